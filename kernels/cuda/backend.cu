/* backend.cu: opening a device, and all of its kernels: one operation a file, compiled together, so that every one is static and the table
 * filled at the end is all that shows. */
#include "cuda/device.h"

#ifdef OMNIQUANT_NCCL
extern "C" const struct device_link nccl_link; /* mpi/nccl_link.h */
#elif defined OMNIQUANT_EMULATED
extern "C" const struct device_link nccl_link __attribute__((weak)); /* of programs that have it, over an NCCL that is none */
#endif

namespace {

#include "cuda/activation.cu"
#include "cuda/attention.cu"
#include "cuda/columns.cu"
#include "cuda/cross_entropy.cu"
#include "cuda/experts.cu"
#include "cuda/lane.cu"
#include "cuda/loss.cu"
#include "cuda/matmul.cu"
#include "cuda/matvec.cu"
#include "cuda/memory.cu"
#include "cuda/norm.cu"
#include "cuda/optimizer.cu"
#include "cuda/quantize.cu"
#include "cuda/record.cu"
#include "cuda/rope.cu"
#include "cuda/search.cu"
#include "cuda/transform.cu"

} // namespace

static void fill_table(struct kernels *k) {
  k->allocate = cuda_allocate;
  k->release = cuda_release;
  k->owns = cuda_owns;
  k->synchronize = cuda_synchronize;
  k->load = cuda_load;
  k->fetch = cuda_fetch;
  k->upload = cuda_upload;
  k->download = cuda_download;
  k->copy = cuda_copy;
  k->clear = cuda_clear;
  k->allocate_host = allocate_host;
  k->release_host = release_host;
  k->room = room;
  k->lane_open = lane_open;
  k->lane_close = lane_close;
  k->send = lane_send;
  k->follow = lane_follow;
  k->join = lane_join;
  k->use = lane_use;
  k->idle = lane_idle;
  k->repeat = repeat;
  k->forget = forget;
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

static void cuda_close(struct kernels *k) {
  struct backend *cuda = k->state;
  cublas_close(k);
#ifdef OMNIQUANT_CUDNN
  cudnn_close(cuda->cudnn);
#endif
  if (cuda->scratch) cudaFree(cuda->scratch);
  if (cuda->stream) cudaStreamDestroy(cuda_stream(k));
  free(cuda);
  free(k);
}

/* The device of that number among the visible ones, in turn. */
static int find_device(int *device, struct cudaDeviceProp *properties, struct error *error) {
  int count = 0;
  cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0)
    return error_set(error, ERROR_WORK, "--backend cuda: no device: %s; use --backend cpu",
                     code != cudaSuccess ? cudaGetErrorString(code) : "none is visible");
  *device %= count;
  if ((code = cudaGetDeviceProperties(properties, *device)) != cudaSuccess)
    return error_set(error, ERROR_WORK, "--backend cuda: device %d of %d cannot be used: %s", *device, count, cudaGetErrorString(code));
  if (properties->major < 8)
    return error_set(error, ERROR_WORK, "--backend cuda: %s has compute capability %d.%d; 8.0 or newer is needed for bf16",
                     properties->name, properties->major, properties->minor);
  return 0;
}

static int open_device(struct kernels *k, int device, struct error *error) {
  struct backend *cuda = k->state;
  struct cudaDeviceProp properties;
  cudaStream_t stream;
  cudaError_t code;
  if (find_device(&device, &properties, error)) return error->code;
  cuda->device = device;
  if ((code = cudaSetDevice(device)) != cudaSuccess || (code = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) != cudaSuccess)
    return error_set(error, ERROR_WORK, "--backend cuda: device %d cannot be used: %s", device, cudaGetErrorString(code));
  cuda->stream = cuda->works = stream;
  snprintf(cuda->level, sizeof cuda->level, "%.70s", properties.name);
#ifdef OMNIQUANT_CUDNN
  cuda->cudnn = cudnn_open(stream, 10 * properties.major + properties.minor);
  size_t length = strlen(cuda->level);
  if (cuda->cudnn)
    snprintf(cuda->level + length, sizeof cuda->level - length, ", cuDNN %d.%d", cudnn_version() / 10000, cudnn_version() / 100 % 100);
#endif
  return cublas_open(k, error) ? 0 : error->code;
}

#ifndef OMNIQUANT_EMULATED
extern "C" size_t cuda_memory_taken(struct kernels *k) {
  return memory_taken(k);
}

extern "C" bool cuda_usable(int device, struct error *reason) {
  struct cudaDeviceProp properties;
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaErrorNoDevice) return false; /* or all are hidden by CUDA_VISIBLE_DEVICES */
  return find_device(&device, &properties, reason) == 0;
}
#endif

extern "C" struct kernels *CUDA_OPEN(int device, struct error *error) {
  struct kernels *k = (struct kernels *)calloc(1, sizeof *k);
  struct backend *state = (struct backend *)calloc(1, sizeof *state);
  if (!k || !state) {
    free(k);
    free(state);
    error_set(error, ERROR_WORK, "out of memory opening the CUDA backend");
    return NULL;
  }
#ifdef OMNIQUANT_EMULATED
  k->name = "emulated";
  k->link = &nccl_link;
#else
  k->name = "cuda";
#ifdef OMNIQUANT_NCCL
  k->link = &nccl_link;
#endif
#endif
  k->level = state->level;
  k->threads = 1;
  k->element_bytes = sizeof(bf16);
  k->state = state;
  k->close = cuda_close;
  fill_table(k);
  if (open_device(k, device, error)) {
    cuda_close(k);
    return NULL;
  }
  return k;
}
