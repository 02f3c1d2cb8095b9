/* verify.c: opening, reading every block, telling. */
#include "verify.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dequantize.h"
#include "printable.h"
#include "recipe.h"

struct verification {
  const struct verify_options *options;
  struct store *store;
  struct model model;
  struct recipe recipe;
  bool damaged_master;
  int whole, damaged, missing;
  json_t *whole_blocks, *damaged_blocks, *missing_blocks; /* for JSON */
};

/* By the master file, or without it by the blocks. */
static int open_store(struct verification *v, struct error *error) {
  struct error of_master = {0}, of_blocks = {0};
  const char *folder = v->options->folder;
  if (store_open(folder, &v->store, &of_master)) {
    v->damaged_master = true;
    if (store_recover(folder, &v->store, &of_blocks)) return error_set(error, of_master.code, "%s", of_master.message);
    if (!v->options->json) printf("%s\n", of_master.message);
    if (v->options->repair && !store_repair(v->store, error)) {
      v->damaged_master = false;
      if (!v->options->json) printf("%s: its master file is made anew\n", folder);
    }
  }
  return error->code;
}

static int open_run(struct verification *v, struct error *error) {
  const struct store_info *info = store_info(v->store);
  recipe_init(&v->recipe);
  if (recipe_from_json(&v->recipe, info->recipe, v->options->folder, error)) return error->code;
  return model_parse(&v->model, info->model_config, v->options->folder, error);
}

/* Layers are quantized as the recipe says. */
static int check_recipe(const struct verification *v, const struct block_record *record, struct error *error) {
  for (int i = 0; i < record->linears; i++) {
    const struct quantized_linear *linear = &record->linear[i];
    int64_t group = v->recipe.group_size ? v->recipe.group_size : linear->in_features;
    if (group > linear->in_features) group = linear->in_features;
    if (linear->bits != v->recipe.wbits || linear->group_size != group || linear->symmetric != v->recipe.symmetric)
      return error_set(error, ERROR_INPUT, "%s: block %d: %s: not of the bits and groups that the recipe says", v->options->folder,
                       record->index, printable(linear->name).text);
  }
  return 0;
}

static void check_block(struct verification *v, int index) {
  struct error damage = {0};
  struct block_record record;
  if (!store_has_block(v->store, index)) {
    v->missing++;
    json_array_append_new(v->missing_blocks, json_integer(index));
    return;
  }
  if (!store_read_block(v->store, index, &record, &damage) && !dequantize_check(&record, &v->model, v->options->folder, &damage))
    check_recipe(v, &record, &damage);
  block_record_free(&record);
  if (!damage.code) {
    v->whole++;
    json_array_append_new(v->whole_blocks, json_integer(index));
    return;
  }
  v->damaged++;
  json_array_append_new(v->damaged_blocks, json_pack("{s:i, s:s}", "index", index, "message", damage.message));
  if (!v->options->json) printf("block %d is damaged: %s\n", index, damage.message);
}

static int tell(const struct verification *v, struct error *error) {
  const struct store_info *info = store_info(v->store);
  if (!v->options->json) {
    printf("%s: %s, of %d blocks %d are whole, %d damaged, %d missing\n", v->options->folder, printable(info->model_type).text,
           info->blocks - info->first_block, v->whole, v->damaged, v->missing);
    return 0;
  }
  json_t *object = json_pack("{s:s, s:s, s:i, s:i, s:O, s:O, s:O}", "model_type", info->model_type, "master",
                             v->damaged_master ? "damaged" : "whole", "blocks_of_model", info->blocks, "first_block", info->first_block,
                             "whole", v->whole_blocks, "damaged", v->damaged_blocks, "missing", v->missing_blocks);
  if (!object || json_dumpf(object, stdout, JSON_INDENT(2)))
    error_set(error, ERROR_WORK, "no memory for the JSON of %d blocks", info->blocks);
  printf("\n");
  json_decref(object);
  return error->code;
}

int verify(const struct verify_options *options, struct error *error) {
  struct verification v = {
      .options = options, .whole_blocks = json_array(), .damaged_blocks = json_array(), .missing_blocks = json_array()};
  if (!open_store(&v, error) && !open_run(&v, error)) {
    for (int i = store_info(v.store)->first_block; i < store_info(v.store)->blocks; i++) check_block(&v, i);
    tell(&v, error);
    if (v.damaged + v.missing > 0)
      error_set(error, ERROR_WORK, "%s: is not whole; give calibrate the same command again, which makes what is damaged or missing",
                options->folder);
    else if (v.damaged_master)
      error_set(error, ERROR_WORK, "%s: its master file is damaged or missing; verify --repair makes it anew", options->folder);
  }
  json_decref(v.whole_blocks);
  json_decref(v.damaged_blocks);
  json_decref(v.missing_blocks);
  store_close(v.store, error);
  return error->code;
}
