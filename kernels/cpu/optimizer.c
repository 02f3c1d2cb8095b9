/* optimizer.c: AdamW (arXiv 1711.05101) and sign updates (method.md section 7) over all learnables of a block, and the sigmoid that
 * turns gamma and beta into clipping factors. */
#include "cpu/backend.h"

#include <math.h>

#include "cpu/vector.h"

static void sigmoid_forward(struct kernels *k, float *y, const float *x, int64_t count) {
  (void)k;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) y[i] = vector_sigmoid(x[i]);
}

static void sigmoid_backward(struct kernels *k, float *dx, const float *dy, const float *x, int64_t count) {
  (void)k;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float s = vector_sigmoid(x[i]);
    dx[i] = dy[i] * s * (1 - s);
  }
}

static void sigmoid_inverse(struct kernels *k, float *x, float limit, int64_t count) {
  (void)k;
  for (int64_t i = 0; i < count; i++) {
    float y = x[i] < limit ? x[i] : limit;
    x[i] = logf(y / (1 - y));
  }
}

static void step_begin(struct kernels *k, struct step_state *state, const float *values, int64_t count) {
  (void)k;
  int bad = 0;
#pragma omp parallel for simd schedule(static) reduction(| : bad)
  for (int64_t i = 0; i < count; i++) bad |= (float_to_bits(values[i]) & 0x7f800000u) == 0x7f800000u;
  state->finite = !bad;
  state->taken += !bad;
  state->skipped += bad;
}

static void adamw(struct kernels *k, const struct learnables of[2], float *m, float *v, const float *gradient,
                  const struct step_state *state) {
  (void)k;
  if (!state->finite) return;
  const float b1 = 0.9f, b2 = 0.999f, c1 = 0.1f, c2 = 0.001f, eps = 1e-8f; /* c = 1 - b, but 1 - 0.999f would be 1.3e-5 off */
  float spread = (float)(1 / sqrt(1 - pow(0.999, state->taken)));
  for (int kind = 0; kind < 2; kind++) {
    float *x = of[kind].x, size = (float)(of[kind].lr / (1 - pow(0.9, state->taken)));
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < of[kind].count; i++) {
      m[i] = b1 * m[i] + c1 * gradient[i];
      v[i] = b2 * v[i] + c2 * gradient[i] * gradient[i];
      x[i] -= size * m[i] / (sqrtf(v[i]) * spread + eps);
    }
    m += of[kind].count;
    v += of[kind].count;
    gradient += of[kind].count;
  }
}

static void sign_step(struct kernels *k, float *x, const float *gradient, int64_t count, float lr, const struct step_state *state) {
  (void)k;
  if (!state->finite) return;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float moved = x[i] - (gradient[i] > 0 ? lr : gradient[i] < 0 ? -lr : 0.0f);
    x[i] = moved < 0 ? 0.0f : moved > 1 ? 1.0f : moved;
  }
}
