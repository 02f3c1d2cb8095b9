/* test_hdf5_check.c: every structure of a file that HDF5 makes is followed, and each number in it that is changed, its checksum put
 * right, is found. Files that the program itself writes, and what is refused by name, are in test_store.c and test_tokens.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "hdf5_check.h"
#include "scratch.h"

enum { LINKS = 12, FEW = 20, MANY = 3000 }; /* links for a heap and a tree; chunks for one page of an index, and for several */

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

/* A dataset of that many bytes in chunks of one, with checksums or without. */
static void make_dataset(hid_t where, const char *name, hsize_t count, bool checksums) {
  hsize_t one = 1;
  hid_t space = H5Screate_simple(1, &count, NULL), creation = H5Pcreate(H5P_DATASET_CREATE);
  uint8_t *zeros = calloc(count, 1);
  H5Pset_chunk(creation, 1, &one);
  if (checksums) H5Pset_fletcher32(creation);
  hid_t set = H5Dcreate2(where, name, H5T_STD_U8LE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  assert_true(zeros && set >= 0 && H5Dwrite(set, H5T_STD_U8LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros) >= 0);
  free(zeros);
  H5Dclose(set);
  H5Pclose(creation);
  H5Sclose(space);
}

/* A file with links in a heap, attributes in another, a large one by itself, and datasets with each kind of index. */
static struct path make_file(void) {
  struct path path = scratch_path(&folder, "file.h5");
  struct error error = {0};
  struct hdf5_site site = {path.text, &error};
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  assert_true(H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0);
  hid_t file = H5Fcreate(path.text, H5F_ACC_TRUNC, H5P_DEFAULT, access);
  hid_t links = H5Gcreate2(file, "links", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  char *text = calloc(70001, 1);
  assert_true(file >= 0 && links >= 0 && text);
  for (int i = 0; i < LINKS; i++) {
    char name[16];
    snprintf(name, sizeof name, "link%d", i);
    H5Gclose(H5Gcreate2(links, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  }
  assert_int_equal(hdf5_write_integer(&site, links, ".", "small", 1), 0);
  memset(text, 'x', 70000);
  assert_int_equal(hdf5_write_text(&site, links, ".", "large", text), 0);
  free(text);
  make_dataset(file, "one", 1, true);
  make_dataset(file, "few", FEW, true);
  make_dataset(file, "many", MANY, false);
  H5Gclose(links);
  H5Pclose(access);
  assert_true(H5Fclose(file) >= 0);
  return path;
}

static int check(const char *path, struct error *error) {
  struct hdf5_site site = {path, error};
  int64_t bytes = 0;
  return hdf5_check(&site, &bytes);
}

static void the_checksum_is_that_of_its_inventor(void **state) {
  (void)state;
  assert_int_equal(hdf5_checksum("", 0), 0xdeadbeef);
  assert_int_equal(hdf5_checksum("Four score and seven years ago", 30), 0x17770551);
}

static void a_good_file_is_accepted(void **state) {
  (void)state;
  struct error error = {0};
  struct path path = make_file();
  if (check(path.text, &error)) fail_msg("%s", error.message);
}

/* ---- lies with the right checksum ---- */

static void put(uint8_t *at, uint64_t value, int width) {
  for (int i = 0; i < width; i++) at[i] = (uint8_t)(value >> 8 * i);
}

static uint32_t get(const uint8_t *at) {
  return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Puts the checksum right that stands `sum` bytes behind `at`: of all before it, or where `whole` is not 0, of that many bytes with zeros
 * in its place. */
static void repair(uint8_t *at, size_t sum, size_t whole) {
  if (whole) put(at + sum, 0, 4);
  put(at + sum, hdf5_checksum(at, whole ? whole : sum), 4);
}

struct lie {
  const char *signature; /* how the structure begins: letters, version, kind */
  size_t letters;
  int which; /* of those that begin so */
  size_t offset;
  int width;
  uint64_t value;
  size_t sum, whole; /* as repair takes them */
  const char *expected;
};

#define SUPERBLOCK     "\x89HDF", 4, 0
#define LINK_HEAP      "FRHP\0\7", 6, 0
#define ATTRIBUTE_HEAP "FRHP\0\10", 6, 0
#define LINK_BLOCK     "FHDB", 4, 1 /* the first is that of the attributes */
#define LINK_TREE      "BTHD\0\5", 6, 0
#define LINK_LEAF      "BTLF\0\5", 6, 0
#define FEW_INDEX      "FAHD\0\1", 6, 0 /* 1: with checksums */
#define FEW_BLOCK      "FADB\0\1", 6, 0
#define MANY_BLOCK     "FADB\0\0", 6, 0
enum { LEAF_SUM = 6 + LINKS * 11, FEW_SUM = 14 + FEW * 14, MANY_SUM = 14 + 1 };

static const struct lie lies[] = {
    {SUPERBLOCK, 9, 1, 4, 44, 0, "another kind of HDF5 file"},
    {SUPERBLOCK, 11, 1, 1, 44, 0, "did not close it"},
    {SUPERBLOCK, 12, 8, 512, 44, 0, "another kind of HDF5 file"},
    {SUPERBLOCK, 20, 8, 48, 44, 0, "another kind of HDF5 file"},
    {SUPERBLOCK, 28, 8, 1 << 30, 44, 0, "cut short"},
    {SUPERBLOCK, 36, 8, 1 << 30, 44, 0, "beyond its end"},
    {SUPERBLOCK, 36, 8, 0, 44, 0, "header of another kind"},
    {LINK_HEAP, 5, 2, 8, 142, 0, "heap of another kind"},
    {LINK_HEAP, 7, 2, 1, 142, 0, "heap of another kind"},
    {LINK_HEAP, 10, 4, 1 << 20, 142, 0, "heap of another kind"},
    {LINK_HEAP, 46, 8, 0, 142, 0, "what it counts"},
    {LINK_HEAP, 54, 8, 1024, 142, 0, "what it counts"},
    {LINK_HEAP, 70, 8, LINKS - 1, 142, 0, "what it counts"},
    {LINK_HEAP, 86, 8, 1, 142, 0, "what it counts"},
    {LINK_HEAP, 102, 8, 1, 142, 0, "heap of another kind"},
    {LINK_HEAP, 110, 2, 0, 142, 0, "heap of another kind"},
    {LINK_HEAP, 112, 8, 1024, 142, 0, "heap of another kind"},
    {LINK_HEAP, 120, 8, 1 << 17, 142, 0, "heap of another kind"},
    {LINK_HEAP, 132, 8, 0, 142, 0, "a part is not what it should be"},
    {LINK_HEAP, 140, 2, 1000, 142, 0, "heap of another kind"},
    {LINK_HEAP, 22, 8, 48, 142, 0, "a part is not what it should be"}, /* a tree of huge objects */
    {LINK_BLOCK, 5, 8, 0, 17, 512, "not where it belongs"},
    {LINK_BLOCK, 13, 4, 512, 17, 512, "not where it belongs"},
    {ATTRIBUTE_HEAP, 86, 8, 0, 142, 0, "what it counts"}, /* and yet there is one, over which the library loses memory */
    {ATTRIBUTE_HEAP, 78, 8, 1, 142, 0, "what it counts"},
    {LINK_TREE, 6, 4, 1 << 30, 34, 0, "tree of another kind"},
    {LINK_TREE, 10, 2, 12, 34, 0, "tree of another kind"},
    {LINK_TREE, 12, 2, 9, 34, 0, "tree of another kind"},
    {LINK_TREE, 12, 2, 1, 34, 0, "a part is not what it should be"},
    {LINK_TREE, 24, 2, 60, 34, 0, "too many records"},
    {LINK_TREE, 24, 2, 3, 34, 0, "a checksum is wrong"},
    {LINK_TREE, 26, 8, LINKS + 1, 34, 0, "the records it counts"},
    {LINK_TREE, 26, 8, (uint64_t)1 << 40, 34, 0, "the records it counts"},
    {LINK_LEAF, 5, 1, 8, LEAF_SUM, 0, "of another kind"},
    {LINK_LEAF, 6, 4, 0, LEAF_SUM, 0, "no proper name"},
    {LINK_LEAF, 10, 1, 0x20, LEAF_SUM, 0, "heap of another kind"},
    {LINK_LEAF, 10, 1, 0x10, LEAF_SUM, 0, "has not the object"},
    {LINK_LEAF, 11, 4, 0, LEAF_SUM, 0, "outside its blocks"},
    {LINK_LEAF, 11, 4, 500, LEAF_SUM, 0, "outside its blocks"},
    {LINK_LEAF, 11, 4, 1 << 20, LEAF_SUM, 0, "outside its blocks"},
    {LINK_LEAF, 15, 2, 0, LEAF_SUM, 0, "link of another kind"},
    {LINK_LEAF, 15, 2, 20, LEAF_SUM, 0, "of another length"},
    {LINK_LEAF, 15, 2, 4096, LEAF_SUM, 0, "outside its blocks"},
    {FEW_INDEX, 5, 1, 0, 24, 0, "index of chunks"},
    {FEW_INDEX, 6, 1, 200, 24, 0, "index of chunks"},
    {FEW_INDEX, 7, 1, 40, 24, 0, "index of chunks"},
    {FEW_INDEX, 8, 8, FEW - 1, 24, 0, "index of chunks"},
    {FEW_INDEX, 16, 8, UINT64_MAX, 24, 0, "too few bytes"},
    {FEW_BLOCK, 6, 8, 48, FEW_SUM, 0, "index of chunks"},
    {FEW_BLOCK, 14, 8, UINT64_MAX, FEW_SUM, 0, "too few bytes"},
    {FEW_BLOCK, 14, 8, 1 << 30, FEW_SUM, 0, "beyond its end"},
    {FEW_BLOCK, 14, 8, 0, FEW_SUM, 0, "overlap"},
    {FEW_BLOCK, 22, 2, 1000, FEW_SUM, 0, "a chunk is of another size"},
    {FEW_BLOCK, 22, 2, 3, FEW_SUM, 0, "a chunk is of another size"},
    {FEW_BLOCK, 24, 4, 1, FEW_SUM, 0, "a chunk is of another size"},
    {MANY_BLOCK, 14, 1, 0xc0, MANY_SUM, 0, "index of chunks"},
};

static uint8_t *find(uint8_t *bytes, size_t length, const char *signature, size_t letters, int which) {
  uint8_t *at = memmem(bytes, length, signature, letters);
  for (; at && which > 0; which--) at = memmem(at + 4, length - (size_t)(at + 4 - bytes), signature, letters);
  assert_non_null(at);
  return at;
}

static void refuse(const struct path *path, const uint8_t *bytes, size_t length, const char *expected) {
  struct error error = {0};
  scratch_write(path->text, bytes, length);
  assert_int_equal(check(path->text, &error), ERROR_INPUT);
  if (!strstr(error.message, expected)) fail_msg("'%s' does not say '%s'", error.message, expected);
}

static void every_lie_with_a_right_checksum_is_refused(void **state) {
  (void)state;
  struct path path = make_file();
  size_t length;
  uint8_t *bytes = scratch_read(path.text, &length), *copy = malloc(length);
  assert_non_null(copy);
  for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
    const struct lie *lie = &lies[i];
    memcpy(copy, bytes, length);
    uint8_t *at = find(copy, length, lie->signature, lie->letters, lie->which);
    uint32_t right = get(at + lie->sum);
    repair(at, lie->sum, lie->whole);
    assert_int_equal(get(at + lie->sum), right); /* what is put right is the checksum */
    put(at + lie->offset, lie->value, lie->width);
    repair(at, lie->sum, lie->whole);
    refuse(&path, copy, length, lie->expected);
  }
  free(copy);
  free(bytes);
}

/* A group that is in itself, which its count of links does not tell: whoever follows it comes to no end. */
static void a_file_that_leads_in_circles_is_refused(void **state) {
  (void)state;
  static const uint8_t link[] = {1, 0, 5, 'l', 'i', 'n', 'k', '7'}; /* version, flags, name; then the address */
  struct path path = make_file();
  size_t length;
  uint8_t *bytes = scratch_read(path.text, &length), *at = memmem(bytes, length, link, sizeof link);
  uint8_t *block = find(bytes, length, LINK_BLOCK);
  assert_true(at > block && at < block + 512);
  put(at + sizeof link, get(bytes + 36), 8); /* the first group */
  repair(block, 17, 512);
  refuse(&path, bytes, length, "parts of it overlap");
  free(bytes);
}

static void a_file_that_begins_with_a_dataset_is_refused(void **state) {
  (void)state;
  static const uint8_t link[] = {1, 0, 3, 'o', 'n', 'e'};
  struct path path = make_file();
  size_t length;
  uint8_t *bytes = scratch_read(path.text, &length), *at = memmem(bytes, length, link, sizeof link);
  assert_non_null(at);
  put(bytes + 36, get(at + sizeof link), 8);
  repair(bytes, 44, 0);
  refuse(&path, bytes, length, "does not begin with a group");
  free(bytes);
}

static void no_cut_or_missing_file_is_accepted(void **state) {
  (void)state;
  struct error error = {0};
  struct path path = make_file(), none = scratch_path(&folder, "none"), pipe = scratch_path(&folder, "pipe");
  assert_int_equal(truncate(path.text, 47), 0);
  assert_int_equal(check(path.text, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, "cut short"));
  error.code = 0;
  assert_int_equal(check(none.text, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, "No such file"));
  assert_int_equal(mkfifo(pipe.text, 0600), 0);
  error.code = 0;
  assert_int_equal(check(pipe.text, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, "not a regular file"));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(the_checksum_is_that_of_its_inventor, setup, teardown),
      cmocka_unit_test_setup_teardown(a_good_file_is_accepted, setup, teardown),
      cmocka_unit_test_setup_teardown(every_lie_with_a_right_checksum_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_file_that_leads_in_circles_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(a_file_that_begins_with_a_dataset_is_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(no_cut_or_missing_file_is_accepted, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
