/* test_let.c: learnable equivalent transformation in a block of every family (fixtures/make_let.py). Without quantization it changes nothing,
 * and what it folds is what PyTorch folds; with quantized weights and activations the block's output and the gradient of every learnable
 * parameter are those of autograd in double. */
#include "fixture.h"
#include "learn.h"

static const char *const let_folders[] = {"llama_mha", "llama_gqa_tied", "mistral",    "qwen2",      "qwen3",  "opt",
                                          "opt_post",  "falcon_7b",      "falcon_40b", "falcon_11b", "mixtral"};
enum { LET_FOLDERS = sizeof let_folders / sizeof *let_folders };

enum { EQUIVALENT, FOLDED, FULL, OUTPUT, GRADIENT, BOUNDS };
static const struct bound all_bounds[BOUNDS] = {
    [EQUIVALENT] = {"output after folding, not quantized, against before, relative norm", 1e-5, 0},
    [FOLDED] = {"folded tensors", 1e-5, 0},
    [FULL] = {"full-precision output", 2e-5, 0},
    [OUTPUT] = {"quantized output", 1e-5, 0},
    [GRADIENT] = {"gradients of s, delta, gamma and beta", 5e-5, 0},
};

/* A learner over one sample of block TRAINED, with the fixture's parameters. */
struct setup {
  struct memory memory;
  struct fixture *f;
  struct kernels *k;
  struct recipe recipe;
  struct world world;
  struct shard shard;
  struct block block;
  struct target target;
  struct learner learner;
  data *x; /* [T, hidden] */
  const char *where;
  struct bound *bounds;
};

/* An array of the forward's fixture. */
static const float *of_model(struct setup *s, const char *name, int64_t count, const char *folder) {
  struct safetensors *file = expected_open(folder, "expected.safetensors");
  const struct tensor *tensor = safetensors_find(file, name);
  if (!tensor || tensor->bytes < (size_t)count * sizeof(float)) fail_msg("%s: not in the fixture", name);
  float *values = host_floats(&s->memory, count);
  struct error error = {0};
  if (safetensors_read(tensor, 0, (size_t)count * sizeof *values, values, &error)) fail_msg("%s", error.message);
  safetensors_close(file);
  return values;
}

/* The fixture's gamma (end 0), beta (1), or the gradients of these. */
static float *clipping(struct setup *s, const char *prefix, int linear, int end) {
  const struct linear *layer = &s->f->model.linear[linear];
  const struct quantized_shape *shape = &s->learner.lwc.shape[linear];
  char name[160];
  snprintf(name, sizeof name, "%s%s.%s", prefix, end ? "beta" : "gamma", layer->name);
  return expected_rows(&s->memory, s->f->expected, name, &s->f->model.tensor[layer->weight].source, layer->rows, groups_per_row(shape));
}

static void load_parameters(struct setup *s) {
  struct learner *l = &s->learner;
  for (int i = 0; i < s->f->model.linears; i++)
    for (int end = 0; end < 2 && s->f->model.linear[i].quantized; end++)
      s->k->upload(s->k, l->lwc.parameter + l->lwc.first[i] + end * groups_of(&l->lwc.shape[i]), clipping(s, "", i, end),
                   (size_t)groups_of(&l->lwc.shape[i]) * sizeof(float));
  lwc_update_factors(&l->lwc);
  for (int place = 0; place < LET_PLACES; place++) {
    const char *name = let_place_name((enum let_place)place);
    int64_t count = l->let.channels[place];
    char key[40];
    snprintf(key, sizeof key, "s.%s", name);
    assert_int_equal(count > 0, safetensors_find(s->f->expected, key) != NULL);
    if (!count) continue;
    s->k->upload(s->k, l->let.parameter + l->let.s[place], expected_floats(&s->memory, s->f->expected, count, "s.%s", name),
                 (size_t)count * sizeof(float));
    snprintf(key, sizeof key, "delta.%s", name);
    assert_int_equal(l->let.delta[place] != ABSENT, safetensors_find(s->f->expected, key) != NULL);
    if (l->let.delta[place] != ABSENT)
      s->k->upload(s->k, l->let.parameter + l->let.delta[place], expected_floats(&s->memory, s->f->expected, count, "delta.%s", name),
                   (size_t)count * sizeof(float));
  }
}

static void setup_open(struct setup *s, struct fixture *f, const char *folder, const struct walk *walk, struct bound *bounds) {
  struct error error = {0};
  *s = (struct setup){.memory = {.k = walk->k}, .f = f, .k = walk->k, .world = {.size = 1, .local_size = 1}, .bounds = bounds};
  s->where = walk->name;
  recipe_init(&s->recipe);
  s->recipe.wbits = 4;
  s->recipe.group_size = 32;
  s->recipe.activations.abits = 6;
  s->recipe.let = true;
  s->recipe.let_up = f->model.activation != ACTIVATION_GELU;
  s->recipe.stored_scale = false;
  s->recipe.samples = 1;
  s->recipe.seqlen = TOKENS;
  shard_init(&s->shard, 1, 1, 0, 1);
  open_block(&s->block, f, s->k, true);
  block_load(&s->block, f->image[TRAINED]);
  s->block.quantizer = s->recipe.activations;
  s->learner =
      (struct learner){.recipe = &s->recipe, .world = &s->world, .k = s->k, .block = &s->block, .shard = &s->shard, .target = &s->target};
  if (learner_init(&s->learner, &error)) fail_msg("%s", error.message);
  load_parameters(s);
  s->x = device_data(&s->memory, of_model(s, "hidden.1", hidden_count(f), folder), hidden_count(f));
}

static void setup_close(struct setup *s) {
  learner_free(&s->learner);
  block_free(&s->block);
  memory_free(&s->memory);
}

/* ---- without quantization ---- */

/* The linear weights as let_fold scales them, where the quantizer would put its own. */
static void scale_weights(struct setup *s) {
  for (int i = 0; i < s->f->model.linears; i++) {
    const struct linear *linear = &s->f->model.linear[i];
    struct weight_scales scales = let_scales(&s->learner.let, i);
    if (linear->quantized)
      s->k->scale_weight(s->k, block_tensor(&s->block, BLOCK_QUANTIZED, linear->weight),
                         block_tensor(&s->block, BLOCK_FULL, linear->weight), &scales, linear->rows, linear->columns);
  }
}

static const float *output(struct setup *s, enum block_weights which) {
  int64_t n = hidden_count(s->f);
  data *y = poisoned_data(&s->memory, n);
  block_forward(&s->block, which, y, s->x);
  return fetched_data(&s->memory, y, n);
}

/* What is folded, where the fixture has it; elsewhere the tensor is as it was. */
static void check_folded(struct setup *s) {
  const struct model *model = &s->f->model;
  for (int i = 0; i < model->tensors; i++) {
    const struct block_tensor *tensor = &model->tensor[i];
    bool weight = model_quantizes(model, i);
    int64_t count = tensor->rows * tensor->columns;
    char key[120];
    snprintf(key, sizeof key, "%s.%s", weight ? "w_folded" : "folded", tensor->name);
    const float *got = fetched_data(&s->memory, block_tensor(&s->block, BLOCK_QUANTIZED, i), count);
    const float *plain = fetched_data(&s->memory, block_tensor(&s->block, BLOCK_FULL, i), count);
    if (!safetensors_find(s->f->expected, key)) {
      assert_memory_equal(got, plain, (size_t)count * sizeof *got);
      continue;
    }
    const float *want = expected_tensor(&s->memory, s->f, weight ? "w_folded" : "folded", i);
    bound_check(&s->bounds[FOLDED], peak_error(got, widened(&s->memory, want, count), count), tensor->name);
  }
}

static void check_equivalence(struct setup *s) {
  int64_t n = hidden_count(s->f);
  const float *before = output(s, BLOCK_FULL);
  const float *want = expected_floats(&s->memory, s->f->expected, n, "y_full");
  let_fold(&s->learner.let, &s->block, s->learner.let.parameter);
  scale_weights(s);
  check_folded(s);
  s->block.quantizer = (struct activation_quantizer){.abits = 16, .kv_bits = 16};
  const float *after = output(s, BLOCK_QUANTIZED);
  s->block.quantizer = s->recipe.activations;
  bound_check(&s->bounds[FULL], peak_error(before, widened(&s->memory, want, n), n), s->where);
  bound_check(&s->bounds[EQUIVALENT], norm_error(after, widened(&s->memory, before, n), n), s->where);
  assert_memory_not_equal(after, before, (size_t)n * sizeof *after); /* it did something */
}

/* ---- with quantization ---- */

static void check_part(struct setup *s, const float *got, const float *want, int64_t count, const char *what, const char *which) {
  char where[160];
  snprintf(where, sizeof where, "%s %s, %s", what, which, s->where);
  bound_check(&s->bounds[GRADIENT], peak_error(got, widened(&s->memory, want, count), count), where);
}

static void check_gradients(struct setup *s, const float *gradient) {
  struct learner *l = &s->learner;
  for (int i = 0; i < s->f->model.linears; i++)
    for (int end = 0; end < 2 && s->f->model.linear[i].quantized; end++)
      check_part(s, gradient + l->lwc.first[i] + end * groups_of(&l->lwc.shape[i]), clipping(s, "grad.", i, end),
                 groups_of(&l->lwc.shape[i]), end ? "beta" : "gamma", s->f->model.linear[i].name);
  const float *let = gradient + 2 * l->lwc.groups;
  for (int place = 0; place < LET_PLACES; place++) {
    const char *name = let_place_name((enum let_place)place);
    int64_t count = l->let.channels[place];
    if (!count) continue;
    check_part(s, let + l->let.s[place], expected_floats(&s->memory, s->f->expected, count, "grad.s.%s", name), count, "s", name);
    if (l->let.delta[place] != ABSENT)
      check_part(s, let + l->let.delta[place], expected_floats(&s->memory, s->f->expected, count, "grad.delta.%s", name), count, "delta",
                 name);
  }
}

static void check_quantized(struct setup *s, const char *folder) {
  struct learner *l = &s->learner;
  int64_t n = hidden_count(s->f);
  data *dy = device_data(&s->memory, of_model(s, "dy", n, folder), n);
  learner_quantize(l, (struct learned){l->lwc.factor, l->let.parameter}, false);
  const float *got = output(s, BLOCK_QUANTIZED), *want = expected_floats(&s->memory, s->f->expected, n, "y");
  bound_check(&s->bounds[OUTPUT], peak_error(got, widened(&s->memory, want, n), n), s->where);
  for (int panels = 0; panels < 2; panels++) { /* whole weights, and some rows at a time */
    if (panels) s->block.panel = SMALL_PANEL;
    learner_backward(l, SAMPLE_WHOLE, l->gradient, dy, s->x);
    s->k->sigmoid_backward(s->k, l->gradient, l->gradient, l->lwc.parameter, 2 * l->lwc.groups);
    check_gradients(s, fetched_floats(&s->memory, l->gradient, l->count));
  }
}

/* ---- the tests ---- */

static void every_family(void (*check)(struct setup *s, const char *folder), const int *shown, int count) {
  for (int i = 0; i < LET_FOLDERS; i++) {
    struct bound bounds[BOUNDS];
    struct fixture f;
    memcpy(bounds, all_bounds, sizeof bounds);
    fixture_open(&f, let_folders[i], "let.safetensors");
    for (struct walk walk = {0}; walk_next(&walk);) {
      struct setup s;
      setup_open(&s, &f, let_folders[i], &walk, bounds);
      check(&s, let_folders[i]);
      setup_close(&s);
    }
    fixture_close(&f);
    print_message("  %s\n", let_folders[i]);
    for (int j = 0; j < count; j++) bound_print(&bounds[shown[j]], 1);
  }
}

static void fold(struct setup *s, const char *folder) {
  (void)folder;
  check_equivalence(s);
}

static void folding_changes_nothing(void **context) {
  (void)context;
  every_family(fold, (const int[]){EQUIVALENT, FOLDED, FULL}, 3);
}

static void quantized_blocks_are_those_of_autograd(void **context) {
  (void)context;
  every_family(check_quantized, (const int[]){OUTPUT, GRADIENT}, 2);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(folding_changes_nothing),
      cmocka_unit_test(quantized_blocks_are_those_of_autograd),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
