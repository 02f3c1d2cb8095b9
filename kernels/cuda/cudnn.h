/* cudnn.h: attention by cuDNN's fused kernels, where the build finds cuDNN's headers and its C++ front end (cudnn.cpp). The library is loaded when
 * the backend is opened; where it is missing, or has no plan for a shape, attention.cu's own kernels do the work. Plain C.
 * For each shape the first plan that cuDNN's heuristic names is kept, among those that give the same bits run after run. */
#ifndef OMNIQUANT_CUDA_CUDNN_H
#define OMNIQUANT_CUDA_CUDNN_H

#include "kernels.h"

struct cudnn;

/* What cuDNN does of one shape. */
struct cudnn_attention {
  struct attention_shape shape;
  bool good;             /* forward and backward both have plans; else `why` */
  int pieces;            /* the backward takes the kv heads in that many equal pieces, which share its scratch */
  size_t forward_bytes;  /* scratch memory of the forward, on the device */
  size_t backward_bytes; /* and of the backward: it holds the slopes of one piece, queries times keys of each head */
  char why[300];         /* cuDNN's words */
};

/* Opens cuDNN on the current device. NULL where it cannot be used. */
struct cudnn *cudnn_open(void *stream, /* cudaStream_t, of everything that is run */
                         int capability /* of the device: 90 for 9.0 */);

/* The same without a device: plans can be made, to see which there are, but not run. */
struct cudnn *cudnn_open_described(const char *device, /* JSON, as cuDNN's device properties are written */
                                   int capability);

void cudnn_close(struct cudnn *cudnn); /* CUDA graphs that hold its kernels have to be destroyed before. NULL: nothing to do */

/* Version of the library: 91900 for 9.19.0; 0 where there is none, or one older than the headers that this was built with. */
int cudnn_version(void);

/* The plans of a shape, made when it is first asked for. NULL without memory; valid until cudnn_close. */
struct cudnn_attention *cudnn_attention(struct cudnn *cudnn, const struct attention_shape *shape);

/* As attention_forward and attention_backward (kernels.h), all of device memory, tensors at multiples of 16 bytes. false when cuDNN fails: the shape
 * is no longer good then. Nothing is allocated or waited for: they can be part of a CUDA graph. */
bool cudnn_forward(struct cudnn *cudnn, struct cudnn_attention *attention, data *out, float *logsum, /* not NULL */
                   const data *q, const data *key, const data *v, char *scratch);
bool cudnn_backward(struct cudnn *cudnn, struct cudnn_attention *attention, data *dq, data *dk, data *dv, const data *dout, const data *out,
                    const float *logsum, const data *q, const data *key, const data *v, char *scratch);

#endif
