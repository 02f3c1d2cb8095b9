/* cuda_launches.c: what one rank of eight does to a block of public models, on a dry device (cuda_dry.h): every launch, copy and product within what a
 * device of compute capability 8.0 and 9.0 takes, and the memory that plans count; and that what is beyond is found. */
#include <stdlib.h>

#include "checkpoint.h"
#include "cuda_dry.h"
#include "fixture.h"
#include "rank.h"
#include "rehearsal.h"

struct kernels *CUDA_OPEN(int device, struct error *error);

static const struct dry_device devices[] = {{.major = 8, .minor = 0, .shared_bytes = 163 << 10},
                                            {.major = 9, .minor = 0, .shared_bytes = 227 << 10}};

static struct kernels *open_dry(struct dry_device *device, const struct dry_device *like) {
  struct error error = {0};
  *device = *like;
  emulation_use(device);
  struct kernels *k = CUDA_OPEN(0, &error);
  if (!k) fail_msg("%s", error.message);
  return k;
}

static void close_dry(struct kernels *k) {
  k->close(k);
  emulation_use(NULL);
}

/* ---- blocks of public models ---- */

/* Tokens go to experts evenly: what the host reads where the latest routing would have left its offsets. */
static struct kernels inner; /* the device's own operations */
static struct routing routing;

static void route_noted(struct kernels *k, const struct routing *to, const data *logits) {
  routing = *to;
  inner.route_forward(k, to, logits);
}

static void download_routed(struct kernels *k, void *to, const void *from, size_t bytes) {
  inner.download(k, to, from, bytes);
  for (int e = 0; from == routing.offset && e <= routing.experts; e++)
    ((int32_t *)to)[e] = (int32_t)((int64_t)routing.tokens * routing.top * e / routing.experts);
}

/* Everything that a rank opens for a block and does to it. What is opened is what the plan counts, and 16 bytes for each buffer of none; from then on
 * the kernels' scratch is all that is added, which is returned. */
static size_t run_block(struct dry_device *device, const struct dry_device *like, const struct model *model, const struct recipe *recipe,
                        int ranks) {
  enum { EMPTY_BUFFERS = 4096 };
  struct error error = {0};
  struct outcome outcome;
  struct rehearsal *plan = malloc(sizeof *plan);
  struct rank *rank = calloc(1, sizeof *rank);
  struct kernels *k = open_dry(device, like);
  size_t before = device->taken;
  assert_true(plan && rank);
  if (rehearse(plan, model, recipe, ranks, k->element_bytes, NULL, &error)) fail_msg("%s", error.message);
  inner = *k;
  routing = (struct routing){0};
  k->route_forward = route_noted;
  k->download = download_routed;
  if (rank_open_block(rank, model, recipe, k, &error) || rank_open_learner(rank, recipe, ranks, &error)) fail_msg("%s", error.message);
  size_t opened = device->taken - before;
  if (opened < plan->allocated || opened > plan->allocated + EMPTY_BUFFERS)
    fail_msg("%zu bytes taken, %zu planned", opened, plan->allocated);
  block_load(&rank->block, rank); /* an address that nobody reads */
  target_pass(&rank->target, true);
  if (learner_run(&rank->learner, 0, &outcome, &error)) fail_msg("%s", error.message);
  record_pack(&rank->room, &rank->learner, (struct learned){rank->learner.lwc.factor, recipe->let ? rank->learner.let.parameter : NULL});
  size_t scratch = device->taken - before - opened;
  assert_int_equal(device->peak, device->taken);
  if (k->synchronize(k, &error)) fail_msg("%s", error.message);
  if (*device->failure) fail_msg("%s", device->failure);
  if (device->empty || device->unaligned) fail_msg("%lu launches are empty, %lu operations unaligned", device->empty, device->unaligned);
  if (device->launches < 500 || device->products < 500) fail_msg("%lu launches, %lu products", device->launches, device->products);
  rank_close(rank);
  close_dry(k);
  assert_int_equal(device->taken, 0);
  free(rank);
  free(plan);
  return scratch;
}

enum { WEIGHTS, TRANSFORMED, SEARCHED, WHOLE_ROWS, RECIPES };
static const char *const recipe_names[RECIPES] = {"W3g128", "W4A4 LET", "W2g64 search", "W8A8 rows"};

static struct recipe recipe_of(int which, const struct model *model, int tokens, int batch) {
  struct recipe recipe;
  recipe_init(&recipe);
  recipe.wbits = 3;
  recipe.group_size = 128;
  recipe.epochs = 1;
  recipe.batch = batch;
  recipe.seqlen = tokens;
  if (which == TRANSFORMED) {
    recipe.wbits = recipe.activations.abits = 4;
    recipe.group_size = 0;
    recipe.let = true;
    recipe.let_up = model->activation != ACTIVATION_GELU;
  }
  if (which == SEARCHED) {
    recipe.wbits = 2;
    recipe.group_size = 64;
    recipe.lwc_init = LWC_INIT_SEARCH;
    recipe.aug_loss = true;
    recipe.optimizer = OPTIMIZER_SIGN;
  }
  if (which == WHOLE_ROWS) { /* the largest groups: a matrix of activations is one */
    recipe.wbits = recipe.activations.abits = 8;
    recipe.group_size = 0;
    recipe.activations.granularity = GRANULARITY_TENSOR;
    recipe.activations.kv_granularity = KV_TOKEN;
  }
  return recipe;
}

/* The rank that has the most samples of 128. */
struct model_case {
  const char *model;
  int tokens, batch, ranks;
  double most_bytes; /* of memory, in pages, on a card of 80 GB; 0: not asked */
};

static void check_recipe(const struct model_case *c, const struct model *model, int which) {
  struct recipe recipe = recipe_of(which, model, c->tokens, c->batch);
  for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
    struct dry_device device;
    size_t scratch = run_block(&device, &devices[i], model, &recipe, c->ranks);
    if (c->most_bytes > 0 && (double)device.paged_peak > c->most_bytes) fail_msg("%s: %zu bytes", c->model, device.paged_peak);
    if (i == 0)
      print_message("    %-15s %d tokens, batch %3d, rank of %d, %-12s %6.2f GB at most (%.2f in pages; scratch %.3f), %5lu launches, %5lu "
                    "products\n",
                    c->model, c->tokens, c->batch, c->ranks, recipe_names[which], (double)device.peak / 1e9,
                    (double)device.paged_peak / 1e9, (double)scratch / 1e9, device.launches, device.products);
  }
}

static void blocks_of_public_models(void **state) {
  (void)state;
  const struct model_case cases[] = {
      {"llama-2-7b", 2048, 8, 8, 0},     {"llama-2-13b", 2048, 128, 8, 0},   {"llama-2-70b", 2048, 8, 8, 75e9},
      {"llama-2-70b", 2048, 8, 1, 75e9}, {"llama-3.1-405b", 4096, 16, 8, 0}, {"mixtral-8x7b", 2048, 8, 8, 0},
      {"mixtral-8x22b", 2048, 8, 8, 0},  {"opt-66b", 2048, 8, 8, 0},         {"falcon-180b", 2048, 8, 8, 75e9},
      {"falcon-180b", 2048, 8, 1, 75e9},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct error error = {0};
    struct model model;
    bool headers;
    char path[512];
    snprintf(path, sizeof path, PLANS "/%s", cases[i].model);
    if (checkpoint_describe(path, &model, &headers, &error)) fail_msg("%s", error.message);
    for (int which = 0; which < RECIPES; which++) check_recipe(&cases[i], &model, which);
  }
}

/* ---- what is beyond a device ---- */

/* The failure that the device or the backend has after what a case does to it. */
struct beyond {
  struct dry_device device;
  struct kernels *k;
  float *floats; /* [1024] */
  data *values;  /* [64, 64] */
};

static void beyond_open(struct beyond *b, const struct dry_device *like) {
  b->k = open_dry(&b->device, like);
  b->floats = b->k->allocate(b->k, 1024 * sizeof *b->floats);
  b->values = b->k->allocate(b->k, (size_t)64 * 64 * b->k->element_bytes);
}

static void beyond_close(struct beyond *b, const char *message) {
  struct error error = {0};
  b->k->synchronize(b->k, &error);
  if (!strstr(error.code ? error.message : b->device.failure, message))
    fail_msg("'%s' and '%s' instead of '%s'", error.message, b->device.failure, message);
  b->k->release(b->k, b->floats);
  b->k->release(b->k, b->values);
  close_dry(b->k);
}

static void launches_beyond_a_device(void **state) {
  (void)state;
  struct beyond b;
  struct attention_shape wide = {.tokens = 16, .heads = 1, .kv_heads = 1, .head_size = 256}, many = {16, 70000, 70000, 1, 0};
  const struct dry_device small = {.major = 8, .minor = 9, .shared_bytes = 99 << 10},
                          old = {.major = 7, .minor = 5, .shared_bytes = 64 << 10};
  struct error error = {0};

  beyond_open(&b, &devices[0]); /* 2^32 blocks, which are none in 32 bits */
  b.k->fill(b.k, b.floats, 1, (int64_t)1 << 40);
  beyond_close(&b, "a launch of 4294967296 x 1 blocks");

  beyond_open(&b, &devices[0]);
  b.k->attention_forward(b.k, b.values, NULL, b.values, b.values, b.values, &many);
  beyond_close(&b, "a launch of 1 x 70000 blocks");

  beyond_open(&b, &small);
  b.k->attention_backward(b.k, b.values, b.values, b.values, b.values, b.values, b.floats, b.values, b.values, b.values, &wide);
  beyond_close(&b, "bytes of shared memory, of 101376");

  beyond_open(&b, &devices[0]);
  float host = 0;
  b.k->sigmoid_inverse(b.k, b.floats, 1, 8);
  b.k->matrix_vector(b.k, &host, b.values, b.floats, 64, 64);
  beyond_close(&b, "a kernel's argument: 4 bytes");

  struct dry_device device = old;
  emulation_use(&device);
  assert_null(CUDA_OPEN(0, &error));
  assert_non_null(strstr(error.message, "compute capability 7.5"));
  emulation_use(NULL);
}

static void copies_beyond_their_memory(void **state) {
  (void)state;
  struct beyond b;
  char host[4097];
  beyond_open(&b, &devices[0]);
  b.k->upload(b.k, b.floats, host, sizeof host);
  beyond_close(&b, "a copy: 4097 bytes");
  beyond_open(&b, &devices[0]);
  b.k->download(b.k, host, b.floats + 1, 4096);
  beyond_close(&b, "a copy: 4096 bytes");
  beyond_open(&b, &devices[0]);
  b.k->copy(b.k, b.values, b.floats, 4097);
  beyond_close(&b, "a copy: 4097 bytes");
  beyond_open(&b, &devices[0]);
  b.k->clear(b.k, b.floats - 1, 4);
  beyond_close(&b, "a clear: 4 bytes");
  beyond_open(&b, &devices[0]); /* within */
  b.k->upload(b.k, b.floats, host, 4096);
  b.k->copy(b.k, b.values, b.floats, 4096);
  beyond_close(&b, "");
  assert_string_equal(b.device.failure, "");
}

static void products_beyond_cublas(void **state) {
  (void)state;
  struct beyond b;
  beyond_open(&b, &devices[0]);
  b.k->linear_forward(b.k, b.values, b.values, b.values, NULL, 64, 64, 65, false);
  beyond_close(&b, "bytes at");
  beyond_open(&b, &devices[0]);
  b.k->linear_forward(b.k, b.values, b.values, b.values, NULL, 8, 12, 8, false);
  beyond_close(&b, "its columns are not at multiples of 16 bytes");
  beyond_open(&b, &devices[0]);
  b.k->linear_forward(b.k, data_at(b.k, b.values, 4), b.values, b.values, NULL, 8, 8, 8, false);
  beyond_close(&b, "its columns are not at multiples of 16 bytes");
  beyond_open(&b, &devices[0]);
  b.k->linear_forward(b.k, b.values, b.values, b.values, (data *)(void *)&b, 8, 8, 8, false);
  beyond_close(&b, "the bias: 16 bytes");
  beyond_open(&b, &devices[0]);
  b.k->linear_forward(b.k, b.values, b.values, b.values, NULL, 1, (int64_t)1 << 31, 1, false);
  beyond_close(&b, "is 2147483648 x 1");
}

/* More than any card has: no memory, and the backend says so. */
static void memory_ends(void **state) {
  (void)state;
  struct beyond b;
  beyond_open(&b, &devices[0]);
  assert_null(b.k->allocate(b.k, (size_t)1 << 43));
  beyond_close(&b, "");
}

/* ---- plans that are measured ---- */

/* `plan --measure` on a device: the operations of a whole block, given memory of the device alone. On the emulation that computes. */
static void plans_are_measured(void **state) {
  (void)state;
  struct error error = {0};
  struct fixture f;
  struct recipe recipe;
  struct rehearsal *rehearsal = malloc(sizeof *rehearsal);
  struct kernels *k = CUDA_OPEN(0, &error);
  assert_true(rehearsal && k);
  fixture_open(&f, "llama_mha", "expected.safetensors");
  recipe_init(&recipe);
  recipe.group_size = 32;
  recipe.epochs = recipe.samples = recipe.batch = 1;
  recipe.seqlen = TOKENS;
  if (rehearse(rehearsal, &f.model, &recipe, 1, 0, k, &error)) fail_msg("%s", error.message);
  assert_int_equal(rehearsal->step.allocated, 0);
  assert_true(rehearsal->block.row[TRACE_quantize_codes].seconds > 0);
  fixture_close(&f);
  k->close(k);
  free(rehearsal);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(blocks_of_public_models),
      cmocka_unit_test(launches_beyond_a_device),
      cmocka_unit_test(copies_beyond_their_memory),
      cmocka_unit_test(products_beyond_cublas),
      cmocka_unit_test(memory_ends),
      cmocka_unit_test(plans_are_measured),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
