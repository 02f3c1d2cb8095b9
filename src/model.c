/* model.c: the table of families, and config.json. A family that is made of the parts below is one more row. */
#include "model.h"

#include <float.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "printable.h"

enum presence { NEVER, ALWAYS, BY_CONFIG };

/* Names of a block's parts in the checkpoint, without ".weight"; NULL for what a family has not. */
struct part_names {
  const char *norm[NORMS];
  const char *linear[ROLES]; /* with one %d for the expert in families that have experts */
  const char *fused;         /* q, k and v in one: for each kv head its query heads, then k, then v */
};

/* Keys of config.json; NULL for what a family fixes by other keys or not at all. */
struct keys {
  const char *ffn, *kv_heads, *norm_eps, *activation;
};

struct config;

struct family {
  const char *model_type;
  struct model_names names;
  struct part_names parts;
  struct keys keys;
  double rope_theta;              /* where config.json names none; 0: no rotary positions */
  enum presence qkv_bias, o_bias; /* BY_CONFIG: attention_bias */
  enum presence mlp_bias;         /* BY_CONFIG: mlp_bias */
  enum activation activation;     /* where config.json names none */
  int ffn_of_hidden;              /* the MLP's width over the hidden size where config.json names none; 0: it has to */
  float norm_eps;                 /* where config.json names none */
  bool layer_norm;
  bool sliding_window; /* sliding_window of config.json holds for all blocks */
  bool tied;           /* where config.json does not say */
  /* What other families have not: changes model and parts by config.json. NULL for none. */
  void (*adapt)(const struct config *config, struct model *model, struct part_names *parts);
};

#define LLAMA_NAMES                                                                                                                        \
  {                                                                                                                                        \
    .block_prefix = "model.layers.%d.", .embedding = "model.embed_tokens.weight", .head = "lm_head.weight",                                \
    .final_norm = "model.norm.weight"                                                                                                      \
  }
#define LLAMA_ATTENTION                                                                                                                    \
  [LINEAR_Q] = "self_attn.q_proj", [LINEAR_K] = "self_attn.k_proj", [LINEAR_V] = "self_attn.v_proj", [LINEAR_O] = "self_attn.o_proj"
#define LLAMA_NORMS [NORM_ATTENTION] = "input_layernorm", [NORM_MLP] = "post_attention_layernorm"
#define LLAMA_LINEAR                                                                                                                       \
  { LLAMA_ATTENTION, [LINEAR_GATE] = "mlp.gate_proj", [LINEAR_UP] = "mlp.up_proj", [LINEAR_DOWN] = "mlp.down_proj" }
#define LLAMA_KEYS                                                                                                                         \
  { "intermediate_size", "num_key_value_heads", "rms_norm_eps", "hidden_act" }

static void adapt_opt(const struct config *config, struct model *model, struct part_names *parts);
static void adapt_falcon(const struct config *config, struct model *model, struct part_names *parts);
static void adapt_mixtral(const struct config *config, struct model *model, struct part_names *parts);

static const struct family families[] = {
    {.model_type = "llama",
     .names = LLAMA_NAMES,
     .parts = {.norm = {LLAMA_NORMS}, .linear = LLAMA_LINEAR},
     .keys = LLAMA_KEYS,
     .qkv_bias = BY_CONFIG,
     .o_bias = BY_CONFIG,
     .mlp_bias = BY_CONFIG,
     .norm_eps = 1e-6f,
     .rope_theta = 10000},
    {.model_type = "mistral",
     .names = LLAMA_NAMES,
     .parts = {.norm = {LLAMA_NORMS}, .linear = LLAMA_LINEAR},
     .keys = LLAMA_KEYS,
     .norm_eps = 1e-6f,
     .rope_theta = 10000,
     .sliding_window = true},
    {.model_type = "qwen2",
     .names = LLAMA_NAMES,
     .parts = {.norm = {LLAMA_NORMS}, .linear = LLAMA_LINEAR},
     .keys = LLAMA_KEYS,
     .qkv_bias = ALWAYS,
     .norm_eps = 1e-6f,
     .rope_theta = 10000},
    {.model_type = "qwen3",
     .names = LLAMA_NAMES,
     .parts = {.norm = {LLAMA_NORMS, [NORM_Q] = "self_attn.q_norm", [NORM_K] = "self_attn.k_norm"}, .linear = LLAMA_LINEAR},
     .keys = LLAMA_KEYS,
     .qkv_bias = BY_CONFIG,
     .o_bias = BY_CONFIG,
     .norm_eps = 1e-6f,
     .rope_theta = 10000},
    {.model_type = "opt",
     .names = {.block_prefix = "model.decoder.layers.%d.",
               .embedding = "model.decoder.embed_tokens.weight",
               .head = "lm_head.weight",
               .final_norm = "model.decoder.final_layer_norm.weight",
               .final_norm_bias = "model.decoder.final_layer_norm.bias",
               .positions = "model.decoder.embed_positions.weight",
               .project_in = "model.decoder.project_in.weight",
               .project_out = "model.decoder.project_out.weight"},
     .parts = {.norm = {[NORM_ATTENTION] = "self_attn_layer_norm", [NORM_MLP] = "final_layer_norm"},
               .linear = {[LINEAR_Q] = "self_attn.q_proj",
                          [LINEAR_K] = "self_attn.k_proj",
                          [LINEAR_V] = "self_attn.v_proj",
                          [LINEAR_O] = "self_attn.out_proj",
                          [LINEAR_UP] = "fc1",
                          [LINEAR_DOWN] = "fc2"}},
     .keys = {.ffn = "ffn_dim", .activation = "activation_function"},
     .qkv_bias = ALWAYS,
     .o_bias = ALWAYS,
     .mlp_bias = ALWAYS,
     .activation = ACTIVATION_RELU,
     .norm_eps = 1e-5f,
     .layer_norm = true,
     .tied = true,
     .adapt = adapt_opt},
    {.model_type = "falcon",
     .names = {.block_prefix = "transformer.h.%d.",
               .embedding = "transformer.word_embeddings.weight",
               .head = "lm_head.weight",
               .final_norm = "transformer.ln_f.weight",
               .final_norm_bias = "transformer.ln_f.bias"},
     .parts = {.norm = {[NORM_ATTENTION] = "input_layernorm"},
               .linear = {[LINEAR_O] = "self_attention.dense", [LINEAR_UP] = "mlp.dense_h_to_4h", [LINEAR_DOWN] = "mlp.dense_4h_to_h"},
               .fused = "self_attention.query_key_value"},
     .keys = {.ffn = "ffn_hidden_size", .norm_eps = "layer_norm_epsilon", .activation = "activation"},
     .activation = ACTIVATION_GELU,
     .ffn_of_hidden = 4,
     .norm_eps = 1e-5f,
     .layer_norm = true,
     .rope_theta = 10000,
     .tied = true,
     .adapt = adapt_falcon},
    {.model_type = "mixtral",
     .names = LLAMA_NAMES,
     .parts = {.norm = {LLAMA_NORMS},
               .linear = {LLAMA_ATTENTION, [LINEAR_ROUTER] = "block_sparse_moe.gate", [LINEAR_GATE] = "block_sparse_moe.experts.%d.w1",
                          [LINEAR_UP] = "block_sparse_moe.experts.%d.w3", [LINEAR_DOWN] = "block_sparse_moe.experts.%d.w2"}},
     .keys = LLAMA_KEYS,
     .norm_eps = 1e-5f,
     .rope_theta = 1e6,
     .sliding_window = true,
     .adapt = adapt_mixtral},
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
  const json_t *value = key ? json_object_get(config->root, key) : NULL;
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
static void parse_rope(const struct config *config, double theta, struct rope_settings *rope) {
  const json_t *parameters = config_get(config, "rope_parameters");
  const json_t *scaling = parameters ? parameters : config_get(config, "rope_scaling");
  const json_t *thetas = parameters && json_object_get(parameters, "rope_theta") ? parameters : config->root;
  rope->theta = config_number(config, thetas, "rope_theta", theta);
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

static bool gated(const struct model *model) {
  return model->activation == ACTIVATION_SILU_GATED;
}

/* A gated MLP has silu; a plain one relu or gelu. */
static void parse_activation(const struct config *config, const struct family *family, struct model *model) {
  const json_t *value = config_get(config, family->keys.activation);
  const char *name = json_string_value(value);
  model->activation = family->activation;
  if (!value) return;
  if (gated(model) && (!name || strcmp(name, "silu") != 0))
    error_set(config->error, ERROR_INPUT, "%s: %s: only \"silu\" is supported in this family", config->path, family->keys.activation);
  if (gated(model)) return;
  if (name && strcmp(name, "relu") == 0)
    model->activation = ACTIVATION_RELU;
  else if (name && strcmp(name, "gelu") == 0)
    model->activation = ACTIVATION_GELU;
  else
    error_set(config->error, ERROR_INPUT, "%s: %s: only \"relu\" and \"gelu\" are supported in this family", config->path,
              family->keys.activation);
}

/* Refuses by name what would silently compute another model. */
static void refuse_unsupported(const struct config *config) {
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
  model->hidden = model->embedding = config_size(config, "hidden_size", 0);
  model->heads = config_size(config, "num_attention_heads", 0);
  model->kv_heads = family->keys.kv_heads ? config_size(config, family->keys.kv_heads, model->heads) : model->heads;
  model->ffn = config_size(config, family->keys.ffn, family->ffn_of_hidden * (int64_t)model->hidden);
  model->vocabulary = config_size(config, "vocab_size", 0);
  model->head_size = config_size(config, "head_dim", model->hidden / model->heads > 0 ? model->hidden / model->heads : 1);
  model->norm_eps =
      family->keys.norm_eps ? (float)config_number(config, config->root, family->keys.norm_eps, family->norm_eps) : family->norm_eps;
  model->experts_per_token = 1;
  model->layer_norm = family->layer_norm;
  model->final_norm = true;
  model->tied_embeddings = config_bool(config, "tie_word_embeddings", family->tied);
  model->window = family->sliding_window && config_get(config, "sliding_window") ? config_size(config, "sliding_window", 0) : 0;
}

static void check_sizes(const struct config *config, const struct family *family, const struct model *model) {
  if (model->heads % model->kv_heads)
    error_set(config->error, ERROR_INPUT, "%s: %s: %d does not divide num_attention_heads %d", config->path,
              family->keys.kv_heads ? family->keys.kv_heads : "num_kv_heads", model->kv_heads, model->heads);
  if (!config_get(config, "head_dim") && model->hidden % model->heads)
    error_set(config->error, ERROR_INPUT, "%s: num_attention_heads: %d does not divide hidden_size %d, and there is no head_dim",
              config->path, model->heads, model->hidden);
  if ((int64_t)model->heads * model->head_size > 1 << 24)
    error_set(config->error, ERROR_INPUT, "%s: head_dim: %d heads of %d are more than 16777216 columns", config->path, model->heads,
              model->head_size);
  if (family->rope_theta > 0 && model->head_size % 2)
    error_set(config->error, ERROR_INPUT, "%s: head_dim: %d is odd, rotary embedding needs pairs", config->path, model->head_size);
}

/* ---- families that have what others have not ---- */

static void adapt_opt(const struct config *config, struct model *model, struct part_names *parts) {
  model->post_norm = !config_bool(config, "do_layer_norm_before", true);
  model->final_norm = !model->post_norm && !config_bool(config, "_remove_final_layer_norm", false);
  model->embedding = config_size(config, "word_embed_proj_dim", model->hidden);
  model->positions = config_size(config, "max_position_embeddings", 2048);
  if (!config_bool(config, "layer_norm_elementwise_affine", true))
    error_set(config->error, ERROR_INPUT, "%s: layer_norm_elementwise_affine: norms without weights are not supported", config->path);
  if (!config_bool(config, "enable_bias", true))
    error_set(config->error, ERROR_INPUT, "%s: enable_bias: an OPT without biases is not supported", config->path);
  (void)parts;
}

static void adapt_falcon(const struct config *config, struct model *model, struct part_names *parts) {
  bool grouped = config_bool(config, "new_decoder_architecture", false);
  int norms = grouped ? config_size(config, "num_ln_in_parallel_attn", 2) : 1;
  if (config_bool(config, "alibi", false))
    error_set(config->error, ERROR_INPUT, "%s: alibi: only rotary positions are supported (Falcon 7B, 11B, 40B, 180B; not Falcon-RW)",
              config->path);
  if (config_bool(config, "bias", false))
    error_set(config->error, ERROR_INPUT, "%s: bias: a Falcon whose linear layers have biases is not supported", config->path);
  if (norms > 2) error_set(config->error, ERROR_INPUT, "%s: num_ln_in_parallel_attn: %d is not 1 or 2", config->path, norms);
  model->kv_heads = grouped                                    ? config_size(config, "num_kv_heads", model->heads)
                    : config_bool(config, "multi_query", true) ? 1
                                                               : model->heads;
  model->parallel = grouped || config_bool(config, "parallel_attn", true);
  if (!model->parallel) {
    parts->norm[NORM_MLP] = "post_attention_layernorm";
  } else if (norms == 2) {
    parts->norm[NORM_ATTENTION] = "ln_attn";
    parts->norm[NORM_MLP] = "ln_mlp";
  }
}

static void adapt_mixtral(const struct config *config, struct model *model, struct part_names *parts) {
  (void)parts;
  model->experts = config_size(config, "num_local_experts", 8);
  model->experts_per_token = config_size(config, "num_experts_per_tok", 2);
  if (model->experts > MODEL_MAX_EXPERTS)
    error_set(config->error, ERROR_INPUT, "%s: num_local_experts: %d are more than the %d that are supported", config->path, model->experts,
              MODEL_MAX_EXPERTS);
  if (model->experts_per_token > model->experts)
    error_set(config->error, ERROR_INPUT, "%s: num_experts_per_tok: %d, but there are %d experts", config->path, model->experts_per_token,
              model->experts);
}

/* ---- the block's tensors ---- */

/* The rows of `total` that the map takes; a whole tensor is one run. */
static struct row_map whole(int64_t rows) {
  return (struct row_map){0, rows, rows, rows};
}

static int add_tensor(struct model *model, const char *name, const char *suffix, int64_t rows, int64_t columns, int dimensions,
                      struct row_map source) {
  struct block_tensor *tensor = &model->tensor[model->tensors];
  snprintf(tensor->name, sizeof tensor->name, "%s.%s", name, suffix);
  tensor->dtype = DTYPE_F32;
  tensor->dimensions = dimensions;
  tensor->rows = rows;
  tensor->columns = columns;
  tensor->source = source;
  return model->tensors++;
}

static void add_norm(struct model *model, enum norm_role role, const char *name, int64_t columns) {
  model->norm[role] = model->norm_bias[role] = ABSENT;
  if (!name) return;
  model->norm[role] = add_tensor(model, name, "weight", 1, columns, 1, whole(columns));
  if (model->layer_norm) model->norm_bias[role] = add_tensor(model, name, "bias", 1, columns, 1, whole(columns));
}

static void add_linear(struct model *model, int index, const char *name, int64_t rows, int64_t columns, bool bias, struct row_map source) {
  struct linear *linear = &model->linear[index];
  *linear = (struct linear){.weight = ABSENT, .bias = ABSENT};
  if (!name) return;
  snprintf(linear->name, sizeof linear->name, "%s", name);
  linear->rows = rows;
  linear->columns = columns;
  linear->quantized = index != LINEAR_ROUTER;
  linear->weight = add_tensor(model, name, "weight", rows, columns, 2, source);
  if (bias) linear->bias = add_tensor(model, name, "bias", 1, rows, 1, source);
}

/* Of a kv head's rows in a fused tensor, `heads` heads from the one numbered `first` on. */
static struct row_map fused_rows(const struct model *model, int first, int heads) {
  int64_t D = model->head_size, per_group = model->heads / model->kv_heads + 2;
  return (struct row_map){first * D, heads * D, per_group * D, model->kv_heads * per_group * D};
}

static void add_attention(const struct config *config, const struct family *family, const struct part_names *parts, struct model *model) {
  int64_t H = model->hidden, q = (int64_t)model->heads * model->head_size, kv = (int64_t)model->kv_heads * model->head_size;
  int share = model->heads / model->kv_heads;
  bool bias = present(config, family->qkv_bias, "attention_bias");
  const char *const *name = parts->linear, *fused = parts->fused;
  add_linear(model, LINEAR_Q, fused ? fused : name[LINEAR_Q], q, H, bias, fused ? fused_rows(model, 0, share) : whole(q));
  add_linear(model, LINEAR_K, fused ? fused : name[LINEAR_K], kv, H, bias, fused ? fused_rows(model, share, 1) : whole(kv));
  add_linear(model, LINEAR_V, fused ? fused : name[LINEAR_V], kv, H, bias, fused ? fused_rows(model, share + 1, 1) : whole(kv));
  add_norm(model, NORM_Q, parts->norm[NORM_Q], model->head_size);
  add_norm(model, NORM_K, parts->norm[NORM_K], model->head_size);
  add_linear(model, LINEAR_O, name[LINEAR_O], H, q, present(config, family->o_bias, "attention_bias"), whole(H));
}

static void add_expert(struct model *model, const struct part_names *parts, int expert, bool bias) {
  int64_t H = model->hidden, F = model->ffn;
  for (enum linear_role role = LINEAR_GATE; role <= LINEAR_DOWN; role++) {
    char name[64];
    bool down = role == LINEAR_DOWN;
    if (parts->linear[role]) snprintf(name, sizeof name, parts->linear[role], expert);
    add_linear(model, linear_of_expert(role, expert), parts->linear[role] ? name : NULL, down ? H : F, down ? F : H, bias,
               whole(down ? H : F));
  }
}

static void add_tensors(const struct config *config, const struct family *family, const struct part_names *parts, struct model *model) {
  bool bias = present(config, family->mlp_bias, "mlp_bias");
  int mlps = model_mlps(model);
  model->linears = ROLES + ROLES_OF_EXPERT * (mlps - 1);
  add_norm(model, NORM_ATTENTION, parts->norm[NORM_ATTENTION], model->hidden);
  add_attention(config, family, parts, model);
  add_norm(model, NORM_MLP, parts->norm[NORM_MLP], model->hidden);
  add_linear(model, LINEAR_ROUTER, parts->linear[LINEAR_ROUTER], model->experts, model->hidden, false, whole(model->experts));
  for (int expert = 0; expert < mlps; expert++) add_expert(model, parts, expert, bias);
  model_layout(model);
}

void model_layout(struct model *model) {
  model->image_bytes = 0;
  model->elements = 0;
  for (int i = 0; i < model->tensors; i++) {
    struct block_tensor *tensor = &model->tensor[i];
    int64_t count = tensor->rows * tensor->columns;
    tensor->image_offset = model->image_bytes;
    tensor->element_offset = model->elements;
    model->image_bytes += ((size_t)count * dtype_size(tensor->dtype) + 63) / 64 * 64;
    model->elements += (count + 15) / 16 * 16;
  }
}

void model_widen(struct model *model) {
  for (int i = 0; i < model->tensors; i++) model->tensor[i].dtype = DTYPE_F32;
  model_layout(model);
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
    error_set(error, ERROR_INPUT, "%s: model_type: %s%.60s%s is not supported; llama, mistral, qwen2, qwen3, opt, falcon and mixtral are",
              path, type ? "\"" : "", type ? printable(type).text : "a missing one", type ? "\"" : "");
  } else {
    struct part_names parts = family->parts;
    snprintf(model->model_type, sizeof model->model_type, "%s", type);
    refuse_unsupported(&config);
    parse_sizes(&config, family, model);
    parse_activation(&config, family, model);
    if (family->adapt) family->adapt(&config, model, &parts);
    check_sizes(&config, family, model);
    if (family->rope_theta > 0) parse_rope(&config, family->rope_theta, &model->rope);
    if (!error->code) add_tensors(&config, family, &parts, model);
  }
  json_decref(root);
  return error->code;
}

/* ---- positions ---- */

bool model_quantizes(const struct model *model, int tensor) {
  for (int i = 0; i < model->linears; i++)
    if (model->linear[i].weight == tensor) return model->linear[i].quantized;
  return false;
}

int model_first_part(const struct model *model, int tensor) {
  int first = 0;
  while (strcmp(model->tensor[first].name, model->tensor[tensor].name) != 0) first++;
  return first;
}

int model_check_seqlen(const struct model *model, int seqlen, const char *where, struct error *error) {
  if (model->positions == 0 || seqlen <= model->positions) return 0;
  return error_set(error, ERROR_INPUT, "%s: max_position_embeddings: the model has learned %d positions, seqlen is %d; lower --seqlen",
                   where, model->positions, seqlen);
}

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

float model_rope_frequency(const struct model *model, int pair) {
  return rope_frequency(&model->rope, pair, model->head_size);
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
