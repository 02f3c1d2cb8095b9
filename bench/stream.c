/* stream.c: how fast blocks come from rank 0's file to every rank, with no work in between: read alone, broadcast alone, and by the block
 * stream that calibrate uses. Prints one JSON object on rank 0 (bench/README.md). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"
#include "clock.h"
#include "measure.h"
#include "stream.h"

struct setup {
  struct world world;
  struct model model;
  struct checkpoint *checkpoint; /* rank 0, else NULL */
  struct kernels *k;
  char *image, *other; /* [model.image_bytes] */
  double *seconds;     /* [model.blocks] */
};

static size_t image_bytes(const void *context, int item) {
  (void)item;
  return ((const struct setup *)context)->model.image_bytes;
}

static int read_image(void *context, int item, void *image, struct error *error) {
  const struct setup *s = context;
  return checkpoint_read_block(s->checkpoint, &s->model, item, image, error);
}

static int setup_open(struct setup *s, const char *folder, struct error *error) {
  if (s->world.rank == 0) checkpoint_open(folder, &s->model, &s->checkpoint, error);
  if (world_agree(&s->world, error)) return error->code;
  world_broadcast(&s->world, &s->model, sizeof s->model);
  s->k = kernels_open("cpu", 1, 0, error);
  s->image = calloc(1, s->model.image_bytes);
  s->other = calloc(1, s->model.image_bytes);
  s->seconds = calloc((size_t)s->model.blocks, sizeof *s->seconds);
  if (!s->image || !s->other || !s->seconds) error_set(error, ERROR_WORK, "out of memory for two blocks");
  return world_agree(&s->world, error);
}

/* Of every block on rank 0, read once before so that the machine may keep the file's pages. */
static double time_reading(struct setup *s, struct error *error) {
  for (int i = 0; i < 2 * s->model.blocks && s->world.rank == 0 && !error->code; i++) {
    double begin = now();
    read_image(s, i % s->model.blocks, s->image, error);
    s->seconds[i % s->model.blocks] = now() - begin;
  }
  return median(s->seconds, s->model.blocks);
}

static double time_copying(struct setup *s) {
  for (int i = 0; i < s->model.blocks; i++) {
    double begin = now();
    memcpy(i % 2 ? s->image : s->other, i % 2 ? s->other : s->image, s->model.image_bytes);
    s->seconds[i] = now() - begin;
  }
  return median(s->seconds, s->model.blocks);
}

static double time_broadcast(struct setup *s) {
  for (int i = 0; i < s->model.blocks; i++) {
    MPI_Barrier(s->world.communicator);
    double begin = now();
    world_broadcast(&s->world, s->image, s->model.image_bytes);
    MPI_Barrier(s->world.communicator);
    s->seconds[i] = now() - begin;
  }
  return median(s->seconds, s->model.blocks);
}

static double time_stream(struct setup *s, struct error *error) {
  struct stream_source source = {s->model.blocks, image_bytes, read_image, s};
  struct stream *stream = NULL;
  stream_open(&s->world, s->k, NULL, &source, &stream, error);
  if (world_agree(&s->world, error)) {
    stream_close(stream);
    return 0;
  }
  double begin = now();
  stream_start(stream, 0);
  for (int i = 0; i < s->model.blocks; i++) {
    const void *bytes;
    stream_next(stream, &bytes, error);
    if (world_agree(&s->world, error)) break;
    stream_release(stream);
    s->seconds[i] = now() - begin;
    begin = now();
  }
  stream_close(stream);
  return median(s->seconds, s->model.blocks);
}

static void run(struct setup *s, struct error *error) {
  double copying = time_copying(s), reading = time_reading(s, error), broadcast = time_broadcast(s), streaming = time_stream(s, error);
  double gigabytes = (double)s->model.image_bytes / 1e9;
  if (error->code || s->world.rank > 0) return;
  printf("{\"ranks\": %d, \"block_mib\": %.2f, \"read_gb_s\": %.3f, ", s->world.size, (double)s->model.image_bytes / (1 << 20),
         gigabytes / reading);
  if (s->world.size > 1)
    printf("\"broadcast_gb_s\": %.3f, ", gigabytes / broadcast);
  else
    printf("\"broadcast_gb_s\": null, ");
  printf("\"stream_gb_s\": %.3f, \"limit_gb_s\": %.3f}\n", gigabytes / streaming, gigabytes / copying);
}

int main(int argc, char **argv) {
  struct setup setup = {0};
  struct error error = {0};
  if (world_init(&setup.world, &argc, &argv, &error)) {
    fprintf(stderr, "stream: %s\n", error.message);
    return error.code;
  }
  if (argc != 2)
    error_set(&error, ERROR_INPUT, "one argument is expected, a model's folder");
  else if (!setup_open(&setup, argv[1], &error))
    run(&setup, &error);
  world_agree(&setup.world, &error);
  if (error.code && setup.world.rank == 0) fprintf(stderr, "stream: %s\n", error.message);
  checkpoint_close(setup.checkpoint);
  free(setup.image);
  free(setup.other);
  free(setup.seconds);
  if (setup.k) setup.k->close(setup.k);
  world_finalize(&setup.world);
  return error.code;
}
