/* compare.h: what the tests of the mathematics share: random numbers, memory of host and device that one call frees, expected tensors,
 * relative errors, finite differences, and the walk over every backend that this machine can run. */
#ifndef OMNIQUANT_COMPARE_H
#define OMNIQUANT_COMPARE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/backend.h"
#include "kernels.h"
#include "safetensors.h"

/* ---- random numbers ---- */

static inline uint64_t random_bits(uint64_t *state) { /* splitmix64 */
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static inline double random_uniform(uint64_t *state) { /* 0 .. 1, never either */
  return ((double)(random_bits(state) >> 12) + 0.5) * 0x1p-52;
}

static inline double random_normal(uint64_t *state) {
  double radius = sqrt(-2 * log(random_uniform(state)));
  return radius * cos(2 * M_PI * random_uniform(state));
}

/* ---- memory ---- */

/* All that a test allocates, on the host and on k's device. */
struct memory {
  struct kernels *k;
  int count;
  struct {
    void *at;
    bool device;
  } slot[800];
};

static inline void *memory_keep(struct memory *memory, void *at, bool device) {
  assert_non_null(at);
  assert_true(memory->count < (int)(sizeof memory->slot / sizeof *memory->slot));
  memory->slot[memory->count].at = at;
  memory->slot[memory->count++].device = device;
  return at;
}

static inline void memory_free(struct memory *memory) {
  for (int i = 0; i < memory->count; i++)
    if (memory->slot[i].device)
      memory->k->release(memory->k, memory->slot[i].at);
    else
      free(memory->slot[i].at);
  memory->count = 0;
}

static inline void *host(struct memory *memory, int64_t count, size_t size) { /* zeroed */
  return memory_keep(memory, calloc(count > 0 ? (size_t)count : 1, size), false);
}

static inline float *host_floats(struct memory *memory, int64_t count) {
  return host(memory, count, sizeof(float));
}

static inline double *host_doubles(struct memory *memory, int64_t count) {
  return host(memory, count, sizeof(double));
}

static inline float *random_floats(struct memory *memory, uint64_t *state, int64_t count) {
  float *values = host_floats(memory, count);
  for (int64_t i = 0; i < count; i++) values[i] = (float)random_normal(state);
  return values;
}

static inline double *widened(struct memory *memory, const float *values, int64_t count) {
  double *wide = host_doubles(memory, count);
  for (int64_t i = 0; i < count; i++) wide[i] = values[i];
  return wide;
}

static inline void *device(struct memory *memory, size_t bytes) {
  return memory_keep(memory, memory->k->allocate(memory->k, bytes), true);
}

/* Elements of the backend's type. */
static inline data *device_data(struct memory *memory, const float *values, int64_t count) {
  data *at = device(memory, (size_t)count * memory->k->element_bytes);
  memory->k->load(memory->k, at, values, DTYPE_F32, count);
  return at;
}

static inline float *fetched_data(struct memory *memory, const data *from, int64_t count) {
  float *values = host_floats(memory, count);
  memory->k->fetch(memory->k, values, from, count);
  return values;
}

/* Device memory that is float on every backend. */
static inline float *device_floats(struct memory *memory, const float *values, int64_t count) {
  float *at = device(memory, (size_t)count * sizeof *at);
  memory->k->upload(memory->k, at, values, (size_t)count * sizeof *at);
  return at;
}

static inline float *fetched_floats(struct memory *memory, const float *from, int64_t count) {
  float *values = host_floats(memory, count);
  memory->k->download(memory->k, values, from, (size_t)count * sizeof *values);
  return values;
}

/* Plain bytes to the device and back. */
static inline void *device_bytes(struct memory *memory, const void *values, size_t bytes) {
  void *at = device(memory, bytes);
  memory->k->upload(memory->k, at, values, bytes);
  return at;
}

static inline void *fetched_bytes(struct memory *memory, const void *from, size_t bytes) {
  void *values = host(memory, (int64_t)bytes, 1);
  memory->k->download(memory->k, values, from, bytes);
  return values;
}

static inline void *poisoned_bytes(struct memory *memory, size_t bytes) { /* all ones */
  return device_bytes(memory, memset(host(memory, (int64_t)bytes, 1), 0xff, bytes), bytes);
}

/* Outputs start as NaN, so that what is not written, or is read before, shows. */
static inline float *poison(struct memory *memory, int64_t count) {
  float *values = host_floats(memory, count);
  for (int64_t i = 0; i < count; i++) values[i] = NAN;
  return values;
}

static inline data *poisoned_data(struct memory *memory, int64_t count) {
  return device_data(memory, poison(memory, count), count);
}

static inline float *poisoned_floats(struct memory *memory, int64_t count) {
  return device_floats(memory, poison(memory, count), count);
}

/* ---- expected tensors ---- */

/* The path of something under fixtures/. */
struct fixture_path {
  char text[4096];
};

static inline struct fixture_path fixture_path(const char *folder, const char *name) {
  struct fixture_path path;
  const char *root = getenv("OMNIQUANT_FIXTURES"); /* where they are on another machine than the one that built this */
  int length = snprintf(path.text, sizeof path.text, "%s/%s%s%s", root ? root : FIXTURES, folder, *name ? "/" : "", name);
  assert_in_range(length, 1, sizeof path.text - 1);
  return path;
}

static inline struct safetensors *expected_open(const char *folder, const char *name) {
  struct error error = {0};
  struct safetensors *file;
  if (safetensors_open_file(fixture_path(folder, name).text, &file, &error)) fail_msg("%s", error.message);
  return file;
}

/* A copy of a tensor that has to have that many bytes. */
static inline void *expected_bytes(struct memory *memory, const struct safetensors *file, size_t bytes, const char *name) {
  const struct tensor *tensor = safetensors_find(file, name);
  if (!tensor || tensor->bytes != bytes) fail_msg("%s: not in the fixture, or not of %zu bytes", name, bytes);
  struct error error = {0};
  void *copy = host(memory, (int64_t)bytes, 1);
  if (safetensors_read(tensor, 0, bytes, copy, &error)) fail_msg("%s", error.message);
  return copy;
}

static inline float *expected_floats(struct memory *memory, const struct safetensors *file, int64_t count, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static inline float *expected_floats(struct memory *memory, const struct safetensors *file, int64_t count, const char *format, ...) {
  char name[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(name, sizeof name, format, arguments);
  va_end(arguments);
  const struct tensor *tensor = safetensors_find(file, name);
  if (!tensor || tensor->dtype != DTYPE_F32) fail_msg("%s: not in the fixture, or not F32", name);
  return expected_bytes(memory, file, (size_t)count * sizeof(float), name);
}

/* ---- errors; anything that is not finite is infinitely wrong ---- */

/* Norm of the difference over the norm of what is wanted. */
static inline double norm_error(const float *got, const double *want, int64_t count) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < count; i++) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  if (!isfinite(difference) || !isfinite(size)) return INFINITY;
  return difference == 0 ? 0 : sqrt(difference / size);
}

/* Largest difference over the size of the element wanted or, for small ones, over the root mean square of all: one wrong element shows. */
static inline double peak_error(const float *got, const double *want, int64_t count) {
  double largest = 0, size = 0;
  for (int64_t i = 0; i < count; i++) size += want[i] * want[i];
  size = sqrt(size / (double)count);
  for (int64_t i = 0; i < count; i++) {
    double difference = fabs(got[i] - want[i]);
    if (!isfinite(difference)) return INFINITY;
    if (difference > 0) largest = fmax(largest, difference / fmax(size, fabs(want[i])));
  }
  return largest;
}

/* Largest difference. */
static inline double absolute_error(const float *got, const float *want, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; i++) {
    double difference = fabs((double)got[i] - want[i]);
    if (!isfinite(difference)) return INFINITY;
    largest = difference > largest ? difference : largest;
  }
  return largest;
}

/* An error that has a limit, and the worst met so far, which the test prints. */
struct bound {
  const char *what;
  double limit, worst;
};

static inline void bound_check(struct bound *bound, double error, const char *where) {
  if (!(error <= bound->limit)) fail_msg("%s, %s: error %.3g, limit %.3g", bound->what, where, error, bound->limit);
  bound->worst = error > bound->worst ? error : bound->worst;
}

static inline void bound_print(const struct bound *bounds, size_t count) {
  for (size_t i = 0; i < count; i++)
    print_message("    %s: worst error %.1e, limit %.0e\n", bounds[i].what, bounds[i].worst, bounds[i].limit);
}

/* ---- finite differences ---- */

/* An operation in double, as plain as it can be written. */
struct operation {
  void (*forward)(double *out, double *const *in, const void *shape);
  const void *shape;
  int64_t out_count;
  int64_t in_count[4];
};

/* d sum(dy * out) / d in[which] by central differences, at all places or, where there are more than `most`, at that many random ones. */
struct gradient {
  int64_t count, *at;
  double *want;
};

static inline double operation_loss(const struct operation *operation, double *const *in, const double *dy, double *out) {
  double loss = 0;
  operation->forward(out, in, operation->shape);
  for (int64_t i = 0; i < operation->out_count; i++) loss += dy[i] * out[i];
  return loss;
}

static inline struct gradient central_differences(struct memory *memory, const struct operation *operation, double *const *in, int which,
                                                  const double *dy, int64_t most) {
  const double h = 1e-4;
  int64_t all = operation->in_count[which];
  struct gradient gradient = {.count = all < most ? all : most};
  double *out = host_doubles(memory, operation->out_count);
  uint64_t state = 99;
  gradient.at = host(memory, gradient.count, sizeof *gradient.at);
  gradient.want = host_doubles(memory, gradient.count);
  for (int64_t i = 0; i < gradient.count; i++) {
    int64_t at = gradient.at[i] = all <= most ? i : (int64_t)(random_bits(&state) % (uint64_t)all);
    double *x = &in[which][at], kept = *x;
    *x = kept + h;
    double above = operation_loss(operation, in, dy, out);
    *x = kept - h;
    double below = operation_loss(operation, in, dy, out);
    *x = kept;
    gradient.want[i] = (above - below) / (2 * h);
  }
  return gradient;
}

/* peak_error at those places; every place has to be finite. */
static inline double gradient_error(struct memory *memory, const struct gradient *gradient, const float *got, int64_t all) {
  float *chosen = host_floats(memory, gradient->count);
  for (int64_t i = 0; i < all; i++)
    if (!isfinite(got[i])) return INFINITY;
  for (int64_t i = 0; i < gradient->count; i++) chosen[i] = got[gradient->at[i]];
  return peak_error(chosen, gradient->want, gradient->count);
}

/* ---- backends ---- */

/* for (struct walk walk = {0}; walk_next(&walk);) visits walk.k: each level of the CPU, with 1 thread and with 2. walk.name says which.
 * What walk_record is given has to be the same bit for bit with 2 threads as with 1. */
struct walk {
  struct kernels *k;
  int next;
  char name[40];
  uint64_t recorded, with_one_thread[3]; /* hashes; of each level */
};

static inline void walk_record(struct walk *walk, const void *values, size_t bytes) {
  const unsigned char *byte = values;
  for (size_t i = 0; i < bytes; i++) walk->recorded = (walk->recorded ^ byte[i]) * 0x100000001b3u; /* FNV-1a */
}

static inline void walk_compare(struct walk *walk) {
  int level = (walk->next - 1) % 3;
  bool first = walk->next <= 3;
  if (first) walk->with_one_thread[level] = walk->recorded;
  if (walk->recorded != walk->with_one_thread[level]) fail_msg("%s: other bits than with 1 thread", walk->name);
  walk->recorded = 0;
}

static inline bool walk_level(struct kernels *k, int level) {
#if defined(__x86_64__)
  static void (*const fill[])(struct kernels *) = {cpu_kernels_v2, cpu_kernels_v3, cpu_kernels_v4};
  bool here[] = {true, __builtin_cpu_supports("x86-64-v3"), __builtin_cpu_supports("x86-64-v4")};
  if (here[level]) fill[level](k);
  return here[level];
#else
  (void)k;
  return level == 0;
#endif
}

static inline bool walk_next(struct walk *walk) {
  struct error error = {0};
  if (walk->k) {
    if (walk->k->synchronize(walk->k, &error)) fail_msg("%s", error.message);
    walk->k->close(walk->k);
    walk->k = NULL;
    walk_compare(walk);
  }
  while (walk->next < 6) {
    int level = walk->next % 3, threads = 1 + walk->next / 3;
    walk->next++;
    struct kernels *k = kernels_open("cpu", threads, 0, &error);
    if (!k) fail_msg("%s", error.message);
    if (walk_level(k, level)) {
      walk->k = k;
      snprintf(walk->name, sizeof walk->name, "level %d, %d threads", level + 2, threads);
      return true;
    }
    k->close(k);
  }
  return false;
}

#endif
