/* learn.h: block-wise error minimization (method.md section 2): finds the clipping factors of one block over this rank's samples. */
#ifndef OMNIQUANT_LEARN_H
#define OMNIQUANT_LEARN_H

#include "lwc.h"
#include "progress.h"
#include "shard.h"
#include "stream.h"

/* This rank's samples, [shard.count, T, hidden] each, device memory. */
struct samples {
  data *x_fp;   /* input of the full-precision block, and in its place the block's output: the target */
  data *x_q;    /* output of the quantized blocks before */
  data *target; /* of aug_loss: the full-precision block's output on x_q; NULL without */
};

enum kept { KEPT_RTN, KEPT_START, KEPT_END };

/* What became of a block. */
struct outcome {
  double loss
      [3]; /* mean over all samples with the weights as stored: rounded to nearest, with the first and the last factors; NaN: not measured */
  enum kept kept; /* the best of the three: the block's effective weights are quantized with it */
  int skipped;    /* steps whose loss or gradient was not finite */
};

struct learner {
  const struct recipe *recipe;
  struct world *world;
  struct kernels *k;
  struct block *block;
  struct lwc *lwc;
  const struct shard *shard;
  struct samples *samples;
  struct stream *stream;     /* polled during the work; may be NULL */
  struct progress *progress; /* NULL on ranks that do not report */

  data *y, *dy;             /* [T, hidden] */
  float *gradient;          /* [2 * groups + 1]: of the factors, then the loss */
  float *scratch;           /* for sums over samples */
  float *m, *v, *start;     /* [2 * groups]: AdamW's moments; the factors before training */
  float *importance;        /* column sums of squares of the four activations that linear layers read, and as much for one step */
  float *step_loss;         /* [epochs * steps], device */
  float *sample_loss;       /* [shard.count], device */
  float *losses;            /* host, [samples] and as many for scratch */
  struct step_state *state; /* device */
  float *epoch_loss;        /* [epochs], host: mean training loss of each epoch of the latest block */
};

/* The caller sets the fields above the blank line; they must outlive the learner. Errors: ERROR_WORK (memory); learner_free even then. */
int learner_init(struct learner *learner, struct error *error);
void learner_free(struct learner *learner);

/* Learns one loaded block: x_fp becomes its full-precision output, its effective weights the best quantization found, and x_q their output.
 * Afterwards learner_factors() are those of the outcome. Collective. Errors: this rank's own: agree on them. */
int learner_run(struct learner *learner, int index, struct outcome *outcome, struct error *error);

/* Factors that the latest block was quantized with, [2 * groups], device memory; NULL for rounded to nearest. */
const float *learner_factors(const struct learner *learner, const struct outcome *outcome);

/* The pieces of training, which learner_run puts together: a fresh optimizer, and one step of it: weights quantized with the factors,
 * forward and backward of the step's samples, gradients summed over the ranks, factors moved. Collective. */
void learner_begin(struct learner *learner);
void learner_step(struct learner *learner, int step, int steps /* of the whole training */);

/* Both streams through the block in full precision, without learning. */
void learner_pass(struct learner *learner);

#endif
