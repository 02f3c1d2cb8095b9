/* file.h: files that are read safely and written whole: reads outlast the hiccups of network file systems and notice a file that changes
 * under them; what is written appears under its name whole, synced to the disk, or not at all. */
#ifndef OMNIQUANT_FILE_H
#define OMNIQUANT_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "error.h"

/* FOLDER/NAME, freed by the caller; NULL with the error set (ERROR_WORK: memory). */
char *path_join(const char *folder, const char *name, struct error *error);

/* ---- reading ---- */

/* An open regular file, and what it was when it was opened. */
struct input_file {
  const char *path; /* the caller's, must outlive the file */
  int fd;           /* -1: not open */
  size_t bytes;     /* size */
  struct timespec modified;
};

/* Opens a regular file. Errors: ERROR_INPUT; fd is -1 then. */
int input_open(struct input_file *file, const char *path,
               bool *missing, /* receives whether there is no such file, without error; or NULL */
               struct error *error);

/* Reads bytes [offset, offset + count), which lie inside the file. Short reads go on, failed ones are tried again for a while. Any thread.
 * Errors: ERROR_WORK for a file that cannot be read, ERROR_INPUT for one whose size or time of change is not what it was. */
int input_read(const struct input_file *file, uint64_t offset, size_t count, void *to, struct error *error);

/* A file that is not open may be closed. */
void input_close(struct input_file *file);

/* ---- writing ---- */

/* A file in the making, under a name that cannot be guessed, in the folder of its final name. */
struct output_file {
  char *path, *temporary; /* owned */
  int fd;
};

/* Errors of all of these: ERROR_WORK, after which nothing is left of the file. */
int output_open(struct output_file *file, const char *path, struct error *error);
int output_write(struct output_file *file, const void *bytes, size_t count, struct error *error);
/* Syncs the file, gives it its name, over an older one, and syncs the folder: a crash leaves the old file or the whole new one. */
int output_commit(struct output_file *file, struct error *error);
/* Gives up a file that was opened and not committed; nothing to do after a failure. */
void output_abandon(struct output_file *file);

/* All of this for bytes that are in memory. */
int file_write(const char *path, const void *bytes, size_t count, struct error *error);

/* Puts the names in a folder on the disk. `path` is what the message names. Errors: ERROR_WORK. */
int folder_sync(const char *folder, const char *path, struct error *error);

/* Removes what writers that were killed left in a folder. Only for who knows that no one writes there now. */
void folder_sweep(const char *folder);

/* Makes a folder and those above it. Errors: ERROR_INPUT. */
int folder_make(const char *folder, size_t *made, /* receives bytes of the path to the first that was not there before, 0 for none */
                struct error *error);

/* Removes the folders that folder_make made, as far as nothing is in them. */
void folder_unmake(const char *folder, size_t made);

/* A folder that one process at a time may write, by a file in it that is locked while the process lives and goes when it unlocks.
 * Zero-initialized: not locked. */
#define FOLDER_LOCK_NAME ".omniquant-lock"
struct folder_lock {
  char *path;
  int fd;
};

/* Waits a few seconds for a process that is just ending. A file system that has no locks: none is taken, without error.
 * Errors: ERROR_INPUT when another process holds it or its file cannot be made. */
int folder_lock(const char *folder, struct folder_lock *lock, struct error *error);
void folder_unlock(struct folder_lock *lock);

/* Bytes that may still be written where the folder is or will be; -1: unknown. */
int64_t folder_free_bytes(const char *folder);

#endif
