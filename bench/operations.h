/* operations.h: the operations of a CPU backend, each timed beside what it moves and computes. What is given this in place of the backend's
 * own kernels does the same work. */
#ifndef OMNIQUANT_BENCH_OPERATIONS_H
#define OMNIQUANT_BENCH_OPERATIONS_H

#include "kernels.h"

enum { MOST_OPERATIONS = 48 };

struct operation {
  const char *name; /* as in kernels.h */
  const char *part; /* of a step: "products", "quantizer", ... */
  int calls;
  double seconds;
  double bytes; /* of its operands, each read or written once */
  double flops; /* of its matrix products */
};

struct operations {
  struct kernels k; /* what others are given; first, so that an operation finds the rest by it */
  struct kernels inner;
  bool on; /* whether calls are counted */
  int count;
  struct operation operation[MOST_OPERATIONS];
  struct operation *current;
};

/* `k`, a CPU backend, stays the caller's and must outlive the operations. */
void operations_init(struct operations *operations, const struct kernels *k);

#endif
