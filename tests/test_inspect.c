/* test_inspect.c: what inspect prints of a store with a block missing, losses not measured, times of one block only and two kinds of groups;
 * bits a weight are checked against counting by hand. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "inspect.h"
#include "store.h"

static char folder[] = "/tmp/omniquant-inspect-XXXXXX", experts[] = "/tmp/omniquant-inspect-XXXXXX";

/* Writes block `index` with one linear of 2 rows by 10 columns: 3 bits in groups of 4 (the last short), or 4 bits per channel. */
static void write_block(struct store *store, int index, bool grouped, int untrained) {
  static uint8_t codes[2 * 5], zero_point[2 * 3];
  static uint16_t scale[2 * 3];
  static float seconds[2 * 3] = {0.25f, 1, 0.25f, 0.5f, 0.5f, 0.5f}; /* rank 0 works for a second, rank 1 waits for it */
  struct quantized_linear linear = {.name = "mlp.up_proj",
                                    .out_features = 2,
                                    .in_features = 10,
                                    .bits = grouped ? 3 : 4,
                                    .group_size = grouped ? 4 : 10,
                                    .codes = codes,
                                    .scale = scale,
                                    .zero_point = zero_point};
  struct block_record record = {.index = index,
                                .loss_rtn = 0.25,
                                .loss_start = grouped ? 0.125 : NAN,
                                .loss_end = grouped ? 0.0625 : NAN,
                                .kept = "rtn",
                                .skipped_steps = grouped ? 3 : 0,
                                .untrained_experts = untrained,
                                .seconds = 1.5,
                                .world_size = 2,
                                .linears = 1,
                                .linear = &linear};
  if (grouped) {
    record.timing = (struct named_array){.name = "timing", .dimensions = 2, .shape = {2, 3}, .values = seconds};
    strcpy(record.phases, "wait,steps,ranks");
  }
  struct error error = {0};
  struct block_image image;
  if (block_image_make(&image, &record, store_info(store), "test", &error) || store_write_block(store, &image, &error))
    fail_msg("%s", error.message);
  block_image_free(&image);
}

/* A model of 3 blocks of which 0 and 2 are stored. */
static int make_store(char *path, int untrained) {
  struct store_info info = {.model_type = "llama", .recipe = "{\"wbits\": 3, \"lwc_lr\": 0.01, \"sampling\": \"random\"}", .blocks = 3};
  struct store *store;
  struct error error = {0};
  info.model_config = "{}";
  memset(info.tokens_sha256, 'a', 64);
  if (mkdtemp(path) == NULL || store_create(path, &info, &store, &error)) return -1;
  write_block(store, 0, true, 0);
  write_block(store, 2, false, untrained);
  return store_close(store, &error);
}

static int make_stores(void **state) {
  (void)state;
  return make_store(folder, 0) || make_store(experts, 5);
}

static int remove_stores(void **state) {
  (void)state;
  char command[100];
  snprintf(command, sizeof command, "rm -r %s %s", folder, experts);
  return system(command);
}

/* What inspect prints; freed by the caller. */
static char *inspected(const char *path, bool json) {
  char *text = NULL;
  size_t bytes;
  FILE *terminal = stdout;
  struct error error = {0};
  stdout = open_memstream(&text, &bytes);
  inspect(path, json, &error);
  fclose(stdout);
  stdout = terminal;
  if (error.code != 0) fail_msg("%s", error.message);
  return text;
}

static void test_json(void **state) {
  (void)state;
  char *text = inspected(folder, true);
  json_t *object = json_loads(text, 0, NULL), *blocks = json_object_get(object, "blocks");
  assert_non_null(object);
  assert_string_equal(json_string_value(json_object_get(object, "model_type")), "llama");
  assert_int_equal(json_integer_value(json_object_get(json_object_get(object, "recipe"), "wbits")), 3);
  assert_int_equal(json_integer_value(json_object_get(object, "blocks_of_model")), 3);
  assert_int_equal(json_integer_value(json_object_get(object, "blocks_stored")), 2);
  assert_int_equal(json_integer_value(json_object_get(object, "weights")), 40);
  assert_true(json_real_value(json_object_get(object, "seconds")) == 3);
  assert_int_equal(json_array_size(blocks), 2);
  json_t *first = json_array_get(blocks, 0), *second = json_array_get(blocks, 1);
  /* A row of 10 codes of 3 bits is 4 bytes, with 3 groups of 24 bits; of 4 bits 5 bytes, with one group. */
  assert_true(fabs(json_real_value(json_object_get(first, "bits_a_weight")) - (32 + 3 * 24) / 10.0) < 1e-6);
  assert_true(fabs(json_real_value(json_object_get(second, "bits_a_weight")) - (40 + 24) / 10.0) < 1e-6);
  assert_true(fabs(json_real_value(json_object_get(object, "bits_a_weight")) - (104 + 64) / 20.0) < 1e-6);
  assert_true(json_real_value(json_object_get(first, "loss_end")) == 0.0625);
  assert_int_equal(json_integer_value(json_object_get(first, "skipped_steps")), 3);
  assert_true(json_is_integer(json_object_get(first, "untrained_experts")));
  assert_int_equal(json_integer_value(json_object_get(first, "untrained_experts")), 0);
  json_t *timing = json_object_get(first, "timing"), *seconds = json_object_get(timing, "seconds");
  assert_string_equal(json_string_value(json_array_get(json_object_get(timing, "phases"), 1)), "steps");
  assert_true(json_array_size(json_object_get(timing, "phases")) == 3 && json_array_size(seconds) == 2);
  assert_true(json_real_value(json_array_get(json_array_get(seconds, 0), 1)) == 1);
  assert_true(json_real_value(json_array_get(json_array_get(seconds, 1), 2)) == 0.5);
  assert_true(json_is_null(json_object_get(second, "timing")));
  assert_int_equal(json_integer_value(json_object_get(second, "index")), 2);
  assert_true(json_is_null(json_object_get(second, "loss_end")));
  assert_string_equal(json_string_value(json_object_get(second, "kept")), "rtn");
  assert_int_equal(strcspn(text, "\n") + 1, strlen(text)); /* one line */
  json_decref(object);
  free(text);
}

static void test_table(void **state) {
  (void)state;
  char *text = inspected(folder, false);
  const char *expected = "model   llama, 3 blocks\n"
                         "recipe  wbits 3  lwc_lr 0.01  sampling random\n"
                         "tokens  SHA-256 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n\n"
                         "block   loss rtn loss start   loss end  kept  skipped  bits a weight  seconds\n"
                         "    0       0.25      0.125     0.0625  rtn         3        10.4000      1.5\n"
                         "    2       0.25          -          -  rtn         0         6.4000      1.5\n\n"
                         "2 of 3 blocks, 40 weights of 8.4000 bits, 3.0 s\n\n"
                         "seconds            wait     steps     ranks\n"
                         "mean of ranks       0.4       0.8       0.4\n"
                         "least               0.2       0.5       0.2\n"
                         "most                0.5       1.0       0.5\n"
                         "rank 0 has worked longest, 1.0 s without waiting\n";
  assert_string_equal(text, expected);
  free(text);
}

/* Experts that were not trained are shown where there are any. */
static void test_untrained_experts(void **state) {
  (void)state;
  char *table = inspected(experts, false), *text = inspected(experts, true);
  const char *expected = "block   loss rtn loss start   loss end  kept  skipped  untrained experts  bits a weight  seconds\n"
                         "    0       0.25      0.125     0.0625  rtn         3                  0        10.4000      1.5\n"
                         "    2       0.25          -          -  rtn         0                  5         6.4000      1.5\n";
  assert_non_null(strstr(table, expected));
  json_t *object = json_loads(text, 0, NULL), *second = json_array_get(json_object_get(object, "blocks"), 1);
  assert_int_equal(json_integer_value(json_object_get(second, "untrained_experts")), 5);
  json_decref(object);
  free(table);
  free(text);
}

static void test_no_store(void **state) {
  (void)state;
  struct error error = {0};
  assert_int_equal(inspect("no-such-folder", false, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, "no-such-folder"));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_json), cmocka_unit_test(test_table), cmocka_unit_test(test_untrained_experts),
                                     cmocka_unit_test(test_no_store)};
  return cmocka_run_group_tests(tests, make_stores, remove_stores);
}
