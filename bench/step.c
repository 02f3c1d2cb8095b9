/* step.c: what one training step costs beside its matrix products, and each of its operations beside what the machine allows. Steps of a
 * block with random weights are timed, and in turn with them exactly the products that a step does are done by themselves: same shapes, same
 * memory, same order. More steps follow in which each operation is timed. Prints one JSON object (bench/README.md). */
#include <argp.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "cpu/backend.h"
#include "measure.h"
#include "rank.h"
#include "trace.h"

struct arguments {
  int hidden, heads, kv_heads, ffn, tokens, bits, abits, group, threads, steps;
  bool bf16, let;
};

static const struct argp_option options[] = {
    {"hidden", 'h', "N", 0, "hidden size (576)", 0},
    {"heads", 'n', "N", 0, "heads (9)", 0},
    {"kv-heads", 'k', "N", 0, "kv heads (3)", 0},
    {"ffn", 'f', "N", 0, "width of the MLP (1536)", 0},
    {"tokens", 'T', "N", 0, "tokens of a sample (512)", 0},
    {"bits", 'b', "N", 0, "bits a weight (3)", 0},
    {"abits", 'a', "N", 0, "bits an activation (16: not quantized)", 0},
    {"let", 'l', NULL, 0, "learn the equivalent transformation too", 0},
    {"group", 'g', "N", 0, "group size, 0 for a row (64)", 0},
    {"threads", 't', "N", 0, "threads (1)", 0},
    {"steps", 's', "N", 0, "timed steps (30)", 0},
    {"bf16", 'r', NULL, 0, "round inputs of products to bf16", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state) {
  struct arguments *a = state->input;
  if (key == 'r' || key == 'l') {
    *(key == 'r' ? &a->bf16 : &a->let) = true;
    return 0;
  }
  int *fields[128] = {['h'] = &a->hidden, ['n'] = &a->heads, ['k'] = &a->kv_heads, ['f'] = &a->ffn,     ['T'] = &a->tokens,
                      ['b'] = &a->bits,   ['a'] = &a->abits, ['g'] = &a->group,    ['t'] = &a->threads, ['s'] = &a->steps};
  if (key <= 0 || key >= 128 || !fields[key]) return ARGP_ERR_UNKNOWN;
  *fields[key] = atoi(text);
  if (*fields[key] < 0 || (*fields[key] == 0 && key != 'g')) argp_error(state, "%s: not a size", text);
  return 0;
}

struct products {
  struct product *list;
  size_t count, room;
};

static void record(void *context, const struct product *done) {
  struct products *products = context;
  if (products->count == products->room) {
    products->room = products->room ? 2 * products->room : 1024;
    products->list = realloc(products->list, products->room * sizeof *products->list);
    if (!products->list) abort();
  }
  products->list[products->count++] = *done;
}

static void replay(struct kernels *k, const struct products *products, bool bf16) {
  k->bf16_products = bf16;
  for (size_t i = 0; i < products->count; i++) k->state->multiply(k, &products->list[i]);
  k->bf16_products = false;
}

static double flops(const struct products *products) {
  double sum = 0;
  for (size_t i = 0; i < products->count; i++)
    sum += 2.0 * (double)products->list[i].m * (double)products->list[i].n * (double)products->list[i].k;
  return sum;
}

/* Everything that a step needs. */
struct setup {
  struct arguments arguments;
  struct model model;
  struct recipe recipe;
  struct kernels *backend;
  struct kernels *traced; /* the backend, whose operations are noted in `trace` */
  struct trace trace;
  struct rank rank;
  double *step_seconds;      /* [steps]; owns the next two */
  double *product_seconds;   /* [steps] */
  double *operation_seconds; /* [TRACE_COUNT + 1, steps]: each operation's, and last what lies between them */
};

enum { WARM_STEPS = 3 };

static int all_steps(const struct arguments *a) {
  return WARM_STEPS + 2 * a->steps;
}

static void set_recipe(struct setup *s) {
  const struct arguments *a = &s->arguments;
  recipe_init(&s->recipe);
  s->recipe.wbits = a->bits;
  s->recipe.activations.abits = a->abits;
  s->recipe.group_size = a->group;
  s->recipe.let = a->let;
  s->recipe.stored_scale = false;
  s->recipe.bf16_products = a->bf16;
  s->recipe.epochs = all_steps(a);
  s->recipe.samples = 1;
  s->recipe.seqlen = a->tokens;
}

static int setup_open(struct setup *s, struct error *error) {
  const struct arguments *a = &s->arguments;
  char config[512];
  snprintf(config, sizeof config,
           "{\"model_type\": \"llama\", \"num_hidden_layers\": 1, \"hidden_size\": %d, \"intermediate_size\": %d, "
           "\"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"vocab_size\": 100}",
           a->hidden, a->ffn, a->heads, a->kv_heads);
  set_recipe(s);
  struct kernels *backend = s->backend = kernels_open("cpu", a->threads, 0, error);
  if (!backend || model_parse(&s->model, config, "config", error)) return error->code;
  s->traced = trace_open(backend, backend->element_bytes, &s->trace);
  size_t steps = (size_t)a->steps;
  s->step_seconds = calloc((2 + TRACE_COUNT + 1) * steps, sizeof *s->step_seconds);
  if (!s->traced || !s->step_seconds) return error_set(error, ERROR_WORK, "out of memory for times");
  s->product_seconds = s->step_seconds + steps;
  s->operation_seconds = s->product_seconds + steps;
  if (rank_open_block(&s->rank, &s->model, &s->recipe, s->traced, error) || rank_open_learner(&s->rank, &s->recipe, 1, error) ||
      rank_fill(&s->rank, error))
    return error->code;
  block_load(&s->rank.block, s->rank.image);
  return 0;
}

static void setup_close(struct setup *s) {
  free(s->step_seconds);
  rank_close(&s->rank);
  if (s->traced) s->traced->close(s->traced);
  if (s->backend) s->backend->close(s->backend);
}

/* The products of one step, in their order. */
static void record_products(struct setup *s, struct products *products) {
  struct backend *state = s->backend->state;
  state->observer = record;
  state->observer_context = products;
  learner_step(&s->rank.learner, WARM_STEPS - 1, all_steps(&s->arguments));
  state->observer = NULL;
}

static void time_steps(struct setup *s, struct products *products) {
  int steps = s->arguments.steps, all = all_steps(&s->arguments);
  s->rank.block.quantizer = s->recipe.activations;
  target_pass(&s->rank.target, true);
  learner_start(&s->rank.learner);
  learner_begin(&s->rank.learner);
  for (int step = 0; step < WARM_STEPS - 1; step++) learner_step(&s->rank.learner, step, all);
  record_products(s, products);
  for (int step = 0; step < steps; step++) { /* in turn, so that a noisy machine slows both */
    double begin = now();
    learner_step(&s->rank.learner, WARM_STEPS + step, all);
    double middle = now();
    replay(s->backend, products, s->arguments.bf16);
    s->step_seconds[step] = middle - begin;
    s->product_seconds[step] = now() - middle;
  }
}

/* Steps in which the time of each operation is kept. */
static void time_operations(struct setup *s) {
  int steps = s->arguments.steps, all = all_steps(&s->arguments);
  for (int step = 0; step < steps; step++) {
    memset(&s->trace, 0, sizeof s->trace);
    double begin = now();
    learner_step(&s->rank.learner, WARM_STEPS + steps + step, all);
    double rest = now() - begin;
    for (int i = 0; i < TRACE_COUNT; i++) {
      s->operation_seconds[i * steps + step] = s->trace.row[i].seconds;
      rest -= s->trace.row[i].seconds;
    }
    s->operation_seconds[TRACE_COUNT * steps + step] = rest;
  }
}

/* What the machine reaches with as many threads: bytes a second of a copy, each counted read and written, and flops a second of a large
 * product. Raised by every measurement: before and after the steps, so that a machine whose speed drifts is not taken for slower than they. */
struct limits {
  double bandwidth;
  double flops[2]; /* in fp32, and with operands rounded to bf16 */
};

static int measure_limits(struct kernels *k, bool bf16, struct limits *limits, struct error *error) {
  enum { SIDE = 1536, COPIED = 32 << 20, REPEATS = 8 };
  float *a = k->allocate(k, 2 * (size_t)COPIED * sizeof *a), *b = a + COPIED;
  if (!a) return error_set(error, ERROR_WORK, "out of memory for measuring the machine");
  uint32_t state = 7;
  for (int64_t i = 0; i < COPIED; i++) a[i] = uniform(&state);
  for (int i = 0; i < REPEATS; i++) { /* the first also brings the pages in */
    double begin = now();
    k->copy(k, b, a, (size_t)COPIED * sizeof *a);
    limits->bandwidth = fmax(limits->bandwidth, 2.0 * COPIED * sizeof *a / (now() - begin));
  }
  for (int i = 0; i < (bf16 ? 2 : 1) * REPEATS; i++) {
    double *fastest = &limits->flops[i / REPEATS], begin = now();
    k->bf16_products = i >= REPEATS;
    k->linear_forward(k, (data *)b, (const data *)a, (const data *)(a + (size_t)SIDE * SIDE), NULL, SIDE, SIDE, SIDE, false);
    *fastest = fmax(*fastest, 2.0 * SIDE * SIDE * SIDE / (now() - begin));
  }
  k->bf16_products = false;
  k->release(k, a);
  return 0;
}

/* Of the latest step, and the medians of all. */
static void print_operations(const struct setup *s, const struct limits *limits) {
  int steps = s->arguments.steps;
  double bounds = 0;
  printf(", \"operations\": [");
  for (int i = 0; i < TRACE_COUNT; i++) {
    const struct trace_row *row = &s->trace.row[i];
    double seconds = median(s->operation_seconds + (size_t)i * (size_t)steps, steps);
    bool rounded = i >= TRACE_linear_forward_bf16 && i <= TRACE_linear_backward_weight_bf16;
    double bound = fmax(row->bytes / limits->bandwidth, row->flops / limits->flops[rounded]);
    if (row->calls == 0) continue;
    bounds += bound;
    printf(
        "{\"part\": \"%s\", \"operation\": \"%s\", \"calls\": %.0f, \"ms\": %.6g, \"mbyte\": %.6g, \"gflop\": %.6g, \"limit_ms\": %.6g}, ",
        trace_part_name(trace_part((enum trace_operation)i)), trace_name((enum trace_operation)i), row->calls, 1e3 * seconds,
        row->bytes / 1e6, row->flops / 1e9, 1e3 * bound);
  }
  printf(
      "{\"part\": \"rest\", \"operation\": \"rest\", \"calls\": null, \"ms\": %.4f, \"mbyte\": null, \"gflop\": null, \"limit_ms\": null}]",
      1e3 * median(s->operation_seconds + (size_t)TRACE_COUNT * (size_t)steps, steps));
  printf(", \"limit_ms\": %.3f", 1e3 * bounds);
}

static int run(struct setup *s, struct error *error) {
  const struct arguments *a = &s->arguments;
  struct products products = {0};
  struct limits limits = {0};
  if (measure_limits(s->backend, a->bf16, &limits, error)) return error->code;
  time_steps(s, &products);
  time_operations(s);
  if (measure_limits(s->backend, a->bf16, &limits, error)) goto end;
  double step = median(s->step_seconds, a->steps), alone = median(s->product_seconds, a->steps);
  printf("{\"step_ms\": %.3f, \"products_ms\": %.3f, \"ratio\": %.3f, \"products\": %zu, \"gflop\": %.3f, \"products_gflops\": %.1f, "
         "\"sgemm_gflops\": %.1f, \"copy_gb_s\": %.1f, \"threads\": %d, \"level\": \"%s\", \"bf16\": %s, \"abits\": %d, \"let\": %s",
         1e3 * step, 1e3 * alone, step / alone, products.count, flops(&products) / 1e9, flops(&products) / alone / 1e9,
         limits.flops[a->bf16] / 1e9, limits.bandwidth / 1e9, a->threads, s->backend->level, a->bf16 ? "true" : "false", a->abits,
         a->let ? "true" : "false");
  print_operations(s, &limits);
  printf("}\n");
  s->backend->synchronize(s->backend, error);
end:
  free(products.list);
  return error->code;
}

int main(int argc, char **argv) {
  static struct setup setup = {.arguments = {576, 9, 3, 1536, 512, 3, 16, 64, 1, 30, false, false}};
  struct error error = {0};
  const struct argp argp = {options, parse, NULL, "Times a training step, its operations, and its matrix products alone.",
                            NULL,    NULL,  NULL};
  argp_parse(&argp, argc, argv, 0, NULL, &setup.arguments);
  if (!setup_open(&setup, &error) && setup.step_seconds) run(&setup, &error);
  setup_close(&setup);
  if (error.code) fprintf(stderr, "step: %s\n", error.message);
  return error.code;
}
