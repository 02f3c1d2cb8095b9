/* cuda_emulation.h: stands in for CUDA, so that the kernels of kernels/cuda are compiled for the host and run without a device. Blocks run one
 * after the other; the threads of a block are fibers that change places at barriers, and exchanges of a warp are barriers too. Device memory is
 * host memory, so that AddressSanitizer sees what compute-sanitizer would.
 * Every second launch runs blocks and threads in reverse: where a barrier is missing, two runs of a kernel give different results. A barrier
 * that not all threads reach ends the program. */
#ifndef OMNIQUANT_CUDA_EMULATION_H
#define OMNIQUANT_CUDA_EMULATION_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static /* one block at a time */

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulation {

/* ---- fibers ---- */

struct barrier {
  int members, arrived;
  unsigned opened;
};

struct warp {
  struct barrier barrier;
  unsigned char slot[2][32][32]; /* what each lane gives to the others; two in turn, so that one barrier an exchange does */
};

struct fiber {
  void *stack_pointer;
  dim3 index;
  bool done;
  int turn; /* which slots come next */
};

inline dim3 grid, block, block_index;
inline std::vector<fiber> fibers;
inline std::vector<warp> warps;
inline barrier block_barrier;
inline std::function<void()> body;
inline fiber *current;
inline void *scheduler;
inline bool progress;
inline char *shared;
inline unsigned long launches;

enum { STACK_BYTES = 1 << 18 };

/* Saves what a call must keep and the stack pointer to *from, and goes on where `to` was saved. */
extern "C" void emulation_switch(void **from, void *to);
__asm__(".text\n"
        ".weak emulation_switch\n"
        ".type emulation_switch, @function\n"
        "emulation_switch:\n"
        "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  movq %rsp, (%rdi)\n"
        "  movq %rsi, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
        "  ret\n");

inline void give_way() {
  emulation_switch(&current->stack_pointer, scheduler);
}

inline void fiber_main() {
  body();
  current->done = progress = true;
  give_way();
  abort();
}

/* Kept from launch to launch. */
struct stack_pool {
  std::vector<char *> at;
  ~stack_pool() {
    for (char *stack : at) free(stack);
  }
};

inline char *stack_of(size_t thread) {
  static stack_pool stacks;
  while (stacks.at.size() <= thread) stacks.at.push_back((char *)aligned_alloc(4096, STACK_BYTES));
  return stacks.at[thread];
}

inline void fiber_start(size_t thread) {
  void **top = (void **)(stack_of(thread) + STACK_BYTES);
  *--top = NULL; /* where fiber_main would return to; it never does */
  *--top = (void *)fiber_main;
  for (int i = 0; i < 6; i++) *--top = NULL;
  fibers[thread] = {top, dim3((unsigned)thread, 0, 0), false, 0};
}

inline void wait(barrier &b) {
  unsigned before = b.opened;
  if (++b.arrived == b.members) {
    b.arrived = 0;
    b.opened++;
    progress = true;
  }
  while (b.opened == before) give_way();
}

inline void run_block(bool reversed) {
  size_t threads = fibers.size(), left = threads;
  block_barrier = {(int)threads, 0, 0};
  for (warp &w : warps) w.barrier = {32, 0, 0};
  for (size_t i = 0; i < threads; i++) fiber_start(i);
  while (left > 0) {
    progress = false;
    left = 0;
    for (size_t i = 0; i < threads; i++) {
      current = &fibers[reversed ? threads - 1 - i : i];
      if (current->done) continue;
      emulation_switch(&scheduler, current->stack_pointer);
      left += !current->done;
    }
    if (!progress && left > 0) {
      fprintf(stderr, "emulation: not all threads of a block reach a barrier\n");
      abort();
    }
  }
}

inline void run(dim3 blocks, int threads, size_t shared_bytes, std::function<void()> kernel) {
  bool reversed = launches++ % 2;
  grid = blocks;
  block = dim3((unsigned)threads);
  body = kernel;
  fibers.resize((size_t)threads);
  warps.resize((size_t)threads / 32);
  if (threads % 32) abort();
  if (shared_bytes > 227 * 1024) { /* a multiprocessor of compute capability 9.0 has no more for one block */
    fprintf(stderr, "emulation: %zu bytes of shared memory\n", shared_bytes);
    abort();
  }
  shared = (char *)aligned_alloc(16, shared_bytes / 16 * 16 + 16);
  unsigned count = blocks.x * blocks.y;
  for (unsigned i = 0; i < count; i++) {
    unsigned at = reversed ? count - 1 - i : i;
    block_index = dim3(at % blocks.x, at / blocks.x);
    memset(shared, 0xff, shared_bytes); /* NaN */
    run_block(reversed);
  }
  free(shared);
}

/* ---- warps ---- */

inline warp &my_warp() {
  return warps[current->index.x / 32];
}

inline int my_lane() {
  return (int)(current->index.x % 32);
}

/* Gives a value to the lanes of the warp, and waits for theirs. */
template <class T> unsigned char (*share(const T &value))[32] {
  warp &w = my_warp();
  int turn = current->turn;
  current->turn ^= 1;
  static_assert(sizeof(T) <= 32, "a slot holds it");
  memcpy(w.slot[turn][my_lane()], &value, sizeof value);
  wait(w.barrier);
  return w.slot[turn];
}

template <class T> T taken(const unsigned char *slot) {
  T value;
  memcpy(&value, slot, sizeof value);
  return value;
}

inline uint16_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float bf16_value(uint32_t bits) { /* of the lower half */
  bits <<= 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* ldmatrix .x4: lane 8i + r gives the address of row r of matrix i. */
template <class T> void load_matrices(uint32_t (&to)[4], const T *row, bool transposed) {
  if ((uintptr_t)row % 16) abort();
  auto slots = share(row);
  int r = my_lane() / 4, c = my_lane() % 4 * 2;
  for (int i = 0; i < 4; i++)
    for (int half = 0; half < 2; half++) {
      const uint16_t *from = taken<const uint16_t *>(slots[8 * i + (transposed ? c + half : r)]) + (transposed ? r : c + half);
      to[i] = half ? to[i] | (uint32_t)*from << 16 : *from;
    }
}

/* mma.sync m16n8k16: of A lane l has rows l / 4 and l / 4 + 8 at columns 2 (l % 4), + 1, and the same at columns 8 further; of B column l / 4 at
 * the rows that it has columns of A. */
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct registers {
    uint32_t a[4], b[2];
  };
  auto slots = share(registers{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  int group = my_lane() / 4, pair = my_lane() % 4;
  for (int i = 0; i < 4; i++) {
    int column = pair * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      registers left = taken<registers>(slots[group * 4 + k % 8 / 2]), right = taken<registers>(slots[column * 4 + k % 8 / 2]);
      sum += bf16_value(left.a[k / 8 * 2 + i / 2] >> k % 2 * 16) * bf16_value(right.b[k / 8] >> k % 2 * 16);
    }
    c[i] += sum;
  }
}

/* What cuBLASLt does: the product in fp32, rounded once. */
template <class P, class W, class R> void multiply(const P &p, W widen, R round) {
  for (int64_t i = 0; i < p.m; i++)
    for (int64_t j = 0; j < p.n; j++) {
      float sum = p.bias ? widen(p.bias[j]) : 0;
      for (int64_t k = 0; k < p.k; k++)
        sum += widen(p.transpose_a ? p.a[k * p.lda + i] : p.a[i * p.lda + k]) * widen(p.transpose_b ? p.b[j * p.k + k] : p.b[k * p.n + j]);
      p.c[i * p.n + j] = round(p.add ? sum + widen(p.c[i * p.n + j]) : sum);
    }
}

} // namespace emulation

#define threadIdx emulation::current->index
#define blockIdx  emulation::block_index
#define blockDim  emulation::block
#define gridDim   emulation::grid

inline void __syncthreads() {
  emulation::wait(emulation::block_barrier);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int distance) {
  auto slots = emulation::share(value);
  return emulation::taken<T>(slots[emulation::my_lane() ^ distance]);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  auto slots = emulation::share(predicate);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)emulation::taken<bool>(slots[i]) << i;
  return bits;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

/* ---- the runtime ---- */

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaStreamNonBlocking = 0, cudaMemcpyHostToDevice = 0, cudaMemcpyDeviceToHost = 0, cudaMemcpyDeviceToDevice = 0 };
enum { cudaMemoryTypeHost, cudaMemoryTypeDevice };
struct cudaPointerAttributes {
  int type;
};
struct cudaDeviceProp {
  char name[16];
  int major, minor;
};

inline const char *cudaGetErrorString(cudaError_t) {
  return "out of memory";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  *properties = {"emulated", 9, 0};
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, int) {
  *stream = NULL;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline std::map<const char *, size_t> cudaAllocations;
inline cudaError_t cudaMalloc(void **memory, size_t bytes) {
  int code = posix_memalign(memory, 256, bytes);
  if (code == 0) cudaAllocations[(const char *)*memory] = bytes;
  return code;
}
inline cudaError_t cudaFree(void *memory) {
  cudaAllocations.erase((const char *)memory);
  free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *memory) {
  auto after = cudaAllocations.upper_bound((const char *)memory);
  bool mine = after != cudaAllocations.begin() && (after--, (const char *)memory < after->first + after->second);
  attributes->type = mine ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

#endif
