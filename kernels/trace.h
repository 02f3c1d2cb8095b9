/* trace.h: a backend that notes what is done: of every operation how often it was called, and the arithmetic and the memory traffic that its
 * arguments ask for. In front of another backend it passes all on and takes the time of each; in front of none it computes nothing, so that the
 * program's own code, run over it, tells what a model needs that no machine at hand could hold. */
#ifndef OMNIQUANT_TRACE_H
#define OMNIQUANT_TRACE_H

#include "kernels.h"

/* The operations of struct kernels that are noted, in its order; products that round their operands to bf16 are told apart. */
#define TRACE_OPERATIONS(X)                                                                                                                \
  X(load)                                                                                                                                  \
  X(fetch)                                                                                                                                 \
  X(upload)                                                                                                                                \
  X(download)                                                                                                                              \
  X(copy)                                                                                                                                  \
  X(clear)                                                                                                                                 \
  X(linear_forward)                                                                                                                        \
  X(linear_backward_input)                                                                                                                 \
  X(linear_backward_weight)                                                                                                                \
  X(linear_forward_bf16)                                                                                                                   \
  X(linear_backward_input_bf16)                                                                                                            \
  X(linear_backward_weight_bf16)                                                                                                           \
  X(matrix_vector)                                                                                                                         \
  X(vector_matrix)                                                                                                                         \
  X(norm_forward)                                                                                                                          \
  X(norm_backward)                                                                                                                         \
  X(rope)                                                                                                                                  \
  X(attention_forward)                                                                                                                     \
  X(attention_backward)                                                                                                                    \
  X(silu_gate_forward)                                                                                                                     \
  X(silu_gate_backward)                                                                                                                    \
  X(activation_forward)                                                                                                                    \
  X(activation_backward)                                                                                                                   \
  X(route_forward)                                                                                                                         \
  X(route_backward)                                                                                                                        \
  X(gather_rows)                                                                                                                           \
  X(gather_rows_backward)                                                                                                                  \
  X(combine_forward)                                                                                                                       \
  X(combine_backward)                                                                                                                      \
  X(fill)                                                                                                                                  \
  X(add)                                                                                                                                   \
  X(accumulate)                                                                                                                            \
  X(clamp)                                                                                                                                 \
  X(column_sums)                                                                                                                           \
  X(column_range)                                                                                                                          \
  X(column_squares)                                                                                                                        \
  X(quantize_forward)                                                                                                                      \
  X(quantize_backward)                                                                                                                     \
  X(quantize_backward_input)                                                                                                               \
  X(quantize_codes)                                                                                                                        \
  X(clip_search)                                                                                                                           \
  X(expand)                                                                                                                                \
  X(expand_backward)                                                                                                                       \
  X(scale_weight)                                                                                                                          \
  X(scale_weight_backward)                                                                                                                 \
  X(fold_vector)                                                                                                                           \
  X(fold_vector_backward)                                                                                                                  \
  X(mse)                                                                                                                                   \
  X(sigmoid_forward)                                                                                                                       \
  X(sigmoid_backward)                                                                                                                      \
  X(sigmoid_inverse)                                                                                                                       \
  X(step_begin)                                                                                                                            \
  X(adamw)                                                                                                                                 \
  X(sign_step)                                                                                                                             \
  X(cross_entropy_piece)

#define TRACE_ENUM(name) TRACE_##name,
enum trace_operation { TRACE_OPERATIONS(TRACE_ENUM) TRACE_COUNT };
#undef TRACE_ENUM

/* Name of an operation: its member's in struct kernels. */
const char *trace_name(enum trace_operation operation);

/* What an operation came to, summed over its calls. */
struct trace_row {
  double calls;
  double flops;   /* arithmetic of products, of attention and of the grid search; 0 for operations that memory bounds */
  double bytes;   /* each argument read or written once, as a kernel must that has no cache to hope for */
  double seconds; /* with a backend behind it */
};

struct trace {
  struct trace_row row[TRACE_COUNT];
  size_t allocated; /* bytes of device memory now held */
};

/* Opens the backend. `behind` stays the caller's and must outlive it; NULL: nothing is computed, memory is counted and cannot be read, and
 * tokens go to experts evenly. `trace` may be cleared and copied at any time. NULL without memory. */
struct kernels *trace_open(struct kernels *behind, size_t element_bytes, /* of data; with a backend behind, its own */
                           struct trace *trace);

#endif
