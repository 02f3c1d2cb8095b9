/* writer.h: rank 0's writer: stores one block in a thread of its own while the next is calibrated. */
#ifndef OMNIQUANT_WRITER_H
#define OMNIQUANT_WRITER_H

#include "store.h"
#include "world.h"

struct writer; /* NULL on ranks that do not write: every function takes it */

/* Errors: ERROR_WORK (memory). The store must outlive the writer; the world does not end while a block is being written. */
int writer_open(struct store *store, struct world *world, struct writer **writer, struct error *error);

/* Waits for the block before and hands over the next; the image's memory becomes the writer's in any case.
 * Errors: those of writing the block before. */
int writer_submit(struct writer *writer, struct block_image *image, struct error *error);

/* Waits for the last block and frees. Errors: those of writing it. */
int writer_close(struct writer *writer, struct error *error);

#endif
