/* dtype.h: the number types of checkpoints, and their exact conversion to and from fp32. */
#ifndef OMNIQUANT_DTYPE_H
#define OMNIQUANT_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A function that device code calls too. */
#ifdef __CUDACC__
#define PORTABLE_FUNCTION static __host__ __device__ __forceinline__
#else
#define PORTABLE_FUNCTION static inline
#endif

enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_OTHER };

/* Bytes of one element; 0 for DTYPE_OTHER. */
static inline size_t dtype_size(enum dtype dtype) {
  return dtype == DTYPE_F32 ? 4 : dtype == DTYPE_OTHER ? 0 : 2;
}

static inline const char *dtype_name(enum dtype dtype) {
  static const char *const names[] = {"F32", "F16", "BF16", "another type"};
  return names[dtype];
}

PORTABLE_FUNCTION float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

PORTABLE_FUNCTION uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

PORTABLE_FUNCTION float bf16_to_float(uint16_t bits) {
  return float_from_bits((uint32_t)bits << 16);
}

/* IEEE 754 binary16 to binary32, exact; branch-free so that compilers vectorize it. */
PORTABLE_FUNCTION float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  /* Rebiasing by a multiplication makes subnormals come out right; infinities and NaN need the exponent filled up. */
  uint32_t bits = float_to_bits(float_from_bits(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0;
  return float_from_bits(bits | sign);
}

/* binary32 to binary16, to nearest even; values beyond the range become infinity. */
PORTABLE_FUNCTION uint16_t half_from_float(float value) {
  uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above */
  if (magnitude < 0x38800000u) {                                   /* subnormal half: adding 0.5 lets the FPU round at the right place */
    float rounded = float_from_bits(magnitude) + 0.5f;
    return (uint16_t)(sign | (float_to_bits(rounded) - 0x3f000000u));
  }
  uint32_t odd = magnitude >> 13 & 1;
  return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

#endif
