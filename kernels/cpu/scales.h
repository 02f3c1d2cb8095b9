/* scales.h: a row of a weight under LET, (w * row) * column in this order everywhere, so that what is trained, stored and computed by
 * scale_weight is the same bit for bit. */
#ifndef OMNIQUANT_CPU_SCALES_H
#define OMNIQUANT_CPU_SCALES_H

#include "kernels.h"

/* What a NULL stands for: no scales, or none of rows or columns. */
static inline float row_scale(const struct weight_scales *scales, int64_t row) {
  return scales && scales->row ? scales->row[row] : 1.0f;
}

static inline const float *column_scales(const struct weight_scales *scales, int64_t first) {
  return scales && scales->column ? scales->column + first : NULL;
}

/* column may be NULL: 1. Not inlined: within the quantizer's loops GCC 12 would take registers from the path without scales. */
__attribute__((noinline)) static void scale_values(float *to, const float *w, float row, const float *column, int64_t count) {
  if (column)
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i] = w[i] * row * column[i];
  else
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i] = w[i] * row;
}

/* From the gradient d of scaled values: returns that of row, adds that of the columns to dcolumn unless it is NULL. */
static inline float scale_values_backward(float *dcolumn, const float *d, const float *w, float row, const float *column, int64_t count) {
  float drow = 0;
  if (column)
#pragma omp simd reduction(+ : drow)
    for (int64_t i = 0; i < count; i++) drow += d[i] * w[i] * column[i];
  else
#pragma omp simd reduction(+ : drow)
    for (int64_t i = 0; i < count; i++) drow += d[i] * w[i];
  if (dcolumn)
#pragma omp simd
    for (int64_t i = 0; i < count; i++) dcolumn[i] += d[i] * w[i] * row;
  return drow;
}

#endif
