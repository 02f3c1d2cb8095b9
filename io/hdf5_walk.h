/* hdf5_walk.h: what the parts of hdf5_check share: the file, the bytes that are taken, and reading numbers out of them. */
#ifndef OMNIQUANT_HDF5_WALK_H
#define OMNIQUANT_HDF5_WALK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "file.h"
#include "hdf5_util.h"

static const uint64_t UNDEFINED = UINT64_MAX; /* an address of nothing */

/* Bytes that belong to one structure. */
struct walk_range {
  uint64_t begin, end;
};

/* An object that a link leads to. */
struct walk_object {
  uint64_t address;
  char name[160]; /* its path, for messages */
};

struct walk {
  const struct hdf5_site *site;
  struct input_file file;
  uint64_t end;            /* of the file, as it says itself: no structure lies beyond */
  uint64_t free_bytes;     /* that no structure has taken: as they cannot overlap, a file that leads in circles runs out of them */
  uint8_t window[1 << 15]; /* bytes of the file from window_begin on */
  uint64_t window_begin;
  size_t window_bytes;
  const char *where; /* path of the object that is being looked at */
  struct walk_range *ranges;
  size_t range_count, range_capacity;
  struct walk_object *objects; /* found, in the order of being found */
  size_t object_count, object_capacity;
};

/* Set the error and return its code (ERROR_INPUT): for what is broken, and for what is well made but not by us. */
int walk_damaged(const struct walk *walk, const char *what);
int walk_foreign(const struct walk *walk, const char *what);

/* Reads bytes, which lie inside the file, taking them or not. Taken are the bytes of a structure, whose buffer is freed by the caller; NULL
 * with the error set. A signature of four letters is checked where one is given. */
int walk_read(struct walk *walk, uint64_t address, size_t length, void *to);
int walk_take(struct walk *walk, uint64_t address, uint64_t length);
uint8_t *walk_take_read(struct walk *walk, uint64_t address, uint64_t length, const char *signature);

/* Checks the checksum behind the first `length` bytes. */
int walk_checksum(const struct walk *walk, const uint8_t *bytes, size_t length);

/* Whether any two structures overlap, once all are taken. */
int walk_overlap(struct walk *walk);

/* Adds an object to look at: `name`, of that many bytes, in the present one. */
int walk_object(struct walk *walk, uint64_t address, const uint8_t *name, size_t length);

/* A run of bytes being read from its beginning. Reading beyond its end gives 0 and marks it. */
struct cursor {
  const uint8_t *at;
  size_t left;
  bool beyond;
};

uint64_t cursor_number(struct cursor *cursor, int bytes); /* little-endian, of 0 .. 8 bytes */
const uint8_t *cursor_bytes(struct cursor *cursor, size_t count);

/* Whether exactly all was read. */
static inline bool cursor_done(const struct cursor *cursor) {
  return !cursor->beyond && cursor->left == 0;
}

/* ---- hdf5_layout.c ---- */

enum { WALK_MAX_RANK = 2, WALK_MAX_LAYOUT_BYTES = 64 };

struct walk_space {
  int rank; /* 0 for a single value */
  uint64_t extent[WALK_MAX_RANK];
  uint64_t count;
};

/* What an object's header says of a dataset. */
struct walk_dataset {
  uint64_t element_bytes;
  struct walk_space space;
  bool checksums;                        /* on each chunk */
  uint8_t layout[WALK_MAX_LAYOUT_BYTES]; /* the message that says where its bytes are */
  size_t layout_bytes;
};

/* Takes all bytes of a dataset, and those of what leads to them. */
int layout_check(struct walk *walk, const struct walk_dataset *dataset);

/* ---- hdf5_dense.c: what does not fit into an object's header ---- */

enum dense_kind { DENSE_LINKS, DENSE_ATTRIBUTES };

/* Looks through a heap and the tree of names that leads into it, and gives each message in it to `found`, with the hash that its name
 * shall have. */
int dense_check(struct walk *walk, enum dense_kind kind, uint64_t heap, uint64_t tree,
                int (*found)(struct walk *walk, struct cursor message, uint32_t hash));

#endif
