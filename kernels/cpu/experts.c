/* experts.c: a mixture of experts (Mixtral, arXiv 2401.04088): which experts each token goes to, its rows to them and back. Softmax over all
 * logits, cut to the largest and divided by their sum, is softmax over those alone. */
#include "cpu/backend.h"
#include "cpu/vector.h"

/* The largest logit of those that are not among the first `chosen`; the first of equals. NaN still gives different experts. */
static inline int32_t next_expert(const float *logits, int experts, const int32_t *expert, int chosen) {
  int32_t best = -1;
  for (int32_t e = 0; e < experts; e++) {
    bool taken = false;
    for (int i = 0; i < chosen; i++) taken = taken || expert[i] == e;
    if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
  }
  return best;
}

static inline void route_token(int32_t *expert, float *weight, const float *logits, int experts, int top) {
  float sum = 0;
  for (int i = 0; i < top; i++) {
    expert[i] = next_expert(logits, experts, expert, i);
    weight[i] = vector_exp(logits[expert[i]] - logits[expert[0]]);
    sum += weight[i];
  }
  for (int i = 0; i < top; i++) weight[i] /= sum;
}

/* Rows by counting: each expert's tokens in their order. */
static void group_rows(const struct routing *routing) {
  int32_t *offset = routing->offset, count = routing->tokens * routing->top;
  memset(offset, 0, ((size_t)routing->experts + 1) * sizeof *offset);
  for (int32_t i = 0; i < count; i++) offset[routing->expert[i] + 1]++;
  for (int e = 0; e < routing->experts; e++) offset[e + 1] += offset[e];
  for (int32_t i = 0; i < count; i++) { /* moves each expert's offset to its end, where the next one's begins */
    int32_t row = offset[routing->expert[i]]++;
    routing->row[i] = row;
    routing->token[row] = i / routing->top;
  }
  for (int e = routing->experts; e > 0; e--) offset[e] = offset[e - 1];
  offset[0] = 0;
}

static void route_forward(struct kernels *k, const struct routing *routing, const data *logits) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < routing->tokens; t++)
    route_token(routing->expert + t * routing->top, routing->weight + t * routing->top, (const float *)logits + t * routing->experts,
                routing->experts, routing->top);
  group_rows(routing);
}

/* The shares say it all: the logits are not needed again. */
static void route_backward(struct kernels *k, data *dlogits, const float *dweight, const struct routing *routing) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < routing->tokens; t++) {
    float *out = (float *)dlogits + t * routing->experts, dot = 0;
    for (int e = 0; e < routing->experts; e++) out[e] = 0;
    for (int64_t i = t * routing->top; i < (t + 1) * routing->top; i++) dot += routing->weight[i] * dweight[i];
    for (int64_t i = t * routing->top; i < (t + 1) * routing->top; i++) out[routing->expert[i]] = routing->weight[i] * (dweight[i] - dot);
  }
}

static void gather_rows(struct kernels *k, data *y, const data *x, const struct routing *routing, int64_t columns) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < (int64_t)routing->tokens * routing->top; r++)
    memcpy((float *)y + r * columns, (const float *)x + routing->token[r] * columns, (size_t)columns * sizeof(float));
}

static void gather_rows_backward(struct kernels *k, data *dx, const data *dy, const struct routing *routing, int64_t columns, bool add) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < routing->tokens; t++) {
    float *out = (float *)dx + t * columns;
    if (!add) memset(out, 0, (size_t)columns * sizeof *out);
    for (int64_t i = t * routing->top; i < (t + 1) * routing->top; i++) {
      const float *in = (const float *)dy + routing->row[i] * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; c++) out[c] += in[c];
    }
  }
}

static void combine_forward(struct kernels *k, data *y, const data *x, const struct routing *routing, int64_t columns) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < routing->tokens; t++) {
    float *out = (float *)y + t * columns;
    for (int64_t i = t * routing->top; i < (t + 1) * routing->top; i++) {
      const float *in = (const float *)x + routing->row[i] * columns, weight = routing->weight[i];
#pragma omp simd
      for (int64_t c = 0; c < columns; c++) out[c] += weight * in[c];
    }
  }
}

static void combine_backward(struct kernels *k, data *dx, float *dweight, const data *dy, const data *x, const struct routing *routing,
                             int64_t columns) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < (int64_t)routing->tokens * routing->top; i++) {
    const float *grad = (const float *)dy + i / routing->top * columns, *in = (const float *)x + routing->row[i] * columns;
    float *out = (float *)dx + routing->row[i] * columns, weight = routing->weight[i], dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < columns; c++) dot += grad[c] * in[c];
    dweight[i] = dot;
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) out[c] = weight * grad[c];
  }
}
