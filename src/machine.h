/* machine.h: how fast a machine is and what it holds, as far as a plan needs it: a graphics card by its name, or a JSON file whose figures were
 * measured or are believed. */
#ifndef OMNIQUANT_MACHINE_H
#define OMNIQUANT_MACHINE_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"
#include "trace.h"

/* Every rate is what is reached, not what a data sheet promises. Bytes and seconds; a rank has one device. */
struct machine {
  char name[64];
  double element_bytes;   /* of the backend's data: 4 on CPUs, 2 on CUDA */
  double ranks_a_node;    /* devices of a node */
  double device_memory;   /* of a device; 0: the backend's memory is the host's */
  double device_overhead; /* of it, what the context, libraries and NCCL take */
  double host_memory;     /* of a node */
  double host_overhead;   /* of a rank: program, libraries, MPI */
  double product_flops;   /* a second, of matrix products */
  double attention_flops;
  double search_flops;                       /* of the grid search, which is done in fp32 without matrix units */
  double memory_bandwidth;                   /* of the device */
  double call_seconds;                       /* an operation takes at least this */
  double copy_bandwidth;                     /* host to device; not used where the memory is the host's */
  double node_bandwidth, node_latency;       /* between ranks of a node, one way */
  double network_bandwidth, network_latency; /* between ranks of different nodes, one way, all ranks of a node sending at once */
  double read_bandwidth, write_bandwidth;    /* of rank 0's file system */

  struct trace_row measured[TRACE_COUNT]; /* of operations that were timed; no seconds: by the rates above */
};

/* Finds a machine: "h100", "h200" and "a100" (figures of machine.c), or reads a JSON object whose keys are the members above, missing ones as
 * those of the CPU in machine.c, and `operations`, by name: {"calls", "flops", "bytes", "seconds"}. Errors: ERROR_INPUT naming file and key. */
int machine_find(struct machine *machine, const char *name, struct error *error);

/* Takes a file's figures over those that are there. */
int machine_read(struct machine *machine, const char *path, struct error *error);

/* Writes such a file with what was measured of the operations. Errors: ERROR_WORK. */
int machine_write(const struct machine *machine, const char *path, struct error *error);

/* The CPU of which nothing is known: sensible figures, and this host's memory. */
void machine_cpu(struct machine *machine);

/* Seconds that an operation takes. */
double machine_seconds(const struct machine *machine, enum trace_operation operation, const struct trace_row *work);

/* Seconds of the ordered sum of world_allreduce: in each round half of what the round before had goes to the partner, and comes back summed. */
double machine_allreduce_seconds(const struct machine *machine, int ranks, double bytes);

/* Seconds of a broadcast in many pieces, each rank passing on what it gets. */
double machine_broadcast_seconds(const struct machine *machine, int ranks, double bytes);

#endif
