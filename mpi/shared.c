/* shared.c: the first rank of a node makes a file without a name in memory (memfd_create), the others open it by that rank's entry in /proc. So
 * neither the size of /dev/shm limits it, nor is anything left behind however the ranks end. */
#include "shared.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"

/* Where a node's file is. */
struct place {
  int64_t process;
  int file; /* -1: it could not be made */
  uint64_t device, inode;
};

static void require(struct world *world, int code, const char *what) {
  if (code == MPI_SUCCESS) return;
  struct error error = {0};
  error_set(&error, ERROR_WORK, "rank %d: MPI %s among the ranks of a node failed (code %d)", world->rank, what, code);
  world_abort(world, &error);
}

static struct place make_file(size_t bytes) {
  struct place place = {.process = getpid(), .file = memfd_create("omniquant", MFD_CLOEXEC)};
  struct stat found;
  if (place.file < 0) return place;
  if (ftruncate(place.file, (off_t)bytes) == 0 && fstat(place.file, &found) == 0) {
    place.device = found.st_dev;
    place.inode = found.st_ino;
    return place;
  }
  int reason = errno;
  close(place.file);
  errno = reason;
  place.file = -1;
  return place;
}

/* The same file on another rank; -1 where /proc has another under that name, as it has for a rank that sees other processes. */
static int open_file(const struct place *place) {
  char path[64];
  struct stat found;
  snprintf(path, sizeof path, "/proc/%" PRId64 "/fd/%d", place->process, place->file);
  int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return -1;
  if (fstat(file, &found) == 0 && found.st_dev == place->device && found.st_ino == place->inode) return file;
  close(file);
  errno = ENOENT;
  return -1;
}

static void *map_file(int file, size_t bytes) {
  void *memory = file < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return memory == MAP_FAILED ? NULL : memory;
}

/* Whether all ranks of the node have it; the first that has not says why. */
static bool all_have(struct world *world, const void *memory, int reason) {
  int mine = memory ? world->local_size : world->local_rank, first;
  require(world, MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, world->node), "allreduce");
  if (first == world->local_rank)
    fprintf(stderr, "rank %d: the ranks of this node hold their weights each by itself, since memory in common cannot be had: %s\n",
            world->rank, strerror(reason));
  return first == world->local_size;
}

void shared_open(struct shared *shared, struct world *world, size_t bytes) {
  *shared = (struct shared){.world = world, .bytes = bytes};
  if (world->local_size == 1) return;
  struct place place = {.file = -1};
  bool maker = world->local_rank == 0;
  if (maker) place = make_file(bytes);
  int reason = errno;
  require(world, MPI_Bcast(&place, sizeof place, MPI_BYTE, 0, world->node), "broadcast");
  int file = maker ? place.file : -1;
  if (!maker && place.file >= 0) file = open_file(&place);
  void *memory = map_file(file, bytes);
  if (!maker || file >= 0) reason = errno;
  bool all = all_have(world, memory, reason); /* nobody needs the maker's entry in /proc any more */
  if (file >= 0) close(file);
  if (all)
    shared->memory = memory;
  else if (memory)
    munmap(memory, bytes);
}

void shared_close(struct shared *shared) {
  if (shared->memory) munmap(shared->memory, shared->bytes);
  *shared = (struct shared){0};
}

void shared_barrier(const struct shared *shared) {
  if (!shared->memory) return;
  double since = now();
  require(shared->world, MPI_Barrier(shared->world->node), "barrier");
  shared->world->waited_seconds += now() - since;
}

void shared_part(const struct shared *shared, int64_t count, int64_t *first, int64_t *end) {
  int64_t rank = shared->memory ? shared->world->local_rank : 0, size = shared->memory ? shared->world->local_size : 1;
  *first = count * rank / size;
  *end = count * (rank + 1) / size;
}
