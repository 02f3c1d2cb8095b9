/* gpu_step.c: a training step of one block on a GPU: milliseconds a step and a sample, the device memory that is taken, and for each operation
 * its time, bytes and flops beside what the card's own limits allow (docs/cuda.md). Prints one JSON object. */
#include <argp.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "cuda/backend.h"
#include "learn.h"
#include "measure.h"

struct arguments {
  const char *config;
  int tokens, bits, abits, group, batch, steps;
  bool let;
};

static const struct argp_option options[] = {
    {"config", 'c', "FILE", 0, "config.json of the block's model (bench/shapes)", 0},
    {"tokens", 'T', "N", 0, "tokens of a sample (2048)", 0},
    {"bits", 'b', "N", 0, "bits a weight (3)", 0},
    {"abits", 'a', "N", 0, "bits an activation (16: not quantized)", 0},
    {"let", 'l', NULL, 0, "learn the equivalent transformation too", 0},
    {"group", 'g', "N", 0, "group size, 0 for a row (128)", 0},
    {"batch", 'B', "N", 0, "samples a step (1)", 0},
    {"steps", 's', "N", 0, "timed steps (20)", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state) {
  struct arguments *a = state->input;
  int *fields[128] = {['T'] = &a->tokens, ['b'] = &a->bits, ['a'] = &a->abits, ['g'] = &a->group, ['B'] = &a->batch, ['s'] = &a->steps};
  if (key == 'l') return a->let = true, 0;
  if (key == 'c') return a->config = text, 0;
  if (key == ARGP_KEY_END && !a->config) argp_error(state, "--config FILE is missing");
  if (key <= 0 || key >= 128 || !fields[key]) return ARGP_ERR_UNKNOWN;
  *fields[key] = atoi(text);
  if (*fields[key] < 0 || (*fields[key] == 0 && key != 'g')) argp_error(state, "%s: not a size", text);
  return 0;
}

static bool read_text(const char *path, char *text, size_t room, struct error *error) {
  FILE *file = fopen(path, "r");
  size_t length = file ? fread(text, 1, room - 1, file) : 0;
  text[length] = '\0';
  if (file) fclose(file);
  if (!length) error_set(error, ERROR_INPUT, "%s: cannot be read", path);
  return length > 0;
}

/* Random numbers that repeat after a prime count, which no row is a multiple of: drawing two billion would take minutes. */
enum { PERIOD = 1000003 };

static void fill_values(float *values, int64_t count, float spread) {
  uint32_t state = 1;
  for (int64_t i = 0; i < count; i++) values[i] = i < PERIOD ? uniform(&state) * spread : values[i - PERIOD];
}

static void load_block(struct block *block, const struct model *model, char *image) {
  for (int i = 0; i < model->tensors; i++) {
    const struct block_tensor *tensor = &model->tensor[i];
    float *values = (float *)(void *)(image + tensor->image_offset);
    int64_t count = tensor->rows * tensor->columns;
    if (tensor->dimensions == 2) fill_values(values, count, sqrtf(3.0f / (float)tensor->columns));
    for (int64_t j = 0; tensor->dimensions == 1 && j < count; j++) values[j] = 1;
  }
  block_load(block, image);
}

/* What the card reaches: bytes a second of a copy, each counted read and written, and flops of a large product. */
struct limits {
  double bandwidth, flops;
};

static struct limits measure_limits(struct kernels *k) {
  enum { SIDE = 8192, REPEATS = 10 };
  size_t elements = (size_t)SIDE * SIDE, bytes = elements * k->element_bytes;
  struct cuda_profile profile = {0};
  struct limits limits = {0, 0};
  data *a = k->allocate(k, bytes), *b = k->allocate(k, bytes), *c = k->allocate(k, bytes);
  float *values = malloc(elements * sizeof *values);
  if (a && b && c && values) {
    fill_values(values, (int64_t)elements, 1);
    k->load(k, a, values, DTYPE_F32, (int64_t)elements);
    k->load(k, b, values, DTYPE_F32, (int64_t)elements);
    for (int i = 0; i < REPEATS + 3; i++) {
      k->state->profile = i < 3 ? NULL : &profile;
      k->linear_forward(k, c, a, b, NULL, SIDE, SIDE, SIDE, false);
      k->copy(k, c, a, bytes);
    }
    k->state->profile = NULL;
    for (int i = 0; i < profile.count; i++) {
      const struct cuda_timing *t = &profile.timing[i];
      *(t->flops > 0 ? &limits.flops : &limits.bandwidth) = (t->flops > 0 ? t->flops : t->bytes) / t->seconds;
    }
  }
  free(values);
  k->release(k, a);
  k->release(k, b);
  k->release(k, c);
  return limits;
}

static void print_timings(const struct cuda_profile *profile, const struct limits *limits) {
  printf(", \"operations\": [");
  for (int i = 0; i < profile->count; i++) {
    const struct cuda_timing *t = &profile->timing[i];
    double bound = fmax(t->bytes / limits->bandwidth, t->flops / limits->flops);
    printf(
        "%s\n  {\"name\": \"%s\", \"calls\": %d, \"ms\": %.4f, \"gbyte\": %.4f, \"gflop\": %.2f, \"limit_ms\": %.4f, \"of_limit\": %.2f}",
        i ? "," : "", t->name, t->calls, 1e3 * t->seconds, t->bytes / 1e9, t->flops / 1e9, 1e3 * bound, bound / t->seconds);
  }
  printf("]");
}

/* Everything that a step needs. */
struct setup {
  struct arguments arguments;
  struct model model;
  struct recipe recipe;
  struct world world;
  struct kernels *k;
  struct block block;
  struct let_statistics statistics;
  struct shard shard;
  struct target target;
  struct learner learner;
};

static void set_recipe(struct setup *s) {
  const struct arguments *a = &s->arguments;
  recipe_init(&s->recipe);
  s->recipe.wbits = a->bits;
  s->recipe.activations.abits = a->abits;
  s->recipe.group_size = a->group;
  s->recipe.let = a->let;
  s->recipe.stored_scale = false;
  s->recipe.epochs = a->steps + 4;
  s->recipe.samples = s->recipe.batch = a->batch;
}

static int setup_open(struct setup *s, struct error *error) {
  const struct arguments *a = &s->arguments;
  char config[4096];
  struct block_use use = {.tokens = a->tokens, .effective = true, .quantized_inputs = a->abits < 16, .trained = true};
  if (!read_text(a->config, config, sizeof config, error) || model_parse(&s->model, config, a->config, error)) return error->code;
  set_recipe(s);
  s->world = (struct world){.size = 1, .local_size = 1};
  struct kernels *k = s->k = CUDA_OPEN(0, error);
  if (!k) return error->code;
  if (block_init(&s->block, &s->model, k, &use, error) || let_statistics_init(&s->statistics, &s->model, k, error)) return error->code;
  shard_init(&s->shard, a->batch, a->batch, 0, 1);
  size_t elements = (size_t)a->batch * (size_t)a->tokens * (size_t)s->model.hidden;
  s->target = (struct target){.world = &s->world, .k = k, .block = &s->block, .shard = &s->shard, .statistics = &s->statistics};
  s->target.x = k->allocate(k, elements * k->element_bytes);
  if (!s->target.x) return error_set(error, ERROR_WORK, "out of memory on cuda for the samples");
  s->learner =
      (struct learner){.recipe = &s->recipe, .world = &s->world, .k = k, .block = &s->block, .shard = &s->shard, .target = &s->target};
  if (target_init(&s->target, error) || learner_init(&s->learner, error)) return error->code;
  char *image = calloc(1, s->model.image_bytes);
  float *x = malloc(elements * sizeof *x);
  if (image && x) {
    load_block(&s->block, &s->model, image);
    fill_values(x, (int64_t)elements, 1);
    k->load(k, s->learner.x_q, x, DTYPE_F32, (int64_t)elements);
    k->load(k, s->target.x, x, DTYPE_F32, (int64_t)elements);
  } else {
    error_set(error, ERROR_WORK, "out of memory for a block");
  }
  free(image);
  free(x);
  return error->code;
}

static void setup_close(struct setup *s) {
  if (!s->k) return;
  learner_free(&s->learner);
  target_free(&s->target);
  let_statistics_free(&s->statistics);
  if (s->target.x) s->k->release(s->k, s->target.x);
  block_free(&s->block);
  s->k->close(s->k);
}

/* Seconds of each of the timed steps together, without a look at them in between. */
static double time_steps(struct setup *s, struct error *error) {
  int all = s->arguments.steps + 4;
  s->block.quantizer = s->recipe.activations;
  target_pass(&s->target, true);
  learner_start(&s->learner);
  learner_begin(&s->learner);
  for (int step = 0; step < 3; step++) learner_step(&s->learner, step, all);
  s->k->synchronize(s->k, error);
  double begin = now();
  for (int step = 0; step < s->arguments.steps; step++) learner_step(&s->learner, step + 3, all);
  s->k->synchronize(s->k, error);
  return (now() - begin) / s->arguments.steps;
}

static int run(struct setup *s, struct error *error) {
  const struct arguments *a = &s->arguments;
  struct cuda_profile profile = {0};
  double seconds = time_steps(s, error), products = 0, flops = 0;
  size_t taken = cuda_memory_taken(s->k);
  s->k->state->profile = &profile;
  learner_step(&s->learner, a->steps + 3, a->steps + 4);
  s->k->state->profile = NULL;
  struct step_state state;
  s->k->download(s->k, &state, s->learner.state, sizeof state);
  struct limits limits = measure_limits(s->k);
  if (s->k->synchronize(s->k, error)) return error->code;
  for (int i = 0; i < profile.count; i++) {
    if (strncmp(profile.timing[i].name, "linear", 6) == 0) products += profile.timing[i].seconds;
    flops += profile.timing[i].flops;
  }
  printf("{\"config\": \"%s\", \"device\": \"%s\", \"tokens\": %d, \"batch\": %d, \"wbits\": %d, \"group\": %d, \"abits\": %d, \"let\": "
         "%s, \"step_ms\": %.3f, "
         "\"sample_ms\": %.3f, \"products_ms\": %.3f, \"tflop\": %.3f, \"memory_gb\": %.2f, \"skipped\": %d, \"copy_gb_s\": %.0f, "
         "\"product_tflop_s\": %.0f",
         a->config, s->k->level, a->tokens, a->batch, a->bits, a->group, a->abits, a->let ? "true" : "false", 1e3 * seconds,
         1e3 * seconds / a->batch, 1e3 * products, flops / 1e12, (double)taken / 1e9, state.skipped, limits.bandwidth / 1e9,
         limits.flops / 1e12);
  print_timings(&profile, &limits);
  printf("}\n");
  return 0;
}

int main(int argc, char **argv) {
  static struct setup setup = {.arguments = {NULL, 2048, 3, 16, 128, 1, 20, false}};
  struct error error = {0};
  const struct argp argp = {options, parse, NULL, "Times a training step of a block on a GPU, and each of its operations.",
                            NULL,    NULL,  NULL};
  argp_parse(&argp, argc, argv, 0, NULL, &setup.arguments);
  if (!setup_open(&setup, &error) && setup.k) run(&setup, &error);
  setup_close(&setup);
  if (error.code) fprintf(stderr, "gpu_step: %s\n", error.message);
  return error.code;
}
