/* feed.c: rank 0 reads and embeds sample after sample and sends each to its owner. */
#include "feed.h"

#include <stdlib.h>
#include <string.h>

static int read_sample(const struct feed *feed, int sample, int32_t *ids, float *hidden, struct error *error) {
  if (tokens_read(feed->tokens, feed->start[sample], feed->seqlen, feed->model->vocabulary, ids, error)) return error->code;
  return checkpoint_embed(feed->checkpoint, ids, feed->seqlen, hidden, error);
}

int feed_embed(const struct feed *feed, struct samples *x, int32_t *ids, struct error *error) {
  struct world *world = feed->world;
  size_t elements = (size_t)feed->seqlen * (size_t)feed->model->hidden;
  float *hidden = malloc(elements * sizeof *hidden);
  int32_t *sample_ids = malloc((size_t)feed->seqlen * sizeof *sample_ids);
  int own = 0;
  if (!hidden || !sample_ids) error_set(error, ERROR_WORK, "rank %d: out of memory for a sample", world->rank);
  world_agree(world, error);
  for (int sample = 0; sample < feed->samples && !error->code; sample++) {
    int owner = feed->owner(feed->context, sample), code = 0;
    if (world->rank == 0) code = read_sample(feed, sample, sample_ids, hidden, error);
    world_broadcast(world, &code, sizeof code);
    if (code) break;
    if (world->rank == 0 && owner != 0) {
      world_send(world, hidden, elements * sizeof *hidden, owner);
      world_send(world, sample_ids, (size_t)feed->seqlen * sizeof *sample_ids, owner);
    }
    if (world->rank != owner) continue;
    if (owner != 0) {
      world_receive(world, hidden, elements * sizeof *hidden, 0);
      world_receive(world, sample_ids, (size_t)feed->seqlen * sizeof *sample_ids, 0);
    }
    feed->k->load(feed->k, samples_write(x, own), hidden, DTYPE_F32, (int64_t)elements);
    /* NOLINTNEXTLINE(clang-analyzer-core.NonNullParamChecker): world_agree has seen that the memory is there */
    if (ids) memcpy(ids + (size_t)own * (size_t)feed->seqlen, sample_ids, (size_t)feed->seqlen * sizeof *ids);
    own++;
  }
  free(hidden);
  free(sample_ids);
  return world_agree(world, error);
}
