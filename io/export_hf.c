/* export_hf.c: an ordinary model folder whose weights are the quantized ones, written out: it runs anywhere. */
#include <stdlib.h>
#include <string.h>

#include "dequantize.h"
#include "export_safetensors.h"

/* Rounding to bfloat16 moves a weight by up to 2^-8 of it: asymmetric codes of 8 bits, up to 255 steps, could not be found again. */
static bool bf16_holds(const struct export_scheme *scheme) {
  return scheme->bits < 8 || scheme->symmetric;
}

/* Of a quantized layer. */
static enum dtype weight_type(const struct export_job *job) {
  static const enum dtype types[] = {[EXPORT_FLOAT16] = DTYPE_F16, [EXPORT_BFLOAT16] = DTYPE_BF16, [EXPORT_FLOAT32] = DTYPE_F32};
  const struct model *model = job->model;
  if (job->dtype != EXPORT_DTYPE_AUTO) return types[job->dtype];
  return model->tensor[model->linear[LINEAR_Q].weight].dtype == DTYPE_BF16 && bf16_holds(&job->scheme) ? DTYPE_BF16 : DTYPE_F16;
}

static const char *config_dtype(const struct export_job *job) {
  static const char *const names[] = {[DTYPE_F32] = "float32", [DTYPE_F16] = "float16", [DTYPE_BF16] = "bfloat16"};
  return names[weight_type(job)];
}

static int check(const struct export_job *job, struct error *error) {
  if (job->dtype != EXPORT_BFLOAT16 || bf16_holds(&job->scheme)) return 0;
  return error_set(error, ERROR_INPUT, "bfloat16 is too coarse for asymmetric weights of 8 bits; give --dtype float16");
}

/* To nearest even. */
static uint16_t bf16_from_float(float value) {
  uint32_t bits = float_to_bits(value);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static int fill(const struct quantized_linear *linear, enum dtype dtype, void *out, struct error *error) {
  int64_t columns = linear->in_features;
  float *row = malloc((size_t)columns * sizeof *row);
  if (!row) return error_set(error, ERROR_WORK, "%s: out of memory", linear->name);
  for (int64_t r = 0; r < linear->out_features; r++) {
    dequantize_row(linear, r, row);
    for (int64_t i = 0; i < columns && dtype == DTYPE_F32; i++) ((float *)out)[r * columns + i] = row[i];
    for (int64_t i = 0; i < columns && dtype == DTYPE_F16; i++) {
      uint16_t half = ((uint16_t *)out)[r * columns + i] = half_from_float(row[i]);
      if ((half & 0x7c00) == 0x7c00)
        error_set(error, ERROR_INPUT, "%s: a weight of %g is too large for float16; write it with --dtype bfloat16", linear->name, row[i]);
    }
    for (int64_t i = 0; i < columns && dtype == DTYPE_BF16; i++) ((uint16_t *)out)[r * columns + i] = bf16_from_float(row[i]);
  }
  free(row);
  return error->code;
}

static int parts(const struct export_job *job, const struct quantized_linear *linear, struct export_part *part, struct error *error) {
  enum dtype dtype = weight_type(job);
  size_t bytes = (size_t)(linear->out_features * linear->in_features) * dtype_size(dtype);
  if (!export_part_set(part, linear, "weight", dtype_name(dtype), 2, linear->out_features, linear->in_features, bytes, error) &&
      linear->codes)
    fill(linear, dtype, part->data, error);
  return 1;
}

static const struct packing packing = {check, NULL, parts, NULL, NULL, config_dtype};

int export_hf_open(const struct export_job *job, void **state, struct error *error) {
  return export_folder_format_open(job, &packing, state, error);
}
