/* gpu_allreduce.c: what sums of device memory that do not depend on the ranks cost: the ordered tree of world_allreduce over NCCL beside ncclAllReduce,
 * which adds in an order of its own. Prints a JSON object for each size on rank 0 (docs/cuda.md). */
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>

#include "clock.h"
#include "cuda/backend.h"
#include "device.h"
#include "measure.h"

enum { REPEATS = 21, LARGEST = 1 << 28 };

struct setup {
  struct world world;
  struct kernels *k;
  ncclComm_t communicator;
  size_t count;            /* floats summed */
  float *values, *scratch; /* [count], device */
};

static void sum_in_order(struct setup *s) {
  world_allreduce(&s->world, s->values, s->count, s->scratch);
}

/* A failure comes back from synchronize, or hangs and is ended by the launcher. */
static void sum_in_any_order(struct setup *s) {
  ncclAllReduce(s->values, s->values, s->count, ncclFloat, ncclSum, s->communicator, s->k->state->stream);
}

/* The median of the seconds until all ranks' devices are done; the first repeat is not counted. */
static double time_of(struct setup *s, void (*work)(struct setup *), struct error *error) {
  double seconds[REPEATS];
  for (int i = -1; i < REPEATS; i++) {
    s->k->fill(s->k, s->values, 1e-3f, (int64_t)s->count); /* sums would grow from repeat to repeat */
    s->k->synchronize(s->k, error);
    MPI_Barrier(s->world.communicator);
    double begin = now();
    work(s);
    s->k->synchronize(s->k, error);
    double spent = world_max(&s->world, now() - begin);
    if (i >= 0) seconds[i] = spent;
  }
  return median(seconds, REPEATS);
}

static int run(struct setup *s, const char *text, struct error *error) {
  long long count = atoll(text);
  if (count < 1 || count > LARGEST) error_set(error, ERROR_INPUT, "%s: is no count of floats; give 1 to %d", text, LARGEST);
  s->count = (size_t)count;
  s->values = error->code ? NULL : s->k->allocate(s->k, s->count * sizeof(float));
  s->scratch = error->code ? NULL : s->k->allocate(s->k, s->count * sizeof(float));
  if (!error->code && (!s->values || !s->scratch)) error_set(error, ERROR_WORK, "out of memory for %lld floats twice", count);
  if (world_agree(&s->world, error)) return error->code;
  double ordered = time_of(s, sum_in_order, error), free_order = time_of(s, sum_in_any_order, error);
  if (s->world.rank == 0 && !error->code)
    printf("{\"ranks\": %d, \"mib\": %.3f, \"tree_seconds\": %.6g, \"nccl_seconds\": %.6g, \"ratio\": %.3f}\n", s->world.size,
           (double)s->count * sizeof(float) / (1 << 20), ordered, free_order, ordered / free_order);
  fflush(stdout);
  s->k->release(s->k, s->values);
  s->k->release(s->k, s->scratch);
  return world_agree(&s->world, error);
}

static int connect(struct setup *s, struct error *error) {
  ncclUniqueId id;
  if (s->world.rank == 0 && ncclGetUniqueId(&id) != ncclSuccess)
    error_set(error, ERROR_WORK, "NCCL cannot start: %s", ncclGetLastError(NULL));
  if (world_agree(&s->world, error)) return error->code;
  world_broadcast(&s->world, &id, sizeof id);
  if (ncclCommInitRank(&s->communicator, s->world.size, id, s->world.rank) != ncclSuccess)
    error_set(error, ERROR_WORK, "rank %d: NCCL cannot connect the ranks: %s", s->world.rank, ncclGetLastError(NULL));
  return world_agree(&s->world, error);
}

static int run_all(struct setup *s, char **sizes, int count, struct error *error) {
  s->k = cuda_open(s->world.local_rank, error);
  if (count < 1 || s->world.size < 2) error_set(error, ERROR_INPUT, "counts of floats are expected, and at least two ranks");
  if (world_agree(&s->world, error)) return error->code;
  device_open(&s->world, s->k, error);
  if (world_agree(&s->world, error) || connect(s, error)) return error->code;
  for (int i = 0; i < count && !error->code; i++) run(s, sizes[i], error);
  ncclCommDestroy(s->communicator);
  return error->code;
}

int main(int argc, char **argv) {
  struct setup setup = {0};
  struct error error = {0};
  if (world_init(&setup.world, &argc, &argv, &error)) {
    fprintf(stderr, "gpu_allreduce: %s\n", error.message);
    return error.code;
  }
  if (run_all(&setup, argv + 1, argc - 1, &error) && setup.world.rank == 0) fprintf(stderr, "gpu_allreduce: %s\n", error.message);
  device_close(&setup.world);
  if (setup.k) setup.k->close(setup.k);
  world_finalize(&setup.world);
  return error.code;
}
