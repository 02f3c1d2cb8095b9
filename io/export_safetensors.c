/* export_safetensors.c: a model folder with other weights in it: safetensors, config.json, what belongs to the tokenizer, README.md. */
#include "export_safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors_writer.h"

struct folder_format {
  const struct export_job *job;
  const struct packing *packing;
  const struct export_folder *folder;
  struct safetensors_writer *writer;
};

/* What a model folder has beside weights and config.json, where it has it. */
static const char *const copied_files[] = {"tokenizer.json",
                                           "tokenizer_config.json",
                                           "tokenizer.model",
                                           "special_tokens_map.json",
                                           "added_tokens.json",
                                           "vocab.json",
                                           "merges.txt",
                                           "chat_template.jinja",
                                           "chat_template.json",
                                           "generation_config.json",
                                           "LICENSE",
                                           "LICENSE.txt",
                                           "LICENSE.md",
                                           "NOTICE",
                                           "USE_POLICY.md"};

int export_folder_format_open(const struct export_job *job, const struct packing *packing, void **state, struct error *error) {
  struct folder_format *format = *state = calloc(1, sizeof *format);
  if (!format) return error_set(error, ERROR_WORK, "out of memory for the export");
  format->job = job;
  format->packing = packing;
  if (packing->check(job, error)) return error->code;
  return safetensors_writer_open(job->shard_bytes, &format->writer, error);
}

void export_folder_format_close(void *state) {
  struct folder_format *format = state;
  if (!format) return;
  safetensors_writer_close(format->writer);
  free(format);
}

/* ---- tensors ---- */

int export_part_set(struct export_part *part, const struct quantized_linear *linear, const char *suffix, const char *dtype, int dimensions,
                    int64_t rows, int64_t columns, size_t bytes, struct error *error) {
  *part = (struct export_part){suffix, dtype, dimensions, {rows, columns}, bytes, NULL};
  if (!linear->codes) return 0;
  part->data = calloc(bytes + 1, 1);
  return part->data ? 0 : error_set(error, ERROR_WORK, "%s: out of memory for %zu bytes", linear->name, bytes);
}

static const char *type_of(const struct export_tensor *tensor) {
  return dtype_name(tensor->folded ? DTYPE_F32 : tensor->source->dtype);
}

static void part_name(char name[160], const struct export_tensor *tensor, const struct export_part *part) {
  size_t length = strlen(tensor->name) - strlen("weight");
  snprintf(name, 160, "%.*s%s", (int)length, tensor->name, part->suffix);
}

static int announce_layer(struct folder_format *format, const struct export_tensor *tensor, struct error *error) {
  struct export_part parts[EXPORT_MAX_PARTS];
  const struct quantized_linear *linear = tensor->linear;
  const struct packing *packing = format->packing;
  struct error wrong = {0};
  if (packing->check_layer && packing->check_layer(format->job, linear->out_features, linear->in_features, &wrong))
    return error_set(error, wrong.code, "%s: %s", tensor->name, wrong.message);
  int count = packing->parts(format->job, linear, parts, error);
  for (int i = 0; i < count && !error->code; i++) {
    char name[160];
    part_name(name, tensor, &parts[i]);
    safetensors_writer_announce(format->writer, name, parts[i].dtype, parts[i].dimensions, parts[i].shape, error);
  }
  return error->code;
}

int export_folder_format_announce(void *state, const struct export_tensor *tensor, struct error *error) {
  struct folder_format *format = state;
  if (tensor->linear) return announce_layer(format, tensor, error);
  return safetensors_writer_announce(format->writer, tensor->name, type_of(tensor), tensor->dimensions, tensor->shape, error);
}

static int write_layer(struct folder_format *format, const struct export_tensor *tensor, struct error *error) {
  struct export_part parts[EXPORT_MAX_PARTS] = {{0}};
  int count = format->packing->parts(format->job, tensor->linear, parts, error);
  for (int i = 0; i < count && !error->code; i++) {
    char name[160];
    part_name(name, tensor, &parts[i]);
    safetensors_writer_write(format->writer, name, parts[i].data, parts[i].bytes, error);
  }
  for (int i = 0; i < EXPORT_MAX_PARTS; i++) free(parts[i].data);
  return error->code;
}

/* The checkpoint's bytes as they are. */
static int write_copied(struct folder_format *format, const struct export_tensor *tensor, struct error *error) {
  enum { PIECE = 1 << 22 };
  char *piece = malloc(PIECE);
  if (!piece) return error_set(error, ERROR_WORK, "%s: out of memory", tensor->name);
  for (size_t offset = 0; offset < tensor->source->bytes && !error->code; offset += PIECE) {
    size_t left = tensor->source->bytes - offset, count = left < PIECE ? left : PIECE;
    if (!safetensors_read(tensor->source, offset, count, piece, error))
      safetensors_writer_write(format->writer, tensor->name, piece, count, error);
  }
  free(piece);
  return error->code;
}

/* In F32, so that what was folded into it stays exact. */
static int write_folded(struct folder_format *format, const struct export_tensor *tensor, struct error *error) {
  int64_t columns = tensor->shape[tensor->dimensions - 1], rows = tensor->dimensions == 2 ? tensor->shape[0] : 1;
  float *row = malloc((size_t)columns * sizeof *row);
  if (!row) return error_set(error, ERROR_WORK, "%s: out of memory", tensor->name);
  for (int64_t r = 0; r < rows && !error->code; r++)
    if (!export_values(tensor, r * columns, columns, row, error))
      safetensors_writer_write(format->writer, tensor->name, row, (size_t)columns * sizeof *row, error);
  free(row);
  return error->code;
}

int export_folder_format_write(void *state, const struct export_tensor *tensor, struct error *error) {
  struct folder_format *format = state;
  if (tensor->linear) return write_layer(format, tensor, error);
  return tensor->folded ? write_folded(format, tensor, error) : write_copied(format, tensor, error);
}

/* ---- the other files ---- */

/* Numbers as short as they can be read back. */
static char *json_text(const json_t *value) {
  char *text = NULL;
  bool same = false;
  for (size_t precision = 15; precision <= 17 && !same; precision++) {
    free(text);
    text = json_dumps(value, JSON_INDENT(2) | JSON_REAL_PRECISION(precision));
    json_t *again = text ? json_loads(text, 0, NULL) : NULL;
    same = json_equal(value, again);
    json_decref(again);
  }
  return text;
}

static int write_json(const struct export_folder *folder, const char *name, const json_t *value, struct error *error) {
  char *text = json_text(value);
  if (!text) return error_set(error, ERROR_WORK, "%s: out of memory", name);
  size_t length = strlen(text);
  text[length] = '\n'; /* in the place of the end */
  export_folder_write(folder, name, text, length + 1, error);
  free(text);
  return error->code;
}

static int write_config(const struct folder_format *format, struct error *error) {
  const struct packing *packing = format->packing;
  json_t *config = json_loads(format->job->config, 0, NULL);
  json_t *quantization = packing->config ? packing->config(format->job) : NULL;
  const char *dtype = packing->dtype ? packing->dtype(format->job) : NULL;
  if (quantization) json_object_set(config, "quantization_config", quantization);
  if (dtype) json_object_set_new(config, json_object_get(config, "dtype") ? "dtype" : "torch_dtype", json_string(dtype));
  if (!config || (packing->config && !quantization))
    error_set(error, ERROR_WORK, "config.json: out of memory");
  else if (!write_json(format->folder, "config.json", config, error) && packing->config_copy)
    write_json(format->folder, packing->config_copy, quantization, error);
  json_decref(quantization);
  json_decref(config);
  return error->code;
}

int export_folder_format_begin(void *state, const struct export_folder *folder, struct error *error) {
  struct folder_format *format = state;
  format->folder = folder;
  if (write_config(format, error)) return error->code;
  for (size_t i = 0; i < sizeof copied_files / sizeof *copied_files; i++)
    if (export_folder_copy(folder, format->job->model_folder, copied_files[i], error)) return error->code;
  return safetensors_writer_begin(format->writer, folder, error);
}

int export_folder_format_finish(void *state, struct error *error) {
  struct folder_format *format = state;
  return safetensors_writer_finish(format->writer, error);
}
