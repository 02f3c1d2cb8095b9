/* fuzz.c: watching what the code under test says and allocates, and the files it is given. */
#include "fuzz.h"

#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void fuzz_expect(bool condition, const char *words) {
  if (condition) return;
  fprintf(stderr, "expected but not so: %s\n", words);
  abort();
}

void fuzz_expect_refusal(int code, const struct error *error) {
  if (getenv("FUZZ_SAY")) fprintf(stderr, "refused: %s\n", error->message);
  if (code != ERROR_INPUT || error->code != code) fprintf(stderr, "code %d, recorded %d: '%s'\n", code, error->code, error->message);
  fuzz_expect(code == ERROR_INPUT && error->code == code, "what is refused is bad input");
  fuzz_expect(*error->message != 0, "a refusal has a message");
  for (const unsigned char *c = (const unsigned char *)error->message; *c; c++)
    fuzz_expect(*c >= 0x20 && *c != 0x7f && !(c[0] == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0), "a message has no control characters");
}

/* ---- allocations ---- */

static size_t limit_bytes; /* 0: not watched */

/* Of the sanitizer's runtime, where there is one. */
int __sanitizer_install_malloc_and_free_hooks(void (*made)(const volatile void *, size_t), void (*freed)(const volatile void *))
    __attribute__((weak));

static void on_malloc(const volatile void *memory, size_t bytes) {
  (void)memory;
  if (limit_bytes == 0 || bytes <= limit_bytes) return;
  limit_bytes = 0;
  fprintf(stderr, "%zu bytes allocated at once\n", bytes);
  fuzz_expect(false, "no allocation beyond what the file's size justifies");
}

static void on_free(const volatile void *memory) {
  (void)memory;
}

void fuzz_begin(size_t bytes) {
  static bool installed;
  if (!installed && __sanitizer_install_malloc_and_free_hooks) __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
  installed = true;
  limit_bytes = ((size_t)16 << 20) + 16 * bytes;
}

void fuzz_end(void) {
  limit_bytes = 0;
}

/* ---- files ---- */

struct fuzz_part fuzz_take(struct fuzz_part *rest) {
  struct fuzz_part part = {rest->bytes, 0};
  if (rest->size < 4) {
    rest->size = 0;
    return part;
  }
  size_t length = rest->bytes[0] | (size_t)rest->bytes[1] << 8 | (size_t)rest->bytes[2] << 16 | (size_t)rest->bytes[3] << 24;
  part = (struct fuzz_part){rest->bytes + 4, length < rest->size - 4 ? length : rest->size - 4};
  rest->bytes += 4 + part.size;
  rest->size -= 4 + part.size;
  return part;
}

static char folder[400];

static int remove_one(const char *path, const struct stat *status, int type, struct FTW *position) {
  (void)status, (void)type, (void)position;
  return remove(path);
}

static void folder_remove(void) {
  nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

const char *fuzz_folder(void) {
  if (*folder) return folder;
  const char *parent = getenv("TMPDIR");
  snprintf(folder, sizeof folder, "%.300s/omniquant-fuzz-XXXXXX", parent ? parent : "/tmp");
  fuzz_expect(mkdtemp(folder) != NULL, "a folder for temporary files");
  atexit(folder_remove);
  return folder;
}

void fuzz_write(const char *name, struct fuzz_part part) {
  char path[500];
  snprintf(path, sizeof path, "%s/%s", fuzz_folder(), name);
  if (!part.bytes) {
    unlink(path);
    return;
  }
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  fuzz_expect(fd >= 0 && write(fd, part.bytes, part.size) == (ssize_t)part.size && close(fd) == 0, "room for temporary files");
}

char *fuzz_text(struct fuzz_part part) {
  char *text = malloc(part.size + 1);
  fuzz_expect(text != NULL, "memory for the input");
  if (part.size) memcpy(text, part.bytes, part.size);
  text[part.size] = 0;
  return text;
}
