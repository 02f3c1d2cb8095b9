/* gguf_writer.c: keys and descriptions are made in memory, data goes to its place in the file. */
#include "gguf_writer.h"

#include <endian.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum value_type { VALUE_U32 = 4, VALUE_I32 = 5, VALUE_F32 = 6, VALUE_BOOL = 7, VALUE_TEXT = 8, VALUE_ARRAY = 9 };
enum { VERSION = 3, MAX_DIMENSIONS = 3 };

struct entry {
  char *name; /* owned */
  enum gguf_type type;
  int dimensions;
  int64_t sizes[MAX_DIMENSIONS];
  int64_t offset, bytes, written; /* from the data's beginning */
};

struct gguf_writer {
  FILE *keys; /* bytes of all keys, in key_bytes once flushed */
  char *key_bytes;
  size_t key_length;
  uint64_t key_count;
  struct entry *entries;
  int count, capacity, last; /* last: found last */
  int64_t data_bytes, data_offset;
  struct export_file file;
};

struct gguf_writer *gguf_writer_open(void) {
  struct gguf_writer *writer = calloc(1, sizeof *writer);
  if (!writer) return NULL;
  writer->file.fd = -1;
  writer->keys = open_memstream(&writer->key_bytes, &writer->key_length);
  if (writer->keys) return writer;
  free(writer);
  return NULL;
}

/* ---- little-endian values ---- */

static void put_u32(FILE *out, uint32_t value) {
  value = htole32(value);
  fwrite(&value, sizeof value, 1, out);
}

static void put_u64(FILE *out, uint64_t value) {
  value = htole64(value);
  fwrite(&value, sizeof value, 1, out);
}

static void put_f32(FILE *out, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  put_u32(out, bits);
}

static void put_text(FILE *out, const char *text, size_t length) {
  put_u64(out, length);
  fwrite(text, 1, length, out);
}

/* ---- keys ---- */

static void put_key(struct gguf_writer *writer, const char *key, enum value_type type) {
  put_text(writer->keys, key, strlen(key));
  put_u32(writer->keys, type);
  writer->key_count++;
}

void gguf_u32(struct gguf_writer *writer, const char *key, uint32_t value) {
  put_key(writer, key, VALUE_U32);
  put_u32(writer->keys, value);
}

void gguf_f32(struct gguf_writer *writer, const char *key, float value) {
  put_key(writer, key, VALUE_F32);
  put_f32(writer->keys, value);
}

void gguf_bool(struct gguf_writer *writer, const char *key, bool value) {
  put_key(writer, key, VALUE_BOOL);
  fputc(value, writer->keys);
}

void gguf_text(struct gguf_writer *writer, const char *key, const char *value) {
  put_key(writer, key, VALUE_TEXT);
  put_text(writer->keys, value, strlen(value));
}

static void put_array(struct gguf_writer *writer, const char *key, enum value_type type, uint64_t count) {
  put_key(writer, key, VALUE_ARRAY);
  put_u32(writer->keys, type);
  put_u64(writer->keys, count);
}

void gguf_texts(struct gguf_writer *writer, const char *key, uint64_t count) {
  put_array(writer, key, VALUE_TEXT, count);
}

void gguf_add_text(struct gguf_writer *writer, const char *value, size_t length) {
  put_text(writer->keys, value, length);
}

void gguf_f32s(struct gguf_writer *writer, const char *key, const float *values, uint64_t count) {
  put_array(writer, key, VALUE_F32, count);
  for (uint64_t i = 0; i < count; i++) put_f32(writer->keys, values[i]);
}

void gguf_i32s(struct gguf_writer *writer, const char *key, const int32_t *values, uint64_t count) {
  put_array(writer, key, VALUE_I32, count);
  for (uint64_t i = 0; i < count; i++) put_u32(writer->keys, (uint32_t)values[i]);
}

/* ---- tensors ---- */

int64_t gguf_row_bytes(enum gguf_type type, int64_t columns) {
  static const int64_t block_bytes[] = {[GGUF_Q4_0] = 18, [GGUF_Q4_1] = 20, [GGUF_Q5_0] = 22, [GGUF_Q5_1] = 24, [GGUF_Q8_0] = 34};
  if (type == GGUF_F32 || type == GGUF_F16) return columns * (type == GGUF_F32 ? 4 : 2);
  return columns / GGUF_BLOCK * block_bytes[type];
}

int gguf_writer_announce(struct gguf_writer *writer, const char *name, enum gguf_type type, int dimensions, const int64_t *sizes,
                         struct error *error) {
  if (writer->count == writer->capacity) {
    int capacity = writer->capacity ? 2 * writer->capacity : 256;
    struct entry *entries = realloc(writer->entries, (size_t)capacity * sizeof *entries);
    if (!entries) return error_set(error, ERROR_WORK, "out of memory for the list of tensors");
    writer->entries = entries;
    writer->capacity = capacity;
  }
  struct entry *entry = &writer->entries[writer->count];
  *entry = (struct entry){.name = strdup(name), .type = type, .dimensions = dimensions, .offset = writer->data_bytes};
  if (!entry->name) return error_set(error, ERROR_WORK, "out of memory for the list of tensors");
  entry->bytes = gguf_row_bytes(type, sizes[0]);
  for (int i = 0; i < dimensions; i++) entry->sizes[i] = sizes[i];
  for (int i = 1; i < dimensions; i++) entry->bytes *= sizes[i];
  writer->data_bytes += (entry->bytes + GGUF_BLOCK - 1) / GGUF_BLOCK * GGUF_BLOCK;
  writer->count++;
  return 0;
}

static void put_head(struct gguf_writer *writer, FILE *out) {
  fwrite("GGUF", 1, 4, out);
  put_u32(out, VERSION);
  put_u64(out, (uint64_t)writer->count);
  put_u64(out, writer->key_count);
  fwrite(writer->key_bytes, 1, writer->key_length, out);
  for (int i = 0; i < writer->count; i++) {
    const struct entry *entry = &writer->entries[i];
    put_text(out, entry->name, strlen(entry->name));
    put_u32(out, (uint32_t)entry->dimensions);
    for (int d = 0; d < entry->dimensions; d++) put_u64(out, (uint64_t)entry->sizes[d]);
    put_u32(out, entry->type);
    put_u64(out, (uint64_t)entry->offset);
  }
  while (ftell(out) % GGUF_BLOCK) fputc(0, out);
}

int gguf_writer_begin(struct gguf_writer *writer, const struct export_folder *folder, const char *name, struct error *error) {
  char *head = NULL;
  size_t length = 0;
  FILE *out = open_memstream(&head, &length);
  bool failed = !out || fflush(writer->keys) || ferror(writer->keys);
  if (!failed) put_head(writer, out);
  if (out && (ferror(out) | fclose(out))) failed = true;
  if (failed) error_set(error, ERROR_WORK, "%s: out of memory", name);
  writer->data_offset = (int64_t)length;
  if (!failed && !export_file_open(&writer->file, folder, name, error)) export_file_write(&writer->file, 0, head, length, error);
  free(head);
  return error->code;
}

int gguf_writer_write(struct gguf_writer *writer, const char *name, int64_t offset, const void *bytes, size_t count, struct error *error) {
  int found = 0; /* mostly the one of the last time or the next */
  while (found < writer->count && strcmp(writer->entries[(writer->last + found) % writer->count].name, name) != 0) found++;
  if (found == writer->count) return error_set(error, ERROR_WORK, "%s: was not announced", name);
  writer->last = (writer->last + found) % writer->count;
  struct entry *entry = &writer->entries[writer->last];
  if (offset + (int64_t)count > entry->bytes) return error_set(error, ERROR_WORK, "%s: more bytes than were announced", name);
  entry->written += (int64_t)count;
  return export_file_write(&writer->file, writer->data_offset + entry->offset + offset, bytes, count, error);
}

int gguf_writer_finish(struct gguf_writer *writer, struct error *error) {
  static const char zeros[GGUF_BLOCK];
  for (int i = 0; i < writer->count; i++) {
    const struct entry *entry = &writer->entries[i];
    if (entry->written != entry->bytes) return error_set(error, ERROR_WORK, "%s: announced and not written", entry->name);
    int64_t pad = -entry->bytes & (GGUF_BLOCK - 1);
    if (export_file_write(&writer->file, writer->data_offset + entry->offset + entry->bytes, zeros, (size_t)pad, error)) return error->code;
  }
  return export_file_finish(&writer->file, error);
}

void gguf_writer_close(struct gguf_writer *writer) {
  if (!writer) return;
  for (int i = 0; i < writer->count; i++) free(writer->entries[i].name);
  free(writer->entries);
  fclose(writer->keys);
  free(writer->key_bytes);
  export_file_close(&writer->file);
  free(writer);
}
