/* hdf5_layout.c: where a dataset's bytes are: in one piece, in one chunk, or in chunks that a fixed array names; nowhere else, and all of
 * them there. */
#include <stdlib.h>

#include "hdf5_walk.h"

enum {
  PAGE_BITS = 10,    /* of a fixed array: elements of a page */
  FLETCHER_BYTES = 4 /* that the checksum adds to a chunk */
};

static int not_stored(const struct walk *walk) {
  return walk_damaged(walk, "too few bytes are stored for its size");
}

static int layout_foreign(const struct walk *walk) {
  return walk_foreign(walk, "is stored in another way than this program does");
}

/* One element of a fixed array: the place of a chunk. */
static int chunk_check(struct walk *walk, const struct walk_dataset *dataset, struct cursor *element, int size_bytes,
                       uint64_t chunk_bytes) {
  uint64_t address = cursor_number(element, 8), bytes = chunk_bytes;
  if (address == UNDEFINED) return not_stored(walk);
  if (dataset->checksums) {
    bytes = cursor_number(element, size_bytes);
    if (cursor_number(element, 4) != 0 || bytes != chunk_bytes + FLETCHER_BYTES) return walk_damaged(walk, "a chunk is of another size");
  }
  return walk_take(walk, address, bytes);
}

struct array {
  uint64_t header, chunks, chunk_bytes;
  int size_bytes, element_bytes; /* of a chunk's size, and of all that is kept of a chunk */
};

/* The elements, in one piece or, if they are many, in pages with a checksum each. */
static int array_block(struct walk *walk, const struct walk_dataset *dataset, const struct array *array, uint64_t address) {
  uint64_t page = (uint64_t)1 << PAGE_BITS, pages = array->chunks > page ? (array->chunks + page - 1) / page : 0;
  uint64_t prefix = 4 + 1 + 1 + 8 + (pages + 7) / 8, elements = array->chunks * (uint64_t)array->element_bytes;
  uint64_t first = pages ? prefix : prefix + elements; /* bytes before the first checksum */
  uint8_t *bytes = walk_take_read(walk, address, prefix + elements + 4 * (pages + 1), "FADB");
  if (!bytes) return walk->site->error->code;
  struct cursor cursor = {bytes + 4, prefix - 4, false};
  bool same = cursor_number(&cursor, 1) == 0;
  same = cursor_number(&cursor, 1) == (dataset->checksums ? 1 : 0) && same;
  same = cursor_number(&cursor, 8) == array->header && same;
  for (uint64_t i = 0; i < pages; i++) same = (bytes[14 + i / 8] & 0x80 >> i % 8) != 0 && same; /* every page is there */
  int failed = walk_checksum(walk, bytes, first);
  if (!failed && !same) failed = walk_damaged(walk, "an index of chunks is not what it should be");
  cursor = (struct cursor){bytes + prefix, pages ? elements + 4 * (pages + 1) : elements, false};
  if (pages) cursor_bytes(&cursor, 4);
  for (uint64_t i = 0; i < array->chunks && !failed; i++) {
    if (pages && i % page == 0) {
      uint64_t count = array->chunks - i < page ? array->chunks - i : page;
      failed = walk_checksum(walk, cursor.at, count * (uint64_t)array->element_bytes);
    }
    if (!failed) failed = chunk_check(walk, dataset, &cursor, array->size_bytes, array->chunk_bytes);
    if (pages && (i % page == page - 1 || i + 1 == array->chunks)) cursor_bytes(&cursor, 4);
  }
  free(bytes);
  return failed;
}

static int array_check(struct walk *walk, const struct walk_dataset *dataset, struct array *array) {
  enum { BYTES = 28 };
  uint8_t *bytes = walk_take_read(walk, array->header, BYTES, "FAHD");
  if (!bytes) return walk->site->error->code;
  struct cursor cursor = {bytes + 4, BYTES - 4, false};
  bool same = cursor_number(&cursor, 1) == 0;
  same = cursor_number(&cursor, 1) == (dataset->checksums ? 1 : 0) && same;
  same = cursor_number(&cursor, 1) == (uint64_t)array->element_bytes && same;
  same = cursor_number(&cursor, 1) == PAGE_BITS && same;
  same = cursor_number(&cursor, 8) == array->chunks && same;
  uint64_t address = cursor_number(&cursor, 8);
  int failed = walk_checksum(walk, bytes, BYTES - 4);
  free(bytes);
  if (failed) return failed;
  if (!same) return walk_damaged(walk, "an index of chunks is not what it should be");
  /* Before anything is figured with it, the count must be one that the file has room for. */
  if (address == UNDEFINED || array->chunks > walk->end / 8) return not_stored(walk);
  return array_block(walk, dataset, array, address);
}

/* The number of chunks, and the bytes of one. */
static int chunks_figure(const struct walk *walk, const struct walk_dataset *dataset, struct cursor *cursor, uint64_t *chunks,
                         uint64_t *bytes) {
  const struct walk_space *space = &dataset->space;
  uint64_t rank = cursor_number(cursor, 1), width = cursor_number(cursor, 1);
  *chunks = 1;
  *bytes = 1;
  if (rank != (uint64_t)space->rank + 1 || width < 1 || width > 8) return layout_foreign(walk);
  for (int i = 0; i <= space->rank; i++) {
    uint64_t size = cursor_number(cursor, (int)width);
    if (size == 0 || __builtin_mul_overflow(*bytes, size, bytes) || *bytes > UINT32_MAX) return walk_damaged(walk, "a chunk is too large");
    if (i == space->rank && size != dataset->element_bytes) return walk_damaged(walk, "a chunk has elements of another size");
    if (i < space->rank && __builtin_mul_overflow(*chunks, (space->extent[i] - 1) / size + 1, chunks)) return not_stored(walk);
  }
  return 0;
}

static int chunked_check(struct walk *walk, const struct walk_dataset *dataset, struct cursor *cursor) {
  enum { ONE_FILTERED = 2, ONE = 1, FIXED_ARRAY = 3 };
  uint64_t flags = cursor_number(cursor, 1), bytes, chunks;
  int failed = chunks_figure(walk, dataset, cursor, &chunks, &bytes);
  if (failed) return failed;
  uint64_t index = cursor_number(cursor, 1);
  if (index == ONE && flags == (dataset->checksums ? ONE_FILTERED : 0) && chunks == 1) {
    uint64_t stored = bytes;
    if (dataset->checksums) {
      stored = cursor_number(cursor, 8);
      if (cursor_number(cursor, 4) != 0 || stored != bytes + FLETCHER_BYTES) return not_stored(walk);
    }
    uint64_t address = cursor_number(cursor, 8);
    if (!cursor_done(cursor)) return layout_foreign(walk);
    return address == UNDEFINED ? not_stored(walk) : walk_take(walk, address, stored);
  }
  if (index != FIXED_ARRAY || flags != 0 || cursor_number(cursor, 1) != PAGE_BITS) return layout_foreign(walk);
  struct array array = {.header = cursor_number(cursor, 8), .chunks = chunks, .chunk_bytes = bytes};
  array.size_bytes = (63 - __builtin_clzll(bytes)) / 8 + 2; /* one byte more than the size takes: filters may make it larger */
  array.element_bytes = 8 + (dataset->checksums ? array.size_bytes + 4 : 0);
  if (!cursor_done(cursor)) return layout_foreign(walk);
  return array.header == UNDEFINED ? not_stored(walk) : array_check(walk, dataset, &array);
}

int layout_check(struct walk *walk, const struct walk_dataset *dataset) {
  enum { CONTIGUOUS = 1, CHUNKED = 2 };
  struct cursor cursor = {dataset->layout, dataset->layout_bytes, false};
  uint64_t version = cursor_number(&cursor, 1), kind = cursor_number(&cursor, 1), bytes;
  if ((version != 3 && version != 4) || dataset->space.rank == 0) return layout_foreign(walk);
  if (__builtin_mul_overflow(dataset->space.count, dataset->element_bytes, &bytes)) return not_stored(walk);
  if (kind == CONTIGUOUS && !dataset->checksums) {
    uint64_t address = cursor_number(&cursor, 8), stored = cursor_number(&cursor, 8);
    if (!cursor_done(&cursor)) return layout_foreign(walk);
    if (stored != bytes || (bytes > 0 && address == UNDEFINED)) return not_stored(walk);
    return bytes > 0 ? walk_take(walk, address, stored) : 0;
  }
  if (version != 4 || kind != CHUNKED || bytes == 0) return layout_foreign(walk);
  return chunked_check(walk, dataset, &cursor);
}
