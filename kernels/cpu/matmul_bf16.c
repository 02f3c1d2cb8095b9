/* matmul_bf16.c: products of bf16-rounded inputs with fp32 sums, where the CPU has instructions for them: about twice as fast as fp32.
 * Operands are rounded into buffers, oneDNN's primitives are made once for each shape and kept. */
#include "cpu/backend.h"

#include <dnnl.h>
#include <omp.h>
#include <stdlib.h>

/* Nearest even; NaN stays NaN. */
static inline uint16_t bf16_from_float(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

static void round_to_bf16(uint16_t *to, const float *from, int64_t count) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) to[i] = bf16_from_float(from[i]);
}

/* Rows that lie `stride` apart, one behind the other. */
static void round_rows_to_bf16(uint16_t *to, const float *from, int64_t rows, int64_t columns, int64_t stride) {
  if (stride == columns) {
    round_to_bf16(to, from, rows * columns);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++)
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) to[r * columns + c] = bf16_from_float(from[r * stride + c]);
}

#if DNNL_VERSION_MAJOR == 2

static bool cpu_has_bf16(void) {
  return (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_bf16) == dnnl_cpu_isa_avx512_core_bf16;
}

/* rows x columns; transposed: the matrix lies in memory as columns x rows. */
static bool describe(dnnl_memory_desc_t *matrix, int64_t rows, int64_t columns, bool transposed, dnnl_data_type_t type) {
  const dnnl_dims_t sizes = {rows, columns}, strides = {transposed ? 1 : columns, transposed ? rows : 1};
  return dnnl_memory_desc_init_by_strides(matrix, 2, sizes, type, strides) == dnnl_success;
}

static bool make_primitive(struct bf16_product *made, dnnl_engine_t engine, const struct product *p) {
  dnnl_memory_desc_t a, b, c;
  dnnl_matmul_desc_t matmul;
  dnnl_primitive_attr_t attributes = NULL;
  dnnl_post_ops_t after = NULL;
  dnnl_primitive_desc_t description = NULL;
  dnnl_primitive_t primitive = NULL;
  dnnl_memory_t memory[3] = {NULL, NULL, NULL};
  bool good = describe(&a, p->m, p->k, p->transpose_a == 'T', dnnl_bf16) && describe(&b, p->k, p->n, p->transpose_b == 'T', dnnl_bf16) &&
              describe(&c, p->m, p->n, false, dnnl_f32) && dnnl_matmul_desc_init(&matmul, &a, &b, NULL, &c) == dnnl_success &&
              dnnl_primitive_attr_create(&attributes) == dnnl_success && dnnl_post_ops_create(&after) == dnnl_success;
  if (good && p->beta == 1) good = dnnl_post_ops_append_sum(after, 1) == dnnl_success;
  good = good && dnnl_primitive_attr_set_post_ops(attributes, after) == dnnl_success &&
         dnnl_primitive_desc_create(&description, &matmul, attributes, engine, NULL) == dnnl_success &&
         dnnl_primitive_create(&primitive, description) == dnnl_success &&
         dnnl_memory_create(&memory[0], &a, engine, DNNL_MEMORY_NONE) == dnnl_success &&
         dnnl_memory_create(&memory[1], &b, engine, DNNL_MEMORY_NONE) == dnnl_success &&
         dnnl_memory_create(&memory[2], &c, engine, DNNL_MEMORY_NONE) == dnnl_success;
  dnnl_primitive_desc_destroy(description);
  dnnl_post_ops_destroy(after);
  dnnl_primitive_attr_destroy(attributes);
  *made = (struct bf16_product){*p, primitive, {memory[0], memory[1], memory[2]}};
  return good;
}

static bool same_shape(const struct product *a, const struct product *b) {
  return a->m == b->m && a->n == b->n && a->k == b->k && a->transpose_a == b->transpose_a && a->transpose_b == b->transpose_b &&
         a->beta == b->beta;
}

/* The kept primitive of a shape; NULL if it cannot be made or there are more shapes than a block has. */
static struct bf16_product *find_primitive(struct bf16_products *bf16, const struct product *p) {
  for (int i = 0; i < bf16->count; i++)
    if (same_shape(&bf16->made[i].shape, p)) return &bf16->made[i];
  if (bf16->count == BF16_SHAPES) return NULL;
  struct bf16_product *made = &bf16->made[bf16->count++]; /* freed with the backend even when it is not whole */
  return make_primitive(made, bf16->engine, p) ? made : NULL;
}

static uint16_t *rounded_operand(struct bf16_buffer *buffer, const float *from, int64_t rows, int64_t columns, int64_t stride) {
  int64_t count = rows * columns;
  if (count > buffer->count) {
    free(buffer->values);
    buffer->values = aligned_alloc(64, ((size_t)count * sizeof(uint16_t) + 63) / 64 * 64);
    buffer->count = buffer->values ? count : 0;
  }
  if (buffer->values) round_rows_to_bf16(buffer->values, from, rows, columns, stride);
  return buffer->values;
}

/* Whether it was done. Only linear layers' products are, of which a transposed A may be some columns of a wider matrix: those of an attention
 * head lie with gaps between the other operands' rows, or are small and called from many threads at a time. */
static bool matmul_bf16(struct kernels *k, const struct product *p) {
  struct bf16_products *bf16 = &k->state->bf16;
  bool transposed = p->transpose_a == 'T';
  bool dense = p->ldc == p->n && (transposed || p->lda == p->k) && p->ldb == (p->transpose_b == 'T' ? p->k : p->n);
  if (!dense || p->alpha != 1 || omp_in_parallel() || !cpu_has_bf16()) return false;
  if (!bf16->engine && (dnnl_engine_create((dnnl_engine_t *)&bf16->engine, dnnl_cpu, 0) != dnnl_success ||
                        dnnl_stream_create((dnnl_stream_t *)&bf16->stream, bf16->engine, dnnl_stream_default_flags) != dnnl_success))
    return false;
  struct bf16_product *made = find_primitive(bf16, p);
  uint16_t *a = made ? rounded_operand(&bf16->a, p->a, transposed ? p->k : p->m, transposed ? p->m : p->k, p->lda) : NULL;
  uint16_t *b = a ? rounded_operand(&bf16->b, p->b, p->k, p->n, p->n) : NULL;
  if (!b) return false;
  const dnnl_exec_arg_t arguments[] = {
      {DNNL_ARG_SRC, made->memory[0]}, {DNNL_ARG_WEIGHTS, made->memory[1]}, {DNNL_ARG_DST, made->memory[2]}};
  return dnnl_memory_set_data_handle(made->memory[0], a) == dnnl_success &&
         dnnl_memory_set_data_handle(made->memory[1], b) == dnnl_success &&
         dnnl_memory_set_data_handle(made->memory[2], p->c) == dnnl_success &&
         dnnl_primitive_execute(made->primitive, bf16->stream, 3, arguments) == dnnl_success &&
         dnnl_stream_wait(bf16->stream) == dnnl_success;
}

#else /* another interface: not used there yet */

static bool matmul_bf16(struct kernels *k, const struct product *p) {
  (void)k;
  (void)p;
  (void)round_rows_to_bf16;
  return false;
}

#endif
