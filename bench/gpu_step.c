/* gpu_step.c: a training step of one block on a GPU: milliseconds a step and a sample, the device memory that is taken, and for each operation
 * its time, bytes and flops beside what the card's own limits allow (docs/cuda.md). Prints one JSON object. */
#include <argp.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "cuda/backend.h"
#include "measure.h"
#include "rank.h"

struct arguments {
  const char *config;
  int tokens, bits, abits, group, batch, steps, panel;
  bool let, own_attention, no_graphs;
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
    {"panel", 'p', "N", 0, "weights whose gradient is made at a time (2^24; not more)", 0},
    {"own-attention", 'o', NULL, 0, "attention by the backend's own kernels, not by cuDNN", 0},
    {"no-graphs", 'n', NULL, 0, "launch every kernel by itself, in no CUDA graph", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state) {
  struct arguments *a = state->input;
  int *fields[128] = {
      ['T'] = &a->tokens, ['b'] = &a->bits, ['a'] = &a->abits, ['g'] = &a->group, ['B'] = &a->batch, ['s'] = &a->steps, ['p'] = &a->panel};
  if (key == 'l') return a->let = true, 0;
  if (key == 'o') return a->own_attention = true, 0;
  if (key == 'n') return a->no_graphs = true, 0;
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
  struct kernels *k;
  struct rank rank;
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
  s->recipe.seqlen = a->tokens;
}

static int setup_open(struct setup *s, struct error *error) {
  const struct arguments *a = &s->arguments;
  char config[4096];
  if (!read_text(a->config, config, sizeof config, error) || model_parse(&s->model, config, a->config, error)) return error->code;
  set_recipe(s);
  s->k = CUDA_OPEN(0, error);
  if (s->k) s->k->own_attention = a->own_attention;
  if (s->k && a->no_graphs) s->k->repeat = NULL;
  if (!s->k || rank_open_block(&s->rank, &s->model, &s->recipe, s->k, error) || rank_open_learner(&s->rank, &s->recipe, 1, error) ||
      rank_fill(&s->rank, error))
    return error->code;
  if (a->panel > 0 && a->panel < s->rank.block.panel) s->rank.block.panel = a->panel;
  block_load(&s->rank.block, s->rank.image);
  return 0;
}

static void setup_close(struct setup *s) {
  rank_close(&s->rank);
  if (s->k) s->k->close(s->k);
}

/* Seconds of each of the timed steps together, without a look at them in between. */
static double time_steps(struct setup *s, struct error *error) {
  int all = s->arguments.steps + 4;
  s->rank.block.quantizer = s->recipe.activations;
  target_pass(&s->rank.target, true);
  learner_start(&s->rank.learner);
  learner_begin(&s->rank.learner);
  for (int step = 0; step < 3; step++) learner_step(&s->rank.learner, step, all);
  s->k->synchronize(s->k, error);
  double begin = now();
  for (int step = 0; step < s->arguments.steps; step++) learner_step(&s->rank.learner, step + 3, all);
  s->k->synchronize(s->k, error);
  return (now() - begin) / s->arguments.steps;
}

static int run(struct setup *s, struct error *error) {
  const struct arguments *a = &s->arguments;
  struct cuda_profile profile = {0};
  double seconds = time_steps(s, error), products = 0, flops = 0;
  size_t taken = cuda_memory_taken(s->k);
  s->k->state->profile = &profile;
  int64_t library_attention = -s->k->library_attention;
  learner_step(&s->rank.learner, a->steps + 3, a->steps + 4);
  library_attention += s->k->library_attention;
  s->k->state->profile = NULL;
  struct step_state state;
  s->k->download(s->k, &state, s->rank.learner.state, sizeof state);
  struct limits limits = measure_limits(s->k);
  if (s->k->synchronize(s->k, error)) return error->code;
  for (int i = 0; i < profile.count; i++) {
    if (strncmp(profile.timing[i].name, "linear", 6) == 0) products += profile.timing[i].seconds;
    flops += profile.timing[i].flops;
  }
  printf("{\"config\": \"%s\", \"device\": \"%s\", \"tokens\": %d, \"batch\": %d, \"wbits\": %d, \"group\": %d, \"abits\": %d, \"let\": "
         "%s, \"graphs\": %s, \"panel\": %lld, \"step_ms\": %.3f, "
         "\"sample_ms\": %.3f, \"products_ms\": %.3f, \"tflop\": %.3f, \"memory_gb\": %.2f, \"attention_by_cudnn\": %lld, \"skipped\": %d, "
         "\"copy_gb_s\": %.0f, "
         "\"product_tflop_s\": %.0f",
         a->config, s->k->level, a->tokens, a->batch, a->bits, a->group, a->abits, a->let ? "true" : "false",
         a->no_graphs ? "false" : "true", (long long)s->rank.block.panel, 1e3 * seconds, 1e3 * seconds / a->batch, 1e3 * products,
         flops / 1e12, (double)taken / 1e9, (long long)library_attention, state.skipped, limits.bandwidth / 1e9, limits.flops / 1e12);
  print_timings(&profile, &limits);
  printf("}\n");
  return 0;
}

int main(int argc, char **argv) {
  static struct setup setup = {.arguments = {NULL, 2048, 3, 16, 128, 1, 20, 0, false, false, false}};
  struct error error = {0};
  const struct argp argp = {options, parse, NULL, "Times a training step of a block on a GPU, and each of its operations.",
                            NULL,    NULL,  NULL};
  argp_parse(&argp, argc, argv, 0, NULL, &setup.arguments);
  if (!setup_open(&setup, &error) && setup.k) run(&setup, &error);
  setup_close(&setup);
  if (error.code) fprintf(stderr, "gpu_step: %s\n", error.message);
  return error.code;
}
