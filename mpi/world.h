/* world.h: the ranks of the run, this rank's place among them, and collectives over host memory. */
#ifndef OMNIQUANT_WORLD_H
#define OMNIQUANT_WORLD_H

#include <mpi.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct watch;
struct device;

struct world {
  int rank, size;             /* of all ranks */
  int local_rank, local_size; /* among those of this node */
  MPI_Comm communicator;      /* of all ranks */
  MPI_Comm node;              /* of those of this node */
  struct watch *watch;        /* over all ranks; NULL before world_watch, and where there is nobody to watch */
  struct device *device;      /* of device_open; NULL: all memory is the host's */
  double waited_seconds;      /* that this rank has spent in collectives over host memory, waiting for the others included; only grows */
};

/* Starts MPI. Call once, first in main. */
int world_init(struct world *world, int *argc, char ***argv, struct error *error);

/* Divides the ranks into `teams` equal runs; `team` becomes the world of this rank's, and its number is returned. `teams` divides the number
 * of ranks. world_leave_team frees it. Collective. */
int world_join_team(struct world *world, int teams, struct world *team);
void world_leave_team(struct world *team);

/* From now on a rank that dies ends all others with a message. Collective. */
void world_watch(struct world *world);

/* From now on SIGTERM, SIGINT or SIGUSR1 to any rank lets the run stop at the next world_agree; a second one ends the process at once. */
void world_catch_signals(struct world *world);

/* Whether this rank knows that the run is to stop, so that work can be left out which nobody will need: ranks learn of it at different times. */
bool world_stopping(const struct world *world);

/* Whether any rank knows; the same answer on all. And, by the same message, whether all ranks are ready for something. Collective. */
bool world_stops(struct world *world, bool *ready /* this rank; becomes all */);

/* Brackets the writing of what is finished: the death of a peer does not interrupt it. Any thread. */
void world_hold(struct world *world);
void world_release(struct world *world);

/* Ends MPI. Collective. */
void world_finalize(struct world *world);

/* Makes an error of one rank the error of all: afterwards every rank holds the same code and message (the lowest failing rank's); of a signal
 * to one rank, ERROR_STOPPED. Returns the code. Collective: call where any rank may have failed alone. */
int world_agree(struct world *world, struct error *error);

/* Ends all ranks at once after a failure in the middle of other ranks' work; prints the message. Does not return. */
void world_abort(struct world *world, const struct error *error) __attribute__((noreturn));

/* The collectives below return nothing: when MPI itself fails there is no way left to tell the others, and all ranks are ended. */

/* Both of the next take memory of the world's device too; then they may run asynchronously, in the order of the device's work.
 *
 * Sums values over all ranks in the fixed binary tree ((0+1)+(2+3))+..., so that for every power-of-two size the result is the same
 * bit for bit as one rank adding in that tree. Every rank receives the sum. Collective. */
void world_allreduce(struct world *world, float *values, /* [count], in place */
                     size_t count, float *scratch /* [count] */);

/* Each of the values becomes the largest over all ranks, on every rank. Collective. */
void world_largest(struct world *world, float *values, /* [count], in place */ size_t count);

/* Sends bytes of rank 0 to all. Collective. */
void world_broadcast(struct world *world, void *bytes, size_t count);

/* One rank sends to another, which receives; other ranks must not call. */
void world_send(struct world *world, const void *bytes, size_t count, int to);
void world_receive(struct world *world, void *bytes, size_t count, int from);

/* The largest and the sum of one number over all ranks, on every rank. Collective. */
double world_max(struct world *world, double value);
double world_sum(struct world *world, double value);

/* Threads a rank may use: `asked` if not 0, else the node's usable cores over its ranks; never more than the cores. */
int world_threads(const struct world *world, int asked);

#endif
