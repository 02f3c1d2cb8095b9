/* target.h: the full-precision stream: each block's output on its own full-precision input, which is what the quantized block is trained
 * towards, and the statistics that LET starts from. Computed once for all recipes of a pass. */
#ifndef OMNIQUANT_TARGET_H
#define OMNIQUANT_TARGET_H

#include "let.h"
#include "samples.h"
#include "shard.h"
#include "stream.h"

struct target {
  struct world *world;
  struct kernels *k;
  struct block *block;
  const struct shard *shard;
  struct stream *stream;             /* polled during the work; may be NULL */
  struct let_statistics *statistics; /* NULL: nobody asks for them */

  struct samples x;      /* this rank's samples, each [T, hidden]; to be placed */
  float *step, *scratch; /* sums over samples */
};

/* The caller sets the fields above the blank line; they must outlive the target. Errors: ERROR_WORK (memory); target_free even then. */
int target_init(struct target *target, struct error *error);
void target_free(struct target *target);

/* Sends x through the loaded block, in place; `observed`: and takes the statistics, if anybody asks for them. Collective. */
void target_pass(struct target *target, bool observed);

#endif
