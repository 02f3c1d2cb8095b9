/* cross_entropy.c: log-softmax over a vocabulary that arrives in pieces: maximum and sum are carried along and rescaled. */
#include "cpu/backend.h"

#include "cpu/vector.h"

static void cross_entropy_piece(struct kernels *k, struct cross_entropy *state, const data *logits, const int32_t *target, int64_t rows,
                                int64_t first, int64_t columns) {
  (void)k;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *row = (const float *)logits + r * columns;
    float maximum = state->maximum[r], sum = 0;
#pragma omp simd reduction(max : maximum)
    for (int64_t c = 0; c < columns; c++) maximum = row[c] > maximum ? row[c] : maximum;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < columns; c++) sum += vector_exp(row[c] - maximum);
    state->sum[r] = state->sum[r] * vector_exp(state->maximum[r] - maximum) + sum;
    state->maximum[r] = maximum;
    if (target[r] >= first && target[r] < first + columns) state->target[r] = row[target[r] - first];
  }
}
