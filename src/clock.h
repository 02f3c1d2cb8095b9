/* clock.h: how long something takes. */
#ifndef OMNIQUANT_CLOCK_H
#define OMNIQUANT_CLOCK_H

#include <time.h>

/* Seconds of a clock that only goes forward; its zero means nothing. */
static inline double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

#endif
