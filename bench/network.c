/* network.c: what a message costs between ranks 0 and 1, 2 and 3, ..., all pairs at once, as the sum of gradients sends it: both exchange and add
 * (MPI_Sendrecv). Prints JSON for bench/simulate.py: latency_seconds (half of a round trip of 4 bytes), bytes_a_second (each way, from the two largest
 * exchanges), and `exchanges`, [bytes, seconds], each the median of its repeats, of the slowest pair. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

#include "measure.h"

enum { SIZES = 12, LEAST_REPEATS = 5, MOST_REPEATS = 200, FIRST_BYTES = 4, TAG = 1 };
static const double SECONDS_A_SIZE = 0.4;

/* Seconds of one exchange. */
static double exchange(float *mine, float *other, int count, int partner) {
  double begin = MPI_Wtime();
  MPI_Sendrecv(mine, count, MPI_FLOAT, partner, TAG, other, count, MPI_FLOAT, partner, TAG, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  for (int i = 0; i < count; i++) mine[i] += other[i];
  return MPI_Wtime() - begin;
}

/* Of all pairs the slowest one's. */
static double slowest(double seconds) {
  MPI_Allreduce(MPI_IN_PLACE, &seconds, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return seconds;
}

/* The ranks go from one exchange into the next without a word: each begins when the one before is over on both. */
static double exchanges(float *mine, float *other, int count, int partner) {
  double seconds[MOST_REPEATS] = {0};
  for (int i = 0; i < 3 && partner >= 0; i++) seconds[0] = exchange(mine, other, count, partner); /* the connection, and its window */
  double fit = SECONDS_A_SIZE / slowest(seconds[0]);
  int repeats = fit > MOST_REPEATS ? MOST_REPEATS : fit < LEAST_REPEATS ? LEAST_REPEATS : (int)fit;
  for (int i = 0; i < repeats && partner >= 0; i++) seconds[i] = exchange(mine, other, count, partner);
  return slowest(median(seconds, repeats));
}

static double round_trip(int rank, int partner) {
  double seconds[MOST_REPEATS] = {0};
  float word = 0;
  for (int i = 0; i < MOST_REPEATS && partner >= 0; i++) {
    double begin = MPI_Wtime();
    if (rank < partner) MPI_Send(&word, 1, MPI_FLOAT, partner, TAG, MPI_COMM_WORLD);
    MPI_Recv(&word, 1, MPI_FLOAT, partner, TAG, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    if (rank > partner) MPI_Send(&word, 1, MPI_FLOAT, partner, TAG, MPI_COMM_WORLD);
    seconds[i] = MPI_Wtime() - begin;
  }
  return slowest(median(seconds, MOST_REPEATS));
}

static void measure(int rank, int partner, float *mine, float *other) {
  int bytes[SIZES];
  double seconds[SIZES], trip = round_trip(rank, partner);
  for (int i = 0; i < SIZES; i++) {
    bytes[i] = FIRST_BYTES << 2 * i;
    seconds[i] = exchanges(mine, other, bytes[i] / (int)sizeof *mine, partner);
  }
  if (rank > 0) return;
  double large = bytes[SIZES - 1] - bytes[SIZES - 2];
  printf("{\"latency_seconds\": %.3g, \"bytes_a_second\": %.4g, \"exchanges\": [", trip / 2,
         large / (seconds[SIZES - 1] - seconds[SIZES - 2]));
  for (int i = 0; i < SIZES; i++) printf("%s[%d, %.4g]", i ? ", " : "", bytes[i], seconds[i]);
  printf("]}\n");
}

int main(int argc, char **argv) {
  int rank, size;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  size_t largest = (size_t)FIRST_BYTES << 2 * (SIZES - 1);
  float *mine = calloc(1, largest), *other = calloc(1, largest);
  if (size < 2 || !mine || !other) {
    fprintf(stderr, "network: needs two ranks, and 2 x %zu bytes\n", largest);
    MPI_Abort(MPI_COMM_WORLD, 2);
  }
  measure(rank, (rank ^ 1) < size ? rank ^ 1 : -1, mine, other);
  free(mine);
  free(other);
  MPI_Finalize();
  return 0;
}
