/* rehearsal.c: what calibrate.c does for a block, on one rank without the others, and what the trace notes of it. */
#include "rehearsal.h"

#include <stdlib.h>

#include "rank.h"

struct rehearsed {
  struct rank rank;
  struct trace trace; /* of rank.k */
};

/* The rows noted since the latest call, and what was allocated in it. */
static struct trace take(struct rehearsed *r) {
  struct trace taken = r->trace;
  r->trace = (struct trace){0};
  return taken;
}

static void add_rows(struct trace *to, const struct trace *from) {
  for (int i = 0; i < TRACE_COUNT; i++) {
    to->row[i].calls += from->row[i].calls;
    to->row[i].flops += from->row[i].flops;
    to->row[i].bytes += from->row[i].bytes;
    to->row[i].seconds += from->row[i].seconds;
  }
}

/* ---- the block ---- */

/* All that is done to a block; its rows are noted. */
static int block(struct rank *rank, struct error *error) {
  struct outcome outcome;
  block_load(&rank->block, rank->image ? (const void *)rank->image : rank->target.x.all /* an address that nobody reads */);
  target_pass(&rank->target, true);
  if (learner_run(&rank->learner, 0, &outcome, error)) return error->code;
  record_pack(&rank->room, &rank->learner, learner_result(&rank->learner, &outcome));
  return record_wait(&rank->room, error);
}

static int run(struct rehearsed *r, int ranks, struct rehearsal *rehearsal, struct error *error) {
  struct rank *rank = &r->rank;
  struct learner *l = &rank->learner;
  struct trace_row *search = &rehearsal->block.row[TRACE_clip_search];
  rehearsal->samples = rank->shard.count;
  rehearsal->steps = l->recipe->epochs * rank->shard.steps;
  rehearsal->learnables = l->count;
  rehearsal->early = l->recipe->lwc ? l->lwc.early : 0;
  rehearsal->allocated = r->trace.allocated;
  rehearsal->record_allocated = rank->room.bytes;
  if (rank->image && block(rank, error)) return error->code; /* memory is touched and libraries have made their plans */
  take(r);
  if (block(rank, error)) return error->code;
  rehearsal->block = take(r);
  *search = (struct trace_row){search->calls, search->flops / ranks, search->bytes / ranks, search->seconds / ranks};
  data *x = samples_read(&l->x_q, 0);
  block_forward(&rank->block, BLOCK_QUANTIZED, l->y, x);
  rehearsal->forward = take(r);
  if (rehearsal->steps == 0) return 0;
  learner_step(l, 0, rehearsal->steps);
  rehearsal->step = take(r);
  rank->k->bf16_products = l->recipe->bf16_products;
  block_forward(&rank->block, BLOCK_QUANTIZED, l->y, x);
  rank->k->mse(rank->k, l->gradient, l->dy, l->y, x, (int64_t)l->recipe->seqlen * rank->block.model->hidden, 1, false);
  learner_backward(l, SAMPLE_BEGINNING, l->gradient, l->dy, x);
  rehearsal->sample = take(r);
  learner_backward(l, SAMPLE_REST, l->gradient, l->dy, x);
  rehearsal->rest = take(r);
  add_rows(&rehearsal->sample, &rehearsal->rest);
  return 0;
}

static int open_and_run(struct rehearsed *r, struct kernels *k, const struct model *model, const struct recipe *recipe, int ranks,
                        bool computing, struct rehearsal *rehearsal, struct error *error) {
  if (rank_open_block(&r->rank, model, recipe, k, error)) return error->code;
  rehearsal->block_allocated = r->trace.allocated;
  rehearsal->gradient_allocated = (size_t)r->rank.block.panel * r->rank.k->element_bytes;
  if (rank_open_learner(&r->rank, recipe, ranks, error) || (computing && rank_fill(&r->rank, error))) return error->code;
  return run(r, ranks, rehearsal, error);
}

int rehearse(struct rehearsal *rehearsal, const struct model *model, const struct recipe *recipe, int ranks, size_t element_bytes,
             struct kernels *behind, struct error *error) {
  struct rehearsed *r = calloc(1, sizeof *r);
  struct kernels *k = r ? trace_open(behind, element_bytes, &r->trace) : NULL;
  *rehearsal = (struct rehearsal){0};
  if (!k) {
    free(r);
    return error_set(error, ERROR_WORK, "out of memory for a rehearsal");
  }
  open_and_run(r, k, model, recipe, ranks, behind != NULL, rehearsal, error);
  rank_close(&r->rank);
  k->close(k);
  free(r);
  return error->code;
}
