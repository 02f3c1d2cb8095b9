/* rank.h: all that one rank opens to calibrate a block, without a run around it: for plans and benchmarks. Sums over ranks are left out. */
#ifndef OMNIQUANT_RANK_H
#define OMNIQUANT_RANK_H

#include "record.h"

struct rank {
  struct world world; /* of one rank */
  struct kernels *k;
  struct shard shard;
  struct block block;
  struct let_statistics statistics;
  struct target target;
  struct learner learner;
  struct record_room room;
  char *image; /* [model->image_bytes] of random weights, made by rank_fill; else NULL */
};

/* Opens the block, and then what learns and packs it, of the rank that has the most samples of a run on so many. `model`, `recipe` and `k` are the caller's and
 * must outlive it. Errors: ERROR_WORK (memory), ERROR_INPUT for a recipe that the model cannot follow; rank_close even then. */
int rank_open_block(struct rank *rank, const struct model *model, const struct recipe *recipe, struct kernels *k, struct error *error);
int rank_open_learner(struct rank *rank, const struct recipe *recipe, int ranks, struct error *error);
void rank_close(struct rank *rank);

/* Makes an image of random weights, which block_load takes, and random samples, the same in both streams. Errors: ERROR_WORK (memory). */
int rank_fill(struct rank *rank, struct error *error);

#endif
