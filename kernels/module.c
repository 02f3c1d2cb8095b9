/* module.c: finding and loading the CUDA backend. */
#include "module.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define FILE_NAME "omniquant_cuda.so"

struct path {
  char text[PATH_MAX + sizeof MODULE_INSTALLED + sizeof FILE_NAME + 2];
};

/* Of the program's folder; false where the system does not tell. */
static bool program_folder(char folder[PATH_MAX]) {
  ssize_t length = readlink("/proc/self/exe", folder, PATH_MAX - 1);
  folder[length > 0 ? length : 0] = '\0';
  char *slash = strrchr(folder, '/');
  if (slash) *slash = '\0';
  return slash != NULL;
}

/* The first place that has it: beside the program, or as installed, MODULE_INSTALLED being that folder as seen from the program's. */
static bool find(struct path *path) {
  static const char *const folders[] = {"", "/" MODULE_INSTALLED};
  char folder[PATH_MAX];
  if (!program_folder(folder)) return false;
  for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
    snprintf(path->text, sizeof path->text, "%s%s/%s", folder, folders[i], FILE_NAME);
    if (access(path->text, F_OK) == 0) return true;
  }
  return false;
}

bool module_there(void) {
  struct path path;
  return find(&path);
}

/* The loader's reason, without the file's name where it begins with it. */
static const char *reason(const struct path *path) {
  const char *text = dlerror();
  size_t length = strlen(path->text);
  if (!text) return "no reason given";
  return strncmp(text, path->text, length) == 0 && text[length] == ':' ? text + length + 2 : text;
}

#define NAME_OF(symbol)   NAME_OF_1(symbol)
#define NAME_OF_1(symbol) #symbol

const struct module *module_load(struct error *error) {
  static const struct module *loaded;
  struct path path;
  if (loaded) return loaded;
  if (!find(&path)) {
    error_set(error, ERROR_WORK, "--backend cuda: not built in; build with CUDA, or use --backend cpu");
    return NULL;
  }
  void *library = dlopen(path.text, RTLD_NOW | RTLD_LOCAL);
  const struct module *module = library ? dlsym(library, NAME_OF(MODULE_SYMBOL)) : NULL;
  if (!module)
    error_set(error, ERROR_WORK,
              "--backend cuda: %s cannot be loaded: %s; put the folder of CUDA's libraries into LD_LIBRARY_PATH, or use --backend cpu",
              path.text, reason(&path));
  else if (strcmp(module->version, OMNIQUANT_VERSION) != 0 || module->kernels_bytes != sizeof(struct kernels))
    error_set(error, ERROR_WORK, "--backend cuda: %s belongs to another build of omniquant; install both together, or use --backend cpu",
              path.text);
  else
    return loaded = module;
  if (library) dlclose(library);
  return NULL;
}
