/* cublas.h: one matrix product by cuBLASLt. For each shape the algorithm that its heuristic names first is kept: not the fastest of a trial,
 * since which wins may change from run to run, and with it the last bits. */
#ifndef OMNIQUANT_CUDA_CUBLAS_H
#define OMNIQUANT_CUDA_CUBLAS_H

#include "cuda/device.h"

enum { PLANS = 512 }; /* shapes kept; experts see ever new numbers of tokens, which then take the place of older ones */
static const size_t WORKSPACE_BYTES = (size_t)32 << 20;

/* What decides how a product is done. */
struct plan_key {
  int64_t m, n, k, lda;
  uint32_t alignment[4]; /* of A, B, C, bias in bytes, 256 at most; 0 without a bias */
  uint32_t flags;        /* transpose_a, transpose_b, add */
};

struct plan {
  struct plan_key key; /* m 0: empty */
  cublasLtMatmulDesc_t operation;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatmulAlgo_t algorithm;
};

struct cublas {
  cublasLtHandle_t handle;
  void *workspace;
  struct plan plan[PLANS];
};

static bool cublas_check(struct kernels *k, cublasStatus_t status, const struct product *p) {
  if (status != CUBLAS_STATUS_SUCCESS)
    cuda_fail(k, ERROR_WORK, "cuBLASLt's matrix product %lld x %lld x %lld failed: %s", (long long)p->m, (long long)p->n, (long long)p->k,
              cublasLtGetStatusString(status));
  return status == CUBLAS_STATUS_SUCCESS;
}

static uint32_t alignment_of(const void *memory) {
  uint32_t bytes = 256;
  while ((uintptr_t)memory % bytes) bytes /= 2;
  return memory ? bytes : 0;
}

static struct plan_key key_of(const struct product *p) {
  struct plan_key key;
  memset(&key, 0, sizeof key); /* compared by its bytes */
  key.m = p->m, key.n = p->n, key.k = p->k, key.lda = p->lda;
  const void *memory[] = {p->a, p->b, p->c, p->bias};
  for (int i = 0; i < 4; i++) key.alignment[i] = alignment_of(memory[i]);
  key.flags = (uint32_t)p->transpose_a | (uint32_t)p->transpose_b << 1 | (uint32_t)p->add << 2;
  return key;
}

static struct plan *find_plan(struct cublas *cublas, const struct plan_key *key) {
  const unsigned char *byte = (const unsigned char *)key;
  uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
  for (size_t i = 0; i < sizeof *key; i++) hash = (hash ^ byte[i]) * 0x100000001b3u;
  return &cublas->plan[hash % PLANS];
}

static void plan_free(struct plan *plan) {
  if (plan->operation) cublasLtMatmulDescDestroy(plan->operation);
  if (plan->a) cublasLtMatrixLayoutDestroy(plan->a);
  if (plan->b) cublasLtMatrixLayoutDestroy(plan->b);
  if (plan->c) cublasLtMatrixLayoutDestroy(plan->c);
  memset(plan, 0, sizeof *plan);
}

/* cuBLASLt's matrices are column-major: there C^T[n, m] = op(B)^T op(A)^T, and a row-major matrix is its own transpose. */
static bool plan_describe(struct kernels *k, struct plan *plan, const struct product *p) {
  cublasOperation_t first = p->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = p->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = p->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  uint64_t b_rows = (uint64_t)(p->transpose_b ? p->k : p->n), b_columns = (uint64_t)(p->transpose_b ? p->n : p->k);
  uint64_t a_rows = (uint64_t)(p->transpose_a ? p->m : p->k), a_columns = (uint64_t)(p->transpose_a ? p->k : p->m);
  return cublas_check(k, cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), p) &&
         cublas_check(k, cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first), p) &&
         cublas_check(k, cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second), p) &&
         cublas_check(k, cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue), p) &&
         cublas_check(k, cublasLtMatrixLayoutCreate(&plan->b, CUDA_R_16BF, b_rows, b_columns, (int64_t)b_rows), p) &&
         cublas_check(k, cublasLtMatrixLayoutCreate(&plan->a, CUDA_R_16BF, a_rows, a_columns, p->lda), p) &&
         cublas_check(k, cublasLtMatrixLayoutCreate(&plan->c, CUDA_R_16BF, (uint64_t)p->n, (uint64_t)p->m, p->n), p);
}

static bool plan_set_bias(struct kernels *k, struct plan *plan, const struct product *p) {
  return !p->bias ||
         cublas_check(k, cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias), p);
}

/* Where a product is cut along k, its parts have to stay fp32: by default they may be rounded to C's bf16 before they are added. */
static bool plan_choose(struct kernels *k, struct plan *plan, const struct product *p, const struct plan_key *key) {
  struct cublas *cublas = (struct cublas *)k->state->products;
  cublasLtMatmulPreference_t preference = NULL;
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  if (!cublas_check(k, cublasLtMatmulPreferenceCreate(&preference), p)) return false;
  const struct {
    cublasLtMatmulPreferenceAttributes_t what;
    uint32_t value;
  } wish[] = {{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key->alignment[1]},
              {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key->alignment[0]},
              {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key->alignment[2]},
              {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key->alignment[2]},
              {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}};
  bool good = cublas_check(
      k,
      cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES, sizeof WORKSPACE_BYTES),
      p);
  for (size_t i = 0; i < sizeof wish / sizeof *wish && good; i++)
    good = cublas_check(k, cublasLtMatmulPreferenceSetAttribute(preference, wish[i].what, &wish[i].value, sizeof(uint32_t)), p);
  good = good && cublas_check(k,
                              cublasLtMatmulAlgoGetHeuristic(cublas->handle, plan->operation, plan->b, plan->a, plan->c, plan->c,
                                                             preference, 1, &result, &found),
                              p);
  cublasLtMatmulPreferenceDestroy(preference);
  good = good && cublas_check(k, found ? result.state : CUBLAS_STATUS_NOT_SUPPORTED, p);
  if (good) plan->algorithm = result.algo;
  return good;
}

static void multiply(struct kernels *k, const struct product *p) {
  struct cublas *cublas = (struct cublas *)k->state->products;
  const float one = 1, zero = 0;
  if (p->m == 0 || p->n == 0) return;
  struct plan_key key = key_of(p);
  struct plan *plan = find_plan(cublas, &key);
  if (memcmp(&plan->key, &key, sizeof key) != 0) {
    plan_free(plan);
    if (!plan_describe(k, plan, p) || !plan_set_bias(k, plan, p) || !plan_choose(k, plan, p, &key)) return plan_free(plan);
    plan->key = key;
  }
  if (!plan_set_bias(k, plan, p)) return;
  cublas_check(k,
               cublasLtMatmul(cublas->handle, plan->operation, &one, p->b, plan->b, p->a, plan->a, p->add ? &one : &zero, p->c, plan->c,
                              p->c, plan->c, &plan->algorithm, cublas->workspace, WORKSPACE_BYTES, cuda_stream(k)),
               p);
}

static bool cublas_open(struct kernels *k, struct error *error) {
  struct cublas *cublas = (struct cublas *)calloc(1, sizeof *cublas);
  if (!cublas) return !error_set(error, ERROR_WORK, "out of memory opening cuBLASLt");
  k->state->products = cublas;
  cublasStatus_t status = cublasLtCreate(&cublas->handle);
  if (status != CUBLAS_STATUS_SUCCESS)
    return !error_set(error, ERROR_WORK, "--backend cuda: cuBLASLt cannot be opened: %s", cublasLtGetStatusString(status));
  if (cudaMalloc(&cublas->workspace, WORKSPACE_BYTES) != cudaSuccess)
    return !error_set(error, ERROR_WORK, "out of memory on cuda for cuBLASLt's workspace (%zu bytes)", WORKSPACE_BYTES);
  return true;
}

static void cublas_close(struct kernels *k) {
  struct cublas *cublas = (struct cublas *)k->state->products;
  if (!cublas) return;
  for (int i = 0; i < PLANS; i++) plan_free(&cublas->plan[i]);
  if (cublas->workspace) cudaFree(cublas->workspace);
  if (cublas->handle) cublasLtDestroy(cublas->handle);
  free(cublas);
}

#endif
