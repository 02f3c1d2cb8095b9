/* quantize.c: the quantizer over a matrix: fake-quantized weights and activations, the gradients of the clipping factors, of LET's scales and
 * of the values themselves, and what is stored. */
#include "cpu/backend.h"
#include "cpu/chunks.h"
#include "cpu/scales.h"

#include <omp.h>
#include <string.h>

/* What is quantized, and how. */
struct quantized {
  const float *w;
  const struct weight_scales *scales; /* NULL: w as it is */
  const float *f_hi, *f_lo;           /* NULL: 1 */
  const struct quantized_shape *shape;
};

static inline struct quantized quantized(const data *w, const struct weight_scales *scales, const float *f_hi, const float *f_lo,
                                         const struct quantized_shape *shape) {
  bool scaled = scales && (scales->row || scales->column);
  return (struct quantized){(const float *)w, scaled ? scales : NULL, f_hi, f_lo, shape};
}

/* One group of it. */
struct group {
  const float *w; /* scaled */
  int64_t offset; /* in the matrix */
  int64_t row, column, length;
  float maximum, minimum;
  float f_hi, f_lo;
};

static inline int64_t group_offset(const struct quantized_shape *shape, int64_t index) {
  int64_t per_row = groups_per_row(shape);
  return index / per_row * shape->columns + index % per_row * shape->quantizer.group_size;
}

/* Floats that hold a group, in whole cache lines. */
static inline int64_t group_room(const struct quantized_shape *shape) {
  int64_t longest = shape->quantizer.group_size < shape->columns ? shape->quantizer.group_size : shape->columns;
  return (longest + 15) / 16 * 16;
}

/* `room`: where the group's scaled weights go; not used without scales. */
static inline struct group group_at(const struct quantized *q, int64_t index, float *room) {
  const struct quantized_shape *shape = q->shape;
  int64_t per_row = groups_per_row(shape), row = index / per_row, first = index % per_row * shape->quantizer.group_size;
  int64_t rest = shape->columns - first;
  struct group group = {.offset = row * shape->columns + first,
                        .row = row,
                        .column = first,
                        .length = shape->quantizer.group_size < rest ? shape->quantizer.group_size : rest};
  group.w = q->w + group.offset;
  if (q->scales) {
    scale_values(room, group.w, row_scale(q->scales, row), column_scales(q->scales, first), group.length);
    group.w = room;
  }
  float maximum = group.w[0], minimum = group.w[0];
#pragma omp simd reduction(max : maximum) reduction(min : minimum)
  for (int64_t i = 0; i < group.length; i++) {
    maximum = group.w[i] > maximum ? group.w[i] : maximum;
    minimum = group.w[i] < minimum ? group.w[i] : minimum;
  }
  group.maximum = maximum;
  group.minimum = minimum;
  group.f_hi = q->f_hi ? q->f_hi[index] : 1.0f;
  group.f_lo = q->f_lo ? q->f_lo[index] : 1.0f;
  return group;
}

static inline struct group_grid grid_of(const struct group *group, const struct quantizer *quantizer, bool at_rest) {
  return quantizer_grid(quantizer, quantizer_high(group->f_hi, group->maximum), quantizer_low(group->f_lo, group->minimum), at_rest);
}

/* Scaled weights go where their fake-quantized ones come. */
static void quantize_forward(struct kernels *k, data *w_hat, const data *w, const struct weight_scales *scales, const float *f_hi,
                             const float *f_lo, const struct quantized_shape *shape, bool at_rest) {
  (void)k;
  struct quantized q = quantized(w, scales, f_hi, f_lo, shape);
  float top = quantizer_top(&shape->quantizer);
#pragma omp parallel for schedule(static)
  for (int64_t g = 0; g < groups_of(shape); g++) {
    struct group group = group_at(&q, g, q.scales ? (float *)w_hat + group_offset(shape, g) : NULL);
    struct group_grid grid = grid_of(&group, &shape->quantizer, at_rest);
    float *out = (float *)w_hat + group.offset;
#pragma omp simd
    for (int64_t i = 0; i < group.length; i++) out[i] = quantizer_fake(group.w[i], grid, top);
  }
}

static inline void factor_gradients(float *df_hi, float *df_lo, float dscale, const struct group *group,
                                    const struct quantizer *quantizer) {
  struct end_slopes slopes = quantizer_factor_slopes(quantizer, group->f_hi, group->f_lo, group->maximum, group->minimum);
  *df_hi = dscale * slopes.high;
  *df_lo = dscale * slopes.low;
}

/* The gradient of a group's own values, dw (may be dw_hat); returns that of its scale. */
static inline float value_gradients(float *dw, const float *dw_hat, const struct group *group, const struct quantizer *quantizer,
                                    struct group_grid grid) {
  const float *w = group->w, maximum = group->maximum, minimum = group->minimum; /* out of the struct: dw might be part of it */
  float top = quantizer_top(quantizer), dscale = 0;
  int64_t length = group->length;
  int maxima = 0, minima = 0;
#pragma omp simd reduction(+ : dscale, maxima, minima)
  for (int64_t i = 0; i < length; i++) {
    float d = dw_hat[i];
    dscale += d * quantizer_scale_slope(w[i], grid, top);
    maxima += w[i] == maximum;
    minima += w[i] == minimum;
    dw[i] = quantizer_inside(w[i], grid, top) ? d : 0;
  }
  struct end_slopes slopes = quantizer_extreme_slopes(quantizer, group->f_hi, group->f_lo, maximum, minimum);
  float at_maximum = dscale * slopes.high / (float)maxima, at_minimum = dscale * slopes.low / (float)minima;
#pragma omp simd
  for (int64_t i = 0; i < length; i++) dw[i] += (w[i] == maximum ? at_maximum : 0) + (w[i] == minimum ? at_minimum : 0);
  return dscale;
}

/* Of the factors alone: the step without LET. */
static void backward_factors(struct kernels *k, float *df_hi, float *df_lo, const float *dw_hat, const struct quantized *q, bool at_rest) {
  const struct quantizer *quantizer = &q->shape->quantizer;
  int64_t room = q->scales ? group_room(q->shape) : 0;
  float top = quantizer_top(quantizer), *scratch = room ? cpu_scratch(k, k->threads * room) : NULL;
  if (room && !scratch) return;
#pragma omp parallel for schedule(static)
  for (int64_t g = 0; g < groups_of(q->shape); g++) {
    struct group group = group_at(q, g, room ? scratch + omp_get_thread_num() * room : NULL);
    struct group_grid grid = grid_of(&group, quantizer, at_rest);
    const float *dw = dw_hat + group.offset;
    float dscale = 0;
#pragma omp simd reduction(+ : dscale)
    for (int64_t i = 0; i < group.length; i++) dscale += dw[i] * quantizer_scale_slope(group.w[i], grid, top);
    factor_gradients(&df_hi[g], &df_lo[g], dscale, &group, quantizer);
  }
}

/* Of the scales, and of the factors unless df_hi is NULL, in one pass over the weight. */
static void backward_scales(struct kernels *k, float *df_hi, float *df_lo, float *drow, float *dcolumn, const float *dw_hat,
                            const struct quantized *q, bool at_rest) {
  const struct quantizer *quantizer = &q->shape->quantizer;
  int64_t rows = q->shape->rows, columns = q->shape->columns, per_row = groups_per_row(q->shape);
  int64_t chunks = row_chunks(rows), room = group_room(q->shape);
  float *scratch = cpu_scratch(k, 2 * k->threads * room + (dcolumn ? chunks * columns : 0)), *partial = scratch + 2 * k->threads * room;
  if (!scratch) return;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    float *scaled = scratch + 2 * omp_get_thread_num() * room, *dw = scaled + room, *sum = dcolumn ? partial + chunk * columns : NULL;
    if (sum) memset(sum, 0, (size_t)columns * sizeof *sum);
    for (int64_t r = chunk_begin(rows, chunks, chunk); r < chunk_begin(rows, chunks, chunk + 1); r++) {
      float slope = 0;
      for (int64_t g = r * per_row; g < (r + 1) * per_row; g++) {
        struct group group = group_at(q, g, scaled);
        float dscale = value_gradients(dw, dw_hat + group.offset, &group, quantizer, grid_of(&group, quantizer, at_rest));
        if (df_hi) factor_gradients(&df_hi[g], &df_lo[g], dscale, &group, quantizer);
        slope += scale_values_backward(sum ? sum + group.column : NULL, dw, q->w + group.offset, row_scale(q->scales, r),
                                       column_scales(q->scales, group.column), group.length);
      }
      if (drow) drow[r] = slope;
    }
  }
  if (dcolumn) sum_chunks(dcolumn, partial, chunks, columns, columns, false);
}

static void quantize_backward(struct kernels *k, float *df_hi, float *df_lo, float *drow, float *dcolumn, const data *dw_hat, const data *w,
                              const struct weight_scales *scales, const float *f_hi, const float *f_lo, const struct quantized_shape *shape,
                              bool at_rest) {
  struct quantized q = quantized(w, scales, f_hi, f_lo, shape);
  if (drow || dcolumn)
    backward_scales(k, df_hi, df_lo, drow, dcolumn, (const float *)dw_hat, &q, at_rest);
  else if (df_hi)
    backward_factors(k, df_hi, df_lo, (const float *)dw_hat, &q, at_rest);
}

static void quantize_backward_input(struct kernels *k, data *dx, const data *dy, const data *x, const struct quantized_shape *shape) {
  (void)k;
  struct quantized q = quantized(x, NULL, NULL, NULL, shape);
#pragma omp parallel for schedule(static)
  for (int64_t g = 0; g < groups_of(shape); g++) {
    struct group group = group_at(&q, g, NULL);
    value_gradients((float *)dx + group.offset, (const float *)dy + group.offset, &group, &shape->quantizer,
                    grid_of(&group, &shape->quantizer, false));
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

static void quantize_codes(struct kernels *k, uint8_t *codes, uint16_t *scale, uint8_t *zero_point, const data *w,
                           const struct weight_scales *scales, const float *f_hi, const float *f_lo, const struct quantized_shape *shape) {
  struct quantized q = quantized(w, scales, f_hi, f_lo, shape);
  int64_t row_bytes = (shape->columns * shape->quantizer.bits + 7) / 8, per_row = groups_per_row(shape), room = group_room(shape);
  float *scratch = cpu_scratch(k, k->threads * room);
  if (!scratch) return;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < shape->rows; row++) {
    memset(codes + row * row_bytes, 0, (size_t)row_bytes);
    for (int64_t g = row * per_row; g < (row + 1) * per_row; g++) {
      struct group group = group_at(&q, g, scratch + omp_get_thread_num() * room);
      struct group_grid grid = grid_of(&group, &shape->quantizer, true);
      scale[g] = half_from_float(grid.scale);
      zero_point[g] = (uint8_t)grid.zero_point;
      pack_codes(codes + row * row_bytes, group.column * shape->quantizer.bits, group.w, group.length, grid, &shape->quantizer);
    }
  }
}
