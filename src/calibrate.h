/* calibrate.h: the main job: from safetensors to stores of quantized blocks (method.md section 4). */
#ifndef OMNIQUANT_CALIBRATE_H
#define OMNIQUANT_CALIBRATE_H

#include <stdbool.h>

#include "error.h"
#include "recipe.h"

struct world;

enum { CALIBRATE_MAX_RECIPES = 16, CALIBRATE_PATH_BYTES = 1024 };

/* One recipe of a pass and the store that it makes. Sent between ranks as bytes. */
struct calibrate_recipe {
  struct recipe recipe;
  char output[CALIBRATE_PATH_BYTES];
};

struct calibrate_options {
  const char *model;     /* checkpoint folder; only rank 0 opens it */
  const char *tokens;    /* token file; only rank 0 opens it */
  const char *output;    /* the store of one recipe, the folder of the stores of several */
  int first_block;       /* blocks [first_block, end_block) are quantized; those before stay full precision and are passed through */
  int end_block;         /* 0: all */
  int stream_checkpoint; /* blocks from one checkpoint of the streams to the next; 0: none */
  bool resume;           /* the store's own recipe where none is given */
  const char *backend;   /* "cpu", "cuda"; of the command line also "auto", which main.c decides */
  int threads;           /* threads a rank; 0: cores of the node over its ranks */
};

/* One pass over the model for all recipes, which agree in their samples, seqlen, sampling, seed and batch. A store that holds the same run
 * already is gone on with. Collective over all ranks. On failure every rank returns the same code and message; ERROR_STOPPED after a signal. */
int calibrate(struct world *world, const struct calibrate_options *options, const struct calibrate_recipe *recipes, /* [count] */
              int count, struct error *error);

#endif
