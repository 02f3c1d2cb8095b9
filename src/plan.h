/* plan.h: what a calibration will take, before it starts: memory, disk, traffic and time. No weights are read: the program's own code for a block
 * is run over a backend that only notes what is asked of it (trace.h), and a machine's figures (machine.h) make seconds of it. */
#ifndef OMNIQUANT_PLAN_H
#define OMNIQUANT_PLAN_H

#include <stdbool.h>

#include "error.h"
#include "machine.h"
#include "model.h"
#include "recipe.h"

struct plan_options {
  const char *model;    /* folder with config.json, and safetensors or not */
  int ranks;            /* of the run */
  int ranks_a_node;     /* 0: as the machine has */
  int threads;          /* a rank, where a CPU computes */
  const char *gpu;      /* "h100", "h200", "a100" or a file of a machine's figures; NULL: a CPU */
  const char *measure;  /* a file to write: operations are timed here, on random weights; NULL: nothing is */
  const char *backend;  /* that is timed: "auto", "cpu", "cuda" */
  const char *measured; /* a file whose figures replace the machine's; NULL: none */
  bool json;            /* one JSON object instead of a table */
};

/* Where the time of a step and of a block goes: the parts of trace.h, and sums over ranks. */
enum { PLAN_ALLREDUCE = TRACE_PARTS, PLAN_PARTS };

/* "products", "all-reduce" */
const char *plan_part_name(int part);

/* Bytes of one rank, the one with the most samples. */
struct plan_memory {
  double weights, effective; /* of a block: in full precision, and as quantized */
  double weight_gradient;    /* of some rows of one linear layer at a time */
  double activations;        /* of one sample, with their gradients */
  double streams;            /* its samples' hidden states: target, quantized, and those behind the block */
  double streams_on_host;    /* of them what a card has no room for (samples.h), */
  double windows;            /* and what it then holds of these */
  double learnables;         /* factors, LET, their gradients and moments */
  double backend;            /* scratch; on a card what context and libraries take */
  double image;              /* a block as it is read, broadcast and waited for: on the host, and on a card too */
  double record;             /* rank 0: what is stored of a block, on its way to the host */
  double output;             /* rank 0: the same on the host, and its file */
  double program;
  double device, host; /* sums: on the card, and in the host's memory of rank 0 */
  double node;         /* in the host's memory of all ranks of rank 0's node, which hold weights on a CPU in common */
};

struct plan {
  struct model model;
  struct recipe recipe;
  struct machine machine;
  bool headers; /* the checkpoint's types are known, not only config.json's */
  int ranks, samples_a_rank, steps_a_block;
  double parameters; /* of the whole model */
  struct plan_memory memory;
  bool fits;
  double checkpoint_bytes, block_bytes, gradient_bytes, output_bytes_a_block, output_bytes;
  double early_bytes,
      beside_seconds; /* of the gradients those that are summed beside a sample's backward pass, and how long that takes from there */
  double step[PLAN_PARTS], block[PLAN_PARTS]; /* seconds */
  double step_seconds, block_seconds;         /* sums */
  double sample_step, sample_forward,
      forward_passes; /* seconds of one sample in a step, of one forward pass; such passes a block and sample */
  double read_seconds, broadcast_seconds, write_seconds; /* of a block, beside the work on another, */
  double copy_seconds;                                   /* as copies between a card and the host are */
  double run_seconds;
  const char *limit; /* what a faster run would need more of, or why it does not fit */
  int largest_batch; /* power of two that fits, the number of samples at most; 0: none does */
  int useful_ranks;  /* twice as many gain less than 10 % */
};

/* Makes the plan. Errors: ERROR_INPUT: model, machine, or a recipe that the model cannot follow; ERROR_WORK. */
int plan_make(struct plan *plan, const struct plan_options *options, const struct recipe *recipe, struct error *error);

/* Makes and prints it. No MPI. */
int plan_print(const struct plan_options *options, const struct recipe *recipe, struct error *error);

#endif
