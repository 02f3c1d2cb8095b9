/* helper.c: what the shell tests and benchmarks need beside the program: token files, random models of any size, comparing two stores,
 * what is expected of the models of the fixtures, and damage to safetensors files. */
#include <endian.h>
#include <hdf5.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "dtype.h"
#include "safetensors.h"
#include "same_store.h"
#include "store.h"

/* ---- common ---- */

static int say(const char *what, const char *which) {
  fprintf(stderr, "test_helper: %s: %s\n", what, which);
  return 1;
}

/* splitmix64: the same numbers everywhere */
static uint64_t next_random(uint64_t *state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

/* In [-1, 1). */
static float next_uniform(uint64_t *state) {
  return (float)(next_random(state) >> 40) * 0x1p-23f - 1;
}

/* ---- tokens ---- */

static int write_tokens(const char *path, const uint32_t *ids, hsize_t count) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS), space = H5Screate_simple(1, &count, NULL);
  H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110); /* the layout that is read */
  hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access);
  hid_t dataset = H5Dcreate2(file, "tokens", H5T_STD_U32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  bool failed = H5Dwrite(dataset, H5T_NATIVE_UINT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, ids) < 0;
  H5Dclose(dataset);
  H5Sclose(space);
  H5Pclose(access);
  failed = H5Fclose(file) < 0 || failed;
  return failed ? say("cannot be written", path) : 0;
}

static int run_tokens(char **arguments) {
  const char *path = arguments[0];
  hsize_t count = strtoull(arguments[1], NULL, 10);
  uint64_t vocabulary = strtoull(arguments[2], NULL, 10), state = strtoull(arguments[3], NULL, 10);
  uint32_t *ids = calloc(count + 1, sizeof *ids);
  if (!ids || !vocabulary) return say("no tokens can be made", path);
  for (hsize_t i = 0; i < count; i++) ids[i] = (uint32_t)(next_random(&state) % vocabulary);
  int failed = write_tokens(path, ids, count);
  free(ids);
  return failed;
}

/* Writes the token ids of an expected.safetensors and prints the perplexity that is expected of them, each sample a window. */
static int run_expected(char **arguments) {
  struct error error = {0};
  struct safetensors *file;
  double nll = 0;
  if (safetensors_open_file(arguments[1], &file, &error)) return say(error.message, "");
  const struct tensor *ids = safetensors_find(file, "input_ids"), *losses = safetensors_find(file, "nll");
  if (!ids || !losses) return say("has no input_ids or nll", arguments[1]);
  for (int64_t i = 0; i < losses->shape[0] && !error.code; i++) {
    float value = 0;
    safetensors_read(losses, (size_t)i * sizeof value, sizeof value, &value, &error);
    nll += value;
  }
  printf("%.9g\n", exp(nll / (double)losses->shape[0]));
  uint32_t *tokens = malloc(ids->bytes + 1);
  int failed = !tokens || error.code || safetensors_read(ids, 0, ids->bytes, tokens, &error)
                   ? say("cannot be read", arguments[1])
                   : write_tokens(arguments[0], tokens, ids->bytes / sizeof(uint32_t));
  free(tokens);
  safetensors_close(file);
  return failed;
}

/* ---- compare ---- */

static int run_compare(char **arguments) {
  return same_store(arguments[0], arguments[1]) ? 0 : 1;
}

/* ---- model ---- */

/* One tensor after the other is named in the header and then, in a second walk, written. */
struct maker {
  int blocks, hidden, heads, kv_heads, ffn, vocabulary;
  enum dtype dtype;
  uint64_t state;
  FILE *header, *file; /* of this walk, the other is NULL */
  size_t offset;
};

static void make_tensor(struct maker *maker, const char *name, int rows, int columns) {
  size_t count = (size_t)columns * (size_t)(rows ? rows : 1), end = maker->offset + count * dtype_size(maker->dtype);
  char shape[32];
  if (rows)
    snprintf(shape, sizeof shape, "%d,%d", rows, columns);
  else
    snprintf(shape, sizeof shape, "%d", columns);
  if (maker->header)
    fprintf(maker->header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", maker->offset ? "," : "", name,
            dtype_name(maker->dtype), shape, maker->offset, end);
  maker->offset = end;
  /* Weights that keep the size of hidden states; norms (no rows) near one. */
  float spread = rows ? sqrtf(3 / (float)columns) : 0.25f, middle = rows ? 0 : 1;
  for (size_t i = 0; maker->file && i < count; i++) {
    float value = middle + spread * next_uniform(&maker->state);
    uint16_t bits = maker->dtype == DTYPE_F16 ? half_from_float(value) : (uint16_t)(float_to_bits(value) >> 16);
    if (maker->dtype == DTYPE_F32)
      fwrite(&value, sizeof value, 1, maker->file);
    else
      fwrite(&bits, sizeof bits, 1, maker->file);
  }
}

static void make_tensors(struct maker *maker) {
  int H = maker->hidden, K = H / maker->heads * maker->kv_heads;
  const struct {
    const char *name;
    int rows, columns;
  } part[] = {{"input_layernorm", 0, H},        {"self_attn.q_proj", H, H},     {"self_attn.k_proj", K, H},
              {"self_attn.v_proj", K, H},       {"self_attn.o_proj", H, H},     {"post_attention_layernorm", 0, H},
              {"mlp.gate_proj", maker->ffn, H}, {"mlp.up_proj", maker->ffn, H}, {"mlp.down_proj", H, maker->ffn}};
  maker->offset = 0;
  make_tensor(maker, "model.embed_tokens.weight", maker->vocabulary, H);
  for (int block = 0; block < maker->blocks; block++)
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
      char name[96];
      snprintf(name, sizeof name, "model.layers.%d.%s.weight", block, part[i].name);
      make_tensor(maker, name, part[i].rows, part[i].columns);
    }
  make_tensor(maker, "model.norm.weight", 0, H);
  make_tensor(maker, "lm_head.weight", maker->vocabulary, H);
}

static int write_config(const struct maker *maker, const char *path) {
  json_t *config = json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:f, s:f, s:b}", "model_type", "llama", "num_hidden_layers",
                             maker->blocks, "hidden_size", maker->hidden, "num_attention_heads", maker->heads, "num_key_value_heads",
                             maker->kv_heads, "intermediate_size", maker->ffn, "vocab_size", maker->vocabulary, "hidden_act", "silu",
                             "rms_norm_eps", 1e-5, "rope_theta", 1e4, "tie_word_embeddings", 0);
  int failed = json_dump_file(config, path, JSON_INDENT(2));
  json_decref(config);
  return failed ? say("cannot be written", path) : 0;
}

static bool write_header(FILE *file, const char *text) {
  uint64_t length = htole64(strlen(text));
  return fwrite(&length, sizeof length, 1, file) == 1 && fputs(text, file) >= 0;
}

static int write_weights(struct maker *maker, const char *path) {
  char *header = NULL;
  size_t length;
  maker->header = open_memstream(&header, &length);
  maker->file = NULL;
  fputc('{', maker->header);
  make_tensors(maker);
  fputc('}', maker->header);
  fclose(maker->header);
  maker->header = NULL;
  maker->file = fopen(path, "wb");
  bool failed = !maker->file || !write_header(maker->file, header);
  if (!failed) make_tensors(maker);
  failed = failed || ferror(maker->file);
  if (maker->file && fclose(maker->file)) failed = true;
  free(header);
  return failed ? say("cannot be written", path) : 0;
}

static int run_model(char **arguments) {
  struct maker maker = {.blocks = atoi(arguments[1]),
                        .hidden = atoi(arguments[2]),
                        .heads = atoi(arguments[3]),
                        .kv_heads = atoi(arguments[4]),
                        .ffn = atoi(arguments[5]),
                        .vocabulary = atoi(arguments[6]),
                        .dtype = DTYPE_F32,
                        .state = arguments[8] ? strtoull(arguments[8], NULL, 10) : 0};
  char path[4096];
  while (maker.dtype < DTYPE_OTHER && strcmp(arguments[7], dtype_name(maker.dtype)) != 0) maker.dtype++;
  if (maker.dtype == DTYPE_OTHER) return say("is not one of F32, F16, BF16", arguments[7]);
  if (maker.blocks < 1 || maker.heads < 1 || maker.kv_heads < 1 || maker.hidden < maker.heads || maker.ffn < 1 || maker.vocabulary < 1)
    return say("a size is not positive", arguments[0]);
  mkdir(arguments[0], 0777);
  snprintf(path, sizeof path, "%s/config.json", arguments[0]);
  if (write_config(&maker, path)) return 1;
  snprintf(path, sizeof path, "%s/model.safetensors", arguments[0]);
  return write_weights(&maker, path);
}

/* ---- damage ---- */

/* A safetensors file that is small enough to hold. */
struct image {
  char *header;
  char *data;
  size_t data_bytes;
};

static void image_free(struct image *image) {
  free(image->header);
  free(image->data);
}

static int image_read(const char *path, struct image *image) {
  struct stat status;
  uint64_t length;
  FILE *file = fopen(path, "rb");
  *image = (struct image){0};
  if (!file) return say("cannot be read", path);
  bool good = fstat(fileno(file), &status) == 0 && fread(&length, sizeof length, 1, file) == 1 &&
              le64toh(length) <= (uint64_t)status.st_size - sizeof length;
  if (good) {
    length = le64toh(length);
    image->data_bytes = (size_t)status.st_size - sizeof length - length;
    image->header = calloc(length + 1, 1);
    image->data = malloc(image->data_bytes + 1);
    good = image->header && image->data && fread(image->header, 1, length, file) == length &&
           fread(image->data, 1, image->data_bytes, file) == image->data_bytes;
  }
  fclose(file);
  if (good) return 0;
  image_free(image);
  return say("is not a safetensors file", path);
}

static int image_write(const char *path, const struct image *image) {
  FILE *file = fopen(path, "wb");
  bool failed = !file || !write_header(file, image->header) || fwrite(image->data, 1, image->data_bytes, file) != image->data_bytes;
  if (file && fclose(file)) failed = true;
  return failed ? say("cannot be written", path) : 0;
}

/* Prints the header, or puts another in its place. */
static int run_header(char **arguments) {
  struct image image;
  int failed = image_read(arguments[0], &image);
  if (failed) return failed;
  if (arguments[1]) {
    free(image.header);
    image.header = strdup(arguments[1]);
    failed = !image.header || image_write(arguments[0], &image);
  } else {
    puts(image.header);
  }
  image_free(&image);
  return failed;
}

/* Sets a tensor's last value to the number whose bits are all ones, which is NaN in every type. */
static int run_nan(char **arguments) {
  struct image image;
  json_int_t begin = 0, end = 0;
  if (image_read(arguments[0], &image)) return 1;
  json_t *header = json_loads(image.header, 0, NULL);
  const char *dtype = "";
  int failed = json_unpack(header, "{s:{s:s, s:[I, I]}}", arguments[1], "dtype", &dtype, "data_offsets", &begin, &end) ||
               end > (json_int_t)image.data_bytes;
  size_t size = strcmp(dtype, "F32") == 0 ? 4 : 2;
  if (failed || (json_int_t)size > end - begin)
    failed = say("there is no such tensor", arguments[1]);
  else {
    memset(image.data + end - size, 0xff, size);
    failed = image_write(arguments[0], &image);
  }
  json_decref(header);
  image_free(&image);
  return failed;
}

/* ---- main ---- */

static const struct subcommand {
  const char *name, *usage;
  int least, most; /* arguments */
  int (*run)(char **arguments);
} subcommands[] = {
    {"tokens", "FILE COUNT VOCABULARY SEED", 4, 4, run_tokens},
    {"expected", "TOKENS.h5 EXPECTED.safetensors", 2, 2, run_expected},
    {"compare", "STORE_A STORE_B", 2, 2, run_compare},
    {"model", "DIR BLOCKS HIDDEN HEADS KV_HEADS FFN VOCABULARY F32|F16|BF16 [SEED]", 8, 9, run_model},
    {"header", "FILE.safetensors [JSON]", 1, 2, run_header},
    {"nan", "FILE.safetensors TENSOR", 2, 2, run_nan},
};

int main(int argc, char **argv) {
  for (size_t i = 0; i < sizeof subcommands / sizeof *subcommands; i++) {
    const struct subcommand *command = &subcommands[i];
    if (argc >= 2 && strcmp(argv[1], command->name) == 0 && argc - 2 >= command->least && argc - 2 <= command->most)
      return command->run(argv + 2);
  }
  for (size_t i = 0; i < sizeof subcommands / sizeof *subcommands; i++)
    fprintf(stderr, "test_helper %s %s\n", subcommands[i].name, subcommands[i].usage);
  return 2;
}
