/* hdf5_walk.c: the bytes of an HDF5 file and who takes them. */
#include "hdf5_walk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hdf5_check.h"
#include "printable.h"

enum { MAX_OBJECTS = 1 << 16 };

/* ---- messages ---- */

int walk_damaged(const struct walk *walk, const char *what) {
  bool somewhere = *walk->where != 0;
  return error_set(walk->site->error, ERROR_INPUT, "%s: is not an HDF5 file, or damaged: %s%s%s", walk->site->path,
                   somewhere ? printable(walk->where).text : "", somewhere ? ": " : "", what);
}

int walk_foreign(const struct walk *walk, const char *what) {
  bool somewhere = *walk->where != 0;
  return error_set(walk->site->error, ERROR_INPUT, "%s: %s%s%s; the file is damaged or was not made by this program", walk->site->path,
                   somewhere ? printable(walk->where).text : "", somewhere ? ": " : "", what);
}

static int out_of_memory(const struct walk *walk) {
  return error_set(walk->site->error, ERROR_WORK, "%s: out of memory", walk->site->path);
}

/* ---- bytes ---- */

/* Small parts lie beside each other: one read serves many of them, which matters where each is a message over a network. */
int walk_read(struct walk *walk, uint64_t address, size_t length, void *to) {
  enum { PAGE = 4096 };
  if (length == 0) return 0;
  if (length > sizeof walk->window - PAGE) return input_read(&walk->file, address, length, to, walk->site->error);
  if (address < walk->window_begin || address - walk->window_begin > walk->window_bytes ||
      length > walk->window_bytes - (address - walk->window_begin)) {
    uint64_t begin = address - address % PAGE, there = walk->file.bytes - begin;
    size_t bytes = there < sizeof walk->window ? (size_t)there : sizeof walk->window;
    walk->window_bytes = 0;
    if (input_read(&walk->file, begin, bytes, walk->window, walk->site->error)) return walk->site->error->code;
    walk->window_begin = begin;
    walk->window_bytes = bytes;
  }
  memcpy(to, walk->window + (address - walk->window_begin), length);
  return 0;
}

int walk_take(struct walk *walk, uint64_t address, uint64_t length) {
  if (address > walk->end || length > walk->end - address) return walk_damaged(walk, "a part lies beyond its end");
  if (length > walk->free_bytes) return walk_damaged(walk, "parts of it overlap");
  if (length == 0) return 0;
  if (walk->range_count == walk->range_capacity) {
    size_t capacity = walk->range_capacity ? 2 * walk->range_capacity : 64;
    struct walk_range *grown = realloc(walk->ranges, capacity * sizeof *grown);
    if (!grown) return out_of_memory(walk);
    walk->ranges = grown;
    walk->range_capacity = capacity;
  }
  walk->free_bytes -= length;
  walk->ranges[walk->range_count++] = (struct walk_range){address, address + length};
  return 0;
}

uint8_t *walk_take_read(struct walk *walk, uint64_t address, uint64_t length, const char *signature) {
  size_t letters = signature ? strlen(signature) : 0;
  if (walk_take(walk, address, length)) return NULL;
  uint8_t *bytes = malloc(length > letters ? (size_t)length : letters + 1);
  if (!bytes) {
    out_of_memory(walk);
    return NULL;
  }
  if (walk_read(walk, address, (size_t)length, bytes)) goto fail;
  if (length < letters || memcmp(bytes, signature ? signature : "", letters) != 0) {
    walk_damaged(walk, "a part is not what it should be");
    goto fail;
  }
  return bytes;
fail:
  free(bytes);
  return NULL;
}

static int compare_ranges(const void *left, const void *right) {
  const struct walk_range *a = left, *b = right;
  return (a->begin > b->begin) - (a->begin < b->begin);
}

int walk_overlap(struct walk *walk) {
  walk->where = "";
  qsort(walk->ranges, walk->range_count, sizeof *walk->ranges, compare_ranges);
  for (size_t i = 1; i < walk->range_count; i++)
    if (walk->ranges[i].begin < walk->ranges[i - 1].end) return walk_damaged(walk, "parts of it overlap");
  return 0;
}

int walk_object(struct walk *walk, uint64_t address, const uint8_t *name, size_t length) {
  if (walk->object_count == MAX_OBJECTS) return walk_foreign(walk, "has too many objects");
  if (walk->object_count == walk->object_capacity) {
    size_t capacity = walk->object_capacity ? 2 * walk->object_capacity : 16;
    struct walk_object *grown = realloc(walk->objects, capacity * sizeof *grown);
    if (!grown) return out_of_memory(walk);
    walk->objects = grown;
    walk->object_capacity = capacity;
  }
  struct walk_object *object = &walk->objects[walk->object_count++];
  object->address = address;
  snprintf(object->name, sizeof object->name, "%s%s%.*s", walk->where, *walk->where ? "/" : "", (int)length, (const char *)name);
  return 0;
}

/* ---- checksums ---- */

static uint32_t turn(uint32_t x, int bits) {
  return x << bits | x >> (32 - bits);
}

static uint32_t word(const uint8_t *bytes) {
  return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* One of three words is mixed with the one before and added to that by the one behind. */
static void mix(uint32_t *x, uint32_t *before, uint32_t behind, int bits) {
  *x -= *before;
  *x ^= turn(*before, bits);
  *before += behind;
}

static void finish(uint32_t *x, uint32_t by, int bits) {
  *x ^= by;
  *x -= turn(by, bits);
}

uint32_t hdf5_checksum(const void *from, size_t length) {
  const uint8_t *bytes = from;
  uint32_t a = 0xdeadbeefu + (uint32_t)length, b = a, c = a;
  if (length == 0) return c;
  for (; length > 12; length -= 12, bytes += 12) {
    a += word(bytes);
    b += word(bytes + 4);
    c += word(bytes + 8);
    mix(&a, &c, b, 4);
    mix(&b, &a, c, 6);
    mix(&c, &b, a, 8);
    mix(&a, &c, b, 16);
    mix(&b, &a, c, 19);
    mix(&c, &b, a, 4);
  }
  uint8_t last[12] = {0};
  memcpy(last, bytes, length);
  a += word(last);
  b += word(last + 4);
  c += word(last + 8);
  finish(&c, b, 14);
  finish(&a, c, 11);
  finish(&b, a, 25);
  finish(&c, b, 16);
  finish(&a, c, 4);
  finish(&b, a, 14);
  finish(&c, b, 24);
  return c;
}

int walk_checksum(const struct walk *walk, const uint8_t *bytes, size_t length) {
  struct cursor stored = {bytes + length, 4, false};
  return cursor_number(&stored, 4) == hdf5_checksum(bytes, length) ? 0 : walk_damaged(walk, "a checksum is wrong");
}

/* ---- cursors ---- */

uint64_t cursor_number(struct cursor *cursor, int bytes) {
  const uint8_t *at = cursor_bytes(cursor, (size_t)bytes);
  uint64_t number = 0;
  for (int i = 0; at && i < bytes; i++) number |= (uint64_t)at[i] << 8 * i;
  return number;
}

const uint8_t *cursor_bytes(struct cursor *cursor, size_t count) {
  const uint8_t *at = cursor->at;
  if (count > cursor->left) {
    cursor->beyond = true;
    cursor->left = 0;
    return NULL;
  }
  cursor->at += count;
  cursor->left -= count;
  return at;
}
