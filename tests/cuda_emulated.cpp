/* cuda_emulated.cpp: the CUDA backend, compiled for the host. */
#include "cuda/backend.cu"

extern "C" void emulation_use(struct dry_device *device) {
  if (!emulation::allocations.empty()) abort();
  emulation::dry = device;
}
