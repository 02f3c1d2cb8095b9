/* test_block.c: for each random model of the fixtures, what transformers and torch's autograd computed with it: forward of both blocks, the
 * gradients of block 1, logits and mean negative log-likelihood through the head in pieces. Rotary tables against the published formulas.
 * Clipping of a whole block is that of each linear layer with its own factors. Activations are quantized in the groups that are asked for. */
#include "fixture.h"
#include "lwc.h"

/* Input of block i, or output of the last, of all samples. */
static const float *hidden(struct fixture *f, int i) {
  return expected_floats(&f->memory, f->expected, SAMPLES * hidden_count(f), "hidden.%d", i);
}

/* ---- forward ---- */

static void embeddings_are_the_first_hidden_states(void **context) {
  (void)context;
  struct bound bound = {"embeddings", 1e-6, 0};
  for (int i = 0; i < FOLDERS; i++) {
    struct fixture f;
    struct error error = {0};
    fixture_open(&f, folders[i], "expected.safetensors");
    int64_t count = SAMPLES * hidden_count(&f);
    float *got = poison(&f.memory, count);
    const int32_t *ids = expected_bytes(&f.memory, f.expected, SAMPLES * TOKENS * sizeof *ids, "input_ids");
    for (int sample = 0; sample < SAMPLES; sample++)
      if (checkpoint_embed(f.checkpoint, ids + sample * TOKENS, TOKENS, got + sample * hidden_count(&f), &error))
        fail_msg("%s", error.message);
    if (f.model.embedding == f.model.hidden) /* else a matrix product comes first */
      assert_memory_equal(got, hidden(&f, 0), (size_t)count * sizeof *got);
    bound_check(&bound, peak_error(got, widened(&f.memory, hidden(&f, 0), count), count), folders[i]);
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
    fixture_open(&f, folders[i], "expected.safetensors");
    for (struct walk walk = {0}; walk_next(&walk);) check_forward(&bound, &f, walk.k, walk.name);
    fixture_close(&f);
    bound_print(&bound, 1);
  }
}

/* ---- backward ---- */

/* Gradients on the host, by tensor. */
struct gradients {
  struct block *block;
  struct memory *memory;
  float *of[MODEL_MAX_TENSORS];
  int64_t rows[MODEL_MAX_TENSORS]; /* of a weight that have come */
  int panels;                      /* that were not a whole weight */
};

static void take_weight(void *context, int linear, struct row_range rows, const data *dw) {
  struct gradients *gradients = context;
  struct kernels *k = gradients->memory->k;
  const struct linear *layer = &gradients->block->model->linear[linear];
  if (rows.first == 0) {
    assert_null(gradients->of[layer->weight]);
    gradients->of[layer->weight] = host_floats(gradients->memory, layer->rows * layer->columns);
  }
  assert_int_equal(rows.first, gradients->rows[layer->weight]);
  assert_true(rows.count * layer->columns <= gradients->block->panel);
  gradients->rows[layer->weight] += rows.count;
  gradients->panels += rows.count < layer->rows;
  k->fetch(k, gradients->of[layer->weight] + rows.first * layer->columns, dw, rows.count * layer->columns);
}

static void take_vector(void *context, int tensor, const float *d) {
  struct gradients *gradients = context;
  assert_null(gradients->of[tensor]);
  gradients->of[tensor] = fetched_floats(gradients->memory, d, gradients->block->model->tensor[tensor].columns);
}

static struct gradients backward(struct memory *d, struct block *block, enum block_weights which, bool vectors, data *dx, const data *dy,
                                 const data *x) {
  struct gradients gradients = {.block = block, .memory = d};
  struct gradient_sink sink = {take_weight, vectors ? take_vector : NULL, &gradients};
  data *y = poisoned_data(d, (int64_t)TOKENS * block->model->hidden);
  block_forward(block, which, y, x);
  block_backward(block, which, dx, dy, x, &sink);
  return gradients;
}

/* The same bits, or not there in both. */
static void check_same(const float *a, const float *b, int64_t count) {
  assert_int_equal(a == NULL, b == NULL);
  if (a) assert_memory_equal(a, b, (size_t)count * sizeof *a);
}

/* An expert without tokens gives no gradient: then zero is expected. */
static void check_gradient(struct bound *bound, struct memory *d, struct fixture *f, const struct gradients *got, int tensor,
                           const char *where) {
  const struct block_tensor *of = &f->model.tensor[tensor];
  int64_t count = of->rows * of->columns;
  char place[160];
  snprintf(place, sizeof place, "%s, %s", of->name, where);
  const float *want = expected_tensor(d, f, "grad", tensor);
  const float *mine = got->of[tensor] ? got->of[tensor] : host_floats(d, count);
  if (!got->of[tensor]) assert_true(f->model.experts > 0);
  if (tensor == f->model.linear[LINEAR_K].bias && f->model.rope.theta == 0) { /* softmax takes no notice of it: noise around zero */
    want = host_floats(d, count);
    for (int64_t i = 0; i < count; i++) assert_true(fabsf(mine[i]) < 1e-5f);
    mine = want;
  }
  bound_check(bound, peak_error(mine, widened(d, want, count), count), place);
}

/* panel 0: every weight's gradient in one piece. */
static void check_backward(struct bound *bound, struct fixture *f, struct kernels *k, int64_t panel, const char *where) {
  struct memory d = {.k = k};
  struct block block;
  int64_t n = hidden_count(f);
  open_block(&block, f, k, true);
  if (panel) block.panel = panel;
  block_load(&block, f->image[TRAINED]);
  copy_weights(&block);
  data *x = device_data(&d, hidden(f, TRAINED), n), *dx = poisoned_data(&d, n), *again = poisoned_data(&d, n);
  data *dy = device_data(&d, expected_floats(&d, f->expected, n, "dy"), n);
  struct gradients full = backward(&d, &block, BLOCK_FULL, true, dx, dy, x);
  struct gradients quantized = backward(&d, &block, BLOCK_QUANTIZED, true, again, dy, x);
  struct gradients without = backward(&d, &block, BLOCK_FULL, false, NULL, dy, x); /* the input's and vectors' left out, as for clipping */
  struct gradients vectors = backward(&d, &block, BLOCK_FULL, true, NULL, dy, x);  /* the input's left out, as for LET */
  float *got = fetched_data(&d, dx, n);
  assert_int_equal(full.panels > 0, panel > 0);
  bound_check(bound, peak_error(got, widened(&d, expected_floats(&d, f->expected, n, "dx"), n), n), where);
  assert_memory_equal(fetched_data(&d, again, n), got, (size_t)n * sizeof *got);
  for (int i = 0; i < f->model.tensors; i++) {
    const struct block_tensor *tensor = &f->model.tensor[i];
    int64_t count = tensor->rows * tensor->columns;
    check_gradient(bound, &d, f, &full, i, where);
    check_same(quantized.of[i], full.of[i], count);
    check_same(vectors.of[i], full.of[i], count);
    if (model_quantizes(&f->model, i)) check_same(without.of[i], full.of[i], count);
  }
  block_free(&block);
  memory_free(&d);
}

static void backward_is_that_of_autograd(void **context) {
  (void)context;
  for (int i = 0; i < FOLDERS; i++) {
    struct bound bound = {folders[i], 2e-5, 0};
    struct fixture f;
    fixture_open(&f, folders[i], "expected.safetensors");
    for (struct walk walk = {0}; walk_next(&walk);) {
      check_backward(&bound, &f, walk.k, 0, walk.name);
      check_backward(&bound, &f, walk.k, SMALL_PANEL, walk.name);
    }
    fixture_close(&f);
    bound_print(&bound, 1);
  }
}

/* ---- head ---- */

/* The last hidden states as the head reads them: after the final norm and the projection, where the family has them. */
static data *head_input(struct memory *d, struct fixture *f, const float *in) {
  struct kernels *k = d->k;
  struct error error = {0};
  const struct model *model = &f->model;
  int64_t H = model->hidden, E = model->embedding;
  data *x = device_data(d, in, hidden_count(f));
  if (model->final_norm) {
    struct norm_shape shape = {TOKENS, H, model->norm_eps, model->layer_norm};
    float *weight = poison(d, H), *bias = poison(d, H);
    if (checkpoint_read_final_norm(f->checkpoint, weight, &error)) fail_msg("%s", error.message);
    if (model->layer_norm && checkpoint_read_final_norm_bias(f->checkpoint, bias, &error)) fail_msg("%s", error.message);
    k->norm_forward(k, x, x, device_data(d, weight, H), model->layer_norm ? device_data(d, bias, H) : NULL, &shape);
  }
  if (E == H) return x;
  float *project = poison(d, E * H);
  data *projected = poisoned_data(d, TOKENS * E);
  if (checkpoint_read_project_out(f->checkpoint, project, &error)) fail_msg("%s", error.message);
  k->linear_forward(k, projected, x, device_data(d, project, E * H), NULL, TOKENS, H, E, false);
  return projected;
}

/* The head over one sample's last hidden states, the vocabulary in pieces of uneven size; logits on the host. */
static struct cross_entropy head(struct memory *d, struct fixture *f, const float *in, const int32_t *target, float *logits) {
  struct kernels *k = d->k;
  struct error error = {0};
  int64_t E = f->model.embedding, V = f->model.vocabulary;
  float *unset = host_floats(d, TOKENS);
  data *x = head_input(d, f, in);
  int32_t *dev_target = device(d, TOKENS * sizeof *dev_target);
  struct cross_entropy entropy = {poisoned_floats(d, TOKENS), device_floats(d, unset, TOKENS), poisoned_floats(d, TOKENS)};
  k->fill(k, entropy.maximum, -INFINITY, TOKENS);
  k->upload(k, dev_target, target, TOKENS * sizeof *target);
  for (int64_t first = 0, rows; first < V; first += rows) {
    rows = first + 37 < V ? 37 : V - first;
    float *weight = poison(d, rows * E);
    data *piece = poisoned_data(d, TOKENS * rows);
    if (checkpoint_read_head(f->checkpoint, first, rows, weight, &error)) fail_msg("%s", error.message);
    k->linear_forward(k, piece, x, device_data(d, weight, rows * E), NULL, TOKENS, E, rows, false);
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
    fixture_open(&f, folders[i], "expected.safetensors");
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
  return values + lwc->first[role] + end * groups_of(&lwc->shape[role]);
}

/* lwc_quantize and lwc_backward against the kernels called for each layer by itself, with factors that differ everywhere. */
static void check_layers(struct memory *d, struct lwc *lwc, struct block *block, const struct let *none, const float *parameter,
                         uint64_t *state) {
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
    lwc_quantize(lwc, block, none, lwc->factor, at_rest);
    for (int i = 0; i < block->model->linears; i++) {
      if (!block->model->linear[i].quantized) continue;
      int64_t count = lwc->shape[i].rows * lwc->shape[i].columns, groups = groups_of(&lwc->shape[i]);
      const float *hi = factors_of(lwc, factor, i, 0), *lo = factors_of(lwc, factor, i, 1);
      const data *w = block_tensor(block, BLOCK_FULL, block->model->linear[i].weight),
                 *dw = device_data(d, random_floats(d, state, count), count);
      data *w_hat = poisoned_data(d, count);
      float *df_hi = poisoned_floats(d, groups), *df_lo = poisoned_floats(d, groups);
      size_t bytes = (size_t)groups * sizeof(float);
      k->quantize_forward(k, w_hat, w, NULL, hi, lo, &lwc->shape[i], at_rest);
      assert_memory_equal(fetched_data(d, block_tensor(block, BLOCK_QUANTIZED, block->model->linear[i].weight), count),
                          fetched_data(d, w_hat, count), (size_t)count * sizeof(float));
      k->quantize_backward(k, df_hi, df_lo, NULL, NULL, dw, w, NULL, hi, lo, &lwc->shape[i], lwc->stored_scale);
      struct row_range upper = {0, lwc->shape[i].rows / 3}, lower = {upper.count, lwc->shape[i].rows - upper.count};
      lwc_backward(lwc, block, none, i, lower, data_at(k, dw, upper.count * lwc->shape[i].columns), lwc->factor, gradient, NULL, NULL);
      lwc_backward(lwc, block, none, i, upper, dw, lwc->factor, gradient, NULL, NULL);
      assert_memory_equal(fetched_floats(d, factors_of(lwc, gradient, i, 0), groups), fetched_floats(d, df_hi, groups), bytes);
      assert_memory_equal(fetched_floats(d, factors_of(lwc, gradient, i, 1), groups), fetched_floats(d, df_lo, groups), bytes);
    }
  }
}

/* The search's factors are each layer's own; as gamma and beta they start no higher than where a gradient is left. */
static void check_search(struct memory *d, struct lwc *lwc, struct block *block, const struct let *none, uint64_t *state) {
  struct kernels *k = d->k;
  struct world world = {.size = 1, .local_size = 1};
  const float *importance[MODEL_MAX_LINEARS] = {0};
  float limit = lwc->sigmoid ? 0.982f : 1;
  for (int i = 0; i < block->model->linears; i++) {
    if (!block->model->linear[i].quantized) continue;
    float *squares = random_floats(d, state, lwc->shape[i].columns);
    for (int64_t c = 0; c < lwc->shape[i].columns; c++) squares[c] *= squares[c];
    importance[i] = device_floats(d, squares, lwc->shape[i].columns);
  }
  lwc_search(lwc, block, none, importance, &world);
  const float *got = fetched_floats(d, lwc->factor, 2 * lwc->groups);
  for (int i = 0; i < block->model->linears; i++) {
    if (!block->model->linear[i].quantized) continue;
    int64_t groups = groups_of(&lwc->shape[i]);
    float *end[] = {poisoned_floats(d, groups), poisoned_floats(d, groups)};
    k->clip_search(k, end[0], end[1], block_tensor(block, BLOCK_FULL, block->model->linear[i].weight), NULL, importance[i], &lwc->shape[i],
                   0, groups);
    for (int e = 0; e < 2; e++) {
      const float *want = fetched_floats(d, end[e], groups), *mine = got + lwc->first[i] + e * groups;
      for (int64_t g = 0; g < groups; g++) assert_true(fabsf(mine[g] - fminf(want[g], limit)) <= 1e-6f);
    }
  }
}

static void clipping_is_each_layers_own(void **context) {
  (void)context;
  struct fixture f;
  struct error error = {0};
  fixture_open(&f, "llama_gqa_tied", "expected.safetensors");
  for (struct walk walk = {0}; walk_next(&walk);)
    for (int kind = 0; kind < 8; kind++) {
      struct memory d = {.k = walk.k};
      struct recipe recipe = {
          .wbits = 3, .group_size = kind & 1 ? 20 : 0, .optimizer = kind & 2 ? OPTIMIZER_SIGN : OPTIMIZER_ADAMW, .stored_scale = kind & 4};
      struct block block;
      struct lwc lwc;
      struct let none;
      uint64_t state = 41;
      open_block(&block, &f, walk.k, false);
      block_load(&block, f.image[0]);
      if (lwc_init(&lwc, &f.model, walk.k, &recipe, &error)) fail_msg("%s", error.message);
      float *parameter = host_floats(&d, 2 * lwc.groups);
      for (int64_t i = 0; i < 2 * lwc.groups; i++) parameter[i] = (float)(random_uniform(&state) * (lwc.sigmoid ? 4 : 1));
      if (let_init(&none, &f.model, walk.k, &recipe, &error)) fail_msg("%s", error.message);
      check_layers(&d, &lwc, &block, &none, parameter, &state);
      check_search(&d, &lwc, &block, &none, &state);
      let_free(&none);
      lwc_free(&lwc);
      block_free(&block);
      memory_free(&d);
    }
  fixture_close(&f);
}

/* ---- activations ---- */

/* Plainly, one group after the other: method.md section 2. */
static void quantize_plainly(float *out, const float *x, int64_t count, int bits) {
  float low = 0, high = 0, top = (float)((1 << bits) - 1);
  for (int64_t i = 0; i < count; i++) {
    low = fminf(low, x[i]);
    high = fmaxf(high, x[i]);
  }
  float scale = fminf(fmaxf((high - low) / top, 1e-5f), 1e4f), zero_point = fminf(fmaxf(rintf(-low / scale), 0), top);
  for (int64_t i = 0; i < count; i++) out[i] = (fminf(fmaxf(rintf(x[i] / scale) + zero_point, 0), top) - zero_point) * scale;
}

/* A buffer and its quantized copy: rows in groups of `group` columns, or all in one where group is 0. */
static void check_hat(struct memory *d, const data *raw, const data *hat, int64_t rows, int64_t columns, int64_t group, int bits) {
  const float *x = fetched_data(d, raw, rows * columns), *got = fetched_data(d, hat, rows * columns);
  float *want = poison(d, rows * columns);
  if (group == 0) rows *= columns, columns = group = rows, rows = 1;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t c = 0; c < columns; c += group)
      quantize_plainly(want + row * columns + c, x + row * columns + c, c + group < columns ? group : columns - c, bits);
  assert_memory_equal(got, want, (size_t)(rows * columns) * sizeof *got);
}

static void check_activations(struct memory *d, struct block *block, const struct activation_quantizer *q) {
  const struct model *model = block->model;
  int64_t T = TOKENS, H = model->hidden, F = model->ffn, D = model->head_size, wide = model->heads * D, kv = model->kv_heads * D;
  int64_t group = q->granularity == GRANULARITY_GROUP ? q->group_size : q->granularity == GRANULARITY_TOKEN ? 1 << 20 : 0;
  int bits = recipe_kv_bits(q);
  check_hat(d, block->n1, block->n1_hat, T, H, group, q->abits);
  check_hat(d, block->n2, block->n2_hat, T, H, group, q->abits);
  check_hat(d, block->a, block->a_hat, T, wide, group, q->abits);
  check_hat(d, block->act, block->act_hat, block->rows, F, group, q->abits);
  check_hat(d, block->q, block->q_hat, T, wide, q->kv_granularity == KV_HEAD ? D : wide, bits);
  check_hat(d, block->key, block->key_hat, T, kv, q->kv_granularity == KV_HEAD ? D : kv, bits);
  check_hat(d, block->v, block->v_hat, T, kv, q->kv_granularity == KV_HEAD ? D : kv, bits);
}

static void activations_are_quantized_as_asked(void **context) {
  (void)context;
  static const char *const models[] = {"qwen3", "opt", "mixtral", "falcon_40b"};
  for (int i = 0; i < 4; i++) {
    struct fixture f;
    fixture_open(&f, models[i], "expected.safetensors");
    for (struct walk walk = {0}; walk_next(&walk);)
      for (int kind = 0; kind < 6; kind++) {
        struct memory d = {.k = walk.k};
        struct block block;
        struct activation_quantizer quantizer = {4 + kind % 3, kind % 2 ? 7 : 0, (enum granularity)(kind % 3), 20,
                                                 (enum kv_granularity)(kind / 3)};
        open_block(&block, &f, walk.k, false);
        block_load(&block, f.image[1]);
        copy_weights(&block);
        data *y = poisoned_data(&d, hidden_count(&f)), *again = poisoned_data(&d, hidden_count(&f));
        data *x = device_data(&d, hidden(&f, 1), hidden_count(&f));
        block.quantizer = quantizer;
        block_forward(&block, BLOCK_QUANTIZED, y, x);
        check_activations(&d, &block, &quantizer);
        block_forward(&block, BLOCK_FULL, again, x); /* which knows nothing of them */
        block.quantizer = (struct activation_quantizer){.abits = 16};
        float *full = fetched_data(&d, again, hidden_count(&f)), *quantized = fetched_data(&d, y, hidden_count(&f));
        assert_memory_not_equal(full, quantized, (size_t)hidden_count(&f) * sizeof *full);
        block_forward(&block, BLOCK_QUANTIZED, y, x);
        assert_memory_equal(fetched_data(&d, y, hidden_count(&f)), full, (size_t)hidden_count(&f) * sizeof *full);
        block_free(&block);
        memory_free(&d);
      }
    fixture_close(&f);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(embeddings_are_the_first_hidden_states), cmocka_unit_test(forward_is_that_of_transformers),
      cmocka_unit_test(backward_is_that_of_autograd),           cmocka_unit_test(head_gives_logits_and_nll),
      cmocka_unit_test(rotary_tables_follow_the_formulas),      cmocka_unit_test(clipping_is_each_layers_own),
      cmocka_unit_test(activations_are_quantized_as_asked),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
