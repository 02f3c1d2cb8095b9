/* backend.h: the CUDA backend's state, and what benchmarks read of it. Plain C: bench/gpu_step.c and mpi/nccl_link.c include it. */
#ifndef OMNIQUANT_CUDA_BACKEND_H
#define OMNIQUANT_CUDA_BACKEND_H

#include "kernels.h"

struct cudnn;

#ifndef CUDA_OPEN /* tests hold a second copy, under another name */
#define CUDA_OPEN cuda_open
#endif

/* What one operation took, summed over its calls. */
enum { CUDA_MOST_TIMINGS = 64 };
struct cuda_timing {
  const char *name;
  int calls;
  double seconds; /* on the device */
  double bytes;   /* that the operation has to read and write, each once */
  double flops;   /* of matrix products; 0 for what memory alone limits */
};

struct cuda_profile {
  int count;
  struct cuda_timing timing[CUDA_MOST_TIMINGS];
};

struct backend {
  int device;          /* number among the visible ones */
  void *stream;        /* cudaStream_t that operations run on: the work's, or a lane's while that is used */
  void *works;         /* the work's */
  void *products;      /* cuBLASLt's objects (cublas.h) */
  struct cudnn *cudnn; /* attention's plans (cudnn.h); NULL: by own kernels */
  char *scratch;       /* grown by cuda_scratch, kept */
  size_t scratch_bytes;
  bool recording, outgrown;     /* a graph is being recorded, and whether it needs more scratch memory than there is */
  struct error failure;         /* first failure, reported by synchronize */
  struct cuda_profile *profile; /* NULL but in benchmarks: each operation is timed, and waited for */
  char level[100];              /* the device's name, and cuDNN's version */
};

/* A queue of copies beside the work (kernels.h). */
struct lane {
  void *stream; /* cudaStream_t */
  void *event;  /* cudaEvent_t: what one stream waits for of the other */
};

/* Bytes of the device's memory that are taken, by whomever. */
size_t cuda_memory_taken(struct kernels *k);

/* Opens the backend on one of the visible devices. Errors: ERROR_WORK without a device, or when it fails. NULL on failure. */
struct kernels *CUDA_OPEN(int device, struct error *error);

/* Whether CUDA_OPEN's device is there and new enough, as kernels_usable says it. */
bool cuda_usable(int device, struct error *reason);

#endif
