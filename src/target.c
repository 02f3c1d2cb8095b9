/* target.c: one pass over the samples, in the steps of training, whose sums come out the same however the samples are dealt. */
#include "target.h"

#include <math.h>
#include <string.h>

static const double KEEP = 0.99; /* of the running middle, a sample */

int target_init(struct target *t, struct error *error) {
  if (samples_init(&t->x, t->k, t->shard->count, (int64_t)t->block->tokens * t->block->model->hidden, t->world->rank, error))
    return error->code;
  if (!t->statistics) return 0;
  t->step = t->k->allocate(t->k, (size_t)t->statistics->count * sizeof(float));
  t->scratch = t->k->allocate(t->k, shard_scratch(t->shard, t->statistics->count) * sizeof(float));
  if (!t->step || !t->scratch) return error_set(error, ERROR_WORK, "out of memory on %s for statistics", t->k->name);
  return 0;
}

void target_free(struct target *t) {
  if (t->step) t->k->release(t->k, t->step);
  if (t->scratch) t->k->release(t->k, t->scratch);
  t->step = t->scratch = NULL;
  samples_free(&t->x);
}

static void forward_sample(struct target *t, int local) {
  if (world_stopping(t->world)) return; /* nobody will need it */
  data *x = samples_change(&t->x, local);
  block_forward(t->block, BLOCK_FULL, x, x);
  if (t->stream) stream_poll(t->stream);
}

/* m_0 = middle of sample 0, m_i = KEEP m_{i-1} + (1 - KEEP) middle of sample i: each sample's weight in the last of them. */
static double running_weight(int sample, int samples) {
  return (sample == 0 ? 1 : 1 - KEEP) * pow(KEEP, samples - 1 - sample);
}

static void observed_sample(void *context, int local, float *out) {
  struct target *t = context;
  forward_sample(t, local);
  let_observe(t->statistics, t->block, out, (float)running_weight(shard_sample(t->shard, local), t->shard->samples));
}

void target_pass(struct target *t, bool observed) {
  struct let_statistics *statistics = t->statistics;
  if (!statistics || !observed) {
    for (int i = 0; i < t->shard->count; i++) forward_sample(t, i);
    return;
  }
  struct step_sum sum = {observed_sample, t, t->k, t->world, t->step, t->scratch, .count = statistics->count};
  size_t bytes = (size_t)statistics->count * sizeof(float);
  t->k->clear(t->k, statistics->absmax, bytes);
  t->k->clear(t->k, statistics->middle, bytes);
  for (int i = 0; i < t->shard->steps; i++) {
    shard_step_sum(t->shard, i, &sum);
    t->k->add(t->k, statistics->middle, t->step, statistics->count);
  }
  world_largest(t->world, statistics->absmax, (size_t)statistics->count);
}
