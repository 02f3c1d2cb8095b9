/* store.c: any bytes as a store: its master file, then the file of its first block, read and turned into weights. */
#include "store.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "dequantize.h"
#include "fuzz.h"
#include "recipe.h"

enum { LARGEST_IMAGE = 1 << 20 };

/* As a loaded recipe and model would be used with it. */
static void use_texts(const struct store_info *info, const struct block_record *record) {
  static struct model model;
  struct recipe recipe;
  struct error of_recipe = {0}, of_model = {0};
  int code = recipe_from_json(&recipe, info->recipe, "store", &of_recipe);
  if (code) fuzz_expect_refusal(code, &of_recipe);
  code = model_parse(&model, info->model_config, "store: model_config", &of_model);
  if (!code && model.image_bytes <= LARGEST_IMAGE) {
    void *image = calloc(model.image_bytes, 1);
    fuzz_expect(image != NULL, "memory for one block");
    code = dequantize_block(record, &model, image, "store", &of_model);
    free(image);
  }
  if (code) fuzz_expect_refusal(code, &of_model);
}

static void use_linear(const struct quantized_linear *linear) {
  fuzz_expect(linear->bits >= 2 && linear->bits <= 8 && linear->group_size >= 1 && linear->in_features >= 1 && linear->out_features >= 1,
              "a linear layer's numbers are in their range");
  fuzz_expect(memchr(linear->name, 0, sizeof linear->name) != NULL, "a name ends");
  int64_t groups = (linear->in_features + linear->group_size - 1) / linear->group_size;
  for (int64_t i = 0; i < linear->out_features * groups; i++) {
    fuzz_expect((linear->scale[i] & 0x7c00) != 0x7c00, "scales are finite");
    fuzz_expect(linear->zero_point[i] < 1 << linear->bits, "zero points are codes");
  }
  float *out = malloc((size_t)(linear->out_features * linear->in_features) * sizeof *out);
  fuzz_expect(out != NULL, "memory for a linear layer");
  dequantize_linear(linear, out);
  for (int64_t i = 0; i < linear->out_features * linear->in_features; i++) fuzz_expect(isfinite(out[i]), "weights are finite");
  free(out);
}

static volatile float touched; /* every value is, for AddressSanitizer to see */

static void use_array(const struct named_array *array) {
  fuzz_expect(memchr(array->name, 0, sizeof array->name) != NULL, "a name ends");
  fuzz_expect((array->dimensions == 1 || array->dimensions == 2) && array->shape[0] >= 0 && array->shape[1] >= 0, "an array has a shape");
  int64_t count = array->shape[0] * (array->dimensions == 2 ? array->shape[1] : 1);
  for (int64_t i = 0; i < count; i++) touched = array->values[i];
}

static void use_record(const struct block_record *record) {
  fuzz_expect(record->world_size >= 1 && record->skipped_steps >= 0 && record->untrained_experts >= 0, "counts are in their range");
  for (int i = 0; i < record->linears; i++) use_linear(&record->linear[i]);
  for (int i = 0; i < record->folded_arrays; i++) use_array(&record->folded[i]);
  for (int i = 0; i < record->calibration_arrays; i++) use_array(&record->calibration[i]);
}

/* The store again, as its block files alone tell of it. */
static void recover(const struct store_info *info) {
  struct error error = {0};
  struct store *store;
  char difference[200];
  int code = store_recover(fuzz_folder(), &store, &error);
  if (code) {
    fuzz_expect(store == NULL, "what is refused is not opened");
    fuzz_expect_refusal(code, &error);
    return;
  }
  if (info && !store_info_same(info, store_info(store), difference)) {
    error_set(&error, ERROR_INPUT, "%s", difference);
    fuzz_expect_refusal(ERROR_INPUT, &error);
  }
  store_close(store, &error);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  struct fuzz_part rest = {bytes, size};
  struct error error = {0};
  struct store *store;
  struct block_record record;
  char path[500];
  snprintf(path, sizeof path, "%s/blocks", fuzz_folder());
  mkdir(path, 0700);
  fuzz_write("omniquant.h5", fuzz_take(&rest));
  fuzz_write("blocks/0000.h5", rest);
  fuzz_begin(size);
  int code = store_open(fuzz_folder(), &store, &error);
  if (code) {
    fuzz_expect(store == NULL, "what is refused is not opened");
    fuzz_expect_refusal(code, &error);
    recover(NULL);
    fuzz_end();
    return 0;
  }
  fuzz_expect(store_info(store)->blocks >= 1 && store_info(store)->recipe && store_info(store)->model_config, "a store says what it is");
  code = store_read_block(store, 0, &record, &error);
  if (code) {
    fuzz_expect_refusal(code, &error);
    fuzz_expect(!record.linear && !record.folded && !record.calibration, "what is refused is not read");
  } else {
    use_record(&record);
    use_texts(store_info(store), &record);
  }
  block_record_free(&record);
  recover(store_info(store));
  fuzz_end();
  store_close(store, &error);
  return 0;
}
