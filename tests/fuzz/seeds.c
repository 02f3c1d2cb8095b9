/* seeds.c FOLDER: writes FOLDER/NAME/ with valid inputs of each harness to start from: tiny models of every family, recipes, token files
 * and stores of every layout that is written. Made anew each time, so that they follow the formats. */
#include <hdf5.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"
#include "model.h"
#include "recipe.h"
#include "store.h"

/* A growing input. */
struct bytes {
  unsigned char *at;
  size_t size;
};

static void add(struct bytes *bytes, const void *from, size_t size) {
  bytes->at = realloc(bytes->at, bytes->size + size + 1);
  fuzz_expect(bytes->at != NULL, "memory for a seed");
  memcpy(bytes->at + bytes->size, from, size);
  bytes->size += size;
}

static void add_number(struct bytes *bytes, uint64_t number, int width) {
  for (int i = 0; i < width; i++) add(bytes, &(unsigned char){(unsigned char)(number >> 8 * i)}, 1);
}

/* A part as fuzz_take takes it. */
static void add_part(struct bytes *bytes, const void *from, size_t size) {
  add_number(bytes, size, 4);
  add(bytes, from, size);
}

__attribute__((format(printf, 2, 3))) static void add_text(struct bytes *bytes, const char *format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fuzz_expect(length >= 0 && length < (int)sizeof text, "a text fits");
  add(bytes, text, (size_t)length);
}

static const char *top;

/* Writes TOP/HARNESS/NAME and empties the bytes. */
static void keep(struct bytes *bytes, const char *harness, const char *name) {
  char path[1000];
  snprintf(path, sizeof path, "%s/%s", top, harness);
  mkdir(path, 0777);
  snprintf(path, sizeof path, "%s/%s/%s", top, harness, name);
  FILE *file = fopen(path, "wb");
  fuzz_expect(file && fwrite(bytes->at, 1, bytes->size, file) == bytes->size && fclose(file) == 0, "room for seeds");
  free(bytes->at);
  *bytes = (struct bytes){0};
}

static struct bytes read_file(const char *path) {
  struct bytes bytes = {0};
  char piece[4096];
  FILE *file = fopen(path, "rb");
  fuzz_expect(file != NULL, "a file that was written");
  for (size_t length; (length = fread(piece, 1, sizeof piece, file)) > 0;) add(&bytes, piece, length);
  fclose(file);
  return bytes;
}

/* ---- models ---- */

static const char *const configs[] = {
    "\"model_type\":\"llama\",\"num_key_value_heads\":1,\"rms_norm_eps\":1e-5,\"rope_parameters\":{\"rope_theta\":1e4,\"rope_type\":"
    "\"default\"}",
    "\"model_type\":\"llama\",\"attention_bias\":true,\"mlp_bias\":true,\"rope_theta\":5e5,\"rope_scaling\":{\"rope_type\":\"llama3\","
    "\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":64}",
    "\"model_type\":\"mistral\",\"sliding_window\":4,\"hidden_act\":\"silu\",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2.0}",
    "\"model_type\":\"qwen2\",\"tie_word_embeddings\":true,\"use_sliding_window\":false",
    "\"model_type\":\"qwen3\",\"head_dim\":4,\"partial_rotary_factor\":1",
    "\"model_type\":\"opt\",\"ffn_dim\":4,\"word_embed_proj_dim\":2,\"max_position_embeddings\":3,\"activation_function\":\"relu\","
    "\"do_layer_norm_before\":true,\"enable_bias\":true",
    "\"model_type\":\"falcon\",\"multi_query\":true,\"parallel_attn\":true,\"alibi\":false,\"bias\":false,\"activation\":\"gelu\"",
    "\"model_type\":\"falcon\",\"new_decoder_architecture\":true,\"num_kv_heads\":1,\"layer_norm_epsilon\":1e-6",
    "\"model_type\":\"mixtral\",\"num_local_experts\":2,\"num_experts_per_tok\":1,\"sliding_window\":null",
};
enum { CONFIGS = sizeof configs / sizeof *configs };

static void config_text(int i, char text[1000]) {
  snprintf(text, 1000, "{\"num_hidden_layers\":1,\"hidden_size\":4,\"intermediate_size\":4,\"num_attention_heads\":2,\"vocab_size\":3,%s}",
           configs[i]);
}

/* A header and its data, as tensors are added. */
struct writer {
  struct bytes header, data;
};

static void add_tensor(struct writer *writer, const char *prefix, const char *name, int dimensions, int64_t rows, int64_t columns) {
  size_t begin = writer->data.size;
  char key[200], shape[60];
  snprintf(key, sizeof key, "\"%s%s\"", prefix, name);
  add(&writer->header, "", 1);
  writer->header.size--;
  if (memmem(writer->header.at, writer->header.size, key, strlen(key))) return; /* q, k and v may be one */
  if (dimensions == 2)
    snprintf(shape, sizeof shape, "%lld,%lld", (long long)rows, (long long)columns);
  else
    snprintf(shape, sizeof shape, "%lld", (long long)columns);
  for (int64_t i = 0; i < rows * columns; i++) add_number(&writer->data, 0x3c00u + (uint64_t)i, 2);
  add_text(&writer->header, "%c%s:{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", begin ? ',' : '{', key, shape, begin,
           writer->data.size);
}

static struct bytes finish(struct writer *writer) {
  struct bytes file = {0};
  add_text(&writer->header, "}");
  add_number(&file, writer->header.size, 8);
  add(&file, writer->header.at, writer->header.size);
  add(&file, writer->data.at, writer->data.size);
  free(writer->header.at);
  free(writer->data.at);
  return file;
}

static struct bytes model_file(const char *config) {
  static struct model model;
  struct error error = {0};
  struct writer writer = {0};
  fuzz_expect(model_parse(&model, config, "seed", &error) == 0, error.message);
  const struct model_names *names = model_names(&model);
  char prefix[64];
  int64_t H = model.hidden, E = model.embedding;
  add_tensor(&writer, "", names->embedding, 2, model.vocabulary, E);
  for (int block = 0; block < model.blocks; block++)
    for (int i = 0; i < model.tensors; i++) {
      const struct block_tensor *tensor = &model.tensor[i];
      bool matrix = tensor->dimensions == 2;
      snprintf(prefix, sizeof prefix, names->block_prefix, block);
      add_tensor(&writer, prefix, tensor->name, tensor->dimensions, matrix ? tensor->source.total : 1,
                 matrix ? tensor->columns : tensor->source.total);
    }
  add_tensor(&writer, "", names->final_norm, 1, 1, H);
  if (names->final_norm_bias) add_tensor(&writer, "", names->final_norm_bias, 1, 1, H);
  if (names->positions) add_tensor(&writer, "", names->positions, 2, 2 + model.positions, H);
  if (E != H) add_tensor(&writer, "", names->project_in, 2, H, E);
  if (E != H) add_tensor(&writer, "", names->project_out, 2, E, H);
  if (!model.tied_embeddings) add_tensor(&writer, "", names->head, 2, model.vocabulary, E);
  return finish(&writer);
}

static void make_models(void) {
  for (int i = 0; i < CONFIGS; i++) {
    char text[1000], name[40];
    struct bytes input = {0};
    config_text(i, text);
    snprintf(name, sizeof name, "model-%d", i);
    add(&input, text, strlen(text));
    keep(&input, "config", name);
    struct bytes file = model_file(text);
    add_number(&input, 2, 1);
    add_part(&input, text, strlen(text));
    add(&input, file.at, file.size);
    free(file.at);
    keep(&input, "safetensors", name);
  }
}

static void make_shards(void) {
  static const char index[] = "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"a.safetensors\",\"b\":\"b.safetensors\"}}";
  static const char *const outside[] = {"../b.safetensors", "/dev/zero", "b.safetensors\\u0000x", "..", "sub/b.safetensors"};
  struct writer writer = {0};
  struct bytes input = {0};
  add_tensor(&writer, "", "a", 2, 2, 3);
  struct bytes a = finish(&writer);
  add_number(&input, 0, 1);
  add(&input, a.at, a.size);
  keep(&input, "safetensors", "file");
  writer = (struct writer){0};
  add_tensor(&writer, "", "b", 1, 1, 3);
  struct bytes b = finish(&writer);
  for (size_t i = 0; i <= sizeof outside / sizeof *outside; i++) {
    char text[400], name[40];
    if (i == 0)
      snprintf(text, sizeof text, "%s", index);
    else
      snprintf(text, sizeof text, "{\"weight_map\":{\"a\":\"a.safetensors\",\"b\":\"%s\"}}", outside[i - 1]);
    add_number(&input, 1, 1);
    add_part(&input, text, strlen(text));
    add_part(&input, a.at, a.size);
    add(&input, b.at, b.size);
    snprintf(name, sizeof name, "index-%zu", i);
    keep(&input, "safetensors", name);
  }
  free(a.at);
  free(b.at);
}

/* ---- recipes ---- */

static void make_recipes(void) {
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  struct recipe recipe;
  struct bytes input = {0};
  recipe_init(&recipe);
  char *json = recipe_json(&recipe);
  fuzz_expect(json != NULL, "memory for a recipe");
  add_number(&input, 1, 1);
  add(&input, json, strlen(json));
  keep(&input, "recipe", "json");
  free(json);
  add_text(&input, "0# every setting\n");
  for (size_t i = 0; i < count; i++) add_text(&input, "%s: %s\n", settings[i].name, settings[i].fallback);
  keep(&input, "recipe", "yaml");
  add_text(&input, "0%%YAML 1.1\n---\n? \"wbits\"\n: !!int '3'\ngroup_size: &a 64 # columns\nlwc: |-\n  true\n...\n");
  keep(&input, "recipe", "yaml-rare");
  add_text(&input, "0{wbits: 3, \"let\": true, lwc_lr: 1.5e-3}\n");
  keep(&input, "recipe", "yaml-flow");
}

/* ---- tokens ---- */

static void make_tokens(const char *name, hid_t type, hsize_t count, hsize_t chunk, bool checksum) {
  char path[1000];
  int64_t *ids = calloc(count + 1, sizeof *ids);
  fuzz_expect(ids != NULL, "memory for tokens");
  for (hsize_t i = 0; i < count; i++) ids[i] = (int64_t)(i * 7919 % 100);
  snprintf(path, sizeof path, "%s/tokens.h5", fuzz_folder());
  hid_t access = H5Pcreate(H5P_FILE_ACCESS), creation = H5Pcreate(H5P_DATASET_CREATE), space = H5Screate_simple(1, &count, NULL);
  H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
  if (chunk) H5Pset_chunk(creation, 1, &chunk);
  if (checksum) H5Pset_fletcher32(creation);
  hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access);
  hid_t set = H5Dcreate2(file, "tokens", type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  hid_t text = H5Tcopy(H5T_C_S1), scalar = H5Screate(H5S_SCALAR), attribute;
  H5Tset_size(text, 10);
  attribute = H5Acreate2(set, "tool", text, scalar, H5P_DEFAULT, H5P_DEFAULT);
  fuzz_expect(H5Dwrite(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, ids) >= 0 && H5Awrite(attribute, text, "omniquant") >= 0,
              "tokens are written");
  H5Aclose(attribute);
  H5Sclose(scalar);
  H5Tclose(text);
  H5Dclose(set);
  H5Sclose(space);
  H5Pclose(creation);
  H5Pclose(access);
  fuzz_expect(H5Fclose(file) >= 0, "tokens are written");
  free(ids);
  struct bytes input = read_file(path);
  keep(&input, "tokens", name);
}

/* ---- stores ---- */

static struct quantized_linear make_linear(const char *name, int64_t out, int64_t in, int bits, int64_t group) {
  struct quantized_linear linear = {.out_features = out, .in_features = in, .bits = bits, .group_size = group};
  int64_t groups = out * ((in + group - 1) / group);
  snprintf(linear.name, sizeof linear.name, "%s", name);
  linear.codes = calloc((size_t)(out * packed_row_bytes(in, bits)), 1);
  linear.scale = calloc((size_t)groups, 2);
  linear.zero_point = calloc((size_t)groups, 1);
  fuzz_expect(linear.codes && linear.scale && linear.zero_point, "memory for a store");
  for (int64_t i = 0; i < groups; i++) linear.scale[i] = (uint16_t)(0x3000 + i % 0x400);
  return linear;
}

static struct named_array make_array(const char *format, int i, int64_t entries) {
  struct named_array array = {.dimensions = 1, .shape = {entries, 1}};
  snprintf(array.name, sizeof array.name, format, i); /* NOLINT: a format of this file */
  array.values = calloc((size_t)entries + 1, sizeof *array.values);
  fuzz_expect(array.values != NULL, "memory for a store");
  return array;
}

/* `linears` of the first model's, then `folded` and `calibration` small arrays. */
static struct block_record make_record(int linears, int folded, int calibration, int64_t size) {
  static const char *const names[] = {"mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj"};
  struct block_record record = {
      .kept = "end", .world_size = 1, .linears = linears, .folded_arrays = folded, .calibration_arrays = calibration};
  record.linear = calloc((size_t)linears + 1, sizeof *record.linear);
  record.folded = calloc((size_t)folded + 1, sizeof *record.folded);
  record.calibration = calloc((size_t)calibration + 1, sizeof *record.calibration);
  fuzz_expect(record.linear && record.folded && record.calibration, "memory for a store");
  for (int i = 0; i < linears; i++) record.linear[i] = make_linear(names[i], size, size, 3, 2);
  for (int i = 0; i < folded; i++) record.folded[i] = make_array("norm.%d", i, i ? 0 : 4);
  for (int i = 0; i < calibration; i++) record.calibration[i] = make_array("self_attn.q_proj/gamma%d", i, 0);
  return record;
}

/* A block of the model that the stores are of: what is read is put into its image. */
static struct block_record make_whole(void) {
  static const struct {
    const char *name;
    int64_t out;
  } parts[] = {{"mlp.down_proj", 4},    {"mlp.gate_proj", 4},    {"mlp.up_proj", 4},     {"self_attn.k_proj", 2},
               {"self_attn.o_proj", 4}, {"self_attn.q_proj", 4}, {"self_attn.v_proj", 2}};
  enum { PARTS = sizeof parts / sizeof *parts };
  struct block_record record = make_record(0, 1, 0, 4);
  free(record.linear);
  record.linear = calloc(PARTS, sizeof *record.linear);
  fuzz_expect(record.linear != NULL, "memory for a store");
  record.linears = PARTS;
  for (int i = 0; i < PARTS; i++) record.linear[i] = make_linear(parts[i].name, parts[i].out, 4, 3, 2);
  snprintf(record.folded[0].name, sizeof record.folded[0].name, "input_layernorm.weight");
  record.timing = make_array("timing", 0, 2);
  record.timing.dimensions = 2;
  record.timing.shape[0] = 1;
  record.timing.shape[1] = 2;
  snprintf(record.phases, sizeof record.phases, "wait,steps");
  return record;
}

static void make_store(const char *name, struct block_record record, size_t spaces) {
  char config[1000], path[1000], *text = malloc(spaces + 1000), *recipe;
  struct recipe defaults;
  struct error error = {0};
  struct store *store = NULL;
  struct block_image image = {0};
  recipe_init(&defaults);
  recipe = recipe_json(&defaults);
  config_text(0, config);
  fuzz_expect(text && recipe, "memory for a store");
  snprintf(text, spaces + 1000, "%*s%s", (int)spaces, "", config);
  struct store_info info = {.model_type = "llama", .recipe = recipe, .model_config = text, .blocks = 1};
  snprintf(path, sizeof path, "%s/%s", fuzz_folder(), name);
  int code = store_create(path, &info, &store, &error);
  if (!code) code = block_image_make(&image, &record, &info, name, &error);
  if (!code) code = store_write_block(store, &image, &error);
  fuzz_expect(!code, error.message);
  block_image_free(&image);
  block_record_free(&record);
  store_close(store, &error);
  free(recipe);
  free(text);
  struct bytes input = {0}, file;
  for (int part = 0; part < 2; part++) {
    snprintf(path, sizeof path, "%s/%s/%s", fuzz_folder(), name, part ? "blocks/0000.h5" : "omniquant.h5");
    file = read_file(path);
    if (part == 0) add_number(&input, file.size, 4);
    add(&input, file.at, file.size);
    free(file.at);
  }
  keep(&input, "store", name);
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "%s FOLDER\n", argv[0]);
    return 2;
  }
  top = argv[1];
  mkdir(top, 0777);
  make_models();
  make_shards();
  make_recipes();
  make_tokens("contiguous", H5T_STD_U32LE, 20, 0, false);
  make_tokens("one-chunk", H5T_STD_U32LE, 20, 20, true);
  make_tokens("chunks", H5T_STD_I64BE, 20, 7, true);
  make_tokens("chunks-unchecked", H5T_STD_U16LE, 20, 7, false);
  make_tokens("pages", H5T_STD_U8LE, 1100, 1, false);
  make_tokens("none", H5T_STD_U32LE, 0, 0, false);
  make_store("small", make_record(1, 1, 1, 4), 0);       /* all in object headers */
  make_store("links", make_record(5, 6, 2, 2), 0);       /* links in a heap, by a tree of one leaf */
  make_store("many-links", make_record(0, 50, 0, 4), 0); /* by a tree of two levels */
  make_store("whole", make_whole(), 0);
  make_store("long-text", make_record(1, 0, 0, 4), 5000); /* attributes in a heap, one of them huge */
  return 0;
}
