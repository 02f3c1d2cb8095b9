/* let.h: Learnable Equivalent Transformation (OmniQuant, arXiv 2308.13137, eq. 3 to 5; method.md section 3) of a block: per channel a scale
 * s and where there are biases a shift delta, moved from activations into the weights around them. What they do to a block is folded into
 * its tensors: a weight becomes w[r, c] * row[r] * column[c] just before it is quantized, norms and biases change in place. */
#ifndef OMNIQUANT_LET_H
#define OMNIQUANT_LET_H

#include "block.h"
#include "recipe.h"
#include "world.h"

/* The places: norm -> the layers that read it, v -> o, q <-> k, up -> down. */
enum let_place { LET_ATTENTION_NORM, LET_MLP_NORM, LET_VALUE, LET_QUERY_KEY, LET_UP, LET_PLACES };

/* How a tensor's channels meet a place: they are multiplied or divided by its s. */
struct let_side {
  int place;     /* ABSENT: not at all */
  int64_t first; /* entry of the place's vectors from which the map counts: an expert's */
  struct channel_map map;
  bool divide;
};

struct let {
  struct kernels *k;
  const struct model *model;
  double alpha;
  int64_t channels[LET_PLACES];             /* 0: the place is not transformed */
  int64_t s[LET_PLACES], delta[LET_PLACES]; /* where its vectors begin in the parameters; delta ABSENT for no shift */
  int64_t scales, count;                    /* parameters: first the `scales` entries of all s, then the deltas; 0: LET is off */
  struct let_side row[MODEL_MAX_LINEARS], column[MODEL_MAX_LINEARS], norm[NORMS];

  float *parameter; /* [count] device memory */

  /* Made by let_fold from the parameters: what each linear layer's weight is multiplied by. */
  bool folded;
  int64_t row_at[MODEL_MAX_LINEARS], column_at[MODEL_MAX_LINEARS]; /* in `expanded`; ABSENT: 1 */
  float *expanded;
  float *start;                                          /* host: scratch of let_start */
  float *drow, *dcolumn, *shift, *plus, *inner, *dinner; /* scratch for the longest vector */
};

/* The statistics that LET starts from (method.md section 3), of the inputs of the layers at each place. Shared by all recipes of a pass. */
struct let_statistics {
  struct kernels *k;
  int64_t at[LET_PLACES], columns[LET_PLACES]; /* of each place in the arrays below */
  int64_t count;
  float *absmax; /* [count] device: over all samples */
  float *middle; /* [count] device: running mean over the samples of (max + min) / 2 */
};

/* Finds the places that this model and recipe have. Errors: ERROR_WORK (memory), ERROR_INPUT for let_up where the activation forbids it;
 * let_free even then. */
int let_init(struct let *let, const struct model *model, struct kernels *k, const struct recipe *recipe, struct error *error);
void let_free(struct let *let);

int let_statistics_init(struct let_statistics *statistics, const struct model *model, struct kernels *k, struct error *error);
void let_statistics_free(struct let_statistics *statistics);

/* Takes in the latest forward of a sample: absmax is raised, middle is assigned this sample's share. */
void let_observe(struct let_statistics *statistics, const struct block *block, float *middle /* [count] */,
                 float weight /* of this sample in the running mean */);

/* The start: s from the statistics and the block's weights, delta the middle. */
void let_start(struct let *let, const struct block *block, const struct let_statistics *statistics);

/* Keeps every s in [1e-2, 1e4], where weights and norms divided by it stay normal numbers of fp16. */
void let_limit(struct let *let);

/* Folds the parameters into the block's effective norms, biases and router, and expands the scales of the weights that are quantized.
 * NULL: none, the block as it is. */
void let_fold(struct let *let, struct block *block, const float *parameter /* [count] or NULL */);

/* The host's part of let_fold, for where a device repeats its work by itself: what let_scales says from now on. */
void let_expect(struct let *let, const float *parameter /* as let_fold's */);

/* What a linear layer's weight is multiplied by since the latest let_fold. */
struct weight_scales let_scales(const struct let *let, int linear);

/* The gradients of the scales of a weight that is not quantized, from that of some of its rows. */
void let_backward_weight(const struct let *let, const struct block *block, int linear, struct row_range rows,
                         const data *dw, /* [rows.count, C_in] */
                         float *drow /* [C_out], entries of `rows` assigned */, float *dcolumn /* [C_in] of these rows alone */);

/* Gradients, added to gradient[count]: from those of a linear layer's scales (not read where let_scales has NULL), and of a folded norm or
 * bias. For the parameters of the latest let_fold. A weight's come by rows, in their order: each time dcolumn of these rows alone, and with the
 * last of them drow of all. */
void let_backward_scales(struct let *let, int linear, struct row_range rows, const float *drow, const float *dcolumn,
                         const float *parameter, float *gradient);
void let_backward_vector(struct let *let, const struct block *block, int tensor, const float *d, const float *parameter, float *gradient);

/* Name of a place as it is stored: "attention_norm". */
const char *let_place_name(enum let_place place);

#endif
