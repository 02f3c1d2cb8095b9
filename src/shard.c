/* shard.c: dealing samples to ranks, and the tree of sums. */
#include "shard.h"

static int first_slot(int batch, int rank, int size) {
  return (int)((int64_t)rank * batch / size);
}

void shard_init(struct shard *shard, int samples, int batch, int rank, int size) {
  *shard = (struct shard){.samples = samples, .batch = batch, .rank = rank, .size = size};
  shard->steps = (samples + batch - 1) / batch;
  shard->slot_begin = first_slot(batch, rank, size);
  shard->slot_end = first_slot(batch, rank + 1, size);
  for (int sample = 0; sample < samples; sample++) shard->count += shard_owner(shard, sample) == rank;
}

int shard_owner(const struct shard *shard, int sample) {
  int slot = sample % shard->batch, rank = 0;
  while (first_slot(shard->batch, rank + 1, shard->size) <= slot) rank++;
  return rank;
}

int shard_sample(const struct shard *shard, int local) {
  int run = shard->slot_end - shard->slot_begin;
  return local / run * shard->batch + shard->slot_begin + local % run;
}

int shard_step_samples(const struct shard *shard, int step) {
  int left = shard->samples - step * shard->batch;
  return left < shard->batch ? left : shard->batch;
}

/* From one level's values to the next one's: devices add four floats at a time where they may. */
static int64_t stride_of(int64_t count) {
  return (count + 3) / 4 * 4;
}

size_t shard_scratch(const struct shard *shard, int64_t count) {
  int depth = 1;
  while (1 << depth < shard->batch) depth++;
  return (size_t)depth * (size_t)stride_of(count);
}

/* The tree over slots [from, from + length): node `index` of a level holds [from + index * length / 2^level, from + (index + 1) * length / 2^level). */
struct tree {
  const struct shard *shard;
  int from, length, step;
  shard_leaf *leaf;
  void *context;
  struct kernels *k;
  int64_t count;
};

/* Sums a node into out; whether it holds any sample. */
static bool sum_node(const struct tree *tree, int level, int64_t index, float *out, float *scratch) {
  int begin = tree->from + (int)((index * tree->length) >> level), end = tree->from + (int)(((index + 1) * tree->length) >> level);
  int present = shard_step_samples(tree->shard, tree->step);
  if (end > present) end = present;
  if (begin >= end) return false;
  if (end - begin == 1) {
    int run = tree->shard->slot_end - tree->shard->slot_begin;
    tree->leaf(tree->context, tree->step * run + begin - tree->shard->slot_begin, out);
    return true;
  }
  bool left = sum_node(tree, level + 1, 2 * index, out, scratch);
  if (!left) return sum_node(tree, level + 1, 2 * index + 1, out, scratch);
  if (sum_node(tree, level + 1, 2 * index + 1, scratch, scratch + stride_of(tree->count))) tree->k->add(tree->k, out, scratch, tree->count);
  return true;
}

void shard_step_sum(const struct shard *shard, int step, shard_leaf *leaf, void *context, struct kernels *k, struct world *world,
                    float *out, float *scratch, int64_t count) {
  int level = 0;
  while (1 << level < shard->size) level++;
  bool power_of_two = 1 << level == shard->size;
  struct tree tree = {shard, 0, shard->batch, step, leaf, context, k, count};
  if (!power_of_two) tree.from = shard->slot_begin, tree.length = shard->slot_end - shard->slot_begin;
  if (!sum_node(&tree, power_of_two ? level : 0, power_of_two ? shard->rank : 0, out, scratch))
    k->clear(k, out, (size_t)count * sizeof *out);
  world_allreduce(world, out, (size_t)count, scratch);
}
