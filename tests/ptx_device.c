/* ptx_device.c: what the backend, compiled with CUDA's headers, is told of the device that ptx_runtime.cpp stands in for. */
#include <cuda_runtime_api.h>
#include <string.h>

int ptx_device_count(void);
void ptx_device_opened(void); /* the emulation counts them */

cudaError_t cudaGetDeviceCount(int *count) {
  *count = ptx_device_count();
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  (void)device;
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "interpreted PTX");
  properties->major = 9;
  ptx_device_opened();
  return cudaSuccess;
}
