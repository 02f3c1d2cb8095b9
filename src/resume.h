/* resume.h: taking up a run again: which blocks are stored, and how the two streams come to the first that is not: from a checkpoint of the
 * streams (streams.h), then by replaying stored blocks forward. */
#ifndef OMNIQUANT_RESUME_H
#define OMNIQUANT_RESUME_H

#include "run.h"

/* On rank 0: finds each job's whole blocks, every checksum verified; one that is damaged, and all behind it, are calibrated again, and it is
 * said. Errors: ERROR_WORK (memory). */
int resume_find(struct run *run, struct error *error);

/* Makes the items of the block stream: each block's tensors, and behind them those that the jobs have stored of it and that are replayed.
 * Errors: ERROR_WORK (memory). */
int resume_schedule(struct run *run, struct error *error);

/* The item with which block `block` begins. */
int resume_first_item(const struct run *run, int block);

/* Fills all x_fp and x_q of this rank from the latest checkpoint of the streams that every job has, and sets run->start to its block; 0 without
 * one. Collective. Errors are agreed. */
int resume_streams(struct run *run, struct error *error);

/* The next item of the stream is a stored block of that job: sends its x_q through it. Collective. Errors are agreed. */
int resume_replay(struct run *run, struct job *job, struct error *error);

/* Begins to write a checkpoint of the streams as inputs of `block`; the one before is whole then, and what is older is removed. What fails is
 * told and spoils nothing. Collective. */
int resume_save(struct run *run, int block, struct error *error);

/* Removes the checkpoints of a run that is complete. Collective. */
void resume_forget(struct run *run);

#endif
