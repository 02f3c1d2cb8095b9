/* level.c: all CPU kernels for one level of the instruction set. The build compiles this file once a level (CPU_LEVEL: v2, v3, v4),
 * so every kernel is static and the table filled at the end is all that each copy shows. One operation a file. */
#include "cpu/backend.h"

#include "cpu/matmul_bf16.c"
#include "cpu/vector.h"

#include "cpu/matmul.c"

#include "cpu/activation.c"
#include "cpu/attention.c"
#include "cpu/columns.c"
#include "cpu/cross_entropy.c"
#include "cpu/experts.c"
#include "cpu/loss.c"
#include "cpu/matvec.c"
#include "cpu/memory.c"
#include "cpu/norm.c"
#include "cpu/optimizer.c"
#include "cpu/quantize.c"
#include "cpu/rope.c"
#include "cpu/search.c"
#include "cpu/transform.c"

#define PASTE(a, b)      a##b
#define LEVEL_NAME(a, b) PASTE(a, b)

void LEVEL_NAME(cpu_kernels_, CPU_LEVEL)(struct kernels *k) {
  k->state->multiply = multiply;
  k->allocate = cpu_allocate;
  k->release = cpu_release;
  k->allocate_host = cpu_allocate_host;
  k->release_host = cpu_release_host;
  k->synchronize = cpu_synchronize;
  k->load = cpu_load;
  k->fetch = cpu_fetch;
  k->upload = k->download = k->copy = cpu_copy;
  k->clear = cpu_clear;
  k->linear_forward = linear_forward;
  k->linear_backward_input = linear_backward_input;
  k->linear_backward_weight = linear_backward_weight;
  k->matrix_vector = matrix_vector;
  k->vector_matrix = vector_matrix;
  k->norm_forward = norm_forward;
  k->norm_backward = norm_backward;
  k->rope = rope;
  k->attention_forward = attention_forward;
  k->attention_backward = attention_backward;
  k->silu_gate_forward = silu_gate_forward;
  k->silu_gate_backward = silu_gate_backward;
  k->activation_forward = activation_forward;
  k->activation_backward = activation_backward;
  k->route_forward = route_forward;
  k->route_backward = route_backward;
  k->gather_rows = gather_rows;
  k->gather_rows_backward = gather_rows_backward;
  k->combine_forward = combine_forward;
  k->combine_backward = combine_backward;
  k->fill = fill;
  k->add = add;
  k->accumulate = accumulate;
  k->clamp = clamp;
  k->column_sums = column_sums;
  k->column_range = column_range;
  k->column_squares = column_squares;
  k->quantize_forward = quantize_forward;
  k->quantize_backward = quantize_backward;
  k->quantize_backward_input = quantize_backward_input;
  k->quantize_codes = quantize_codes;
  k->clip_search = clip_search;
  k->expand = expand;
  k->expand_backward = expand_backward;
  k->scale_weight = scale_weight;
  k->scale_weight_backward = scale_weight_backward;
  k->fold_vector = fold_vector;
  k->fold_vector_backward = fold_vector_backward;
  k->mse = mse;
  k->sigmoid_forward = sigmoid_forward;
  k->sigmoid_backward = sigmoid_backward;
  k->sigmoid_inverse = sigmoid_inverse;
  k->step_begin = step_begin;
  k->adamw = adamw;
  k->sign_step = sign_step;
  k->cross_entropy_piece = cross_entropy_piece;
}
