/* dequantize.c: unpacking and scaling of stored codes. */
#include "dequantize.h"

#include <string.h>

void dequantize_linear(const struct quantized_linear *linear, float *out) {
  int bits = linear->bits;
  int64_t row_bytes = packed_row_bytes(linear->in_features, bits);
  int64_t per_row = (linear->in_features + linear->group_size - 1) / linear->group_size;
  for (int64_t row = 0; row < linear->out_features; row++) {
    const uint8_t *codes = linear->codes + row * row_bytes;
    for (int64_t i = 0; i < linear->in_features; i++) {
      int64_t position = i * bits, group = row * per_row + i / linear->group_size;
      uint32_t window = codes[position / 8];
      if (position % 8 + bits > 8) window |= (uint32_t)codes[position / 8 + 1] << 8;
      int code = (int)(window >> position % 8 & ((1u << bits) - 1));
      out[row * linear->in_features + i] = (float)(code - linear->zero_point[group]) * half_to_float(linear->scale[group]);
    }
  }
}

static const struct quantized_linear *find_linear(const struct block_record *record, const char *name) {
  for (int i = 0; i < record->linears; i++)
    if (strcmp(record->linear[i].name, name) == 0) return &record->linear[i];
  return NULL;
}

int dequantize_block(const struct block_record *record, const struct model *model, void *image, const char *where, struct error *error) {
  for (int i = 0; i < LINEARS; i++) {
    const struct linear *linear = &model->linear[i];
    const struct quantized_linear *stored = find_linear(record, linear->name);
    if (!stored || stored->out_features != linear->rows || stored->in_features != linear->columns)
      return error_set(error, ERROR_INPUT, "%s: block %d: %s: %s; it was made from another model", where, record->index, linear->name,
                       stored ? "another shape than the model's" : "missing");
    dequantize_linear(stored, (float *)(void *)((char *)image + model->tensor[linear->weight].image_offset));
  }
  return 0;
}
