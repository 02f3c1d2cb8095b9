/* store.c: storing a quantized block and reading it back: its file made in memory, written and synced, and read with all its checks, beside
 * the same bytes written and read as they are. Prints a JSON object for each number of bits (bench/README.md). */
#include "store.h"

#include <argp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "file.h"
#include "measure.h"

enum { LINEARS = 7 };

struct arguments {
  const char *folder;
  int hidden, ffn, group, repeats;
};

static const struct argp_option options[] = {
    {"hidden", 'h', "N", 0, "hidden size (2048)", 0},
    {"ffn", 'f', "N", 0, "width of the MLP (5632)", 0},
    {"group", 'g', "N", 0, "group size (128)", 0},
    {"repeats", 'r', "N", 0, "blocks written and read for each number of bits (5)", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state) {
  struct arguments *a = state->input;
  int *fields[128] = {['h'] = &a->hidden, ['f'] = &a->ffn, ['g'] = &a->group, ['r'] = &a->repeats};
  if (key == ARGP_KEY_ARG && !a->folder) return a->folder = text, 0;
  if (key == ARGP_KEY_END && !a->folder) argp_error(state, "FOLDER is missing");
  if (key <= 0 || key >= 128 || !fields[key]) return ARGP_ERR_UNKNOWN;
  *fields[key] = atoi(text);
  if (*fields[key] < 1) argp_error(state, "%s: not a size", text);
  return 0;
}

/* ---- a block with random codes, as a LLaMA block's layers are ---- */

static bool fill_linear(struct quantized_linear *linear, uint32_t *state) {
  size_t rows = (size_t)linear->out_features, groups = rows * (size_t)((linear->in_features + linear->group_size - 1) / linear->group_size);
  size_t bytes = rows * (size_t)packed_row_bytes(linear->in_features, linear->bits);
  linear->codes = malloc(bytes);
  linear->scale = malloc(groups * sizeof *linear->scale);
  linear->zero_point = malloc(groups);
  if (!linear->codes || !linear->scale || !linear->zero_point) return false;
  for (size_t i = 0; i < bytes; i++) linear->codes[i] = (uint8_t)(127 * uniform(state) + 128);
  for (size_t i = 0; i < groups; i++) {
    linear->scale[i] = (uint16_t)(0x2000 + i % 1024); /* fp16 from 2^-7 on */
    linear->zero_point[i] = (uint8_t)(i % (1u << linear->bits));
  }
  return true;
}

static int record_make(struct block_record *record, const struct arguments *a, int bits, struct error *error) {
  static const char *const names[LINEARS] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                             "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
  uint32_t state = 1;
  *record = (struct block_record){.kept = "end", .world_size = 1, .linears = LINEARS};
  record->linear = calloc(LINEARS, sizeof *record->linear);
  for (int i = 0; record->linear && i < LINEARS; i++) {
    struct quantized_linear *linear = &record->linear[i];
    *linear = (struct quantized_linear){.out_features = i == 4 || i == 5 ? a->ffn : a->hidden,
                                        .in_features = i == 6 ? a->ffn : a->hidden,
                                        .bits = bits,
                                        .group_size = a->group};
    snprintf(linear->name, sizeof linear->name, "%s", names[i]);
    if (!fill_linear(linear, &state)) return error_set(error, ERROR_WORK, "out of memory for a block");
  }
  return record->linear ? 0 : error_set(error, ERROR_WORK, "out of memory for a block");
}

/* ---- times ---- */

/* Medians over the blocks, in seconds. */
struct times {
  double make, write, read, plain_write, plain_read;
  size_t bytes;
};

static int read_plain(const char *path, void *to, size_t count, struct error *error) {
  struct input_file file = {.fd = -1};
  if (!input_open(&file, path, NULL, error)) input_read(&file, 0, count, to, error);
  input_close(&file);
  return error->code;
}

/* One block: made, written, read; its bytes written and read as they are. */
static int time_block(const struct arguments *a, struct store *store, struct block_record *record, double seconds[5], size_t *length,
                      struct error *error) {
  struct block_image image = {0};
  struct block_record back = {0};
  char *path = path_join(a->folder, "plain", error);
  double at[6] = {now()};
  if (!path || block_image_make(&image, record, store_info(store), a->folder, error)) goto end;
  at[1] = now();
  if (store_write_block(store, &image, error)) goto end;
  at[2] = now();
  if (store_read_block(store, record->index, &back, error)) goto end;
  at[3] = now();
  if (file_write(path, image.bytes, image.length, error)) goto end;
  at[4] = now();
  if (read_plain(path, image.bytes, image.length, error)) goto end;
  at[5] = now();
  for (int i = 0; i < 5; i++) seconds[i] = at[i + 1] - at[i];
  *length = image.length;
end:
  if (path) unlink(path); /* the next one is a new file, as each block's is */
  block_record_free(&back);
  block_image_free(&image);
  free(path);
  return error->code;
}

static int time_blocks(const struct arguments *a, struct store *store, struct block_record *record, struct times *times,
                       struct error *error) {
  double *seconds = calloc(5 * (size_t)a->repeats, sizeof *seconds);
  if (!seconds) return error_set(error, ERROR_WORK, "out of memory");
  for (int i = 0; i < a->repeats && !error->code; i++) {
    double of_block[5] = {0};
    record->index = i;
    if (time_block(a, store, record, of_block, &times->bytes, error)) break;
    for (int what = 0; what < 5; what++) seconds[what * a->repeats + i] = of_block[what];
  }
  double *fields[5] = {&times->make, &times->write, &times->read, &times->plain_write, &times->plain_read};
  for (int what = 0; what < 5; what++) *fields[what] = median(seconds + (size_t)what * (size_t)a->repeats, a->repeats);
  free(seconds);
  return error->code;
}

static int run(const struct arguments *a, int bits, struct error *error) {
  struct store_info info = {.model_type = "llama", .recipe = "{}", .model_config = "{}", .blocks = a->repeats};
  struct block_record record = {0};
  struct store *store = NULL;
  struct times times = {0};
  char name[16];
  snprintf(name, sizeof name, "w%d", bits);
  char *folder = path_join(a->folder, name, error);
  if (!folder || record_make(&record, a, bits, error) || store_create(folder, &info, &store, error)) goto end;
  if (time_blocks(a, store, &record, &times, error)) goto end;
  double megabytes = (double)times.bytes / 1e6;
  printf("{\"bits\": %d, \"mb\": %.2f, \"make_mb_s\": %.0f, \"write_mb_s\": %.0f, \"limit_write_mb_s\": %.0f, \"read_mb_s\": %.0f, "
         "\"limit_read_mb_s\": %.0f}\n",
         bits, megabytes, megabytes / times.make, megabytes / times.write, megabytes / times.plain_write, megabytes / times.read,
         megabytes / times.plain_read);
end:
  store_close(store, error);
  block_record_free(&record);
  free(folder);
  return error->code;
}

int main(int argc, char **argv) {
  struct arguments a = {NULL, 2048, 5632, 128, 5};
  struct error error = {0};
  const struct argp argp = {options, parse, "FOLDER", "Times storing and reading back blocks of 2 to 8 bits in FOLDER.", NULL, NULL, NULL};
  argp_parse(&argp, argc, argv, 0, NULL, &a);
  for (int bits = 2; bits <= 8 && !error.code; bits++) run(&a, bits, &error);
  if (error.code) fprintf(stderr, "store: %s\n", error.message);
  return error.code;
}
