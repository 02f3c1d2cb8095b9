/* attention.cu: causal softmax attention in tiles of 64 queries and 64 keys, after FlashAttention-2 (arXiv 2307.08691): no T x T values are
 * ever stored. The backward computes the weights again from logsum, once by tiles of queries for dq and once by tiles of keys for dk and dv,
 * which costs two of seven products more than one pass would but needs no atomics: every sum has its order. */
#include "cuda/tile.h"

/* One launch's shapes. */
struct attention {
  struct attention_shape shape;
  int64_t wide_q, wide_kv; /* columns of q and out, and of keys and values */
  int group;               /* query heads a kv head */
  float scale;             /* 1 / sqrt(D) */
  bool vectors;
};

static struct attention attention_of(const struct attention_shape *shape, bool vectors) {
  int64_t D = shape->head_size;
  return {*shape, shape->heads * D, shape->kv_heads * D, shape->heads / shape->kv_heads, 1.0f / sqrtf((float)D), vectors && D % 8 == 0};
}

DEVICE bool sees(const struct attention &a, int64_t query, int64_t key) {
  return key <= query && (a.shape.window == 0 || key > query - a.shape.window);
}

/* The first tile of keys that a tile of queries sees, and the last tile of queries that sees a tile of keys. */
DEVICE int first_key_tile(const struct attention &a, int tile) {
  int64_t first = (int64_t)tile * TILE - a.shape.window + 1;
  return a.shape.window && first > 0 ? (int)(first / TILE) : 0;
}
DEVICE int last_query_tile(const struct attention &a, int tile) {
  int last = (a.shape.tokens - 1) / TILE;
  int64_t query = (int64_t)tile * TILE + TILE - 1 + a.shape.window - 1;
  return a.shape.window && query / TILE < last ? (int)(query / TILE) : last;
}

/* Four neighbouring lanes hold a row of an accumulator. */
DEVICE float row_largest(float x) {
  x = quantizer_max(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return quantizer_max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* ---- forward ---- */

template <int D> struct forward_tiles { struct tile<D> q, key, v; };

/* Running softmax of this lane's two rows. */
struct running {
  float largest[2], sum[2];
};

/* Scores become weights exp(scale * (s - largest)), and what was summed before is rescaled. */
template <int D>
DEVICE void softmax_tile(float (&s)[TILE / 8][4], float (&out)[D / 8][4], struct running &run, const struct attention &a, int64_t query,
                         int64_t key) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = run.largest[half], sum = 0;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        if (!sees(a, query + tile_row(i), key + tile_column(n, i))) s[n][i] = -INFINITY;
        largest = s[n][i] > largest ? s[n][i] : largest;
      }
    largest = row_largest(largest);
    float from = largest == -INFINITY ? 0 : largest,
          rescale = expf(a.scale * (run.largest[half] - from)); /* a row that sees nothing here */
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) sum += s[n][i] = expf(a.scale * (s[n][i] - from));
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) out[n][i] *= rescale;
    run.largest[half] = largest;
    run.sum[half] = run.sum[half] * rescale + sum;
  }
}

template <int D>
__global__ void __launch_bounds__(TILE_THREADS)
    attention_forward_kernel(bf16 *out, float *logsum, const bf16 *q, const bf16 *key, const bf16 *v, struct attention a) {
  struct forward_tiles<D> &tiles = *(struct forward_tiles<D> *)dynamic_shared();
  int tile = (int)(gridDim.x - 1 - blockIdx.x), head = (int)blockIdx.y, row = (int)threadIdx.x / WARP * 16; /* the longest rows first */
  int64_t T = a.shape.tokens, query = (int64_t)tile * TILE, column = (int64_t)head * a.shape.head_size;
  int64_t kv_column = (int64_t)(head / a.group) * a.shape.head_size;
  float sums[D / 8][4] = {};
  struct running run = {{-INFINITY, -INFINITY}, {0, 0}};
  tile_load<D>(tiles.q, q, query, T, a.wide_q, column, a.shape.head_size, a.vectors);
  for (int t = first_key_tile(a, tile); t <= tile; t++) {
    float s[TILE / 8][4] = {};
    __syncthreads();
    tile_load<D>(tiles.key, key, (int64_t)t * TILE, T, a.wide_kv, kv_column, a.shape.head_size, a.vectors);
    tile_load<D>(tiles.v, v, (int64_t)t * TILE, T, a.wide_kv, kv_column, a.shape.head_size, a.vectors);
    __syncthreads();
    multiply_by_rows<D>(s, tiles.q, row, tiles.key);
    softmax_tile<D>(s, sums, run, a, query + row, (int64_t)t * TILE);
    multiply_by_columns<D>(sums, s, tiles.v);
  }
  float inverse[2];
  for (int half = 0; half < 2; half++) {
    float sum = row_sum(run.sum[half]);
    int64_t r = query + row + tile_row(2 * half);
    inverse[half] = 1 / sum;
    if (logsum && r < T && threadIdx.x % 4 == 0) logsum[head * T + r] = a.scale * run.largest[half] + logf(sum);
  }
  tile_store<D>(out, sums, inverse, query + row, T, a.wide_q, column, a.shape.head_size);
}

/* ---- backward ---- */

/* delta[head, t] = sum of dout * out: what softmax's gradient takes off. A warp a row and head. */
__global__ void attention_delta_kernel(float *delta, const bf16 *dout, const bf16 *out, struct attention a) {
  int64_t i = team_index<WARP>(), rows = (int64_t)a.shape.tokens * a.shape.heads, D = a.shape.head_size;
  float sum = 0;
  for (int64_t c = team_lane<WARP>(); i < rows && c < D; c += WARP) sum += to_float(dout[i * D + c]) * to_float(out[i * D + c]);
  sum = team_sum<WARP>(sum);
  if (i < rows && team_lane<WARP>() == 0) delta[i % a.shape.heads * a.shape.tokens + i / a.shape.heads] = sum;
}

template <int D> struct backward_tiles {
  struct tile<D> q, dout, key, v;
  float logsum[TILE], delta[TILE];
};

/* Of the tile of queries from `query` on; beyond the last an infinite logsum makes their weights 0. */
template <int D>
DEVICE void load_rows(struct backward_tiles<D> &tiles, const float *logsum, const float *delta, int head, int64_t query,
                      const struct attention &a) {
  int64_t T = a.shape.tokens, at = query + threadIdx.x;
  if (threadIdx.x >= TILE) return;
  tiles.logsum[threadIdx.x] = at < T ? logsum[head * T + at] : INFINITY;
  tiles.delta[threadIdx.x] = at < T ? delta[head * T + at] : 0;
}

template <int D>
__global__ void __launch_bounds__(TILE_THREADS) attention_dq_kernel(bf16 *dq, const bf16 *dout, const float *logsum, const float *delta,
                                                                    const bf16 *q, const bf16 *key, const bf16 *v, struct attention a) {
  struct backward_tiles<D> &tiles = *(struct backward_tiles<D> *)dynamic_shared();
  int tile = (int)(gridDim.x - 1 - blockIdx.x), head = (int)blockIdx.y, row = (int)threadIdx.x / WARP * 16;
  int64_t T = a.shape.tokens, query = (int64_t)tile * TILE, column = (int64_t)head * a.shape.head_size;
  int64_t kv_column = (int64_t)(head / a.group) * a.shape.head_size;
  float sums[D / 8][4] = {};
  tile_load<D>(tiles.q, q, query, T, a.wide_q, column, a.shape.head_size, a.vectors);
  tile_load<D>(tiles.dout, dout, query, T, a.wide_q, column, a.shape.head_size, a.vectors);
  load_rows<D>(tiles, logsum, delta, head, query, a);
  for (int t = first_key_tile(a, tile); t <= tile; t++) {
    float p[TILE / 8][4] = {}, dp[TILE / 8][4] = {};
    int64_t first = (int64_t)t * TILE;
    __syncthreads();
    tile_load<D>(tiles.key, key, first, T, a.wide_kv, kv_column, a.shape.head_size, a.vectors);
    tile_load<D>(tiles.v, v, first, T, a.wide_kv, kv_column, a.shape.head_size, a.vectors);
    __syncthreads();
    multiply_by_rows<D>(p, tiles.q, row, tiles.key);
    multiply_by_rows<D>(dp, tiles.dout, row, tiles.v);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = row + tile_row(i);
        float weight = sees(a, query + r, first + tile_column(n, i)) ? expf(a.scale * p[n][i] - tiles.logsum[r]) : 0;
        dp[n][i] = weight * (dp[n][i] - tiles.delta[r]);
      }
    multiply_by_columns<D>(sums, dp, tiles.key);
  }
  float scale[2] = {a.scale, a.scale};
  tile_store<D>(dq, sums, scale, query + row, T, a.wide_q, column, a.shape.head_size);
}

/* A block takes a tile of keys of one kv head, over all query heads that read it. Products are transposed: rows are keys. */
template <int D>
__global__ void __launch_bounds__(TILE_THREADS)
    attention_dkv_kernel(bf16 *dk, bf16 *dv, const bf16 *dout, const float *logsum, const float *delta, const bf16 *q, const bf16 *key,
                         const bf16 *v, struct attention a) {
  struct backward_tiles<D> &tiles = *(struct backward_tiles<D> *)dynamic_shared();
  int tile = (int)blockIdx.x, kv_head = (int)blockIdx.y, row = (int)threadIdx.x / WARP * 16;
  int64_t T = a.shape.tokens, first = (int64_t)tile * TILE, kv_column = (int64_t)kv_head * a.shape.head_size;
  float dk_sums[D / 8][4] = {}, dv_sums[D / 8][4] = {};
  tile_load<D>(tiles.key, key, first, T, a.wide_kv, kv_column, a.shape.head_size, a.vectors);
  tile_load<D>(tiles.v, v, first, T, a.wide_kv, kv_column, a.shape.head_size, a.vectors);
  for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; head++)
    for (int t = tile; t <= last_query_tile(a, tile); t++) {
      float p[TILE / 8][4] = {}, dp[TILE / 8][4] = {};
      int64_t query = (int64_t)t * TILE, column = (int64_t)head * a.shape.head_size;
      __syncthreads();
      tile_load<D>(tiles.q, q, query, T, a.wide_q, column, a.shape.head_size, a.vectors);
      tile_load<D>(tiles.dout, dout, query, T, a.wide_q, column, a.shape.head_size, a.vectors);
      load_rows<D>(tiles, logsum, delta, head, query, a);
      __syncthreads();
      multiply_by_rows<D>(p, tiles.key, row, tiles.q);
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int c = tile_column(n, i);
          p[n][i] = sees(a, query + c, first + row + tile_row(i)) ? expf(a.scale * p[n][i] - tiles.logsum[c]) : 0;
        }
      multiply_by_columns<D>(dv_sums, p, tiles.dout);
      multiply_by_rows<D>(dp, tiles.v, row, tiles.dout);
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dp[n][i] = p[n][i] * (dp[n][i] - tiles.delta[tile_column(n, i)]);
      multiply_by_columns<D>(dk_sums, dp, tiles.q);
    }
  float scale[2] = {a.scale, a.scale}, one[2] = {1, 1};
  tile_store<D>(dk, dk_sums, scale, first + row, T, a.wide_kv, kv_column, a.shape.head_size);
  tile_store<D>(dv, dv_sums, one, first + row, T, a.wide_kv, kv_column, a.shape.head_size);
}

/* ---- cuDNN ---- */

#ifdef OMNIQUANT_CUDNN
/* Its plans of a shape; NULL: own kernels. Operands where eight elements at a time may not be read are not for cuDNN. */
static struct cudnn_attention *cudnn_plans(struct kernels *k, const struct attention_shape *shape, bool vectors) {
  struct backend *cuda = k->state;
  if (!cuda->cudnn || k->own_attention || !vectors || cuda->failure.code) return NULL;
  struct cudnn_attention *plans = cudnn_attention(cuda->cudnn, shape);
  return plans && plans->good ? plans : NULL;
}

/* Whether the latest cuda_scratch gave what it was asked for, be it nothing. */
static bool scratch_is_there(const struct kernels *k) {
  const struct backend *cuda = k->state;
  return !cuda->failure.code && !(cuda->recording && cuda->outgrown);
}

static bool cudnn_did(struct kernels *k, bool good) {
  k->library_attention += good;
  return good;
}

static bool library_forward(struct kernels *k, data *out, float *logsum, const data *q, const data *key, const data *v,
                            const struct attention_shape *shape) {
  struct cudnn_attention *plans = cudnn_plans(k, shape, aligned(out, q, key, v));
  if (!plans) return false;
  size_t sums_bytes = logsum ? 0 : (size_t)shape->heads * shape->tokens * sizeof(float); /* written in any case */
  size_t at = (plans->forward_bytes + 255) / 256 * 256;
  char *scratch = cuda_scratch(k, (int64_t)(at + sums_bytes));
  if (!scratch_is_there(k)) return false;
  if (!logsum) logsum = (float *)(scratch + at);
  return cudnn_did(k, cudnn_forward(k->state->cudnn, plans, out, logsum, q, key, v, scratch));
}

static bool library_backward(struct kernels *k, data *dq, data *dk, data *dv, const data *dout, const data *out, const float *logsum,
                             const data *q, const data *key, const data *v, const struct attention_shape *shape) {
  struct cudnn_attention *plans = cudnn_plans(k, shape, aligned(dq, dk, dv, dout, out, q, key, v));
  if (!plans) return false;
  char *scratch = cuda_scratch(k, (int64_t)plans->backward_bytes);
  if (!scratch_is_there(k)) return false;
  return cudnn_did(k, cudnn_backward(k->state->cudnn, plans, dq, dk, dv, dout, out, logsum, q, key, v, scratch));
}
#else
template <class... A> static bool library_forward(A...) {
  return false;
}
template <class... A> static bool library_backward(A...) {
  return false;
}
#endif

/* ---- launches ---- */

/* Products of one head's tiles below the diagonal, each 2 * D flops a query and key; a window leaves some out. */
static double attention_flops(const struct attention_shape *shape, int products) {
  double T = shape->tokens, seen = shape->window && shape->window < T ? T * shape->window : T * T / 2;
  return products * 2.0 * seen * shape->head_size * shape->heads;
}

static bool head_size_fits(struct kernels *k, const struct attention_shape *shape) {
  if (shape->head_size <= 256) return true;
  cuda_fail(k, ERROR_INPUT, "--backend cuda: heads of %d channels are too large for its attention (256 at most); use cpu",
            shape->head_size);
  return false;
}

template <int D>
static void forward_launch(struct kernels *k, bf16 *out, float *logsum, const bf16 *q, const bf16 *key, const bf16 *v,
                           const struct attention &a) {
  launch(k, grid_of(ceil_div(a.shape.tokens, TILE), a.shape.heads), TILE_THREADS, sizeof(struct forward_tiles<D>),
         attention_forward_kernel<D>, out, logsum, q, key, v, a);
}

template <int D>
static void backward_launch(struct kernels *k, bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const float *logsum, const float *delta,
                            const bf16 *q, const bf16 *key, const bf16 *v, const struct attention &a) {
  int64_t tiles = ceil_div(a.shape.tokens, TILE);
  size_t shared = sizeof(struct backward_tiles<D>);
  launch(k, grid_of(tiles, a.shape.heads), TILE_THREADS, shared, attention_dq_kernel<D>, dq, dout, logsum, delta, q, key, v, a);
  launch(k, grid_of(tiles, a.shape.kv_heads), TILE_THREADS, shared, attention_dkv_kernel<D>, dk, dv, dout, logsum, delta, q, key, v, a);
}

static void attention_forward(struct kernels *k, data *out, float *logsum, const data *q, const data *key, const data *v,
                              const struct attention_shape *shape) {
  double elements_moved = 2.0 * shape->tokens * shape->head_size * (shape->heads + shape->kv_heads);
  timed timer(k, "attention_forward", 2 * elements_moved, attention_flops(shape, 2));
  if (!head_size_fits(k, shape) || library_forward(k, out, logsum, q, key, v, shape)) return;
  struct attention a = attention_of(shape, aligned(q, key, v));
  if (shape->head_size <= 64)
    forward_launch<64>(k, elements(out), logsum, elements(q), elements(key), elements(v), a);
  else if (shape->head_size <= 128)
    forward_launch<128>(k, elements(out), logsum, elements(q), elements(key), elements(v), a);
  else
    forward_launch<256>(k, elements(out), logsum, elements(q), elements(key), elements(v), a);
}

static void attention_backward(struct kernels *k, data *dq, data *dk, data *dv, const data *dout, const data *out, const float *logsum,
                               const data *q, const data *key, const data *v, const struct attention_shape *shape) {
  double elements_moved = 4.0 * shape->tokens * shape->head_size * (shape->heads + shape->kv_heads);
  timed timer(k, "attention_backward", 2 * elements_moved, attention_flops(shape, 5));
  if (!head_size_fits(k, shape) || library_backward(k, dq, dk, dv, dout, out, logsum, q, key, v, shape)) return;
  int64_t rows = (int64_t)shape->tokens * shape->heads;
  float *delta = (float *)cuda_scratch(k, rows * (int64_t)sizeof(float));
  if (!delta) return;
  struct attention a = attention_of(shape, aligned(q, key, v, dout));
  launch(k, team_grid<WARP>(rows), BLOCK_THREADS, 0, attention_delta_kernel, delta, elements(dout), elements(out), a);
  bf16 *to[] = {elements(dq), elements(dk), elements(dv)};
  const bf16 *in[] = {elements(q), elements(key), elements(v)};
  if (shape->head_size <= 64)
    backward_launch<64>(k, to[0], to[1], to[2], elements(dout), logsum, delta, in[0], in[1], in[2], a);
  else if (shape->head_size <= 128)
    backward_launch<128>(k, to[0], to[1], to[2], elements(dout), logsum, delta, in[0], in[1], in[2], a);
  else
    backward_launch<256>(k, to[0], to[1], to[2], elements(dout), logsum, delta, in[0], in[1], in[2], a);
}
