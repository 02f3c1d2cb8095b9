/* search.cu: the start of short runs (method.md section 7): for each group the clipping factors with the least weighted squared error. A block
 * takes a group, a thread each pair of the grid's factors. */
#include "cuda/device.h"

enum { SEARCH_THREADS = 160, SEARCH_PAIRS = CLIP_SEARCH_STEPS * CLIP_SEARCH_STEPS, SEARCH_PIECE = 512 };
static_assert(SEARCH_PAIRS <= SEARCH_THREADS && SEARCH_THREADS % WARP == 0, "a thread for each pair");

/* The factor of step i: 1 - stride * i as the CPU has it. A product that is written plainly is contracted with the difference, also out of a volatile
 * variable. */
DEVICE float search_factor(int step) {
  return 1 - __fmul_rn(CLIP_SEARCH_STRIDE, (float)step);
}

/* The first of the pairs with the least error: all errors that are not finite leave the factors at 1. */
DEVICE void choose_pair(float *f_hi, float *f_lo, const float *error) {
  float least = INFINITY;
  *f_hi = *f_lo = 1;
  for (int pair = 0; pair < SEARCH_PAIRS; pair++) {
    if (!(error[pair] < least)) continue;
    least = error[pair];
    *f_hi = search_factor(pair / CLIP_SEARCH_STEPS);
    *f_lo = search_factor(pair % CLIP_SEARCH_STEPS);
  }
}

__global__ void clip_search_kernel(float *f_hi, float *f_lo, struct quantized q, const float *importance, int64_t first) {
  __shared__ float values[SEARCH_PIECE], weights[SEARCH_PIECE], errors[SEARCH_THREADS], ends[2][SEARCH_THREADS / WARP];
  uint32_t index = (uint32_t)(first + blockIdx.x);
  int thread = (int)threadIdx.x;
  struct group group = place_group(q, index);
  struct group_scales scales = scales_of(q, group);
  importance += group.offset - index / q.per_row * q.columns;
  float maximum = -INFINITY, minimum = INFINITY, error = 0;
  for (int64_t i = thread; i < group.length; i += SEARCH_THREADS) {
    float w = to_float(q.w[group.offset + i]) * scales.row * (scales.column ? scales.column[i] : 1);
    maximum = quantizer_max(w, maximum);
    minimum = quantizer_min(w, minimum);
  }
  maximum = team_largest<WARP>(maximum);
  minimum = team_least<WARP>(minimum);
  if (thread % WARP == 0) ends[0][thread / WARP] = maximum, ends[1][thread / WARP] = minimum;
  __syncthreads();
  for (int i = 0; i < SEARCH_THREADS / WARP; i++) {
    maximum = quantizer_max(ends[0][i], maximum);
    minimum = quantizer_min(ends[1][i], minimum);
  }
  int pair = thread < SEARCH_PAIRS ? thread : 0;
  float hi = search_factor(pair / CLIP_SEARCH_STEPS), lo = search_factor(pair % CLIP_SEARCH_STEPS), top = quantizer_top(&q.quantizer);
  struct group_grid grid = quantizer_grid(&q.quantizer, quantizer_high(hi, maximum), quantizer_low(lo, minimum), true);
  for (int64_t begin = 0; begin < group.length; begin += SEARCH_PIECE) {
    int count = group.length - begin < SEARCH_PIECE ? (int)(group.length - begin) : (int)SEARCH_PIECE;
    __syncthreads();
    for (int i = thread; i < count; i += SEARCH_THREADS) {
      float scale = scales.column ? scales.column[begin + i] : 1;
      values[i] = to_float(q.w[group.offset + begin + i]) * scales.row * scale;
      weights[i] = importance[begin + i] / (scale * scale); /* what a scaled weight multiplies is scaled the other way */
    }
    __syncthreads();
    for (int i = 0; i < count; i++) {
      float d = quantizer_fake(values[i], grid, top) - values[i];
      error += weights[i] * d * d;
    }
  }
  errors[thread] = error;
  __syncthreads();
  if (thread == 0) choose_pair(&f_hi[index], &f_lo[index], errors);
}

static void clip_search(struct kernels *k, float *f_hi, float *f_lo, const data *w, const struct weight_scales *scales,
                        const float *importance, const struct quantized_shape *shape, int64_t first, int64_t end) {
  timed timer(k, "clip_search", 2.0 * (double)((end - first) * shape->quantizer.group_size));
  if (end <= first) return;
  struct quantized q = quantized_of(w, scales, NULL, NULL, shape, true);
  launch(k, grid_of(end - first), SEARCH_THREADS, 0, clip_search_kernel, f_hi, f_lo, q, importance, first);
}
