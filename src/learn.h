/* learn.h: block-wise error minimization (method.md section 4) for one recipe: finds the clipping factors and the equivalent transformation
 * of one block over this rank's samples. */
#ifndef OMNIQUANT_LEARN_H
#define OMNIQUANT_LEARN_H

#include "let.h"
#include "lwc.h"
#include "progress.h"
#include "target.h"
#include "timing.h"

enum kept { KEPT_RTN, KEPT_START, KEPT_END };

/* What became of a block. */
struct outcome {
  double loss
      [3]; /* mean over all samples with the weights as stored: rounded to nearest, with the first and the last parameters; NaN: not measured */
  enum kept kept;        /* the best of the three: the block's effective tensors are quantized with it */
  int skipped;           /* steps whose loss or gradient was not finite */
  int untrained_experts; /* experts that saw no token in training and are rounded to nearest */
};

/* What a block is quantized with, device memory. */
struct learned {
  const float *factor; /* [2 * lwc->groups] clipping factors; NULL: 1 */
  const float *let;    /* [let->count] scales and shifts; NULL: none */
};

/* One sample in both streams, [T, hidden] each, device memory. */
struct sample {
  data *x;         /* what the quantized block reads */
  data *target;    /* what it is to give */
  data *augmented; /* of aug_loss: what it is to give as well; else NULL */
};

/* A sample's work in a step, or its parts: up to the gradients of the MLP's factors, and the rest. */
enum sample_part { SAMPLE_WHOLE, SAMPLE_BEGINNING, SAMPLE_REST };

/* What a device has noted of a sample's work (kernels.h, repeat): one for each place where a gradient goes, each weight it has, and each part. */
struct recording {
  float *out; /* NULL: none yet */
  float weight;
  enum sample_part part;
  void *made;
};
/* Of a whole step and of a last, shorter one: 32 levels of the sum over samples, and the last sample's two parts. */
enum { LEARNER_MOST_RECORDINGS = 70 };

/* Losses on their way to the host. From a device with a memory of its own an epoch's come beside the next epoch, on the lane of even or of odd ones. */
struct loss_log {
  struct lane *lane[2]; /* NULL: they are read at the epoch's end */
  float *at;            /* [epochs * steps], host */
};

struct learner {
  const struct recipe *recipe;
  struct world *world;
  struct kernels *k;
  struct block *block;
  const struct shard *shard;
  struct target *target;     /* what the block's output is to be; computed before learner_run */
  struct stream *stream;     /* polled during the work; may be NULL */
  struct progress *progress; /* NULL on ranks that do not report */
  struct timing *timing;     /* told of each phase; may be NULL */

  struct lwc lwc;
  struct let let;
  struct samples x_q;       /* this rank's samples, each [T, hidden]: output of the quantized blocks before */
  struct samples next;      /* the same after this block */
  struct samples augmented; /* of aug_loss: the full-precision block's output on x_q */
  int64_t count;            /* learnable parameters: 2 * lwc.groups, then let.count */
  data *y, *dy;             /* [T, hidden] */
  struct sample copy;       /* of the sample in work, where the device repeats */
  struct recording recording[LEARNER_MOST_RECORDINGS];
  void *quantizing;  /* the same of quantizing the weights */
  float *gradient;   /* [count + 1]: of factors (parameters after a step), then of LET's parameters, then the loss */
  float *scratch;    /* for sums over samples */
  struct lane *sums; /* where the MLP's factors' gradients are summed over ranks, beside attention's backward; or NULL */
  float *m, *v;      /* [count]: AdamW's moments */
  float *start;      /* [count]: factors and LET's parameters before training */
  int64_t importance_at[MODEL_MAX_LINEARS]; /* of each layer's inputs in `importance` */
  int64_t importances;
  float *importance;  /* column sums of squares of what linear layers read, and as much for one step */
  float *step_loss;   /* [epochs * steps], device */
  float *sample_loss; /* [shard.count], device */
  struct loss_log log;
  float *losses;            /* host, [samples] and as many for scratch */
  struct step_state *state; /* device */
  float *epoch_loss;        /* [epochs], host: mean training loss of each epoch of the latest block */
};

/* The caller sets the fields above the blank line; they must outlive the learner. Errors: ERROR_WORK (memory), ERROR_INPUT for a recipe that
 * the model cannot follow; learner_free even then. */
int learner_init(struct learner *learner, struct error *error);

/* Places the samples, when all else is allocated. Errors: ERROR_WORK (memory). */
int learner_place(struct learner *learner, struct error *error);
void learner_free(struct learner *learner);

/* Learns one loaded block, whose target is there: its effective tensors become the best quantization found, and x_q their output. A run that
 * is to stop (world_stopping) leaves it unfinished. Collective. Errors: this rank's own: agree on them, before anything is made of the block. */
int learner_run(struct learner *learner, int index, struct outcome *outcome, struct error *error);

/* What the latest block was quantized with. */
struct learned learner_result(const struct learner *learner, const struct outcome *outcome);

/* The pieces of training, which learner_run puts together: the first parameters; a fresh optimizer; and one step of it: weights quantized
 * with the parameters, forward and backward of the step's samples, gradients summed over the ranks, parameters moved. Collective. */
void learner_start(struct learner *learner);
void learner_begin(struct learner *learner);
void learner_step(struct learner *learner, int step, int steps /* of the whole training */);

/* After block_forward with the parameters in training: their gradient for one sample; at once, or in two parts of which the first makes the MLP's
 * factors' gradients, the first lwc.early of all. */
void learner_backward(struct learner *learner, enum sample_part part, float *gradient, /* [count], device: as `gradient` below; assigned */
                      const data *dy, const data *x /* [T, hidden] */);

/* The block's effective tensors, quantized with these parameters. */
void learner_quantize(struct learner *learner, struct learned with, bool at_rest);

/* x_q through the block in full precision, and through the block as it is stored (block_load_stored), without learning. */
void learner_pass(struct learner *learner);
void learner_replay(struct learner *learner);

#endif
