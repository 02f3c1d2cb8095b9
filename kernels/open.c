/* open.c: which backends there are, and which of them can compute here. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cpu/backend.h"
#include "module.h"

/* ---- CUDA's ---- */

#ifdef CUDA_OPEN /* tests build a program that emulates the device */
struct kernels *CUDA_OPEN(int device, struct error *error);

static bool cuda_there(void) {
  return true;
}

static struct kernels *open_cuda(int device, struct error *error) {
  return CUDA_OPEN(device, error);
}

static bool cuda_usable(int device, struct error *reason) {
  (void)device;
  (void)reason;
  return false;
}
#else
static bool cuda_there(void) {
  return module_there();
}

static struct kernels *open_cuda(int device, struct error *error) {
  const struct module *module = module_load(error);
  return module ? module->open(device, error) : NULL;
}

/* Whether the system has a device that is not hidden, without loading anything: the driver's files, the last one under WSL. */
static bool has_device(void) {
  static const char *const files[] = {"/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"};
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  bool there = false;
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) there = there || access(files[i], F_OK) == 0;
  return there && !(visible && *visible == '\0');
}

static bool cuda_usable(int device, struct error *reason) {
  const struct module *module = has_device() && module_there() ? module_load(reason) : NULL;
  return module && module->usable(device, reason);
}
#endif

/* ---- all ---- */

bool kernels_built_in(const char *name) {
  return strcmp(name, "cpu") == 0 || (strcmp(name, "cuda") == 0 && cuda_there());
}

bool kernels_usable(const char *name, int device, struct error *reason) {
  return strcmp(name, "cpu") == 0 || (strcmp(name, "cuda") == 0 && cuda_usable(device, reason));
}

struct kernels *kernels_open(const char *name, int threads, int device, struct error *error) {
  struct kernels *k = NULL;
  if (strcmp(name, "cuda") == 0 && cuda_there())
    k = open_cuda(device, error);
  else if (strcmp(name, "cpu") == 0)
    k = cpu_open(threads, error);
  else
    error_set(error, ERROR_INPUT, "--backend %s: not built in; use %s", name, cuda_there() ? "cpu or cuda" : "cpu");
  if (k) k->threads = threads;
  return k;
}
