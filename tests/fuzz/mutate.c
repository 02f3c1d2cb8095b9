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

enum { MAX_AREAS = 1024 };

struct input {
  uint8_t *bytes;
  size_t size;
  size_t base; /* of the HDF5 file that is being looked at */
  struct area areas[MAX_AREAS];
  size_t count;
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

static void find_header(struct input *input, size_t at) {
  uint64_t flags = number(input, at + 5, 1), before = 6 + (flags & 32 ? 16 : 0) + (flags & 16 ? 4 : 0);
  int width = 1 << (flags & 3);
  uint64_t length = number(input, at + before, width);
  if (length < input->size) add(input, at, before + (uint64_t)width + length, before + (uint64_t)width + length, false);
}

/* A header's continuation: its length stands beside its address somewhere. */
static void find_continuation(struct input *input, size_t at) {
  uint8_t address[8];
  for (int i = 0; i < 8; i++) address[i] = (uint8_t)((at - input->base) >> 8 * i);
  const uint8_t *found = memmem(input->bytes, input->size, address, 8);
  if (!found) return;
  uint64_t length = number(input, (size_t)(found - input->bytes) + 8, 8);
  if (length >= 8 && length < input->size) add(input, at, length - 4, length - 4, false);
}

/* Nodes do not say how many records they have: any length will do for which the checksum is right. */
static void find_node(struct input *input, size_t at) {
  for (size_t length = 6; length <= 740 && at + length + 4 <= input->size; length++) {
    size_t before = input->count;
    add_if_right(input, at, length, length);
    if (input->count > before) return;
  }
}

/* The same for blocks of a heap, whose size is a power of two. */
static void find_block(struct input *input, size_t at) {
  for (uint64_t length = 512; length <= 65536; length *= 2)
    for (uint64_t offset = 4; offset <= 5; offset++) add_if_right(input, at, length, 13 + offset);
}

static void find_chunk(struct input *input, uint64_t address, uint64_t length) {
  if (length > 4 && length < input->size && address < input->size) add(input, input->base + address, length - 4, length - 4, true);
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
  input->count = 0;
  for (size_t at = 0; at + 48 <= input->size; at++) {
    const uint8_t *here = input->bytes + at;
    if (memcmp(here, "\x89HDF", 4) == 0) {
      input->base = at;
      add(input, at, 44, 44, false);
    } else if (memcmp(here, "\4\2\2", 3) == 0) {
      find_layout(input, at);
    } else if (memcmp(here, "OHDR", 4) == 0) {
      find_header(input, at);
    } else if (memcmp(here, "OCHK", 4) == 0) {
      find_continuation(input, at);
    } else if (memcmp(here, "BTHD", 4) == 0) {
      add(input, at, 34, 34, false);
    } else if (memcmp(here, "FRHP", 4) == 0) {
      add(input, at, 142, 142, false);
    } else if (memcmp(here, "FAHD", 4) == 0) {
      find_array(input, at);
    } else if (memcmp(here, "BTLF", 4) == 0 || memcmp(here, "BTIN", 4) == 0 || memcmp(here, "FHIB", 4) == 0) {
      find_node(input, at);
    } else if (memcmp(here, "FHDB", 4) == 0) {
      find_block(input, at);
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
    else if (way < 4)
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
