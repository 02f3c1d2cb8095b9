/* test_quantizer.c: the quantizer at every CPU level, with 1 and 2 threads: against the fixtures (codes and zero points equal), the OmniQuant
 * authors' own vectors, and an independent model in double whose central differences give the gradients of the factors, of LET's scales and
 * of activations. Its quotient without a division has a division's bits. What is stored dequantizes to quantize_forward at rest bit for bit, and scales applied on the fly give the bits of a
 * weight that was scaled before. The search for clipping factors finds the best pair of its grid. */
#include "compare.h"
#include "dequantize.h"

enum { ROWS = 6, COLUMNS = 96, COUNT = ROWS * COLUMNS }; /* of the fixtures */

/* What the quantizer gives for one matrix. */
struct result {
  float *y[2];                 /* host; in training with fp32 scales, and at rest */
  float *df_hi[2], *df_lo[2];  /* likewise */
  float *drow[2], *dcolumn[2]; /* likewise, where there are scales */
  uint8_t *codes;              /* packed */
  uint16_t *scale;
  uint8_t *zero_point;
};

/* Scales of the host, on the device. */
static struct weight_scales device_scales(struct memory *d, const struct weight_scales *scales, const struct quantized_shape *shape) {
  return (struct weight_scales){scales->row ? device_floats(d, scales->row, shape->rows) : NULL,
                                scales->column ? device_floats(d, scales->column, shape->columns) : NULL};
}

/* Every operation twice, into poisoned outputs; both runs have to give the same bits. Scales NULL: no LET; factors NULL: 1. */
static struct result quantize(struct memory *d, const struct quantized_shape *shape, const float *w, const float *dw,
                              const struct weight_scales *scales, const float *f_hi, const float *f_lo) {
  struct kernels *k = d->k;
  int64_t count = shape->rows * shape->columns, groups = groups_of(shape);
  size_t code_bytes = (size_t)(shape->rows * packed_row_bytes(shape->columns, shape->quantizer.bits));
  data *dev_w = device_data(d, w, count), *dev_dw = device_data(d, dw, count);
  float *hi = f_hi ? device_floats(d, f_hi, groups) : NULL, *lo = f_lo ? device_floats(d, f_lo, groups) : NULL;
  struct weight_scales dev_scales = {NULL, NULL}, *let = scales ? &dev_scales : NULL;
  if (scales) dev_scales = device_scales(d, scales, shape);
  struct result r[2];
  for (int run = 0; run < 2; run++) {
    uint8_t *codes = poisoned_bytes(d, code_bytes), *zero_point = poisoned_bytes(d, (size_t)groups);
    uint16_t *scale = poisoned_bytes(d, (size_t)groups * sizeof *scale);
    for (int at_rest = 0; at_rest < 2; at_rest++) {
      data *y = poisoned_data(d, count);
      float *df_hi = poisoned_floats(d, groups), *df_lo = poisoned_floats(d, groups);
      float *drow = scales ? poisoned_floats(d, shape->rows) : NULL, *dcolumn = scales ? poisoned_floats(d, shape->columns) : NULL;
      k->quantize_forward(k, y, dev_w, let, hi, lo, shape, at_rest);
      k->quantize_backward(k, df_hi, df_lo, drow, dcolumn, dev_dw, dev_w, let, hi, lo, shape, at_rest);
      r[run].drow[at_rest] = scales ? fetched_floats(d, drow, shape->rows) : NULL;
      r[run].dcolumn[at_rest] = scales ? fetched_floats(d, dcolumn, shape->columns) : NULL;
      r[run].y[at_rest] = fetched_data(d, y, count);
      r[run].df_hi[at_rest] = fetched_floats(d, df_hi, groups);
      r[run].df_lo[at_rest] = fetched_floats(d, df_lo, groups);
    }
    k->quantize_codes(k, codes, scale, zero_point, dev_w, let, hi, lo, shape);
    r[run].codes = fetched_bytes(d, codes, code_bytes);
    r[run].scale = fetched_bytes(d, scale, (size_t)groups * sizeof *scale);
    r[run].zero_point = fetched_bytes(d, zero_point, (size_t)groups);
  }
  for (int at_rest = 0; at_rest < 2; at_rest++) {
    assert_memory_equal(r[0].y[at_rest], r[1].y[at_rest], (size_t)count * sizeof(float));
    assert_memory_equal(r[0].df_hi[at_rest], r[1].df_hi[at_rest], (size_t)groups * sizeof(float));
    assert_memory_equal(r[0].df_lo[at_rest], r[1].df_lo[at_rest], (size_t)groups * sizeof(float));
    if (scales) assert_memory_equal(r[0].drow[at_rest], r[1].drow[at_rest], (size_t)shape->rows * sizeof(float));
    if (scales) assert_memory_equal(r[0].dcolumn[at_rest], r[1].dcolumn[at_rest], (size_t)shape->columns * sizeof(float));
  }
  assert_memory_equal(r[0].codes, r[1].codes, code_bytes);
  assert_memory_equal(r[0].scale, r[1].scale, (size_t)groups * sizeof(uint16_t));
  assert_memory_equal(r[0].zero_point, r[1].zero_point, (size_t)groups);
  return r[0];
}

/* Code i of a packed row, bit by bit. */
static int unpacked(const uint8_t *row, int64_t i, int bits) {
  int code = 0;
  for (int bit = 0; bit < bits; bit++) {
    int64_t position = i * bits + bit;
    code |= (row[position / 8] >> position % 8 & 1) << bit;
  }
  return code;
}

/* Where group g of a matrix begins, and its columns. */
static int64_t group_begin(const struct quantized_shape *shape, int64_t g) {
  int64_t per_row = groups_per_row(shape);
  return g / per_row * shape->columns + g % per_row * shape->quantizer.group_size;
}

static int64_t group_length(const struct quantized_shape *shape, int64_t g) {
  int64_t rest = shape->columns - g % groups_per_row(shape) * shape->quantizer.group_size;
  return rest < shape->quantizer.group_size ? rest : shape->quantizer.group_size;
}

static double relative(double got, double want) {
  return got == want ? 0 : fabs(got - want) / fabs(want);
}

/* What a group's gradient is measured by: d w_hat / d scale is the difference of round(x) and x for most weights, so that the sum of
 * |dw * x| times the largest slope of the scale is what rounding errors grow from, however well the sum cancels. */
static double gradient_size(const struct quantizer *q, const float *w, const float *dw, int64_t length, double scale) {
  double sum = 0, reach = 0;
  for (int64_t i = 0; i < length; i++) {
    sum += fabs(dw[i] * w[i] / scale);
    reach = fmax(reach, fabs(w[i]));
  }
  return sum * reach / (q->symmetric ? (1 << (q->bits - 1)) - 1 : (1 << q->bits) - 1);
}

static void check_gradient(struct bound *bound, double got, double want, double size, const char *where) {
  bound_check(bound, got == want ? 0 : fabs(got - want) / size, where);
}

/* ---- fixtures ---- */

struct fixture_case {
  struct quantized_shape shape;
  char name[40];
  const float *y, *y_rest, *scale, *scale_rest, *df_hi, *df_lo;
  const uint8_t *codes, *codes_rest, *zero_point, *zero_point_rest;
};

static const uint8_t *bytes_of(struct memory *m, const struct safetensors *file, int64_t count, const char *name, const char *part) {
  char full[80];
  snprintf(full, sizeof full, "%s.%s", name, part);
  return expected_bytes(m, file, (size_t)count, full);
}

static struct fixture_case fixture_case(struct memory *m, const struct safetensors *file, int bits, int group, bool symmetric) {
  struct fixture_case c = {{ROWS, COLUMNS, {bits, symmetric, group ? group : COLUMNS}}, "", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  int64_t groups = groups_of(&c.shape);
  snprintf(c.name, sizeof c.name, "b%d_g%d_%s", bits, group, symmetric ? "sym" : "asym");
  c.y = expected_floats(m, file, COUNT, "%s.y", c.name);
  c.y_rest = expected_floats(m, file, COUNT, "%s.y_rest", c.name);
  c.scale = expected_floats(m, file, groups, "%s.scale", c.name);
  c.scale_rest = expected_floats(m, file, groups, "%s.scale_rest", c.name);
  c.df_hi = expected_floats(m, file, groups, "%s.d_f_hi_open", c.name);
  c.df_lo = expected_floats(m, file, groups, "%s.d_f_lo_open", c.name);
  c.codes = bytes_of(m, file, COUNT, c.name, "codes");
  c.codes_rest = bytes_of(m, file, COUNT, c.name, "codes_rest");
  c.zero_point = bytes_of(m, file, groups, c.name, "zero_point");
  c.zero_point_rest = bytes_of(m, file, groups, c.name, "zero_point_rest");
  return c;
}

/* The header's arithmetic in training, which shows codes, scales and zero points that the kernels keep to themselves. */
static void check_grid(struct bound *bound, const struct fixture_case *c, const float *x, const float *f_hi, const float *f_lo) {
  const struct quantizer *q = &c->shape.quantizer;
  for (int64_t g = 0; g < groups_of(&c->shape); g++) {
    int64_t begin = group_begin(&c->shape, g), end = begin + group_length(&c->shape, g);
    float maximum = x[begin], minimum = x[begin];
    for (int64_t i = begin; i < end; i++) maximum = fmaxf(maximum, x[i]), minimum = fminf(minimum, x[i]);
    struct group_grid grid = quantizer_grid(q, quantizer_high(f_hi[g], maximum), quantizer_low(f_lo[g], minimum), false);
    bound_check(bound, relative(grid.scale, c->scale[g]), c->name);
    assert_true(grid.zero_point == c->zero_point[g]);
    for (int64_t i = begin; i < end; i++) assert_true(quantizer_code(x[i], grid, quantizer_top(q)) == c->codes[i]);
  }
}

static void check_stored(const struct fixture_case *c, const struct result *r) {
  const struct quantizer *q = &c->shape.quantizer;
  int64_t row_bytes = packed_row_bytes(COLUMNS, q->bits);
  for (int64_t g = 0; g < groups_of(&c->shape); g++) {
    assert_true(half_to_float(r->scale[g]) == c->scale_rest[g]);
    assert_int_equal(r->zero_point[g], c->zero_point_rest[g]);
  }
  for (int64_t i = 0; i < COUNT; i++)
    assert_int_equal(unpacked(r->codes + i / COLUMNS * row_bytes, i % COLUMNS, q->bits), c->codes_rest[i]);
}

static void fixtures_are_met(void **context) {
  (void)context;
  static const int bits[] = {2, 3, 4, 5, 8}, group[] = {0, 32, 40};
  struct bound bounds[] = {{"scale", 1e-6, 0}, {"y in training", 1e-6, 0}, {"y at rest", 1e-6, 0}, {"gradient of the factors", 1e-6, 0}};
  struct safetensors *file = expected_open("", "quantizer.safetensors");
  for (int i = 0; i < 5 * 3 * 2; i++) {
    struct memory m = {0};
    struct fixture_case c = fixture_case(&m, file, bits[i / 6], group[i / 2 % 3], i % 2);
    int64_t groups = groups_of(&c.shape);
    const float *x = expected_floats(&m, file, COUNT, "x"), *g = expected_floats(&m, file, COUNT, "g");
    const float *f_hi = expected_floats(&m, file, groups, "g%d.f_hi", group[i / 2 % 3]);
    const float *f_lo = expected_floats(&m, file, groups, "g%d.f_lo", group[i / 2 % 3]);
    check_grid(&bounds[0], &c, x, f_hi, f_lo);
    for (struct walk walk = {0}; walk_next(&walk);) {
      struct memory d = {.k = walk.k};
      struct result r = quantize(&d, &c.shape, x, g, NULL, f_hi, f_lo);
      check_stored(&c, &r);
      for (int64_t j = 0; j < COUNT; j++) {
        bound_check(&bounds[1], relative(r.y[0][j], c.y[j]), c.name);
        bound_check(&bounds[2], relative(r.y[1][j], c.y_rest[j]), c.name);
      }
      for (int64_t j = 0; j < groups; j++) {
        int64_t begin = group_begin(&c.shape, j);
        double size = gradient_size(&c.shape.quantizer, x + begin, g + begin, group_length(&c.shape, j), c.scale[j]);
        check_gradient(&bounds[3], r.df_hi[0][j], c.df_hi[j], size, c.name);
        check_gradient(&bounds[3], r.df_lo[0][j], c.df_lo[j], size, c.name);
      }
      memory_free(&d);
    }
    memory_free(&m);
  }
  safetensors_close(file);
  bound_print(bounds, 4);
}

/* ---- the authors' vectors ---- */

/* Left out is what this quantizer does otherwise by design: rows without a negative value (row 1), symmetric codes, short groups. */
static void reference_vectors_are_met(void **context) {
  (void)context;
  enum { ONE_SIGN = 1 };
  static const int bits[] = {2, 3, 4, 6, 8}, group[] = {0, 32};
  struct bound bounds[] = {{"y", 1e-6, 0}, {"gradient of gamma and beta", 1e-5, 0}};
  struct safetensors *file = expected_open("golden", "quantizer_vectors.safetensors");
  for (int i = 0; i < 5 * 2; i++) {
    struct memory m = {0};
    char name[40];
    snprintf(name, sizeof name, "b%d_g%d_asym", bits[i / 2], group[i % 2]);
    struct quantized_shape shape = {ROWS, COLUMNS, {bits[i / 2], false, group[i % 2] ? group[i % 2] : COLUMNS}};
    int64_t groups = groups_of(&shape), per_row = groups / ROWS;
    const float *x = expected_floats(&m, file, COUNT, "x"), *gout = expected_floats(&m, file, COUNT, "gout");
    const float *y = expected_floats(&m, file, COUNT, "%s/y", name);
    const float *parameter[] = {expected_floats(&m, file, groups, "%s/up", name), expected_floats(&m, file, groups, "%s/low", name)};
    const float *want[] = {expected_floats(&m, file, groups, "%s/gup", name), expected_floats(&m, file, groups, "%s/glow", name)};
    for (struct walk walk = {0}; walk_next(&walk);) {
      struct kernels *k = walk.k;
      struct memory d = {.k = k};
      const float *factor[2], *got[2];
      for (int end = 0; end < 2; end++) {
        float *f = poisoned_floats(&d, groups);
        k->sigmoid_forward(k, f, device_floats(&d, parameter[end], groups), groups);
        factor[end] = fetched_floats(&d, f, groups);
      }
      struct result r = quantize(&d, &shape, x, gout, NULL, factor[0], factor[1]);
      for (int end = 0; end < 2; end++) {
        float *slope = device_floats(&d, end ? r.df_lo[0] : r.df_hi[0], groups);
        k->sigmoid_backward(k, slope, slope, device_floats(&d, parameter[end], groups), groups);
        got[end] = fetched_floats(&d, slope, groups);
      }
      for (int64_t row = 0; row < ROWS; row++) {
        if (row == ONE_SIGN) continue;
        for (int64_t j = row * COLUMNS; j < (row + 1) * COLUMNS; j++) bound_check(&bounds[0], relative(r.y[0][j], y[j]), name);
        for (int64_t j = row * per_row; j < (row + 1) * per_row; j++) {
          double size = fmax(fabs(want[0][j]), fabs(want[1][j]));
          check_gradient(&bounds[1], got[0][j], want[0][j], size, name);
          check_gradient(&bounds[1], got[1][j], want[1][j], size, name);
        }
      }
      memory_free(&d);
    }
    memory_free(&m);
  }
  safetensors_close(file);
  bound_print(bounds, 2);
}

/* ---- finite differences ---- */

/* One group in double. Straight-through: what round() adds to x and, at rest, to the scale, the zero point, and which codes are held at an
 * end, are frozen where they were first computed, so that the loss is smooth in the factors and its slope is the one that training uses. */
struct soft_group {
  const double *w;
  const float *dw;
  int64_t length;
  int bits;
  bool symmetric;
  double maximum, minimum;
  double rounding;             /* of the scale to fp16; 0 in fp32 */
  double zero_point, *residue; /* round(x) - x */
  int *held;                   /* -1: at code 0, 1: at code Q, 0: between */
};

static void soft_range(struct soft_group *s) {
  s->maximum = s->minimum = s->w[0];
  for (int64_t i = 0; i < s->length; i++) s->maximum = fmax(s->maximum, s->w[i]), s->minimum = fmin(s->minimum, s->w[i]);
}

static double soft_scale(const struct soft_group *s, double f_hi, double f_lo) {
  double high = fmax(f_hi * s->maximum, 0), low = fmin(f_lo * s->minimum, 0), top = pow(2, s->bits) - 1;
  double scale = s->symmetric ? fmax(high, -low) / (pow(2, s->bits - 1) - 1) : (high - low) / top;
  return fmin(fmax(scale, 1e-5), 1e4) + s->rounding;
}

static bool near_tie(double x) {
  return fabs(fabs(x - rint(x)) - 0.5) < 1e-4;
}

/* Freezes the decisions; false where one of them hangs on the last bits of a float. */
static bool soft_freeze(struct soft_group *s, double f_hi, double f_lo, bool at_rest) {
  s->rounding = 0;
  double exact = soft_scale(s, f_hi, f_lo), unit = exp2(floor(log2(exact)) - 10); /* of fp16 */
  if (at_rest) s->rounding = rint(exact / unit) * unit - exact;
  double scale = soft_scale(s, f_hi, f_lo), offset = s->symmetric ? pow(2, s->bits - 1) : -fmin(f_lo * s->minimum, 0) / scale;
  bool clear = (s->symmetric || !near_tie(offset)) && !(at_rest && near_tie(exact / unit));
  s->zero_point = rint(offset);
  for (int64_t i = 0; i < s->length; i++) {
    double x = s->w[i] / scale, code = rint(x) + s->zero_point;
    clear = clear && !near_tie(x);
    s->residue[i] = rint(x) - x;
    s->held[i] = code <= 0 ? -1 : code >= pow(2, s->bits) - 1 ? 1 : 0;
  }
  return clear;
}

static double soft_value(const struct soft_group *s, double scale, int64_t i) {
  double top = pow(2, s->bits) - 1;
  if (s->held[i]) return ((s->held[i] > 0 ? top : 0) - s->zero_point) * scale;
  return (s->w[i] / scale + s->residue[i]) *
         scale; /* at the frozen factors: round(x) * scale; away from them as if round were x + constant */
}

static double soft_loss(const struct soft_group *s, double f_hi, double f_lo) {
  double loss = 0, scale = soft_scale(s, f_hi, f_lo);
  for (int64_t i = 0; i < s->length; i++) loss += s->dw[i] * soft_value(s, scale, i);
  return loss;
}

/* All groups of a matrix. */
static struct soft_group *soft_groups(struct memory *m, const struct quantized_shape *shape, const double *w, const float *dw) {
  int64_t groups = groups_of(shape), count = shape->rows * shape->columns;
  struct soft_group *s = host(m, groups, sizeof *s);
  double *residue = host_doubles(m, count);
  int *held = host(m, count, sizeof *held);
  for (int64_t g = 0; g < groups; g++) {
    int64_t begin = group_begin(shape, g);
    s[g] = (struct soft_group){.w = w + begin,
                               .dw = dw + begin,
                               .length = group_length(shape, g),
                               .bits = shape->quantizer.bits,
                               .symmetric = shape->quantizer.symmetric,
                               .residue = residue + begin,
                               .held = held + begin};
    soft_range(&s[g]);
  }
  return s;
}

static void check_soft(struct bound *bounds, const struct quantized_shape *shape, bool at_rest, uint64_t seed) {
  struct memory m = {0};
  const double h = 1e-4;
  uint64_t state = seed;
  int64_t count = shape->rows * shape->columns, groups = groups_of(shape), per_row = groups_per_row(shape), skipped = 0;
  float *w = random_floats(&m, &state, count), *dw = random_floats(&m, &state, count);
  double *wide = widened(&m, w, count);
  float *factor[] = {host_floats(&m, groups), host_floats(&m, groups)};
  double *want[] = {host_doubles(&m, groups), host_doubles(&m, groups)}, *y = host_doubles(&m, count), *size = host_doubles(&m, groups);
  bool *clear = host(&m, groups, sizeof *clear);
  struct soft_group *soft = soft_groups(&m, shape, wide, dw);
  char where[80];
  snprintf(where, sizeof where, "%d bits, %s%s, %lld columns in groups of %lld", shape->quantizer.bits, at_rest ? "at rest, " : "",
           shape->quantizer.symmetric ? "symmetric" : "asymmetric", (long long)shape->columns, (long long)shape->quantizer.group_size);
  for (int64_t g = 0; g < groups; g++) {
    int64_t begin = group_begin(shape, g), length = group_length(shape, g);
    struct soft_group s = soft[g];
    double f[2];
    for (int end = 0; end < 2; end++) f[end] = factor[end][g] = (float)(0.4 + 0.6 * random_uniform(&state));
    clear[g] = soft_freeze(&s, f[0], f[1], at_rest);
    if (s.symmetric && fabs(f[0] * s.maximum + f[1] * s.minimum) < 0.01) clear[g] = false; /* near the corner of the maximum */
    skipped += !clear[g];
    for (int64_t i = 0; i < length; i++) y[begin + i] = soft_value(&s, soft_scale(&s, f[0], f[1]), i);
    want[0][g] = (soft_loss(&s, f[0] + h, f[1]) - soft_loss(&s, f[0] - h, f[1])) / (2 * h);
    want[1][g] = (soft_loss(&s, f[0], f[1] + h) - soft_loss(&s, f[0], f[1] - h)) / (2 * h);
    size[g] = gradient_size(&shape->quantizer, w + begin, s.dw, length, soft_scale(&s, f[0], f[1]));
  }
  assert_true(skipped * 4 < groups);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct memory d = {.k = walk.k};
    struct result r = quantize(&d, shape, w, dw, NULL, factor[0], factor[1]);
    for (int64_t i = 0; i < count; i++) {
      int64_t g = i / shape->columns * per_row + i % shape->columns / shape->quantizer.group_size;
      if (clear[g]) bound_check(&bounds[0], relative(r.y[at_rest][i], y[i]), where);
    }
    for (int64_t g = 0; g < groups; g++) {
      if (!clear[g]) continue;
      check_gradient(&bounds[1], r.df_hi[at_rest][g], want[0][g], size[g], where);
      check_gradient(&bounds[1], r.df_lo[at_rest][g], want[1][g], size[g], where);
    }
    walk_record(&walk, r.df_hi[at_rest], (size_t)groups * sizeof(float));
    walk_record(&walk, r.df_lo[at_rest], (size_t)groups * sizeof(float));
    memory_free(&d);
  }
  memory_free(&m);
}

static void gradients_are_those_of_a_soft_model(void **context) {
  (void)context;
  struct bound bounds[] = {{"y", 1e-6, 0}, {"gradient of the factors", 1e-6, 0}};
  const struct { int64_t columns, group; } sizes[] = {{7, 7}, {50, 13}, {65, 64}, {96, 33}};
  for (int bits = 2; bits <= 8; bits++)
    for (int symmetric = 0; symmetric < 2; symmetric++)
      for (int i = 0; i < 8; i++)
        check_soft(bounds, &(struct quantized_shape){9, sizes[i / 2].columns, {bits, symmetric, sizes[i / 2].group}}, i % 2,
                   (uint64_t)(bits * 10 + i));
  bound_print(bounds, 2);
}

/* ---- gradients of what moves the values: LET's scales, and activations themselves ---- */

/* A factor of a group; NULL: 1. */
static double factor_of(const float *factors, int64_t g) {
  return factors ? factors[g] : 1;
}

/* Freezes all groups. Those whose decisions, or whose maximum or minimum, a small step might change get a gradient of 0, so that they say
 * nothing; with `ties` equal values are no such decision. Returns how many. */
static int64_t soft_freeze_all(struct soft_group *s, const struct quantized_shape *shape, float *dw, const float *f_hi, const float *f_lo,
                               bool at_rest, bool ties) {
  int64_t silenced = 0;
  for (int64_t g = 0; g < groups_of(shape); g++) {
    double hi = factor_of(f_hi, g), lo = factor_of(f_lo, g), corner = fabs(hi * s[g].maximum + lo * s[g].minimum);
    bool clear = soft_freeze(&s[g], hi, lo, at_rest);
    int highest = 0, lowest = 0;
    for (int64_t i = 0; i < s[g].length; i++) {
      highest += s[g].w[i] > s[g].maximum - 1e-3;
      lowest += s[g].w[i] < s[g].minimum + 1e-3;
    }
    clear = clear && (ties || (highest == 1 && lowest == 1 && fabs(s[g].maximum) > 1e-3 && fabs(s[g].minimum) > 1e-3));
    if (s[g].symmetric && corner < 0.01 && !(ties && corner == 0)) clear = false;
    for (int64_t i = 0; !clear && i < s[g].length; i++) dw[group_begin(shape, g) + i] = 0;
    silenced += !clear;
  }
  return silenced;
}

/* Loss of groups [first, end), whose maxima and minima follow their values; every step-th. */
static double soft_loss_of(struct soft_group *s, int64_t first, int64_t end, int64_t step, const float *f_hi, const float *f_lo) {
  double loss = 0;
  for (int64_t g = first; g < end; g += step) {
    soft_range(&s[g]);
    loss += soft_loss(&s[g], factor_of(f_hi, g), factor_of(f_lo, g));
  }
  return loss;
}

/* A weight under LET, in double. */
struct soft_weight {
  const struct quantized_shape *shape;
  const float *w, *f_hi, *f_lo;
  double *scaled, *row, *column;
  struct soft_group *group;
};

static void soft_scale_row(struct soft_weight *s, int64_t r, int64_t first, int64_t end) {
  for (int64_t c = first; c < end; c++) s->scaled[r * s->shape->columns + c] = s->w[r * s->shape->columns + c] * s->row[r] * s->column[c];
}

static double soft_row_slope(struct soft_weight *s, int64_t r) {
  const double h = 1e-5, kept = s->row[r];
  int64_t per_row = groups_per_row(s->shape);
  double loss[2];
  for (int i = 0; i < 2; i++) {
    s->row[r] = kept + (i ? -h : h);
    soft_scale_row(s, r, 0, s->shape->columns);
    loss[i] = soft_loss_of(s->group, r * per_row, (r + 1) * per_row, 1, s->f_hi, s->f_lo);
  }
  s->row[r] = kept;
  soft_scale_row(s, r, 0, s->shape->columns);
  return (loss[0] - loss[1]) / (2 * h);
}

static double soft_column_slope(struct soft_weight *s, int64_t c) {
  const double h = 1e-5, kept = s->column[c];
  int64_t per_row = groups_per_row(s->shape);
  double loss[3];
  for (int i = 0; i < 3; i++) {
    s->column[c] = i < 2 ? kept + (i ? -h : h) : kept;
    for (int64_t r = 0; r < s->shape->rows; r++) soft_scale_row(s, r, c, c + 1);
    loss[i] = soft_loss_of(s->group, c / s->shape->quantizer.group_size, groups_of(s->shape), per_row, s->f_hi, s->f_lo);
  }
  return (loss[0] - loss[1]) / (2 * h);
}

/* What is left out is not asked for, and the rest is as before. */
static void check_parts(struct bound *bound, struct memory *d, const struct quantized_shape *shape, const float *w, const float *dw,
                        const struct weight_scales *scales, const float *f_hi, const float *f_lo, bool at_rest, const struct result *r) {
  struct kernels *k = d->k;
  int64_t groups = groups_of(shape), count = shape->rows * shape->columns;
  struct weight_scales dev_scales = device_scales(d, scales, shape);
  data *dev_w = device_data(d, w, count), *dev_dw = device_data(d, dw, count);
  float *hi = device_floats(d, f_hi, groups), *lo = device_floats(d, f_lo, groups);
  for (int part = 0; part < 8; part++) {
    float *df_hi = part & 1 ? poisoned_floats(d, groups) : NULL, *df_lo = part & 1 ? poisoned_floats(d, groups) : NULL;
    float *drow = part & 2 ? poisoned_floats(d, shape->rows) : NULL, *dcolumn = part & 4 ? poisoned_floats(d, shape->columns) : NULL;
    k->quantize_backward(k, df_hi, df_lo, drow, dcolumn, dev_dw, dev_w, &dev_scales, hi, lo, shape, at_rest);
    if (drow) assert_memory_equal(fetched_floats(d, drow, shape->rows), r->drow[at_rest], (size_t)shape->rows * sizeof(float));
    if (dcolumn)
      assert_memory_equal(fetched_floats(d, dcolumn, shape->columns), r->dcolumn[at_rest], (size_t)shape->columns * sizeof(float));
    if (!df_hi) continue;
    bound_check(bound, peak_error(fetched_floats(d, df_hi, groups), widened(d, r->df_hi[at_rest], groups), groups), "df_hi");
    bound_check(bound, peak_error(fetched_floats(d, df_lo, groups), widened(d, r->df_lo[at_rest], groups), groups), "df_lo");
  }
}

static float *random_scales(struct memory *m, uint64_t *state, int64_t count) { /* 0.5 .. 2 */
  float *scales = host_floats(m, count);
  for (int64_t i = 0; i < count; i++) scales[i] = (float)exp2(2 * random_uniform(state) - 1);
  return scales;
}

static float *random_factors(struct memory *m, uint64_t *state, int64_t count) {
  float *factors = host_floats(m, count);
  for (int64_t i = 0; i < count; i++) factors[i] = (float)(0.4 + 0.6 * random_uniform(state));
  return factors;
}

/* w * row * column as fp32 has it, bit for bit. */
static float *scaled_weight(struct memory *m, const float *w, const struct weight_scales *scales, const struct quantized_shape *shape) {
  float *scaled = host_floats(m, shape->rows * shape->columns);
  for (int64_t i = 0; i < shape->rows * shape->columns; i++) {
    scaled[i] = scales->row ? w[i] * scales->row[i / shape->columns] : w[i];
    if (scales->column) scaled[i] *= scales->column[i % shape->columns];
  }
  return scaled;
}

static void check_soft_scales(struct bound *bounds, const struct quantized_shape *shape, int which, bool at_rest, uint64_t seed) {
  struct memory m = {0};
  uint64_t state = seed;
  int64_t R = shape->rows, C = shape->columns, groups = groups_of(shape), count = R * C;
  float *w = random_floats(&m, &state, count), *dw = random_floats(&m, &state, count);
  float *f_hi = random_factors(&m, &state, groups), *f_lo = random_factors(&m, &state, groups);
  struct weight_scales scales = {which & 1 ? random_scales(&m, &state, R) : NULL, which & 2 ? random_scales(&m, &state, C) : NULL};
  struct soft_weight soft = {
      shape, w, f_hi, f_lo, widened(&m, scaled_weight(&m, w, &scales, shape), count), host_doubles(&m, R), host_doubles(&m, C), NULL};
  double *want[] = {host_doubles(&m, R), host_doubles(&m, C)}, *size = host_doubles(&m, R);
  char where[100];
  snprintf(where, sizeof where, "%d bits, %s%s, scales %d, %lld columns in groups of %lld", shape->quantizer.bits,
           at_rest ? "at rest, " : "", shape->quantizer.symmetric ? "symmetric" : "asymmetric", which, (long long)C,
           (long long)shape->quantizer.group_size);
  for (int64_t r = 0; r < R; r++) soft.row[r] = scales.row ? scales.row[r] : 1;
  for (int64_t c = 0; c < C; c++) soft.column[c] = scales.column ? scales.column[c] : 1;
  soft.group = soft_groups(&m, shape, soft.scaled, dw);
  assert_true(soft_freeze_all(soft.group, shape, dw, f_hi, f_lo, at_rest, false) * 2 < groups);
  for (int64_t i = 0; i < count; i++) size[i / C] += fabs(dw[i] * soft.scaled[i] / soft.row[i / C]);
  for (int64_t r = 0; r < R; r++) want[0][r] = soft_row_slope(&soft, r);
  for (int64_t c = 0; c < C; c++) want[1][c] = soft_column_slope(&soft, c);
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct memory d = {.k = walk.k};
    struct result r = quantize(&d, shape, w, dw, &scales, f_hi, f_lo);
    for (int64_t i = 0; i < R; i++) check_gradient(&bounds[0], r.drow[at_rest][i], want[0][i], size[i], where);
    bound_check(&bounds[1], peak_error(r.dcolumn[at_rest], want[1], C), where);
    check_parts(&bounds[2], &d, shape, w, dw, &scales, f_hi, f_lo, at_rest, &r);
    walk_record(&walk, r.y[at_rest], (size_t)count * sizeof(float));
    walk_record(&walk, r.drow[at_rest], (size_t)R * sizeof(float));
    walk_record(&walk, r.dcolumn[at_rest], (size_t)C * sizeof(float));
    memory_free(&d);
  }
  memory_free(&m);
}

static void gradients_of_scales_are_those_of_a_soft_model(void **context) {
  (void)context;
  struct bound bounds[] = {
      {"gradient of row scales", 2e-6, 0}, {"gradient of column scales", 2e-6, 0}, {"factors without scales", 2e-6, 0}};
  const int bits[] = {2, 3, 4, 8};
  const struct { int64_t rows, columns, group; } sizes[] = {{9, 7, 7}, {1, 50, 13}, {17, 65, 64}, {600, 20, 7}, {5, 1, 1}};
  for (int i = 0; i < 4 * 2 * 5; i++)
    check_soft_scales(bounds,
                      &(struct quantized_shape){sizes[i % 5].rows, sizes[i % 5].columns, {bits[i / 10], i / 5 % 2, sizes[i % 5].group}},
                      i % 4, i % 3 == 0, (uint64_t)i);
  bound_print(bounds, 3);
}

/* The gradient of a group's values by the formulas of method.md, where central differences do not share a maximum among its ties. */
static void closed_gradient(double *d, const struct soft_group *s, double f_hi, double f_lo) {
  double top = pow(2, s->bits) - 1, steps = s->symmetric ? pow(2, s->bits - 1) - 1 : top, dscale = 0, ties[] = {0, 0};
  double high = fmax(f_hi * s->maximum, 0), low = fmin(f_lo * s->minimum, 0), share[] = {1, 1};
  double raw = (s->symmetric ? fmax(high, -low) : high - low) / steps;
  if (s->symmetric) share[0] = high > -low ? 1 : high < -low ? 0 : 0.5, share[1] = 1 - share[0];
  for (int64_t i = 0; i < s->length; i++) {
    dscale += s->dw[i] * (s->held[i] ? (s->held[i] > 0 ? top : 0) - s->zero_point : s->residue[i]);
    ties[0] += s->w[i] == s->maximum;
    ties[1] += s->w[i] == s->minimum;
  }
  for (int64_t i = 0; i < s->length; i++) {
    d[i] = s->held[i] ? 0 : s->dw[i];
    if (raw < 1e-5 || raw > 1e4) continue;
    if (s->maximum > 0 && s->w[i] == s->maximum) d[i] += dscale * share[0] / steps * f_hi / ties[0];
    if (s->minimum < 0 && s->w[i] == s->minimum) d[i] -= dscale * share[1] / steps * f_lo / ties[1];
  }
}

/* Few different values, so that most maxima and minima are shared; some rows of one sign, of zeros, below the least scale, with both ends
 * equally far from zero and, where asked for, above the largest scale. */
static float *tied_values(struct memory *m, uint64_t *state, int64_t rows, int64_t columns, bool huge) {
  static const float set[] = {-1, -0.37f, 0.52f, 1.5f};
  float *values = host_floats(m, rows * columns);
  for (int64_t i = 0; i < rows * columns; i++) {
    float value = set[random_bits(state) % 4];
    switch (i / columns % 7) {
    case 1:
      value = fabsf(value);
      break;
    case 2:
      value = -fabsf(value);
      break;
    case 3:
      value = 0;
      break;
    case 4:
      value *= 1e-7f;
      break;
    case 5:
      value = value == -1 ? -1.5f : value;
      break;
    case 6:
      value *= huge ? 3e7f : 1;
      break;
    default:
      break;
    }
    values[i] = value;
  }
  return values;
}

static void check_tied_scales(struct bound *bounds, const struct quantized_shape *shape, uint64_t seed) {
  struct memory m = {0};
  uint64_t state = seed;
  int64_t R = shape->rows, C = shape->columns, groups = groups_of(shape), count = R * C;
  float *w = tied_values(&m, &state, R, C, false), *dw = random_floats(&m, &state, count);
  float *row = host_floats(&m, R), *column = host_floats(&m, C);
  float *f_hi = random_factors(&m, &state, groups), *f_lo = seed % 2 ? f_hi : random_factors(&m, &state, groups);
  for (int64_t r = 0; r < R; r++) row[r] = random_bits(&state) % 2 ? 0.5f : 1; /* powers of two keep equal values equal */
  for (int64_t c = 0; c < C; c++) column[c] = random_bits(&state) % 4 ? 1 : 2;
  struct weight_scales scales = {row, column};
  double *scaled = widened(&m, scaled_weight(&m, w, &scales, shape), count), *d_scaled = host_doubles(&m, count);
  double *want[] = {host_doubles(&m, R), host_doubles(&m, C)};
  struct soft_group *soft = soft_groups(&m, shape, scaled, dw);
  assert_true(soft_freeze_all(soft, shape, dw, f_hi, f_lo, false, true) * 3 < groups);
  for (int64_t g = 0; g < groups; g++) closed_gradient(d_scaled + group_begin(shape, g), &soft[g], f_hi[g], f_lo[g]);
  for (int64_t i = 0; i < count; i++) {
    want[0][i / C] += d_scaled[i] * w[i] * column[i % C];
    want[1][i % C] += d_scaled[i] * w[i] * row[i / C];
  }
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct memory d = {.k = walk.k};
    struct result r = quantize(&d, shape, w, dw, &scales, f_hi, f_lo);
    bound_check(&bounds[0], peak_error(r.drow[0], want[0], R), walk.name);
    bound_check(&bounds[1], peak_error(r.dcolumn[0], want[1], C), walk.name);
    memory_free(&d);
  }
  memory_free(&m);
}

static void gradients_of_scales_are_shared_by_ties(void **context) {
  (void)context;
  struct bound bounds[] = {{"gradient of row scales", 2e-6, 0}, {"gradient of column scales", 2e-6, 0}};
  for (int bits = 2; bits <= 8; bits += 2)
    for (int symmetric = 0; symmetric < 2; symmetric++) {
      check_tied_scales(bounds, &(struct quantized_shape){21, 40, {bits, symmetric, 40}}, (uint64_t)bits);
      check_tied_scales(bounds, &(struct quantized_shape){21, 45, {bits, symmetric, 16}}, (uint64_t)bits + 1);
    }
  bound_print(bounds, 2);
}

/* dx of every element; twice, and in dy's place. */
static void check_activations(struct bound *bound, const struct quantized_shape *shape, const float *x, const float *dy,
                              const double *want) {
  int64_t count = shape->rows * shape->columns;
  char where[100];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    snprintf(where, sizeof where, "%d bits, %s, %lld columns in groups of %lld, %s", shape->quantizer.bits,
             shape->quantizer.symmetric ? "symmetric" : "asymmetric", (long long)shape->columns, (long long)shape->quantizer.group_size,
             walk.name);
    data *dev_x = device_data(&d, x, count), *dev_dy = device_data(&d, dy, count),
         *dx[] = {poisoned_data(&d, count), poisoned_data(&d, count), dev_dy};
    for (int run = 0; run < 3; run++) {
      k->quantize_backward_input(k, dx[run], dev_dy, dev_x, shape);
      float *got = fetched_data(&d, dx[run], count);
      for (int64_t i = 0; i < count; i++) bound_check(bound, fabs(got[i] - want[i]) / fmax(1, fabs(want[i])), where);
      assert_memory_equal(got, fetched_data(&d, dx[0], count), (size_t)count * sizeof(float));
    }
    walk_record(&walk, fetched_data(&d, dx[0], count), (size_t)count * sizeof(float));
    memory_free(&d);
  }
}

static void check_soft_activations(struct bound *bound, const struct quantized_shape *shape, uint64_t seed) {
  struct memory m = {0};
  const double h = 1e-5;
  uint64_t state = seed;
  int64_t groups = groups_of(shape), count = shape->rows * shape->columns;
  float *x = random_floats(&m, &state, count), *dy = random_floats(&m, &state, count);
  double *wide = widened(&m, x, count), *want = host_doubles(&m, count);
  struct soft_group *soft = soft_groups(&m, shape, wide, dy);
  assert_true(soft_freeze_all(soft, shape, dy, NULL, NULL, false, false) * 2 <= groups);
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = group_begin(shape, g); i < group_begin(shape, g) + group_length(shape, g); i++) {
      double kept = wide[i], loss[2];
      for (int side = 0; side < 2; side++) {
        wide[i] = kept + (side ? -h : h);
        loss[side] = soft_loss_of(soft, g, g + 1, 1, NULL, NULL);
      }
      wide[i] = kept;
      want[i] = (loss[0] - loss[1]) / (2 * h);
    }
  check_activations(bound, shape, x, dy, want);
  memory_free(&m);
}

static void check_tied_activations(struct bound *bound, const struct quantized_shape *shape, uint64_t seed) {
  struct memory m = {0};
  uint64_t state = seed;
  int64_t groups = groups_of(shape), count = shape->rows * shape->columns;
  float *x = tied_values(&m, &state, shape->rows, shape->columns, true), *dy = random_floats(&m, &state, count);
  double *want = host_doubles(&m, count);
  struct soft_group *soft = soft_groups(&m, shape, widened(&m, x, count), dy);
  assert_true(soft_freeze_all(soft, shape, dy, NULL, NULL, false, true) * 3 < groups);
  for (int64_t g = 0; g < groups; g++) closed_gradient(want + group_begin(shape, g), &soft[g], 1, 1);
  check_activations(bound, shape, x, dy, want);
  memory_free(&m);
}

static void gradients_of_activations(void **context) {
  (void)context;
  struct bound bounds[] = {{"of a soft model", 2e-6, 0}, {"shared by ties", 2e-6, 0}};
  const struct { int64_t rows, columns, group; } sizes[] = {{9, 40, 40}, {1, 50, 13}, {37, 65, 64}, {7, 3, 1}};
  for (int i = 0; i < 4 * 2 * 4; i++) {
    struct quantized_shape shape = {sizes[i % 4].rows, sizes[i % 4].columns, {2 + i / 8 * 2, i / 4 % 2, sizes[i % 4].group}};
    check_soft_activations(&bounds[0], &shape, (uint64_t)i);
    check_tied_activations(&bounds[1], &shape, (uint64_t)i);
  }
  bound_print(bounds, 2);
}

/* ---- a weight under LET is the weight that scale_weight makes ---- */

static void check_scaled(struct bound *bound, const struct quantized_shape *shape, const struct weight_scales *scales, bool factors,
                         uint64_t seed) {
  struct memory m = {0};
  uint64_t state = seed;
  const struct quantizer *q = &shape->quantizer;
  int64_t C = shape->columns, count = shape->rows * C, groups = groups_of(shape);
  size_t bytes = (size_t)count * sizeof(float), group_bytes = (size_t)groups * sizeof(float);
  float *w = random_floats(&m, &state, count), *dw = random_floats(&m, &state, count), *scaled = scaled_weight(&m, w, scales, shape);
  float *f_hi = factors ? random_factors(&m, &state, groups) : NULL, *f_lo = factors ? random_factors(&m, &state, groups) : NULL;
  float *importance[] = {random_floats(&m, &state, C), host_floats(&m, C)};
  for (int64_t c = 0; c < C; c++) {
    importance[0][c] *= importance[0][c];
    importance[1][c] = scales->column ? importance[0][c] / (scales->column[c] * scales->column[c]) : importance[0][c];
  }
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct kernels *k = walk.k;
    struct memory d = {.k = k};
    struct weight_scales dev_scales = device_scales(&d, scales, shape);
    data *dev_w = device_data(&d, w, count), *made = poisoned_data(&d, count);
    k->scale_weight(k, made, dev_w, &dev_scales, shape->rows, C);
    assert_memory_equal(fetched_data(&d, made, count), scaled, bytes);
    struct result let = quantize(&d, shape, w, dw, scales, f_hi, f_lo), plain = quantize(&d, shape, scaled, dw, NULL, f_hi, f_lo);
    for (int at_rest = 0; at_rest < 2; at_rest++) {
      assert_memory_equal(let.y[at_rest], plain.y[at_rest], bytes);
      for (int64_t g = 0; g < groups; g++) {
        int64_t begin = group_begin(shape, g), length = group_length(shape, g);
        double size = gradient_size(q, scaled + begin, dw + begin, length, 1) * 1e3; /* of a scale of 1e-3, which no group is below */
        check_gradient(bound, let.df_hi[at_rest][g], plain.df_hi[at_rest][g], size, walk.name);
        check_gradient(bound, let.df_lo[at_rest][g], plain.df_lo[at_rest][g], size, walk.name);
      }
    }
    assert_memory_equal(let.codes, plain.codes, (size_t)(shape->rows * packed_row_bytes(C, q->bits)));
    assert_memory_equal(let.scale, plain.scale, (size_t)groups * sizeof(uint16_t));
    assert_memory_equal(let.zero_point, plain.zero_point, (size_t)groups);
    float *found[2][2];
    for (int i = 0; i < 2; i++) {
      float *hi = poisoned_floats(&d, groups), *lo = poisoned_floats(&d, groups);
      k->clip_search(k, hi, lo, i ? made : dev_w, i ? NULL : &dev_scales, device_floats(&d, importance[i], C), shape, 0, groups);
      found[i][0] = fetched_floats(&d, hi, groups);
      found[i][1] = fetched_floats(&d, lo, groups);
    }
    assert_memory_equal(found[0][0], found[1][0], group_bytes);
    assert_memory_equal(found[0][1], found[1][1], group_bytes);
    k->quantize_forward(k, made, made, NULL, NULL, NULL, shape, false); /* in place */
    if (!factors) assert_memory_equal(fetched_data(&d, made, count), plain.y[0], bytes);
    memory_free(&d);
  }
  memory_free(&m);
}

static void scales_on_the_fly_are_those_of_scale_weight(void **context) {
  (void)context;
  struct bound bound = {"gradient of the factors", 1e-6, 0};
  const struct { int64_t rows, columns, group; } sizes[] = {{9, 48, 16}, {1, 50, 13}, {11, 65, 65}, {5, 1, 1}};
  for (int i = 0; i < 4 * 4 * 2; i++) {
    struct memory m = {0};
    uint64_t state = (uint64_t)i;
    struct quantized_shape shape = {sizes[i % 4].rows, sizes[i % 4].columns, {2 + i % 7, i % 3 == 0, sizes[i % 4].group}};
    int which = i / 4 % 4; /* none, rows, columns, both */
    struct weight_scales scales = {which & 1 ? random_scales(&m, &state, shape.rows) : NULL,
                                   which & 2 ? random_scales(&m, &state, shape.columns) : NULL};
    check_scaled(&bound, &shape, &scales, i / 16, (uint64_t)i);
    memory_free(&m);
  }
  bound_print(&bound, 1);
}

/* ---- what is stored ---- */

static void stored_weights_are_those_at_rest(void **context) {
  (void)context;
  const int64_t columns[] = {1, 33, 96, 130}, group[] = {1, 5, 32, 200};
  for (int i = 0; i < 7 * 2 * 4 * 4; i++) {
    struct memory m = {0};
    uint64_t state = (uint64_t)i;
    int64_t C = columns[i % 4], G = group[i / 4 % 4] < C ? group[i / 4 % 4] : C;
    struct quantized_shape shape = {5, C, {2 + i / 32, i / 16 % 2, G}};
    int64_t count = 5 * C, groups = groups_of(&shape);
    float *w = random_floats(&m, &state, count), *f_hi = host_floats(&m, groups), *f_lo = host_floats(&m, groups);
    for (int64_t j = 0; j < count; j++) w[j] *= (float)pow(10, -2.0 * (double)(j / C)); /* down to 1e-8: below the least scale */
    for (int64_t g = 0; g < groups; g++) f_hi[g] = (float)random_uniform(&state), f_lo[g] = g % 5 ? (float)random_uniform(&state) : 0;
    for (struct walk walk = {0}; walk_next(&walk);) {
      struct memory d = {.k = walk.k};
      bool clipped = i % 3;
      struct result r = quantize(&d, &shape, w, w, NULL, clipped ? f_hi : NULL, clipped ? f_lo : NULL);
      struct quantized_linear stored = {.out_features = 5,
                                        .in_features = C,
                                        .bits = shape.quantizer.bits,
                                        .group_size = G,
                                        .symmetric = shape.quantizer.symmetric,
                                        .codes = r.codes,
                                        .scale = r.scale,
                                        .zero_point = r.zero_point};
      float *weights = poison(&d, count);
      dequantize_linear(&stored, weights);
      assert_memory_equal(weights, r.y[1], (size_t)count * sizeof *weights);
      memory_free(&d);
    }
    memory_free(&m);
  }
}

/* ---- search ---- */

/* The error of one group, in double, under the grid that these factors give at rest. */
static double search_error(const float *w, const float *importance, int64_t length, const struct quantizer *q, float f_hi, float f_lo) {
  float maximum = w[0], minimum = w[0];
  double error = 0;
  for (int64_t i = 0; i < length; i++) maximum = fmaxf(maximum, w[i]), minimum = fminf(minimum, w[i]);
  struct group_grid grid = quantizer_grid(q, quantizer_high(f_hi, maximum), quantizer_low(f_lo, minimum), true);
  for (int64_t i = 0; i < length; i++) {
    double d = (double)quantizer_fake(w[i], grid, quantizer_top(q)) - w[i];
    error += importance[i] * d * d;
  }
  return error;
}

static float grid_factor(int step) {
  return 1 - CLIP_SEARCH_STRIDE * (float)step;
}

static double least_error(const float *w, const float *importance, int64_t length, const struct quantizer *q) {
  double least = INFINITY;
  for (int a = 0; a < CLIP_SEARCH_STEPS; a++)
    for (int b = 0; b < CLIP_SEARCH_STEPS; b++) least = fmin(least, search_error(w, importance, length, q, grid_factor(a), grid_factor(b)));
  return least;
}

static bool on_grid(float factor) {
  for (int a = 0; a < CLIP_SEARCH_STEPS; a++)
    if (factor == grid_factor(a)) return true;
  return false;
}

/* Searches groups [first, end) alone; all others have to stay as they were. */
static void check_share(struct memory *d, const struct quantized_shape *shape, const data *w, const float *importance, int64_t first,
                        int64_t end, const float *whole_hi, const float *whole_lo) {
  int64_t groups = groups_of(shape);
  float *hi = poisoned_floats(d, groups), *lo = poisoned_floats(d, groups);
  d->k->clip_search(d->k, hi, lo, w, NULL, importance, shape, first, end);
  float *got_hi = fetched_floats(d, hi, groups), *got_lo = fetched_floats(d, lo, groups);
  for (int64_t g = 0; g < groups; g++) {
    bool mine = g >= first && g < end;
    assert_true(mine ? got_hi[g] == whole_hi[g] && got_lo[g] == whole_lo[g] : isnan(got_hi[g]) && isnan(got_lo[g]));
  }
}

static void check_search(struct bound *bound, const struct quantized_shape *shape, int *improved) {
  struct memory m = {0};
  uint64_t state = 31;
  const struct quantizer *q = &shape->quantizer;
  int64_t C = shape->columns, count = shape->rows * C, groups = groups_of(shape);
  float *w = random_floats(&m, &state, count), *importance = random_floats(&m, &state, C);
  for (int64_t i = 0; i < C; i++) importance[i] *= importance[i] * (i % 7 ? 1 : 30);
  double *least = host_doubles(&m, groups);
  for (int64_t g = 0; g < groups; g++) {
    int64_t begin = group_begin(shape, g);
    least[g] = least_error(w + begin, importance + begin % C, group_length(shape, g), q);
  }
  char where[80];
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct memory d = {.k = walk.k};
    snprintf(where, sizeof where, "%d bits, %s, %s", q->bits, q->symmetric ? "symmetric" : "asymmetric", walk.name);
    data *dev_w = device_data(&d, w, count);
    float *dev_importance = device_floats(&d, importance, C), *hi = poisoned_floats(&d, groups), *lo = poisoned_floats(&d, groups);
    walk.k->clip_search(walk.k, hi, lo, dev_w, NULL, dev_importance, shape, 0, groups);
    float *got_hi = fetched_floats(&d, hi, groups), *got_lo = fetched_floats(&d, lo, groups);
    for (int64_t g = 0; g < groups; g++) {
      int64_t begin = group_begin(shape, g), length = group_length(shape, g);
      double found = search_error(w + begin, importance + begin % C, length, q, got_hi[g], got_lo[g]);
      double plain = search_error(w + begin, importance + begin % C, length, q, 1, 1);
      assert_true(on_grid(got_hi[g]) && on_grid(got_lo[g]));
      bound_check(bound, found / least[g] - 1, where); /* a near tie may be decided by float's rounding */
      assert_true(found <= plain * (1 + 1e-5));
      *improved += found < plain * 0.999;
    }
    for (int rank = 0; rank < 3; rank++)
      check_share(&d, shape, dev_w, dev_importance, groups * rank / 3, groups * (rank + 1) / 3, got_hi, got_lo);
    memory_free(&d);
  }
  memory_free(&m);
}

static void search_finds_the_best_of_its_grid(void **context) {
  (void)context;
  struct bound bound = {"least error of the search over brute force's, less 1", 1e-5, 0};
  int improved = 0;
  check_search(&bound, &(struct quantized_shape){5, 96, {2, false, 32}}, &improved);
  check_search(&bound, &(struct quantized_shape){5, 90, {3, false, 40}}, &improved);
  check_search(&bound, &(struct quantized_shape){7, 65, {4, false, 65}}, &improved);
  check_search(&bound, &(struct quantized_shape){5, 96, {3, true, 32}}, &improved);
  check_search(&bound, &(struct quantized_shape){3, 17, {8, false, 5}}, &improved);
  assert_true(improved > 100);
  bound_print(&bound, 1);
}

/* Columns that nothing was seen of leave the group as it is, and so does what is not a number. */
static void search_without_importance_changes_nothing(void **context) {
  (void)context;
  struct memory m = {0};
  uint64_t state = 32;
  struct quantized_shape shape = {3, 40, {3, false, 20}};
  float *w = random_floats(&m, &state, 120), *importance = host_floats(&m, 40);
  for (int64_t i = 20; i < 40; i++) importance[i] = NAN;
  for (struct walk walk = {0}; walk_next(&walk);) {
    struct memory d = {.k = walk.k};
    float *hi = poisoned_floats(&d, 6), *lo = poisoned_floats(&d, 6);
    walk.k->clip_search(walk.k, hi, lo, device_data(&d, w, 120), NULL, device_floats(&d, importance, 40), &shape, 0, 6);
    for (int g = 0; g < 6; g++) assert_true(fetched_floats(&d, hi, 6)[g] == 1 && fetched_floats(&d, lo, 6)[g] == 1);
    memory_free(&d);
  }
  memory_free(&m);
}

static void check_quotient(float w, struct group_grid grid) {
  float got = quantizer_quotient(w, grid), want = w / grid.scale;
  if (got != want) fail_msg("%a / %a is %a, not %a", w, grid.scale, want, got);
}

/* What a GPU computes in place of a division: of values of 8 and of 24 bits, and of those at the ends. */
static void quotients_are_those_of_a_division(void **state) {
  (void)state;
  const float ends[] = {0, INFINITY, -INFINITY, 0x1p-126f, FLT_MAX};
  uint32_t random = 1;
  for (int i = 0; i < 100000; i++) {
    random = random * 1664525u + 1013904223u;
    struct group_grid grid = {.scale = float_from_bits(0x3c000000u | random >> 9)};
    grid.inverse = 1 / grid.scale;
    check_quotient(bf16_to_float((uint16_t)(0x3f80 + i % 128)), grid);
    check_quotient(float_from_bits(0x3f800000u | (random * 2654435769u) >> 9), grid);
    for (size_t n = 0; i % 1000 == 0 && n < sizeof ends / sizeof *ends; n++) check_quotient(ends[n], grid);
  }
  assert_true(isnan(quantizer_quotient(NAN, (struct group_grid){1, 1, 0})));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(quotients_are_those_of_a_division),
      cmocka_unit_test(fixtures_are_met),
      cmocka_unit_test(reference_vectors_are_met),
      cmocka_unit_test(gradients_are_those_of_a_soft_model),
      cmocka_unit_test(gradients_of_scales_are_those_of_a_soft_model),
      cmocka_unit_test(gradients_of_scales_are_shared_by_ties),
      cmocka_unit_test(gradients_of_activations),
      cmocka_unit_test(scales_on_the_fly_are_those_of_scale_weight),
      cmocka_unit_test(stored_weights_are_those_at_rest),
      cmocka_unit_test(search_finds_the_best_of_its_grid),
      cmocka_unit_test(search_without_importance_changes_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
