/* stream.h: the block stream: items (as a model's blocks, in order) go from rank 0 to every rank, one ahead of the work. On rank 0 a thread
 * reads the next item into the one buffer as soon as the current item has been taken out of it; its pieces are then broadcast without
 * blocking while the ranks work, each time they call stream_poll. Where devices have memory of their own, items come to an image there, beside the
 * work: through each rank's host; or to rank 0's device and from there to the others' by a link, in pieces for which all ranks ask at the same places.
 * What the bytes mean is the source's business. */
#ifndef OMNIQUANT_STREAM_H
#define OMNIQUANT_STREAM_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"
#include "kernels.h"
#include "world.h"

struct stream_source {
  int items; /* 0 .. items - 1 */
  /* Bytes of an item; the same answer on every rank. */
  size_t (*bytes)(const void *context, int item);
  /* Fills the buffer with an item. Called on rank 0 only, from the reader's thread, in order. */
  int (*read)(void *context, int item, void *buffer, struct error *error);
  void *context; /* given to both; owned by the caller, must outlive the stream */
};

/* What carries bytes between devices. */
struct stream_link {
  void *context;
  /* Rank 0's become those of every rank, device memory: after the lane's copies so far and before its next ones, and in one order with all else that the
   * link carries. Asynchronous. Collective: called only within stream_send and stream_next; it fails for all. */
  void (*broadcast)(void *context, struct lane *lane, void *bytes, size_t count);
};

struct stream; /* one rank's end */

/* Makes this rank's end. Collective. The buffer holds the largest item, 64-byte aligned.
 * Errors (ERROR_WORK: memory, threads) are this rank's own: agree on them. *stream is NULL then. */
int stream_open(struct world *world, struct kernels *k, /* both must outlive the stream */
                const struct stream_link *link, /* between the devices of all ranks, or NULL: MPI carries all; must outlive the stream */
                const struct stream_source *source, struct stream **stream, struct error *error);

/* Begins with an item, once all ranks have opened their ends. Collective. */
void stream_start(struct stream *stream, int item);

/* Lets a broadcast in work advance; cheap. Call it every few milliseconds of work, on every rank. */
void stream_poll(struct stream *stream);

/* Whether the next piece of the item that is under way can go from rank 0's device to the others': to be asked, and agreed on, by all ranks at the same
 * place. Never where MPI carries the bytes, or where `world`, which agrees, is not all of the stream's ranks. */
bool stream_ready(const struct stream *stream, const struct world *world);

/* Sends it, beside the work asked for from now on. Collective, where all ranks are ready. */
void stream_send(struct stream *stream);

/* Waits for the next item. Collective. *bytes is host memory, or the device's where it has its own (both of which k->load takes), until
 * stream_release.
 * A failed read comes back on every rank at this call; rank 0 has its message, agree on it. */
int stream_next(struct stream *stream, const void **bytes, struct error *error);

/* Says that the item has been taken out, or that this has been asked of the device: the next one may overwrite it. Behind the last the memory is given
 * back. */
void stream_release(struct stream *stream);

/* Ends the reader and frees; safe at any time on which all ranks agree, and with NULL. Collective. */
void stream_close(struct stream *stream);

#endif
