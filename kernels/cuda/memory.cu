/* memory.cu: device memory, copies, conversion from and to the types of checkpoints, and what is done to plain floats. */
#include "cuda/device.h"

static void *cuda_allocate(struct kernels *k, size_t bytes) {
  void *memory = NULL;
  if (!cuda_got(k, cudaMalloc(&memory, bytes ? bytes : 16))) return NULL;
  cuda_check(k, cudaMemsetAsync(memory, 0, bytes ? bytes : 16, cuda_stream(k)), "clearing memory");
  return memory;
}

static void cuda_release(struct kernels *k, void *memory) {
  cuda_check(k, cudaFree(memory), "freeing memory");
}

static bool cuda_owns(struct kernels *k, const void *memory) {
  struct cudaPointerAttributes attributes;
  return cuda_check(k, cudaPointerGetAttributes(&attributes, memory), "asking for a pointer's memory") &&
         attributes.type == cudaMemoryTypeDevice;
}

#ifndef OMNIQUANT_EMULATED
static size_t memory_taken(struct kernels *k) {
  size_t free_bytes = 0, total = 0;
  cuda_check(k, cudaMemGetInfo(&free_bytes, &total), "asking for free memory");
  return total - free_bytes;
}
#endif

static int cuda_synchronize(struct kernels *k, struct error *error) {
  cuda_check(k, cudaStreamSynchronize(cuda_stream(k)), "waiting for the device");
  if (k->state->failure.code) return error_set(error, k->state->failure.code, "%s", k->state->failure.message);
  return 0;
}

/* What the caller may reuse or read on return has to have been copied by then. */
static void cuda_upload(struct kernels *k, void *to, const void *from, size_t bytes) {
  cuda_check(k, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cuda_stream(k)), "copying to the device");
  cuda_check(k, cudaStreamSynchronize(cuda_stream(k)), "copying to the device");
}

static void cuda_download(struct kernels *k, void *to, const void *from, size_t bytes) {
  cuda_check(k, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda_stream(k)), "copying from the device");
  cuda_check(k, cudaStreamSynchronize(cuda_stream(k)), "copying from the device");
}

static void cuda_copy(struct kernels *k, void *to, const void *from, size_t bytes) {
  timed timer(k, "copy", 2 * (double)bytes);
  cuda_check(k, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_stream(k)), "copying");
}

static void cuda_clear(struct kernels *k, void *memory, size_t bytes) {
  cuda_check(k, cudaMemsetAsync(memory, 0, bytes, cuda_stream(k)), "clearing memory");
}

/* ---- conversion ---- */

struct convert_in {
  bf16 *to;
  const uint8_t *from;
  enum dtype dtype;
  template <int N> DEVICE void at(int64_t i) const {
    float x[N];
    for (int n = 0; n < N; n++) {
      if (dtype == DTYPE_F32) {
        x[n] = ((const float *)from)[i + n];
      } else {
        uint16_t bits = ((const uint16_t *)from)[i + n];
        x[n] = dtype == DTYPE_F16 ? half_to_float(bits) : bf16_to_float(bits);
      }
    }
    store<N>(to + i, x);
  }
};

struct convert_out {
  float *to;
  const bf16 *from;
  template <int N> DEVICE void at(int64_t i) const {
    float x[N];
    load<N>(x, from + i);
    store<N>(to + i, x);
  }
};

static const int64_t CONVERTED_AT_ONCE = 1 << 24; /* elements: what is converted goes through scratch memory in pieces */

static void cuda_load(struct kernels *k, data *to, const void *from, enum dtype dtype, int64_t count) {
  if (cuda_owns(k, from)) return each(k, convert_in{elements(to), (const uint8_t *)from, dtype}, count, aligned(elements(to)));
  int64_t size = (int64_t)dtype_size(dtype), most = count < CONVERTED_AT_ONCE ? count : CONVERTED_AT_ONCE;
  char *raw = cuda_scratch(k, most * size);
  if (!raw) return;
  for (int64_t done = 0; done < count; done += most) {
    int64_t piece = count - done < most ? count - done : most;
    bf16 *out = elements(to) + done;
    cuda_check(k, cudaMemcpyAsync(raw, (const char *)from + done * size, (size_t)(piece * size), cudaMemcpyHostToDevice, cuda_stream(k)),
               "copying to the device");
    each(k, convert_in{out, (const uint8_t *)raw, dtype}, piece, aligned(out));
  }
  cuda_check(k, cudaStreamSynchronize(cuda_stream(k)), "copying to the device");
}

static void cuda_fetch(struct kernels *k, float *to, const data *from, int64_t count) {
  int64_t most = count < CONVERTED_AT_ONCE ? count : CONVERTED_AT_ONCE;
  float *wide = (float *)cuda_scratch(k, most * (int64_t)sizeof(float));
  if (!wide) return;
  for (int64_t done = 0; done < count; done += most) {
    int64_t piece = count - done < most ? count - done : most;
    const bf16 *in = elements(from) + done;
    each(k, convert_out{wide, in}, piece, aligned(in));
    cuda_download(k, to + done, wide, (size_t)piece * sizeof(float));
  }
}

/* ---- floats ---- */

struct fill_each {
  float *to, value;
  template <int N> DEVICE void at(int64_t i) const {
    for (int n = 0; n < N; n++) to[i + n] = value;
  }
};

template <typename T> struct add_each {
  T *to;
  const T *from;
  template <int N> DEVICE void at(int64_t i) const {
    float a[N], b[N];
    load<N>(a, to + i);
    load<N>(b, from + i);
    for (int n = 0; n < N; n++) a[n] += b[n];
    store<N>(to + i, a);
  }
};

struct clamp_each {
  float *x, low, high;
  template <int N> DEVICE void at(int64_t i) const {
    for (int n = 0; n < N; n++) x[i + n] = x[i + n] < low ? low : x[i + n] > high ? high : x[i + n];
  }
};

static void fill(struct kernels *k, float *to, float value, int64_t count) {
  each(k, fill_each{to, value}, count, false);
}

static void add(struct kernels *k, float *to, const float *from, int64_t count) {
  timed timer(k, "add", 12.0 * (double)count);
  each(k, add_each<float>{to, from}, count, aligned(to, from));
}

static void accumulate(struct kernels *k, data *to, const data *from, int64_t count) {
  timed timer(k, "accumulate", 6.0 * (double)count);
  each(k, add_each<bf16>{elements(to), elements(from)}, count, aligned(to, from));
}

static void clamp(struct kernels *k, float *x, float low, float high, int64_t count) {
  each(k, clamp_each{x, low, high}, count, false);
}
