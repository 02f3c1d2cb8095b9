/* export_folder.h: a folder in the making: filled under a name that cannot be guessed, synced and given its own name, or removed. */
#ifndef OMNIQUANT_EXPORT_FOLDER_H
#define OMNIQUANT_EXPORT_FOLDER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct export_folder {
  char *path, *temporary; /* owned; temporary is NULL when there is nothing to remove */
};

/* ERROR_INPUT if something has the name already; nothing is made. */
int export_folder_check(const char *path, struct error *error);

/* Makes the temporary folder, beside where the folder will be. ERROR_INPUT if something has its name already, or it cannot be made there. */
int export_folder_open(struct export_folder *folder, const char *path, struct error *error);

/* Writes a small file. */
int export_folder_write(const struct export_folder *folder, const char *name, const void *bytes, size_t count, struct error *error);

/* Copies a file, if there is one: the same bytes under the same name. */
int export_folder_copy(const struct export_folder *folder, const char *from, const char *name, struct error *error);

/* Gives the folder its name, unless something has it by now. */
int export_folder_commit(struct export_folder *folder, struct error *error);

/* Removes what was not committed, and frees. A zeroed folder is allowed. */
void export_folder_close(struct export_folder *folder);

/* A file of the folder, written at any place. Errors of all: ERROR_WORK. */
struct export_file {
  char *path; /* owned */
  int fd;     /* -1: not open */
};
int export_file_open(struct export_file *file, const struct export_folder *folder, const char *name, struct error *error);
int export_file_write(const struct export_file *file, int64_t offset, const void *bytes, size_t count, struct error *error);
int export_file_finish(struct export_file *file, struct error *error); /* syncs and closes */
void export_file_close(struct export_file *file);                      /* gives up one that is open; others are allowed */

#endif
