/* nccl_over_mpi.h: an NCCL that is none, for what asks it (mpi/nccl_link.c): MPI carries everything, at once, when the stream's work before it is done.
 * Whoever has it defines cudaStreamSynchronize. What NCCL would not do ends the process. */
#ifndef OMNIQUANT_NCCL_OVER_MPI_H
#define OMNIQUANT_NCCL_OVER_MPI_H

/* Of rank 1 alone: "init": it cannot open a communicator; "later": a communicator that has connected its ranks reports a failure; "device": NCCL reports
 * none, but the device has failed. Else "". */
extern const char *nccl_failure;

/* Communicators that are open. */
extern int nccl_communicators;

#endif
