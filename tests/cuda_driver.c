/* cuda_driver.c: a libcuda.so.1 for cuda_cudnn.c, where there is no device. cuDNN compiles its kernels before it asks the driver to load them; this
 * one takes any machine code for loaded and knows any kernel by its name, and refuses everything else that cuDNN looks for. */
enum { CUDA_SUCCESS = 0, CUDA_ERROR_NO_DEVICE = 100 };

int cuLibraryLoadData(const void **library, const void *code);
int cuLibraryLoadData(const void **library, const void *code) {
  *library = code;
  return CUDA_SUCCESS;
}

int cuLibraryGetKernel(const void **kernel, const void *library, const char *name);
int cuLibraryGetKernel(const void **kernel, const void *library, const char *name) {
  (void)library;
  *kernel = name;
  return CUDA_SUCCESS;
}

int cuLibraryUnload(const void *library);
int cuLibraryUnload(const void *library) {
  (void)library;
  return CUDA_SUCCESS;
}

int cuGetErrorString(int error, const char **text);
int cuGetErrorString(int error, const char **text) {
  (void)error;
  *text = "refused by the tests' driver";
  return CUDA_SUCCESS;
}

#define REFUSED(name)                                                                                                                      \
  int name(void);                                                                                                                          \
  int name(void) {                                                                                                                         \
    return CUDA_ERROR_NO_DEVICE;                                                                                                           \
  }
REFUSED(cuInit)
REFUSED(cuCtxGetCurrent)
REFUSED(cuCtxGetLimit)
REFUSED(cuCtxPopCurrent)
REFUSED(cuCtxPushCurrent)
REFUSED(cuDeviceGet)
REFUSED(cuDeviceGetCount)
REFUSED(cuDriverGetVersion)
REFUSED(cuGetErrorName)
REFUSED(cuKernelGetAttribute)
REFUSED(cuKernelSetAttribute)
REFUSED(cuLaunchCooperativeKernel)
REFUSED(cuLaunchKernel)
REFUSED(cuLaunchKernelEx)
REFUSED(cuLibraryLoadFromFile)
REFUSED(cuLinkAddData)
REFUSED(cuLinkComplete)
REFUSED(cuLinkCreate)
REFUSED(cuLinkDestroy)
REFUSED(cuOccupancyMaxPotentialClusterSize)
REFUSED(cuStreamGetCtx)
