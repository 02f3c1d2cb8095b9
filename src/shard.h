/* shard.h: which samples a rank owns, and sums over samples that come out the same bit for bit however they are dealt.
 *
 * Step i of an epoch takes samples [i * batch, (i + 1) * batch), the last one what is left. Its slots are dealt to the ranks in equal runs, and
 * a rank owns the samples that its slots meet. The sum over a step's slots is taken in a binary tree of halves: for a world size that is
 * a power of two a rank's run is one node of that tree, which it sums by itself, and world_allreduce goes on from there. */
#ifndef OMNIQUANT_SHARD_H
#define OMNIQUANT_SHARD_H

#include <stdint.h>

#include "kernels.h"
#include "world.h"

struct shard {
  int samples, batch;
  int rank, size;
  int steps;                /* of an epoch */
  int slot_begin, slot_end; /* this rank's slots of a full step */
  int count;                /* samples this rank owns; its i-th in order is local index i */
};

void shard_init(struct shard *shard, int samples, int batch, int rank, int size);

/* The rank that owns a sample, and the global number of this rank's i-th. */
int shard_owner(const struct shard *shard, int sample);
int shard_sample(const struct shard *shard, int local);

/* Samples in a step, over all ranks. */
int shard_step_samples(const struct shard *shard, int step);

/* Floats that shard_step_sum needs beside its result. */
size_t shard_scratch(const struct shard *shard, int64_t count);

/* What is summed: assigns a sample's values to out. */
typedef void shard_leaf(void *context, int local, float *out);

struct step_sum {
  shard_leaf *leaf;
  void *context;
  struct kernels *k;
  struct world *world;
  float *out;     /* [count], device memory: receives the sum over the step's samples on all ranks, zero where there is none */
  float *scratch; /* [shard_scratch], device memory */
  int64_t count;

  /* With `rest`, a rank's last sample is made in two parts: `begin` makes its values [0, early), which are summed on the lane while `rest` makes the
   * others. The same bits come of it. */
  shard_leaf *begin, *rest;
  int64_t early;
  struct lane *lane;
};

/* Collective. */
void shard_step_sum(const struct shard *shard, int step, const struct step_sum *sum);

#endif
