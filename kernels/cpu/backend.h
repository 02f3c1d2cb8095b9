/* backend.h: what the CPU kernels share: their scratch memory and the record of matrix products. */
#ifndef OMNIQUANT_CPU_BACKEND_H
#define OMNIQUANT_CPU_BACKEND_H

#include "kernels.h"

/* One matrix product C = alpha op(A) op(B) + beta C as it was done; bench/step.c replays them to measure the products alone. */
struct product {
  char transpose_a, transpose_b; /* 'N' or 'T' */
  int64_t m, n, k, lda, ldb, ldc;
  float alpha, beta;
  const float *a, *b;
  float *c;
};

/* oneDNN's objects for products of bf16 (matmul_bf16.c). */
enum { BF16_SHAPES = 64 };
struct bf16_products {
  void *engine, *stream;
  int count;
  struct bf16_product {
    struct product shape;
    void *primitive, *memory[3];
  } made[BF16_SHAPES];
  struct bf16_buffer {
    uint16_t *values;
    int64_t count;
  } a, b; /* rounded operands */
};

struct backend {
  float *scratch; /* grown by cpu_scratch, kept */
  size_t scratch_bytes;
  struct bf16_products bf16;
  void (*multiply)(struct kernels *k, const struct product *p); /* the level's product */
  struct error failure;                                         /* first failure, reported by synchronize */
  void (*observer)(void *context, const struct product *done);  /* sees every product; NULL but in benchmarks */
  void *observer_context;
};

/* At least `count` floats that stay valid until the next call; NULL (and the failure kept) without memory. */
float *cpu_scratch(struct kernels *k, int64_t count);

struct kernels *cpu_open(int threads, struct error *error); /* ERROR_WORK without memory; NULL on failure */

void cpu_kernels_v2(struct kernels *k);
void cpu_kernels_v3(struct kernels *k);
void cpu_kernels_v4(struct kernels *k);

#endif
