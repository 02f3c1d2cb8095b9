/* rehearsal.c: what calibrate.c opens and does for a block, on one rank without the others. */
#include "rehearsal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "learn.h"

/* Everything that a rank opens for a block (calibrate.c). */
struct rank {
  struct world world;
  struct trace trace;
  struct kernels *k;
  struct shard shard;
  struct block block;
  size_t block_allocated;
  struct let_statistics statistics;
  struct target target;
  struct learner learner;
  char *image; /* of random weights; NULL where nothing is computed */
};

static int rank_open(struct rank *rank, const struct model *model, const struct recipe *recipe, int ranks, size_t element_bytes,
                     struct kernels *behind, struct error *error) {
  bool quantized = recipe->activations.abits < 16 || recipe_kv_bits(&recipe->activations) < 16;
  struct block_use use = {.tokens = recipe->seqlen, .effective = true, .quantized_inputs = quantized, .trained = true};
  rank->world = (struct world){.size = 1, .local_size = 1}; /* sums over ranks are reckoned apart */
  rank->k = trace_open(behind, element_bytes, &rank->trace);
  if (!rank->k) return error_set(error, ERROR_WORK, "out of memory for a rehearsal");
  shard_init(&rank->shard, recipe->samples, recipe->batch, ranks - 1, ranks); /* the last rank has the most samples */
  if (block_init(&rank->block, model, rank->k, &use, error)) return error->code;
  rank->block_allocated = rank->trace.allocated;
  if (recipe->let && let_statistics_init(&rank->statistics, model, rank->k, error)) return error->code;
  rank->target = (struct target){
      .world = &rank->world,
      .k = rank->k,
      .block = &rank->block,
      .shard = &rank->shard,
      .statistics = recipe->let ? &rank->statistics : NULL,
      .x = rank->k->allocate(rank->k, (size_t)rank->shard.count * (size_t)recipe->seqlen * (size_t)model->hidden * rank->k->element_bytes)};
  rank->learner = (struct learner){
      .recipe = recipe, .world = &rank->world, .k = rank->k, .block = &rank->block, .shard = &rank->shard, .target = &rank->target};
  if (!rank->target.x) return error_set(error, ERROR_WORK, "out of memory on %s for %d samples", rank->k->name, rank->shard.count);
  return target_init(&rank->target, error) ? error->code : learner_init(&rank->learner, error);
}

static void rank_close(struct rank *rank) {
  if (!rank->k) return;
  free(rank->image);
  if (rank->target.x) rank->k->release(rank->k, rank->target.x);
  learner_free(&rank->learner);
  target_free(&rank->target);
  let_statistics_free(&rank->statistics);
  block_free(&rank->block);
  rank->k->close(rank->k);
}

/* The rows noted since the latest call. */
static struct trace take(struct rank *rank) {
  struct trace taken = rank->trace;
  rank->trace = (struct trace){.allocated = taken.allocated};
  return taken;
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

/* A block whose outputs are as large as its inputs: weights of variance 1 / C_in, norms of 1. */
static void fill_image(const struct model *model, char *image) {
  uint32_t state = 1;
  for (int i = 0; i < model->tensors; i++) {
    const struct block_tensor *tensor = &model->tensor[i];
    float spread = sqrtf(3.0f / (float)tensor->columns);
    for (int64_t j = 0; j < tensor->rows * tensor->columns; j++)
      store_value(image + tensor->image_offset + (size_t)j * dtype_size(tensor->dtype), tensor->dtype,
                  tensor->dimensions == 1 ? 1 : uniform(&state) * spread);
  }
}

static int fill(struct rank *rank, struct error *error) {
  const struct learner *l = &rank->learner;
  int64_t count = (int64_t)rank->block.tokens * rank->block.model->hidden;
  float *sample = malloc((size_t)count * sizeof *sample);
  rank->image = malloc(rank->block.model->image_bytes);
  if (!sample || !rank->image) {
    free(sample);
    return error_set(error, ERROR_WORK, "out of memory for a block of random weights");
  }
  fill_image(rank->block.model, rank->image);
  uint32_t state = 7;
  for (int i = 0; i < rank->shard.count; i++) {
    for (int64_t j = 0; j < count; j++) sample[j] = uniform(&state);
    rank->k->load(rank->k, data_at(rank->k, rank->target.x, i * count), sample, DTYPE_F32, count);
  }
  rank->k->copy(rank->k, l->x_q, rank->target.x, (size_t)rank->shard.count * (size_t)count * rank->k->element_bytes);
  free(sample);
  return 0;
}

/* ---- the block ---- */

/* The codes that the team's first rank packs, while the others wait. */
static int pack(struct rank *rank, struct error *error) {
  const struct learner *l = &rank->learner;
  bool computing = rank->image != NULL;
  for (int i = 0; i < l->block->model->linears; i++) {
    const struct quantized_shape *shape = &l->lwc.shape[i];
    size_t groups = (size_t)groups_of(shape), bytes = (size_t)(shape->rows * (shape->columns + 1));
    if (shape->rows == 0) continue;
    uint8_t *codes = computing ? malloc(bytes) : NULL, *zero_point = computing ? malloc(groups) : NULL;
    uint16_t *scale = computing ? malloc(groups * sizeof *scale) : NULL;
    if (computing && (!codes || !zero_point || !scale)) error_set(error, ERROR_WORK, "out of memory for codes");
    if (!error->code)
      l->k->quantize_codes(l->k, codes, scale, zero_point, block_tensor(l->block, BLOCK_FULL, l->block->model->linear[i].weight), NULL,
                           NULL, NULL, shape);
    free(codes);
    free(zero_point);
    free(scale);
    if (error->code) break;
  }
  return error->code;
}

/* All that is done to a block; its rows are noted. */
static int block(struct rank *rank, struct error *error) {
  struct outcome outcome;
  block_load(&rank->block, rank->image ? (const void *)rank->image : rank->target.x /* an address that nobody reads */);
  target_pass(&rank->target, true);
  return learner_run(&rank->learner, 0, &outcome, error) ? error->code : pack(rank, error);
}

static int run(struct rank *rank, int ranks, struct rehearsal *rehearsal, struct error *error) {
  struct learner *l = &rank->learner;
  struct trace_row *search = &rehearsal->block.row[TRACE_clip_search];
  rehearsal->samples = rank->shard.count;
  rehearsal->steps = l->recipe->epochs * rank->shard.steps;
  rehearsal->learnables = l->count;
  rehearsal->allocated = rank->trace.allocated;
  rehearsal->block_allocated = rank->block_allocated;
  if (rank->image && block(rank, error)) return error->code; /* memory is touched and libraries have made their plans */
  take(rank);
  if (block(rank, error)) return error->code;
  rehearsal->block = take(rank);
  *search = (struct trace_row){search->calls, search->flops / ranks, search->bytes / ranks, search->seconds / ranks};
  data *x = l->x_q;
  block_forward(&rank->block, BLOCK_QUANTIZED, l->y, x);
  rehearsal->forward = take(rank);
  if (rehearsal->steps == 0) return 0;
  learner_step(l, 0, rehearsal->steps);
  rehearsal->step = take(rank);
  rank->k->bf16_products = l->recipe->bf16_products;
  block_forward(&rank->block, BLOCK_QUANTIZED, l->y, x);
  rank->k->mse(rank->k, l->gradient, l->dy, l->y, x, (int64_t)l->recipe->seqlen * rank->block.model->hidden, 1, false);
  learner_backward(l, l->gradient, l->dy, x);
  rehearsal->sample = take(rank);
  return 0;
}

int rehearse(struct rehearsal *rehearsal, const struct model *model, const struct recipe *recipe, int ranks, size_t element_bytes,
             struct kernels *behind, struct error *error) {
  struct rank *rank = calloc(1, sizeof *rank);
  *rehearsal = (struct rehearsal){0};
  if (!rank) return error_set(error, ERROR_WORK, "out of memory for a rehearsal");
  if (rank_open(rank, model, recipe, ranks, element_bytes, behind, error) == 0 && (!behind || fill(rank, error) == 0))
    run(rank, ranks, rehearsal, error);
  rank_close(rank);
  free(rank);
  return error->code;
}
