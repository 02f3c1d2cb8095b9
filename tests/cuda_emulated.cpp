/* cuda_emulated.cpp: the CUDA backend, compiled for the host. */
#include "cuda/backend.cu"
