/* nccl_link.c: on several ranks (ranks.bash): mpi/nccl_link.c over an NCCL that is none: MPI carries what it asks for, at once, and memory of the host
 * stands for a device's. Sums are those of host memory, in teams too; all that NCCL connects late is connected when a communicator is opened. With an
 * argument, a failure of rank 1 has to end all ranks: in opening, while the others wait in it (init), or later, while they wait for the device (later). */
#include "nccl_link.h"

#include <nccl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "cuda/backend.h"

static struct world world;
static const char *failure = "";

/* ---- NCCL ---- */

enum { MOST_RANKS = 8 };

struct ncclComm {
  MPI_Comm carrier;
  bool met[MOST_RANKS]; /* partners that are connected */
};

static MPI_Comm opening;  /* of the ranks that open a communicator */
static bool open_already; /* what is connected now is connected late */
static int open_communicators;

static struct {
  ncclComm_t comm; /* NULL: nothing is asked for */
  const void *mine;
  void *theirs;
  size_t mine_count, theirs_count;
  int partner;
} group;

const char *ncclGetErrorString(ncclResult_t result) {
  return result == ncclSuccess ? "no error" : "made up";
}

const char *ncclGetLastError(ncclComm_t comm) {
  (void)comm;
  return "by the test";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 7, sizeof *id);
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
  if (strcmp(failure, "init") == 0 && rank == 1) return ncclSystemError;
  for (size_t i = 0; i < sizeof id.internal; i++) assert_int_equal(id.internal[i], 7);
  *comm = calloc(1, sizeof **comm);
  assert_non_null(*comm);
  MPI_Comm_dup(opening, &(*comm)->carrier); /* waits for all, as NCCL does */
  int mpi_size, mpi_rank;
  MPI_Comm_size((*comm)->carrier, &mpi_size);
  MPI_Comm_rank((*comm)->carrier, &mpi_rank);
  assert_int_equal(size, mpi_size);
  assert_int_equal(rank, mpi_rank);
  open_communicators++;
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  MPI_Comm_free(&comm->carrier);
  free(comm);
  open_communicators--;
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *result) {
  (void)comm;
  *result = strcmp(failure, "later") == 0 && world.rank == 1 && open_already ? ncclRemoteError : ncclSuccess;
  return ncclSuccess;
}

ncclResult_t ncclGroupStart(void) {
  memset(&group, 0, sizeof group);
  return ncclSuccess;
}

static void meet(ncclComm_t comm, int partner) {
  assert_true(!group.comm || (group.comm == comm && group.partner == partner));
  assert_true(comm->met[partner] || !open_already);
  group.comm = comm;
  group.partner = partner;
  comm->met[partner] = true;
}

ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int to, ncclComm_t comm, cudaStream_t stream) {
  (void)stream;
  assert_int_equal(type, ncclFloat);
  meet(comm, to);
  group.mine = from;
  group.mine_count = count;
  return ncclSuccess;
}

ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int from, ncclComm_t comm, cudaStream_t stream) {
  (void)stream;
  assert_int_equal(type, ncclFloat);
  meet(comm, from);
  group.theirs = to;
  group.theirs_count = count;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
  if (!group.comm) return ncclSuccess;
  MPI_Sendrecv(group.mine, (int)group.mine_count, MPI_FLOAT, group.mine ? group.partner : MPI_PROC_NULL, 0, group.theirs,
               (int)group.theirs_count, MPI_FLOAT, group.theirs ? group.partner : MPI_PROC_NULL, 0, group.comm->carrier, MPI_STATUS_IGNORE);
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  (void)stream;
  assert_true(from == to && type == ncclFloat && op == ncclMax);
  MPI_Allreduce(MPI_IN_PLACE, to, (int)count, MPI_FLOAT, MPI_MAX, comm->carrier);
  return ncclSuccess;
}

ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  (void)stream;
  assert_ptr_equal(from, to);
  MPI_Bcast(to, (int)(count * (type == ncclFloat ? sizeof(float) : 1)), MPI_BYTE, root, comm->carrier);
  return ncclSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  (void)stream;
  return cudaSuccess;
}

/* ---- a device ---- */

enum { FLOATS = 1 << 20 };
static float memory[FLOATS];
static size_t taken; /* floats */

static void *allocate(struct kernels *k, size_t bytes) {
  (void)k;
  float *at = memory + taken;
  taken += (bytes / sizeof *at + 31) / 32 * 32;
  assert_true(taken <= FLOATS);
  return at;
}

static void release(struct kernels *k, void *at) {
  (void)k;
  if (at) taken = (size_t)((float *)at - memory); /* the last one */
}

static bool owns(struct kernels *k, const void *at) {
  (void)k;
  return (const float *)at >= memory && (const float *)at < memory + FLOATS;
}

static int synchronize(struct kernels *k, struct error *error) {
  (void)k;
  return error->code;
}

static void add(struct kernels *k, float *to, const float *from, int64_t count) {
  (void)k;
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

static struct backend state;
static struct kernels kernels = {.name = "device",
                                 .state = &state,
                                 .link = &nccl_link,
                                 .allocate = allocate,
                                 .release = release,
                                 .owns = owns,
                                 .synchronize = synchronize,
                                 .add = add};

/* ---- the tests ---- */

static void check_sums(struct world *of) {
  const size_t counts[] = {1, 1000, 4096, 100003};
  static float given[100003], sum[100003], largest[100003], scratch[100003];
  struct world plain = *of;
  plain.device = NULL;
  for (int c = 0; c < 4; c++) {
    size_t n = counts[c];
    uint32_t random = 100 + (uint32_t)world.rank;
    for (size_t i = 0; i < n; i++) { /* of two sizes, so that the order of sums shows */
      random = random * 1664525U + 1013904223U;
      given[i] = sum[i] = largest[i] = (float)(random >> 8) * (i % 7 ? 0x1p-24F : 1);
    }
    world_allreduce(&plain, sum, n, scratch);
    world_largest(&plain, largest, n);
    float *values = allocate(&kernels, n * sizeof *values), *room = allocate(&kernels, n * sizeof *room);
    memcpy(values, given, n * sizeof *values);
    world_allreduce(of, values, n, room);
    assert_memory_equal(values, sum, n * sizeof *values);
    memcpy(values, given, n * sizeof *values);
    world_largest(of, values, n);
    assert_memory_equal(values, largest, n * sizeof *values);
    release(&kernels, values);
  }
}

static void check_broadcast(struct world *of) {
  const struct stream_link *link = device_stream_link(of);
  struct lane lane = {0};
  unsigned char *bytes = allocate(&kernels, 1001);
  assert_non_null(link);
  memset(bytes, of->rank == 0 ? 5 : 0, 1001);
  link->broadcast(link->context, &lane, bytes, 1001);
  for (int i = 0; i < 1001; i++) assert_int_equal(bytes[i], 5);
  release(&kernels, bytes);
}

static void check(struct world *of) {
  struct error error = {0};
  opening = of->communicator;
  open_already = false;
  device_open(of, &kernels, &error);
  if (world_agree(&world, &error)) fail_msg("%s", error.message);
  assert_int_equal(open_communicators, of->size > 1);
  open_already = true;
  check_sums(of);
  if (of->size > 1) check_broadcast(of);
  device_close(of);
  assert_int_equal(open_communicators, 0);
}

static void in_the_world_and_in_teams(void **context) {
  (void)context;
  struct world team;
  check(&world);
  if (world.size % 2) return;
  world_join_team(&world, 2, &team);
  check(&team);
  world_leave_team(&team);
}

/* Returns where no failure has ended the process. */
static int run_to_failure(void) {
  struct error error = {0};
  world_watch(&world);
  opening = world.communicator;
  device_open(&world, &kernels, &error);
  open_already = true;
  sleep(60); /* for the device, whose partner says nothing */
  return 0;
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(in_the_world_and_in_teams)};
  struct error error = {0};
  if (world_init(&world, &argc, &argv, &error) || world.size > MOST_RANKS) return 2;
  failure = argc > 1 ? argv[1] : "";
  int failed = *failure ? run_to_failure() : cmocka_run_group_tests(tests, NULL, NULL);
  world_finalize(&world);
  return failed;
}
