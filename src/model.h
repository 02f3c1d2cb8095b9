/* model.h: what a checkpoint is: its family's row in the table, its sizes, how its blocks are put together, and where each tensor of a
 * block lies. Plain data without pointers, so that rank 0 can read it and broadcast it. */
#ifndef OMNIQUANT_MODEL_H
#define OMNIQUANT_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "error.h"
#include "kernels.h"

/* The linear layers of a block by their part in it, which is also their index in struct model. GATE, UP and DOWN are those of the MLP or of
 * expert 0; expert e's follow at linear_of_expert(). */
enum linear_role { LINEAR_Q, LINEAR_K, LINEAR_V, LINEAR_O, LINEAR_ROUTER, LINEAR_GATE, LINEAR_UP, LINEAR_DOWN, ROLES };
enum { ROLES_OF_EXPERT = LINEAR_DOWN - LINEAR_GATE + 1 };

/* The norms of a block. */
enum norm_role { NORM_ATTENTION, NORM_MLP, NORM_Q, NORM_K, NORMS };

enum {
  MODEL_MAX_EXPERTS = 64,
  MODEL_MAX_LINEARS = ROLES + ROLES_OF_EXPERT * (MODEL_MAX_EXPERTS - 1),
  MODEL_MAX_TENSORS = MODEL_MAX_LINEARS + ROLES + 2 * NORMS, /* only a dense MLP has biases */
  ABSENT = -1
};

static inline int linear_of_expert(enum linear_role role, int expert) {
  return (int)role + ROLES_OF_EXPERT * expert;
}

/* The other way: part and expert of the layer with that index. */
static inline enum linear_role role_of_linear(int linear) {
  return (enum linear_role)(linear < ROLES ? linear : LINEAR_GATE + (linear - ROLES) % ROLES_OF_EXPERT);
}
static inline int expert_of_linear(int linear) {
  return linear < ROLES ? 0 : (linear - ROLES) / ROLES_OF_EXPERT + 1;
}

/* Rows of a tensor in the checkpoint that make one of ours: ours' row r is its row r / run * period + first + r % run. Of vectors, entries. */
struct row_map {
  int64_t first, run, period;
  int64_t total; /* of the checkpoint's tensor */
};

static inline int64_t source_row(const struct row_map *map, int64_t row) {
  return row / map->run * map->period + map->first + row % map->run;
}

/* A tensor of a block. */
struct block_tensor {
  char name[64];    /* in the checkpoint, without the block's prefix: "self_attn.q_proj.weight" */
  enum dtype dtype; /* in the block's image; a checkpoint that mixes types between blocks is widened to F32 */
  int dimensions;   /* 1 or 2 */
  int64_t rows;     /* 1 for vectors */
  int64_t columns;
  struct row_map source;  /* the rows that it is of the checkpoint's tensor of that name, which may hold q, k and v in one */
  size_t image_offset;    /* bytes, multiple of 64 */
  int64_t element_offset; /* elements, multiple of 16, where a device holds all tensors of a block in one array */
};

/* A linear layer of a block. */
struct linear {
  char name[64];    /* in the checkpoint: "self_attn.q_proj"; q, k and v may be parts of one */
  int weight, bias; /* index of the tensor; ABSENT for no bias, and for a layer that the family has not */
  int64_t rows;     /* C_out; 0 for a layer that the family has not */
  int64_t columns;  /* C_in */
  bool quantized;   /* false: absent, or the router */
};

/* Rotary position embedding. */
enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };
struct rope_settings {
  enum rope_scaling scaling;
  double theta;                                               /* 0: the family has no rotary embedding */
  double factor, low_frequency_factor, high_frequency_factor; /* LINEAR: factor; LLAMA3: all */
  double original_positions;                                  /* LLAMA3 */
};

struct model {
  char model_type[32]; /* as in config.json */
  int blocks;
  int hidden, ffn, heads, kv_heads, head_size;
  int experts;           /* 0: a dense MLP */
  int experts_per_token; /* 1 for a dense MLP */
  int vocabulary;
  int embedding; /* columns of embedding and head; other than `hidden` where they are projected */
  int positions; /* learned positions, the longest sample; 0: rotary */
  int window;    /* of attention; 0: unlimited */
  enum activation activation;
  float norm_eps;
  bool layer_norm; /* LayerNorm; false: RMSNorm */
  bool parallel;   /* y = x + attention(norm(x)) + mlp(norm(x)); false: the MLP follows attention */
  bool post_norm;  /* each sum is normalized instead of each input */
  bool final_norm;
  bool tied_embeddings; /* the head is the embedding */
  struct rope_settings rope;

  int tensors;
  struct block_tensor tensor[MODEL_MAX_TENSORS];
  int linears; /* ROLES, and three for each expert after the first */
  struct linear linear[MODEL_MAX_LINEARS];
  int norm[NORMS];      /* index of the norm's weight, or ABSENT */
  int norm_bias[NORMS]; /* of its bias, or ABSENT */
  size_t image_bytes;   /* of one block's tensors back to back in their dtypes */
  int64_t elements;     /* of one block's tensors back to back */
};

/* Names of tensors outside the blocks, and the prefix of block i's. NULL for what a family has not. */
struct model_names {
  const char *block_prefix; /* printf format with one %d */
  const char *embedding, *head;
  const char *final_norm, *final_norm_bias;
  const char *positions;                /* [2 + positions, hidden]: the first two rows are for padding */
  const char *project_in, *project_out; /* [hidden, embedding], [embedding, hidden], where these differ */
};
const struct model_names *model_names(const struct model *model);

/* Reads a config.json of a known family and lays out its block, with every tensor taken as F32 until checkpoint_open sets its type.
 * Errors: ERROR_INPUT naming the file, the key and the mend. */
int model_parse(struct model *model, const char *text, /* contents of config.json, zero-terminated */
                const char *path,                      /* of the file, for messages */
                struct error *error);

/* Whether samples of seqlen tokens have positions. ERROR_INPUT; `where`, the model's folder, begins the message. */
int model_check_seqlen(const struct model *model, int seqlen, const char *where, struct error *error);

/* Fixes offsets and sizes after dtypes have changed. */
void model_layout(struct model *model);

/* Takes every tensor as F32. */
void model_widen(struct model *model);

/* MLPs of a block: its experts, or the one of a dense block. */
static inline int model_mlps(const struct model *model) {
  return model->experts ? model->experts : 1;
}

/* Whether a tensor is the weight of a quantized layer. */
bool model_quantizes(const struct model *model, int tensor);

/* The first of the tensors that are parts of the same one in the checkpoint as this: itself, where that is whole. */
int model_first_part(const struct model *model, int tensor);

/* Frequency of the rotary embedding's pair 0 .. head_size / 2 - 1. */
float model_rope_frequency(const struct model *model, int pair);

/* Angles of the rotary embedding: cosine and sine of position * frequency, both [tokens, head_size / 2], host memory of the caller. */
void model_rope_table(const struct model *model, int tokens, float *cosine, float *sine);

#endif
