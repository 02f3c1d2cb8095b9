/* inspect.c: showing what a store holds, as a table or as JSON. */
#include "inspect.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "printable.h"
#include "store.h"

/* What is shown of one block. */
struct block_summary {
  int index, linears, world_size, untrained_experts;
  double loss_rtn, loss_start, loss_end, seconds;
  char kept[8];
  int64_t skipped_steps;
  int64_t weights;     /* quantized ones */
  int64_t stored_bits; /* codes, scales and zero points that they take */
  char phases[128];    /* comma-separated; empty: no times */
  float *rank_seconds; /* [world_size, phases], owned */
};

struct summary {
  const struct store_info *info;
  json_t *recipe; /* owned */
  int present;
  struct block_summary *block; /* [present], owned */
  bool untrained_experts;      /* in any of them */
  double seconds;              /* of all blocks present */
  int64_t weights, stored_bits;
};

static double bits_a_weight(int64_t stored_bits, int64_t weights) {
  return weights > 0 ? (double)stored_bits / (double)weights : NAN;
}

/* Takes the times out of the record. */
static struct block_summary summarize_block(struct block_record *record) {
  struct block_summary block = {.index = record->index,
                                .linears = record->linears,
                                .world_size = record->world_size,
                                .loss_rtn = record->loss_rtn,
                                .loss_start = record->loss_start,
                                .loss_end = record->loss_end,
                                .seconds = record->seconds,
                                .skipped_steps = record->skipped_steps,
                                .untrained_experts = record->untrained_experts,
                                .rank_seconds = record->timing.values};
  memcpy(block.kept, record->kept, sizeof block.kept);
  memcpy(block.phases, record->phases, sizeof block.phases);
  record->timing.values = NULL;
  for (int i = 0; i < record->linears; i++) {
    const struct quantized_linear *linear = &record->linear[i];
    int64_t groups = (linear->in_features + linear->group_size - 1) / linear->group_size;
    block.weights += linear->out_features * linear->in_features;
    block.stored_bits += linear->out_features * (8 * packed_row_bytes(linear->in_features, linear->bits) + groups * (16 + 8));
  }
  return block;
}

/* Reads all blocks, one in memory at a time. */
static int summarize(struct store *store, const char *folder, struct summary *summary, struct error *error) {
  summary->info = store_info(store);
  summary->recipe = json_loads(summary->info->recipe, 0, NULL);
  if (summary->recipe == NULL) return error_set(error, ERROR_INPUT, "%s: the recipe stored in it is not JSON: it is damaged", folder);
  summary->block = calloc((size_t)summary->info->blocks + 1, sizeof *summary->block);
  if (summary->block == NULL) return error_set(error, ERROR_WORK, "%s: no memory for %d blocks", folder, summary->info->blocks);
  for (int i = 0; i < summary->info->blocks; i++) {
    struct block_record record = {0};
    if (!store_has_block(store, i)) continue;
    if (store_read_block(store, i, &record, error)) return error->code;
    struct block_summary block = summarize_block(&record);
    block_record_free(&record);
    summary->block[summary->present++] = block;
    summary->untrained_experts = summary->untrained_experts || block.untrained_experts > 0;
    summary->seconds += block.seconds;
    summary->weights += block.weights;
    summary->stored_bits += block.stored_bits;
  }
  return 0;
}

/* ---- times ---- */

enum { MOST_PHASES = 64 };

struct phase_names {
  int count;
  char text[128];
  const char *name[MOST_PHASES]; /* in text */
};

static struct phase_names *split_phases(struct phase_names *names, const char *phases) {
  char *rest = names->text;
  *names = (struct phase_names){0};
  snprintf(names->text, sizeof names->text, "%s", phases);
  while (rest && names->count < MOST_PHASES) names->name[names->count++] = strsep(&rest, ",");
  return names;
}

/* All but waiting: for a block, and in collectives for the other ranks. */
static bool is_work(const char *phase) {
  return strcmp(phase, "wait") != 0 && strcmp(phase, "ranks") != 0;
}

/* JSON has no NaN: what was not measured is null. */
static json_t *real_or_null(double value) {
  return isfinite(value) ? json_real(value) : json_null();
}

/* {"phases": [name], "seconds": [[of a rank in each]]}; null without times. */
static json_t *times_json(const struct block_summary *block) {
  struct phase_names names;
  if (!block->rank_seconds) return json_null();
  json_t *phases = json_array(), *seconds = json_array();
  split_phases(&names, block->phases);
  for (int p = 0; p < names.count; p++) json_array_append_new(phases, json_string(names.name[p]));
  for (int rank = 0; rank < block->world_size; rank++) {
    json_t *row = json_array();
    for (int p = 0; p < names.count; p++) json_array_append_new(row, json_real((double)block->rank_seconds[rank * names.count + p]));
    json_array_append_new(seconds, row);
  }
  return json_pack("{s:o, s:o}", "phases", phases, "seconds", seconds);
}

static json_t *block_json(const struct block_summary *block) {
  return json_pack("{s:i, s:o, s:o, s:o, s:s, s:I, s:i, s:o, s:o, s:i, s:i, s:o}", "index", block->index, "loss_rtn",
                   real_or_null(block->loss_rtn), "loss_start", real_or_null(block->loss_start), "loss_end", real_or_null(block->loss_end),
                   "kept", block->kept, "skipped_steps", (json_int_t)block->skipped_steps, "untrained_experts", block->untrained_experts,
                   "bits_a_weight", real_or_null(bits_a_weight(block->stored_bits, block->weights)), "seconds",
                   real_or_null(block->seconds), "linears", block->linears, "world_size", block->world_size, "timing", times_json(block));
}

static int print_json(const struct summary *summary, struct error *error) {
  json_t *blocks = json_array();
  for (int i = 0; i < summary->present; i++)
    if (json_array_append_new(blocks, block_json(&summary->block[i]))) error_set(error, ERROR_WORK, "no memory for the JSON of a block");
  json_t *object = json_pack("{s:s, s:O, s:s, s:i, s:i, s:I, s:o, s:o, s:o}", "model_type", summary->info->model_type, "recipe",
                             summary->recipe, "tokens_sha256", summary->info->tokens_sha256, "blocks_of_model", summary->info->blocks,
                             "blocks_stored", summary->present, "weights", (json_int_t)summary->weights, "bits_a_weight",
                             real_or_null(bits_a_weight(summary->stored_bits, summary->weights)), "seconds", real_or_null(summary->seconds),
                             "blocks", blocks);
  char *text = object != NULL && error->code == 0 ? json_dumps(object, JSON_REAL_PRECISION(9)) : NULL;
  if (text != NULL)
    puts(text);
  else
    error_set(error, ERROR_WORK, "no memory for the JSON of %d blocks", summary->present);
  free(text);
  json_decref(object);
  return error->code;
}

/* "wbits 3  group_size 64  ...", broken into lines under its heading. */
static void print_recipe(json_t *recipe) {
  const char *key, *separator = "";
  json_t *value;
  size_t column = (size_t)printf("recipe  ");
  json_object_foreach(recipe, key, value) {
    char *text = json_is_string(value) ? strdup(json_string_value(value)) : json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(9));
    if (text == NULL) continue;
    if (column + strlen(key) + strlen(text) + 3 > 80) {
      column = 0;
      separator = "\n        ";
    }
    column += (size_t)printf("%s%s %s", separator, printable(key).text, printable(text).text);
    separator = "  ";
    free(text);
  }
  putchar('\n');
}

/* A number in a column, "-" for one that was not measured. */
static void print_number(int width, const char *format, double value) {
  char text[32] = "-";
  if (isfinite(value)) snprintf(text, sizeof text, format, value);
  printf("%*s", width, text);
}

/* The rank that has worked longest, over all blocks with these phases. */
static int slowest_rank(const struct summary *summary, const struct phase_names *names, const char *phases, double *work) {
  int slowest = 0, ranks = 1;
  *work = 0;
  for (int rank = 0; rank < ranks; rank++) {
    double seconds = 0;
    for (const struct block_summary *block = summary->block; block < summary->block + summary->present; block++) {
      if (!block->rank_seconds || strcmp(block->phases, phases) != 0) continue;
      if (block->world_size > ranks) ranks = block->world_size;
      for (int p = 0; p < names->count && rank < block->world_size; p++)
        if (is_work(names->name[p])) seconds += (double)block->rank_seconds[rank * names->count + p];
    }
    if (seconds > *work) slowest = rank, *work = seconds;
  }
  return slowest;
}

/* Mean, least and most seconds of a block's ranks in a phase, added to the totals of the blocks. */
static void add_phase(const struct block_summary *block, const struct phase_names *names, int phase, double total[3]) {
  double sum = 0, least = INFINITY, most = 0;
  for (int rank = 0; rank < block->world_size; rank++) {
    double seconds = (double)block->rank_seconds[rank * names->count + phase];
    sum += seconds;
    least = fmin(least, seconds);
    most = fmax(most, seconds);
  }
  total[0] += sum / block->world_size;
  total[1] += least;
  total[2] += most;
}

/* Where the time went, of all blocks whose phases are those of the first that has any. */
static void print_times(const struct summary *summary) {
  static const char *const rows[] = {"mean of ranks", "least", "most"};
  const struct block_summary *first = summary->block, *end = summary->block + summary->present;
  struct phase_names names;
  double total[MOST_PHASES][3] = {{0}}, work;
  while (first < end && !first->rank_seconds) first++;
  if (first == end) return;
  split_phases(&names, first->phases);
  for (const struct block_summary *block = first; block < end; block++)
    for (int p = 0; p < names.count && block->rank_seconds && strcmp(block->phases, first->phases) == 0; p++)
      add_phase(block, &names, p, total[p]);
  printf("\nseconds      ");
  for (int p = 0; p < names.count; p++) printf(" %9s", names.name[p]);
  for (int row = 0; row < 3; row++) {
    printf("\n%-13s", rows[row]);
    for (int p = 0; p < names.count; p++) printf(" %9.1f", total[p][row]);
  }
  int rank = slowest_rank(summary, &names, first->phases, &work);
  printf("\nrank %d has worked longest, %.1f s without waiting\n", rank, work);
}

static void print_table(const struct summary *summary) {
  printf("model   %s, %d blocks\n", printable(summary->info->model_type).text, summary->info->blocks);
  print_recipe(summary->recipe);
  printf("tokens  %s%s\n\n", *summary->info->tokens_sha256 ? "SHA-256 " : "none", summary->info->tokens_sha256);
  printf("block   loss rtn loss start   loss end  kept  skipped  %sbits a weight  seconds\n",
         summary->untrained_experts ? "untrained experts  " : "");
  for (int i = 0; i < summary->present; i++) {
    const struct block_summary *block = &summary->block[i];
    printf("%5d", block->index);
    print_number(11, "%.5g", block->loss_rtn);
    print_number(11, "%.5g", block->loss_start);
    print_number(11, "%.5g", block->loss_end);
    printf("  %-5s %7lld", block->kept, (long long)block->skipped_steps);
    if (summary->untrained_experts) printf("%19d", block->untrained_experts);
    print_number(15, "%.4f", bits_a_weight(block->stored_bits, block->weights));
    print_number(9, "%.1f", block->seconds);
    putchar('\n');
  }
  printf("\n%d of %d blocks", summary->present, summary->info->blocks);
  if (summary->present > 0)
    printf(", %lld weights of %.4f bits, %.1f s", (long long)summary->weights, bits_a_weight(summary->stored_bits, summary->weights),
           summary->seconds);
  putchar('\n');
  print_times(summary);
}

int inspect(const char *folder, bool json, struct error *error) {
  struct store *store;
  struct summary summary = {0};
  if (store_open(folder, &store, error)) return error->code;
  if (summarize(store, folder, &summary, error) == 0) {
    if (json)
      print_json(&summary, error);
    else
      print_table(&summary);
  }
  for (int i = 0; i < summary.present; i++) free(summary.block[i].rank_seconds);
  free(summary.block);
  json_decref(summary.recipe);
  store_close(store, error);
  return error->code;
}
