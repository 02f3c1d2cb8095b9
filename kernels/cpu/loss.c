/* loss.c: mean squared error between block outputs and its gradient (method.md section 4). */
#include "cpu/backend.h"

enum { LOSS_CHUNK = 4096 }; /* summed in float by vector code, chunks in double in their order: independent of the number of threads */

static void mse(struct kernels *k, float *loss, data *dy, const data *y, const data *target, int64_t count, float weight, bool add) {
  int64_t chunks = (count + LOSS_CHUNK - 1) / LOSS_CHUNK;
  float *sums = cpu_scratch(k, chunks), slope = 2 * weight / (float)count;
  if (!sums) return;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    int64_t begin = chunk * LOSS_CHUNK, end = begin + LOSS_CHUNK < count ? begin + LOSS_CHUNK : count;
    const float *a = (const float *)y, *b = (const float *)target;
    float *d = (float *)dy, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    sums[chunk] = sum;
    if (d)
#pragma omp simd
      for (int64_t i = begin; i < end; i++) d[i] = (add ? d[i] : 0) + slope * (a[i] - b[i]);
  }
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) total += sums[chunk];
  *loss = (add ? *loss : 0) + (float)(total / (double)count);
}
