/* activation.c: what an MLP puts between its linear layers: the gated SiLU of LLaMA (arXiv 2002.05202), y = gate * sigmoid(gate) * up;
 * ReLU; and GELU (arXiv 1606.08415), y = x Phi(x). */
#include "cpu/backend.h"
#include "cpu/vector.h"

static void silu_gate_forward(struct kernels *k, data *y, const data *gate, const data *up, int64_t count) {
  (void)k;
  const float *g = (const float *)gate, *u = (const float *)up;
  float *out = (float *)y;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) out[i] = g[i] * vector_sigmoid(g[i]) * u[i];
}

static void silu_gate_backward(struct kernels *k, data *dgate, data *dup, const data *dy, const data *gate, const data *up, int64_t count) {
  (void)k;
  const float *g = (const float *)gate, *u = (const float *)up, *d = (const float *)dy;
  float *dg = (float *)dgate, *du = (float *)dup;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float s = vector_sigmoid(g[i]), dy_i = d[i];
    dg[i] = dy_i * u[i] * s * (1 + g[i] * (1 - s));
    du[i] = dy_i * g[i] * s;
  }
}

/* ReLU as x < 0 ? 0 : x lets NaN through, so that a step it spoils is seen and skipped. */
static void activation_forward(struct kernels *k, data *y, const data *x, enum activation kind, int64_t count) {
  (void)k;
  const float *in = (const float *)x;
  float *out = (float *)y;
  if (kind == ACTIVATION_RELU) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) out[i] = in[i] < 0 ? 0 : in[i];
  } else {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) out[i] = in[i] * vector_normal(in[i]);
  }
}

static void activation_backward(struct kernels *k, data *dx, const data *dy, const data *x, enum activation kind, int64_t count) {
  (void)k;
  const float *in = (const float *)x, *d = (const float *)dy;
  float *out = (float *)dx;
  if (kind == ACTIVATION_RELU) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) out[i] = in[i] > 0 ? d[i] : 0;
  } else {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
      float density = 0.39894228f * vector_exp(-0.5f * in[i] * in[i]); /* 1 / sqrt(2 pi) */
      out[i] = d[i] * (vector_normal(in[i]) + in[i] * density);
    }
  }
}
