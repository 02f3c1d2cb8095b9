/* scratch.h: a temporary folder for tests that write files. */
#ifndef OMNIQUANT_SCRATCH_H
#define OMNIQUANT_SCRATCH_H

#include <dirent.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct path {
  char text[400];
};

static inline int scratch_remove_one(const char *path, const struct stat *status, int type, struct FTW *position) {
  (void)status, (void)type, (void)position;
  return remove(path);
}

/* A new folder under $TMPDIR or /tmp. */
static inline struct path scratch_init(void) {
  struct path folder;
  const char *parent = getenv("TMPDIR");
  snprintf(folder.text, sizeof folder.text, "%.300s/omniquant-test-XXXXXX", parent ? parent : "/tmp");
  if (!mkdtemp(folder.text)) abort();
  return folder;
}

static inline void scratch_free(const struct path *folder) {
  nftw(folder->text, scratch_remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static inline struct path scratch_path(const struct path *folder, const char *name) {
  struct path path;
  if (snprintf(path.text, sizeof path.text, "%s/%s", folder->text, name) >= (int)sizeof path.text) abort();
  return path;
}

static inline void scratch_write(const char *path, const void *bytes, size_t length) {
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(bytes, 1, length, file) != length || fclose(file) != 0) abort();
}

/* Reads a whole file; freed by the caller. */
static inline unsigned char *scratch_read(const char *path, size_t *length) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END) != 0) abort();
  *length = (size_t)ftell(file);
  unsigned char *bytes = malloc(*length + 1);
  rewind(file);
  if (!bytes || fread(bytes, 1, *length, file) != *length) abort();
  fclose(file);
  return bytes;
}

/* Number of names in a folder; -1 if it is not there. */
static inline int scratch_count(const char *path) {
  int count = 0;
  DIR *stream = opendir(path);
  if (!stream) return -1;
  for (struct dirent *entry; (entry = readdir(stream));) count += strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
  closedir(stream);
  return count;
}

#endif
