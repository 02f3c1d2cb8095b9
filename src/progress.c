/* progress.c: the bar and the lines of a long run. */
#include "progress.h"

#include "clock.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { DURATION = 48 };
static const double redraw_seconds = 0.1; /* more often is only flicker */

struct progress {
  const char *label;
  int blocks;
  bool bar;           /* redraw one line; else print lines */
  bool drawn;         /* the cursor stands in a line of ours */
  double start;       /* clock when opened */
  double block_start; /* clock when the current block began */
  double redrawn;     /* clock of the last drawing */
  char tail[96];      /* what the bar tells behind its count */
};

static bool wants_bar(void) {
  const char *asked = getenv("OMNIQUANT_PROGRESS"), *terminal = getenv("TERM");
  if (asked != NULL && strcmp(asked, "bar") == 0) return true;
  if (asked != NULL && strcmp(asked, "lines") == 0) return false;
  return isatty(STDERR_FILENO) && terminal != NULL && strcmp(terminal, "dumb") != 0;
}

/* Columns of the terminal; behind a launcher's pipe only the environment may know. */
static int width(void) {
  struct winsize size;
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  const char *columns = getenv("COLUMNS");
  int value = columns != NULL ? atoi(columns) : 0;
  return value > 0 ? value : 80;
}

/* A time as a person says it: 12s, 5m20s, 3h05m. */
static const char *duration(double seconds, char text[DURATION]) {
  long s = seconds < 0 ? 0 : seconds > 3.6e8 ? 360000000 : lround(seconds);
  if (s < 60)
    snprintf(text, DURATION, "%lds", s);
  else if (s < 3600)
    snprintf(text, DURATION, "%ldm%02lds", s / 60, s % 60);
  else
    snprintf(text, DURATION, "%ldh%02ldm", s / 3600, s / 60 % 60);
  return text;
}

struct progress *progress_open(const char *label, int blocks) {
  struct progress *progress = calloc(1, sizeof *progress);
  if (progress == NULL) return NULL;
  progress->label = label;
  progress->blocks = blocks;
  progress->bar = wants_bar();
  progress->start = progress->block_start = now();
  return progress;
}

/* Draws the line anew: label, bar, count, tail, times; what does not fit is cut at the right, the bar takes what is left over. */
static void draw(struct progress *progress, double done) {
  char elapsed[DURATION], left[DURATION] = "?", text[256], bar[64];
  double seconds = now() - progress->start;
  if (done > 0) duration(seconds * (progress->blocks - done) / done, left);
  int room = width() - 1; /* a full line would wrap on some terminals */
  int length =
      snprintf(text, sizeof text, " %d/%d%s  %s  left %s", (int)done, progress->blocks, progress->tail, duration(seconds, elapsed), left);
  int cells = room - (int)strlen(progress->label) - length - 3;
  cells = cells > 40 ? 40 : cells < 4 ? 0 : cells;
  int full = (int)(cells * done / progress->blocks);
  for (int i = 0; i < cells; i++) bar[i] = i < full ? '#' : '-';
  bar[cells] = '\0';
  char line[512];
  snprintf(line, sizeof line, cells > 0 ? "%s [%s]%s" : "%s%s%s", progress->label, bar, text);
  fprintf(stderr, "\r%.*s\033[K", room < 1 ? 1 : room, line);
  fflush(stderr);
  progress->drawn = true;
  progress->redrawn = now();
}

void progress_epoch(struct progress *progress, int block, int epoch, int epochs, double loss) {
  if (progress == NULL || !progress->bar) return;
  if (progress->drawn && now() - progress->redrawn < redraw_seconds) return;
  int length = snprintf(progress->tail, sizeof progress->tail, "  epoch %d/%d", epoch, epochs);
  if (isfinite(loss)) snprintf(progress->tail + length, sizeof progress->tail - (size_t)length, "  loss %.4g", loss);
  draw(progress, block + (epochs > 0 ? (double)epoch / (epochs + 1) : 0)); /* the last part of a block is measuring and storing */
}

void progress_block(struct progress *progress, int block, const char *text) {
  if (progress == NULL) return;
  double seconds = now() - progress->block_start, elapsed = now() - progress->start;
  char left[DURATION];
  progress->block_start = now();
  if (progress->bar) {
    progress->tail[0] = '\0';
    draw(progress, block + 1);
    return;
  }
  duration(elapsed / (block + 1) * (progress->blocks - block - 1), left);
  fprintf(stderr, "block %d/%d  %s  %.1f s  left %s\n", block + 1, progress->blocks, text, seconds, left);
  fflush(stderr);
}

void progress_close(struct progress *progress) {
  if (progress == NULL) return;
  if (progress->drawn) fputc('\n', stderr);
  free(progress);
}
