/* memory.c: device memory of the CPU backend is host memory. */
#include "cpu/backend.h"

#include <stdlib.h>

enum { ALIGNMENT = 64 };

/* By calloc, which leaves large memory to the system until it is first used; in front of it stands what is to be freed. */
static void *cpu_allocate(struct kernels *k, size_t bytes) {
  (void)k;
  size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  char *whole = calloc(1, rounded + 2 * ALIGNMENT);
  if (!whole) return NULL;
  char *memory = whole + 2 * ALIGNMENT - (uintptr_t)whole % ALIGNMENT;
  memcpy(memory - sizeof whole, &whole, sizeof whole);
  return memory;
}

static void cpu_release(struct kernels *k, void *memory) {
  (void)k;
  char *whole = NULL;
  if (memory) memcpy(&whole, (char *)memory - sizeof whole, sizeof whole);
  free(whole);
}

static void *cpu_allocate_host(struct kernels *k, size_t bytes) {
  (void)k;
  return aligned_alloc(64, bytes ? (bytes + 63) / 64 * 64 : 64);
}

static void cpu_release_host(struct kernels *k, void *memory) {
  (void)k;
  free(memory);
}

static int cpu_synchronize(struct kernels *k, struct error *error) {
  if (k->state->failure.code) return error_set(error, k->state->failure.code, "%s", k->state->failure.message);
  return 0;
}

static void cpu_copy(struct kernels *k, void *to, const void *from, size_t bytes) {
  (void)k;
  memcpy(to, from, bytes);
}

static void cpu_clear(struct kernels *k, void *memory, size_t bytes) {
  (void)k;
  memset(memory, 0, bytes);
}

static void cpu_load(struct kernels *k, data *to, const void *from, enum dtype dtype, int64_t count) {
  (void)k;
  float *out = (float *)to;
  const uint8_t *in = from;
  if (dtype == DTYPE_F32) {
    memcpy(out, in, (size_t)count * sizeof(float));
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i++) {
    uint16_t bits;
    memcpy(&bits, in + 2 * i, sizeof bits);
    out[i] = dtype == DTYPE_F16 ? half_to_float(bits) : bf16_to_float(bits);
  }
}

static void cpu_fetch(struct kernels *k, float *to, const data *from, int64_t count) {
  (void)k;
  memcpy(to, from, (size_t)count * sizeof(float));
}

static void fill(struct kernels *k, float *to, float value, int64_t count) {
  (void)k;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) to[i] = value;
}

static void add(struct kernels *k, float *to, const float *from, int64_t count) {
  (void)k;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

static void clamp(struct kernels *k, float *x, float low, float high, int64_t count) {
  (void)k;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) x[i] = x[i] < low ? low : x[i] > high ? high : x[i];
}

static void accumulate(struct kernels *k, data *to, const data *from, int64_t count) {
  add(k, (float *)to, (const float *)from, count);
}
