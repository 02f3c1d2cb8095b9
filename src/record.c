/* record.c: from a learned block on the device to a block_record on the host. The device lays all of it out as the file has it, and it comes to the
 * host in one copy, beside the work on the next block. */
#include "record.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *record_kept_name(enum kept kept) {
  static const char *const names[] = {"rtn", "start", "end"};
  return names[kept];
}

static const int64_t PANEL = 1 << 24; /* weights that are quantized at a time: scratch memory is for as many, whatever the layer */

/* ---- where things stand ---- */

static const struct row_map *source_of(const struct learner *l, int linear) {
  const struct model *model = l->block->model;
  return &model->tensor[model->linear[linear].weight].source;
}

static bool learns_factors(const struct learner *l) {
  return l->recipe->lwc && l->recipe->epochs > 0;
}

/* Whether a tensor stays as it is unless LET folds something into it. */
static bool may_be_folded(const struct learner *l, int tensor) {
  return l->recipe->let && l->recipe->epochs > 0 && !model_quantizes(l->block->model, tensor);
}

static size_t values_of(const struct block_tensor *tensor) {
  return (size_t)(tensor->rows * tensor->columns);
}

static float *floats_at(uint8_t *memory, size_t at) {
  return (float *)(void *)(memory + at);
}

/* Where the next so many bytes stand. */
static size_t take(size_t *all, size_t bytes) {
  size_t at = *all;
  *all += (bytes + 15) / 16 * 16;
  return at;
}

/* Where the checkpoint's tensor stands that a layer's weight is, or is a part of. */
static const struct record_place *place_of(const struct record_room *room, const struct learner *l, int linear) {
  return &room->weight[model_first_part(l->block->model, l->block->model->linear[linear].weight)];
}

/* Whether a layer is quantized, and the first that is met of its tensor. */
static bool is_first(const struct model *model, int linear) {
  const struct linear *layer = &model->linear[linear];
  return layer->quantized && model_first_part(model, layer->weight) == layer->weight;
}

static void place_linear(struct record_room *room, const struct learner *l, int index) {
  const struct quantized_shape *shape = &l->lwc.shape[index];
  struct record_place *at = &room->weight[l->block->model->linear[index].weight];
  size_t rows = (size_t)source_of(l, index)->total, groups = rows * (size_t)groups_per_row(shape);
  at->codes = take(&room->bytes, rows * (size_t)packed_row_bytes(shape->columns, shape->quantizer.bits));
  at->zero_point = take(&room->bytes, groups);
  at->scale = take(&room->bytes, groups * sizeof(uint16_t));
  for (int end = 0; end < 2 && learns_factors(l); end++) at->factor[end] = take(&room->bytes, groups * sizeof(float));
}

static void place_all(struct record_room *room, const struct learner *l) {
  const struct model *model = l->block->model;
  for (int i = 0; i < model->linears; i++)
    if (is_first(model, i)) place_linear(room, l, i);
  room->let = take(&room->bytes, (size_t)l->let.count * sizeof(float));
  for (int i = 0; i < model->tensors; i++)
    if (may_be_folded(l, i)) room->folded[i] = take(&room->own_bytes, values_of(&model->tensor[i]) * sizeof(float));
  room->losses = take(&room->own_bytes, (size_t)l->recipe->epochs * sizeof(float));
  room->timing = take(&room->own_bytes, (size_t)l->world->size * PHASES * sizeof(float));
}

int record_room_init(struct record_room *room, const struct learner *l, struct error *error) {
  struct kernels *k = l->k;
  *room = (struct record_room){.k = k, .panel = PANEL};
  place_all(room, l);
  room->device = room->host = k->allocate(k, room->bytes);
  room->own = calloc(1, room->own_bytes);
  if (k->lane_open) {
    room->host = k->allocate_host(k, room->bytes);
    room->lane = k->lane_open(k);
  }
  if (room->device && room->host && room->own && (room->lane || !k->lane_open)) return 0;
  return error_set(error, ERROR_WORK, "out of memory on %s for a block's codes (%zu bytes)", k->name, room->bytes);
}

void record_room_free(struct record_room *room) {
  struct kernels *k = room->k;
  if (!k) return;
  if (k->lane_open) {
    k->lane_close(k, room->lane);
    k->release_host(k, room->host);
  }
  if (room->device) k->release(k, room->device);
  free(room->own);
  *room = (struct record_room){0};
}

/* ---- the device's part: everything as the file has it, on its way to the host ---- */

/* Rows [first, first + count) of a layer, which are neighbours in the checkpoint's tensor too. */
static void pack_rows(const struct record_room *room, const struct learner *l, int index, struct row_range rows, const float *factor) {
  const struct record_place *at = place_of(room, l, index);
  struct rows_of_weight of = lwc_rows(&l->lwc, l->block, &l->let, index, rows, factor);
  int64_t row = source_row(source_of(l, index), rows.first), per_row = groups_per_row(&of.shape);
  size_t group = (size_t)(row * per_row), bytes = (size_t)(rows.count * per_row) * sizeof(float);
  l->k->quantize_codes(l->k, room->device + at->codes + row * packed_row_bytes(of.shape.columns, of.shape.quantizer.bits),
                       (uint16_t *)(void *)(room->device + at->scale) + group, room->device + at->zero_point + group, of.w, &of.scales,
                       of.hi, of.lo, &of.shape);
  if (!factor) return;
  l->k->copy(l->k, floats_at(room->device, at->factor[0]) + group, of.hi, bytes);
  l->k->copy(l->k, floats_at(room->device, at->factor[1]) + group, of.lo, bytes);
}

static void pack_linear(const struct record_room *room, const struct learner *l, int index, const float *factor) {
  const struct quantized_shape *shape = &l->lwc.shape[index];
  const struct row_map *source = source_of(l, index);
  int64_t most = shape->columns < room->panel ? room->panel / shape->columns : 1;
  for (int64_t row = 0, count; row < shape->rows; row += count) {
    int64_t run = source->run - row % source->run, left = shape->rows - row;
    count = run < left ? run : left;
    if (count > most) count = most;
    pack_rows(room, l, index, (struct row_range){row, count}, factor);
  }
}

/* Factors that training learned as gamma and beta are stored as these: infinity where the sigmoid is 1. */
static void unpack_factors(const struct record_room *room, const struct learner *l, int index) {
  int64_t groups = source_of(l, index)->total * groups_per_row(&l->lwc.shape[index]);
  for (int end = 0; end < 2; end++)
    l->k->sigmoid_inverse(l->k, floats_at(room->device, place_of(room, l, index)->factor[end]), INFINITY, groups);
}

void record_pack(const struct record_room *room, const struct learner *l, struct learned learned) {
  const struct model *model = l->block->model;
  struct kernels *k = l->k;
  if (room->lane) k->join(k, room->lane);
  for (int i = 0; i < model->linears; i++)
    if (model->linear[i].quantized) pack_linear(room, l, i, learned.factor);
  for (int i = 0; i < model->linears && learned.factor && l->lwc.sigmoid; i++)
    if (is_first(model, i)) unpack_factors(room, l, i);
  if (learned.let) k->copy(k, room->device + room->let, learned.let, (size_t)l->let.count * sizeof(float));
  if (!room->lane) return;
  k->follow(k, room->lane);
  k->send(k, room->lane, room->host, room->device, room->bytes);
}

int record_wait(const struct record_room *room, struct error *error) {
  if (!room->lane || room->k->idle(room->k, room->lane, true)) return error->code;
  return error_set(error, ERROR_WORK, "the device failed while a block's codes were copied to the host");
}

/* ---- the host's part: what stands where ---- */

static void *list_of(size_t count, size_t size, struct error *error) {
  void *memory = error->code ? NULL : calloc(count ? count : 1, size);
  if (!memory) error_set(error, ERROR_WORK, "out of memory for a block's record");
  return memory;
}

static void name_linear(struct block_record *record, const struct record_room *room, const struct learner *l, int index) {
  const struct quantized_shape *shape = &l->lwc.shape[index];
  const struct record_place *at = place_of(room, l, index);
  struct quantized_linear *linear = &record->linear[record->linears++];
  *linear = (struct quantized_linear){.out_features = source_of(l, index)->total,
                                      .in_features = shape->columns,
                                      .bits = shape->quantizer.bits,
                                      .group_size = shape->quantizer.group_size,
                                      .symmetric = shape->quantizer.symmetric,
                                      .codes = room->host + at->codes,
                                      .scale = (uint16_t *)(void *)(room->host + at->scale),
                                      .zero_point = room->host + at->zero_point};
  snprintf(linear->name, sizeof linear->name, "%s", l->block->model->linear[index].name);
}

/* What calibration learned: [rows, columns], or [rows] where there are no columns. */
static void name_array(struct block_record *record, const char *of, const char *what, float *values, int64_t rows, int64_t columns) {
  struct named_array *array = &record->calibration[record->calibration_arrays++];
  *array = (struct named_array){.dimensions = columns ? 2 : 1, .shape = {rows, columns}, .values = values};
  snprintf(array->name, sizeof array->name, "%.64s%s", of, what);
}

static void name_factors(struct block_record *record, const struct record_room *room, const struct learner *l, int index) {
  static const char *const names[2][2] = {{"/f_hi", "/f_lo"}, {"/gamma", "/beta"}};
  for (int end = 0; end < 2; end++)
    name_array(record, l->block->model->linear[index].name, names[l->lwc.sigmoid][end],
               floats_at(room->host, place_of(room, l, index)->factor[end]), source_of(l, index)->total,
               groups_per_row(&l->lwc.shape[index]));
}

static void name_let(struct block_record *record, const struct record_room *room, const struct learner *l) {
  for (int place = 0; place < LET_PLACES; place++) {
    const char *name = let_place_name((enum let_place)place);
    if (!l->let.channels[place]) continue;
    name_array(record, name, "/s", floats_at(room->host, room->let) + l->let.s[place], l->let.channels[place], 0);
    if (l->let.delta[place] != ABSENT)
      name_array(record, name, "/delta", floats_at(room->host, room->let) + l->let.delta[place], l->let.channels[place], 0);
  }
}

/* What LET folded into a tensor that stays unquantized, if its values are not the checkpoint's. */
static int take_folded(struct block_record *record, const struct record_room *room, const struct learner *l, int index,
                       struct error *error) {
  const struct block_tensor *tensor = &l->block->model->tensor[index];
  size_t count = values_of(tensor);
  float *folded = floats_at(room->own, room->folded[index]), *plain = list_of(count, sizeof *plain, error);
  if (error->code) return error->code;
  l->k->fetch(l->k, folded, block_tensor(l->block, BLOCK_QUANTIZED, index), (int64_t)count);
  l->k->fetch(l->k, plain, block_tensor(l->block, BLOCK_FULL, index), (int64_t)count);
  if (memcmp(folded, plain, count * sizeof *plain) != 0) {
    struct named_array *array = &record->folded[record->folded_arrays++];
    *array = (struct named_array){.dimensions = tensor->dimensions, .shape = {tensor->rows, tensor->columns}, .values = folded};
    if (tensor->dimensions == 1) array->shape[0] = tensor->columns;
    snprintf(array->name, sizeof array->name, "%s", tensor->name);
  }
  free(plain);
  return 0;
}

/* ---- the whole ---- */

int record_block(struct block_record *record, const struct record_room *room, const struct learner *l, int index,
                 const struct outcome *outcome, struct error *error) {
  const struct model *model = l->block->model;
  struct learned learned = learner_result(l, outcome);
  int epochs = l->recipe->epochs;
  *record = (struct block_record){.index = index,
                                  .loss_rtn = outcome->loss[KEPT_RTN],
                                  .loss_start = outcome->loss[KEPT_START],
                                  .loss_end = outcome->loss[KEPT_END],
                                  .skipped_steps = outcome->skipped,
                                  .untrained_experts = outcome->untrained_experts,
                                  .world_size = l->world->size,
                                  .lent = true};
  snprintf(record->kept, sizeof record->kept, "%s", record_kept_name(outcome->kept));
  record->linear = list_of((size_t)model->linears, sizeof *record->linear, error);
  record->calibration = list_of(2 * (size_t)model->linears + 2 * LET_PLACES + 1, sizeof *record->calibration, error);
  record->folded = list_of((size_t)model->tensors, sizeof *record->folded, error);
  for (int i = 0; i < model->tensors && learned.let && !error->code; i++) /* while the device has nothing else to do */
    if (may_be_folded(l, i)) take_folded(record, room, l, i, error);
  if (error->code) return error->code;
  record_pack(room, l, learned);
  for (int i = 0; i < model->linears; i++) {
    if (!is_first(model, i)) continue;
    name_linear(record, room, l, i);
    if (learned.factor) name_factors(record, room, l, i);
  }
  if (learned.let) name_let(record, room, l);
  if (epochs == 0 || !(l->recipe->lwc || l->recipe->let)) return 0;
  memcpy(floats_at(room->own, room->losses), l->epoch_loss, (size_t)epochs * sizeof(float));
  name_array(record, "loss", "", floats_at(room->own, room->losses), epochs, 0);
  return 0;
}

void record_timing(struct block_record *record, const struct record_room *room, const float *rank_seconds, double seconds) {
  float *values = floats_at(room->own, room->timing);
  record->seconds = seconds;
  record->timing = (struct named_array){.name = "timing", .dimensions = 2, .shape = {record->world_size, PHASES}, .values = values};
  memcpy(values, rank_seconds, (size_t)record->world_size * PHASES * sizeof *values);
  snprintf(record->phases, sizeof record->phases, "%s", timing_phases);
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
