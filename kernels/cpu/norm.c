/* norm.c: LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467), which is the same with a mean of zero. */
#include "cpu/backend.h"
#include "cpu/chunks.h"

#include <math.h>

/* n = (x - mean) * inverse */
struct row_norm {
  float mean, inverse;
};

/* The deviations are squared in a pass of their own: mean(x^2) - mean^2 would cancel where the mean is large. */
static inline struct row_norm row_norm(const float *x, const struct norm_shape *shape) {
  float mean = 0, squares = 0;
  if (shape->centered) {
#pragma omp simd reduction(+ : mean)
    for (int64_t c = 0; c < shape->columns; c++) mean += x[c];
    mean /= (float)shape->columns;
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < shape->columns; c++) squares += (x[c] - mean) * (x[c] - mean);
  return (struct row_norm){mean, 1.0f / sqrtf(squares / (float)shape->columns + shape->eps)};
}

static void norm_forward(struct kernels *k, data *y, const data *x, const data *w, const data *b, const struct norm_shape *shape) {
  (void)k;
  const float *weight = (const float *)w, *bias = (const float *)b;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < shape->rows; r++) {
    const float *in = (const float *)x + r * shape->columns;
    float *out = (float *)y + r * shape->columns;
    struct row_norm norm = row_norm(in, shape);
#pragma omp simd
    for (int64_t c = 0; c < shape->columns; c++) out[c] = weight[c] * ((in[c] - norm.mean) * norm.inverse);
    if (bias)
#pragma omp simd
      for (int64_t c = 0; c < shape->columns; c++) out[c] += bias[c];
  }
}

/* dx = inverse * (g - mean(g) - n * mean(g * n)), g = dy * w; without the mean of g where it is not centered. */
static inline void row_backward_input(float *dx, const float *dy, const float *x, const float *w, struct row_norm norm,
                                      const struct norm_shape *shape, bool add) {
  float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t c = 0; c < shape->columns; c++) {
    float g = dy[c] * w[c];
    sum += g;
    dot += g * (x[c] - norm.mean);
  }
  float push = shape->centered ? sum / (float)shape->columns : 0;
  float pull = dot * norm.inverse * norm.inverse / (float)shape->columns;
#pragma omp simd
  for (int64_t c = 0; c < shape->columns; c++) {
    float d = norm.inverse * (dy[c] * w[c] - push - (x[c] - norm.mean) * pull);
    dx[c] = add ? dx[c] + d : d;
  }
}

static inline void row_backward_parameters(float *dw, float *db, const float *dy, const float *x, struct row_norm norm, int64_t columns) {
#pragma omp simd
  for (int64_t c = 0; c < columns; c++) {
    dw[c] += dy[c] * ((x[c] - norm.mean) * norm.inverse);
    db[c] += dy[c];
  }
}

/* The parameters' gradients come before dx, which may overwrite dy. */
static void norm_backward(struct kernels *k, data *dx, float *dw, float *db, const data *dy, const data *x, const data *w,
                          const struct norm_shape *shape, bool add) {
  bool parameters = dw || db;
  int64_t rows = shape->rows, columns = shape->columns, chunks = parameters ? row_chunks(rows) : rows;
  float *partial = parameters ? cpu_scratch(k, 2 * chunks * columns + 1) : NULL;
  if (parameters && !partial) return;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    float *sum = parameters ? partial + 2 * chunk * columns : NULL;
    if (sum) memset(sum, 0, (size_t)(2 * columns) * sizeof *sum);
    for (int64_t r = chunk_begin(rows, chunks, chunk); r < chunk_begin(rows, chunks, chunk + 1); r++) {
      const float *in = (const float *)x + r * columns, *grad = (const float *)dy + r * columns;
      struct row_norm norm = row_norm(in, shape);
      if (sum) row_backward_parameters(sum, sum + columns, grad, in, norm, columns);
      if (dx) row_backward_input((float *)dx + r * columns, grad, in, (const float *)w, norm, shape, add);
    }
  }
  if (dw) sum_chunks(dw, partial, chunks, 2 * columns, columns, false);
  if (db) sum_chunks(db, partial + columns, chunks, 2 * columns, columns, false);
}
