/* norm.cu: LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467), which is the same with a mean of zero. A team of threads takes a row:
 * a warp, or the whole block where rows are long. What is read again comes from the first level's cache. */
#include "cuda/device.h"

/* n = (x - mean) * inverse */
struct row_norm {
  float mean, inverse;
};

enum { NORM_WARP_COLUMNS = 1024 }; /* up to so many a warp takes a row */

/* The deviations are squared in a pass of their own: mean(x^2) - mean^2 would cancel where the mean is large. */
template <int N, int TEAM> DEVICE struct row_norm find_row_norm(const bf16 *x, const struct norm_shape &shape, bool row_there) {
  float mean = 0, squares = 0, v[N];
  int64_t first = team_lane<TEAM>() * N, end = row_there ? shape.columns : 0;
  if (shape.centered) {
    for (int64_t c = first; c < end; c += TEAM * N) {
      load<N>(v, x + c);
      for (int n = 0; n < N; n++) mean += v[n];
    }
    mean = team_sum<TEAM>(mean) / (float)shape.columns;
  }
  for (int64_t c = first; c < end; c += TEAM * N) {
    load<N>(v, x + c);
    for (int n = 0; n < N; n++) squares += (v[n] - mean) * (v[n] - mean);
  }
  squares = team_sum<TEAM>(squares);
  return {mean, 1.0f / sqrtf(squares / (float)shape.columns + shape.eps)};
}

template <int N, int TEAM>
__global__ void norm_forward_kernel(bf16 *y, const bf16 *x, const bf16 *w, const bf16 *b, struct norm_shape shape) {
  int64_t r = team_index<TEAM>();
  bool there = r < shape.rows;
  x += r * shape.columns;
  y += r * shape.columns;
  struct row_norm norm = find_row_norm<N, TEAM>(x, shape, there);
  for (int64_t c = team_lane<TEAM>() * N; there && c < shape.columns; c += TEAM * N) {
    float v[N], weight[N], bias[N] = {};
    load<N>(v, x + c);
    load<N>(weight, w + c);
    if (b) load<N>(bias, b + c);
    for (int n = 0; n < N; n++) v[n] = weight[n] * ((v[n] - norm.mean) * norm.inverse) + bias[n];
    store<N>(y + c, v);
  }
}

/* dx = inverse * (g - mean(g) - n * mean(g * n)), g = dy * w; without the mean of g where it is not centered. */
template <int N, int TEAM>
__global__ void norm_backward_kernel(bf16 *dx, const bf16 *dy, const bf16 *x, const bf16 *w, struct norm_shape shape, bool add) {
  int64_t r = team_index<TEAM>(), first = team_lane<TEAM>() * N;
  bool there = r < shape.rows;
  x += r * shape.columns;
  dy += r * shape.columns;
  dx += r * shape.columns;
  struct row_norm norm = find_row_norm<N, TEAM>(x, shape, there);
  float sum = 0, dot = 0, v[N], d[N], weight[N];
  for (int64_t c = first; there && c < shape.columns; c += TEAM * N) {
    load<N>(v, x + c);
    load<N>(d, dy + c);
    load<N>(weight, w + c);
    for (int n = 0; n < N; n++) {
      sum += d[n] * weight[n];
      dot += d[n] * weight[n] * (v[n] - norm.mean);
    }
  }
  sum = team_sum<TEAM>(sum);
  dot = team_sum<TEAM>(dot);
  float push = shape.centered ? sum / (float)shape.columns : 0;
  float pull = dot * norm.inverse * norm.inverse / (float)shape.columns;
  for (int64_t c = first; there && c < shape.columns; c += TEAM * N) {
    float before[N] = {};
    load<N>(v, x + c);
    load<N>(d, dy + c);
    load<N>(weight, w + c);
    if (add) load<N>(before, dx + c);
    for (int n = 0; n < N; n++) d[n] = before[n] + norm.inverse * (d[n] * weight[n] - push - (v[n] - norm.mean) * pull);
    store<N>(dx + c, d);
  }
}

/* What the columns' sums need of each row. */
template <int N, int TEAM> __global__ void row_norm_kernel(struct row_norm *norms, const bf16 *x, struct norm_shape shape) {
  int64_t r = team_index<TEAM>();
  struct row_norm norm = find_row_norm<N, TEAM>(x + r * shape.columns, shape, r < shape.rows);
  if (r < shape.rows && team_lane<TEAM>() == 0) norms[r] = norm;
}

struct norm_weight_slope {
  const bf16 *dy, *x;
  const struct row_norm *norms;
  int64_t columns;
  template <int N> DEVICE void add(float (&sum)[N], int64_t r, int64_t c) const {
    float d[N], v[N];
    load<N>(d, dy + r * columns + c);
    load<N>(v, x + r * columns + c);
    struct row_norm norm = norms[r];
    for (int n = 0; n < N; n++) sum[n] += d[n] * ((v[n] - norm.mean) * norm.inverse);
  }
};

/* Runs the kernel for the shape: eight elements at a time where they are aligned. */
#define LAUNCH_ROWS(kernel, k, shape, vectors, ...)                                                                                        \
  do {                                                                                                                                     \
    bool warp = (shape)->columns <= NORM_WARP_COLUMNS;                                                                                     \
    struct launch_grid grid = warp ? team_grid<WARP>((shape)->rows) : team_grid<BLOCK_THREADS>((shape)->rows);                             \
    if (vectors)                                                                                                                           \
      launch(k, grid, BLOCK_THREADS, 0, warp ? kernel<8, WARP> : kernel<8, BLOCK_THREADS>, __VA_ARGS__);                                   \
    else                                                                                                                                   \
      launch(k, grid, BLOCK_THREADS, 0, warp ? kernel<1, WARP> : kernel<1, BLOCK_THREADS>, __VA_ARGS__);                                   \
  } while (0)

static void norm_forward(struct kernels *k, data *y, const data *x, const data *w, const data *b, const struct norm_shape *shape) {
  timed timer(k, "norm_forward", 4.0 * (double)(shape->rows * shape->columns));
  LAUNCH_ROWS(norm_forward_kernel, k, shape, shape->columns % 8 == 0 && aligned(y, x, w, b), elements(y), elements(x), elements(w),
              elements(b), *shape);
}

/* The parameters' gradients come before dx, which may overwrite dy. */
static void norm_backward(struct kernels *k, data *dx, float *dw, float *db, const data *dy, const data *x, const data *w,
                          const struct norm_shape *shape, bool add) {
  timed timer(k, "norm_backward", (dx ? add ? 8.0 : 6.0 : 4.0) * (double)(shape->rows * shape->columns));
  int64_t rows = shape->rows, columns = shape->columns, room = column_room(columns);
  bool vectors = columns % 8 == 0 && aligned(dx, dy, x, w);
  char *scratch = dw || db ? cuda_scratch(k, room + rows * (int64_t)sizeof(struct row_norm)) : NULL;
  if ((dw || db) && !scratch) return;
  if (dw) {
    struct row_norm *norms = (struct row_norm *)(scratch + room);
    LAUNCH_ROWS(row_norm_kernel, k, shape, vectors, norms, elements(x), *shape);
    column_sum(k, dw, norm_weight_slope{elements(dy), elements(x), norms, columns}, rows, columns, vectors, false, (float *)scratch);
  }
  if (db) column_sum(k, db, weighted_value{elements(dy), NULL, columns}, rows, columns, vectors, false, (float *)scratch);
  if (dx) LAUNCH_ROWS(norm_backward_kernel, k, shape, vectors, elements(dx), elements(dy), elements(x), elements(w), *shape, add);
}
