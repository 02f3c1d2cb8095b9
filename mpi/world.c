/* world.c: ranks and collectives over host memory, on MPI. */
#include "world.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "tree.h"
#include "watch.h"

enum { TAG_BYTES = 1, TAG_REDUCE = 2 };
static const size_t PIECE = (size_t)1 << 28; /* MPI counts are int: longer messages go in pieces */

/* Ends all ranks when MPI fails. */
static void require(struct world *world, int code, const char *what) {
  if (code == MPI_SUCCESS) return;
  char reason[MPI_MAX_ERROR_STRING] = "";
  int length;
  MPI_Error_string(code, reason, &length);
  struct error error = {0};
  error_set(&error, ERROR_WORK, "rank %d: MPI %s failed: %s", world->rank, what, reason);
  world_abort(world, &error);
}

/* Counts what a collective has taken. */
static void count_wait(struct world *world, double since) {
  world->waited_seconds += now() - since;
}

/* This rank's place on its node. */
static void find_node(struct world *world) {
  require(world, MPI_Comm_set_errhandler(world->node, MPI_ERRORS_RETURN), "error handler");
  require(world, MPI_Comm_rank(world->node, &world->local_rank), "rank");
  require(world, MPI_Comm_size(world->node, &world->local_size), "size");
}

int world_init(struct world *world, int *argc, char ***argv, struct error *error) {
  int provided;
  if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS || provided < MPI_THREAD_FUNNELED)
    return error_set(error, ERROR_WORK, "MPI could not start with thread support (MPI_THREAD_FUNNELED)");
  world->communicator = MPI_COMM_WORLD;
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN);
  require(world, MPI_Comm_rank(MPI_COMM_WORLD, &world->rank), "rank");
  require(world, MPI_Comm_size(MPI_COMM_WORLD, &world->size), "size");
  require(world, MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world->rank, MPI_INFO_NULL, &world->node), "split by node");
  find_node(world);
  return 0;
}

int world_join_team(struct world *world, int teams, struct world *team) {
  int size = world->size / teams, number = world->rank / size;
  *team = *world;
  if (teams == 1) return 0;
  team->size = size;
  team->rank = world->rank % size;
  require(world, MPI_Comm_split(world->communicator, number, world->rank, &team->communicator), "split into teams");
  require(world, MPI_Comm_set_errhandler(team->communicator, MPI_ERRORS_RETURN), "error handler");
  require(world, MPI_Comm_split(world->node, number, world->rank, &team->node), "split a node into teams");
  find_node(team);
  return number;
}

void world_leave_team(struct world *team) {
  if (team->communicator == MPI_COMM_NULL || team->communicator == MPI_COMM_WORLD) return;
  MPI_Comm_free(&team->communicator);
  MPI_Comm_free(&team->node);
}

void world_watch(struct world *world) {
  if (world->size > 1) watch_open(world->communicator, world->rank, world->size, world->local_rank, &world->watch);
}

void world_catch_signals(struct world *world) {
  watch_catch_signals(world->watch);
}

bool world_stopping(const struct world *world) {
  (void)world;
  return watch_stop_signal() != 0;
}

bool world_stops(struct world *world, bool *ready) {
  int mine[2] = {watch_stop_signal(), !*ready}, any[2] = {mine[0], mine[1]};
  double since = now();
  if (world->size > 1) require(world, MPI_Allreduce(mine, any, 2, MPI_INT, MPI_MAX, world->communicator), "allreduce");
  count_wait(world, since);
  *ready = !any[1];
  return any[0] != 0;
}

void world_hold(struct world *world) {
  watch_hold(world->watch);
}

void world_release(struct world *world) {
  watch_release(world->watch);
}

void world_finalize(struct world *world) {
  watch_close(world->watch);
  MPI_Comm_free(&world->node);
  MPI_Finalize();
}

int world_agree(struct world *world, struct error *error) {
  int stop = watch_stop_signal();
  if (stop)
    error_set(error, ERROR_STOPPED, "stopped by SIG%s; the blocks that are stored stay: the same command goes on from there",
              sigabbrev_np(stop));
  struct {
    int code, rank;
  } mine = {error->code ? 1 : 0, world->rank}, worst;
  double since = now();
  require(world, MPI_Allreduce(&mine, &worst, 1, MPI_2INT, MPI_MAXLOC, world->communicator), "allreduce");
  count_wait(world, since);
  if (!worst.code) return 0;
  require(world, MPI_Bcast(error, sizeof *error, MPI_BYTE, worst.rank, world->communicator), "broadcast");
  return error->code;
}

void world_abort(struct world *world, const struct error *error) {
  fprintf(stderr, "omniquant: %s\n", error->message);
  fflush(stderr);
  watch_end_others(world->watch, error->code);
  MPI_Abort(world->communicator, error->code);
  _exit(error->code);
}

static void exchange(void *context, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner) {
  struct world *world = context;
  int given = (int)mine_count, taken = (int)theirs_count;
  MPI_Comm communicator = world->communicator;
  if (!taken)
    require(world, MPI_Send(mine, given, MPI_FLOAT, partner, TAG_REDUCE, communicator), "send");
  else if (!given)
    require(world, MPI_Recv(theirs, taken, MPI_FLOAT, partner, TAG_REDUCE, communicator, MPI_STATUS_IGNORE), "receive");
  else
    require(world,
            MPI_Sendrecv(mine, given, MPI_FLOAT, partner, TAG_REDUCE, theirs, taken, MPI_FLOAT, partner, TAG_REDUCE, communicator,
                         MPI_STATUS_IGNORE),
            "exchange");
}

static void add_to(void *context, float *values, const float *other, size_t count) {
  (void)context;
  for (size_t i = 0; i < count; i++) values[i] += other[i];
}

void world_allreduce(struct world *world, float *values, size_t count, float *scratch) {
  if (world->size == 1) return;
  if (device_owns(world->device, values)) {
    device_allreduce(world, values, count, scratch);
    return;
  }
  double since = now();
  const struct tree_link link = {world, exchange, add_to};
  for (size_t done = 0; done < count; done += PIECE)
    tree_sum(&link, world->rank, world->size, values + done, count - done < PIECE ? count - done : PIECE, scratch);
  count_wait(world, since);
}

void world_largest(struct world *world, float *values, size_t count) {
  if (world->size > 1 && device_owns(world->device, values)) {
    device_largest(world, values, count);
    return;
  }
  double since = now();
  for (size_t done = 0; done < count && world->size > 1; done += PIECE) {
    size_t piece = count - done < PIECE ? count - done : PIECE;
    require(world, MPI_Allreduce(MPI_IN_PLACE, values + done, (int)piece, MPI_FLOAT, MPI_MAX, world->communicator), "allreduce");
  }
  count_wait(world, since);
}

void world_broadcast(struct world *world, void *bytes, size_t count) {
  for (size_t done = 0; done < count; done += PIECE) {
    size_t piece = count - done < PIECE ? count - done : PIECE;
    require(world, MPI_Bcast((char *)bytes + done, (int)piece, MPI_BYTE, 0, world->communicator), "broadcast");
  }
}

void world_send(struct world *world, const void *bytes, size_t count, int to) {
  for (size_t done = 0; done < count; done += PIECE) {
    size_t piece = count - done < PIECE ? count - done : PIECE;
    require(world, MPI_Send((const char *)bytes + done, (int)piece, MPI_BYTE, to, TAG_BYTES, world->communicator), "send");
  }
}

void world_receive(struct world *world, void *bytes, size_t count, int from) {
  for (size_t done = 0; done < count; done += PIECE) {
    size_t piece = count - done < PIECE ? count - done : PIECE;
    require(world, MPI_Recv((char *)bytes + done, (int)piece, MPI_BYTE, from, TAG_BYTES, world->communicator, MPI_STATUS_IGNORE),
            "receive");
  }
}

double world_max(struct world *world, double value) {
  double result, since = now();
  if (world->size == 1) return value;
  require(world, MPI_Allreduce(&value, &result, 1, MPI_DOUBLE, MPI_MAX, world->communicator), "allreduce");
  count_wait(world, since);
  return result;
}

double world_sum(struct world *world, double value) {
  double result, since = now();
  if (world->size == 1) return value;
  require(world, MPI_Allreduce(&value, &result, 1, MPI_DOUBLE, MPI_SUM, world->communicator), "allreduce");
  count_wait(world, since);
  return result;
}

/* Cores of this node that its ranks may use together: a launcher may have bound each to its own, or left all to all. */
static int usable_cores(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

int world_threads(const struct world *world, int asked) {
  int online = (int)sysconf(_SC_NPROCESSORS_ONLN), mine = usable_cores();
  bool bound = mine < online && world->local_size > 1; /* the launcher gave each rank its cores */
  int share = bound ? mine : mine / world->local_size;
  if (share < 1) share = 1;
  if (asked > 0) return asked < mine ? asked : mine;
  return share;
}
