/* nccl_link.c: on several ranks (ranks.bash): mpi/nccl_link.c over an NCCL that is none: MPI carries what it asks for, at once, and memory of the host
 * stands for a device's. Sums are those of host memory, in teams too; all that NCCL connects late is connected when a communicator is opened. With an
 * argument, a failure of rank 1 has to end all ranks: in opening, while the others wait in it (init), or later, while they wait for the device (later),
 * also one of its device, of which NCCL says nothing (device). */
#include "nccl_link.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include <cuda_runtime.h>

#include "cuda/backend.h"
#include "nccl_over_mpi.h"

static struct world world;

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
  device_open(of, &kernels, &error);
  if (world_agree(&world, &error)) fail_msg("%s", error.message);
  assert_int_equal(nccl_communicators, of->size > 1);
  check_sums(of);
  if (of->size > 1) check_broadcast(of);
  device_close(of);
  assert_int_equal(nccl_communicators, 0);
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
  device_open(&world, &kernels, &error);
  sleep(60); /* for the device, whose partner says nothing */
  return 0;
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(in_the_world_and_in_teams)};
  struct error error = {0};
  if (world_init(&world, &argc, &argv, &error)) return 2;
  nccl_failure = argc > 1 ? argv[1] : "";
  int failed = *nccl_failure ? run_to_failure() : cmocka_run_group_tests(tests, NULL, NULL);
  world_finalize(&world);
  return failed;
}
