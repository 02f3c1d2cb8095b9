/* device.h: sums over ranks of what lies in a device's memory. Once a world has its device, world_allreduce and world_largest take pointers of
 * either kind of memory, and callers need not know which. Over NCCL where the program is built with it; else through the host's memory. */
#ifndef OMNIQUANT_DEVICE_H
#define OMNIQUANT_DEVICE_H

#include "kernels.h"
#include "stream.h"
#include "world.h"

/* Gives the world its device; nothing to do on one rank, or where the backend's memory is the host's. `k` must outlive device_close. Collective,
 * after all ranks have opened their kernels. Errors: ERROR_WORK, this rank's own: agree on them. */
int device_open(struct world *world, struct kernels *k, struct error *error);
void device_close(struct world *world);

/* What carries the block stream between the devices of a world's ranks; NULL: MPI does. Valid until device_close. Beside sums only on a world of its
 * own: what one world's device carries goes in one order. */
const struct stream_link *device_link(const struct world *world);

/* What world_allreduce and world_largest ask and do. */
bool device_owns(const struct device *device, const void *memory);
void device_allreduce(struct world *world, float *values, size_t count, float *scratch);
void device_largest(struct world *world, float *values, size_t count);

#endif
