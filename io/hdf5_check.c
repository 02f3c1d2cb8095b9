/* hdf5_check.c: superblock, object headers and what they may hold: each message that may stand in a header is a row of `messages`. */
#include "hdf5_check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hdf5_walk.h"
#include "printable.h"

/* A piece of an object's header that is still to be read. */
struct piece {
  uint64_t address, length;
};

/* What the header of one object has said so far. */
struct header {
  unsigned seen; /* a bit a row of the table */
  struct walk_dataset dataset;
  uint64_t links_heap, links_tree, attributes_heap, attributes_tree; /* UNDEFINED for none */
  struct piece *pieces;
  size_t piece_count;
};

/* ---- types and spaces ---- */

/* Integers and IEEE numbers as they are in memory of one kind of machine or the other, and text of fixed length. */
static int type_read(struct walk *walk, struct cursor *cursor, uint64_t *type_bytes) {
  static const struct {
    uint64_t size, sign;
    uint8_t properties[12]; /* offset, precision, exponent's place and size, mantissa's, bias */
  } floats[] = {{2, 15, {0, 0, 16, 0, 10, 5, 0, 10, 15, 0, 0, 0}},
                {4, 31, {0, 0, 32, 0, 23, 8, 0, 23, 127, 0, 0, 0}},
                {8, 63, {0, 0, 64, 0, 52, 11, 0, 52, 255, 3, 0, 0}}};
  enum { INTEGER = 0, FLOAT = 1, TEXT = 3 };
  uint64_t kind = cursor_number(cursor, 1), flags = cursor_number(cursor, 3), size = cursor_number(cursor, 4);
  bool good = kind >> 4 >= 1 && kind >> 4 <= 3;
  *type_bytes = size;
  if ((kind & 15) == INTEGER) {
    uint64_t offset = cursor_number(cursor, 2), precision = cursor_number(cursor, 2);
    good = good && (flags & ~9u) == 0 && (size == 1 || size == 2 || size == 4 || size == 8) && offset == 0 && precision == 8 * size;
  } else if ((kind & 15) == FLOAT) {
    const uint8_t *properties = cursor_bytes(cursor, sizeof floats->properties);
    bool known = false;
    for (size_t i = 0; properties && i < sizeof floats / sizeof *floats; i++)
      known = known || (size == floats[i].size && flags == (0x20 | floats[i].sign << 8) &&
                        memcmp(properties, floats[i].properties, sizeof floats->properties) == 0);
    good = good && known;
  } else {
    good = good && (kind & 15) == TEXT && (flags & 15) <= 2 && flags >> 4 <= 1 && size >= 1;
  }
  return good && !cursor->beyond ? 0 : walk_foreign(walk, "is of another type than this program writes");
}

static int space_read(struct walk *walk, struct cursor *cursor, struct walk_space *space) {
  enum { HAS_MAXIMA = 1, SCALAR = 0, SIMPLE = 1 };
  uint64_t version = cursor_number(cursor, 1), rank = cursor_number(cursor, 1), flags = cursor_number(cursor, 1),
           kind = cursor_number(cursor, 1);
  bool good = version == 2 && flags <= HAS_MAXIMA && (kind == SCALAR ? rank == 0 : kind == SIMPLE && rank >= 1 && rank <= WALK_MAX_RANK);
  if (!good) return walk_foreign(walk, "has a shape of another kind than this program writes");
  *space = (struct walk_space){.rank = (int)rank, .count = 1};
  for (int i = 0; i < space->rank; i++) {
    space->extent[i] = cursor_number(cursor, 8);
    if (__builtin_mul_overflow(space->count, space->extent[i], &space->count)) return walk_damaged(walk, "a shape is too large");
  }
  for (int i = 0; i < space->rank && flags == HAS_MAXIMA; i++)
    if (cursor_number(cursor, 8) != space->extent[i]) return walk_foreign(walk, "has a shape that can grow");
  return cursor->beyond ? walk_damaged(walk, "a shape is cut short") : 0;
}

/* ---- messages of an object's header ---- */

static int nothing_message(struct walk *walk, struct header *header, struct cursor message) {
  (void)walk, (void)header, (void)message;
  return 0;
}

static int space_message(struct walk *walk, struct header *header, struct cursor message) {
  int failed = space_read(walk, &message, &header->dataset.space);
  return failed || cursor_done(&message) ? failed : walk_damaged(walk, "a shape is too long");
}

static int type_message(struct walk *walk, struct header *header, struct cursor message) {
  int failed = type_read(walk, &message, &header->dataset.element_bytes);
  return failed || cursor_done(&message) ? failed : walk_damaged(walk, "a type is too long");
}

/* Where links are that do not fit: their order of creation is not kept. */
static int link_info_message(struct walk *walk, struct header *header, struct cursor message) {
  bool plain = cursor_number(&message, 1) == 0;
  plain = cursor_number(&message, 1) == 0 && plain;
  header->links_heap = cursor_number(&message, 8);
  header->links_tree = cursor_number(&message, 8);
  return plain && cursor_done(&message) ? 0 : walk_foreign(walk, "is a group of another kind");
}

static int attribute_info_message(struct walk *walk, struct header *header, struct cursor message) {
  bool plain = cursor_number(&message, 1) == 0;
  plain = cursor_number(&message, 1) == 0 && plain;
  header->attributes_heap = cursor_number(&message, 8);
  header->attributes_tree = cursor_number(&message, 8);
  return plain && cursor_done(&message) ? 0 : walk_foreign(walk, "has attributes of another kind");
}

/* The value of what was never written: none is given. */
static int fill_message(struct walk *walk, struct header *header, struct cursor message) {
  (void)header;
  bool plain = cursor_number(&message, 1) == 3;
  plain = (cursor_number(&message, 1) & 0xe0) == 0 && plain;
  return plain && cursor_done(&message) ? 0 : walk_foreign(walk, "has a fill value");
}

static int link_read(struct walk *walk, struct cursor message, const uint32_t *hash) {
  enum { LENGTH_WIDTH = 3, ORDER = 4, KIND = 8, CHARSET = 16, HARD = 0, EXTERNAL = 64 };
  uint64_t version = cursor_number(&message, 1), flags = cursor_number(&message, 1);
  if (version != 1 || flags & ~(uint64_t)(LENGTH_WIDTH | KIND | CHARSET)) return walk_foreign(walk, "has a link of another kind");
  uint64_t kind = flags & KIND ? cursor_number(&message, 1) : HARD, charset = flags & CHARSET ? cursor_number(&message, 1) : 0;
  uint64_t length = cursor_number(&message, 1 << (flags & LENGTH_WIDTH));
  const uint8_t *name = cursor_bytes(&message, length);
  if (!name || length == 0 || memchr(name, 0, length) || memchr(name, '/', length) || (length == 1 && *name == '.') || charset > 1 ||
      (hash && *hash != hdf5_checksum(name, length))) {
    return walk_damaged(walk, "a link has no proper name");
  }
  if (kind == HARD) {
    uint64_t address = cursor_number(&message, 8);
    return cursor_done(&message) ? walk_object(walk, address, name, length) : walk_damaged(walk, "a link is of another length");
  }
  char where[100]; /* of the link, for the message */
  snprintf(where, sizeof where, "%.*s: is a link to elsewhere", (int)(length < 60 ? length : 60), (const char *)name);
  if (kind != EXTERNAL) return walk_foreign(walk, printable(where).text);
  uint64_t bytes = cursor_number(&message, 2); /* version and flags, file and object, both with a zero at the end */
  bool whole = message.left == bytes && cursor_number(&message, 1) == 0;
  const uint8_t *file = message.at, *end = whole ? memchr(file, 0, message.left) : NULL;
  const uint8_t *object = end ? end + 1 : NULL, *last = object ? memchr(object, 0, message.left - (size_t)(object - file)) : NULL;
  return last && last + 1 == message.at + message.left ? 0 : walk_damaged(walk, "a link to another file is cut short");
}

static int link_message(struct walk *walk, struct header *header, struct cursor message) {
  (void)header;
  return link_read(walk, message, NULL);
}

static int link_found(struct walk *walk, struct cursor message, uint32_t hash) {
  return link_read(walk, message, &hash);
}

static int attribute_read(struct walk *walk, struct cursor message, const uint32_t *hash) {
  uint64_t element_bytes = 0, bytes = 0;
  struct walk_space space = {0};
  bool plain = cursor_number(&message, 1) == 3;
  plain = cursor_number(&message, 1) == 0 && plain; /* neither type nor space lie elsewhere */
  uint64_t name_bytes = cursor_number(&message, 2), type_bytes = cursor_number(&message, 2), space_bytes = cursor_number(&message, 2);
  plain = cursor_number(&message, 1) <= 1 && plain;
  const uint8_t *name = cursor_bytes(&message, name_bytes);
  struct cursor type_cursor = {cursor_bytes(&message, type_bytes), type_bytes, false};
  struct cursor space_cursor = {cursor_bytes(&message, space_bytes), space_bytes, false};
  if (!plain) return walk_foreign(walk, "has an attribute of another kind");
  if (message.beyond || name_bytes < 2 || memchr(name, 0, name_bytes) != name + name_bytes - 1 ||
      (hash && *hash != hdf5_checksum(name, name_bytes - 1))) {
    return walk_damaged(walk, "an attribute is cut short or has no proper name");
  }
  char where[300];
  const char *object = walk->where; /* the attribute is what is looked at now */
  snprintf(where, sizeof where, "%s%sattribute %.60s", object, *object ? ": " : "", (const char *)name);
  walk->where = where;
  int failed = type_read(walk, &type_cursor, &element_bytes);
  if (!failed) failed = space_read(walk, &space_cursor, &space);
  bool fits = !failed && !__builtin_mul_overflow(space.count, element_bytes, &bytes) && bytes == message.left &&
              cursor_done(&type_cursor) && cursor_done(&space_cursor);
  if (!failed && !fits) failed = walk_damaged(walk, "its value is of another length than its type and shape");
  walk->where = object;
  return failed;
}

static int attribute_message(struct walk *walk, struct header *header, struct cursor message) {
  (void)header;
  return attribute_read(walk, message, NULL);
}

static int attribute_found(struct walk *walk, struct cursor message, uint32_t hash) {
  return attribute_read(walk, message, &hash);
}

static int layout_message(struct walk *walk, struct header *header, struct cursor message) {
  struct walk_dataset *dataset = &header->dataset;
  if (message.left > sizeof dataset->layout) return walk_foreign(walk, "is stored in another way than this program does");
  dataset->layout_bytes = message.left;
  memcpy(dataset->layout, message.at, message.left);
  return 0;
}

/* One filter: the checksum. */
static int filter_message(struct walk *walk, struct header *header, struct cursor message) {
  static const uint8_t fletcher32[] = {2, 1, 3, 0, 0, 0, 0, 0}; /* version, one filter, its number, flags, no values */
  if (message.left != sizeof fletcher32 || memcmp(message.at, fletcher32, sizeof fletcher32) != 0)
    return walk_foreign(walk, "is compressed, or filtered in another way than by a checksum");
  header->dataset.checksums = true;
  return 0;
}

static int piece_message(struct walk *walk, struct header *header, struct cursor message) {
  struct piece *grown = realloc(header->pieces, (header->piece_count + 1) * sizeof *grown);
  if (!grown) return error_set(walk->site->error, ERROR_WORK, "%s: out of memory", walk->site->path);
  header->pieces = grown;
  struct piece *piece = &header->pieces[header->piece_count++];
  piece->address = cursor_number(&message, 8);
  piece->length = cursor_number(&message, 8);
  return cursor_done(&message) ? 0 : walk_damaged(walk, "a header's continuation is cut short");
}

enum { SPACE = 1, LINK_INFO = 2, TYPE = 3, LINK = 6, LAYOUT = 8 };

static const struct {
  int (*check)(struct walk *walk, struct header *header, struct cursor message);
  bool many; /* may stand more than once */
} messages[] = {
    [0] = {nothing_message, true},          [SPACE] = {space_message, false}, [LINK_INFO] = {link_info_message, false},
    [TYPE] = {type_message, false},         [5] = {fill_message, false},      [LINK] = {link_message, true},
    [LAYOUT] = {layout_message, false},     [10] = {nothing_message, false}, /* when links move to a heap: for writing */
    [11] = {filter_message, false},         [12] = {attribute_message, true}, [16] = {piece_message, true},
    [21] = {attribute_info_message, false},
};

/* What else HDF5 may put into a header, by its number, in words that follow "has". */
static const char *const foreign[] = {
    [4] = "a fill value of the old layout",
    [7] = "data in other files",
    [9] = "a message of no meaning",
    [13] = "a comment",
    [14] = "a time of the old layout",
    [15] = "shared messages",
    [17] = "links of the old layout",
    [18] = "a time",
    [19] = "settings of trees",
    [20] = "settings of drivers",
    [22] = "more than one link to it",
    [23] = "settings of file space",
};

/* ---- objects ---- */

/* Reads the messages of one piece of a header. */
static int messages_read(struct walk *walk, struct header *header, struct cursor *cursor) {
  enum { PREFIX = 4, CONSTANT = 1, NOT_SHARED = 4 };
  while (cursor->left >= PREFIX) { /* less is a gap */
    uint64_t type = cursor_number(cursor, 1), length = cursor_number(cursor, 2), flags = cursor_number(cursor, 1);
    struct cursor message = {cursor_bytes(cursor, length), length, false};
    char what[60];
    bool named = type < sizeof foreign / sizeof *foreign && foreign[type];
    snprintf(what, sizeof what, "has %s", named ? foreign[type] : "a header message of another kind");
    if (!message.at) return walk_damaged(walk, "a header is cut short");
    if (type >= sizeof messages / sizeof *messages || !messages[type].check || flags & ~(uint64_t)(CONSTANT | NOT_SHARED))
      return walk_foreign(walk, what);
    if (header->seen >> type & 1 && !messages[type].many) return walk_damaged(walk, "a header says the same thing twice");
    header->seen |= 1u << type;
    int failed = messages[type].check(walk, header, message);
    if (failed) return failed;
  }
  return 0;
}

/* Finds the messages in the first piece of a header, whose bytes are freed by the caller; NULL with the error set. */
static uint8_t *header_begin(struct walk *walk, uint64_t address, struct cursor *found) {
  enum { LENGTH_WIDTH = 3, PHASE = 16, TIMES = 32, LONGEST = 4 + 1 + 1 + 16 + 4 + 8 };
  uint8_t prefix[LONGEST];
  uint64_t room = address < walk->end ? walk->end - address : 0;
  struct cursor cursor = {prefix, room < LONGEST ? (size_t)room : LONGEST, false};
  if (walk_read(walk, address, cursor.left, prefix)) return NULL;
  cursor_bytes(&cursor, 4);
  uint64_t version = cursor_number(&cursor, 1), flags = cursor_number(&cursor, 1);
  if (!cursor.beyond && (version != 2 || flags & ~(uint64_t)(LENGTH_WIDTH | PHASE | TIMES))) {
    walk_foreign(walk, "has a header of another kind");
    return NULL;
  }
  if (flags & TIMES) cursor_bytes(&cursor, 16);
  if (flags & PHASE) cursor_bytes(&cursor, 4); /* when attributes move to a heap: for writing */
  uint64_t length = cursor_number(&cursor, 1 << (flags & LENGTH_WIDTH));
  if (cursor.beyond || length > walk->end) {
    walk_damaged(walk, "a header lies beyond its end");
    return NULL;
  }
  size_t before = (size_t)(cursor.at - prefix);
  uint8_t *bytes = walk_take_read(walk, address, before + length + 4, "OHDR");
  if (bytes && walk_checksum(walk, bytes, before + length)) {
    free(bytes);
    return NULL;
  }
  if (bytes) *found = (struct cursor){bytes + before, (size_t)length, false};
  return bytes;
}

static int header_read(struct walk *walk, uint64_t address, struct header *header) {
  struct cursor cursor;
  uint8_t *bytes = header_begin(walk, address, &cursor);
  if (!bytes) return walk->site->error->code;
  int failed = messages_read(walk, header, &cursor);
  free(bytes);
  for (size_t i = 0; i < header->piece_count && !failed; i++) {
    enum { AROUND = 4 + 4 }; /* signature and checksum */
    uint64_t length = header->pieces[i].length;
    bytes = length < AROUND ? NULL : walk_take_read(walk, header->pieces[i].address, length, "OCHK");
    if (!bytes) return walk_damaged(walk, "a header's continuation is too short");
    cursor = (struct cursor){bytes + 4, (size_t)length - AROUND, false};
    failed = walk_checksum(walk, bytes, (size_t)length - 4);
    if (!failed) failed = messages_read(walk, header, &cursor);
    free(bytes);
  }
  return failed;
}

static int object_check(struct walk *walk, uint64_t address, bool first) {
  enum { GROUP = 1u << LINK_INFO, LINKS = 1u << LINK, DATASET = 1u << SPACE | 1u << TYPE | 1u << LAYOUT };
  struct header header = {.links_heap = UNDEFINED, .links_tree = UNDEFINED, .attributes_heap = UNDEFINED, .attributes_tree = UNDEFINED};
  int failed = header_read(walk, address, &header);
  unsigned group = header.seen & (GROUP | LINKS), dataset = header.seen & DATASET;
  free(header.pieces);
  if (failed) return failed;
  if (!(dataset == 0 && (group & GROUP)) && !(dataset == DATASET && group == 0 && !first))
    return walk_foreign(walk, first ? "does not begin with a group" : "is neither group nor dataset");
  if (dataset) failed = layout_check(walk, &header.dataset);
  if (!failed && header.links_heap != UNDEFINED) failed = dense_check(walk, DENSE_LINKS, header.links_heap, header.links_tree, link_found);
  if (!failed && header.attributes_heap != UNDEFINED)
    failed = dense_check(walk, DENSE_ATTRIBUTES, header.attributes_heap, header.attributes_tree, attribute_found);
  return failed;
}

/* ---- the file ---- */

/* Reads the superblock; *root receives the address of the first group. */
static int superblock_check(struct walk *walk, uint64_t *root) {
  enum { BYTES = 48, SIGNATURE_BYTES = 8 };
  static const uint8_t signature[SIGNATURE_BYTES] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
  uint8_t bytes[BYTES] = {0};
  size_t file_bytes = walk->file.bytes;
  struct cursor cursor = {bytes + SIGNATURE_BYTES, BYTES - SIGNATURE_BYTES, false};
  if (walk_read(walk, 0, file_bytes < BYTES ? file_bytes : BYTES, bytes)) return walk->site->error->code;
  if (memcmp(bytes, signature, SIGNATURE_BYTES) != 0) return walk_damaged(walk, "it does not begin as one");
  if (file_bytes < BYTES) return walk_damaged(walk, "it is cut short");
  uint64_t version = cursor_number(&cursor, 1);
  if (version < 2) {
    return error_set(walk->site->error, ERROR_INPUT, "%s: is an HDF5 file of the old layout, without checksums, which is not read",
                     walk->site->path);
  }
  bool plain = version <= 3 && cursor_number(&cursor, 2) == 0x0808; /* bytes of addresses and of sizes */
  bool closed = cursor_number(&cursor, 1) == 0;
  uint64_t base = cursor_number(&cursor, 8), extension = cursor_number(&cursor, 8);
  walk->end = cursor_number(&cursor, 8);
  *root = cursor_number(&cursor, 8);
  if (walk->end > file_bytes) return walk_damaged(walk, "it is cut short");
  walk->free_bytes = walk->end;
  if (walk_checksum(walk, bytes, BYTES - 4)) return walk->site->error->code;
  if (!plain || base != 0 || extension != UNDEFINED) return walk_foreign(walk, "is of another kind of HDF5 file");
  if (!closed) return walk_damaged(walk, "who wrote it did not close it");
  return walk_take(walk, 0, BYTES);
}

static int file_check(struct walk *walk) {
  uint64_t root = 0;
  int failed = superblock_check(walk, &root);
  if (!failed) failed = walk_object(walk, root, (const uint8_t *)"", 0);
  for (size_t i = 0; i < walk->object_count && !failed; i++) {
    struct walk_object object = walk->objects[i]; /* the array moves as it grows */
    walk->where = object.name;
    failed = object_check(walk, object.address, i == 0);
  }
  return failed ? failed : walk_overlap(walk);
}

int hdf5_check(const struct hdf5_site *site, int64_t *bytes) {
  struct walk walk = {.site = site, .where = ""};
  int failed = input_open(&walk.file, site->path, NULL, site->error);
  if (!failed) failed = file_check(&walk);
  *bytes = (int64_t)walk.file.bytes;
  input_close(&walk.file);
  free(walk.ranges);
  free(walk.objects);
  return failed;
}
