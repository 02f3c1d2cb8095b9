/* lwc.h: Learnable Weight Clipping (OmniQuant, arXiv 2308.13137, eq. 2; method.md sections 1 and 3) of all linear layers of a block:
 * a pair of factors a group shrinks the range that the codes cover. With AdamW they are sigmoid(gamma) and sigmoid(beta); with sign
 * updates they are learned themselves. */
#ifndef OMNIQUANT_LWC_H
#define OMNIQUANT_LWC_H

#include "block.h"
#include "recipe.h"
#include "world.h"

struct lwc {
  struct kernels *k;
  struct weight_shape shape[LINEARS];
  int64_t first[LINEARS]; /* first group of each linear layer */
  int64_t groups;         /* of all linear layers of the block */
  bool sigmoid;           /* parameters are gamma and beta; else the factors themselves */
  bool stored_scale;      /* training uses the scale as it is stored, in fp16 */
  /* Device memory, [2 * groups]: of all layers f_hi (gamma), then of all f_lo (beta). */
  float *parameter, *factor;
};

/* A group wider than a row is the row. Errors: ERROR_WORK (memory); lwc_free even then. */
int lwc_init(struct lwc *lwc, const struct model *model, struct kernels *k, const struct recipe *recipe, struct error *error);
void lwc_free(struct lwc *lwc);

/* The paper's start: gamma = beta = 4; factors of 1 where they are learned themselves. */
void lwc_start(struct lwc *lwc);

/* The start of short runs: the grid search, each rank taking its share of the groups. Collective. */
void lwc_search(struct lwc *lwc, const struct block *block,
                const float *const importance[LINEARS], /* [C_in] each, device memory: sum of squares of the layer's inputs */
                struct world *world);

/* Factors from parameters. */
void lwc_update_factors(struct lwc *lwc);

/* The block's effective weights = its weights, fake-quantized with these factors. */
void lwc_quantize(const struct lwc *lwc, struct block *block, const float *factor, /* [2 * groups], or NULL: round to nearest */
                  bool at_rest);                                                   /* with the scale as stored */

/* gradient[2 * groups] of the factors: the part of one layer's, from that of its effective weight as training quantizes it
 * (lwc_quantize with at_rest = stored_scale). */
void lwc_backward(const struct lwc *lwc, const struct block *block, enum linear_role role, const data *dw, float *gradient);

#endif
