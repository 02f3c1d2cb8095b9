/* checkpoint.c: from safetensors to block images. */
#include "checkpoint.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "file.h"
#include "safetensors.h"
#include "sha256.h"

enum { FIRST_POSITION = 2 }; /* row of the table of learned positions that a sample begins with; those before are for padding */

struct checkpoint {
  struct safetensors *tensors;
  struct model model;
  char *config;
  size_t bare;               /* bytes that names lack at their beginning where a model was saved without its head: "model." */
  double test_delay_seconds; /* OMNIQUANT_TEST_READ_SECONDS: what reading a block is made to take longer, to measure overlap */
};

/* config.json as it stands. */
static char *read_text(const char *path, struct error *error) {
  enum { LARGEST = 1 << 24 };
  struct input_file file;
  bool missing = false;
  char *text = NULL;
  if (input_open(&file, path, &missing, error)) {
    if (missing)
      error_set(error, ERROR_INPUT, "%s: No such file or directory; --model needs a folder with config.json and safetensors", path);
    return NULL;
  }
  bool fits = file.bytes <= LARGEST;
  if (fits && !(text = calloc(file.bytes + 1, 1))) error_set(error, ERROR_WORK, "out of memory reading %s", path);
  if (text) input_read(&file, 0, file.bytes, text, error);
  if (!fits || (text && !error->code && memchr(text, 0, file.bytes))) error_set(error, ERROR_INPUT, "%s: not a JSON text", path);
  input_close(&file);
  if (!error->code) return text;
  free(text);
  return NULL;
}

/* Where transformers saved a model without its head, names begin after the first point of the embedding's. */
static void find_bare_names(struct checkpoint *checkpoint) {
  const char *embedding = model_names(&checkpoint->model)->embedding, *bare = strchr(embedding, '.') + 1;
  if (!safetensors_find(checkpoint->tensors, embedding) && safetensors_find(checkpoint->tensors, bare))
    checkpoint->bare = (size_t)(bare - embedding);
}

static const struct tensor *find_tensor(const struct checkpoint *checkpoint, const char *name, int dimensions, int64_t rows,
                                        int64_t columns, struct error *error) {
  if (strncmp(name, model_names(&checkpoint->model)->embedding, checkpoint->bare) == 0) name += checkpoint->bare;
  const struct tensor *tensor = safetensors_find(checkpoint->tensors, name);
  if (!tensor) {
    error_set(error, ERROR_INPUT, "%s: tensor '%s' is missing; the checkpoint is not whole or not of model_type %s",
              safetensors_count(checkpoint->tensors) ? safetensors_at(checkpoint->tensors, 0)->path : "model.safetensors", name,
              checkpoint->model.model_type);
    return NULL;
  }
  if (tensor->dtype == DTYPE_OTHER) {
    error_set(error, ERROR_INPUT, "%s: tensor '%s': its type is not F32, F16 or BF16; convert the checkpoint to one of them", tensor->path,
              name);
    return NULL;
  }
  bool fits = tensor->dimensions == dimensions && tensor->shape[dimensions - 1] == columns && (dimensions == 1 || tensor->shape[0] == rows);
  if (!fits) {
    char wanted[48];
    if (dimensions == 1)
      snprintf(wanted, sizeof wanted, "[%lld]", (long long)columns);
    else
      snprintf(wanted, sizeof wanted, "[%lld, %lld]", (long long)rows, (long long)columns);
    error_set(error, ERROR_INPUT, "%s: tensor '%s': its shape is not %s, which config.json says; bring both anew from one model",
              tensor->path, name, wanted);
    return NULL;
  }
  return tensor;
}

/* A tensor of a block, or the one that it is a part of. */
static const struct tensor *find_block_tensor(const struct checkpoint *checkpoint, int block, int i, struct error *error) {
  const struct block_tensor *part = &checkpoint->model.tensor[i];
  bool matrix = part->dimensions == 2;
  char name[128];
  int length = snprintf(name, sizeof name, model_names(&checkpoint->model)->block_prefix, block);
  snprintf(name + length, sizeof name - (size_t)length, "%s", part->name);
  return find_tensor(checkpoint, name, part->dimensions, part->source.total, matrix ? part->columns : part->source.total, error);
}

/* ---- tensors outside the blocks; they are there, says checkpoint_open ---- */

enum outside { OUTSIDE_EMBEDDING, OUTSIDE_POSITIONS, OUTSIDE_IN, OUTSIDE_NORM, OUTSIDE_NORM_BIAS, OUTSIDE_OUT, OUTSIDE_HEAD, OUTSIDES };

struct outside_shape {
  const char *name;
  int64_t rows, columns;
  bool has;
};

static struct outside_shape outside_shape(const struct model *model, enum outside which) {
  const struct model_names *names = model_names(model);
  int64_t H = model->hidden, E = model->embedding, V = model->vocabulary;
  const struct outside_shape shapes[OUTSIDES] = {
      [OUTSIDE_EMBEDDING] = {names->embedding, V, E, true},
      [OUTSIDE_POSITIONS] = {names->positions, FIRST_POSITION + (int64_t)model->positions, H, model->positions > 0},
      [OUTSIDE_IN] = {names->project_in, H, E, E != H},
      [OUTSIDE_NORM] = {names->final_norm, 1, H, model->final_norm},
      [OUTSIDE_NORM_BIAS] = {names->final_norm_bias, 1, H, model->final_norm && model->layer_norm},
      [OUTSIDE_OUT] = {names->project_out, E, H, E != H},
      [OUTSIDE_HEAD] = {model->tied_embeddings ? names->embedding : names->head, V, E, true},
  };
  return shapes[which];
}

/* NULL, without an error, for what the model has not. */
static const struct tensor *find_outside(const struct checkpoint *checkpoint, enum outside which, struct error *error) {
  struct outside_shape shape = outside_shape(&checkpoint->model, which);
  bool vector = which == OUTSIDE_NORM || which == OUTSIDE_NORM_BIAS;
  return shape.has ? find_tensor(checkpoint, shape.name, vector ? 1 : 2, shape.rows, shape.columns, error) : NULL;
}

/* Checks all tensors and takes each one's type, F32 where blocks differ. */
static int check_tensors(struct checkpoint *checkpoint, struct error *error) {
  struct model *model = &checkpoint->model;
  for (int block = 0; block < model->blocks; block++)
    for (int i = 0; i < model->tensors; i++) {
      const struct tensor *tensor = find_block_tensor(checkpoint, block, i, error);
      if (!tensor) return error->code;
      if (block == 0)
        model->tensor[i].dtype = tensor->dtype;
      else if (model->tensor[i].dtype != tensor->dtype)
        model->tensor[i].dtype = DTYPE_F32;
    }
  model_layout(model);
  for (enum outside which = 0; which < OUTSIDES && !error->code; which++) find_outside(checkpoint, which, error);
  return error->code;
}

int checkpoint_open(const char *folder, struct model *model, struct checkpoint **checkpoint, struct error *error) {
  struct checkpoint *c = *checkpoint = calloc(1, sizeof *c);
  char path[4096];
  if (!c) return error_set(error, ERROR_WORK, "out of memory opening %s", folder);
  const char *delay = getenv("OMNIQUANT_TEST_READ_SECONDS");
  c->test_delay_seconds = delay ? atof(delay) : 0;
  snprintf(path, sizeof path, "%s/config.json", folder);
  c->config = read_text(path, error);
  if (!c->config || model_parse(&c->model, c->config, path, error)) goto fail;
  if (safetensors_open(folder, &c->tensors, error)) goto fail;
  find_bare_names(c);
  if (check_tensors(c, error)) goto fail;
  *model = c->model;
  return 0;
fail:
  checkpoint_close(c);
  *checkpoint = NULL;
  return error->code;
}

/* Takes every tensor of a block in the type that config.json names. */
static int take_config_dtype(struct model *model, const char *config, const char *path, struct error *error) {
  static const struct {
    const char *name;
    enum dtype dtype;
  } known[] = {{"float32", DTYPE_F32}, {"float16", DTYPE_F16}, {"bfloat16", DTYPE_BF16}};
  json_t *root = json_loads(config, 0, NULL);
  const json_t *value = json_object_get(root, "torch_dtype");
  if (!value) value = json_object_get(root, "dtype");
  const char *name = value ? json_string_value(value) : "float32";
  enum dtype dtype = DTYPE_OTHER;
  for (size_t i = 0; name && i < sizeof known / sizeof *known; i++)
    if (strcmp(name, known[i].name) == 0) dtype = known[i].dtype;
  json_decref(root);
  if (dtype == DTYPE_OTHER) return error_set(error, ERROR_INPUT, "%s: torch_dtype: not one of float32, float16, bfloat16", path);
  for (int i = 0; i < model->tensors; i++) model->tensor[i].dtype = dtype;
  model_layout(model);
  return 0;
}

int checkpoint_describe(const char *folder, struct model *model, bool *headers, struct error *error) {
  static const char *const files[] = {"model.safetensors", "model.safetensors.index.json"};
  char path[4096];
  *headers = false;
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    snprintf(path, sizeof path, "%s/%s", folder, files[i]);
    *headers = *headers || access(path, F_OK) == 0;
  }
  struct checkpoint *checkpoint = NULL;
  if (*headers && checkpoint_open(folder, model, &checkpoint, error) == 0) checkpoint_close(checkpoint);
  if (*headers) return error->code;
  snprintf(path, sizeof path, "%s/config.json", folder);
  char *config = read_text(path, error);
  if (config && model_parse(model, config, path, error) == 0) take_config_dtype(model, config, path, error);
  free(config);
  return error->code;
}

int64_t checkpoint_outside_elements(const struct model *model) {
  int64_t elements = 0;
  for (enum outside which = 0; which < OUTSIDES; which++) {
    struct outside_shape shape = outside_shape(model, which);
    if (shape.has && !(which == OUTSIDE_HEAD && model->tied_embeddings)) elements += shape.rows * shape.columns;
  }
  return elements;
}

const struct tensor *checkpoint_block_tensor(const struct checkpoint *checkpoint, int block, int index) {
  struct error never = {0}; /* they are there, says checkpoint_open */
  return find_block_tensor(checkpoint, block, index, &never);
}

const struct tensor *checkpoint_outside_tensor(const struct checkpoint *checkpoint, int number, const char **name) {
  struct error never = {0};
  for (enum outside which = 0; which < OUTSIDES; which++) {
    struct outside_shape shape = outside_shape(&checkpoint->model, which);
    if (!shape.has || (which == OUTSIDE_HEAD && checkpoint->model.tied_embeddings) || number-- > 0) continue;
    *name = shape.name;
    return find_outside(checkpoint, which, &never);
  }
  return NULL;
}

const char *checkpoint_config(const struct checkpoint *checkpoint) {
  return checkpoint->config;
}

/* Name, layout, and pieces of the values at even distances, the first and the last bytes among them. */
static int hash_tensor(struct sha256 *hash, const struct tensor *tensor, struct error *error) {
  enum { PIECES = 8, PIECE = 512 };
  char bytes[PIECE];
  size_t length = tensor->bytes < PIECE ? tensor->bytes : PIECE;
  int64_t layout[2] = {tensor->dtype, tensor->dimensions};
  sha256_update(hash, tensor->name, strlen(tensor->name) + 1, error);
  sha256_update(hash, layout, sizeof layout, error);
  sha256_update(hash, tensor->shape, (size_t)tensor->dimensions * sizeof *tensor->shape, error);
  for (size_t i = 0; i < PIECES && !error->code; i++)
    if (!safetensors_read(tensor, (tensor->bytes - length) / (PIECES - 1) * i, length, bytes, error))
      sha256_update(hash, bytes, length, error);
  if (!error->code && !safetensors_read(tensor, tensor->bytes - length, length, bytes, error)) sha256_update(hash, bytes, length, error);
  return error->code;
}

int checkpoint_sha256(const struct checkpoint *checkpoint, char hex[65], struct error *error) {
  uint8_t digest[SHA256_BYTES];
  struct sha256 *hash = sha256_open("model", error);
  for (size_t i = 0; i < safetensors_count(checkpoint->tensors) && !error->code; i++)
    hash_tensor(hash, safetensors_at(checkpoint->tensors, i), error);
  if (!sha256_close(hash, digest, error)) sha256_text(digest, hex);
  return error->code;
}

static void convert(float *to, const void *from, enum dtype dtype, int64_t count) {
  const uint8_t *bytes = from;
  for (int64_t i = 0; i < count; i++) {
    uint16_t bits;
    if (dtype == DTYPE_F32) {
      memcpy(to + i, bytes + 4 * i, 4);
    } else {
      memcpy(&bits, bytes + 2 * i, 2);
      to[i] = dtype == DTYPE_F16 ? half_to_float(bits) : bf16_to_float(bits);
    }
  }
}

/* Whether all values are finite: whether no exponent is all ones. */
static bool all_finite(const void *values, enum dtype dtype, int64_t count) {
  uint32_t bad = 0;
  if (dtype == DTYPE_F32) {
    const uint32_t *bits = values;
    for (int64_t i = 0; i < count; i++) bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    uint16_t mask = dtype == DTYPE_F16 ? 0x7c00 : 0x7f80;
    const uint16_t *bits = values;
    for (int64_t i = 0; i < count; i++) bad |= (bits[i] & mask) == mask;
  }
  return !bad;
}

static int not_finite(const struct tensor *tensor, struct error *error) {
  return error_set(error, ERROR_INPUT, "%s: tensor '%s' holds NaN or infinity; the checkpoint is damaged, download it again", tensor->path,
                   tensor->name);
}

void checkpoint_test_delay(const struct checkpoint *checkpoint) {
  struct timespec pause = {.tv_sec = (time_t)checkpoint->test_delay_seconds};
  pause.tv_nsec = (long)((checkpoint->test_delay_seconds - (double)pause.tv_sec) * 1e9);
  if (checkpoint->test_delay_seconds > 0) nanosleep(&pause, NULL);
}

/* Copies elements [first, first + count) of a tensor as `dtype`. */
static int copy_elements(void *to, enum dtype dtype, const struct tensor *tensor, int64_t first, int64_t count, struct error *error) {
  enum { PIECE = 1 << 14 };
  size_t size = dtype_size(tensor->dtype), offset = (size_t)first * size;
  char piece[PIECE * sizeof(float)];
  if (tensor->dtype == dtype) return safetensors_read(tensor, offset, (size_t)count * size, to, error);
  for (int64_t done = 0; done < count && !error->code; done += PIECE) {
    int64_t length = count - done < PIECE ? count - done : PIECE;
    if (!safetensors_read(tensor, offset + (size_t)done * size, (size_t)length * size, piece, error))
      convert((float *)to + done, piece, tensor->dtype, length);
  }
  return error->code;
}

int checkpoint_read_tensor(const struct checkpoint *checkpoint, const struct model *model, int block, int index, void *image,
                           struct error *error) {
  const struct block_tensor *part = &model->tensor[index];
  const struct tensor *tensor = find_block_tensor(checkpoint, block, index, error);
  if (!tensor) return error->code;
  bool matrix = part->dimensions == 2;
  int64_t rows = matrix ? part->rows : part->columns, columns = matrix ? part->columns : 1;
  char *to = (char *)image + part->image_offset;
  for (int64_t row = 0; row < rows; row += part->source.run)
    if (copy_elements(to + (size_t)(row * columns) * dtype_size(part->dtype), part->dtype, tensor, source_row(&part->source, row) * columns,
                      part->source.run * columns, error))
      return error->code;
  return all_finite(to, part->dtype, rows * columns) ? 0 : not_finite(tensor, error);
}

int checkpoint_read_block(const struct checkpoint *checkpoint, const struct model *model, int block, void *image, struct error *error) {
  checkpoint_test_delay(checkpoint);
  for (int i = 0; i < model->tensors; i++)
    if (checkpoint_read_tensor(checkpoint, model, block, i, image, error)) break;
  return error->code;
}

/* Rows [first, first + count) of a matrix, or a vector as its row 0, as fp32. */
static int read_rows(const struct tensor *tensor, int64_t first, int64_t count, float *out, struct error *error) {
  int64_t columns = tensor->shape[tensor->dimensions - 1];
  if (copy_elements(out, DTYPE_F32, tensor, first * columns, count * columns, error)) return error->code;
  return all_finite(out, DTYPE_F32, count * columns) ? 0 : not_finite(tensor, error);
}

/* All of a tensor outside the blocks. */
static int read_outside(const struct checkpoint *checkpoint, enum outside which, float *out, struct error *error) {
  const struct tensor *tensor = find_outside(checkpoint, which, error);
  if (!tensor) return error->code;
  return read_rows(tensor, 0, tensor->dimensions == 2 ? tensor->shape[0] : 1, out, error);
}

/* The embedding's rows of these tokens. */
static int read_embeddings(const struct checkpoint *checkpoint, const int32_t *ids, int64_t count, float *out, /* [count, embedding] */
                           struct error *error) {
  const struct tensor *table = find_outside(checkpoint, OUTSIDE_EMBEDDING, error);
  if (!table) return error->code;
  int64_t columns = checkpoint->model.embedding;
  for (int64_t i = 0; i < count; i++)
    if (copy_elements(out + i * columns, DTYPE_F32, table, ids[i] * columns, columns, error)) return error->code;
  return all_finite(out, DTYPE_F32, count * columns) ? 0 : not_finite(table, error);
}

/* out = in W^T */
static void project(float *out, /* [count, rows] */
                    const float *in /* [count, columns] */, const float *w /* [rows, columns] */, int64_t count, int64_t rows,
                    int64_t columns) {
#pragma omp parallel for
  for (int64_t i = 0; i < count; i++)
    for (int64_t row = 0; row < rows; row++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < columns; c++) sum += in[i * columns + c] * w[row * columns + c];
      out[i * rows + row] = sum;
    }
}

/* Embeddings of another width than the hidden states. */
static int embed_projected(const struct checkpoint *checkpoint, const int32_t *ids, int64_t count, float *out, struct error *error) {
  int64_t H = checkpoint->model.hidden, E = checkpoint->model.embedding;
  float *narrow = calloc((size_t)(count * E), sizeof *narrow), *w = calloc((size_t)(H * E), sizeof *w);
  if (!narrow || !w)
    error_set(error, ERROR_WORK, "out of memory for the embedding's projection");
  else if (!read_embeddings(checkpoint, ids, count, narrow, error) && !read_outside(checkpoint, OUTSIDE_IN, w, error))
    project(out, narrow, w, count, H, E);
  free(narrow);
  free(w);
  return error->code;
}

static int add_positions(const struct checkpoint *checkpoint, int64_t count, float *out, struct error *error) {
  const struct tensor *table = find_outside(checkpoint, OUTSIDE_POSITIONS, error);
  if (!table) return error->code;
  int64_t elements = count * checkpoint->model.hidden;
  float *positions = malloc((size_t)elements * sizeof *positions);
  if (!positions) return error_set(error, ERROR_WORK, "out of memory for the positions of a sample");
  if (!read_rows(table, FIRST_POSITION, count, positions, error))
    for (int64_t i = 0; i < elements; i++) out[i] += positions[i];
  free(positions);
  return error->code;
}

int checkpoint_embed(const struct checkpoint *checkpoint, const int32_t *ids, int64_t count, float *out, struct error *error) {
  const struct model *model = &checkpoint->model;
  if (model->embedding == model->hidden)
    read_embeddings(checkpoint, ids, count, out, error);
  else
    embed_projected(checkpoint, ids, count, out, error);
  return error->code ? error->code : add_positions(checkpoint, count, out, error);
}

int checkpoint_read_final_norm(const struct checkpoint *checkpoint, float *out, struct error *error) {
  return read_outside(checkpoint, OUTSIDE_NORM, out, error);
}

int checkpoint_read_final_norm_bias(const struct checkpoint *checkpoint, float *out, struct error *error) {
  return read_outside(checkpoint, OUTSIDE_NORM_BIAS, out, error);
}

int checkpoint_read_project_out(const struct checkpoint *checkpoint, float *out, struct error *error) {
  return read_outside(checkpoint, OUTSIDE_OUT, out, error);
}

int checkpoint_read_head(const struct checkpoint *checkpoint, int64_t first, int64_t count, float *out, struct error *error) {
  const struct tensor *head = find_outside(checkpoint, OUTSIDE_HEAD, error);
  return head ? read_rows(head, first, count, out, error) : error->code;
}

void checkpoint_close(struct checkpoint *checkpoint) {
  if (!checkpoint) return;
  safetensors_close(checkpoint->tensors);
  free(checkpoint->config);
  free(checkpoint);
}
