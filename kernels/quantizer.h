/* quantizer.h: the arithmetic of the quantizer (method.md section 1) for one group and one element, shared by every backend.
 * Source: OmniQuant, arXiv 2308.13137, eq. 2; the lines marked there as ours keep the zero point inside 0..Q. */
#ifndef OMNIQUANT_QUANTIZER_H
#define OMNIQUANT_QUANTIZER_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "dtype.h"

struct quantizer {
  int bits;           /* n: 2..8 */
  bool symmetric;     /* zero point fixed at 2^(n-1) */
  int64_t group_size; /* input columns a group, the last of a row may be short; C_in for per channel */
};

/* What one group's codes mean: w_hat = (code - zero_point) * scale. */
struct group_grid {
  float scale;
  float inverse; /* 1 / scale */
  float zero_point;
};

/* Of a NaN and a number the number, if it is b. On CPUs not fmaxf and fminf: their rules for NaN keep compilers from vector code; on a GPU they are
 * one instruction instead of two. */
PORTABLE_FUNCTION float quantizer_max(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
PORTABLE_FUNCTION float quantizer_min(float a, float b) {
#ifdef __CUDA_ARCH__
  return fminf(a, b);
#else
  return a < b ? a : b;
#endif
}

PORTABLE_FUNCTION float quantizer_top(const struct quantizer *q) { /* Q = 2^n - 1 */
  return (float)((1 << q->bits) - 1);
}

/* The largest scale's divisor: Q, or 2^(n-1) - 1 for symmetric codes. */
PORTABLE_FUNCTION float quantizer_steps(const struct quantizer *q) {
  return q->symmetric ? (float)((1 << (q->bits - 1)) - 1) : quantizer_top(q);
}

/* hi and lo with 0 inside: the ends of the range that the codes cover. */
PORTABLE_FUNCTION float quantizer_high(float factor, float maximum) {
  return quantizer_max(factor * maximum, 0);
}
PORTABLE_FUNCTION float quantizer_low(float factor, float minimum) {
  return quantizer_min(factor * minimum, 0);
}

PORTABLE_FUNCTION float quantizer_raw_scale(const struct quantizer *q, float high, float low) {
  float range = q->symmetric ? quantizer_max(high, -low) : high - low;
  return range / quantizer_steps(q);
}

PORTABLE_FUNCTION bool quantizer_scale_clamped(float raw) {
  return !(raw >= 1e-5f && raw <= 1e4f);
}

/* at_rest: the scale as it is stored, in fp16. */
PORTABLE_FUNCTION struct group_grid quantizer_grid(const struct quantizer *q, float high, float low, bool at_rest) {
  struct group_grid grid;
  grid.scale = quantizer_min(quantizer_max(quantizer_raw_scale(q, high, low), 1e-5f), 1e4f);
  if (at_rest) grid.scale = half_to_float(half_from_float(grid.scale));
  grid.inverse = 1 / grid.scale;
  grid.zero_point =
      q->symmetric ? (float)(1 << (q->bits - 1)) : quantizer_min(quantizer_max(rintf(-low / grid.scale), 0), quantizer_top(q));
  return grid;
}

/* w / scale to the last bit without a division: a product with 1 / scale, itself rounded to nearest, and two fused multiply-adds (N. Brisebarre,
 * J.-M. Muller, S. K. Raina, Accelerating correctly rounded floating-point division when the divisor is known in advance, IEEE Transactions on
 * Computers 53(8), 2004). */
PORTABLE_FUNCTION float quantizer_quotient(float w, struct group_grid grid) {
  float near = w * grid.inverse, rest = fmaf(-near, grid.scale, w);
  return fmaf(quantizer_max(rest, -FLT_MAX) /* of an infinite w it is NaN */, grid.inverse, near);
}

/* The same, as it is cheapest: a GPU's division is ten instructions and three turns of its slowest unit. */
PORTABLE_FUNCTION float quantizer_scaled(float w, struct group_grid grid) {
#if defined __CUDACC__ || defined OMNIQUANT_EMULATED
  return quantizer_quotient(w, grid);
#else
  return w / grid.scale;
#endif
}

/* round(w / scale) + zero_point before it is clamped to 0..Q: outside, the weight is clipped. */
PORTABLE_FUNCTION float quantizer_raw_code(float w, struct group_grid grid) {
  return rintf(quantizer_scaled(w, grid)) + grid.zero_point;
}

PORTABLE_FUNCTION float quantizer_code(float w, struct group_grid grid, float top) {
  return quantizer_min(quantizer_max(quantizer_raw_code(w, grid), 0), top);
}

PORTABLE_FUNCTION float quantizer_fake(float w, struct group_grid grid, float top) {
  return (quantizer_code(w, grid, top) - grid.zero_point) * grid.scale;
}

/* d w_hat / d scale, straight-through: round(x) - x inside, the code's distance from the zero point at the ends and outside: a weight
 * that the range's end holds moves with it. */
PORTABLE_FUNCTION float quantizer_scale_slope(float w, struct group_grid grid, float top) {
  float x = quantizer_scaled(w, grid), rounded = rintf(x), raw = rounded + grid.zero_point;
  return raw <= 0 ? -grid.zero_point : raw >= top ? top - grid.zero_point : rounded - x;
}

/* d w_hat / d w is 1 here, 0 where an end holds the weight. */
PORTABLE_FUNCTION bool quantizer_inside(float w, struct group_grid grid, float top) {
  float raw = quantizer_raw_code(w, grid);
  return raw > 0 && raw < top;
}

/* The slope of a group's scale by each end of its range, or by what that end comes from. */
struct end_slopes {
  float high, low;
};

/* d scale / d high and d scale / d low; 0 where the scale is clamped. Where both ends of a symmetric range are equally far from zero each
 * takes half, as a maximum's gradient is shared by ties. */
PORTABLE_FUNCTION struct end_slopes quantizer_range_slopes(const struct quantizer *q, float high, float low) {
  struct end_slopes slopes = {0, 0};
  if (quantizer_scale_clamped(quantizer_raw_scale(q, high, low))) return slopes;
  float share_high = 1, share_low = 1;
  if (q->symmetric) {
    share_high = high > -low ? 1.0f : high == -low ? 0.5f : 0.0f;
    share_low = 1 - share_high;
  }
  float step = 1 / quantizer_steps(q);
  slopes.high = share_high * step;
  slopes.low = -share_low * step;
  return slopes;
}

/* d scale / d f_hi and d scale / d f_lo. */
PORTABLE_FUNCTION struct end_slopes quantizer_factor_slopes(const struct quantizer *q, float f_hi, float f_lo, float maximum,
                                                            float minimum) {
  struct end_slopes slopes = quantizer_range_slopes(q, quantizer_high(f_hi, maximum), quantizer_low(f_lo, minimum));
  slopes.high *= quantizer_max(maximum, 0);
  slopes.low *= quantizer_min(minimum, 0);
  return slopes;
}

/* d scale / d maximum and d scale / d minimum, where the group's values move too; an end at zero does not follow them. */
PORTABLE_FUNCTION struct end_slopes quantizer_extreme_slopes(const struct quantizer *q, float f_hi, float f_lo, float maximum,
                                                             float minimum) {
  struct end_slopes slopes = quantizer_range_slopes(q, quantizer_high(f_hi, maximum), quantizer_low(f_lo, minimum));
  slopes.high *= maximum > 0 ? f_hi : 0;
  slopes.low *= minimum < 0 ? f_lo : 0;
  return slopes;
}

#endif
