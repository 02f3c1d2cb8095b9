/* nccl_link.c: exchanges between devices. A thread asks once a second whether NCCL has met a failure, since the stream would only wait, or the device,
 * for which other ranks' streams would; a dead peer that leaves NCCL waiting in silence is found by the ranks' watch (watch.h). */
#include "nccl_link.h"

#include <nccl.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "cuda/backend.h"
#include "tree.h"

struct nccl {
  ncclComm_t communicator;
  struct kernels *k; /* whose stream takes what is asked for */
  struct world *world;
  cudaStream_t idle; /* nothing is asked of it: what it says of itself is how the device is */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t end;
  bool ending, started;
};

static void end_all(struct nccl *nccl, ncclResult_t code, const char *what) {
  struct error error = {0};
  error_set(&error, ERROR_WORK, "rank %d: NCCL %s failed: %s (%s)", nccl->world->rank, what, ncclGetErrorString(code),
            ncclGetLastError(nccl->communicator));
  world_abort(nccl->world, &error);
}

/* The others' streams may wait for what this rank's device has not sent, and so the ranks would never agree on its failure. */
static void end_for_device(struct nccl *nccl, cudaError_t code) {
  struct error error = {0};
  error_set(&error, ERROR_WORK, "rank %d: CUDA: the device failed: %s", nccl->world->rank, cudaGetErrorString(code));
  world_abort(nccl->world, &error);
}

static cudaStream_t stream_of(const struct nccl *nccl) {
  return nccl->k->state->stream;
}

static void require(struct nccl *nccl, ncclResult_t code, const char *what) {
  if (code != ncclSuccess && code != ncclInProgress) end_all(nccl, code, what);
}

static void *look_for_failures(void *context) {
  struct nccl *nccl = context;
  cudaSetDevice(nccl->k->state->device);
  pthread_mutex_lock(&nccl->lock);
  while (!nccl->ending) {
    struct timespec until;
    ncclResult_t state = ncclSuccess;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec++;
    pthread_cond_timedwait(&nccl->end, &nccl->lock, &until);
    if (nccl->ending) break;
    require(nccl, ncclCommGetAsyncError(nccl->communicator, &state), "query");
    require(nccl, state, "exchange");
    cudaError_t code = cudaStreamQuery(nccl->idle);
    if (code != cudaSuccess) end_for_device(nccl, code);
  }
  pthread_mutex_unlock(&nccl->lock);
  return NULL;
}

static void nccl_exchange(void *state, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner) {
  struct nccl *nccl = state;
  require(nccl, ncclGroupStart(), "group");
  if (mine_count) require(nccl, ncclSend(mine, mine_count, ncclFloat, partner, nccl->communicator, stream_of(nccl)), "send");
  if (theirs_count) require(nccl, ncclRecv(theirs, theirs_count, ncclFloat, partner, nccl->communicator, stream_of(nccl)), "receive");
  require(nccl, ncclGroupEnd(), "exchange");
}

static void nccl_largest(void *state, float *values, size_t count) {
  struct nccl *nccl = state;
  require(nccl, ncclAllReduce(values, values, count, ncclFloat, ncclMax, nccl->communicator, stream_of(nccl)), "allreduce");
}

static void nccl_broadcast(void *state, struct lane *lane, void *bytes, size_t count) {
  struct nccl *nccl = state;
  require(nccl, ncclBroadcast(bytes, bytes, count, ncclChar, 0, nccl->communicator, (cudaStream_t)lane->stream), "broadcast");
}

static void keep(void *context, float *values, const float *other, size_t count) {
  (void)context, (void)values, (void)other, (void)count;
}

/* Each kind of operation once, and what NCCL does in another way the longer it is (broadcasts always go round a ring) at every length. The first ones
 * connect the ranks, which wait for each other on the host meanwhile, and take NCCL's buffers, which may be more than a gigabyte: before what is free is
 * dealt out to samples. */
static int connect_ranks(struct nccl *nccl, struct kernels *k, struct error *error) {
  enum { COUNT = 64, LONGEST = 1 << 18 /* more than a block has columns */ };
  const struct tree_link link = {nccl, nccl_exchange, keep};
  const struct world *world = nccl->world;
  float *values = k->allocate(k, LONGEST * sizeof *values);
  if (!values) {
    error_set(error, ERROR_WORK, "rank %d: out of memory on %s for NCCL", world->rank, k->name);
    world_abort(nccl->world, error); /* the others wait in what follows */
  }
  tree_sum(&link, world->rank, world->size, values, COUNT, values + COUNT);
  for (size_t count = COUNT; count <= LONGEST; count *= 4) nccl_largest(nccl, values, count);
  require(nccl, ncclBroadcast(values, values, COUNT, ncclFloat, 0, nccl->communicator, stream_of(nccl)), "broadcast");
  k->synchronize(k, error);
  k->release(k, values);
  return error->code;
}

static int nccl_open(struct world *world, struct kernels *k, void **opened, struct error *error) {
  ncclUniqueId id = {{0}};
  struct nccl *nccl = calloc(1, sizeof *nccl);
  cudaStream_t idle = NULL;
  cudaError_t opening = cudaStreamCreateWithFlags(&idle, cudaStreamNonBlocking);
  ncclResult_t code = world->rank == 0 ? ncclGetUniqueId(&id) : ncclSuccess;
  if (!nccl) error_set(error, ERROR_WORK, "rank %d: out of memory for NCCL", world->rank);
  if (opening != cudaSuccess)
    error_set(error, ERROR_WORK, "rank %d: CUDA: opening a stream failed: %s", world->rank, cudaGetErrorString(opening));
  if (code != ncclSuccess)
    error_set(error, ERROR_WORK, "NCCL cannot start: %s (%s); NCCL_DEBUG=INFO tells more", ncclGetErrorString(code),
              ncclGetLastError(NULL));
  world_broadcast(world, &id, sizeof id);
  if (world_agree(world, error) || !nccl) { /* what follows waits for all ranks, and moves no message of MPI's on: all have the id */
    if (idle) cudaStreamDestroy(idle);
    free(nccl);
    return error->code;
  }
  *opened = nccl;
  *nccl = (struct nccl){.world = world, .k = k, .idle = idle, .lock = PTHREAD_MUTEX_INITIALIZER, .end = PTHREAD_COND_INITIALIZER};
  code = ncclCommInitRank(&nccl->communicator, world->size, id, world->rank);
  if (code != ncclSuccess) {
    error_set(error, ERROR_WORK, "rank %d: NCCL cannot connect the ranks: %s (%s); each needs a GPU of its own; NCCL_DEBUG=INFO tells more",
              world->rank, ncclGetErrorString(code), ncclGetLastError(NULL));
    world_abort(world, error); /* the others may wait for this one in NCCL, which has no limit of time */
  }
  if (pthread_create(&nccl->thread, NULL, look_for_failures, nccl)) {
    error_set(error, ERROR_WORK, "rank %d: no thread can be started to watch NCCL", world->rank);
    world_abort(world, error); /* the others wait in what follows */
  }
  nccl->started = true;
  return connect_ranks(nccl, k, error);
}

static void nccl_close(void *state) {
  struct nccl *nccl = state;
  if (!nccl) return;
  cudaError_t code = cudaStreamSynchronize(stream_of(nccl)); /* what was asked for has to be over before the communicator goes */
  if (code != cudaSuccess) end_for_device(nccl, code);
  if (nccl->started) {
    pthread_mutex_lock(&nccl->lock);
    nccl->ending = true;
    pthread_cond_signal(&nccl->end);
    pthread_mutex_unlock(&nccl->lock);
    pthread_join(nccl->thread, NULL);
  }
  if (nccl->communicator) ncclCommDestroy(nccl->communicator);
  cudaStreamDestroy(nccl->idle);
  free(nccl);
}

const struct device_link nccl_link = {nccl_open, nccl_close, nccl_exchange, nccl_largest, nccl_broadcast};
