/* kernels.h: every device operation once. A backend is a filled `struct kernels`, chosen when it is opened; callers name an operation
 * k->operation(k, ...) and know nothing else of the device.
 *
 * Two kinds of memory live on a device. `data` is what large tensors are made of, in the backend's own element type (fp32 on the CPU,
 * bf16 on CUDA); it is opaque, data_at() moves inside it. Learnable parameters, their gradients and statistics are always float.
 * All matrices are row-major. Operations may run asynchronously, in the order of their calls; they cannot fail by themselves: a device's
 * failure is kept and comes back from synchronize(). Results are the same bit for bit, run after run, at the same number of threads.
 *
 * Letters: T tokens of a sample, C_in and C_out the columns and rows of a linear layer's weight, H hidden size, D head size. */
#ifndef OMNIQUANT_KERNELS_H
#define OMNIQUANT_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "error.h"
#include "quantizer.h"

struct device_link; /* mpi/device.h */

typedef struct data data; /* never defined: elements of the backend's type */

/* The grid of clip_search: factors 1, 1 - stride, ... for each end of a group's range. */
enum { CLIP_SEARCH_STEPS = 12 };
#define CLIP_SEARCH_STRIDE 0.04f

/* A matrix and how it is quantized: a weight [C_out, C_in], or activations [T, C_in]. */
struct quantized_shape {
  int64_t rows;
  int64_t columns;
  struct quantizer quantizer;
};

static inline int64_t groups_per_row(const struct quantized_shape *shape) {
  return (shape->columns + shape->quantizer.group_size - 1) / shape->quantizer.group_size;
}

static inline int64_t groups_of(const struct quantized_shape *shape) {
  return shape->rows * groups_per_row(shape);
}

/* What LET makes of a weight before it is quantized (method.md section 3): w[r, c] * row[r] * column[c]. */
struct weight_scales {
  const float *row;    /* [C_out]; NULL: 1 */
  const float *column; /* [C_in]; NULL: 1 */
};

/* Which entry of a vector s belongs to each channel of something made of heads: channel c of head h = c / head_size takes
 * s[h / share * period + c % head_size % period]. One head as wide as the vector, share 1 and period head_size: s[c]. */
struct channel_map {
  int head_size;
  int share;  /* neighbouring heads that use the same entries */
  int period; /* head_size, or half of it where the two channels of a rotated pair use one entry */
};

/* The rows of a matrix that a norm takes each by itself. */
struct norm_shape {
  int64_t rows, columns;
  float eps;
  bool centered; /* LayerNorm: the mean is taken off; false: RMSNorm */
};

/* An MLP's activation; the first is gated: silu(gate) * up. */
enum activation { ACTIVATION_SILU_GATED, ACTIVATION_RELU, ACTIVATION_GELU };

/* Which experts each token goes to. The rows that experts compute are grouped by expert: each expert's are consecutive, in the order of
 * their tokens. All arrays in device memory. */
struct routing {
  int tokens, experts;
  int top;         /* experts a token */
  int32_t *expert; /* [T, top] chosen, the most probable first; of equals the one with the lower number */
  float *weight;   /* [T, top] their shares, which sum to 1 */
  int32_t *row;    /* [T, top] row of the token in each one's group */
  int32_t *token;  /* [T * top] the token of each row */
  int32_t *offset; /* [experts + 1] each expert's first row; the last entry: T * top */
};

/* Heads of an attention and what a query may see. */
struct attention_shape {
  int tokens;
  int heads;     /* of the queries */
  int kv_heads;  /* of keys and values; divides heads: query head h reads kv head h / (heads / kv_heads) */
  int head_size; /* D */
  int window;    /* a query sees the last `window` positions, itself included; 0: all before it */
};

/* Device counters of an optimizer, kept there so that a step needs no look from the host. */
struct step_state {
  int32_t finite;  /* whether the step in work is to be applied */
  int32_t taken;   /* steps applied */
  int32_t skipped; /* steps whose loss or gradient was not finite */
};

/* Parameters that learn at one rate. */
struct learnables {
  float *x; /* [count] */
  int64_t count;
  float lr;
};

/* Running cross entropy of tokens over a vocabulary that comes in pieces; see cross_entropy_piece. */
struct cross_entropy {
  float *maximum; /* [tokens] largest logit so far; begin at -INFINITY */
  float *sum;     /* [tokens] sum of exp(logit - maximum) so far; begin at 0 */
  float *target;  /* [tokens] logit of the token that is to be predicted */
};

struct kernels {
  const char *name;               /* "cpu", "cuda" */
  const char *level;              /* what of the device is used, for the log: "x86-64-v4", "NVIDIA H100" */
  int threads;                    /* host threads that operations may use */
  size_t element_bytes;           /* of one element of data */
  struct backend *state;          /* the backend's own */
  const struct device_link *link; /* carries sums between the devices of ranks; NULL: they go through the host */
  bool bf16_products;        /* set at will: linear layers may round their inputs to bf16 (sums stay fp32) where the device is faster so */
  bool own_attention;        /* set at will: attention by the backend's own kernels, also where a library would do it */
  int64_t library_attention; /* how many calls of attention a library did */

  void (*close)(struct kernels *k);

  /* ---- memory ---- */
  /* Device memory, zeroed; NULL if there is not enough. Freed by release; NULL may be released. */
  void *(*allocate)(struct kernels *k, size_t bytes);
  void (*release)(struct kernels *k, void *memory);
  /* Whether it lies in this device's memory, which the host cannot read; NULL where the device's memory is the host's. */
  bool (*owns)(struct kernels *k, const void *memory);
  /* Waits for all work; reports the device's first failure (ERROR_WORK). */
  int (*synchronize)(struct kernels *k, struct error *error);
  /* Into data, `count` elements of a checkpoint's dtype: from the host, not aligned if need be, and free to be reused on return; or, where the device
   * owns it, from its memory, aligned to the elements, which is only asked for. */
  void (*load)(struct kernels *k, data *to, const void *from, enum dtype dtype, int64_t count);
  /* Device to host, `count` elements as fp32; waits. */
  void (*fetch)(struct kernels *k, float *to, const data *from, int64_t count);
  /* Plain bytes host to device, device to host (waits), and device to device. */
  void (*upload)(struct kernels *k, void *to, const void *from, size_t bytes);
  void (*download)(struct kernels *k, void *to, const void *from, size_t bytes);
  void (*copy)(struct kernels *k, void *to, const void *from, size_t bytes);
  void (*clear)(struct kernels *k, void *memory, size_t bytes);

  /* ---- copies beside the work ---- */
  /* Host memory that a device copies from and to at its full speed while others work; 64-byte aligned, not cleared; NULL if there is not enough. */
  void *(*allocate_host)(struct kernels *k, size_t bytes);
  void (*release_host)(struct kernels *k, void *memory); /* NULL may be released */
  /* The rest is NULL where the device's memory is the host's. Bytes of device memory that may still be allocated, with what operations and libraries
   * will yet ask for left out. */
  size_t (*room)(struct kernels *k);
  /* A lane is a queue, of copies above all, which run in their order, beside the work and beside other lanes. NULL: the device failed, which it keeps. */
  struct lane *(*lane_open)(struct kernels *k);
  void (*lane_close)(struct kernels *k, struct lane *lane); /* waits for its copies; NULL is allowed */
  /* Plain bytes between the device's memory and that of allocate_host, either way. */
  void (*send)(struct kernels *k, struct lane *lane, void *to, const void *from, size_t bytes);
  /* The lane's copies from now on begin after the work asked for so far; the work asked for from now on begins after the lane's copies so far. */
  void (*follow)(struct kernels *k, struct lane *lane);
  void (*join)(struct kernels *k, struct lane *lane);
  /* What is asked for from now on runs on the lane, behind its copies so far, and not where the work does; NULL: where it does. */
  void (*use)(struct kernels *k, struct lane *lane);
  /* Whether the lane's copies are done, for the host too; `wait`: they are, or the device has failed, which it keeps. Any thread may ask. */
  bool (*idle)(struct kernels *k, struct lane *lane, bool wait);

  /* ---- work that comes again ---- */
  /* Calls work(context). What it asks of the device has to be the same each time but for what the memory it names holds, and it may not wait:
   * the device keeps a record of it, and later calls launch the record whole. *recording: NULL before the first; freed by forget, which takes
   * NULL too. NULL where a launch costs nothing (the CPU): work is called by its own name. */
  void (*repeat)(struct kernels *k, void **recording, void (*work)(void *context), void *context);
  void (*forget)(struct kernels *k, void *recording);

  /* ---- linear layers: y = x W^T + b ---- */
  void (*linear_forward)(struct kernels *k, data *y, /* [T, C_out] assigned, or added to */
                         const data *x,              /* [T, C_in] */
                         const data *w,              /* [C_out, C_in] */
                         const data *bias,           /* [C_out] or NULL */
                         int64_t tokens, int64_t columns, int64_t rows, bool add);
  void (*linear_backward_input)(struct kernels *k, data *dx, /* [T, C_in] assigned, or added to */
                                const data *dy,              /* [T, C_out] */
                                const data *w, int64_t tokens, int64_t columns, int64_t rows, bool add);
  void (*linear_backward_weight)(struct kernels *k, data *dw, /* [C_out, C_in] assigned */
                                 const data *dy, /* [T, C_out], each row `stride` elements behind the one before: all of dy's, or some */
                                 const data *x, int64_t tokens, int64_t columns, int64_t rows, int64_t stride);

  /* y[R] = W x and, the other way, y[C] += x^T W: what a bias gains when a shift is folded into it, and its gradient. fp32 throughout. */
  void (*matrix_vector)(struct kernels *k, float *y, /* [rows] assigned */
                        const data *w, const float *x /* [columns] */, int64_t rows, int64_t columns);
  void (*vector_matrix)(struct kernels *k, float *y, /* [columns] added to */
                        const float *x /* [rows] */, const data *w, int64_t rows, int64_t columns);

  /* ---- norms: y = x / sqrt(mean(x^2) + eps) * w + b, each row by itself; centered: of x - mean(x) ---- */
  void (*norm_forward)(struct kernels *k, data *y, /* [rows, columns]; may be x */
                       const data *x, const data *w /* [columns] */, const data *b /* [columns] or NULL */, const struct norm_shape *shape);
  void (*norm_backward)(struct kernels *k, data *dx, /* [rows, columns] assigned, or added to; may be dy when assigned; NULL: not wanted */
                        float *dw, float *db,        /* [columns] assigned; NULL: not wanted */
                        const data *dy, const data *x, const data *w, const struct norm_shape *shape, bool add /* dx */);

  /* ---- positions ---- */
  /* Rotates each head's pairs (i, i + D/2) by the angle of the row's position; inverse: by its negative, which is the backward. In place. */
  void (*rope)(struct kernels *k, data *x,             /* [T, heads * D] */
               const float *cosine, const float *sine, /* [T, D/2] */
               int64_t tokens, int heads, int head_size, bool inverse);

  /* ---- attention: softmax(q k^T / sqrt(D)) v, causal ---- */
  void (*attention_forward)(struct kernels *k, data *out,   /* [T, heads * D] assigned */
                            float *logsum,                  /* [heads, T] log of each softmax's denominator, for the backward; or NULL */
                            const data *q,                  /* [T, heads * D] */
                            const data *key, const data *v, /* [T, kv_heads * D] */
                            const struct attention_shape *shape);
  void (*attention_backward)(struct kernels *k, data *dq, data *dk, data *dv, /* assigned; shapes of q, k, v */
                             const data *dout, const data *out, const float *logsum, const data *q, const data *key, const data *v,
                             const struct attention_shape *shape);

  /* ---- gated activation: y = silu(gate) * up ---- */
  void (*silu_gate_forward)(struct kernels *k, data *y, const data *gate, const data *up, int64_t count);
  void (*silu_gate_backward)(struct kernels *k, data *dgate, data *dup, /* assigned; one of them may be dy */
                             const data *dy, const data *gate, const data *up, int64_t count);

  /* ---- plain activation, not the gated one: RELU max(x, 0), with slope 0 at 0 and NaN let through; GELU x Phi(x), by the error function ---- */
  void (*activation_forward)(struct kernels *k, data *y /* may be x */, const data *x, enum activation kind, int64_t count);
  void (*activation_backward)(struct kernels *k, data *dx /* assigned; may be dy */, const data *dy, const data *x, enum activation kind,
                              int64_t count);

  /* ---- experts: softmax over the router's logits, the `top` largest, their probabilities divided by their sum ---- */
  /* Fills the arrays of `routing`. */
  void (*route_forward)(struct kernels *k, const struct routing *routing, const data *logits /* [T, experts] */);
  void (*route_backward)(struct kernels *k, data *dlogits, /* [T, experts] assigned */
                         const float *dweight /* [T, top] */, const struct routing *routing);
  /* y[r] = x[token[r]]; its backward dx[t] (+)= sum over the token's rows of dy. */
  void (*gather_rows)(struct kernels *k, data *y /* [T * top, columns] */, const data *x /* [T, columns] */, const struct routing *routing,
                      int64_t columns);
  void (*gather_rows_backward)(struct kernels *k, data *dx, const data *dy, const struct routing *routing, int64_t columns, bool add);
  /* y[t] += sum over the token's rows of weight * x[row]. */
  void (*combine_forward)(struct kernels *k, data *y /* [T, columns] */, const data *x /* [T * top, columns] */,
                          const struct routing *routing, int64_t columns);
  void (*combine_backward)(struct kernels *k, data *dx /* [T * top, columns] assigned */, float *dweight /* [T, top] assigned */,
                           const data *dy, const data *x, const struct routing *routing, int64_t columns);

  /* ---- elementwise and by columns ---- */
  void (*fill)(struct kernels *k, float *to, float value, int64_t count);
  void (*add)(struct kernels *k, float *to, const float *from, int64_t count);      /* to += from */
  void (*accumulate)(struct kernels *k, data *to, const data *from, int64_t count); /* to += from */
  void (*clamp)(struct kernels *k, float *x, float low, float high, int64_t count);
  /* sums[c] = sum over rows of x[r, c] */
  void (*column_sums)(struct kernels *k, float *sums /* [columns], assigned */, const data *x, int64_t rows, int64_t columns);
  /* absmax[c] = max(absmax[c], |x[r, c]| over rows);  middle[c] = weight * (max + min) / 2 over rows, 0 without rows */
  void (*column_range)(struct kernels *k, float *absmax, /* [columns] raised; NULL: not wanted */
                       float *middle,                    /* [columns] assigned; NULL: not wanted */
                       float weight, const data *x, int64_t rows, int64_t columns);
  /* sums[c] (+)= sum over rows of x[r, c]^2 */
  void (*column_squares)(struct kernels *k, float *sums /* [columns], added to */, const data *x, int64_t rows, int64_t columns);

  /* ---- quantizer, method.md section 1, of a weight w[r, c] * row[r] * column[c] (`scales`; NULL: w) or of activations.
   *      Factors f_hi, f_lo: [groups], NULL for 1 (round to nearest) ---- */
  /* w_hat = fake-quantized w; may be w without scales. at_rest: with the scale rounded to fp16, exactly what is stored. */
  void (*quantize_forward)(struct kernels *k, data *w_hat, const data *w, const struct weight_scales *scales, const float *f_hi,
                           const float *f_lo, const struct quantized_shape *shape, bool at_rest);
  /* Straight-through gradients, for weights quantized by quantize_forward with the same at_rest: of the factors, and of the scales: through
   * the scaled weight itself and, shared evenly by ties, through its group's maximum and minimum. */
  void (*quantize_backward)(struct kernels *k, float *df_hi, float *df_lo, /* [groups] assigned; both NULL: not wanted */
                            float *drow, float *dcolumn,                   /* [rows], [columns] assigned; NULL: not wanted */
                            const data *dw_hat, const data *w, const struct weight_scales *scales, const float *f_hi, const float *f_lo,
                            const struct quantized_shape *shape, bool at_rest);
  /* The same of activations, quantized by quantize_forward without scales and factors, not at rest: of the values themselves. */
  void (*quantize_backward_input)(struct kernels *k, data *dx, /* [rows, columns] assigned; may be dy */
                                  const data *dy, const data *x, const struct quantized_shape *shape);
  /* What is stored: packed codes, fp16 scales and zero points (store.h), at rest. */
  void (*quantize_codes)(struct kernels *k, uint8_t *codes, uint16_t *scale, uint8_t *zero_point, const data *w,
                         const struct weight_scales *scales, const float *f_hi, const float *f_lo, const struct quantized_shape *shape);
  /* Search of method.md section 7 over groups [first, end): the pair of grid factors with the least sum of a_c (w_hat - w)^2, where under
   * scales w is the scaled weight and a_c is divided by column[c]^2, since what it multiplies is so scaled. */
  void (*clip_search)(struct kernels *k, float *f_hi, float *f_lo, /* [groups], entries [first, end) assigned */
                      const data *w, const struct weight_scales *scales, const float *importance, /* a: [columns] */
                      const struct quantized_shape *shape, int64_t first, int64_t end);

  /* ---- LET, method.md section 3: vectors that scale rows and columns, folded into weights, norms and biases ---- */
  /* to[c] = s of channel c, or 1 / s; and its gradient added to ds. */
  void (*expand)(struct kernels *k, float *to /* [count] */, const float *s, const struct channel_map *map, int64_t count, bool inverse);
  void (*expand_backward)(struct kernels *k, float *ds, const float *dto, const float *s /* NULL unless inverse */,
                          const struct channel_map *map, int64_t count, bool inverse, float sign /* of what is added: 1 or -1 */);
  /* A weight that is scaled but not quantized: to[r, c] = w[r, c] * row[r] * column[c]; and the gradient of the scales. */
  void (*scale_weight)(struct kernels *k, data *to, const data *w, const struct weight_scales *scales, int64_t rows, int64_t columns);
  void (*scale_weight_backward)(struct kernels *k, float *drow, float *dcolumn, /* assigned; NULL: not wanted */
                                const data *dto, const data *w, const struct weight_scales *scales, int64_t rows, int64_t columns);
  /* A norm's weight or bias, or a linear layer's bias: to[i] = (from[i] + plus[i] - shift[i]) * scale[i]; NULL for plus, shift: 0, for scale: 1.
   * Backward: dinner[i] = dto[i] * scale[i], the gradient of the bracket, assigned; dscale[i] += dto[i] * the bracket, NULL: not wanted. */
  void (*fold_vector)(struct kernels *k, data *to, const data *from, const float *plus, const float *shift, const float *scale,
                      int64_t count);
  void (*fold_vector_backward)(struct kernels *k, float *dinner, float *dscale, const float *dto, const data *from, const float *plus,
                               const float *shift, const float *scale, int64_t count);

  /* ---- loss: mean((y - target)^2) ---- */
  void (*mse)(struct kernels *k, float *loss, /* one value, assigned or added to */
              data *dy,                       /* [count] gradient * weight, assigned or added to; NULL: loss only */
              const data *y, const data *target, int64_t count, float weight, /* of the gradient: 1 / samples of the step */
              bool add);

  /* ---- optimizers over fp32 parameters ---- */
  void (*sigmoid_forward)(struct kernels *k, float *y, const float *x, int64_t count);
  void (*sigmoid_backward)(struct kernels *k, float *dx, const float *dy, const float *x, int64_t count); /* dx may be dy */
  /* x = the logarithm of y / (1 - y), y taken as `limit` where it is above: the sigmoid's inverse, in place. */
  void (*sigmoid_inverse)(struct kernels *k, float *x, float limit, int64_t count);
  /* Looks whether all values are finite and counts the step as taken or skipped. */
  void (*step_begin)(struct kernels *k, struct step_state *state, const float *values, int64_t count);
  /* AdamW without weight decay (0.9, 0.999, 1e-8) of two kinds of parameters at once, each at its own rate; does nothing when the step is skipped. */
  void (*adamw)(struct kernels *k, const struct learnables of[2], float *m, float *v,
                const float *gradient, /* like m and v of the first kind's parameters and then the second's */
                const struct step_state *state);
  /* x = clamp(x - lr * sign(gradient), 0, 1); does nothing when the step is skipped. */
  void (*sign_step)(struct kernels *k, float *x, const float *gradient, int64_t count, float lr, const struct step_state *state);

  /* ---- evaluation ---- */
  /* Takes the logits of vocabulary entries [first, first + columns) into the running cross entropy. */
  void (*cross_entropy_piece)(struct kernels *k, struct cross_entropy *state, const data *logits, /* [rows, columns] */
                              const int32_t *target,                                              /* [rows] ids, device memory */
                              int64_t rows, int64_t first, int64_t columns);
};

/* Opens a backend. Errors: ERROR_INPUT for a name that is not built in, ERROR_WORK when the device fails, or what drives it cannot be loaded. NULL on
 * failure. */
struct kernels *kernels_open(const char *name, /* "cpu", "cuda" */
                             int threads,      /* host threads, at least 1 */
                             int device,       /* this rank's number on its node: its devices are taken in turn. The CPU has one */
                             struct error *error);

/* Whether a backend of that name is built in: of CUDA's, whether its library is there (module.h). */
bool kernels_built_in(const char *name);

/* Whether it can compute here, on the device that kernels_open would take. Where nothing of a device is there, nothing is loaded to find that out. */
bool kernels_usable(
    const char *name, int device,
    struct error *reason); /* set where there is a device, and what keeps it from being used; the caller may go on without */

/* Element `offset` of a tensor. */
static inline data *data_at(const struct kernels *k, const data *tensor, int64_t offset) {
  return (data *)(uintptr_t)((uintptr_t)tensor + (uintptr_t)offset * k->element_bytes);
}

#endif
