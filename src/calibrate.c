/* calibrate.c: the main job, from top to bottom: open, embed, and for each block: stream, target, and for each recipe: learn, store. */
#include "calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "clock.h"
#include "feed.h"
#include "learn.h"
#include "record.h"
#include "writer.h"

/* What a block's calibration tells rank 0, beside the block itself. */
struct result {
  struct outcome outcome;
  double seconds;
  size_t bytes; /* of the block's file */
};

/* One recipe of the pass. */
struct job {
  const struct recipe *recipe;
  const char *output;
  int team;               /* that calibrates it */
  struct learner learner; /* that team's */

  /* rank 0, and the first rank of the team until rank 0 has it */
  struct result result;
  struct block_image image;

  /* rank 0 */
  struct store *store;
  struct writer *writer;
  int64_t skipped_steps;
  int untrained_experts;
};

/* Where there are more ranks than `batch` can use and several recipes, the ranks form teams that calibrate different recipes side by side. A
 * team is all there is to a learner: it holds every sample, and sums over its ranks alone. */
struct run {
  struct world *world;
  struct world team; /* this rank's */
  int teams, team_number;
  const struct calibrate_options *options;
  const struct recipe *recipe; /* the first job's: for what all agree in */
  int first, end;              /* blocks [first, end) are quantized */
  struct job *jobs;
  int count;

  /* rank 0 */
  struct checkpoint *checkpoint;
  struct tokens *tokens;
  int64_t *start; /* [samples] first token of each */
  struct progress *progress;

  /* every rank */
  struct model model;
  struct kernels *k;
  struct shard shard;
  struct block block;
  struct let_statistics statistics;
  struct target target;
  struct stream *stream;
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

static int make_store(struct job *job, const struct store_info *of_run, struct error *error) {
  struct store_info info = *of_run;
  char *recipe = recipe_json(job->recipe);
  info.recipe = recipe;
  if (!recipe)
    error_set(error, ERROR_WORK, "out of memory for the recipe");
  else if (!store_create(job->output, &info, &job->store, error))
    writer_open(job->store, &job->writer, error);
  free(recipe);
  return error->code;
}

static int make_stores(struct run *run, struct error *error) {
  struct store_info info = {.model_config = checkpoint_config(run->checkpoint), .blocks = run->model.blocks};
  snprintf(info.model_type, sizeof info.model_type, "%s", run->model.model_type);
  if (tokens_sha256(run->tokens, info.tokens_sha256, error)) return error->code;
  for (int i = 0; i < run->count && !error->code; i++) make_store(&run->jobs[i], &info, error);
  return error->code;
}

static int open_files(struct run *run, struct error *error) {
  const struct calibrate_options *options = run->options;
  if (checkpoint_open(options->model, &run->model, &run->checkpoint, error)) return error->code;
  if (options->first_block >= run->model.blocks || options->end_block > run->model.blocks)
    return error_set(error, ERROR_INPUT, "--blocks %d:%d: the model has blocks 0 to %d", options->first_block, options->end_block,
                     run->model.blocks - 1);
  if (model_check_seqlen(&run->model, run->recipe->seqlen, options->model, error)) return error->code;
  if (tokens_open(options->tokens, &run->tokens, error)) return error->code;
  return choose_samples(run, error) || check_tokens(run, error) ? error->code : make_stores(run, error);
}

/* ---- every rank: teams and memory ---- */

static bool is_mine(const struct run *run, const struct job *job) {
  return job->team == run->team_number;
}

/* As many teams as find a recipe and leave each enough ranks for a batch: a power of two, so that sums are taken in the same tree. */
static void form_teams(struct run *run) {
  int size = run->world->size, batch = run->recipe->batch;
  run->teams = 1;
  while (2 * run->teams <= run->count && size % (2 * run->teams) == 0 && size / (2 * run->teams) >= batch) run->teams *= 2;
  run->team_number = world_join_team(run->world, run->teams, &run->team);
  for (int i = 0; i < run->count; i++) run->jobs[i].team = i % run->teams;
}

static size_t image_bytes(const void *context, int item) {
  (void)item;
  return ((const struct run *)context)->model.image_bytes;
}

static int read_image(void *context, int item, void *image, struct error *error) {
  struct run *run = context;
  return checkpoint_read_block(run->checkpoint, &run->model, item, image, error);
}

static size_t stream_bytes(const struct run *run) {
  return (size_t)run->shard.count * (size_t)run->recipe->seqlen * (size_t)run->model.hidden * run->k->element_bytes;
}

static int open_job(struct run *run, struct job *job, struct error *error) {
  job->learner = (struct learner){.recipe = job->recipe,
                                  .world = &run->team,
                                  .k = run->k,
                                  .block = &run->block,
                                  .shard = &run->shard,
                                  .target = &run->target,
                                  .stream = run->stream,
                                  .progress = run->progress};
  return learner_init(&job->learner, error);
}

/* The full-precision stream, which all jobs share. */
static int open_target(struct run *run, bool observed, struct error *error) {
  if (observed && let_statistics_init(&run->statistics, &run->model, run->k, error)) return error->code;
  run->target = (struct target){.world = &run->team,
                                .k = run->k,
                                .block = &run->block,
                                .shard = &run->shard,
                                .stream = run->stream,
                                .statistics = observed ? &run->statistics : NULL,
                                .x = run->k->allocate(run->k, stream_bytes(run))};
  if (!run->target.x)
    return error_set(error, ERROR_WORK, "rank %d: out of memory on %s for %d samples (%zu bytes); lower --samples or use more ranks",
                     run->world->rank, run->k->name, run->shard.count, stream_bytes(run));
  return target_init(&run->target, error);
}

static int open_work(struct run *run, struct error *error) {
  struct stream_source source = {0, run->end, image_bytes, read_image, run};
  struct block_use use = {.tokens = run->recipe->seqlen, .effective = true, .trained = true};
  bool observed = false;
  for (int i = 0; i < run->count; i++) {
    const struct recipe *recipe = run->jobs[i].recipe;
    if (!is_mine(run, &run->jobs[i])) continue;
    use.quantized_inputs = use.quantized_inputs || recipe->activations.abits < 16 || recipe_kv_bits(&recipe->activations) < 16;
    observed = observed || recipe->let;
  }
  if (stream_open(run->world, &source, &run->stream, error))
    return error->code; /* first: it is collective, and what follows may fail on one rank alone */
  run->k = kernels_open(run->options->backend, world_threads(run->world, run->options->threads), error);
  if (!run->k) return error->code;
  shard_init(&run->shard, run->recipe->samples, run->recipe->batch, run->team.rank, run->team.size);
  if (block_init(&run->block, &run->model, run->k, &use, error)) return error->code;
  if (open_target(run, observed, error)) return error->code;
  for (int i = 0; i < run->count && !error->code; i++)
    if (is_mine(run, &run->jobs[i])) open_job(run, &run->jobs[i], error);
  return error->code;
}

/* The rank of a team that owns a sample. */
struct dealing {
  const struct shard *shard;
  int first; /* rank of the team */
};

static int sample_owner(const void *context, int sample) {
  const struct dealing *dealing = context;
  return dealing->first + shard_owner(dealing->shard, sample);
}

/* Every team gets all samples. */
static int embed(struct run *run, struct error *error) {
  for (int team = 0; team < run->teams; team++) {
    struct dealing dealing = {&run->shard, team * run->team.size};
    struct feed feed = {run->world,           run->k,     &run->model,  run->tokens, run->checkpoint, run->recipe->seqlen,
                        run->recipe->samples, run->start, sample_owner, &dealing};
    if (feed_embed(&feed, run->target.x, NULL, error)) return error->code;
  }
  for (int i = 0; i < run->count; i++)
    if (is_mine(run, &run->jobs[i])) run->k->copy(run->k, run->jobs[i].learner.x_q, run->target.x, stream_bytes(run));
  return 0;
}

/* ---- the loop ---- */

/* The last name of a path. */
static const char *base_of(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

static void report(struct run *run, const struct job *job, int index, const struct outcome *outcome) {
  char text[200];
  int length = 0;
  if (run->count > 1) length = snprintf(text, sizeof text, "%.60s  ", base_of(job->output));
  if (isnan(outcome->loss[KEPT_END]))
    length += snprintf(text + length, sizeof text - (size_t)length, "rtn %.6g", outcome->loss[KEPT_RTN]);
  else
    length += snprintf(text + length, sizeof text - (size_t)length, "rtn %.6g  start %.6g  end %.6g  kept %s", outcome->loss[KEPT_RTN],
                       outcome->loss[KEPT_START], outcome->loss[KEPT_END], record_kept_name(outcome->kept));
  if (outcome->untrained_experts > 0) snprintf(text + length, sizeof text - (size_t)length, "  %d experts rtn", outcome->untrained_experts);
  progress_block(run->progress, (index - run->first) * run->count + (int)(job - run->jobs), text);
}

/* The block's file, on the team's first rank. */
static int pack_block(struct job *job, int index, struct error *error) {
  struct block_record record = {0};
  if (job->learner.world->rank > 0) return 0;
  if (!record_block(&record, &job->learner, index, &job->result.outcome, job->result.seconds, error))
    block_image_make(&job->image, &record, job->output, error);
  job->result.bytes = job->image.length;
  block_record_free(&record);
  return error->code;
}

/* On rank 0: told, counted, and handed to the writer. */
static int take_result(struct run *run, struct job *job, int index, struct error *error) {
  job->skipped_steps += job->result.outcome.skipped;
  job->untrained_experts += job->result.outcome.untrained_experts;
  report(run, job, index, &job->result.outcome);
  return writer_submit(job->writer, &job->image, error);
}

/* Another team's result comes to rank 0. */
static int fetch_result(struct run *run, struct job *job, int index, struct error *error) {
  int leader = job->team * run->team.size;
  if (run->world->rank == leader) {
    world_send(run->world, &job->result, sizeof job->result, 0);
    world_send(run->world, job->image.bytes, job->result.bytes, 0);
    block_image_free(&job->image);
  }
  if (run->world->rank > 0) return 0;
  world_receive(run->world, &job->result, sizeof job->result, leader);
  job->image = (struct block_image){index, malloc(job->result.bytes), job->result.bytes};
  if (!job->image.bytes) { /* the other rank is sending */
    error_set(error, ERROR_WORK, "out of memory for a block of %s (%zu bytes)", job->output, job->result.bytes);
    world_abort(run->world, error);
  }
  world_receive(run->world, job->image.bytes, job->result.bytes, leader);
  return take_result(run, job, index, error);
}

static int calibrate_job(struct run *run, struct job *job, int index, double shared_seconds, struct error *error) {
  double begin = now();
  learner_run(&job->learner, (index - run->first) * run->count + (int)(job - run->jobs), &job->result.outcome, error);
  job->result.seconds = shared_seconds + now() - begin;
  if (!error->code) pack_block(job, index, error);
  if (run->world->rank == 0 && !error->code) take_result(run, job, index, error);
  return world_agree(&run->team, error);
}

/* This team's recipes, and then rank 0 has all. */
static int calibrate_jobs(struct run *run, int index, double shared_seconds, struct error *error) {
  for (int i = 0; i < run->count && !error->code; i++)
    if (is_mine(run, &run->jobs[i])) calibrate_job(run, &run->jobs[i], index, shared_seconds, error);
  if (run->teams == 1 || world_agree(run->world, error)) return error->code;
  for (int i = 0; i < run->count; i++)
    if (run->jobs[i].team > 0) fetch_result(run, &run->jobs[i], index, error);
  return world_agree(run->world, error);
}

static int calibrate_block(struct run *run, int index, struct error *error) {
  double begin = now();
  const void *image;
  stream_next(run->stream, &image, error);
  if (world_agree(run->world, error)) return error->code;
  block_load(&run->block, image);
  stream_release(run->stream);
  target_pass(&run->target);
  if (index >= run->first) return calibrate_jobs(run, index, now() - begin, error);
  for (int i = 0; i < run->count; i++)
    if (is_mine(run, &run->jobs[i])) learner_pass(&run->jobs[i].learner);
  return 0;
}

static double bits_per_weight(const struct run *run, const struct recipe *recipe) {
  double bits = 0, weights = 0;
  for (int i = 0; i < run->model.linears; i++) {
    struct quantized_shape shape = lwc_shape(&run->model.linear[i], recipe);
    double count = (double)shape.rows * (double)shape.columns;
    bits += count * shape.quantizer.bits + 24.0 * (double)groups_of(&shape); /* fp16 scale, 8-bit zero point */
    weights += count;
  }
  return bits / weights;
}

static void summarize(struct run *run, double seconds) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  double memory = world_max(run->world, (double)usage.ru_maxrss / 1024);
  for (int i = 0; run->world->rank == 0 && i < run->count; i++) {
    const struct job *job = &run->jobs[i];
    printf("%s: %d blocks, %.4g bits a weight, %.1f s, peak memory %.0f MiB a rank, %lld steps skipped", job->output, run->end - run->first,
           bits_per_weight(run, job->recipe), seconds, memory, (long long)job->skipped_steps);
    if (job->untrained_experts > 0) printf(", %d experts without tokens rounded to nearest", job->untrained_experts);
    printf("\n");
  }
}

/* "W4A16g64": bits of weights and activations, and the group. */
static void announce_job(const struct run *run, const struct job *job) {
  const struct recipe *recipe = job->recipe;
  if (run->count > 1) fprintf(stderr, "%s: ", job->output);
  fprintf(stderr, "%s, %d blocks, W%dA%d%s%.0d%s%s, %d ranks x %d threads (%s), %d samples x %d tokens\n", run->model.model_type,
          run->model.blocks, recipe->wbits, recipe->activations.abits, recipe->group_size ? "g" : "", recipe->group_size,
          recipe->lwc ? " LWC" : "", recipe->let ? " LET" : "", run->world->size, run->k->threads, run->k->level, recipe->samples,
          recipe->seqlen);
}

static void announce(const struct run *run) {
  if (run->world->rank != 0) return;
  for (int i = 0; i < run->count; i++) announce_job(run, &run->jobs[i]);
  if (run->teams > 1) fprintf(stderr, "%d teams of %d ranks calibrate different recipes\n", run->teams, run->team.size);
  if (run->team.size > run->recipe->batch)
    fprintf(stderr, "%d ranks share %d samples a step: %d of them have nothing to do; raise --batch\n", run->team.size, run->recipe->batch,
            run->team.size - run->recipe->batch);
}

static void close_writers(struct run *run, struct error *error) {
  for (int i = 0; i < run->count; i++) {
    struct writer *writer = run->jobs[i].writer;
    run->jobs[i].writer = NULL;
    writer_close(writer, error);
  }
}

static int calibrate_all(struct run *run, struct error *error) {
  double begin = now();
  if (run->world->rank == 0) open_files(run, error);
  if (world_agree(run->world, error)) return error->code;
  world_broadcast(run->world, &run->model, sizeof run->model);
  run->first = run->options->first_block;
  run->end = run->options->end_block ? run->options->end_block : run->model.blocks;
  form_teams(run);
  if (run->world->rank == 0) run->progress = progress_open("calibrate", (run->end - run->first) * run->count);
  open_work(run, error);
  if (world_agree(run->world, error)) return error->code;
  announce(run);
  stream_start(run->stream);
  if (embed(run, error)) return error->code;
  for (int index = 0; index < run->end; index++)
    if (calibrate_block(run, index, error)) return error->code;
  close_writers(run, error);
  if (world_agree(run->world, error)) return error->code;
  progress_close(run->progress);
  run->progress = NULL;
  summarize(run, now() - begin);
  return 0;
}

static void run_free(struct run *run, struct error *error) {
  progress_close(run->progress);
  stream_close(run->stream);
  close_writers(run, error);
  for (int i = 0; i < run->count; i++) {
    if (error->code) store_abandon(run->jobs[i].store);
    store_close(run->jobs[i].store, error);
  }
  tokens_close(run->tokens);
  checkpoint_close(run->checkpoint);
  free(run->start);
  for (int i = 0; i < run->count; i++) block_image_free(&run->jobs[i].image);
  world_leave_team(&run->team);
  if (!run->k) return;
  for (int i = 0; i < run->count; i++) learner_free(&run->jobs[i].learner);
  target_free(&run->target);
  let_statistics_free(&run->statistics);
  block_free(&run->block);
  run->k->release(run->k, run->target.x);
  run->k->close(run->k);
}

int calibrate(struct world *world, const struct calibrate_options *options, const struct calibrate_recipe *recipes, int count,
              struct error *error) {
  struct job *jobs = calloc((size_t)count, sizeof *jobs);
  struct run run = {.world = world,
                    .team = {.communicator = MPI_COMM_NULL},
                    .options = options,
                    .recipe = &recipes->recipe,
                    .jobs = jobs,
                    .count = count};
  if (!jobs) error_set(error, ERROR_WORK, "out of memory for %d recipes", count);
  for (int i = 0; jobs && i < count; i++) jobs[i] = (struct job){.recipe = &recipes[i].recipe, .output = recipes[i].output};
  if (world_agree(world, error) == 0) {
    calibrate_all(&run, error);
    run_free(&run, error);
  }
  free(jobs);
  return world_agree(world, error);
}
