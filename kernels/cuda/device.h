/* device.h: what the CUDA kernels are written in: launches, bf16 in vectors of 16 bytes, sums and extremes over the threads of a team. The
 * same sources are compiled for the host under tests/cuda_emulation.h, which stands in for CUDA.
 * Sums are taken in fixed trees, never by atomics: the same bits run after run. */
#ifndef OMNIQUANT_CUDA_DEVICE_H
#define OMNIQUANT_CUDA_DEVICE_H

#ifdef OMNIQUANT_EMULATED
#include "cuda_emulation.h"
#else
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "cuda/backend.h"
#ifdef OMNIQUANT_CUDNN
#include "cuda/cudnn.h"
#endif
}

#define DEVICE __device__ __forceinline__

namespace { /* nothing of it shows: a test program holds these kernels twice, for the device and emulated */

enum { BLOCK_THREADS = 256, WARP = 32 };

/* ---- host side ---- */

/* Keeps the first failure, as error_set does; who waits for a lane may be another thread than who works. */
static pthread_mutex_t failing = PTHREAD_MUTEX_INITIALIZER;
#define cuda_fail(k, ...)                                                                                                                  \
  do {                                                                                                                                     \
    pthread_mutex_lock(&failing);                                                                                                          \
    error_set(&(k)->state->failure, __VA_ARGS__);                                                                                          \
    pthread_mutex_unlock(&failing);                                                                                                        \
  } while (0)

static bool cuda_check(struct kernels *k, cudaError_t code, const char *what) {
  if (code != cudaSuccess) cuda_fail(k, ERROR_WORK, "CUDA: %s failed: %s", what, cudaGetErrorString(code));
  return code == cudaSuccess;
}

static cudaStream_t cuda_stream(struct kernels *k) {
  return (cudaStream_t)k->state->stream;
}

/* Whether memory has come. That there is not enough is no failure of the device, and is the caller's to tell. */
static bool cuda_got(struct kernels *k, cudaError_t code) {
  if (code != cudaErrorMemoryAllocation) return cuda_check(k, code, "allocating memory");
  cudaGetLastError();
  return false;
}

/* At least that many bytes of device memory, valid until the next call; NULL (and the failure kept) without memory. Grows in the first steps
 * and stays: growing waits for what may still read it. */
static char *cuda_scratch(struct kernels *k, int64_t bytes) {
  struct backend *cuda = k->state;
  if ((size_t)bytes <= cuda->scratch_bytes) return cuda->scratch;
  if (cuda->recording) { /* a record cannot allocate: it is given up */
    cuda->outgrown = true;
    return NULL;
  }
  cuda_check(k, cudaStreamSynchronize(cuda_stream(k)), "waiting");
  cudaFree(cuda->scratch);
  cuda->scratch = NULL;
  cuda->scratch_bytes = 0;
  void *memory = NULL;
  if (!cuda_got(k, cudaMalloc(&memory, (size_t)bytes))) {
    cuda_fail(k, ERROR_WORK, "out of memory on cuda: %lld bytes for a kernel's scratch", (long long)bytes);
    return NULL;
  }
  cuda->scratch = (char *)memory;
  cuda->scratch_bytes = (size_t)bytes;
  return cuda->scratch;
}

static int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/* The blocks of a launch; counted in 64 bits, so that too many are seen. */
struct launch_grid {
  int64_t x, y;
};

static struct launch_grid grid_of(int64_t x, int64_t y = 1) {
  return {x, y};
}

/* Runs kernel(arguments...) on a grid of blocks; nothing to do for an empty grid. */
template <class... P, class... A>
static void launch(struct kernels *k, const struct launch_grid &grid, int threads, size_t shared_bytes, void (*kernel)(P...),
                   A... arguments) {
  const uint64_t MOST_X = 2147483647, MOST_Y = 65535;
#ifdef OMNIQUANT_EMULATED
  if (grid.x == 0 || grid.y == 0) emulation::note_empty();
#endif
  if (grid.x == 0 || grid.y == 0 || k->state->failure.code) return;
  if ((uint64_t)grid.x > MOST_X || (uint64_t)grid.y > MOST_Y) {
    cuda_fail(k, ERROR_WORK, "CUDA: a launch of %lld x %lld blocks, more than a device takes", (long long)grid.x, (long long)grid.y);
    return;
  }
  dim3 blocks((unsigned)grid.x, (unsigned)grid.y);
#ifdef OMNIQUANT_EMULATED
  (emulation::check_argument(arguments), ...);
  emulation::run(cuda_stream(k), blocks, threads, shared_bytes, [=] { kernel(arguments...); });
#else
  enum { WITHOUT_ASKING = 48 * 1024 };
  if (shared_bytes > WITHOUT_ASKING &&
      !cuda_check(k, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes),
                  "shared memory"))
    return;
  kernel<<<blocks, (unsigned)threads, shared_bytes, cuda_stream(k)>>>(arguments...);
  cuda_check(k, cudaGetLastError(), "launch");
#endif
}

/* Stands first in an operation: measures it where a benchmark asks. */
struct timed {
  struct kernels *k;
#ifdef OMNIQUANT_EMULATED
  timed(struct kernels *kernels, const char *, double, double = 0) : k(kernels) {}
#else
  struct cuda_timing *timing;
  cudaEvent_t begin, end;
  timed(struct kernels *kernels, const char *name, double bytes, double flops = 0) : k(kernels), timing(NULL) {
    struct cuda_profile *profile = k->state->profile;
    if (!profile) return;
    int i = 0;
    while (i < profile->count && strcmp(profile->timing[i].name, name) != 0) i++;
    if (i == CUDA_MOST_TIMINGS) return;
    if (i == profile->count) profile->timing[profile->count++] = {name, 0, 0, 0, 0};
    timing = &profile->timing[i];
    timing->calls++;
    timing->bytes += bytes;
    timing->flops += flops;
    cuda_check(k, cudaEventCreate(&begin), "event");
    cuda_check(k, cudaEventCreate(&end), "event");
    cuda_check(k, cudaEventRecord(begin, cuda_stream(k)), "event");
  }
  ~timed() {
    if (!timing) return;
    float milliseconds = 0;
    cuda_check(k, cudaEventRecord(end, cuda_stream(k)), "event");
    cuda_check(k, cudaEventSynchronize(end), "event");
    cuda_check(k, cudaEventElapsedTime(&milliseconds, begin, end), "event");
    timing->seconds += 1e-3 * milliseconds;
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
#endif
  timed(const timed &) = delete;
  timed &operator=(const timed &) = delete;
};

/* ---- elements ---- */

/* What a launch asked for with shared_bytes, at a multiple of 16. */
DEVICE char *dynamic_shared() {
#ifdef OMNIQUANT_EMULATED
  return emulation::shared;
#else
  extern __shared__ uint4 shared_memory[];
  return (char *)shared_memory;
#endif
}

struct bf16 {
  uint16_t bits;
};

static const bf16 *elements(const data *x) {
  return (const bf16 *)x;
}

static bf16 *elements(data *x) {
  return (bf16 *)x;
}

DEVICE float to_float(bf16 x) {
  return float_from_bits((uint32_t)x.bits << 16);
}

DEVICE float to_float(float x) {
  return x;
}

/* Two of them in one register, `low` in the lower half: to nearest even, NaN stays NaN. */
DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef OMNIQUANT_EMULATED
  return emulation::bf16_bits(low) | (uint32_t)emulation::bf16_bits(high) << 16;
#else
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
#endif
}

DEVICE bf16 to_bf16(float x) {
  return {(uint16_t)pack_bf16(x, 0)};
}

/* N elements as they lie in memory: one, or eight, whose address has to be a multiple of 16. */
template <int N> struct packed { bf16 at; };
template <> struct packed<8> { uint4 at; };

DEVICE void unpack(float (&to)[1], const struct packed<1> &from) {
  to[0] = to_float(from.at);
}
DEVICE void unpack(float (&to)[8], const struct packed<8> &from) {
  uint32_t word[4] = {from.at.x, from.at.y, from.at.z, from.at.w};
#pragma unroll
  for (int i = 0; i < 8; i++) to[i] = float_from_bits(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
}

template <int N> DEVICE void load(float (&to)[N], const bf16 *from) {
  unpack(to, *(const struct packed<N> *)from);
}

template <int N> DEVICE void load(float (&to)[N], const float *from) {
  if constexpr (N == 8) {
    float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
    to[0] = *from;
  }
}

template <int N> DEVICE void store(bf16 *to, const float (&from)[N]) {
  if constexpr (N == 8)
    *(uint4 *)to = {pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]), pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7])};
  else
    *to = to_bf16(from[0]);
}

template <int N> DEVICE void store(float *to, const float (&from)[N]) {
  if constexpr (N == 8) {
    ((float4 *)to)[0] = {from[0], from[1], from[2], from[3]};
    ((float4 *)to)[1] = {from[4], from[5], from[6], from[7]};
  } else {
    *to = from[0];
  }
}

/* Whether eight elements at a time may be read at each of these, and at every multiple of eight behind; NULL does not matter. */
static bool aligned() {
  return true;
}
template <class T, class... Rest> static bool aligned(T *first, Rest... rest) {
#ifdef OMNIQUANT_EMULATED
  return emulation::note_alignment((uintptr_t)first % 16 == 0) && aligned(rest...);
#else
  return (uintptr_t)first % 16 == 0 && aligned(rest...);
#endif
}

/* ---- each element by itself ---- */

/* F has a member template at<N>(i), which does elements [i, i + N). */
template <int N, class F> __global__ void each_kernel(F f, int64_t count) {
  int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i + N <= count)
    f.template at<N>(i);
  else
    for (; i < count; i++) f.template at<1>(i);
}

template <class F> static void each(struct kernels *k, const F &f, int64_t count, bool vectors) {
  if (vectors)
    launch(k, grid_of(ceil_div(count, 8 * BLOCK_THREADS)), BLOCK_THREADS, 0, each_kernel<8, F>, f, count);
  else
    launch(k, grid_of(ceil_div(count, BLOCK_THREADS)), BLOCK_THREADS, 0, each_kernel<1, F>, f, count);
}

/* ---- teams: the threads that work on one row or group ---- */

struct sum_of {
  template <class T> static DEVICE T join(T a, T b) {
    return a + b;
  }
};
struct largest_of {
  static DEVICE float join(float a, float b) {
    return quantizer_max(a, b);
  }
};
struct least_of {
  static DEVICE float join(float a, float b) {
    return quantizer_min(a, b);
  }
};

/* TEAM lanes of a warp (a power of two) or, over 32, all threads of a block. Every thread receives the same bits: partners of an exchange
 * join the same two values, and joining commutes. All threads of the block have to come here. */
template <int TEAM, class Op, class T> DEVICE T team_reduce(T x) {
#pragma unroll
  for (int distance = 1; distance < TEAM && distance < WARP; distance *= 2) x = Op::join(x, __shfl_xor_sync(0xffffffffu, x, distance));
  if constexpr (TEAM > WARP) {
    __shared__ T part[TEAM / WARP];
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    x = part[0];
    for (int i = 1; i < TEAM / WARP; i++) x = Op::join(x, part[i]);
    __syncthreads();
  }
  return x;
}

template <int TEAM, class T> DEVICE T team_sum(T x) {
  return team_reduce<TEAM, sum_of>(x);
}
template <int TEAM> DEVICE float team_largest(float x) {
  return team_reduce<TEAM, largest_of>(x);
}
template <int TEAM> DEVICE float team_least(float x) {
  return team_reduce<TEAM, least_of>(x);
}

/* Which team of the grid a thread is in, and which of its threads. */
template <int TEAM> DEVICE int64_t team_index() {
  return (int64_t)blockIdx.x * (BLOCK_THREADS / TEAM) + threadIdx.x / TEAM;
}
template <int TEAM> DEVICE int team_lane() {
  return threadIdx.x % TEAM;
}

template <int TEAM> static struct launch_grid team_grid(int64_t teams) {
  return grid_of(ceil_div(teams, BLOCK_THREADS / TEAM));
}

} // namespace

#endif
