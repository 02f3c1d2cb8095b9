/* ptx_runtime.cpp: the CUDA runtime and cuBLASLt for the backend as nvcc compiles it: the emulation's (cuda_emulation.h), whose functions are shown
 * here under CUDA's names; but a launch is run from the PTX that the backend carries (ptx.h). */
#define CUDA_CALL extern "C" __attribute__((used)) inline
#include "cuda_emulation.h"

#include "ptx.h"

namespace {

struct configuration {
  dim3 blocks, threads;
  size_t shared_bytes;
  void *stream;
};

thread_local configuration asked; /* by the launch that comes next */

/* Kernels by the host's functions that stand for them: names, and what shared memory they may be given. */
struct entry {
  const char *name;
  size_t dynamic_bytes = 48 * 1024;
};

std::map<const void *, entry> &entries() { /* asked for before constructors have run */
  static std::map<const void *, entry> all;
  return all;
}

ptx::allocation find_allocation(const void *memory) {
  auto after = emulation::allocations.upper_bound((const char *)memory);
  if (!emulation::bytes_behind(memory)) return {0, 0};
  after--;
  return {(uint64_t)after->first, after->second};
}

const char *binary; /* the backend's device code */

/* The PTX in it: a header, and pieces with a header each. */
std::string find_ptx() {
  enum { MAGIC = 0xba55ed50u, PTX = 1 };
  struct {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes; /* behind the header */
  } whole;
  struct {
    uint16_t kind, flags;
    uint32_t header_bytes;
    uint64_t bytes; /* behind the header */
  } piece;
  memcpy(&whole, binary, sizeof whole);
  if (whole.magic != MAGIC) emulation::fail("the backend's code is no fat binary");
  const char *at = binary + whole.header_bytes, *end = at + whole.bytes;
  for (; at + sizeof piece <= end; at += piece.header_bytes + piece.bytes) {
    memcpy(&piece, at, sizeof piece);
    if (piece.kind != PTX) continue;
    std::string text(at + piece.header_bytes, piece.bytes);
    if (text.find(".version") == std::string::npos) emulation::fail("the backend's PTX is compressed");
    return text.c_str(); /* up to its NUL */
  }
  emulation::fail("the backend has no PTX");
  return "";
}

} // namespace

/* ---- what nvcc's code calls ---- */

extern "C" {

/* Before constructors have run: looked at later. */
void **__cudaRegisterFatBinary(const void *wrapper) {
  memcpy(&binary, (const char *)wrapper + 8, sizeof binary); /* behind a magic number and a version */
  return (void **)&binary;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}

void __cudaRegisterFunction(void **, const void *function, char *, const char *name, int, void *, void *, void *, void *, int *) {
  entries()[function].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared_bytes, void *stream) {
  asked = {blocks, threads, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *blocks, dim3 *threads, size_t *shared_bytes, void **stream) {
  *blocks = asked.blocks, *threads = asked.threads, *shared_bytes = asked.shared_bytes, *stream = asked.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(const void **kernel, const void *function) {
  *kernel = function;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, int what, int value) {
  if (what != 8) emulation::fail("cudaFuncSetAttribute of %d", what); /* cudaFuncAttributeMaxDynamicSharedMemorySize */
  entries().at(function).dynamic_bytes = (size_t)value;
  return cudaSuccess;
}

/* Arguments are taken now, and the kernel is run when its stream comes to it. */
cudaError_t __cudaLaunchKernel(const void *function, dim3 blocks, dim3 threads, void **arguments, size_t shared_bytes, void *stream) {
  static const std::string text = find_ptx();
  static const bool loaded = (ptx::load(text.c_str()), true);
  (void)loaded;
  const entry &e = entries().at(function);
  const ptx::kernel &k = ptx::find(e.name);
  if (shared_bytes > e.dynamic_bytes) emulation::fail("%s: %zu bytes of shared memory, of %zu", e.name, shared_bytes, e.dynamic_bytes);
  if (threads.x > k.most_threads) emulation::fail("%s: %u threads, of %u", e.name, threads.x, k.most_threads);
  if (threads.y != 1 || threads.z != 1 || blocks.z != 1) emulation::fail("%s: launched in three dimensions", e.name);
  ptx::launch launch = {&k, blocks.x, blocks.y, threads.x, shared_bytes, false, {}, find_allocation};
  for (const ptx::parameter &p : k.parameters) {
    launch.parameters.resize(p.at + p.bytes);
    memcpy(&launch.parameters[p.at], *arguments++, p.bytes);
  }
  emulation::issue(stream, [=]() mutable {
    launch.reversed = emulation::launches++ % 2;
    if (emulation::may_run((int)launch.threads, launch.shared_bytes + launch.of->shared_bytes)) ptx::run(launch);
  });
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 blocks, dim3 threads, void **arguments, size_t shared_bytes, void *stream) {
  return __cudaLaunchKernel(function, blocks, threads, arguments, shared_bytes, stream); /* what older compilers call */
}

/* ---- what only benchmarks ask for ---- */

enum { cudaErrorNotSupported = 801 };

cudaError_t cudaEventCreate(cudaEvent_t *) {
  return cudaErrorNotSupported;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return cudaErrorNotSupported;
}
cudaError_t cudaEventElapsedTime(float *, cudaEvent_t, cudaEvent_t) {
  return cudaErrorNotSupported;
}

/* ---- of ptx_device.c ---- */

int ptx_device_count(void) {
  return ptx::usable();
}

void ptx_device_opened(void) {
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, 0);
}

} // extern "C"
