/* store_info.c: copying and comparing what a run is. */
#include "store_info.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "printable.h"

int store_info_copy(struct store_info *copy, const struct store_info *info, const char *where, struct error *error) {
  *copy = *info;
  copy->recipe = strdup(info->recipe);
  copy->model_config = strdup(info->model_config);
  if (copy->recipe && copy->model_config) return 0;
  store_info_free(copy);
  return error_set(error, ERROR_WORK, "%s: out of memory", where);
}

void store_info_free(struct store_info *info) {
  free((char *)info->recipe);
  free((char *)info->model_config);
  *info = (struct store_info){0};
}

/* A JSON value as a message shows it. */
static struct printable value_text(const json_t *value) {
  char *text = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(9)) : NULL;
  struct printable shown = printable(text ? text : "not set");
  free(text);
  return shown;
}

/* The first key by which two JSON objects differ. */
static bool objects_same(const char *what, const char *there, const char *here, char difference[200]) {
  json_t *old = json_loads(there, 0, NULL), *new = json_loads(here, 0, NULL);
  bool same = json_equal(old, new) != 0;
  const char *key;
  json_t *value;
  if (!same) snprintf(difference, 200, "%s differs", what);
  bool found = same;
  json_object_foreach(new, key, value) {
    if (found || json_equal(value, json_object_get(old, key))) continue;
    snprintf(difference, 200, "%s: %.40s is %.40s there and %.40s here", what, printable(key).text,
             value_text(json_object_get(old, key)).text, value_text(value).text);
    found = true;
  }
  json_object_foreach(old, key, value) {
    if (found || json_object_get(new, key)) continue;
    snprintf(difference, 200, "%s: %.40s is %.40s there and not set here", what, printable(key).text, value_text(value).text);
    found = true;
  }
  json_decref(old);
  json_decref(new);
  return same;
}

bool store_info_same(const struct store_info *there, const struct store_info *here, char difference[200]) {
  if (!objects_same("recipe", there->recipe, here->recipe, difference)) return false;
  if (!objects_same("model", there->model_config, here->model_config, difference)) return false;
  const char *what = NULL;
  if (strcmp(there->tokens_sha256, here->tokens_sha256) != 0) what = "tokens: it was calibrated with others (tokens_sha256)";
  if (strcmp(there->model_sha256, here->model_sha256) != 0) what = "model: it was made from other weights (model_sha256)";
  if (!*there->model_sha256 && *here->model_sha256) what = "it was made by an earlier version, which did not note its model's weights";
  if (there->blocks != here->blocks || strcmp(there->model_type, here->model_type) != 0) what = "model: another number of blocks or type";
  if (what) snprintf(difference, 200, "%s", what);
  if (!what && there->first_block != here->first_block)
    snprintf(difference, 200, "--blocks: it begins with %d there and with %d here", there->first_block, here->first_block);
  return !what && there->first_block == here->first_block;
}
