/* cuda_stream.c: on some ranks (ranks.bash): the block stream into device memory brings every item whole, while work of the device still reads the
 * one before: through each rank's host, and over a link between devices, for which MPI stands in here. */
#include <time.h>

#include "cuda_ranks.h"
#include "stream.h"

static struct world world;

enum { ITEMS = 6, PIECES = 16, LARGEST = (17 << 20) + 64 /* a sixteenth is no multiple of 16 */ };
static const size_t sizes[ITEMS] = {LARGEST, 1000, 0, 3 << 20, 64, (2 << 20) + 12}; /* several pieces, one, none */

static size_t item_bytes(const void *context, int item) {
  (void)context;
  return sizes[item];
}

/* Small floats, other ones in every item. */
static int read_item(void *context, int item, void *buffer, struct error *error) {
  const int *damaged = context;
  float *values = buffer;
  for (size_t i = 0; i < sizes[item] / sizeof *values; i++) values[i] = (float)((i * 7 + (size_t)item * 1001) % 4096) - 2048;
  return item == *damaged ? error_set(error, ERROR_INPUT, "item %d is damaged", item) : 0;
}

/* ---- a link ---- */

struct mpi_link {
  struct kernels *k;
  char *host; /* [LARGEST] which copies beside the work may use */
};

/* A rank waits in a broadcast for the others, which may wait for it elsewhere: unless all have come to the same place. */
static bool together;

static int next_item(struct stream *stream, const void **bytes, struct error *error) {
  together = true;
  int code = stream_next(stream, bytes, error);
  together = false;
  return code;
}

/* Whether a piece was sent. */
static bool step(struct stream *stream) {
  bool ready = stream_ready(stream, &world);
  assert_false(world_stops(&world, &ready));
  together = true;
  if (ready) stream_send(stream);
  together = false;
  return ready;
}

static void broadcast(void *context, struct lane *lane, void *bytes, size_t count) {
  const struct mpi_link *link = context;
  struct kernels *k = link->k;
  assert_true(together && (uintptr_t)bytes % 16 == 0);
  if (world.rank == 0) k->send(k, lane, link->host, bytes, count);
  k->idle(k, lane, true);
  assert_int_equal(MPI_Bcast(link->host, (int)count, MPI_BYTE, 0, world.communicator), MPI_SUCCESS);
  if (world.rank > 0) k->send(k, lane, bytes, link->host, count);
  k->idle(k, lane, true);
}

/* ---- items ---- */

/* In steps, some of which send pieces where there is a link. Another world's steps send none. */
static void work_a_while(struct kernels *k, struct stream *stream, data *x) {
  const struct world other = {.size = world.size + 1};
  for (int i = 0; i < 20; i++) {
    k->accumulate(k, x, x, 64);
    stream_poll(stream);
    assert_false(stream_ready(stream, &other));
    if (i % 4 == 0) step(stream);
    nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL); /* the reader gets on meanwhile */
  }
}

/* The first item's pieces, all but the last one, go by steps of the work. */
static void check_pieces(struct kernels *k, struct stream *stream, struct memory *m) {
  struct error error = {0};
  int none = -1, sent = 0;
  const void *bytes;
  void *want = host(m, LARGEST, 1);
  read_item(&none, 0, want, &error);
  assert_false(stream_ready(stream, &world));
  stream_start(stream, 0);
  while (sent < PIECES - 1) {
    stream_poll(stream);
    sent += step(stream);
  }
  assert_true(stream_ready(stream, &world));
  if (next_item(stream, &bytes, &error)) fail_msg("%s", error.message);
  assert_true(k->owns(k, bytes) && !stream_ready(stream, &world));
  assert_memory_equal(fetched_bytes(m, bytes, LARGEST), want, LARGEST);
}

/* What was copied out of each item when it was there, looked at when all have passed. */
static void check_items(struct kernels *k, struct stream *stream, struct memory *m) {
  struct error error = {0};
  int none = -1;
  void *kept[ITEMS];
  data *x = poisoned_data(m, 64);
  stream_start(stream, 0);
  for (int item = 0; item < ITEMS; item++) {
    const void *bytes;
    if (next_item(stream, &bytes, &error)) fail_msg("%s", error.message);
    assert_true(k->owns(k, bytes));
    kept[item] = poisoned_bytes(m, sizes[item]);
    k->copy(k, kept[item], bytes, sizes[item]);
    stream_release(stream);
    work_a_while(k, stream, x);
  }
  for (int item = 0; item < ITEMS; item++) {
    void *want = host(m, (int64_t)sizes[item], 1);
    read_item(&none, item, want, &error);
    assert_memory_equal(fetched_bytes(m, kept[item], sizes[item]), want, sizes[item]);
  }
}

/* Elements of each type out of the image are those out of host memory. */
static void check_loading(struct kernels *k, struct stream *stream, struct memory *m) {
  struct error error = {0};
  int none = -1;
  const void *bytes;
  int64_t count = 3001;
  void *from = host(m, LARGEST, 1);
  read_item(&none, 0, from, &error);
  stream_start(stream, 0);
  if (next_item(stream, &bytes, &error)) fail_msg("%s", error.message);
  for (enum dtype dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
    data *got = poisoned_data(m, count), *want = poisoned_data(m, count);
    k->load(k, got, (const char *)bytes + 64, dtype, count);
    k->load(k, want, (const char *)from + 64, dtype, count);
    assert_memory_equal(fetched_bytes(m, got, (size_t)count * k->element_bytes), fetched_bytes(m, want, (size_t)count * k->element_bytes),
                        (size_t)count * k->element_bytes);
  }
}

/* The ranks learn of a failed read, and close what is under way. */
static void check_failure(struct stream *stream, int damaged) {
  struct error error = {0};
  const void *bytes;
  stream_start(stream, 0);
  for (int item = 0; item < damaged; item++) {
    if (next_item(stream, &bytes, &error)) fail_msg("%s", error.message);
    stream_release(stream);
  }
  assert_int_equal(next_item(stream, &bytes, &error), ERROR_INPUT);
}

static void check(struct kernels *k, const struct stream_link *link, int damaged,
                  void (*checked)(struct kernels *, struct stream *, struct memory *)) {
  struct error error = {0};
  struct memory m = {.k = k};
  struct stream_source source = {ITEMS, item_bytes, read_item, &damaged};
  struct stream *stream;
  stream_open(&world, k, link, &source, &stream, &error);
  if (world_agree(&world, &error)) fail_msg("%s", error.message);
  if (checked)
    checked(k, stream, &m);
  else
    check_failure(stream, damaged);
  stream_close(stream);
  if (k->synchronize(k, &error)) fail_msg("%s", error.message);
  memory_free(&m);
}

/* Twice: on the emulation the second time copies are early and the work is late. */
static void items_come_whole(void **context) {
  (void)context;
  for (int run = 0; run < 2; run++) {
    struct error error = {0};
    struct kernels *k = CUDA_OPEN(world.local_rank, &error);
    if (world_agree(&world, &error) || !k) fail_msg("%s", error.message);
    struct mpi_link through = {k, k->allocate_host(k, LARGEST)};
    const struct stream_link link = {&through, broadcast};
    assert_non_null(through.host);
    for (int linked = 0; linked < 2; linked++) {
      check(k, linked ? &link : NULL, -1, check_items);
      check(k, linked ? &link : NULL, -1, check_loading);
      if (linked) check(k, &link, -1, check_pieces);
      check(k, linked ? &link : NULL, 3, NULL);
    }
    k->release_host(k, through.host);
    k->close(k);
  }
}

int main(int argc, char **argv) {
  return run_on_ranks(&world, argc, argv, (struct CMUnitTest)cmocka_unit_test(items_come_whole));
}
