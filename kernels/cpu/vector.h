/* vector.h: functions of one float that compilers turn into vector code, since they hold no call and no branch. */
#ifndef OMNIQUANT_CPU_VECTOR_H
#define OMNIQUANT_CPU_VECTOR_H

#include "dtype.h"

#include <math.h>

/* exp(x), to 2 units in the last place for -87 <= x <= 88; below it is 0, above it saturates. */
static inline float vector_exp(float x) {
  float limited = x < -87.0f ? -87.0f : x;
  limited = limited > 88.0f ? 88.0f : limited;
  float n = rintf(limited * 1.44269504f);
  float r = (limited - n * 0.693359375f) - n * -2.12194440e-4f; /* ln 2 in two parts, so that n * the first is exact */
  float p = 1.9875691500e-4f; /* minimax polynomial of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2 (Cephes, expf) */
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  float y = p * r * r + r + 1.0f;
  y *= float_from_bits((uint32_t)((int32_t)n + 127) << 23);
  return x < -87.0f ? 0.0f : y;
}

static inline float vector_sigmoid(float x) {
  return 1.0f / (1.0f + vector_exp(-x));
}

/* The complement of the error function: Chebyshev fit of Press et al., Numerical Recipes (erfcc), relative error 1.2e-7 in exact arithmetic;
 * in fp32 z * z loses up to 1e-5 of it at z = 6. */
static inline float vector_erfc(float x) {
  float z = fabsf(x), t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  float y = t * vector_exp(p - z * z);
  return x < 0 ? 2.0f - y : y;
}

/* The normal distribution's Phi(x): the part of it below x. */
static inline float vector_normal(float x) {
  return 0.5f * vector_erfc(-0.70710678f * x);
}

#endif
