/* block.h: one transformer block of any family on one rank: its weights, one sample's activations, forward and backward.
 *
 *     n1 = norm(x);   q, k, v = linear(n1);  a = attention(rope(q), rope(k), v);  h = x + linear_o(a)
 *     n2 = norm(h);   y = h + mlp(n2),  mlp(n) = linear_down(silu(linear_gate(n)) * linear_up(n)),  or linear_down(activation(linear_up(n)))
 *
 * parallel: n2 = norm(x), or n1 where there is one norm.  post_norm: n1 = x, n2 = h, and h and y are the norms of these sums.
 * Experts: mlp(n) is the sum over each token's experts of their MLPs, weighted by the router. */
#ifndef OMNIQUANT_BLOCK_H
#define OMNIQUANT_BLOCK_H

#include "kernels.h"
#include "model.h"
#include "recipe.h"
#include "shared.h"

enum {
  BLOCK_MOST_BUFFERS = 64,
  BLOCK_PANEL = 1 << 24, /* elements of a weight whose gradient is there at a time */
  BLOCK_PANEL_STEP = 64  /* its rows are a multiple, so that it begins where products like it */
};

/* Rows [first, first + count) of a weight. */
struct row_range {
  int64_t first, count;
};

struct block {
  const struct model *model;
  struct kernels *k;
  int tokens;                            /* T of every sample */
  int64_t rows;                          /* rows that the MLPs compute: T, or T * experts_per_token */
  struct activation_quantizer quantizer; /* of activations where BLOCK_QUANTIZED; may be changed between samples */

  data *weights;   /* all tensors of the block in full precision, at their element_offset */
  data *effective; /* those that are quantized, as the quantized block uses them, at the same place; may be `weights` itself */
  data *folded;    /* the others, scaled and shifted: norms, biases, router; NULL where `effective` is `weights` */
  data *tensor[2][MODEL_MAX_TENSORS];     /* each in full precision and effective */
  struct shared of_weights, of_effective; /* who else has them: what block_use says */

  float *cosine, *sine; /* [T, D/2]; NULL without rotary positions */

  /* What forward leaves for backward. A name with _hat is the quantized copy that linear layers and attention read, there only for a
   * block that may quantize activations. */
  data *n1, *n1_hat;               /* [T, hidden] */
  data *q, *key, *v;               /* [T, heads * D], [T, kv_heads * D]; q and key after head norm and rope */
  data *q_hat, *key_hat, *v_hat;   /* the same */
  data *q_raw, *key_raw;           /* before the head norm, in families that have one, else NULL */
  data *a, *a_hat;                 /* [T, heads * D] attention's output */
  float *logsum;                   /* [heads, T] */
  data *sum1, *sum2;               /* [T, hidden] before their norms, in families that normalize sums, else NULL */
  data *h, *n2, *n2_hat;           /* [T, hidden] */
  data *gate, *up, *act, *act_hat; /* [rows, ffn]; no gate where the activation is plain */

  /* Experts; NULL or 0 for a dense MLP. */
  data *logits;           /* [T, experts] */
  struct routing routing; /* device */
  int32_t *offset;        /* [experts + 1] routing.offset on the host */
  int64_t *expert_tokens; /* [experts] tokens that quantized forward passes have sent to each; the caller clears it */
  data *expert_in;        /* [rows, hidden] */
  data *expert_out;       /* [rows, hidden] */

  /* Gradients; NULL unless trained. dw serves some rows of one weight at a time, dvector one norm or bias. */
  data *dw, *dq, *dk, *dv, *da, *dsum, *dh, *dn1, *dn2, *dgate, *dup;
  int64_t panel; /* elements of dw; may be lowered between samples */
  float *dvector, *dbias;
  data *dlogits, *dexpert_in, *dexpert_out;
  float *dshare; /* [T, top] of the experts' weights */

  void *owned[BLOCK_MOST_BUFFERS]; /* all device memory above, to be released */
  int owned_count;
};

/* Which weights forward and backward use, and whether activations are quantized. */
enum block_weights { BLOCK_FULL, BLOCK_QUANTIZED };

/* Receives gradients as soon as backward has them. */
struct gradient_sink {
  /* A weight's, some rows at a time, in their order. */
  void (*weight)(void *context, int linear, struct row_range rows, const data *dw /* [rows.count, C_in], valid during the call */);
  /* Norm weights and biases and linear biases; and weight() of the router. NULL: not wanted. */
  void (*vector)(void *context, int tensor, const float *d /* valid during the call */);
  void *context;
};

/* What a block is used for. */
struct block_use {
  int tokens;            /* T of every sample */
  bool effective;        /* effective weights beside the full ones; false: they are the same memory */
  bool quantized_inputs; /* activations may be quantized */
  bool trained;          /* backward will be called */
  /* Memory that ranks have in common for model->elements each, of the caller's; {0}: the block allocates its own. */
  struct shared weights_in, effective_in;
};

/* Allocates. `model`, `k` and memory in common must outlive the block. Errors: ERROR_WORK (memory); block_free even then. */
int block_init(struct block *block, const struct model *model, struct kernels *k, const struct block_use *use, struct error *error);
void block_free(struct block *block);

/* Takes the full-precision tensors out of an image (model.h), of those in common this rank's part; effective ones that are not quantized become the
 * same. Collective over the ranks that have the weights in common, as block_load_stored is over those of the effective ones. */
void block_load(struct block *block, const void *image /* model->image_bytes, memory that k->load takes */);

/* Takes the effective tensors, those that are quantized too, out of an image. */
void block_load_stored(struct block *block, const struct model *wide, /* the block's model with all tensors F32 (model_widen) */
                       const void *image /* wide->image_bytes, likewise */);

/* Makes the effective tensors that are not quantized (norms, biases, router) the full-precision ones again. */
void block_restore(struct block *block);

/* A tensor in full precision or as the quantized block uses it; NULL for ABSENT. */
data *block_tensor(const struct block *block, enum block_weights which, int tensor);

/* The rows that a linear layer read in the latest forward, not quantized: [*rows, C_in]; an expert's are those of its tokens. */
const data *block_input(const struct block *block, int linear, int64_t *rows);

/* y = block(x), both [T, hidden]; y may be x when no backward follows. */
void block_forward(struct block *block, enum block_weights which, data *y, const data *x);

/* After block_forward of the same x and weights: hands gradients to the sink (an expert's without tokens are zero and left out) and, unless
 * dx is NULL, assigns the input's. */
void block_backward(struct block *block, enum block_weights which, data *dx, /* [T, hidden] or NULL */
                    const data *dy, const data *x, const struct gradient_sink *sink);

/* The same in two parts, the first of which gives all gradients of the MLP's linear weights; nothing else is asked of the block between them. */
void block_backward_mlp(struct block *block, enum block_weights which, bool wanted, /* whether dx will be */
                        const data *dy, const struct gradient_sink *sink);
void block_backward_attention(struct block *block, enum block_weights which, data *dx, const data *x, const struct gradient_sink *sink);

#endif
