/* evaluate.h: perplexity of a model, full precision or from a store (method.md section 5). */
#ifndef OMNIQUANT_EVALUATE_H
#define OMNIQUANT_EVALUATE_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"

struct world;

struct evaluate_options {
  const char *model;     /* checkpoint folder; only rank 0 opens it */
  const char *quantized; /* store, or NULL for full precision */
  const char *tokens;    /* token file; only rank 0 opens it */
  int seqlen;            /* tokens a window */
  int64_t offset;        /* first token of the first window */
  int windows;           /* consecutive windows; 0: as many as the file holds */
  int abits, kv_bits;    /* of activations; 0: as the store's recipe says, 16 without a store */
  bool json;             /* one JSON object on stdout instead of a line */
  const char *backend;   /* "cpu", "cuda"; of the command line also "auto", which main.c decides */
  int threads;           /* threads a rank; 0: cores of the node over its ranks */
};

/* Collective over all ranks; rank 0 prints the result. On failure every rank returns the same code and message. */
int evaluate(struct world *world, const struct evaluate_options *options, struct error *error);

#endif
