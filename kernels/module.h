/* module.h: the CUDA backend as a shared library that is loaded only when it is used: a program that is linked with CUDA's libraries takes their memory
 * and their start on machines without a device too. It lies beside the program, as built, or where `cmake --install` puts it, and takes what it needs of
 * the program (errors, collectives) from there. */
#ifndef OMNIQUANT_MODULE_H
#define OMNIQUANT_MODULE_H

#include "kernels.h"

/* What the library shows, under the name of MODULE_SYMBOL, and nothing else. */
struct module {
  const char *version;  /* of the program that it was built with, and */
  size_t kernels_bytes; /* sizeof(struct kernels) there: another build's would be called wrongly */
  struct kernels *(*open)(int device, struct error *error);
  bool (*usable)(int device, struct error *reason); /* as kernels_usable */
};

#define MODULE_SYMBOL omniquant_module

/* Whether there is one. */
bool module_there(void);

/* Loads it, once; it stays. Errors: ERROR_WORK, where it is not there or cannot be loaded. NULL on failure. */
const struct module *module_load(struct error *error);

#endif
