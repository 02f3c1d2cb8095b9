/* tree.h: the fixed order in which sums over ranks are taken, ((0+1)+(2+3))+..., over any means of exchange. Which ranks move what depends on
 * the length; the bits of the sum do not. */
#ifndef OMNIQUANT_TREE_H
#define OMNIQUANT_TREE_H

#include <stddef.h>

/* What carries it. Both may be asynchronous, in the order of their calls. */
struct tree_link {
  void *context;
  /* Sends floats to the partner and receives others from it; a count of 0: one way only. */
  void (*exchange)(void *context, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner);
  void (*add)(void *context, float *values, const float *other, size_t count);
};

/* Every rank's values become their sum over ranks 0 .. size - 1. Collective. */
void tree_sum(const struct tree_link *link, int rank, int size, float *values, /* [count] */
              size_t count, float *scratch /* [count] */);

#endif
