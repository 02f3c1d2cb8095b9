/* watch.h: the ranks' life beside MPI, which may hang for ever when a peer dies: every rank keeps a TCP connection to rank 0. Where one breaks,
 * rank 0 says which rank on which host is gone, and all ranks end; a signal to one rank is told to all. */
#ifndef OMNIQUANT_WATCH_H
#define OMNIQUANT_WATCH_H

#include <mpi.h>
#include <stdbool.h>

#include "error.h"

struct watch;

/* Connects this rank, and begins to watch. Collective. Where ranks cannot reach rank 0, or one has no memory for it, nothing is watched (*watch is
 * NULL, told once on standard error): the launcher may still notice a dead rank. When MPI itself fails, all ranks are ended. */
void watch_open(MPI_Comm communicator, int rank, int size, int local_rank, struct watch **watch);

/* Ends the watch in peace; NULL is allowed. */
void watch_close(struct watch *watch);

/* Brackets what a dead peer must not interrupt, as the writing of a finished block: the end waits for it, half a minute at most. NULL is allowed. */
void watch_hold(struct watch *watch);
void watch_release(struct watch *watch);

/* Lets all other ranks end with this status without a further message, because this one has told it. NULL is allowed. */
void watch_end_others(struct watch *watch, int status);

/* From now on SIGTERM, SIGINT and SIGUSR1 ask for the run to stop: this rank, and through the watch every rank, learns of it by
 * watch_stop_signal. A second signal ends the process at once. */
void watch_catch_signals(struct watch *watch /* NULL: of this rank alone */);

/* The signal that asks the run to stop, 0 while there is none. Cheap; not the same on every rank at the same time. */
int watch_stop_signal(void);

#endif
