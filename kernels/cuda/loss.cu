/* loss.cu: mean squared error between block outputs and its gradient (method.md section 4). */
#include "cuda/device.h"

enum { LOSS_CHUNK = 8 * BLOCK_THREADS }; /* elements a block */

template <int N>
__global__ void mse_kernel(float *partial, bf16 *dy, const bf16 *y, const bf16 *target, int64_t count, float slope, bool add) {
  int64_t end = ((int64_t)blockIdx.x + 1) * LOSS_CHUNK < count ? ((int64_t)blockIdx.x + 1) * LOSS_CHUNK : count;
  float sum = 0;
  for (int64_t i = (int64_t)blockIdx.x * LOSS_CHUNK + threadIdx.x * N; i < end; i += BLOCK_THREADS * N) {
    float a[N], b[N], d[N] = {};
    load<N>(a, y + i);
    load<N>(b, target + i);
    if (dy && add) load<N>(d, dy + i);
    for (int n = 0; n < N; n++) {
      sum += (a[n] - b[n]) * (a[n] - b[n]);
      d[n] += slope * (a[n] - b[n]);
    }
    if (dy) store<N>(dy + i, d);
  }
  sum = team_sum<BLOCK_THREADS>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void mse_total_kernel(float *loss, const float *partial, int64_t chunks, int64_t count, bool add) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += BLOCK_THREADS) sum += partial[i];
  sum = team_sum<BLOCK_THREADS>(sum);
  if (threadIdx.x == 0) *loss = (add ? *loss : 0) + (float)(sum / (double)count);
}

static void mse(struct kernels *k, float *loss, data *dy, const data *y, const data *target, int64_t count, float weight, bool add) {
  timed timer(k, "mse", (dy ? add ? 8.0 : 6.0 : 4.0) * (double)count);
  int64_t chunks = ceil_div(count, LOSS_CHUNK);
  float *partial = (float *)cuda_scratch(k, chunks * (int64_t)sizeof(float)), slope = 2 * weight / (float)count;
  if (!partial) return;
  if (count % 8 == 0 && aligned(dy, y, target))
    launch(k, grid_of(chunks), BLOCK_THREADS, 0, mse_kernel<8>, partial, elements(dy), elements(y), elements(target), count, slope, add);
  else
    launch(k, grid_of(chunks), BLOCK_THREADS, 0, mse_kernel<1>, partial, elements(dy), elements(y), elements(target), count, slope, add);
  launch(k, grid_of(1), BLOCK_THREADS, 0, mse_total_kernel, loss, (const float *)partial, chunks, count, add);
}
