/* quantize.c: the weight quantizer over a matrix: fake-quantized weights, the gradients of the clipping factors, and what is stored. */
#include "cpu/backend.h"

#include <string.h>

/* One group of a weight matrix. */
struct group {
  const float *w;
  int64_t offset; /* of w in the matrix */
  int64_t length;
  float maximum, minimum;
  float f_hi, f_lo;
};

static inline struct group group_at(const data *w, const float *f_hi, const float *f_lo, const struct weight_shape *shape, int64_t index) {
  int64_t per_row = weight_groups_per_row(shape), row = index / per_row, first = index % per_row * shape->quantizer.group_size;
  int64_t rest = shape->columns - first;
  struct group group = {.offset = row * shape->columns + first,
                        .length = shape->quantizer.group_size < rest ? shape->quantizer.group_size : rest};
  group.w = (const float *)w + group.offset;
  float maximum = group.w[0], minimum = group.w[0];
#pragma omp simd reduction(max : maximum) reduction(min : minimum)
  for (int64_t i = 0; i < group.length; i++) {
    maximum = group.w[i] > maximum ? group.w[i] : maximum;
    minimum = group.w[i] < minimum ? group.w[i] : minimum;
  }
  group.maximum = maximum;
  group.minimum = minimum;
  group.f_hi = f_hi ? f_hi[index] : 1.0f;
  group.f_lo = f_lo ? f_lo[index] : 1.0f;
  return group;
}

static inline struct group_grid grid_of(const struct group *group, const struct quantizer *quantizer, bool at_rest) {
  return quantizer_grid(quantizer, quantizer_high(group->f_hi, group->maximum), quantizer_low(group->f_lo, group->minimum), at_rest);
}

static void quantize_forward(struct kernels *k, data *w_hat, const data *w, const float *f_hi, const float *f_lo,
                             const struct weight_shape *shape, bool at_rest) {
  (void)k;
  float top = quantizer_top(&shape->quantizer);
#pragma omp parallel for schedule(static)
  for (int64_t g = 0; g < weight_groups(shape); g++) {
    struct group group = group_at(w, f_hi, f_lo, shape, g);
    struct group_grid grid = grid_of(&group, &shape->quantizer, at_rest);
    float *out = (float *)w_hat + group.offset;
#pragma omp simd
    for (int64_t i = 0; i < group.length; i++) out[i] = quantizer_fake(group.w[i], grid, top);
  }
}

static void quantize_backward(struct kernels *k, float *df_hi, float *df_lo, const data *dw_hat, const data *w, const float *f_hi,
                              const float *f_lo, const struct weight_shape *shape, bool at_rest) {
  (void)k;
  float top = quantizer_top(&shape->quantizer);
#pragma omp parallel for schedule(static)
  for (int64_t g = 0; g < weight_groups(shape); g++) {
    struct group group = group_at(w, f_hi, f_lo, shape, g);
    struct group_grid grid = grid_of(&group, &shape->quantizer, at_rest);
    const float *dw = (const float *)dw_hat + group.offset;
    float dscale = 0, slope_hi, slope_lo;
#pragma omp simd reduction(+ : dscale)
    for (int64_t i = 0; i < group.length; i++) dscale += dw[i] * quantizer_scale_slope(group.w[i], grid, top);
    quantizer_factor_slopes(&shape->quantizer, group.f_hi, group.f_lo, group.maximum, group.minimum, &slope_hi, &slope_lo);
    df_hi[g] = dscale * slope_hi;
    df_lo[g] = dscale * slope_lo;
  }
}

/* Adds `length` codes of `bits` bits from bit `position` on; the row's bytes are zero before. */
static void pack_codes(uint8_t *row, int64_t position, const float *w, int64_t length, struct group_grid grid,
                       const struct quantizer *quantizer) {
  float top = quantizer_top(quantizer);
  for (int64_t i = 0; i < length; i++, position += quantizer->bits) {
    uint32_t code = (uint32_t)quantizer_code(w[i], grid, top) << position % 8;
    row[position / 8] |= (uint8_t)code;
    if (code > 0xff) row[position / 8 + 1] |= (uint8_t)(code >> 8);
  }
}

static void quantize_codes(struct kernels *k, uint8_t *codes, uint16_t *scale, uint8_t *zero_point, const data *w, const float *f_hi,
                           const float *f_lo, const struct weight_shape *shape) {
  (void)k;
  int64_t row_bytes = (shape->columns * shape->quantizer.bits + 7) / 8, per_row = weight_groups_per_row(shape);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < shape->rows; row++) {
    memset(codes + row * row_bytes, 0, (size_t)row_bytes);
    for (int64_t g = row * per_row; g < (row + 1) * per_row; g++) {
      struct group group = group_at(w, f_hi, f_lo, shape, g);
      struct group_grid grid = grid_of(&group, &shape->quantizer, true);
      scale[g] = half_from_float(grid.scale);
      zero_point[g] = (uint8_t)grid.zero_point;
      pack_codes(codes + row * row_bytes, (group.offset - row * shape->columns) * shape->quantizer.bits, group.w, group.length, grid,
                 &shape->quantizer);
    }
  }
}
