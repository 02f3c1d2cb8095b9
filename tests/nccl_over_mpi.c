/* nccl_over_mpi.c: a communicator's ranks are those that have its id. What connects ranks that NCCL has not connected before its first broadcast, which
 * ends the opening (nccl_link.c), is refused: it would be late. */
#include "nccl_over_mpi.h"

#include <mpi.h>
#include <nccl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_RANKS = 8 };
static int rank_of_all; /* of this process, once it has opened a communicator */

const char *nccl_failure = "";
int nccl_communicators;

struct ncclComm {
  MPI_Comm carrier;
  int rank;
  bool met[MOST_RANKS]; /* partners that are connected */
  size_t longest;       /* that was reduced: longer ones may go another way */
  bool opened;
};

static struct {
  ncclComm_t comm; /* NULL: nothing is asked for */
  const void *mine;
  void *theirs;
  size_t mine_count, theirs_count;
  int partner;
  cudaStream_t stream;
} group;

static void must(bool good, const char *what) {
  if (good) return;
  fprintf(stderr, "NCCL over MPI: %s\n", what);
  abort();
}

const char *ncclGetErrorString(ncclResult_t result) {
  return result == ncclSuccess ? "no error" : "made up";
}

const char *ncclGetLastError(ncclComm_t comm) {
  (void)comm;
  return "by the test";
}

/* A number, over and over. */
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  static int32_t count;
  int32_t number = (int32_t)getpid() % 100000 * 1000 + ++count;
  for (size_t i = 0; i < sizeof id->internal; i += sizeof number) memcpy(id->internal + i, &number, sizeof number);
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
  int32_t color, copy;
  int found_size, found_rank, of_all;
  MPI_Comm_rank(MPI_COMM_WORLD, &of_all);
  if (strcmp(nccl_failure, "init") == 0 && of_all == 1) return ncclSystemError;
  memcpy(&color, id.internal, sizeof color);
  for (size_t i = 0; i < sizeof id.internal; i += sizeof copy) {
    memcpy(&copy, id.internal + i, sizeof copy);
    must(copy == color, "the id is not whole");
  }
  *comm = calloc(1, sizeof **comm);
  must(*comm, "no memory");
  MPI_Comm_split(MPI_COMM_WORLD, color, rank, &(*comm)->carrier); /* waits for all, as NCCL does for a communicator's */
  MPI_Comm_size((*comm)->carrier, &found_size);
  MPI_Comm_rank((*comm)->carrier, &found_rank);
  must(size == found_size && rank == found_rank && size <= MOST_RANKS, "the ranks that have an id are not the communicator's");
  (*comm)->rank = rank_of_all = of_all;
  nccl_communicators++;
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  MPI_Comm_free(&comm->carrier);
  free(comm);
  nccl_communicators--;
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *result) {
  *result = strcmp(nccl_failure, "later") == 0 && comm->rank == 1 && comm->opened ? ncclRemoteError : ncclSuccess;
  return ncclSuccess;
}

cudaError_t cudaSetDevice(int device) {
  (void)device;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  (void)flags;
  *stream = NULL;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  (void)stream;
  return cudaSuccess;
}

/* Of a stream that nothing is asked of. */
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  (void)stream;
  return strcmp(nccl_failure, "device") == 0 && rank_of_all == 1 ? cudaErrorECCUncorrectable : cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : "made up";
}

ncclResult_t ncclGroupStart(void) {
  memset(&group, 0, sizeof group);
  return ncclSuccess;
}

static void meet(ncclComm_t comm, int partner, ncclDataType_t type, cudaStream_t stream) {
  must(type == ncclFloat, "exchanges are of floats");
  must(!group.comm || (group.comm == comm && group.partner == partner && group.stream == stream), "a group has one partner");
  must(comm->met[partner] || !comm->opened, "ranks are connected late");
  group.comm = comm;
  group.partner = partner;
  group.stream = stream;
  comm->met[partner] = true;
}

ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int to, ncclComm_t comm, cudaStream_t stream) {
  meet(comm, to, type, stream);
  group.mine = from;
  group.mine_count = count;
  return ncclSuccess;
}

ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int from, ncclComm_t comm, cudaStream_t stream) {
  meet(comm, from, type, stream);
  group.theirs = to;
  group.theirs_count = count;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
  if (!group.comm) return ncclSuccess;
  cudaStreamSynchronize(group.stream);
  MPI_Sendrecv(group.mine, (int)group.mine_count, MPI_FLOAT, group.mine ? group.partner : MPI_PROC_NULL, 0, group.theirs,
               (int)group.theirs_count, MPI_FLOAT, group.theirs ? group.partner : MPI_PROC_NULL, 0, group.comm->carrier, MPI_STATUS_IGNORE);
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  must(from == to && type == ncclFloat && op == ncclMax, "what is reduced are floats in place, to the largest");
  must(count <= comm->longest || !comm->opened, "a way of reducing is connected late");
  if (count > comm->longest) comm->longest = count;
  cudaStreamSynchronize(stream);
  MPI_Allreduce(MPI_IN_PLACE, to, (int)count, MPI_FLOAT, MPI_MAX, comm->carrier);
  return ncclSuccess;
}

ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  must(from == to, "what is broadcast stays in place");
  cudaStreamSynchronize(stream);
  MPI_Bcast(to, (int)(count * (type == ncclFloat ? sizeof(float) : 1)), MPI_BYTE, root, comm->carrier);
  comm->opened = true;
  return ncclSuccess;
}
