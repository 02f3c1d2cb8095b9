/* open.c: which backends this program was built with. */
#include "cpu/backend.h"

#include <string.h>

#ifdef OMNIQUANT_CUDA
#ifndef CUDA_OPEN /* tests build a program that emulates the device */
#define CUDA_OPEN cuda_open
#endif
struct kernels *CUDA_OPEN(int device, struct error *error); /* cuda/backend.h, whose struct backend is another one */
static const char built_in[] = "cpu or cuda";
#else
static const char built_in[] = "cpu";
#endif

bool kernels_built_in(const char *name) {
#ifdef OMNIQUANT_CUDA
  if (strcmp(name, "cuda") == 0) return true;
#endif
  return strcmp(name, "cpu") == 0;
}

struct kernels *kernels_open(const char *name, int threads, int device, struct error *error) {
  struct kernels *k = NULL;
  if (!kernels_built_in(name)) {
    error_set(error, ERROR_INPUT, "--backend %s: not built in; use %s", name, built_in);
    return NULL;
  }
#ifdef OMNIQUANT_CUDA
  if (strcmp(name, "cuda") == 0) k = CUDA_OPEN(device, error);
#else
  (void)device;
#endif
  if (strcmp(name, "cpu") == 0) k = cpu_open(threads, error);
  if (k) k->threads = threads;
  return k;
}
