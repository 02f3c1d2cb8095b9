/* lwc.h: Learnable Weight Clipping (OmniQuant, arXiv 2308.13137, eq. 2; method.md sections 1 and 7) of all linear layers of a block:
 * a pair of factors a group shrinks the range that the codes cover. With AdamW they are sigmoid(gamma) and sigmoid(beta); with sign
 * updates they are learned themselves. */
#ifndef OMNIQUANT_LWC_H
#define OMNIQUANT_LWC_H

#include "block.h"
#include "let.h"
#include "recipe.h"
#include "world.h"

struct lwc {
  struct kernels *k;
  struct quantized_shape shape[MODEL_MAX_LINEARS]; /* no rows for layers that are not quantized */
  int64_t first[MODEL_MAX_LINEARS];                /* where each linear layer's factors begin in the arrays below */
  int64_t groups;                                  /* of all linear layers of the block */
  int64_t early;                                   /* the first so many factors are the MLP's, whose gradients backward has first */
  bool sigmoid;                                    /* parameters are gamma and beta; else the factors themselves */
  bool stored_scale;                               /* training uses the scale as it is stored, in fp16 */
  /* Device memory, [2 * groups]: of each layer f_hi (gamma) of its groups, then their f_lo (beta). */
  float *parameter, *factor;
};

/* How a recipe quantizes a layer: no rows for one that is not quantized; a group wider than a row is the row. */
struct quantized_shape lwc_shape(const struct linear *linear, const struct recipe *recipe);

/* Errors: ERROR_WORK (memory); lwc_free even then. */
int lwc_init(struct lwc *lwc, const struct model *model, struct kernels *k, const struct recipe *recipe, struct error *error);
void lwc_free(struct lwc *lwc);

/* The paper's start: gamma = beta = 4; factors of 1 where they are learned themselves. */
void lwc_start(struct lwc *lwc);

/* The start of short runs: the grid search, each rank taking its share of the groups. Of the weights as the latest let_fold scales them.
 * Collective. */
void lwc_search(struct lwc *lwc, const struct block *block, const struct let *let,
                const float *const importance[], /* [linears]; [C_in] each, device memory: sum of squares of the layer's inputs */
                struct world *world);

/* Factors from parameters. */
void lwc_update_factors(struct lwc *lwc);

/* One layer rounded to nearest: its factors in factor[2 * groups] become 1. */
void lwc_round(const struct lwc *lwc, int linear, float *factor);

/* Some rows of a layer's weight as the quantizer takes them. */
struct rows_of_weight {
  struct quantized_shape shape;
  const data *w;
  struct weight_scales scales;
  const float *hi, *lo; /* their factors; NULL: 1 */
  int64_t hi_at, lo_at; /* where these begin in an array of factors */
};

struct rows_of_weight lwc_rows(const struct lwc *lwc, const struct block *block, const struct let *let, int linear, struct row_range rows,
                               const float *factor /* [2 * groups], or NULL: round to nearest */);

/* The block's effective weights = its weights, scaled by the latest let_fold and fake-quantized with these factors. Of weights that ranks have
 * in common each does its part: collective over them, with the same factors. */
void lwc_quantize(const struct lwc *lwc, struct block *block, const struct let *let,
                  const float *factor, /* [2 * groups], or NULL: round to nearest */
                  bool at_rest);       /* with the scale as stored */

/* Of some rows of one layer's weight: their part of gradient[2 * groups] of the factors (NULL: not wanted) and, where let_scales has them, the
 * gradients of their scales and what they add to those of the columns', from that of the effective weight as training quantizes it
 * (lwc_quantize with at_rest = stored_scale). */
void lwc_backward(const struct lwc *lwc, const struct block *block, const struct let *let, int linear, struct row_range rows,
                  const data *dw,      /* [rows.count, C_in] */
                  const float *factor, /* as given to lwc_quantize */
                  float *gradient, float *drow /* [C_out], entries of `rows` assigned */, float *dcolumn /* [C_in] of these rows alone */);

#endif
