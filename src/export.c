/* export.c: the story of an export: open store and checkpoint, ask the format whether it holds them, then write tensor by tensor, of
 * which one is in memory at a time. */
#include "export.h"

#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "card.h"
#include "checkpoint.h"
#include "printable.h"
#include "recipe.h"
#include "world.h"

struct exporter {
  const struct export_options *options;
  const struct export_format *format;
  struct world alone; /* without MPI: for signals */
  struct model model;
  struct checkpoint *checkpoint;
  struct store *store;
  struct recipe recipe;
  struct export_job job;
  char *name, *card; /* owned, in job */
};

/* ---- opening ---- */

static int find_format(struct exporter *e, struct error *error) {
  char names[128] = "";
  for (const struct export_format *format = export_formats; format->name; format++) {
    if (strcmp(format->name, e->options->format) == 0) e->format = format;
    snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", *names ? ", " : "", format->name);
  }
  if (e->format) return 0;
  return error_set(error, ERROR_INPUT, "--format: '%s' is not one of %s", printable(e->options->format).text, names);
}

static int open_store(struct exporter *e, struct error *error) {
  const char *folder = e->options->quantized;
  if (store_open(folder, &e->store, error)) return error->code;
  const struct store_info *info = store_info(e->store);
  if (info->blocks != e->model.blocks || strcmp(info->model_type, e->model.model_type) != 0)
    return error_set(error, ERROR_INPUT,
                     "%s: it holds a model of type %s with %d blocks, %s is %s with %d; give the model it was made from", folder,
                     printable(info->model_type).text, info->blocks, e->options->model, e->model.model_type, e->model.blocks);
  if (info->first_block > 0)
    return error_set(error, ERROR_INPUT, "%s: blocks before %d stayed full precision (--blocks); export takes models quantized as a whole",
                     folder, info->first_block);
  for (int i = 0; i < info->blocks; i++)
    if (!store_has_block(e->store, i))
      return error_set(error, ERROR_INPUT, "%s: block %d is not there; its calibration did not end", folder, i);
  return recipe_from_json(&e->recipe, info->recipe, folder, error);
}

/* The model's name is its folder's. */
static char *model_name(const char *folder) {
  char *path = realpath(folder, NULL), *name = path ? strdup(basename(path)) : NULL;
  free(path);
  return name;
}

static int make_job(struct exporter *e, struct error *error) {
  const struct export_options *options = e->options;
  const struct recipe *recipe = &e->recipe;
  e->name = model_name(options->model);
  if (!e->name) return error_set(error, ERROR_WORK, "%s: out of memory", options->model);
  e->job = (struct export_job){.model = &e->model,
                               .config = checkpoint_config(e->checkpoint),
                               .model_folder = options->model,
                               .name = e->name,
                               .scheme = {.bits = recipe->wbits,
                                          .group_size = recipe->group_size,
                                          .symmetric = recipe->symmetric,
                                          .abits = recipe->activations.abits,
                                          .token_activations = recipe->activations.granularity == GRANULARITY_TOKEN,
                                          .kv_bits = recipe_kv_bits(&recipe->activations)},
                               .shard_bytes = (int64_t)options->shard_mib << 20,
                               .gptq = options->gptq,
                               .dtype = options->dtype,
                               .f16_fallback = options->f16_fallback,
                               .embedding = options->embedding,
                               .exact = options->exact,
                               .pretokenizer = options->pretokenizer};
  e->job.card = e->card = card_make(options, &e->job, store_info(e->store), error);
  return error->code;
}

/* ---- walking through the model's tensors ---- */

typedef int visitor(void *state, const struct export_tensor *tensor, struct error *error);

static int visit_unless_stopped(const struct exporter *e, const struct export_tensor *tensor, visitor *visit, void *state,
                                struct error *error) {
  if (world_stopping(&e->alone)) return error_set(error, ERROR_STOPPED, "stopped by a signal; nothing is left of the export");
  return visit(state, tensor, error);
}

/* A quantized layer as it has to be stored; without codes. */
static struct quantized_linear planned_linear(const struct exporter *e, int index) {
  const struct block_tensor *tensor = &e->model.tensor[index];
  struct quantized_linear linear = {.out_features = tensor->source.total,
                                    .in_features = tensor->columns,
                                    .bits = e->recipe.wbits,
                                    .group_size = e->recipe.group_size ? e->recipe.group_size : tensor->columns,
                                    .symmetric = e->recipe.symmetric};
  snprintf(linear.name, sizeof linear.name, "%.*s", (int)(strlen(tensor->name) - strlen(".weight")), tensor->name);
  return linear;
}

static int not_the_model(const struct exporter *e, const struct block_record *record, const char *name, const char *what,
                         struct error *error) {
  return error_set(error, ERROR_INPUT, "%s: block %d: %s: %s; it was made from another model or recipe", e->options->quantized,
                   record->index, name, what);
}

/* A block of the store, from which linears are read as they come. */
struct stored_block {
  struct block_record record; /* without what its linears point to */
  struct block_file *file;    /* NULL: it is only looked at */
};

/* A layer as it is stored; `linear` says what it has to be. */
static int find_linear(const struct exporter *e, const struct block_record *record, struct quantized_linear *linear, struct error *error) {
  for (int i = 0; i < record->linears; i++) {
    const struct quantized_linear *found = &record->linear[i];
    if (strcmp(found->name, linear->name) != 0) continue;
    /* A group that is longer than the row is the row. */
    bool same_groups =
        found->group_size == linear->group_size || (found->group_size >= linear->in_features && linear->group_size >= linear->in_features);
    if (found->out_features != linear->out_features || found->in_features != linear->in_features || found->bits != linear->bits ||
        found->symmetric != linear->symmetric || !same_groups)
      return not_the_model(e, record, linear->name, "another shape, or quantized otherwise, than it should be", error);
    *linear = *found;
    return 0;
  }
  return not_the_model(e, record, linear->name, "missing", error);
}

static int find_folded(const struct exporter *e, const struct block_record *record, struct export_tensor *tensor, struct error *error) {
  const char *name = e->model.tensor[tensor->index].name;
  for (int i = 0; i < record->folded_arrays; i++) {
    const struct named_array *array = &record->folded[i];
    if (strcmp(array->name, name) != 0) continue;
    if (array->dimensions != tensor->dimensions || array->shape[0] != tensor->shape[0] ||
        (array->dimensions == 2 && array->shape[1] != tensor->shape[1]))
      return not_the_model(e, record, name, "another shape than the model's", error);
    tensor->values = array->values;
  }
  return 0;
}

/* One tensor of a block. Without a stored one it is only announced. */
static int visit_tensor(const struct exporter *e, int block, int index, const struct stored_block *stored, visitor *visit, void *state,
                        struct error *error) {
  const struct block_tensor *part = &e->model.tensor[index];
  struct quantized_linear linear = {0};
  struct export_tensor tensor = {.block = block,
                                 .index = index,
                                 .dimensions = part->dimensions,
                                 .shape = {part->source.total, part->dimensions == 2 ? part->columns : 0},
                                 .source = checkpoint_block_tensor(e->checkpoint, block, index)};
  int length = snprintf(tensor.name, sizeof tensor.name, model_names(&e->model)->block_prefix, block);
  snprintf(tensor.name + length, sizeof tensor.name - (size_t)length, "%s", part->name);
  if (model_quantizes(&e->model, index)) {
    linear = planned_linear(e, index);
    tensor.linear = &linear;
    if (stored && !find_linear(e, &stored->record, &linear, error) && stored->file) block_file_read_linear(stored->file, &linear, error);
  } else {
    tensor.folded = e->recipe.let;
    if (stored) find_folded(e, &stored->record, &tensor, error);
  }
  if (!error->code) visit_unless_stopped(e, &tensor, visit, state, error);
  quantized_linear_free(&linear);
  return error->code;
}

/* What is visited: the model's tensors alone; with the store's beside them; with their codes. */
enum depth { MODEL, STORE, CODES };

static int visit_block(const struct exporter *e, int block, enum depth depth, visitor *visit, void *state, struct error *error) {
  struct stored_block stored = {0};
  if (depth == CODES) checkpoint_test_delay(e->checkpoint);
  if (depth != MODEL && store_open_block(e->store, block, &stored.file, &stored.record, error)) return error->code;
  if (depth == STORE) {
    block_file_close(stored.file);
    stored.file = NULL;
  }
  for (int i = 0; i < e->model.tensors && !error->code; i++)
    if (model_first_part(&e->model, i) == i) visit_tensor(e, block, i, depth == MODEL ? NULL : &stored, visit, state, error);
  block_record_free(&stored.record);
  block_file_close(stored.file);
  return error->code;
}

static int visit_outside(const struct exporter *e, visitor *visit, void *state, struct error *error) {
  const char *name;
  const struct tensor *source;
  for (int i = 0; (source = checkpoint_outside_tensor(e->checkpoint, i, &name)) && !error->code; i++) {
    struct export_tensor tensor = {.block = ABSENT, .index = ABSENT, .dimensions = source->dimensions, .source = source};
    snprintf(tensor.name, sizeof tensor.name, "%s", name);
    for (int d = 0; d < source->dimensions && d < 2; d++) tensor.shape[d] = source->shape[d];
    visit_unless_stopped(e, &tensor, visit, state, error);
  }
  return error->code;
}

static int walk(const struct exporter *e, enum depth depth, visitor *visit, void *state, struct error *error) {
  for (int block = 0; block < e->model.blocks && !error->code; block++) visit_block(e, block, depth, visit, state, error);
  return error->code ? error->code : visit_outside(e, visit, state, error);
}

static int pass_by(void *state, const struct export_tensor *tensor, struct error *error) {
  (void)state, (void)tensor;
  return error->code;
}

/* ---- what fits ---- */

/* Whether a format holds the model: it has been told of all tensors then. */
static int announce(const struct exporter *e, const struct export_format *format, void **state, struct error *error) {
  *state = NULL;
  if (format->open(&e->job, state, error)) return error->code;
  return walk(e, MODEL, format->announce, *state, error);
}

/* Names the formats that do hold it. */
static int refuse(const struct exporter *e, const struct error *reason, struct error *error) {
  char names[128] = "";
  if (reason->code != ERROR_INPUT) return error_set(error, reason->code, "%s", reason->message);
  for (const struct export_format *format = export_formats; format->name; format++) {
    struct error ignored = {0};
    void *state;
    if (!announce(e, format, &state, &ignored))
      snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", *names ? ", " : "", format->name);
    format->close(state);
  }
  return error_set(error, ERROR_INPUT, "%s: --format %s: %s; formats that hold %s: %s", e->options->quantized, e->format->name,
                   reason->message, export_scheme_text(&e->job.scheme).text, names);
}

/* ---- the whole ---- */

static int write_all(const struct exporter *e, void *state, struct error *error) {
  struct export_folder folder;
  if (export_folder_open(&folder, e->options->output, error) == 0 &&
      export_folder_write(&folder, "README.md", e->card, strlen(e->card), error) == 0 && e->format->begin(state, &folder, error) == 0 &&
      walk(e, CODES, e->format->write, state, error) == 0 && e->format->finish(state, error) == 0)
    export_folder_commit(&folder, error);
  export_folder_close(&folder);
  return error->code;
}

static int export_all(struct exporter *e, struct error *error) {
  const char *model = e->options->model;
  struct error reason = {0};
  void *state;
  if (find_format(e, error) || export_folder_check(e->options->output, error)) return error->code;
  if (checkpoint_open(model, &e->model, &e->checkpoint, error) || open_store(e, error) || make_job(e, error)) return error->code;
  if (walk(e, STORE, pass_by, NULL, error)) return error->code; /* that it fits the model is known before anything is written */
  if (announce(e, e->format, &state, &reason))
    refuse(e, &reason, error);
  else
    write_all(e, state, error);
  e->format->close(state);
  return error->code;
}

int export_model(const struct export_options *options, struct error *error) {
  struct exporter exporter = {.options = options, .alone = {.size = 1}};
  world_catch_signals(&exporter.alone);
  export_all(&exporter, error);
  store_close(exporter.store, error);
  checkpoint_close(exporter.checkpoint);
  free(exporter.name);
  free(exporter.card);
  return error->code;
}
