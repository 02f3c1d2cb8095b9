/* matmul.c: matrix products, by oneDNN: it picks its kernels by the CPU's instruction set, where OpenBLAS goes by a list of CPU models
 * and takes new ones for old (docs/design.md has the measurement). dnnl_sgemm is row-major and runs on OpenMP's threads, or on the
 * caller's alone inside a parallel region. */
#include "cpu/backend.h"

#include <dnnl.h>

static void multiply(struct kernels *k, const struct product *p) {
  if (k->bf16_products && matmul_bf16(k, p)) return;
  dnnl_status_t status =
      dnnl_sgemm(p->transpose_a, p->transpose_b, p->m, p->n, p->k, p->alpha, p->a, p->lda, p->b, p->ldb, p->beta, p->c, p->ldc);
  if (status != dnnl_success) {
#pragma omp critical
    error_set(&k->state->failure, ERROR_WORK, "oneDNN's matrix product %lld x %lld x %lld failed with status %d", (long long)p->m,
              (long long)p->n, (long long)p->k, (int)status);
  }
}

static void matmul(struct kernels *k, struct product p) {
  multiply(k, &p);
  if (k->state->observer) {
#pragma omp critical
    k->state->observer(k->state->observer_context, &p);
  }
}

static void linear_forward(struct kernels *k, data *y, const data *x, const data *w, const data *bias, int64_t tokens, int64_t columns,
                           int64_t rows, bool add) {
  float *out = (float *)y;
  if (bias) {
    const float *b = (const float *)bias;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < rows; i++) out[t * rows + i] = (add ? out[t * rows + i] : 0) + b[i];
  }
  matmul(k, (struct product){'N', 'T', tokens, rows, columns, columns, columns, rows, 1, add || bias ? 1 : 0, (const float *)x,
                             (const float *)w, out});
}

static void linear_backward_input(struct kernels *k, data *dx, const data *dy, const data *w, int64_t tokens, int64_t columns, int64_t rows,
                                  bool add) {
  matmul(k, (struct product){'N', 'N', tokens, columns, rows, rows, columns, columns, 1, add ? 1 : 0, (const float *)dy, (const float *)w,
                             (float *)dx});
}

static void linear_backward_weight(struct kernels *k, data *dw, const data *dy, const data *x, int64_t tokens, int64_t columns,
                                   int64_t rows, int64_t stride) {
  matmul(k, (struct product){'T', 'N', rows, columns, tokens, stride, columns, columns, 1, 0, (const float *)dy, (const float *)x,
                             (float *)dw});
}
