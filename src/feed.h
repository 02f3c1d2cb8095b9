/* feed.h: token samples to embedded hidden states on the ranks that own them. Rank 0 alone reads tokens and embeddings. */
#ifndef OMNIQUANT_FEED_H
#define OMNIQUANT_FEED_H

#include "checkpoint.h"
#include "samples.h"
#include "tokens.h"
#include "world.h"

/* Which samples go where. */
struct feed {
  struct world *world;
  struct kernels *k;
  const struct model *model;
  struct tokens *tokens;         /* rank 0, else NULL */
  struct checkpoint *checkpoint; /* rank 0, else NULL */
  int seqlen;                    /* T */
  int samples;
  const int64_t *start;                          /* [samples] first token of each, rank 0 */
  int (*owner)(const void *context, int sample); /* rank that owns a sample */
  const void *context;
};

/* Embeds every sample and leaves those of this rank, in their order, in x. Collective.
 * Errors are agreed: every rank returns the same. */
int feed_embed(const struct feed *feed, struct samples *x, /* [own samples] */
               int32_t *ids,                               /* [own samples, T], host memory, or NULL */
               struct error *error);

#endif
