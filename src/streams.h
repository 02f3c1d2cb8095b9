/* streams.h: checkpoints of the two streams of hidden states, so that a resumed run need not replay every stored block: OUT/streams/NNNN holds
 * x_fp and x_q as inputs of block NNNN, one file a rank, a safetensors file with an array for each of the rank's samples: any number of ranks
 * can read it. Files are written by a thread of each rank while the work goes on. */
#ifndef OMNIQUANT_STREAMS_H
#define OMNIQUANT_STREAMS_H

#include "samples.h"
#include "shard.h"
#include "store_info.h"

/* One rank's part of the checkpoints of one run. */
struct streams {
  const char *output; /* folder of the store */
  const struct store_info *info;
  struct kernels *k;
  const struct shard *shard;
  int rank;
  int64_t elements; /* of a sample: T * hidden */

  struct streams_writing *writing; /* NULL: none */
};
/* The caller sets the fields above the blank line; they must outlive the rest. */

/* Takes this rank's samples as they are and begins to write them as inputs of `block`. The checkpoint before must be settled.
 * Errors: ERROR_WORK (memory, threads). */
int streams_save(struct streams *streams, int block, struct samples *x_fp, struct samples *x_q /* [shard->count] each */,
                 struct error *error);

/* Waits until it is written. Errors: ERROR_WORK of writing it. */
int streams_settle(struct streams *streams, struct error *error);

/* Removes all checkpoints but that of one block; ABSENT: all. For one rank of each node, when all ranks have settled. */
void streams_sweep(const struct streams *streams, int block);

/* The last block, `most` at the most, that this rank's samples are there for, by the names in the files; 0 for none. */
int streams_latest(const struct streams *streams, int most);

/* Reads this rank's samples as inputs of `block`, checksums verified. Errors: ERROR_INPUT: missing, damaged, of another run; ERROR_WORK. */
int streams_load(const struct streams *streams, int block, struct samples *x_fp, struct samples *x_q, struct error *error);

#endif
