/* export_folder.c: files under a temporary folder, and its renaming. */
#include "export_folder.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"

/* ---- files ---- */

int export_file_open(struct export_file *file, const struct export_folder *folder, const char *name, struct error *error) {
  file->fd = -1;
  file->path = path_join(folder->temporary, name, error);
  if (!file->path) return error->code;
  file->fd = open(file->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file->fd >= 0) return 0;
  error_set(error, ERROR_WORK, "%s: %s", file->path, strerror(errno));
  export_file_close(file);
  return error->code;
}

int export_file_write(const struct export_file *file, int64_t offset, const void *bytes, size_t count, struct error *error) {
  const char *from = bytes;
  while (count > 0) {
    ssize_t written = pwrite(file->fd, from, count, offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0)
      return error_set(error, ERROR_WORK, "%s: %s; nothing is left of the export", file->path,
                       written < 0 ? strerror(errno) : "not written");
    from += written;
    offset += written;
    count -= (size_t)written;
  }
  return 0;
}

int export_file_finish(struct export_file *file, struct error *error) {
  int failed = fsync(file->fd) ? errno : 0;
  if (close(file->fd) && !failed) failed = errno;
  file->fd = -1;
  if (failed) error_set(error, ERROR_WORK, "%s: %s; nothing is left of the export", file->path, strerror(failed));
  export_file_close(file);
  return error->code;
}

void export_file_close(struct export_file *file) {
  if (file->path && file->fd >= 0) close(file->fd);
  free(file->path);
  *file = (struct export_file){.fd = -1};
}

int export_folder_write(const struct export_folder *folder, const char *name, const void *bytes, size_t count, struct error *error) {
  struct export_file file;
  if (export_file_open(&file, folder, name, error)) return error->code;
  if (export_file_write(&file, 0, bytes, count, error))
    export_file_close(&file);
  else
    export_file_finish(&file, error);
  return error->code;
}

int export_folder_copy(const struct export_folder *folder, const char *from, const char *name, struct error *error) {
  enum { PIECE = 1 << 16 };
  char piece[PIECE], *path = path_join(from, name, error);
  struct export_file file = {.fd = -1};
  struct input_file in = {.fd = -1};
  bool missing = false;
  if (!path || input_open(&in, path, &missing, error) || export_file_open(&file, folder, name, error)) goto done;
  for (size_t offset = 0; offset < in.bytes && !error->code; offset += PIECE) {
    size_t count = in.bytes - offset < PIECE ? in.bytes - offset : PIECE;
    if (!input_read(&in, offset, count, piece, error)) export_file_write(&file, (int64_t)offset, piece, count, error);
  }
  if (!error->code) export_file_finish(&file, error);
done:
  export_file_close(&file);
  input_close(&in);
  free(path);
  return error->code;
}

/* ---- the folder ---- */

int export_folder_check(const char *path, struct error *error) {
  struct stat status;
  if (!*path) return error_set(error, ERROR_INPUT, "--output: it is empty; name a folder to make");
  if (lstat(path, &status) == 0)
    return error_set(error, ERROR_INPUT, "%s: it is there already; remove it or choose another --output", path);
  return errno == ENOENT ? 0 : error_set(error, ERROR_INPUT, "%s: %s", path, strerror(errno));
}

/* "parent/name" -> "parent/.name.XXXXXX" */
static char *temporary_name(const char *path) {
  char *parent = strdup(path), *name = strdup(path), *result = NULL;
  if (parent && name && asprintf(&result, "%s/.%s.XXXXXX", dirname(parent), basename(name)) < 0) result = NULL;
  free(parent);
  free(name);
  return result;
}

int export_folder_open(struct export_folder *folder, const char *path, struct error *error) {
  *folder = (struct export_folder){0};
  if (export_folder_check(path, error)) return error->code;
  char *temporary = temporary_name(path);
  folder->path = strdup(path);
  if (!temporary || !folder->path) {
    free(temporary);
    return error_set(error, ERROR_WORK, "%s: out of memory", path);
  }
  size_t length = strlen(folder->path);
  while (length > 1 && folder->path[length - 1] == '/') folder->path[--length] = 0;
  mode_t mask = umask(0);
  umask(mask);
  if (!mkdtemp(temporary)) {
    error_set(error, ERROR_INPUT, "%s: cannot be made: %s; choose another --output", path, strerror(errno));
    free(temporary);
    return error->code;
  }
  folder->temporary = temporary;
  if (chmod(temporary, 0777 & ~mask)) error_set(error, ERROR_WORK, "%s: %s", temporary, strerror(errno)); /* mkdtemp makes it private */
  return error->code;
}

/* Not over anything, not even an empty folder; file systems that cannot do that at once are asked first. */
static int rename_new(const char *from, const char *to) {
  struct stat status;
  if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) return 0;
  if (errno != EINVAL && errno != ENOSYS) return errno;
  if (lstat(to, &status) == 0) return EEXIST;
  return rename(from, to) ? errno : 0;
}

int export_folder_commit(struct export_folder *folder, struct error *error) {
  if (folder_sync(folder->temporary, folder->temporary, error)) return error->code;
  int failed = rename_new(folder->temporary, folder->path);
  if (failed)
    return error_set(error, failed == EEXIST ? ERROR_INPUT : ERROR_WORK, "%s: %s; nothing is left of the export", folder->path,
                     failed == EEXIST ? "it appeared meanwhile" : strerror(failed));
  free(folder->temporary);
  folder->temporary = NULL;
  char *parent = strdup(folder->path);
  if (!parent) return error_set(error, ERROR_WORK, "%s: out of memory", folder->path);
  folder_sync(dirname(parent), folder->path, error);
  free(parent);
  return error->code;
}

static int remove_one(const char *path, const struct stat *status, int type, struct FTW *position) {
  (void)status, (void)type, (void)position;
  return remove(path);
}

void export_folder_close(struct export_folder *folder) {
  if (folder->temporary) nftw(folder->temporary, remove_one, 16, FTW_DEPTH | FTW_PHYS);
  free(folder->temporary);
  free(folder->path);
  *folder = (struct export_folder){0};
}
