/* block_file.h: one quantized block as one HDF5 file, group /block (docs/format.md). Names, times of writing and links are the store's. */
#ifndef OMNIQUANT_BLOCK_FILE_H
#define OMNIQUANT_BLOCK_FILE_H

#include "error.h"
#include "hdf5_util.h"
#include "store.h"

/* Makes the file in memory. `path` is for messages. Errors: ERROR_WORK, also for a record that could not be read back; no bytes then. */
int block_file_make(const char *path, const struct block_record *record, const struct store_info *info, struct hdf5_image *image,
                    struct error *error);

/* Reads the file of block `index`, every checksum, shape and number checked; nothing larger than the file is allocated.
 * Linears and arrays come in order of name. On failure (ERROR_INPUT) the record and info are empty. */
int block_file_read(
    const char *path, int index, struct block_record *record, /* NULL: only info is read */
    struct store_info *info, /* receives the run's attributes, store_info_free; without blocks in files of earlier versions */
    struct error *error);

#endif
