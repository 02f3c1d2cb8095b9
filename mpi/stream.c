/* stream.c: the reader's thread on rank 0 and the pieces in flight. Only the main thread calls MPI or the device. An item is sent as one status
 * word, so that a failed read reaches all ranks, and then its bytes: by MPI in pieces, a few of them under way at a time, and from there to the
 * device; or, where devices have a link, to rank 0's device and from there to the others', in pieces for which all ranks ask at the same places. */
#include "stream.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

enum { IN_FLIGHT = 4, PIECES = 32, LINK_PIECES = 16 /* few steps may have to do */ };
static const size_t SMALLEST_PIECE = (size_t)1 << 20, LARGEST_PIECE = (size_t)1 << 28,
                    PIECE_STEP = 256 /* devices carry what is not aligned slowly */;

enum reader_state { READER_IDLE, READER_READING, READER_DONE, READER_QUIT };
enum transfer_state { TRANSFER_STATUS, TRANSFER_PIECES, TRANSFER_COPY, TRANSFER_COMPLETE };

struct stream {
  struct world *world;
  struct kernels *k;
  const struct stream_link *link; /* NULL: MPI carries the bytes */
  struct stream_source source;
  MPI_Comm communicator; /* of its own: its broadcasts may overtake the calibration's collectives */
  char *buffer;          /* on the host; NULL where the link brings all */
  char *image;           /* on the device; NULL where its memory is the host's */
  struct lane *lane;     /* of copies to it */
  int item;              /* being read or sent, or last handed out */

  enum transfer_state transfer;
  int status;     /* of the item's read, as broadcast */
  bool cancelled; /* rank 0: the stream is being closed, the item need not be sent */
  size_t posted, piece;
  size_t sent; /* over the link */
  MPI_Request request[IN_FLIGHT];

  bool has_reader; /* rank 0 */
  pthread_t thread;
  pthread_mutex_t lock; /* guards `reader`; read_error and the buffer belong to the thread while READER_READING */
  pthread_cond_t changed;
  enum reader_state reader;
  struct error read_error;
};

/* Of the item that is under way. */
static size_t item_bytes(const struct stream *s) {
  return s->source.bytes(s->source.context, s->item);
}

static void require(struct stream *s, int code) {
  if (code == MPI_SUCCESS) return;
  struct error error = {0};
  error_set(&error, ERROR_WORK, "rank %d: the broadcast of item %d failed in MPI (code %d)", s->world->rank, s->item, code);
  world_abort(s->world, &error);
}

static void *reader_main(void *argument) {
  struct stream *s = argument;
  pthread_mutex_lock(&s->lock);
  while (s->reader != READER_QUIT) {
    if (s->reader != READER_READING) {
      pthread_cond_wait(&s->changed, &s->lock);
      continue;
    }
    int item = s->item;
    pthread_mutex_unlock(&s->lock);
    s->source.read(s->source.context, item, s->buffer, &s->read_error);
    pthread_mutex_lock(&s->lock);
    if (s->reader == READER_READING) s->reader = READER_DONE;
    pthread_cond_broadcast(&s->changed);
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

static void reader_set(struct stream *s, enum reader_state state) {
  pthread_mutex_lock(&s->lock);
  s->reader = state;
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
}

static bool reader_done(struct stream *s, bool wait) {
  pthread_mutex_lock(&s->lock);
  while (wait && s->reader == READER_READING) pthread_cond_wait(&s->changed, &s->lock);
  bool done = s->reader == READER_DONE;
  pthread_mutex_unlock(&s->lock);
  return done;
}

/* The image may be overwritten when the work asked for so far is done. */
static void image_begin(struct stream *s) {
  if (s->image) s->k->follow(s->k, s->lane);
}

/* Begins the transfer of s->item: nothing is posted before rank 0 has read it. */
static void item_begin(struct stream *s) {
  size_t bytes = item_bytes(s);
  size_t piece = (bytes / (s->link ? LINK_PIECES : PIECES) + PIECE_STEP - 1) / PIECE_STEP * PIECE_STEP;
  s->piece = piece < SMALLEST_PIECE ? SMALLEST_PIECE : piece > LARGEST_PIECE ? LARGEST_PIECE : piece;
  s->posted = s->sent = 0;
  s->transfer = TRANSFER_STATUS;
  s->status = 0;
  for (int i = 0; i < IN_FLIGHT; i++) s->request[i] = MPI_REQUEST_NULL;
  image_begin(s);
  if (s->has_reader)
    reader_set(s, READER_READING);
  else
    require(s, MPI_Ibcast(&s->status, 1, MPI_INT, 0, s->communicator, &s->request[0]));
}

/* Posts pieces into free requests until all are under way. */
static void post_pieces(struct stream *s, size_t bytes) {
  for (int i = 0; i < IN_FLIGHT && s->posted < bytes; i++) {
    if (s->request[i] != MPI_REQUEST_NULL) continue;
    size_t length = bytes - s->posted < s->piece ? bytes - s->posted : s->piece;
    require(s, MPI_Ibcast(s->buffer + s->posted, (int)length, MPI_BYTE, 0, s->communicator, &s->request[i]));
    s->posted += length;
  }
}

/* Whoever has it on the host copies it to the device. The host sees when that is done, so that work asked for from then on need not wait for the lane. */
static void image_copy(struct stream *s, size_t bytes) {
  bool copied = s->image && s->buffer;
  if (copied) s->k->send(s->k, s->lane, s->image, s->buffer, bytes);
  s->transfer = copied ? TRANSFER_COPY : TRANSFER_COMPLETE;
}

/* From rank 0's device to the others', the next so many bytes. What NCCL runs waits on the device for its partners, and what is asked of it has to be
 * asked in one order on all ranks: had one rank asked for a broadcast and waited for its whole device (freeing memory, loading a kernel), while another
 * waits for the first in a sum, both would for ever. */
static void link_send(struct stream *s, size_t length) {
  s->k->follow(s->k, s->lane);
  s->link->broadcast(s->link->context, s->lane, s->image + s->sent, length);
  s->sent += length;
}

/* What is left of the item, when every rank has come for it. */
static void link_finish(struct stream *s) {
  size_t bytes = item_bytes(s);
  if (!bytes) return;
  require(s, MPI_Barrier(s->communicator)); /* a rank that waits for its device moves no message of MPI's on */
  if (s->sent < bytes) link_send(s, bytes - s->sent);
  s->k->idle(s->k, s->lane, true);
}

/* After the status, which is the same on all ranks. */
static void contents_begin(struct stream *s, size_t bytes) {
  if (s->status)
    s->transfer = TRANSFER_COMPLETE;
  else if (s->world->size == 1 || s->link)
    image_copy(s, bytes);
  else
    s->transfer = TRANSFER_PIECES;
}

static void advance(struct stream *s, bool wait) {
  size_t bytes = item_bytes(s);
  int idle = 1;
  if (s->transfer == TRANSFER_STATUS) {
    if (s->has_reader) {
      if (!reader_done(s, wait)) return;
      s->status = s->cancelled ? ERROR_WORK : s->read_error.code;
      if (s->world->size > 1 && s->request[0] == MPI_REQUEST_NULL)
        require(s, MPI_Ibcast(&s->status, 1, MPI_INT, 0, s->communicator, &s->request[0]));
    }
    if (s->world->size > 1) require(s, MPI_Test(&s->request[0], &idle, MPI_STATUS_IGNORE));
    if (!idle) return;
    contents_begin(s, bytes);
  }
  if (s->transfer == TRANSFER_PIECES) {
    post_pieces(s, bytes);
    for (int i = 0; i < IN_FLIGHT; i++) require(s, MPI_Test(&s->request[i], &idle, MPI_STATUS_IGNORE));
    post_pieces(s, bytes);
    require(s, MPI_Testall(IN_FLIGHT, s->request, &idle, MPI_STATUSES_IGNORE));
    if (idle && s->posted == bytes) image_copy(s, bytes);
  }
  if (s->transfer == TRANSFER_COPY && (s->k->idle(s->k, s->lane, wait) || wait)) s->transfer = TRANSFER_COMPLETE;
}

static void memory_free(struct stream *s) {
  if (s->image) s->k->lane_close(s->k, s->lane);
  if (s->image) s->k->release(s->k, s->image);
  s->k->release_host(s->k, s->buffer);
  s->image = s->buffer = NULL;
}

/* Where the device's memory is its own, the image there; on the host what MPI and the reader fill. False without memory. */
static bool memory_open(struct stream *s, size_t bytes) {
  bool opened = true;
  if (s->k->owns) {
    s->image = s->k->allocate(s->k, bytes);
    opened = s->image && (s->lane = s->k->lane_open(s->k));
  }
  if (s->world->rank == 0 || !s->link) opened = (s->buffer = s->k->allocate_host(s->k, bytes)) && opened;
  return opened;
}

int stream_open(struct world *world, struct kernels *k, const struct stream_link *link, const struct stream_source *source,
                struct stream **stream, struct error *error) {
  size_t largest = 64;
  for (int item = 0; item < source->items; item++) {
    size_t bytes = source->bytes(source->context, item);
    if (bytes > largest) largest = bytes;
  }
  struct stream *s = *stream = calloc(1, sizeof *s);
  MPI_Comm communicator;
  if (MPI_Comm_dup(world->communicator, &communicator) != MPI_SUCCESS) {
    error_set(error, ERROR_WORK, "rank %d: MPI could not make a communicator for the block stream", world->rank);
    world_abort(world, error); /* the others wait in it */
  }
  if (s) *s = (struct stream){.world = world, .k = k, .link = link, .source = *source, .communicator = communicator, .item = source->items};
  if (!s || !memory_open(s, largest)) {
    if (s) memory_free(s);
    MPI_Comm_free(&communicator);
    free(s);
    *stream = NULL;
    return error_set(error, ERROR_WORK, "rank %d: out of memory for the block stream (%zu bytes)", world->rank, largest);
  }
  s->transfer = TRANSFER_COMPLETE;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->changed, NULL);
  s->reader = READER_IDLE;
  if (world->rank == 0) {
    if (pthread_create(&s->thread, NULL, reader_main, s)) {
      stream_close(s);
      *stream = NULL;
      return error_set(error, ERROR_WORK, "no thread for the block stream's reader");
    }
    s->has_reader = true;
  }
  return 0;
}

void stream_start(struct stream *s, int item) {
  s->item = item;
  if (s->item < s->source.items) item_begin(s);
}

void stream_poll(struct stream *s) {
  if (s->transfer != TRANSFER_COMPLETE) advance(s, false);
}

bool stream_ready(const struct stream *s, const struct world *world) {
  if (!s->link || world->size != s->world->size || s->item >= s->source.items) return false;
  return s->transfer == TRANSFER_COMPLETE && !s->status && s->sent < item_bytes(s);
}

void stream_send(struct stream *s) {
  size_t left = item_bytes(s) - s->sent;
  link_send(s, left < s->piece ? left : s->piece);
}

int stream_next(struct stream *s, const void **bytes, struct error *error) {
  const struct timespec pause = {.tv_nsec = 50000}; /* leave the core to the reader */
  while (s->transfer != TRANSFER_COMPLETE) {
    advance(s, true);
    if (s->transfer != TRANSFER_COMPLETE && !s->has_reader) nanosleep(&pause, NULL);
  }
  *bytes = s->image ? s->image : s->buffer;
  if (!s->status && s->link) link_finish(s);
  if (!s->status) return 0;
  if (s->has_reader) return error_set(error, s->read_error.code, "%s", s->read_error.message);
  return error_set(error, s->status, "rank 0 could not read item %d of the block stream", s->item);
}

void stream_release(struct stream *s) {
  if (++s->item < s->source.items) {
    item_begin(s);
    return;
  }
  memory_free(s); /* nothing comes that would need it */
}

void stream_close(struct stream *s) {
  if (!s) return;
  s->cancelled = true;
  while (s->transfer != TRANSFER_COMPLETE) advance(s, true); /* a broadcast that was begun cannot be taken back */
  if (s->has_reader) {
    reader_set(s, READER_QUIT);
    pthread_join(s->thread, NULL);
  }
  MPI_Comm_free(&s->communicator);
  pthread_mutex_destroy(&s->lock);
  pthread_cond_destroy(&s->changed);
  memory_free(s);
  free(s);
}
