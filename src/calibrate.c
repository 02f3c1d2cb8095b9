/* calibrate.c: the main job, from top to bottom: open, embed, and for each block: stream, target, and for each recipe: learn, store. */
#include "calibrate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "clock.h"
#include "dequantize.h"
#include "device.h"
#include "feed.h"
#include "file.h"
#include "resume.h"

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
  run->sample_start = calloc((size_t)recipe->samples, sizeof *run->sample_start);
  if (!run->sample_start) return error_set(error, ERROR_WORK, "out of memory for the samples");
  uint64_t state = (uint64_t)recipe->seed;
  for (int i = 0; i < recipe->samples; i++)
    run->sample_start[i] = sequential ? i * T : (int64_t)(next_random(&state) % (uint64_t)(count - T + 1));
  return 0;
}

/* A bad id is found before the output is made. */
static int check_tokens(struct run *run, struct error *error) {
  int32_t *ids = malloc((size_t)run->recipe->seqlen * sizeof *ids);
  if (!ids) return error_set(error, ERROR_WORK, "out of memory for the samples");
  for (int i = 0; i < run->recipe->samples && !error->code; i++)
    tokens_read(run->tokens, run->sample_start[i], run->recipe->seqlen, run->model.vocabulary, ids, error);
  free(ids);
  return error->code;
}

/* What each job's store is to say of its run. */
static int describe_jobs(struct run *run, const char *config, const struct store_info *of_run, struct error *error) {
  for (int i = 0; i < run->count && !error->code; i++) {
    struct store_info *info = &run->jobs[i].info;
    *info = *of_run;
    info->recipe = recipe_json(run->jobs[i].recipe);
    info->model_config = strdup(config);
    if (!info->recipe || !info->model_config) error_set(error, ERROR_WORK, "out of memory for the recipe");
  }
  return error->code;
}

static int describe_run(struct run *run, struct error *error) {
  struct store_info info = {.blocks = run->model.blocks, .first_block = run->options->first_block};
  memcpy(info.model_type, run->model.model_type, sizeof info.model_type);
  if (tokens_sha256(run->tokens, info.tokens_sha256, error) || checkpoint_sha256(run->checkpoint, info.model_sha256, error))
    return error->code;
  return describe_jobs(run, checkpoint_config(run->checkpoint), &info, error);
}

/* Not found out when a night's work is to be written. */
static int check_space(const struct run *run, struct error *error) {
  double need = 0;
  double streams = 2.0 * run->recipe->samples * run->recipe->seqlen * run->model.hidden * (double)sizeof(float);
  for (int i = 0; i < run->count; i++) {
    const struct job *job = &run->jobs[i];
    need += (double)record_bytes(&run->model, job->recipe) * (run->end - job->stored);
    if (run->options->stream_checkpoint) need += 2 * streams; /* the new one is there before the old one goes */
  }
  int64_t free_bytes = folder_free_bytes(run->options->output);
  if (free_bytes < 0 || need <= (double)free_bytes) return 0;
  return error_set(error, ERROR_INPUT,
                   "%s: what is to be stored takes %.4g MiB, and %.4g are free there; make room or choose another --output",
                   run->options->output, need / (1 << 20), (double)free_bytes / (1 << 20));
}

static int make_stores(struct run *run, struct error *error) {
  for (int i = 0; i < run->count && !error->code; i++) {
    struct job *job = &run->jobs[i];
    if (!store_create(job->output, &job->info, &job->store, error)) writer_open(job->store, job->output, run->world, &job->writer, error);
  }
  return error->code || resume_find(run, error) ? error->code : check_space(run, error);
}

static int open_files(struct run *run, struct error *error) {
  const struct calibrate_options *options = run->options;
  if (checkpoint_open(options->model, &run->model, &run->checkpoint, error)) return error->code;
  if (options->first_block >= run->model.blocks || options->end_block > run->model.blocks)
    return error_set(error, ERROR_INPUT, "--blocks %d:%d: the model has blocks 0 to %d", options->first_block, options->end_block,
                     run->model.blocks - 1);
  if (model_check_seqlen(&run->model, run->recipe->seqlen, options->model, error)) return error->code;
  run->first = options->first_block;
  run->end = options->end_block ? options->end_block : run->model.blocks;
  if (tokens_open(options->tokens, &run->tokens, error)) return error->code;
  if (choose_samples(run, error) || check_tokens(run, error)) return error->code;
  return describe_run(run, error) ? error->code : make_stores(run, error);
}

/* What rank 0 has found out, to all. */
static int share_findings(struct run *run, struct error *error) {
  struct store_info info = run->jobs[0].info;
  size_t length = info.model_config ? strlen(info.model_config) + 1 : 0;
  world_broadcast(run->world, &run->model, sizeof run->model);
  world_broadcast(run->world, &info, sizeof info); /* but for its texts */
  world_broadcast(run->world, &length, sizeof length);
  char *config = calloc(length + 1, 1);
  if (!config) error_set(error, ERROR_WORK, "rank %d: out of memory for the model's config.json", run->world->rank);
  if (world_agree(run->world, error) || !config) {
    free(config);
    return error->code;
  }
  if (run->world->rank == 0) memcpy(config, info.model_config, length);
  world_broadcast(run->world, config, length);
  if (run->world->rank > 0) describe_jobs(run, config, &info, error);
  free(config);
  for (int i = 0; i < run->count; i++) world_broadcast(run->world, &run->jobs[i].stored, sizeof run->jobs[i].stored);
  run->first = run->options->first_block;
  run->end = run->options->end_block ? run->options->end_block : run->model.blocks;
  run->wide = run->model;
  model_widen(&run->wide);
  return world_agree(run->world, error);
}

/* ---- every rank: teams and memory ---- */

/* As many teams as find a recipe and leave each enough ranks for a batch: a power of two, so that sums are taken in the same tree. */
static void form_teams(struct run *run) {
  int size = run->world->size, batch = run->recipe->batch;
  run->teams = 1;
  while (2 * run->teams <= run->count && size % (2 * run->teams) == 0 && size / (2 * run->teams) >= batch) run->teams *= 2;
  run->team_number = world_join_team(run->world, run->teams, &run->team);
  for (int i = 0; i < run->count; i++) run->jobs[i].team = i % run->teams;
}

static size_t image_bytes(const void *context, int item) {
  const struct run *run = context;
  return run->item[item].job == ABSENT ? run->model.image_bytes : run->wide.image_bytes;
}

static int read_image(void *context, int item, void *image, struct error *error) {
  struct run *run = context;
  const struct stream_item *what = &run->item[item];
  if (what->job == ABSENT) return checkpoint_read_block(run->checkpoint, &run->model, what->block, image, error);
  const struct job *job = &run->jobs[what->job];
  return dequantize_read_block(job->store, run->checkpoint, &run->wide, what->block, image, job->output, error);
}

static int open_job(struct run *run, struct job *job, struct error *error) {
  job->learner = (struct learner){.recipe = job->recipe,
                                  .world = &run->team,
                                  .k = run->k,
                                  .block = &run->block,
                                  .shard = &run->shard,
                                  .target = &run->target,
                                  .stream = run->stream,
                                  .progress = run->progress,
                                  .timing = &job->timing};
  job->timing = (struct timing){.world = run->world, .team = &run->team};
  job->rank_seconds = calloc(2 * (size_t)run->team.size * PHASES, sizeof *job->rank_seconds);
  if (!job->rank_seconds)
    return error_set(error, ERROR_WORK, "rank %d: out of memory for times of %d ranks", run->world->rank, run->team.size);
  if (learner_init(&job->learner, error)) return error->code;
  return run->team.rank == 0 ? record_room_init(&job->room, &job->learner, error) : 0;
}

static void open_streams(struct run *run) {
  for (int i = 0; i < run->count; i++) {
    struct job *job = &run->jobs[i];
    job->streams = (struct streams){.output = job->output,
                                    .info = &job->info,
                                    .k = run->k,
                                    .shard = &run->shard,
                                    .rank = run->world->rank,
                                    .elements = (int64_t)run->recipe->seqlen * run->model.hidden};
  }
}

/* The full-precision stream, which all jobs share. */
static int open_target(struct run *run, bool observed, struct error *error) {
  if (observed && let_statistics_init(&run->statistics, &run->model, run->k, error)) return error->code;
  run->target = (struct target){.world = &run->team,
                                .k = run->k,
                                .block = &run->block,
                                .shard = &run->shard,
                                .stream = run->stream,
                                .statistics = observed ? &run->statistics : NULL};
  return target_init(&run->target, error);
}

/* Where memory is the host's, the ranks of a node hold one block between them: in full precision all of them, its effective weights each team. */
static void open_shared(struct run *run) {
  size_t bytes = (size_t)run->model.elements * run->k->element_bytes;
  shared_open(&run->weights, run->world, bytes);
  shared_open(&run->effective, &run->team, bytes);
}

/* Sums go over the team's devices, blocks over all ranks': the same ones where there is one team. */
static int open_device(struct run *run, struct error *error) {
  run->k = kernels_open(run->options->backend, world_threads(run->world, run->options->threads), run->world->local_rank, error);
  if (world_agree(run->world, error)) return error->code;
  device_open(&run->team, run->k, error);
  if (world_agree(run->world, error)) return error->code;
  if (run->teams > 1) device_open(run->world, run->k, error);
  return world_agree(run->world, error);
}

static int open_work(struct run *run, struct error *error) {
  struct stream_source source = {run->items, image_bytes, read_image, run};
  struct block_use use = {.tokens = run->recipe->seqlen, .effective = true, .trained = true};
  bool observed = false;
  run->timing = (struct timing){.world = run->world, .team = &run->team};
  for (int i = 0; i < run->count; i++) {
    const struct recipe *recipe = run->jobs[i].recipe;
    if (!is_mine(run, &run->jobs[i])) continue;
    use.quantized_inputs = use.quantized_inputs || recipe->activations.abits < 16 || recipe_kv_bits(&recipe->activations) < 16;
    observed = observed || recipe->let;
  }
  const struct stream_link *link = device_stream_link(run->teams > 1 ? run->world : &run->team);
  stream_open(run->world, run->k, link, &source, &run->stream, error);
  if (world_agree(run->world, error)) return error->code;
  if (!run->k->owns) open_shared(run); /* collective; what follows may fail on one rank alone */
  shard_init(&run->shard, run->recipe->samples, run->recipe->batch, run->team.rank, run->team.size);
  open_streams(run);
  use.weights_in = run->weights;
  use.effective_in = run->effective;
  if (block_init(&run->block, &run->model, run->k, &use, error)) return error->code;
  if (open_target(run, observed, error)) return error->code;
  for (int i = 0; i < run->count && !error->code; i++)
    if (is_mine(run, &run->jobs[i])) open_job(run, &run->jobs[i], error);
  if (!error->code) samples_place(&run->target.x, error);
  for (int i = 0; i < run->count && !error->code; i++)
    if (is_mine(run, &run->jobs[i])) learner_place(&run->jobs[i].learner, error);
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
    struct feed feed = {
        run->world,        run->k,       &run->model, run->tokens, run->checkpoint, run->recipe->seqlen, run->recipe->samples,
        run->sample_start, sample_owner, &dealing};
    if (feed_embed(&feed, &run->target.x, NULL, error)) return error->code;
  }
  for (int i = 0; i < run->count; i++)
    if (is_mine(run, &run->jobs[i])) samples_copy(&run->jobs[i].learner.x_q, &run->target.x);
  return 0;
}

/* ---- the loop ---- */

/* The last name of a path. */
static const char *base_of(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

/* How many blocks of all jobs are calibrated before this one. */
static int position(const struct run *run, const struct job *job, int index) {
  int count = 0;
  for (const struct job *other = run->jobs; other < run->jobs + run->count; other++)
    if (index > other->stored)
      count += index - other->stored + (other < job);
    else if (index == other->stored)
      count += other < job;
  return count;
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
  progress_block(run->progress, position(run, job, index), text);
}

/* What the block's file is made of, on the team's first rank; with the times of all its ranks, therefore collective over the team. Where it has to be
 * sent to rank 0, the file. */
static int pack_block(const struct run *run, struct job *job, int index, struct error *error) {
  bool first = job->learner.world->rank == 0;
  timing_enter(&job->timing, PHASE_STORE);
  if (first && writer_wait(job->writer, error) == 0)
    record_block(&job->record, &job->room, &job->learner, index, &job->result.outcome, error);
  double seconds = timing_gather(&job->timing, job->rank_seconds);
  if (first && !error->code) record_timing(&job->record, &job->room, job->rank_seconds, seconds);
  if (!first || run->world->rank == 0) return error->code;
  if (!error->code && record_wait(&job->room, error) == 0) block_image_make(&job->image, &job->record, &job->info, job->output, error);
  job->result.bytes = job->image.length;
  block_record_free(&job->record);
  return error->code;
}

/* On rank 0: told, counted, and handed to the writer. */
static int take_result(struct run *run, struct job *job, int index, struct error *error) {
  job->skipped_steps += job->result.outcome.skipped;
  job->untrained_experts += job->result.outcome.untrained_experts;
  report(run, job, index, &job->result.outcome);
  return writer_submit(job->writer, &job->image, &job->record, &job->room, error);
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

static int calibrate_job(struct run *run, struct job *job, int index, struct error *error) {
  timing_go_on(&job->timing, &run->timing, PHASE_TARGET);
  learner_run(&job->learner, position(run, job, index), &job->result.outcome, error);
  if (world_agree(&run->team, error)) return error->code; /* a block that a stop left unfinished goes no further */
  pack_block(run, job, index, error);
  if (run->world->rank == 0 && !error->code) take_result(run, job, index, error);
  world_agree(&run->team, error);
  timing_enter(&job->timing, PHASE_STORE); /* goes on with the next block */
  return error->code;
}

/* This team's recipes, and then rank 0 has all. */
static int calibrate_jobs(struct run *run, int index, struct error *error) {
  for (int i = 0; i < run->count && !error->code; i++)
    if (is_mine(run, &run->jobs[i]) && index >= run->jobs[i].stored) calibrate_job(run, &run->jobs[i], index, error);
  if (run->teams == 1 || world_agree(run->world, error)) return error->code;
  for (int i = 0; i < run->count; i++)
    if (run->jobs[i].team > 0 && index >= run->jobs[i].stored) fetch_result(run, &run->jobs[i], index, error);
  return world_agree(run->world, error);
}

/* Whether any job learns this block: none does before the first block, or where all have it stored. */
static bool is_learned(const struct run *run, int index) {
  bool learned = false;
  for (int i = 0; i < run->count; i++) learned = learned || index >= run->jobs[i].stored;
  return learned;
}

/* Jobs that have this block stored, or want it as it is, only send their stream through it. */
static int pass_jobs(struct run *run, int index, struct error *error) {
  for (int i = 0; i < run->count && !error->code; i++) {
    struct job *job = &run->jobs[i];
    if (index < run->first && is_mine(run, job)) learner_pass(&job->learner);
    if (index >= run->first && index < job->stored) resume_replay(run, job, error);
  }
  return error->code;
}

static int calibrate_block(struct run *run, int index, struct error *error) {
  const void *image;
  timing_begin(&run->timing, PHASE_WAIT);
  stream_next(run->stream, &image, error);
  if (world_agree(run->world, error)) return error->code;
  timing_enter(&run->timing, PHASE_TARGET);
  block_load(&run->block, image);
  stream_release(run->stream);
  target_pass(&run->target, is_learned(run, index));
  timing_enter(&run->timing, PHASE_MEASURE);
  if (pass_jobs(run, index, error)) return error->code;
  if (!is_learned(run, index)) return 0;
  timing_enter(&run->timing, PHASE_MEASURE);
  if (calibrate_jobs(run, index, error)) return error->code;
  int every = run->options->stream_checkpoint;
  return every && (index + 1) % every == 0 && index + 1 < run->end ? resume_save(run, index + 1, error) : 0;
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

static bool lives_on_host(const struct run *run) {
  bool some = run->target.x.host;
  for (int i = 0; i < run->count; i++) {
    const struct learner *l = &run->jobs[i].learner;
    some = some || l->x_q.host || l->next.host || l->augmented.host;
  }
  return some;
}

static void announce(const struct run *run) {
  if (run->world->rank != 0) return;
  for (int i = 0; i < run->count; i++) announce_job(run, &run->jobs[i]);
  if (lives_on_host(run)) fprintf(stderr, "hidden states have no room on the device: they come from pinned host memory beside the work\n");
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

static int blocks_left(const struct run *run) {
  int left = 0;
  for (int i = 0; i < run->count; i++) left += run->end - run->jobs[i].stored;
  return left;
}

/* From the first samples, or from a checkpoint of the streams, to the last block. */
static int calibrate_blocks(struct run *run, struct error *error) {
  form_teams(run);
  if (run->world->rank == 0) run->progress = progress_open("calibrate", blocks_left(run));
  resume_schedule(run, error);
  if (world_agree(run->world, error) || open_device(run, error)) return error->code;
  open_work(run, error);
  if (world_agree(run->world, error)) return error->code;
  announce(run);
  if (resume_streams(run, error)) return error->code;
  stream_start(run->stream, resume_first_item(run, run->start));
  if (run->start == 0 && embed(run, error)) return error->code;
  double replay_begin = now();
  for (int index = run->start; index < run->end; index++) {
    if (index > run->start && is_learned(run, index) && !is_learned(run, index - 1) && run->world->rank == 0)
      fprintf(stderr, "blocks %d to %d passed through in %.1f s\n", run->start, index - 1, now() - replay_begin);
    if (calibrate_block(run, index, error)) return error->code;
  }
  close_writers(run, error);
  if (world_agree(run->world, error)) return error->code;
  progress_close(run->progress);
  run->progress = NULL;
  return 0;
}

static int calibrate_all(struct run *run, struct error *error) {
  double begin = now();
  if (run->world->rank == 0) open_files(run, error);
  if (world_agree(run->world, error) || share_findings(run, error)) return error->code;
  if (blocks_left(run) > 0 && calibrate_blocks(run, error)) return error->code;
  resume_forget(run);
  summarize(run, now() - begin);
  return 0;
}

static void run_free(struct run *run, struct error *error) {
  progress_close(run->progress);
  stream_close(run->stream);
  close_writers(run, error);
  for (int i = 0; i < run->count; i++) {
    struct error ignored = {0};
    streams_settle(&run->jobs[i].streams, &ignored);
    if (error->code && store_abandon(run->jobs[i].store)) streams_sweep(&run->jobs[i].streams, ABSENT);
    store_close(run->jobs[i].store, error);
    store_info_free(&run->jobs[i].info);
  }
  tokens_close(run->tokens);
  checkpoint_close(run->checkpoint);
  free(run->sample_start);
  free(run->item);
  for (int i = 0; i < run->count; i++) {
    block_image_free(&run->jobs[i].image);
    block_record_free(&run->jobs[i].record);
    free(run->jobs[i].rank_seconds);
  }
  device_close(run->world);
  device_close(&run->team);
  world_leave_team(&run->team);
  if (!run->k) return;
  for (int i = 0; i < run->count; i++) {
    record_room_free(&run->jobs[i].room);
    learner_free(&run->jobs[i].learner);
  }
  target_free(&run->target);
  let_statistics_free(&run->statistics);
  block_free(&run->block);
  shared_close(&run->weights);
  shared_close(&run->effective);
  run->k->close(run->k);
}

int calibrate(struct world *world, const struct calibrate_options *options, const struct calibrate_recipe *recipes, int count,
              struct error *error) {
  struct job *jobs = calloc((size_t)count, sizeof *jobs);
  struct run run = {.world = world,
                    .team = {.communicator = MPI_COMM_NULL},
                    .options = options,
                    .recipe = &recipes->recipe,
                    .streams_at = ABSENT,
                    .jobs = jobs,
                    .count = count};
  if (!jobs) error_set(error, ERROR_WORK, "out of memory for %d recipes", count);
  for (int i = 0; jobs && i < count; i++)
    jobs[i] = (struct job){.recipe = &recipes[i].recipe, .output = recipes[i].output, .streams = {.output = recipes[i].output}};
  if (world_agree(world, error) == 0) {
    world_catch_signals(world);
    calibrate_all(&run, error);
    run_free(&run, error);
  }
  free(jobs);
  return world_agree(world, error);
}
