/* file.c: checked reading and writing of whole files. */
#include "file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { TRIES = 4, FIRST_PAUSE_MS = 50, PAUSE_GROWTH = 8 }; /* of a failing read: 0.05 + 0.4 + 3.2 s in all */

static const char TEMPORARY_PREFIX[] = ".omniquant-", TEMPORARY_SUFFIX[] = ".tmp";

char *path_join(const char *folder, const char *name, struct error *error) {
  char *path;
  if (asprintf(&path, "%s/%s", folder, name) >= 0) return path;
  error_set(error, ERROR_WORK, "%s: out of memory", folder);
  return NULL;
}

/* ---- reading ---- */

int input_open(struct input_file *file, const char *path, bool *missing, struct error *error) {
  struct stat status;
  *file = (struct input_file){.path = path, .fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)}; /* not to hang on a pipe */
  if (file->fd < 0 && errno == ENOENT && missing) {
    *missing = true;
    return ERROR_INPUT;
  }
  if (file->fd < 0 || fstat(file->fd, &status) != 0) {
    error_set(error, ERROR_INPUT, "%s: %s", path, strerror(errno));
  } else if (!S_ISREG(status.st_mode)) {
    error_set(error, ERROR_INPUT, "%s: is not a regular file", path);
  } else {
    file->bytes = (size_t)status.st_size;
    file->modified = status.st_mtim;
    return 0;
  }
  input_close(file);
  return error->code;
}

/* Whether the file is what it was. */
static int unchanged(const struct input_file *file, struct error *error) {
  struct stat status;
  if (fstat(file->fd, &status) != 0) return error_set(error, ERROR_WORK, "%s: cannot be read: %s", file->path, strerror(errno));
  if ((size_t)status.st_size == file->bytes && status.st_mtim.tv_sec == file->modified.tv_sec &&
      status.st_mtim.tv_nsec == file->modified.tv_nsec)
    return 0;
  return error_set(error, ERROR_INPUT, "%s: was changed while it was in use; leave it as it is while the program runs", file->path);
}

/* What a network file system may fail with for a moment. */
static bool passes(int reason) {
  return reason == EIO || reason == ESTALE || reason == ETIMEDOUT || reason == EAGAIN;
}

int input_read(const struct input_file *file, uint64_t offset, size_t count, void *to, struct error *error) {
  size_t done = 0;
  long pause_ms = FIRST_PAUSE_MS;
  for (int tries = 0; done < count;) {
    ssize_t got = pread(file->fd, (char *)to + done, count - done, (off_t)(offset + done));
    if (got > 0) {
      done += (size_t)got;
      tries = 0;
      continue;
    }
    if (got < 0 && errno == EINTR) continue;
    if (got == 0 && unchanged(file, error)) return error->code; /* cut short */
    int reason = got == 0 ? EIO : errno;                        /* an end before the end */
    if (!passes(reason) || ++tries == TRIES) return error_set(error, ERROR_WORK, "%s: cannot be read: %s", file->path, strerror(reason));
    nanosleep(&(struct timespec){.tv_sec = pause_ms / 1000, .tv_nsec = pause_ms % 1000 * 1000000}, NULL);
    pause_ms *= PAUSE_GROWTH;
  }
  return unchanged(file, error);
}

void input_close(struct input_file *file) {
  if (file->fd >= 0) close(file->fd);
  file->fd = -1;
}

/* ---- writing ---- */

static int write_failed(struct output_file *file, const char *what, struct error *error) {
  error_set(error, ERROR_WORK, "%s: cannot be %s: %s", file->path ? file->path : "output", what, strerror(errno));
  output_abandon(file);
  return error->code;
}

/* FOLDER/.omniquant-RANDOM.tmp, FOLDER being that of the path. */
static char *temporary_name(const char *path) {
  uint64_t random = 0;
  char *name;
  const char *slash = strrchr(path, '/');
  if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) return NULL;
  int folder = slash ? (int)(slash - path) + 1 : 0;
  return asprintf(&name, "%.*s%s%016llx%s", folder, path, TEMPORARY_PREFIX, (unsigned long long)random, TEMPORARY_SUFFIX) < 0 ? NULL : name;
}

int output_open(struct output_file *file, const char *path, struct error *error) {
  *file = (struct output_file){.path = strdup(path), .temporary = temporary_name(path), .fd = -1};
  if (!file->path || !file->temporary) {
    error_set(error, ERROR_WORK, "%s: out of memory", path);
    output_abandon(file);
    return error->code;
  }
  file->fd = open(file->temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
  return file->fd < 0 ? write_failed(file, "written", error) : 0;
}

int output_write(struct output_file *file, const void *bytes, size_t count, struct error *error) {
  for (size_t done = 0; done < count;) {
    ssize_t written = write(file->fd, (const char *)bytes + done, count - done);
    if (written > 0) done += (size_t)written;
    if (written == 0) errno = EIO;
    if (written == 0 || (written < 0 && errno != EINTR)) return write_failed(file, "written", error);
  }
  return 0;
}

/* EINVAL: a file system that cannot sync folders. */
int folder_sync(const char *folder, const char *path, struct error *error) {
  int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL))
    error_set(error, ERROR_WORK, "%s: cannot be written to disk: %s", path, strerror(errno));
  if (fd >= 0) close(fd);
  return error->code;
}

/* A name is on the disk when its folder is. */
static int name_sync(const char *path, struct error *error) {
  char *folder = strdup(path), *slash = folder ? strrchr(folder, '/') : NULL;
  if (!folder) return error_set(error, ERROR_WORK, "%s: out of memory", path);
  if (slash) slash[slash == folder] = 0;
  folder_sync(slash ? folder : ".", path, error);
  free(folder);
  return error->code;
}

int output_commit(struct output_file *file, struct error *error) {
  if (fsync(file->fd) != 0) return write_failed(file, "written", error);
  int fd = file->fd;
  file->fd = -1;
  if (close(fd) != 0) return write_failed(file, "written", error);
  if (rename(file->temporary, file->path) != 0) return write_failed(file, "named", error);
  free(file->temporary);
  file->temporary = NULL;
  int failed = name_sync(file->path, error);
  output_abandon(file);
  return failed;
}

void output_abandon(struct output_file *file) {
  if (file->fd >= 0) close(file->fd);
  if (file->temporary) unlink(file->temporary);
  free(file->temporary);
  free(file->path);
  *file = (struct output_file){.fd = -1};
}

int file_write(const char *path, const void *bytes, size_t count, struct error *error) {
  struct output_file file;
  if (output_open(&file, path, error) || output_write(&file, bytes, count, error)) return error->code;
  return output_commit(&file, error);
}

static bool is_temporary(const char *name) {
  size_t length = strlen(name), suffix = sizeof TEMPORARY_SUFFIX - 1;
  return strncmp(name, TEMPORARY_PREFIX, sizeof TEMPORARY_PREFIX - 1) == 0 && length > suffix &&
         strcmp(name + length - suffix, TEMPORARY_SUFFIX) == 0;
}

void folder_sweep(const char *folder) {
  DIR *stream = opendir(folder);
  struct dirent *entry;
  while (stream && (entry = readdir(stream)))
    if (is_temporary(entry->d_name)) unlinkat(dirfd(stream), entry->d_name, 0);
  if (stream) closedir(stream);
}

int folder_make(const char *folder, size_t *made, struct error *error) {
  char *path = strdup(folder);
  int failed = path ? 0 : error_set(error, ERROR_WORK, "%s: out of memory", folder);
  *made = 0;
  for (size_t i = 1; !failed && i <= strlen(folder); i++) {
    if (folder[i] != '/' && folder[i] != 0) continue;
    path[i] = 0;
    if (mkdir(path, 0777) == 0) {
      if (!*made) *made = i;
    } else if (errno != EEXIST) {
      failed = error_set(error, ERROR_INPUT, "%s: cannot be made: %s; choose another --output", path, strerror(errno));
    }
    path[i] = folder[i];
  }
  free(path);
  return failed;
}

void folder_unmake(const char *folder, size_t made) {
  char *path = made ? strdup(folder) : NULL;
  for (size_t i = path ? strlen(path) : 0; i >= made && i > 0; i--) {
    if (folder[i] != '/' && folder[i] != 0) continue;
    path[i] = 0;
    if (rmdir(path) != 0) break;
  }
  free(path);
}

/* Whether the lock file is still the one that stands in the folder: who unlocks removes it. */
static bool lock_stands(const struct folder_lock *lock) {
  struct stat ours, there;
  return fstat(lock->fd, &ours) == 0 && stat(lock->path, &there) == 0 && ours.st_ino == there.st_ino && ours.st_dev == there.st_dev;
}

/* One try: 0 done (or no locks here), else the reason. */
static int lock_try(struct folder_lock *lock) {
  lock->fd = open(lock->path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
  if (lock->fd < 0) return errno;
  if (flock(lock->fd, LOCK_EX | LOCK_NB) == 0 && lock_stands(lock)) return 0;
  int reason = errno;
  bool held = reason == EWOULDBLOCK || !lock_stands(lock);
  if (!held) return 0; /* the file system has no locks */
  close(lock->fd);
  return EWOULDBLOCK;
}

int folder_lock(const char *folder, struct folder_lock *lock, struct error *error) {
  enum { LOCK_TRIES = 20, PAUSE_MS = 100 };
  int reason = EWOULDBLOCK;
  *lock = (struct folder_lock){path_join(folder, FOLDER_LOCK_NAME, error), -1};
  if (!lock->path) return error->code;
  for (int i = 0; i < LOCK_TRIES && reason == EWOULDBLOCK; i++) {
    if (i > 0) nanosleep(&(struct timespec){.tv_nsec = PAUSE_MS * 1000000}, NULL);
    reason = lock_try(lock);
  }
  if (!reason) return 0;
  if (reason == EWOULDBLOCK)
    error_set(error, ERROR_INPUT, "%s: another omniquant is writing here; wait for its end or choose another --output", folder);
  else
    error_set(error, ERROR_INPUT, "%s: cannot be used as output: %s; choose another --output", folder, strerror(reason));
  free(lock->path);
  *lock = (struct folder_lock){0};
  return error->code;
}

void folder_unlock(struct folder_lock *lock) {
  if (!lock->path) return;
  unlink(lock->path);
  close(lock->fd);
  free(lock->path);
  *lock = (struct folder_lock){0};
}

int64_t folder_free_bytes(const char *folder) {
  struct statvfs status;
  int64_t bytes = -1;
  char *path = strdup(folder), *slash = path;
  while (path && slash && statvfs(*path ? path : "/", &status) != 0) { /* not made yet: the folder that it will be made in */
    slash = strrchr(path, '/');
    if (slash) *slash = 0;
  }
  if (path && (slash || statvfs(".", &status) == 0)) bytes = (int64_t)status.f_bavail * (int64_t)status.f_frsize;
  free(path);
  return bytes;
}
