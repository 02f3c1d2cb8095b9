/* resume.c: what is there, and going on from it. */
#include "resume.h"

#include <stdio.h>
#include <stdlib.h>

#include "dequantize.h"

/* ---- what is stored ---- */

/* Reads one block for its checksums and for what the summary counts. */
static bool block_is_whole(struct job *job, int index, struct error *error) {
  struct block_record record;
  if (store_read_block(job->store, index, &record, error)) return false;
  job->skipped_steps += record.skipped_steps;
  job->untrained_experts += record.untrained_experts;
  block_record_free(&record);
  return true;
}

static int find_stored(struct run *run, struct job *job, struct error *error) {
  job->stored = run->first;
  while (job->stored < run->end && store_has_block(job->store, job->stored)) {
    struct error damage = {0};
    if (!block_is_whole(job, job->stored, &damage)) {
      if (damage.code == ERROR_WORK) return error_set(error, damage.code, "%s", damage.message);
      fprintf(stderr, "%s; block %d is calibrated again\n", damage.message, job->stored);
      break;
    }
    job->stored++;
  }
  if (job->stored > run->first)
    fprintf(stderr, "%s: blocks %d to %d of %d are stored, %s\n", job->output, run->first, job->stored - 1, run->model.blocks,
            job->stored < run->end ? "the run goes on behind them" : "nothing is left to do");
  return 0;
}

int resume_find(struct run *run, struct error *error) {
  for (int i = 0; i < run->count; i++)
    if (find_stored(run, &run->jobs[i], error)) break;
  return error->code;
}

/* ---- the schedule ---- */

int resume_schedule(struct run *run, struct error *error) {
  run->item = calloc((size_t)run->end * (size_t)(1 + run->count), sizeof *run->item);
  if (!run->item) return error_set(error, ERROR_WORK, "out of memory for %d blocks", run->end);
  for (int block = 0; block < run->end; block++) {
    run->item[run->items++] = (struct stream_item){block, ABSENT};
    for (int i = 0; i < run->count; i++)
      if (block >= run->first && block < run->jobs[i].stored) run->item[run->items++] = (struct stream_item){block, i};
  }
  return 0;
}

int resume_first_item(const struct run *run, int block) {
  int item = 0;
  while (item < run->items && run->item[item].block < block) item++;
  return item;
}

/* ---- the streams ---- */

/* The first block that any job has not stored. */
static int first_missing(const struct run *run) {
  int block = run->end;
  for (int i = 0; i < run->count; i++)
    if (run->jobs[i].stored < block) block = run->jobs[i].stored;
  return block;
}

/* The least of a number over all ranks. */
static int least(struct run *run, int value) {
  return -(int)world_max(run->world, -(double)value);
}

int resume_streams(struct run *run, struct error *error) {
  for (int most = first_missing(run);;) {
    int block = most;
    for (int i = 0; i < run->count; i++)
      if (is_mine(run, &run->jobs[i])) block = streams_latest(&run->jobs[i].streams, block);
    block = least(run, block);
    if (block <= 0) break;
    struct error damage = {0};
    for (int i = 0; i < run->count && !damage.code; i++)
      if (is_mine(run, &run->jobs[i])) streams_load(&run->jobs[i].streams, block, &run->target.x, &run->jobs[i].learner.x_q, &damage);
    if (least(run, damage.code ? 0 : 1) == 1) {
      run->start = run->streams_at = block;
      break;
    }
    most = block - 1;
  }
  if (run->start > 0 && run->world->rank == 0) fprintf(stderr, "hidden states are read from the checkpoint at block %d\n", run->start);
  return world_agree(run->world, error);
}

int resume_replay(struct run *run, struct job *job, struct error *error) {
  const void *image;
  timing_enter(&run->timing, PHASE_WAIT);
  stream_next(run->stream, &image, error);
  if (world_agree(run->world, error)) return error->code;
  timing_enter(&run->timing, PHASE_MEASURE);
  if (is_mine(run, job)) {
    block_load_stored(&run->block, &run->wide, image);
    learner_replay(&job->learner);
  }
  stream_release(run->stream);
  return 0;
}

/* Whether all ranks' files of the checkpoint before are written; told once by whom it failed. */
static bool all_settled(struct run *run) {
  struct error failure = {0};
  for (int i = 0; i < run->count; i++)
    if (is_mine(run, &run->jobs[i])) streams_settle(&run->jobs[i].streams, &failure);
  if (failure.code) fprintf(stderr, "rank %d: no checkpoint of the streams: %s\n", run->world->rank, failure.message);
  return least(run, failure.code ? 0 : 1) == 1;
}

static void sweep(struct run *run, int block) {
  for (int i = 0; i < run->count && run->world->local_rank == 0; i++) streams_sweep(&run->jobs[i].streams, block);
}

int resume_save(struct run *run, int block, struct error *error) {
  if (all_settled(run)) sweep(run, run->streams_at);
  if (world_agree(run->world, error)) return error->code; /* nobody writes before everybody has swept */
  run->streams_at = block;
  for (int i = 0; i < run->count; i++) {
    struct job *job = &run->jobs[i];
    struct error failure = {0};
    if (is_mine(run, job) && run->shard.count > 0 && streams_save(&job->streams, block, &run->target.x, &job->learner.x_q, &failure))
      fprintf(stderr, "rank %d: no checkpoint of the streams: %s\n", run->world->rank, failure.message);
  }
  return world_agree(run->world, error);
}

void resume_forget(struct run *run) {
  all_settled(run);
  sweep(run, ABSENT);
}
