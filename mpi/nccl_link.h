/* nccl_link.h: a communicator of NCCL over the ranks of a world, on the stream of their kernels. It runs asynchronously; a failure ends all ranks. */
#ifndef OMNIQUANT_NCCL_LINK_H
#define OMNIQUANT_NCCL_LINK_H

#include "device.h"

extern const struct device_link nccl_link;

#endif
