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

/* The tree over slots [from, from + length): node `index` of a level holds [from + index * length / 2^level, from + (index + 1) * length / 2^level).
 * What is summed after the last sample is put off where that is made in two parts. */
struct tree {
  const struct shard *shard;
  int from, length, step;
  const struct step_sum *sum;
  int left;                 /* samples that are still to be made */
  float *last;              /* where the last one went; NULL: none yet */
  float *to[32], *plus[32]; /* the sums that are put off */
  int put_off;
};

static int first_present(const struct tree *tree, int slot) {
  int present = shard_step_samples(tree->shard, tree->step);
  return slot < present ? slot : present;
}

static void make_sample(struct tree *tree, int slot, float *out) {
  const struct step_sum *sum = tree->sum;
  int run = tree->shard->slot_end - tree->shard->slot_begin, local = tree->step * run + slot - tree->shard->slot_begin;
  if (--tree->left == 0) tree->last = out;
  (sum->rest && tree->left == 0 ? sum->begin : sum->leaf)(sum->context, local, out);
}

static void add_to(struct tree *tree, float *to, float *plus) {
  if (tree->sum->rest && tree->left == 0) {
    tree->to[tree->put_off] = to;
    tree->plus[tree->put_off++] = plus;
  } else {
    tree->sum->k->add(tree->sum->k, to, plus, tree->sum->count);
  }
}

/* Sums a node into out; whether it holds any sample. */
static bool sum_node(struct tree *tree, int level, int64_t index, float *out, float *scratch) {
  int begin = first_present(tree, tree->from + (int)((index * tree->length) >> level)),
      end = first_present(tree, tree->from + (int)(((index + 1) * tree->length) >> level));
  if (begin >= end) return false;
  if (end - begin == 1) {
    make_sample(tree, begin, out);
    return true;
  }
  bool left = sum_node(tree, level + 1, 2 * index, out, scratch);
  if (!left) return sum_node(tree, level + 1, 2 * index + 1, out, scratch);
  if (sum_node(tree, level + 1, 2 * index + 1, scratch, scratch + stride_of(tree->sum->count))) add_to(tree, out, scratch);
  return true;
}

/* Values [first, end): the sums that were put off, and those over ranks. */
static void sum_part(const struct tree *tree, int64_t first, int64_t end) {
  const struct step_sum *sum = tree->sum;
  for (int i = 0; i < tree->put_off; i++) sum->k->add(sum->k, tree->to[i] + first, tree->plus[i] + first, end - first);
  world_allreduce(sum->world, sum->out + first, (size_t)(end - first), sum->scratch + first);
}

/* The last sample's rest is at work while what it began with is summed. */
static void sum_beside(const struct tree *tree, int local) {
  const struct step_sum *sum = tree->sum;
  struct kernels *k = sum->k;
  k->follow(k, sum->lane);
  if (tree->last) sum->rest(sum->context, local, tree->last);
  k->use(k, sum->lane);
  sum_part(tree, 0, sum->early);
  k->use(k, NULL);
  sum_part(tree, sum->early, sum->count);
  k->join(k, sum->lane);
}

void shard_step_sum(const struct shard *shard, int step, const struct step_sum *sum) {
  int level = 0, begin = shard->slot_begin, end = shard->slot_end, present = shard_step_samples(shard, step);
  while (1 << level < shard->size) level++;
  bool power_of_two = 1 << level == shard->size;
  struct tree tree = {.shard = shard, .length = shard->batch, .step = step, .sum = sum};
  if (!power_of_two) tree.from = begin, tree.length = end - begin;
  if (present < end) end = present;
  tree.left = end > begin ? end - begin : 0;
  if (!sum_node(&tree, power_of_two ? level : 0, power_of_two ? shard->rank : 0, sum->out, sum->scratch))
    sum->k->clear(sum->k, sum->out, (size_t)sum->count * sizeof *sum->out);
  if (sum->rest)
    sum_beside(&tree, step * (shard->slot_end - shard->slot_begin) + end - 1 - begin);
  else
    sum_part(&tree, 0, sum->count);
}
