/* trace.c: every operation of struct kernels as: note what it asks for, pass it on. */
#include "trace.h"

#include <stdlib.h>
#include <string.h>

#include "clock.h"

struct backend {
  struct kernels *behind; /* NULL: nothing is computed */
  struct trace *trace;

  /* Without a backend behind. */
  uintptr_t next;        /* where the next allocation begins: addresses that are only computed with */
  const int32_t *offset; /* of the latest routing */
  int rows, experts;     /* of it: tokens * top, and experts */
};

static const uintptr_t NOWHERE = (uintptr_t)1 << 46; /* beyond what a process has */

const char *trace_name(enum trace_operation operation) {
#define NAME(name, part) #name,
  static const char *const names[] = {TRACE_OPERATIONS(NAME)};
#undef NAME
  return names[operation];
}

enum trace_part trace_part(enum trace_operation operation) {
#define PART(name, part) TRACE_##part,
  static const enum trace_part parts[] = {TRACE_OPERATIONS(PART)};
#undef PART
  return parts[operation];
}

const char *trace_part_name(enum trace_part part) {
  static const char *const names[] = {[TRACE_PRODUCTS] = "products",   [TRACE_ATTENTION] = "attention",
                                      [TRACE_QUANTIZER] = "quantizer", [TRACE_TRANSFORMATION] = "transformation",
                                      [TRACE_NORMS] = "norms",         [TRACE_ACTIVATIONS] = "activations",
                                      [TRACE_EXPERTS] = "experts",     [TRACE_LOSS] = "loss",
                                      [TRACE_OPTIMIZER] = "optimizer", [TRACE_MOVES] = "moves"};
  return names[part];
}

static double begin(const struct kernels *k) {
  return k->state->behind ? now() : 0;
}

/* Work may run asynchronously: the time is that until it is done. A failure stays for the caller's own synchronize. */
static void note(const struct kernels *k, enum trace_operation operation, double flops, double bytes, double since) {
  struct trace_row *row = &k->state->trace->row[operation];
  struct error ignored = {0};
  row->calls++;
  row->flops += flops;
  row->bytes += bytes;
  if (!k->state->behind) return;
  k->state->behind->synchronize(k->state->behind, &ignored);
  row->seconds += now() - since;
}

/* ---- sizes ---- */

static double size_of(const struct quantized_shape *shape) {
  return (double)shape->rows * (double)shape->columns;
}

static double size_of_norm(const struct norm_shape *shape) {
  return (double)shape->rows * (double)shape->columns;
}

static double routed(const struct routing *routing, int64_t columns) {
  return (double)routing->tokens * routing->top * (double)columns;
}

/* Queries times the keys that each sees. */
static double pairs(const struct attention_shape *shape) {
  double T = shape->tokens, W = shape->window && shape->window < T ? shape->window : T;
  return W * (W + 1) / 2 + (T - W) * W;
}

/* Elements of q and k, or of the output and v. */
static double heads_size(const struct attention_shape *shape) {
  return (double)shape->tokens * (shape->heads + shape->kv_heads) * shape->head_size;
}

/* Every weight of groups [first, end) is quantized with every pair of the grid: some eight operations each time. */
static double search_flops(const struct quantized_shape *shape, int64_t first, int64_t end) {
  return 8.0 * CLIP_SEARCH_STEPS * CLIP_SEARCH_STEPS * size_of(shape) * (double)(end - first) / (double)groups_of(shape);
}

/* ---- memory ---- */

static void *trace_allocate(struct kernels *k, size_t bytes) {
  struct backend *state = k->state;
  state->trace->allocated += bytes;
  if (state->behind) return state->behind->allocate(state->behind, bytes);
  uintptr_t at = state->next;
  state->next += (bytes + 4095) / 4096 * 4096 + 4096;
  return (void *)at; /* NOLINT(performance-no-int-to-ptr): a name, never read */
}

static void trace_release(struct kernels *k, void *memory) {
  if (k->state->behind) k->state->behind->release(k->state->behind, memory);
}

static bool trace_owns(struct kernels *k, const void *memory) {
  return k->state->behind->owns(k->state->behind, memory);
}

static void *trace_allocate_host(struct kernels *k, size_t bytes) {
  return k->state->behind->allocate_host(k->state->behind, bytes);
}

static void trace_release_host(struct kernels *k, void *memory) {
  k->state->behind->release_host(k->state->behind, memory);
}

static size_t trace_room(struct kernels *k) {
  return k->state->behind->room(k->state->behind);
}

/* Copies beside the work are not noted: nobody waits for them. */
static struct lane *trace_lane_open(struct kernels *k) {
  return k->state->behind->lane_open(k->state->behind);
}

static void trace_lane_close(struct kernels *k, struct lane *lane) {
  k->state->behind->lane_close(k->state->behind, lane);
}

static void trace_send(struct kernels *k, struct lane *lane, void *to, const void *from, size_t bytes) {
  k->state->behind->send(k->state->behind, lane, to, from, bytes);
}

static void trace_follow(struct kernels *k, struct lane *lane) {
  k->state->behind->follow(k->state->behind, lane);
}

static void trace_join(struct kernels *k, struct lane *lane) {
  k->state->behind->join(k->state->behind, lane);
}

static void trace_use(struct kernels *k, struct lane *lane) {
  k->state->behind->use(k->state->behind, lane);
}

static bool trace_idle(struct kernels *k, struct lane *lane, bool wait) {
  return k->state->behind->idle(k->state->behind, lane, wait);
}

static int trace_synchronize(struct kernels *k, struct error *error) {
  return k->state->behind ? k->state->behind->synchronize(k->state->behind, error) : 0;
}

/* Each operation is noted by itself: nothing is recorded. */
static void trace_repeat(struct kernels *k, void **recording, void (*work)(void *context), void *context) {
  (void)k;
  (void)recording;
  work(context);
}

static void trace_forget(struct kernels *k, void *recording) {
  (void)k;
  (void)recording;
}

static void trace_close(struct kernels *k) {
  free(k->state);
  free(k);
}

/* Without a backend all is zero, but for experts: they get the same number of tokens. */
static void trace_download(struct kernels *k, void *to, const void *from, size_t bytes) {
  const struct backend *state = k->state;
  double since = begin(k);
  if (state->behind) {
    state->behind->download(state->behind, to, from, bytes);
  } else {
    memset(to, 0, bytes);
    for (int e = 0; from == state->offset && e <= state->experts; e++)
      ((int32_t *)to)[e] = (int32_t)((int64_t)state->rows * e / state->experts);
  }
  note(k, TRACE_download, 0, 2 * (double)bytes, since);
}

/* ---- products ---- */

static double product(int64_t tokens, int64_t columns, int64_t rows) {
  return 2 * (double)tokens * (double)columns * (double)rows;
}

static double product_bytes(const struct kernels *k, int64_t tokens, int64_t columns, int64_t rows) {
  double T = (double)tokens, C = (double)columns, R = (double)rows;
  return (double)k->element_bytes * (T * C + C * R + T * R);
}

/* The backend behind, told whether products may be rounded. */
static struct kernels *multiplier(const struct kernels *k) {
  if (k->state->behind) k->state->behind->bf16_products = k->bf16_products;
  return k->state->behind;
}

static void trace_linear_forward(struct kernels *k, data *y, const data *x, const data *w, const data *bias, int64_t tokens,
                                 int64_t columns, int64_t rows, bool add) {
  struct kernels *behind = multiplier(k);
  double since = begin(k);
  if (behind) behind->linear_forward(behind, y, x, w, bias, tokens, columns, rows, add);
  note(k, k->bf16_products ? TRACE_linear_forward_bf16 : TRACE_linear_forward, product(tokens, columns, rows),
       product_bytes(k, tokens, columns, rows), since);
}

static void trace_linear_backward_input(struct kernels *k, data *dx, const data *dy, const data *w, int64_t tokens, int64_t columns,
                                        int64_t rows, bool add) {
  struct kernels *behind = multiplier(k);
  double since = begin(k);
  if (behind) behind->linear_backward_input(behind, dx, dy, w, tokens, columns, rows, add);
  note(k, k->bf16_products ? TRACE_linear_backward_input_bf16 : TRACE_linear_backward_input, product(tokens, columns, rows),
       product_bytes(k, tokens, columns, rows), since);
}

static void trace_linear_backward_weight(struct kernels *k, data *dw, const data *dy, const data *x, int64_t tokens, int64_t columns,
                                         int64_t rows, int64_t stride) {
  struct kernels *behind = multiplier(k);
  double since = begin(k);
  if (behind) behind->linear_backward_weight(behind, dw, dy, x, tokens, columns, rows, stride);
  note(k, k->bf16_products ? TRACE_linear_backward_weight_bf16 : TRACE_linear_backward_weight, product(tokens, columns, rows),
       product_bytes(k, tokens, columns, rows), since);
}

/* ---- all others ---- */

/* TRACED(name, parameters, arguments, flops, bytes): an operation without a look at what it computes. */
#define TRACED(name, parameters, arguments, flops, bytes)                                                                                  \
  static void trace_##name parameters {                                                                                                    \
    double since = begin(k);                                                                                                               \
    if (k->state->behind) k->state->behind->name arguments;                                                                                \
    note(k, TRACE_##name, flops, bytes, since);                                                                                            \
  }
#define BEHIND  k->state->behind
#define ELEMENT (double)k->element_bytes

TRACED(load, (struct kernels * k, data *to, const void *from, enum dtype dtype, int64_t count), (BEHIND, to, from, dtype, count), 0,
       (double)count *((double)dtype_size(dtype) + ELEMENT))
TRACED(fetch, (struct kernels * k, float *to, const data *from, int64_t count), (BEHIND, to, from, count), 0, (double)count *(ELEMENT + 4))
TRACED(upload, (struct kernels * k, void *to, const void *from, size_t bytes), (BEHIND, to, from, bytes), 0, 2 * (double)bytes)
TRACED(copy, (struct kernels * k, void *to, const void *from, size_t bytes), (BEHIND, to, from, bytes), 0, 2 * (double)bytes)
TRACED(clear, (struct kernels * k, void *memory, size_t bytes), (BEHIND, memory, bytes), 0, (double)bytes)
TRACED(matrix_vector, (struct kernels * k, float *y, const data *w, const float *x, int64_t rows, int64_t columns),
       (BEHIND, y, w, x, rows, columns), 0, ELEMENT *(double)rows *(double)columns)
TRACED(vector_matrix, (struct kernels * k, float *y, const float *x, const data *w, int64_t rows, int64_t columns),
       (BEHIND, y, x, w, rows, columns), 0, ELEMENT *(double)rows *(double)columns)
TRACED(norm_forward, (struct kernels * k, data *y, const data *x, const data *w, const data *b, const struct norm_shape *shape),
       (BEHIND, y, x, w, b, shape), 0, 2 * ELEMENT * size_of_norm(shape))
TRACED(norm_backward,
       (struct kernels * k, data *dx, float *dw, float *db, const data *dy, const data *x, const data *w, const struct norm_shape *shape,
        bool add),
       (BEHIND, dx, dw, db, dy, x, w, shape, add), 0, (dx ? add ? 4 : 3 : 2) * ELEMENT * size_of_norm(shape))
TRACED(rope, (struct kernels * k, data *x, const float *cosine, const float *sine, int64_t tokens, int heads, int head_size, bool inverse),
       (BEHIND, x, cosine, sine, tokens, heads, head_size, inverse), 0, 2 * ELEMENT * (double)tokens * heads * head_size)
TRACED(attention_forward,
       (struct kernels * k, data *out, float *logsum, const data *q, const data *key, const data *v, const struct attention_shape *shape),
       (BEHIND, out, logsum, q, key, v, shape), 4 * pairs(shape) * shape->heads * shape->head_size, 2 * ELEMENT * heads_size(shape))
TRACED(attention_backward,
       (struct kernels * k, data *dq, data *dk, data *dv, const data *dout, const data *out, const float *logsum, const data *q,
        const data *key, const data *v, const struct attention_shape *shape),
       (BEHIND, dq, dk, dv, dout, out, logsum, q, key, v, shape), 10 * pairs(shape) * shape->heads * shape->head_size,
       4 * ELEMENT * heads_size(shape))
TRACED(silu_gate_forward, (struct kernels * k, data *y, const data *gate, const data *up, int64_t count), (BEHIND, y, gate, up, count), 0,
       3 * ELEMENT * (double)count)
TRACED(silu_gate_backward, (struct kernels * k, data *dgate, data *dup, const data *dy, const data *gate, const data *up, int64_t count),
       (BEHIND, dgate, dup, dy, gate, up, count), 0, 5 * ELEMENT * (double)count)
TRACED(activation_forward, (struct kernels * k, data *y, const data *x, enum activation kind, int64_t count), (BEHIND, y, x, kind, count),
       0, 2 * ELEMENT * (double)count)
TRACED(activation_backward, (struct kernels * k, data *dx, const data *dy, const data *x, enum activation kind, int64_t count),
       (BEHIND, dx, dy, x, kind, count), 0, 3 * ELEMENT * (double)count)
TRACED(route_backward, (struct kernels * k, data *dlogits, const float *dweight, const struct routing *routing),
       (BEHIND, dlogits, dweight, routing), 0, 2 * ELEMENT * (double)routing->tokens * routing->experts)
TRACED(gather_rows, (struct kernels * k, data *y, const data *x, const struct routing *routing, int64_t columns),
       (BEHIND, y, x, routing, columns), 0, 2 * ELEMENT * routed(routing, columns))
TRACED(gather_rows_backward, (struct kernels * k, data *dx, const data *dy, const struct routing *routing, int64_t columns, bool add),
       (BEHIND, dx, dy, routing, columns, add), 0, (add ? 3 : 2) * ELEMENT * routed(routing, columns))
TRACED(combine_forward, (struct kernels * k, data *y, const data *x, const struct routing *routing, int64_t columns),
       (BEHIND, y, x, routing, columns), 0, 2 * ELEMENT * routed(routing, columns))
TRACED(combine_backward,
       (struct kernels * k, data *dx, float *dweight, const data *dy, const data *x, const struct routing *routing, int64_t columns),
       (BEHIND, dx, dweight, dy, x, routing, columns), 0, 3 * ELEMENT * routed(routing, columns))
TRACED(fill, (struct kernels * k, float *to, float value, int64_t count), (BEHIND, to, value, count), 0, 4 * (double)count)
TRACED(add, (struct kernels * k, float *to, const float *from, int64_t count), (BEHIND, to, from, count), 0, 12 * (double)count)
TRACED(accumulate, (struct kernels * k, data *to, const data *from, int64_t count), (BEHIND, to, from, count), 0,
       3 * ELEMENT * (double)count)
TRACED(clamp, (struct kernels * k, float *x, float low, float high, int64_t count), (BEHIND, x, low, high, count), 0, 8 * (double)count)
TRACED(column_sums, (struct kernels * k, float *sums, const data *x, int64_t rows, int64_t columns), (BEHIND, sums, x, rows, columns), 0,
       ELEMENT *(double)rows *(double)columns)
TRACED(column_range, (struct kernels * k, float *absmax, float *middle, float weight, const data *x, int64_t rows, int64_t columns),
       (BEHIND, absmax, middle, weight, x, rows, columns), 0, ELEMENT *(double)rows *(double)columns)
TRACED(column_squares, (struct kernels * k, float *sums, const data *x, int64_t rows, int64_t columns), (BEHIND, sums, x, rows, columns), 0,
       ELEMENT *(double)rows *(double)columns)
TRACED(quantize_forward,
       (struct kernels * k, data *w_hat, const data *w, const struct weight_scales *scales, const float *f_hi, const float *f_lo,
        const struct quantized_shape *shape, bool at_rest),
       (BEHIND, w_hat, w, scales, f_hi, f_lo, shape, at_rest), 0, 2 * ELEMENT * size_of(shape))
TRACED(quantize_backward,
       (struct kernels * k, float *df_hi, float *df_lo, float *drow, float *dcolumn, const data *dw_hat, const data *w,
        const struct weight_scales *scales, const float *f_hi, const float *f_lo, const struct quantized_shape *shape, bool at_rest),
       (BEHIND, df_hi, df_lo, drow, dcolumn, dw_hat, w, scales, f_hi, f_lo, shape, at_rest), 0, 2 * ELEMENT * size_of(shape))
TRACED(quantize_backward_input, (struct kernels * k, data *dx, const data *dy, const data *x, const struct quantized_shape *shape),
       (BEHIND, dx, dy, x, shape), 0, 3 * ELEMENT * size_of(shape))
TRACED(quantize_codes,
       (struct kernels * k, uint8_t *codes, uint16_t *scale, uint8_t *zero_point, const data *w, const struct weight_scales *scales,
        const float *f_hi, const float *f_lo, const struct quantized_shape *shape),
       (BEHIND, codes, scale, zero_point, w, scales, f_hi, f_lo, shape), 0, (ELEMENT + shape->quantizer.bits / 8.0) * size_of(shape))
TRACED(clip_search,
       (struct kernels * k, float *f_hi, float *f_lo, const data *w, const struct weight_scales *scales, const float *importance,
        const struct quantized_shape *shape, int64_t first, int64_t end),
       (BEHIND, f_hi, f_lo, w, scales, importance, shape, first, end), search_flops(shape, first, end),
       ELEMENT *size_of(shape) * (double)(end - first) / (double)groups_of(shape))
TRACED(expand, (struct kernels * k, float *to, const float *s, const struct channel_map *map, int64_t count, bool inverse),
       (BEHIND, to, s, map, count, inverse), 0, 8 * (double)count)
TRACED(expand_backward,
       (struct kernels * k, float *ds, const float *dto, const float *s, const struct channel_map *map, int64_t count, bool inverse,
        float sign),
       (BEHIND, ds, dto, s, map, count, inverse, sign), 0, 12 * (double)count)
TRACED(scale_weight, (struct kernels * k, data *to, const data *w, const struct weight_scales *scales, int64_t rows, int64_t columns),
       (BEHIND, to, w, scales, rows, columns), 0, 2 * ELEMENT * (double)rows * (double)columns)
TRACED(scale_weight_backward,
       (struct kernels * k, float *drow, float *dcolumn, const data *dto, const data *w, const struct weight_scales *scales, int64_t rows,
        int64_t columns),
       (BEHIND, drow, dcolumn, dto, w, scales, rows, columns), 0, 2 * ELEMENT * (double)rows * (double)columns)
TRACED(fold_vector,
       (struct kernels * k, data *to, const data *from, const float *plus, const float *shift, const float *scale, int64_t count),
       (BEHIND, to, from, plus, shift, scale, count), 0, (2 * ELEMENT + 12) * (double)count)
TRACED(fold_vector_backward,
       (struct kernels * k, float *dinner, float *dscale, const float *dto, const data *from, const float *plus, const float *shift,
        const float *scale, int64_t count),
       (BEHIND, dinner, dscale, dto, from, plus, shift, scale, count), 0, 24 * (double)count)
TRACED(mse, (struct kernels * k, float *loss, data *dy, const data *y, const data *target, int64_t count, float weight, bool add),
       (BEHIND, loss, dy, y, target, count, weight, add), 0, (dy ? add ? 4 : 3 : 2) * ELEMENT * (double)count)
TRACED(sigmoid_forward, (struct kernels * k, float *y, const float *x, int64_t count), (BEHIND, y, x, count), 0, 8 * (double)count)
TRACED(sigmoid_backward, (struct kernels * k, float *dx, const float *dy, const float *x, int64_t count), (BEHIND, dx, dy, x, count), 0,
       12 * (double)count)
TRACED(sigmoid_inverse, (struct kernels * k, float *x, float limit, int64_t count), (BEHIND, x, limit, count), 0, 8 * (double)count)
TRACED(step_begin, (struct kernels * k, struct step_state *state, const float *values, int64_t count), (BEHIND, state, values, count), 0,
       4 * (double)count)
TRACED(adamw,
       (struct kernels * k, const struct learnables of[2], float *m, float *v, const float *gradient, const struct step_state *state),
       (BEHIND, of, m, v, gradient, state), 0, 28 * (double)(of[0].count + of[1].count))
TRACED(sign_step, (struct kernels * k, float *x, const float *gradient, int64_t count, float lr, const struct step_state *state),
       (BEHIND, x, gradient, count, lr, state), 0, 12 * (double)count)
TRACED(cross_entropy_piece,
       (struct kernels * k, struct cross_entropy *state, const data *logits, const int32_t *target, int64_t rows, int64_t first,
        int64_t columns),
       (BEHIND, state, logits, target, rows, first, columns), 0, ELEMENT *(double)rows *(double)columns)

#undef BEHIND
#undef ELEMENT
#undef TRACED

/* Remembers where the experts' rows will be asked for. */
static void trace_route_forward(struct kernels *k, const struct routing *routing, const data *logits) {
  struct backend *state = k->state;
  double since = begin(k);
  if (state->behind) state->behind->route_forward(state->behind, routing, logits);
  state->offset = routing->offset;
  state->rows = routing->tokens * routing->top;
  state->experts = routing->experts;
  note(k, TRACE_route_forward, 0, (double)k->element_bytes * routing->tokens * routing->experts, since);
}

struct kernels *trace_open(struct kernels *behind, size_t element_bytes, struct trace *trace) {
  struct kernels *k = calloc(1, sizeof *k);
  struct backend *state = calloc(1, sizeof *state);
  if (!k || !state) {
    free(k);
    free(state);
    return NULL;
  }
  bool repeats = behind ? behind->repeat != NULL : element_bytes < sizeof(float); /* as devices do, whose elements are bf16 */
  *trace = (struct trace){0};
  *state = (struct backend){.behind = behind, .trace = trace, .next = NOWHERE};
  *k = (struct kernels){.name = behind ? behind->name : "trace",
                        .level = behind ? behind->level : "",
                        .threads = behind ? behind->threads : 1,
                        .element_bytes = behind ? behind->element_bytes : element_bytes,
                        .state = state,
                        .close = trace_close,
                        .allocate = trace_allocate,
                        .release = trace_release,
                        .owns = behind && behind->owns ? trace_owns : NULL,
                        .repeat = repeats ? trace_repeat : NULL,
                        .forget = repeats ? trace_forget : NULL,
                        .synchronize = trace_synchronize,
                        .download = trace_download,
                        .linear_forward = trace_linear_forward,
                        .linear_backward_input = trace_linear_backward_input,
                        .linear_backward_weight = trace_linear_backward_weight,
                        .load = trace_load,
                        .fetch = trace_fetch,
                        .upload = trace_upload,
                        .copy = trace_copy,
                        .clear = trace_clear,
                        .matrix_vector = trace_matrix_vector,
                        .vector_matrix = trace_vector_matrix,
                        .norm_forward = trace_norm_forward,
                        .norm_backward = trace_norm_backward,
                        .rope = trace_rope,
                        .attention_forward = trace_attention_forward,
                        .attention_backward = trace_attention_backward,
                        .silu_gate_forward = trace_silu_gate_forward,
                        .silu_gate_backward = trace_silu_gate_backward,
                        .activation_forward = trace_activation_forward,
                        .activation_backward = trace_activation_backward,
                        .route_forward = trace_route_forward,
                        .route_backward = trace_route_backward,
                        .gather_rows = trace_gather_rows,
                        .gather_rows_backward = trace_gather_rows_backward,
                        .combine_forward = trace_combine_forward,
                        .combine_backward = trace_combine_backward,
                        .fill = trace_fill,
                        .add = trace_add,
                        .accumulate = trace_accumulate,
                        .clamp = trace_clamp,
                        .column_sums = trace_column_sums,
                        .column_range = trace_column_range,
                        .column_squares = trace_column_squares,
                        .quantize_forward = trace_quantize_forward,
                        .quantize_backward = trace_quantize_backward,
                        .quantize_backward_input = trace_quantize_backward_input,
                        .quantize_codes = trace_quantize_codes,
                        .clip_search = trace_clip_search,
                        .expand = trace_expand,
                        .expand_backward = trace_expand_backward,
                        .scale_weight = trace_scale_weight,
                        .scale_weight_backward = trace_scale_weight_backward,
                        .fold_vector = trace_fold_vector,
                        .fold_vector_backward = trace_fold_vector_backward,
                        .mse = trace_mse,
                        .sigmoid_forward = trace_sigmoid_forward,
                        .sigmoid_backward = trace_sigmoid_backward,
                        .sigmoid_inverse = trace_sigmoid_inverse,
                        .step_begin = trace_step_begin,
                        .adamw = trace_adamw,
                        .sign_step = trace_sign_step,
                        .cross_entropy_piece = trace_cross_entropy_piece};
  if (behind) {
    k->allocate_host = trace_allocate_host;
    k->release_host = trace_release_host;
  }
  if (behind && behind->owns) {
    k->room = trace_room;
    k->lane_open = trace_lane_open;
    k->lane_close = trace_lane_close;
    k->send = trace_send;
    k->follow = trace_follow;
    k->join = trace_join;
    k->use = trace_use;
    k->idle = trace_idle;
  }
  return k;
}
