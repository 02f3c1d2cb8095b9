/* hdf5_util.h: what every use of HDF5 here shares: quiet error stacks, safe opening, attributes, messages with the system's reason. */
#ifndef OMNIQUANT_HDF5_UTIL_H
#define OMNIQUANT_HDF5_UTIL_H

#include <hdf5.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

/* Brackets every run of HDF5 calls: stops HDF5 from printing its errors, and keeps other threads out where the library was built without
 * thread safety. Does not nest. */
void hdf5_enter(void);
void hdf5_leave(void);

/* Where a message comes from and goes to. */
struct hdf5_site {
  const char *path; /* the file, as the message names it */
  struct error *error;
};

/* Set the error after a failed HDF5 call, with the reason on HDF5's error stack, so before any further call (closing too).
 * `object` names the dataset or attribute; NULL for the file itself. Return the code: ERROR_WORK for writing, ERROR_INPUT for reading. */
int hdf5_write_failed(const struct hdf5_site *site, const char *object);
int hdf5_read_failed(const struct hdf5_site *site, const char *object);

/* Opens a regular file to read; negative with the error set if it is not there, or not HDF5 as this program writes it (hdf5_check.h). */
hid_t hdf5_open(const struct hdf5_site *site, int64_t *bytes /* receives the file's size */);

/* A file is made in memory and written by ourselves: HDF5 cannot close a file whose disk is full, and crashes at exit for it. */
struct hdf5_image {
  void *bytes; /* freed by the caller */
  size_t length;
};

/* Creates a file in the format whose metadata carries checksums; negative with the error set on failure. */
hid_t hdf5_create(const struct hdf5_site *site, struct hdf5_image *image /* filled by hdf5_finish, must live until then */);

/* Closes a file that was created, and gives its bytes to the image. */
int hdf5_finish(const struct hdf5_site *site, hid_t file, struct hdf5_image *image);

/* Closes any identifier; negative ones, from calls that failed, are ignored. */
void hdf5_close(hid_t id);

/* Write a scalar attribute of the object `where`, a path from `base` ("." for base itself). Text is a UTF-8 string of fixed length. */
int hdf5_write_integer(const struct hdf5_site *site, hid_t base, const char *where, const char *name, int64_t value);
int hdf5_write_real(const struct hdf5_site *site, hid_t base, const char *where, const char *name, double value);
int hdf5_write_text(const struct hdf5_site *site, hid_t base, const char *where, const char *name, const char *value);

/* A group of few attributes, which are kept in the object's header, where a checksum covers them; negative with the error set. */
hid_t hdf5_make_group(const struct hdf5_site *site, hid_t base, const char *name);

/* Opens a group that lies in this file, not behind a link out of it; negative with the error set. */
hid_t hdf5_open_group(const struct hdf5_site *site, hid_t base, const char *name);

bool hdf5_has_attribute(hid_t base, const char *name);

/* Read one back, its type and shape checked. */
int hdf5_read_integer(const struct hdf5_site *site, hid_t base, const char *where, const char *name, /* as above */
                      int64_t min, int64_t max,                                                      /* values allowed */
                      int64_t *value);
int hdf5_read_real(const struct hdf5_site *site, hid_t base, const char *where, const char *name, double *value);
int hdf5_read_text(const struct hdf5_site *site, hid_t base, const char *where, const char *name,
                   char **value /* receives a copy, freed by the caller */);

#endif
