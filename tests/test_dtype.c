/* test_dtype.c: conversions of half and bfloat16 against slow references written with doubles. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "dtype.h"

/* The value of a finite half, by the definition of binary16. */
static double half_value(uint16_t half) {
  int exponent = half >> 10 & 31, fraction = half & 1023;
  double magnitude = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

/* The half nearest to a value that is not NaN, ties to even, found by counting in units of the last place. */
static uint16_t half_reference(double value) {
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  double magnitude = fabs(value);
  int exponent = -14; /* smallest binade, shared with the subnormals */
  if (isinf(magnitude)) return sign | 0x7c00;
  while (exponent < 16 && magnitude >= ldexp(1, exponent + 1)) exponent++;
  double units = ldexp(magnitude, 10 - exponent), whole = floor(units), rest = units - whole;
  if (rest > 0.5 || (rest == 0.5 && fmod(whole, 2) == 1)) whole++;
  if (ldexp(whole, exponent - 10) >= 65536) return sign | 0x7c00;
  /* Carries into the next binade come out right, as the encoding counts on across it. */
  return (uint16_t)(sign | ((exponent + 14) * 1024 + (int)whole));
}

static void check_half(float value) {
  uint16_t half = half_from_float(value), expected = half_reference(value);
  if (half != expected) fail_msg("%a becomes %04x, not %04x", (double)value, half, expected);
}

static void every_half_survives_the_way_to_float_and_back(void **state) {
  (void)state;
  for (uint32_t bits = 0; bits < 65536; bits++) {
    uint16_t half = (uint16_t)bits;
    float value = half_to_float(half);
    if ((bits & 0x7fff) > 0x7c00) {
      assert_true(isnan(value) && isnan(half_to_float(half_from_float(value))));
      assert_int_equal(half_from_float(value) & 0x8000, bits & 0x8000);
      continue;
    }
    if ((bits & 0x7fff) == 0x7c00) {
      assert_true(isinf(value) && !signbit(value) == !(bits & 0x8000));
    } else {
      assert_true((double)value == half_value(half) && !signbit(value) == !(bits & 0x8000));
    }
    assert_int_equal(half_from_float(value), half);
  }
}

static void halves_midpoints_and_their_neighbours_round_to_even(void **state) {
  (void)state;
  for (uint16_t half = 0; half < 0x7c00; half++) {
    double next = half + 1 == 0x7c00 ? 65536 : half_value((uint16_t)(half + 1));
    float exact = (float)half_value(half), middle = (float)((half_value(half) + next) / 2); /* both exact in binary32 */
    const float values[] = {exact,  nextafterf(exact, INFINITY),  nextafterf(exact, -INFINITY),
                            middle, nextafterf(middle, INFINITY), nextafterf(middle, -INFINITY)};
    for (int i = 0; i < 6; i++) {
      check_half(values[i]);
      check_half(-values[i]);
    }
  }
}

static void floats_over_the_whole_range_agree_with_the_reference(void **state) {
  (void)state;
  for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += 4093) {
    float value = float_from_bits((uint32_t)bits);
    if (!isnan(value)) check_half(value);
  }
}

static void the_edges_of_the_range(void **state) {
  (void)state;
  assert_int_equal(half_from_float(0.0f), 0x0000);
  assert_int_equal(half_from_float(-0.0f), 0x8000);
  assert_int_equal(half_from_float(65504.0f), 0x7bff);
  assert_int_equal(half_from_float(nextafterf(65520.0f, 0)), 0x7bff);
  assert_int_equal(half_from_float(65520.0f), 0x7c00);
  assert_int_equal(half_from_float(-INFINITY), 0xfc00);
  assert_int_equal(half_from_float(0x1p-14f), 0x0400);
  assert_int_equal(half_from_float(0x1p-24f), 0x0001);
  assert_int_equal(half_from_float(0x1p-25f), 0x0000); /* the tie to zero */
  assert_int_equal(half_from_float(nextafterf(0x1p-25f, 1)), 0x0001);
  assert_int_equal(half_from_float(0x1p-149f), 0x0000);
}

static void every_bfloat16_is_the_upper_half_of_a_float(void **state) {
  (void)state;
  for (uint32_t bits = 0; bits < 65536; bits++) assert_int_equal(float_to_bits(bf16_to_float((uint16_t)bits)), bits << 16);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_half_survives_the_way_to_float_and_back),
      cmocka_unit_test(halves_midpoints_and_their_neighbours_round_to_even),
      cmocka_unit_test(floats_over_the_whole_range_agree_with_the_reference),
      cmocka_unit_test(the_edges_of_the_range),
      cmocka_unit_test(every_bfloat16_is_the_upper_half_of_a_float),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
