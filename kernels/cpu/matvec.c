/* matvec.c: a weight times one vector, from either side, as a shift of LET passes through it. */
#include "cpu/backend.h"

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
  weighted_column_sums(k, y, x, w, rows, columns, true);
}
