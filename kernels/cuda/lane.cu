/* lane.cu: memory that copies need, and copies on streams of their own. */
#include "cuda/device.h"

/* What is left to what comes later than the large arrays: scratch memory, workspaces, kernels as they are loaded. */
static const size_t RESERVE_BYTES = (size_t)1 << 30;

static void *allocate_host(struct kernels *k, size_t bytes) {
  void *memory = NULL;
  return cuda_got(k, cudaHostAlloc(&memory, bytes ? bytes : 16, cudaHostAllocDefault)) ? memory : NULL;
}

static void release_host(struct kernels *k, void *memory) {
  if (memory) cuda_check(k, cudaFreeHost(memory), "freeing host memory");
}

static size_t room(struct kernels *k) {
  size_t free_bytes = 0, total = 0;
  if (!cuda_check(k, cudaMemGetInfo(&free_bytes, &total), "asking for free memory")) return 0;
  return free_bytes > RESERVE_BYTES ? free_bytes - RESERVE_BYTES : 0;
}

static cudaStream_t stream_of(const struct lane *lane) {
  return (cudaStream_t)lane->stream;
}

static cudaEvent_t event_of(const struct lane *lane) {
  return (cudaEvent_t)lane->event;
}

static void lane_close(struct kernels *k, struct lane *lane) {
  if (!lane) return;
  if (lane->stream) {
    cuda_check(k, cudaStreamSynchronize(stream_of(lane)), "waiting for copies");
    cuda_check(k, cudaStreamDestroy(stream_of(lane)), "closing a stream");
  }
  if (lane->event) cuda_check(k, cudaEventDestroy(event_of(lane)), "closing an event");
  free(lane);
}

static struct lane *lane_open(struct kernels *k) {
  struct lane *lane = (struct lane *)calloc(1, sizeof *lane);
  cudaStream_t stream = NULL;
  cudaEvent_t event = NULL;
  if (!lane) {
    cuda_fail(k, ERROR_WORK, "out of memory for a stream of copies");
    return NULL;
  }
  int least, greatest; /* what goes beside the work is short, and others wait for it */
  bool opened = cuda_check(k, cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for priorities") &&
                cuda_check(k, cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "opening a stream");
  lane->stream = stream;
  opened = opened && cuda_check(k, cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "opening an event");
  lane->event = event;
  if (opened) return lane;
  lane_close(k, lane);
  return NULL;
}

static void lane_send(struct kernels *k, struct lane *lane, void *to, const void *from, size_t bytes) {
  cuda_check(k, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(lane)), "copying beside the work");
}

/* What is asked of `later` from now on begins after what was asked of `earlier`. */
static void lane_order(struct kernels *k, struct lane *lane, cudaStream_t earlier, cudaStream_t later) {
  if (cuda_check(k, cudaEventRecord(event_of(lane), earlier), "marking a stream"))
    cuda_check(k, cudaStreamWaitEvent(later, event_of(lane), 0), "ordering streams");
}

static void lane_follow(struct kernels *k, struct lane *lane) {
  lane_order(k, lane, (cudaStream_t)k->state->works, stream_of(lane));
}

static void lane_join(struct kernels *k, struct lane *lane) {
  lane_order(k, lane, stream_of(lane), (cudaStream_t)k->state->works);
}

static void lane_use(struct kernels *k, struct lane *lane) {
  k->state->stream = lane ? lane->stream : k->state->works;
}

static bool lane_idle(struct kernels *k, struct lane *lane, bool wait) {
  if (!cuda_check(k, cudaSetDevice(k->state->device), "choosing the device")) return false; /* a thread begins with the first */
  cudaError_t code = wait ? cudaStreamSynchronize(stream_of(lane)) : cudaStreamQuery(stream_of(lane));
  return code != cudaErrorNotReady && cuda_check(k, code, "copying beside the work");
}
