/* transform.cu: LET (method.md section 3) over weights that stay unquantized and over vectors: channel scales of heads, folded norms and
 * biases. Under the quantizer the scales are applied on the fly (quantize.cu). */
#include "cuda/device.h"

DEVICE int64_t map_entry(const struct channel_map &map, int64_t channel) {
  return channel / map.head_size / map.share * map.period + channel % map.head_size % map.period;
}

struct expand_each {
  float *to;
  const float *s;
  struct channel_map map;
  bool inverse;
  template <int N> DEVICE void at(int64_t i) const {
    for (int n = 0; n < N; n++) to[i + n] = inverse ? 1 / s[map_entry(map, i + n)] : s[map_entry(map, i + n)];
  }
};

/* Each entry sums its own channels, in their order. */
struct expand_backward_each {
  float *ds;
  const float *dto, *s;
  struct channel_map map;
  int64_t heads;
  bool inverse;
  float sign;
  template <int N> DEVICE void at(int64_t entry) const {
    int64_t first = entry / map.period * map.share, end = first + map.share < heads ? first + map.share : heads;
    float sum = 0;
    for (int64_t head = first; head < end; head++)
      for (int64_t c = entry % map.period; c < map.head_size; c += map.period) sum += dto[head * map.head_size + c];
    ds[entry] += sign * (inverse ? -sum / (s[entry] * s[entry]) : sum);
  }
};

static void expand(struct kernels *k, float *to, const float *s, const struct channel_map *map, int64_t count, bool inverse) {
  each(k, expand_each{to, s, *map, inverse}, count, false);
}

static void expand_backward(struct kernels *k, float *ds, const float *dto, const float *s, const struct channel_map *map, int64_t count,
                            bool inverse, float sign) {
  int64_t heads = count / map->head_size, entries = ceil_div(heads, map->share) * map->period;
  each(k, expand_backward_each{ds, dto, s, *map, heads, inverse, sign}, entries, false);
}

/* ---- weights: (w * row) * column in this order everywhere ---- */

struct scale_each {
  bf16 *to;
  const bf16 *w;
  const float *row, *column; /* NULL: 1 */
  int64_t columns;
  template <int N> DEVICE void at(int64_t i) const {
    float v[N];
    load<N>(v, w + i);
    for (int n = 0; n < N; n++) v[n] = v[n] * (row ? row[i / columns] : 1) * (column ? column[i % columns + n] : 1);
    store<N>(to + i, v);
  }
};

static void scale_weight(struct kernels *k, data *to, const data *w, const struct weight_scales *scales, int64_t rows, int64_t columns) {
  timed timer(k, "scale_weight", 4.0 * (double)(rows * columns));
  each(k, scale_each{elements(to), elements(w), scales ? scales->row : NULL, scales ? scales->column : NULL, columns}, rows * columns,
       columns % 8 == 0 && aligned(to, w));
}

/* drow[r] = sum over columns of d * w * column. */
__global__ void scale_rows_kernel(float *drow, const bf16 *d, const bf16 *w, const float *column, int64_t columns) {
  int64_t r = blockIdx.x;
  float sum = 0;
  for (int64_t c = threadIdx.x; c < columns; c += BLOCK_THREADS)
    sum += to_float(d[r * columns + c]) * to_float(w[r * columns + c]) * (column ? column[c] : 1);
  sum = team_sum<BLOCK_THREADS>(sum);
  if (threadIdx.x == 0) drow[r] = sum;
}

struct scaled_column_slope {
  const bf16 *d, *w;
  const float *row;
  int64_t columns;
  template <int N> DEVICE void add(float (&sum)[N], int64_t r, int64_t c) const {
    float slope[N], plain[N];
    load<N>(slope, d + r * columns + c);
    load<N>(plain, w + r * columns + c);
    for (int n = 0; n < N; n++) sum[n] += slope[n] * plain[n] * (row ? row[r] : 1);
  }
};

static void scale_weight_backward(struct kernels *k, float *drow, float *dcolumn, const data *dto, const data *w,
                                  const struct weight_scales *scales, int64_t rows, int64_t columns) {
  timed timer(k, "scale_weight_backward", 4.0 * (double)(rows * columns));
  const float *row = scales ? scales->row : NULL, *column = scales ? scales->column : NULL;
  if (drow) launch(k, grid_of(rows), BLOCK_THREADS, 0, scale_rows_kernel, drow, elements(dto), elements(w), column, columns);
  float *partial = dcolumn ? (float *)cuda_scratch(k, column_room(columns)) : NULL;
  bool vectors = columns % 8 == 0 && aligned(dto, w);
  if (partial)
    column_sum(k, dcolumn, scaled_column_slope{elements(dto), elements(w), row, columns}, rows, columns, vectors, false, partial);
}

/* ---- vectors ---- */

struct fold {
  const bf16 *from;
  const float *plus, *shift, *scale;
  DEVICE float bracket(int64_t i) const {
    return to_float(from[i]) + (plus ? plus[i] : 0) - (shift ? shift[i] : 0);
  }
};

struct fold_each {
  bf16 *to;
  struct fold fold;
  template <int N> DEVICE void at(int64_t i) const {
    to[i] = to_bf16(fold.bracket(i) * (fold.scale ? fold.scale[i] : 1));
  }
};

struct fold_backward_each {
  float *dinner, *dscale;
  const float *dto;
  struct fold fold;
  template <int N> DEVICE void at(int64_t i) const {
    float d = dto[i];
    dinner[i] = d * (fold.scale ? fold.scale[i] : 1);
    if (dscale) dscale[i] += d * fold.bracket(i);
  }
};

static void fold_vector(struct kernels *k, data *to, const data *from, const float *plus, const float *shift, const float *scale,
                        int64_t count) {
  each(k, fold_each{elements(to), {elements(from), plus, shift, scale}}, count, false);
}

static void fold_vector_backward(struct kernels *k, float *dinner, float *dscale, const float *dto, const data *from, const float *plus,
                                 const float *shift, const float *scale, int64_t count) {
  each(k, fold_backward_each{dinner, dscale, dto, {elements(from), plus, shift, scale}}, count, false);
}
