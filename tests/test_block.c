/* test_block.c: for each random model of the fixtures, what transformers and torch's autograd computed with it: forward of both blocks, the
 * gradients of block 1, logits and mean negative log-likelihood through the head in pieces. Rotary tables against the published formulas.
 * Clipping of a whole block is that of each linear layer with its own factors. */
#include "block.h"
#include "checkpoint.h"
#include "compare.h"
#include "lwc.h"

enum { SAMPLES = 2, TOKENS = 24, BLOCKS = 2, TRAINED = 1 };

static const char *const folders[] = {"llama_mha", "llama_gqa_tied", "llama3_rope", "llama_linear_rope", "mistral", "qwen2", "qwen3"};
enum { FOLDERS = sizeof folders / sizeof *folders };

/* An open model with its blocks on the host, and what is expected of it. */
struct fixture {
  struct memory memory;
  struct model model;
  struct checkpoint *checkpoint;
  struct safetensors *expected;
  void *image[BLOCKS];
};

static void fixture_open(struct fixture *f, const char *name) {
  struct error error = {0};
  *f = (struct fixture){0};
  if (checkpoint_open(fixture_path(name, "").text, &f->model, &f->checkpoint, &error)) fail_msg("%s", error.message);
  f->expected = expected_open(name, "expected.safetensors");
  for (int i = 0; i < BLOCKS; i++) {
    f->image[i] = host(&f->memory, (int64_t)f->model.image_bytes, 1);
    if (checkpoint_read_block(f->checkpoint, &f->model, i, f->image[i], &error)) fail_msg("%s", error.message);
  }
}

static void fixture_close(struct fixture *f) {
  checkpoint_close(f->checkpoint);
  safetensors_close(f->expected);
  memory_free(&f->memory);
}

static int64_t hidden_count(const struct fixture *f) { /* of one sample */
  return (int64_t)TOKENS * f->model.hidden;
}

/* Input of block i, or output of the last, of all samples. */
static const float *hidden(struct fixture *f, int i) {
  return expected_floats(&f->memory, f->expected, SAMPLES * hidden_count(f), "hidden.%d", i);
}

static void open_block(struct block *block, const struct fixture *f, struct kernels *k, bool trained) {
  struct error error = {0};
  if (block_init(block, &f->model, k, TOKENS, true, trained, &error)) fail_msg("%s", error.message);
}

/* The linear weights where the quantizer would put its own. */
static void copy_weights(struct block *block) {
  for (int i = 0; i < LINEARS; i++) {
    const struct linear *linear = &block->model->linear[i];
    block->k->copy(block->k, block_effective(block, (enum linear_role)i), block_weight(block, (enum linear_role)i, BLOCK_FULL),
                   (size_t)(linear->rows * linear->columns) * block->k->element_bytes);
  }
}

/* ---- forward ---- */

static void embeddings_are_the_first_hidden_states(void **context) {
  (void)context;
  for (int i = 0; i < FOLDERS; i++) {
    struct fixture f;
    struct error error = {0};
    fixture_open(&f, folders[i]);
    int64_t count = SAMPLES * hidden_count(&f);
    float *got = poison(&f.memory, count);
    const int32_t *ids = expected_bytes(&f.memory, f.expected, SAMPLES * TOKENS * sizeof *ids, "input_ids");
    if (checkpoint_embed(f.checkpoint, ids, SAMPLES * TOKENS, got, &error)) fail_msg("%s", error.message);
    assert_memory_equal(got, hidden(&f, 0), (size_t)count * sizeof *got);
    fixture_close(&f);
  }
}

static void check_forward(struct bound *bound, struct fixture *f, struct kernels *k, const char *where) {
  struct memory d = {.k = k};
  struct block block;
  int64_t n = hidden_count(f);
  open_block(&block, f, k, false);
  for (int i = 0; i < BLOCKS; i++) {
    const float *in = hidden(f, i), *out = hidden(f, i + 1);
    block_load(&block, f->image[i]);
    copy_weights(&block);
    for (int sample = 0; sample < SAMPLES; sample++) {
      data *x = device_data(&d, in + sample * n, n), *y = poisoned_data(&d, n), *again = poisoned_data(&d, n);
      block_forward(&block, BLOCK_FULL, y, x);
      float *got = fetched_data(&d, y, n);
      bound_check(bound, peak_error(got, widened(&d, out + sample * n, n), n), where);
      block_forward(&block, BLOCK_QUANTIZED, again, x);
      assert_memory_equal(fetched_data(&d, again, n), got, (size_t)n * sizeof *got);
      block_forward(&block, BLOCK_FULL, x, x);
      assert_memory_equal(fetched_data(&d, x, n), got, (size_t)n * sizeof *got);
    }
  }
  block_free(&block);
  memory_free(&d);
}

static void forward_is_that_of_transformers(void **context) {
  (void)context;
  for (int i = 0; i < FOLDERS; i++) {
    struct bound bound = {folders[i], 1e-5, 0};
    struct fixture f;
    fixture_open(&f, folders[i]);
    for (struct walk walk = {0}; walk_next(&walk);) check_forward(&bound, &f, walk.k, walk.name);
    fixture_close(&f);
    bound_print(&bound, 1);
  }
}

/* ---- backward ---- */

struct gradients {
  struct block *block;
  struct memory *memory;
  float *weight[LINEARS]; /* host */
  int calls;
};

static void take_gradient(void *context, enum linear_role role, const data *dw) {
  struct gradients *gradients = context;
  const struct linear *linear = &gradients->block->model->linear[role];
  assert_null(gradients->weight[role]);
  gradients->weight[role] = fetched_data(gradients->memory, dw, linear->rows * linear->columns);
  gradients->calls++;
}

static struct gradients backward(struct memory *d, struct block *block, enum block_weights which, data *dx, const data *dy, const data *x) {
  struct gradients gradients = {.block = block, .memory = d};
  struct gradient_sink sink = {take_gradient, &gradients};
  data *y = poisoned_data(d, (int64_t)TOKENS * block->model->hidden);
  block_forward(block, which, y, x);
  block_backward(block, which, dx, dy, x, &sink);
  assert_int_equal(gradients.calls, LINEARS);
  return gradients;
}

static void check_backward(struct bound *bound, struct fixture *f, struct kernels *k, const char *where) {
  struct memory d = {.k = k};
  struct block block;
  int64_t n = hidden_count(f);
  open_block(&block, f, k, true);
  block_load(&block, f->image[TRAINED]);
  copy_weights(&block);
  data *x = device_data(&d, hidden(f, TRAINED), n), *dx = poisoned_data(&d, n), *again = poisoned_data(&d, n);
  data *dy = device_data(&d, expected_floats(&d, f->expected, n, "dy"), n);
  struct gradients full = backward(&d, &block, BLOCK_FULL, dx, dy, x), quantized = backward(&d, &block, BLOCK_QUANTIZED, again, dy, x);
  struct gradients without = backward(&d, &block, BLOCK_FULL, NULL, dy, x); /* the input's left out, as in training */
  float *got = fetched_data(&d, dx, n);
  bound_check(bound, peak_error(got, widened(&d, expected_floats(&d, f->expected, n, "dx"), n), n), where);
  assert_memory_equal(fetched_data(&d, again, n), got, (size_t)n * sizeof *got);
  for (int i = 0; i < LINEARS; i++) {
    const struct linear *linear = &f->model.linear[i];
    int64_t count = linear->rows * linear->columns;
    char place[120];
    snprintf(place, sizeof place, "%s, %s", linear->name, where);
    const float *want = expected_floats(&d, f->expected, count, "grad.%s.weight", linear->name);
    bound_check(bound, peak_error(full.weight[i], widened(&d, want, count), count), place);
    assert_memory_equal(quantized.weight[i], full.weight[i], (size_t)count * sizeof(float));
    assert_memory_equal(without.weight[i], full.weight[i], (size_t)count * sizeof(float));
  }
  block_free(&block);
  memory_free(&d);
}

static void backward_is_that_of_autograd(void **context) {
  (void)context;
  for (int i = 0; i < FOLDERS; i++) {
    struct bound bound = {folders[i], 2e-5, 0};
    struct fixture f;
    fixture_open(&f, folders[i]);
    for (struct walk walk = {0}; walk_next(&walk);) check_backward(&bound, &f, walk.k, walk.name);
    fixture_close(&f);
    bound_print(&bound, 1);
  }
}

/* ---- head ---- */

/* Final norm and head over one sample's last hidden states, the vocabulary in pieces of uneven size; logits on the host. */
static struct cross_entropy head(struct memory *d, struct fixture *f, const float *in, const int32_t *target, float *logits) {
  struct kernels *k = d->k;
  struct error error = {0};
  int64_t H = f->model.hidden, V = f->model.vocabulary;
  float *norm = poison(d, H), *unset = host_floats(d, TOKENS);
  data *x = device_data(d, in, hidden_count(f));
  int32_t *dev_target = device(d, TOKENS * sizeof *dev_target);
  struct cross_entropy entropy = {poisoned_floats(d, TOKENS), device_floats(d, unset, TOKENS), poisoned_floats(d, TOKENS)};
  k->fill(k, entropy.maximum, -INFINITY, TOKENS);
  k->upload(k, dev_target, target, TOKENS * sizeof *target);
  if (checkpoint_read_final_norm(f->checkpoint, norm, &error)) fail_msg("%s", error.message);
  k->rmsnorm_forward(k, x, x, device_data(d, norm, H), TOKENS, H, f->model.norm_eps);
  for (int64_t first = 0, rows; first < V; first += rows) {
    rows = first + 37 < V ? 37 : V - first;
    float *weight = poison(d, rows * H);
    data *piece = poisoned_data(d, TOKENS * rows);
    if (checkpoint_read_head(f->checkpoint, first, rows, weight, &error)) fail_msg("%s", error.message);
    k->linear_forward(k, piece, x, device_data(d, weight, rows * H), NULL, TOKENS, H, rows, false);
    k->cross_entropy_piece(k, &entropy, piece, dev_target, TOKENS, first, rows);
    float *got = fetched_data(d, piece, TOKENS * rows);
    for (int64_t i = 0; i < TOKENS * rows; i++) logits[i / rows * V + first + i % rows] = got[i];
  }
  return entropy;
}

static void check_head(struct bound *bounds, struct fixture *f, struct kernels *k, const char *where) {
  struct memory d = {.k = k};
  int64_t n = hidden_count(f), count = (int64_t)TOKENS * f->model.vocabulary;
  const float *last = hidden(f, BLOCKS), *nll = expected_floats(&d, f->expected, SAMPLES, "nll");
  const int32_t *ids = expected_bytes(&d, f->expected, SAMPLES * TOKENS * sizeof *ids, "input_ids");
  for (int sample = 0; sample < SAMPLES; sample++) {
    int32_t target[TOKENS];
    float *logits = poison(&d, count);
    double sum = 0;
    for (int t = 0; t < TOKENS; t++) target[t] = t + 1 < TOKENS ? ids[sample * TOKENS + t + 1] : -1;
    struct cross_entropy entropy = head(&d, f, last + sample * n, target, logits);
    float *maximum = fetched_floats(&d, entropy.maximum, TOKENS), *total = fetched_floats(&d, entropy.sum, TOKENS);
    float *chosen = fetched_floats(&d, entropy.target, TOKENS);
    for (int t = 0; t < TOKENS - 1; t++) sum += maximum[t] + log(total[t]) - chosen[t];
    bound_check(&bounds[1], fabs(sum / (TOKENS - 1) - nll[sample]) / nll[sample], where);
    if (sample > 0) continue;
    const float *want = expected_floats(&d, f->expected, count, "logits");
    bound_check(&bounds[0], peak_error(logits, widened(&d, want, count), count), where);
  }
  memory_free(&d);
}

static void head_gives_logits_and_nll(void **context) {
  (void)context;
  struct bound bounds[] = {{"logits", 1e-5, 0}, {"nll", 1e-6, 0}};
  for (int i = 0; i < FOLDERS; i++) {
    struct fixture f;
    fixture_open(&f, folders[i]);
    for (struct walk walk = {0}; walk_next(&walk);) check_head(bounds, &f, walk.k, walk.name);
    fixture_close(&f);
  }
  bound_print(bounds, 2);
}

/* ---- rotary tables ---- */

/* The published formulas, in double. llama3: as it is where the wavelength is short, divided by the factor where it is long, and between
 * them mixed by the number of turns that the original context holds. */
static double frequency(const struct rope_settings *rope, int pair, int head_size) {
  double plain = pow(rope->theta, -2.0 * pair / head_size);
  if (rope->scaling == ROPE_PLAIN) return plain;
  if (rope->scaling == ROPE_LINEAR) return plain / rope->factor;
  double turns = rope->original_positions * plain / (2 * M_PI);
  double kept = (turns - rope->low_frequency_factor) / (rope->high_frequency_factor - rope->low_frequency_factor);
  kept = fmin(fmax(kept, 0), 1);
  return plain * (kept + (1 - kept) / rope->factor);
}

/* transformers multiplies position and frequency in fp32, and so do we: the angle at position t is good to t * 2^-23 or so. */
static void rotary_tables_follow_the_formulas(void **context) {
  (void)context;
  enum { T = 2048, LARGEST_D = 128 };
  struct bound bound = {"angles at positions up to 2047, per position", 5e-7, 0};
  static const struct {
    int head_size;
    struct rope_settings rope;
  } cases[] = {
      {64, {ROPE_PLAIN, 10000, 0, 0, 0, 0}},   {128, {ROPE_PLAIN, 1e6, 0, 0, 0, 0}},        {6, {ROPE_PLAIN, 500000, 0, 0, 0, 0}},
      {64, {ROPE_LINEAR, 10000, 4, 0, 0, 0}},  {128, {ROPE_LLAMA3, 500000, 8, 1, 4, 8192}}, {64, {ROPE_LLAMA3, 500000, 32, 1, 4, 8192}},
      {16, {ROPE_LLAMA3, 20000, 8, 1, 4, 64}},
  };
  struct memory m = {0};
  float *cosine = host_floats(&m, T * LARGEST_D / 2), *sine = host_floats(&m, T * LARGEST_D / 2);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct model model = {.head_size = cases[i].head_size, .rope = cases[i].rope};
    int half = model.head_size / 2;
    model_rope_table(&model, T, cosine, sine);
    for (int at = 0; at < T * half; at++) {
      double angle = at / half * frequency(&model.rope, at % half, model.head_size);
      double error = fmax(fabs(cosine[at] - cos(angle)), fabs(sine[at] - sin(angle)));
      bound_check(&bound, error / (1 + at / half), "rope");
    }
  }
  memory_free(&m);
  bound_print(&bound, 1);
}

/* ---- clipping ---- */

/* Where a linear layer's factors of one end begin. */
static float *factors_of(const struct lwc *lwc, float *values, int role, int end) {
  return values + end * lwc->groups + lwc->first[role];
}

/* lwc_quantize and lwc_backward against the kernels called for each layer by itself, with factors that differ everywhere. */
static void check_layers(struct memory *d, struct lwc *lwc, struct block *block, const float *parameter, uint64_t *state) {
  struct kernels *k = d->k;
  int64_t both = 2 * lwc->groups;
  float *factor = poisoned_floats(d, both), *gradient = poisoned_floats(d, both);
  k->upload(k, lwc->parameter, parameter, (size_t)both * sizeof(float));
  lwc_update_factors(lwc);
  if (lwc->sigmoid)
    k->sigmoid_forward(k, factor, lwc->parameter, both);
  else
    k->upload(k, factor, parameter, (size_t)both * sizeof(float));
  assert_memory_equal(fetched_floats(d, lwc->factor, both), fetched_floats(d, factor, both), (size_t)both * sizeof(float));
  for (int at_rest = 0; at_rest < 2; at_rest++) {
    lwc_quantize(lwc, block, lwc->factor, at_rest);
    for (int i = 0; i < LINEARS; i++) {
      enum linear_role role = (enum linear_role)i;
      int64_t count = lwc->shape[i].rows * lwc->shape[i].columns, groups = weight_groups(&lwc->shape[i]);
      const float *hi = factors_of(lwc, factor, i, 0), *lo = factors_of(lwc, factor, i, 1);
      const data *w = block_weight(block, role, BLOCK_FULL), *dw = device_data(d, random_floats(d, state, count), count);
      data *w_hat = poisoned_data(d, count);
      float *df_hi = poisoned_floats(d, groups), *df_lo = poisoned_floats(d, groups);
      size_t bytes = (size_t)groups * sizeof(float);
      k->quantize_forward(k, w_hat, w, hi, lo, &lwc->shape[i], at_rest);
      assert_memory_equal(fetched_data(d, block_effective(block, role), count), fetched_data(d, w_hat, count),
                          (size_t)count * sizeof(float));
      k->quantize_backward(k, df_hi, df_lo, dw, w, hi, lo, &lwc->shape[i], lwc->stored_scale);
      lwc_backward(lwc, block, role, dw, gradient);
      assert_memory_equal(fetched_floats(d, factors_of(lwc, gradient, i, 0), groups), fetched_floats(d, df_hi, groups), bytes);
      assert_memory_equal(fetched_floats(d, factors_of(lwc, gradient, i, 1), groups), fetched_floats(d, df_lo, groups), bytes);
    }
  }
}

/* The search's factors are each layer's own; as gamma and beta they start no higher than where a gradient is left. */
static void check_search(struct memory *d, struct lwc *lwc, struct block *block, uint64_t *state) {
  struct kernels *k = d->k;
  struct world world = {.size = 1, .local_size = 1};
  const float *importance[LINEARS];
  float limit = lwc->sigmoid ? 0.982f : 1;
  for (int i = 0; i < LINEARS; i++) {
    float *squares = random_floats(d, state, lwc->shape[i].columns);
    for (int64_t c = 0; c < lwc->shape[i].columns; c++) squares[c] *= squares[c];
    importance[i] = device_floats(d, squares, lwc->shape[i].columns);
  }
  lwc_search(lwc, block, importance, &world);
  const float *got = fetched_floats(d, lwc->factor, 2 * lwc->groups);
  for (int i = 0; i < LINEARS; i++) {
    int64_t groups = weight_groups(&lwc->shape[i]);
    float *end[] = {poisoned_floats(d, groups), poisoned_floats(d, groups)};
    k->clip_search(k, end[0], end[1], block_weight(block, (enum linear_role)i, BLOCK_FULL), importance[i], &lwc->shape[i], 0, groups);
    for (int e = 0; e < 2; e++) {
      const float *want = fetched_floats(d, end[e], groups), *mine = got + e * lwc->groups + lwc->first[i];
      for (int64_t g = 0; g < groups; g++) assert_true(fabsf(mine[g] - fminf(want[g], limit)) <= 1e-6f);
    }
  }
}

static void clipping_is_each_layers_own(void **context) {
  (void)context;
  struct fixture f;
  struct error error = {0};
  fixture_open(&f, "llama_gqa_tied");
  for (struct walk walk = {0}; walk_next(&walk);)
    for (int kind = 0; kind < 8; kind++) {
      struct memory d = {.k = walk.k};
      struct recipe recipe = {
          .wbits = 3, .group_size = kind & 1 ? 20 : 0, .optimizer = kind & 2 ? OPTIMIZER_SIGN : OPTIMIZER_ADAMW, .stored_scale = kind & 4};
      struct block block;
      struct lwc lwc;
      uint64_t state = 41;
      open_block(&block, &f, walk.k, false);
      block_load(&block, f.image[0]);
      if (lwc_init(&lwc, &f.model, walk.k, &recipe, &error)) fail_msg("%s", error.message);
      float *parameter = host_floats(&d, 2 * lwc.groups);
      for (int64_t i = 0; i < 2 * lwc.groups; i++) parameter[i] = (float)(random_uniform(&state) * (lwc.sigmoid ? 4 : 1));
      check_layers(&d, &lwc, &block, parameter, &state);
      check_search(&d, &lwc, &block, &state);
      lwc_free(&lwc);
      block_free(&block);
      memory_free(&d);
    }
  fixture_close(&f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(embeddings_are_the_first_hidden_states), cmocka_unit_test(forward_is_that_of_transformers),
      cmocka_unit_test(backward_is_that_of_autograd),           cmocka_unit_test(head_gives_logits_and_nll),
      cmocka_unit_test(rotary_tables_follow_the_formulas),      cmocka_unit_test(clipping_is_each_layers_own),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
