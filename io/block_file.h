/* block_file.h: one quantized block as one HDF5 file, group /block (docs/format.md). Names, times of writing and links are the store's. */
#ifndef OMNIQUANT_BLOCK_FILE_H
#define OMNIQUANT_BLOCK_FILE_H

#include "error.h"
#include "store.h"

/* Writes the file, over an old one, and waits until it is on the disk. On failure (ERROR_WORK) nothing is left at `path`. */
int block_file_write(const char *path, const struct block_record *record, struct error *error);

/* Reads the file of block `index`, every checksum, shape and number checked; nothing larger than the file is allocated.
 * Linears and arrays come in order of name. On failure (ERROR_INPUT) the record is empty. */
int block_file_read(const char *path, int index, struct block_record *record, struct error *error);

#endif
