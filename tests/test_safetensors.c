/* test_safetensors.c: what a good checkpoint gives, and that every lie in a file is refused with a message that names it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "safetensors.h"
#include "scratch.h"

static struct path folder;

static int setup(void **state) {
  (void)state;
  folder = scratch_init();
  return 0;
}

static int teardown(void **state) {
  (void)state;
  scratch_free(&folder);
  return 0;
}

/* Writes a file whose data area holds the bytes 0, 1, 2, ... */
static struct path make_file(const char *name, uint64_t header_length, const char *header, size_t data_bytes) {
  size_t text = strlen(header), total = 8 + text + data_bytes;
  unsigned char *bytes = malloc(total);
  assert_non_null(bytes);
  for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(header_length >> (8 * i));
  memcpy(bytes + 8, header, text);
  for (size_t i = 0; i < data_bytes; i++) bytes[8 + text + i] = (unsigned char)i;
  struct path path = scratch_path(&folder, name);
  scratch_write(path.text, bytes, total);
  free(bytes);
  return path;
}

static void make_text(const char *name, const char *text) {
  scratch_write(scratch_path(&folder, name).text, text, strlen(text));
}

static void check_refused(int code, struct safetensors *checkpoint, const struct error *error, const char *expected) {
  if (code != ERROR_INPUT || error->code != ERROR_INPUT || checkpoint) fail_msg("not refused, for: %s", expected);
  if (!strstr(error->message, expected)) fail_msg("'%s' does not say '%s'", error->message, expected);
  for (const char *c = error->message; *c; c++) assert_true((unsigned char)*c >= 0x20);
}

static void refuse_file(const char *path, const char *expected) {
  struct error error = {0};
  struct safetensors *checkpoint = NULL;
  int code = safetensors_open_file(path, &checkpoint, &error);
  check_refused(code, checkpoint, &error, expected);
  assert_memory_equal(error.message, path, strlen(path));
}

static void refuse_folder(const char *expected) {
  struct error error = {0};
  struct safetensors *checkpoint = NULL;
  int code = safetensors_open(folder.text, &checkpoint, &error);
  check_refused(code, checkpoint, &error, expected);
}

static const char GOOD[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                           "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[8,20]},"
                           "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                           "\"c\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[20,28]},"
                           "\"e\":{\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[28,30]},"
                           "\"f\":{\"dtype\":\"F9_NEW\",\"shape\":[7],\"data_offsets\":[30,31]},"
                           "\"d\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[28,28]}}   ";

static void a_good_file_gives_its_tensors_by_name(void **state) {
  (void)state;
  struct error error = {0};
  struct safetensors *checkpoint;
  struct path path = make_file("model.safetensors", sizeof GOOD - 1, GOOD, 31);
  assert_int_equal(safetensors_open(folder.text, &checkpoint, &error), 0);
  assert_int_equal(safetensors_count(checkpoint), 6);
  for (size_t i = 0; i < 6; i++) assert_int_equal(safetensors_at(checkpoint, i)->name[0], 'a' + (int)i);
  const struct tensor *b = safetensors_find(checkpoint, "b");
  assert_non_null(b);
  assert_string_equal(b->path, path.text);
  assert_int_equal(b->dtype, DTYPE_BF16);
  assert_int_equal(b->dimensions, 2);
  assert_true(b->shape[0] == 2 && b->shape[1] == 3 && b->bytes == 12);
  unsigned char bytes[12];
  assert_int_equal(safetensors_read(b, 0, sizeof bytes, bytes, &error), 0);
  for (size_t i = 0; i < sizeof bytes; i++) assert_int_equal(bytes[i], 8 + i);
  assert_int_equal(safetensors_find(checkpoint, "c")->dtype, DTYPE_OTHER);
  assert_int_equal(safetensors_find(checkpoint, "c")->dimensions, 0);
  assert_int_equal(safetensors_find(checkpoint, "f")->dtype, DTYPE_OTHER);
  assert_int_equal(safetensors_find(checkpoint, "d")->bytes, 0);
  assert_null(safetensors_find(checkpoint, "__metadata__"));
  assert_null(safetensors_find(checkpoint, "bb"));
  safetensors_close(checkpoint);
  safetensors_close(NULL);
}

static void a_file_without_tensors_is_good(void **state) {
  (void)state;
  struct error error = {0};
  struct safetensors *checkpoint;
  struct path path = make_file("empty.safetensors", 2, "{}", 0);
  assert_int_equal(safetensors_open_file(path.text, &checkpoint, &error), 0);
  assert_int_equal(safetensors_count(checkpoint), 0);
  assert_null(safetensors_find(checkpoint, "a"));
  safetensors_close(checkpoint);
}

static void any_range_of_a_tensor_is_read(void **state) {
  (void)state;
  enum { BYTES = 40000 };
  struct error error = {0};
  struct safetensors *checkpoint;
  unsigned char bytes[BYTES];
  const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[40000],\"data_offsets\":[0,40000]}}";
  struct path path = make_file("ranges.safetensors", sizeof header - 1, header, BYTES);
  assert_int_equal(safetensors_open_file(path.text, &checkpoint, &error), 0);
  const size_t ranges[][2] = {{0, BYTES}, {100, 1}, {5000, 20000}, {BYTES - 1, 1}, {BYTES, 0}, {7, 0}};
  for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
    assert_int_equal(safetensors_read(safetensors_at(checkpoint, 0), ranges[i][0], ranges[i][1], bytes, &error), 0);
    for (size_t k = 0; k < ranges[i][1]; k++) assert_int_equal(bytes[k], (ranges[i][0] + k) % 256);
  }
  safetensors_close(checkpoint);
}

/* Cut short or written over while it is open: noticed by the next reading, without a signal. */
static void a_file_that_changes_is_noticed(void **state) {
  (void)state;
  const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[9000],\"data_offsets\":[0,9000]}}";
  for (int cut = 0; cut < 2; cut++) {
    struct error error = {0};
    struct safetensors *checkpoint;
    unsigned char byte;
    struct path path = make_file("changes.safetensors", sizeof header - 1, header, 9000);
    assert_int_equal(safetensors_open_file(path.text, &checkpoint, &error), 0);
    assert_int_equal(safetensors_read(safetensors_at(checkpoint, 0), 8999, 1, &byte, &error), 0);
    struct timespec past[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    assert_int_equal(cut ? truncate(path.text, 5000) : utimensat(AT_FDCWD, path.text, past, 0), 0);
    assert_int_equal(safetensors_read(safetensors_at(checkpoint, 0), 8999, 1, &byte, &error), ERROR_INPUT);
    assert_non_null(strstr(error.message, path.text));
    assert_non_null(strstr(error.message, "was changed while it was in use"));
    safetensors_close(checkpoint);
  }
}

#define TENSOR(name, dtype, shape, offsets) "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void every_lie_of_a_header_is_refused(void **state) {
  (void)state;
  static const struct {
    const char *header;
    size_t data_bytes;
    const char *expected;
  } lies[] = {
      {"[1,2]", 0, "not an object"},
      {"{\"a\":", 0, "JSON header"},
      {"{}{}", 0, "JSON header"},
      {"{\"a\":1}", 0, "'a': has no dtype"},
      {"{\"a\\nb\\u001b[31m\":{}}", 0, "'a?b?[31m': has no dtype"},
      {"{\"caf\\u00e9\\u009b31m\":{}}", 0, "'caf\xc3\xa9??31m': has no dtype"}, /* U+009B begins commands of terminals too */
      {"{\"__metadata__\":3}", 0, "__metadata__"},
      {"{\"__metadata__\":{\"a\":1}}", 0, "__metadata__"},
      {"{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "'a': has no dtype"},
      {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "'a': shape is not a list"},
      {"{" TENSOR("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "at most 8"},
      {"{" TENSOR("a", "F32", "[-1]", "[0,4]") "}", 4, "shape[0] is not"},
      {"{" TENSOR("a", "F32", "[1,1.0]", "[0,4]") "}", 4, "shape[1] is not"},
      {"{" TENSOR("a", "F32", "[99999999999999999999]", "[0,4]") "}", 4, "too big integer"},
      {"{" TENSOR("a", "F32", "[4294967296,4294967296]", "[0,0]") "}", 0, "more than 2^63"},
      {"{" TENSOR("a", "F32", "[4611686018427387904]", "[0,0]") "}", 0, "give it 0 bytes"},
      {"{" TENSOR("a", "F32", "[2]", "[0,4]") "}", 4, "give it 4 bytes but its shape has 2 elements of 32 bits"},
      {"{" TENSOR("a", "F4", "[3]", "[0,2]") "}", 2, "elements of 4 bits"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets are not"},
      {"{" TENSOR("a", "F32", "[1]", "[0]") "}", 4, "data_offsets are not"},
      {"{" TENSOR("a", "F32", "[1]", "[0,4,8]") "}", 4, "data_offsets are not"},
      {"{" TENSOR("a", "F32", "[1]", "[0,4.0]") "}", 4, "data_offsets are not"},
      {"{" TENSOR("a", "F32", "[1]", "[-4,0]") "}", 4, "data_offsets are not"},
      {"{" TENSOR("a", "F32", "[1]", "[4,0]") "}", 4, "data_offsets are not"},
      {"{" TENSOR("a.b", "F32", "[225]", "[0,900]") "}", 800, "'a.b': data_offsets end at 900 but the file holds 800 bytes"},
      {"{" TENSOR("a", "F32", "[1]", "[0,4]") "," TENSOR("b", "F32", "[1]", "[0,4]") "}", 4, "it overlaps"},
      {"{" TENSOR("a", "F32", "[2]", "[0,8]") "," TENSOR("b", "F32", "[2]", "[4,12]") "}", 12, "'b': begins at 4 where 8 was due"},
      {"{" TENSOR("a", "F32", "[2]", "[0,8]") "," TENSOR("b", "U8", "[0]", "[4,4]") "}", 8, "begins at 4 where 8 was due"},
      {"{" TENSOR("a", "F32", "[1]", "[0,4]") "," TENSOR("b", "F32", "[1]", "[8,12]") "}", 12, "there is a hole"},
      {"{" TENSOR("a", "F32", "[1]", "[4,8]") "}", 8, "'a': begins at 4 where 0 was due: there is a hole"},
      {"{" TENSOR("a", "F32", "[1]", "[0,4]") "}", 7, "3 bytes after the last tensor"},
      {"{}", 1, "1 bytes after the last tensor"},
      {"{" TENSOR("a", "F32", "[1]", "[0,4]") "," TENSOR("a", "F32", "[1]", "[4,8]") "}", 8, "duplicate object key"},
  };
  for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
    struct path path = make_file("lie.safetensors", strlen(lies[i].header), lies[i].header, lies[i].data_bytes);
    refuse_file(path.text, lies[i].expected);
  }
}

static void a_header_length_that_does_not_fit_is_refused(void **state) {
  (void)state;
  refuse_file(make_file("length", 3, "{}", 0).text, "header length 3 is beyond");
  refuse_file(make_file("length", UINT64_MAX, "{}", 0).text, "header length 18446744073709551615");
  refuse_file(make_file("length", 0, "{}", 0).text, "JSON header");
  refuse_file(make_file("length", 1, "{}", 0).text, "JSON header");
  struct path path = scratch_path(&folder, "short");
  scratch_write(path.text, "\2\0\0\0\0\0\0", 7);
  refuse_file(path.text, "holds 7 bytes");
  scratch_write(path.text, "", 0);
  refuse_file(path.text, "holds 0 bytes");
}

static void a_header_above_the_limit_is_refused_unread(void **state) {
  (void)state;
  struct path path = make_file("sparse", 100000001, "{}", 0);
  assert_int_equal(truncate(path.text, 200000000), 0);
  refuse_file(path.text, "above the format's limit");
}

static void deep_nesting_is_refused(void **state) {
  (void)state;
  enum { DEPTH = 1000000 };
  char *header = malloc(DEPTH + 1);
  assert_non_null(header);
  memset(header, '[', DEPTH);
  memcpy(header, "{\"a\":", 5);
  header[DEPTH] = 0;
  refuse_file(make_file("deep", DEPTH, header, 0).text, "JSON header");
  free(header);
}

static void what_is_not_a_file_is_refused(void **state) {
  (void)state;
  struct path pipe = scratch_path(&folder, "pipe");
  assert_int_equal(mkfifo(pipe.text, 0600), 0);
  refuse_file(pipe.text, "not a regular file");
  refuse_file(folder.text, "not a regular file");
  refuse_file(scratch_path(&folder, "none").text, "No such file");
}

static void a_folder_without_checkpoint_is_refused(void **state) {
  (void)state;
  struct error error = {0};
  struct safetensors *checkpoint = NULL;
  refuse_folder("holds neither");
  int code = safetensors_open(scratch_path(&folder, "none").text, &checkpoint, &error);
  check_refused(code, checkpoint, &error, "no such folder");
}

#define ONE(name) "{" TENSOR(name, "F32", "[1]", "[0,4]") "}"

static void make_shard(const char *name, const char *header) {
  make_file(name, strlen(header), header, 4);
}

static void shards_are_one_checkpoint(void **state) {
  (void)state;
  struct error error = {0};
  struct safetensors *checkpoint;
  make_shard("x-1.safetensors", ONE("b"));
  make_shard("x-2.safetensors", ONE("a"));
  make_text("model.safetensors.index.json",
            "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"x-2.safetensors\",\"b\":\"x-1.safetensors\"}}");
  assert_int_equal(safetensors_open(folder.text, &checkpoint, &error), 0);
  assert_int_equal(safetensors_count(checkpoint), 2);
  assert_string_equal(safetensors_at(checkpoint, 0)->name, "a");
  assert_string_equal(safetensors_find(checkpoint, "b")->path, scratch_path(&folder, "x-1.safetensors").text);
  assert_string_equal(safetensors_find(checkpoint, "a")->path, scratch_path(&folder, "x-2.safetensors").text);
  safetensors_close(checkpoint);
}

static void every_lie_of_an_index_is_refused(void **state) {
  (void)state;
  static const struct {
    const char *index, *expected;
  } lies[] = {
      {"", "JSON header"},
      {"{}", "weight_map: is missing"},
      {"{\"weight_map\":{}}", "weight_map: is missing or empty"},
      {"{\"weight_map\":[]}", "weight_map: is missing"},
      {"{\"weight_map\":{\"a\":1}}", "weight_map 'a': '' is not the name"},
      {"{\"weight_map\":{\"a\":\"\"}}", "weight_map 'a': '' is not the name"},
      {"{\"weight_map\":{\"a\":\"../x\"}}", "weight_map 'a': '../x' is not the name"},
      {"{\"weight_map\":{\"a\":\"..\"}}", "weight_map 'a': '..' is not the name"},
      {"{\"weight_map\":{\"a\":\"/etc/hostname\"}}", "is not the name of a file"},
      {"{\"weight_map\":{\"a\":\"sub/x\"}}", "is not the name of a file"},
      {"{\"weight_map\":{\"a\":\"./one\"}}", "is not the name of a file"},
      {"{\"weight_map\":{\"a\":\".\"}}", "is not a regular file"},
      {"{\"weight_map\":{\"a\":\"one\\u0000/../../x\"}}", "JSON header"},
      {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "there is no file 'gone.safetensors'"},
      {"{\"weight_map\":{\"a\":\"one\",\"z\":\"one\"}}", "weight_map 'z': is not in 'one'"},
      {"{\"weight_map\":{\"a\":\"two\",\"b\":\"one\"}}", "weight_map 'a': is not in 'two'"},
      {"{\"weight_map\":{\"a\":\"one\",\"b\":\"again\"}}", "tensor 'a': is in "},
      {"{\"weight_map\":{\"a\":\"one\",\"a\":\"two\"}}", "duplicate object key"},
      {"{\"weight_map\":{\"a\":\"broken\"}}", "broken: JSON header"},
  };
  make_shard("one", ONE("a"));
  make_shard("two", ONE("b"));
  make_shard("again", ONE("a"));
  make_shard("broken", "{");
  for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
    make_text("model.safetensors.index.json", lies[i].index);
    refuse_folder(lies[i].expected);
  }
}

/* Whatever byte of a header is changed: refused or read, never out of bounds (for AddressSanitizer to see). */
static void no_changed_byte_leads_outside(void **state) {
  (void)state;
  static const unsigned char changes[] = {0, 9, '"', '-', '0', '9', '[', '}', 0x7f, 0xff};
  struct path path = make_file("changed", sizeof GOOD - 1, GOOD, 31);
  size_t length;
  unsigned char *bytes = scratch_read(path.text, &length);
  FILE *file = fopen(path.text, "r+b");
  assert_non_null(file);
  setbuf(file, NULL);
  for (size_t i = 0; i < 8 + sizeof GOOD - 1; i++) {
    for (size_t change = 0; change <= sizeof changes; change++) {
      struct error error = {0};
      struct safetensors *checkpoint;
      fseek(file, (long)i, SEEK_SET);
      fputc(change < sizeof changes ? changes[change] : bytes[i], file); /* the last puts things right again */
      if (safetensors_open_file(path.text, &checkpoint, &error) == 0) {
        for (size_t t = 0; t < safetensors_count(checkpoint); t++) {
          const struct tensor *tensor = safetensors_at(checkpoint, t);
          unsigned char *all = malloc(tensor->bytes + 1);
          assert_int_equal(safetensors_read(tensor, 0, tensor->bytes, all, &error), 0);
          free(all);
        }
      }
      safetensors_close(checkpoint);
    }
  }
  fclose(file);
  free(bytes);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(a_good_file_gives_its_tensors_by_name, setup, teardown),
      cmocka_unit_test_setup_teardown(a_file_without_tensors_is_good, setup, teardown),
      cmocka_unit_test_setup_teardown(any_range_of_a_tensor_is_read, setup, teardown),
      cmocka_unit_test_setup_teardown(a_file_that_changes_is_noticed, setup, teardown),
      cmocka_unit_test_setup_teardown(every_lie_of_a_header_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_header_length_that_does_not_fit_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_header_above_the_limit_is_refused_unread, setup, teardown),
      cmocka_unit_test_setup_teardown(deep_nesting_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(what_is_not_a_file_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_folder_without_checkpoint_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(shards_are_one_checkpoint, setup, teardown),
      cmocka_unit_test_setup_teardown(every_lie_of_an_index_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(no_changed_byte_leads_outside, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
