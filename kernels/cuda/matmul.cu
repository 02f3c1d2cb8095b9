/* matmul.cu: the linear layers' matrix products, bf16 with fp32 sums. */
#include "cuda/device.h"

/* C[m, n] (+)= op(A)[m, k] op(B)[k, n] (+ bias[n]), all row-major. */
struct product {
  bool transpose_a, transpose_b; /* A is stored [k, m], B [n, k] */
  int64_t m, n, k, lda;          /* A's rows as they are stored lie lda apart, the others' behind one another */
  bool add;
  const bf16 *a, *b, *bias; /* bias NULL: none */
  bf16 *c;
};

#include "cuda/cublas.h"

static void matmul(struct kernels *k, const char *name, const struct product &p) {
  timed timer(k, name, 2.0 * (double)(p.m * p.k + p.k * p.n + (p.add ? 2 : 1) * p.m * p.n), 2.0 * (double)p.m * (double)p.n * (double)p.k);
  if (!k->state->failure.code) multiply(k, &p);
}

static void linear_forward(struct kernels *k, data *y, const data *x, const data *w, const data *bias, int64_t tokens, int64_t columns,
                           int64_t rows, bool add) {
  matmul(k, "linear_forward", {false, true, tokens, rows, columns, columns, add, elements(x), elements(w), elements(bias), elements(y)});
}

static void linear_backward_input(struct kernels *k, data *dx, const data *dy, const data *w, int64_t tokens, int64_t columns, int64_t rows,
                                  bool add) {
  matmul(k, "linear_backward_input", {false, false, tokens, columns, rows, rows, add, elements(dy), elements(w), NULL, elements(dx)});
}

static void linear_backward_weight(struct kernels *k, data *dw, const data *dy, const data *x, int64_t tokens, int64_t columns,
                                   int64_t rows, int64_t stride) {
  matmul(k, "linear_backward_weight", {true, false, rows, columns, tokens, stride, false, elements(dy), elements(x), NULL, elements(dw)});
}
