/* config.c: any text as a model's config.json. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "model.h"

enum { LARGEST_SIZE = 1 << 24 };

static bool is_size(int64_t size) {
  return size >= 1 && size <= LARGEST_SIZE;
}

static void check_sizes(const struct model *model) {
  fuzz_expect(is_size(model->blocks) && is_size(model->hidden) && is_size(model->ffn) && is_size(model->heads) &&
                  is_size(model->kv_heads) && is_size(model->head_size) && is_size(model->vocabulary) && is_size(model->embedding),
              "sizes are in their range");
  fuzz_expect(model->heads % model->kv_heads == 0, "heads share kv heads evenly");
  fuzz_expect(model->experts >= 0 && model->experts <= MODEL_MAX_EXPERTS && model->experts_per_token >= 1 &&
                  model->experts_per_token <= model_mlps(model),
              "experts are in their range");
  fuzz_expect(model->positions >= 0 && model->window >= 0, "positions and window are not negative");
  fuzz_expect(isfinite(model->norm_eps) && model->norm_eps > 0, "norm_eps is a positive number");
}

static void check_tensor(const struct model *model, int index, size_t *offset, int64_t *element) {
  const struct block_tensor *tensor = &model->tensor[index];
  fuzz_expect(memchr(tensor->name, 0, sizeof tensor->name) != NULL && *tensor->name, "a tensor has a name");
  fuzz_expect((tensor->dimensions == 1 && tensor->rows == 1) || tensor->dimensions == 2, "a tensor is a vector or a matrix");
  fuzz_expect(is_size(tensor->rows) && is_size(tensor->columns), "a tensor's sizes are in their range");
  fuzz_expect(tensor->image_offset == *offset && *offset % 64 == 0 && tensor->element_offset == *element && *element % 16 == 0,
              "tensors follow each other in the image");
  int64_t count = tensor->rows * tensor->columns, entries = tensor->dimensions == 2 ? tensor->rows : tensor->columns;
  *offset += ((size_t)count * dtype_size(tensor->dtype) + 63) / 64 * 64;
  *element += (count + 15) / 16 * 16;
  const struct row_map *map = &tensor->source;
  fuzz_expect(map->run >= 1 && map->first >= 0 && map->period >= map->run && entries % map->run == 0, "rows are whole runs");
  fuzz_expect(source_row(map, 0) >= 0 && source_row(map, entries - 1) < map->total, "rows are those of the checkpoint's tensor");
}

static void check_linears(const struct model *model) {
  fuzz_expect(model->linears >= ROLES && model->linears <= MODEL_MAX_LINEARS, "linear layers fit");
  for (int i = 0; i < model->linears; i++) {
    const struct linear *linear = &model->linear[i];
    fuzz_expect(linear->weight >= ABSENT && linear->weight < model->tensors && linear->bias >= ABSENT && linear->bias < model->tensors,
                "a linear layer's tensors are there");
    if (linear->weight == ABSENT) continue;
    fuzz_expect(model->tensor[linear->weight].rows == linear->rows && model->tensor[linear->weight].columns == linear->columns,
                "a linear layer has its weight's shape");
    fuzz_expect(linear->bias == ABSENT || model->tensor[linear->bias].columns == linear->rows, "a bias has as many entries as outputs");
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  static struct model model;
  struct error error = {0};
  char *text = fuzz_text((struct fuzz_part){bytes, size});
  fuzz_begin(size);
  int code = model_parse(&model, text, "config.json", &error);
  fuzz_end();
  free(text);
  if (code) {
    fuzz_expect_refusal(code, &error);
    return 0;
  }
  size_t offset = 0;
  int64_t element = 0;
  check_sizes(&model);
  fuzz_expect(model.tensors > 0 && model.tensors <= MODEL_MAX_TENSORS, "tensors fit");
  for (int i = 0; i < model.tensors; i++) check_tensor(&model, i, &offset, &element);
  fuzz_expect(model.image_bytes == offset && model.elements == element, "the image ends with its last tensor");
  check_linears(&model);
  fuzz_expect(model_names(&model) != NULL, "a model has names");
  if (model.head_size <= 512 && model.rope.theta > 0) {
    float table[2][256];
    model_rope_table(&model, 1, table[0], table[1]);
    fuzz_expect(table[0][0] == 1 && table[1][0] == 0, "position 0 is not turned");
  }
  return 0;
}
