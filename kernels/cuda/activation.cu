/* activation.cu: the gated SiLU of LLaMA (arXiv 2002.05202), y = gate * sigmoid(gate) * up; ReLU; and GELU (arXiv 1606.08415), y = x Phi(x). */
#include "cuda/device.h"

DEVICE float sigmoid_of(float x) {
  return 1.0f / (1.0f + expf(-x));
}

/* The normal distribution's Phi(x). */
DEVICE float normal_of(float x) {
  return 0.5f * erfcf(-0.70710678f * x);
}

struct silu_gate_each {
  bf16 *y;
  const bf16 *gate, *up;
  template <int N> DEVICE void at(int64_t i) const {
    float g[N], u[N];
    load<N>(g, gate + i);
    load<N>(u, up + i);
    for (int n = 0; n < N; n++) g[n] = g[n] * sigmoid_of(g[n]) * u[n];
    store<N>(y + i, g);
  }
};

struct silu_gate_backward_each {
  bf16 *dgate, *dup;
  const bf16 *dy, *gate, *up;
  template <int N> DEVICE void at(int64_t i) const {
    float d[N], g[N], u[N];
    load<N>(d, dy + i);
    load<N>(g, gate + i);
    load<N>(u, up + i);
    for (int n = 0; n < N; n++) {
      float s = sigmoid_of(g[n]), y = d[n] * g[n] * s;
      g[n] = d[n] * u[n] * s * (1 + g[n] * (1 - s));
      u[n] = y;
    }
    store<N>(dgate + i, g);
    store<N>(dup + i, u);
  }
};

/* ReLU as x < 0 ? 0 : x lets NaN through, so that a step it spoils is seen and skipped. */
template <bool GELU> struct activation_each {
  bf16 *y;
  const bf16 *x;
  template <int N> DEVICE void at(int64_t i) const {
    float v[N];
    load<N>(v, x + i);
    for (int n = 0; n < N; n++) v[n] = GELU ? v[n] * normal_of(v[n]) : v[n] < 0 ? 0 : v[n];
    store<N>(y + i, v);
  }
};

template <bool GELU> struct activation_backward_each {
  bf16 *dx;
  const bf16 *dy, *x;
  template <int N> DEVICE void at(int64_t i) const {
    float v[N], d[N];
    load<N>(v, x + i);
    load<N>(d, dy + i);
    for (int n = 0; n < N; n++) {
      if (GELU)
        d[n] *= normal_of(v[n]) + v[n] * (0.39894228f * expf(-0.5f * v[n] * v[n])); /* 1 / sqrt(2 pi) */
      else
        d[n] = v[n] > 0 ? d[n] : 0;
    }
    store<N>(dx + i, d);
  }
};

static void silu_gate_forward(struct kernels *k, data *y, const data *gate, const data *up, int64_t count) {
  timed timer(k, "silu_gate_forward", 6.0 * (double)count);
  each(k, silu_gate_each{elements(y), elements(gate), elements(up)}, count, aligned(y, gate, up));
}

static void silu_gate_backward(struct kernels *k, data *dgate, data *dup, const data *dy, const data *gate, const data *up, int64_t count) {
  timed timer(k, "silu_gate_backward", 10.0 * (double)count);
  each(k, silu_gate_backward_each{elements(dgate), elements(dup), elements(dy), elements(gate), elements(up)}, count,
       aligned(dgate, dup, dy, gate, up));
}

static void activation_forward(struct kernels *k, data *y, const data *x, enum activation kind, int64_t count) {
  timed timer(k, "activation_forward", 4.0 * (double)count);
  if (kind == ACTIVATION_RELU)
    each(k, activation_each<false>{elements(y), elements(x)}, count, aligned(y, x));
  else
    each(k, activation_each<true>{elements(y), elements(x)}, count, aligned(y, x));
}

static void activation_backward(struct kernels *k, data *dx, const data *dy, const data *x, enum activation kind, int64_t count) {
  timed timer(k, "activation_backward", 6.0 * (double)count);
  if (kind == ACTIVATION_RELU)
    each(k, activation_backward_each<false>{elements(dx), elements(dy), elements(x)}, count, aligned(dx, dy, x));
  else
    each(k, activation_backward_each<true>{elements(dx), elements(dy), elements(x)}, count, aligned(dx, dy, x));
}
