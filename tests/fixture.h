/* fixture.h: a random model of the fixtures, its blocks on the host, and what is expected of it; shared by the tests of the block. */
#ifndef OMNIQUANT_FIXTURE_H
#define OMNIQUANT_FIXTURE_H

#include "block.h"
#include "checkpoint.h"
#include "compare.h"
#include "rank.h"

/* SMALL_PANEL: elements of which no weight of the fixtures is a multiple, so that gradients come in rows of uneven numbers. */
enum { SAMPLES = 2, TOKENS = 24, BLOCKS = 2, TRAINED = 1, SMALL_PANEL = 1000 };

static const char *const folders[] = {"llama_mha", "llama_gqa_tied", "llama3_rope", "llama_linear_rope", "mistral",    "qwen2",  "qwen3",
                                      "opt",       "opt_post",       "falcon_7b",   "falcon_40b",        "falcon_11b", "mixtral"};
enum { FOLDERS = sizeof folders / sizeof *folders };

struct fixture {
  struct memory memory;
  struct model model;
  struct checkpoint *checkpoint;
  struct safetensors *expected;
  void *image[BLOCKS];
};

static inline void fixture_open(struct fixture *f, const char *name, const char *expected) {
  struct error error = {0};
  *f = (struct fixture){0};
  if (checkpoint_open(fixture_path(name, "").text, &f->model, &f->checkpoint, &error)) fail_msg("%s", error.message);
  f->expected = expected_open(name, expected);
  for (int i = 0; i < BLOCKS; i++) {
    f->image[i] = host(&f->memory, (int64_t)f->model.image_bytes, 1);
    if (checkpoint_read_block(f->checkpoint, &f->model, i, f->image[i], &error)) fail_msg("%s", error.message);
  }
}

static inline void fixture_close(struct fixture *f) {
  checkpoint_close(f->checkpoint);
  safetensors_close(f->expected);
  memory_free(&f->memory);
}

static inline int64_t hidden_count(const struct fixture *f) { /* of one sample */
  return (int64_t)TOKENS * f->model.hidden;
}

static inline void open_block(struct block *block, const struct fixture *f, struct kernels *k, bool trained) {
  struct error error = {0};
  struct block_use use = {.tokens = TOKENS, .effective = true, .quantized_inputs = true, .trained = trained};
  if (block_init(block, &f->model, k, &use, &error)) fail_msg("%s", error.message);
}

/* What learns block TRAINED, on one rank; the samples, of which `x` holds the values in turn, are the same in both streams. */
static inline void open_rank(struct rank *rank, const struct fixture *f, struct kernels *k, const struct recipe *recipe, const float *x) {
  struct error error = {0};
  int64_t n = hidden_count(f);
  if (rank_open_block(rank, &f->model, recipe, k, &error) || rank_open_learner(rank, recipe, 1, &error)) fail_msg("%s", error.message);
  block_load(&rank->block, f->image[TRAINED]);
  for (int i = 0; i < recipe->samples; i++) k->load(k, samples_write(&rank->target.x, i), x + i * n, DTYPE_F32, n);
  samples_copy(&rank->learner.x_q, &rank->target.x);
}

/* As many samples as are asked for: hidden states of the fixture in turn, each a little different. */
static inline float *similar_samples(struct memory *m, const struct fixture *f, int samples) {
  int64_t n = hidden_count(f);
  const float *hidden = expected_floats(m, f->expected, SAMPLES * n, "hidden.%d", TRAINED);
  float *values = host_floats(m, samples * n);
  uint64_t state = 5;
  for (int64_t i = 0; i < samples * n; i++) values[i] = hidden[i % (SAMPLES * n)] * (1 + 0.1f * (float)random_uniform(&state));
  return values;
}

/* The linear weights where the quantizer would put its own. */
static inline void copy_weights(struct block *block) {
  for (int i = 0; i < block->model->linears; i++) {
    const struct linear *linear = &block->model->linear[i];
    if (linear->quantized)
      block->k->copy(block->k, block_tensor(block, BLOCK_QUANTIZED, linear->weight), block_tensor(block, BLOCK_FULL, linear->weight),
                     (size_t)(linear->rows * linear->columns) * block->k->element_bytes);
  }
}

/* Ours of an expected array that is named as in the checkpoint, which may hold the rows of several: [rows, columns]. */
static inline float *expected_rows(struct memory *m, const struct safetensors *file, const char *name, const struct row_map *source,
                                   int64_t rows, int64_t columns) {
  const float *all = expected_floats(m, file, source->total * columns, "%s", name);
  float *ours = host_floats(m, rows * columns);
  for (int64_t row = 0; row < rows; row++)
    memcpy(ours + row * columns, all + source_row(source, row) * columns, (size_t)columns * sizeof *ours);
  return ours;
}

/* The same of one of the block's tensors: PREFIX.NAME. */
static inline float *expected_tensor(struct memory *m, const struct fixture *f, const char *prefix, int index) {
  const struct block_tensor *tensor = &f->model.tensor[index];
  char name[160];
  snprintf(name, sizeof name, "%s.%s", prefix, tensor->name);
  bool vector = tensor->dimensions == 1;
  return expected_rows(m, f->expected, name, &tensor->source, vector ? tensor->columns : tensor->rows, vector ? 1 : tensor->columns);
}

#endif
