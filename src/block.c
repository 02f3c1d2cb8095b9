/* block.c: forward and backward of one block, in the order of block.h's formulas. A dense MLP is one expert that computes all tokens. */
#include "block.h"

#include <stdlib.h>
#include <string.h>

static const enum linear_role attention_readers[] = {LINEAR_Q, LINEAR_K, LINEAR_V};

static bool has(const struct block *block, enum norm_role norm) {
  return block->model->norm[norm] != ABSENT;
}

static bool gated(const struct block *block) {
  return block->model->activation == ACTIVATION_SILU_GATED;
}

/* Whether the MLP reads what attention reads, as in Falcon 7B. */
static bool one_norm(const struct block *block) {
  return block->model->parallel && !has(block, NORM_MLP);
}

/* ---- memory ---- */

/* Every buffer of a block: its field, its bytes, and whether this block needs it. */
struct buffer {
  void *field; /* of any pointer type */
  size_t bytes;
  bool needed;
};

static int allocate(struct block *block, const struct buffer *buffers, size_t count, struct error *error) {
  for (size_t i = 0; i < count; i++) {
    if (!buffers[i].needed) continue;
    void *memory = block->k->allocate(block->k, buffers[i].bytes);
    if (!memory) return error_set(error, ERROR_WORK, "out of memory on %s for a block (%zu bytes)", block->k->name, buffers[i].bytes);
    memcpy(buffers[i].field, &memory, sizeof memory);
    block->owned[block->owned_count++] = memory;
  }
  return 0;
}

static int load_rope_table(struct block *block, struct error *error) {
  size_t count = (size_t)block->tokens * (size_t)(block->model->head_size / 2), bytes = count * sizeof(float);
  float *host = malloc(2 * bytes);
  if (!host) return error_set(error, ERROR_WORK, "out of memory for the rotary table");
  model_rope_table(block->model, block->tokens, host, host + count);
  block->k->upload(block->k, block->cosine, host, bytes);
  block->k->upload(block->k, block->sine, host + count, bytes);
  free(host);
  return 0;
}

enum { TENSOR_STEP = 16 }; /* elements: as model.h places tensors */

static int64_t placed_elements(const struct block_tensor *tensor) {
  return (tensor->rows * tensor->columns + TENSOR_STEP - 1) / TENSOR_STEP * TENSOR_STEP;
}

/* Elements of the tensors that are not quantized, each beginning at a multiple of TENSOR_STEP. */
static int64_t folded_elements(const struct model *model) {
  int64_t elements = 0;
  for (int i = 0; i < model->tensors; i++)
    if (!model_quantizes(model, i)) elements += placed_elements(&model->tensor[i]);
  return elements;
}

static void place_tensors(struct block *block) {
  const struct model *model = block->model;
  int64_t folded = 0;
  for (int i = 0; i < model->tensors; i++) {
    const struct block_tensor *tensor = &model->tensor[i];
    bool own = block->folded && !model_quantizes(model, i);
    block->tensor[BLOCK_FULL][i] = data_at(block->k, block->weights, tensor->element_offset);
    block->tensor[BLOCK_QUANTIZED][i] =
        own ? data_at(block->k, block->folded, folded) : data_at(block->k, block->effective, tensor->element_offset);
    if (own) folded += placed_elements(tensor);
  }
}

/* Rows of a weight whose gradient is made at a time. */
static int64_t panel_rows(int64_t panel, int64_t rows, int64_t columns) {
  int64_t most = panel / columns;
  if (most >= rows) return rows;
  if (most < BLOCK_PANEL_STEP) return most > 1 ? most : 1;
  return most - most % BLOCK_PANEL_STEP;
}

/* Elements of the largest part of a weight's gradient, and rows of the longest vector. */
static void largest(const struct model *model, int64_t *panel, int64_t *vector) {
  *panel = *vector = 0;
  for (int i = 0; i < model->tensors; i++) {
    const struct block_tensor *tensor = &model->tensor[i];
    bool matrix = tensor->dimensions == 2;
    int64_t rows = matrix ? panel_rows(BLOCK_PANEL, tensor->rows, tensor->columns) : tensor->rows, count = rows * tensor->columns;
    int64_t *most = matrix ? panel : vector;
    if (count > *most) *most = count;
  }
}

int block_init(struct block *block, const struct model *model, struct kernels *k, const struct block_use *use, struct error *error) {
  *block = (struct block){.model = model, .k = k, .tokens = use->tokens, .quantizer = {.abits = 16, .kv_bits = 16}};
  block->of_weights = use->weights_in;
  block->of_effective = use->effective_in;
  block->weights = use->weights_in.memory;
  block->effective = use->effective_in.memory;
  block->rows = (int64_t)use->tokens * model->experts_per_token;
  block->routing = (struct routing){.tokens = use->tokens, .experts = model->experts, .top = model->experts_per_token};
  size_t T = (size_t)use->tokens, rows = (size_t)block->rows, E = (size_t)model->experts, e = k->element_bytes,
         D = (size_t)model->head_size;
  size_t stream = T * (size_t)model->hidden * e, wide_q = T * (size_t)model->heads * D * e, wide_kv = T * (size_t)model->kv_heads * D * e;
  size_t inner = rows * (size_t)model->ffn * e, routed = rows * (size_t)model->hidden * e;
  bool head_norm = has(block, NORM_Q), experts = model->experts > 0, own_n2 = !one_norm(block), hat = use->quantized_inputs,
       trained = use->trained;
  int64_t vector, folded = use->effective ? folded_elements(model) : 0;
  largest(model, &block->panel, &vector);
  const struct buffer buffers[] = {
      {&block->weights, (size_t)model->elements * e, !block->weights},
      {&block->effective, (size_t)model->elements * e, use->effective && !block->effective},
      {&block->folded, (size_t)folded * e, use->effective},
      {&block->cosine, T * D / 2 * sizeof(float), model->rope.theta > 0},
      {&block->sine, T * D / 2 * sizeof(float), model->rope.theta > 0},
      {&block->n1, stream, true},
      {&block->n1_hat, stream, hat},
      {&block->q, wide_q, true},
      {&block->key, wide_kv, true},
      {&block->v, wide_kv, true},
      {&block->q_hat, wide_q, hat},
      {&block->key_hat, wide_kv, hat},
      {&block->v_hat, wide_kv, hat},
      {&block->q_raw, wide_q, head_norm},
      {&block->key_raw, wide_kv, head_norm},
      {&block->a, wide_q, true},
      {&block->a_hat, wide_q, hat},
      {&block->logsum, T * (size_t)model->heads * sizeof(float), true},
      {&block->sum1, stream, model->post_norm},
      {&block->sum2, stream, model->post_norm},
      {&block->h, stream, true},
      {&block->n2, stream, own_n2},
      {&block->n2_hat, stream, own_n2 && hat},
      {&block->gate, inner, gated(block)},
      {&block->up, inner, true},
      {&block->act, inner, true},
      {&block->act_hat, inner, hat},
      {&block->logits, T * E * e, experts},
      {&block->routing.expert, rows * sizeof(int32_t), experts},
      {&block->routing.weight, rows * sizeof(float), experts},
      {&block->routing.row, rows * sizeof(int32_t), experts},
      {&block->routing.token, rows * sizeof(int32_t), experts},
      {&block->routing.offset, (E + 1) * sizeof(int32_t), experts},
      {&block->expert_in, routed, experts},
      {&block->expert_out, routed, experts},
      {&block->dw, (size_t)block->panel * e, trained},
      {&block->dvector, (size_t)vector * sizeof(float), trained},
      {&block->dbias, (size_t)vector * sizeof(float), trained},
      {&block->dq, wide_q, trained},
      {&block->dk, wide_kv, trained},
      {&block->dv, wide_kv, trained},
      {&block->da, wide_q, trained},
      {&block->dsum, stream, trained && model->post_norm},
      {&block->dh, stream, trained},
      {&block->dn1, stream, trained},
      {&block->dn2, stream, trained && own_n2},
      {&block->dgate, inner, trained && gated(block)},
      {&block->dup, inner, trained},
      {&block->dlogits, T * E * e, trained && experts},
      {&block->dshare, rows * sizeof(float), trained && experts},
      {&block->dexpert_in, routed, trained && experts},
      {&block->dexpert_out, routed, trained && experts},
  };
  _Static_assert(sizeof buffers / sizeof *buffers <= BLOCK_MOST_BUFFERS, "owned[] holds them all");
  if (allocate(block, buffers, sizeof buffers / sizeof *buffers, error)) return error->code;
  block->offset = calloc(E + 2, sizeof *block->offset);
  block->expert_tokens = calloc(E + 1, sizeof *block->expert_tokens);
  if (!block->offset || !block->expert_tokens) return error_set(error, ERROR_WORK, "out of memory for a block");
  if (!experts) block->offset[1] = use->tokens;
  if (!use->effective) block->effective = block->weights;
  place_tensors(block);
  return block->cosine ? load_rope_table(block, error) : 0;
}

void block_free(struct block *block) {
  for (int i = 0; i < block->owned_count; i++) block->k->release(block->k, block->owned[i]);
  free(block->offset);
  free(block->expert_tokens);
  memset(block, 0, sizeof *block);
}

/* ---- weights ---- */

/* One of an image's tensors, or of one that is in common this rank's part. */
static void load_tensor(struct block *block, data *to, const struct block_tensor *tensor, const void *image, const struct shared *in) {
  int64_t first, end;
  shared_part(in, tensor->rows * tensor->columns, &first, &end);
  const char *from = (const char *)image + tensor->image_offset + (size_t)first * dtype_size(tensor->dtype);
  block->k->load(block->k, data_at(block->k, to, first), from, tensor->dtype, end - first);
}

void block_load(struct block *block, const void *image) {
  const struct model *model = block->model;
  shared_barrier(&block->of_weights);
  for (int i = 0; i < model->tensors; i++)
    load_tensor(block, block_tensor(block, BLOCK_FULL, i), &model->tensor[i], image, &block->of_weights);
  shared_barrier(&block->of_weights);
  block_restore(block);
}

void block_load_stored(struct block *block, const struct model *wide, const void *image) {
  static const struct shared alone;
  shared_barrier(&block->of_effective);
  for (int i = 0; i < wide->tensors; i++)
    load_tensor(block, block_tensor(block, BLOCK_QUANTIZED, i), &wide->tensor[i], image,
                model_quantizes(wide, i) ? &block->of_effective : &alone);
  shared_barrier(&block->of_effective);
}

void block_restore(struct block *block) {
  const struct model *model = block->model;
  if (block->effective == block->weights) return;
  for (int i = 0; i < model->tensors; i++)
    if (!model_quantizes(model, i))
      block->k->copy(block->k, block_tensor(block, BLOCK_QUANTIZED, i), block_tensor(block, BLOCK_FULL, i),
                     (size_t)(model->tensor[i].rows * model->tensor[i].columns) * block->k->element_bytes);
}

data *block_tensor(const struct block *block, enum block_weights which, int tensor) {
  return tensor == ABSENT ? NULL : block->tensor[which][tensor];
}

/* ---- quantized activations ---- */

static bool quantizes_inputs(const struct block *block, enum block_weights which) {
  return which == BLOCK_QUANTIZED && block->quantizer.abits < 16;
}

static bool quantizes_heads(const struct block *block, enum block_weights which) {
  return which == BLOCK_QUANTIZED && recipe_kv_bits(&block->quantizer) < 16;
}

/* How the inputs of linear layers, [rows, columns], are quantized. */
static struct quantized_shape input_shape(const struct block *block, int64_t rows, int64_t columns) {
  const struct activation_quantizer *quantizer = &block->quantizer;
  struct quantized_shape shape = {rows, columns, {quantizer->abits, false, columns}};
  if (quantizer->granularity == GRANULARITY_TENSOR)
    shape = (struct quantized_shape){1, rows * columns, {quantizer->abits, false, rows * columns}};
  if (quantizer->granularity == GRANULARITY_GROUP && quantizer->group_size < columns) shape.quantizer.group_size = quantizer->group_size;
  return shape;
}

static struct quantized_shape heads_shape(const struct block *block, int heads) {
  int64_t D = block->model->head_size, T = block->tokens;
  int bits = recipe_kv_bits(&block->quantizer);
  if (block->quantizer.kv_granularity == KV_TOKEN) return (struct quantized_shape){T, heads * D, {bits, false, heads * D}};
  return (struct quantized_shape){T * heads, D, {bits, false, D}};
}

/* What linear layers read in place of x: its quantized copy, where this block quantizes. */
static const data *input_forward(struct block *block, enum block_weights which, data *hat, const data *x, int64_t rows, int64_t columns) {
  if (!quantizes_inputs(block, which)) return x;
  struct quantized_shape shape = input_shape(block, rows, columns);
  block->k->quantize_forward(block->k, hat, x, NULL, NULL, NULL, &shape, false);
  return hat;
}

/* From the gradient of what they read to that of x, in place. */
static void input_backward(struct block *block, enum block_weights which, data *dx, const data *x, int64_t rows, int64_t columns) {
  struct quantized_shape shape = input_shape(block, rows, columns);
  if (quantizes_inputs(block, which)) block->k->quantize_backward_input(block->k, dx, dx, x, &shape);
}

static const data *heads_quantized(struct block *block, enum block_weights which, data *hat, const data *x, int heads) {
  if (!quantizes_heads(block, which)) return x;
  struct quantized_shape shape = heads_shape(block, heads);
  block->k->quantize_forward(block->k, hat, x, NULL, NULL, NULL, &shape, false);
  return hat;
}

/* ---- forward ---- */

static struct attention_shape attention_of(const struct block *block) {
  const struct model *model = block->model;
  return (struct attention_shape){block->tokens, model->heads, model->kv_heads, model->head_size, model->window};
}

static size_t stream_bytes(const struct block *block) {
  return (size_t)block->tokens * (size_t)block->model->hidden * block->k->element_bytes;
}

/* From an expert's first row on, in a matrix of all rows. */
static data *rows_of(const struct block *block, const data *matrix, int expert, int64_t columns) {
  return data_at(block->k, matrix, block->offset[expert] * columns);
}

static int64_t tokens_of(const struct block *block, int expert) {
  return block->offset[expert + 1] - block->offset[expert];
}

/* y (+)= linear(x). */
static void forward(struct block *block, enum block_weights which, int index, data *y, const data *x, int64_t tokens, bool add) {
  const struct linear *linear = &block->model->linear[index];
  if (tokens == 0) return;
  block->k->linear_forward(block->k, y, x, block_tensor(block, which, linear->weight), block_tensor(block, which, linear->bias), tokens,
                           linear->columns, linear->rows, add);
}

static struct norm_shape norm_of(const struct block *block, int64_t rows, int64_t columns) {
  return (struct norm_shape){rows, columns, block->model->norm_eps, block->model->layer_norm};
}

static void norm_forward(struct block *block, enum block_weights which, enum norm_role role, data *y, const data *x, int64_t rows,
                         int64_t columns) {
  struct norm_shape shape = norm_of(block, rows, columns);
  block->k->norm_forward(block->k, y, x, block_tensor(block, which, block->model->norm[role]),
                         block_tensor(block, which, block->model->norm_bias[role]), &shape);
}

/* Queries or keys as attention uses them: head norm and rotation where the family has them. */
static void heads_forward(struct block *block, enum block_weights which, enum norm_role norm, data *x, data *raw, int heads) {
  int64_t rows = (int64_t)block->tokens * heads;
  int D = block->model->head_size;
  if (has(block, norm)) {
    block->k->copy(block->k, raw, x, (size_t)(rows * D) * block->k->element_bytes);
    norm_forward(block, which, norm, x, raw, rows, D);
  }
  if (block->cosine) block->k->rope(block->k, x, block->cosine, block->sine, block->tokens, heads, D, false);
}

/* sum = x + attention(n1). */
static void attention_forward(struct block *block, enum block_weights which, data *sum, const data *x) {
  const struct model *model = block->model;
  struct attention_shape shape = attention_of(block);
  int64_t T = block->tokens;
  const data *in = input_forward(block, which, block->n1_hat, block->n1, T, model->hidden);
  forward(block, which, LINEAR_Q, block->q, in, T, false);
  forward(block, which, LINEAR_K, block->key, in, T, false);
  forward(block, which, LINEAR_V, block->v, in, T, false);
  heads_forward(block, which, NORM_Q, block->q, block->q_raw, model->heads);
  heads_forward(block, which, NORM_K, block->key, block->key_raw, model->kv_heads);
  const data *q = heads_quantized(block, which, block->q_hat, block->q, model->heads);
  const data *key = heads_quantized(block, which, block->key_hat, block->key, model->kv_heads);
  const data *v = heads_quantized(block, which, block->v_hat, block->v, model->kv_heads);
  block->k->attention_forward(block->k, block->a, block->logsum, q, key, v, &shape);
  block->k->copy(block->k, sum, x, stream_bytes(block));
  forward(block, which, LINEAR_O, sum, input_forward(block, which, block->a_hat, block->a, T, model->heads * model->head_size), T, true);
}

/* Sends the tokens to their experts: `in`, as linear layers read it, becomes rows grouped by expert. The router reads n2 as it is. */
static const data *route(struct block *block, enum block_weights which, const data *in) {
  struct kernels *k = block->k;
  int experts = block->model->experts;
  forward(block, which, LINEAR_ROUTER, block->logits, block->n2, block->tokens, false);
  k->route_forward(k, &block->routing, block->logits);
  k->gather_rows(k, block->expert_in, in, &block->routing, block->model->hidden);
  k->download(k, block->offset, block->routing.offset, (size_t)(experts + 1) * sizeof *block->offset);
  for (int e = 0; which == BLOCK_QUANTIZED && e < experts; e++) block->expert_tokens[e] += tokens_of(block, e);
  return block->expert_in;
}

/* sum += mlp(n), where `in` is n as linear layers read it. */
static void mlp_forward(struct block *block, enum block_weights which, data *sum, const data *in) {
  struct kernels *k = block->k;
  int64_t H = block->model->hidden, F = block->model->ffn;
  bool routed = block->model->experts > 0;
  if (routed) in = route(block, which, in);
  for (int e = 0; e < model_mlps(block->model); e++) {
    if (gated(block))
      forward(block, which, linear_of_expert(LINEAR_GATE, e), rows_of(block, block->gate, e, F), rows_of(block, in, e, H),
              tokens_of(block, e), false);
    forward(block, which, linear_of_expert(LINEAR_UP, e), rows_of(block, block->up, e, F), rows_of(block, in, e, H), tokens_of(block, e),
            false);
  }
  if (gated(block))
    k->silu_gate_forward(k, block->act, block->gate, block->up, block->rows * F);
  else
    k->activation_forward(k, block->act, block->up, block->model->activation, block->rows * F);
  const data *act = input_forward(block, which, block->act_hat, block->act, block->rows, F);
  data *out = routed ? block->expert_out : sum;
  for (int e = 0; e < model_mlps(block->model); e++)
    forward(block, which, linear_of_expert(LINEAR_DOWN, e), rows_of(block, out, e, H), rows_of(block, act, e, F), tokens_of(block, e),
            !routed);
  if (routed) k->combine_forward(k, sum, block->expert_out, &block->routing, H);
}

void block_forward(struct block *block, enum block_weights which, data *y, const data *x) {
  struct kernels *k = block->k;
  const struct model *model = block->model;
  int64_t T = block->tokens, H = model->hidden;
  bool post = model->post_norm;
  if (post)
    k->copy(k, block->n1, x, stream_bytes(block));
  else
    norm_forward(block, which, NORM_ATTENTION, block->n1, x, T, H);
  if (model->parallel && has(block, NORM_MLP)) norm_forward(block, which, NORM_MLP, block->n2, x, T, H);
  attention_forward(block, which, post ? block->sum1 : block->h, x);
  if (post) {
    norm_forward(block, which, NORM_ATTENTION, block->h, block->sum1, T, H);
    k->copy(k, block->n2, block->h, stream_bytes(block));
  } else if (!model->parallel) {
    norm_forward(block, which, NORM_MLP, block->n2, block->h, T, H);
  }
  const data *in = one_norm(block) ? (quantizes_inputs(block, which) ? block->n1_hat : block->n1)
                                   : input_forward(block, which, block->n2_hat, block->n2, T, H);
  data *sum = post ? block->sum2 : y;
  k->copy(k, sum, block->h, stream_bytes(block));
  mlp_forward(block, which, sum, in);
  if (post) norm_forward(block, which, NORM_MLP, y, block->sum2, T, H);
}

const data *block_input(const struct block *block, int linear, int64_t *rows) {
  int expert = expert_of_linear(linear);
  enum linear_role role = role_of_linear(linear);
  bool routed = block->model->experts > 0;
  *rows = block->tokens;
  if (role <= LINEAR_V) return block->n1;
  if (role == LINEAR_O) return block->a;
  if (role == LINEAR_ROUTER) return block->n2;
  *rows = tokens_of(block, expert);
  if (role == LINEAR_DOWN) return rows_of(block, block->act, expert, block->model->ffn);
  if (routed) return rows_of(block, block->expert_in, expert, block->model->hidden);
  return one_norm(block) ? block->n1 : block->n2;
}

/* ---- backward ---- */

/* A layer's own gradients: of its weight, and of its bias where somebody asks. */
static void layer_backward(struct block *block, int index, const data *dy, const data *x, int64_t tokens,
                           const struct gradient_sink *sink) {
  const struct linear *linear = &block->model->linear[index];
  if (tokens == 0) return;
  int64_t most = panel_rows(block->panel, linear->rows, linear->columns);
  for (struct row_range rows = {0}; rows.first < linear->rows; rows.first += rows.count) {
    rows.count = linear->rows - rows.first < most ? linear->rows - rows.first : most;
    block->k->linear_backward_weight(block->k, block->dw, data_at(block->k, dy, rows.first), x, tokens, linear->columns, rows.count,
                                     linear->rows);
    sink->weight(sink->context, index, rows, block->dw);
  }
  if (!sink->vector || linear->bias == ABSENT) return;
  block->k->column_sums(block->k, block->dbias, dy, tokens, linear->rows);
  sink->vector(sink->context, linear->bias, block->dbias);
}

static void reader_backward(struct block *block, enum block_weights which, int index, data *dx, const data *dy, int64_t tokens, bool add) {
  const struct linear *linear = &block->model->linear[index];
  if (tokens == 0) return;
  block->k->linear_backward_input(block->k, dx, dy, block_tensor(block, which, linear->weight), tokens, linear->columns, linear->rows, add);
}

/* dx (NULL: not wanted) (+)= the norm's input's gradient; its weight's and bias's to the sink where somebody asks. */
static void norm_backward(struct block *block, enum block_weights which, enum norm_role role, data *dx, const data *dy, const data *x,
                          int64_t rows, int64_t columns, bool add, const struct gradient_sink *sink) {
  const struct model *model = block->model;
  struct norm_shape shape = norm_of(block, rows, columns);
  bool bias = sink->vector && model->norm_bias[role] != ABSENT;
  if (!dx && !sink->vector) return;
  block->k->norm_backward(block->k, dx, sink->vector ? block->dvector : NULL, bias ? block->dbias : NULL, dy, x,
                          block_tensor(block, which, model->norm[role]), &shape, add);
  if (sink->vector) sink->vector(sink->context, model->norm[role], block->dvector);
  if (bias) sink->vector(sink->context, model->norm_bias[role], block->dbias);
}

static void heads_backward(struct block *block, enum block_weights which, enum norm_role norm, data *dx, const data *x, const data *raw,
                           int heads, const struct gradient_sink *sink) {
  int D = block->model->head_size;
  struct quantized_shape shape = heads_shape(block, heads);
  if (quantizes_heads(block, which)) block->k->quantize_backward_input(block->k, dx, dx, x, &shape);
  if (block->cosine) block->k->rope(block->k, dx, block->cosine, block->sine, block->tokens, heads, D, true);
  if (has(block, norm)) norm_backward(block, which, norm, dx, dx, raw, (int64_t)block->tokens * heads, D, false, sink);
}

/* From dsum, the gradient of x + attention(n1), to what q, k and v read: dn1 (+)=, unless `wanted` is false. */
static void attention_backward(struct block *block, enum block_weights which, const data *dsum, bool wanted, bool add,
                               const struct gradient_sink *sink) {
  struct kernels *k = block->k;
  const struct model *model = block->model;
  struct attention_shape shape = attention_of(block);
  int64_t T = block->tokens, wide = (int64_t)model->heads * model->head_size;
  bool inputs = quantizes_inputs(block, which), heads = quantizes_heads(block, which);
  layer_backward(block, LINEAR_O, dsum, inputs ? block->a_hat : block->a, T, sink);
  reader_backward(block, which, LINEAR_O, block->da, dsum, T, false);
  input_backward(block, which, block->da, block->a, T, wide);
  k->attention_backward(k, block->dq, block->dk, block->dv, block->da, block->a, block->logsum, heads ? block->q_hat : block->q,
                        heads ? block->key_hat : block->key, heads ? block->v_hat : block->v, &shape);
  heads_backward(block, which, NORM_Q, block->dq, block->q, block->q_raw, model->heads, sink);
  heads_backward(block, which, NORM_K, block->dk, block->key, block->key_raw, model->kv_heads, sink);
  struct quantized_shape value = heads_shape(block, model->kv_heads);
  if (heads) k->quantize_backward_input(k, block->dv, block->dv, block->v, &value);
  const data *slope[] = {block->dq, block->dk, block->dv};
  for (int i = 0; i < 3; i++) {
    layer_backward(block, attention_readers[i], slope[i], inputs ? block->n1_hat : block->n1, T, sink);
    if (wanted) reader_backward(block, which, attention_readers[i], block->dn1, slope[i], T, add || i > 0);
  }
}

/* The router's part: its weight's gradient, and its input's added to dn2. */
static void route_backward(struct block *block, enum block_weights which, const struct gradient_sink *sink) {
  struct kernels *k = block->k;
  k->route_backward(k, block->dlogits, block->dshare, &block->routing);
  if (sink->vector) layer_backward(block, LINEAR_ROUTER, block->dlogits, block->n2, block->tokens, sink);
  reader_backward(block, which, LINEAR_ROUTER, block->dn2, block->dlogits, block->tokens, true);
}

/* From dsum, the gradient of h + mlp(n), to dn (NULL: not wanted): of n, or where attention reads the same norm, of what its readers read. */
static void mlp_backward(struct block *block, enum block_weights which, data *dn, const data *dsum, const struct gradient_sink *sink) {
  struct kernels *k = block->k;
  int64_t H = block->model->hidden, F = block->model->ffn;
  bool routed = block->model->experts > 0, inputs = quantizes_inputs(block, which);
  const data *n = one_norm(block) ? block->n1 : block->n2, *n_hat = one_norm(block) ? block->n1_hat : block->n2_hat;
  const data *in = routed ? block->expert_in : inputs ? n_hat : n, *act = inputs ? block->act_hat : block->act;
  const data *dout = routed ? block->dexpert_out : dsum;
  data *din = routed ? block->dexpert_in : dn;
  if (routed) k->combine_backward(k, block->dexpert_out, block->dshare, dsum, block->expert_out, &block->routing, H);
  for (int e = 0; e < model_mlps(block->model); e++) {
    int down = linear_of_expert(LINEAR_DOWN, e);
    layer_backward(block, down, rows_of(block, dout, e, H), rows_of(block, act, e, F), tokens_of(block, e), sink);
    reader_backward(block, which, down, rows_of(block, block->dup, e, F), rows_of(block, dout, e, H), tokens_of(block, e), false);
  }
  input_backward(block, which, block->dup, block->act, block->rows, F);
  if (gated(block))
    k->silu_gate_backward(k, block->dgate, block->dup, block->dup, block->gate, block->up, block->rows * F);
  else
    k->activation_backward(k, block->dup, block->dup, block->up, block->model->activation, block->rows * F);
  for (int e = 0; e < model_mlps(block->model); e++)
    for (enum linear_role role = gated(block) ? LINEAR_GATE : LINEAR_UP; role <= LINEAR_UP; role++) {
      int index = linear_of_expert(role, e);
      const data *dy = rows_of(block, role == LINEAR_GATE ? block->dgate : block->dup, e, F);
      layer_backward(block, index, dy, rows_of(block, in, e, H), tokens_of(block, e), sink);
      if (dn) reader_backward(block, which, index, rows_of(block, din, e, H), dy, tokens_of(block, e), gated(block) && role == LINEAR_UP);
    }
  if (!dn) return;
  if (routed) k->gather_rows_backward(k, dn, block->dexpert_in, &block->routing, H, false);
  if (!one_norm(block)) input_backward(block, which, dn, n, block->tokens, H);
  if (routed) route_backward(block, which, sink);
}

void block_backward_mlp(struct block *block, enum block_weights which, bool wanted, const data *dy, const struct gradient_sink *sink) {
  struct kernels *k = block->k;
  const struct model *model = block->model;
  int64_t T = block->tokens, H = model->hidden;
  bool post = model->post_norm, needed = !model->parallel || wanted || sink->vector;
  const data *dsum2 = dy;
  if (post) {
    norm_backward(block, which, NORM_MLP, block->dsum, dy, block->sum2, T, H, false, sink);
    dsum2 = block->dsum;
  }
  mlp_backward(block, which, !needed ? NULL : one_norm(block) ? block->dn1 : block->dn2, dsum2, sink);
  k->copy(k, block->dh, dsum2, stream_bytes(block));
  if (post) {
    k->accumulate(k, block->dh, block->dn2, T * H);
    norm_backward(block, which, NORM_ATTENTION, block->dh, block->dh, block->sum1, T, H, false, sink);
  } else if (!model->parallel) {
    norm_backward(block, which, NORM_MLP, block->dh, block->dn2, block->h, T, H, true, sink);
  }
}

void block_backward_attention(struct block *block, enum block_weights which, data *dx, const data *x, const struct gradient_sink *sink) {
  struct kernels *k = block->k;
  const struct model *model = block->model;
  int64_t T = block->tokens, H = model->hidden;
  bool shared = one_norm(block), wanted = dx || sink->vector;
  attention_backward(block, which, block->dh, wanted, shared, sink);
  if (!wanted) return;
  input_backward(block, which, block->dn1, block->n1, T, H);
  if (dx) k->copy(k, dx, block->dh, stream_bytes(block));
  if (model->post_norm) {
    if (dx) k->accumulate(k, dx, block->dn1, T * H);
    return;
  }
  norm_backward(block, which, NORM_ATTENTION, dx, block->dn1, x, T, H, true, sink);
  if (model->parallel && !shared) norm_backward(block, which, NORM_MLP, dx, block->dn2, x, T, H, true, sink);
}

void block_backward(struct block *block, enum block_weights which, data *dx, const data *dy, const data *x,
                    const struct gradient_sink *sink) {
  block_backward_mlp(block, which, dx != NULL, dy, sink);
  block_backward_attention(block, which, dx, x, sink);
}
