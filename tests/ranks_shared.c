/* ranks_shared.c: on several ranks (ranks.bash): memory that a node's ranks have in common is one, in the whole world and in teams; what one writes
 * the others read behind a barrier, and not before; a block in it has the tensors of a block by itself, bit for bit; where it cannot be had all
 * ranks know. */
#include "fixture.h"
#include "lwc.h"
#include "shared.h"

static struct world world;

static void parts_are_all_there_is(void **context) {
  (void)context;
  const int64_t counts[] = {0, 1, 7, 1000, (int64_t)1 << 40};
  struct shared shared;
  shared_open(&shared, &world, 64);
  for (int i = 0; i < 5; i++) {
    int64_t first, end;
    shared_part(&shared, counts[i], &first, &end);
    assert_true(0 <= first && first <= end && end <= counts[i]);
    double sum = world_sum(&world, (double)(end - first));
    assert_true(sum == (double)counts[i] * (world.size == world.local_size ? 1 : world.size));
    shared_part(&(struct shared){0}, counts[i], &first, &end);
    assert_true(first == 0 && end == counts[i]);
  }
  shared_close(&shared);
}

/* Each writes its part of every round's numbers, and reads all. */
static void check_rounds(struct world *of, uint32_t seed) {
  enum { COUNT = 1003, ROUNDS = 300 };
  struct shared shared;
  int64_t first, end;
  shared_open(&shared, of, COUNT * sizeof(uint32_t));
  assert_int_equal(shared.memory != NULL, of->local_size > 1);
  volatile uint32_t *number = shared.memory;
  for (int i = 0; number && i < COUNT; i++) assert_int_equal(number[i], 0);
  shared_part(&shared, COUNT, &first, &end);
  for (uint32_t round = 0; number && round < ROUNDS; round++) {
    shared_barrier(&shared);
    for (int64_t i = first; i < end; i++) number[i] = seed + round * COUNT + (uint32_t)i;
    shared_barrier(&shared);
    for (int64_t i = 0; i < COUNT; i++) assert_int_equal(number[i], seed + round * COUNT + (uint32_t)i);
  }
  shared_close(&shared);
}

static void memory_is_one(void **context) {
  (void)context;
  check_rounds(&world, 1);
  if (world.size % 2) return;
  struct world team;
  int number = world_join_team(&world, 2, &team);
  assert_int_equal(team.local_size, world.local_size / 2);
  check_rounds(&team, 1000000u * (uint32_t)(number + 1));
  world_leave_team(&team);
}

/* ---- blocks ---- */

static void check_same_tensors(struct memory *m, const struct block *a, const struct block *b) {
  for (int i = 0; i < a->model->tensors; i++) {
    int64_t count = a->model->tensor[i].rows * a->model->tensor[i].columns;
    for (int which = BLOCK_FULL; which <= BLOCK_QUANTIZED; which++)
      assert_memory_equal(fetched_data(m, block_tensor(a, (enum block_weights)which, i), count),
                          fetched_data(m, block_tensor(b, (enum block_weights)which, i), count), (size_t)count * sizeof(float));
  }
}

/* Two blocks' images and three sets of factors in turn, into one block in common memory and one that is alone. */
static void check_block(const char *folder) {
  struct error error = {0};
  struct kernels *k = kernels_open("cpu", 1, 0, &error);
  struct memory m = {.k = k};
  struct fixture f;
  struct block own, common;
  struct lwc lwc;
  struct let none = {.k = k};
  struct recipe recipe;
  struct block_use use = {.tokens = TOKENS, .effective = true};
  fixture_open(&f, folder, "expected.safetensors");
  recipe_init(&recipe);
  recipe.wbits = 3;
  recipe.group_size = 32;
  if (block_init(&own, &f.model, k, &use, &error)) fail_msg("%s", error.message);
  shared_open(&use.weights_in, &world, (size_t)f.model.elements * k->element_bytes);
  shared_open(&use.effective_in, &world, (size_t)f.model.elements * k->element_bytes);
  if (block_init(&common, &f.model, k, &use, &error) || lwc_init(&lwc, &f.model, k, &recipe, &error)) fail_msg("%s", error.message);
  for (int round = 0; round < 6; round++) {
    block_load(&own, f.image[round % BLOCKS]);
    block_load(&common, f.image[round % BLOCKS]);
    k->fill(k, lwc.factor, 1.0f - 0.1f * (float)round, 2 * lwc.groups);
    lwc_quantize(&lwc, &own, &none, lwc.factor, round % 2);
    lwc_quantize(&lwc, &common, &none, lwc.factor, round % 2);
    check_same_tensors(&m, &own, &common);
  }
  lwc_free(&lwc);
  block_free(&own);
  block_free(&common);
  shared_close(&use.weights_in);
  shared_close(&use.effective_in);
  fixture_close(&f);
  memory_free(&m);
  k->close(k);
}

static void a_block_in_common_is_that_of_one_alone(void **context) {
  (void)context;
  check_block("llama_gqa_tied");
  check_block("mixtral"); /* with a router, which each has by itself */
}

/* More than a process can have; then it does not matter that nothing is in common. */
static void what_cannot_be_had_is_nobodys(void **context) {
  (void)context;
  struct shared shared;
  int64_t first, end;
  shared_open(&shared, &world, (size_t)1 << 60);
  assert_null(shared.memory);
  shared_barrier(&shared);
  shared_part(&shared, 10, &first, &end);
  assert_true(first == 0 && end == 10);
  shared_close(&shared);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(parts_are_all_there_is),
      cmocka_unit_test(memory_is_one),
      cmocka_unit_test(a_block_in_common_is_that_of_one_alone),
      cmocka_unit_test(what_cannot_be_had_is_nobodys),
  };
  struct error error = {0};
  if (world_init(&world, &argc, &argv, &error)) return 1;
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  world_finalize(&world);
  return failed;
}
