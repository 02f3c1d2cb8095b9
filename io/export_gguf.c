/* export_gguf.c: a model as llama.cpp knows it: names, order of rows, and the block types that hold the store's codes. */
#include "export_gguf.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dequantize.h"
#include "gguf_tokenizer.h"
#include "gguf_writer.h"

/* Of our families those that llama.cpp knows. */
struct architecture {
  const char *model_type, *name;
  bool pairs; /* rows of q and k lie in the order of rotated pairs */
  bool layer_norm;
  int positions; /* context where config.json names none */
};
static const struct architecture architectures[] = {
    {"llama", "llama", true, false, 2048},   {"mistral", "llama", true, false, 32768}, {"mixtral", "llama", true, false, 32768},
    {"qwen2", "qwen2", false, false, 32768}, {"qwen3", "qwen3", false, false, 32768},  {"falcon", "falcon", false, true, 2048},
};

/* Which type holds codes of so many bits, and what it stores of a code. Of several the first counts. */
static const struct holder {
  int least, most; /* bits */
  enum gguf_type type;
  int middle;
  int file_type;  /* general.file_type */
  bool symmetric; /* codes */
  bool minimum;   /* weight d * q + m with m = -d * z, rounded to F16; else d * (q - middle), exactly */
} holders[] = {
    {2, 3, GGUF_Q4_0, 8, 2, false, false}, {4, 4, GGUF_Q4_1, 0, 3, false, true},   {5, 5, GGUF_Q5_1, 0, 9, false, true},
    {6, 7, GGUF_Q8_0, 0, 7, false, false}, {2, 4, GGUF_Q4_0, 8, 2, true, false},   {5, 5, GGUF_Q5_0, 16, 8, true, false},
    {6, 8, GGUF_Q8_0, 0, 7, true, false},  {4, 4, GGUF_Q5_0, 16, 8, false, false}, {5, 5, GGUF_Q8_0, 0, 7, false, false},
};
enum { FILE_TYPE_F16 = 1 };

struct gguf {
  const struct export_job *job;
  const struct architecture *architecture;
  const struct holder *holder; /* NULL: no type holds the scheme, all is F16 */
  struct gguf_writer *writer;
};

/* What a tensor becomes. */
struct place {
  char name[64];
  enum gguf_type type;
  int dimensions;
  int64_t sizes[3]; /* fastest first */
  int64_t offset;   /* bytes, of an expert's part */
};

/* ---- what llama.cpp can run ---- */

static int check_model(struct gguf *g, struct error *error) {
  const struct model *model = g->job->model;
  for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++)
    if (strcmp(architectures[i].model_type, model->model_type) == 0) g->architecture = &architectures[i];
  if (!g->architecture) return error_set(error, ERROR_INPUT, "llama.cpp does not know models of type %s", model->model_type);
  bool bias = false;
  for (int i = 0; i < model->linears; i++) bias = bias || model->linear[i].bias != ABSENT;
  if (strcmp(model->model_type, "qwen3") == 0 && bias)
    return error_set(error, ERROR_INPUT, "llama.cpp's qwen3 has no biases, the model has");
  if (g->architecture->layer_norm && !model->parallel)
    return error_set(error, ERROR_INPUT, "llama.cpp's falcon has attention and MLP side by side, the model one after the other");
  if (strcmp(model->model_type, "falcon") == 0 && model->activation != ACTIVATION_GELU)
    return error_set(error, ERROR_INPUT, "llama.cpp's falcon has GELU, the model another activation");
  return 0;
}

static int check_scheme(struct gguf *g, struct error *error) {
  const struct export_scheme *scheme = &g->job->scheme;
  if (scheme->abits < 16) return error_set(error, ERROR_INPUT, "it has no quantized activations, the recipe's have %d bits", scheme->abits);
  for (size_t i = 0; i < sizeof holders / sizeof *holders && !g->holder; i++)
    if (holders[i].symmetric == scheme->symmetric && scheme->bits >= holders[i].least && scheme->bits <= holders[i].most &&
        !(holders[i].minimum && g->job->exact))
      g->holder = &holders[i];
  if (g->holder || g->job->f16_fallback) return 0;
  return error_set(error, ERROR_INPUT,
                   "no type holds asymmetric weights of %d bits; calibrate with 2 to 7 bits, or with --symmetric, or give --f16-fallback",
                   scheme->bits);
}

static bool fits_blocks(const struct quantized_linear *linear) {
  return linear->in_features % GGUF_BLOCK == 0 && (linear->group_size % GGUF_BLOCK == 0 || linear->group_size >= linear->in_features);
}

/* ---- names ---- */

static const char *const norm_names[NORMS] = {
    [NORM_ATTENTION] = "attn_norm", [NORM_MLP] = "ffn_norm", [NORM_Q] = "attn_q_norm", [NORM_K] = "attn_k_norm"};
static const char *const linear_names[ROLES] = {[LINEAR_Q] = "attn_q",
                                                [LINEAR_K] = "attn_k",
                                                [LINEAR_V] = "attn_v",
                                                [LINEAR_O] = "attn_output",
                                                [LINEAR_ROUTER] = "ffn_gate_inp",
                                                [LINEAR_GATE] = "ffn_gate",
                                                [LINEAR_UP] = "ffn_up",
                                                [LINEAR_DOWN] = "ffn_down"};

/* Whether q, k and v are one tensor. */
static bool fused(const struct model *model) {
  const struct linear *q = &model->linear[LINEAR_Q], *k = &model->linear[LINEAR_K];
  return strcmp(model->tensor[q->weight].name, model->tensor[k->weight].name) == 0;
}

/* Falcon's MLP reads what llama.cpp calls attn_norm, and attention reads attn_norm_2 where it has a norm of its own. */
static const char *norm_name(const struct gguf *g, int role) {
  bool two = g->job->model->norm[NORM_MLP] != ABSENT;
  if (!g->architecture->layer_norm || !two) return norm_names[role];
  return role == NORM_ATTENTION ? "attn_norm_2" : "attn_norm";
}

/* Index of the linear layer that has this weight or bias; ABSENT. */
static int linear_of(const struct model *model, int tensor) {
  for (int i = 0; i < model->linears; i++)
    if (model->linear[i].rows > 0 && (model->linear[i].weight == tensor || model->linear[i].bias == tensor)) return i;
  return ABSENT;
}

static void block_name(const struct gguf *g, const struct export_tensor *tensor, char name[64]) {
  const struct model *model = g->job->model;
  const char *base = "", *suffix = tensor->dimensions == 2 ? "weight" : "bias";
  int linear = linear_of(model, tensor->index);
  for (int role = 0; role < NORMS; role++) {
    if (model->norm[role] == tensor->index) suffix = "weight";
    if (model->norm[role] == tensor->index || model->norm_bias[role] == tensor->index) base = norm_name(g, role);
  }
  if (linear != ABSENT) base = linear == LINEAR_Q && fused(model) ? "attn_qkv" : linear_names[role_of_linear(linear)];
  bool expert = linear != ABSENT && model->experts && role_of_linear(linear) >= LINEAR_GATE;
  snprintf(name, 64, "blk.%d.%s%s.%s", tensor->block, base, expert ? "_exps" : "", suffix);
}

static void outside_name(const struct gguf *g, const struct export_tensor *tensor, char name[64]) {
  const struct model_names *names = model_names(g->job->model);
  const char *const table[][2] = {{names->embedding, "token_embd.weight"},
                                  {names->head, "output.weight"},
                                  {names->final_norm, "output_norm.weight"},
                                  {names->final_norm_bias, "output_norm.bias"}};
  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (table[i][0] && strcmp(table[i][0], tensor->name) == 0) snprintf(name, 64, "%s", table[i][1]);
}

/* ---- types and places ---- */

/* Of the embedding and the head, where they were asked to be rounded and their columns allow it. */
static bool rounds(const struct gguf *g, const struct export_tensor *tensor) {
  return g->job->embedding == EXPORT_EMBEDDING_Q8_0 && tensor->block == ABSENT && tensor->dimensions == 2 &&
         tensor->shape[1] % GGUF_BLOCK == 0;
}

static struct place place_of(const struct gguf *g, const struct export_tensor *tensor) {
  const struct model *model = g->job->model;
  struct place place = {.dimensions = tensor->dimensions, .type = tensor->dimensions == 2 ? GGUF_F16 : GGUF_F32};
  int linear = tensor->index == ABSENT ? ABSENT : linear_of(model, tensor->index);
  place.sizes[0] = tensor->shape[tensor->dimensions - 1];
  if (tensor->dimensions == 2) place.sizes[1] = tensor->shape[0];
  if (tensor->block == ABSENT)
    outside_name(g, tensor, place.name);
  else
    block_name(g, tensor, place.name);
  if (linear == LINEAR_ROUTER) place.type = GGUF_F32;
  if (rounds(g, tensor)) place.type = GGUF_Q8_0;
  if (tensor->linear && g->holder && fits_blocks(tensor->linear)) place.type = g->holder->type;
  if (linear != ABSENT && model->experts && role_of_linear(linear) >= LINEAR_GATE) {
    place.dimensions = 3;
    place.sizes[2] = model->experts;
    place.offset = expert_of_linear(linear) * place.sizes[1] * gguf_row_bytes(place.type, place.sizes[0]);
  }
  return place;
}

int export_gguf_announce(void *state, const struct export_tensor *tensor, struct error *error) {
  struct gguf *g = state;
  struct place place = place_of(g, tensor);
  if (tensor->linear && g->holder && !fits_blocks(tensor->linear) && !g->job->f16_fallback)
    return error_set(error, ERROR_INPUT,
                     "%s: its blocks have %d columns, which have to divide the layer's %lld and the group's %lld; --f16-fallback writes "
                     "such layers as F16",
                     tensor->name, GGUF_BLOCK, (long long)tensor->linear->in_features, (long long)tensor->linear->group_size);
  if (place.offset > 0) return 0; /* the first expert has announced it for all */
  return gguf_writer_announce(g->writer, place.name, place.type, place.dimensions, place.sizes, error);
}

/* ---- rows ---- */

/* The checkpoint's row that becomes row `row`. */
static int64_t source_of(const struct gguf *g, const struct export_tensor *tensor, int64_t row) {
  const struct model *model = g->job->model;
  int linear = tensor->index == ABSENT ? ABSENT : linear_of(model, tensor->index);
  if (linear == LINEAR_Q && fused(model)) { /* all of q, then all of k, then all of v */
    for (int part = LINEAR_Q; part <= LINEAR_V; part++) {
      if (row < model->linear[part].rows) return source_row(&model->tensor[model->linear[part].weight].source, row);
      row -= model->linear[part].rows;
    }
  }
  if (!g->architecture->pairs || (linear != LINEAR_Q && linear != LINEAR_K)) return row;
  int64_t size = model->head_size, in_head = row % size;
  return row - in_head + in_head % 2 * (size / 2) + in_head / 2;
}

static void put_half(uint8_t *to, uint16_t half) {
  to[0] = (uint8_t)half;
  to[1] = (uint8_t)(half >> 8);
}

/* Of 32 numbers below 16 byte i has numbers i and i + 16; of those below 32 a word of fifth bits stands before. */
static uint8_t *put_numbers(uint8_t *to, const uint8_t *number, enum gguf_type type) {
  if (type == GGUF_Q8_0) {
    memcpy(to, number, GGUF_BLOCK);
    return to + GGUF_BLOCK;
  }
  if (type == GGUF_Q5_0 || type == GGUF_Q5_1) {
    uint32_t fifth = 0;
    for (int i = 0; i < GGUF_BLOCK; i++) fifth |= (uint32_t)(number[i] >> 4 & 1) << i;
    for (int i = 0; i < 4; i++) *to++ = (uint8_t)(fifth >> 8 * i);
  }
  for (int i = 0; i < GGUF_BLOCK / 2; i++) *to++ = (uint8_t)((number[i] & 15) | number[i + GGUF_BLOCK / 2] << 4);
  return to;
}

/* A row of codes as blocks. A group is one or more blocks. */
static int put_blocks(const struct gguf *g, const struct quantized_linear *linear, int64_t row, uint8_t *to, struct error *error) {
  const struct holder *holder = g->holder;
  int64_t groups = export_groups(linear);
  for (int64_t first = 0; first < linear->in_features; first += GGUF_BLOCK) {
    int64_t group = row * groups + first / linear->group_size;
    int zero = linear->zero_point[group];
    uint8_t number[GGUF_BLOCK];
    for (int i = 0; i < GGUF_BLOCK; i++) {
      int code = export_code(linear, row, first + i);
      number[i] = (uint8_t)(holder->minimum ? code : code - zero + holder->middle);
    }
    put_half(to, linear->scale[group]);
    to += 2;
    if (holder->minimum) {
      uint16_t minimum = half_from_float(-half_to_float(linear->scale[group]) * (float)zero);
      if ((minimum & 0x7c00) == 0x7c00)
        return error_set(error, ERROR_INPUT, "%s: a group's minimum is too large for F16; use another format", linear->name);
      put_half(to, minimum);
      to += 2;
    }
    to = put_numbers(to, number, holder->type);
  }
  return 0;
}

/* Values rounded to the nearest of 255 steps between the ends of their block, as ggml quantizes to Q8_0. */
static int put_rounded(const struct export_tensor *tensor, const float *values, int64_t count, uint8_t *to, struct error *error) {
  for (int64_t first = 0; first < count; first += GGUF_BLOCK) {
    float largest = 0;
    for (int i = 0; i < GGUF_BLOCK; i++) largest = fmaxf(largest, fabsf(values[first + i]));
    float scale = largest / 127, inverse = scale > 0 ? 1 / scale : 0;
    uint16_t half = half_from_float(scale);
    if ((half & 0x7c00) == 0x7c00)
      return error_set(error, ERROR_INPUT, "%s: a value of %g is too large for Q8_0; leave --embedding at f16", tensor->name,
                       (double)largest);
    put_half(to, half);
    for (int i = 0; i < GGUF_BLOCK; i++) to[2 + i] = (uint8_t)(int8_t)roundf(values[first + i] * inverse);
    to += 2 + GGUF_BLOCK;
  }
  return 0;
}

static int put_values(const struct export_tensor *tensor, const float *values, enum gguf_type type, int64_t count, uint8_t *to,
                      struct error *error) {
  if (type == GGUF_Q8_0) return put_rounded(tensor, values, count, to, error);
  for (int64_t i = 0; i < count && type == GGUF_F16; i++) {
    uint16_t half = half_from_float(values[i]);
    put_half(to + 2 * i, half);
    if ((half & 0x7c00) == 0x7c00)
      return error_set(error, ERROR_INPUT, "%s: a value of %g is too large for F16; use another format", tensor->name, values[i]);
  }
  for (int64_t i = 0; i < count && type == GGUF_F32; i++) {
    uint32_t bits = float_to_bits(values[i]);
    for (int b = 0; b < 4; b++) to[4 * i + b] = (uint8_t)(bits >> 8 * b);
  }
  return 0;
}

/* One row of the tensor, or a vector's entry. `values` is memory for a row. */
static int put_row(const struct gguf *g, const struct export_tensor *tensor, enum gguf_type type, int64_t row, int64_t columns,
                   float *values, uint8_t *to, struct error *error) {
  int64_t source = source_of(g, tensor, row);
  if (tensor->linear && type != GGUF_F16) return put_blocks(g, tensor->linear, source, to, error);
  if (tensor->linear)
    dequantize_row(tensor->linear, source, values);
  else if (export_values(tensor, source * columns, columns, values, error))
    return error->code;
  return put_values(tensor, values, type, columns, to, error);
}

/* In pieces of rows: an embedding is large. */
int export_gguf_write(void *state, const struct export_tensor *tensor, struct error *error) {
  enum { PIECE = 1 << 22 };
  struct gguf *g = state;
  struct place place = place_of(g, tensor);
  int64_t rows = tensor->shape[0], columns = tensor->dimensions == 2 ? tensor->shape[1] : 1;
  int64_t row_bytes = gguf_row_bytes(place.type, columns), most = row_bytes < PIECE ? PIECE / row_bytes : 1;
  float *values = malloc((size_t)columns * sizeof *values);
  uint8_t *bytes = malloc((size_t)(most * row_bytes));
  if (!values || !bytes) error_set(error, ERROR_WORK, "%s: out of memory", tensor->name);
  for (int64_t first = 0; first < rows && !error->code; first += most) {
    int64_t left = rows - first, count = left < most ? left : most;
    for (int64_t i = 0; i < count && !error->code; i++)
      put_row(g, tensor, place.type, first + i, columns, values, bytes + i * row_bytes, error);
    if (!error->code) gguf_writer_write(g->writer, place.name, place.offset + first * row_bytes, bytes, (size_t)(count * row_bytes), error);
  }
  free(values);
  free(bytes);
  return error->code;
}

/* ---- keys ---- */

static void key_name(const struct gguf *g, const char *key, char name[96]) {
  snprintf(name, 96, "%s.%s", g->architecture->name, key);
}

static void set_u32(const struct gguf *g, const char *key, int64_t value) {
  char name[96];
  key_name(g, key, name);
  gguf_u32(g->writer, name, (uint32_t)value);
}

static void set_f32(const struct gguf *g, const char *key, double value) {
  char name[96];
  key_name(g, key, name);
  gguf_f32(g->writer, name, (float)value);
}

static void set_text(const struct gguf *g, const char *key, const char *value) {
  char name[96];
  key_name(g, key, name);
  gguf_text(g->writer, name, value);
}

/* llama.cpp attends to all of the context here: one within the window is the same. */
static int64_t context_length(const struct gguf *g) {
  json_t *config = json_loads(g->job->config, 0, NULL);
  json_int_t length = json_integer_value(json_object_get(config, "max_position_embeddings"));
  json_decref(config);
  if (length < 1) length = g->architecture->positions;
  int window = g->job->model->window;
  return window > 0 && window < length ? window : length;
}

static void set_sizes(const struct gguf *g) {
  const struct model *model = g->job->model;
  set_u32(g, "vocab_size", model->vocabulary);
  set_u32(g, "context_length", context_length(g));
  set_u32(g, "embedding_length", model->hidden);
  set_u32(g, "block_count", model->blocks);
  set_u32(g, "feed_forward_length", model->ffn);
  set_u32(g, "attention.head_count", model->heads);
  set_u32(g, "attention.head_count_kv", model->kv_heads);
  set_u32(g, "attention.key_length", model->head_size);
  set_u32(g, "attention.value_length", model->head_size);
  set_u32(g, "rope.dimension_count", model->head_size);
  set_f32(g, "rope.freq_base", model->rope.theta);
  set_f32(g, model->layer_norm ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", (double)model->norm_eps);
  if (model->experts) {
    set_u32(g, "expert_count", model->experts);
    set_u32(g, "expert_used_count", model->experts_per_token);
  }
  if (model->rope.scaling == ROPE_LINEAR) {
    set_text(g, "rope.scaling.type", "linear");
    set_f32(g, "rope.scaling.factor", model->rope.factor);
  }
  if (model->layer_norm) set_text(g, "tensor_data_layout", "jploski"); /* q, k and v one after the other */
}

static void set_keys(const struct gguf *g) {
  const struct export_scheme *scheme = &g->job->scheme;
  gguf_text(g->writer, "general.architecture", g->architecture->name);
  gguf_text(g->writer, "general.type", "model");
  gguf_text(g->writer, "general.name", g->job->name);
  gguf_text(g->writer, "general.description", export_scheme_text(scheme).text);
  gguf_text(g->writer, "general.quantized_by", "omniquant " OMNIQUANT_VERSION);
  gguf_u32(g->writer, "general.file_type", (uint32_t)(g->holder ? g->holder->file_type : FILE_TYPE_F16));
  gguf_u32(g->writer, "general.quantization_version", 2);
  set_sizes(g);
}

/* LLaMA 3's rotation is told by what each pair's frequency is divided by: the ratio of plain frequencies to the model's. */
static int64_t rope_factors(const struct model *model) {
  return model->rope.scaling == ROPE_LLAMA3 ? model->head_size / 2 : 0;
}

static int write_rope_factors(const struct gguf *g, struct error *error) {
  const struct model *model = g->job->model;
  struct model plain = *model;
  plain.rope.scaling = ROPE_PLAIN;
  for (int64_t i = 0; i < rope_factors(model) && !error->code; i++) {
    float factor = model_rope_frequency(&plain, (int)i) / model_rope_frequency(model, (int)i);
    gguf_writer_write(g->writer, "rope_freqs.weight", i * 4, &factor, sizeof factor, error);
  }
  return error->code;
}

/* ---- the whole ---- */

int export_gguf_open(const struct export_job *job, void **state, struct error *error) {
  struct gguf *g = *state = calloc(1, sizeof *g);
  if (g) g->writer = gguf_writer_open();
  if (!g || !g->writer) return error_set(error, ERROR_WORK, "out of memory for the export");
  g->job = job;
  if (check_model(g, error) || check_scheme(g, error)) return error->code;
  set_keys(g);
  if (gguf_tokenizer(g->writer, job->model_folder, job->model->vocabulary, job->pretokenizer, error)) return error->code;
  int64_t factors = rope_factors(job->model);
  return factors ? gguf_writer_announce(g->writer, "rope_freqs.weight", GGUF_F32, 1, &factors, error) : 0;
}

int export_gguf_begin(void *state, const struct export_folder *folder, struct error *error) {
  const struct gguf *g = state;
  return gguf_writer_begin(g->writer, folder, "model.gguf", error) ? error->code : write_rope_factors(g, error);
}

int export_gguf_finish(void *state, struct error *error) {
  const struct gguf *g = state;
  return gguf_writer_finish(g->writer, error);
}

void export_gguf_close(void *state) {
  struct gguf *g = state;
  if (!g) return;
  gguf_writer_close(g->writer);
  free(g);
}
