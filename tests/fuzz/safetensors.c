/* safetensors.c: any bytes as the files of a model folder. The first byte says which: one file; an index and two shards; or config.json and
 * one file, opened as a model and read through. */
#include "safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"
#include "file.h"
#include "fuzz.h"

enum { INDEX = 1, MODEL = 2, MODES = 3 };

static const char FILE_NAME[] = "model.safetensors", INDEX_NAME[] = "model.safetensors.index.json",
                  CONFIG_NAME[] = "config.json", *const SHARD_NAMES[] = {"a.safetensors", "b.safetensors"};

static void read_all(const struct tensor *tensor) {
  struct error error = {0};
  void *values = malloc(tensor->bytes + 1);
  fuzz_expect(values != NULL, "memory for a tensor");
  fuzz_expect(safetensors_read(tensor, 0, tensor->bytes, values, &error) == 0, "a tensor can be read");
  free(values);
}

/* What the headers promise. `bytes`: of all files together. */
static void check_tensors(const struct safetensors *checkpoint, size_t bytes) {
  size_t sum = 0;
  for (size_t i = 0; i < safetensors_count(checkpoint); i++) {
    const struct tensor *tensor = safetensors_at(checkpoint, i);
    fuzz_expect(safetensors_find(checkpoint, tensor->name) == tensor, "a tensor is found by its name");
    fuzz_expect(i == 0 || strcmp(safetensors_at(checkpoint, i - 1)->name, tensor->name) < 0, "names are in order, each once");
    fuzz_expect(strncmp(tensor->path, fuzz_folder(), strlen(fuzz_folder())) == 0 && tensor->path[strlen(fuzz_folder())] == '/' &&
                    !strchr(tensor->path + strlen(fuzz_folder()) + 1, '/'),
                "a shard lies in the folder");
    fuzz_expect(tensor->dimensions >= 0 && tensor->dimensions <= TENSOR_MAX_DIMENSIONS, "dimensions are in their range");
    size_t elements = 1;
    for (int d = 0; d < tensor->dimensions; d++)
      fuzz_expect(tensor->shape[d] >= 0 && !__builtin_mul_overflow(elements, (size_t)tensor->shape[d], &elements), "a shape has a size");
    if (tensor->dtype != DTYPE_OTHER) fuzz_expect(tensor->bytes / dtype_size(tensor->dtype) == elements, "shape and bytes agree");
    fuzz_expect(tensor->offset <= tensor->file->bytes && tensor->bytes <= tensor->file->bytes - tensor->offset,
                "a tensor lies in its file");
    fuzz_expect(tensor->bytes <= bytes - sum, "tensors do not overlap");
    sum += tensor->bytes;
    read_all(tensor);
  }
}

static void open_tensors(size_t bytes) {
  struct error error = {0};
  struct safetensors *checkpoint;
  fuzz_begin(bytes);
  int code = safetensors_open(fuzz_folder(), &checkpoint, &error);
  fuzz_end();
  if (code) {
    fuzz_expect(checkpoint == NULL, "what is refused is not opened");
    fuzz_expect_refusal(code, &error);
    return;
  }
  check_tensors(checkpoint, bytes);
  safetensors_close(checkpoint);
}

/* Reads everything that a calibration reads. */
static void read_model(const struct checkpoint *checkpoint, const struct model *model) {
  const int32_t ids[] = {0, model->vocabulary - 1};
  struct error error = {0};
  void *image = malloc(model->image_bytes);
  float *out = malloc((size_t)model->hidden * 2 * sizeof *out);
  fuzz_expect(image && out, "memory for one block");
  char hex[65];
  int code = checkpoint_sha256(checkpoint, hex, &error);
  for (int block = 0; block < model->blocks && !code; block++) code = checkpoint_read_block(checkpoint, model, block, image, &error);
  if (!code && (model->positions == 0 || model->positions >= 2)) code = checkpoint_embed(checkpoint, ids, 2, out, &error);
  if (!code && model->final_norm) code = checkpoint_read_final_norm(checkpoint, out, &error);
  if (code) fuzz_expect_refusal(code, &error);
  free(out);
  free(image);
}

static void open_model(size_t bytes) {
  static struct model model;
  struct error error = {0};
  struct checkpoint *checkpoint;
  fuzz_begin(bytes);
  int code = checkpoint_open(fuzz_folder(), &model, &checkpoint, &error);
  if (code) {
    fuzz_end();
    fuzz_expect(checkpoint == NULL, "what is refused is not opened");
    fuzz_expect_refusal(code, &error);
    return;
  }
  read_model(checkpoint, &model);
  fuzz_end();
  checkpoint_close(checkpoint);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  if (size == 0) return 0;
  const struct fuzz_part none = {NULL, 0};
  struct fuzz_part rest = {bytes + 1, size - 1};
  int mode = *bytes % MODES;
  fuzz_write(CONFIG_NAME, mode == MODEL ? fuzz_take(&rest) : none);
  fuzz_write(INDEX_NAME, mode == INDEX ? fuzz_take(&rest) : none);
  fuzz_write(SHARD_NAMES[0], mode == INDEX ? fuzz_take(&rest) : none);
  fuzz_write(SHARD_NAMES[1], mode == INDEX ? rest : none);
  fuzz_write(FILE_NAME, mode == INDEX ? none : rest);
  if (mode == MODEL)
    open_model(size);
  else
    open_tensors(size);
  return 0;
}
