/* emulated_nccl.c: the streams of NCCL's stand-in (nccl_over_mpi.c) are the emulation's. */
#include <cuda_runtime.h>

void emulation_wait(void *stream);

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  emulation_wait(stream);
  return cudaSuccess;
}
