/* inspect.h: what a store holds, as a table or as JSON. */
#ifndef OMNIQUANT_INSPECT_H
#define OMNIQUANT_INSPECT_H

#include <stdbool.h>

#include "error.h"

/* Prints the run's attributes and, a line a block, losses, the parameters kept, bits a weight and seconds. No MPI. */
int inspect(const char *folder, /* store */
            bool json,          /* one JSON object on stdout instead of a table */
            struct error *error);

#endif
