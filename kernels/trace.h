/* trace.h: a backend that notes what is done: of every operation how often it was called, and the arithmetic and the memory traffic that its
 * arguments ask for. In front of another backend it passes all on and takes the time of each; in front of none it computes nothing, so that the
 * program's own code, run over it, tells what a model needs that no machine at hand could hold. */
#ifndef OMNIQUANT_TRACE_H
#define OMNIQUANT_TRACE_H

#include "kernels.h"

/* What operations are for, as time is shown. */
enum trace_part {
  TRACE_PRODUCTS,
  TRACE_ATTENTION,
  TRACE_QUANTIZER,
  TRACE_TRANSFORMATION, /* LET: statistics, scales, folding */
  TRACE_NORMS,          /* and the rotation */
  TRACE_ACTIVATIONS,
  TRACE_EXPERTS, /* routing */
  TRACE_LOSS,
  TRACE_OPTIMIZER,
  TRACE_MOVES,
  TRACE_PARTS
};

/* "products" */
const char *trace_part_name(enum trace_part part);

/* The operations of struct kernels that are noted, and their parts; products that round their operands to bf16 are told apart. */
#define TRACE_OPERATIONS(X)                                                                                                                \
  X(load, MOVES)                                                                                                                           \
  X(fetch, MOVES)                                                                                                                          \
  X(upload, MOVES)                                                                                                                         \
  X(download, MOVES)                                                                                                                       \
  X(copy, MOVES)                                                                                                                           \
  X(clear, MOVES)                                                                                                                          \
  X(linear_forward, PRODUCTS)                                                                                                              \
  X(linear_backward_input, PRODUCTS)                                                                                                       \
  X(linear_backward_weight, PRODUCTS)                                                                                                      \
  X(linear_forward_bf16, PRODUCTS)                                                                                                         \
  X(linear_backward_input_bf16, PRODUCTS)                                                                                                  \
  X(linear_backward_weight_bf16, PRODUCTS)                                                                                                 \
  X(matrix_vector, TRANSFORMATION)                                                                                                         \
  X(vector_matrix, TRANSFORMATION)                                                                                                         \
  X(norm_forward, NORMS)                                                                                                                   \
  X(norm_backward, NORMS)                                                                                                                  \
  X(rope, NORMS)                                                                                                                           \
  X(attention_forward, ATTENTION)                                                                                                          \
  X(attention_backward, ATTENTION)                                                                                                         \
  X(silu_gate_forward, ACTIVATIONS)                                                                                                        \
  X(silu_gate_backward, ACTIVATIONS)                                                                                                       \
  X(activation_forward, ACTIVATIONS)                                                                                                       \
  X(activation_backward, ACTIVATIONS)                                                                                                      \
  X(route_forward, EXPERTS)                                                                                                                \
  X(route_backward, EXPERTS)                                                                                                               \
  X(gather_rows, EXPERTS)                                                                                                                  \
  X(gather_rows_backward, EXPERTS)                                                                                                         \
  X(combine_forward, EXPERTS)                                                                                                              \
  X(combine_backward, EXPERTS)                                                                                                             \
  X(fill, MOVES)                                                                                                                           \
  X(add, MOVES)                                                                                                                            \
  X(accumulate, MOVES)                                                                                                                     \
  X(clamp, MOVES)                                                                                                                          \
  X(column_sums, TRANSFORMATION)                                                                                                           \
  X(column_range, TRANSFORMATION)                                                                                                          \
  X(column_squares, TRANSFORMATION)                                                                                                        \
  X(quantize_forward, QUANTIZER)                                                                                                           \
  X(quantize_backward, QUANTIZER)                                                                                                          \
  X(quantize_backward_input, QUANTIZER)                                                                                                    \
  X(quantize_codes, QUANTIZER)                                                                                                             \
  X(clip_search, QUANTIZER)                                                                                                                \
  X(expand, TRANSFORMATION)                                                                                                                \
  X(expand_backward, TRANSFORMATION)                                                                                                       \
  X(scale_weight, TRANSFORMATION)                                                                                                          \
  X(scale_weight_backward, TRANSFORMATION)                                                                                                 \
  X(fold_vector, TRANSFORMATION)                                                                                                           \
  X(fold_vector_backward, TRANSFORMATION)                                                                                                  \
  X(mse, LOSS)                                                                                                                             \
  X(sigmoid_forward, OPTIMIZER)                                                                                                            \
  X(sigmoid_backward, OPTIMIZER)                                                                                                           \
  X(sigmoid_inverse, OPTIMIZER)                                                                                                            \
  X(step_begin, OPTIMIZER)                                                                                                                 \
  X(adamw, OPTIMIZER)                                                                                                                      \
  X(sign_step, OPTIMIZER)                                                                                                                  \
  X(cross_entropy_piece, LOSS)

#define TRACE_ENUM(name, part) TRACE_##name,
enum trace_operation { TRACE_OPERATIONS(TRACE_ENUM) TRACE_COUNT };
#undef TRACE_ENUM

enum trace_part trace_part(enum trace_operation operation);

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
  size_t allocated; /* bytes of device memory that were allocated; releasing does not count */
};

/* Opens the backend. `behind` stays the caller's and must outlive it; NULL: nothing is computed, memory is counted and cannot be read, and
 * tokens go to experts evenly. `trace` may be cleared and copied at any time. NULL without memory. */
struct kernels *trace_open(struct kernels *behind, size_t element_bytes, /* of data; with a backend behind, its own */
                           struct trace *trace);

#endif
