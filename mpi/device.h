/* device.h: sums over ranks of what lies in a device's memory. Once a world has its device, world_allreduce and world_largest take pointers of
 * either kind of memory, and callers need not know which. They go over what the backend brings (device_link), or through the host's memory. */
#ifndef OMNIQUANT_DEVICE_H
#define OMNIQUANT_DEVICE_H

#include "kernels.h"
#include "stream.h"
#include "world.h"

/* What carries values between the devices of ranks: NCCL (nccl_link.h). A failure in the middle of a sum ends all ranks. */
struct device_link {
  /* Collective; takes what memory it will need. Errors: ERROR_WORK, this rank's own; what *state has then is to be closed, too. What one rank alone
   * cannot do ends all where the others already wait for it. */
  int (*open)(struct world *world, struct kernels *k, void **state, struct error *error);
  void (*close)(void *state /* NULL is allowed */);
  /* As tree_link has it. */
  void (*exchange)(void *state, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner);
  void (*largest)(void *state, float *values, size_t count); /* over all ranks, in place */
  /* As stream_link has it (stream.h): on the lane's stream. */
  void (*broadcast)(void *state, struct lane *lane, void *bytes, size_t count);
};

/* The backend that all ranks compute with: the one asked for, or of "auto" CUDA's where every rank has a device that it can use, and the CPU's where
 * none has, with a line of rank 0 if that has one all the same. Collective; a world of one rank needs no MPI. Errors, of all ranks: ERROR_INPUT where
 * only some have one; NULL then. */
const char *device_choose(struct world *world, const char *asked /* "auto", "cpu", "cuda" */, struct error *error);

/* Gives the world its device; nothing to do on one rank, or where the backend's memory is the host's. `k` must outlive device_close. Collective,
 * after all ranks have opened their kernels. Errors: ERROR_WORK, this rank's own: agree on them. */
int device_open(struct world *world, struct kernels *k, struct error *error);
void device_close(struct world *world);

/* What carries the block stream between the devices of a world's ranks; NULL: MPI does. Valid until device_close. What the devices of ranks carry, of
 * one world or of several, has to be asked for in one order on all of them. */
const struct stream_link *device_stream_link(const struct world *world);

/* What world_allreduce and world_largest ask and do. */
bool device_owns(const struct device *device, const void *memory);
void device_allreduce(struct world *world, float *values, size_t count, float *scratch);
void device_largest(struct world *world, float *values, size_t count);

#endif
