/* test_store.c: what is written is read back, appears whole or not at all, and nothing damaged or foreign is believed.
 * With OMNIQUANT_KEEP_STORE=DIR the store of the round trip is made at DIR and stays (tests/h5py_reads.sh). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <hdf5.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

#include "scratch.h"
#include "store.h"

static struct path folder;

/* LeakSanitizer asks for this: HDF5 leaks when it refuses a damaged file. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
  return "leak:libhdf5";
}

static int setup(void **state) {
  (void)state;
  folder = scratch_init();
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  return 0;
}

static int teardown(void **state) {
  (void)state;
  assert_int_equal(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
  scratch_free(&folder);
  return 0;
}

static struct store_info make_info(void) {
  return (struct store_info){.model_type = "llama",
                             .recipe = "{\"wbits\": 3}",
                             .model_config = "{\"model_type\": \"llama\", \"name\": \"caf\xc3\xa9\"}",
                             .tokens_sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
                             .model_sha256 = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210",
                             .blocks = 3};
}

/* ---- records ---- */

static struct quantized_linear make_linear(const char *name, int64_t out, int64_t in, int bits, int64_t group, bool symmetric) {
  struct quantized_linear linear = {.out_features = out, .in_features = in, .bits = bits, .group_size = group, .symmetric = symmetric};
  snprintf(linear.name, sizeof linear.name, "%s", name);
  int64_t codes = out * packed_row_bytes(in, bits), groups = out * ((in + group - 1) / group);
  linear.codes = malloc((size_t)codes);
  linear.scale = malloc((size_t)groups * 2);
  linear.zero_point = malloc((size_t)groups);
  assert_true(linear.codes && linear.scale && linear.zero_point);
  for (int64_t i = 0; i < codes; i++) linear.codes[i] = (uint8_t)(i * 37 + 11 * bits);
  for (int64_t i = 0; i < groups; i++) linear.scale[i] = (uint16_t)(0x2000 + i * 13 % 0x1c00);
  for (int64_t i = 0; i < groups; i++) linear.zero_point[i] = (uint8_t)(i % (1 << bits));
  return linear;
}

static struct named_array make_array(const char *name, int dimensions, int64_t rows, int64_t columns) {
  struct named_array array = {.dimensions = dimensions, .shape = {rows, columns}};
  snprintf(array.name, sizeof array.name, "%s", name);
  array.values = malloc((size_t)(rows * columns) * sizeof *array.values + 1);
  assert_non_null(array.values);
  for (int64_t i = 0; i < rows * columns; i++) array.values[i] = (float)i / 7 - 3;
  return array;
}

/* Names stand in the order in which they are read back. */
static struct block_record make_record(int index, int linears, int folded, int calibration) {
  struct block_record record = {.index = index, .loss_rtn = 0.5, .loss_start = NAN, .loss_end = 1.0 / 3, .kept = "end", .skipped_steps = 2};
  record.untrained_experts = 3;
  record.seconds = 12.25;
  record.world_size = 4;
  record.linear = calloc((size_t)linears + 1, sizeof *record.linear);
  record.folded = calloc((size_t)folded + 1, sizeof *record.folded);
  record.calibration = calloc((size_t)calibration + 1, sizeof *record.calibration);
  assert_true(record.linear && record.folded && record.calibration);
  record.linears = linears;
  record.folded_arrays = folded;
  record.calibration_arrays = calibration;
  record.timing = make_array("timing", 2, 4, 2);
  for (int i = 0; i < 4 * 2; i++) record.timing.values[i] = (float)i / 8;
  strcpy(record.phases, "wait,steps");
  return record;
}

static struct block_record make_small(int index) {
  struct block_record record = make_record(index, 1, 1, 1);
  record.linear[0] = make_linear("self_attn.q_proj", 4, 37, 3, 16, false);
  record.folded[0] = make_array("input_layernorm.weight", 1, 5, 1);
  record.calibration[0] = make_array("loss", 1, 2, 1);
  return record;
}

static struct block_record make_full(int index) {
  char longest[96];
  memset(longest, 'z', 95);
  longest[95] = 0;
  struct block_record record = make_record(index, 5, 2, 6);
  record.linear[0] = make_linear("block_sparse_moe.experts.63.w1", 3, 8, 4, 8, false);
  record.linear[1] = make_linear("mlp.down_proj", 3000, 1001, 4, 1001, true); /* several chunks */
  record.linear[2] = make_linear("self_attn.k_proj", 1, 1, 2, 128, false);
  record.linear[3] = make_linear("self_attn.q_proj", 5, 37, 3, 16, false);
  record.linear[4] = make_linear(longest, 2, 9, 8, 8, false);
  record.folded[0] = make_array("input_layernorm.weight", 1, 64, 1);
  record.folded[1] = make_array("mlp.gate.weight", 2, 3, 5);
  record.calibration[0] = make_array("attention_norm/s", 1, 64, 1);
  record.calibration[1] = make_array("block_sparse_moe.experts.63.w1/gamma", 2, 3, 1);
  record.calibration[2] = make_array("loss", 1, 0, 1);
  record.calibration[3] = make_array("self_attn.q_proj/beta", 2, 5, 3);
  record.calibration[4] = make_array("self_attn.q_proj/gamma", 2, 5, 3);
  record.calibration[5] = make_array(longest, 1, 1, 1);
  return record;
}

static bool doubles_same(double a, double b) {
  return a == b || (isnan(a) && isnan(b));
}

static bool linears_same(const struct quantized_linear *a, const struct quantized_linear *b) {
  if (strcmp(a->name, b->name) || a->out_features != b->out_features || a->in_features != b->in_features || a->bits != b->bits ||
      a->group_size != b->group_size || a->symmetric != b->symmetric) {
    return false;
  }
  size_t codes = (size_t)(a->out_features * packed_row_bytes(a->in_features, a->bits));
  size_t groups = (size_t)(a->out_features * ((a->in_features + a->group_size - 1) / a->group_size));
  return !memcmp(a->codes, b->codes, codes) && !memcmp(a->scale, b->scale, groups * 2) && !memcmp(a->zero_point, b->zero_point, groups);
}

static bool arrays_same(const struct named_array *a, const struct named_array *b) {
  int64_t columns = a->dimensions > 1 ? a->shape[1] : 1;
  return !strcmp(a->name, b->name) && a->dimensions == b->dimensions && a->shape[0] == b->shape[0] &&
         (a->dimensions == 1 || a->shape[1] == b->shape[1]) && !memcmp(a->values, b->values, (size_t)(a->shape[0] * columns) * 4);
}

static bool records_same(const struct block_record *a, const struct block_record *b) {
  bool same = a->index == b->index && doubles_same(a->loss_rtn, b->loss_rtn) && doubles_same(a->loss_start, b->loss_start) &&
              doubles_same(a->loss_end, b->loss_end) && !strcmp(a->kept, b->kept) && a->skipped_steps == b->skipped_steps &&
              a->untrained_experts == b->untrained_experts && a->seconds == b->seconds && a->world_size == b->world_size &&
              !strcmp(a->phases, b->phases) && !a->timing.values == !b->timing.values &&
              (!a->timing.values || arrays_same(&a->timing, &b->timing)) && a->linears == b->linears &&
              a->folded_arrays == b->folded_arrays && a->calibration_arrays == b->calibration_arrays;
  for (int i = 0; same && i < a->linears; i++) same = linears_same(&a->linear[i], &b->linear[i]);
  for (int i = 0; same && i < a->folded_arrays; i++) same = arrays_same(&a->folded[i], &b->folded[i]);
  for (int i = 0; same && i < a->calibration_arrays; i++) same = arrays_same(&a->calibration[i], &b->calibration[i]);
  return same;
}

/* ---- stores ---- */

static struct store *create_good(const char *path) {
  struct error error = {0};
  struct store_info info = make_info();
  struct store *store;
  if (store_create(path, &info, &store, &error) != 0) fail_msg("%s", error.message);
  return store;
}

static struct store *open_good(const char *path) {
  struct error error = {0};
  struct store *store;
  if (store_open(path, &store, &error) != 0) fail_msg("%s", error.message);
  return store;
}

/* As calibrate does it: the file is made in memory and then written. */
static int write_block(struct store *store, const struct block_record *record, struct error *error) {
  struct block_image image;
  struct store_info info = make_info();
  int code = block_image_make(&image, record, &info, "test", error);
  if (!code) code = store_write_block(store, &image, error);
  block_image_free(&image);
  return code;
}

static void write_good(struct store *store, struct block_record record) {
  struct error error = {0};
  if (write_block(store, &record, &error) != 0) fail_msg("%s", error.message);
  block_record_free(&record);
}

/* A store with one small block 0; its path. */
static struct path make_store(void) {
  struct error error = {0};
  struct path out = scratch_path(&folder, "out");
  struct store *store = create_good(out.text);
  write_good(store, make_small(0));
  assert_int_equal(store_close(store, &error), 0);
  return out;
}

static void check_said(const struct error *error, const char *expected) {
  if (!strstr(error->message, expected)) fail_msg("'%s' does not say '%s'", error->message, expected);
  for (const char *c = error->message; *c; c++) assert_true((unsigned char)*c >= 0x20);
}

static void refuse_create(const char *path, const struct store_info *info, const char *expected) {
  struct error error = {0};
  struct store *store = (struct store *)&error;
  assert_int_equal(store_create(path, info, &store, &error), ERROR_INPUT);
  assert_null(store);
  check_said(&error, expected);
}

static void refuse_open(const char *path, const char *expected) {
  struct error error = {0};
  struct store *store = (struct store *)&error;
  assert_int_equal(store_open(path, &store, &error), ERROR_INPUT);
  assert_null(store);
  check_said(&error, expected);
}

static void refuse_read(const char *path, int index, const char *expected) {
  struct error error = {0};
  struct block_record record;
  struct store *store = open_good(path);
  assert_int_equal(store_read_block(store, index, &record, &error), ERROR_INPUT);
  assert_true(record.linears == 0 && !record.linear && !record.folded && !record.calibration);
  check_said(&error, expected);
  store_close(store, &error);
}

static void check_block(struct store *store, struct block_record expected) {
  struct error error = {0};
  struct block_record record;
  if (store_read_block(store, expected.index, &record, &error) != 0) fail_msg("%s", error.message);
  assert_true(records_same(&expected, &record));
  block_record_free(&record);
  assert_null(record.linear);
  block_record_free(&expected);
}

static void blocks_come_back_as_they_were_written(void **state) {
  (void)state;
  struct error error = {0};
  struct store_info expected = make_info();
  const char *keep = getenv("OMNIQUANT_KEEP_STORE");
  struct path out = scratch_path(&folder, "a/b/out"), moved = scratch_path(&folder, "moved");
  if (keep) snprintf(out.text, sizeof out.text, "%s", keep);
  struct store *store = create_good(out.text);
  assert_false(store_has_block(store, 0));
  write_good(store, make_full(1));
  write_good(store, make_small(0));
  assert_true(store_has_block(store, 0) && store_has_block(store, 1) && !store_has_block(store, 2));
  assert_false(store_has_block(store, -1) || store_has_block(store, 3));
  check_block(store, make_full(1));
  assert_int_equal(store_close(store, &error), 0);
  if (keep) return;
  assert_int_equal(rename(out.text, moved.text), 0); /* links are relative */
  store = open_good(moved.text);
  assert_string_equal(store_info(store)->model_type, expected.model_type);
  assert_string_equal(store_info(store)->recipe, expected.recipe);
  assert_string_equal(store_info(store)->model_config, expected.model_config);
  assert_string_equal(store_info(store)->tokens_sha256, expected.tokens_sha256);
  assert_int_equal(store_info(store)->blocks, 3);
  check_block(store, make_small(0));
  check_block(store, make_full(1));
  store_close(store, &error);
  refuse_read(moved.text, 2, "blocks/0002.h5: is not there");
  refuse_read(moved.text, 3, "the model has blocks 0..2");
  hid_t file = H5Fopen(scratch_path(&moved, "omniquant.h5").text, H5F_ACC_RDONLY, H5P_DEFAULT);
  hid_t codes = H5Dopen2(file, "/blocks/0001/self_attn.q_proj/codes", H5P_DEFAULT);
  assert_true(codes >= 0);
  H5Dclose(codes);
  H5Fclose(file);
}

static void a_block_may_be_written_again(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store();
  struct store *store = open_good(out.text);
  write_good(store, make_full(0));
  check_block(store, make_full(0));
  store_close(store, &error);
  assert_int_equal(scratch_count(scratch_path(&out, "blocks").text), 1);
  assert_int_equal(scratch_count(out.text), 2);
}

/* Files of earlier versions. */
static void times_may_be_missing(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store();
  struct store *store = open_good(out.text);
  struct block_record records[2] = {make_small(1), make_small(1)};
  for (int i = 0; i < 2; i++) {
    free(records[i].timing.values);
    records[i].timing = (struct named_array){0};
    records[i].phases[0] = 0;
  }
  write_good(store, records[0]);
  check_block(store, records[1]);
  store_close(store, &error);
}

static void long_texts_are_stored(void **state) {
  (void)state;
  enum { LENGTH = 300000 };
  struct error error = {0};
  struct path out = scratch_path(&folder, "out");
  struct store_info info = make_info();
  struct store *store;
  char *text = malloc(LENGTH + 1);
  assert_non_null(text);
  memset(text, ' ', LENGTH);
  text[0] = '{';
  text[LENGTH - 1] = '}';
  text[LENGTH] = 0;
  info.model_config = text;
  info.tokens_sha256[0] = 0;
  assert_int_equal(store_create(out.text, &info, &store, &error), 0);
  store_close(store, &error);
  store = open_good(out.text);
  assert_string_equal(store_info(store)->model_config, text);
  assert_string_equal(store_info(store)->tokens_sha256, "");
  store_close(store, &error);
  free(text);
}

static void only_a_new_or_empty_folder_is_taken(void **state) {
  (void)state;
  struct store_info info = make_info();
  struct error error = {0};
  struct path empty = scratch_path(&folder, "empty"), other = scratch_path(&folder, "other"), file = scratch_path(&folder, "file");
  assert_int_equal(mkdir(empty.text, 0700), 0);
  struct store *store = create_good(empty.text);
  store_close(store, &error);
  assert_int_equal(mkdir(other.text, 0700), 0);
  scratch_write(scratch_path(&other, "thesis.txt").text, "x", 1);
  refuse_create(other.text, &info, "other: is not empty (holds thesis.txt)");
  assert_int_equal(scratch_count(other.text), 1);
  scratch_write(file.text, "x", 1);
  refuse_create(file.text, &info, "Not a directory");
  refuse_create(scratch_path(&file, "out").text, &info, "Not a directory");
  refuse_create("", &info, "--output");
  refuse_create("/proc/out", &info, "choose another --output");
}

static void a_store_that_cannot_be_described_is_not_begun(void **state) {
  (void)state;
  struct path out = scratch_path(&folder, "out");
  struct store_info info = make_info();
  info.blocks = 0;
  refuse_create(out.text, &info, "attribute blocks");
  info.blocks = 10001;
  refuse_create(out.text, &info, "attribute blocks");
  info = make_info();
  info.recipe = "wbits: 3";
  refuse_create(out.text, &info, "attribute recipe");
  info = make_info();
  info.model_config = "[]";
  refuse_create(out.text, &info, "attribute model_config");
  info = make_info();
  info.tokens_sha256[3] = 0;
  refuse_create(out.text, &info, "attribute tokens_sha256");
  assert_int_equal(scratch_count(out.text), -1);
}

/* ---- going on ---- */

static void the_same_run_goes_on(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store();
  struct store *store = create_good(out.text);
  assert_true(store_has_block(store, 0) && !store_has_block(store, 1));
  write_good(store, make_small(1));
  store_abandon(store); /* nothing: a block is there */
  store_close(store, &error);
  store = open_good(out.text);
  check_block(store, make_small(0));
  check_block(store, make_small(1));
  store_close(store, &error);
  assert_int_equal(scratch_count(out.text), 2);
}

static void another_run_is_refused_by_its_difference(void **state) {
  (void)state;
  struct path out = make_store();
  struct store_info info = make_info();
  info.recipe = "{\"wbits\": 4}";
  refuse_create(out.text, &info, "out: holds another run: recipe: wbits is 3 there and 4 here; choose another --output");
  info.recipe = "{}";
  refuse_create(out.text, &info, "recipe: wbits is 3 there and not set here");
  info.recipe = "{\"wbits\": 3, \"seed\": 1}";
  refuse_create(out.text, &info, "recipe: seed is not set there and 1 here");
  info = make_info();
  info.model_config = "{\"model_type\": \"llama\", \"name\": \"tea\"}";
  refuse_create(out.text, &info, "model: name is \"caf");
  info = make_info();
  info.tokens_sha256[0] = '1';
  refuse_create(out.text, &info, "tokens: it was calibrated with others");
  info = make_info();
  info.model_sha256[0] = '1';
  refuse_create(out.text, &info, "model: it was made from other weights");
  info = make_info();
  info.blocks = 4;
  refuse_create(out.text, &info, "model: another number of blocks");
  info = make_info();
  info.first_block = 1;
  refuse_create(out.text, &info, "--blocks: it begins with 0 there and with 1 here");
  assert_int_equal(scratch_count(out.text), 2);
  struct error error = {0};
  struct store *store = open_good(out.text);
  check_block(store, make_small(0));
  store_close(store, &error);
}

/* Damaged or lost, the master is made anew from what the blocks say: by a run that goes on, and by itself. */
static void the_master_comes_back_from_the_blocks(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store(), master = scratch_path(&out, "omniquant.h5");
  struct store *store;
  for (int damage = 0; damage < 4; damage++) {
    if (damage % 2 == 0) assert_int_equal(unlink(master.text), 0);
    if (damage % 2 == 1) assert_int_equal(truncate(master.text, 50), 0);
    assert_int_equal(store_open(out.text, &store, &(struct error){0}), ERROR_INPUT);
    if (damage < 2) {
      store = create_good(out.text);
    } else {
      if (store_recover(out.text, &store, &error) || store_repair(store, &error)) fail_msg("%s", error.message);
    }
    store_close(store, &error);
    store = open_good(out.text);
    assert_string_equal(store_info(store)->recipe, make_info().recipe);
    assert_string_equal(store_info(store)->model_sha256, make_info().model_sha256);
    check_block(store, make_small(0));
    store_close(store, &error);
    assert_int_equal(scratch_count(out.text), 2);
  }
  struct store_info other = make_info();
  other.tokens_sha256[0] = '1';
  assert_int_equal(unlink(master.text), 0);
  refuse_create(out.text, &other, "tokens: it was calibrated with others");
  assert_int_equal(scratch_count(out.text), 1);
}

static void nothing_is_recovered_from_nothing(void **state) {
  (void)state;
  struct error error = {0};
  struct store *store;
  struct path out = make_store(), block = scratch_path(&out, "blocks/0000.h5");
  assert_int_equal(truncate(block.text, 100), 0);
  assert_int_equal(store_recover(out.text, &store, &error), ERROR_INPUT);
  check_said(&error, "nothing to recover");
  struct store_info info = make_info();
  assert_int_equal(truncate(scratch_path(&out, "omniquant.h5").text, 100), 0);
  refuse_create(out.text, &info, "omniquant.h5: is not an HDF5 file, or damaged");
  assert_int_equal(scratch_count(out.text), 2);
}

/* As kill -9 leaves it: temporary files, and a folder of blocks without a master. */
static void what_a_killed_start_left_is_in_nobodys_way(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = scratch_path(&folder, "out"), blocks = scratch_path(&out, "blocks");
  assert_int_equal(mkdir(out.text, 0700), 0);
  assert_int_equal(mkdir(blocks.text, 0700), 0);
  scratch_write(scratch_path(&out, ".omniquant-0123456789abcdef.tmp").text, "x", 1);
  scratch_write(scratch_path(&blocks, ".omniquant-0123456789abcdef.tmp").text, "x", 1);
  scratch_write(scratch_path(&out, ".omniquant-lock").text, "", 0);
  struct store *store = create_good(out.text);
  write_good(store, make_small(0));
  assert_int_equal(scratch_count(blocks.text), 1);
  store_close(store, &error);
  assert_int_equal(scratch_count(out.text), 2);
}

static void two_do_not_write_at_once(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = scratch_path(&folder, "out");
  struct store_info info = make_info();
  struct store *store = create_good(out.text);
  refuse_create(out.text, &info, "out: another omniquant is writing here");
  write_good(store, make_small(0));
  store_close(store, &error);
  store_close(create_good(out.text), &error);
}

static void a_block_of_another_run_is_refused(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store(), other = scratch_path(&folder, "other");
  struct store_info info = make_info();
  struct store *store;
  info.recipe = "{\"wbits\": 3, \"seed\": 7}";
  if (store_create(other.text, &info, &store, &error)) fail_msg("%s", error.message);
  store_close(store, &error);
  assert_int_equal(rename(scratch_path(&out, "blocks/0000.h5").text, scratch_path(&other, "blocks/0000.h5").text), 0);
  refuse_read(other.text, 0, "blocks/0000.h5: belongs to another run than");
}

static void refuse_write(struct store *store, struct block_record record, const char *expected) {
  struct error error = {0};
  assert_int_equal(write_block(store, &record, &error), ERROR_WORK);
  check_said(&error, expected);
  assert_false(store_has_block(store, 1));
  block_record_free(&record);
}

static void what_could_not_be_read_is_not_written(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store();
  struct store *store = open_good(out.text);
  struct block_record record = make_small(1);
  record.linear[0].scale[2] = 0x7c00;
  refuse_write(store, record, "row 0, group 2: the scale is not a finite number");
  record = make_small(1);
  record.linear[0].zero_point[4] = 8;
  refuse_write(store, record, "row 1, group 1: the zero point is not a code");
  record = make_small(1);
  record.linear[0].bits = 9;
  refuse_write(store, record, "bits 9");
  record = make_small(1);
  strcpy(record.linear[0].name, "calibration");
  refuse_write(store, record, "name cannot be stored");
  record = make_small(1);
  strcpy(record.folded[0].name, "a/b");
  refuse_write(store, record, "name cannot be stored");
  record = make_small(1);
  strcpy(record.calibration[0].name, "a/./b");
  refuse_write(store, record, "name cannot be stored");
  record = make_small(1);
  strcpy(record.folded[0].name, "timing");
  refuse_write(store, record, "name cannot be stored");
  record = make_small(1);
  strcpy(record.phases, "wait,steps,ranks");
  refuse_write(store, record, "timing: is not seconds of 4 ranks in the phases 'wait,steps,ranks'");
  record = make_small(1);
  strcpy(record.phases, "wait,Steps");
  refuse_write(store, record, "timing: is not seconds of 4 ranks");
  record = make_small(1);
  record.timing.values[5] = -1;
  refuse_write(store, record, "timing: rank 2: -1 seconds are no time");
  record = make_small(1);
  strcpy(record.folded[0].name, "self_attn.q_proj"); /* found by HDF5 only when half is written */
  refuse_write(store, record, "self_attn.q_proj: cannot be written");
  record = make_small(1);
  record.kept[0] = 0;
  refuse_write(store, record, "kept ''");
  record = make_small(1);
  record.untrained_experts = -1;
  refuse_write(store, record, "untrained_experts -1");
  record = make_small(3);
  refuse_write(store, record, "the model has blocks 0..2");
  store_close(store, &error);
  assert_int_equal(scratch_count(scratch_path(&out, "blocks").text), 1);
}

/* The limit on file sizes stands for a full disk. */
static void a_block_half_written_leaves_nothing(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store();
  struct store *store = open_good(out.text);
  struct rlimit limit, small;
  struct block_record record = make_full(1);
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
  for (rlim_t bytes = 0; bytes < 1000000; bytes = bytes * 3 + 500) {
    small = (struct rlimit){bytes, limit.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    struct error full = {0};
    int code = write_block(store, &record, &full);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    assert_int_equal(code, ERROR_WORK);
    check_said(&full, "File too large");
    assert_int_equal(scratch_count(scratch_path(&out, "blocks").text), 1);
    assert_int_equal(scratch_count(out.text), 2);
    check_block(store, make_small(0));
  }
  block_record_free(&record);
  write_good(store, make_full(1));
  check_block(store, make_full(1));
  store_close(store, &error);
}

static void a_store_that_cannot_be_begun_leaves_nothing(void **state) {
  (void)state;
  struct path out = scratch_path(&folder, "out");
  struct store_info info = make_info();
  struct rlimit limit, small;
  struct error error = {0};
  struct store *store;
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
  small = (struct rlimit){100, limit.rlim_max};
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
  int code = store_create(out.text, &info, &store, &error);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
  assert_int_equal(code, ERROR_WORK);
  assert_null(store);
  check_said(&error, "omniquant.h5: cannot be written: File too large");
  assert_int_equal(scratch_count(out.text), -1);
  store_close(create_good(out.text), &error);
}

static void a_store_that_is_none_is_refused(void **state) {
  (void)state;
  struct path out = scratch_path(&folder, "out");
  struct path master = scratch_path(&out, "omniquant.h5");
  refuse_open(out.text, "omniquant.h5: No such file or directory");
  assert_int_equal(mkdir(out.text, 0700), 0);
  refuse_open(out.text, "omniquant.h5: No such file or directory");
  scratch_write(master.text, "PK\3\4", 4);
  refuse_open(out.text, "not an HDF5 file");
  assert_int_equal(unlink(master.text), 0);
  assert_int_equal(mkfifo(master.text, 0600), 0);
  refuse_open(out.text, "not a regular file");
}

/* Opens a file to change it, keeping to its layout: another one is not even looked at. */
static hid_t edit(const struct path *out, const char *name) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
  hid_t file = H5Fopen(scratch_path(out, name).text, H5F_ACC_RDWR, access);
  assert_true(file >= 0);
  H5Pclose(access);
  return file;
}

/* ---- damage ---- */

static void a_changed_byte_of_codes_is_found_by_its_checksum(void **state) {
  (void)state;
  struct path out = make_store(), block = scratch_path(&out, "blocks/0000.h5");
  struct block_record record = make_small(0);
  size_t length;
  unsigned char *bytes = scratch_read(block.text, &length);
  unsigned char *codes = memmem(bytes, length, record.linear[0].codes, 4 * 14);
  assert_non_null(codes);
  codes[20] ^= 1;
  scratch_write(block.text, bytes, length);
  refuse_read(out.text, 0, "blocks/0000.h5: self_attn.q_proj/codes: cannot be read");
  codes[20] ^= 1;
  scratch_write(block.text, bytes, length);
  struct error error = {0};
  struct store *store = open_good(out.text);
  check_block(store, make_small(0));
  store_close(store, &error);
  free(bytes);
  block_record_free(&record);
}

/* Reads block 0 of a store; false with the error set if anything is refused. */
static bool read_all(const char *path, struct block_record *record, struct store_info *info, struct error *error) {
  struct error ignored = {0};
  struct store *store;
  *record = (struct block_record){0};
  if (store_open(path, &store, error) != 0) return false;
  *info = *store_info(store);
  bool same = !strcmp(info->recipe, make_info().recipe) && !strcmp(info->model_config, make_info().model_config);
  if (!same) fail_msg("a changed text is believed");
  int failed = store_read_block(store, 0, record, error);
  store_close(store, &ignored);
  return !failed;
}

/* Any byte of a file: its change is refused, or it was a byte that means nothing. */
static void check_changes(const struct path *out, const char *name) {
  struct block_record expected = make_small(0), record;
  struct store_info right = make_info(), info;
  size_t length;
  unsigned char *bytes = scratch_read(scratch_path(out, name).text, &length);
  FILE *file = fopen(scratch_path(out, name).text, "r+b");
  assert_non_null(file);
  setbuf(file, NULL);
  for (size_t i = 0; i < length; i++) {
    struct error error = {0};
    fseek(file, (long)i, SEEK_SET);
    fputc(bytes[i] ^ (int)(1 + i % 255), file);
    if (read_all(out->text, &record, &info, &error)) {
      if (!records_same(&expected, &record) || info.blocks != right.blocks || strcmp(info.model_type, right.model_type)) {
        fail_msg("%s: changed byte %zu is believed", name, i);
      }
    } else {
      check_said(&error, name);
    }
    block_record_free(&record);
    fseek(file, (long)i, SEEK_SET);
    fputc(bytes[i], file);
  }
  fclose(file);
  free(bytes);
  block_record_free(&expected);
}

static void no_changed_byte_passes(void **state) {
  (void)state;
  struct path out = make_store();
  check_changes(&out, "blocks/0000.h5");
  check_changes(&out, "omniquant.h5");
}

static void a_file_cut_short_is_refused(void **state) {
  (void)state;
  struct path out = make_store(), block = scratch_path(&out, "blocks/0000.h5");
  struct stat status;
  assert_int_equal(stat(block.text, &status), 0);
  for (off_t length = status.st_size - 1; length > 0; length = length * 3 / 4) {
    assert_int_equal(truncate(block.text, length), 0);
    refuse_read(out.text, 0, "blocks/0000.h5: is not an HDF5 file, or damaged");
  }
}

/* ---- strangers' files ---- */

static void set_integer(hid_t file, const char *where, const char *name, int64_t value) {
  hid_t object = H5Oopen(file, where, H5P_DEFAULT), attribute = H5Aopen(object, name, H5P_DEFAULT);
  assert_true(attribute >= 0 && H5Awrite(attribute, H5T_NATIVE_INT64, &value) >= 0);
  H5Aclose(attribute);
  H5Oclose(object);
}

/* Replaces a text attribute. Variable length is a form that this program does not write. */
static void set_text(hid_t file, const char *where, const char *name, const char *value, bool variable) {
  hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
  H5Adelete_by_name(file, where, name, H5P_DEFAULT);
  H5Tset_size(type, variable ? H5T_VARIABLE : strlen(value));
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  hid_t attribute = H5Acreate_by_name(file, where, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  assert_true(attribute >= 0 && H5Awrite(attribute, type, variable ? (const void *)&value : value) >= 0);
  H5Aclose(attribute);
  H5Sclose(space);
  H5Tclose(type);
}

enum master_lie {
  FORMAT_OTHER,
  FORMAT_LONG,
  FORMAT_VARIABLE,
  FORMAT_MISSING,
  VERSION_NEW,
  BLOCKS_NEGATIVE,
  BLOCKS_MANY,
  RECIPE_BROKEN,
  TYPE_LONG,
  LINK_ABSOLUTE,
  LINK_OTHER_BLOCK,
  LINK_OTHER_OBJECT,
  LINK_SOFT,
  LINK_GROUP,
  LINK_BEYOND,
  LINK_UNNAMED,
  BLOCKS_SOFT,
  MASTER_LIES
};

static const char *tell_master_lie(hid_t file, enum master_lie lie) {
  static const char no_link[] = "is not a link to a block of this folder";
  hid_t group;
  if (lie >= LINK_ABSOLUTE && lie <= LINK_GROUP) H5Ldelete(file, "/blocks/0000", H5P_DEFAULT);
  switch (lie) {
  case FORMAT_OTHER:
    return set_text(file, ".", "format", "keras", false), "attribute format: is 'keras'";
  case FORMAT_LONG:
    return set_text(file, ".", "format", "omniquant2", false), "attribute format: is longer";
  case FORMAT_VARIABLE:
    return set_text(file, ".", "format", "omniquant", true), "attribute format: is of another type";
  case FORMAT_MISSING:
    return H5Adelete(file, "format"), "attribute format: is missing";
  case VERSION_NEW:
    return set_integer(file, ".", "version", 2), "attribute version: is 2";
  case BLOCKS_NEGATIVE:
    return set_integer(file, ".", "blocks", -3), "attribute blocks: is -3 but must be in 1..10000";
  case BLOCKS_MANY:
    return set_integer(file, ".", "blocks", (int64_t)1 << 33), "attribute blocks: is 8589934592";
  case RECIPE_BROKEN:
    return set_text(file, ".", "recipe", "{", false), "attribute recipe: is not a JSON object";
  case TYPE_LONG:
    return set_text(file, ".", "model_type", "0123456789012345678901234567890123456789", false), "attribute model_type: is longer";
  case LINK_ABSOLUTE:
    return H5Lcreate_external("/etc/x.h5", "/block", file, "/blocks/0000", H5P_DEFAULT, H5P_DEFAULT), no_link;
  case LINK_OTHER_BLOCK:
    return H5Lcreate_external("blocks/0001.h5", "/block", file, "/blocks/0000", H5P_DEFAULT, H5P_DEFAULT), no_link;
  case LINK_OTHER_OBJECT:
    return H5Lcreate_external("blocks/0000.h5", "/other", file, "/blocks/0000", H5P_DEFAULT, H5P_DEFAULT), no_link;
  case LINK_SOFT:
    return H5Lcreate_soft("/x", file, "/blocks/0000", H5P_DEFAULT, H5P_DEFAULT), "blocks: 0000: is a link to elsewhere";
  case LINK_GROUP:
    group = H5Gcreate2(file, "/blocks/0000", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    H5Gclose(group);
    return no_link;
  case LINK_BEYOND:
    return H5Lcreate_external("blocks/0003.h5", "/block", file, "/blocks/0003", H5P_DEFAULT, H5P_DEFAULT), no_link;
  case LINK_UNNAMED:
    return H5Lcreate_external("blocks/0000.h5", "/block", file, "/blocks/a\nb", H5P_DEFAULT, H5P_DEFAULT), "blocks/a?b: ";
  case BLOCKS_SOFT:
    H5Lmove(file, "/blocks", file, "/elsewhere", H5P_DEFAULT, H5P_DEFAULT);
    return H5Lcreate_soft("/elsewhere", file, "/blocks", H5P_DEFAULT, H5P_DEFAULT), "blocks: is a link to elsewhere";
  default:
    return "";
  }
}

static void every_lie_of_a_master_is_refused(void **state) {
  (void)state;
  struct path out = make_store(), master = scratch_path(&out, "omniquant.h5");
  size_t length;
  unsigned char *bytes = scratch_read(master.text, &length);
  for (int lie = 0; lie < MASTER_LIES; lie++) {
    scratch_write(master.text, bytes, length);
    hid_t file = edit(&out, "omniquant.h5");
    const char *expected = tell_master_lie(file, (enum master_lie)lie);
    assert_true(H5Fclose(file) >= 0);
    refuse_open(out.text, expected);
  }
  free(bytes);
}

/* Puts a dataset of another make in the place of one of ours: zeros, or nothing at all where that would be many. */
static void replace_dataset(hid_t file, const char *path, hid_t type, int dimensions, hsize_t rows, hsize_t columns, hid_t creation) {
  static const double zeros[100];
  hsize_t shape[2] = {rows, columns};
  hid_t space = H5Screate_simple(dimensions, shape, NULL);
  H5Ldelete(file, path, H5P_DEFAULT);
  hid_t set = H5Dcreate2(file, path, type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  assert_true(set >= 0);
  if (rows * columns <= 100) assert_true(H5Dwrite(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros) >= 0);
  H5Dclose(set);
  H5Sclose(space);
}

static hid_t chunked(hsize_t rows, hsize_t columns, bool checksum, bool deflate) {
  hsize_t chunk[2] = {rows, columns};
  hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_chunk(creation, 2, chunk);
  if (deflate) H5Pset_deflate(creation, 9);
  if (checksum) H5Pset_fletcher32(creation);
  return creation;
}

enum block_lie {
  INDEX_OTHER,
  KEPT_OTHER,
  WORLD_ZERO,
  UNTRAINED_NEGATIVE,
  TIMING_RANKS,
  TIMING_PHASES,
  TIMING_UNNAMED,
  TIMING_INFINITE,
  TIMING_DOUBLE,
  BITS_NINE,
  BITS_FOUR,
  GROUP_ZERO,
  IN_NEGATIVE,
  IN_HUGE,
  GROUP_HUGE,
  SYMMETRIC_TWO,
  CODES_MISSING,
  CODES_SHORT,
  CODES_FLAT,
  CODES_FLOAT,
  CODES_CONTIGUOUS,
  CODES_UNCHECKED,
  CODES_DEFLATED,
  CODES_SPARSE,
  CODES_HUGE,
  CODES_EXTERNAL,
  CODES_VIRTUAL,
  CODES_SOFT_LINK,
  CODES_EXTERNAL_LINK,
  SCALE_FLOAT,
  SCALE_ROWS,
  ARRAY_DOUBLE,
  LINEAR_EMPTY,
  LINK_CYCLE,
  NAME_LONG,
  NAMES_DEEP,
  TYPE_COMMITTED,
  BLOCK_MISSING,
  BLOCK_LINK,
  BLOCK_LIES
};

static void replace_codes(hid_t file, hsize_t rows, hsize_t columns, hid_t creation) {
  replace_dataset(file, "/block/self_attn.q_proj/codes", H5T_STD_U8LE, 2, rows, columns, creation);
  if (creation != H5P_DEFAULT) H5Pclose(creation);
}

static void make_groups(hid_t file, const char *path) {
  hid_t link = H5Pcreate(H5P_LINK_CREATE);
  H5Pset_create_intermediate_group(link, 1);
  hid_t group = H5Gcreate2(file, path, link, H5P_DEFAULT, H5P_DEFAULT);
  assert_true(group >= 0);
  H5Gclose(group);
  H5Pclose(link);
}

static const char *tell_block_lie(hid_t file, enum block_lie lie) {
  static const char q[] = "/block/self_attn.q_proj", codes[] = "/block/self_attn.q_proj/codes";
  static const char storage[] = "self_attn.q_proj/codes: is not stored in whole chunks with checksums";
  char name[1001];
  hid_t object;
  switch (lie) {
  case INDEX_OTHER:
    return set_integer(file, "/block", "index", 1), "0000.h5: attribute index: is 1";
  case KEPT_OTHER:
    return set_text(file, "/block", "kept", "all of them", false), "attribute kept: is none of";
  case WORLD_ZERO:
    return set_integer(file, "/block", "world_size", 0), "attribute world_size: is 0";
  case UNTRAINED_NEGATIVE:
    return set_integer(file, "/block", "untrained_experts", -1), "attribute untrained_experts: is -1";
  case TIMING_RANKS:
    return set_integer(file, "/block", "world_size", 3), "0000.h5: timing: is not seconds of 3 ranks in the phases 'wait,steps'";
  case TIMING_PHASES:
    return set_text(file, "/block/timing", "phases", "wait", false), "timing: is not seconds of 4 ranks in the phases 'wait'";
  case TIMING_UNNAMED:
    return H5Adelete_by_name(file, "/block/timing", "phases", H5P_DEFAULT), "timing: attribute phases: is missing";
  case TIMING_INFINITE:
    object = H5Dopen2(file, "/block/timing", H5P_DEFAULT);
    H5Dwrite(object, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, (const float[8]){[7] = INFINITY});
    H5Dclose(object);
    return "timing: rank 3: inf seconds are no time";
  case TIMING_DOUBLE:
    return replace_dataset(file, "/block/timing", H5T_IEEE_F64LE, 2, 4, 2, H5P_DEFAULT), "timing: has another type";
  case BITS_NINE:
    return set_integer(file, q, "bits", 9), "self_attn.q_proj: attribute bits: is 9 but must be in 2..8";
  case BITS_FOUR:
    return set_integer(file, q, "bits", 4), "codes: has shape [4, 14] but its linear needs [4, 19]";
  case GROUP_ZERO:
    return set_integer(file, q, "group_size", 0), "attribute group_size: is 0";
  case IN_NEGATIVE:
    return set_integer(file, q, "in_features", -37), "attribute in_features: is -37";
  case IN_HUGE:
    return set_integer(file, q, "in_features", INT64_MAX), "attribute in_features: is 9223372036854775807";
  case GROUP_HUGE:
    return set_integer(file, q, "group_size", 64), "scale: has shape [4, 3] but its linear needs [4, 1]";
  case SYMMETRIC_TWO:
    return set_integer(file, q, "symmetric", 2), "attribute symmetric: is 2";
  case CODES_MISSING:
    return H5Ldelete(file, codes, H5P_DEFAULT), "self_attn.q_proj/codes: cannot be read";
  case CODES_SHORT:
    return replace_codes(file, 4, 13, chunked(4, 13, true, false)), "has shape [4, 13] but its linear needs [4, 14]";
  case CODES_FLAT:
    return replace_dataset(file, codes, H5T_STD_U8LE, 1, 56, 1, H5P_DEFAULT), storage;
  case CODES_FLOAT:
    return replace_dataset(file, codes, H5T_STD_I8LE, 2, 4, 14, H5P_DEFAULT), "has another type or rank";
  case CODES_CONTIGUOUS:
    return replace_codes(file, 4, 14, H5P_DEFAULT), storage;
  case CODES_UNCHECKED:
    return replace_codes(file, 4, 14, chunked(4, 14, false, false)), storage;
  case CODES_DEFLATED:
    return replace_codes(file, 4, 14, chunked(4, 14, true, true)), "codes: is compressed";
  case CODES_SPARSE:
    return replace_codes(file, 100, 14, chunked(1, 14, true, false)), "codes: too few bytes are stored";
  case CODES_HUGE:
    return replace_codes(file, (hsize_t)1 << 20, (hsize_t)1 << 20, chunked(4, 14, true, false)), "codes: too few bytes are stored";
  case CODES_EXTERNAL:
    object = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_external(object, scratch_path(&folder, "outside.bin").text, 0, 56);
    return replace_codes(file, 4, 14, object), "codes: has data in other files";
  case CODES_VIRTUAL:
    object = H5Pcreate(H5P_DATASET_CREATE);
    hid_t whole = H5Screate_simple(2, (const hsize_t[]){20, 14}, NULL); /* too many to be written, which it would be elsewhere */
    H5Pset_virtual(object, whole, "/etc/hostname", "codes", whole);
    H5Sclose(whole);
    return replace_codes(file, 20, 14, object), "codes: is stored in another way";
  case CODES_SOFT_LINK:
    H5Ldelete(file, codes, H5P_DEFAULT);
    return H5Lcreate_soft("/block/self_attn.q_proj/zero_point", file, codes, H5P_DEFAULT, H5P_DEFAULT), "is a link to elsewhere";
  case CODES_EXTERNAL_LINK:
    H5Ldelete(file, codes, H5P_DEFAULT);
    return H5Lcreate_external("0000.h5", "/block", file, codes, H5P_DEFAULT, H5P_DEFAULT), "is a link to elsewhere";
  case SCALE_FLOAT:
    return replace_dataset(file, "/block/self_attn.q_proj/scale", H5T_IEEE_F32LE, 2, 4, 3, H5P_DEFAULT), "scale: has another type";
  case SCALE_ROWS:
    object = H5Dopen2(file, "/block/self_attn.q_proj/scale", H5P_DEFAULT);
    hid_t type = H5Dget_type(object), creation = chunked(3, 3, true, false);
    H5Dclose(object);
    replace_dataset(file, "/block/self_attn.q_proj/scale", type, 2, 3, 3, creation);
    H5Pclose(creation);
    H5Tclose(type);
    return "scale: has shape [3, 3] but its linear needs [4, 3]";
  case ARRAY_DOUBLE:
    return replace_dataset(file, "/block/calibration/loss", H5T_IEEE_F64LE, 1, 2, 1, H5P_DEFAULT), "loss: has another type";
  case LINEAR_EMPTY:
    return make_groups(file, "/block/mlp.up_proj"), "mlp.up_proj: attribute bits: is missing";
  case LINK_CYCLE:
    return H5Lcreate_hard(file, "/block", file, "/block/again", H5P_DEFAULT, H5P_DEFAULT), "block: has more than one link to it";
  case NAME_LONG:
  case NAMES_DEEP:
    memcpy(name, "/block/", 7);
    for (int i = 7; i < 1000; i++) name[i] = lie == NAMES_DEEP && i % 2 == 0 ? '/' : 'x';
    name[1000] = 0;
    return make_groups(file, name), "has too long a name";
  case TYPE_COMMITTED:
    object = H5Tcopy(H5T_STD_U8LE);
    H5Tcommit2(file, "/block/type", object, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    H5Tclose(object);
    return "type: is neither group nor dataset";
  case BLOCK_MISSING:
    return H5Ldelete(file, "/block", H5P_DEFAULT), "block: there is no such group";
  case BLOCK_LINK:
    H5Ldelete(file, "/block", H5P_DEFAULT);
    return H5Lcreate_external("0001.h5", "/block", file, "/block", H5P_DEFAULT, H5P_DEFAULT), "block: there is no such group";
  default:
    return "";
  }
}

/* Stores of a time before experts have no such attribute. */
static void a_block_that_does_not_count_untrained_experts_has_none(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store();
  hid_t file = edit(&out, "blocks/0000.h5");
  assert_true(H5Adelete_by_name(file, "/block", "untrained_experts", H5P_DEFAULT) >= 0);
  H5Fclose(file);
  struct store *store = open_good(out.text);
  struct block_record expected = make_small(0);
  expected.untrained_experts = 0;
  check_block(store, expected);
  store_close(store, &error);
}

static void every_lie_of_a_block_is_refused(void **state) {
  (void)state;
  struct path out = make_store(), block = scratch_path(&out, "blocks/0000.h5");
  size_t length;
  unsigned char *bytes = scratch_read(block.text, &length);
  for (int lie = 0; lie < BLOCK_LIES; lie++) {
    scratch_write(block.text, bytes, length);
    hid_t file = edit(&out, "blocks/0000.h5");
    const char *expected = tell_block_lie(file, (enum block_lie)lie);
    assert_true(H5Fclose(file) >= 0);
    refuse_read(out.text, 0, expected);
  }
  free(bytes);
}

/* ---- threads ---- */

static void *read_often(void *argument) {
  struct store *store = argument;
  struct block_record expected = make_small(0);
  intptr_t good = 0;
  for (int i = 0; i < 100; i++) {
    struct error error = {0};
    struct block_record record;
    good += store_read_block(store, 0, &record, &error) == 0 && records_same(&expected, &record);
    block_record_free(&record);
  }
  block_record_free(&expected);
  return (void *)good; /* NOLINT: a count, not a pointer */
}

static void stores_are_read_by_one_thread_and_written_by_another(void **state) {
  (void)state;
  struct error error = {0};
  struct path out = make_store();
  struct store *reader = open_good(out.text), *writer = create_good(scratch_path(&folder, "other").text);
  pthread_t thread;
  void *good;
  assert_int_equal(pthread_create(&thread, NULL, read_often, reader), 0);
  for (int i = 0; i < 20; i++) write_good(writer, make_small(i % 3));
  assert_int_equal(pthread_join(thread, &good), 0);
  assert_int_equal((intptr_t)good, 100);
  store_close(reader, &error);
  store_close(writer, &error);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(blocks_come_back_as_they_were_written, setup, teardown),
      cmocka_unit_test_setup_teardown(a_block_may_be_written_again, setup, teardown),
      cmocka_unit_test_setup_teardown(times_may_be_missing, setup, teardown),
      cmocka_unit_test_setup_teardown(long_texts_are_stored, setup, teardown),
      cmocka_unit_test_setup_teardown(only_a_new_or_empty_folder_is_taken, setup, teardown),
      cmocka_unit_test_setup_teardown(the_same_run_goes_on, setup, teardown),
      cmocka_unit_test_setup_teardown(another_run_is_refused_by_its_difference, setup, teardown),
      cmocka_unit_test_setup_teardown(the_master_comes_back_from_the_blocks, setup, teardown),
      cmocka_unit_test_setup_teardown(nothing_is_recovered_from_nothing, setup, teardown),
      cmocka_unit_test_setup_teardown(what_a_killed_start_left_is_in_nobodys_way, setup, teardown),
      cmocka_unit_test_setup_teardown(two_do_not_write_at_once, setup, teardown),
      cmocka_unit_test_setup_teardown(a_block_of_another_run_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_store_that_cannot_be_described_is_not_begun, setup, teardown),
      cmocka_unit_test_setup_teardown(what_could_not_be_read_is_not_written, setup, teardown),
      cmocka_unit_test_setup_teardown(a_block_half_written_leaves_nothing, setup, teardown),
      cmocka_unit_test_setup_teardown(a_store_that_cannot_be_begun_leaves_nothing, setup, teardown),
      cmocka_unit_test_setup_teardown(a_store_that_is_none_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_changed_byte_of_codes_is_found_by_its_checksum, setup, teardown),
      cmocka_unit_test_setup_teardown(no_changed_byte_passes, setup, teardown),
      cmocka_unit_test_setup_teardown(a_file_cut_short_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(every_lie_of_a_master_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_block_that_does_not_count_untrained_experts_has_none, setup, teardown),
      cmocka_unit_test_setup_teardown(every_lie_of_a_block_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(stores_are_read_by_one_thread_and_written_by_another, setup, teardown),
  };
  if (getenv("OMNIQUANT_KEEP_STORE")) cmocka_set_test_filter("blocks_come_back_as_they_were_written");
  return cmocka_run_group_tests(tests, NULL, NULL);
}
