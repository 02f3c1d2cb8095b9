/* cuda_allreduce.c: on several ranks (ranks.bash): sums and extremes of device memory over the ranks are those of host memory, bit for
 * bit, in the whole world and in teams. */
#include "cuda_ranks.h"
#include "device.h"

static struct world world;

/* Of every rank other numbers, of sizes from 1e-6 to 1e6, so that the order of sums shows. */
static float *values_of_rank(struct memory *m, int64_t count) {
  uint64_t state = 100 + (uint64_t)world.rank;
  float *values = random_floats(m, &state, count);
  for (int64_t i = 0; i < count; i++) values[i] *= (float)pow(10, (double)((i * 7 + world.rank * 5) % 13) - 6);
  return values;
}

static float *copied(struct memory *m, const float *values, int64_t count) {
  return memcpy(host_floats(m, count), values, (size_t)count * sizeof *values);
}

static void check(struct world *of, struct kernels *k) {
  const int64_t counts[] = {1, 1000, 100003};
  for (int i = 0; i < 3; i++) {
    struct memory m = {.k = k};
    int64_t n = counts[i];
    size_t bytes = (size_t)n * sizeof(float);
    struct world plain = *of;
    plain.device = NULL;
    float *values = values_of_rank(&m, n), *sum = copied(&m, values, n), *largest = copied(&m, values, n), *scratch = host_floats(&m, n);
    world_allreduce(&plain, sum, (size_t)n, scratch);
    world_largest(&plain, largest, (size_t)n);
    for (int run = 0; run < 2; run++) {
      float *dev = device_floats(&m, values, n), *dev_largest = device_floats(&m, values, n), *room = poisoned_floats(&m, n);
      world_allreduce(of, dev, (size_t)n, room);
      world_largest(of, dev_largest, (size_t)n);
      assert_memory_equal(fetched_floats(&m, dev, n), sum, bytes);
      assert_memory_equal(fetched_floats(&m, dev_largest, n), largest, bytes);
      float *host_values = copied(&m, values, n); /* which the device does not own */
      world_allreduce(of, host_values, (size_t)n, scratch);
      assert_memory_equal(host_values, sum, bytes);
    }
    memory_free(&m);
  }
}

static void sums_of_device_memory(void **context) {
  (void)context;
  struct error error = {0};
  struct kernels *k = CUDA_OPEN(world.local_rank, &error);
  if (world_agree(&world, &error) || !k) fail_msg("%s", error.message);
  device_open(&world, k, &error);
  if (world_agree(&world, &error)) fail_msg("%s", error.message);
  check(&world, k);
  device_close(&world);
  if (world.size % 2 == 0 && world.size > 2) {
    struct world team;
    world_join_team(&world, 2, &team);
    device_open(&team, k, &error);
    if (world_agree(&world, &error)) fail_msg("%s", error.message);
    check(&team, k);
    device_close(&team);
    world_leave_team(&team);
  }
  k->close(k);
}

int main(int argc, char **argv) {
  return run_on_ranks(&world, argc, argv, (struct CMUnitTest)cmocka_unit_test(sums_of_device_memory));
}
