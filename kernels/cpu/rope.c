/* rope.c: rotary position embedding (arXiv 2104.09864) in the half-split layout of HF checkpoints. A rotation's backward is the rotation back. */
#include "cpu/backend.h"

static void rope(struct kernels *k, data *x, const float *cosine, const float *sine, int64_t tokens, int heads, int head_size,
                 bool inverse) {
  (void)k;
  int half = head_size / 2;
  float direction = inverse ? -1.0f : 1.0f;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    const float *c = cosine + t * half, *s = sine + t * half;
    for (int h = 0; h < heads; h++) {
      float *a = (float *)x + (t * heads + h) * head_size, *b = a + half;
#pragma omp simd
      for (int i = 0; i < half; i++) {
        float u = a[i], v = b[i], sin_i = direction * s[i];
        a[i] = u * c[i] - v * sin_i;
        b[i] = v * c[i] + u * sin_i;
      }
    }
  }
}
