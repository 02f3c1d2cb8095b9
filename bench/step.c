/* step.c: what one training step costs beside its matrix products. Steps of a block with random weights are timed, then exactly the
 * products that a step does are done again by themselves: same shapes, same memory, same order (docs/benchmarks.md). */
#include <argp.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "clock.h"
#include "cpu/backend.h"
#include "learn.h"

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

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *seconds, int count) {
  qsort(seconds, (size_t)count, sizeof *seconds, ascending);
  return seconds[count / 2];
}

static float uniform(uint32_t *state) { /* -1 .. 1 */
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) * 0x1p-23f - 1;
}

static void fill_image(const struct model *model, char *image) {
  uint32_t state = 1;
  for (int i = 0; i < model->tensors; i++) {
    const struct block_tensor *tensor = &model->tensor[i];
    float *values = (float *)(void *)(image + tensor->image_offset), spread = sqrtf(3.0f / (float)tensor->columns);
    for (int64_t j = 0; j < tensor->rows * tensor->columns; j++) values[j] = tensor->dimensions == 1 ? 1 : uniform(&state) * spread;
  }
}

int main(int argc, char **argv) {
  struct arguments a = {576, 9, 3, 1536, 512, 3, 16, 64, 1, 30, false, false};
  const struct argp argp = {options, parse, NULL, "Times a training step and its matrix products alone.", NULL, NULL, NULL};
  argp_parse(&argp, argc, argv, 0, NULL, &a);

  struct error error = {0};
  struct model model;
  char config[512];
  snprintf(config, sizeof config,
           "{\"model_type\": \"llama\", \"num_hidden_layers\": 1, \"hidden_size\": %d, \"intermediate_size\": %d, "
           "\"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"vocab_size\": 100}",
           a.hidden, a.ffn, a.heads, a.kv_heads);
  struct recipe recipe;
  recipe_init(&recipe);
  recipe.wbits = a.bits;
  recipe.activations.abits = a.abits;
  recipe.group_size = a.group;
  recipe.let = a.let;
  recipe.stored_scale = false;
  recipe.bf16_products = a.bf16;
  recipe.epochs = a.steps + 3;
  recipe.samples = 1;
  struct world world = {.size = 1, .local_size = 1};
  struct kernels *k = kernels_open("cpu", a.threads, 0, &error);
  char *image = NULL;
  double *step_seconds = NULL, *product_seconds = NULL;
  struct block block;
  struct block_use use = {.tokens = a.tokens, .effective = true, .quantized_inputs = a.abits < 16, .trained = true};
  struct let_statistics statistics;
  struct shard shard;
  if (error.code || model_parse(&model, config, "config", &error) || block_init(&block, &model, k, &use, &error) ||
      let_statistics_init(&statistics, &model, k, &error))
    goto fail;
  shard_init(&shard, 1, 1, 0, 1);
  int64_t elements = (int64_t)a.tokens * a.hidden;
  struct target target = {.world = &world, .k = k, .block = &block, .shard = &shard, .statistics = &statistics};
  struct learner learner = {.recipe = &recipe, .world = &world, .k = k, .block = &block, .shard = &shard, .target = &target};
  target.x = k->allocate(k, (size_t)elements * 4);
  image = calloc(1, model.image_bytes);
  step_seconds = calloc((size_t)a.steps, sizeof *step_seconds);
  product_seconds = calloc((size_t)a.steps, sizeof *product_seconds);
  if (!image || !target.x || !step_seconds || !product_seconds || target_init(&target, &error) || learner_init(&learner, &error)) goto fail;
  fill_image(&model, image);
  block_load(&block, image);
  uint32_t state = 7;
  for (int64_t i = 0; i < elements; i++) ((float *)learner.x_q)[i] = ((float *)target.x)[i] = uniform(&state);
  target_pass(&target, true);

  struct products products = {0};
  block.quantizer = recipe.activations;
  learner_start(&learner);
  learner_begin(&learner);
  for (int step = 0; step < 2; step++) learner_step(&learner, step, a.steps + 3);
  k->state->observer = record;
  k->state->observer_context = &products;
  learner_step(&learner, 2, a.steps + 3);
  k->state->observer = NULL;
  for (int step = 0; step < a.steps; step++) { /* in turn, so that a noisy machine slows both */
    double begin = now();
    learner_step(&learner, step + 3, a.steps + 3);
    double middle = now();
    replay(k, &products, a.bf16);
    step_seconds[step] = middle - begin;
    product_seconds[step] = now() - middle;
  }
  double step = median(step_seconds, a.steps), alone = median(product_seconds, a.steps);
  printf("{\"step_ms\": %.2f, \"products_ms\": %.2f, \"ratio\": %.3f, \"products\": %zu, \"gflop\": %.2f, \"products_gflops\": %.1f, "
         "\"threads\": %d, \"level\": \"%s\", \"bf16\": %s, \"abits\": %d, \"let\": %s}\n",
         1e3 * step, 1e3 * alone, step / alone, products.count, flops(&products) / 1e9, flops(&products) / alone / 1e9, a.threads, k->level,
         a.bf16 ? "true" : "false", a.abits, a.let ? "true" : "false");
  free(products.list);
  free(image);
  free(step_seconds);
  free(product_seconds);
  learner_free(&learner);
  target_free(&target);
  let_statistics_free(&statistics);
  k->release(k, target.x);
  block_free(&block);
  k->close(k);
  return 0;
fail:
  free(image);
  free(step_seconds);
  free(product_seconds);
  fprintf(stderr, "step: %s\n", error.message);
  return 1;
}
