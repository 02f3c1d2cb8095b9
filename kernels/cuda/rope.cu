/* rope.cu: rotary position embedding (arXiv 2104.09864) in the half-split layout of HF checkpoints. */
#include "cuda/device.h"

/* Elements count the first halves of all heads. */
struct rope_each {
  bf16 *x;
  const float *cosine, *sine;
  int heads, half;
  float direction;
  template <int N> DEVICE void at(int64_t i) const {
    int64_t row = i / half, at = i % half, t = row / heads;
    bf16 *a = x + row * 2 * half + at, *b = a + half;
    float u[N], v[N], c[N], s[N], turned[N];
    load<N>(u, a);
    load<N>(v, b);
    load<N>(c, cosine + t * half + at);
    load<N>(s, sine + t * half + at);
    for (int n = 0; n < N; n++) {
      float sine_n = direction * s[n];
      turned[n] = u[n] * c[n] - v[n] * sine_n;
      v[n] = v[n] * c[n] + u[n] * sine_n;
    }
    store<N>(a, turned);
    store<N>(b, v);
  }
};

static void rope(struct kernels *k, data *x, const float *cosine, const float *sine, int64_t tokens, int heads, int head_size,
                 bool inverse) {
  int64_t count = tokens * heads * (head_size / 2);
  timed timer(k, "rope", 8.0 * (double)count);
  rope_each f = {elements(x), cosine, sine, heads, head_size / 2, inverse ? -1.0f : 1.0f};
  each(k, f, count, head_size % 16 == 0 && aligned(x, cosine, sine));
}
