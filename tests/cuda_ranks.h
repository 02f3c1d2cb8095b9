/* cuda_ranks.h: a test program on several ranks (ranks.bash), each with a device. */
#ifndef OMNIQUANT_CUDA_RANKS_H
#define OMNIQUANT_CUDA_RANKS_H

#include "cuda_pair.h"
#include "world.h"

/* Runs one test with `world` started; skips it, by its exit status, where any rank has no device. */
static inline int run_on_ranks(struct world *world, int argc, char **argv, struct CMUnitTest test) {
  struct error error = {0};
  const struct CMUnitTest tests[] = {test};
  if (world_init(world, &argc, &argv, &error)) return 1;
  struct kernels *k = CUDA_OPEN(world->local_rank, &error);
  bool skipped = world_agree(world, &error) != 0;
  if (k) k->close(k);
  if (skipped && world->rank == 0) printf("skipped: %s\n", error.message);
  int failed = skipped ? 0 : cmocka_run_group_tests(tests, NULL, NULL);
  world_finalize(world);
  return skipped ? 77 : failed;
}

#endif
