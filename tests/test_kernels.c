/* test_kernels.c: every operation of the CPU backend but the quantizer's, at each level of the instruction set and with 1 and 2 threads.
 * Forward against plain loops in double, backward against central differences of those loops, into outputs filled with NaN; a second
 * run gives the same bits. Limits are of compare.h's peak_error unless they say otherwise. */
#include "compare.h"

/* The two results of an operation that was run twice. */
static void check_same(struct memory *m, const data *a, const data *b, int64_t count) {
  assert_memory_equal(fetched_data(m, a, count), fetched_data(m, b, count), (size_t)count * sizeof(float));
}

/* Results on the host; they have to be the same with any number of threads. */
static float *result_data(struct memory *d, struct walk *walk, const data *from, int64_t count) {
  float *values = fetched_data(d, from, count);
  walk_record(walk, values, (size_t)count * sizeof *values);
  return values;
}

static float *result_floats(struct memory *d, struct walk *walk, const float *from, int64_t count) {
  float *values = fetched_floats(d, from, count);
  walk_record(walk, values, (size_t)count * sizeof *values);
  return values;
}

/* Something to add to, or poison to be overwritten. */
static data *data_before(struct memory *d, const float *before, int64_t count, bool add) {
  return add ? device_data(d, before, count) : poisoned_data(d, count);
}

/* Of what is added to `before`. */
static struct gradient gradient_added(struct memory *m, const struct gradient *gradient, const float *before) {
  struct gradient added = *gradient;
  added.want = host_doubles(m, added.count);
  for (int64_t i = 0; i < added.count; i++) added.want[i] = gradient->want[i] + before[added.at[i]];
  return added;
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
  struct gradient dx_added = gradient_added(&m, &dx_want, dx_before);
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
    k->linear_backward_weight(k, dw, dev_dy, dev_x, s->tokens, s->columns, s->rows, s->rows);
    bound_check(&bounds[2], gradient_error(&d, &dw_want, fetched_data(&d, dw, nw), nw), walk.name);
    k->linear_backward_weight(k, again, dev_dy, dev_x, s->tokens, s->columns, s->rows, s->rows);
    check_same(&d, dw, again, nw);
    int64_t first = s->rows / 3, some = s->rows - s->rows / 2; /* by some of dy's columns alone, the same rows */
    data *panel = poisoned_data(&d, some * s->columns);
    k->linear_backward_weight(k, panel, data_at(k, dev_dy, first), dev_x, s->tokens, s->columns, some, s->rows);
    const float *rows = fetched_data(&d, data_at(k, dw, first * s->columns), some * s->columns);
    bound_check(&bounds[3], peak_error(fetched_data(&d, panel, some * s->columns), widened(&d, rows, some * s->columns), some * s->columns),
                walk.name);
    memory_free(&d);
  }
  memory_free(&m);
}

static void linear_layers(void **context) {
  (void)context;
  struct bound bounds[] = {{"linear_forward", 3e-6, 0},
                           {"linear_backward_input", 3e-6, 0},
                           {"linear_backward_weight", 3e-6, 0},
                           {"linear_backward_weight of some rows", 3e-6, 0}};
  const struct linear_shape shapes[] = {{1, 1, 1}, {17, 33, 29}, {70, 96, 131}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (int bf16 = 0; bf16 < 2; bf16++) check_linear(bounds, &shapes[i], bf16);
  bound_print(bounds, 4);
}

/* ---- products with one vector ---- */

static void matrix_vector(double *y, double *const *in, const void *shape) { /* in: w, x */
  const struct linear_shape *s = shape;
  for (int64_t r = 0; r < s->rows; r++) {
    y[r] = 0;
    for (int64_t c = 0; c < s->columns; c++) y[r] += in[0][r * s->columns + c] * in[1][c];
  }
}

/* vector_matrix is the gradient of matrix_vector by its vector. */
static void check_vectors(struct bound *bounds, const struct linear_shape *s) {
  struct memory m = {0};
  uint64_t state = 13;
  int64_t n = s->rows * s->columns;
  struct operation operation = {matrix_vector, s, s->rows, {n, s->columns}};
  float *w = random_floats(&m, &state, n), *x = random_floats(&m, &state, s->columns), *dy = random_floats(&m, &state, s->rows);
  float *before = random_floats(&m, &state, s->columns);
  double *in[] = {widened(&m, w, n), widened(&m, x, s->columns)}, *want = host_doubles(&m, s->rows);
  matrix_vector(want, in, s);
  struct gradient dx_want = central_differences(&m, &operation, in, 1, widened(&m, dy, s->rows), s->columns);
  dx_want = gradient_added(&m, &dx_want, before);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *dev_w = device_data(&d, w, n);
    float *dev_x = device_floats(&d, x, s->columns), *dev_dy = device_floats(&d, dy, s->rows);
    for (int run = 0; run < 2; run++) {
      static float *first[2];
      float *y = poisoned_floats(&d, s->rows), *dx = device_floats(&d, before, s->columns);
      k->matrix_vector(k, y, dev_w, dev_x, s->rows, s->columns);
      k->vector_matrix(k, dx, dev_dy, dev_w, s->rows, s->columns);
      float *got[] = {result_floats(&d, &walk, y, s->rows), result_floats(&d, &walk, dx, s->columns)};
      bound_check(&bounds[0], peak_error(got[0], want, s->rows), walk.name);
      bound_check(&bounds[1], gradient_error(&d, &dx_want, got[1], s->columns), walk.name);
      if (run) assert_memory_equal(got[0], first[0], (size_t)s->rows * sizeof(float));
      if (run) assert_memory_equal(got[1], first[1], (size_t)s->columns * sizeof(float));
      first[0] = got[0], first[1] = got[1];
    }
    memory_free(&d);
  }
  memory_free(&m);
}

static void products_with_a_vector(void **context) {
  (void)context;
  struct bound bounds[] = {{"matrix_vector", 3e-6, 0}, {"vector_matrix", 3e-6, 0}};
  const struct linear_shape shapes[] = {{0, 1, 1}, {0, 33, 7}, {0, 130, 600}, {0, 600, 17}, {0, 5, 0}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_vectors(bounds, &shapes[i]);
  bound_print(bounds, 2);
}

/* ---- norms ---- */

static void norm(double *y, double *const *in, const void *shape) { /* in: x, w, b */
  const struct norm_shape *s = shape;
  for (int64_t r = 0; r < s->rows; r++) {
    const double *x = in[0] + r * s->columns;
    double mean = 0, squares = 0;
    for (int64_t c = 0; c < s->columns && s->centered; c++) mean += x[c] / (double)s->columns;
    for (int64_t c = 0; c < s->columns; c++) squares += (x[c] - mean) * (x[c] - mean);
    for (int64_t c = 0; c < s->columns; c++)
      y[r * s->columns + c] = (x[c] - mean) / sqrt(squares / (double)s->columns + s->eps) * in[1][c] + in[2][c];
  }
}

/* What is wanted of norm_backward, and where dx goes. */
struct norm_parts {
  bool dx, add, in_place, dw, db;
};

static void check_norm(struct bound *bounds, const struct norm_shape *s, double size, double offset) {
  static const struct norm_parts parts[] = {{.dx = true, .dw = true, .db = true},
                                            {.dx = true, .dw = true, .db = true},
                                            {.dx = true, .add = true, .dw = true, .db = true},
                                            {.dx = true},
                                            {.dx = true, .add = true},
                                            {.dx = true, .in_place = true},
                                            {.dx = true, .in_place = true, .dw = true, .db = true},
                                            {.dw = true, .db = true},
                                            {.dw = true},
                                            {.db = true, .dx = true}};
  struct memory m = {0};
  uint64_t state = 2;
  int64_t C = s->columns, n = s->rows * C;
  float *x = random_floats(&m, &state, n), *w = random_floats(&m, &state, C), *b = random_floats(&m, &state, C);
  float *dy = random_floats(&m, &state, n), *before = random_floats(&m, &state, n);
  for (int64_t i = 0; i < n; i++) x[i] = (float)(x[i] * size + offset);
  struct operation operation = {norm, s, n, {n, C, C}};
  double *in[] = {widened(&m, x, n), widened(&m, w, C), host_doubles(&m, C)}, *want[] = {host_doubles(&m, n), host_doubles(&m, n)};
  double *dy_wide = widened(&m, dy, n);
  norm(want[0], in, s);
  for (int64_t c = 0; c < C; c++) in[2][c] = b[c];
  norm(want[1], in, s);
  struct gradient dx_want = central_differences(&m, &operation, in, 0, dy_wide, 400), dx_added = gradient_added(&m, &dx_want, before);
  struct gradient dw_want = central_differences(&m, &operation, in, 1, dy_wide, 50);
  struct gradient db_want = central_differences(&m, &operation, in, 2, dy_wide, 50);
  bool still = s->centered && C == 1; /* x - mean(x) is 0 whatever x is, and dx but for rounding */
  float *zero = host_floats(&m, n);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *dev_x = device_data(&d, x, n), *dev_w = device_data(&d, w, C), *dev_b = device_data(&d, b, C);
    for (int bias = 0; bias < 2; bias++) {
      data *y = poisoned_data(&d, n), *in_place = device_data(&d, x, n);
      k->norm_forward(k, y, dev_x, dev_w, bias ? dev_b : NULL, s);
      bound_check(&bounds[0], peak_error(result_data(&d, &walk, y, n), want[bias], n), walk.name);
      k->norm_forward(k, in_place, in_place, dev_w, bias ? dev_b : NULL, s);
      check_same(&d, y, in_place, n);
    }
    data *first[2] = {NULL, NULL}; /* dx assigned, and added */
    float *first_dw = NULL, *first_db = NULL;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
      const struct norm_parts *p = &parts[i];
      data *dev_dy = device_data(&d, dy, n), *dx = !p->dx ? NULL : p->in_place ? dev_dy : data_before(&d, before, n, p->add);
      float *dw = p->dw ? poisoned_floats(&d, C) : NULL, *db = p->db ? poisoned_floats(&d, C) : NULL;
      k->norm_backward(k, dx, dw, db, dev_dy, dev_x, dev_w, s, p->add);
      if (dx && !first[p->add]) {
        first[p->add] = dx;
        float *got = result_data(&d, &walk, dx, n);
        double error = still ? absolute_error(got, p->add ? before : zero, n) : gradient_error(&d, p->add ? &dx_added : &dx_want, got, n);
        bound_check(&bounds[1], error, walk.name);
      }
      if (i == 0) {
        first_dw = result_floats(&d, &walk, dw, C);
        first_db = result_floats(&d, &walk, db, C);
        bound_check(&bounds[2], gradient_error(&d, &dw_want, first_dw, C), walk.name);
        bound_check(&bounds[2], gradient_error(&d, &db_want, first_db, C), walk.name);
      }
      if (dx) check_same(&d, dx, first[p->add], n);
      if (dw) assert_memory_equal(fetched_floats(&d, dw, C), first_dw, (size_t)C * sizeof(float));
      if (db) assert_memory_equal(fetched_floats(&d, db, C), first_db, (size_t)C * sizeof(float));
    }
    assert_memory_equal(fetched_data(&d, dev_x, n), x, (size_t)n * sizeof(float));
    memory_free(&d);
  }
  memory_free(&m);
}

static void norms(void **context) {
  (void)context;
  struct bound bounds[] = {{"norm_forward", 3e-6, 0}, {"norm_backward dx", 5e-6, 0}, {"norm_backward dw, db", 5e-6, 0}};
  struct bound far[] = {
      {"norm_forward far from 0", 1e-3, 0}, {"norm_backward dx far from 0", 1e-3, 0}, {"norm_backward dw, db far from 0", 1e-3, 0}};
  for (int centered = 0; centered < 2; centered++) {
    const struct norm_shape shapes[] = {{1, 1, 1e-1f, centered},  {7, 37, 1e-5f, centered},  {3, 130, 1e-6f, centered},
                                        {1, 64, 1e-5f, centered}, {40, 16, 1e-6f, centered}, {600, 12, 1e-5f, centered}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_norm(bounds, &shapes[i], 1, 0);
    check_norm(bounds, &(struct norm_shape){5, 64, 1e-2f, centered}, 0.1, 0); /* eps as large as what it is added to */
  }
  check_norm(far, &(struct norm_shape){5, 96, 1e-5f, true}, 1, 1000); /* mean(x^2) - mean^2 would be off by some hundredths */
  bound_print(bounds, 3);
  bound_print(far, 3);
}

/* ---- by columns ---- */

static void check_columns(struct bound *bounds, int64_t rows, int64_t columns) {
  struct memory m = {0};
  uint64_t state = 3;
  const float weight = 0.3f;
  float *x = random_floats(&m, &state, rows * columns), *before = random_floats(&m, &state, columns);
  float *absmax_before = host_floats(&m, columns), *absmax = host_floats(&m, columns);
  double *squares = widened(&m, before, columns), *sums = host_doubles(&m, columns), *middle = host_doubles(&m, columns);
  for (int64_t c = 0; c < columns; c++) {
    float high = rows ? x[c] : 0, low = high;
    absmax[c] = absmax_before[c] = c % 3 ? fabsf(before[c]) : 9; /* some are large already */
    for (int64_t i = c; i < rows * columns; i += columns) {
      sums[c] += x[i];
      squares[c] += (double)x[i] * x[i];
      absmax[c] = fmaxf(absmax[c], fabsf(x[i]));
      high = fmaxf(high, x[i]);
      low = fminf(low, x[i]);
    }
    middle[c] = weight * ((double)high + low) / 2;
  }
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *dev_x = device_data(&d, x, rows * columns);
    for (int run = 0; run < 2; run++) {
      static float *first[4];
      float *to[] = {poisoned_floats(&d, columns), device_floats(&d, before, columns), device_floats(&d, absmax_before, columns),
                     poisoned_floats(&d, columns)};
      k->column_sums(k, to[0], dev_x, rows, columns);
      k->column_squares(k, to[1], dev_x, rows, columns);
      k->column_range(k, to[2], run ? NULL : to[3], weight, dev_x, rows, columns);
      if (run) k->column_range(k, NULL, to[3], weight, dev_x, rows, columns);
      for (int i = 0; i < 4; i++) {
        float *got = result_floats(&d, &walk, to[i], columns);
        if (run) assert_memory_equal(got, first[i], (size_t)columns * sizeof *got);
        first[i] = got;
      }
      bound_check(&bounds[0], peak_error(first[0], sums, columns), walk.name);
      bound_check(&bounds[1], peak_error(first[1], squares, columns), walk.name);
      assert_memory_equal(first[2], absmax, (size_t)columns * sizeof *absmax);
      bound_check(&bounds[2], peak_error(first[3], middle, columns), walk.name);
    }
    memory_free(&d);
  }
  memory_free(&m);
}

static void sums_and_ranges_of_columns(void **context) {
  (void)context;
  struct bound bounds[] = {{"column_sums", 3e-6, 0}, {"column_squares", 3e-6, 0}, {"column_range middle", 1e-6, 0}};
  const int64_t rows[] = {0, 1, 9, 33, 600}, columns[] = {1, 64, 131};
  for (int i = 0; i < 5 * 3; i++) check_columns(bounds, rows[i / 3], columns[i % 3]);
  bound_print(bounds, 3);
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

/* Phi, the part of the normal distribution below x. */
static double normal(double x) {
  return 0.5 * erfc(-x * M_SQRT1_2);
}

/* Of a value or slope, over the size of what it is the sum of; below -8, where GELU is under 1e-14, over that. */
static double gelu_error(double got, double want, double size, double x) {
  return isfinite(got) ? fabs(got - want) / (x >= -8 ? size : 1e-14) : INFINITY;
}

static void plain_activations(void **context) {
  (void)context;
  struct bound bounds[] = {{"gelu above -1 (relative)", 1e-6, 0},
                           {"gelu down to -8 (relative)", 2e-5, 0},
                           {"slope of gelu above -1 (of its terms)", 1e-6, 0},
                           {"slope of gelu down to -8 (of its terms)", 2e-5, 0}};
  struct memory m = {0};
  uint64_t state = 14;
  enum { N = 2567, TYPES = 2 };
  static const enum activation types[TYPES] = {ACTIVATION_RELU, ACTIVATION_GELU};
  float *x = host_floats(&m, N), *dy = random_floats(&m, &state, N);
  for (int i = 0; i < N; i++) x[i] = (float)(i - 1280) / 64 + (i % 2 ? 1e-3f * dy[i] : 0); /* -20 .. 20, zero among them */
  x[0] = 1e-30f, x[1] = -1e-30f, x[2] = -0.0f, x[3] = 300, x[4] = -300;
  assert_true(x[1280] == 0);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *dev_x = device_data(&d, x, N);
    float *got[TYPES][2];
    for (int type = 0; type < TYPES; type++) {
      data *y[] = {poisoned_data(&d, N), device_data(&d, x, N)}, *dev_dy = device_data(&d, dy, N), *dx[] = {poisoned_data(&d, N), dev_dy};
      for (int run = 0; run < 2; run++) { /* the second in place */
        k->activation_forward(k, y[run], run ? y[run] : dev_x, types[type], N);
        k->activation_backward(k, dx[run], dev_dy, dev_x, types[type], N);
      }
      check_same(&d, y[0], y[1], N);
      check_same(&d, dx[0], dx[1], N);
      got[type][0] = result_data(&d, &walk, y[0], N);
      got[type][1] = result_data(&d, &walk, dx[0], N);
    }
    for (int i = 0; i < N; i++) {
      double density = exp(-0.5 * (double)x[i] * x[i]) / sqrt(2 * M_PI), phi = normal(x[i]), value = x[i] * phi;
      double slope = dy[i] * (phi + x[i] * density), terms = fabs(dy[i]) * (phi + fabs(x[i]) * density);
      assert_true(got[0][0][i] == (x[i] > 0 ? x[i] : 0));
      assert_true(got[0][1][i] == (x[i] > 0 ? dy[i] : 0));
      if (x[i] == 0) assert_true(got[1][0][i] == 0);
      if (x[i] != 0) bound_check(&bounds[x[i] < -1], gelu_error(got[1][0][i], value, fabs(value), x[i]), walk.name);
      bound_check(&bounds[2 + (x[i] < -1)], gelu_error(got[1][1][i], slope, terms, x[i]), walk.name);
    }
    memory_free(&d);
  }
  memory_free(&m);
  bound_print(bounds, 4);
}

/* ---- experts ---- */

/* A routing on the host, by the plainest loops. */
static struct routing routing_of(struct memory *m, const float *logits, int tokens, int experts, int top) {
  int64_t rows = (int64_t)tokens * top;
  struct routing r = {
      tokens, experts, top, host(m, rows, 4), host(m, rows, 4), host(m, rows, 4), host(m, rows, 4), host(m, experts + 1, 4)};
  bool *taken = host(m, experts, sizeof *taken);
  for (int t = 0; t < tokens; t++) {
    const float *row = logits + t * experts;
    memset(taken, 0, (size_t)experts * sizeof *taken);
    for (int i = 0; i < top; i++) {
      int best = -1;
      for (int e = 0; e < experts; e++)
        if (!taken[e] && (best < 0 || row[e] > row[best])) best = e;
      taken[best] = true;
      r.expert[t * top + i] = best;
    }
  }
  int32_t next = 0;
  for (int e = 0; e < experts; e++) {
    r.offset[e] = next;
    for (int i = 0; i < rows; i++)
      if (r.expert[i] == e) {
        r.token[next] = i / top;
        r.row[i] = next++;
      }
  }
  r.offset[experts] = next;
  return r;
}

/* Shares of the chosen experts by a softmax over all. */
static void route(double *weight, double *const *in, const void *shape) { /* in: logits */
  const struct routing *r = shape;
  for (int t = 0; t < r->tokens; t++) {
    const double *row = in[0] + t * r->experts;
    double largest = row[0], sum = 0, chosen = 0;
    for (int e = 0; e < r->experts; e++) largest = fmax(largest, row[e]);
    for (int e = 0; e < r->experts; e++) sum += exp(row[e] - largest);
    for (int i = 0; i < r->top; i++) chosen += weight[t * r->top + i] = exp(row[r->expert[t * r->top + i]] - largest) / sum;
    for (int i = 0; i < r->top; i++) weight[t * r->top + i] /= chosen;
  }
}

struct combination {
  struct routing routing;
  int64_t columns;
};

static void combine(double *y, double *const *in, const void *shape) { /* in: x, weight, what it is added to */
  const struct combination *s = shape;
  for (int64_t t = 0; t < s->routing.tokens; t++)
    for (int64_t c = 0; c < s->columns; c++) {
      y[t * s->columns + c] = in[2][t * s->columns + c];
      for (int64_t i = t * s->routing.top; i < (t + 1) * s->routing.top; i++)
        y[t * s->columns + c] += in[1][i] * in[0][s->routing.row[i] * s->columns + c];
    }
}

/* Random logits; every second token has ties, some one expert that outweighs all, and the last expert gets no token that has a choice. */
static float *routing_logits(struct memory *m, uint64_t *state, int tokens, int experts, int top) {
  float *logits = random_floats(m, state, (int64_t)tokens * experts);
  for (int t = 0; t < tokens; t++) {
    float *row = logits + t * experts;
    for (int e = 0; e < experts && t % 4 == 1; e++) row[e] = 0.5f;
    if (t % 4 == 3) row[experts / 2] = row[0] = 4;
    if (t % 8 == 4) row[t % experts] = 60;
    if (experts > top && t % 4 != 1) row[experts - 1] = -30;
  }
  return logits;
}

static struct routing device_routing(struct memory *d, int tokens, int experts, int top) {
  size_t bytes = (size_t)tokens * (size_t)top * 4;
  return (struct routing){tokens,
                          experts,
                          top,
                          poisoned_bytes(d, bytes),
                          poisoned_bytes(d, bytes),
                          poisoned_bytes(d, bytes),
                          poisoned_bytes(d, bytes),
                          poisoned_bytes(d, ((size_t)experts + 1) * 4)};
}

static void check_same_routing(struct memory *d, const struct routing *got, const struct routing *want) {
  size_t bytes = (size_t)want->tokens * (size_t)want->top * 4;
  assert_memory_equal(fetched_bytes(d, got->expert, bytes), want->expert, bytes);
  assert_memory_equal(fetched_bytes(d, got->row, bytes), want->row, bytes);
  assert_memory_equal(fetched_bytes(d, got->token, bytes), want->token, bytes);
  assert_memory_equal(fetched_bytes(d, got->offset, ((size_t)want->experts + 1) * 4), want->offset, ((size_t)want->experts + 1) * 4);
}

static void check_experts(struct bound *bounds, int tokens, int experts, int top, int64_t columns) {
  struct memory m = {0};
  uint64_t state = 15;
  int64_t rows = (int64_t)tokens * top, nl = (int64_t)tokens * experts, nx = rows * columns, ny = tokens * columns;
  float *logits = routing_logits(&m, &state, tokens, experts, top), *dweight = random_floats(&m, &state, rows);
  float *x = random_floats(&m, &state, nx), *y_before = random_floats(&m, &state, ny), *dy = random_floats(&m, &state, ny);
  struct combination s = {routing_of(&m, logits, tokens, experts, top), columns};
  struct operation routed = {route, &s.routing, rows, {nl}}, combined = {combine, &s, ny, {nx, rows, ny}};
  double *in[] = {widened(&m, logits, nl)}, *weight = host_doubles(&m, rows), *y_want = host_doubles(&m, ny);
  route(weight, in, &s.routing);
  double *parts[] = {widened(&m, x, nx), weight, widened(&m, y_before, ny)}, *dy_wide = widened(&m, dy, ny);
  combine(y_want, parts, &s);
  struct gradient dlogits_want = central_differences(&m, &routed, in, 0, widened(&m, dweight, rows), 400);
  struct gradient dx_want = central_differences(&m, &combined, parts, 0, dy_wide, 200);
  struct gradient dweight_want = central_differences(&m, &combined, parts, 1, dy_wide, 200);
  double *gathered_back[] = {host_doubles(&m, ny), widened(&m, y_before, ny)}; /* assigned, added */
  for (int64_t i = 0; i < 2 * nx; i++) gathered_back[i % 2][s.routing.token[i / 2 / columns] * columns + i / 2 % columns] += x[i / 2];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    data *dev_logits = device_data(&d, logits, nl), *dev_x = device_data(&d, x, nx), *dev_dy = device_data(&d, dy, ny);
    float *dev_dweight = device_floats(&d, dweight, rows);
    for (int run = 0; run < 2; run++) {
      static data *first[4];
      static float *first_weight, *first_dweight;
      struct routing r = device_routing(&d, tokens, experts, top);
      k->route_forward(k, &r, dev_logits);
      check_same_routing(&d, &r, &s.routing);
      float *got = result_floats(&d, &walk, r.weight, rows);
      bound_check(&bounds[0], peak_error(got, weight, rows), walk.name);
      data *dlogits = poisoned_data(&d, nl), *gathered = poisoned_data(&d, nx), *dx = poisoned_data(&d, nx);
      k->route_backward(k, dlogits, dev_dweight, &r);
      bound_check(&bounds[1], gradient_error(&d, &dlogits_want, result_data(&d, &walk, dlogits, nl), nl), walk.name);
      k->gather_rows(k, gathered, dev_dy, &r, columns);
      float *rows_got = fetched_data(&d, gathered, nx);
      for (int64_t i = 0; i < nx; i++) assert_true(rows_got[i] == dy[s.routing.token[i / columns] * columns + i % columns]);
      for (int add = 0; add < 2; add++) {
        data *back = data_before(&d, y_before, ny, add);
        k->gather_rows_backward(k, back, dev_x, &r, columns, add);
        bound_check(&bounds[2], peak_error(result_data(&d, &walk, back, ny), gathered_back[add], ny), walk.name);
      }
      data *y = device_data(&d, y_before, ny);
      float *dev_got = poisoned_floats(&d, rows);
      k->combine_forward(k, y, dev_x, &r, columns);
      bound_check(&bounds[3], peak_error(result_data(&d, &walk, y, ny), y_want, ny), walk.name);
      k->combine_backward(k, dx, dev_got, dev_dy, dev_x, &r, columns);
      bound_check(&bounds[4], gradient_error(&d, &dx_want, result_data(&d, &walk, dx, nx), nx), walk.name);
      float *dweight_got = result_floats(&d, &walk, dev_got, rows);
      bound_check(&bounds[4], gradient_error(&d, &dweight_want, dweight_got, rows), walk.name);
      data *made[] = {dlogits, gathered, y, dx};
      int64_t counts[] = {nl, nx, ny, nx};
      for (int i = 0; i < 4; i++) {
        if (run) check_same(&d, made[i], first[i], counts[i]);
        first[i] = made[i];
      }
      if (run) assert_memory_equal(got, first_weight, (size_t)rows * sizeof *got);
      if (run) assert_memory_equal(dweight_got, first_dweight, (size_t)rows * sizeof *got);
      first_weight = got, first_dweight = dweight_got;
    }
    memory_free(&d);
  }
  memory_free(&m);
}

static void mixture_of_experts(void **context) {
  (void)context;
  struct bound bounds[] = {{"route_forward weight", 1e-6, 0},
                           {"route_backward", 2e-6, 0},
                           {"gather_rows_backward", 1e-6, 0},
                           {"combine_forward", 2e-6, 0},
                           {"combine_backward", 3e-6, 0}};
  const struct {
    int tokens, experts, top;
    int64_t columns;
  } sizes[] = {{1, 1, 1, 1}, {1, 8, 2, 37}, {13, 8, 2, 33}, {40, 5, 1, 7}, {33, 3, 3, 16}, {0, 4, 2, 5}, {200, 16, 4, 10}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    check_experts(bounds, sizes[i].tokens, sizes[i].experts, sizes[i].top, sizes[i].columns);
  bound_print(bounds, 5);
}

/* ---- LET ---- */

static void scales_of_channels(void **context) {
  (void)context;
  struct bound bounds[] = {{"expand", 1e-7, 0}, {"expand_backward", 1e-6, 0}};
  const struct {
    struct channel_map map;
    int heads;
  } cases[] = {{{37, 1, 37}, 1}, {{8, 1, 8}, 6}, {{8, 3, 8}, 6}, {{8, 1, 4}, 6}, {{8, 3, 4}, 6}, {{64, 8, 32}, 8}, {{1, 1, 1}, 1}};
  const float signs[] = {1, -1};
  for (size_t i = 0; i < sizeof cases / sizeof *cases * 4; i++) {
    struct memory m = {0};
    uint64_t state = i;
    const struct channel_map *map = &cases[i / 4].map;
    bool inverse = i % 2;
    float sign = signs[i / 2 % 2];
    int64_t count = (int64_t)cases[i / 4].heads * map->head_size, entries = (int64_t)cases[i / 4].heads / map->share * map->period;
    float *s = host_floats(&m, entries), *before = random_floats(&m, &state, entries), *dto = random_floats(&m, &state, count);
    double *to = host_doubles(&m, count), *ds = widened(&m, before, entries);
    for (int64_t j = 0; j < entries; j++) s[j] = (float)(0.3 + random_uniform(&state));
    for (int head = 0, c = 0; head < cases[i / 4].heads; head++)
      for (int channel = 0; channel < map->head_size; channel++, c++) {
        int group = head / map->share, entry = group * map->period + (channel < map->period ? channel : channel - map->period);
        to[c] = inverse ? 1.0 / s[entry] : s[entry];
        ds[entry] += sign * dto[c] * (inverse ? -1.0 / ((double)s[entry] * s[entry]) : 1);
      }
    for (struct walk walk = {0}; walk_next(&walk);) {
      struct kernels *k = walk.k;
      struct memory d = {.k = k};
      float *dev_s = device_floats(&d, s, entries), *dev_dto = device_floats(&d, dto, count), *first = NULL;
      for (int run = 0; run < 2; run++) {
        float *got = poisoned_floats(&d, count), *slope = device_floats(&d, before, entries);
        k->expand(k, got, dev_s, map, count, inverse);
        bound_check(&bounds[0], peak_error(result_floats(&d, &walk, got, count), to, count), walk.name);
        k->expand_backward(k, slope, dev_dto, inverse ? dev_s : NULL, map, count, inverse, sign);
        slope = result_floats(&d, &walk, slope, entries);
        bound_check(&bounds[1], peak_error(slope, ds, entries), walk.name);
        if (run) assert_memory_equal(slope, first, (size_t)entries * sizeof *slope);
        first = slope;
      }
      memory_free(&d);
    }
    memory_free(&m);
  }
  bound_print(bounds, 2);
}

struct scaled_shape {
  int64_t rows, columns;
  const double *w;
};

static void scale(double *to, double *const *in, const void *shape) { /* in: row, column */
  const struct scaled_shape *s = shape;
  for (int64_t i = 0; i < s->rows * s->columns; i++) to[i] = s->w[i] * in[0][i / s->columns] * in[1][i % s->columns];
}

static void check_scale(struct bound *bounds, int64_t R, int64_t C, int which) { /* bit 0: rows, bit 1: columns; 4: no scales at all */
  struct memory m = {0};
  uint64_t state = 16;
  int64_t n = R * C;
  size_t row_bytes = (size_t)R * sizeof(float), column_bytes = (size_t)C * sizeof(float);
  float *w = random_floats(&m, &state, n), *dto = random_floats(&m, &state, n), *to = host_floats(&m, n);
  float *row = random_floats(&m, &state, R), *column = random_floats(&m, &state, C);
  struct scaled_shape shape = {R, C, widened(&m, w, n)};
  for (int64_t r = 0; r < R && !(which & 1); r++) row[r] = 1;
  for (int64_t c = 0; c < C && !(which & 2); c++) column[c] = 1;
  for (int64_t i = 0; i < n; i++) {
    float scaled = w[i] * row[i / C]; /* in this order */
    to[i] = scaled * column[i % C];
  }
  struct operation operation = {scale, &shape, n, {R, C}};
  double *in[] = {widened(&m, row, R), widened(&m, column, C)}, *dto_wide = widened(&m, dto, n);
  struct gradient drow_want = central_differences(&m, &operation, in, 0, dto_wide, 50);
  struct gradient dcolumn_want = central_differences(&m, &operation, in, 1, dto_wide, 50);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    struct weight_scales scales = {which & 1 ? device_floats(&d, row, R) : NULL, which & 2 ? device_floats(&d, column, C) : NULL};
    struct weight_scales *let = which == 4 ? NULL : &scales;
    data *dev_w = device_data(&d, w, n), *dev_dto = device_data(&d, dto, n), *got = poisoned_data(&d, n);
    k->scale_weight(k, got, dev_w, let, R, C);
    assert_memory_equal(fetched_data(&d, got, n), to, (size_t)n * sizeof *to);
    float *first[2] = {NULL, NULL};
    for (int part = 3; part >= 0; part--) { /* both, one of them, none */
      float *drow = part & 1 ? poisoned_floats(&d, R) : NULL, *dcolumn = part & 2 ? poisoned_floats(&d, C) : NULL;
      k->scale_weight_backward(k, drow, dcolumn, dev_dto, dev_w, let, R, C);
      drow = drow ? result_floats(&d, &walk, drow, R) : NULL;
      dcolumn = dcolumn ? result_floats(&d, &walk, dcolumn, C) : NULL;
      if (part == 3) first[0] = drow, first[1] = dcolumn;
      if (drow) assert_memory_equal(drow, first[0], row_bytes);
      if (dcolumn) assert_memory_equal(dcolumn, first[1], column_bytes);
    }
    bound_check(&bounds[0], gradient_error(&d, &drow_want, first[0], R), walk.name);
    bound_check(&bounds[1], gradient_error(&d, &dcolumn_want, first[1], C), walk.name);
    memory_free(&d);
  }
  memory_free(&m);
}

static void scaled_weights(void **context) {
  (void)context;
  struct bound bounds[] = {{"scale_weight_backward drow", 3e-6, 0}, {"scale_weight_backward dcolumn", 3e-6, 0}};
  const struct { int64_t rows, columns; } sizes[] = {{1, 1}, {9, 37}, {600, 19}, {3, 130}};
  for (int i = 0; i < 4 * 5; i++) check_scale(bounds, sizes[i / 5].rows, sizes[i / 5].columns, i % 5);
  bound_print(bounds, 2);
}

static void folded_vectors(void **context) {
  (void)context;
  struct bound bounds[] = {{"fold_vector", 3e-7, 0}, {"fold_vector_backward dinner", 1e-7, 0}, {"fold_vector_backward dscale", 1e-6, 0}};
  enum { N = 203 };
  for (int which = 0; which < 8; which++) { /* bits: plus, shift, scale */
    struct memory m = {0};
    uint64_t state = 17;
    float *from = random_floats(&m, &state, N), *dto = random_floats(&m, &state, N), *before = random_floats(&m, &state, N);
    float *part[3]; /* plus, shift, scale */
    double *to = host_doubles(&m, N), *dinner = host_doubles(&m, N), *dscale = host_doubles(&m, N);
    for (int i = 0; i < 3; i++) part[i] = random_floats(&m, &state, N);
    for (int i = 0; i < N; i++) {
      double bracket = from[i], scale = which & 4 ? part[2][i] : 1;
      if (which & 1) bracket += part[0][i];
      if (which & 2) bracket -= part[1][i];
      to[i] = bracket * scale;
      dinner[i] = dto[i] * scale;
      dscale[i] = before[i] + dto[i] * bracket;
    }
    for (struct walk walk = {0}; walk_next(&walk);) {
      struct kernels *k = walk.k;
      struct memory d = {.k = k};
      data *dev_from = device_data(&d, from, N), *got = poisoned_data(&d, N);
      float *dev[3], *dev_dto = device_floats(&d, dto, N);
      for (int i = 0; i < 3; i++) dev[i] = which >> i & 1 ? device_floats(&d, part[i], N) : NULL;
      k->fold_vector(k, got, dev_from, dev[0], dev[1], dev[2], N);
      bound_check(&bounds[0], peak_error(result_data(&d, &walk, got, N), to, N), walk.name);
      for (int wanted = 0; wanted < 2; wanted++) {
        float *inner = poisoned_floats(&d, N), *slope = wanted ? device_floats(&d, before, N) : NULL;
        k->fold_vector_backward(k, inner, slope, dev_dto, dev_from, dev[0], dev[1], dev[2], N);
        bound_check(&bounds[1], peak_error(result_floats(&d, &walk, inner, N), dinner, N), walk.name);
        if (slope) bound_check(&bounds[2], peak_error(result_floats(&d, &walk, slope, N), dscale, N), walk.name);
      }
      memory_free(&d);
    }
    memory_free(&m);
  }
  bound_print(bounds, 3);
}

/* ---- loss ---- */

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
  struct gradient assigned = central_differences(&m, &operation, in, 0, &upstream, 100);
  struct gradient added = gradient_added(&m, &assigned, before);
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

static void filling_adding_clamping_and_conversion(void **context) {
  (void)context;
  struct memory m = {0};
  uint64_t state = 8;
  enum { N = 71 };
  float *a = random_floats(&m, &state, N), *b = random_floats(&m, &state, N), *sum = host_floats(&m, N), *filled = host_floats(&m, N);
  float *clamped = host_floats(&m, N);
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
    clamped[i] = fminf(fmaxf(a[i], -0.5f), 0.25f);
  }
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    float *to = device_floats(&d, a, N), *from = device_floats(&d, b, N);
    k->add(k, to, from, N);
    assert_memory_equal(fetched_floats(&d, to, N), sum, N * sizeof *sum);
    data *accumulated = device_data(&d, a, N);
    k->accumulate(k, accumulated, device_data(&d, b, N), N);
    assert_memory_equal(fetched_data(&d, accumulated, N), sum, N * sizeof *sum);
    k->copy(k, from, to, N * sizeof *to);
    assert_memory_equal(fetched_floats(&d, from, N), sum, N * sizeof *sum);
    k->upload(k, to, a, N * sizeof *to);
    k->clamp(k, to, -0.5f, 0.25f, N);
    assert_memory_equal(fetched_floats(&d, to, N), clamped, N * sizeof *clamped);
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
      const int64_t some = step % 3 * (OPTIMIZER_COUNT / 3); /* of the second kind; now and then none */
      const struct learnables of[2] = {{at, OPTIMIZER_COUNT - some, lr}, {at + OPTIMIZER_COUNT - some, some, lr}};
      k->adamw(k, of, dev_m, dev_v, slope, dev_state);
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
      cmocka_unit_test(products_with_a_vector),
      cmocka_unit_test(norms),
      cmocka_unit_test(sums_and_ranges_of_columns),
      cmocka_unit_test(rotary_positions),
      cmocka_unit_test(causal_attention),
      cmocka_unit_test(gated_activation),
      cmocka_unit_test(plain_activations),
      cmocka_unit_test(mixture_of_experts),
      cmocka_unit_test(scales_of_channels),
      cmocka_unit_test(scaled_weights),
      cmocka_unit_test(folded_vectors),
      cmocka_unit_test(mean_squared_error),
      cmocka_unit_test(filling_adding_clamping_and_conversion),
      cmocka_unit_test(sigmoids),
      cmocka_unit_test(adamw),
      cmocka_unit_test(sign_updates),
      cmocka_unit_test(cross_entropy_in_pieces),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
