/* level.c: all CPU kernels for one level of the instruction set. The build compiles this file once a level (CPU_LEVEL: v2, v3, v4),
 * so every kernel is static and the table filled at the end is all that each copy shows. One operation a file. */
#include "cpu/backend.h"

#include "cpu/matmul_bf16.c"
#include "cpu/vector.h"

#include "cpu/matmul.c"

#include "cpu/activation.c"
#include "cpu/attention.c"
#include "cpu/cross_entropy.c"
#include "cpu/loss.c"
#include "cpu/memory.c"
#include "cpu/norm.c"
#include "cpu/optimizer.c"
#include "cpu/quantize.c"
#include "cpu/rope.c"
#include "cpu/search.c"

#define PASTE(a, b)      a##b
#define LEVEL_NAME(a, b) PASTE(a, b)

void LEVEL_NAME(cpu_kernels_, CPU_LEVEL)(struct kernels *k) {
  k->state->multiply = multiply;
  k->allocate = cpu_allocate;
  k->release = cpu_release;
  k->synchronize = cpu_synchronize;
  k->load = cpu_load;
  k->fetch = cpu_fetch;
  k->upload = k->download = k->copy = cpu_copy;
  k->clear = cpu_clear;
  k->linear_forward = linear_forward;
  k->linear_backward_input = linear_backward_input;
  k->linear_backward_weight = linear_backward_weight;
  k->rmsnorm_forward = rmsnorm_forward;
  k->rmsnorm_backward = rmsnorm_backward;
  k->rope = rope;
  k->attention_forward = attention_forward;
  k->attention_backward = attention_backward;
  k->silu_gate_forward = silu_gate_forward;
  k->silu_gate_backward = silu_gate_backward;
  k->fill = fill;
  k->add = add;
  k->column_squares = column_squares;
  k->quantize_forward = quantize_forward;
  k->quantize_backward = quantize_backward;
  k->quantize_codes = quantize_codes;
  k->clip_search = clip_search;
  k->mse = mse;
  k->sigmoid_forward = sigmoid_forward;
  k->sigmoid_backward = sigmoid_backward;
  k->sigmoid_inverse = sigmoid_inverse;
  k->step_begin = step_begin;
  k->adamw = adamw;
  k->sign_step = sign_step;
  k->cross_entropy_piece = cross_entropy_piece;
}
