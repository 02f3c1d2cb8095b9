/* block.h: one transformer block on one rank: its weights, one sample's activations, forward and backward.
 *
 *     n1 = norm(x);  q, k, v = linear(n1);  a = attention(rope(q), rope(k), v);  h = x + linear_o(a)
 *     n2 = norm(h);  y = h + linear_down(silu(linear_gate(n2)) * linear_up(n2))                                          */
#ifndef OMNIQUANT_BLOCK_H
#define OMNIQUANT_BLOCK_H

#include "kernels.h"
#include "model.h"

struct block {
  const struct model *model;
  struct kernels *k;
  int tokens; /* T of every sample */

  data *weights;   /* all tensors of the block in full precision, at their element_offset */
  data *effective; /* the linear weights as the quantized block uses them, at their linear's element_offset */

  float *cosine, *sine; /* [T, D/2] */

  /* What forward leaves for backward. */
  data *n1, *q, *key, *v; /* q and key after head norm and rope */
  data *q_raw, *key_raw;  /* before the head norm, in families that have one, else NULL */
  data *a;                /* attention's output */
  float *logsum;          /* [heads, T] */
  data *h, *n2, *gate, *up, *act;

  /* Gradients; NULL unless trained. dw serves one weight at a time. */
  data *dw, *dq, *dk, *dv, *da, *dh, *dn, *dgate, *dup;
};

/* Which weights forward and backward use. */
enum block_weights { BLOCK_FULL, BLOCK_QUANTIZED };

/* Receives the gradient of each linear layer's weight as soon as backward has it. */
struct gradient_sink {
  void (*weight)(void *context, enum linear_role role, const data *dw /* [C_out, C_in], valid during the call */);
  void *context;
};

/* Allocates for samples of `tokens` tokens. `model` and `k` must outlive the block. Errors: ERROR_WORK (memory); block_free even then. */
int block_init(struct block *block, const struct model *model, struct kernels *k, int tokens,
               bool quantized, /* whether effective weights are kept */
               bool trained,   /* whether backward will be called */
               struct error *error);
void block_free(struct block *block);

/* Takes the full-precision weights out of an image (model.h). */
void block_load(struct block *block, const void *image /* host memory, model->image_bytes */);

/* A linear layer's weight: full precision, or where the quantizer puts the effective one. */
const data *block_weight(const struct block *block, enum linear_role role, enum block_weights which);
data *block_effective(const struct block *block, enum linear_role role);

/* The activations that a linear layer reads in the latest forward: [T, C_in]. */
const data *block_input_of(const struct block *block, enum linear_role role);

/* y = block(x), both [T, hidden]; y may be x when no backward follows. */
void block_forward(struct block *block, enum block_weights which, data *y, const data *x);

/* After block_forward of the same x and weights: hands every weight's gradient to the sink and, unless dx is NULL, assigns the input's. */
void block_backward(struct block *block, enum block_weights which, data *dx, /* [T, hidden] or NULL */
                    const data *dy, const data *x, const struct gradient_sink *sink);

#endif
