/* safetensors.c: opening a checkpoint's files and checking their headers before anything they say is used.
 * A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes. */
#include "safetensors.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "file.h"
#include "printable.h"

enum { LENGTH_BYTES = 8, MAX_JSON_BYTES = 100000000 }; /* the limit of the format's own library */

static const char INDEX_NAME[] = "model.safetensors.index.json";

struct shard {
  char *path;
  struct input_file file;
};

struct safetensors {
  struct shard **shards; /* each by itself: tensors point to their files */
  size_t shard_count;
  struct tensor *tensors; /* by name once opened */
  size_t tensor_count;
};

static int out_of_memory(const char *path, struct error *error) {
  return error_set(error, ERROR_WORK, "%s: out of memory", path);
}

/* Parses a JSON object; NULL with the error set if it is not one. Keys that appear twice are refused. */
static json_t *object_parse(const char *path, const char *text, size_t length, struct error *error) {
  json_error_t where;
  json_t *object = json_loadb(text, length, JSON_REJECT_DUPLICATES, &where);
  if (!object) {
    error_set(error, ERROR_INPUT, "%s: JSON header, byte %d: %s; the file is damaged, download it again", path, where.position,
              printable(where.text).text);
  } else if (!json_is_object(object)) {
    error_set(error, ERROR_INPUT, "%s: the JSON header is not an object; the file is damaged, download it again", path);
    json_decref(object);
    object = NULL;
  }
  return object;
}

/* Bits of one element by the format's name of the type; 0 for a type this program has not heard of. */
static int dtype_parse(const char *name, enum dtype *dtype) {
  static const struct {
    const char *name;
    int bits;
    enum dtype dtype;
  } types[] = {
      {"F32", 32, DTYPE_F32},      {"F16", 16, DTYPE_F16},   {"BF16", 16, DTYPE_BF16},    {"F64", 64, DTYPE_OTHER},
      {"I64", 64, DTYPE_OTHER},    {"U64", 64, DTYPE_OTHER}, {"C64", 64, DTYPE_OTHER},    {"I32", 32, DTYPE_OTHER},
      {"U32", 32, DTYPE_OTHER},    {"I16", 16, DTYPE_OTHER}, {"U16", 16, DTYPE_OTHER},    {"I8", 8, DTYPE_OTHER},
      {"U8", 8, DTYPE_OTHER},      {"BOOL", 8, DTYPE_OTHER}, {"F8_E4M3", 8, DTYPE_OTHER}, {"F8_E5M2", 8, DTYPE_OTHER},
      {"F8_E8M0", 8, DTYPE_OTHER}, {"F4", 4, DTYPE_OTHER},   {"F6_E2M3", 6, DTYPE_OTHER}, {"F6_E3M2", 6, DTYPE_OTHER},
  };
  *dtype = DTYPE_OTHER;
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    if (strcmp(name, types[i].name) != 0) continue;
    *dtype = types[i].dtype;
    return types[i].bits;
  }
  return 0;
}

static int shape_parse(struct tensor *tensor, const json_t *entry, int64_t *elements, struct error *error) {
  const json_t *shape = json_object_get(entry, "shape");
  if (!json_is_array(shape) || json_array_size(shape) > TENSOR_MAX_DIMENSIONS) {
    return error_set(error, ERROR_INPUT, "%s: tensor '%s': shape is not a list of at most %d sizes; the file is damaged, download it again",
                     tensor->path, printable(tensor->name).text, TENSOR_MAX_DIMENSIONS);
  }
  tensor->dimensions = (int)json_array_size(shape);
  *elements = 1;
  for (int i = 0; i < tensor->dimensions; i++) {
    const json_t *size = json_array_get(shape, (size_t)i);
    if (!json_is_integer(size) || json_integer_value(size) < 0) {
      return error_set(error, ERROR_INPUT,
                       "%s: tensor '%s': shape[%d] is not a non-negative integer; the file is damaged, download it again", tensor->path,
                       printable(tensor->name).text, i);
    }
    tensor->shape[i] = json_integer_value(size);
    if (__builtin_mul_overflow(*elements, tensor->shape[i], elements)) {
      return error_set(error, ERROR_INPUT, "%s: tensor '%s': shape has more than 2^63 elements; the file is damaged, download it again",
                       tensor->path, printable(tensor->name).text);
    }
  }
  return 0;
}

/* Sets where the tensor's bytes are from data_offsets, which count from the end of the header. */
static int offsets_parse(struct tensor *tensor, const json_t *entry, size_t data, struct error *error) {
  size_t data_bytes = tensor->file->bytes - data;
  const json_t *offsets = json_object_get(entry, "data_offsets");
  const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end) || json_integer_value(begin) < 0 ||
      json_integer_value(end) < json_integer_value(begin)) {
    return error_set(error, ERROR_INPUT,
                     "%s: tensor '%s': data_offsets are not two rising integers; the file is damaged, download it again", tensor->path,
                     printable(tensor->name).text);
  }
  uint64_t first = (uint64_t)json_integer_value(begin), last = (uint64_t)json_integer_value(end);
  if (last > data_bytes) {
    return error_set(
        error, ERROR_INPUT,
        "%s: tensor '%s': data_offsets end at %llu but the file holds %zu bytes of data; the file is cut short, download it again",
        tensor->path, printable(tensor->name).text, (unsigned long long)last, data_bytes);
  }
  tensor->offset = data + (size_t)first;
  tensor->bytes = (size_t)(last - first);
  return 0;
}

static int tensor_parse(struct tensor *tensor, const json_t *entry, size_t data, struct error *error) {
  int64_t elements = 0, bits = 0;
  const char *type = json_string_value(json_object_get(entry, "dtype"));
  if (!type) {
    return error_set(error, ERROR_INPUT, "%s: tensor '%s': has no dtype; the file is damaged, download it again", tensor->path,
                     printable(tensor->name).text);
  }
  int width = dtype_parse(type, &tensor->dtype);
  int failed = shape_parse(tensor, entry, &elements, error);
  if (!failed) failed = offsets_parse(tensor, entry, data, error);
  if (failed || width == 0) return failed;
  if (__builtin_mul_overflow(elements, (int64_t)width, &bits) || bits % 8 != 0 || (uint64_t)bits / 8 != tensor->bytes) {
    return error_set(error, ERROR_INPUT,
                     "%s: tensor '%s': data_offsets give it %zu bytes but its shape has %lld elements of %d bits; the file is damaged, "
                     "download it again",
                     tensor->path, printable(tensor->name).text, tensor->bytes, (long long)elements, width);
  }
  return 0;
}

static int compare_offset(const void *left, const void *right) {
  const struct tensor *a = left, *b = right;
  if (a->offset != b->offset) return a->offset < b->offset ? -1 : 1;
  return (a->bytes > b->bytes) - (a->bytes < b->bytes);
}

static int compare_name(const void *left, const void *right) {
  return strcmp(((const struct tensor *)left)->name, ((const struct tensor *)right)->name);
}

/* Tensors must cover the data area without overlap and without a hole: a file of one reading. */
static int layout_check(struct tensor *tensors, size_t count, const struct input_file *file, size_t data, struct error *error) {
  size_t end = data;
  if (count > 0) qsort(tensors, count, sizeof *tensors, compare_offset);
  for (size_t i = 0; i < count; i++) {
    if (tensors[i].offset != end) {
      return error_set(error, ERROR_INPUT, "%s: tensor '%s': begins at %zu where %zu was due: %s; the file is damaged, download it again",
                       file->path, printable(tensors[i].name).text, tensors[i].offset - data, end - data,
                       tensors[i].offset < end ? "it overlaps another tensor" : "there is a hole");
    }
    end += tensors[i].bytes;
  }
  if (end != file->bytes) {
    return error_set(error, ERROR_INPUT, "%s: holds %zu bytes after the last tensor; the file is damaged, download it again", file->path,
                     file->bytes - end);
  }
  return 0;
}

static int metadata_check(const char *path, json_t *metadata, struct error *error) {
  const char *key;
  json_t *value;
  bool good = json_is_object(metadata);
  json_object_foreach(metadata, key, value) {
    good = good && json_is_string(value);
  }
  if (good) return 0;
  return error_set(error, ERROR_INPUT, "%s: __metadata__ is not an object of strings; the file is damaged, download it again", path);
}

/* Adds the tensors of one header, behind which `data` bytes into the file the tensors' bytes are, to the checkpoint. */
static int header_parse(struct safetensors *checkpoint, const struct input_file *file, json_t *header, size_t data, struct error *error) {
  size_t first = checkpoint->tensor_count;
  const char *key;
  json_t *entry;
  struct tensor *grown = realloc(checkpoint->tensors, (first + json_object_size(header) + 1) * sizeof *grown);
  if (!grown) return out_of_memory(file->path, error);
  checkpoint->tensors = grown;
  json_object_foreach(header, key, entry) {
    if (strcmp(key, "__metadata__") == 0) {
      if (metadata_check(file->path, entry, error)) return error->code;
      continue;
    }
    struct tensor *tensor = &grown[checkpoint->tensor_count];
    *tensor = (struct tensor){.name = strdup(key), .path = file->path, .file = file};
    if (!tensor->name) return out_of_memory(file->path, error);
    checkpoint->tensor_count++;
    if (tensor_parse(tensor, entry, data, error)) return error->code;
  }
  return layout_check(grown + first, checkpoint->tensor_count - first, file, data, error);
}

/* Finds the header: *length bytes behind the first eight. */
static int header_find(const struct input_file *file, size_t *length, struct error *error) {
  unsigned char first[LENGTH_BYTES];
  uint64_t bytes = 0;
  if (file->bytes < LENGTH_BYTES) {
    return error_set(error, ERROR_INPUT, "%s: holds %zu bytes, too few for a safetensors file; download it again", file->path, file->bytes);
  }
  if (input_read(file, 0, LENGTH_BYTES, first, error)) return error->code;
  for (int i = 0; i < LENGTH_BYTES; i++) bytes |= (uint64_t)first[i] << (8 * i);
  if (bytes > file->bytes - LENGTH_BYTES) {
    return error_set(error, ERROR_INPUT,
                     "%s: header length %llu is beyond the file's %zu bytes; not a safetensors file, or cut short: download it again",
                     file->path, (unsigned long long)bytes, file->bytes);
  }
  if (bytes > MAX_JSON_BYTES) {
    return error_set(error, ERROR_INPUT, "%s: header length %llu is above the format's limit of %d bytes; not a safetensors file",
                     file->path, (unsigned long long)bytes, MAX_JSON_BYTES);
  }
  *length = (size_t)bytes;
  return 0;
}

/* Reads and parses an object of JSON text in a file; NULL with the error set. */
static json_t *object_read(const struct input_file *file, size_t offset, size_t length, struct error *error) {
  char *text = malloc(length + 1);
  json_t *object = NULL;
  if (!text)
    out_of_memory(file->path, error);
  else if (!input_read(file, offset, length, text, error))
    object = object_parse(file->path, text, length, error);
  free(text);
  return object;
}

/* Opens one file and adds its tensors. The checkpoint owns `path` whatever comes of it. */
static int shard_add(struct safetensors *checkpoint, char *path, bool *missing, struct error *error) {
  struct shard **grown = path ? realloc(checkpoint->shards, (checkpoint->shard_count + 1) * sizeof(struct shard *)) : NULL;
  struct shard *shard = grown ? calloc(1, sizeof *shard) : NULL;
  size_t length = 0;
  if (grown) checkpoint->shards = grown;
  if (!shard) {
    free(path);
    return out_of_memory("checkpoint", error);
  }
  grown[checkpoint->shard_count++] = shard;
  shard->path = path;
  int failed = input_open(&shard->file, path, missing, error);
  if (!failed) failed = header_find(&shard->file, &length, error);
  if (failed) return failed;
  json_t *header = object_read(&shard->file, LENGTH_BYTES, length, error);
  if (!header) return error->code;
  failed = header_parse(checkpoint, &shard->file, header, LENGTH_BYTES + length, error);
  json_decref(header);
  return failed;
}

/* Puts the tensors in order of name, which finds the same name in two shards. */
static int names_sort(struct safetensors *checkpoint, struct error *error) {
  struct tensor *tensors = checkpoint->tensors;
  if (checkpoint->tensor_count > 0) qsort(tensors, checkpoint->tensor_count, sizeof *tensors, compare_name);
  for (size_t i = 1; i < checkpoint->tensor_count; i++) {
    if (strcmp(tensors[i - 1].name, tensors[i].name) != 0) continue;
    return error_set(error, ERROR_INPUT, "%s: tensor '%s': is in %s too; remove the file that does not belong to the checkpoint",
                     tensors[i].path, printable(tensors[i].name).text, tensors[i - 1].path);
  }
  return 0;
}

static const char *base_name(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

/* Opens every shard that weight_map names, once. */
static int shards_add(struct safetensors *checkpoint, const char *folder, const char *index, json_t *weight_map, struct error *error) {
  const char *key;
  json_t *value, *seen = json_object();
  int failed = seen ? 0 : out_of_memory(index, error);
  json_object_foreach(weight_map, key, value) {
    const char *name = json_string_value(value);
    bool missing = false;
    if (failed || (name && json_object_get(seen, name))) continue;
    if (!name || !*name || strchr(name, '/') || strstr(name, "..")) {
      failed = error_set(error, ERROR_INPUT, "%s: weight_map '%s': '%s' is not the name of a file in this folder; download the index again",
                         index, printable(key).text, printable(name ? name : "").text);
      continue;
    }
    failed = shard_add(checkpoint, path_join(folder, name, error), &missing, error);
    if (missing) {
      failed = error_set(error, ERROR_INPUT, "%s: weight_map '%s': there is no file '%s' in this folder; download it", index,
                         printable(key).text, printable(name).text);
    }
    if (!failed && json_object_set_new(seen, name, json_true()) != 0) failed = out_of_memory(index, error);
  }
  json_decref(seen);
  return failed;
}

/* Every tensor of weight_map must be in the shard that it names. */
static int weight_map_check(const struct safetensors *checkpoint, const char *index, json_t *weight_map, struct error *error) {
  const char *key;
  json_t *value;
  json_object_foreach(weight_map, key, value) {
    const struct tensor *tensor = safetensors_find(checkpoint, key);
    if (tensor && strcmp(base_name(tensor->path), json_string_value(value)) == 0) continue;
    return error_set(error, ERROR_INPUT,
                     "%s: weight_map '%s': is not in '%s'; index and shards do not belong together, download them again", index,
                     printable(key).text, printable(json_string_value(value)).text);
  }
  return 0;
}

/* *missing: there is no index. */
static int index_open(struct safetensors *checkpoint, const char *folder, const char *path, bool *missing, struct error *error) {
  struct input_file file;
  json_t *index = NULL, *weight_map;
  int failed = input_open(&file, path, missing, error);
  if (failed) return failed;
  if (file.bytes > MAX_JSON_BYTES) {
    failed = error_set(error, ERROR_INPUT, "%s: holds %zu bytes, more than an index can; download it again", path, file.bytes);
    goto done;
  }
  index = object_read(&file, 0, file.bytes, error);
  if (!index) {
    failed = error->code;
    goto done;
  }
  weight_map = json_object_get(index, "weight_map");
  if (!json_is_object(weight_map) || json_object_size(weight_map) == 0) {
    failed = error_set(error, ERROR_INPUT, "%s: weight_map: is missing or empty; download the index again", path);
    goto done;
  }
  failed = shards_add(checkpoint, folder, path, weight_map, error);
  if (!failed) failed = names_sort(checkpoint, error);
  if (!failed) failed = weight_map_check(checkpoint, path, weight_map, error);
done:
  json_decref(index);
  input_close(&file);
  return failed;
}

/* The plain file first, as the Hugging Face loader has it, then the index. */
static int folder_open(struct safetensors *checkpoint, const char *folder, struct error *error) {
  bool no_file = false, no_index = false;
  int failed = shard_add(checkpoint, path_join(folder, "model.safetensors", error), &no_file, error);
  if (!failed) failed = names_sort(checkpoint, error);
  if (!no_file) return failed;
  char *index = path_join(folder, INDEX_NAME, error);
  failed = index ? index_open(checkpoint, folder, index, &no_index, error) : error->code;
  free(index);
  if (!no_index) return failed;
  if (access(folder, F_OK) != 0) return error_set(error, ERROR_INPUT, "%s: no such folder", folder);
  return error_set(error, ERROR_INPUT, "%s: holds neither model.safetensors nor %s; give a checkpoint folder in safetensors format", folder,
                   INDEX_NAME);
}

/* Opens a folder, or the file `path` if folder is NULL. */
static int checkpoint_open(const char *folder, const char *path, struct safetensors **checkpoint, struct error *error) {
  int failed;
  *checkpoint = calloc(1, sizeof **checkpoint);
  if (!*checkpoint) return out_of_memory(folder ? folder : path, error);
  if (folder) {
    failed = folder_open(*checkpoint, folder, error);
  } else {
    failed = shard_add(*checkpoint, strdup(path), NULL, error);
    if (!failed) failed = names_sort(*checkpoint, error);
  }
  if (!failed) return 0;
  safetensors_close(*checkpoint);
  *checkpoint = NULL;
  return failed;
}

int safetensors_open(const char *folder, struct safetensors **checkpoint, struct error *error) {
  return checkpoint_open(folder, NULL, checkpoint, error);
}

int safetensors_open_file(const char *path, struct safetensors **checkpoint, struct error *error) {
  return checkpoint_open(NULL, path, checkpoint, error);
}

const struct tensor *safetensors_find(const struct safetensors *checkpoint, const char *name) {
  struct tensor key = {.name = name};
  if (checkpoint->tensor_count == 0) return NULL;
  return bsearch(&key, checkpoint->tensors, checkpoint->tensor_count, sizeof key, compare_name);
}

size_t safetensors_count(const struct safetensors *checkpoint) {
  return checkpoint->tensor_count;
}

const struct tensor *safetensors_at(const struct safetensors *checkpoint, size_t i) {
  return &checkpoint->tensors[i];
}

int safetensors_read(const struct tensor *tensor, size_t offset, size_t bytes, void *to, struct error *error) {
  return input_read(tensor->file, tensor->offset + offset, bytes, to, error);
}

void safetensors_close(struct safetensors *checkpoint) {
  if (!checkpoint) return;
  for (size_t i = 0; i < checkpoint->tensor_count; i++) free((char *)checkpoint->tensors[i].name);
  for (size_t i = 0; i < checkpoint->shard_count; i++) {
    input_close(&checkpoint->shards[i]->file);
    free(checkpoint->shards[i]->path);
    free(checkpoint->shards[i]);
  }
  free(checkpoint->tensors);
  free(checkpoint->shards);
  free(checkpoint);
}
