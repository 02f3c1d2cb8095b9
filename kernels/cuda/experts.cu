/* experts.cu: a mixture of experts (Mixtral, arXiv 2401.04088): which experts each token goes to, its rows to them and back. Softmax over all
 * logits, cut to the largest and divided by their sum, is softmax over those alone. */
#include "cuda/device.h"

/* The largest logit of those that are not among the first `chosen`; the first of equals. NaN still gives different experts. */
DEVICE int32_t next_expert(const bf16 *logits, int experts, const int32_t *expert, int chosen) {
  int32_t best = -1;
  for (int32_t e = 0; e < experts; e++) {
    bool taken = false;
    for (int i = 0; i < chosen; i++) taken = taken || expert[i] == e;
    if (!taken && (best < 0 || to_float(logits[e]) > to_float(logits[best]))) best = e;
  }
  return best;
}

__global__ void route_kernel(struct routing routing, const bf16 *logits) {
  int64_t t = (int64_t)blockIdx.x * WARP + threadIdx.x;
  if (t >= routing.tokens) return;
  int32_t *expert = routing.expert + t * routing.top;
  float *weight = routing.weight + t * routing.top, sum = 0;
  const bf16 *row = logits + t * routing.experts;
  for (int i = 0; i < routing.top; i++) {
    expert[i] = next_expert(row, routing.experts, expert, i);
    weight[i] = expf(to_float(row[expert[i]]) - to_float(row[expert[0]]));
    sum += weight[i];
  }
  for (int i = 0; i < routing.top; i++) weight[i] /= sum;
}

/* Rows of one expert, a block, in the order of their tokens: first those of the experts before it are counted. One warp looks at 32 choices at
 * a time. */
__global__ void group_rows_kernel(struct routing routing) {
  int e = (int)blockIdx.x, lane = (int)threadIdx.x, count = routing.tokens * routing.top;
  int32_t before = 0;
  for (int i = lane; i < count; i += WARP) before += routing.expert[i] < e;
  int32_t next = team_sum<WARP>(before);
  if (lane == 0) routing.offset[e] = next;
  for (int begin = 0; begin < count; begin += WARP) {
    int i = begin + lane;
    bool mine = i < count && routing.expert[i] == e;
    unsigned chosen = __ballot_sync(0xffffffffu, mine);
    if (mine) {
      int32_t row = next + __popc(chosen & ((1u << lane) - 1));
      routing.row[i] = row;
      routing.token[row] = i / routing.top;
    }
    next += __popc(chosen);
  }
  if (lane == 0 && e == routing.experts - 1) routing.offset[routing.experts] = next;
}

static void route_forward(struct kernels *k, const struct routing *routing, const data *logits) {
  timed timer(k, "route_forward", 2.0 * routing->tokens * routing->experts);
  launch(k, grid_of(ceil_div(routing->tokens, WARP)), WARP, 0, route_kernel, *routing, elements(logits));
  launch(k, grid_of(routing->experts), WARP, 0, group_rows_kernel, *routing);
}

/* The shares say it all: the logits are not needed again. */
__global__ void route_backward_kernel(bf16 *dlogits, const float *dweight, struct routing routing) {
  int64_t t = (int64_t)blockIdx.x * WARP + threadIdx.x;
  if (t >= routing.tokens) return;
  bf16 *out = dlogits + t * routing.experts;
  float dot = 0;
  for (int e = 0; e < routing.experts; e++) out[e] = to_bf16(0);
  for (int64_t i = t * routing.top; i < (t + 1) * routing.top; i++) dot += routing.weight[i] * dweight[i];
  for (int64_t i = t * routing.top; i < (t + 1) * routing.top; i++)
    out[routing.expert[i]] = to_bf16(routing.weight[i] * (dweight[i] - dot));
}

static void route_backward(struct kernels *k, data *dlogits, const float *dweight, const struct routing *routing) {
  timed timer(k, "route_backward", 2.0 * routing->tokens * routing->experts);
  launch(k, grid_of(ceil_div(routing->tokens, WARP)), WARP, 0, route_backward_kernel, elements(dlogits), dweight, *routing);
}

/* ---- rows: elements count those of the matrix that is written ---- */

struct gather_each {
  bf16 *y;
  const bf16 *x;
  const int32_t *token;
  int64_t columns;
  template <int N> DEVICE void at(int64_t i) const {
    float v[N];
    load<N>(v, x + token[i / columns] * columns + i % columns);
    store<N>(y + i, v);
  }
};

/* out[t] (+)= sum over the token's rows of weight * in[row]; weight NULL: 1. */
struct spread_each {
  bf16 *out;
  const bf16 *in;
  const float *weight;
  const int32_t *row;
  int64_t columns;
  int top;
  bool add;
  template <int N> DEVICE void at(int64_t at) const {
    int64_t t = at / columns, c = at % columns;
    float sum[N] = {}, v[N];
    if (add) load<N>(sum, out + at);
    for (int64_t i = t * top; i < (t + 1) * top; i++) {
      load<N>(v, in + row[i] * columns + c);
      for (int n = 0; n < N; n++) sum[n] += (weight ? weight[i] : 1.0f) * v[n];
    }
    store<N>(out + at, sum);
  }
};

static void gather_rows(struct kernels *k, data *y, const data *x, const struct routing *routing, int64_t columns) {
  int64_t count = (int64_t)routing->tokens * routing->top * columns;
  timed timer(k, "gather_rows", 4.0 * (double)count);
  each(k, gather_each{elements(y), elements(x), routing->token, columns}, count, columns % 8 == 0 && aligned(y, x));
}

static void gather_rows_backward(struct kernels *k, data *dx, const data *dy, const struct routing *routing, int64_t columns, bool add) {
  timed timer(k, "gather_rows_backward", 2.0 * (routing->top + 1 + add) * (double)(routing->tokens * columns));
  each(k, spread_each{elements(dx), elements(dy), NULL, routing->row, columns, routing->top, add}, routing->tokens * columns,
       columns % 8 == 0 && aligned(dx, dy));
}

static void combine_forward(struct kernels *k, data *y, const data *x, const struct routing *routing, int64_t columns) {
  timed timer(k, "combine_forward", 2.0 * (routing->top + 2) * (double)(routing->tokens * columns));
  each(k, spread_each{elements(y), elements(x), routing->weight, routing->row, columns, routing->top, true}, routing->tokens * columns,
       columns % 8 == 0 && aligned(y, x));
}

/* One block for each choice of a token. */
template <int N>
__global__ void combine_backward_kernel(bf16 *dx, float *dweight, const bf16 *dy, const bf16 *x, struct routing routing, int64_t columns) {
  int64_t i = blockIdx.x, row = routing.row[i];
  const bf16 *grad = dy + i / routing.top * columns, *in = x + row * columns;
  float weight = routing.weight[i], dot = 0;
  for (int64_t c = threadIdx.x * N; c < columns; c += BLOCK_THREADS * N) {
    float d[N], v[N];
    load<N>(d, grad + c);
    load<N>(v, in + c);
    for (int n = 0; n < N; n++) {
      dot += d[n] * v[n];
      d[n] *= weight;
    }
    store<N>(dx + row * columns + c, d);
  }
  dot = team_sum<BLOCK_THREADS>(dot);
  if (threadIdx.x == 0) dweight[i] = dot;
}

static void combine_backward(struct kernels *k, data *dx, float *dweight, const data *dy, const data *x, const struct routing *routing,
                             int64_t columns) {
  int64_t rows = (int64_t)routing->tokens * routing->top;
  timed timer(k, "combine_backward", 6.0 * (double)(rows * columns));
  if (columns % 8 == 0 && aligned(dx, dy, x))
    launch(k, grid_of(rows), BLOCK_THREADS, 0, combine_backward_kernel<8>, elements(dx), dweight, elements(dy), elements(x), *routing,
           columns);
  else
    launch(k, grid_of(rows), BLOCK_THREADS, 0, combine_backward_kernel<1>, elements(dx), dweight, elements(dy), elements(x), *routing,
           columns);
}
