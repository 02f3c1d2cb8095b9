/* tokens.h: a token file: HDF5 with one dataset `tokens` (uint32), as tools/tokenize.py writes it. Other integers are read too, but no
 * other storage than whole chunks or one piece, uncompressed, in the layout of HDF5 1.10 (hdf5_check.h). */
#ifndef OMNIQUANT_TOKENS_H
#define OMNIQUANT_TOKENS_H

#include <stdint.h>

#include "error.h"

struct tokens; /* an open token file */

/* Opens the file and checks that `tokens` is a one-dimensional integer dataset. Errors: ERROR_INPUT, *tokens is NULL. */
int tokens_open(const char *path, struct tokens **tokens, struct error *error);

/* Number of tokens in the file. */
int64_t tokens_count(const struct tokens *tokens);

/* Reads tokens [first, first + count) and checks each against the vocabulary.
 * Errors: ERROR_INPUT naming the file, the position and the id for a range beyond the end or an id >= vocabulary. */
int tokens_read(struct tokens *tokens, int64_t first, int64_t count, int64_t vocabulary, /* ids must be below it */
                int32_t *ids,                                                            /* [count] */
                struct error *error);

/* SHA-256 over all ids as little-endian uint32, in hexadecimal: the identity of a calibration text. Reads in pieces. */
int tokens_sha256(struct tokens *tokens, char hex[65], struct error *error);

/* Closes and frees; NULL is allowed. */
void tokens_close(struct tokens *tokens);

#endif
