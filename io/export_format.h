/* export_format.h: what the formats of `omniquant export` share: the tensors of a model as an export meets them, what is asked of it, and a format
 * as a row of functions. A format knows tensors and model folders, nothing of how the codes were found. */
#ifndef OMNIQUANT_EXPORT_FORMAT_H
#define OMNIQUANT_EXPORT_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "export_folder.h"
#include "model.h"
#include "safetensors.h"
#include "store.h"

/* How all quantized layers of a store are quantized. */
struct export_scheme {
  int bits;               /* 2..8 */
  int64_t group_size;     /* input columns a group; 0: the whole row */
  bool symmetric;         /* zero point 2^(bits - 1) */
  int abits;              /* of the inputs of linear layers; 16: not quantized */
  bool token_activations; /* a scale a token */
  int kv_bits;            /* of queries, keys and values; 16: not quantized */
};

enum export_gptq { EXPORT_GPTQ_AUTO, EXPORT_GPTQ_V1, EXPORT_GPTQ_V2 };
enum export_embedding { EXPORT_EMBEDDING_F16, EXPORT_EMBEDDING_Q8_0 };
enum export_dtype { EXPORT_DTYPE_AUTO, EXPORT_FLOAT16, EXPORT_BFLOAT16, EXPORT_FLOAT32 };

/* What is asked for. All is the caller's and outlives the export. */
struct export_job {
  const struct model *model;
  const char *config;       /* the checkpoint's config.json */
  const char *model_folder; /* the checkpoint: its tokenizer files are copied or read */
  const char *name;         /* of the model, for metadata */
  struct export_scheme scheme;
  int64_t shard_bytes;             /* largest safetensors file, but for a single tensor that is larger */
  enum export_gptq gptq;           /* checkpoint_format of gptq */
  enum export_dtype dtype;         /* of dequantized weights; AUTO: the checkpoint's, F16 where that is F32 */
  bool f16_fallback;               /* gguf: F16 for layers that no type of it holds */
  enum export_embedding embedding; /* gguf: type of the embedding and the head, which calibration leaves as they are */
  bool exact;                      /* gguf: only types that round nothing */
  const char *pretokenizer;        /* gguf: tokenizer.ggml.pre; NULL: as tokenizer.json says */
  const char *card;                /* text of README.md */
};

/* A tensor of the model: quantized, changed by what was folded into it, or as in the checkpoint. Of a fused tensor the whole. */
struct export_tensor {
  char name[128];                        /* as in the checkpoint: "model.layers.0.self_attn.q_proj.weight" */
  int block;                             /* ABSENT outside the blocks */
  int index;                             /* of it, or of its first part, in model->tensor; ABSENT outside the blocks */
  int dimensions;                        /* 1 or 2 */
  int64_t shape[2];                      /* row-major */
  const struct quantized_linear *linear; /* the weight of a quantized layer, else NULL; codes are NULL while it is announced */
  bool folded;                           /* a transformation may have changed it: exports keep it in F32 where they can */
  const float *values;                   /* what replaces the checkpoint's, or NULL */
  const struct tensor *source;           /* the checkpoint's, in a type that is read */
};

/* A format. Every tensor is announced, and then, where all fits, written in the same order. Errors: ERROR_INPUT for what the format cannot
 * hold, before `begin`. */
struct export_format {
  const char *name;
  int (*open)(const struct export_job *job, void **state, struct error *error); /* checks what can be checked without tensors */
  int (*announce)(void *state, const struct export_tensor *tensor, struct error *error);
  int (*begin)(void *state, const struct export_folder *folder, struct error *error); /* begins the files */
  int (*write)(void *state, const struct export_tensor *tensor, struct error *error);
  int (*finish)(void *state, struct error *error); /* ends and syncs them */
  void (*close)(void *state);                      /* NULL is allowed */
};

/* The table; ends with a row without a name. */
extern const struct export_format export_formats[];

/* ---- for the formats ---- */

/* A packed code. */
static inline int export_code(const struct quantized_linear *linear, int64_t row, int64_t column) {
  return packed_code(linear->codes + row * packed_row_bytes(linear->in_features, linear->bits), column, linear->bits);
}

static inline int64_t export_groups(const struct quantized_linear *linear) {
  return (linear->in_features + linear->group_size - 1) / linear->group_size;
}

/* Elements [first, first + count) of a tensor that is not quantized, as fp32. */
int export_values(const struct export_tensor *tensor, int64_t first, int64_t count, float *out, struct error *error);

/* "W4A16 g64 asymmetric", "W4A4 per channel, symmetric". */
struct export_text {
  char text[96];
};
struct export_text export_scheme_text(const struct export_scheme *scheme);

#endif
