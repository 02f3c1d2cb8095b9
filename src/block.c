/* block.c: forward and backward of one block, in the order of block.h's formulas. */
#include "block.h"

#include <stdlib.h>
#include <string.h>

static const enum linear_role readers_of_n1[] = {LINEAR_Q, LINEAR_K, LINEAR_V};
static const enum linear_role readers_of_n2[] = {LINEAR_GATE, LINEAR_UP};

/* ---- memory ---- */

static void *device_memory(struct block *block, size_t bytes, struct error *error) {
  if (error->code) return NULL;
  void *memory = block->k->allocate(block->k, bytes);
  if (!memory) error_set(error, ERROR_WORK, "out of memory on %s for a block (%zu bytes)", block->k->name, bytes);
  return memory;
}

static data *elements(struct block *block, int64_t count, struct error *error) {
  return device_memory(block, (size_t)count * block->k->element_bytes, error);
}

static int load_rope_table(struct block *block, struct error *error) {
  size_t bytes = (size_t)block->tokens * (size_t)(block->model->head_size / 2) * sizeof(float);
  float *host = malloc(2 * bytes);
  block->cosine = device_memory(block, bytes, error);
  block->sine = device_memory(block, bytes, error);
  if (!host) error_set(error, ERROR_WORK, "out of memory for the rotary table");
  if (!error->code) {
    float *sine = host + bytes / sizeof(float);
    model_rope_table(block->model, block->tokens, host, sine);
    block->k->upload(block->k, block->cosine, host, bytes);
    block->k->upload(block->k, block->sine, sine, bytes);
  }
  free(host);
  return error->code;
}

static int64_t largest_linear(const struct model *model) {
  int64_t largest = 0;
  for (int i = 0; i < LINEARS; i++) {
    int64_t count = model->linear[i].rows * model->linear[i].columns;
    if (count > largest) largest = count;
  }
  return largest;
}

int block_init(struct block *block, const struct model *model, struct kernels *k, int tokens, bool quantized, bool trained,
               struct error *error) {
  *block = (struct block){.model = model, .k = k, .tokens = tokens};
  int64_t T = tokens, H = model->hidden, F = model->ffn, D = model->head_size;
  int64_t width_q = model->heads * D, width_kv = model->kv_heads * D;
  block->weights = elements(block, model->elements, error);
  if (quantized) block->effective = elements(block, model->linear_elements, error);
  block->n1 = elements(block, T * H, error);
  block->q = elements(block, T * width_q, error);
  block->key = elements(block, T * width_kv, error);
  block->v = elements(block, T * width_kv, error);
  if (model->norm[NORM_Q] != ABSENT) {
    block->q_raw = elements(block, T * width_q, error);
    block->key_raw = elements(block, T * width_kv, error);
  }
  block->a = elements(block, T * width_q, error);
  block->logsum = device_memory(block, (size_t)(T * model->heads) * sizeof(float), error);
  block->h = elements(block, T * H, error);
  block->n2 = elements(block, T * H, error);
  block->gate = elements(block, T * F, error);
  block->up = elements(block, T * F, error);
  block->act = elements(block, T * F, error);
  if (trained) {
    block->dw = elements(block, largest_linear(model), error);
    block->dq = elements(block, T * width_q, error);
    block->dk = elements(block, T * width_kv, error);
    block->dv = elements(block, T * width_kv, error);
    block->da = elements(block, T * width_q, error);
    block->dh = elements(block, T * H, error);
    block->dn = elements(block, T * H, error);
    block->dgate = elements(block, T * F, error);
    block->dup = elements(block, T * F, error);
  }
  return load_rope_table(block, error);
}

void block_free(struct block *block) {
  void *const memory[] = {block->weights, block->effective, block->cosine,  block->sine,  block->n1,     block->q,  block->key,
                          block->v,       block->q_raw,     block->key_raw, block->a,     block->logsum, block->h,  block->n2,
                          block->gate,    block->up,        block->act,     block->dw,    block->dq,     block->dk, block->dv,
                          block->da,      block->dh,        block->dn,      block->dgate, block->dup};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
    if (memory[i]) block->k->release(block->k, memory[i]);
  memset(block, 0, sizeof *block);
}

/* ---- weights ---- */

void block_load(struct block *block, const void *image) {
  const struct model *model = block->model;
  for (int i = 0; i < model->tensors; i++) {
    const struct block_tensor *tensor = &model->tensor[i];
    block->k->load(block->k, data_at(block->k, block->weights, tensor->element_offset), (const char *)image + tensor->image_offset,
                   tensor->dtype, tensor->rows * tensor->columns);
  }
}

static const data *tensor_of(const struct block *block, int index) {
  return index == ABSENT ? NULL : data_at(block->k, block->weights, block->model->tensor[index].element_offset);
}

data *block_effective(const struct block *block, enum linear_role role) {
  return data_at(block->k, block->effective, block->model->linear[role].element_offset);
}

const data *block_weight(const struct block *block, enum linear_role role, enum block_weights which) {
  return which == BLOCK_QUANTIZED ? block_effective(block, role) : tensor_of(block, block->model->linear[role].weight);
}

const data *block_input_of(const struct block *block, enum linear_role role) {
  switch (role) {
  case LINEAR_O:
    return block->a;
  case LINEAR_DOWN:
    return block->act;
  case LINEAR_GATE:
  case LINEAR_UP:
    return block->n2;
  default:
    return block->n1;
  }
}

/* ---- forward ---- */

static struct attention_shape attention_of(const struct block *block) {
  const struct model *model = block->model;
  return (struct attention_shape){block->tokens, model->heads, model->kv_heads, model->head_size, model->window};
}

/* y (+)= linear(x). */
static void forward(struct block *block, enum block_weights which, enum linear_role role, data *y, const data *x, bool add) {
  const struct linear *linear = &block->model->linear[role];
  block->k->linear_forward(block->k, y, x, block_weight(block, role, which), tensor_of(block, linear->bias), block->tokens, linear->columns,
                           linear->rows, add);
}

static void norm_forward(struct block *block, enum norm_role role, data *y, const data *x, int64_t rows, int64_t columns) {
  block->k->rmsnorm_forward(block->k, y, x, tensor_of(block, block->model->norm[role]), rows, columns, block->model->norm_eps);
}

/* Queries or keys as attention uses them: head norm where the family has one, then rotation. */
static void heads_forward(struct block *block, enum norm_role norm, data *x, data *raw, int heads) {
  int64_t rows = (int64_t)block->tokens * heads;
  int D = block->model->head_size;
  if (block->model->norm[norm] != ABSENT) {
    block->k->copy(block->k, raw, x, (size_t)(rows * D) * block->k->element_bytes);
    norm_forward(block, norm, x, raw, rows, D);
  }
  block->k->rope(block->k, x, block->cosine, block->sine, block->tokens, heads, D, false);
}

static void attention_forward(struct block *block, enum block_weights which, const data *x) {
  const struct model *model = block->model;
  struct attention_shape shape = attention_of(block);
  norm_forward(block, NORM_ATTENTION, block->n1, x, block->tokens, model->hidden);
  forward(block, which, LINEAR_Q, block->q, block->n1, false);
  forward(block, which, LINEAR_K, block->key, block->n1, false);
  forward(block, which, LINEAR_V, block->v, block->n1, false);
  heads_forward(block, NORM_Q, block->q, block->q_raw, model->heads);
  heads_forward(block, NORM_K, block->key, block->key_raw, model->kv_heads);
  block->k->attention_forward(block->k, block->a, block->logsum, block->q, block->key, block->v, &shape);
}

void block_forward(struct block *block, enum block_weights which, data *y, const data *x) {
  struct kernels *k = block->k;
  int64_t T = block->tokens, H = block->model->hidden, F = block->model->ffn;
  size_t stream_bytes = (size_t)(T * H) * k->element_bytes;
  attention_forward(block, which, x);
  k->copy(k, block->h, x, stream_bytes);
  forward(block, which, LINEAR_O, block->h, block->a, true);
  norm_forward(block, NORM_MLP, block->n2, block->h, T, H);
  forward(block, which, LINEAR_GATE, block->gate, block->n2, false);
  forward(block, which, LINEAR_UP, block->up, block->n2, false);
  k->silu_gate_forward(k, block->act, block->gate, block->up, T * F);
  k->copy(k, y, block->h, stream_bytes);
  forward(block, which, LINEAR_DOWN, y, block->act, true);
}

/* ---- backward ---- */

static void backward_weight(struct block *block, enum linear_role role, const data *dy, const struct gradient_sink *sink) {
  const struct linear *linear = &block->model->linear[role];
  block->k->linear_backward_weight(block->k, block->dw, dy, block_input_of(block, role), block->tokens, linear->columns, linear->rows);
  sink->weight(sink->context, role, block->dw);
}

static void backward_input(struct block *block, enum block_weights which, enum linear_role role, data *dx, const data *dy, bool add) {
  const struct linear *linear = &block->model->linear[role];
  block->k->linear_backward_input(block->k, dx, dy, block_weight(block, role, which), block->tokens, linear->columns, linear->rows, add);
}

static void norm_backward(struct block *block, enum norm_role role, data *dx, const data *dy, const data *x, int64_t rows, int64_t columns,
                          bool add) {
  block->k->rmsnorm_backward(block->k, dx, dy, x, tensor_of(block, block->model->norm[role]), rows, columns, block->model->norm_eps, add);
}

static void heads_backward(struct block *block, enum norm_role norm, data *dx, const data *raw, int heads) {
  block->k->rope(block->k, dx, block->cosine, block->sine, block->tokens, heads, block->model->head_size, true);
  if (block->model->norm[norm] != ABSENT)
    norm_backward(block, norm, dx, dx, raw, (int64_t)block->tokens * heads, block->model->head_size, false);
}

/* From dy to dh: through the MLP and its residual. */
static void mlp_backward(struct block *block, enum block_weights which, const data *dy, const struct gradient_sink *sink) {
  struct kernels *k = block->k;
  int64_t T = block->tokens, H = block->model->hidden, F = block->model->ffn;
  backward_weight(block, LINEAR_DOWN, dy, sink);
  backward_input(block, which, LINEAR_DOWN, block->dup, dy, false);
  k->silu_gate_backward(k, block->dgate, block->dup, block->dup, block->gate, block->up, T * F);
  const data *slope[LINEARS] = {[LINEAR_GATE] = block->dgate, [LINEAR_UP] = block->dup};
  for (int i = 0; i < 2; i++) {
    enum linear_role role = readers_of_n2[i];
    backward_weight(block, role, slope[role], sink);
    backward_input(block, which, role, block->dn, slope[role], i > 0);
  }
  k->copy(k, block->dh, dy, (size_t)(T * H) * k->element_bytes);
  norm_backward(block, NORM_MLP, block->dh, block->dn, block->h, T, H, true);
}

void block_backward(struct block *block, enum block_weights which, data *dx, const data *dy, const data *x,
                    const struct gradient_sink *sink) {
  struct kernels *k = block->k;
  const struct model *model = block->model;
  struct attention_shape shape = attention_of(block);
  int64_t T = block->tokens, H = model->hidden;
  mlp_backward(block, which, dy, sink);
  backward_weight(block, LINEAR_O, block->dh, sink);
  backward_input(block, which, LINEAR_O, block->da, block->dh, false);
  k->attention_backward(k, block->dq, block->dk, block->dv, block->da, block->a, block->logsum, block->q, block->key, block->v, &shape);
  heads_backward(block, NORM_Q, block->dq, block->q_raw, model->heads);
  heads_backward(block, NORM_K, block->dk, block->key_raw, model->kv_heads);
  const data *slope[LINEARS] = {[LINEAR_Q] = block->dq, [LINEAR_K] = block->dk, [LINEAR_V] = block->dv};
  for (int i = 0; i < 3; i++) {
    enum linear_role role = readers_of_n1[i];
    backward_weight(block, role, slope[role], sink);
    if (dx) backward_input(block, which, role, block->dn, slope[role], i > 0);
  }
  if (!dx) return;
  k->copy(k, dx, block->dh, (size_t)(T * H) * k->element_bytes);
  norm_backward(block, NORM_ATTENTION, dx, block->dn, x, T, H, true);
}
