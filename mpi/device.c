/* device.c: which backend all ranks take, and what carries sums of device memory over them, and blocks: the backend's own link, or copies through the
 * host. */
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tree.h"

struct device {
  struct kernels *k;
  void *link;                /* of k->link; NULL: through the host */
  struct stream_link blocks; /* the same link, as the block stream asks it */
  float *host;               /* grown as needed; twice what is summed */
  size_t host_count;
};

/* ---- the choice ---- */

const char *device_choose(struct world *world, const char *asked, struct error *error) {
  struct error reason = {0};
  if (strcmp(asked, "auto") != 0) return asked;
  bool usable = kernels_usable("cuda", world->local_rank, &reason);
  int with = (int)world_sum(world, usable);
  if (with == 0) {
    if (reason.code && world->rank == 0) fprintf(stderr, "GPUs are not used: %s\n", reason.message);
    return "cpu";
  }
  if (with == world->size) return "cuda";
  if (!usable) {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    error_set(error, ERROR_INPUT,
              "rank %d on host %s has no GPU that it can use, while %d of %d ranks have one: %.600s; start every rank where there is one, "
              "or choose "
              "--backend cpu",
              world->rank, host, with, world->size, reason.code ? reason.message : "none is visible");
  }
  world_agree(world, error);
  return NULL;
}

/* ---- a world's device ---- */

int device_open(struct world *world, struct kernels *k, struct error *error) {
  if (world->size == 1 || !k->owns) return 0;
  world->device = calloc(1, sizeof *world->device);
  if (!world->device) return error_set(error, ERROR_WORK, "rank %d: out of memory for sums over ranks", world->rank);
  world->device->k = k;
  return k->link ? k->link->open(world, k, &world->device->link, error) : 0;
}

void device_close(struct world *world) {
  if (!world->device) return;
  if (world->device->link) world->device->k->link->close(world->device->link);
  free(world->device->host);
  free(world->device);
  world->device = NULL;
}

bool device_owns(const struct device *device, const void *memory) {
  return device && device->k->owns(device->k, memory);
}

static void broadcast(void *context, struct lane *lane, void *bytes, size_t count) {
  const struct device *device = context;
  device->k->link->broadcast(device->link, lane, bytes, count);
}

const struct stream_link *device_stream_link(const struct world *world) {
  struct device *device = world->device;
  if (!device || !device->link) return NULL;
  device->blocks = (struct stream_link){device, broadcast};
  return &device->blocks;
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

static void exchange(void *context, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner) {
  const struct device *device = context;
  device->k->link->exchange(device->link, mine, mine_count, theirs, theirs_count, partner);
}

static void add(void *context, float *values, const float *other, size_t count) {
  struct kernels *k = ((struct device *)context)->k;
  k->add(k, values, other, (int64_t)count);
}

void device_allreduce(struct world *world, float *values, size_t count, float *scratch) {
  struct tree_link link = {world->device, exchange, add};
  if (world->device->link)
    tree_sum(&link, world->rank, world->size, values, count, scratch);
  else
    allreduce_through_host(world, values, count);
}

void device_largest(struct world *world, float *values, size_t count) {
  if (world->device->link)
    world->device->k->link->largest(world->device->link, values, count);
  else
    largest_through_host(world, values, count);
}
