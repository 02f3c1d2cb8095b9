/* test_kernels.c: every operation of the CPU backend but the quantizer's, at each level of the instruction set and with 1 and 2 threads.
 * Forward against plain loops in double, backward against central differences of those loops, into outputs filled with NaN; a second
 * run gives the same bits. Limits are of compare.h's peak_error unless they say otherwise. */
#include "compare.h"

/* The two results of an operation that was run twice. */
static void check_same(struct memory *m, const data *a, const data *b, int64_t count) {
  assert_memory_equal(fetched_data(m, a, count), fetched_data(m, b, count), (size_t)count * sizeof(float));
}

/* ---- linear layers ---- */

struct linear_shape {
  int64_t tokens, columns, rows;
};

static void linear(double *y, double *const *in, const void *shape) { /* in: x, w, bias */
  const struct linear_shape *s = shape;
  for (int64_t t = 0; t < s->tokens; t++)
    for (int64_t r = 0; r < s->rows; r++) {
      double sum = in[2][r];
      for (int64_t c = 0; c < s->columns; c++) sum += in[0][t * s->columns + c] * in[1][r * s->columns + c];
      y[t * s->rows + r] = sum;
    }
}

/* Values that bf16 holds: rounding them changes nothing, so products of bf16 are held to the same bounds. */
static float *random_bf16(struct memory *m, uint64_t *state, int64_t count) {
  float *values = random_floats(m, state, count);
  for (int64_t i = 0; i < count; i++) values[i] = bf16_to_float((uint16_t)(float_to_bits(values[i]) >> 16));
  return values;
}

static void check_linear(struct bound *bounds, const struct linear_shape *s, bool bf16) {
  struct memory m = {0};
  uint64_t state = 1;
  int64_t nx = s->tokens * s->columns, nw = s->rows * s->columns, ny = s->tokens * s->rows;
  struct operation operation = {linear, s, ny, {nx, nw, s->rows}};
  float *(*draw)(struct memory *, uint64_t *, int64_t) = bf16 ? random_bf16 : random_floats;
  float *x = draw(&m, &state, nx), *w = draw(&m, &state, nw), *b = random_floats(&m, &state, s->rows);
  float *before = random_floats(&m, &state, ny), *dy = draw(&m, &state, ny), *dx_before = random_floats(&m, &state, nx);
  double *in[] = {widened(&m, x, nx), widened(&m, w, nw), widened(&m, b, s->rows)}, *want[2][2]; /* [bias][add] */
  double *none[] = {in[0], in[1], host_doubles(&m, s->rows)}, *dy_wide = widened(&m, dy, ny);
  for (int i = 0; i < 4; i++) {
    double *y = want[i / 2][i % 2] = host_doubles(&m, ny);
    linear(y, i / 2 ? in : none, s);
    for (int64_t j = 0; i % 2 && j < ny; j++) y[j] += before[j];
  }
  struct gradient dx_want = central_differences(&m, &operation, in, 0, dy_wide, 300);
  struct gradient dw_want = central_differences(&m, &operation, in, 1, dy_wide, 300);
  struct gradient dx_added = dx_want;
  dx_added.want = host_doubles(&m, dx_want.count);
  for (int64_t i = 0; i < dx_want.count; i++) dx_added.want[i] = dx_want.want[i] + dx_before[dx_want.at[i]];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    k->bf16_products = bf16;
    data *dev_x = device_data(&d, x, nx), *dev_w = device_data(&d, w, nw), *dev_b = device_data(&d, b, s->rows);
    for (int i = 0; i < 4; i++)
      for (int run = 0; run < 2; run++) {
        static data *first;
        data *y = i % 2 ? device_data(&d, before, ny) : poisoned_data(&d, ny);
        k->linear_forward(k, y, dev_x, dev_w, i / 2 ? dev_b : NULL, s->tokens, s->columns, s->rows, i % 2);
        bound_check(&bounds[0], peak_error(fetched_data(&d, y, ny), want[i / 2][i % 2], ny), walk.name);
        if (run) check_same(&d, y, first, ny);
        first = y;
      }
    data *dev_dy = device_data(&d, dy, ny), *dx = poisoned_data(&d, nx), *again = poisoned_data(&d, nx);
    k->linear_backward_input(k, dx, dev_dy, dev_w, s->tokens, s->columns, s->rows, false);
    bound_check(&bounds[1], gradient_error(&d, &dx_want, fetched_data(&d, dx, nx), nx), walk.name);
    k->linear_backward_input(k, again, dev_dy, dev_w, s->tokens, s->columns, s->rows, false);
    check_same(&d, dx, again, nx);
    dx = device_data(&d, dx_before, nx);
    k->linear_backward_input(k, dx, dev_dy, dev_w, s->tokens, s->columns, s->rows, true);
    bound_check(&bounds[1], gradient_error(&d, &dx_added, fetched_data(&d, dx, nx), nx), walk.name);
    data *dw = poisoned_data(&d, nw);
    again = poisoned_data(&d, nw);
    k->linear_backward_weight(k, dw, dev_dy, dev_x, s->tokens, s->columns, s->rows);
    bound_check(&bounds[2], gradient_error(&d, &dw_want, fetched_data(&d, dw, nw), nw), walk.name);
    k->linear_backward_weight(k, again, dev_dy, dev_x, s->tokens, s->columns, s->rows);
    check_same(&d, dw, again, nw);
    memory_free(&d);
  }
  memory_free(&m);
}

static void linear_layers(void **context) {
  (void)context;
  struct bound bounds[] = {{"linear_forward", 3e-6, 0}, {"linear_backward_input", 3e-6, 0}, {"linear_backward_weight", 3e-6, 0}};
  const struct linear_shape shapes[] = {{1, 1, 1}, {17, 33, 29}, {70, 96, 131}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (int bf16 = 0; bf16 < 2; bf16++) check_linear(bounds, &shapes[i], bf16);
  bound_print(bounds, 3);
}

/* ---- norms ---- */

struct norm_shape {
  int64_t rows, columns;
  double eps;
};

static void rmsnorm(double *y, double *const *in, const void *shape) { /* in: x, w */
  const struct norm_shape *s = shape;
  for (int64_t r = 0; r < s->rows; r++) {
    const double *x = in[0] + r * s->columns;
    double squares = 0;
    for (int64_t c = 0; c < s->columns; c++) squares += x[c] * x[c];
    for (int64_t c = 0; c < s->columns; c++) y[r * s->columns + c] = x[c] / sqrt(squares / (double)s->columns + s->eps) * in[1][c];
  }
}

static void check_norm(struct bound *bounds, const struct norm_shape *s, double size) {
  struct memory m = {0};
  uint64_t state = 2;
  int64_t n = s->rows * s->columns;
  size_t bytes = (size_t)n * sizeof(float);
  float eps = (float)s->eps, *x = random_floats(&m, &state, n), *w = random_floats(&m, &state, s->columns);
  float *dy = random_floats(&m, &state, n), *before = random_floats(&m, &state, n);
  for (int64_t i = 0; i < n; i++) x[i] *= (float)size;
  struct operation operation = {rmsnorm, s, n, {n, s->columns}};
  double *in[] = {widened(&m, x, n), widened(&m, w, s->columns)}, *want = host_doubles(&m, n), *dy_wide = widened(&m, dy, n);
  rmsnorm(want, in, s);
  struct gradient dx_want = central_differences(&m, &operation, in, 0, dy_wide, 400), dx_added = dx_want;
  dx_added.want = host_doubles(&m, dx_want.count);
  for (int64_t i = 0; i < dx_want.count; i++) dx_added.want[i] = dx_want.want[i] + before[dx_want.at[i]];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *dev_x = device_data(&d, x, n), *in_place = device_data(&d, x, n), *dev_w = device_data(&d, w, s->columns),
         *y = poisoned_data(&d, n);
    k->rmsnorm_forward(k, y, dev_x, dev_w, s->rows, s->columns, eps);
    bound_check(&bounds[0], peak_error(fetched_data(&d, y, n), want, n), walk.name);
    k->rmsnorm_forward(k, in_place, in_place, dev_w, s->rows, s->columns, eps);
    check_same(&d, y, in_place, n);
    data *dev_dy = device_data(&d, dy, n), *dx = poisoned_data(&d, n), *added = device_data(&d, before, n);
    k->rmsnorm_backward(k, dx, dev_dy, dev_x, dev_w, s->rows, s->columns, eps, false);
    bound_check(&bounds[1], gradient_error(&d, &dx_want, fetched_data(&d, dx, n), n), walk.name);
    k->rmsnorm_backward(k, added, dev_dy, dev_x, dev_w, s->rows, s->columns, eps, true);
    bound_check(&bounds[1], gradient_error(&d, &dx_added, fetched_data(&d, added, n), n), walk.name);
    assert_memory_equal(fetched_data(&d, dev_x, n), x, bytes);
    k->rmsnorm_backward(k, dev_dy, dev_dy, dev_x, dev_w, s->rows, s->columns, eps, false);
    check_same(&d, dx, dev_dy, n);
    memory_free(&d);
  }
  memory_free(&m);
}

static void norms(void **context) {
  (void)context;
  struct bound bounds[] = {{"rmsnorm_forward", 3e-6, 0}, {"rmsnorm_backward", 5e-6, 0}};
  const struct norm_shape shapes[] = {{1, 1, 1e-1}, {7, 37, 1e-5}, {3, 130, 1e-6}, {40, 16, 1e-6}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_norm(bounds, &shapes[i], 1);
  check_norm(bounds, &(struct norm_shape){5, 64, 1e-2}, 0.1); /* eps as large as what it is added to */
  bound_print(bounds, 2);
}

static void column_sums_of_squares(void **context) {
  (void)context;
  struct bound bound = {"column_squares", 3e-6, 0};
  struct memory m = {0};
  uint64_t state = 3;
  int64_t rows = 33, columns = 131;
  float *x = random_floats(&m, &state, rows * columns), *before = random_floats(&m, &state, columns);
  double *want = widened(&m, before, columns);
  for (int64_t i = 0; i < rows * columns; i++) want[i % columns] += (double)x[i] * x[i];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct memory d = {.k = walk.k};
    data *dev_x = device_data(&d, x, rows * columns);
    float *sums[] = {device_floats(&d, before, columns), device_floats(&d, before, columns)};
    for (int run = 0; run < 2; run++) walk.k->column_squares(walk.k, sums[run], dev_x, rows, columns);
    float *got = fetched_floats(&d, sums[0], columns);
    bound_check(&bound, peak_error(got, want, columns), walk.name);
    assert_memory_equal(got, fetched_floats(&d, sums[1], columns), (size_t)columns * sizeof *got);
    memory_free(&d);
  }
  memory_free(&m);
  bound_print(&bound, 1);
}

/* ---- positions ---- */

struct rope_shape {
  int tokens, heads, head_size;
  const float *angle; /* [T, D/2] */
};

static void rope(double *y, double *const *in, const void *shape) { /* rotates the complex numbers (x[i], x[i + D/2]) */
  const struct rope_shape *s = shape;
  int half = s->head_size / 2;
  for (int t = 0; t < s->tokens; t++)
    for (int h = 0; h < s->heads; h++)
      for (int i = 0; i < half; i++) {
        int64_t a = ((int64_t)t * s->heads + h) * s->head_size + i, b = a + half;
        double angle = s->angle[t * half + i];
        y[a] = in[0][a] * cos(angle) - in[0][b] * sin(angle);
        y[b] = in[0][a] * sin(angle) + in[0][b] * cos(angle);
      }
}

static void rotary_positions(void **context) {
  (void)context;
  struct bound bounds[] = {{"rope", 2e-6, 0}, {"rope inverse as backward", 2e-6, 0}};
  struct memory m = {0};
  uint64_t state = 4;
  struct rope_shape s = {9, 3, 10, NULL};
  int64_t n = s.tokens * s.heads * s.head_size, angles = s.tokens * s.head_size / 2;
  float *angle = random_floats(&m, &state, angles), *cosine = host_floats(&m, angles), *sine = host_floats(&m, angles);
  float *x = random_floats(&m, &state, n), *dy = random_floats(&m, &state, n);
  s.angle = angle;
  for (int64_t i = 0; i < angles; i++) cosine[i] = cosf(angle[i]), sine[i] = sinf(angle[i]);
  struct operation operation = {rope, &s, n, {n}};
  double *in[] = {widened(&m, x, n)}, *want = host_doubles(&m, n);
  rope(want, in, &s);
  struct gradient dx_want = central_differences(&m, &operation, in, 0, widened(&m, dy, n), n);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    float *dev_cosine = device_floats(&d, cosine, angles), *dev_sine = device_floats(&d, sine, angles);
    for (int run = 0; run < 2; run++) {
      static data *first;
      data *y = device_data(&d, x, n), *dx = device_data(&d, dy, n);
      k->rope(k, y, dev_cosine, dev_sine, s.tokens, s.heads, s.head_size, false);
      bound_check(&bounds[0], peak_error(fetched_data(&d, y, n), want, n), walk.name);
      k->rope(k, dx, dev_cosine, dev_sine, s.tokens, s.heads, s.head_size, true);
      bound_check(&bounds[1], gradient_error(&d, &dx_want, fetched_data(&d, dx, n), n), walk.name);
      if (run) check_same(&d, dx, first, n);
      first = dx;
    }
    memory_free(&d);
  }
  memory_free(&m);
  bound_print(bounds, 2);
}

/* ---- attention ---- */

/* Weights of what query row t of head h sees, unnormalized; returns the logarithm of their sum. [*begin, t] are the keys seen. */
static double attention_weights(double *p, double *const *in, const struct attention_shape *s, int h, int t, int *begin) {
  int D = s->head_size, kv = h / (s->heads / s->kv_heads);
  double largest = -INFINITY, sum = 0;
  *begin = s->window && t - s->window + 1 > 0 ? t - s->window + 1 : 0;
  for (int u = *begin; u <= t; u++) {
    double dot = 0;
    for (int i = 0; i < D; i++) dot += in[0][((int64_t)t * s->heads + h) * D + i] * in[1][((int64_t)u * s->kv_heads + kv) * D + i];
    p[u] = dot / sqrt(D);
    largest = fmax(largest, p[u]);
  }
  for (int u = *begin; u <= t; u++) sum += p[u] = exp(p[u] - largest);
  return largest + log(sum);
}

static void attention(double *out, double *const *in, const void *shape) { /* in: q, key, v */
  const struct attention_shape *s = shape;
  int D = s->head_size;
  double p[256];
  for (int h = 0; h < s->heads; h++)
    for (int t = 0; t < s->tokens; t++) {
      int begin, kv = h / (s->heads / s->kv_heads);
      double sum = 0, *row = out + ((int64_t)t * s->heads + h) * D;
      attention_weights(p, in, s, h, t, &begin);
      for (int i = 0; i < D; i++) row[i] = 0;
      for (int u = begin; u <= t; u++) {
        sum += p[u];
        for (int i = 0; i < D; i++) row[i] += p[u] * in[2][((int64_t)u * s->kv_heads + kv) * D + i];
      }
      for (int i = 0; i < D; i++) row[i] /= sum;
    }
}

static void check_attention(struct bound *bounds, const struct attention_shape *s) {
  struct memory m = {0};
  uint64_t state = 5;
  int64_t nq = (int64_t)s->tokens * s->heads * s->head_size, nk = (int64_t)s->tokens * s->kv_heads * s->head_size;
  int64_t sums = (int64_t)s->heads * s->tokens, count[] = {nq, nk, nk};
  struct operation operation = {attention, s, nq, {nq, nk, nk}};
  float *x[] = {random_floats(&m, &state, nq), random_floats(&m, &state, nk), random_floats(&m, &state, nk)};
  float *dy = random_floats(&m, &state, nq);
  double *in[3], *want = host_doubles(&m, nq), *logsum_want = host_doubles(&m, sums), *dy_wide = widened(&m, dy, nq), p[256];
  struct gradient gradient[3];
  for (int i = 0; i < 3; i++) in[i] = widened(&m, x[i], count[i]);
  attention(want, in, s);
  for (int64_t i = 0; i < sums; i++) {
    int begin;
    logsum_want[i] = attention_weights(p, in, s, (int)(i / s->tokens), (int)(i % s->tokens), &begin);
  }
  for (int i = 0; i < 3; i++) gradient[i] = central_differences(&m, &operation, in, i, dy_wide, 60);
  bool single = s->tokens == 1 || s->window == 1;
  float *zero = host_floats(&m, nq);
  char where[120];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *q = device_data(&d, x[0], nq), *key = device_data(&d, x[1], nk), *v = device_data(&d, x[2], nk), *dout = device_data(&d, dy, nq);
    data *out[2], *slope[2][3];
    snprintf(where, sizeof where, "T %d, %d heads on %d, D %d, window %d, %s", s->tokens, s->heads, s->kv_heads, s->head_size, s->window,
             walk.name);
    for (int run = 0; run < 2; run++) {
      float *logsum = poisoned_floats(&d, sums);
      out[run] = poisoned_data(&d, nq);
      for (int i = 0; i < 3; i++) slope[run][i] = poisoned_data(&d, count[i]);
      k->attention_forward(k, out[run], logsum, q, key, v, s);
      bound_check(&bounds[0], peak_error(fetched_data(&d, out[run], nq), want, nq), where);
      float *got = fetched_floats(&d, logsum, sums);
      for (int64_t i = 0; i < sums; i++) bound_check(&bounds[1], fabs(got[i] - logsum_want[i]), where);
      k->attention_backward(k, slope[run][0], slope[run][1], slope[run][2], dout, out[run], logsum, q, key, v, s);
      for (int i = single ? 2 : 0; i < 3; i++)
        bound_check(&bounds[2 + i], gradient_error(&d, &gradient[i], fetched_data(&d, slope[run][i], count[i]), count[i]), where);
    }
    for (int i = 0; single && i < 2; i++) /* a softmax of one: its gradient is 0, but for rounding */
      bound_check(&bounds[2 + i], absolute_error(fetched_data(&d, slope[0][i], count[i]), zero, count[i]), where);
    check_same(&d, out[0], out[1], nq);
    for (int i = 0; i < 3; i++) check_same(&d, slope[0][i], slope[1][i], count[i]);
    k->attention_forward(k, out[1], NULL, q, key, v, s);
    check_same(&d, out[0], out[1], nq);
    memory_free(&d);
  }
  memory_free(&m);
}

static void causal_attention(void **context) {
  (void)context;
  struct bound bounds[] = {{"attention_forward", 5e-6, 0},
                           {"attention logsum (absolute)", 5e-6, 0},
                           {"attention_backward dq", 1e-5, 0},
                           {"attention_backward dk", 1e-5, 0},
                           {"attention_backward dv", 1e-5, 0}};
  const struct attention_shape shapes[] = {
      {1, 2, 1, 4, 0},   {5, 4, 4, 6, 0},    {64, 2, 2, 16, 0}, {65, 4, 2, 8, 0},  {130, 6, 2, 8, 0},
      {70, 4, 1, 10, 0}, {130, 4, 2, 8, 50}, {100, 2, 1, 6, 1}, {80, 3, 3, 4, 64}, {70, 2, 2, 4, 200},
  };
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_attention(bounds, &shapes[i]);
  bound_print(bounds, 5);
}

/* ---- elementwise ---- */

static void silu_gate(double *y, double *const *in, const void *shape) { /* in: gate, up */
  for (int64_t i = 0; i < *(const int64_t *)shape; i++) y[i] = in[0][i] / (1 + exp(-in[0][i])) * in[1][i];
}

static void gated_activation(void **context) {
  (void)context;
  struct bound bounds[] = {{"silu_gate_forward", 2e-6, 0}, {"silu_gate_backward", 2e-6, 0}};
  struct memory m = {0};
  uint64_t state = 6;
  int64_t n = 1003;
  float *gate = random_floats(&m, &state, n), *up = random_floats(&m, &state, n), *dy = random_floats(&m, &state, n);
  for (int64_t i = 0; i < n; i++) gate[i] *= 3;
  gate[0] = 0, gate[1] = 60, gate[2] = -60, gate[3] = -200, gate[4] = 200;
  up[1] = up[4] = dy[1] = dy[4] = 0.01f; /* so that these do not set the scale of errors */
  struct operation operation = {silu_gate, &n, n, {n, n}};
  double *in[] = {widened(&m, gate, n), widened(&m, up, n)}, *want = host_doubles(&m, n), *dy_wide = widened(&m, dy, n);
  silu_gate(want, in, &n);
  struct gradient want_gate = central_differences(&m, &operation, in, 0, dy_wide, n);
  struct gradient want_up = central_differences(&m, &operation, in, 1, dy_wide, n);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *g = device_data(&d, gate, n), *u = device_data(&d, up, n), *y[] = {poisoned_data(&d, n), poisoned_data(&d, n)};
    for (int run = 0; run < 2; run++) k->silu_gate_forward(k, y[run], g, u, n);
    bound_check(&bounds[0], peak_error(fetched_data(&d, y[0], n), want, n), walk.name);
    check_same(&d, y[0], y[1], n);
    for (int place = 0; place < 3; place++) { /* its own memory, dgate in dy's place, dup in dy's place */
      static data *first_dgate, *first_dup;
      data *d_y = device_data(&d, dy, n), *dgate = place == 1 ? d_y : poisoned_data(&d, n), *dup = place == 2 ? d_y : poisoned_data(&d, n);
      k->silu_gate_backward(k, dgate, dup, d_y, g, u, n);
      bound_check(&bounds[1], gradient_error(&d, &want_gate, fetched_data(&d, dgate, n), n), walk.name);
      bound_check(&bounds[1], gradient_error(&d, &want_up, fetched_data(&d, dup, n), n), walk.name);
      if (place == 0) first_dgate = dgate, first_dup = dup;
      check_same(&d, dgate, first_dgate, n);
      check_same(&d, dup, first_dup, n);
    }
    memory_free(&d);
  }
  memory_free(&m);
  bound_print(bounds, 2);
}

static void mean_square(double *loss, double *const *in, const void *shape) { /* in: y, target */
  int64_t n = *(const int64_t *)shape;
  *loss = 0;
  for (int64_t i = 0; i < n; i++) *loss += (in[0][i] - in[1][i]) * (in[0][i] - in[1][i]) / (double)n;
}

static void check_mse(struct bound *bounds, int64_t n) {
  struct memory m = {0};
  uint64_t state = 7;
  const float weight = 0.25f, loss_before = 3;
  float *y = random_floats(&m, &state, n), *target = random_floats(&m, &state, n), *before = random_floats(&m, &state, n);
  for (int64_t i = 0; i < n; i++) before[i] /= (float)n;
  struct operation operation = {mean_square, &n, 1, {n, n}};
  double *in[] = {widened(&m, y, n), widened(&m, target, n)}, loss_want, upstream = weight;
  mean_square(&loss_want, in, &n);
  struct gradient assigned = central_differences(&m, &operation, in, 0, &upstream, 100), added = assigned;
  added.want = host_doubles(&m, added.count);
  for (int64_t i = 0; i < added.count; i++) added.want[i] = assigned.want[i] + before[added.at[i]];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *dev_y = device_data(&d, y, n), *dev_target = device_data(&d, target, n);
    for (int add = 0; add < 2; add++) {
      const struct gradient *want = add ? &added : &assigned;
      double loss_sum = loss_want + (add ? loss_before : 0);
      float *loss[3], got[3];
      data *dy[2];
      for (int run = 0; run < 3; run++) loss[run] = add ? device_floats(&d, &loss_before, 1) : poisoned_floats(&d, 1);
      for (int run = 0; run < 2; run++) {
        dy[run] = add ? device_data(&d, before, n) : poisoned_data(&d, n);
        k->mse(k, loss[run], dy[run], dev_y, dev_target, n, weight, add);
        bound_check(&bounds[1], gradient_error(&d, want, fetched_data(&d, dy[run], n), n), walk.name);
      }
      k->mse(k, loss[2], NULL, dev_y, dev_target, n, weight, add);
      for (int run = 0; run < 3; run++) {
        got[run] = *fetched_floats(&d, loss[run], 1);
        bound_check(&bounds[0], peak_error(&got[run], &loss_sum, 1), walk.name);
        assert_memory_equal(&got[run], &got[0], sizeof *got);
      }
      check_same(&d, dy[0], dy[1], n);
    }
    memory_free(&d);
  }
  memory_free(&m);
}

static void mean_squared_error(void **context) {
  (void)context;
  struct bound bounds[] = {{"mse", 1e-6, 0}, {"mse gradient", 1e-6, 0}};
  check_mse(bounds, 1);
  check_mse(bounds, 4096);
  check_mse(bounds, 10007);
  bound_print(bounds, 2);
}

static void filling_adding_and_conversion(void **context) {
  (void)context;
  struct memory m = {0};
  uint64_t state = 8;
  enum { N = 71 };
  float *a = random_floats(&m, &state, N), *b = random_floats(&m, &state, N), *sum = host_floats(&m, N), *filled = host_floats(&m, N);
  unsigned char packed[2][2 * N + 1]; /* fp16 and bf16 at an odd address */
  float *unpacked[] = {host_floats(&m, N), host_floats(&m, N)};
  for (int i = 0; i < N; i++) {
    uint16_t half = half_from_float(a[i]), brain = (uint16_t)(float_to_bits(a[i]) >> 16);
    memcpy(packed[0] + 1 + 2 * i, &half, 2);
    memcpy(packed[1] + 1 + 2 * i, &brain, 2);
    unpacked[0][i] = half_to_float(half);
    unpacked[1][i] = bf16_to_float(brain);
    sum[i] = a[i] + b[i];
    filled[i] = -INFINITY;
  }
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    float *to = device_floats(&d, a, N), *from = device_floats(&d, b, N);
    k->add(k, to, from, N);
    assert_memory_equal(fetched_floats(&d, to, N), sum, N * sizeof *sum);
    k->copy(k, from, to, N * sizeof *to);
    assert_memory_equal(fetched_floats(&d, from, N), sum, N * sizeof *sum);
    k->fill(k, to, -INFINITY, N);
    assert_memory_equal(fetched_floats(&d, to, N), filled, N * sizeof *filled);
    for (int i = 0; i < 2; i++) {
      data *loaded = poisoned_data(&d, N);
      k->load(k, loaded, packed[i] + 1, i ? DTYPE_BF16 : DTYPE_F16, N);
      assert_memory_equal(fetched_data(&d, loaded, N), unpacked[i], N * sizeof **unpacked);
    }
    memory_free(&d);
  }
  memory_free(&m);
}

/* ---- optimizers ---- */

static void sigmoids(void **context) {
  (void)context;
  struct bound bounds[] = {{"sigmoid_forward (relative)", 1e-6, 0},
                           {"sigmoid_backward (of its largest slope)", 1e-6, 0},
                           {"sigmoid_inverse (of the sigmoid, relative)", 1e-5, 0}};
  struct memory m = {0};
  uint64_t state = 9;
  int64_t n = 803;
  const float limit = 0.982f;
  float *x = host_floats(&m, n), *dy = random_floats(&m, &state, n), *inverse = host_floats(&m, n);
  for (int64_t i = 0; i < n; i++) {
    x[i] = (float)(i - 401) / 5;          /* -80.2 .. 80.2 */
    inverse[i] = (float)(i + 1) / 810.0f; /* up to 0.991 */
  }
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    float *dev_x = device_floats(&d, x, n), *y = poisoned_floats(&d, n), *dev_dy = device_floats(&d, dy, n), *dx = poisoned_floats(&d, n);
    k->sigmoid_forward(k, y, dev_x, n);
    k->sigmoid_backward(k, dx, dev_dy, dev_x, n);
    float *got = fetched_floats(&d, y, n), *slope = fetched_floats(&d, dx, n);
    for (int64_t i = 0; i < n; i++) {
      double s = 1 / (1 + exp(-(double)x[i]));
      bound_check(&bounds[0], fabs(got[i] - s) / s, walk.name);
      bound_check(&bounds[1], fabs(slope[i] - dy[i] * s * (1 - s)) / (0.25 * fabs(dy[i])), walk.name);
    }
    k->sigmoid_backward(k, dev_dy, dev_dy, dev_x, n);
    assert_memory_equal(slope, fetched_floats(&d, dev_dy, n), (size_t)n * sizeof(float));
    float *back = device_floats(&d, inverse, n);
    k->sigmoid_inverse(k, back, limit, n);
    got = fetched_floats(&d, back, n);
    for (int64_t i = 0; i < n; i++) {
      double target = fmin(inverse[i], limit);
      bound_check(&bounds[2], fabs(1 / (1 + exp(-(double)got[i])) - target) / target, walk.name);
    }
    memory_free(&d);
  }
  memory_free(&m);
  bound_print(bounds, 3);
}

/* One step of AdamW as its paper writes it. */
static void adamw_step(double *x, double *m, double *v, const float *gradient, int64_t count, double lr, int step) {
  for (int64_t i = 0; i < count; i++) {
    m[i] = 0.9 * m[i] + 0.1 * gradient[i];
    v[i] = 0.999 * v[i] + 0.001 * gradient[i] * (double)gradient[i];
    double m_hat = m[i] / (1 - pow(0.9, step)), v_hat = v[i] / (1 - pow(0.999, step));
    x[i] -= lr * m_hat / (sqrt(v_hat) + 1e-8);
  }
}

enum { OPTIMIZER_COUNT = 501, OPTIMIZER_STEPS = 9 };

/* Gradients of sizes from 1e-12, where epsilon rules, to 1e3; those of steps 3 and 6 hold a NaN and an infinity. */
static void optimizer_gradients(struct memory *m, float *gradient[OPTIMIZER_STEPS], bool finite[OPTIMIZER_STEPS]) {
  uint64_t state = 10;
  for (int step = 0; step < OPTIMIZER_STEPS; step++) {
    gradient[step] = random_floats(m, &state, OPTIMIZER_COUNT);
    for (int i = 0; i < OPTIMIZER_COUNT; i++) gradient[step][i] *= (float)pow(10, i % 16 - 12);
    gradient[step][5] = 0;
    finite[step] = step != 3 && step != 6;
  }
  gradient[3][OPTIMIZER_COUNT - 1] = NAN;
  gradient[6][0] = -INFINITY;
}

static void adamw(void **context) {
  (void)context;
  struct bound bound = {"adamw (largest difference after 7 steps, in steps of lr)", 1e-5, 0};
  struct memory m = {0};
  const float lr = 0.01f;
  float *gradient[OPTIMIZER_STEPS];
  bool finite[OPTIMIZER_STEPS];
  uint64_t state = 11;
  size_t bytes = OPTIMIZER_COUNT * sizeof(float);
  float *x = random_floats(&m, &state, OPTIMIZER_COUNT);
  double *moments = host_doubles(&m, 2 * OPTIMIZER_COUNT), *want = widened(&m, x, OPTIMIZER_COUNT);
  optimizer_gradients(&m, gradient, finite);
  for (int i = 0; i < OPTIMIZER_COUNT; i++) want[i] = x[i] /= 100; /* small, so that the step's rounding shows and not that of x */
  for (int step = 0, taken = 0; step < OPTIMIZER_STEPS; step++)
    if (finite[step]) adamw_step(want, moments, moments + OPTIMIZER_COUNT, gradient[step], OPTIMIZER_COUNT, lr, ++taken);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    float *at = device_floats(&d, x, OPTIMIZER_COUNT), *dev_m = device(&d, bytes), *dev_v = device(&d, bytes);
    struct step_state *dev_state = device(&d, sizeof *dev_state), end;
    for (int step = 0; step < OPTIMIZER_STEPS; step++) {
      float *slope = device_floats(&d, gradient[step], OPTIMIZER_COUNT);
      float *before[] = {fetched_floats(&d, at, OPTIMIZER_COUNT), fetched_floats(&d, dev_m, OPTIMIZER_COUNT),
                         fetched_floats(&d, dev_v, OPTIMIZER_COUNT)};
      k->step_begin(k, dev_state, slope, OPTIMIZER_COUNT);
      k->adamw(k, at, dev_m, dev_v, slope, OPTIMIZER_COUNT, lr, dev_state);
      if (finite[step]) continue;
      assert_memory_equal(fetched_floats(&d, at, OPTIMIZER_COUNT), before[0], bytes);
      assert_memory_equal(fetched_floats(&d, dev_m, OPTIMIZER_COUNT), before[1], bytes);
      assert_memory_equal(fetched_floats(&d, dev_v, OPTIMIZER_COUNT), before[2], bytes);
    }
    float *got = fetched_floats(&d, at, OPTIMIZER_COUNT);
    for (int i = 0; i < OPTIMIZER_COUNT; i++) bound_check(&bound, fabs(got[i] - want[i]) / lr, walk.name);
    k->download(k, &end, dev_state, sizeof end);
    assert_int_equal(end.taken, OPTIMIZER_STEPS - 2);
    assert_int_equal(end.skipped, 2);
    memory_free(&d);
  }
  memory_free(&m);
  bound_print(&bound, 1);
}

static void sign_updates(void **context) {
  (void)context;
  struct memory m = {0};
  const float lr = 0.3f;
  float *gradient[OPTIMIZER_STEPS];
  bool finite[OPTIMIZER_STEPS];
  size_t bytes = OPTIMIZER_COUNT * sizeof(float);
  float *x = host_floats(&m, OPTIMIZER_COUNT), *want = host_floats(&m, OPTIMIZER_COUNT);
  optimizer_gradients(&m, gradient, finite);
  for (int i = 0; i < OPTIMIZER_COUNT; i++) want[i] = x[i] = (float)i / (OPTIMIZER_COUNT - 1);
  for (int step = 0; step < OPTIMIZER_STEPS; step++)
    for (int i = 0; finite[step] && i < OPTIMIZER_COUNT; i++)
      want[i] = fminf(fmaxf(want[i] - lr * (float)((gradient[step][i] > 0) - (gradient[step][i] < 0)), 0), 1);
  assert_true(want[5] == x[5]);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    float *at = device_floats(&d, x, OPTIMIZER_COUNT);
    struct step_state *dev_state = device(&d, sizeof *dev_state);
    for (int step = 0; step < OPTIMIZER_STEPS; step++) {
      float *slope = device_floats(&d, gradient[step], OPTIMIZER_COUNT);
      k->step_begin(k, dev_state, slope, OPTIMIZER_COUNT);
      k->sign_step(k, at, slope, OPTIMIZER_COUNT, lr, dev_state);
    }
    assert_memory_equal(fetched_floats(&d, at, OPTIMIZER_COUNT), want, bytes);
    memory_free(&d);
  }
  memory_free(&m);
}

/* ---- evaluation ---- */

static void cross_entropy_in_pieces(void **context) {
  (void)context;
  struct bound bound = {"cross_entropy_piece (absolute, of the nll)", 3e-6, 0};
  struct memory m = {0};
  enum { ROWS = 13, VOCABULARY = 100 };
  const int begin[] = {0, 37, 38, 90, VOCABULARY};
  uint64_t state = 12;
  float *logits = random_floats(&m, &state, ROWS * VOCABULARY), *unset = host_floats(&m, ROWS);
  int32_t target[ROWS];
  double want[ROWS];
  for (int i = 0; i < ROWS * VOCABULARY; i++) logits[i] *= 4;
  logits[3 * VOCABULARY + 2] = 150;  /* all that follows is far below */
  logits[4 * VOCABULARY + 99] = 150; /* all before is */
  for (int r = 0; r < ROWS; r++) {
    double sum = 0;
    for (int c = 0; c < VOCABULARY; c++) sum += exp((double)logits[r * VOCABULARY + c]);
    target[r] = r == 0 ? 0 : r == 1 ? 37 : r == 2 ? VOCABULARY - 1 : r == 5 ? -1 : (int32_t)(random_bits(&state) % VOCABULARY);
    want[r] = log(sum) - (target[r] < 0 ? 0 : logits[r * VOCABULARY + target[r]]);
  }
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    float *first[3] = {0};
    int32_t *dev_target = device(&d, sizeof target);
    k->upload(k, dev_target, target, sizeof target);
    for (int run = 0; run < 2; run++) {
      struct cross_entropy entropy = {poisoned_floats(&d, ROWS), device_floats(&d, unset, ROWS), device_floats(&d, unset, ROWS)};
      k->fill(k, entropy.maximum, -INFINITY, ROWS);
      for (int piece = 0; piece < 4; piece++) {
        int columns = begin[piece + 1] - begin[piece];
        float *part = host_floats(&d, ROWS * columns);
        for (int i = 0; i < ROWS * columns; i++) part[i] = logits[i / columns * VOCABULARY + begin[piece] + i % columns];
        k->cross_entropy_piece(k, &entropy, device_data(&d, part, ROWS * columns), dev_target, ROWS, begin[piece], columns);
      }
      float *got[] = {fetched_floats(&d, entropy.maximum, ROWS), fetched_floats(&d, entropy.sum, ROWS),
                      fetched_floats(&d, entropy.target, ROWS)};
      for (int r = 0; r < ROWS; r++) {
        double nll = got[0][r] + log(got[1][r]) - got[2][r];
        bound_check(&bound, fabs(nll - want[r]) / fmax(1, fabs(want[r])), walk.name);
      }
      assert_true(got[2][5] == 0);
      for (int i = 0; i < 3; i++) {
        if (run) assert_memory_equal(first[i], got[i], ROWS * sizeof(float));
        first[i] = got[i];
      }
    }
    memory_free(&d);
  }
  memory_free(&m);
  bound_print(&bound, 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_layers),
      cmocka_unit_test(norms),
      cmocka_unit_test(column_sums_of_squares),
      cmocka_unit_test(rotary_positions),
      cmocka_unit_test(causal_attention),
      cmocka_unit_test(gated_activation),
      cmocka_unit_test(mean_squared_error),
      cmocka_unit_test(filling_adding_and_conversion),
      cmocka_unit_test(sigmoids),
      cmocka_unit_test(adamw),
      cmocka_unit_test(sign_updates),
      cmocka_unit_test(cross_entropy_in_pieces),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
