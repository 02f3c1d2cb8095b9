/* test_checkpoint.c: reading a model folder: the first block's input of every family against what transformers computed, parts of fused
 * tensors row by row, what stands behind the last block, and a stored block put back into an image. */
#include "checkpoint.h"
#include "compare.h"
#include "dequantize.h"
#include "scratch.h"

enum { SAMPLES = 2, TOKENS = 24 };
static const char *const folders[] = {"llama_mha", "llama_gqa_tied", "qwen2",      "qwen3",      "mistral", "opt",
                                      "opt_post",  "falcon_7b",      "falcon_40b", "falcon_11b", "mixtral"};
enum { FOLDERS = sizeof folders / sizeof *folders };

struct fixture {
  struct model model;
  struct checkpoint *checkpoint;
  struct safetensors *expected, *weights;
};

static void fixture_open(struct fixture *f, const char *name) {
  struct error error = {0};
  char path[400];
  snprintf(path, sizeof path, FIXTURES "/%s", name);
  if (checkpoint_open(path, &f->model, &f->checkpoint, &error) || safetensors_open(path, &f->weights, &error))
    fail_msg("%s", error.message);
  snprintf(path, sizeof path, FIXTURES "/%s/expected.safetensors", name);
  if (safetensors_open_file(path, &f->expected, &error)) fail_msg("%s", error.message);
}

static void fixture_close(struct fixture *f) {
  checkpoint_close(f->checkpoint);
  safetensors_close(f->expected);
  safetensors_close(f->weights);
}

static void expected(const struct fixture *f, const char *name, size_t offset, size_t bytes, void *to) {
  struct error error = {0};
  const struct tensor *tensor = safetensors_find(f->expected, name);
  if (!tensor || safetensors_read(tensor, offset, bytes, to, &error)) fail_msg("%s: %s", name, error.message);
}

/* A tensor of the checkpoint, whose names may lack "model.". */
static const struct tensor *weight(const struct fixture *f, const char *name) {
  const struct tensor *tensor = safetensors_find(f->weights, name);
  if (!tensor) tensor = safetensors_find(f->weights, strchr(name, '.') + 1);
  assert_non_null(tensor);
  return tensor;
}

/* One element in any of the types. */
static float element_at(enum dtype dtype, const void *bytes) {
  uint16_t half;
  float value;
  memcpy(&value, bytes, dtype == DTYPE_F32 ? 4 : 0);
  if (dtype == DTYPE_F32) return value;
  memcpy(&half, bytes, 2);
  return dtype == DTYPE_F16 ? half_to_float(half) : bf16_to_float(half);
}

/* Element i of a tensor of the checkpoint. */
static float element(const struct tensor *tensor, int64_t i) {
  struct error error = {0};
  size_t size = dtype_size(tensor->dtype);
  char bytes[4];
  if (safetensors_read(tensor, (size_t)i * size, size, bytes, &error)) fail_msg("%s", error.message);
  return element_at(tensor->dtype, bytes);
}

static void embedding_is_that_of_transformers(void **context) {
  (void)context;
  for (int i = 0; i < FOLDERS; i++) {
    struct fixture f;
    struct error error = {0};
    fixture_open(&f, folders[i]);
    int64_t count = (int64_t)TOKENS * f.model.hidden;
    float *got = malloc((size_t)count * sizeof *got), *want = malloc((size_t)count * sizeof *want), largest = 0;
    int32_t ids[TOKENS];
    for (int sample = 0; sample < SAMPLES; sample++) {
      expected(&f, "input_ids", sizeof ids * (size_t)sample, sizeof ids, ids);
      expected(&f, "hidden.0", (size_t)(sample * count) * sizeof *want, (size_t)count * sizeof *want, want);
      if (checkpoint_embed(f.checkpoint, ids, TOKENS, got, &error)) fail_msg("%s", error.message);
      for (int64_t k = 0; k < count; k++) largest = fmaxf(largest, fabsf(got[k] - want[k]) / (fabsf(want[k]) + 0.1f));
      /* Sums are in another order only where embeddings are projected. */
      if (f.model.embedding == f.model.hidden) assert_memory_equal(got, want, (size_t)count * sizeof *got);
    }
    if (largest > 1e-5f) fail_msg("%s: %g", folders[i], (double)largest);
    free(got);
    free(want);
    fixture_close(&f);
  }
}

static void images_hold_the_rows_of_the_checkpoint(void **context) {
  (void)context;
  for (int i = 0; i < FOLDERS; i++) {
    struct fixture f;
    struct error error = {0};
    fixture_open(&f, folders[i]);
    struct model wide = f.model; /* as the stream of an evaluation carries it */
    for (int t = 0; t < wide.tensors; t++) wide.tensor[t].dtype = DTYPE_F32;
    model_layout(&wide);
    char *image = malloc(wide.image_bytes), *narrow = malloc(f.model.image_bytes);
    if (checkpoint_read_block(f.checkpoint, &wide, 1, image, &error)) fail_msg("%s", error.message);
    if (checkpoint_read_block(f.checkpoint, &f.model, 1, narrow, &error)) fail_msg("%s", error.message);
    for (int t = 0; t < wide.tensors; t++) {
      const struct block_tensor *part = &wide.tensor[t];
      char name[128];
      snprintf(name + snprintf(name, 64, model_names(&wide)->block_prefix, 1), 64, "%s", part->name);
      const struct tensor *tensor = weight(&f, name);
      enum dtype dtype = f.model.tensor[t].dtype;
      const char *as_read = narrow + f.model.tensor[t].image_offset;
      const float *got = (const float *)(const void *)(image + part->image_offset);
      int64_t width = part->dimensions == 2 ? part->columns : 1, rows = part->rows * part->columns / width;
      for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < width; c++) {
          assert_true(got[row * width + c] == element(tensor, source_row(&part->source, row) * width + c));
          assert_true(got[row * width + c] == element_at(dtype, as_read + (size_t)(row * width + c) * dtype_size(dtype)));
        }
    }
    free(image);
    free(narrow);
    fixture_close(&f);
  }
}

/* What stands behind the last block is there in full; the head in two pieces. */
static void the_head_is_read_in_pieces(void **context) {
  (void)context;
  for (int i = 0; i < FOLDERS; i++) {
    struct fixture f;
    struct error error = {0};
    fixture_open(&f, folders[i]);
    const struct model_names *names = model_names(&f.model);
    int64_t H = f.model.hidden, E = f.model.embedding, V = f.model.vocabulary;
    float *head = malloc((size_t)(V * E) * sizeof *head), *norm = malloc((size_t)(H * E) * sizeof *norm);
    if (checkpoint_read_head(f.checkpoint, 0, 37, head, &error) || checkpoint_read_head(f.checkpoint, 37, V - 37, head + 37 * E, &error))
      fail_msg("%s", error.message);
    const struct tensor *tensor = weight(&f, f.model.tied_embeddings ? names->embedding : names->head);
    for (int64_t k = 0; k < V * E; k++) assert_true(head[k] == element(tensor, k));
    if (f.model.final_norm) {
      if (checkpoint_read_final_norm(f.checkpoint, norm, &error)) fail_msg("%s", error.message);
      for (int64_t k = 0; k < H; k++) assert_true(norm[k] == element(weight(&f, names->final_norm), k));
    }
    if (f.model.final_norm && f.model.layer_norm) {
      if (checkpoint_read_final_norm_bias(f.checkpoint, norm, &error)) fail_msg("%s", error.message);
      for (int64_t k = 0; k < H; k++) assert_true(norm[k] == element(weight(&f, names->final_norm_bias), k));
    }
    if (E != H) {
      if (checkpoint_read_project_out(f.checkpoint, norm, &error)) fail_msg("%s", error.message);
      for (int64_t k = 0; k < H * E; k++) assert_true(norm[k] == element(weight(&f, names->project_out), k));
    }
    free(head);
    free(norm);
    fixture_close(&f);
  }
}

/* ---- stored blocks ---- */

/* A record with every linear layer of the checkpoint once: 8 bits, codes that tell their place, scale 1, zero point 0; and one norm. */
static struct block_record make_record(const struct model *model, const char *folded, int64_t columns) {
  struct block_record record = {.index = 1};
  record.linear = calloc(MODEL_MAX_LINEARS, sizeof *record.linear);
  for (int i = 0; i < model->linears; i++) {
    const struct linear *linear = &model->linear[i];
    bool known = !linear->quantized;
    for (int k = 0; k < record.linears; k++) known = known || strcmp(record.linear[k].name, linear->name) == 0;
    if (known) continue;
    int64_t rows = model->tensor[linear->weight].source.total;
    struct quantized_linear *stored = &record.linear[record.linears++];
    *stored = (struct quantized_linear){.out_features = rows, .in_features = linear->columns, .bits = 8, .group_size = linear->columns};
    strcpy(stored->name, linear->name);
    stored->codes = malloc((size_t)(rows * linear->columns));
    for (int64_t k = 0; k < rows * linear->columns; k++) stored->codes[k] = (uint8_t)(k * 7 + record.linears);
    stored->scale = malloc((size_t)rows * sizeof *stored->scale);
    for (int64_t k = 0; k < rows; k++) stored->scale[k] = 0x3c00;
    stored->zero_point = calloc((size_t)rows, 1);
  }
  record.folded = calloc(1, sizeof *record.folded);
  record.folded_arrays = 1;
  record.folded[0] = (struct named_array){.dimensions = 1, .shape = {columns}};
  strcpy(record.folded[0].name, folded);
  record.folded[0].values = malloc((size_t)columns * sizeof(float));
  for (int64_t k = 0; k < columns; k++) record.folded[0].values[k] = (float)k + 0.5f;
  return record;
}

static void a_stored_block_is_put_into_its_image(void **context) {
  (void)context;
  static const char *const norm[] = {"input_layernorm.weight",
                                     "input_layernorm.weight",
                                     "self_attn.v_proj.bias",
                                     "self_attn.q_norm.weight",
                                     "input_layernorm.weight",
                                     "self_attn_layer_norm.bias",
                                     "fc1.bias",
                                     "input_layernorm.bias",
                                     "ln_mlp.weight",
                                     "input_layernorm.weight",
                                     "post_attention_layernorm.weight"};
  for (int i = 0; i < FOLDERS; i++) {
    struct fixture f;
    struct error error = {0};
    fixture_open(&f, folders[i]);
    for (int t = 0; t < f.model.tensors; t++) f.model.tensor[t].dtype = DTYPE_F32;
    model_layout(&f.model);
    char *image = malloc(f.model.image_bytes);
    if (checkpoint_read_block(f.checkpoint, &f.model, 1, image, &error)) fail_msg("%s", error.message);
    int changed = 0;
    while (strcmp(f.model.tensor[changed].name, norm[i]) != 0) assert_true(++changed < f.model.tensors);
    struct block_record record = make_record(&f.model, norm[i], f.model.tensor[changed].columns);
    if (dequantize_block(&record, &f.model, image, "store", &error)) fail_msg("%s: %s", folders[i], error.message);
    for (int k = 0; k < f.model.linears; k++) {
      const struct linear *linear = &f.model.linear[k];
      if (!linear->quantized) continue;
      const struct block_tensor *weight = &f.model.tensor[linear->weight];
      const float *got = (const float *)(const void *)(image + weight->image_offset);
      int stored = 0;
      while (strcmp(record.linear[stored].name, linear->name) != 0) stored++;
      for (int64_t row = 0; row < weight->rows; row++)
        for (int64_t c = 0; c < weight->columns; c++)
          assert_true(got[row * weight->columns + c] ==
                      (float)(uint8_t)((source_row(&weight->source, row) * weight->columns + c) * 7 + stored + 1));
    }
    const float *got = (const float *)(const void *)(image + f.model.tensor[changed].image_offset);
    for (int64_t k = 0; k < f.model.tensor[changed].columns; k++) assert_true(got[k] == (float)k + 0.5f);
    block_record_free(&record);
    free(image);
    fixture_close(&f);
  }
}

static void refuse_record(const struct fixture *f, struct block_record *record, const char *expected) {
  struct error error = {0};
  char *image = malloc(f->model.image_bytes);
  assert_int_equal(dequantize_block(record, &f->model, image, "store", &error), ERROR_INPUT);
  assert_string_equal(error.message, expected);
  free(image);
}

static void what_does_not_belong_into_a_block_is_refused(void **context) {
  (void)context;
  struct fixture f;
  fixture_open(&f, "mixtral");
  for (int t = 0; t < f.model.tensors; t++) f.model.tensor[t].dtype = DTYPE_F32;
  model_layout(&f.model);
  struct block_record record = make_record(&f.model, "input_layernorm.weight", 47);
  refuse_record(&f, &record, "store: block 1: input_layernorm.weight: another shape than the model's; it was made from another model");
  record.folded[0].shape[0] = 48;
  record.folded[0].values = realloc(record.folded[0].values, 48 * sizeof(float));
  record.folded[0].values[47] = NAN;
  refuse_record(&f, &record, "store: block 1: input_layernorm.weight: holds NaN or infinity; calibrate again");
  strcpy(record.folded[0].name, "input_layernorm.bias");
  refuse_record(&f, &record,
                "store: block 1: input_layernorm.bias: the model has no such tensor to replace; it was made from another model");
  strcpy(record.folded[0].name, "self_attn.q_proj.weight");
  refuse_record(&f, &record,
                "store: block 1: self_attn.q_proj.weight: the model has no such tensor to replace; it was made from another model");
  strcpy(record.folded[0].name, "block_sparse_moe.gate.weight");
  refuse_record(&f, &record,
                "store: block 1: block_sparse_moe.gate.weight: another shape than the model's; it was made from another model");
  record.linear[0].out_features--;
  refuse_record(&f, &record, "store: block 1: self_attn.q_proj: another shape than the model's; it was made from another model");
  strcpy(record.linear[0].name, "self_attn.query");
  refuse_record(&f, &record, "store: block 1: self_attn.q_proj: missing; it was made from another model");
  block_record_free(&record);
  fixture_close(&f);
}

/* Which would wait for ever for someone to write to it. */
static void a_pipe_is_no_config(void **context) {
  (void)context;
  struct error error = {0};
  struct model model;
  struct checkpoint *checkpoint;
  struct path folder = scratch_init(), config = scratch_path(&folder, "config.json");
  assert_int_equal(mkfifo(config.text, 0600), 0);
  assert_int_equal(checkpoint_open(folder.text, &model, &checkpoint, &error), ERROR_INPUT);
  assert_null(checkpoint);
  if (!strstr(error.message, "config.json: is not a regular file")) fail_msg("%s", error.message);
  scratch_free(&folder);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(embedding_is_that_of_transformers),
      cmocka_unit_test(images_hold_the_rows_of_the_checkpoint),
      cmocka_unit_test(the_head_is_read_in_pieces),
      cmocka_unit_test(a_stored_block_is_put_into_its_image),
      cmocka_unit_test(what_does_not_belong_into_a_block_is_refused),
      cmocka_unit_test(a_pipe_is_no_config),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
