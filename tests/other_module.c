/* other_module.c: the CUDA backend's library as another version of omniquant would have it, of which nothing may be called (module.sh). */
#include "module.h"

extern const struct module MODULE_SYMBOL;
const struct module MODULE_SYMBOL = {"0.0.0", sizeof(struct kernels), NULL, NULL};
