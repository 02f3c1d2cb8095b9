/* safetensors_writer.c: shards, their headers, and the index. */
#include "safetensors_writer.h"

#include <endian.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct entry {
  char *name; /* owned */
  const char *dtype;
  int dimensions;
  int64_t shape[2];
  int64_t bytes;
  int shard;
  int64_t offset; /* in the shard's data */
};

struct shard {
  int64_t header_bytes; /* with the length before it */
  int64_t data_bytes;
  struct export_file file;
};

struct safetensors_writer {
  const struct export_folder *folder;
  int64_t shard_bytes;
  struct entry *entries;
  int count, capacity;
  struct shard *shards;
  int shard_count;
  int next;        /* entry that the next piece belongs to */
  int64_t written; /* bytes of it */
};

static int64_t element_bytes(const char *dtype) {
  static const struct {
    const char *name;
    int64_t bytes;
  } types[] = {{"I64", 8}, {"I32", 4}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I8", 1}};
  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (strcmp(types[i].name, dtype) == 0) return types[i].bytes;
  return 0;
}

static int no_memory(struct error *error) {
  return error_set(error, ERROR_WORK, "out of memory for the list of tensors");
}

int safetensors_writer_open(int64_t shard_bytes, struct safetensors_writer **writer, struct error *error) {
  *writer = calloc(1, sizeof **writer);
  if (!*writer) return no_memory(error);
  (*writer)->shard_bytes = shard_bytes;
  return 0;
}

int safetensors_writer_announce(struct safetensors_writer *writer, const char *name, const char *dtype, int dimensions,
                                const int64_t *shape, struct error *error) {
  if (writer->count == writer->capacity) {
    int capacity = writer->capacity ? 2 * writer->capacity : 256;
    struct entry *entries = realloc(writer->entries, (size_t)capacity * sizeof *entries);
    if (!entries) return no_memory(error);
    writer->entries = entries;
    writer->capacity = capacity;
  }
  struct entry *entry = &writer->entries[writer->count];
  *entry = (struct entry){.name = strdup(name), .dtype = dtype, .dimensions = dimensions, .bytes = element_bytes(dtype)};
  if (!entry->name) return no_memory(error);
  for (int i = 0; i < dimensions; i++) entry->bytes *= entry->shape[i] = shape[i];
  writer->count++;
  return 0;
}

/* ---- layout ---- */

static void deal_to_shards(struct safetensors_writer *writer) {
  int64_t filled = 0;
  writer->shard_count = 1;
  for (int i = 0; i < writer->count; i++) {
    struct entry *entry = &writer->entries[i];
    if (filled > 0 && filled + entry->bytes > writer->shard_bytes) {
      writer->shard_count++;
      filled = 0;
    }
    entry->shard = writer->shard_count - 1;
    filled += entry->bytes;
  }
}

/* Wide elements first: the format allows no gaps, and readers map elements where they lie. */
static void place(struct safetensors_writer *writer) {
  for (int64_t width = 8; width > 0; width /= 2)
    for (int i = 0; i < writer->count; i++) {
      struct entry *entry = &writer->entries[i];
      if (element_bytes(entry->dtype) != width) continue;
      entry->offset = writer->shards[entry->shard].data_bytes;
      writer->shards[entry->shard].data_bytes += entry->bytes;
    }
}

static void shard_name(const struct safetensors_writer *writer, int shard, char name[48]) {
  if (writer->shard_count == 1)
    snprintf(name, 48, "model.safetensors");
  else
    snprintf(name, 48, "model-%05d-of-%05d.safetensors", shard + 1, writer->shard_count);
}

/* ---- headers and index ---- */

static char *header_text(const struct safetensors_writer *writer, int shard) {
  json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
  for (int i = 0; i < writer->count; i++) {
    const struct entry *entry = &writer->entries[i];
    if (entry->shard != shard) continue;
    json_t *shape = json_array();
    for (int d = 0; d < entry->dimensions; d++) json_array_append_new(shape, json_integer(entry->shape[d]));
    json_int_t first = entry->offset, end = entry->offset + entry->bytes;
    json_object_set_new(header, entry->name,
                        json_pack("{s:s, s:o, s:[I, I]}", "dtype", entry->dtype, "shape", shape, "data_offsets", first, end));
  }
  char *text = json_dumps(header, JSON_COMPACT);
  json_decref(header);
  return text;
}

/* Spaces fill the header up to a multiple of 8 bytes. */
static int write_header(struct safetensors_writer *writer, int index, struct error *error) {
  struct shard *shard = &writer->shards[index];
  char name[48], *text = header_text(writer, index);
  if (!text) return no_memory(error);
  size_t length = strlen(text), padded = (length + 7) / 8 * 8;
  uint64_t little = htole64(padded);
  shard_name(writer, index, name);
  if (!export_file_open(&shard->file, writer->folder, name, error) && !export_file_write(&shard->file, 0, &little, 8, error) &&
      !export_file_write(&shard->file, 8, text, length, error))
    export_file_write(&shard->file, 8 + (int64_t)length, "        ", padded - length, error);
  shard->header_bytes = 8 + (int64_t)padded;
  free(text);
  return error->code;
}

static int write_index(const struct safetensors_writer *writer, struct error *error) {
  int64_t total = 0;
  json_t *map = json_object();
  for (int i = 0; i < writer->count; i++) {
    char name[48];
    shard_name(writer, writer->entries[i].shard, name);
    json_object_set_new(map, writer->entries[i].name, json_string(name));
    total += writer->entries[i].bytes;
  }
  json_t *index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
  char *text = json_dumps(index, JSON_INDENT(2));
  json_decref(index);
  if (!text) return no_memory(error);
  export_folder_write(writer->folder, "model.safetensors.index.json", text, strlen(text), error);
  free(text);
  return error->code;
}

int safetensors_writer_begin(struct safetensors_writer *writer, const struct export_folder *folder, struct error *error) {
  writer->folder = folder;
  deal_to_shards(writer);
  writer->shards = calloc((size_t)writer->shard_count, sizeof *writer->shards);
  if (!writer->shards) return no_memory(error);
  for (int i = 0; i < writer->shard_count; i++) writer->shards[i].file.fd = -1;
  place(writer);
  return writer->shard_count > 1 ? write_index(writer, error) : 0;
}

/* ---- data ---- */

/* Files are open while their tensors come. */
static int turn_to(struct safetensors_writer *writer, const struct entry *entry, struct error *error) {
  bool first = writer->next == 0 || writer->entries[writer->next - 1].shard != entry->shard;
  if (!first || writer->written > 0) return 0;
  if (entry->shard > 0 && export_file_finish(&writer->shards[entry->shard - 1].file, error)) return error->code;
  return write_header(writer, entry->shard, error);
}

int safetensors_writer_write(struct safetensors_writer *writer, const char *name, const void *bytes, size_t count, struct error *error) {
  const struct entry *entry = writer->next < writer->count ? &writer->entries[writer->next] : NULL;
  if (!entry || strcmp(entry->name, name) != 0 || writer->written + (int64_t)count > entry->bytes)
    return error_set(error, ERROR_WORK, "%s: %zu bytes were not announced", name, count);
  if (turn_to(writer, entry, error)) return error->code;
  const struct shard *shard = &writer->shards[entry->shard];
  if (export_file_write(&shard->file, shard->header_bytes + entry->offset + writer->written, bytes, count, error)) return error->code;
  writer->written += (int64_t)count;
  if (writer->written < entry->bytes) return 0;
  writer->next++;
  writer->written = 0;
  return 0;
}

int safetensors_writer_finish(struct safetensors_writer *writer, struct error *error) {
  if (writer->next < writer->count)
    return error_set(error, ERROR_WORK, "%s: announced and not written", writer->entries[writer->next].name);
  return export_file_finish(&writer->shards[writer->shard_count - 1].file, error);
}

void safetensors_writer_close(struct safetensors_writer *writer) {
  if (!writer) return;
  for (int i = 0; i < writer->count; i++) free(writer->entries[i].name);
  for (int i = 0; writer->shards && i < writer->shard_count; i++) export_file_close(&writer->shards[i].file);
  free(writer->shards);
  free(writer->entries);
  free(writer);
}
