/* columns.c: what is taken by columns of a matrix: sums, sums of squares, and ranges. */
#include "cpu/backend.h"
#include "cpu/chunks.h"

#include <math.h>

/* sums[c] (+)= sum over rows of weight[r] * x[r, c]; weight NULL: 1. */
static void weighted_column_sums(struct kernels *k, float *sums, const float *weight, const data *x, int64_t rows, int64_t columns,
                                 bool add) {
  int64_t chunks = row_chunks(rows);
  float *partial = cpu_scratch(k, chunks * columns + 1);
  if (!partial) return;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    float *sum = partial + chunk * columns;
    memset(sum, 0, (size_t)columns * sizeof *sum);
    for (int64_t r = chunk_begin(rows, chunks, chunk); r < chunk_begin(rows, chunks, chunk + 1); r++) {
      const float *in = (const float *)x + r * columns, share = weight ? weight[r] : 1;
#pragma omp simd
      for (int64_t c = 0; c < columns; c++) sum[c] += share * in[c];
    }
  }
  sum_chunks(sums, partial, chunks, columns, columns, add);
}

static void column_sums(struct kernels *k, float *sums, const data *x, int64_t rows, int64_t columns) {
  weighted_column_sums(k, sums, NULL, x, rows, columns, false);
}

static void column_range(struct kernels *k, float *absmax, float *middle, float weight, const data *x, int64_t rows, int64_t columns) {
  (void)k;
  enum { BLOCK = 64 };
  const float *in = (const float *)x;
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < columns; begin += BLOCK) {
    int64_t count = begin + BLOCK < columns ? BLOCK : columns - begin;
    float high[BLOCK], low[BLOCK];
    for (int64_t c = 0; c < count; c++) high[c] = -INFINITY, low[c] = INFINITY;
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
      for (int64_t c = 0; c < count; c++) {
        float value = in[r * columns + begin + c];
        high[c] = value > high[c] ? value : high[c];
        low[c] = value < low[c] ? value : low[c];
      }
    for (int64_t c = 0; c < count && absmax; c++) { /* without rows both are -INFINITY and raise nothing */
      float reach = high[c] > -low[c] ? high[c] : -low[c];
      absmax[begin + c] = reach > absmax[begin + c] ? reach : absmax[begin + c];
    }
    for (int64_t c = 0; c < count && middle; c++) middle[begin + c] = rows ? weight * (high[c] + low[c]) / 2 : 0;
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
