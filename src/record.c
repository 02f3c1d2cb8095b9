/* record.c: from a learned block on the device to a block_record on the host. */
#include "record.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *record_kept_name(enum kept kept) {
  static const char *const names[] = {"rtn", "start", "end"};
  return names[kept];
}

static void *host_memory(size_t count, size_t size, struct error *error) {
  void *memory = error->code ? NULL : calloc(count ? count : 1, size);
  if (!memory) error_set(error, ERROR_WORK, "out of memory for a block's record");
  return memory;
}

/* ---- linear layers ---- */

/* The record's linear of that name, made when its first part comes. */
static struct quantized_linear *linear_named(struct block_record *record, const struct linear *layer, const struct row_map *source,
                                             const struct quantized_shape *shape, struct error *error) {
  for (int i = 0; i < record->linears; i++)
    if (strcmp(record->linear[i].name, layer->name) == 0) return &record->linear[i];
  struct quantized_linear *linear = &record->linear[record->linears++];
  size_t rows = (size_t)source->total, groups = (size_t)groups_per_row(shape);
  *linear = (struct quantized_linear){.out_features = source->total,
                                      .in_features = layer->columns,
                                      .bits = shape->quantizer.bits,
                                      .group_size = shape->quantizer.group_size,
                                      .symmetric = shape->quantizer.symmetric};
  snprintf(linear->name, sizeof linear->name, "%s", layer->name);
  linear->codes = host_memory(rows, (size_t)packed_row_bytes(layer->columns, shape->quantizer.bits), error);
  linear->scale = host_memory(rows, groups * sizeof *linear->scale, error);
  linear->zero_point = host_memory(rows, groups, error);
  return linear;
}

/* A learned array of that name, [rows, columns], made when its first part comes. */
static struct named_array *array_named(struct block_record *record, const char *name, int64_t rows, int64_t columns, struct error *error) {
  for (int i = 0; i < record->calibration_arrays; i++)
    if (strcmp(record->calibration[i].name, name) == 0) return &record->calibration[i];
  struct named_array *array = &record->calibration[record->calibration_arrays++];
  snprintf(array->name, sizeof array->name, "%s", name);
  array->dimensions = columns ? 2 : 1;
  array->shape[0] = rows;
  array->shape[1] = columns;
  array->values = host_memory((size_t)rows, (size_t)(columns ? columns : 1) * sizeof(float), error);
  return array;
}

/* Copies a part's rows, from row `first` on, to their places in the checkpoint's tensor. */
static void place_rows(void *to, const void *from, const struct row_map *source, int64_t first, int64_t rows, size_t row_bytes) {
  for (int64_t row = 0; row < rows; row++)
    /* NOLINTNEXTLINE(clang-analyzer-core.NonNullParamChecker): a part is found by its name only where its memory was there */
    memcpy((char *)to + (size_t)source_row(source, first + row) * row_bytes, (const char *)from + (size_t)row * row_bytes, row_bytes);
}

static const struct row_map *source_of(const struct learner *l, int linear) {
  const struct model *model = l->block->model;
  return &model->tensor[model->linear[linear].weight].source;
}

/* ---- codes, in panels of rows: what the device and the host hold of them on the way is small, whatever the layer ---- */

static const int64_t PANEL = 1 << 24;

struct panel {
  int64_t first, rows;
  size_t codes, groups, bytes; /* of its codes, its groups, and of all: codes, then zero points, then scales, each at a multiple of 16 */
  size_t zero_point, scale;    /* where they begin */
};

static size_t after(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

/* From row `first` on, of as many weights at the most, but a row at least. */
static struct panel panel_at(const struct quantized_shape *shape, int64_t first, int64_t weights) {
  int64_t most = shape->columns < weights ? weights / shape->columns : 1, left = shape->rows - first;
  struct panel panel = {.first = first, .rows = left < most ? left : most};
  panel.codes = (size_t)(panel.rows * packed_row_bytes(shape->columns, shape->quantizer.bits));
  panel.groups = (size_t)(panel.rows * groups_per_row(shape));
  panel.zero_point = after(panel.codes);
  panel.scale = panel.zero_point + after(panel.groups);
  panel.bytes = panel.scale + panel.groups * sizeof(uint16_t);
  return panel;
}

int record_room_init(struct record_room *room, const struct learner *l, struct error *error) {
  size_t most = 1;
  for (int i = 0; i < l->block->model->linears; i++) {
    const struct quantized_shape *shape = &l->lwc.shape[i];
    if (shape->rows > 0 && panel_at(shape, 0, PANEL).bytes > most) most = panel_at(shape, 0, PANEL).bytes;
  }
  *room = (struct record_room){.k = l->k, .panel = PANEL, .device = l->k->allocate(l->k, most), .host = l->k->allocate_host(l->k, most)};
  if (room->device && room->host) return 0;
  return error_set(error, ERROR_WORK, "out of memory on %s for a block's codes (%zu bytes)", l->k->name, most);
}

void record_room_free(struct record_room *room) {
  if (!room->k) return;
  if (room->device) room->k->release(room->k, room->device);
  room->k->release_host(room->k, room->host);
  *room = (struct record_room){0};
}

static void quantize_panel(const struct record_room *room, const struct learner *l, int index, const float *factor,
                           const struct panel *panel) {
  struct rows_of_weight of = lwc_rows(&l->lwc, l->block, &l->let, index, (struct row_range){panel->first, panel->rows}, factor);
  l->k->quantize_codes(l->k, room->device, (uint16_t *)(void *)(room->device + panel->scale), room->device + panel->zero_point, of.w,
                       &of.scales, of.hi, of.lo, &of.shape);
  l->k->download(l->k, room->host, room->device, panel->bytes);
}

static int record_linear(struct block_record *record, const struct record_room *room, const struct learner *l, int index,
                         const float *factor, struct error *error) {
  const struct quantized_shape *shape = &l->lwc.shape[index];
  const struct row_map *source = source_of(l, index);
  size_t row_groups = (size_t)groups_per_row(shape), row_bytes = (size_t)packed_row_bytes(shape->columns, shape->quantizer.bits);
  struct quantized_linear *linear = linear_named(record, &l->block->model->linear[index], source, shape, error);
  for (int64_t row = 0; row < shape->rows && !error->code;) {
    struct panel panel = panel_at(shape, row, room->panel);
    quantize_panel(room, l, index, factor, &panel);
    place_rows(linear->codes, room->host, source, row, panel.rows, row_bytes);
    place_rows(linear->zero_point, room->host + panel.zero_point, source, row, panel.rows, row_groups);
    place_rows(linear->scale, room->host + panel.scale, source, row, panel.rows, row_groups * sizeof(uint16_t));
    row += panel.rows;
  }
  return error->code;
}

/* ---- what was learned ---- */

/* A layer's clipping factors, as gamma and beta where training learned these. */
static int record_factors(struct block_record *record, const struct learner *l, int index, const float *factor, struct error *error) {
  static const char *const names[2][2] = {{"f_hi", "f_lo"}, {"gamma", "beta"}};
  const struct quantized_shape *shape = &l->lwc.shape[index];
  int64_t groups = groups_of(shape), per_row = groups_per_row(shape);
  float *host = host_memory((size_t)groups, sizeof *host, error);
  for (int end = 0; end < 2 && !error->code; end++) {
    char name[96];
    snprintf(name, sizeof name, "%.64s/%s", l->block->model->linear[index].name, names[l->lwc.sigmoid][end]);
    struct named_array *array = array_named(record, name, source_of(l, index)->total, per_row, error);
    if (error->code) break;
    l->k->download(l->k, host, factor + end * l->lwc.groups + l->lwc.first[index], (size_t)groups * sizeof *host);
    for (int64_t g = 0; l->lwc.sigmoid && g < groups; g++) host[g] = logf(host[g] / (1 - host[g]));
    place_rows(array->values, host, source_of(l, index), 0, shape->rows, (size_t)per_row * sizeof *host);
  }
  free(host);
  return error->code;
}

static void record_vector(struct block_record *record, const struct learner *l, const char *name, const float *values, int64_t count,
                          struct error *error) {
  struct named_array *array = array_named(record, name, count, 0, error);
  if (!error->code) l->k->download(l->k, array->values, values, (size_t)count * sizeof *values);
}

static int record_let(struct block_record *record, const struct learner *l, const float *parameter, struct error *error) {
  for (int place = 0; place < LET_PLACES; place++) {
    char name[96];
    if (!l->let.channels[place]) continue;
    snprintf(name, sizeof name, "%s/s", let_place_name((enum let_place)place));
    record_vector(record, l, name, parameter + l->let.s[place], l->let.channels[place], error);
    if (l->let.delta[place] == ABSENT) continue;
    snprintf(name, sizeof name, "%s/delta", let_place_name((enum let_place)place));
    record_vector(record, l, name, parameter + l->let.delta[place], l->let.channels[place], error);
  }
  return error->code;
}

static int record_losses(struct block_record *record, const struct learner *l, struct error *error) {
  int epochs = l->recipe->epochs;
  struct named_array *array = array_named(record, "loss", epochs, 0, error);
  if (array->values) memcpy(array->values, l->epoch_loss, (size_t)epochs * sizeof(float));
  return error->code;
}

/* ---- what LET folded into tensors that stay unquantized: those whose values are not the checkpoint's ---- */

static int record_folded_tensor(struct block_record *record, const struct learner *l, int index, struct error *error) {
  const struct block_tensor *tensor = &l->block->model->tensor[index];
  int64_t count = tensor->rows * tensor->columns;
  float *folded = host_memory((size_t)count, sizeof *folded, error), *plain = host_memory((size_t)count, sizeof *plain, error);
  if (!error->code) {
    l->k->fetch(l->k, folded, block_tensor(l->block, BLOCK_QUANTIZED, index), count);
    l->k->fetch(l->k, plain, block_tensor(l->block, BLOCK_FULL, index), count);
  }
  if (!error->code && memcmp(folded, plain, (size_t)count * sizeof *plain) != 0) {
    struct named_array *array = &record->folded[record->folded_arrays++];
    snprintf(array->name, sizeof array->name, "%s", tensor->name);
    array->dimensions = tensor->dimensions;
    array->shape[0] = tensor->dimensions == 2 ? tensor->rows : tensor->columns;
    array->shape[1] = tensor->columns;
    array->values = folded;
    folded = NULL;
  }
  free(folded);
  free(plain);
  return error->code;
}

/* ---- the whole ---- */

int record_block(struct block_record *record, const struct record_room *room, const struct learner *l, int index,
                 const struct outcome *outcome, struct error *error) {
  const struct model *model = l->block->model;
  struct learned learned = learner_result(l, outcome);
  *record = (struct block_record){.index = index,
                                  .loss_rtn = outcome->loss[KEPT_RTN],
                                  .loss_start = outcome->loss[KEPT_START],
                                  .loss_end = outcome->loss[KEPT_END],
                                  .skipped_steps = outcome->skipped,
                                  .untrained_experts = outcome->untrained_experts,
                                  .world_size = l->world->size};
  snprintf(record->kept, sizeof record->kept, "%s", record_kept_name(outcome->kept));
  record->linear = host_memory((size_t)model->linears, sizeof *record->linear, error);
  record->calibration = host_memory(2 * (size_t)model->linears + 2 * LET_PLACES + 1, sizeof *record->calibration, error);
  record->folded = host_memory((size_t)model->tensors, sizeof *record->folded, error);
  for (int i = 0; i < model->linears && !error->code; i++) {
    if (!model->linear[i].quantized) continue;
    record_linear(record, room, l, i, learned.factor, error);
    if (learned.factor && !error->code) record_factors(record, l, i, learned.factor, error);
  }
  for (int i = 0; i < model->tensors && learned.let && !error->code; i++)
    if (!model_quantizes(model, i)) record_folded_tensor(record, l, i, error);
  if (learned.let && !error->code) record_let(record, l, learned.let, error);
  if (l->recipe->epochs > 0 && (l->recipe->lwc || l->recipe->let) && !error->code) record_losses(record, l, error);
  return error->code;
}

int record_timing(struct block_record *record, const float *rank_seconds, double seconds, struct error *error) {
  size_t count = (size_t)record->world_size * PHASES;
  record->seconds = seconds;
  record->timing = (struct named_array){.name = "timing", .dimensions = 2, .shape = {record->world_size, PHASES}};
  record->timing.values = host_memory(count, sizeof(float), error);
  if (record->timing.values) memcpy(record->timing.values, rank_seconds, count * sizeof(float));
  snprintf(record->phases, sizeof record->phases, "%s", timing_phases);
  return error->code;
}

int64_t record_bytes(const struct model *model, const struct recipe *recipe) {
  enum { OBJECT_BYTES = 400, FILE_BYTES = 8192 }; /* what HDF5 takes for a dataset; for the rest, with the run's attributes */
  int64_t bytes = FILE_BYTES + OBJECT_BYTES /* times */, widest = 0;
  for (int i = 0; i < model->linears; i++) {
    const struct linear *layer = &model->linear[i];
    if (!layer->quantized) continue;
    struct quantized_shape shape = lwc_shape(layer, recipe);
    int64_t groups = groups_of(&shape), learned = recipe->lwc && recipe->epochs > 0 ? 2 * (int64_t)sizeof(float) : 0;
    bytes += layer->rows * packed_row_bytes(layer->columns, recipe->wbits) + groups * (2 + 1 + learned) + 5 * OBJECT_BYTES;
    if (layer->columns > widest) widest = layer->columns;
  }
  if (!recipe->let || recipe->epochs == 0) return bytes;
  for (int i = 0; i < model->tensors; i++)
    if (!model_quantizes(model, i)) bytes += model->tensor[i].rows * model->tensor[i].columns * (int64_t)sizeof(float) + OBJECT_BYTES;
  return bytes + 2 * LET_PLACES * (widest * (int64_t)sizeof(float) + OBJECT_BYTES);
}
