/* hdf5_check.h: looking through a stranger's HDF5 file before the HDF5 library does, which crashes on many a malformed one.
 * What is accepted is the small part of the format that this program and tools/tokenize.py write (with HDF5's "v110" bounds), all else is
 * refused by name: groups of hard and external links, integers, floats and texts of fixed length as attributes, and datasets stored whole.
 * Every structure is followed, its checksum and its numbers are checked, and no byte of the file may belong to two of them. What
 * attributes and datasets are called and hold is not looked at here. */
#ifndef OMNIQUANT_HDF5_CHECK_H
#define OMNIQUANT_HDF5_CHECK_H

#include <stddef.h>
#include <stdint.h>

#include "hdf5_util.h"

/* Errors: ERROR_INPUT for a file that is not there, is no regular file, or not of that kind; ERROR_WORK when it cannot be read
 * (file.h). */
int hdf5_check(const struct hdf5_site *site, int64_t *bytes /* receives the file's size */);

/* The checksum of HDF5's metadata: Bob Jenkins' lookup3. */
uint32_t hdf5_checksum(const void *bytes, size_t length);

#endif
