/* cuda_cudnn.c: which of attention's shapes cuDNN has plans for, forward and backward, on an A100 and an H100 that need not be there: from a
 * description of the device cuDNN compiles its kernels to machine code, and cuda_driver.c's driver takes them for loaded. What they compute is seen on
 * a device alone, by cuda_kernels.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "cuda/cudnn.h"

#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))

/* What CUDA says of the devices; cuDNN names a key that it misses. */
#define DEVICE(name, version, processors, shared, l2, sm_clock, memory_clock)                                                              \
  "{\"deviceName\": \"" name "\", \"deviceVer\": " #version ", \"multiProcessorCount\": " #processors                                      \
  ", \"maxSharedMemoryPerBlockOptin\": " #shared ", \"l2CacheSize\": " #l2 ", \"smClockRateKHz\": " #sm_clock                              \
  ", \"memClockRateKHz\": " #memory_clock ", \"driverVer\": 13000, \"cudaDeviceId\": 0, \"totalGlobalMem\": 85899345920, "                 \
  "\"maxGridSize\": [2147483647, 65535, 65535], \"maxBlockSize\": [1024, 1024, 64], \"regsPerBlock\": 65536, \"warpSize\": 32, "           \
  "\"maxSharedMemoryPerBlock\": 49152, \"reservedSharedMemoryPerBlock\": 1024, \"maxRegistersPerSM\": 65536, \"maxCtasPerSM\": 32, "       \
  "\"maxThreadsPerBlock\": 1024, \"maxThreadsPerSM\": 2048, \"pciDeviceId\": 0, \"isTccDriver\": 0, \"supportCoopLaunch\": 1}"

static const char a100[] = DEVICE("NVIDIA A100-SXM4-80GB", 800, 108, 166912, 41943040, 1410000, 1593000);
static const char h100[] = DEVICE("NVIDIA H100 80GB HBM3", 900, 132, 232448, 52428800, 1980000, 2619000);

static struct cudnn *open_described(const char *device, int capability) {
  struct cudnn *cudnn = cudnn_open_described(device, capability);
  assert_non_null(cudnn);
  return cudnn;
}

static const struct cudnn_attention *plans_of(struct cudnn *cudnn, const struct attention_shape *s) {
  const struct cudnn_attention *plans = cudnn_attention(cudnn, s);
  assert_non_null(plans);
  assert_ptr_equal(cudnn_attention(cudnn, s), plans); /* made once */
  print_message("    T %4d, %3d heads on %2d of %3d, window %4d: ", s->tokens, s->heads, s->kv_heads, s->head_size, s->window);
  if (plans->good)
    print_message("scratch %zu MB forward, %zu MB backward in %d pieces\n", plans->forward_bytes >> 20, plans->backward_bytes >> 20,
                  plans->pieces);
  else
    print_message("none: %s\n", plans->why);
  return plans;
}

/* LLaMA-2-7B and 70B, Falcon-180B, SmolLM2-135M, Mistral-7B; and a window that is felt. */
static void check_models(const char *device, int capability) {
  const struct attention_shape shapes[] = {{2048, 32, 32, 128, 0}, {2048, 64, 8, 128, 0},    {2048, 232, 8, 64, 0}, {2048, 9, 3, 64, 0},
                                           {512, 9, 3, 64, 0},     {2048, 32, 8, 128, 4096}, {512, 32, 8, 128, 100}};
  struct cudnn *cudnn = open_described(device, capability);
  for (int i = 0; i < COUNT(shapes); i++) {
    const struct attention_shape *s = &shapes[i];
    const struct cudnn_attention *plans = plans_of(cudnn, s);
    if (!plans->good) fail_msg("no plans: %s", plans->why);
    /* The backward that adds to dq by atomics, in any order, holds fp32 sums [heads, T, D]; the other one bf16 slopes [heads, T, T]. */
    size_t slopes = (size_t)s->heads / (size_t)plans->pieces * (size_t)s->tokens * (size_t)s->tokens * 2;
    assert_in_range(plans->backward_bytes, slopes, (size_t)512 << 20);
    assert_int_equal(s->kv_heads % plans->pieces, 0);
  }
  cudnn_close(cudnn);
}

static void models_on_an_a100(void **context) {
  (void)context;
  check_models(a100, 80);
}

static void models_on_an_h100(void **context) {
  (void)context;
  check_models(h100, 90);
}

/* What is left to the own kernels, with cuDNN's reason. */
static void shapes_without_plans(void **context) {
  (void)context;
  struct cudnn *cudnn = open_described(a100, 80);
  const struct attention_shape shapes[] = {{64, 4, 1, 10, 0}, {65, 4, 1, 64, 0}, {64, 2, 2, 256, 0}, {8192, 8, 1, 64, 0}};
  for (int i = 0; i < COUNT(shapes); i++) {
    const struct cudnn_attention *plans = plans_of(cudnn, &shapes[i]);
    assert_false(plans->good);
    assert_int_not_equal(strlen(plans->why), 0);
  }
  cudnn_close(cudnn);
}

/* Without a device nothing can be run: the shape falls to the own kernels. All that a run has to be given is looked at before. */
static void what_cannot_be_run(void **context) {
  (void)context;
  struct cudnn *cudnn = open_described(a100, 80);
  struct attention_shape shape = {128, 4, 2, 64, 0};
  struct cudnn_attention *plans = cudnn_attention(cudnn, &shape);
  static _Alignas(256) char memory[256];
  data *x = (data *)(void *)memory;
  for (int backward = 0; backward < 2; backward++) {
    plans->good = true;
    if (backward)
      assert_false(cudnn_backward(cudnn, plans, x, x, x, x, x, (float *)(void *)memory, x, x, x, memory));
    else
      assert_false(cudnn_forward(cudnn, plans, x, (float *)(void *)memory, x, x, x, memory));
    assert_false(plans->good);
    print_message("    %s\n", plans->why);
    assert_null(strstr(plans->why, "variant pack")); /* that something is missing, or not aligned */
  }
  cudnn_close(cudnn);
}

static void a_description_that_is_none(void **context) {
  (void)context;
  assert_null(cudnn_open_described("{}", 80));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(models_on_an_a100),  cmocka_unit_test(models_on_an_h100),          cmocka_unit_test(shapes_without_plans),
      cmocka_unit_test(what_cannot_be_run), cmocka_unit_test(a_description_that_is_none),
  };
  /* Before cuDNN asks for the one of this name. */
  if (!dlopen(DRIVER, RTLD_NOW | RTLD_GLOBAL)) {
    printf("%s\n", dlerror());
    return 1;
  }
  if (!cudnn_version()) {
    printf("skipped: cuDNN cannot be loaded, or is older than its headers\n");
    return 77;
  }
  return cmocka_run_group_tests(tests, NULL, NULL);
}
