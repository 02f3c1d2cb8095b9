/* measure.h: what the benchmarks in C share: the middle one of several times, and random numbers. */
#ifndef OMNIQUANT_BENCH_MEASURE_H
#define OMNIQUANT_BENCH_MEASURE_H

#include <stdint.h>
#include <stdlib.h>

static inline int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Sorts the seconds; the upper of the middle two. */
static inline double median(double *seconds, int count) {
  qsort(seconds, (size_t)count, sizeof *seconds, ascending);
  return seconds[count / 2];
}

/* -1 .. 1; the state is any number. */
static inline float uniform(uint32_t *state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) * 0x1p-23f - 1;
}

#endif
