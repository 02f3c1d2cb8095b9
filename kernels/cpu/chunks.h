/* chunks.h: sums over rows. Chunks of rows are summed each by one thread, then the chunks' sums in their order: how many there are does not
 * depend on the number of threads, so neither do the bits. */
#ifndef OMNIQUANT_CPU_CHUNKS_H
#define OMNIQUANT_CPU_CHUNKS_H

#include <stdbool.h>
#include <stdint.h>

enum { CHUNK_LEAST_ROWS = 8, CHUNKS_MOST = 64 };

static inline int64_t row_chunks(int64_t rows) {
  int64_t chunks = (rows + CHUNK_LEAST_ROWS - 1) / CHUNK_LEAST_ROWS;
  return chunks < CHUNKS_MOST ? chunks : CHUNKS_MOST;
}

/* The first row of a chunk, and the end of the one before it. */
static inline int64_t chunk_begin(int64_t rows, int64_t chunks, int64_t chunk) {
  return rows * chunk / chunks;
}

/* to[c] (+)= sum over chunks of sums[chunk * stride + c] */
static void sum_chunks(float *to, const float *sums, int64_t chunks, int64_t stride, int64_t columns, bool add) {
  enum { BLOCK = 64 };
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < columns; begin += BLOCK) {
    int64_t end = begin + BLOCK < columns ? begin + BLOCK : columns;
    for (int64_t c = begin; !add && c < end; c++) to[c] = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
#pragma omp simd
      for (int64_t c = begin; c < end; c++) to[c] += sums[chunk * stride + c];
  }
}

#endif
