/* verify.h: whether a store is whole. */
#ifndef OMNIQUANT_VERIFY_H
#define OMNIQUANT_VERIFY_H

#include <stdbool.h>

#include "error.h"

struct verify_options {
  const char *folder; /* store */
  bool repair;        /* a master file that is damaged or missing is made anew from what the blocks tell */
  bool json;          /* one JSON object on stdout instead of lines */
};

/* Reads every block: checksums, shapes against the model's, bits and groups against the recipe's, and whether it is of this run. Prints which
 * are whole. Errors: ERROR_WORK for a store with blocks that are damaged or missing, ERROR_INPUT where there is no store. No MPI. */
int verify(const struct verify_options *options, struct error *error);

#endif
