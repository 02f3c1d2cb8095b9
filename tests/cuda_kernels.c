/* cuda_kernels.c: every operation of the CUDA backend against the CPU backend, on random values that bf16 holds, into outputs filled with NaN,
 * of odd sizes and of multiples of eight, aligned and not. Limits are of compare.h's peak_error: 4e-3 for one rounding to bf16 (2^-8), 1e-5 and
 * less for what stays fp32. Attention rounds softmax's weights and their slopes too, whose errors meet where sums cancel: its single elements may
 * be further off, but the norm of all errors is held to 4e-3 and 8e-3. A second run gives the same bits. */
#include "cuda_pair.h"

static struct kernels *cpu, *cuda;

#define ONE_ROUNDING 4e-3 /* to bf16: half a unit in the last of 8 bits */
#define COUNT(list)  ((int)(sizeof(list) / sizeof *(list)))

static void compare(const char *where, operation_on *operation, const void *shape, const struct argument *arguments, int count) {
  compare_backends(cpu, cuda, where, operation, shape, arguments, count);
}

static struct argument absent(void) {
  return (struct argument){.count = -1};
}

/* ---- linear layers ---- */

struct linear_case {
  int64_t tokens, columns, rows;
  bool add;
};

static void do_linear_forward(struct kernels *k, void **at, const void *shape) {
  const struct linear_case *s = shape;
  k->linear_forward(k, at[0], at[1], at[2], at[3], s->tokens, s->columns, s->rows, s->add);
}
static void do_linear_backward_input(struct kernels *k, void **at, const void *shape) {
  const struct linear_case *s = shape;
  k->linear_backward_input(k, at[0], at[1], at[2], s->tokens, s->columns, s->rows, s->add);
}
static void do_linear_backward_weight(struct kernels *k, void **at, const void *shape) {
  const struct linear_case *s = shape;
  k->linear_backward_weight(k, at[0], at[1], at[2], s->tokens, s->columns, s->rows, s->rows);
}
/* The first half of the rows. */
static void do_linear_backward_rows(struct kernels *k, void **at, const void *shape) {
  const struct linear_case *s = shape;
  k->linear_backward_weight(k, at[0], at[1], at[2], s->tokens, s->columns, (s->rows + 1) / 2, s->rows);
}
static void do_vectors(struct kernels *k, void **at, const void *shape) {
  const struct linear_case *s = shape;
  k->matrix_vector(k, at[0], at[2], at[3], s->rows, s->columns);
  k->vector_matrix(k, at[1], at[4], at[2], s->rows, s->columns);
}

static void linear_layers(void **context) {
  (void)context;
  struct bound bounds[] = {{"linear_forward", ONE_ROUNDING, 0},
                           {"linear_backward_input", ONE_ROUNDING, 0},
                           {"linear_backward_weight", ONE_ROUNDING, 0},
                           {"matrix_vector", 1e-5, 0},
                           {"vector_matrix", 1e-5, 0}};
  const struct linear_case cases[] = {{1, 1, 1, false}, {17, 33, 29, false}, {17, 33, 29, true}, {64, 128, 96, false}, {70, 96, 131, true}};
  for (int i = 0; i < COUNT(cases); i++) {
    struct memory m = {0};
    uint64_t state = 1;
    const struct linear_case *s = &cases[i];
    int64_t nx = s->tokens * s->columns, nw = s->rows * s->columns, ny = s->tokens * s->rows;
    float *x = random_bf16(&m, &state, nx), *w = random_bf16(&m, &state, nw), *b = random_bf16(&m, &state, s->rows);
    float *y = random_bf16(&m, &state, ny), *dx = random_bf16(&m, &state, nx), *v = random_floats(&m, &state, s->columns);
    float *u = random_floats(&m, &state, s->rows);
    for (int bias = 0; bias < 2; bias++) {
      struct argument forward[] = {data_out(&bounds[0], s->add ? y : NULL, ny), data_in(x, nx), data_in(w, nw),
                                   bias ? data_in(b, s->rows) : absent()};
      compare("linear", do_linear_forward, s, forward, 4);
    }
    struct argument input[] = {data_out(&bounds[1], s->add ? dx : NULL, nx), data_in(y, ny), data_in(w, nw)};
    compare("linear", do_linear_backward_input, s, input, 3);
    struct argument weight[] = {data_out(&bounds[2], NULL, nw), data_in(y, ny), data_in(x, nx)};
    compare("linear", do_linear_backward_weight, s, weight, 3);
    struct argument rows[] = {data_out(&bounds[2], NULL, (s->rows + 1) / 2 * s->columns), data_in(y, ny), data_in(x, nx)};
    compare("linear, some rows", do_linear_backward_rows, s, rows, 3);
    struct argument vectors[] = {floats_out(&bounds[3], NULL, s->rows), floats_out(&bounds[4], v, s->columns), data_in(w, nw),
                                 floats_in(v, s->columns), floats_in(u, s->rows)};
    compare("vectors", do_vectors, s, vectors, 5);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

/* ---- norms ---- */

struct norm_case {
  struct norm_shape shape;
  bool add, in_place;
};

static void do_norm_forward(struct kernels *k, void **at, const void *shape) {
  const struct norm_case *s = shape;
  k->norm_forward(k, at[0], s->in_place ? at[0] : at[1], at[2], at[3], &s->shape);
}
static void do_norm_backward(struct kernels *k, void **at, const void *shape) {
  const struct norm_case *s = shape;
  k->norm_backward(k, at[0], at[1], at[2], s->in_place ? at[0] : at[3], at[4], at[5], &s->shape, s->add);
}

static void norms(void **context) {
  (void)context;
  struct bound bounds[] = {{"norm_forward", ONE_ROUNDING, 0}, {"norm_backward dx", ONE_ROUNDING, 0}, {"norm_backward dw, db", 2e-5, 0}};
  const int64_t sizes[][2] = {{7, 37}, {3, 130}, {9, 64}, {40, 16}, {3, 1100}, {2, 2048}, {600, 8}};
  for (int i = 0; i < COUNT(sizes) * 4; i++) {
    struct memory m = {0};
    uint64_t state = 2;
    struct norm_case s = {{sizes[i / 4][0], sizes[i / 4][1], 1e-5f, i % 2}, i % 4 / 2, false};
    int64_t C = s.shape.columns, n = s.shape.rows * C;
    float *x = random_bf16(&m, &state, n), *w = random_bf16(&m, &state, C), *b = random_bf16(&m, &state, C);
    float *dy = random_bf16(&m, &state, n), *dx = random_bf16(&m, &state, n);
    for (int part = 0; part < 3; part++) { /* with everything; the input alone; nothing but the input, in place */
      s.in_place = part == 2;
      struct argument forward[] = {data_out(&bounds[0], s.in_place ? x : NULL, n), data_in(x, n), data_in(w, C),
                                   part ? absent() : data_in(b, C)};
      compare("norm", do_norm_forward, &s, forward, 4);
      if (s.in_place && s.add) continue;
      struct argument backward[] = {data_out(&bounds[1],
                                             s.in_place ? dy
                                             : s.add    ? dx
                                                        : NULL,
                                             n),
                                    part ? absent() : floats_out(&bounds[2], NULL, C),
                                    part ? absent() : floats_out(&bounds[2], NULL, C),
                                    data_in(dy, n),
                                    data_in(x, n),
                                    data_in(w, C)};
      compare("norm", do_norm_backward, &s, backward, 6);
    }
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

/* ---- by columns, and elementwise ---- */

static void do_columns(struct kernels *k, void **at, const void *shape) {
  const int64_t *size = shape;
  k->column_sums(k, at[0], at[4], size[0], size[1]);
  k->column_squares(k, at[1], at[4], size[0], size[1]);
  k->column_range(k, at[2], at[3], 0.3f, at[4], size[0], size[1]);
}

static void columns_of_a_matrix(void **context) {
  (void)context;
  struct bound bounds[] = {{"column_sums", 1e-5, 0}, {"column_squares", 1e-5, 0}, {"column_range", 1e-6, 0}};
  const int64_t sizes[][2] = {{0, 5}, {1, 1}, {9, 64}, {33, 131}, {600, 130}};
  for (int i = 0; i < COUNT(sizes); i++) {
    struct memory m = {0};
    uint64_t state = 3;
    int64_t n = sizes[i][0] * sizes[i][1], C = sizes[i][1];
    float *x = random_bf16(&m, &state, n), *before = random_floats(&m, &state, C);
    struct argument arguments[] = {floats_out(&bounds[0], NULL, C), floats_out(&bounds[1], before, C), floats_out(&bounds[2], before, C),
                                   floats_out(&bounds[2], NULL, C), data_in(x, n)};
    compare("columns", do_columns, sizes[i], arguments, 5);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

struct activation_case {
  int64_t count;
  enum activation kind;
  int in_place; /* of the backward: 1, dgate or dx is dy; 2, dup */
};

static void do_gate(struct kernels *k, void **at, const void *shape) {
  const struct activation_case *s = shape;
  k->silu_gate_forward(k, at[0], at[4], at[5], s->count);
  k->silu_gate_backward(k, s->in_place == 1 ? at[3] : at[1], s->in_place == 2 ? at[3] : at[2], at[3], at[4], at[5], s->count);
}
static void do_activation(struct kernels *k, void **at, const void *shape) {
  const struct activation_case *s = shape;
  k->activation_backward(k, s->in_place ? at[2] : at[1], at[2], at[3], s->kind, s->count);
  if (s->in_place) k->copy(k, at[0], at[3], (size_t)s->count * k->element_bytes);
  k->activation_forward(k, at[0], s->in_place ? at[0] : at[3], s->kind, s->count);
}
static void do_sums(struct kernels *k, void **at, const void *shape) {
  int64_t count = *(const int64_t *)shape;
  k->add(k, at[0], at[4], count);
  k->accumulate(k, at[1], at[5], count);
  k->clamp(k, at[2], -0.5f, 0.25f, count);
  k->fill(k, at[3], -2.5f, count);
}

static void elementwise(void **context) {
  (void)context;
  struct bound bounds[] = {{"silu_gate_forward", ONE_ROUNDING, 0},
                           {"silu_gate_backward", ONE_ROUNDING, 0},
                           {"activation_forward", ONE_ROUNDING, 0},
                           {"activation_backward", ONE_ROUNDING, 0},
                           {"add, clamp, fill", 0, 0},
                           {"accumulate", ONE_ROUNDING, 0}};
  const int64_t counts[] = {1003, 4096, 8, 1};
  for (int i = 0; i < COUNT(counts) * 3; i++) {
    struct memory m = {0};
    uint64_t state = 4;
    int64_t n = counts[i / 3];
    struct activation_case s = {n, ACTIVATION_SILU_GATED, i % 3};
    float *gate = random_bf16(&m, &state, n), *up = random_bf16(&m, &state, n), *dy = random_bf16(&m, &state, n);
    float *a = random_floats(&m, &state, n), *b = random_floats(&m, &state, n);
    if (n > 8) gate[0] = 0, gate[1] = 60, gate[2] = -60, gate[3] = -200, gate[4] = 1;
    struct argument gated[] = {data_out(&bounds[0], NULL, n),
                               data_out(s.in_place == 1 ? NULL : &bounds[1], NULL, n),
                               data_out(s.in_place == 2 ? NULL : &bounds[1], NULL, n),
                               data_out(s.in_place ? &bounds[1] : NULL, dy, n),
                               data_in(gate, n),
                               data_in(up, n)};
    gated[1].result = s.in_place != 1, gated[2].result = s.in_place != 2;
    compare("gate", do_gate, &s, gated, 6);
    for (int kind = 0; kind < 2; kind++) {
      s.kind = kind ? ACTIVATION_GELU : ACTIVATION_RELU;
      struct argument plain[] = {data_out(&bounds[2], NULL, n), data_out(&bounds[3], NULL, n), data_out(&bounds[3], dy, n),
                                 data_in(gate, n)};
      plain[s.in_place ? 1 : 2].bound = NULL, plain[1].result = !s.in_place;
      compare("activation", do_activation, &s, plain, 4);
    }
    struct argument sums[] = {floats_out(&bounds[4], a, n),
                              floats_out(&bounds[5], NULL, n),
                              floats_out(&bounds[4], a, n),
                              floats_out(&bounds[4], NULL, n),
                              floats_in(b, n),
                              data_in(up, n)};
    sums[1] = data_out(&bounds[5], dy, n);
    compare("sums", do_sums, &n, sums, 6);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

static void conversions(void **context) {
  (void)context;
  enum { N = 1003 };
  struct memory m = {0}, d = {.k = cuda};
  uint64_t state = 5;
  float *exact = random_bf16(&m, &state, N), *values = random_floats(&m, &state, N);
  unsigned char half[2 * N + 1], brain[2 * N + 1]; /* at an odd address */
  for (int i = 0; i < N; i++) {
    uint16_t h = half_from_float(exact[i]), b = (uint16_t)(float_to_bits(exact[i]) >> 16);
    memcpy(half + 1 + 2 * i, &h, 2);
    memcpy(brain + 1 + 2 * i, &b, 2);
  }
  data *to = poisoned_data(&d, N + 3);
  cuda->load(cuda, data_at(cuda, to, 3), half + 1, DTYPE_F16, N);
  assert_memory_equal(fetched_data(&d, data_at(cuda, to, 3), N), exact, N * sizeof *exact);
  cuda->load(cuda, to, brain + 1, DTYPE_BF16, N);
  assert_memory_equal(fetched_data(&d, to, N), exact, N * sizeof *exact);
  values[0] = 0x1.01p0f, values[1] = 0x1.03p0f; /* ties: to even, down and up */
  values[2] = INFINITY, values[3] = NAN, values[4] = 0x1.fffp127f;
  cuda->load(cuda, to, values, DTYPE_F32, N);
  float *got = fetched_data(&d, to, N);
  assert_true(got[0] == 1 && got[1] == 0x1.04p0f && got[2] == INFINITY && isnan(got[3]) && got[4] == INFINITY);
  for (int i = 5; i < N; i++) assert_true(fabsf(got[i] - values[i]) <= ldexpf(fabsf(values[i]), -8));
  memory_free(&d);
  memory_free(&m);
}

/* ---- positions and attention ---- */

struct rope_case {
  int64_t tokens;
  int heads, head_size;
  bool inverse;
};

static void do_rope(struct kernels *k, void **at, const void *shape) {
  const struct rope_case *s = shape;
  k->rope(k, at[0], at[1], at[2], s->tokens, s->heads, s->head_size, s->inverse);
}

static void rotary_positions(void **context) {
  (void)context;
  struct bound bound = {"rope", ONE_ROUNDING, 0};
  const struct rope_case cases[] = {{9, 3, 10, false}, {9, 3, 64, false}, {5, 2, 32, true}, {3, 1, 2, true}};
  for (int i = 0; i < COUNT(cases); i++) {
    struct memory m = {0};
    uint64_t state = 6;
    const struct rope_case *s = &cases[i];
    int64_t n = s->tokens * s->heads * s->head_size, angles = s->tokens * s->head_size / 2;
    float *x = random_bf16(&m, &state, n), *cosine = random_floats(&m, &state, angles), *sine = host_floats(&m, angles);
    for (int64_t j = 0; j < angles; j++) sine[j] = sinf(cosine[j]), cosine[j] = cosf(cosine[j]);
    struct argument arguments[] = {data_out(&bound, x, n), floats_in(cosine, angles), floats_in(sine, angles)};
    compare("rope", do_rope, s, arguments, 3);
    memory_free(&m);
  }
  bound_print(&bound, 1);
}

static void do_attention(struct kernels *k, void **at, const void *shape) {
  k->attention_forward(k, at[0], at[1], at[2], at[3], at[4], shape);
}
static void do_attention_backward(struct kernels *k, void **at, const void *shape) {
  k->attention_backward(k, at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], shape);
}

struct attention_bounds {
  struct bound single[5]; /* out, logsum, dq, dk, dv */
  struct bound norm[4];   /* without logsum */
};

/* The backward starts from the CPU's output, rounded, and logsum, so that its errors are its own. */
static void check_attention(const struct attention_shape *s, struct attention_bounds *bounds) {
  struct memory m = {.k = cpu};
  uint64_t state = 7;
  char where[80];
  struct bound *single = bounds->single, *norm = bounds->norm;
  int64_t nq = (int64_t)s->tokens * s->heads * s->head_size, nk = (int64_t)s->tokens * s->kv_heads * s->head_size;
  int64_t sums = (int64_t)s->heads * s->tokens;
  float *q = random_bf16(&m, &state, nq), *key = random_bf16(&m, &state, nk), *v = random_bf16(&m, &state, nk);
  float *dout = random_bf16(&m, &state, nq);
  snprintf(where, sizeof where, "T %d, %d heads on %d, D %d, window %d", s->tokens, s->heads, s->kv_heads, s->head_size, s->window);
  struct argument forward[] = {data_out(&single[0], NULL, nq), floats_out(&single[1], NULL, sums), data_in(q, nq), data_in(key, nk),
                               data_in(v, nk)};
  forward[0].norm = &norm[0];
  compare(where, do_attention, s, forward, 5);
  forward[1] = absent();
  compare(where, do_attention, s, forward, 5);
  data *out = poisoned_data(&m, nq);
  float *logsum = poisoned_floats(&m, sums);
  cpu->attention_forward(cpu, out, logsum, device_data(&m, q, nq), device_data(&m, key, nk), device_data(&m, v, nk), s);
  float *out_host = fetched_data(&m, out, nq), *logsum_host = fetched_floats(&m, logsum, sums);
  bool alone = s->tokens == 1 || s->window == 1; /* a softmax of one: the gradients of q and k are 0, but for rounding */
  struct argument backward[] = {data_out(alone ? NULL : &single[2], NULL, nq),
                                data_out(alone ? NULL : &single[3], NULL, nk),
                                data_out(&single[4], NULL, nk),
                                data_in(dout, nq),
                                data_in(out_host, nq),
                                floats_in(logsum_host, sums),
                                data_in(q, nq),
                                data_in(key, nk),
                                data_in(v, nk)};
  for (int j = alone ? 2 : 0; j < 3; j++) backward[j].norm = &norm[1 + j];
  compare(where, do_attention_backward, s, backward, 9);
  memory_free(&m);
}

/* A shape that a library does is done by the own kernels too. Whether a library did it. */
static bool check_both(const struct attention_shape *s, struct attention_bounds *library, struct attention_bounds *own) {
  int64_t calls = cuda->library_attention;
  check_attention(s, library);
  if (cuda->library_attention == calls) return false;
  cuda->own_attention = true;
  check_attention(s, own);
  cuda->own_attention = false;
  return true;
}

static void causal_attention(void **context) {
  (void)context;
  struct attention_bounds own = {{{"attention_forward", 2e-2, 0},
                                  {"attention logsum", 1e-5, 0},
                                  {"attention_backward dq", 4e-2, 0},
                                  {"attention_backward dk", 4e-2, 0},
                                  {"attention_backward dv", 4e-2, 0}},
                                 {{"attention_forward (norm)", 4e-3, 0},
                                  {"attention_backward dq (norm)", 8e-3, 0},
                                  {"attention_backward dk (norm)", 8e-3, 0},
                                  {"attention_backward dv (norm)", 8e-3, 0}}},
                          library = own;
  const struct attention_shape shapes[] = {{1, 2, 1, 4, 0},     {5, 4, 4, 6, 0},     {64, 2, 2, 16, 0},  {65, 4, 2, 64, 0},
                                           {130, 6, 2, 8, 0},   {70, 4, 1, 10, 0},   {130, 4, 2, 8, 50}, {80, 2, 1, 6, 1},
                                           {80, 3, 3, 4, 64},   {70, 2, 2, 4, 200},  {80, 2, 2, 16, 1},  {129, 2, 1, 128, 0},
                                           {136, 4, 1, 128, 0}, {152, 6, 2, 64, 70}, {40, 1, 1, 200, 0}};
  const struct attention_shape in_pieces = {2048, 80, 8, 8, 0}; /* cuDNN's backward takes these heads in two pieces */
  int by_library = 0;
  for (int i = 0; i < COUNT(shapes); i++) by_library += check_both(&shapes[i], &library, &own);
  if (by_library) assert_true(check_both(&in_pieces, &library, &own)); /* the own kernels alone would show nothing new */
  print_message("    %d of %d shapes by a library\n", by_library, COUNT(shapes));
  bound_print(library.single, COUNT(library.single));
  bound_print(library.norm, COUNT(library.norm));
  if (!by_library) return;
  print_message("    these by the own kernels:\n");
  bound_print(own.single, COUNT(own.single));
  bound_print(own.norm, COUNT(own.norm));
}

/* ---- experts ---- */

struct expert_case {
  int tokens, experts, top;
  int64_t columns;
};

/* at: expert, weight, row, token, offset; and from 5 on the operands. */
static struct routing routing_at(void **at, const struct expert_case *s) {
  return (struct routing){s->tokens, s->experts, s->top, at[0], at[1], at[2], at[3], at[4]};
}
static void do_route(struct kernels *k, void **at, const void *shape) {
  struct routing r = routing_at(at, shape);
  k->route_forward(k, &r, at[5]);
  k->route_backward(k, at[6], at[7], &r);
}
static void do_experts(struct kernels *k, void **at, const void *shape) {
  const struct expert_case *s = shape;
  struct routing r = routing_at(at, shape);
  k->route_forward(k, &r, at[5]);
  k->gather_rows(k, at[6], at[7], &r, s->columns);
  k->gather_rows_backward(k, at[8], at[9], &r, s->columns, false);
  k->gather_rows_backward(k, at[10], at[9], &r, s->columns, true);
  k->combine_forward(k, at[11], at[9], &r, s->columns);
  k->combine_backward(k, at[12], at[13], at[7], at[9], &r, s->columns);
}

static void mixture_of_experts(void **context) {
  (void)context;
  struct bound bounds[] = {
      {"route_forward weight", 1e-6, 0},         {"route_backward", ONE_ROUNDING, 0},  {"gather_rows", 0, 0},
      {"gather_rows_backward", ONE_ROUNDING, 0}, {"combine_forward", ONE_ROUNDING, 0}, {"combine_backward dx", ONE_ROUNDING, 0},
      {"combine_backward dweight", 1e-5, 0}};
  const struct expert_case cases[] = {{1, 1, 1, 1}, {1, 8, 2, 37}, {13, 8, 2, 33}, {40, 5, 1, 8}, {33, 3, 3, 16}, {200, 16, 4, 24}};
  for (int i = 0; i < COUNT(cases); i++) {
    struct memory m = {0};
    uint64_t state = 8;
    const struct expert_case *s = &cases[i];
    int64_t rows = (int64_t)s->tokens * s->top, nl = (int64_t)s->tokens * s->experts, nx = rows * s->columns, ny = s->tokens * s->columns;
    float *logits = random_bf16(&m, &state, nl), *dweight = random_floats(&m, &state, rows), *x = random_bf16(&m, &state, nx);
    float *y = random_bf16(&m, &state, ny), *dy = random_bf16(&m, &state, ny);
    for (int64_t j = 0; j < nl; j++)
      if (j / s->experts % 4 == 1) logits[j] = 0.5f; /* ties */
    struct argument routing[] = {bytes_out(NULL, 4 * rows), floats_out(&bounds[0], NULL, rows), bytes_out(NULL, 4 * rows),
                                 bytes_out(NULL, 4 * rows), bytes_out(NULL, 4 * (s->experts + 1))};
    struct argument route[8] = {
        [5] = data_in(logits, nl), [6] = data_out(s->top > 1 ? &bounds[1] : NULL, NULL, nl), [7] = floats_in(dweight, rows)};
    struct argument all[14] = {[5] = data_in(logits, nl),
                               [6] = data_out(&bounds[2], NULL, nx),
                               [7] = data_in(dy, ny),
                               [8] = data_out(&bounds[3], NULL, ny),
                               [9] = data_in(x, nx),
                               [10] = data_out(&bounds[3], y, ny),
                               [11] = data_out(&bounds[4], y, ny),
                               [12] = data_out(&bounds[5], NULL, nx),
                               [13] = floats_out(&bounds[6], NULL, rows)};
    memcpy(route, routing, sizeof routing);
    memcpy(all, routing, sizeof routing);
    compare("route", do_route, s, route, 8);
    compare("experts", do_experts, s, all, 14);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

/* ---- quantizer ---- */

struct quantize_case {
  struct quantized_shape shape;
  bool at_rest;
};

/* at: w, dw, row, column, f_hi, f_lo, then the results. */
static void do_quantize(struct kernels *k, void **at, const void *shape) {
  const struct quantize_case *s = shape;
  struct weight_scales scales = {at[2], at[3]};
  k->quantize_forward(k, at[6], at[0], &scales, at[4], at[5], &s->shape, s->at_rest);
  k->quantize_backward(k, at[7], at[8], at[9], at[10], at[1], at[0], &scales, at[4], at[5], &s->shape, s->at_rest);
  k->quantize_codes(k, at[11], at[12], at[13], at[0], &scales, at[4], at[5], &s->shape);
}
static void do_activations(struct kernels *k, void **at, const void *shape) {
  const struct quantize_case *s = shape;
  k->quantize_forward(k, at[0], at[2], NULL, NULL, NULL, &s->shape, false);
  k->quantize_backward_input(k, at[1], at[1], at[2], &s->shape);
}

static float *random_between(struct memory *m, uint64_t *state, int64_t count, double low, double high) {
  float *values = host_floats(m, count);
  for (int64_t i = 0; i < count; i++) values[i] = (float)(low + (high - low) * random_uniform(state));
  return values;
}

static const struct quantized_shape quantized_shapes[] = {
    {6, 96, {3, false, 32}},  {5, 131, {2, false, 40}},  {3, 64, {4, true, 16}},      {4, 200, {8, false, 64}},   {3, 256, {3, false, 128}},
    {2, 300, {5, true, 300}}, {2, 520, {4, false, 512}}, {2, 1288, {3, false, 1288}}, {2, 1111, {6, true, 1111}}, {3, 512, {4, false, 256}},
    {70, 24, {4, false, 24}}, {1, 7, {4, true, 3}},      {3, 640, {3, false, 640}},   {2, 4104, {4, false, 4104}}};

static void quantizer_of_weights(void **context) {
  (void)context;
  struct bound bounds[] = {{"quantize_forward", ONE_ROUNDING, 0},
                           {"quantize_backward factors", 5e-5, 0},
                           {"quantize_backward row scales", 5e-5, 0},
                           {"quantize_backward column scales", 5e-5, 0}};
  for (int i = 0; i < COUNT(quantized_shapes) * 8; i++) {
    struct memory m = {0};
    uint64_t state = 9;
    struct quantize_case s = {quantized_shapes[i / 8], i % 2};
    bool row = i % 4 / 2, column = i % 8 / 4, factors = i % 3 > 0;
    int64_t R = s.shape.rows, C = s.shape.columns, n = R * C, groups = groups_of(&s.shape);
    int64_t code_bytes = R * ((C * s.shape.quantizer.bits + 7) / 8);
    char where[80];
    snprintf(where, sizeof where, "%lld x %lld, %d bits, group %lld", (long long)R, (long long)C, s.shape.quantizer.bits,
             (long long)s.shape.quantizer.group_size);
    float *w = random_bf16(&m, &state, n), *dw = random_bf16(&m, &state, n);
    float *hi = random_between(&m, &state, groups, 0.5, 1), *lo = random_between(&m, &state, groups, 0.5, 1);
    float *r = random_between(&m, &state, R, 0.5, 2), *c = random_between(&m, &state, C, 0.5, 2);
    struct argument a[] = {data_in(w, n),
                           data_in(dw, n),
                           row ? floats_in(r, R) : absent(),
                           column ? floats_in(c, C) : absent(),
                           factors ? floats_in(hi, groups) : absent(),
                           factors ? floats_in(lo, groups) : absent(),
                           data_out(&bounds[0], NULL, n),
                           i % 5 ? floats_out(&bounds[1], NULL, groups) : absent(),
                           i % 5 ? floats_out(&bounds[1], NULL, groups) : absent(),
                           row ? floats_out(&bounds[2], NULL, R) : absent(),
                           column ? floats_out(&bounds[3], NULL, C) : absent(),
                           bytes_out(NULL, code_bytes),
                           bytes_out(NULL, 2 * groups),
                           bytes_out(NULL, groups)};
    compare(where, do_quantize, &s, a, 14);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

static void quantizer_of_activations(void **context) {
  (void)context;
  struct bound bounds[] = {{"quantize_forward of activations", ONE_ROUNDING, 0}, {"quantize_backward_input", ONE_ROUNDING, 0}};
  for (int i = 0; i < COUNT(quantized_shapes); i++) {
    struct memory m = {0};
    uint64_t state = 10;
    struct quantize_case s = {quantized_shapes[i], false};
    int64_t n = s.shape.rows * s.shape.columns;
    float *x = random_bf16(&m, &state, n), *dy = random_bf16(&m, &state, n);
    x[0] = x[1] = x[2] = 4; /* a tie at the end */
    struct argument a[] = {data_out(&bounds[0], NULL, n), data_out(&bounds[1], dy, n), data_in(x, n)};
    compare("activations", do_activations, &s, a, 3);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

/* ---- search ---- */

static double search_error(const float *w, const float *a, int64_t length, const struct quantizer *q, float hi, float lo) {
  float high = w[0], low = w[0];
  double error = 0;
  for (int64_t i = 0; i < length; i++) high = fmaxf(high, w[i]), low = fminf(low, w[i]);
  struct group_grid grid = quantizer_grid(q, quantizer_high(hi, high), quantizer_low(lo, low), true);
  for (int64_t i = 0; i < length; i++) {
    double d = (double)quantizer_fake(w[i], grid, quantizer_top(q)) - w[i];
    error += a[i] * d * d;
  }
  return error;
}

static bool on_grid(float factor) {
  for (int step = 0; step < CLIP_SEARCH_STEPS; step++)
    if (factor == 1 - CLIP_SEARCH_STRIDE * (float)step) return true;
  return false;
}

/* Two pairs of factors may be as good but for the last bits: what is compared is the error of those found, each of which has the CPU's bits. */
static void search(void **context) {
  (void)context;
  struct bound bound = {"clip_search (error over the CPU's, less 1)", 1e-5, 0};
  for (int i = 0; i < COUNT(quantized_shapes); i++) {
    struct memory sides[2] = {{.k = cpu}, {.k = cuda}};
    struct memory m = {0};
    uint64_t state = 11;
    const struct quantized_shape *s = &quantized_shapes[i];
    const struct quantizer *q = &s->quantizer;
    int64_t n = s->rows * s->columns, groups = groups_of(s), first = groups / 4, end = groups - groups / 5;
    float *w = random_bf16(&m, &state, n), *a = random_between(&m, &state, s->columns, 0.1, 2),
          *column = random_between(&m, &state, s->columns, 0.5, 2);
    float *found[2][2], *scaled = host_floats(&m, n), *scaled_a = host_floats(&m, s->columns);
    for (int64_t c = 0; c < s->columns; c++) scaled_a[c] = a[c] / (column[c] * column[c]);
    for (int64_t j = 0; j < n; j++) scaled[j] = w[j] * column[j % s->columns];
    for (int side = 0; side < 2; side++) {
      struct memory *d = &sides[side];
      struct weight_scales scales = {NULL, device_floats(d, column, s->columns)};
      float *hi = poisoned_floats(d, groups), *lo = poisoned_floats(d, groups);
      d->k->clip_search(d->k, hi, lo, device_data(d, w, n), &scales, device_floats(d, a, s->columns), s, first, end);
      found[side][0] = fetched_floats(d, hi, groups), found[side][1] = fetched_floats(d, lo, groups);
    }
    for (int64_t g = 0; g < groups; g++) {
      int64_t begin = g % groups_per_row(s) * q->group_size, at = g / groups_per_row(s) * s->columns + begin;
      int64_t length = s->columns - begin < q->group_size ? s->columns - begin : q->group_size;
      if (g < first || g >= end) {
        assert_true(isnan(found[1][0][g]) && isnan(found[1][1][g]));
        continue;
      }
      assert_true(on_grid(found[1][0][g]) && on_grid(found[1][1][g]));
      double want = search_error(scaled + at, scaled_a + begin, length, q, found[0][0][g], found[0][1][g]);
      double got = search_error(scaled + at, scaled_a + begin, length, q, found[1][0][g], found[1][1][g]);
      bound_check(&bound, fmax(got / want - 1, 0), "search");
    }
    memory_free(&sides[0]);
    memory_free(&sides[1]);
    memory_free(&m);
  }
  bound_print(&bound, 1);
}

/* ---- LET ---- */

struct expand_case {
  struct channel_map map;
  int heads;
  bool inverse;
};

static void do_expand(struct kernels *k, void **at, const void *shape) {
  const struct expand_case *s = shape;
  int64_t count = (int64_t)s->heads * s->map.head_size;
  k->expand(k, at[0], at[2], &s->map, count, s->inverse);
  k->expand_backward(k, at[1], at[3], s->inverse ? at[2] : NULL, &s->map, count, s->inverse, -1);
}
static void do_scale(struct kernels *k, void **at, const void *shape) {
  const int64_t *size = shape;
  struct weight_scales scales = {at[3], at[4]};
  k->scale_weight(k, at[0], at[5], &scales, size[0], size[1]);
  k->scale_weight_backward(k, at[1], at[2], at[6], at[5], &scales, size[0], size[1]);
}
static void do_fold(struct kernels *k, void **at, const void *shape) {
  int64_t count = *(const int64_t *)shape;
  k->fold_vector(k, at[0], at[3], at[4], at[5], at[6], count);
  k->fold_vector_backward(k, at[1], at[2], at[7], at[3], at[4], at[5], at[6], count);
}

static void transformation(void **context) {
  (void)context;
  struct bound bounds[] = {{"expand", 1e-6, 0},
                           {"expand_backward", 1e-5, 0},
                           {"scale_weight", ONE_ROUNDING, 0},
                           {"scale_weight_backward", 1e-5, 0},
                           {"fold_vector", ONE_ROUNDING, 0},
                           {"fold_vector_backward", 1e-6, 0}};
  const struct expand_case maps[] = {
      {{37, 1, 37}, 1, false}, {{8, 3, 8}, 6, true}, {{8, 3, 4}, 6, false}, {{64, 8, 32}, 8, true}, {{8, 3, 4}, 6, true}};
  for (int i = 0; i < COUNT(maps); i++) {
    struct memory m = {0};
    uint64_t state = 12;
    int64_t count = (int64_t)maps[i].heads * maps[i].map.head_size,
            entries = (int64_t)maps[i].heads / maps[i].map.share * maps[i].map.period;
    float *s = random_between(&m, &state, entries, 0.3, 1.3), *d = random_floats(&m, &state, count);
    struct argument a[] = {floats_out(&bounds[0], NULL, count), floats_out(&bounds[1], s, entries), floats_in(s, entries),
                           floats_in(d, count)};
    compare("expand", do_expand, &maps[i], a, 4);
    memory_free(&m);
  }
  const int64_t sizes[][2] = {{1, 1}, {9, 37}, {600, 19}, {3, 136}};
  for (int i = 0; i < COUNT(sizes) * 4; i++) {
    struct memory m = {0};
    uint64_t state = 13;
    int64_t R = sizes[i / 4][0], C = sizes[i / 4][1];
    float *w = random_bf16(&m, &state, R * C), *d = random_bf16(&m, &state, R * C);
    float *row = random_between(&m, &state, R, 0.5, 2), *column = random_between(&m, &state, C, 0.5, 2);
    struct argument a[] = {data_out(&bounds[2], NULL, R * C),
                           floats_out(&bounds[3], NULL, R),
                           floats_out(&bounds[3], NULL, C),
                           i & 1 ? floats_in(row, R) : absent(),
                           i & 2 ? floats_in(column, C) : absent(),
                           data_in(w, R * C),
                           data_in(d, R * C)};
    compare("scale", do_scale, sizes[i / 4], a, 7);
    memory_free(&m);
  }
  for (int i = 0; i < 8; i++) {
    struct memory m = {0};
    uint64_t state = 14;
    int64_t n = 203;
    float *from = random_bf16(&m, &state, n), *part[4];
    for (int j = 0; j < 4; j++) part[j] = random_floats(&m, &state, n);
    struct argument a[] = {data_out(&bounds[4], NULL, n),
                           floats_out(&bounds[5], NULL, n),
                           floats_out(&bounds[5], part[3], n),
                           data_in(from, n),
                           i & 1 ? floats_in(part[0], n) : absent(),
                           i & 2 ? floats_in(part[1], n) : absent(),
                           i & 4 ? floats_in(part[2], n) : absent(),
                           floats_in(part[3], n)};
    compare("fold", do_fold, &n, a, 8);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

/* ---- loss, optimizers, evaluation ---- */

struct loss_case {
  int64_t count;
  bool add;
};

static void do_mse(struct kernels *k, void **at, const void *shape) {
  const struct loss_case *s = shape;
  k->mse(k, at[0], at[2], at[3], at[4], s->count, 0.25f, s->add);
  k->mse(k, at[1], NULL, at[3], at[4], s->count, 1, s->add);
}
static void do_sigmoid(struct kernels *k, void **at, const void *shape) {
  int64_t count = *(const int64_t *)shape;
  k->sigmoid_forward(k, at[0], at[3], count);
  k->sigmoid_backward(k, at[1], at[1], at[3], count);
  k->sigmoid_inverse(k, at[2], 0.982f, count);
}

/* Of seven steps the third has a gradient that is not finite. */
static void do_steps(struct kernels *k, void **at, const void *shape) {
  int64_t count = *(const int64_t *)shape;
  for (int step = 0; step < 7; step++) {
    float *gradient = (float *)at[5] + (step == 2 ? count : 0);
    k->step_begin(k, at[4], gradient, count);
    const struct learnables of[2] = {{at[0], count - count / 3, 0.01f}, {(float *)at[0] + count - count / 3, count / 3, 0.02f}};
    k->adamw(k, of, at[1], at[2], gradient, at[4]);
    k->sign_step(k, at[3], gradient, count, 0.05f, at[4]);
  }
}

static void loss_and_optimizers(void **context) {
  (void)context;
  struct bound bounds[] = {{"mse", 1e-5, 0},           {"mse gradient", ONE_ROUNDING, 0},
                           {"sigmoids", 1e-5, 0},      {"adamw parameters", 1e-6, 0},
                           {"adamw moments", 1e-5, 0}, {"sign_step", 0, 0}};
  const int64_t counts[] = {1, 10007, 8 * 2048, 5000};
  for (int i = 0; i < COUNT(counts); i++) {
    struct memory m = {0};
    uint64_t state = 15;
    int64_t n = counts[i];
    float *y = random_bf16(&m, &state, n), *target = random_bf16(&m, &state, n), *before = random_bf16(&m, &state, n), loss[] = {3};
    float *x = random_floats(&m, &state, n), *share = random_between(&m, &state, n, 0.01, 0.99),
          *gradient = random_floats(&m, &state, 2 * n);
    for (int64_t j = 0; j < n; j++) before[j] = bf16_to_float((uint16_t)(float_to_bits(before[j] / (float)n) >> 16));
    for (int add = 0; add < 2; add++) {
      struct loss_case s = {n, add};
      struct argument a[] = {floats_out(&bounds[0], add ? loss : NULL, 1), floats_out(&bounds[0], add ? loss : NULL, 1),
                             data_out(&bounds[1], add ? before : NULL, n), data_in(y, n), data_in(target, n)};
      compare("mse", do_mse, &s, a, 5);
    }
    struct argument sigmoids[] = {floats_out(&bounds[2], NULL, n), floats_out(&bounds[2], x, n), floats_out(&bounds[2], share, n),
                                  floats_in(x, n)};
    compare("sigmoids", do_sigmoid, &n, sigmoids, 4);
    struct step_state start = {0, 0, 0};
    float *zero = host_floats(&m, n);
    gradient[2 * n - 1] = n % 2 ? NAN : -INFINITY;
    struct argument steps[] = {floats_out(&bounds[3], x, n),     floats_out(&bounds[4], zero, n), floats_out(&bounds[4], zero, n),
                               floats_out(&bounds[5], share, n), bytes_out(&start, sizeof start), floats_in(gradient, 2 * n)};
    compare("steps", do_steps, &n, steps, 6);
    memory_free(&m);
  }
  bound_print(bounds, COUNT(bounds));
}

static void do_cross_entropy(struct kernels *k, void **at, const void *shape) {
  const int64_t *size = shape; /* rows, columns; two pieces */
  struct cross_entropy state = {at[0], at[1], at[2]};
  k->cross_entropy_piece(k, &state, at[3], at[5], size[0], 0, size[1]);
  k->cross_entropy_piece(k, &state, at[4], at[5], size[0], size[1], size[1]);
}

static void cross_entropy(void **context) {
  (void)context;
  struct bound bounds[] = {{"cross_entropy_piece", 1e-5, 0}};
  const int64_t sizes[][2] = {{1, 3}, {13, 700}};
  for (int i = 0; i < COUNT(sizes); i++) {
    struct memory m = {0};
    uint64_t state = 16;
    int64_t R = sizes[i][0], C = sizes[i][1];
    float *first = random_bf16(&m, &state, R * C), *second = random_bf16(&m, &state, R * C), *least = host_floats(&m, R),
          *zero = host_floats(&m, R);
    int32_t *target = host(&m, R, sizeof *target);
    for (int64_t r = 0; r < R; r++) target[r] = (int32_t)(random_bits(&state) % (uint64_t)(2 * C)), least[r] = -INFINITY;
    struct argument a[] = {floats_out(&bounds[0], least, R), floats_out(&bounds[0], zero, R),
                           floats_out(&bounds[0], NULL, R),  data_in(first, R * C),
                           data_in(second, R * C),           bytes_in(target, 4 * R)};
    compare("cross entropy", do_cross_entropy, sizes[i], a, 6);
    memory_free(&m);
  }
  bound_print(bounds, 1);
}

/* ---- failures ---- */

/* A failure stays, and comes back from synchronize. */
static void a_failure_is_kept(void **context) {
  (void)context;
  struct error error = {0};
  struct kernels *k = CUDA_OPEN(0, &error);
  struct memory d = {.k = k};
  struct attention_shape shape = {1, 1, 1, 300, 0};
  data *x = device(&d, 300 * 2);
  assert_int_equal(k->synchronize(k, &error), 0);
  k->attention_forward(k, x, NULL, x, x, x, &shape);
  assert_int_equal(k->synchronize(k, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, "300 channels"));
  memory_free(&d);
  k->close(k);
}

/* ---- repeating ---- */

enum { REPEATED_ROWS = 40, REPEATED_COLUMNS = 24 };

/* Column sums, for which scratch memory is needed, and an addition to what the call before left. */
struct repeated {
  struct kernels *k;
  data *x;
  float *sums, *total;
  int calls;
};

static void repeated_work(void *context) {
  struct repeated *r = context;
  r->calls++;
  r->k->clear(r->k, r->sums, REPEATED_COLUMNS * sizeof(float));
  r->k->column_squares(r->k, r->sums, r->x, REPEATED_ROWS, REPEATED_COLUMNS);
  r->k->add(r->k, r->total, r->sums, REPEATED_COLUMNS);
}

/* Work on other values in the same memory gives what it gives when called, whether it is called, recorded or repeated. */
static void work_is_repeated(void **context) {
  (void)context;
  enum { TIMES = 7, GROWN_BEFORE = 4, COUNT_X = REPEATED_ROWS * REPEATED_COLUMNS, WIDE = 1 << 14 };
  struct error error = {0};
  struct kernels *k = CUDA_OPEN(0, &error); /* one whose scratch memory has not grown */
  struct memory m = {0}, d = {.k = k};
  struct repeated r = {k, device(&d, COUNT_X * k->element_bytes), device(&d, REPEATED_COLUMNS * sizeof(float)),
                       device(&d, REPEATED_COLUMNS * sizeof(float)), 0};
  data *wide = device(&d, 2 * WIDE * k->element_bytes);
  float *wide_sums = device(&d, WIDE * sizeof(float)), total[REPEATED_COLUMNS] = {0}, got[REPEATED_COLUMNS];
  uint64_t state = 17;
  void *recording = NULL;
  for (int i = 0; i < TIMES; i++) {
    float *x = random_bf16(&m, &state, COUNT_X), sums[REPEATED_COLUMNS] = {0};
    for (int row = 0; row < REPEATED_ROWS; row++)
      for (int c = 0; c < REPEATED_COLUMNS; c++) sums[c] += x[row * REPEATED_COLUMNS + c] * x[row * REPEATED_COLUMNS + c];
    for (int c = 0; c < REPEATED_COLUMNS; c++) total[c] += sums[c];
    k->load(k, r.x, x, DTYPE_F32, COUNT_X);
    if (i == GROWN_BEFORE) k->column_sums(k, wide_sums, wide, 2, WIDE); /* moves the scratch memory that the record uses */
    k->repeat(k, &recording, repeated_work, &r);
  }
  k->download(k, got, r.total, sizeof got);
  assert_int_equal(k->synchronize(k, &error), 0);
  assert_int_equal(r.calls, 3); /* once to settle, and once for each of the two records */
  for (int c = 0; c < REPEATED_COLUMNS; c++) assert_float_equal(got[c], total[c], 1e-4);
  k->forget(k, recording);
  memory_free(&m);
  memory_free(&d);
  k->close(k);
}

/* Work that needs more scratch memory than its first call did is done all the same. */
static void grown_work(void *context) {
  struct repeated *r = context;
  r->k->column_sums(r->k, r->sums, r->x, 2, r->calls++ ? REPEATED_COLUMNS : 1);
}

static void work_that_outgrows_its_memory_is_called(void **context) {
  (void)context;
  struct error error = {0};
  struct kernels *k = CUDA_OPEN(0, &error);
  struct memory d = {.k = k};
  float x[2 * REPEATED_COLUMNS], got[REPEATED_COLUMNS];
  struct repeated r = {k, device(&d, sizeof x), device(&d, sizeof got), NULL, 0};
  void *recording = NULL;
  for (int i = 0; i < 2 * REPEATED_COLUMNS; i++) x[i] = (float)i;
  k->load(k, r.x, x, DTYPE_F32, 2 * REPEATED_COLUMNS);
  for (int i = 0; i < 5; i++) {
    k->clear(k, r.sums, sizeof got);
    k->repeat(k, &recording, grown_work, &r);
    k->download(k, got, r.sums, sizeof got);
    for (int c = 0; c < (i ? REPEATED_COLUMNS : 1); c++) assert_float_equal(got[c], i ? 2 * c + REPEATED_COLUMNS : 1, 0);
  }
  assert_int_equal(r.calls, 4); /* small; recorded in vain, called instead; recorded */
  k->forget(k, recording);
  memory_free(&d);
  k->close(k);
}

/* --own-attention: no library does attention, for what looks into kernels as they run. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_layers),
      cmocka_unit_test(norms),
      cmocka_unit_test(columns_of_a_matrix),
      cmocka_unit_test(elementwise),
      cmocka_unit_test(conversions),
      cmocka_unit_test(rotary_positions),
      cmocka_unit_test(causal_attention),
      cmocka_unit_test(mixture_of_experts),
      cmocka_unit_test(quantizer_of_weights),
      cmocka_unit_test(quantizer_of_activations),
      cmocka_unit_test(search),
      cmocka_unit_test(transformation),
      cmocka_unit_test(loss_and_optimizers),
      cmocka_unit_test(cross_entropy),
      cmocka_unit_test(a_failure_is_kept),
      cmocka_unit_test(work_is_repeated),
      cmocka_unit_test(work_that_outgrows_its_memory_is_called),
  };
  open_backends(&cpu, &cuda);
  cuda->own_attention = argc > 1 && strcmp(argv[1], "--own-attention") == 0;
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  cuda->close(cuda);
  cpu->close(cpu);
  return failed;
}
