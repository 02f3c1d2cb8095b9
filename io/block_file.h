/* block_file.h: one quantized block as one HDF5 file, group /block (docs/format.md). Names, times of writing and links are the store's. */
#ifndef OMNIQUANT_BLOCK_FILE_H
#define OMNIQUANT_BLOCK_FILE_H

#include "error.h"
#include "hdf5_util.h"
#include "store.h"

/* Makes the file in memory. `path` is for messages. Errors: ERROR_WORK, also for a record that could not be read back; no bytes then. */
int block_file_make(const char *path, const struct block_record *record, const struct store_info *info, struct hdf5_image *image,
                    struct error *error);

/* Of which run a file is. `info` receives the run's attributes, store_info_free; without blocks in files of earlier versions. On failure
 * (ERROR_INPUT) it is empty. */
int block_file_read_info(const char *path, struct store_info *info, struct error *error);

/* Opens the file of block `index`, every checksum, shape and number checked of what is read; nothing larger than the file is allocated. The
 * record receives linears and folded arrays in order of name; linears without what they point to, and not what calibration learned. On
 * failure (ERROR_INPUT) all that is received is empty. */
int block_file_open(const char *path, int index, struct block_file **file, /* receives the file, block_file_close (store.h) */
                    struct block_record *record, struct store_info *info, struct error *error);

/* Adds to its record what calibration learned, in order of name. */
int block_file_read_calibration(struct block_file *file, struct block_record *record, struct error *error);

#endif
