/* recipe.h: what to do: every setting of a calibration, from a YAML file and flags that override it. One table (recipe.c) holds each
 * setting's name, type, default, range and help; YAML keys, command-line flags and the stored JSON all come from it. */
#ifndef OMNIQUANT_RECIPE_H
#define OMNIQUANT_RECIPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "setting.h"

enum sampling { SAMPLING_RANDOM, SAMPLING_SEQUENTIAL };
enum lwc_init { LWC_INIT_PAPER, LWC_INIT_SEARCH }; /* gamma = beta = 4, or the grid search of method.md section 7 */
enum optimizer { OPTIMIZER_ADAMW, OPTIMIZER_SIGN };
enum granularity { GRANULARITY_TOKEN, GRANULARITY_TENSOR, GRANULARITY_GROUP };
enum kv_granularity { KV_HEAD, KV_TOKEN };

/* How activations are quantized, dynamically and asymmetrically (method.md section 2); bits of 16: not at all. */
struct activation_quantizer {
  int abits;                          /* of the inputs of linear layers */
  int kv_bits;                        /* of queries, keys and values as attention reads them; 0: abits */
  enum granularity granularity;       /* a scale a token, a sample, or a group of columns of a token */
  int group_size;                     /* columns a group */
  enum kv_granularity kv_granularity; /* a scale a token and head, or a token */
};

/* Bits of queries, keys and values. */
static inline int recipe_kv_bits(const struct activation_quantizer *activations) {
  return activations->kv_bits ? activations->kv_bits : activations->abits;
}

struct recipe {
  int wbits;      /* 2..8 */
  int group_size; /* input columns a group; 0: per channel (the whole row) */
  bool symmetric; /* false: with zero points */
  struct activation_quantizer activations;
  bool lwc;               /* learn the clipping of weights */
  bool let;               /* learn the equivalent transformation */
  bool let_up;            /* transform between up and down too */
  double alpha;           /* LET's start: how far activations' outliers move into weights */
  double let_lr;          /* AdamW's learning rate of LET at batch 1 */
  bool aug_loss;          /* add the loss against the full-precision block on the quantized input */
  enum lwc_init lwc_init; /* where the clipping factors start */
  enum optimizer optimizer;
  bool stored_scale;      /* train with the scale rounded to fp16 as it is stored; false: in fp32, as the paper's code */
  bool bf16_products;     /* training steps may round inputs of matrix products to bf16 where that is faster */
  int epochs;             /* passes over the samples a block; 0: round to nearest, as without lwc and let */
  int batch;              /* samples a step, over all ranks */
  double lwc_lr;          /* AdamW's learning rate at batch 1 */
  double sign_span;       /* sign updates: the first step's length times the number of steps */
  bool scale_lr;          /* multiply learning rates by batch (AdamW) */
  int samples;            /* calibration samples */
  int seqlen;             /* tokens a sample */
  enum sampling sampling; /* where samples start in the token file */
  int64_t seed;           /* of random sampling */
};

/* The table; *count receives its length. */
const struct setting *recipe_settings(size_t *count);

/* Sets all defaults. */
void recipe_init(struct recipe *recipe);

/* Reads a YAML mapping of settings over what the recipe holds. ERROR_INPUT names file, line, key and mend: no such file, not a mapping,
 * unknown key, key twice, wrong type, out of range. The recipe is of no use then. */
int recipe_load(struct recipe *recipe, const char *path, struct error *error);

/* Sets one setting from text. `origin` starts the message: "configs/x.yaml:3: wbits" or "--wbits". */
int recipe_set(struct recipe *recipe, const struct setting *setting, const char *text, const char *origin, struct error *error);

/* Checks settings against each other (batch > samples and so on). */
int recipe_check(const struct recipe *recipe, struct error *error);

/* Whether two recipes agree in a setting. */
bool recipe_same(const struct recipe *a, const struct recipe *b, const struct setting *setting);

/* Reads the recipe that a store holds: defaults for keys that are missing, since older stores lack them. ERROR_INPUT names `where` and the
 * key: not JSON, an unknown key, a wrong value. */
int recipe_from_json(struct recipe *recipe, const char *text, const char *where, struct error *error);

/* The recipe as JSON text, keys in the table's order; freed by the caller; NULL without memory. */
char *recipe_json(const struct recipe *recipe);

#endif
