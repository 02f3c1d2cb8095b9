/* dequantize.c: unpacking and scaling of stored codes, and finding what belongs where in a block. */
#include "dequantize.h"

#include <math.h>
#include <string.h>

#include "printable.h"

void dequantize_row(const struct quantized_linear *linear, int64_t row, float *out) {
  int64_t per_row = (linear->in_features + linear->group_size - 1) / linear->group_size;
  const uint8_t *codes = linear->codes + row * packed_row_bytes(linear->in_features, linear->bits);
  for (int64_t i = 0; i < linear->in_features; i++) {
    int64_t group = row * per_row + i / linear->group_size;
    out[i] = (float)(packed_code(codes, i, linear->bits) - linear->zero_point[group]) * half_to_float(linear->scale[group]);
  }
}

void dequantize_linear(const struct quantized_linear *linear, float *out) {
  for (int64_t row = 0; row < linear->out_features; row++) dequantize_row(linear, row, out + row * linear->in_features);
}

static const struct quantized_linear *find_linear(const struct block_record *record, const char *name) {
  for (int i = 0; i < record->linears; i++)
    if (strcmp(record->linear[i].name, name) == 0) return &record->linear[i];
  return NULL;
}

/* The model's tensor of that name that is not quantized, or NULL. */
static const struct block_tensor *find_tensor(const struct model *model, const char *name) {
  for (int i = 0; i < model->tensors; i++)
    if (!model_quantizes(model, i) && strcmp(model->tensor[i].name, name) == 0) return &model->tensor[i];
  return NULL;
}

static float *image_floats(const struct block_tensor *tensor, void *image) {
  return (float *)(void *)((char *)image + tensor->image_offset);
}

static int refuse(const struct block_record *record, const char *name, const char *what, const char *where, struct error *error) {
  return error_set(error, ERROR_INPUT, "%s: block %d: %s: %s", where, record->index, printable(name).text, what);
}

/* One of the model's linear layers, which may be some rows of the stored one. */
static int check_linear(const struct block_record *record, const struct model *model, const struct linear *linear, const char *where,
                        struct error *error) {
  const struct quantized_linear *stored = find_linear(record, linear->name);
  const struct block_tensor *weight = &model->tensor[linear->weight];
  if (!stored) return refuse(record, linear->name, "missing; it was made from another model", where, error);
  if (stored->out_features == weight->source.total && stored->in_features == weight->columns) return 0;
  return refuse(record, linear->name, "another shape than the model's; it was made from another model", where, error);
}

/* A norm's weight or bias, a linear layer's bias, or the router. */
static int check_folded(const struct block_record *record, const struct model *model, const struct named_array *array, const char *where,
                        struct error *error) {
  const struct block_tensor *tensor = find_tensor(model, array->name);
  if (!tensor) return refuse(record, array->name, "the model has no such tensor to replace; it was made from another model", where, error);
  bool matrix = tensor->dimensions == 2;
  if (array->dimensions != tensor->dimensions || array->shape[0] != (matrix ? tensor->rows : tensor->columns) ||
      (matrix && array->shape[1] != tensor->columns))
    return refuse(record, array->name, "another shape than the model's; it was made from another model", where, error);
  bool finite = true;
  for (int64_t i = 0; i < tensor->rows * tensor->columns; i++) finite = finite && isfinite(array->values[i]);
  return finite ? 0 : refuse(record, array->name, "holds NaN or infinity; calibrate again", where, error);
}

int dequantize_check(const struct block_record *record, const struct model *model, const char *where, struct error *error) {
  for (int i = 0; i < model->linears && !error->code; i++)
    if (model->linear[i].quantized) check_linear(record, model, &model->linear[i], where, error);
  for (int i = 0; i < record->folded_arrays && !error->code; i++) check_folded(record, model, &record->folded[i], where, error);
  return error->code;
}

static void put_linear(const struct block_record *record, const struct model *model, const struct linear *linear, void *image) {
  const struct quantized_linear *stored = find_linear(record, linear->name);
  const struct block_tensor *weight = &model->tensor[linear->weight];
  float *out = image_floats(weight, image);
  for (int64_t row = 0; row < weight->rows; row++) dequantize_row(stored, source_row(&weight->source, row), out + row * weight->columns);
}

static void put_folded(const struct model *model, const struct named_array *array, void *image) {
  const struct block_tensor *tensor = find_tensor(model, array->name);
  memcpy(image_floats(tensor, image), array->values, (size_t)(tensor->rows * tensor->columns) * sizeof(float));
}

int dequantize_block(const struct block_record *record, const struct model *model, void *image, const char *where, struct error *error) {
  if (dequantize_check(record, model, where, error)) return error->code;
  for (int i = 0; i < model->linears; i++)
    if (model->linear[i].quantized) put_linear(record, model, &model->linear[i], image);
  for (int i = 0; i < record->folded_arrays; i++) put_folded(model, &record->folded[i], image);
  return 0;
}

int dequantize_read_block(struct store *store, const struct checkpoint *checkpoint, const struct model *wide, int block, void *image,
                          const char *where, struct error *error) {
  struct block_record record = {0};
  for (int i = 0; i < wide->tensors && !error->code; i++)
    if (!model_quantizes(wide, i)) checkpoint_read_tensor(checkpoint, wide, block, i, image, error);
  if (!error->code && !store_read_block(store, block, &record, error)) dequantize_block(&record, wide, image, where, error);
  block_record_free(&record);
  return error->code;
}
