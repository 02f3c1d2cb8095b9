/* timing.h: where a block's time goes: each moment of a rank belongs to one phase, so that the phases add up to the whole. What a backend does
 * asynchronously is counted where the host waits for it. */
#ifndef OMNIQUANT_TIMING_H
#define OMNIQUANT_TIMING_H

#include "world.h"

enum phase {
  PHASE_WAIT,    /* for the block's tensors: rank 0 reads, the others receive */
  PHASE_TARGET,  /* unpacking them, and forward passes in full precision */
  PHASE_START,   /* the first clipping factors (search) and transformation */
  PHASE_STEPS,   /* of training: quantizing weights, forward and backward passes, updates */
  PHASE_MEASURE, /* forward passes of the quantized block: losses of what may be kept, outputs for the next block */
  PHASE_STORE, /* on a team's first rank: packing codes; and of the block before handing it to the writer, or making its file and sending it */
  PHASE_RANKS, /* in collectives, within any of these: sums, and waiting for slower ranks */
  PHASES
};

/* Their names in a store, comma-separated. */
extern const char timing_phases[];

struct timing {
  struct world *world, *team; /* whose collectives are counted; set by the caller */
  double seconds[PHASES];
  enum phase phase; /* that is counted now */
  double since, waited_since;
};

/* Forgets what was counted; from now on `phase` is. */
void timing_begin(struct timing *timing, enum phase phase);

/* From now on another phase is counted; NULL is allowed. */
void timing_enter(struct timing *timing, enum phase phase);

/* Adds what `more` has counted; from now on `phase` is, and what passed since the last call is not. */
void timing_go_on(struct timing *timing, const struct timing *more, enum phase phase);

/* What each rank of the team has counted until now; then begins anew with PHASE_STORE. Returns this rank's total. Collective over the team. */
double timing_gather(struct timing *timing, float *seconds /* [2, team's ranks, PHASES]: receives the first half; the second is scratch */);

#endif
