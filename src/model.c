/* model.c: the table of families, and config.json. A family that is made of the parts below is one more row. */
#include "model.h"

#include <float.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "printable.h"

enum presence { NEVER, ALWAYS, BY_CONFIG };

struct family {
  const char *model_type;
  struct model_names names;
  enum presence qkv_bias, o_bias; /* BY_CONFIG: attention_bias */
  enum presence mlp_bias;         /* BY_CONFIG: mlp_bias */
  bool qk_norm;                   /* RMSNorm over each head of q and k */
  bool sliding_window;            /* sliding_window of config.json holds for all blocks */
};

#define LLAMA_NAMES                                                                                                                        \
  { "model.layers.%d.", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight" }

static const struct family families[] = {
    {"llama", LLAMA_NAMES, BY_CONFIG, BY_CONFIG, BY_CONFIG, false, false},
    {"mistral", LLAMA_NAMES, NEVER, NEVER, NEVER, false, true},
    {"qwen2", LLAMA_NAMES, ALWAYS, NEVER, NEVER, false, false},
    {"qwen3", LLAMA_NAMES, BY_CONFIG, BY_CONFIG, NEVER, true, false},
};

static const struct family *family_find(const char *model_type) {
  for (size_t i = 0; i < sizeof families / sizeof *families; i++)
    if (strcmp(families[i].model_type, model_type) == 0) return &families[i];
  return NULL;
}

const struct model_names *model_names(const struct model *model) {
  return &family_find(model->model_type)->names;
}

/* ---- config.json ---- */

struct config {
  const json_t *root;
  const char *path;
  struct error *error;
};

static const json_t *config_get(const struct config *config, const char *key) {
  const json_t *value = json_object_get(config->root, key);
  return json_is_null(value) ? NULL : value;
}

/* An integer in 1 .. 2^24, or the fallback where the key is absent; fallback 0 makes the key obligatory. */
static int config_size(const struct config *config, const char *key, int64_t fallback) {
  const json_t *value = config_get(config, key);
  if (!value && fallback) return (int)fallback;
  json_int_t size = json_is_integer(value) ? json_integer_value(value) : 0;
  if (size < 1 || size > 1 << 24) {
    error_set(config->error, ERROR_INPUT, "%s: %s: %s; it has to be a whole number from 1 to 16777216", config->path, key,
              value ? "not a size" : "missing");
    return 1;
  }
  return (int)size;
}

static bool config_bool(const struct config *config, const char *key, bool fallback) {
  const json_t *value = config_get(config, key);
  if (!value) return fallback;
  if (!json_is_boolean(value)) error_set(config->error, ERROR_INPUT, "%s: %s: not true or false", config->path, key);
  return json_is_true(value);
}

/* A positive number of `object` that fp32 holds; fallback 0 makes the key obligatory. */
static double config_number(const struct config *config, const json_t *object, const char *key, double fallback) {
  const json_t *value = json_object_get(object, key);
  if ((!value || json_is_null(value)) && fallback > 0) return fallback;
  double number = json_number_value(value);
  if (!(number >= FLT_MIN && number <= FLT_MAX))
    error_set(config->error, ERROR_INPUT, "%s: %s: %s; it has to be a positive number", config->path, key,
              !value             ? "missing"
              : number > FLT_MAX ? "too large"
                                 : "not positive");
  return number;
}

static bool present(const struct config *config, enum presence presence, const char *key) {
  return presence == ALWAYS || (presence == BY_CONFIG && config_bool(config, key, false));
}

/* Whether there is a set of settings for each kind of layer instead of one set. */
static bool has_sets(const json_t *parameters) {
  json_t *object = (json_t *)(uintptr_t)parameters; /* iterators take no const */
  for (void *at = json_object_iter(object); at; at = json_object_iter_next(object, at))
    if (json_is_object(json_object_iter_value(at))) return true;
  return false;
}

/* transformers 4 writes rope_theta and rope_scaling, transformers 5 both inside rope_parameters. */
static void parse_rope(const struct config *config, struct rope_settings *rope) {
  const json_t *parameters = config_get(config, "rope_parameters");
  const json_t *scaling = parameters ? parameters : config_get(config, "rope_scaling");
  const json_t *thetas = parameters && json_object_get(parameters, "rope_theta") ? parameters : config->root;
  rope->theta = config_number(config, thetas, "rope_theta", 10000);
  if (!scaling) return;
  const json_t *type = json_object_get(scaling, "rope_type");
  if (!type) type = json_object_get(scaling, "type");
  const char *name = !type && parameters ? "default" : json_string_value(type);
  if (!json_is_object(scaling) || !name) {
    error_set(config->error, ERROR_INPUT, "%s: %s: no rope_type in it; it has to be default, linear or llama3", config->path,
              parameters ? "rope_parameters" : "rope_scaling");
  } else if (has_sets(scaling)) {
    error_set(config->error, ERROR_INPUT, "%s: %s: several sets of settings in it; only one for all layers is supported", config->path,
              parameters ? "rope_parameters" : "rope_scaling");
  } else if (strcmp(name, "default") == 0) {
    rope->scaling = ROPE_PLAIN;
  } else if (strcmp(name, "linear") == 0) {
    rope->scaling = ROPE_LINEAR;
    rope->factor = config_number(config, scaling, "factor", 0);
  } else if (strcmp(name, "llama3") == 0) {
    rope->scaling = ROPE_LLAMA3;
    rope->factor = config_number(config, scaling, "factor", 0);
    rope->low_frequency_factor = config_number(config, scaling, "low_freq_factor", 0);
    rope->high_frequency_factor = config_number(config, scaling, "high_freq_factor", 0);
    rope->original_positions = config_number(config, scaling, "original_max_position_embeddings", 0);
  } else {
    error_set(config->error, ERROR_INPUT, "%s: rope_type: \"%.40s\" is not supported; default, linear and llama3 are", config->path,
              printable(name).text);
  }
}

/* Refuses by name what would silently compute another model. */
static void refuse_unsupported(const struct config *config) {
  const json_t *act = config_get(config, "hidden_act");
  if (act && (!json_is_string(act) || strcmp(json_string_value(act), "silu") != 0))
    error_set(config->error, ERROR_INPUT, "%s: hidden_act: only \"silu\" is supported in this family", config->path);
  if (config_bool(config, "use_sliding_window", false))
    error_set(config->error, ERROR_INPUT, "%s: use_sliding_window: a window in some blocks only is not supported", config->path);
  const json_t *partial = config_get(config, "partial_rotary_factor");
  if (partial && json_number_value(partial) != 1)
    error_set(config->error, ERROR_INPUT, "%s: partial_rotary_factor: only 1 is supported", config->path);
  if (config_get(config, "quantization_config"))
    error_set(config->error, ERROR_INPUT, "%s: quantization_config: this checkpoint is quantized already; give the full-precision one",
              config->path);
}

static void parse_sizes(const struct config *config, const struct family *family, struct model *model) {
  model->blocks = config_size(config, "num_hidden_layers", 0);
  model->hidden = config_size(config, "hidden_size", 0);
  model->ffn = config_size(config, "intermediate_size", 0);
  model->heads = config_size(config, "num_attention_heads", 0);
  model->kv_heads = config_size(config, "num_key_value_heads", model->heads);
  model->vocabulary = config_size(config, "vocab_size", 0);
  model->head_size = config_size(config, "head_dim", model->hidden / model->heads > 0 ? model->hidden / model->heads : 1);
  model->norm_eps = (float)config_number(config, config->root, "rms_norm_eps", 1e-6);
  model->tied_embeddings = config_bool(config, "tie_word_embeddings", false);
  model->window = family->sliding_window && config_get(config, "sliding_window") ? config_size(config, "sliding_window", 0) : 0;
  if (model->heads % model->kv_heads)
    error_set(config->error, ERROR_INPUT, "%s: num_key_value_heads: %d does not divide num_attention_heads %d", config->path,
              model->kv_heads, model->heads);
  if (!config_get(config, "head_dim") && model->hidden % model->heads)
    error_set(config->error, ERROR_INPUT, "%s: num_attention_heads: %d does not divide hidden_size %d, and there is no head_dim",
              config->path, model->heads, model->hidden);
  if ((int64_t)model->heads * model->head_size > 1 << 24)
    error_set(config->error, ERROR_INPUT, "%s: head_dim: %d heads of %d are more than 16777216 columns", config->path, model->heads,
              model->head_size);
  if (model->head_size % 2)
    error_set(config->error, ERROR_INPUT, "%s: head_dim: %d is odd, rotary embedding needs pairs", config->path, model->head_size);
}

/* ---- the block's tensors ---- */

static int add_tensor(struct model *model, const char *name, const char *suffix, int64_t rows, int64_t columns, int dimensions) {
  struct block_tensor *tensor = &model->tensor[model->tensors];
  snprintf(tensor->name, sizeof tensor->name, "%s.%s", name, suffix);
  tensor->dtype = DTYPE_F32;
  tensor->dimensions = dimensions;
  tensor->rows = rows;
  tensor->columns = columns;
  return model->tensors++;
}

static void add_linear(struct model *model, enum linear_role role, const char *name, int64_t rows, int64_t columns, bool bias) {
  struct linear *linear = &model->linear[role];
  snprintf(linear->name, sizeof linear->name, "%s", name);
  linear->rows = rows;
  linear->columns = columns;
  linear->weight = add_tensor(model, name, "weight", rows, columns, 2);
  linear->bias = bias ? add_tensor(model, name, "bias", 1, rows, 1) : ABSENT;
}

static void add_tensors(const struct config *config, const struct family *family, struct model *model) {
  int64_t H = model->hidden, F = model->ffn, D = model->head_size, q = model->heads * D, kv = model->kv_heads * D;
  bool qkv_bias = present(config, family->qkv_bias, "attention_bias"), o_bias = present(config, family->o_bias, "attention_bias");
  bool mlp_bias = present(config, family->mlp_bias, "mlp_bias");
  model->norm[NORM_ATTENTION] = add_tensor(model, "input_layernorm", "weight", 1, H, 1);
  add_linear(model, LINEAR_Q, "self_attn.q_proj", q, H, qkv_bias);
  add_linear(model, LINEAR_K, "self_attn.k_proj", kv, H, qkv_bias);
  add_linear(model, LINEAR_V, "self_attn.v_proj", kv, H, qkv_bias);
  model->norm[NORM_Q] = family->qk_norm ? add_tensor(model, "self_attn.q_norm", "weight", 1, D, 1) : ABSENT;
  model->norm[NORM_K] = family->qk_norm ? add_tensor(model, "self_attn.k_norm", "weight", 1, D, 1) : ABSENT;
  add_linear(model, LINEAR_O, "self_attn.o_proj", H, q, o_bias);
  model->norm[NORM_MLP] = add_tensor(model, "post_attention_layernorm", "weight", 1, H, 1);
  add_linear(model, LINEAR_GATE, "mlp.gate_proj", F, H, mlp_bias);
  add_linear(model, LINEAR_UP, "mlp.up_proj", F, H, mlp_bias);
  add_linear(model, LINEAR_DOWN, "mlp.down_proj", H, F, mlp_bias);
  model_layout(model);
}

void model_layout(struct model *model) {
  model->image_bytes = 0;
  model->elements = model->linear_elements = 0;
  for (int i = 0; i < model->tensors; i++) {
    struct block_tensor *tensor = &model->tensor[i];
    int64_t count = tensor->rows * tensor->columns;
    tensor->image_offset = model->image_bytes;
    tensor->element_offset = model->elements;
    model->image_bytes += ((size_t)count * dtype_size(tensor->dtype) + 63) / 64 * 64;
    model->elements += (count + 15) / 16 * 16;
  }
  for (int i = 0; i < LINEARS; i++) {
    model->linear[i].element_offset = model->linear_elements;
    model->linear_elements += (model->linear[i].rows * model->linear[i].columns + 15) / 16 * 16;
  }
}

int model_parse(struct model *model, const char *text, const char *path, struct error *error) {
  memset(model, 0, sizeof *model);
  json_error_t reason;
  json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, &reason);
  if (!json_is_object(root)) {
    bool parsed = root;
    json_decref(root);
    return error_set(error, ERROR_INPUT, "%s:%d: not a JSON object%s%s; it has to be the model's config.json", path,
                     parsed ? 1 : reason.line, parsed ? "" : ": ", parsed ? "" : printable(reason.text).text);
  }
  struct config config = {root, path, error};
  const char *type = json_string_value(json_object_get(root, "model_type"));
  const struct family *family = type ? family_find(type) : NULL;
  if (!family) {
    error_set(error, ERROR_INPUT, "%s: model_type: %s%.60s%s is not supported; llama, mistral, qwen2 and qwen3 are", path, type ? "\"" : "",
              type ? printable(type).text : "a missing one", type ? "\"" : "");
  } else {
    snprintf(model->model_type, sizeof model->model_type, "%s", type);
    refuse_unsupported(&config);
    parse_sizes(&config, family, model);
    parse_rope(&config, &model->rope);
    if (!error->code) add_tensors(&config, family, model);
  }
  json_decref(root);
  return error->code;
}

/* ---- rotary embedding ---- */

/* Frequency of a pair; in float where transformers computes in float, so that angles agree to the last bit. */
static float rope_frequency(const struct rope_settings *rope, int pair, int head_size) {
  float frequency = 1.0f / powf((float)rope->theta, (float)(2 * pair) / (float)head_size);
  if (rope->scaling == ROPE_LINEAR) return frequency / (float)rope->factor;
  if (rope->scaling == ROPE_PLAIN) return frequency;
  double wavelength = 2 * M_PI / (double)frequency;
  if (wavelength > rope->original_positions / rope->low_frequency_factor) return (float)(frequency / rope->factor);
  if (wavelength < rope->original_positions / rope->high_frequency_factor) return frequency;
  double smooth =
      (rope->original_positions / wavelength - rope->low_frequency_factor) / (rope->high_frequency_factor - rope->low_frequency_factor);
  return (float)((1 - smooth) * frequency / rope->factor + smooth * frequency);
}

void model_rope_table(const struct model *model, int tokens, float *cosine, float *sine) {
  int half = model->head_size / 2;
  for (int i = 0; i < half; i++) {
    float frequency = rope_frequency(&model->rope, i, model->head_size);
    for (int t = 0; t < tokens; t++) {
      float angle = (float)t * frequency;
      cosine[(int64_t)t * half + i] = cosf(angle);
      sine[(int64_t)t * half + i] = sinf(angle);
    }
  }
}
