/* cuda_emulation.h: stands in for CUDA, so that the kernels of kernels/cuda are compiled for the host and run without a device. Blocks run one
 * after the other; the threads of a block are fibers that change places at barriers, and exchanges of a warp are barriers too. Device memory is
 * host memory, so that AddressSanitizer sees what compute-sanitizer would.
 * Every second launch runs blocks and threads in reverse: where a barrier is missing, two runs of a kernel give different results. A barrier
 * that not all threads reach ends the program. cuBLASLt is a loop, called as the library is, with its own layouts and what it asks of them.
 * Streams are queues. The first device that is opened does its work as soon as it is asked for and copies beside it as late as can be, the second the
 * other way round, and so on in turn (OMNIQUANT_EMULATED_LATE=copies or work: all one way): where one stream should wait for another and does not,
 * the two give different results.
 * On a dry device (cuda_dry.h) nothing is run.
 * OMNIQUANT_EMULATED_MEMORY: bytes of the device's memory; without it there is no end to it. */
#ifndef OMNIQUANT_CUDA_EMULATION_H
#define OMNIQUANT_CUDA_EMULATION_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

extern "C" {
#include "cuda_dry.h"
}

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

/* ---- what is wrong ---- */

inline dry_device *dry; /* NULL: launches are run */

/* A dry device keeps the first; else it ends the program. */
__attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
  char text[sizeof dry->failure];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!dry) {
    fprintf(stderr, "emulation: %s\n", text);
    abort();
  }
  if (!*dry->failure) memcpy(dry->failure, text, sizeof text);
}

/* ---- memory ---- */

typedef std::map<const char *, size_t> memory_map;
inline memory_map allocations, pinned; /* the device's memory; the host's that copies beside the work may use */
inline size_t bytes_taken;             /* of the device's */

inline size_t memory_bytes() {
  const char *bytes = getenv("OMNIQUANT_EMULATED_MEMORY");
  return bytes ? strtoull(bytes, NULL, 10) : SIZE_MAX;
}

/* Bytes from there to the end of the allocation; 0: of no allocation. */
inline size_t bytes_behind(const void *memory, const memory_map &map = allocations) {
  const char *at = (const char *)memory;
  auto after = map.upper_bound(at);
  if (after == map.begin()) return 0;
  after--;
  return at < after->first + after->second ? (size_t)(after->first + after->second - at) : 0;
}

inline void check_range(const char *what, const void *memory, size_t bytes) {
  if (bytes > bytes_behind(memory)) fail("%s: %zu bytes at %p are not inside one allocation", what, bytes, memory);
}

/* Either end of a copy beside the work. */
inline void check_end(const void *memory, size_t bytes) {
  if (bytes > bytes_behind(memory) && bytes > bytes_behind(memory, pinned))
    fail("a copy beside the work: %zu bytes at %p are neither the device's nor pinned", bytes, memory);
}

/* An argument of a kernel: what points somewhere points to memory of the device. */
template <class T> void check_argument(const T &) {}
template <class T> void check_argument(T *memory) {
  if (memory) check_range("a kernel's argument", memory, sizeof(T));
}

inline bool note_alignment(bool aligned) {
  if (dry && !aligned) dry->unaligned++;
  return aligned;
}

inline void note_empty() {
  if (dry) dry->empty++;
}

enum : size_t { PAGE_BYTES = 2 << 20, DRY_ROOM = (size_t)1 << 42 };
inline char *dry_room, *dry_next; /* addresses that nobody may touch */

inline void *dry_allocate(size_t bytes) {
  if (!dry_room) {
    void *room = mmap(NULL, DRY_ROOM, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return NULL;
    dry_room = dry_next = (char *)room;
  }
  if (allocations.empty()) dry_next = dry_room;
  size_t room = bytes / 256 * 256 + 512; /* aligned as CUDA's, and never side by side */
  if (bytes > DRY_ROOM || room > (size_t)(dry_room + DRY_ROOM - dry_next)) return NULL;
  char *memory = dry_next;
  dry_next += room;
  return memory;
}

inline size_t paged(size_t bytes) {
  return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

inline void dry_count(size_t bytes) {
  dry->taken += bytes;
  dry->paged_taken += paged(bytes);
  if (dry->taken > dry->peak) dry->peak = dry->taken;
  if (dry->paged_taken > dry->paged_peak) dry->paged_peak = dry->paged_taken;
}

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

/* ---- streams ---- */

struct stream {
  struct operation {
    std::function<void()> run;
    stream *awaited; /* NULL: none */
    unsigned long until;
  };
  bool works; /* carries a device's work: the first that is made after it is opened; others carry copies */
  std::deque<operation> queue;
  unsigned long asked, done;
};

/* A moment of a stream: when it has done so many operations. */
struct event {
  stream *of;
  unsigned long at;
};

inline std::vector<stream *> streams;
inline unsigned devices; /* opened so far */
inline bool opening;     /* one, which has no stream yet */

inline bool work_is_late() {
  if (dry) return false;
  const char *late = getenv("OMNIQUANT_EMULATED_LATE");
  return late ? strcmp(late, "work") == 0 : devices % 2 == 0;
}

inline bool is_ready(const stream *s) {
  return !s->queue.empty() && (!s->queue.front().awaited || s->queue.front().awaited->done >= s->queue.front().until);
}

inline void do_next(stream *s) {
  stream::operation next = s->queue.front();
  s->queue.pop_front();
  if (next.run) next.run();
  s->done++;
}

/* Where work is late, copies are done as soon as they may. */
inline void let_copies_run() {
  for (bool moved = work_is_late(); moved;) {
    moved = false;
    for (stream *s : streams)
      for (; !s->works && is_ready(s); moved = true) do_next(s);
  }
}

/* Of threads that ask, or wait for what was asked. */
typedef std::lock_guard<std::recursive_mutex> guard;
inline std::recursive_mutex one_at_a_time;

inline void run_until(stream *s, unsigned long at) {
  guard alone(one_at_a_time);
  while (s->done < at) {
    if (is_ready(s))
      do_next(s);
    else
      run_until(s->queue.front().awaited, s->queue.front().until);
    let_copies_run();
  }
}

inline void run_all() {
  guard alone(one_at_a_time);
  for (stream *s : streams) run_until(s, s->asked);
}

inline void ask(stream *s, const stream::operation &operation) {
  guard alone(one_at_a_time);
  s->queue.push_back(operation);
  s->asked++;
  if (s->works && !work_is_late()) run_until(s, s->asked);
  let_copies_run();
}

/* What the work's stream is asked for, noted while a graph is recorded. */
typedef std::vector<std::function<void()>> graph;
inline thread_local graph *recorded;

/* What a device refuses meanwhile, or would do once and not when the graph is launched. */
inline bool refused(const char *what) {
  if (recorded) fail("%s while a graph is recorded", what);
  return recorded != NULL;
}

inline void issue(void *on, std::function<void()> work) {
  stream *s = (stream *)on;
  if (recorded && s->works)
    recorded->push_back(work);
  else
    ask(s, {work, NULL, 0});
}

/* Whether a device takes a launch, and is there to run it. */
inline bool may_run(int threads, size_t shared_bytes) {
  const size_t most = dry ? dry->shared_bytes : 227 * 1024; /* a multiprocessor of compute capability 9.0 has no more for one block */
  if (threads <= 0 || threads > 1024 || threads % 32) fail("%d threads a block", threads);
  if (shared_bytes > most) fail("%zu bytes of shared memory, of %zu", shared_bytes, most);
  if (dry) dry->launches++;
  return !dry;
}

inline void run_now(dim3 blocks, int threads, size_t shared_bytes, std::function<void()> kernel) {
  bool reversed = launches++ % 2;
  if (!may_run(threads, shared_bytes)) return;
  grid = blocks;
  block = dim3((unsigned)threads);
  body = kernel;
  fibers.resize((size_t)threads);
  warps.resize((size_t)threads / 32);
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

inline void run(void *on, dim3 blocks, int threads, size_t shared_bytes, std::function<void()> kernel) {
  issue(on, [=] { run_now(blocks, threads, shared_bytes, kernel); });
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
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b; /* which no compiler for hosts contracts */
  return product;
}

/* ---- the runtime: numbers are CUDA's own, since ptx_runtime.cpp shows these functions to what is compiled with CUDA's headers ---- */

#ifndef CUDA_CALL
#define CUDA_CALL inline
#endif

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorNotReady = 600 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };
enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
enum { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
struct cudaPointerAttributes {
  int type;
};
struct cudaDeviceProp {
  char name[16];
  int major, minor;
};

CUDA_CALL const char *cudaGetErrorString(cudaError_t) {
  return "out of memory";
}
CUDA_CALL cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) { /* asked for by who opens it */
  emulation::devices++;
  emulation::opening = true;
  *properties = {"emulated", emulation::dry ? emulation::dry->major : 9, emulation::dry ? emulation::dry->minor : 0};
  return cudaSuccess;
}

/* ---- memory ---- */

CUDA_CALL cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = emulation::memory_bytes();
  *free_bytes = *total - emulation::bytes_taken;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaMalloc(void **memory, size_t bytes) {
  if (emulation::refused("memory is allocated")) return 2;
  if (bytes > emulation::memory_bytes() - emulation::bytes_taken) return cudaErrorMemoryAllocation;
  if (emulation::dry)
    *memory = emulation::dry_allocate(bytes);
  else if (posix_memalign(memory, 256, bytes))
    *memory = NULL;
  if (!*memory) return cudaErrorMemoryAllocation;
  if (!emulation::dry) memset(*memory, 0xff, bytes); /* NaN */
  emulation::allocations[(const char *)*memory] = bytes;
  emulation::bytes_taken += bytes;
  if (emulation::dry) emulation::dry_count(bytes);
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaFree(void *memory) {
  auto found = emulation::allocations.find((const char *)memory);
  if (!memory) return cudaSuccess;
  if (emulation::refused("memory is freed")) return 2;
  if (found == emulation::allocations.end()) {
    emulation::fail("%p is freed, which is no allocation", memory);
    return cudaSuccess;
  }
  emulation::run_all(); /* as a device does */
  emulation::bytes_taken -= found->second;
  if (emulation::dry) {
    emulation::dry->taken -= found->second;
    emulation::dry->paged_taken -= emulation::paged(found->second);
  } else {
    free(memory);
  }
  emulation::allocations.erase(found);
  return cudaSuccess;
}
/* Full of NaN. */
CUDA_CALL cudaError_t cudaHostAlloc(void **memory, size_t bytes, int) {
  if (emulation::refused("host memory is pinned")) return 2;
  if (posix_memalign(memory, 256, bytes)) return cudaErrorMemoryAllocation;
  memset(*memory, 0xff, bytes);
  emulation::pinned[(const char *)*memory] = bytes;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaFreeHost(void *memory) {
  if (emulation::refused("host memory is freed")) return 2;
  emulation::run_all();
  emulation::pinned.erase((const char *)memory);
  free(memory);
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *memory) {
  attributes->type = emulation::bytes_behind(memory)                      ? cudaMemoryTypeDevice
                     : emulation::bytes_behind(memory, emulation::pinned) ? cudaMemoryTypeHost
                                                                          : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

/* ---- streams ---- */

typedef emulation::event *cudaEvent_t;

CUDA_CALL cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, int) {
  emulation::stream *made = new emulation::stream();
  made->works = emulation::opening;
  emulation::opening = false;
  emulation::streams.push_back(made);
  *stream = made;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, int flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
CUDA_CALL cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (emulation::refused("the host waits")) return 2;
  emulation::run_until((emulation::stream *)stream, ((emulation::stream *)stream)->asked);
  return cudaSuccess;
}
/* Who asks often enough sees it done. */
CUDA_CALL cudaError_t cudaStreamQuery(cudaStream_t stream) {
  emulation::stream *s = (emulation::stream *)stream;
  if (s->done == s->asked) return cudaSuccess;
  emulation::run_until(s, s->done + 1);
  return cudaErrorNotReady;
}
CUDA_CALL cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  emulation::run_all();
  for (size_t i = 0; i < emulation::streams.size(); i++)
    if (emulation::streams[i] == stream) emulation::streams.erase(emulation::streams.begin() + (long)i);
  delete (emulation::stream *)stream;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, int) {
  *event = new emulation::event();
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (emulation::refused("streams are ordered")) return 2;
  *event = {(emulation::stream *)stream, ((emulation::stream *)stream)->asked};
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, int) {
  emulation::ask((emulation::stream *)stream, {NULL, event->of, event->at});
  return cudaSuccess;
}
/* Of a dry device only zeros come back. */
CUDA_CALL cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, cudaStream_t stream) {
  if (kind != cudaMemcpyDeviceToDevice && emulation::refused("the host's memory is copied")) return 2;
  if (kind == cudaMemcpyDefault) {
    emulation::check_end(to, bytes);
    emulation::check_end(from, bytes);
  } else {
    if (kind != cudaMemcpyDeviceToHost) emulation::check_range("a copy", to, bytes);
    if (kind != cudaMemcpyHostToDevice) emulation::check_range("a copy", from, bytes);
  }
  if (!emulation::dry)
    emulation::issue(stream, [=] { memcpy(to, from, bytes); });
  else if (kind == cudaMemcpyDeviceToHost)
    memset(to, 0, bytes);
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream) {
  emulation::check_range("a clear", memory, bytes);
  if (!emulation::dry) emulation::issue(stream, [=] { memset(memory, value, bytes); });
  return cudaSuccess;
}

/* ---- graphs ---- */

typedef emulation::graph *cudaGraph_t, *cudaGraphExec_t;
enum { cudaStreamCaptureModeThreadLocal = 1 };

CUDA_CALL cudaError_t cudaStreamBeginCapture(cudaStream_t, int) {
  emulation::recorded = new emulation::graph;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
  *graph = emulation::recorded;
  emulation::recorded = NULL;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, int) {
  *made = new emulation::graph(*graph);
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  emulation::issue(stream, [=] {
    for (const std::function<void()> &work : *graph) work();
  });
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
CUDA_CALL cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  emulation::run_all();
  delete graph;
  return cudaSuccess;
}

/* ---- cuBLASLt: D = alpha op(A) op(B) + beta C (+ bias along D's rows), column-major, in fp32, rounded once; and at half the sum over k too, where
 * the caller lets parts be of the output's type ---- */

typedef int cublasStatus_t;
typedef int cublasOperation_t;
typedef int cublasLtEpilogue_t;
typedef int cublasLtMatmulDescAttributes_t;
typedef int cublasLtMatmulPreferenceAttributes_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum { CUBLAS_OP_N, CUBLAS_OP_T };
enum { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum { CUBLAS_COMPUTE_32F = 68, CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_TRANSB = 4,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8
};
enum {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, /* and on: of B, C, D */
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
};
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2, CUBLASLT_REDUCTION_SCHEME_MASK = 7 }; /* 1 and 4: parts of the output's type */

struct cublasLtMatmulDesc {
  cublasOperation_t operation[2] = {CUBLAS_OP_N, CUBLAS_OP_N}; /* of A and B */
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const uint16_t *bias = NULL;
};
struct cublasLtMatrixLayout {
  uint64_t rows, columns;
  int64_t stride; /* from column to column */
};
struct cublasLtMatmulPreference {
  uint32_t alignment[4]; /* of A, B, C, D */
  uint32_t reduction;    /* how the parts of a product that is cut along k may be added */
  size_t workspace;
};
struct cublasLtMatmulAlgo_t {
  uint64_t m, n, k; /* what it was chosen for */
  cublasLtMatmulPreference preference;
  uint64_t unused[1];
};
static_assert(sizeof(cublasLtMatmulAlgo_t) == 64, "the size of the library's");
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  size_t workspace;
  cublasStatus_t state;
};
typedef int *cublasLtHandle_t;
typedef cublasLtMatmulDesc *cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayout *cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreference *cublasLtMatmulPreference_t;

namespace emulation {

/* A product's sizes, and whether the operands agree in them. */
struct product_sizes {
  uint64_t m, n, k;
  bool fit;
};

inline product_sizes sizes_of(const cublasLtMatmulDesc *d, const cublasLtMatrixLayout *a, const cublasLtMatrixLayout *b,
                              const cublasLtMatrixLayout *c) {
  bool ta = d->operation[0] == CUBLAS_OP_T, tb = d->operation[1] == CUBLAS_OP_T;
  uint64_t m = ta ? a->columns : a->rows, k = ta ? a->rows : a->columns, n = tb ? b->rows : b->columns;
  return {m, n, k, (tb ? b->columns : b->rows) == k && c->rows == m && c->columns == n};
}

/* A matrix, bf16, where it lies. On a dry device, whose sizes are models', also whether tensor cores take it as it lies. */
inline void check_matrix(const char *name, const cublasLtMatrixLayout *layout, const void *at, uint32_t alignment) {
  const uint64_t most = INT32_MAX;
  if (layout->rows > most || layout->columns > most || (uint64_t)layout->stride > most)
    fail("cuBLASLt: %s is %llu x %llu", name, (unsigned long long)layout->rows, (unsigned long long)layout->columns);
  if (layout->stride < (int64_t)layout->rows) fail("cuBLASLt: %s: columns overlap", name);
  check_range(name, at, (size_t)((int64_t)(layout->columns - 1) * layout->stride + (int64_t)layout->rows) * 2);
  if ((uintptr_t)at % alignment) fail("cuBLASLt: %s is not aligned to the %u bytes that were said", name, alignment);
  if (dry && ((uintptr_t)at % 16 || layout->stride % 8)) fail("cuBLASLt: %s: its columns are not at multiples of 16 bytes", name);
}

/* op(X) in fp32, its rows (or those of its transpose) one after the other. */
inline std::vector<float> widened(const uint16_t *x, const cublasLtMatrixLayout *layout, bool by_columns) {
  std::vector<float> values(layout->rows * layout->columns);
  for (uint64_t column = 0; column < layout->columns; column++)
    for (uint64_t row = 0; row < layout->rows; row++)
      values[by_columns ? column * layout->rows + row : row * layout->columns + column] =
          bf16_value(x[column * (uint64_t)layout->stride + row]);
  return values;
}

} // namespace emulation

CUDA_CALL const char *cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_INVALID_VALUE";
}
CUDA_CALL cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  *handle = new int(0);
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, int compute, int scale) {
  if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
  *d = new cublasLtMatmulDesc;
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete d;
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, int what, const void *value, size_t bytes) {
  void *to = what == CUBLASLT_MATMUL_DESC_TRANSA     ? (void *)&d->operation[0]
             : what == CUBLASLT_MATMUL_DESC_TRANSB   ? (void *)&d->operation[1]
             : what == CUBLASLT_MATMUL_DESC_EPILOGUE ? (void *)&d->epilogue
                                                     : (void *)&d->bias;
  if (bytes != (what == CUBLASLT_MATMUL_DESC_BIAS_POINTER ? sizeof d->bias : sizeof(int))) return CUBLAS_STATUS_INVALID_VALUE;
  memcpy(to, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, int type, uint64_t rows, uint64_t columns,
                                                    int64_t stride) {
  if (type != CUDA_R_16BF) return CUBLAS_STATUS_INVALID_VALUE;
  *layout = new cublasLtMatrixLayout{rows, columns, stride};
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
  *preference = new cublasLtMatmulPreference{{256, 256, 256, 256}, CUBLASLT_REDUCTION_SCHEME_MASK, 0}; /* the library's own defaults */
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference, int what, const void *value,
                                                              size_t bytes) {
  void *to = what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? (void *)&preference->workspace
             : what == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
                 ? (void *)&preference->reduction
                 : (void *)&preference->alignment[what - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES];
  if (bytes != (to == &preference->workspace ? sizeof preference->workspace : sizeof(uint32_t))) return CUBLAS_STATUS_INVALID_VALUE;
  memcpy(to, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
                                                        cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                                        cublasLtMatmulPreference_t preference, int, cublasLtMatmulHeuristicResult_t *result,
                                                        int *found) {
  auto sizes = emulation::sizes_of(d, a, b, c);
  if (!sizes.fit) return CUBLAS_STATUS_INVALID_VALUE;
  result->algo = {sizes.m, sizes.n, sizes.k, *preference, {0}};
  result->state = CUBLAS_STATUS_SUCCESS;
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}
CUDA_CALL cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const float *alpha, const void *a,
                                        cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout, const float *beta,
                                        const void *c, cublasLtMatrixLayout_t c_layout, void *to, cublasLtMatrixLayout_t to_layout,
                                        const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_bytes,
                                        cudaStream_t stream) {
  auto sizes = emulation::sizes_of(d, a_layout, b_layout, to_layout);
  if (!sizes.fit || c != to || c_layout != to_layout || sizes.m != algorithm->m || sizes.n != algorithm->n || sizes.k != algorithm->k ||
      algorithm->preference.workspace > workspace_bytes)
    return CUBLAS_STATUS_INVALID_VALUE;
  emulation::check_matrix("A", a_layout, a, algorithm->preference.alignment[0]);
  emulation::check_matrix("B", b_layout, b, algorithm->preference.alignment[1]);
  emulation::check_matrix("C", c_layout, c, algorithm->preference.alignment[2]);
  emulation::check_matrix("D", to_layout, to, algorithm->preference.alignment[3]);
  emulation::check_range("the workspace", workspace, workspace_bytes);
  const uint16_t *bias = d->epilogue == CUBLASLT_EPILOGUE_BIAS ? d->bias : NULL;
  if (d->epilogue == CUBLASLT_EPILOGUE_BIAS) emulation::check_range("the bias", bias, sizes.m * sizeof *bias);
  if (emulation::dry) {
    emulation::issue(stream, [] { emulation::dry->products++; });
    return CUBLAS_STATUS_SUCCESS;
  }
  const cublasLtMatrixLayout left_layout = *a_layout, right_layout = *b_layout;
  const bool left_turned = d->operation[0] == CUBLAS_OP_T, right_turned = d->operation[1] == CUBLAS_OP_N;
  const uint64_t stride = (uint64_t)to_layout->stride;
  const float scale = *alpha, kept = *beta;
  const bool rounds_parts = algorithm->preference.reduction & ~(uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  emulation::issue(stream, [=] {
    std::vector<float> left = emulation::widened((const uint16_t *)a, &left_layout, left_turned);
    std::vector<float> right = emulation::widened((const uint16_t *)b, &right_layout, right_turned);
    for (uint64_t j = 0; j < sizes.n; j++)
      for (uint64_t i = 0; i < sizes.m; i++) {
        uint16_t *out = (uint16_t *)to + j * stride + i;
        float sum = 0;
        for (uint64_t l = 0; l < sizes.k; l++) {
          if (rounds_parts && l == sizes.k / 2) sum = emulation::bf16_value(emulation::bf16_bits(sum));
          sum += left[i * sizes.k + l] * right[j * sizes.k + l];
        }
        sum = scale * sum + (kept != 0 ? kept * emulation::bf16_value(*out) : 0) + (bias ? emulation::bf16_value(bias[i]) : 0);
        *out = emulation::bf16_bits(sum);
      }
  });
  return CUBLAS_STATUS_SUCCESS;
}

#endif
