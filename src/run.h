/* run.h: the nouns of a calibration, which its story (calibrate.c) and its taking up again (resume.c) share. */
#ifndef OMNIQUANT_RUN_H
#define OMNIQUANT_RUN_H

#include "calibrate.h"
#include "checkpoint.h"
#include "learn.h"
#include "record.h"
#include "streams.h"
#include "tokens.h"
#include "writer.h"

/* What a block's calibration tells rank 0, beside the block itself. */
struct result {
  struct outcome outcome;
  size_t bytes; /* of the block's file */
};

/* One recipe of the pass. */
struct job {
  const struct recipe *recipe;
  const char *output;
  struct store_info info;  /* of its store, on every rank */
  int stored;              /* blocks [run->first, stored) are in the store already */
  int team;                /* that calibrates it */
  struct learner learner;  /* that team's */
  struct streams streams;  /* that team's */
  struct timing timing;    /* of the block at work; that team's */
  float *rank_seconds;     /* for timing_gather; that team's */
  struct record_room room; /* the team's first rank's */

  /* rank 0, and the first rank of the team until rank 0 has it */
  struct result result;
  struct block_record record; /* on rank 0, which makes the file beside the next block's work, */
  struct block_image image;   /* or the file itself, as other ranks send it */

  /* rank 0 */
  struct store *store;
  struct writer *writer;
  int64_t skipped_steps;
  int untrained_experts;
};

/* An item of the block stream: a block's tensors as they are in the checkpoint, or as a job has stored them. */
struct stream_item {
  int block, job; /* ABSENT: the checkpoint's */
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
  int start;                   /* the first block that is looked at: those before are in a checkpoint of the streams */
  int streams_at;              /* block of the latest such checkpoint; ABSENT */
  struct job *jobs;
  int count;

  /* rank 0 */
  struct checkpoint *checkpoint;
  struct tokens *tokens;
  int64_t *sample_start; /* [samples] first token of each */
  struct progress *progress;

  /* every rank */
  struct model model;
  struct model wide; /* the same with all tensors in F32: how a stored block is sent */
  struct kernels *k;
  struct shard shard;
  struct shared weights, effective; /* of the block, as the ranks of a node, and of this team, have them in common */
  struct block block;
  struct let_statistics statistics;
  struct target target;
  struct stream_item *item; /* [items] */
  int items;
  struct stream *stream;
  struct timing timing; /* of what the block's jobs share */
};

static inline bool is_mine(const struct run *run, const struct job *job) {
  return job->team == run->team_number;
}

#endif
