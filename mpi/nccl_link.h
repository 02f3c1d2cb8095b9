/* nccl_link.h: a communicator of NCCL over the ranks of a world, on the stream of their kernels. It runs asynchronously; a failure ends all ranks. */
#ifndef OMNIQUANT_NCCL_LINK_H
#define OMNIQUANT_NCCL_LINK_H

#include "kernels.h"
#include "world.h"

struct nccl;

/* Collective. Errors: ERROR_WORK, this rank's own. */
int nccl_open(struct world *world, struct kernels *k, struct nccl **nccl, struct error *error);
void nccl_close(struct nccl *nccl); /* NULL is allowed */

/* As tree_link has it. */
void nccl_exchange(struct nccl *nccl, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner);
void nccl_largest(struct nccl *nccl, float *values, size_t count);

/* As stream_link has it: on the lane's stream. */
void nccl_broadcast(struct nccl *nccl, struct lane *lane, void *bytes, size_t count);

#endif
