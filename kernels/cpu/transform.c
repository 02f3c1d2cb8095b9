/* transform.c: LET (method.md section 3) over weights that stay unquantized and over vectors: channel scales of heads, folded norms and
 * biases. Under the quantizer the scales are applied on the fly (quantize.c). */
#include "cpu/backend.h"
#include "cpu/chunks.h"
#include "cpu/scales.h"

static inline int64_t map_entry(const struct channel_map *map, int64_t channel) {
  return channel / map->head_size / map->share * map->period + channel % map->head_size % map->period;
}

static void expand(struct kernels *k, float *to, const float *s, const struct channel_map *map, int64_t count, bool inverse) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < count; c++) to[c] = inverse ? 1 / s[map_entry(map, c)] : s[map_entry(map, c)];
}

/* Each entry sums its own channels, in their order. */
static void expand_backward(struct kernels *k, float *ds, const float *dto, const float *s, const struct channel_map *map, int64_t count,
                            bool inverse, float sign) {
  (void)k;
  int64_t heads = count / map->head_size, entries = (heads + map->share - 1) / map->share * map->period;
#pragma omp parallel for schedule(static)
  for (int64_t entry = 0; entry < entries; entry++) {
    int64_t first = entry / map->period * map->share, end = first + map->share < heads ? first + map->share : heads;
    float sum = 0;
    for (int64_t head = first; head < end; head++)
      for (int64_t c = entry % map->period; c < map->head_size; c += map->period) sum += dto[head * map->head_size + c];
    ds[entry] += sign * (inverse ? -sum / (s[entry] * s[entry]) : sum);
  }
}

static void scale_weight(struct kernels *k, data *to, const data *w, const struct weight_scales *scales, int64_t rows, int64_t columns) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++)
    scale_values((float *)to + r * columns, (const float *)w + r * columns, row_scale(scales, r), column_scales(scales, 0), columns);
}

static void scale_weight_backward(struct kernels *k, float *drow, float *dcolumn, const data *dto, const data *w,
                                  const struct weight_scales *scales, int64_t rows, int64_t columns) {
  int64_t chunks = row_chunks(rows);
  float *partial = dcolumn ? cpu_scratch(k, chunks * columns + 1) : NULL;
  if (dcolumn && !partial) return;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    float *sum = dcolumn ? partial + chunk * columns : NULL;
    if (sum) memset(sum, 0, (size_t)columns * sizeof *sum);
    for (int64_t r = chunk_begin(rows, chunks, chunk); r < chunk_begin(rows, chunks, chunk + 1); r++) {
      float slope = scale_values_backward(sum, (const float *)dto + r * columns, (const float *)w + r * columns, row_scale(scales, r),
                                          column_scales(scales, 0), columns);
      if (drow) drow[r] = slope;
    }
  }
  if (dcolumn) sum_chunks(dcolumn, partial, chunks, columns, columns, false);
}

static inline float fold_bracket(const float *from, const float *plus, const float *shift, int64_t i) {
  return from[i] + (plus ? plus[i] : 0) - (shift ? shift[i] : 0);
}

static void fold_vector(struct kernels *k, data *to, const data *from, const float *plus, const float *shift, const float *scale,
                        int64_t count) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i++) ((float *)to)[i] = fold_bracket((const float *)from, plus, shift, i) * (scale ? scale[i] : 1);
}

static void fold_vector_backward(struct kernels *k, float *dinner, float *dscale, const float *dto, const data *from, const float *plus,
                                 const float *shift, const float *scale, int64_t count) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float d = dto[i];
    dinner[i] = d * (scale ? scale[i] : 1);
    if (dscale) dscale[i] += d * fold_bracket((const float *)from, plus, shift, i);
  }
}
