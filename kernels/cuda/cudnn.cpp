/* cudnn.cpp: attention as graphs of NVIDIA's cudnn-frontend, which writes the products, masks and softmax between them as cuDNN wants them. */
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
#include "cuda/cudnn.h"
}

namespace fe = cudnn_frontend;

namespace cudnn_frontend {
void *cudnn_dlhandle; /* where the front end looks cuDNN's functions up; opened once, never closed, as libraries that it loads stay too */
}

namespace {

using graph_pointer = std::shared_ptr<fe::graph::Graph>;

enum tensor { Q = 1, KEY, V, OUT, LOGSUM, DOUT, DQ, DK, DV };

/* Slopes that the backward writes to memory at a time: T x T of a head, since the kernel that holds them on chip adds to dq in no order. */
constexpr size_t MOST_BACKWARD_BYTES = (size_t)512 << 20;

struct plans : cudnn_attention {
  graph_pointer forward, backward;
};

} // namespace

struct cudnn {
  cudnnHandle_t handle;                            /* NULL without a device */
  std::shared_ptr<fe::DeviceProperties> described; /* of a device that is not there; else NULL */
  int capability;
  std::vector<std::unique_ptr<struct plans>> plans;
};

namespace {

/* One tensor of heads that lie beside each other in the rows of a matrix of `columns`. */
fe::graph::Tensor_attributes heads_in_rows(enum tensor tensor, int64_t heads, int64_t columns, const struct attention_shape &shape) {
  int64_t T = shape.tokens, D = shape.head_size;
  return fe::graph::Tensor_attributes().set_uid(tensor).set_dim({1, heads, T, D}).set_stride({T * columns, D, columns, 1});
}

fe::graph::Tensor_attributes logsum_of(int64_t heads, const struct attention_shape &shape) {
  int64_t T = shape.tokens;
  return fe::graph::Tensor_attributes()
      .set_uid(LOGSUM)
      .set_dim({1, heads, T, 1})
      .set_stride({heads * T, T, 1, 1})
      .set_alignment(sizeof(float)) /* of which a caller may have it anywhere */
      .set_data_type(fe::DataType_t::FLOAT);
}

/* What forward and backward say alike. A query sees no key behind it; cuDNN's left bound keeps the keys with key + bound > query, as ours does. */
template <class Options> Options options_of(const struct attention_shape &shape) {
  Options options;
  options.set_attn_scale(1.0f / sqrtf((float)shape.head_size))
      .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
      .set_diagonal_band_right_bound(0);
  if (shape.window > 0 && shape.window < shape.tokens) options.set_diagonal_band_left_bound(shape.window);
  return options;
}

graph_pointer graph_of(const struct cudnn &cudnn) {
  auto graph = std::make_shared<fe::graph::Graph>();
  graph->set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT)
      .set_sm_version(cudnn.capability)
      .set_cuda_graph_retention(fe::CudaGraphRetention_t::NONE); /* plans live as long as the backend */
  if (cudnn.described) graph->set_device_properties(cudnn.described);
  return graph;
}

graph_pointer forward_graph(const struct cudnn &cudnn, const struct attention_shape &shape) {
  auto graph = graph_of(cudnn);
  int64_t heads = shape.heads, kv_heads = shape.kv_heads, wide = heads * shape.head_size, wide_kv = kv_heads * shape.head_size;
  auto [out, logsum] = graph->sdpa(
      graph->tensor(heads_in_rows(Q, heads, wide, shape)), graph->tensor(heads_in_rows(KEY, kv_heads, wide_kv, shape)),
      graph->tensor(heads_in_rows(V, kv_heads, wide_kv, shape)), options_of<fe::graph::SDPA_attributes>(shape).set_generate_stats(true));
  *out = heads_in_rows(OUT, heads, wide, shape).set_output(true);
  *logsum = logsum_of(heads, shape).set_output(true);
  return graph;
}

graph_pointer backward_graph(const struct cudnn &cudnn, const struct attention_shape &shape, int pieces) {
  auto graph = graph_of(cudnn);
  int64_t heads = shape.heads / pieces, kv_heads = shape.kv_heads / pieces;
  int64_t wide = (int64_t)shape.heads * shape.head_size, wide_kv = (int64_t)shape.kv_heads * shape.head_size;
  auto [dq, dk, dv] =
      graph->sdpa_backward(graph->tensor(heads_in_rows(Q, heads, wide, shape)), graph->tensor(heads_in_rows(KEY, kv_heads, wide_kv, shape)),
                           graph->tensor(heads_in_rows(V, kv_heads, wide_kv, shape)), graph->tensor(heads_in_rows(OUT, heads, wide, shape)),
                           graph->tensor(heads_in_rows(DOUT, heads, wide, shape)), graph->tensor(logsum_of(heads, shape)),
                           options_of<fe::graph::SDPA_backward_attributes>(shape).set_deterministic_algorithm(true));
  *dq = heads_in_rows(DQ, heads, wide, shape).set_output(true);
  *dk = heads_in_rows(DK, kv_heads, wide_kv, shape).set_output(true);
  *dv = heads_in_rows(DV, kv_heads, wide_kv, shape).set_output(true);
  return graph;
}

void check(fe::error_t error) {
  if (error.is_bad()) throw std::runtime_error(error.get_message());
}

/* Builds the first plan of the heuristic's list that can be built. What cuDNN notes to differ from run to run is left out: a forward that may come
 * to be so noted; the backward is not, though it adds to dq in any order unless it is told not to. */
void build(const struct cudnn &cudnn, fe::graph::Graph &graph, size_t *bytes) {
  int64_t needed = 0;
  check(graph.validate());
  check(graph.build_operation_graph(cudnn.handle));
  check(graph.create_execution_plans({fe::HeurMode_t::A}));
  graph.deselect_numeric_notes({fe::NumericalNote_t::NONDETERMINISTIC});
  check(graph.check_support());
  check(graph.build_plans(fe::BuildPlanPolicy_t::HEURISTICS_CHOICE));
  check(graph.get_workspace_size(needed));
  *bytes = (size_t)needed;
}

/* The backward in as few pieces as keep its scratch memory within the limit. */
void build_backward(const struct cudnn &cudnn, struct plans &p) {
  for (p.pieces = 1; p.pieces <= p.shape.kv_heads; p.pieces++) {
    if (p.shape.kv_heads % p.pieces) continue;
    p.backward = backward_graph(cudnn, p.shape, p.pieces);
    build(cudnn, *p.backward, &p.backward_bytes);
    if (p.backward_bytes <= MOST_BACKWARD_BYTES) return;
  }
  throw std::runtime_error("the backward of one kv head needs too much scratch memory");
}

/* Makes calls that throw; false, and the shape is no longer good, when one does. */
template <class Calls> bool done(struct cudnn_attention &attention, Calls calls) {
  try {
    calls();
  } catch (const std::exception &exception) {
    attention.good = false;
    snprintf(attention.why, sizeof attention.why, "%s", exception.what());
  }
  return attention.good;
}

/* The library that the front end calls from here on, once for all. */
bool load(void) {
  if (!fe::cudnn_dlhandle) {
    const std::string name = "libcudnn.so." + std::to_string(CUDNN_MAJOR),
                      runtime = "libcudart.so." + std::to_string(CUDART_VERSION / 1000);
    setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", runtime.c_str(), 0); /* this program's own; else the front end takes any that lies about */
    fe::cudnn_dlhandle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  return fe::cudnn_dlhandle && fe::detail::get_backend_version() >= CUDNN_VERSION;
}

struct cudnn *open(void *stream, const char *device, int capability) {
  try {
    if (!load()) return NULL;
    auto opened = std::make_unique<cudnn>();
    opened->capability = capability;
    if (device) {
      opened->described = std::make_shared<fe::DeviceProperties>();
      return opened->described->deserialize({device, device + strlen(device)}).is_good() ? opened.release() : NULL;
    }
    if (fe::detail::create_handle(&opened->handle) != CUDNN_STATUS_SUCCESS) return NULL;
    if (fe::detail::set_stream(opened->handle, (cudaStream_t)stream) == CUDNN_STATUS_SUCCESS) return opened.release();
    fe::detail::destroy_handle(opened->handle);
  } catch (const std::exception &) { /* a function that this library lacks, or no memory */
  }
  return NULL;
}

} // namespace

extern "C" struct cudnn *cudnn_open(void *stream, int capability) {
  return open(stream, NULL, capability);
}

extern "C" struct cudnn *cudnn_open_described(const char *device, int capability) {
  return open(NULL, device, capability);
}

extern "C" void cudnn_close(struct cudnn *cudnn) {
  if (!cudnn) return;
  cudnn->plans.clear();
  if (cudnn->handle) fe::detail::destroy_handle(cudnn->handle);
  delete cudnn;
}

extern "C" int cudnn_version(void) {
  return load() ? (int)fe::detail::get_backend_version() : 0;
}

extern "C" struct cudnn_attention *cudnn_attention(struct cudnn *cudnn, const struct attention_shape *shape) {
  for (auto &p : cudnn->plans)
    if (memcmp(&p->shape, shape, sizeof *shape) == 0) return p.get();
  try {
    cudnn->plans.push_back(std::make_unique<plans>());
  } catch (const std::exception &) {
    return NULL;
  }
  struct plans &p = *cudnn->plans.back();
  p.shape = *shape, p.good = true;
  done(p, [&] {
    /* The front end lays a float a query and head before the scratch memory that it hands to cuDNN, and does not look where that begins then. */
    if (shape->tokens % 8) throw std::runtime_error("tokens are no multiple of 8");
    p.forward = forward_graph(*cudnn, *shape);
    build(*cudnn, *p.forward, &p.forward_bytes);
    build_backward(*cudnn, p);
  });
  return &p;
}

extern "C" bool cudnn_forward(struct cudnn *cudnn, struct cudnn_attention *attention, data *out, float *logsum, const data *q,
                              const data *key, const data *v, char *scratch) {
  auto &p = *static_cast<struct plans *>(attention);
  return done(p, [&] {
    std::unordered_map<int64_t, void *> tensors = {{Q, (void *)q}, {KEY, (void *)key}, {V, (void *)v}, {OUT, out}, {LOGSUM, logsum}};
    check(p.forward->execute(cudnn->handle, tensors, scratch));
  });
}

extern "C" bool cudnn_backward(struct cudnn *cudnn, struct cudnn_attention *attention, data *dq, data *dk, data *dv, const data *dout,
                               const data *out, const float *logsum, const data *q, const data *key, const data *v, char *scratch) {
  auto &p = *static_cast<struct plans *>(attention);
  const int64_t width = p.shape.heads / p.pieces * p.shape.head_size, kv_width = p.shape.kv_heads / p.pieces * p.shape.head_size;
  return done(p, [&] {
    for (int piece = 0; piece < p.pieces; piece++) {
      auto from = [piece](const void *tensor, int64_t columns) { return (void *)((uint16_t *)tensor + piece * columns); };
      float *sums = (float *)logsum + (int64_t)piece * (p.shape.heads / p.pieces) * p.shape.tokens;
      std::unordered_map<int64_t, void *> tensors = {
          {Q, from(q, width)},       {KEY, from(key, kv_width)}, {V, from(v, kv_width)},   {OUT, from(out, width)}, {LOGSUM, sums},
          {DOUT, from(dout, width)}, {DQ, from(dq, width)},      {DK, from(dk, kv_width)}, {DV, from(dv, kv_width)}};
      check(p.backward->execute(cudnn->handle, tensors, scratch));
    }
  });
}
