/* export_gptq.c: GPTQ as GPTQModel, transformers and vLLM read it: per layer qweight and qzeros, packed into words of 32 bits, scales, g_idx. */
#include <stdlib.h>
#include <string.h>

#include "export_safetensors.h"

enum { SMALLEST_GROUP = 16, LARGEST_GROUP = 1024, WORD_BITS = 32 };

/* Codes have to fill words: 32 of them where one straddles two words, else as many as a word holds. */
static int64_t codes_a_word(int bits) {
  return WORD_BITS % bits ? WORD_BITS : WORD_BITS / bits;
}

static bool is_v1(const struct export_job *job) {
  return job->gptq == EXPORT_GPTQ_V1 || (job->gptq == EXPORT_GPTQ_AUTO && job->scheme.symmetric);
}

static int check(const struct export_job *job, struct error *error) {
  const struct export_scheme *scheme = &job->scheme;
  int64_t group = scheme->group_size;
  if (scheme->abits < 16) return error_set(error, ERROR_INPUT, "it has no quantized activations, the recipe's have %d bits", scheme->abits);
  if (scheme->bits != 2 && scheme->bits != 3 && scheme->bits != 4 && scheme->bits != 8)
    return error_set(error, ERROR_INPUT, "it holds weights of 2, 3, 4 and 8 bits, not of %d", scheme->bits);
  if (group && (group < SMALLEST_GROUP || group > LARGEST_GROUP || (group & (group - 1))))
    return error_set(error, ERROR_INPUT, "its groups have 16, 32, 64, ... 1024 columns or the whole row, not %lld", (long long)group);
  if (job->gptq == EXPORT_GPTQ_V1 && !scheme->symmetric)
    return error_set(error, ERROR_INPUT,
                     "its version 1 cannot hold zero points of 0, which asymmetric weights have; leave --checkpoint-format at auto");
  return 0;
}

static int check_layer(const struct export_job *job, int64_t out_features, int64_t in_features, struct error *error) {
  int64_t multiple = codes_a_word(job->scheme.bits), group = job->scheme.group_size;
  if (in_features % multiple || out_features % multiple)
    return error_set(error, ERROR_INPUT, "it packs %lld codes of %d bits together, which does not divide the shape [%lld, %lld]",
                     (long long)multiple, job->scheme.bits, (long long)out_features, (long long)in_features);
  if (group && in_features % group)
    return error_set(error, ERROR_INPUT, "its groups have to divide the layer's %lld columns, %lld do not", (long long)in_features,
                     (long long)group);
  return 0;
}

/* Row o's bit stream becomes column o: words change places, nothing is packed anew. */
static void fill_qweight(const struct quantized_linear *linear, uint8_t *out) {
  int64_t words = linear->in_features * linear->bits / WORD_BITS, columns = linear->out_features;
  for (int64_t row = 0; row < columns; row++)
    for (int64_t word = 0; word < words; word++) memcpy(out + 4 * (word * columns + row), linear->codes + 4 * (row * words + word), 4);
}

/* A bit stream along the output columns. Version 1 stores one less. */
static void fill_qzeros(const struct quantized_linear *linear, bool v1, uint8_t *out) {
  int64_t groups = export_groups(linear), row_bytes = linear->out_features * linear->bits / 8;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t o = 0; o < linear->out_features; o++) {
      uint32_t zero = (uint32_t)(linear->zero_point[o * groups + g] - v1) & ((1u << linear->bits) - 1);
      uint8_t *at = out + g * row_bytes + o * linear->bits / 8;
      uint32_t shifted = zero << o * linear->bits % 8;
      at[0] |= (uint8_t)shifted;
      if (shifted >> 8) at[1] |= (uint8_t)(shifted >> 8);
    }
}

static void fill_scales(const struct quantized_linear *linear, uint16_t *out) {
  int64_t groups = export_groups(linear);
  for (int64_t g = 0; g < groups; g++)
    for (int64_t o = 0; o < linear->out_features; o++) out[g * linear->out_features + o] = linear->scale[o * groups + g];
}

static int parts(const struct export_job *job, const struct quantized_linear *linear, struct export_part *part, struct error *error) {
  int64_t in = linear->in_features, out = linear->out_features, groups = export_groups(linear);
  int64_t words_in = in * linear->bits / WORD_BITS, words_out = out * linear->bits / WORD_BITS;
  if (export_part_set(&part[0], linear, "qweight", "I32", 2, words_in, out, (size_t)(4 * words_in * out), error) ||
      export_part_set(&part[1], linear, "qzeros", "I32", 2, groups, words_out, (size_t)(4 * groups * words_out), error) ||
      export_part_set(&part[2], linear, "scales", "F16", 2, groups, out, (size_t)(2 * groups * out), error) ||
      export_part_set(&part[3], linear, "g_idx", "I32", 1, in, 0, (size_t)(4 * in), error) || !linear->codes)
    return 4;
  fill_qweight(linear, part[0].data);
  fill_qzeros(linear, is_v1(job), part[1].data);
  fill_scales(linear, part[2].data);
  for (int64_t i = 0; i < in; i++) ((int32_t *)part[3].data)[i] = (int32_t)(i / linear->group_size);
  return 4;
}

/* Since checkpoint_format says that zero points are as they are, GPTQModel asks no more who wrote them. */
static json_t *config(const struct export_job *job) {
  const struct export_scheme *scheme = &job->scheme;
  json_t *config = json_pack("{s:s, s:i, s:I, s:b, s:b, s:b, s:b, s:s, s:s, s:{s:s}}", "quant_method", "gptq", "bits", scheme->bits,
                             "group_size", (json_int_t)(scheme->group_size ? scheme->group_size : -1), "desc_act", 0, "sym",
                             scheme->symmetric, "lm_head", 0, "true_sequential", 1, "checkpoint_format", is_v1(job) ? "gptq" : "gptq_v2",
                             "pack_dtype", "int32", "meta", "quantizer", "omniquant:" OMNIQUANT_VERSION);
  return config;
}

static const struct packing packing = {check, check_layer, parts, config, "quantize_config.json", NULL};

int export_gptq_open(const struct export_job *job, void **state, struct error *error) {
  return export_folder_format_open(job, &packing, state, error);
}
