/* checkpoint.c: from safetensors to block images. */
#include "checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "safetensors.h"

struct checkpoint {
  struct safetensors *tensors;
  struct model model;
  char *config;
  double test_delay_seconds; /* OMNIQUANT_TEST_READ_SECONDS: what reading a block is made to take longer, to measure overlap */
};

static char *read_text(const char *path, struct error *error) {
  enum { LARGEST = 1 << 24 };
  FILE *file = fopen(path, "rb");
  char *text = file ? malloc(LARGEST + 1) : NULL;
  size_t length = text ? fread(text, 1, LARGEST + 1, file) : 0;
  if (!file || (text && ferror(file))) {
    error_set(error, ERROR_INPUT, "%s: cannot be read (%m); --model needs a folder with config.json and safetensors", path);
  } else if (!text) {
    error_set(error, ERROR_WORK, "out of memory reading %s", path);
  } else if (length > LARGEST || memchr(text, 0, length)) {
    error_set(error, ERROR_INPUT, "%s: not a JSON text", path);
  }
  if (file) fclose(file);
  if (error->code) {
    free(text);
    return NULL;
  }
  text[length] = 0;
  char *fitted = realloc(text, length + 1);
  return fitted ? fitted : text;
}

static const struct tensor *find_tensor(const struct checkpoint *checkpoint, const char *name, int dimensions, int64_t rows,
                                        int64_t columns, struct error *error) {
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

static const struct tensor *find_block_tensor(const struct checkpoint *checkpoint, int block, int i, struct error *error) {
  const struct block_tensor *part = &checkpoint->model.tensor[i];
  char name[128];
  int length = snprintf(name, sizeof name, model_names(&checkpoint->model)->block_prefix, block);
  snprintf(name + length, sizeof name - (size_t)length, "%s", part->name);
  return find_tensor(checkpoint, name, part->dimensions, part->rows, part->columns, error);
}

static const struct tensor *find_head(const struct checkpoint *checkpoint, struct error *error) {
  const struct model *model = &checkpoint->model;
  const struct model_names *names = model_names(model);
  return find_tensor(checkpoint, model->tied_embeddings ? names->embedding : names->head, 2, model->vocabulary, model->hidden, error);
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
  const struct model_names *names = model_names(model);
  if (!find_tensor(checkpoint, names->embedding, 2, model->vocabulary, model->hidden, error)) return error->code;
  if (!find_tensor(checkpoint, names->final_norm, 1, 1, model->hidden, error)) return error->code;
  find_head(checkpoint, error);
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
  if (check_tensors(c, error)) goto fail;
  *model = c->model;
  return 0;
fail:
  checkpoint_close(c);
  *checkpoint = NULL;
  return error->code;
}

const char *checkpoint_config(const struct checkpoint *checkpoint) {
  return checkpoint->config;
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

static void test_delay(const struct checkpoint *checkpoint) {
  struct timespec pause = {.tv_sec = (time_t)checkpoint->test_delay_seconds};
  pause.tv_nsec = (long)((checkpoint->test_delay_seconds - (double)pause.tv_sec) * 1e9);
  if (checkpoint->test_delay_seconds > 0) nanosleep(&pause, NULL);
}

int checkpoint_read_tensor(const struct checkpoint *checkpoint, const struct model *model, int block, int index, void *image,
                           struct error *error) {
  const struct block_tensor *part = &model->tensor[index];
  const struct tensor *tensor = find_block_tensor(checkpoint, block, index, error);
  if (!tensor) return error->code;
  int64_t count = part->rows * part->columns;
  void *to = (char *)image + part->image_offset;
  safetensors_prefetch(tensor, 0, tensor->bytes);
  if (tensor->dtype == part->dtype)
    memcpy(to, tensor->data, tensor->bytes);
  else
    convert(to, tensor->data, tensor->dtype, count);
  safetensors_release(tensor, 0, tensor->bytes);
  return all_finite(to, part->dtype, count) ? 0 : not_finite(tensor, error);
}

int checkpoint_read_block(const struct checkpoint *checkpoint, const struct model *model, int block, void *image, struct error *error) {
  test_delay(checkpoint);
  for (int i = 0; i < model->tensors; i++)
    if (checkpoint_read_tensor(checkpoint, model, block, i, image, error)) break;
  return error->code;
}

/* Row `row` of a matrix of `columns` columns. */
static const void *tensor_row(const struct tensor *tensor, int64_t row, int64_t columns) {
  return (const char *)tensor->data + (size_t)(row * columns) * dtype_size(tensor->dtype);
}

int checkpoint_embed(const struct checkpoint *checkpoint, const int32_t *ids, int64_t count, float *out, struct error *error) {
  const struct model *model = &checkpoint->model;
  const struct tensor *table = safetensors_find(checkpoint->tensors, model_names(model)->embedding);
  for (int64_t i = 0; i < count; i++)
    convert(out + i * model->hidden, tensor_row(table, ids[i], model->hidden), table->dtype, model->hidden);
  safetensors_release(table, 0, table->bytes);
  return all_finite(out, DTYPE_F32, count * model->hidden) ? 0 : not_finite(table, error);
}

int checkpoint_read_final_norm(const struct checkpoint *checkpoint, float *out, struct error *error) {
  const struct model *model = &checkpoint->model;
  const struct tensor *norm = safetensors_find(checkpoint->tensors, model_names(model)->final_norm);
  convert(out, norm->data, norm->dtype, model->hidden);
  return all_finite(out, DTYPE_F32, model->hidden) ? 0 : not_finite(norm, error);
}

int checkpoint_read_head(const struct checkpoint *checkpoint, int64_t first, int64_t count, float *out, struct error *error) {
  const struct model *model = &checkpoint->model;
  const struct tensor *head = find_head(checkpoint, error);
  if (!head) return error->code;
  size_t row_bytes = (size_t)model->hidden * dtype_size(head->dtype);
  safetensors_prefetch(head, (size_t)first * row_bytes, (size_t)count * row_bytes);
  convert(out, tensor_row(head, first, model->hidden), head->dtype, count * model->hidden);
  safetensors_release(head, (size_t)first * row_bytes, (size_t)count * row_bytes);
  return all_finite(out, DTYPE_F32, count * model->hidden) ? 0 : not_finite(head, error);
}

void checkpoint_close(struct checkpoint *checkpoint) {
  if (!checkpoint) return;
  safetensors_close(checkpoint->tensors);
  free(checkpoint->config);
  free(checkpoint);
}
