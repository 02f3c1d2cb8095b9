/* writer.c: one thread a block; at most one block is being written. */
#include "writer.h"

#include <pthread.h>
#include <stdlib.h>

struct writer {
  struct store *store;
  const char *where;
  struct world *world;
  bool busy;
  pthread_t thread;
  struct block_image image;   /* the thread's while busy, */
  struct block_record record; /* this too */
  const struct record_room *room;
  struct error error;
};

int writer_open(struct store *store, const char *where, struct world *world, struct writer **writer, struct error *error) {
  *writer = calloc(1, sizeof **writer);
  if (!*writer) return error_set(error, ERROR_WORK, "out of memory for the block writer");
  **writer = (struct writer){.store = store, .where = where, .world = world};
  return 0;
}

static void block_free_both(struct block_image *image, struct block_record *record) {
  block_image_free(image);
  block_record_free(record);
}

static void *writer_main(void *argument) {
  struct writer *writer = argument;
  if (!writer->image.bytes && record_wait(writer->room, &writer->error) == 0)
    block_image_make(&writer->image, &writer->record, store_info(writer->store), writer->where, &writer->error);
  block_record_free(&writer->record);
  if (!writer->error.code) store_write_block(writer->store, &writer->image, &writer->error);
  block_image_free(&writer->image);
  world_release(writer->world);
  return NULL;
}

int writer_wait(struct writer *writer, struct error *error) {
  if (!writer) return 0;
  if (writer->busy) pthread_join(writer->thread, NULL);
  writer->busy = false;
  return writer->error.code ? error_set(error, writer->error.code, "%s", writer->error.message) : 0;
}

int writer_submit(struct writer *writer, struct block_image *image, struct block_record *record, const struct record_room *room,
                  struct error *error) {
  if (!writer) return 0;
  if (writer_wait(writer, error)) {
    block_free_both(image, record);
    return error->code;
  }
  writer->image = *image;
  writer->record = *record;
  writer->room = room;
  *image = (struct block_image){0};
  *record = (struct block_record){0};
  world_hold(writer->world);
  writer->busy = pthread_create(&writer->thread, NULL, writer_main, writer) == 0;
  if (writer->busy) return 0;
  world_release(writer->world);
  block_free_both(&writer->image, &writer->record);
  return error_set(error, ERROR_WORK, "no thread for the block writer");
}

int writer_close(struct writer *writer, struct error *error) {
  if (!writer) return 0;
  int code = writer_wait(writer, error);
  free(writer);
  return code;
}
