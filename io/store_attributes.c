/* store_attributes.c: writing and reading what a run is. */
#include "store_attributes.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "printable.h"

enum { VERSION = 1 };

static const char FORMAT[] = "omniquant";

/* JSON text that later readers will parse. */
static int json_check(const struct hdf5_site *site, const char *name, const char *text) {
  json_error_t where;
  json_t *value = json_loads(text, 0, &where);
  bool good = json_is_object(value);
  json_decref(value);
  if (good) return 0;
  return error_set(site->error, ERROR_INPUT, "%s: attribute %s: is not a JSON object", site->path, name);
}

static int hash_check(const struct hdf5_site *site, const char *name, const char *text) {
  size_t digits = strspn(text, "0123456789abcdef");
  if (!text[digits] && (digits == 0 || digits == 64)) return 0;
  return error_set(site->error, ERROR_INPUT, "%s: attribute %s: is not a SHA-256 in hexadecimal", site->path, name);
}

int store_attributes_check(const struct hdf5_site *site, const struct store_info *info) {
  if (hash_check(site, "tokens_sha256", info->tokens_sha256) || hash_check(site, "model_sha256", info->model_sha256))
    return site->error->code;
  if (info->blocks < 1 || info->blocks > STORE_MAX_BLOCKS) {
    return error_set(site->error, ERROR_INPUT, "%s: attribute blocks: is %d but must be in 1..%d", site->path, info->blocks,
                     STORE_MAX_BLOCKS);
  }
  if (info->first_block < 0 || info->first_block >= info->blocks) {
    return error_set(site->error, ERROR_INPUT, "%s: attribute first_block: is %d but the model has %d blocks", site->path,
                     info->first_block, info->blocks);
  }
  int failed = json_check(site, "recipe", info->recipe);
  return failed ? failed : json_check(site, "model_config", info->model_config);
}

int store_attributes_write(const struct hdf5_site *site, hid_t group, const struct store_info *info) {
  int failed = hdf5_write_text(site, group, ".", "format", FORMAT);
  if (!failed) failed = hdf5_write_integer(site, group, ".", "version", VERSION);
  if (!failed) failed = hdf5_write_text(site, group, ".", "model_type", info->model_type);
  if (!failed) failed = hdf5_write_text(site, group, ".", "recipe", info->recipe);
  if (!failed) failed = hdf5_write_text(site, group, ".", "model_config", info->model_config);
  if (!failed) failed = hdf5_write_text(site, group, ".", "tokens_sha256", info->tokens_sha256);
  if (!failed) failed = hdf5_write_text(site, group, ".", "model_sha256", info->model_sha256);
  if (!failed) failed = hdf5_write_integer(site, group, ".", "blocks", info->blocks);
  if (!failed) failed = hdf5_write_integer(site, group, ".", "first_block", info->first_block);
  return failed;
}

/* Reads a short text attribute into an array of the given size. */
static int short_text_read(const struct hdf5_site *site, hid_t group, const char *name, char *text, size_t size) {
  char *value = NULL;
  int failed = hdf5_read_text(site, group, ".", name, &value);
  if (!failed && strlen(value) >= size) {
    failed = error_set(site->error, ERROR_INPUT, "%s: attribute %s: is longer than %zu bytes", site->path, name, size - 1);
  }
  if (!failed) snprintf(text, size, "%s", value);
  free(value);
  return failed;
}

static int format_read(const struct hdf5_site *site, hid_t group) {
  char format[sizeof FORMAT];
  int64_t version = 0;
  int failed = short_text_read(site, group, "format", format, sizeof format);
  if (failed) return failed;
  if (strcmp(format, FORMAT) != 0) {
    return error_set(site->error, ERROR_INPUT, "%s: attribute format: is '%s', not '%s'; not a store of this program", site->path,
                     printable(format).text, FORMAT);
  }
  failed = hdf5_read_integer(site, group, ".", "version", INT64_MIN, INT64_MAX, &version);
  if (failed || version == VERSION) return failed;
  return error_set(site->error, ERROR_INPUT, "%s: attribute version: is %lld but this program reads version %d; use the one that made it",
                   site->path, (long long)version, VERSION);
}

/* Stores of earlier versions lack these. */
static int later_read(const struct hdf5_site *site, hid_t group, struct store_info *info) {
  int64_t first = 0;
  int failed = 0;
  if (hdf5_has_attribute(group, "model_sha256"))
    failed = short_text_read(site, group, "model_sha256", info->model_sha256, sizeof info->model_sha256);
  if (!failed && hdf5_has_attribute(group, "first_block"))
    failed = hdf5_read_integer(site, group, ".", "first_block", 0, STORE_MAX_BLOCKS, &first);
  info->first_block = (int)first;
  return failed;
}

int store_attributes_read(const struct hdf5_site *site, hid_t group, struct store_info *info) {
  int64_t blocks = 0;
  char *recipe = NULL, *config = NULL;
  *info = (struct store_info){0};
  int failed = format_read(site, group);
  if (!failed) failed = short_text_read(site, group, "model_type", info->model_type, sizeof info->model_type);
  if (!failed) failed = short_text_read(site, group, "tokens_sha256", info->tokens_sha256, sizeof info->tokens_sha256);
  if (!failed) failed = hdf5_read_integer(site, group, ".", "blocks", 1, STORE_MAX_BLOCKS, &blocks);
  if (!failed) failed = later_read(site, group, info);
  if (!failed) failed = hdf5_read_text(site, group, ".", "recipe", &recipe);
  if (!failed) failed = hdf5_read_text(site, group, ".", "model_config", &config);
  info->blocks = (int)blocks;
  info->recipe = recipe;
  info->model_config = config;
  if (!failed) failed = store_attributes_check(site, info);
  if (failed) store_info_free(info);
  return failed;
}
