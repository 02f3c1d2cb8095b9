/* cross_entropy.cu: log-softmax over a vocabulary that arrives in pieces: maximum and sum are carried along and rescaled. */
#include "cuda/device.h"

__global__ void cross_entropy_kernel(struct cross_entropy state, const bf16 *logits, const int32_t *target, int64_t first,
                                     int64_t columns) {
  int64_t r = blockIdx.x;
  const bf16 *row = logits + r * columns;
  float before = state.maximum[r], maximum = -INFINITY, sum = 0;
  for (int64_t c = threadIdx.x; c < columns; c += BLOCK_THREADS) maximum = quantizer_max(to_float(row[c]), maximum);
  maximum = quantizer_max(team_largest<BLOCK_THREADS>(maximum), before);
  for (int64_t c = threadIdx.x; c < columns; c += BLOCK_THREADS) sum += expf(to_float(row[c]) - maximum);
  sum = team_sum<BLOCK_THREADS>(sum);
  if (threadIdx.x != 0) return;
  state.sum[r] = state.sum[r] * expf(before - maximum) + sum;
  state.maximum[r] = maximum;
  if (target[r] >= first && target[r] < first + columns) state.target[r] = to_float(row[target[r] - first]);
}

static void cross_entropy_piece(struct kernels *k, struct cross_entropy *state, const data *logits, const int32_t *target, int64_t rows,
                                int64_t first, int64_t columns) {
  timed timer(k, "cross_entropy_piece", 2.0 * (double)(rows * columns));
  launch(k, grid_of(rows), BLOCK_THREADS, 0, cross_entropy_kernel, *state, elements(logits), target, first, columns);
}
