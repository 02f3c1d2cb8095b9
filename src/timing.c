/* timing.c: one clock a rank; the worlds count what their collectives take. */
#include "timing.h"

#include <string.h>

#include "clock.h"

const char timing_phases[] = "wait,target,start,steps,measure,store,ranks";

static double waited(const struct timing *t) {
  return t->world->waited_seconds + t->team->waited_seconds;
}

static void restart(struct timing *t, enum phase phase) {
  t->phase = phase;
  t->since = now();
  t->waited_since = waited(t);
}

void timing_begin(struct timing *t, enum phase phase) {
  memset(t->seconds, 0, sizeof t->seconds);
  restart(t, phase);
}

void timing_enter(struct timing *t, enum phase phase) {
  if (!t) return;
  double since = t->since, in_collectives = waited(t) - t->waited_since;
  enum phase before = t->phase;
  restart(t, phase);
  t->seconds[before] += t->since - since - in_collectives;
  t->seconds[PHASE_RANKS] += in_collectives;
}

void timing_go_on(struct timing *t, const struct timing *more, enum phase phase) {
  for (int i = 0; i < PHASES; i++) t->seconds[i] += more->seconds[i];
  restart(t, phase);
}

double timing_gather(struct timing *t, float *seconds) {
  size_t count = (size_t)t->team->size * PHASES;
  float *mine = seconds + (size_t)t->team->rank * PHASES;
  double total = 0;
  timing_enter(t, PHASE_STORE);
  memset(seconds, 0, count * sizeof *seconds);
  for (int i = 0; i < PHASES; i++) {
    mine[i] = (float)t->seconds[i];
    total += t->seconds[i];
    t->seconds[i] = 0;
  }
  world_allreduce(t->team, seconds, count, seconds + count); /* every number is one rank's: the sum gathers them */
  return total;
}
