/* shared.h: memory that the ranks of a node have in common. It is divided among them for writing: each writes its part between two barriers, so
 * that nobody writes over what others still read, nor reads what is not written. Where there is none in common, because a rank is alone on its
 * node or the system has refused it, a rank's own memory takes its place, all of it is the rank's part, and the barriers cost nothing. */
#ifndef OMNIQUANT_SHARED_H
#define OMNIQUANT_SHARED_H

#include <stddef.h>
#include <stdint.h>

#include "world.h"

struct shared {
  void *memory; /* the same on all ranks of the node; NULL: there is none in common */
  size_t bytes;
  struct world *world; /* whose ranks on this node have it in common; not used without memory */
};

/* Gets zeroed memory, which takes room only where it is written to, for the world's ranks on this node. What keeps it from being had is told
 * once, by a line on stderr. Collective. */
void shared_open(struct shared *shared, struct world *world, size_t bytes);

/* Once no other rank is waited for; the memory goes with the last rank that has it. {0} is allowed. */
void shared_close(struct shared *shared);

/* Waits until all that have the memory have come. Collective over them. */
void shared_barrier(const struct shared *shared);

/* This rank's part of `count` things: [*first, *end). */
void shared_part(const struct shared *shared, int64_t count, int64_t *first, int64_t *end);

#endif
