/* allreduce.c: what sums that do not depend on the ranks cost: the ordered tree of world_allreduce beside MPI_Allreduce, which may add in any
 * order, and the exchange of as many bytes between two ranks. Prints a JSON object for each size on rank 0 (bench/README.md). */
#include <stdio.h>
#include <stdlib.h>

#include "clock.h"
#include "measure.h"
#include "world.h"

struct setup {
  struct world world;
  size_t count; /* floats summed */
  int repeats;
  float *values, *scratch; /* [count] */
  double *seconds;         /* [repeats] */
};

static void sum_in_order(struct setup *s) {
  world_allreduce(&s->world, s->values, s->count, s->scratch);
}

static void sum_in_any_order(struct setup *s) {
  MPI_Allreduce(MPI_IN_PLACE, s->values, (int)s->count, MPI_FLOAT, MPI_SUM, s->world.communicator);
}

/* With the neighbour, both ways at once. */
static void exchange(struct setup *s) {
  int partner = s->world.rank ^ 1;
  if (partner < s->world.size)
    MPI_Sendrecv(s->values, (int)s->count, MPI_FLOAT, partner, 0, s->scratch, (int)s->count, MPI_FLOAT, partner, 0, s->world.communicator,
                 MPI_STATUS_IGNORE);
}

/* The median over the repeats of the seconds until all ranks are done; one more before them is not counted. */
static double time_of(struct setup *s, void (*work)(struct setup *)) {
  for (int i = -1; i < s->repeats; i++) {
    for (size_t j = 0; j < s->count; j++) s->values[j] = 1e-3f * (float)(j % 1000); /* sums would grow from repeat to repeat */
    MPI_Barrier(s->world.communicator);
    double begin = now();
    work(s);
    double spent = world_max(&s->world, now() - begin);
    if (i >= 0) s->seconds[i] = spent;
  }
  return median(s->seconds, s->repeats);
}

static void run(struct setup *s) {
  double bytes = (double)s->count * sizeof(float), ranks = s->world.size;
  double ordered = time_of(s, sum_in_order), free_order = time_of(s, sum_in_any_order), pair = time_of(s, exchange);
  double limit = 2 * (ranks - 1) / ranks * pair; /* as many bytes as each rank has to send, at the exchange's rate */
  if (s->world.rank > 0) return;
  printf("{\"ranks\": %d, \"mib\": %.3f, \"tree_seconds\": %.6g, \"mpi_seconds\": %.6g, \"ratio\": %.3f, \"tree_gb_s\": %.3f, "
         "\"mpi_gb_s\": %.3f, \"limit_gb_s\": %.3f}\n",
         s->world.size, bytes / (1 << 20), ordered, free_order, ordered / free_order, bytes / ordered / 1e9, bytes / free_order / 1e9,
         bytes / limit / 1e9);
  fflush(stdout);
}

static int setup_size(struct setup *s, const char *text, struct error *error) {
  long long count = atoll(text);
  free(s->values);
  free(s->scratch);
  s->values = s->scratch = NULL;
  if (count < 1 || count > 1 << 28) return error_set(error, ERROR_INPUT, "%s: is no count of floats; give 1 to %d", text, 1 << 28);
  s->count = (size_t)count;
  s->values = calloc(s->count, sizeof *s->values);
  s->scratch = calloc(s->count, sizeof *s->scratch);
  if (!s->values || !s->scratch) return error_set(error, ERROR_WORK, "out of memory for %lld floats twice", count);
  return 0;
}

int main(int argc, char **argv) {
  struct setup setup = {.repeats = 9};
  struct error error = {0};
  if (world_init(&setup.world, &argc, &argv, &error)) {
    fprintf(stderr, "allreduce: %s\n", error.message);
    return error.code;
  }
  setup.seconds = calloc((size_t)setup.repeats, sizeof *setup.seconds);
  if (!setup.seconds) error_set(&error, ERROR_WORK, "out of memory");
  if (argc < 2 || setup.world.size < 2) error_set(&error, ERROR_INPUT, "counts of floats are expected, and at least two ranks");
  world_agree(&setup.world, &error);
  for (int i = 1; i < argc && !error.code; i++) {
    setup_size(&setup, argv[i], &error);
    if (!world_agree(&setup.world, &error)) run(&setup);
  }
  if (error.code && setup.world.rank == 0) fprintf(stderr, "allreduce: %s\n", error.message);
  free(setup.values);
  free(setup.scratch);
  free(setup.seconds);
  world_finalize(&setup.world);
  return error.code;
}
