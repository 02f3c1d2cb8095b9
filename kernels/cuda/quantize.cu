/* quantize.cu: the quantizer over a matrix: fake-quantized weights and activations, the gradients of the clipping factors, of LET's scales and
 * of the values themselves, and what is stored. A team of threads takes a group. */
#include "cuda/device.h"

/* What is quantized, and how. */
struct quantized {
  const bf16 *w;
  const float *row, *column; /* scales; NULL: 1 */
  const float *f_hi, *f_lo;  /* NULL: 1 */
  int64_t rows, columns;
  int64_t missing; /* that the last group of a row is short of */
  uint32_t groups, per_row;
  struct quantizer quantizer;
  bool at_rest;
};

static struct quantized quantized_of(const data *w, const struct weight_scales *scales, const float *f_hi, const float *f_lo,
                                     const struct quantized_shape *shape, bool at_rest) {
  return {elements(w),
          scales ? scales->row : NULL,
          scales ? scales->column : NULL,
          f_hi,
          f_lo,
          shape->rows,
          shape->columns,
          groups_per_row(shape) * shape->quantizer.group_size - shape->columns,
          (uint32_t)groups_of(shape),
          (uint32_t)groups_per_row(shape),
          shape->quantizer,
          at_rest};
}

/* One group of it. */
struct group {
  uint32_t index;
  int64_t offset; /* in the matrix */
  int64_t length; /* 0: a team beyond the last group, which only takes part in reductions */
  float maximum, minimum;
  float f_hi, f_lo;
};

/* Where a group lies. Its row takes a division, which no one needs where all groups are full and nothing is scaled. */
DEVICE struct group place_group(const struct quantized &q, uint32_t index) {
  struct group group = {index, (int64_t)index * q.quantizer.group_size, q.quantizer.group_size, -INFINITY, INFINITY, 1, 1};
  if (index >= q.groups) {
    group.offset = group.length = 0;
  } else if (q.missing) {
    uint32_t row = index / q.per_row;
    group.offset -= row * q.missing;
    if (index == (row + 1) * q.per_row - 1) group.length -= q.missing;
  }
  return group;
}

/* The scales of a group's row, and of its columns from the first on. */
struct group_scales {
  float row;           /* 1 without */
  const float *column; /* NULL without */
};

DEVICE struct group_scales scales_of(const struct quantized &q, const struct group &group) {
  int64_t row = group.index / q.per_row;
  return {q.row ? q.row[row] : 1, q.column ? q.column + group.offset - row * q.columns : NULL};
}

/* What a thread of a team takes of a group: N elements at a time, one vector or, of more than eight, vectors that lie apart with those of the team's other
 * threads between them. Behind the group's end they are 0, which changes neither its range nor any sum. With ONCE the N elements are all that it
 * takes, and stay in registers; else they are read again in every pass, from the first level's cache. */
template <int N, int TEAM, bool ONCE> struct walker {
  enum { WIDTH = N < 8 ? N : 8, VECTORS = N / WIDTH, APART = TEAM * WIDTH };
  float w[N];
  struct packed<WIDTH> beside[VECTORS]; /* what lies at the same place in another matrix */

  static DEVICE int64_t first() {
    return team_lane<TEAM>() * WIDTH;
  }
  static DEVICE int64_t next(int64_t i, const struct group &group) {
    return ONCE ? group.length : i + TEAM * N;
  }

  /* From the group's element i on. */
  static DEVICE void load_apart(struct packed<WIDTH> (&to)[VECTORS], const bf16 *from, const struct group &group, int64_t i) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      to[v] = {};
      if (i + v * APART < group.length) to[v] = *(const struct packed<WIDTH> *)(from + group.offset + i + v * APART);
    }
  }
  static DEVICE void unpack_apart(float (&to)[N], const struct packed<WIDTH> (&from)[VECTORS]) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) unpack((float(&)[WIDTH])to[WIDTH * v], from[v]);
  }
  static DEVICE void store_apart(bf16 *to, const float (&from)[N], const struct group &group, int64_t i) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
      if (i + v * APART < group.length) store<WIDTH>(to + group.offset + i + v * APART, (const float(&)[WIDTH])from[WIDTH * v]);
  }

  /* A vector of the columns' scales, from the group's element i on; 1 without. */
  static DEVICE void load_columns(float (&to)[WIDTH], const struct group_scales &scales, const struct group &group, int64_t i) {
#pragma unroll
    for (int n = 0; n < WIDTH; n++) to[n] = 1;
    if (scales.column && i < group.length) load<WIDTH>(to, scales.column + i);
  }

  /* The values from i on, scaled: (w * row) * column; and what is beside them, where a matrix is named. All loads come first, to be under way
   * together. */
  DEVICE void read(const struct quantized &q, const struct group &group, int64_t i, const bf16 *other) {
    struct packed<WIDTH> plain[VECTORS];
    load_apart(plain, q.w, group, i);
    if (other) load_apart(beside, other, group, i);
    unpack_apart(w, plain);
    if (q.row || q.column) {
      struct group_scales scales = scales_of(q, group);
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        float column[WIDTH];
        load_columns(column, scales, group, i + v * APART);
#pragma unroll
        for (int n = 0; n < WIDTH; n++) w[v * WIDTH + n] = w[v * WIDTH + n] * scales.row * column[n];
      }
    }
  }
  DEVICE void read_again(const struct quantized &q, const struct group &group, int64_t i, const bf16 *other) {
    if (!ONCE) read(q, group, i, other);
  }
};

template <int N, int TEAM, bool ONCE>
DEVICE struct group find_group(const struct quantized &q, uint32_t index, struct walker<N, TEAM, ONCE> &walk, const bf16 *beside) {
  struct group group = place_group(q, index);
  if (q.f_hi && index < q.groups) group.f_hi = q.f_hi[index];
  if (q.f_lo && index < q.groups) group.f_lo = q.f_lo[index];
  for (int64_t i = walk.first(); i < group.length; i = walk.next(i, group)) {
    walk.read(q, group, i, ONCE ? beside : NULL);
#pragma unroll
    for (int n = 0; n < N; n++) {
      group.maximum = quantizer_max(walk.w[n], group.maximum);
      group.minimum = quantizer_min(walk.w[n], group.minimum);
    }
  }
  group.maximum = team_largest<TEAM>(group.maximum);
  group.minimum = team_least<TEAM>(group.minimum);
  return group;
}

DEVICE struct group_grid grid_of_group(const struct quantized &q, const struct group &group) {
  return quantizer_grid(&q.quantizer, quantizer_high(group.f_hi, group.maximum), quantizer_low(group.f_lo, group.minimum), q.at_rest);
}

template <int N, int TEAM, bool ONCE>
__global__ void __launch_bounds__(BLOCK_THREADS, ONCE ? 6 : 5) quantize_forward_kernel(bf16 *w_hat, struct quantized q) {
  struct walker<N, TEAM, ONCE> walk;
  struct group group = find_group(q, (uint32_t)team_index<TEAM>(), walk, NULL);
  struct group_grid grid = grid_of_group(q, group);
  float top = quantizer_top(&q.quantizer);
  for (int64_t i = walk.first(); i < group.length; i = walk.next(i, group)) {
    float fake[N];
    walk.read_again(q, group, i, NULL);
#pragma unroll
    for (int n = 0; n < N; n++) fake[n] = quantizer_fake(walk.w[n], grid, top);
    walk.store_apart(w_hat, fake, group, i);
  }
}

/* ---- backward ---- */

/* Of one group, for the sums by columns: how its values were quantized, and what is added to those at its ends. */
struct group_record {
  struct group_grid grid;
  float maximum, minimum, at_maximum, at_minimum;
};

/* Where the gradients of a group go; NULL: not wanted. */
struct group_slopes {
  float *df_hi, *df_lo;
  bf16 *dx;                    /* of the values themselves; may be dw_hat */
  float *drow;                 /* [groups] each group's part of its row's scale's */
  struct group_record *record; /* [groups] */
};

DEVICE float value_slope(float d, float w, const struct group_record &record, float top) {
  float slope = quantizer_inside(w, record.grid, top) ? d : 0;
  if (w == record.maximum) slope += record.at_maximum;
  if (w == record.minimum) slope += record.at_minimum;
  return slope;
}

template <int N, int TEAM, bool ONCE>
__global__ void __launch_bounds__(BLOCK_THREADS, ONCE ? 4 : 3)
    quantize_backward_kernel(struct group_slopes to, const bf16 *dw_hat, struct quantized q) {
  struct walker<N, TEAM, ONCE> walk;
  uint32_t index = (uint32_t)team_index<TEAM>();
  struct group group = find_group(q, index, walk, dw_hat);
  struct group_grid grid = grid_of_group(q, group);
  float top = quantizer_top(&q.quantizer), dscale = 0, d[N];
  int maxima = 0, minima = 0;
  bool values = to.dx || to.drow || to.record, leader = team_lane<TEAM>() == 0 && index < q.groups;
  for (int64_t i = walk.first(); i < group.length; i = walk.next(i, group)) {
    walk.read_again(q, group, i, dw_hat);
    walk.unpack_apart(d, walk.beside);
#pragma unroll
    for (int n = 0; n < N; n++) dscale += d[n] * quantizer_scale_slope(walk.w[n], grid, top);
    if (!values) continue;
#pragma unroll
    for (int n = 0; n < N; n++) {
      maxima += walk.w[n] == group.maximum;
      minima += walk.w[n] == group.minimum;
    }
  }
  dscale = team_sum<TEAM>(dscale);
  if (to.df_hi && leader) {
    struct end_slopes slopes = quantizer_factor_slopes(&q.quantizer, group.f_hi, group.f_lo, group.maximum, group.minimum);
    to.df_hi[index] = dscale * slopes.high;
    to.df_lo[index] = dscale * slopes.low;
  }
  if (!values) return;
  maxima = team_sum<TEAM>(maxima);
  minima = team_sum<TEAM>(minima);
  struct end_slopes slopes = quantizer_extreme_slopes(&q.quantizer, group.f_hi, group.f_lo, group.maximum, group.minimum);
  struct group_record record = {grid, group.maximum, group.minimum, dscale * slopes.high / (float)maxima,
                                dscale * slopes.low / (float)minima};
  if (to.record && leader) to.record[index] = record;
  float drow = 0;
  for (int64_t i = walk.first(); i < group.length && (to.dx || to.drow); i = walk.next(i, group)) {
    walk.read_again(q, group, i, dw_hat);
    walk.unpack_apart(d, walk.beside);
#pragma unroll
    for (int n = 0; n < N; n++) d[n] = value_slope(d[n], walk.w[n], record, top);
    if (to.dx) walk.store_apart(to.dx, d, group, i);
    if (!to.drow) continue;
    float plain[N];
    struct packed<walk.WIDTH> raw[walk.VECTORS];
    struct group_scales scales = scales_of(q, group);
    walk.load_apart(raw, q.w, group, i);
    walk.unpack_apart(plain, raw);
#pragma unroll
    for (int v = 0; v < walk.VECTORS; v++) {
      float column[walk.WIDTH];
      walk.load_columns(column, scales, group, i + v * walk.APART);
#pragma unroll
      for (int n = 0; n < walk.WIDTH; n++) drow += d[v * walk.WIDTH + n] * plain[v * walk.WIDTH + n] * column[n];
    }
  }
  if (!to.drow) return;
  drow = team_sum<TEAM>(drow);
  if (leader) to.drow[index] = drow;
}

/* Runs the kernel with as many threads a group as suit it. Vectors of eight need groups that begin and end at multiples of eight. */
#define LAUNCH_GROUPS(kernel, k, q, vectors, ...)                                                                                          \
  do {                                                                                                                                     \
    enum { WARP_MOST = 1024, HELD_MOST = 16 * BLOCK_THREADS }; /* over WARP_MOST the whole block takes a group */                          \
    int64_t size = (q).quantizer.group_size < (q).columns ? (q).quantizer.group_size : (q).columns, n = (q).groups;                        \
    if ((vectors) && size <= 16)                                                                                                           \
      launch(k, team_grid<2>(n), BLOCK_THREADS, 0, kernel<8, 2, true>, __VA_ARGS__);                                                       \
    else if ((vectors) && size <= 32)                                                                                                      \
      launch(k, team_grid<2>(n), BLOCK_THREADS, 0, kernel<16, 2, true>, __VA_ARGS__);                                                      \
    else if ((vectors) && size <= 64)                                                                                                      \
      launch(k, team_grid<4>(n), BLOCK_THREADS, 0, kernel<16, 4, true>, __VA_ARGS__);                                                      \
    else if ((vectors) && size <= 128)                                                                                                     \
      launch(k, team_grid<8>(n), BLOCK_THREADS, 0, kernel<16, 8, true>, __VA_ARGS__);                                                      \
    else if ((vectors) && size <= 256)                                                                                                     \
      launch(k, team_grid<16>(n), BLOCK_THREADS, 0, kernel<16, 16, true>, __VA_ARGS__);                                                    \
    else if ((vectors) && size <= 512)                                                                                                     \
      launch(k, team_grid<WARP>(n), BLOCK_THREADS, 0, kernel<16, WARP, true>, __VA_ARGS__);                                                \
    else if ((vectors) && size <= WARP_MOST)                                                                                               \
      launch(k, team_grid<WARP>(n), BLOCK_THREADS, 0, kernel<16, WARP, false>, __VA_ARGS__);                                               \
    else if ((vectors) && size <= HELD_MOST)                                                                                               \
      launch(k, team_grid<BLOCK_THREADS>(n), BLOCK_THREADS, 0, kernel<16, BLOCK_THREADS, true>, __VA_ARGS__);                              \
    else if (vectors)                                                                                                                      \
      launch(k, team_grid<BLOCK_THREADS>(n), BLOCK_THREADS, 0, kernel<16, BLOCK_THREADS, false>, __VA_ARGS__);                             \
    else if (size <= WARP_MOST)                                                                                                            \
      launch(k, team_grid<WARP>(n), BLOCK_THREADS, 0, kernel<1, WARP, false>, __VA_ARGS__);                                                \
    else                                                                                                                                   \
      launch(k, team_grid<BLOCK_THREADS>(n), BLOCK_THREADS, 0, kernel<1, BLOCK_THREADS, false>, __VA_ARGS__);                              \
  } while (0)

static bool in_eights(const struct quantized &q) {
  return q.columns % 8 == 0 && (q.quantizer.group_size % 8 == 0 || q.quantizer.group_size >= q.columns) && aligned(q.column);
}

static void quantize_forward(struct kernels *k, data *w_hat, const data *w, const struct weight_scales *scales, const float *f_hi,
                             const float *f_lo, const struct quantized_shape *shape, bool at_rest) {
  timed timer(k, "quantize_forward", 4.0 * (double)(shape->rows * shape->columns));
  struct quantized q = quantized_of(w, scales, f_hi, f_lo, shape, at_rest);
  LAUNCH_GROUPS(quantize_forward_kernel, k, q, in_eights(q) && aligned(w_hat, w), elements(w_hat), q);
}

/* drow[r] = the sum of its groups' parts, in their order. */
struct row_total_each {
  float *drow;
  const float *part;
  int64_t per_row;
  template <int N> DEVICE void at(int64_t r) const {
    float sum = 0;
    for (int64_t g = r * per_row; g < (r + 1) * per_row; g++) sum += part[g];
    drow[r] = sum;
  }
};

/* What scaled weights, of one group, give to the gradients of their columns' scales. */
struct column_scale_slope {
  const bf16 *dw_hat;
  struct quantized q;
  const struct group_record *record;
  float top;
  template <int N> DEVICE void add(float (&sum)[N], int64_t r, int64_t c) const {
    float d[N], plain[N], column[N], row = q.row ? q.row[r] : 1;
    load<N>(d, dw_hat + r * q.columns + c);
    load<N>(plain, q.w + r * q.columns + c);
    if (q.column) load<N>(column, q.column + c);
    const struct group_record group = record[(uint32_t)r * q.per_row + (uint32_t)c / (uint32_t)q.quantizer.group_size];
    for (int n = 0; n < N; n++) {
      plain[n] *= row;
      sum[n] += value_slope(d[n], plain[n] * (q.column ? column[n] : 1), group, top) * plain[n];
    }
  }
};

static void quantize_backward(struct kernels *k, float *df_hi, float *df_lo, float *drow, float *dcolumn, const data *dw_hat, const data *w,
                              const struct weight_scales *scales, const float *f_hi, const float *f_lo, const struct quantized_shape *shape,
                              bool at_rest) {
  timed timer(k, "quantize_backward", (dcolumn ? 8.0 : 4.0) * (double)(shape->rows * shape->columns));
  struct quantized q = quantized_of(w, scales, f_hi, f_lo, shape, at_rest);
  bool scaled = drow || dcolumn;
  int64_t room = column_room(q.columns), records = (int64_t)q.groups * (int64_t)sizeof(struct group_record);
  char *scratch = scaled ? cuda_scratch(k, room + records + (int64_t)q.groups * (int64_t)sizeof(float)) : NULL;
  if (scaled && !scratch) return;
  struct group_record *record = dcolumn ? (struct group_record *)(scratch + room) : NULL;
  float *part = drow ? (float *)(scratch + room + records) : NULL;
  bool vectors = in_eights(q) && aligned(dw_hat, w);
  if (df_hi || scaled)
    LAUNCH_GROUPS(quantize_backward_kernel, k, q, vectors, group_slopes{df_hi, df_lo, NULL, part, record}, elements(dw_hat), q);
  if (drow) each(k, row_total_each{drow, part, q.per_row}, q.rows, false);
  if (dcolumn)
    column_sum(k, dcolumn, column_scale_slope{elements(dw_hat), q, record, quantizer_top(&q.quantizer)}, q.rows, q.columns, vectors, false,
               (float *)scratch);
}

static void quantize_backward_input(struct kernels *k, data *dx, const data *dy, const data *x, const struct quantized_shape *shape) {
  timed timer(k, "quantize_backward_input", 6.0 * (double)(shape->rows * shape->columns));
  struct quantized q = quantized_of(x, NULL, NULL, NULL, shape, false);
  LAUNCH_GROUPS(quantize_backward_kernel, k, q, in_eights(q) && aligned(dx, dy, x), group_slopes{NULL, NULL, elements(dx), NULL, NULL},
                elements(dy), q);
}

/* ---- what is stored ---- */

template <int N, int TEAM, bool ONCE>
__global__ void quantize_grid_kernel(uint16_t *scale, uint8_t *zero_point, struct group_grid *grids, struct quantized q) {
  struct walker<N, TEAM, ONCE> walk;
  uint32_t index = (uint32_t)team_index<TEAM>();
  struct group group = find_group(q, index, walk, NULL);
  struct group_grid grid = grid_of_group(q, group);
  if (index >= q.groups || team_lane<TEAM>() != 0) return;
  grids[index] = grid;
  scale[index] = half_from_float(grid.scale);
  zero_point[index] = (uint8_t)grid.zero_point;
}

/* Elements count bytes of codes: each gathers the codes that have a bit in it. */
struct pack_each {
  uint8_t *codes;
  const struct group_grid *grids;
  struct quantized q;
  int64_t row_bytes;
  float top;
  template <int N> DEVICE void at(int64_t i) const {
    int bits = q.quantizer.bits;
    int64_t row = i / row_bytes, first = i % row_bytes * 8;
    uint32_t byte = 0;
    for (int64_t c = first / bits; c < q.columns && c * bits < first + 8; c++) {
      int64_t g = row * q.per_row + c / q.quantizer.group_size, shift = c * bits - first;
      float w = to_float(q.w[row * q.columns + c]) * (q.row ? q.row[row] : 1) * (q.column ? q.column[c] : 1);
      uint32_t code = (uint32_t)quantizer_code(w, grids[g], top);
      byte |= shift < 0 ? code >> -shift : code << shift;
    }
    codes[i] = (uint8_t)byte;
  }
};

static void quantize_codes(struct kernels *k, uint8_t *codes, uint16_t *scale, uint8_t *zero_point, const data *w,
                           const struct weight_scales *scales, const float *f_hi, const float *f_lo, const struct quantized_shape *shape) {
  struct quantized q = quantized_of(w, scales, f_hi, f_lo, shape, true);
  int64_t row_bytes = (q.columns * q.quantizer.bits + 7) / 8;
  struct group_grid *grids = (struct group_grid *)cuda_scratch(k, (int64_t)q.groups * (int64_t)sizeof(struct group_grid) + 16);
  if (!grids) return;
  LAUNCH_GROUPS(quantize_grid_kernel, k, q, in_eights(q) && aligned(w), scale, zero_point, grids, q);
  each(k, pack_each{codes, grids, q, row_bytes, quantizer_top(&q.quantizer)}, q.rows * row_bytes, false);
}
