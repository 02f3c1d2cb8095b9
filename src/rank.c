/* rank.c: what calibrate.c opens for a block, on one rank without the others. */
#include "rank.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int rank_open_block(struct rank *rank, const struct model *model, const struct recipe *recipe, struct kernels *k, struct error *error) {
  bool quantized = recipe->activations.abits < 16 || recipe_kv_bits(&recipe->activations) < 16;
  struct block_use use = {.tokens = recipe->seqlen, .effective = true, .quantized_inputs = quantized, .trained = true};
  *rank = (struct rank){.world = {.size = 1, .local_size = 1}, .k = k};
  return block_init(&rank->block, model, k, &use, error);
}

int rank_open_learner(struct rank *rank, const struct recipe *recipe, int ranks, struct error *error) {
  struct kernels *k = rank->k;
  const struct model *model = rank->block.model;
  shard_init(&rank->shard, recipe->samples, recipe->batch, ranks - 1, ranks); /* the last rank has the most samples */
  if (recipe->let && let_statistics_init(&rank->statistics, model, k, error)) return error->code;
  rank->target = (struct target){
      .world = &rank->world, .k = k, .block = &rank->block, .shard = &rank->shard, .statistics = recipe->let ? &rank->statistics : NULL};
  rank->learner = (struct learner){
      .recipe = recipe, .world = &rank->world, .k = k, .block = &rank->block, .shard = &rank->shard, .target = &rank->target};
  if (target_init(&rank->target, error) || learner_init(&rank->learner, error)) return error->code;
  if (record_room_init(&rank->room, &rank->learner, error)) return error->code;
  return samples_place(&rank->target.x, error) ? error->code : learner_place(&rank->learner, error);
}

void rank_close(struct rank *rank) {
  struct kernels *k = rank->k;
  if (!k) return;
  free(rank->image);
  record_room_free(&rank->room);
  learner_free(&rank->learner);
  target_free(&rank->target);
  let_statistics_free(&rank->statistics);
  block_free(&rank->block);
}

/* ---- something to compute with ---- */

static float uniform(uint32_t *state) { /* -1 .. 1 */
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) * 0x1p-23f - 1;
}

static void store_value(char *at, enum dtype dtype, float value) {
  uint16_t half = dtype == DTYPE_F16 ? half_from_float(value) : (uint16_t)(float_to_bits(value) >> 16);
  if (dtype == DTYPE_F32)
    memcpy(at, &value, sizeof value);
  else
    memcpy(at, &half, sizeof half);
}

/* Random numbers repeat after a prime count, which no row is a multiple of: drawing two billion would take minutes. */
enum { PERIOD = 1000003 };

static void fill_tensor(char *values, const struct block_tensor *tensor) {
  int64_t count = tensor->rows * tensor->columns;
  size_t size = dtype_size(tensor->dtype);
  float spread = sqrtf(3.0f / (float)tensor->columns);
  uint32_t state = 1;
  for (int64_t j = 0; j < count && (j < PERIOD || tensor->dimensions == 1); j++)
    store_value(values + (size_t)j * size, tensor->dtype, tensor->dimensions == 1 ? 1 : uniform(&state) * spread);
  for (int64_t j = PERIOD; j < count && tensor->dimensions == 2; j += PERIOD)
    memcpy(values + (size_t)j * size, values, (size_t)(count - j < PERIOD ? count - j : PERIOD) * size);
}

/* A block whose outputs are as large as its inputs: weights of variance 1 / C_in, norms of 1. */
static void fill_image(const struct model *model, char *image) {
  for (int i = 0; i < model->tensors; i++) fill_tensor(image + model->tensor[i].image_offset, &model->tensor[i]);
}

int rank_fill(struct rank *rank, struct error *error) {
  int64_t count = (int64_t)rank->block.tokens * rank->block.model->hidden;
  float *sample = malloc((size_t)count * sizeof *sample);
  rank->image = calloc(1, rank->block.model->image_bytes);
  if (!sample || !rank->image) {
    free(sample);
    return error_set(error, ERROR_WORK, "out of memory for a block of random weights");
  }
  fill_image(rank->block.model, rank->image);
  uint32_t state = 7;
  for (int i = 0; i < rank->shard.count; i++) {
    for (int64_t j = 0; j < count; j++) sample[j] = uniform(&state);
    rank->k->load(rank->k, samples_write(&rank->target.x, i), sample, DTYPE_F32, count);
  }
  samples_copy(&rank->learner.x_q, &rank->target.x);
  free(sample);
  return 0;
}
