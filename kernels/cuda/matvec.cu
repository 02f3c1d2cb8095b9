/* matvec.cu: a weight times one vector, from either side, as a shift of LET passes through it. */
#include "cuda/device.h"

template <int N> __global__ void matrix_vector_kernel(float *y, const bf16 *w, const float *x, int64_t rows, int64_t columns) {
  int64_t r = team_index<WARP>();
  float sum = 0;
  for (int64_t c = team_lane<WARP>() * N; r < rows && c < columns; c += WARP * N) {
    float a[N], b[N];
    load<N>(a, w + r * columns + c);
    load<N>(b, x + c);
    for (int n = 0; n < N; n++) sum += a[n] * b[n];
  }
  sum = team_sum<WARP>(sum);
  if (r < rows && team_lane<WARP>() == 0) y[r] = sum;
}

static void matrix_vector(struct kernels *k, float *y, const data *w, const float *x, int64_t rows, int64_t columns) {
  timed timer(k, "matrix_vector", 2.0 * (double)(rows * columns));
  if (columns % 8 == 0 && aligned(w, x))
    launch(k, team_grid<WARP>(rows), BLOCK_THREADS, 0, matrix_vector_kernel<8>, y, elements(w), x, rows, columns);
  else
    launch(k, team_grid<WARP>(rows), BLOCK_THREADS, 0, matrix_vector_kernel<1>, y, elements(w), x, rows, columns);
}

static void vector_matrix(struct kernels *k, float *y, const float *x, const data *w, int64_t rows, int64_t columns) {
  timed timer(k, "vector_matrix", 2.0 * (double)(rows * columns));
  float *partial = (float *)cuda_scratch(k, column_room(columns));
  bool vectors = columns % 8 == 0 && aligned(w);
  if (partial) column_sum(k, y, weighted_value{elements(w), x, columns}, rows, columns, vectors, true, partial);
}
