/* device.c: what carries sums of device memory over the ranks, and blocks: NCCL, or copies through the host. */
#include "device.h"

#include <stdlib.h>
#include <string.h>

#ifdef OMNIQUANT_NCCL
#include "nccl_link.h"
#include "tree.h"
#endif

struct device {
  struct kernels *k;
  struct nccl *nccl; /* NULL: through the host */
  struct stream_link link;
  float *host; /* grown as needed; twice what is summed */
  size_t host_count;
};

int device_open(struct world *world, struct kernels *k, struct error *error) {
  if (world->size == 1 || !k->owns) return 0;
  world->device = calloc(1, sizeof *world->device);
  if (!world->device) return error_set(error, ERROR_WORK, "rank %d: out of memory for sums over ranks", world->rank);
  world->device->k = k;
#ifdef OMNIQUANT_NCCL
  if (strcmp(k->name, "cuda") == 0) return nccl_open(world, k, &world->device->nccl, error);
#endif
  return 0;
}

void device_close(struct world *world) {
  if (!world->device) return;
#ifdef OMNIQUANT_NCCL
  nccl_close(world->device->nccl);
#endif
  free(world->device->host);
  free(world->device);
  world->device = NULL;
}

bool device_owns(const struct device *device, const void *memory) {
  return device && device->k->owns(device->k, memory);
}

#ifdef OMNIQUANT_NCCL
static void broadcast(void *context, struct lane *lane, void *bytes, size_t count) {
  nccl_broadcast(context, lane, bytes, count);
}
#endif

const struct stream_link *device_link(const struct world *world) {
#ifdef OMNIQUANT_NCCL
  struct device *device = world->device;
  if (!device || !device->nccl) return NULL;
  device->link = (struct stream_link){device->nccl, broadcast};
  return &device->link;
#else
  (void)world;
  return NULL;
#endif
}

/* ---- through the host ---- */

/* Twice `count` floats of host memory; without them all ranks are ended, since the others wait in a collective. */
static float *host_room(struct world *world, size_t count) {
  struct device *device = world->device;
  if (count <= device->host_count) return device->host;
  free(device->host);
  device->host = malloc(2 * count * sizeof *device->host);
  device->host_count = count;
  if (device->host) return device->host;
  struct error error = {0};
  error_set(&error, ERROR_WORK, "rank %d: out of memory for sums over ranks (%zu bytes)", world->rank, 2 * count * sizeof *device->host);
  world_abort(world, &error);
}

static float *fetched(struct world *world, const float *values, size_t count) {
  float *host = host_room(world, count);
  world->device->k->download(world->device->k, host, values, count * sizeof *host);
  return host;
}

static void send_back(struct world *world, float *values, size_t count) {
  world->device->k->upload(world->device->k, values, world->device->host, count * sizeof *values);
}

static void allreduce_through_host(struct world *world, float *values, size_t count) {
  float *host = fetched(world, values, count);
  world_allreduce(world, host, count, host + count);
  send_back(world, values, count);
}

static void largest_through_host(struct world *world, float *values, size_t count) {
  world_largest(world, fetched(world, values, count), count);
  send_back(world, values, count);
}

/* ---- sums ---- */

#ifdef OMNIQUANT_NCCL
static void exchange(void *context, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner) {
  nccl_exchange(((struct device *)context)->nccl, mine, mine_count, theirs, theirs_count, partner);
}

static void add(void *context, float *values, const float *other, size_t count) {
  struct kernels *k = ((struct device *)context)->k;
  k->add(k, values, other, (int64_t)count);
}

void device_allreduce(struct world *world, float *values, size_t count, float *scratch) {
  struct tree_link link = {world->device, exchange, add};
  if (world->device->nccl)
    tree_sum(&link, world->rank, world->size, values, count, scratch);
  else
    allreduce_through_host(world, values, count);
}

void device_largest(struct world *world, float *values, size_t count) {
  if (world->device->nccl)
    nccl_largest(world->device->nccl, values, count);
  else
    largest_through_host(world, values, count);
}
#else
void device_allreduce(struct world *world, float *values, size_t count, float *scratch) {
  (void)scratch;
  allreduce_through_host(world, values, count);
}

void device_largest(struct world *world, float *values, size_t count) {
  largest_through_host(world, values, count);
}
#endif
