/* rehearsal.h: one rank's calibration of one block, run over a traced backend: without one behind it, to know the work and the memory of a model that is
 * not there; with one, on random weights, to know how long each operation takes. */
#ifndef OMNIQUANT_REHEARSAL_H
#define OMNIQUANT_REHEARSAL_H

#include "error.h"
#include "model.h"
#include "recipe.h"
#include "trace.h"

/* What was done, on the rank that has the most samples. Sums over ranks are not in it. */
struct rehearsal {
  struct trace block;           /* the whole block, from loading it to packing its codes; of the grid search the rank's share */
  struct trace step;            /* one step of training; all zero where nothing is trained */
  struct trace sample, forward; /* one sample's part of a step; one forward pass of it without training */
  struct trace rest;            /* of the sample's part of a step, that beside which the early gradients are summed over ranks on devices */
  size_t allocated;             /* bytes of device memory */
  size_t block_allocated;       /* of it for the block itself */
  size_t gradient_allocated;    /* of that for a weight's gradient, some rows at a time */
  size_t record_allocated;      /* of `allocated` for what is stored of the block, on one rank of a team alone */
  int64_t learnables;           /* parameters */
  int64_t early;                /* of them those with early gradients */
  int samples;                  /* of the rank */
  int steps;                    /* of the block */
};

/* Errors: ERROR_WORK (memory, device), ERROR_INPUT for a recipe that the model cannot follow. */
int rehearse(struct rehearsal *rehearsal, const struct model *model, const struct recipe *recipe, int ranks /* of the run */,
             size_t element_bytes,   /* of the backend's data */
             struct kernels *behind, /* computes, on random weights and samples; NULL: nothing is computed */
             struct error *error);

#endif
