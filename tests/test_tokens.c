/* test_tokens.c: reading ids in any integer type, the identity of a text, and what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <hdf5.h>

#include "scratch.h"
#include "tokens.h"

enum { COUNT = 150001 }; /* more than two of the reader's pieces */

static struct path folder;

static int setup(void **state) {
  (void)state;
  folder = scratch_init();
  return 0;
}

static int teardown(void **state) {
  (void)state;
  assert_int_equal(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
  scratch_free(&folder);
  return 0;
}

static int64_t token(int64_t i) {
  return i * 7919 % 32000;
}

/* The bounds of HDF5's versions in whose layout files are read. */
static hid_t bounds(void) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  assert_true(H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0);
  return access;
}

/* A file with one dataset, in chunks with checksums where `chunk` is not 0; filled with token() unless `values` are given or `empty` asks
 * for none. */
static struct path make_file(const char *dataset, hid_t type, int dimensions, hsize_t count, hsize_t chunk, const int64_t *values,
                             int empty) {
  struct path path = scratch_path(&folder, "tokens.h5");
  hsize_t shape[2] = {count, 1}, chunks[2] = {chunk, 1};
  hid_t access = bounds(), file = H5Fcreate(path.text, H5F_ACC_TRUNC, H5P_DEFAULT, access);
  hid_t space = H5Screate_simple(dimensions, shape, NULL), creation = H5Pcreate(H5P_DATASET_CREATE);
  if (chunk) {
    H5Pset_chunk(creation, dimensions, chunks);
    H5Pset_fletcher32(creation);
  }
  hid_t set = H5Dcreate2(file, dataset, type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  assert_true(set >= 0);
  if (!empty) {
    int64_t *ids = malloc(count * sizeof *ids + 1);
    assert_non_null(ids);
    for (hsize_t i = 0; i < count; i++) ids[i] = values ? values[i] : token((int64_t)i);
    assert_true(H5Dwrite(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, ids) >= 0);
    free(ids);
  }
  H5Dclose(set);
  H5Pclose(creation);
  H5Pclose(access);
  H5Sclose(space);
  H5Fclose(file);
  return path;
}

static struct tokens *open_good(const struct path *path) {
  struct error error = {0};
  struct tokens *tokens;
  if (tokens_open(path->text, &tokens, &error) != 0) fail_msg("%s", error.message);
  return tokens;
}

static void refuse_file(const char *path, const char *expected) {
  struct error error = {0};
  struct tokens *tokens = (struct tokens *)&error;
  assert_int_equal(tokens_open(path, &tokens, &error), ERROR_INPUT);
  assert_null(tokens);
  if (!strstr(error.message, expected)) fail_msg("'%s' does not say '%s'", error.message, expected);
  assert_memory_equal(error.message, path, strlen(path));
}

static void ids_are_read_whatever_their_type(void **state) {
  (void)state;
  const hid_t types[] = {H5T_STD_U32LE, H5T_STD_U16LE, H5T_STD_I64BE, H5T_STD_I32LE};
  int32_t *ids = malloc(COUNT * sizeof *ids);
  assert_non_null(ids);
  for (int t = 0; t < 4; t++) {
    struct path path = make_file("tokens", types[t], 1, COUNT, t % 2 ? 1000 : 0, NULL, 0);
    struct error error = {0};
    struct tokens *tokens = open_good(&path);
    assert_int_equal(tokens_count(tokens), COUNT);
    const int64_t ranges[][2] = {{0, COUNT}, {COUNT - 1, 1}, {65535, 2}, {COUNT, 0}, {100, 70000}};
    for (int r = 0; r < 5; r++) {
      assert_int_equal(tokens_read(tokens, ranges[r][0], ranges[r][1], 32000, ids, &error), 0);
      for (int64_t i = 0; i < ranges[r][1]; i++) assert_int_equal(ids[i], token(ranges[r][0] + i));
    }
    tokens_close(tokens);
  }
  free(ids);
}

static void the_digest_is_that_of_the_ids_as_little_endian_uint32(void **state) {
  (void)state;
  /* printf '\1\0\0\0\2\0\0\0\0\175\0\0\377\377\377\377' | sha256sum */
  const char expected[] = "bad5e09f008dcd729a62d8f867d422a692cfa465810864940be457d2937846d0";
  const int64_t ids[] = {1, 2, 32000, 4294967295};
  struct error error = {0};
  char hex[65];
  struct path path = make_file("tokens", H5T_STD_U32LE, 1, 4, 0, ids, 0);
  struct tokens *tokens = open_good(&path);
  assert_int_equal(tokens_sha256(tokens, hex, &error), 0);
  assert_string_equal(hex, expected);
  tokens_close(tokens);
}

static void the_digest_does_not_depend_on_how_the_ids_are_stored(void **state) {
  (void)state;
  struct error error = {0};
  char plain[65], packed[65];
  struct path path = make_file("tokens", H5T_STD_U32LE, 1, COUNT, 0, NULL, 0);
  struct tokens *tokens = open_good(&path);
  assert_int_equal(tokens_sha256(tokens, plain, &error), 0);
  tokens_close(tokens);
  path = make_file("tokens", H5T_STD_I64BE, 1, COUNT, 777, NULL, 0);
  tokens = open_good(&path);
  assert_int_equal(tokens_sha256(tokens, packed, &error), 0);
  tokens_close(tokens);
  assert_string_equal(plain, packed);
}

static void a_file_without_tokens_is_read(void **state) {
  (void)state;
  struct error error = {0};
  char hex[65];
  struct path path = make_file("tokens", H5T_STD_U32LE, 1, 0, 0, NULL, 0);
  struct tokens *tokens = open_good(&path);
  assert_int_equal(tokens_count(tokens), 0);
  assert_int_equal(tokens_sha256(tokens, hex, &error), 0);
  assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  tokens_close(tokens);
}

static void refuse_read(struct tokens *tokens, int64_t first, int64_t count, int64_t vocabulary, const char *expected) {
  struct error error = {0};
  int32_t ids[16] = {0};
  assert_int_equal(tokens_read(tokens, first, count, vocabulary, ids, &error), ERROR_INPUT);
  if (!strstr(error.message, expected)) fail_msg("'%s' does not say '%s'", error.message, expected);
}

static void ranges_and_ids_out_of_bounds_are_refused(void **state) {
  (void)state;
  const int64_t values[] = {5, 6, 7, 31999, -1, 4294967296};
  struct path path = make_file("tokens", H5T_STD_I64LE, 1, 6, 0, values, 0);
  struct error error = {0};
  char hex[65];
  int32_t ids[16];
  struct tokens *tokens = open_good(&path);
  assert_int_equal(tokens_read(tokens, 0, 4, 32000, ids, &error), 0);
  refuse_read(tokens, 0, 7, 32000, "7 tokens from position 0 on are asked for but the file holds 6");
  refuse_read(tokens, 6, 1, 32000, "but the file holds 6");
  refuse_read(tokens, -1, 1, 32000, "but the file holds 6");
  refuse_read(tokens, 1, INT64_MAX, 32000, "but the file holds 6");
  refuse_read(tokens, 2, 2, 31999, "the id at position 3 is 31999 but must be in 0..31998");
  refuse_read(tokens, 4, 1, 32000, "the id at position 4 is -1");
  refuse_read(tokens, 5, 1, INT64_MAX, "the id at position 5 is 4294967296");
  assert_int_equal(tokens_sha256(tokens, hex, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, "position 4"));
  tokens_close(tokens);
  tokens_close(NULL);
}

static void other_files_are_refused(void **state) {
  (void)state;
  refuse_file(scratch_path(&folder, "none").text, "No such file");
  refuse_file(folder.text, "not a regular file");
  struct path text = scratch_path(&folder, "text");
  scratch_write(text.text, "tokens", 6);
  refuse_file(text.text, "not an HDF5 file");
  refuse_file(make_file("input_ids", H5T_STD_U32LE, 1, 4, 0, NULL, 0).text, "holds no dataset `tokens`");
  refuse_file(make_file("tokens", H5T_STD_U32LE, 2, 4, 0, NULL, 0).text, "not a one-dimensional integer dataset");
  refuse_file(make_file("tokens", H5T_IEEE_F32LE, 1, 4, 0, NULL, 0).text, "not a one-dimensional integer dataset");
  refuse_file(make_file("tokens", H5T_STD_U32LE, 1, (hsize_t)1 << 40, 1000, NULL, 1).text, "too few bytes are stored");
  refuse_file(make_file("tokens", H5T_STD_U32LE, 1, (hsize_t)1 << 62, 1000, NULL, 1).text, "too few bytes are stored");
}

enum way { DEFLATED, GROWING, EXTERNAL, VIRTUAL, COMPACT, UNWRITTEN, FILLED, OLD, LINK_SOFT, LINK_EXTERNAL, A_GROUP, WAYS };

/* Makes a file whose `tokens` are there in another way than they are written; what is said of it. */
static const char *make_other(const char *path, enum way way) {
  static const char link[] = "is a link to elsewhere", stored[] = "stored in another way";
  hsize_t length = 4, most = way == GROWING ? H5S_UNLIMITED : 4, chunk = 4;
  uint32_t ids[4] = {1, 2, 3, 4};
  hid_t access = way == OLD ? H5P_DEFAULT : bounds(), file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access);
  hid_t space = H5Screate_simple(1, &length, &most), creation = H5Pcreate(H5P_DATASET_CREATE);
  const char *said = "";
  assert_true(file >= 0);
  if (way == DEFLATED || way == GROWING || way == UNWRITTEN) H5Pset_chunk(creation, 1, &chunk);
  if (way == DEFLATED) H5Pset_deflate(creation, 6), said = "is compressed";
  if (way == GROWING) said = "can grow";
  if (way == EXTERNAL) H5Pset_external(creation, "/etc/hostname", 0, 4 * sizeof *ids), said = "has data in other files";
  if (way == VIRTUAL) H5Pset_virtual(creation, space, "/etc/hostname", "tokens", space), said = stored;
  if (way == COMPACT) H5Pset_layout(creation, H5D_COMPACT), said = stored;
  if (way == UNWRITTEN) said = "too few bytes are stored";
  if (way == FILLED) H5Pset_fill_value(creation, H5T_NATIVE_UINT32, ids), said = "has a fill value";
  if (way == OLD) said = "old layout, without checksums, which is not read; make it anew with tools/tokenize.py";
  hid_t object = way < LINK_SOFT ? H5Dcreate2(file, "tokens", H5T_STD_U32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT) : -1;
  if (object >= 0 && way != EXTERNAL && way != VIRTUAL && way != UNWRITTEN)
    assert_true(H5Dwrite(object, H5T_NATIVE_UINT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, ids) >= 0);
  if (way == LINK_SOFT) assert_true(H5Lcreate_soft("/other", file, "tokens", H5P_DEFAULT, H5P_DEFAULT) >= 0), said = link;
  if (way == LINK_EXTERNAL)
    assert_true(H5Lcreate_external("good.h5", "tokens", file, "tokens", H5P_DEFAULT, H5P_DEFAULT) >= 0), said = "holds no dataset `tokens`";
  if (way == A_GROUP) object = H5Gcreate2(file, "tokens", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), said = "holds no dataset `tokens`";
  if (object >= 0) H5Oclose(object);
  H5Pclose(creation);
  H5Sclose(space);
  if (access != H5P_DEFAULT) H5Pclose(access);
  assert_true(H5Fclose(file) >= 0);
  return said;
}

/* What could lead to other files, to plug-ins or to more memory than the file has bytes, and what the library cannot be trusted with. */
static void tokens_that_are_there_in_another_way_are_refused(void **state) {
  (void)state;
  struct path good = make_file("tokens", H5T_STD_U32LE, 1, 4, 4, NULL, 0), other = scratch_path(&folder, "other.h5");
  assert_int_equal(rename(good.text, scratch_path(&folder, "good.h5").text), 0); /* where the external link leads */
  good = scratch_path(&folder, "good.h5");
  tokens_close(open_good(&good));
  for (int way = 0; way < WAYS; way++) refuse_file(other.text, make_other(other.text, (enum way)way));
}

static void a_file_cut_short_is_refused(void **state) {
  (void)state;
  struct path path = make_file("tokens", H5T_STD_U32LE, 1, COUNT, 0, NULL, 0);
  assert_int_equal(truncate(path.text, 1000), 0);
  refuse_file(path.text, "damaged");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(ids_are_read_whatever_their_type, setup, teardown),
      cmocka_unit_test_setup_teardown(the_digest_is_that_of_the_ids_as_little_endian_uint32, setup, teardown),
      cmocka_unit_test_setup_teardown(the_digest_does_not_depend_on_how_the_ids_are_stored, setup, teardown),
      cmocka_unit_test_setup_teardown(a_file_without_tokens_is_read, setup, teardown),
      cmocka_unit_test_setup_teardown(ranges_and_ids_out_of_bounds_are_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(other_files_are_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(tokens_that_are_there_in_another_way_are_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_file_cut_short_is_refused, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
