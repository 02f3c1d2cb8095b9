/* faults.c: the calls that the linker sends here. OMNIQUANT_FAULT="KIND N RANK" in the environment arms one in a
 * process of that rank; with OMNIQUANT_FAULT_COUNT_CALLS it says at the end how many there were. */
#include "faults.h"

#include <errno.h>
#include <fcntl.h>
#include <mpi.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>

const char *const fault_names[FAULTS] = {"read", "hiccup", "write", "fsync", "rename", "open", "malloc", "collective", "poll", "map"};

static atomic_int armed = -1;
static atomic_long calls, due;

void fault_arm(enum fault kind, long n) {
  armed = n > 0 ? (int)kind : -1;
  calls = 0;
  due = n;
}

long fault_calls(void) {
  return calls;
}

static void tell_calls(void) {
  const char *rank = getenv("OMPI_COMM_WORLD_RANK");
  fprintf(stderr, "calls of %s on rank %s: %ld\n", fault_names[armed], rank ? rank : "0", (long)calls);
}

/* Runs before main. */
__attribute__((constructor)) static void arm_from_environment(void) {
  const char *text = getenv("OMNIQUANT_FAULT"), *rank = getenv("OMPI_COMM_WORLD_RANK");
  char kind[16];
  long n;
  int on;
  if (!text || sscanf(text, "%15s %ld %d", kind, &n, &on) != 3 || on != (rank ? atoi(rank) : 0)) return;
  for (int i = 0; i < FAULTS; i++)
    if (strcmp(kind, fault_names[i]) == 0) fault_arm((enum fault)i, n);
  if (getenv("OMNIQUANT_FAULT_COUNT_CALLS")) atexit(tell_calls);
}

/* Whether this call is the one that fails. */
static bool fails(enum fault kind, int reason) {
  if (armed != (int)kind || ++calls != due) return false;
  errno = reason;
  return true;
}

/* WRAP(kind, reason, returned, type, name, (parameters), (arguments)) */
#define WRAP(kind, reason, returned, type, name, parameters, arguments)                                                                    \
  type __real_##name parameters;                                                                                                           \
  type __wrap_##name parameters;                                                                                                           \
  type __wrap_##name parameters {                                                                                                          \
    return fails(kind, reason) ? (returned) : __real_##name arguments;                                                                     \
  }

ssize_t __real_pread(int fd, void *to, size_t count, off_t offset);
ssize_t __wrap_pread(int fd, void *to, size_t count, off_t offset);
ssize_t __wrap_pread(int fd, void *to, size_t count, off_t offset) {
  if (fails(FAULT_READ, ENXIO) || fails(FAULT_HICCUP, EIO)) return -1;
  return __real_pread(fd, to, armed == FAULT_HICCUP && count > 1 ? count / 2 : count, offset); /* and every read is short */
}
WRAP(FAULT_WRITE, ENOSPC, -1, ssize_t, write, (int fd, const void *from, size_t count), (fd, from, count))
WRAP(FAULT_FSYNC, EIO, -1, int, fsync, (int fd), (fd))
WRAP(FAULT_RENAME, EIO, -1, int, rename, (const char *from, const char *to), (from, to))
WRAP(FAULT_MALLOC, ENOMEM, NULL, void *, malloc, (size_t bytes), (bytes))
WRAP(FAULT_MALLOC, ENOMEM, NULL, void *, calloc, (size_t count, size_t bytes), (count, bytes))
WRAP(FAULT_MALLOC, ENOMEM, NULL, void *, realloc, (void *memory, size_t bytes), (memory, bytes))
WRAP(FAULT_MALLOC, ENOMEM, NULL, void *, aligned_alloc, (size_t alignment, size_t bytes), (alignment, bytes))
WRAP(FAULT_MALLOC, ENOMEM, NULL, char *, strdup, (const char *text), (text))

WRAP(FAULT_MAP, ENOMEM, -1, int, memfd_create, (const char *name, unsigned flags), (name, flags))
WRAP(FAULT_MAP, ENOMEM, MAP_FAILED, void *, mmap, (void *at, size_t bytes, int access, int flags, int fd, off_t offset),
     (at, bytes, access, flags, fd, offset))

int __wrap_asprintf(char **text, const char *format, ...) __attribute__((format(printf, 2, 3)));
int __wrap_asprintf(char **text, const char *format, ...) {
  va_list arguments;
  if (fails(FAULT_MALLOC, ENOMEM)) return -1;
  va_start(arguments, format);
  int length = vasprintf(text, format, arguments);
  va_end(arguments);
  return length;
}

int __real_open(const char *path, int flags, mode_t mode);
int __wrap_open(const char *path, int flags, mode_t mode);
int __wrap_open(const char *path, int flags, mode_t mode) { /* a variadic call passes mode the same way, or nothing that is looked at */
  return fails(FAULT_OPEN, EMFILE) ? -1 : __real_open(path, flags, mode);
}

#define WRAP_MPI(name, parameters, arguments) WRAP(FAULT_COLLECTIVE, 0, MPI_ERR_OTHER, int, name, parameters, arguments)
WRAP_MPI(MPI_Allreduce, (const void *from, void *to, int count, MPI_Datatype type, MPI_Op op, MPI_Comm comm),
         (from, to, count, type, op, comm))
WRAP_MPI(MPI_Bcast, (void *buffer, int count, MPI_Datatype type, int root, MPI_Comm comm), (buffer, count, type, root, comm))
WRAP_MPI(MPI_Ibcast, (void *buffer, int count, MPI_Datatype type, int root, MPI_Comm comm, MPI_Request *request),
         (buffer, count, type, root, comm, request))
WRAP(FAULT_POLL, 0, MPI_ERR_OTHER, int, MPI_Test, (MPI_Request * request, int *flag, MPI_Status *status), (request, flag, status))
WRAP(FAULT_POLL, 0, MPI_ERR_OTHER, int, MPI_Testall, (int count, MPI_Request requests[], int *flag, MPI_Status statuses[]),
     (count, requests, flag, statuses))
WRAP_MPI(MPI_Send, (const void *from, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm), (from, count, type, to, tag, comm))
WRAP_MPI(MPI_Recv, (void *to, int count, MPI_Datatype type, int from, int tag, MPI_Comm comm, MPI_Status *status),
         (to, count, type, from, tag, comm, status))
WRAP_MPI(MPI_Sendrecv,
         (const void *out, int out_count, MPI_Datatype out_type, int to, int out_tag, void *in, int in_count, MPI_Datatype in_type,
          int from, int in_tag, MPI_Comm comm, MPI_Status *status),
         (out, out_count, out_type, to, out_tag, in, in_count, in_type, from, in_tag, comm, status))
WRAP_MPI(MPI_Comm_split, (MPI_Comm comm, int color, int key, MPI_Comm *out), (comm, color, key, out))
WRAP_MPI(MPI_Comm_split_type, (MPI_Comm comm, int type, int key, MPI_Info info, MPI_Comm *out), (comm, type, key, info, out))
WRAP_MPI(MPI_Barrier, (MPI_Comm comm), (comm))
WRAP_MPI(MPI_Comm_dup, (MPI_Comm comm, MPI_Comm *out), (comm, out))
