/* hdf5_dense.c: fractal heaps and version 2 B-trees of the kinds in which HDF5 keeps the links and attributes that are too many or too
 * large for an object's header. The tree's records are names' hashes and identifiers of the heap's objects; these lie in the blocks of a
 * doubling table or, if they are huge, by themselves, found by a tree of their own. */
#include <stdlib.h>
#include <string.h>

#include "hdf5_check.h"
#include "hdf5_walk.h"

enum {
  NODE_BYTES = 512,
  MAX_DEPTH = 4,        /* of a tree: beyond a million names */
  WIDTH = 4,            /* blocks in a row of a doubling table */
  MAX_DIRECT = 1 << 16, /* bytes of the largest block that holds objects */
  MAX_MANAGED = 4096,   /* bytes of the largest object in it */
  LENGTH_BYTES = 2,     /* of an object, in an identifier */
  MAX_HUGE = 256        /* objects that lie by themselves */
};

/* What HDF5 makes the heaps like. */
struct layout {
  int tree_type, record_bytes;
  int id_bytes;
  int offset_bits; /* of the heap's addresses */
  uint64_t start;  /* bytes of the first block */
};
static const struct layout layouts[] = {[DENSE_LINKS] = {5, 11, 7, 32, 512}, [DENSE_ATTRIBUTES] = {8, 17, 8, 40, 1024}};
enum { HUGE_TREE = 1, HUGE_RECORD_BYTES = 24 };

struct block {
  uint64_t offset, size; /* in the heap */
  uint8_t *bytes;
};

struct huge {
  uint64_t address, length, key;
};

struct heap {
  const struct layout *layout;
  uint64_t address, huge_tree;
  struct block *blocks; /* by offset */
  size_t block_count, block_capacity;
  uint64_t free_bytes; /* of the blocks, that no object has taken */
  struct count {
    uint64_t space, allocated;          /* bytes that its table stands for, and of its blocks */
    uint64_t managed, huge, huge_bytes; /* objects in blocks; by themselves, and their bytes */
  } says, has;                          /* by the heap's header, and as it was found */
  struct huge *huge;
  size_t huge_count, huge_capacity;
  int (*found)(struct walk *walk, struct cursor message, uint32_t hash);
};

static int log2_of(uint64_t power) {
  return __builtin_ctzll(power);
}

/* Room for one more of an array's elements; NULL with the error set. */
static void *grow(struct walk *walk, void *array, size_t count, size_t *capacity, size_t size) {
  if (count < *capacity) return array;
  size_t wanted = *capacity ? 2 * *capacity : 8;
  void *grown = realloc(array, wanted * size);
  if (grown)
    *capacity = wanted;
  else
    error_set(walk->site->error, ERROR_WORK, "%s: out of memory", walk->site->path);
  return grown;
}

/* ---- the doubling table ---- */

static uint64_t row_size(const struct layout *layout, int row) {
  return row == 0 ? layout->start : layout->start << (row - 1);
}

/* Rows of the table of a part of the heap with that many bytes. */
static int rows_of(const struct layout *layout, int bits) {
  return bits - log2_of(layout->start * WIDTH) + 1;
}

/* Signature, version, the heap's address and the block's offset, as all blocks begin. */
static bool block_begins(struct cursor *cursor, const struct heap *heap, uint64_t offset) {
  cursor_bytes(cursor, 4);
  return cursor_number(cursor, 1) == 0 && cursor_number(cursor, 8) == heap->address &&
         cursor_number(cursor, heap->layout->offset_bits / 8) == offset;
}

static int direct_block(struct walk *walk, struct heap *heap, uint64_t address, uint64_t offset, uint64_t size) {
  uint8_t *bytes = walk_take_read(walk, address, size, "FHDB"), zero[4] = {0}, stored[4];
  if (!bytes) return walk->site->error->code;
  struct block *grown = grow(walk, heap->blocks, heap->block_count, &heap->block_capacity, sizeof *grown);
  if (!grown) {
    free(bytes);
    return walk->site->error->code;
  }
  heap->blocks = grown;
  heap->blocks[heap->block_count++] = (struct block){offset, size, bytes};
  heap->free_bytes += size;
  heap->has.allocated += size;
  struct cursor cursor = {bytes, (size_t)size, false};
  if (!block_begins(&cursor, heap, offset)) return walk_damaged(walk, "a block of a heap is not where it belongs");
  uint8_t *checksum = bytes + (cursor.at - bytes); /* of the block with zeros in the checksum's place */
  memcpy(stored, checksum, 4);
  memcpy(checksum, zero, 4);
  uint32_t right = hdf5_checksum(bytes, (size_t)size);
  struct cursor is = {stored, 4, false};
  return cursor_number(&is, 4) == right ? 0 : walk_damaged(walk, "a checksum is wrong");
}

/* A table of blocks, and the tables below it, each smaller than the one above. */
static int indirect_block(struct walk *walk, struct heap *heap, uint64_t address, uint64_t offset, int rows) {
  const struct layout *layout = heap->layout;
  size_t prefix = 4 + 1 + 8 + (size_t)layout->offset_bits / 8, length = prefix + (size_t)rows * WIDTH * 8 + 4;
  uint8_t *bytes = walk_take_read(walk, address, length, "FHIB");
  if (!bytes) return walk->site->error->code;
  struct cursor cursor = {bytes, length, false};
  int failed = walk_checksum(walk, bytes, length - 4);
  if (!failed && !block_begins(&cursor, heap, offset)) failed = walk_damaged(walk, "a block of a heap is not where it belongs");
  for (int entry = 0; entry < rows * WIDTH && !failed; entry++) {
    uint64_t child = cursor_number(&cursor, 8), size = row_size(layout, entry / WIDTH);
    if (child != UNDEFINED && size <= MAX_DIRECT) failed = direct_block(walk, heap, child, offset, size);
    if (child != UNDEFINED && size > MAX_DIRECT) failed = indirect_block(walk, heap, child, offset, rows_of(layout, log2_of(size)));
    offset += size;
  }
  free(bytes);
  return failed;
}

static int heap_header(struct walk *walk, struct heap *heap) {
  enum { BYTES = 146 };
  const struct layout *layout = heap->layout;
  uint8_t *bytes = walk_take_read(walk, heap->address, BYTES, "FRHP");
  if (!bytes) return walk->site->error->code;
  struct cursor cursor = {bytes + 4, BYTES - 4, false};
  bool same = cursor_number(&cursor, 1) == 0 && cursor_number(&cursor, 2) == (uint64_t)layout->id_bytes;
  same = cursor_number(&cursor, 2) == 0 && same; /* no filters */
  same = cursor_number(&cursor, 1) == 2 && same; /* blocks have checksums */
  same = cursor_number(&cursor, 4) == MAX_MANAGED && same;
  cursor_bytes(&cursor, 8); /* the next huge object's key */
  heap->huge_tree = cursor_number(&cursor, 8);
  cursor_bytes(&cursor, 16); /* of free space: for writing */
  heap->says.space = cursor_number(&cursor, 8);
  heap->says.allocated = cursor_number(&cursor, 8);
  cursor_bytes(&cursor, 8); /* where the next block is made */
  heap->says.managed = cursor_number(&cursor, 8);
  heap->says.huge_bytes = cursor_number(&cursor, 8);
  heap->says.huge = cursor_number(&cursor, 8);
  same = cursor_number(&cursor, 8) == 0 && same; /* no objects inside of identifiers */
  same = cursor_number(&cursor, 8) == 0 && same;
  same = cursor_number(&cursor, 2) == WIDTH && same;
  same = cursor_number(&cursor, 8) == layout->start && same;
  same = cursor_number(&cursor, 8) == MAX_DIRECT && same;
  same = cursor_number(&cursor, 2) == (uint64_t)layout->offset_bits && same;
  same = cursor_number(&cursor, 2) == 1 && same; /* rows at the start */
  uint64_t root = cursor_number(&cursor, 8), rows = cursor_number(&cursor, 2);
  int failed = walk_checksum(walk, bytes, BYTES - 4);
  free(bytes);
  if (failed) return failed;
  if (!same || rows > (uint64_t)rows_of(layout, layout->offset_bits)) return walk_foreign(walk, "has a heap of another kind");
  if (root == UNDEFINED) return 0;
  heap->has.space = rows == 0 ? layout->start : (layout->start * WIDTH) << (rows - 1);
  return rows == 0 ? direct_block(walk, heap, root, 0, layout->start) : indirect_block(walk, heap, root, 0, (int)rows);
}

/* ---- trees ---- */

/* A tree's header, and what follows from it for each level. */
struct tree {
  struct heap *heap;
  int type, record_bytes;
  uint64_t records; /* found so far */
  struct level {
    uint64_t most, most_below; /* records of a node, and of it and all below */
    int pointer_bytes;         /* of a pointer to a node of the level below */
    int total_bytes;           /* of it, the count of records below: none in pointers to leaves */
  } level[MAX_DEPTH + 1];
  int (*record)(struct walk *walk, struct heap *heap, struct cursor record);
};

/* Bytes that a number up to this is kept in. */
static int bytes_for(uint64_t most) {
  return (63 - __builtin_clzll(most)) / 8 + 1;
}

static void levels_figure(struct tree *tree) {
  enum { PREFIX = 10 }; /* signature, version, type, checksum */
  struct level *leaf = &tree->level[0];
  leaf->most = leaf->most_below = (uint64_t)((NODE_BYTES - PREFIX) / tree->record_bytes);
  for (int i = 1; i <= MAX_DEPTH; i++) {
    struct level *level = &tree->level[i], *below = &tree->level[i - 1];
    level->total_bytes = i > 1 ? bytes_for(below->most_below) : 0;
    level->pointer_bytes = 8 + bytes_for(leaf->most) + level->total_bytes;
    level->most = (uint64_t)((NODE_BYTES - PREFIX - level->pointer_bytes) / (tree->record_bytes + level->pointer_bytes));
    level->most_below = (level->most + 1) * below->most_below + level->most;
  }
}

static int tree_node(struct walk *walk, struct tree *tree, uint64_t address, int depth, uint64_t records) {
  const struct level *level = &tree->level[depth];
  if (records > level->most) return walk_damaged(walk, "a node of a tree has too many records");
  uint8_t *bytes = walk_take_read(walk, address, NODE_BYTES, depth ? "BTIN" : "BTLF");
  if (!bytes) return walk->site->error->code;
  size_t inside = (size_t)records * (size_t)tree->record_bytes, pointers = depth ? (records + 1) * (uint64_t)level->pointer_bytes : 0;
  struct cursor record = {bytes + 4, inside + 2, false}, pointer = {bytes + 6 + inside, pointers, false};
  bool same = cursor_number(&record, 1) == 0;
  same = cursor_number(&record, 1) == (uint64_t)tree->type && same;
  int failed = walk_checksum(walk, bytes, 6 + inside + pointers);
  if (!failed && !same) failed = walk_damaged(walk, "a node of a tree is of another kind");
  for (uint64_t i = 0; i < records && !failed; i++)
    failed = tree->record(walk, tree->heap,
                          (struct cursor){cursor_bytes(&record, (size_t)tree->record_bytes), (size_t)tree->record_bytes, false});
  tree->records += records;
  for (uint64_t i = 0; depth && i <= records && !failed; i++) {
    uint64_t child = cursor_number(&pointer, 8), count = cursor_number(&pointer, level->pointer_bytes - 8 - level->total_bytes);
    uint64_t total = level->total_bytes ? cursor_number(&pointer, level->total_bytes) : count, before = tree->records;
    failed = tree_node(walk, tree, child, depth - 1, count);
    if (!failed && tree->records - before != total) failed = walk_damaged(walk, "a tree does not have the records it counts");
  }
  free(bytes);
  return failed;
}

static int tree_check(struct walk *walk, struct heap *heap, uint64_t address, int type, int record_bytes,
                      int (*record)(struct walk *, struct heap *, struct cursor)) {
  enum { BYTES = 38 };
  struct tree tree = {.heap = heap, .type = type, .record_bytes = record_bytes, .record = record};
  uint8_t *bytes = walk_take_read(walk, address, BYTES, "BTHD");
  if (!bytes) return walk->site->error->code;
  struct cursor cursor = {bytes + 4, BYTES - 4, false};
  bool same = cursor_number(&cursor, 1) == 0;
  same = cursor_number(&cursor, 1) == (uint64_t)type && same;
  same = cursor_number(&cursor, 4) == NODE_BYTES && same;
  same = cursor_number(&cursor, 2) == (uint64_t)record_bytes && same;
  uint64_t depth = cursor_number(&cursor, 2);
  cursor_bytes(&cursor, 2); /* when nodes are split and merged */
  uint64_t root = cursor_number(&cursor, 8), records = cursor_number(&cursor, 2), total = cursor_number(&cursor, 8);
  int failed = walk_checksum(walk, bytes, BYTES - 4);
  free(bytes);
  if (failed) return failed;
  if (!same || depth > MAX_DEPTH) return walk_foreign(walk, "has a tree of another kind");
  levels_figure(&tree);
  if (root != UNDEFINED)
    failed = tree_node(walk, &tree, root, (int)depth, records);
  else if (records != 0)
    failed = walk_damaged(walk, "a tree has no root");
  if (!failed && tree.records != total) failed = walk_damaged(walk, "a tree does not have the records it counts");
  return failed;
}

/* ---- objects of a heap ---- */

static int huge_record(struct walk *walk, struct heap *heap, struct cursor record) {
  if (heap->huge_count == MAX_HUGE) return walk_foreign(walk, "has too many large attributes");
  struct huge *grown = grow(walk, heap->huge, heap->huge_count, &heap->huge_capacity, sizeof *grown);
  if (!grown) return walk->site->error->code;
  heap->huge = grown;
  struct huge *huge = &heap->huge[heap->huge_count++];
  huge->address = cursor_number(&record, 8);
  huge->length = cursor_number(&record, 8);
  huge->key = cursor_number(&record, 8);
  return 0;
}

static int huge_object(struct walk *walk, struct heap *heap, uint64_t key, uint32_t hash) {
  for (size_t i = 0; i < heap->huge_count; i++) {
    if (heap->huge[i].key != key) continue;
    heap->has.huge++;
    heap->has.huge_bytes += heap->huge[i].length;
    uint8_t *bytes = walk_take_read(walk, heap->huge[i].address, heap->huge[i].length, NULL);
    if (!bytes) return walk->site->error->code;
    int failed = heap->found(walk, (struct cursor){bytes, (size_t)heap->huge[i].length, false}, hash);
    free(bytes);
    return failed;
  }
  return walk_damaged(walk, "a heap has not the object that a tree names");
}

static int managed_object(struct walk *walk, struct heap *heap, uint64_t offset, uint64_t length, uint32_t hash) {
  uint64_t overhead = 4 + 1 + 8 + (uint64_t)heap->layout->offset_bits / 8 + 4;
  size_t low = 0, high = heap->block_count; /* the last block that begins at the offset or before */
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (heap->blocks[middle].offset <= offset)
      low = middle + 1;
    else
      high = middle;
  }
  const struct block *block = low ? &heap->blocks[low - 1] : NULL;
  uint64_t begin = block ? offset - block->offset : 0;
  if (!block || begin < overhead || begin > block->size || length > block->size - begin)
    return walk_damaged(walk, "an object of a heap lies outside its blocks");
  if (length > heap->free_bytes) return walk_damaged(walk, "objects of a heap overlap");
  heap->free_bytes -= length;
  heap->has.managed++;
  return heap->found(walk, (struct cursor){block->bytes + begin, (size_t)length, false}, hash);
}

/* The identifier of a heap's object. */
static int object_find(struct walk *walk, struct heap *heap, struct cursor id, uint32_t hash) {
  enum { MANAGED = 0, HUGE = 0x10 };
  int offset_bytes = heap->layout->offset_bits / 8;
  uint64_t kind = cursor_number(&id, 1);
  if (kind == HUGE) return huge_object(walk, heap, cursor_number(&id, heap->layout->id_bytes - 1), hash);
  if (kind != MANAGED) return walk_foreign(walk, "has a heap of another kind");
  uint64_t offset = cursor_number(&id, offset_bytes);
  return managed_object(walk, heap, offset, cursor_number(&id, LENGTH_BYTES), hash);
}

static int link_record(struct walk *walk, struct heap *heap, struct cursor record) {
  uint32_t hash = (uint32_t)cursor_number(&record, 4);
  return object_find(walk, heap, record, hash);
}

static int attribute_record(struct walk *walk, struct heap *heap, struct cursor record) {
  struct cursor id = {cursor_bytes(&record, 8), 8, false};
  uint64_t flags = cursor_number(&record, 1);
  cursor_bytes(&record, 4); /* order of creation */
  if (flags != 0) return walk_foreign(walk, "has an attribute of another kind");
  return object_find(walk, heap, id, (uint32_t)cursor_number(&record, 4));
}

/* The library deletes the tree of huge objects when there are none left, even from a file that it only reads. */
static bool counts_same(const struct heap *heap) {
  const struct count *says = &heap->says, *has = &heap->has;
  return says->space == has->space && says->allocated == has->allocated && says->managed == has->managed && says->huge == has->huge &&
         says->huge_bytes == has->huge_bytes && (heap->huge_tree == UNDEFINED) == (has->huge == 0);
}

int dense_check(struct walk *walk, enum dense_kind kind, uint64_t heap_address, uint64_t tree,
                int (*found)(struct walk *walk, struct cursor message, uint32_t hash)) {
  const struct layout *layout = &layouts[kind];
  struct heap heap = {.layout = layout, .address = heap_address, .huge_tree = UNDEFINED, .found = found};
  int failed = heap_header(walk, &heap);
  if (!failed && heap.huge_tree != UNDEFINED) failed = tree_check(walk, &heap, heap.huge_tree, HUGE_TREE, HUGE_RECORD_BYTES, huge_record);
  if (!failed)
    failed = tree_check(walk, &heap, tree, layout->tree_type, layout->record_bytes, kind == DENSE_LINKS ? link_record : attribute_record);
  if (!failed && !counts_same(&heap)) failed = walk_damaged(walk, "a heap does not have what it counts");
  for (size_t i = 0; i < heap.block_count; i++) free(heap.blocks[i].bytes);
  free(heap.blocks);
  free(heap.huge);
  return failed;
}
