/* export_compressed_tensors.c: compressed-tensors as vLLM and transformers read it: pack-quantized for weights alone, int-quantized where
 * activations are quantized too. */
#include <stdlib.h>
#include <string.h>

#include "export_safetensors.h"

enum { WORD_BITS = 32 };

static bool quantizes_activations(const struct export_job *job) {
  return job->scheme.abits < 16;
}

static int check(const struct export_job *job, struct error *error) {
  const struct export_scheme *scheme = &job->scheme;
  if (!quantizes_activations(job)) return 0;
  if (scheme->abits > 8) return error_set(error, ERROR_INPUT, "it holds activations of up to 8 bits, not of %d", scheme->abits);
  if (!scheme->symmetric || scheme->group_size)
    return error_set(error, ERROR_INPUT,
                     "with quantized activations its weights are symmetric, a scale a row (int-quantized), the recipe's are not");
  if (!scheme->token_activations)
    return error_set(error, ERROR_INPUT, "its activations have a scale a token, the recipe's act_granularity is another");
  return 0;
}

static int check_layer(const struct export_job *job, int64_t out_features, int64_t in_features, struct error *error) {
  int64_t group = job->scheme.group_size;
  (void)out_features;
  if (group && in_features % group)
    return error_set(error, ERROR_INPUT, "its groups have to divide the layer's %lld columns, %lld do not", (long long)in_features,
                     (long long)group);
  return 0;
}

static int64_t words(int64_t codes, int bits) {
  return (codes * bits + WORD_BITS - 1) / WORD_BITS;
}

/* The store's bit stream of a row, up to a whole word. */
static void fill_packed(const struct quantized_linear *linear, uint8_t *out) {
  int64_t from = packed_row_bytes(linear->in_features, linear->bits), to = 4 * words(linear->in_features, linear->bits);
  for (int64_t row = 0; row < linear->out_features; row++) memcpy(out + row * to, linear->codes + row * from, (size_t)from);
}

/* A bit stream along the rows, for each group; words of all groups side by side. */
static void fill_zero_points(const struct quantized_linear *linear, uint32_t *out) {
  int64_t groups = export_groups(linear);
  for (int64_t row = 0; row < linear->out_features; row++)
    for (int64_t g = 0; g < groups; g++) {
      int64_t bit = row * linear->bits, word = bit / WORD_BITS;
      uint64_t zero = (uint64_t)linear->zero_point[row * groups + g] << bit % WORD_BITS;
      out[word * groups + g] |= (uint32_t)zero;
      if (zero >> WORD_BITS) out[(word + 1) * groups + g] |= (uint32_t)(zero >> WORD_BITS);
    }
}

static void fill_scale(const struct quantized_linear *linear, float *out) {
  for (int64_t i = 0; i < linear->out_features * export_groups(linear); i++) out[i] = half_to_float(linear->scale[i]);
}

static int packed_parts(const struct quantized_linear *linear, struct export_part *part, struct error *error) {
  int64_t in = linear->in_features, out = linear->out_features, groups = export_groups(linear);
  int64_t words_in = words(in, linear->bits), words_out = words(out, linear->bits);
  int count = linear->symmetric ? 3 : 4;
  if (export_part_set(&part[0], linear, "weight_packed", "I32", 2, out, words_in, (size_t)(4 * out * words_in), error) ||
      export_part_set(&part[1], linear, "weight_scale", "F32", 2, out, groups, (size_t)(4 * out * groups), error) ||
      export_part_set(&part[2], linear, "weight_shape", "I64", 1, 2, 0, 16, error) ||
      (count == 4 &&
       export_part_set(&part[3], linear, "weight_zero_point", "I32", 2, words_out, groups, (size_t)(4 * words_out * groups), error)) ||
      !linear->codes)
    return count;
  fill_packed(linear, part[0].data);
  fill_scale(linear, part[1].data);
  memcpy(part[2].data, (const int64_t[]){out, in}, 16);
  if (count == 4) fill_zero_points(linear, part[3].data);
  return count;
}

static int integer_parts(const struct quantized_linear *linear, struct export_part *part, struct error *error) {
  int64_t in = linear->in_features, out = linear->out_features;
  if (export_part_set(&part[0], linear, "weight", "I8", 2, out, in, (size_t)(out * in), error) ||
      export_part_set(&part[1], linear, "weight_scale", "F32", 2, out, 1, (size_t)(4 * out), error) || !linear->codes)
    return 2;
  for (int64_t row = 0; row < out; row++)
    for (int64_t i = 0; i < in; i++)
      ((int8_t *)part[0].data)[row * in + i] = (int8_t)(export_code(linear, row, i) - linear->zero_point[row]);
  fill_scale(linear, part[1].data);
  return 2;
}

static int parts(const struct export_job *job, const struct quantized_linear *linear, struct export_part *part, struct error *error) {
  return quantizes_activations(job) ? integer_parts(linear, part, error) : packed_parts(linear, part, error);
}

/* Linear layers that are none of a block's quantized ones. */
static json_t *ignored(const struct model *model) {
  json_t *list = json_pack("[s]", "lm_head");
  if (model->embedding != model->hidden) {
    json_array_append_new(list, json_string("re:.*project_in$"));
    json_array_append_new(list, json_string("re:.*project_out$"));
  }
  if (model->experts) { /* the router, as vLLM names it and as transformers 5 does */
    json_array_append_new(list, json_string("re:.*block_sparse_moe.gate$"));
    json_array_append_new(list, json_string("re:.*mlp.gate$"));
  }
  return list;
}

static json_t *weights_config(const struct export_scheme *scheme) {
  json_t *config = json_pack("{s:i, s:s, s:b, s:s, s:b}", "num_bits", scheme->bits, "type", "int", "symmetric", scheme->symmetric,
                             "strategy", scheme->group_size ? "group" : "channel", "dynamic", 0);
  if (scheme->group_size) json_object_set_new(config, "group_size", json_integer(scheme->group_size));
  return config;
}

/* Activations are quantized as in calibration: asymmetrically, a scale a token. */
static json_t *activations_config(const struct export_job *job) {
  if (!quantizes_activations(job)) return json_null();
  return json_pack("{s:i, s:s, s:b, s:s, s:b}", "num_bits", job->scheme.abits, "type", "int", "symmetric", 0, "strategy", "token",
                   "dynamic", 1);
}

static json_t *config(const struct export_job *job) {
  return json_pack("{s:s, s:s, s:s, s:o, s:{s:{s:[s], s:o, s:n, s:o}}}", "quant_method", "compressed-tensors", "format",
                   quantizes_activations(job) ? "int-quantized" : "pack-quantized", "quantization_status", "compressed", "ignore",
                   ignored(job->model), "config_groups", "group_0", "targets", "Linear", "input_activations", activations_config(job),
                   "output_activations", "weights", weights_config(&job->scheme));
}

static const struct packing packing = {check, check_layer, parts, config, NULL, NULL};

int export_compressed_tensors_open(const struct export_job *job, void **state, struct error *error) {
  return export_folder_format_open(job, &packing, state, error);
}
