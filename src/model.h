/* model.h: what a checkpoint is: its family's row in the table, its sizes, and where each tensor of a block lies. Plain data without
 * pointers, so that rank 0 can read it and broadcast it. */
#ifndef OMNIQUANT_MODEL_H
#define OMNIQUANT_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "error.h"

/* The linear layers of a block that are quantized, by their part in it. */
enum linear_role { LINEAR_Q, LINEAR_K, LINEAR_V, LINEAR_O, LINEAR_GATE, LINEAR_UP, LINEAR_DOWN, LINEARS };

/* The norms of a block. */
enum norm_role { NORM_ATTENTION, NORM_MLP, NORM_Q, NORM_K, NORMS };

enum { MODEL_MAX_TENSORS = 2 * LINEARS + NORMS, ABSENT = -1 };

/* A tensor of a block. */
struct block_tensor {
  char name[64];    /* in the checkpoint, without the block's prefix: "self_attn.q_proj.weight" */
  enum dtype dtype; /* in the block's image; a checkpoint that mixes types between blocks is widened to F32 */
  int dimensions;   /* 1 or 2 */
  int64_t rows;     /* 1 for vectors */
  int64_t columns;
  size_t image_offset;    /* bytes, multiple of 64 */
  int64_t element_offset; /* elements, multiple of 16, where a device holds all tensors of a block in one array */
};

/* A linear layer of a block. */
struct linear {
  char name[64];          /* "self_attn.q_proj" */
  int weight, bias;       /* index of the tensor, ABSENT for no bias */
  int64_t rows;           /* C_out */
  int64_t columns;        /* C_in */
  int64_t element_offset; /* of its weight where only the linear weights of a block are held, multiple of 16 */
};

/* Rotary position embedding. */
enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };
struct rope_settings {
  enum rope_scaling scaling;
  double theta;
  double factor, low_frequency_factor, high_frequency_factor; /* LINEAR: factor; LLAMA3: all */
  double original_positions;                                  /* LLAMA3 */
};

struct model {
  char model_type[32]; /* as in config.json */
  int blocks;
  int hidden, ffn, heads, kv_heads, head_size;
  int vocabulary;
  int window; /* of attention; 0: unlimited */
  float norm_eps;
  bool tied_embeddings; /* lm_head is the embedding */
  struct rope_settings rope;

  int tensors;
  struct block_tensor tensor[MODEL_MAX_TENSORS];
  struct linear linear[LINEARS];
  int norm[NORMS];         /* index of the norm's weight tensor, or ABSENT */
  size_t image_bytes;      /* of one block's tensors back to back in their dtypes */
  int64_t elements;        /* of one block's tensors back to back */
  int64_t linear_elements; /* of one block's linear weights back to back */
};

/* Names of tensors outside the blocks, and the prefix of block i's. */
struct model_names {
  const char *block_prefix; /* printf format with one %d */
  const char *embedding, *final_norm, *head;
};
const struct model_names *model_names(const struct model *model);

/* Reads a config.json of a known family and lays out its block, with every tensor taken as F32 until checkpoint_open sets its type.
 * Errors: ERROR_INPUT naming the file, the key and the mend. */
int model_parse(struct model *model, const char *text, /* contents of config.json, zero-terminated */
                const char *path,                      /* of the file, for messages */
                struct error *error);

/* Fixes offsets and sizes after dtypes have changed. */
void model_layout(struct model *model);

/* Angles of the rotary embedding: cosine and sine of position * frequency, both [tokens, head_size / 2], host memory of the caller. */
void model_rope_table(const struct model *model, int tokens, float *cosine, float *sine);

#endif
