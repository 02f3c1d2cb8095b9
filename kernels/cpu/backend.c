/* backend.c: opening the CPU backend with the best level of the instruction set that this machine has. */
#include "cpu/backend.h"

#include <dnnl.h>
#include <omp.h>
#include <stdlib.h>

float *cpu_scratch(struct kernels *k, int64_t count) {
  struct backend *cpu = k->state;
  size_t bytes = ((size_t)count * sizeof(float) + 63) / 64 * 64;
  if (bytes > cpu->scratch_bytes) {
    free(cpu->scratch);
    cpu->scratch = aligned_alloc(64, bytes);
    cpu->scratch_bytes = cpu->scratch ? bytes : 0;
    if (!cpu->scratch) error_set(&cpu->failure, ERROR_WORK, "out of memory: %zu bytes for a kernel's scratch", bytes);
  }
  return cpu->scratch;
}

static void bf16_free(struct bf16_products *bf16) {
  for (int i = 0; i < bf16->count; i++) {
    dnnl_primitive_destroy(bf16->made[i].primitive);
    for (int m = 0; m < 3; m++) dnnl_memory_destroy(bf16->made[i].memory[m]);
  }
  dnnl_stream_destroy(bf16->stream);
  dnnl_engine_destroy(bf16->engine);
  free(bf16->a.values);
  free(bf16->b.values);
}

static void cpu_close(struct kernels *k) {
  bf16_free(&k->state->bf16);
  free(k->state->scratch);
  free(k->state);
  free(k);
}

#if defined(__x86_64__)
/* What the compiler may use at -march=x86-64-v3 and -v4; by feature, since not every compiler knows the levels by name. */
static bool has_v3(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

static bool has_v4(void) {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static void choose_level(struct kernels *k) {
#if defined(__x86_64__)
  if (has_v4()) {
    cpu_kernels_v4(k);
    k->level = "x86-64-v4";
  } else if (has_v3()) {
    cpu_kernels_v3(k);
    k->level = "x86-64-v3";
  } else {
    cpu_kernels_v2(k);
    k->level = "x86-64-v2";
  }
#else
  cpu_kernels_v2(k);
  k->level = "generic";
#endif
}

struct kernels *cpu_open(int threads, struct error *error) {
  struct kernels *k = calloc(1, sizeof *k);
  struct backend *state = calloc(1, sizeof *state);
  if (!k || !state) {
    free(k);
    free(state);
    error_set(error, ERROR_WORK, "out of memory opening the CPU backend");
    return NULL;
  }
  k->name = "cpu";
  k->threads = threads;
  k->element_bytes = sizeof(float);
  k->state = state;
  k->close = cpu_close;
  choose_level(k);
  omp_set_dynamic(0);
  omp_set_num_threads(threads); /* oneDNN's products use the same OpenMP threads */
  return k;
}
