/* calibrate.h: the main job: from safetensors to a store of quantized blocks (method.md section 2). */
#ifndef OMNIQUANT_CALIBRATE_H
#define OMNIQUANT_CALIBRATE_H

#include "error.h"
#include "recipe.h"

struct world;

struct calibrate_options {
  const char *model;   /* checkpoint folder; only rank 0 opens it */
  const char *tokens;  /* token file; only rank 0 opens it */
  const char *output;  /* store to make */
  int first_block;     /* blocks [first_block, end_block) are quantized; those before stay full precision and are passed through */
  int end_block;       /* 0: all */
  const char *backend; /* "cpu" */
  int threads;         /* threads a rank; 0: cores of the node over its ranks */
};

/* Collective over all ranks. On failure every rank returns the same code and message. */
int calibrate(struct world *world, const struct calibrate_options *options, const struct recipe *recipe, struct error *error);

#endif
