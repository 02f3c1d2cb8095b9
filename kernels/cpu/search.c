/* search.c: the start of short runs (method.md section 7): for each group the clipping factors with the least weighted squared error.
 * The importance of a column is the mean square of the activations that it multiplies. */
#include "cpu/backend.h"

#include <math.h>

/* The error of one group under one grid. */
static inline float weighted_error(const struct group *group, const float *importance, struct group_grid grid, float top) {
  float error = 0;
#pragma omp simd reduction(+ : error)
  for (int64_t i = 0; i < group->length; i++) {
    float d = quantizer_fake(group->w[i], grid, top) - group->w[i];
    error += importance[i] * d * d;
  }
  return error;
}

static void search_group(const struct group *group, const float *importance, const struct quantizer *quantizer, float *best_hi,
                         float *best_lo) {
  float top = quantizer_top(quantizer), least = INFINITY;
  for (int a = 0; a < CLIP_SEARCH_STEPS; a++)
    for (int b = 0; b < CLIP_SEARCH_STEPS; b++) {
      float f_hi = 1 - CLIP_SEARCH_STRIDE * (float)a, f_lo = 1 - CLIP_SEARCH_STRIDE * (float)b;
      struct group_grid grid = quantizer_grid(quantizer, quantizer_high(f_hi, group->maximum), quantizer_low(f_lo, group->minimum), true);
      float error = weighted_error(group, importance, grid, top);
      if (error < least) {
        least = error;
        *best_hi = f_hi;
        *best_lo = f_lo;
      }
    }
}

/* a_c / column[c]^2: what a scaled weight multiplies is scaled the other way. */
static inline const float *scaled_importance(float *room, const float *importance, const float *column, int64_t length) {
  if (!column) return importance;
#pragma omp simd
  for (int64_t i = 0; i < length; i++) room[i] = importance[i] / (column[i] * column[i]);
  return room;
}

static void clip_search(struct kernels *k, float *f_hi, float *f_lo, const data *w, const struct weight_scales *scales,
                        const float *importance, const struct quantized_shape *shape, int64_t first, int64_t end) {
  struct quantized q = quantized(w, scales, NULL, NULL, shape);
  int64_t room = group_room(shape);
  float *scratch = cpu_scratch(k, 2 * k->threads * room);
  if (!scratch) return;
#pragma omp parallel for schedule(static)
  for (int64_t g = first; g < end; g++) {
    float *scaled = scratch + 2 * omp_get_thread_num() * room;
    struct group group = group_at(&q, g, scaled);
    const float *a = scaled_importance(scaled + room, importance + group.column, column_scales(q.scales, group.column), group.length);
    f_hi[g] = f_lo[g] = 1;
    search_group(&group, a, &shape->quantizer, &f_hi[g], &f_lo[g]);
  }
}
