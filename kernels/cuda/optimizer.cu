/* optimizer.cu: AdamW (arXiv 1711.05101) and sign updates (method.md section 7) over all learnables of a block, and the sigmoid that
 * turns gamma and beta into clipping factors. */
#include "cuda/device.h"

struct sigmoid_each {
  float *y;
  const float *x;
  template <int N> DEVICE void at(int64_t i) const {
    float v[N];
    load<N>(v, x + i);
    for (int n = 0; n < N; n++) v[n] = sigmoid_of(v[n]);
    store<N>(y + i, v);
  }
};

struct sigmoid_backward_each {
  float *dx;
  const float *dy, *x;
  template <int N> DEVICE void at(int64_t i) const {
    float v[N], d[N];
    load<N>(v, x + i);
    load<N>(d, dy + i);
    for (int n = 0; n < N; n++) {
      float s = sigmoid_of(v[n]);
      d[n] *= s * (1 - s);
    }
    store<N>(dx + i, d);
  }
};

struct sigmoid_inverse_each {
  float *x, limit;
  template <int N> DEVICE void at(int64_t i) const {
    for (int n = 0; n < N; n++) {
      float y = x[i + n] < limit ? x[i + n] : limit;
      x[i + n] = logf(y / (1 - y));
    }
  }
};

static void sigmoid_forward(struct kernels *k, float *y, const float *x, int64_t count) {
  timed timer(k, "sigmoid_forward", 8.0 * (double)count);
  each(k, sigmoid_each{y, x}, count, aligned(y, x));
}

static void sigmoid_backward(struct kernels *k, float *dx, const float *dy, const float *x, int64_t count) {
  timed timer(k, "sigmoid_backward", 12.0 * (double)count);
  each(k, sigmoid_backward_each{dx, dy, x}, count, aligned(dx, dy, x));
}

static void sigmoid_inverse(struct kernels *k, float *x, float limit, int64_t count) {
  each(k, sigmoid_inverse_each{x, limit}, count, false);
}

/* ---- steps ---- */

enum { FINITE_CHUNK = 16 * BLOCK_THREADS };

__global__ void finite_kernel(int32_t *partial, const float *values, int64_t count) {
  int64_t begin = (int64_t)blockIdx.x * FINITE_CHUNK, end = begin + FINITE_CHUNK < count ? begin + FINITE_CHUNK : count;
  int32_t bad = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += BLOCK_THREADS) bad += (float_to_bits(values[i]) & 0x7f800000u) == 0x7f800000u;
  bad = team_sum<BLOCK_THREADS>(bad);
  if (threadIdx.x == 0) partial[blockIdx.x] = bad;
}

__global__ void step_begin_kernel(struct step_state *state, const int32_t *partial, int64_t chunks) {
  int32_t bad = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += BLOCK_THREADS) bad += partial[i] != 0;
  bad = team_sum<BLOCK_THREADS>(bad) != 0;
  if (threadIdx.x != 0) return;
  state->finite = !bad;
  state->taken += !bad;
  state->skipped += bad;
}

static void step_begin(struct kernels *k, struct step_state *state, const float *values, int64_t count) {
  timed timer(k, "step_begin", 4.0 * (double)count);
  int64_t chunks = ceil_div(count, FINITE_CHUNK);
  int32_t *partial = (int32_t *)cuda_scratch(k, chunks * (int64_t)sizeof(int32_t) + 16);
  if (!partial) return;
  launch(k, grid_of(chunks), BLOCK_THREADS, 0, finite_kernel, partial, values, count);
  launch(k, grid_of(1), BLOCK_THREADS, 0, step_begin_kernel, state, (const int32_t *)partial, chunks);
}

__global__ void adamw_kernel(struct learnables first, struct learnables second, float *m, float *v, const float *gradient,
                             const struct step_state *state) {
  const float b1 = 0.9f, b2 = 0.999f, c1 = 0.1f, c2 = 0.001f, eps = 1e-8f; /* c = 1 - b, but 1 - 0.999f would be 1.3e-5 off */
  __shared__ float size[2], spread;
  if (!state->finite) return;
  if (threadIdx.x == 0) {
    double unbiased = 1 - pow(0.9, (double)state->taken);
    size[0] = (float)(first.lr / unbiased);
    size[1] = (float)(second.lr / unbiased);
    spread = (float)(1 / sqrt(1 - pow(0.999, (double)state->taken)));
  }
  __syncthreads();
  int64_t count = first.count + second.count;
  for (int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x; i < count; i += (int64_t)gridDim.x * BLOCK_THREADS) {
    bool behind = i >= first.count;
    float *x = behind ? second.x + (i - first.count) : first.x + i, g = gradient[i];
    m[i] = b1 * m[i] + c1 * g;
    v[i] = b2 * v[i] + c2 * g * g;
    *x -= size[behind] * m[i] / (sqrtf(v[i]) * spread + eps);
  }
}

static void adamw(struct kernels *k, const struct learnables of[2], float *m, float *v, const float *gradient,
                  const struct step_state *state) {
  const int64_t MOST_BLOCKS = 1024;
  int64_t count = of[0].count + of[1].count, blocks = ceil_div(count, BLOCK_THREADS);
  timed timer(k, "adamw", 28.0 * (double)count);
  launch(k, grid_of(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS), BLOCK_THREADS, 0, adamw_kernel, of[0], of[1], m, v, gradient, state);
}

struct sign_step_each {
  float *x;
  const float *gradient;
  float lr;
  const struct step_state *state;
  template <int N> DEVICE void at(int64_t i) const {
    if (!state->finite) return;
    for (int n = 0; n < N; n++) {
      float g = gradient[i + n], moved = x[i + n] - (g > 0 ? lr : g < 0 ? -lr : 0.0f);
      x[i + n] = moved < 0 ? 0.0f : moved > 1 ? 1.0f : moved;
    }
  }
};

static void sign_step(struct kernels *k, float *x, const float *gradient, int64_t count, float lr, const struct step_state *state) {
  timed timer(k, "sign_step", 12.0 * (double)count);
  each(k, sign_step_each{x, gradient, lr, state}, count, false);
}
