/* cuda_emulated.cpp: the CUDA backend, compiled for the host. */
#include "cuda/backend.cu"

extern "C" void emulation_wait(void *stream) { /* of emulated_nccl.c */
  cudaStreamSynchronize(stream);
}

extern "C" void emulation_use(struct dry_device *device) {
  if (!emulation::allocations.empty()) {
    fprintf(stderr, "emulation: memory of the device before is left\n");
    abort();
  }
  emulation::dry = device;
}
