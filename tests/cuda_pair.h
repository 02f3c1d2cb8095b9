/* cuda_pair.h: one operation on the CPU backend and on the CUDA backend, and how far the results are apart. The same tests run on a device,
 * where there is one, and without on the emulation (cuda_emulation.h). */
#ifndef OMNIQUANT_CUDA_PAIR_H
#define OMNIQUANT_CUDA_PAIR_H

#include "compare.h"

struct kernels *CUDA_OPEN(int device, struct error *error);

/* What an operation is given. */
enum argument_kind {
  DATA,   /* elements of the backend's type; in the test fp32 values that bf16 holds */
  FLOATS, /* fp32 on both */
  BYTES   /* the same bytes on both */
};

struct argument {
  enum argument_kind kind;
  int64_t count;
  const void *before;  /* what it holds; NULL: poison */
  struct bound *bound; /* of the result's peak_error; NULL: not a result, or bytes that have to be equal */
  bool result;
  struct bound *norm; /* of its norm_error too; NULL: not asked */
};

enum { MOST_ARGUMENTS = 16 };

/* Runs an operation on the arguments' memory. */
typedef void operation_on(struct kernels *k, void **at, const void *shape);

static inline struct argument data_in(const float *values, int64_t count) {
  return (struct argument){DATA, count, values, NULL, false, NULL};
}
static inline struct argument data_out(struct bound *bound, const float *before, int64_t count) { /* NULL: assigned, else changed */
  return (struct argument){DATA, count, before, bound, true, NULL};
}
static inline struct argument floats_in(const float *values, int64_t count) {
  return (struct argument){FLOATS, count, values, NULL, false, NULL};
}
static inline struct argument floats_out(struct bound *bound, const float *before, int64_t count) {
  return (struct argument){FLOATS, count, before, bound, true, NULL};
}
static inline struct argument bytes_in(const void *bytes, int64_t count) {
  return (struct argument){BYTES, count, bytes, NULL, false, NULL};
}
static inline struct argument bytes_out(const void *before, int64_t count) {
  return (struct argument){BYTES, count, before, NULL, true, NULL};
}

/* Values that bf16 holds. */
static inline float *random_bf16(struct memory *m, uint64_t *state, int64_t count) {
  float *values = random_floats(m, state, count);
  for (int64_t i = 0; i < count; i++) values[i] = bf16_to_float((uint16_t)(float_to_bits(values[i]) >> 16));
  return values;
}

/* An argument's memory on k's device, `shift` elements behind an address that is as aligned as can be. */
static inline void *argument_make(struct memory *d, const struct argument *a, int shift) {
  size_t size = a->kind == DATA ? d->k->element_bytes : a->kind == FLOATS ? sizeof(float) : 1;
  size_t skipped = a->kind == BYTES ? 0 : (size_t)shift * size;
  char *at = (char *)device(d, (size_t)a->count * size + skipped) + skipped;
  const float *values = a->before || a->kind == BYTES ? a->before : poison(d, a->count);
  if (a->kind == DATA)
    d->k->load(d->k, (data *)(void *)at, values, DTYPE_F32, a->count);
  else if (values)
    d->k->upload(d->k, at, values, (size_t)a->count * size);
  return at;
}

static inline float *argument_fetch(struct memory *d, const struct argument *a, void *at) {
  if (a->kind == BYTES) return fetched_bytes(d, at, (size_t)a->count);
  return a->kind == DATA ? fetched_data(d, at, a->count) : fetched_floats(d, at, a->count);
}

/* The results of one run, on the host. */
static inline void run_operation(struct memory *d, float **result, operation_on *operation, const void *shape, const struct argument *a,
                                 int count, int shift) {
  void *at[MOST_ARGUMENTS] = {NULL};
  struct error error = {0};
  for (int i = 0; i < count; i++) at[i] = a[i].count < 0 ? NULL : argument_make(d, &a[i], shift);
  operation(d->k, at, shape);
  for (int i = 0; i < count; i++) result[i] = a[i].result && a[i].count >= 0 ? argument_fetch(d, &a[i], at[i]) : NULL;
  if (d->k->synchronize(d->k, &error)) fail_msg("%s", error.message);
}

/* On the CPU once; on CUDA twice with aligned memory, which has to give the same bits, and once with memory one element off. An argument of a
 * negative count is NULL. */
static inline void compare_backends(struct kernels *cpu, struct kernels *cuda, const char *where, operation_on *operation,
                                    const void *shape, const struct argument *a, int count) {
  struct memory host_side = {.k = cpu};
  float *want[MOST_ARGUMENTS], *first[MOST_ARGUMENTS], *got[MOST_ARGUMENTS];
  run_operation(&host_side, want, operation, shape, a, count, 0);
  for (int run = 0; run < 3; run++) {
    struct memory d = {.k = cuda};
    run_operation(&d, got, operation, shape, a, count, run == 2);
    for (int i = 0; i < count; i++) {
      if (!got[i]) continue;
      size_t bytes = (size_t)a[i].count * (a[i].kind == BYTES ? 1 : sizeof(float));
      if (a[i].kind == BYTES && memcmp(got[i], want[i], bytes) != 0) fail_msg("argument %d, %s: not the same bytes", i, where);
      if (a[i].bound) bound_check(a[i].bound, peak_error(got[i], widened(&d, want[i], a[i].count), a[i].count), where);
      if (a[i].norm) bound_check(a[i].norm, norm_error(got[i], widened(&d, want[i], a[i].count), a[i].count), where);
      if (run == 1) assert_memory_equal(got[i], first[i], bytes);
      if (run == 0) first[i] = memcpy(host(&host_side, (int64_t)bytes, 1), got[i], bytes);
    }
    memory_free(&d);
  }
  memory_free(&host_side);
}

/* Opens both; ends the program as skipped where there is no device. */
static inline void open_backends(struct kernels **cpu, struct kernels **cuda) {
  struct error error = {0};
  *cpu = kernels_open("cpu", 1, 0, &error);
  if (!*cpu) fail_msg("%s", error.message);
  *cuda = CUDA_OPEN(0, &error);
  if (*cuda) return;
  printf("skipped: %s\n", error.message);
  (*cpu)->close(*cpu);
  exit(77);
}

#endif
