/* device_choice.c: on several ranks (ranks.bash): which backend they take together, with kernels_usable replaced by what a case says of each rank. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "device.h"

static struct world world;
static unsigned with_device; /* a bit a rank */

bool __wrap_kernels_usable(const char *name, int device, struct error *reason);
bool __wrap_kernels_usable(const char *name, int device, struct error *reason) {
  assert_string_equal(name, "cuda");
  assert_int_equal(device, world.local_rank);
  if (with_device >> world.rank & 1) return true;
  error_set(reason, ERROR_WORK, "it is broken");
  return false;
}

static void all_or_none(void **state) {
  (void)state;
  struct error error = {0};
  with_device = ~0u;
  assert_string_equal(device_choose(&world, "auto", &error), "cuda");
  assert_string_equal(device_choose(&world, "cpu", &error), "cpu");
  with_device = 0;
  assert_string_equal(device_choose(&world, "auto", &error), "cpu");
  assert_string_equal(device_choose(&world, "cuda", &error), "cuda"); /* opening it says why not */
  assert_int_equal(error.code, 0);
}

static void some(void **state) {
  (void)state;
  if (world.size == 1) return;
  for (int without = 0; without < world.size; without++) {
    struct error error = {0};
    char names[64], counts[64];
    with_device = ~(1u << without);
    snprintf(names, sizeof names, "rank %d on host ", without);
    snprintf(counts, sizeof counts, "%d of %d ranks have one: it is broken; ", world.size - 1, world.size);
    assert_null(device_choose(&world, "auto", &error));
    assert_int_equal(error.code, ERROR_INPUT);
    assert_true(strncmp(error.message, names, strlen(names)) == 0 && strstr(error.message, counts) &&
                strstr(error.message, "--backend cpu"));
  }
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(all_or_none), cmocka_unit_test(some)};
  struct error error = {0};
  if (world_init(&world, &argc, &argv, &error)) return 1;
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  world_finalize(&world);
  return failed;
}
