/* writer.h: rank 0's writer: makes one block's file and stores it in a thread of its own while the next is calibrated. */
#ifndef OMNIQUANT_WRITER_H
#define OMNIQUANT_WRITER_H

#include "record.h"
#include "world.h"

struct writer; /* NULL on ranks that do not write: every function takes it */

/* Errors: ERROR_WORK (memory). The store must outlive the writer; the world does not end while a block is being written. */
int writer_open(struct store *store, const char *where /* of messages; must outlive the writer */, struct world *world,
                struct writer **writer, struct error *error);

/* Waits for the block before and hands over the next: its file, or where that is not made yet (no bytes) what it is made of, which may still be on its
 * way from the device. The memory of both becomes the writer's in any case; what the record points to stays the room's, which the writer reads until
 * writer_wait. Errors: those of making and writing the block before. */
int writer_submit(struct writer *writer, struct block_image *image, struct block_record *record, const struct record_room *room,
                  struct error *error);

/* Waits for the block before. Errors: those of making and writing it. */
int writer_wait(struct writer *writer, struct error *error);

/* Waits for the last block and frees. Errors: those of making and writing it. */
int writer_close(struct writer *writer, struct error *error);

#endif
