/* norm.c: RMSNorm (arXiv 1910.07467) and the column statistics that read the same rows. */
#include "cpu/backend.h"

#include <math.h>

static inline float inverse_rms(const float *x, int64_t columns, float eps) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < columns; c++) squares += x[c] * x[c];
  return 1.0f / sqrtf(squares / (float)columns + eps);
}

static void rmsnorm_forward(struct kernels *k, data *y, const data *x, const data *w, int64_t rows, int64_t columns, float eps) {
  (void)k;
  const float *weight = (const float *)w;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *in = (const float *)x + r * columns;
    float *out = (float *)y + r * columns, inverse = inverse_rms(in, columns, eps);
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) out[c] = weight[c] * (in[c] * inverse);
  }
}

/* With n = x * inverse: dx = inverse * (g - n * mean(g * n)), g = dy * w. */
static void rmsnorm_backward(struct kernels *k, data *dx, const data *dy, const data *x, const data *w, int64_t rows, int64_t columns,
                             float eps, bool add) {
  (void)k;
  const float *weight = (const float *)w;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *in = (const float *)x + r * columns, *grad = (const float *)dy + r * columns;
    float *out = (float *)dx + r * columns, inverse = inverse_rms(in, columns, eps), dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < columns; c++) dot += grad[c] * weight[c] * in[c];
    float pull = dot * inverse * inverse / (float)columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) {
      float d = inverse * (grad[c] * weight[c] - in[c] * pull);
      out[c] = add ? out[c] + d : d;
    }
  }
}

static void column_squares(struct kernels *k, float *sums, const data *x, int64_t rows, int64_t columns) {
  (void)k;
  const float *in = (const float *)x;
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < columns; begin += 64) {
    int64_t end = begin + 64 < columns ? begin + 64 : columns;
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
      for (int64_t c = begin; c < end; c++) sums[c] += in[r * columns + c] * in[r * columns + c];
  }
}
