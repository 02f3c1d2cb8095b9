/* attention.c: causal softmax attention in tiles of query rows. A tile's scores are full rows, so softmax needs no running maximum; the
 * backward computes them again from logsum instead of keeping T x T values. Keys that no query of the tile sees are left out. */
#include "cpu/backend.h"

#include <math.h>
#include <omp.h>

#include "cpu/vector.h"

enum { QUERY_TILE = 64 };

/* One head's tile of query rows [row, row + rows) against keys [key, key + keys). */
struct tile {
  int head, kv_head;
  int64_t row, rows, key, keys;
};

static int64_t tiles_per_head(const struct attention_shape *shape) {
  return (shape->tokens + QUERY_TILE - 1) / QUERY_TILE;
}

static int64_t first_visible(const struct attention_shape *shape, int64_t row) {
  return shape->window && row >= shape->window ? row - shape->window + 1 : 0;
}

static struct tile tile_at(const struct attention_shape *shape, int head, int64_t index) {
  struct tile tile = {.head = head, .kv_head = head / (shape->heads / shape->kv_heads), .row = index * QUERY_TILE};
  tile.rows = tile.row + QUERY_TILE < shape->tokens ? QUERY_TILE : shape->tokens - tile.row;
  tile.key = first_visible(shape, tile.row);
  tile.keys = tile.row + tile.rows - tile.key;
  return tile;
}

/* scores[rows, keys] = scale * q k^T. */
static void tile_scores(struct kernels *k, float *scores, const float *q, const float *key, const struct tile *tile,
                        const struct attention_shape *shape) {
  int64_t D = shape->head_size, ldq = shape->heads * D, ldk = shape->kv_heads * D;
  matmul(k, (struct product){'N', 'T', tile->rows, tile->keys, D, ldq, ldk, tile->keys, 1.0f / sqrtf((float)D), 0,
                             q + tile->row * ldq + tile->head * D, key + tile->key * ldk + tile->kv_head * D, scores});
}

/* Columns of a tile row that its query sees: [*begin, *end). */
static void visible_columns(const struct attention_shape *shape, const struct tile *tile, int64_t r, int64_t *begin, int64_t *end) {
  int64_t first = first_visible(shape, tile->row + r);
  *begin = first > tile->key ? first - tile->key : 0;
  *end = tile->row + r + 1 - tile->key;
}

/* Softmax of each row over what it sees, zero elsewhere; logsum may be NULL. */
static void tile_softmax(float *scores, float *logsum, const struct tile *tile, const struct attention_shape *shape) {
  for (int64_t r = 0; r < tile->rows; r++) {
    float *row = scores + r * tile->keys, maximum = -INFINITY, sum = 0;
    int64_t begin, end;
    visible_columns(shape, tile, r, &begin, &end);
#pragma omp simd reduction(max : maximum)
    for (int64_t c = begin; c < end; c++) maximum = row[c] > maximum ? row[c] : maximum;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = begin; c < end; c++) {
      row[c] = vector_exp(row[c] - maximum);
      sum += row[c];
    }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t c = begin; c < end; c++) row[c] *= inverse;
    for (int64_t c = 0; c < begin; c++) row[c] = 0;
    for (int64_t c = end; c < tile->keys; c++) row[c] = 0;
    if (logsum) logsum[tile->head * (int64_t)shape->tokens + tile->row + r] = maximum + logf(sum);
  }
}

static void attention_forward(struct kernels *k, data *out, float *logsum, const data *q, const data *key, const data *v,
                              const struct attention_shape *shape) {
  int64_t D = shape->head_size, ldq = shape->heads * D, ldk = shape->kv_heads * D, tiles = tiles_per_head(shape);
  float *scratch = cpu_scratch(k, (int64_t)k->threads * QUERY_TILE * shape->tokens);
  if (!scratch) return;
    /* Later tiles see more keys: dealt out one by one, the last first, the threads end together. */
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = shape->heads * tiles - 1; job >= 0; job--) {
    struct tile tile = tile_at(shape, (int)(job % shape->heads), job / shape->heads);
    float *scores = scratch + (int64_t)omp_get_thread_num() * QUERY_TILE * shape->tokens;
    tile_scores(k, scores, (const float *)q, (const float *)key, &tile, shape);
    tile_softmax(scores, logsum, &tile, shape);
    matmul(k, (struct product){'N', 'N', tile.rows, D, tile.keys, tile.keys, ldk, ldq, 1, 0, scores,
                               (const float *)v + tile.key * ldk + tile.kv_head * D, (float *)out + tile.row * ldq + tile.head * D});
  }
}

/* p becomes softmax from the scores and logsum, dp becomes the scores' gradient p * (dp - sum(dout * out)). */
static void tile_softmax_backward(float *p, float *dp, const float *dout, const float *out, const float *logsum, const struct tile *tile,
                                  const struct attention_shape *shape) {
  int64_t D = shape->head_size, ld = shape->heads * D;
  for (int64_t r = 0; r < tile->rows; r++) {
    const float *d = dout + (tile->row + r) * ld + tile->head * D, *o = out + (tile->row + r) * ld + tile->head * D;
    float *row = p + r * tile->keys, *slope = dp + r * tile->keys, dot = 0;
    float log_sum = logsum[tile->head * (int64_t)shape->tokens + tile->row + r];
    int64_t begin, end;
    visible_columns(shape, tile, r, &begin, &end);
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < D; i++) dot += d[i] * o[i];
#pragma omp simd
    for (int64_t c = begin; c < end; c++) {
      row[c] = vector_exp(row[c] - log_sum);
      slope[c] = row[c] * (slope[c] - dot);
    }
    for (int64_t c = 0; c < begin; c++) row[c] = slope[c] = 0;
    for (int64_t c = end; c < tile->keys; c++) row[c] = slope[c] = 0;
  }
}

/* One query head: its rows of dq, and its share [T, D] of dk and dv. */
static void head_backward(struct kernels *k, int head, float *dq, float *dk, float *dv, float *p, float *dp, const float *dout,
                          const float *out, const float *logsum, const float *q, const float *key, const float *v,
                          const struct attention_shape *shape) {
  int64_t D = shape->head_size, ldq = shape->heads * D, ldk = shape->kv_heads * D;
  float scale = 1.0f / sqrtf((float)D);
  memset(dk, 0, (size_t)(shape->tokens * D) * sizeof(float));
  memset(dv, 0, (size_t)(shape->tokens * D) * sizeof(float));
  for (int64_t t = 0; t < tiles_per_head(shape); t++) {
    struct tile tile = tile_at(shape, head, t);
    const float *q_tile = q + tile.row * ldq + head * D, *dout_tile = dout + tile.row * ldq + head * D;
    const float *k_tile = key + tile.key * ldk + tile.kv_head * D, *v_tile = v + tile.key * ldk + tile.kv_head * D;
    tile_scores(k, p, q, key, &tile, shape);
    matmul(k, (struct product){'N', 'T', tile.rows, tile.keys, D, ldq, ldk, tile.keys, 1, 0, dout_tile, v_tile, dp});
    tile_softmax_backward(p, dp, dout, out, logsum, &tile, shape);
    matmul(k,
           (struct product){'N', 'N', tile.rows, D, tile.keys, tile.keys, ldk, ldq, scale, 0, dp, k_tile, dq + tile.row * ldq + head * D});
    matmul(k, (struct product){'T', 'N', tile.keys, D, tile.rows, tile.keys, ldq, D, scale, 1, dp, q_tile, dk + tile.key * D});
    matmul(k, (struct product){'T', 'N', tile.keys, D, tile.rows, tile.keys, ldq, D, 1, 1, p, dout_tile, dv + tile.key * D});
  }
}

/* to[T, kv_heads * D] = sum over the query heads of each kv head of their shares [heads, T, D]. */
static void gather_shares(float *to, const float *shares, const struct attention_shape *shape) {
  int64_t D = shape->head_size, T = shape->tokens, group = shape->heads / shape->kv_heads;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; t++)
    for (int64_t h = 0; h < shape->kv_heads; h++) {
      float *row = to + (t * shape->kv_heads + h) * D;
      for (int64_t i = 0; i < D; i++) row[i] = shares[((h * group) * T + t) * D + i];
      for (int64_t g = 1; g < group; g++)
        for (int64_t i = 0; i < D; i++) row[i] += shares[((h * group + g) * T + t) * D + i];
    }
}

static void attention_backward(struct kernels *k, data *dq, data *dk, data *dv, const data *dout, const data *out, const float *logsum,
                               const data *q, const data *key, const data *v, const struct attention_shape *shape) {
  int64_t share = (int64_t)shape->tokens * shape->head_size, tile = (int64_t)QUERY_TILE * shape->tokens;
  float *scratch = cpu_scratch(k, 2 * shape->heads * share + 2 * k->threads * tile);
  if (!scratch) return;
  float *dk_shares = scratch, *dv_shares = dk_shares + shape->heads * share, *tiles = dv_shares + shape->heads * share;
#pragma omp parallel for schedule(dynamic)
  for (int head = 0; head < shape->heads; head++) {
    float *p = tiles + 2 * omp_get_thread_num() * tile, *dp = p + tile;
    head_backward(k, head, (float *)dq, dk_shares + head * share, dv_shares + head * share, p, dp, (const float *)dout, (const float *)out,
                  logsum, (const float *)q, (const float *)key, (const float *)v, shape);
  }
  gather_shares((float *)dk, dk_shares, shape);
  gather_shares((float *)dv, dv_shares, shape);
}
