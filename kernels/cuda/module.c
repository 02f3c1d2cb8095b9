/* module.c: what the CUDA backend's library shows. */
#include "module.h"

#include "cuda/backend.h"

extern const struct module MODULE_SYMBOL __attribute__((visibility("default")));
const struct module MODULE_SYMBOL = {OMNIQUANT_VERSION, sizeof(struct kernels), cuda_open, cuda_usable};
