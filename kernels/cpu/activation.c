/* activation.c: the gated SiLU of LLaMA's MLP (arXiv 2002.05202), y = gate * sigmoid(gate) * up. */
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
