/* matvec.c: a weight times one vector, from either side, as a shift of LET passes through it. */
#include "cpu/backend.h"
#include "cpu/chunks.h"

static void matrix_vector(struct kernels *k, float *y, const data *w, const float *x, int64_t rows, int64_t columns) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *row = (const float *)w + r * columns;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < columns; c++) sum += row[c] * x[c];
    y[r] = sum;
  }
}

static void vector_matrix(struct kernels *k, float *y, const float *x, const data *w, int64_t rows, int64_t columns) {
  int64_t chunks = row_chunks(rows);
  float *partial = cpu_scratch(k, chunks * columns + 1);
  if (!partial) return;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    float *sum = partial + chunk * columns;
    memset(sum, 0, (size_t)columns * sizeof *sum);
    for (int64_t r = chunk_begin(rows, chunks, chunk); r < chunk_begin(rows, chunks, chunk + 1); r++) {
      const float *row = (const float *)w + r * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; c++) sum[c] += x[r] * row[c];
    }
  }
  sum_chunks(y, partial, chunks, columns, columns, true);
}
