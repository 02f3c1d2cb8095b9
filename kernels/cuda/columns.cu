/* columns.cu: what is taken by columns of a matrix. Chunks of rows are summed each by its own blocks, then the chunks' sums in their order. */
#include "cuda/device.h"

enum { COLUMN_THREADS = 128 };
static const int64_t CHUNK_LEAST_ROWS = 8, CHUNKS_MOST = 64;

static int64_t row_chunks(int64_t rows) {
  int64_t chunks = ceil_div(rows, CHUNK_LEAST_ROWS);
  return chunks < CHUNKS_MOST ? chunks : CHUNKS_MOST;
}

/* Bytes of scratch that column_sum needs. */
static int64_t column_room(int64_t columns) {
  return CHUNKS_MOST * columns * (int64_t)sizeof(float) + 16;
}

/* The rows of a chunk: [begin, end). */
struct row_range {
  int64_t begin, end;
};

DEVICE struct row_range chunk_rows(int64_t rows) {
  return {rows * blockIdx.y / gridDim.y, rows * (blockIdx.y + 1) / gridDim.y};
}

/* F has a member template add<N>(sum, r, c), which adds the values of row r and of columns [c, c + N). A warp's threads take N columns each, the
 * warps of a block the rows in turn; the warps' sums are added in their order. */
template <int N, class F> __global__ void column_chunk_kernel(float *partial, F f, int64_t rows, int64_t columns) {
  enum { WARPS = BLOCK_THREADS / WARP };
  alignas(16) __shared__ float of_warp[WARPS][WARP * N];
  int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
  int64_t first = (int64_t)blockIdx.x * WARP * N, c = first + lane * N;
  struct row_range range = chunk_rows(rows);
  float sum[N] = {};
  for (int64_t r = range.begin + warp; r < range.end && c < columns; r += WARPS) f.template add<N>(sum, r, c);
  store<N>(of_warp[warp] + lane * N, sum);
  __syncthreads();
  for (int i = (int)threadIdx.x; i < WARP * N && first + i < columns; i += BLOCK_THREADS) {
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += of_warp[w][i];
    partial[blockIdx.y * columns + first + i] = total;
  }
}

__global__ void column_total_kernel(float *to, const float *partial, int64_t columns, int chunks, bool add) {
  int64_t c = (int64_t)blockIdx.x * COLUMN_THREADS + threadIdx.x;
  if (c >= columns) return;
  float sum = add ? to[c] : 0;
  for (int chunk = 0; chunk < chunks; chunk++) sum += partial[chunk * columns + c];
  to[c] = sum;
}

/* to[c] (+)= sum over rows of what f adds; partial: column_room bytes. vectors: f takes eight columns at a time, of which there is a multiple. */
template <class F>
static void column_sum(struct kernels *k, float *to, const F &f, int64_t rows, int64_t columns, bool vectors, bool add, float *partial) {
  int64_t chunks = row_chunks(rows);
  if (vectors)
    launch(k, grid_of(ceil_div(columns, 8 * WARP), chunks), BLOCK_THREADS, 0, column_chunk_kernel<8, F>, partial, f, rows, columns);
  else
    launch(k, grid_of(ceil_div(columns, WARP), chunks), BLOCK_THREADS, 0, column_chunk_kernel<1, F>, partial, f, rows, columns);
  launch(k, grid_of(ceil_div(columns, COLUMN_THREADS)), COLUMN_THREADS, 0, column_total_kernel, to, (const float *)partial, columns,
         (int)chunks, add);
}

struct weighted_value {
  const bf16 *x;
  const float *weight; /* NULL: 1 */
  int64_t columns;
  template <int N> DEVICE void add(float (&sum)[N], int64_t r, int64_t c) const {
    float value[N];
    load<N>(value, x + r * columns + c);
    for (int n = 0; n < N; n++) sum[n] += (weight ? weight[r] : 1.0f) * value[n];
  }
};

struct squared_value {
  const bf16 *x;
  int64_t columns;
  template <int N> DEVICE void add(float (&sum)[N], int64_t r, int64_t c) const {
    float value[N];
    load<N>(value, x + r * columns + c);
    for (int n = 0; n < N; n++) sum[n] += value[n] * value[n];
  }
};

static void column_sums(struct kernels *k, float *sums, const data *x, int64_t rows, int64_t columns) {
  timed timer(k, "column_sums", 2.0 * (double)(rows * columns));
  bool vectors = columns % 8 == 0 && aligned(x);
  float *partial = (float *)cuda_scratch(k, column_room(columns));
  if (partial) column_sum(k, sums, weighted_value{elements(x), NULL, columns}, rows, columns, vectors, false, partial);
}

static void column_squares(struct kernels *k, float *sums, const data *x, int64_t rows, int64_t columns) {
  timed timer(k, "column_squares", 2.0 * (double)(rows * columns));
  bool vectors = columns % 8 == 0 && aligned(x);
  float *partial = (float *)cuda_scratch(k, column_room(columns));
  if (partial) column_sum(k, sums, squared_value{elements(x), columns}, rows, columns, vectors, true, partial);
}

/* ---- ranges: the same in any order ---- */

__global__ void range_chunk_kernel(float *high, float *low, const bf16 *x, int64_t rows, int64_t columns) {
  int64_t c = (int64_t)blockIdx.x * COLUMN_THREADS + threadIdx.x;
  if (c >= columns) return;
  struct row_range range = chunk_rows(rows);
  float most = -INFINITY, least = INFINITY;
#pragma unroll 4
  for (int64_t r = range.begin; r < range.end; r++) {
    float value = to_float(x[r * columns + c]);
    most = value > most ? value : most;
    least = value < least ? value : least;
  }
  high[blockIdx.y * columns + c] = most;
  low[blockIdx.y * columns + c] = least;
}

__global__ void range_total_kernel(float *absmax, float *middle, float weight, const float *high, const float *low, int64_t columns,
                                   int chunks) {
  int64_t c = (int64_t)blockIdx.x * COLUMN_THREADS + threadIdx.x;
  if (c >= columns) return;
  float most = -INFINITY, least = INFINITY;
  for (int chunk = 0; chunk < chunks; chunk++) {
    most = quantizer_max(high[chunk * columns + c], most);
    least = quantizer_min(low[chunk * columns + c], least);
  }
  float reach = most > -least ? most : -least; /* without rows -INFINITY, which raises nothing */
  if (absmax) absmax[c] = reach > absmax[c] ? reach : absmax[c];
  if (middle) middle[c] = chunks ? weight * (most + least) / 2 : 0;
}

static void column_range(struct kernels *k, float *absmax, float *middle, float weight, const data *x, int64_t rows, int64_t columns) {
  timed timer(k, "column_range", 2.0 * (double)(rows * columns));
  int64_t chunks = row_chunks(rows), blocks = ceil_div(columns, COLUMN_THREADS);
  float *high = (float *)cuda_scratch(k, 2 * column_room(columns));
  if (!high) return;
  float *low = high + chunks * columns;
  launch(k, grid_of(blocks, chunks), COLUMN_THREADS, 0, range_chunk_kernel, high, low, elements(x), rows, columns);
  launch(k, grid_of(blocks), COLUMN_THREADS, 0, range_total_kernel, absmax, middle, weight, (const float *)high, (const float *)low,
         columns, (int)chunks);
}
