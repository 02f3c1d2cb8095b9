/* operations.c: a wrapper for each operation of a training step. Bytes count each operand once, as it is in memory; what a cache holds
 * may come faster. */
#include "operations.h"

#include <string.h>

#include "clock.h"
#include "cpu/backend.h"

static void count_product(void *context, const struct product *done) {
  struct operations *operations = context;
  if (operations->current) operations->current->flops += 2.0 * (double)done->m * (double)done->n * (double)done->k;
}

/* The operation's entry, made at its first call. */
static struct operation *operation_of(struct operations *operations, const char *name, const char *part) {
  int i = 0;
  while (i < operations->count && strcmp(operations->operation[i].name, name) != 0) i++;
  if (i == operations->count) operations->operation[operations->count++] = (struct operation){.name = name, .part = part};
  return &operations->operation[i];
}

static double values(int64_t count) {
  return (double)count * sizeof(float);
}

static double matrix(const struct quantized_shape *shape) {
  return values(shape->rows * shape->columns);
}

/* Scales and zero points are not stored; factors and their gradients are. */
static double factors(const struct quantized_shape *shape, const float *f_hi) {
  return f_hi ? values(2 * groups_of(shape)) : 0;
}

#define OPERATION(NAME, PART, BYTES, PARAMETERS, ARGUMENTS)                                                                                \
  static void timed_##NAME PARAMETERS {                                                                                                    \
    struct operations *o = (struct operations *)(void *)k;                                                                                 \
    struct operation *entry = operation_of(o, #NAME, PART);                                                                                \
    o->current = o->on ? entry : NULL;                                                                                                     \
    double begin = now();                                                                                                                  \
    o->inner.NAME ARGUMENTS;                                                                                                               \
    double seconds = now() - begin;                                                                                                        \
    o->current = NULL;                                                                                                                     \
    if (!o->on) return;                                                                                                                    \
    entry->calls++;                                                                                                                        \
    entry->seconds += seconds;                                                                                                             \
    entry->bytes += BYTES;                                                                                                                 \
  }

OPERATION(linear_forward, "products", values(tokens *columns + columns * rows + (add ? 2 : 1) * tokens * rows),
          (struct kernels * k, data *y, const data *x, const data *w, const data *bias, int64_t tokens, int64_t columns, int64_t rows,
           bool add),
          (k, y, x, w, bias, tokens, columns, rows, add))
OPERATION(linear_backward_input, "products", values(tokens *rows + columns * rows + (add ? 2 : 1) * tokens * columns),
          (struct kernels * k, data *dx, const data *dy, const data *w, int64_t tokens, int64_t columns, int64_t rows, bool add),
          (k, dx, dy, w, tokens, columns, rows, add))
OPERATION(linear_backward_weight, "products", values(tokens *rows + tokens * columns + columns * rows),
          (struct kernels * k, data *dw, const data *dy, const data *x, int64_t tokens, int64_t columns, int64_t rows),
          (k, dw, dy, x, tokens, columns, rows))

OPERATION(quantize_forward, "quantizer", 2 * matrix(shape) + factors(shape, f_hi),
          (struct kernels * k, data *w_hat, const data *w, const struct weight_scales *scales, const float *f_hi, const float *f_lo,
           const struct quantized_shape *shape, bool at_rest),
          (k, w_hat, w, scales, f_hi, f_lo, shape, at_rest))
OPERATION(quantize_backward, "quantizer", 2 * matrix(shape) + 2 * factors(shape, f_hi),
          (struct kernels * k, float *df_hi, float *df_lo, float *drow, float *dcolumn, const data *dw_hat, const data *w,
           const struct weight_scales *scales, const float *f_hi, const float *f_lo, const struct quantized_shape *shape, bool at_rest),
          (k, df_hi, df_lo, drow, dcolumn, dw_hat, w, scales, f_hi, f_lo, shape, at_rest))
OPERATION(quantize_backward_input, "quantizer", 3 * matrix(shape),
          (struct kernels * k, data *dx, const data *dy, const data *x, const struct quantized_shape *shape), (k, dx, dy, x, shape))

OPERATION(attention_forward, "attention",
          values((int64_t)shape->tokens *(2 * (shape->heads + shape->kv_heads) * shape->head_size + shape->heads)),
          (struct kernels * k, data *out, float *logsum, const data *q, const data *key, const data *v,
           const struct attention_shape *shape),
          (k, out, logsum, q, key, v, shape))
OPERATION(attention_backward, "attention",
          values((int64_t)shape->tokens *(4 * (shape->heads + shape->kv_heads) * shape->head_size + shape->heads)),
          (struct kernels * k, data *dq, data *dk, data *dv, const data *dout, const data *out, const float *logsum, const data *q,
           const data *key, const data *v, const struct attention_shape *shape),
          (k, dq, dk, dv, dout, out, logsum, q, key, v, shape))

OPERATION(rope, "positions", values(tokens *head_size *(2 * heads + 1)),
          (struct kernels * k, data *x, const float *cosine, const float *sine, int64_t tokens, int heads, int head_size, bool inverse),
          (k, x, cosine, sine, tokens, heads, head_size, inverse))
OPERATION(norm_forward, "norms", values(2 * shape->rows * shape->columns + shape->columns),
          (struct kernels * k, data *y, const data *x, const data *w, const data *b, const struct norm_shape *shape),
          (k, y, x, w, b, shape))
OPERATION(norm_backward, "norms", values((2 + (dx ? 1 + add : 0)) * shape->rows * shape->columns + shape->columns),
          (struct kernels * k, data *dx, float *dw, float *db, const data *dy, const data *x, const data *w, const struct norm_shape *shape,
           bool add),
          (k, dx, dw, db, dy, x, w, shape, add))
OPERATION(silu_gate_forward, "activation", values(3 * count),
          (struct kernels * k, data *y, const data *gate, const data *up, int64_t count), (k, y, gate, up, count))
OPERATION(silu_gate_backward, "activation", values(5 * count),
          (struct kernels * k, data *dgate, data *dup, const data *dy, const data *gate, const data *up, int64_t count),
          (k, dgate, dup, dy, gate, up, count))
OPERATION(mse, "loss", values((2 + (dy ? 1 + add : 0)) * count),
          (struct kernels * k, float *loss, data *dy, const data *y, const data *target, int64_t count, float weight, bool add),
          (k, loss, dy, y, target, count, weight, add))

OPERATION(copy, "moves", 2 * (double)bytes, (struct kernels * k, void *to, const void *from, size_t bytes), (k, to, from, bytes))
OPERATION(clear, "moves", (double)bytes, (struct kernels * k, void *memory, size_t bytes), (k, memory, bytes))
OPERATION(add, "moves", values(3 * count), (struct kernels * k, float *to, const float *from, int64_t count), (k, to, from, count))
OPERATION(accumulate, "moves", values(3 * count), (struct kernels * k, data *to, const data *from, int64_t count), (k, to, from, count))

OPERATION(sigmoid_forward, "optimizer", values(2 * count), (struct kernels * k, float *y, const float *x, int64_t count), (k, y, x, count))
OPERATION(sigmoid_backward, "optimizer", values(3 * count), (struct kernels * k, float *dx, const float *dy, const float *x, int64_t count),
          (k, dx, dy, x, count))
OPERATION(step_begin, "optimizer", values(count), (struct kernels * k, struct step_state *state, const float *gradient, int64_t count),
          (k, state, gradient, count))
OPERATION(adamw, "optimizer", values(7 * count),
          (struct kernels * k, float *x, float *m, float *v, const float *gradient, int64_t count, float lr,
           const struct step_state *state),
          (k, x, m, v, gradient, count, lr, state))

OPERATION(column_sums, "transformation", values(rows *columns + columns),
          (struct kernels * k, float *sums, const data *x, int64_t rows, int64_t columns), (k, sums, x, rows, columns))
OPERATION(matrix_vector, "transformation", values(rows *columns + rows + columns),
          (struct kernels * k, float *y, const data *w, const float *x, int64_t rows, int64_t columns), (k, y, w, x, rows, columns))
OPERATION(vector_matrix, "transformation", values(rows *columns + rows + 2 * columns),
          (struct kernels * k, float *y, const float *x, const data *w, int64_t rows, int64_t columns), (k, y, x, w, rows, columns))
OPERATION(fold_vector, "transformation", values((2 + !!plus + !!shift + !!scale) * count),
          (struct kernels * k, data *to, const data *from, const float *plus, const float *shift, const float *scale, int64_t count),
          (k, to, from, plus, shift, scale, count))
OPERATION(fold_vector_backward, "transformation", values((3 + 2 * !!dscale + !!plus + !!shift + !!scale) * count),
          (struct kernels * k, float *dinner, float *dscale, const float *dto, const data *from, const float *plus, const float *shift,
           const float *scale, int64_t count),
          (k, dinner, dscale, dto, from, plus, shift, scale, count))

void operations_init(struct operations *operations, const struct kernels *k) {
  *operations = (struct operations){.k = *k, .inner = *k};
#define WRAP(NAME) operations->k.NAME = timed_##NAME
  WRAP(linear_forward);
  WRAP(linear_backward_input);
  WRAP(linear_backward_weight);
  WRAP(quantize_forward);
  WRAP(quantize_backward);
  WRAP(quantize_backward_input);
  WRAP(attention_forward);
  WRAP(attention_backward);
  WRAP(rope);
  WRAP(norm_forward);
  WRAP(norm_backward);
  WRAP(silu_gate_forward);
  WRAP(silu_gate_backward);
  WRAP(mse);
  WRAP(copy);
  WRAP(clear);
  WRAP(add);
  WRAP(accumulate);
  WRAP(sigmoid_forward);
  WRAP(sigmoid_backward);
  WRAP(step_begin);
  WRAP(adamw);
  WRAP(column_sums);
  WRAP(matrix_vector);
  WRAP(vector_matrix);
  WRAP(fold_vector);
  WRAP(fold_vector_backward);
#undef WRAP
  k->state->observer = count_product;
  k->state->observer_context = operations;
}
