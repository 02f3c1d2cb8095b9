/* calibrate.c: the main job, from top to bottom: open, embed, and for each block: stream, learn, store. */
#include "calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "clock.h"
#include "feed.h"
#include "learn.h"
#include "writer.h"

struct run {
  struct world *world;
  const struct calibrate_options *options;
  const struct recipe *recipe;
  int first, end; /* blocks [first, end) are quantized */

  /* rank 0 */
  struct checkpoint *checkpoint;
  struct tokens *tokens;
  int64_t *start; /* [samples] first token of each */
  struct store *store;
  struct writer *writer;
  struct progress *progress;

  /* every rank */
  struct model model;
  struct kernels *k;
  struct shard shard;
  struct block block;
  struct lwc lwc;
  struct samples samples;
  struct stream *stream;
  struct learner learner;
  int64_t skipped_steps;
};

/* ---- rank 0: input and output ---- */

/* A fixed generator (splitmix64), so that a seed means the same samples everywhere. */
static uint64_t next_random(uint64_t *state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static int choose_samples(struct run *run, struct error *error) {
  const struct recipe *recipe = run->recipe;
  int64_t count = tokens_count(run->tokens), T = recipe->seqlen;
  bool sequential = recipe->sampling == SAMPLING_SEQUENTIAL;
  int64_t needed = sequential ? T * recipe->samples : T;
  if (count < needed)
    return error_set(
        error, ERROR_INPUT, "%s: tokens: %lld are there, but %d %s samples of %d need %lld; give more text or lower --samples or --seqlen",
        run->options->tokens, (long long)count, recipe->samples, sequential ? "sequential" : "random", recipe->seqlen, (long long)needed);
  run->start = calloc((size_t)recipe->samples, sizeof *run->start);
  if (!run->start) return error_set(error, ERROR_WORK, "out of memory for the samples");
  uint64_t state = (uint64_t)recipe->seed;
  for (int i = 0; i < recipe->samples; i++) run->start[i] = sequential ? i * T : (int64_t)(next_random(&state) % (uint64_t)(count - T + 1));
  return 0;
}

/* A bad id is found before the output is made. */
static int check_tokens(struct run *run, struct error *error) {
  int32_t *ids = malloc((size_t)run->recipe->seqlen * sizeof *ids);
  if (!ids) return error_set(error, ERROR_WORK, "out of memory for the samples");
  for (int i = 0; i < run->recipe->samples && !error->code; i++)
    tokens_read(run->tokens, run->start[i], run->recipe->seqlen, run->model.vocabulary, ids, error);
  free(ids);
  return error->code;
}

static int make_store(struct run *run, struct error *error) {
  struct store_info info = {.model_config = checkpoint_config(run->checkpoint), .blocks = run->model.blocks};
  snprintf(info.model_type, sizeof info.model_type, "%s", run->model.model_type);
  if (tokens_sha256(run->tokens, info.tokens_sha256, error)) return error->code;
  char *recipe = recipe_json(run->recipe);
  info.recipe = recipe;
  if (!recipe)
    error_set(error, ERROR_WORK, "out of memory for the recipe");
  else
    store_create(run->options->output, &info, &run->store, error);
  free(recipe);
  return error->code;
}

static int open_files(struct run *run, struct error *error) {
  const struct calibrate_options *options = run->options;
  if (checkpoint_open(options->model, &run->model, &run->checkpoint, error)) return error->code;
  if (options->first_block >= run->model.blocks || options->end_block > run->model.blocks)
    return error_set(error, ERROR_INPUT, "--blocks %d:%d: the model has blocks 0 to %d", options->first_block, options->end_block,
                     run->model.blocks - 1);
  if (tokens_open(options->tokens, &run->tokens, error)) return error->code;
  if (choose_samples(run, error) || check_tokens(run, error)) return error->code;
  if (make_store(run, error)) return error->code;
  return writer_open(run->store, &run->writer, error);
}

/* ---- every rank: memory ---- */

static size_t image_bytes(const void *context, int item) {
  (void)item;
  return ((const struct run *)context)->model.image_bytes;
}

static int read_image(void *context, int item, void *image, struct error *error) {
  struct run *run = context;
  return checkpoint_read_block(run->checkpoint, &run->model, item, image, error);
}

static data *hidden_states(struct run *run, struct error *error) {
  size_t bytes = (size_t)run->shard.count * (size_t)run->recipe->seqlen * (size_t)run->model.hidden * run->k->element_bytes;
  data *memory = run->k->allocate(run->k, bytes);
  if (!memory)
    error_set(error, ERROR_WORK, "rank %d: out of memory on %s for %d samples (%zu bytes); lower --samples or use more ranks",
              run->world->rank, run->k->name, run->shard.count, bytes);
  return memory;
}

static int open_work(struct run *run, struct error *error) {
  const struct recipe *recipe = run->recipe;
  struct stream_source source = {0, run->end, image_bytes, read_image, run};
  run->k = kernels_open(run->options->backend, world_threads(run->world, run->options->threads), error);
  if (!run->k) return error->code;
  shard_init(&run->shard, recipe->samples, recipe->batch, run->world->rank, run->world->size);
  run->samples.x_fp = hidden_states(run, error);
  run->samples.x_q = hidden_states(run, error);
  if (recipe->aug_loss) run->samples.target = hidden_states(run, error);
  if (error->code) return error->code;
  if (block_init(&run->block, &run->model, run->k, recipe->seqlen, true, true, error)) return error->code;
  if (lwc_init(&run->lwc, &run->model, run->k, recipe, error)) return error->code;
  if (stream_open(run->world, &source, &run->stream, error)) return error->code;
  run->learner = (struct learner){.recipe = recipe,
                                  .world = run->world,
                                  .k = run->k,
                                  .block = &run->block,
                                  .lwc = &run->lwc,
                                  .shard = &run->shard,
                                  .samples = &run->samples,
                                  .stream = run->stream,
                                  .progress = run->progress};
  return learner_init(&run->learner, error);
}

static int sample_owner(const void *context, int sample) {
  return shard_owner(context, sample);
}

static int embed(struct run *run, struct error *error) {
  struct feed feed = {run->world,           run->k,     &run->model,  run->tokens, run->checkpoint, run->recipe->seqlen,
                      run->recipe->samples, run->start, sample_owner, &run->shard};
  if (feed_embed(&feed, run->samples.x_fp, NULL, error)) return error->code;
  size_t bytes = (size_t)run->shard.count * (size_t)run->recipe->seqlen * (size_t)run->model.hidden * run->k->element_bytes;
  run->k->copy(run->k, run->samples.x_q, run->samples.x_fp, bytes);
  return 0;
}

/* ---- what is stored ---- */

static void *host_memory(size_t count, size_t size, struct error *error) {
  void *memory = calloc(count ? count : 1, size);
  if (!memory) error_set(error, ERROR_WORK, "out of memory for a block's record");
  return memory;
}

static void *fetched(struct kernels *k, const void *device, size_t bytes, struct error *error) {
  void *host = host_memory(bytes, 1, error);
  if (host) k->download(k, host, device, bytes);
  return host;
}

static int record_linear(struct run *run, int role, const float *factor, struct quantized_linear *record, struct error *error) {
  struct kernels *k = run->k;
  const struct weight_shape *shape = &run->lwc.shape[role];
  size_t groups = (size_t)weight_groups(shape);
  size_t code_bytes = (size_t)(shape->rows * packed_row_bytes(shape->columns, shape->quantizer.bits));
  uint8_t *codes = k->allocate(k, code_bytes), *zero_point = k->allocate(k, groups);
  uint16_t *scale = k->allocate(k, groups * sizeof *scale);
  *record = (struct quantized_linear){.out_features = shape->rows,
                                      .in_features = shape->columns,
                                      .bits = shape->quantizer.bits,
                                      .group_size = shape->quantizer.group_size,
                                      .symmetric = shape->quantizer.symmetric};
  snprintf(record->name, sizeof record->name, "%s", run->model.linear[role].name);
  if (codes && scale && zero_point) {
    const float *hi = factor ? factor + run->lwc.first[role] : NULL, *lo = factor ? hi + run->lwc.groups : NULL;
    k->quantize_codes(k, codes, scale, zero_point, block_weight(&run->block, (enum linear_role)role, BLOCK_FULL), hi, lo, shape);
    record->codes = fetched(k, codes, code_bytes, error);
    record->scale = fetched(k, scale, groups * sizeof *scale, error);
    record->zero_point = fetched(k, zero_point, groups, error);
  } else {
    error_set(error, ERROR_WORK, "out of memory on %s for a block's codes", k->name);
  }
  k->release(k, codes);
  k->release(k, scale);
  k->release(k, zero_point);
  return error->code;
}

/* What calibration learned: the factors' parameters of each layer, and the loss of each epoch. */
static int record_calibration(struct run *run, const float *factor, struct block_record *record, struct error *error) {
  bool sigmoid = run->lwc.sigmoid;
  record->calibration = host_memory(2 * LINEARS + 1, sizeof *record->calibration, error);
  if (!record->calibration) return error->code;
  for (int i = 0; factor && i < 2 * LINEARS; i++) {
    const struct weight_shape *shape = &run->lwc.shape[i / 2];
    struct named_array *array = &record->calibration[record->calibration_arrays++];
    int64_t groups = weight_groups(shape), per_row = weight_groups_per_row(shape);
    const char *names[2][2] = {{"f_hi", "f_lo"}, {"gamma", "beta"}};
    snprintf(array->name, sizeof array->name, "%s/%s", run->model.linear[i / 2].name, names[sigmoid][i % 2]);
    array->dimensions = 2;
    array->shape[0] = shape->rows;
    array->shape[1] = per_row;
    array->values = fetched(run->k, factor + (i % 2) * run->lwc.groups + run->lwc.first[i / 2], (size_t)groups * sizeof(float), error);
    for (int64_t g = 0; array->values && sigmoid && g < groups; g++) array->values[g] = logf(array->values[g] / (1 - array->values[g]));
  }
  if (run->recipe->lwc && run->recipe->epochs > 0) {
    struct named_array *loss = &record->calibration[record->calibration_arrays++];
    snprintf(loss->name, sizeof loss->name, "loss");
    loss->dimensions = 1;
    loss->shape[0] = run->recipe->epochs;
    loss->values = host_memory((size_t)run->recipe->epochs, sizeof(float), error);
    if (loss->values) memcpy(loss->values, run->learner.epoch_loss, (size_t)run->recipe->epochs * sizeof(float));
  }
  return error->code;
}

static const char *const kept_names[] = {"rtn", "start", "end"};

/* Hands the block to rank 0's writer. */
static int store_block(struct run *run, int index, const struct outcome *outcome, double seconds, struct error *error) {
  const float *factor = learner_factors(&run->learner, outcome);
  struct block_record record = {.index = index,
                                .loss_rtn = outcome->loss[KEPT_RTN],
                                .loss_start = outcome->loss[KEPT_START],
                                .loss_end = outcome->loss[KEPT_END],
                                .skipped_steps = outcome->skipped,
                                .seconds = seconds,
                                .world_size = run->world->size,
                                .linears = LINEARS};
  if (!run->writer) return 0;
  snprintf(record.kept, sizeof record.kept, "%s", kept_names[outcome->kept]);
  record.linear = host_memory(LINEARS, sizeof *record.linear, error);
  for (int i = 0; i < LINEARS && !error->code; i++) record_linear(run, i, factor, &record.linear[i], error);
  if (!error->code) record_calibration(run, factor, &record, error);
  if (error->code)
    block_record_free(&record);
  else
    writer_submit(run->writer, &record, error);
  return error->code;
}

/* ---- the loop ---- */

static void report(struct run *run, int index, const struct outcome *outcome) {
  char text[160];
  if (isnan(outcome->loss[KEPT_END]))
    snprintf(text, sizeof text, "rtn %.6g", outcome->loss[KEPT_RTN]);
  else
    snprintf(text, sizeof text, "rtn %.6g  start %.6g  end %.6g  kept %s", outcome->loss[KEPT_RTN], outcome->loss[KEPT_START],
             outcome->loss[KEPT_END], kept_names[outcome->kept]);
  progress_block(run->progress, index - run->first, text);
}

static int calibrate_block(struct run *run, int index, struct error *error) {
  double begin = now();
  const void *image;
  struct outcome outcome;
  stream_next(run->stream, &image, error);
  if (world_agree(run->world, error)) return error->code;
  block_load(&run->block, image);
  stream_release(run->stream);
  if (index < run->first) {
    learner_pass(&run->learner);
    return 0;
  }
  learner_run(&run->learner, index - run->first, &outcome, error);
  if (!error->code) store_block(run, index, &outcome, now() - begin, error);
  if (world_agree(run->world, error)) return error->code;
  run->skipped_steps += outcome.skipped;
  report(run, index, &outcome);
  return 0;
}

static double bits_per_weight(const struct run *run) {
  double bits = 0, weights = 0;
  for (int i = 0; i < LINEARS; i++) {
    const struct weight_shape *shape = &run->lwc.shape[i];
    bits += (double)shape->rows * (double)shape->columns * shape->quantizer.bits +
            24.0 * (double)weight_groups(shape); /* fp16 scale, 8-bit zero point */
    weights += (double)shape->rows * (double)shape->columns;
  }
  return bits / weights;
}

static void summarize(struct run *run, double seconds) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  double memory = world_max(run->world, (double)usage.ru_maxrss / 1024);
  if (run->world->rank != 0) return;
  printf("%s: %d blocks, %.4g bits a weight, %.1f s, peak memory %.0f MiB a rank, %lld steps skipped\n", run->options->output,
         run->end - run->first, bits_per_weight(run), seconds, memory, (long long)run->skipped_steps);
}

static void announce(const struct run *run) {
  const struct recipe *recipe = run->recipe;
  if (run->world->rank != 0) return;
  fprintf(stderr, "%s, %d blocks, W%dA16%s%.0d, %d ranks x %d threads (%s), %d samples x %d tokens\n", run->model.model_type,
          run->model.blocks, recipe->wbits, recipe->group_size ? "g" : "", recipe->group_size, run->world->size, run->k->threads,
          run->k->level, recipe->samples, recipe->seqlen);
  if (run->world->size > recipe->batch)
    fprintf(stderr, "%d ranks share %d samples a step: %d of them have nothing to do; raise --batch\n", run->world->size, recipe->batch,
            run->world->size - recipe->batch);
}

static int calibrate_all(struct run *run, struct error *error) {
  double begin = now();
  if (run->world->rank == 0) open_files(run, error);
  if (world_agree(run->world, error)) return error->code;
  world_broadcast(run->world, &run->model, sizeof run->model);
  run->first = run->options->first_block;
  run->end = run->options->end_block ? run->options->end_block : run->model.blocks;
  if (run->world->rank == 0) run->progress = progress_open("calibrate", run->end - run->first);
  open_work(run, error);
  if (world_agree(run->world, error)) return error->code;
  announce(run);
  stream_start(run->stream);
  if (embed(run, error)) return error->code;
  for (int index = 0; index < run->end; index++)
    if (calibrate_block(run, index, error)) return error->code;
  struct writer *writer = run->writer;
  run->writer = NULL;
  writer_close(writer, error);
  if (world_agree(run->world, error)) return error->code;
  progress_close(run->progress);
  run->progress = NULL;
  summarize(run, now() - begin);
  return 0;
}

static void run_free(struct run *run, struct error *error) {
  progress_close(run->progress);
  stream_close(run->stream);
  writer_close(run->writer, error);
  if (error->code) store_abandon(run->store);
  store_close(run->store, error);
  tokens_close(run->tokens);
  checkpoint_close(run->checkpoint);
  free(run->start);
  if (!run->k) return;
  learner_free(&run->learner);
  lwc_free(&run->lwc);
  block_free(&run->block);
  run->k->release(run->k, run->samples.x_fp);
  run->k->release(run->k, run->samples.x_q);
  run->k->release(run->k, run->samples.target);
  run->k->close(run->k);
}

int calibrate(struct world *world, const struct calibrate_options *options, const struct recipe *recipe, struct error *error) {
  struct run run = {.world = world, .options = options, .recipe = recipe};
  calibrate_all(&run, error);
  run_free(&run, error);
  return world_agree(world, error);
}
