/* replay.c FILE|FOLDER...: runs a harness once on each of the files, as libFuzzer would. A finding ends it by a signal. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"

/* Neither HDF5 nor what is broken off in the middle of a refusal is asked for leaks here: test_store.c says the same. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
  return "leak:libhdf5";
}

static int run_file(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END) != 0) return -1;
  long length = ftell(file);
  unsigned char *bytes = malloc((size_t)length + 1), *exact = malloc(length ? (size_t)length : 1);
  rewind(file);
  bool good = bytes && exact && fread(bytes, 1, (size_t)length, file) == (size_t)length;
  fclose(file);
  if (good) {
    memcpy(exact, bytes, (size_t)length); /* of exactly the input's size, so that AddressSanitizer sees a read beyond it */
    LLVMFuzzerTestOneInput(exact, (size_t)length);
  }
  free(bytes);
  free(exact);
  return good ? 1 : -1;
}

/* The number of inputs, or -1. */
static int run_path(const char *path) {
  struct stat status;
  if (stat(path, &status) != 0) return -1;
  if (!S_ISDIR(status.st_mode)) return run_file(path);
  DIR *stream = opendir(path);
  int count = 0;
  if (!stream) return -1;
  for (struct dirent *entry; count >= 0 && (entry = readdir(stream));) {
    char name[4096];
    if (entry->d_name[0] == '.') continue;
    snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
    int ran = run_file(name);
    count = ran < 0 ? ran : count + ran;
  }
  closedir(stream);
  return count;
}

int main(int argc, char **argv) {
  int count = 0;
  for (int i = 1; i < argc; i++) {
    int ran = run_path(argv[i]);
    if (ran < 0) {
      fprintf(stderr, "%s: %s cannot be read\n", argv[0], argv[i]);
      return 2;
    }
    count += ran;
  }
  printf("%d inputs\n", count);
  return count > 0 ? 0 : 2;
}
