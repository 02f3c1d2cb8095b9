/* mutate.c: mutation of HDF5 files. HDF5's structures carry checksums, at which plain mutation would stop: this one changes fields of a
 * structure and then puts all checksums right again. Structures are found by their signatures, whatever stands around them. */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "hdf5_check.h"

size_t LLVMFuzzerMutate(uint8_t *bytes, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t size, size_t most, unsigned seed);

/* Bytes [begin, end) whose checksum stands at `sum`: behind them, or inside and then zero for its own computing. */
struct area {
  size_t begin, end, sum;
  bool data; /* fletcher32 of a chunk, else lookup3 of metadata */
};

/* The value of an attribute, or the data of a chunk: what the program is told once it trusts the structure. */
struct value {
  size_t at, size;
};

enum { MAX_AREAS = 1024 };

struct input {
  uint8_t *bytes;
  size_t size;
  size_t base; /* of the HDF5 file that is being looked at */
  struct area areas[MAX_AREAS];
  struct value values[MAX_AREAS];
  size_t count, value_count;
};

static uint64_t number(const struct input *input, size_t at, int width) {
  uint64_t value = 0;
  for (int i = 0; i < width && at + (size_t)i < input->size; i++) value |= (uint64_t)input->bytes[at + (size_t)i] << 8 * i;
  return value;
}

static void put(struct input *input, size_t at, uint64_t value, int width) {
  for (int i = 0; i < width && at + (size_t)i < input->size; i++) input->bytes[at + (size_t)i] = (uint8_t)(value >> 8 * i);
}

static void add(struct input *input, size_t begin, uint64_t length, uint64_t sum, bool data) {
  if (input->count == MAX_AREAS || length > input->size || begin > input->size - length || sum > input->size ||
      begin + sum + 4 > input->size)
    return;
  input->areas[input->count++] = (struct area){begin, begin + (size_t)length, begin + (size_t)sum, data};
}

/* ---- checksums ---- */

static uint32_t fletcher32(const uint8_t *bytes, size_t length) {
  uint32_t low = 0, high = 0;
  for (size_t i = 0; i < length; i += 2) {
    low += (uint32_t)bytes[i] << 8 | (i + 1 < length ? bytes[i + 1] : 0u);
    low = (low & 0xffff) + (low >> 16);
    high += low;
    high = (high & 0xffff) + (high >> 16);
  }
  return high << 16 | low;
}

static uint32_t figure(struct input *input, const struct area *area) {
  const uint8_t *begin = input->bytes + area->begin;
  bool inside = area->sum < area->end;
  uint64_t kept = number(input, area->sum, 4);
  if (inside) put(input, area->sum, 0, 4);
  uint32_t sum = area->data ? fletcher32(begin, area->end - area->begin) : hdf5_checksum(begin, area->end - area->begin);
  if (inside) put(input, area->sum, kept, 4);
  return sum;
}

static bool right(struct input *input, const struct area *area) {
  return figure(input, area) == number(input, area->sum, 4);
}

/* Adds an area if its checksum is right as it stands. */
static void add_if_right(struct input *input, size_t begin, uint64_t length, uint64_t sum) {
  size_t before = input->count;
  add(input, begin, length, sum, false);
  if (input->count > before && !right(input, &input->areas[before])) input->count = before;
}

/* ---- structures ---- */

static void add_value(struct input *input, size_t at, uint64_t size) {
  if (input->value_count == MAX_AREAS || size == 0 || at > input->size || size > input->size - at) return;
  input->values[input->value_count++] = (struct value){at, (size_t)size};
}

/* The attributes among the messages of a header. */
static void find_values(struct input *input, size_t at, size_t end) {
  enum { ATTRIBUTE = 12, PREFIX = 4, BEFORE_NAME = 9 };
  while (at + PREFIX < end) {
    uint64_t length = number(input, at + 1, 2), before = BEFORE_NAME;
    for (size_t i = 2; i <= 6; i += 2) before += number(input, at + PREFIX + i, 2); /* name, type and shape */
    if (number(input, at, 1) == ATTRIBUTE && before < length) add_value(input, at + PREFIX + before, length - before);
    at += PREFIX + length;
  }
}

static void find_header(struct input *input, size_t at) {
  uint64_t flags = number(input, at + 5, 1), before = 6 + (flags & 32 ? 16 : 0) + (flags & 16 ? 4 : 0);
  int width = 1 << (flags & 3);
  uint64_t length = number(input, at + before, width);
  if (length >= input->size) return;
  add(input, at, before + (uint64_t)width + length, before + (uint64_t)width + length, false);
  find_values(input, at + before + (size_t)width, at + before + (size_t)width + (size_t)length);
}

/* A header's continuation: its length stands beside its address somewhere. */
static void find_continuation(struct input *input, size_t at) {
  uint8_t address[8];
  for (int i = 0; i < 8; i++) address[i] = (uint8_t)((at - input->base) >> 8 * i);
  const uint8_t *found = memmem(input->bytes, input->size, address, 8);
  if (!found) return;
  uint64_t length = number(input, (size_t)(found - input->bytes) + 8, 8);
  if (length < 8 || length >= input->size) return;
  add(input, at, length - 4, length - 4, false);
  find_values(input, at + 4, at + (size_t)length - 4);
}

/* Adds a structure of `first` bytes and any number of steps, which it does not say itself: that for which the checksum is right. */
static void find_steps(struct input *input, size_t at, size_t first, size_t step, int most) {
  size_t before = input->count;
  for (int i = 0; i <= most && input->count == before; i++) add_if_right(input, at, first + step * (size_t)i, first + step * (size_t)i);
}

/* A node of a tree: records, and in inner nodes pointers to one more node than these. */
static void find_node(struct input *input, size_t at, bool inner) {
  uint64_t type = number(input, at + 5, 1);
  size_t record = type == 5 ? 11 : type == 8 ? 17 : 24;
  if (!inner) find_steps(input, at, 6, record, 46);
  for (size_t pointer = 9; inner && pointer <= 12; pointer++) find_steps(input, at, 6 + pointer, record + pointer, 26);
}

/* A block of a heap, whose size is a power of two. */
static void find_block(struct input *input, size_t at) {
  for (uint64_t length = 512; length <= 65536; length *= 2)
    for (uint64_t offset = 4; offset <= 5; offset++) add_if_right(input, at, length, 13 + offset);
}

static void find_chunk(struct input *input, uint64_t address, uint64_t length) {
  if (length <= 4 || length >= input->size || address >= input->size) return;
  add(input, input->base + address, length - 4, length - 4, true);
  add_value(input, input->base + address, length - 4);
}

static void find_array(struct input *input, size_t at) {
  uint64_t filtered = number(input, at + 5, 1), element = number(input, at + 6, 1), count = number(input, at + 8, 8),
           block = number(input, at + 16, 8), page = 1024;
  add(input, at, 24, 24, false);
  if (element < 8 || count > input->size || block > input->size || count * element > input->size) return;
  uint64_t pages = count > page ? (count + page - 1) / page : 0, prefix = 14 + (pages + 7) / 8;
  size_t begin = input->base + block;
  add(input, begin, pages ? prefix : prefix + count * element, pages ? prefix : prefix + count * element, false);
  for (uint64_t i = 0; i < pages; i++) {
    uint64_t here = (i + 1 < pages ? page : count - i * page) * element;
    add(input, begin + prefix + 4 + i * (page * element + 4), here, here, false);
  }
  for (uint64_t i = 0; filtered && element > 12 && i < count && !pages; i++) {
    size_t entry = begin + prefix + i * element;
    find_chunk(input, number(input, entry, 8), number(input, entry + 8, (int)element - 12 > 8 ? 8 : (int)element - 12));
  }
}

/* The message of a dataset in one chunk with a checksum. */
static void find_layout(struct input *input, size_t at) {
  uint64_t rank = number(input, at + 3, 1), width = number(input, at + 4, 1);
  size_t index = at + 5 + (size_t)(rank * width);
  if (rank < 2 || rank > 3 || width < 1 || width > 8 || number(input, index, 1) != 1) return;
  find_chunk(input, number(input, index + 13, 8), number(input, index + 1, 8));
}

static void find_areas(struct input *input) {
  input->base = 0;
  input->count = input->value_count = 0;
  for (size_t at = 0; at + 48 <= input->size; at++) {
    switch (number(input, at, 4)) {
    case 0x46444889: /* the letters of a signature as a number: \x89HDF */
      input->base = at;
      add(input, at, 44, 44, false);
      break;
    case 0x5244484f: /* OHDR */
      find_header(input, at);
      break;
    case 0x4b48434f: /* OCHK */
      find_continuation(input, at);
      break;
    case 0x44485442: /* BTHD */
      add(input, at, 34, 34, false);
      break;
    case 0x464c5442: /* BTLF */
      find_node(input, at, false);
      break;
    case 0x4e495442: /* BTIN */
      find_node(input, at, true);
      break;
    case 0x50485246: /* FRHP */
      add(input, at, 142, 142, false);
      break;
    case 0x42444846: /* FHDB */
      find_block(input, at);
      break;
    case 0x42494846: /* FHIB */
      find_steps(input, at, 17, 32, 22);
      find_steps(input, at, 18, 32, 30);
      break;
    case 0x44484146: /* FAHD */
      find_array(input, at);
      break;
    default:
      if (number(input, at, 3) == 0x020204) find_layout(input, at);
    }
  }
}

static void repair(struct input *input) {
  for (size_t i = 0; i < input->count; i++) put(input, input->areas[i].sum, figure(input, &input->areas[i]), 4);
}

/* ---- mutation ---- */

/* A value that may mean something: small, large, an address, near to the present one. */
static uint64_t value_choose(const struct input *input, size_t at, int width) {
  uint64_t present = number(input, at, width);
  switch (rand() % 8) {
  case 0:
    return (uint64_t)(rand() % 17);
  case 1:
    return UINT64_MAX >> rand() % 64;
  case 2:
    return (uint64_t)1 << rand() % 64;
  case 3:
    return input->areas[(size_t)rand() % input->count].begin - input->base;
  case 4:
    return present ^ (uint64_t)1 << rand() % (8 * width);
  case 5:
    return input->size + (uint64_t)(rand() % 64) - 32;
  default:
    return present + (uint64_t)(rand() % 33) - 16;
  }
}

static void field_change(struct input *input) {
  const struct area *area = &input->areas[(size_t)rand() % input->count];
  int width = 1 << rand() % 4;
  size_t length = area->end - area->begin, at = area->begin + (length ? (size_t)rand() % length : 0);
  if (rand() % 2) at = area->begin + (size_t)rand() % (length < 64 ? length + 1 : 64);
  put(input, at, value_choose(input, at, width), width);
}

static void value_change(struct input *input) {
  if (input->value_count == 0) return;
  const struct value *value = &input->values[(size_t)rand() % input->value_count];
  int width = value->size % 8 == 0 && rand() % 2 ? 8 : 1 << rand() % 3;
  size_t at = value->at + (width == 8 ? (size_t)rand() % (value->size / 8) * 8 : (size_t)rand() % value->size);
  if (rand() % 4 == 0)
    LLVMFuzzerMutate(input->bytes + value->at, value->size, value->size);
  else if (at + (size_t)width <= value->at + value->size)
    put(input, at, value_choose(input, at, width), width);
}

/* Puts the beginning of one structure over another. */
static void area_copy(struct input *input) {
  const struct area *from = &input->areas[(size_t)rand() % input->count], *to = &input->areas[(size_t)rand() % input->count];
  size_t length = from->end - from->begin, room = to->end - to->begin;
  memmove(input->bytes + to->begin, input->bytes + from->begin, length < room ? length : room);
}

static void piece_change(struct input *input) {
  const struct area *area = &input->areas[(size_t)rand() % input->count];
  size_t length = area->end - area->begin, first = length ? (size_t)rand() % length : 0, room = length - first;
  if (room > 32) room = 1 + (size_t)rand() % 32;
  if (room > 0) LLVMFuzzerMutate(input->bytes + area->begin + first, room, room);
}

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t size, size_t most, unsigned seed) {
  static struct input input;
  srand(seed);
  input.bytes = bytes;
  input.size = size;
  find_areas(&input);
  if (input.count == 0 || rand() % 32 == 0) return LLVMFuzzerMutate(bytes, size, most);
  for (int changes = 1 + rand() % 3; changes > 0; changes--) {
    int way = rand() % 16;
    if (way == 0)
      area_copy(&input);
    else if (way < 8)
      value_change(&input);
    else if (way < 10)
      piece_change(&input);
    else
      field_change(&input);
  }
  if (rand() % 16 == 0) return size; /* checksums may be wrong too */
  repair(&input);
  find_areas(&input); /* lengths that have changed */
  repair(&input);
  return size;
}
