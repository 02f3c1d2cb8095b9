/* watch.c: connections, the thread that looks after them, and signals. Rank 0 listens on a port of its own; who connects has to show a
 * random key, which the ranks have from MPI. */
#include "watch.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum {
  MOST_ADDRESSES = 16,
  HOST_BYTES = 64,
  CONNECT_MS = 3000, /* for each address of rank 0 */
  HELLO_SECONDS = 5, /* until a stranger has shown the key */
  IDLE_SECONDS = 10, /* until an idle connection is probed; */
  PROBE_SECONDS = 5, /* probes without an answer that end it: */
  PROBES = 3,        /* a host without power is gone after 25 s */
  HOLD_SECONDS = 30, /* that a peer's death waits for what is held */
  GOES_ON = -1,
  SAME_SIGNAL_MS = 500 /* a launcher and a batch script may both pass one signal on */
};

/* ---- what goes over a connection ---- */

/* One byte, which cannot come in parts: an end in peace; stop for a signal; exit with a status, without a word. */
enum { BYE = 0, STOP = 0x40, END = 0x80 };

struct hello {
  unsigned char key[16];
  uint32_t rank; /* network order */
  char host[HOST_BYTES];
};

/* How to reach rank 0; sent to all ranks by MPI. */
struct meeting_point {
  unsigned char key[16], answer[16];
  in_port_t port; /* network order; 0: rank 0 cannot be reached */
  int addresses;
  in_addr_t address[MOST_ADDRESSES];
  char host[HOST_BYTES];
};

enum peer_state { PEER_NEW, PEER_JOINED, PEER_GONE }; /* gone: in peace */

/* The other end of a connection. */
struct peer {
  int fd;
  enum peer_state state;
  int rank;
  char host[HOST_BYTES];
  time_t since;
  struct hello hello; /* PEER_NEW: as far as it has come */
  size_t received;
};

struct watch {
  int rank, local_rank;
  struct meeting_point point;
  int listener;      /* rank 0, else -1 */
  int wake[2];       /* pipe: signals, and the end of the watch */
  struct peer *peer; /* rank 0: everybody who came; else rank 0 alone. The thread's */
  int peers, capacity;
  pthread_t thread;
  bool running;
  atomic_int last_word; /* of this process: 0 or a status; GOES_ON before */
  atomic_int held;
};

/* A signal handler cannot be given anything. */
static volatile sig_atomic_t stop_signal, wake_fd = -1;
static struct timespec stop_time;

/* ---- the end of this process ---- */

static void end_process(struct watch *watch, int status) {
  for (int i = 0; atomic_load(&watch->held) > 0 && i < HOLD_SECONDS * 20; i++) nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
  _exit(status);
}

/* Not waited for: who cannot take a byte is lost anyway. */
static void tell(const struct peer *peer, int kind, int value) {
  uint8_t message = (uint8_t)(kind | value);
  if (peer->state == PEER_JOINED) send(peer->fd, &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void tell_all(const struct watch *watch, int kind, int value) {
  for (int i = 0; i < watch->peers; i++) tell(&watch->peer[i], kind, value);
}

static void peer_lost(struct watch *watch, const struct peer *peer) {
  /* If rank 0 is lost, nobody speaks for all: one rank a host does, and rank 1 for its own. */
  if (watch->rank <= 1 || watch->local_rank == 0) {
    fprintf(stderr, "omniquant: rank %d on host %s is gone; all ranks end. What is stored is whole: the same command goes on from there\n",
            peer->rank, peer->host);
    fflush(stderr);
  }
  tell_all(watch, END, ERROR_STOPPED);
  end_process(watch, ERROR_STOPPED);
}

/* ---- the thread ---- */

/* Rank 0 tells everybody, others rank 0. */
static void stop_for(const struct watch *watch, int number) {
  if (!stop_signal) stop_signal = number;
  tell_all(watch, STOP, number);
}

static void peer_hear(struct watch *watch, struct peer *peer, uint8_t message) {
  int kind = message & END ? END : message & STOP, value = message & ~kind;
  bool passed_on = watch->rank == 0;
  if (kind == BYE) peer->state = PEER_GONE;
  if (kind == STOP && !stop_signal) {
    stop_signal = value;
    if (passed_on) stop_for(watch, value);
  }
  if (kind != END) return;
  if (passed_on) tell_all(watch, END, value);
  end_process(watch, value);
}

static void peer_drop(struct peer *peer) {
  close(peer->fd);
  peer->fd = -1;
  peer->state = PEER_GONE;
}

/* A stranger's first words. */
static void peer_greet(const struct watch *watch, struct peer *peer) {
  ssize_t got = recv(peer->fd, (char *)&peer->hello + peer->received, sizeof peer->hello - peer->received, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got > 0) peer->received += (size_t)got;
  if (got > 0 && peer->received < sizeof peer->hello) return;
  if (got <= 0 || memcmp(peer->hello.key, watch->point.key, sizeof peer->hello.key) != 0 ||
      send(peer->fd, watch->point.answer, sizeof watch->point.answer, MSG_NOSIGNAL | MSG_DONTWAIT) != sizeof watch->point.answer) {
    peer_drop(peer);
    return;
  }
  peer->rank = (int)ntohl(peer->hello.rank);
  memcpy(peer->host, peer->hello.host, sizeof peer->host);
  peer->host[HOST_BYTES - 1] = 0;
  peer->state = PEER_JOINED;
  if (stop_signal) tell(peer, STOP, stop_signal);
}

static void peer_receive(struct watch *watch, struct peer *peer) {
  uint8_t message;
  if (peer->state == PEER_NEW) {
    peer_greet(watch, peer);
    return;
  }
  ssize_t got = recv(peer->fd, &message, sizeof message, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got == (ssize_t)sizeof message)
    peer_hear(watch, peer, message);
  else
    peer_lost(watch, peer);
  if (peer->state == PEER_GONE) peer_drop(peer);
}

static void keep_alive(int fd) {
  const int on = 1, idle = IDLE_SECONDS, probe = PROBE_SECONDS, probes = PROBES;
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &probe, sizeof probe);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static bool peers_grow(struct watch *watch) {
  if (watch->peers < watch->capacity) return true;
  int capacity = watch->capacity ? 2 * watch->capacity : 16;
  struct peer *grown = realloc(watch->peer, (size_t)capacity * sizeof *grown);
  if (!grown) return false;
  watch->peer = grown;
  watch->capacity = capacity;
  return true;
}

static void peer_accept(struct watch *watch) {
  int fd = accept4(watch->listener, NULL, NULL, SOCK_CLOEXEC);
  if (fd < 0) return;
  if (!peers_grow(watch)) {
    close(fd);
    return;
  }
  keep_alive(fd);
  watch->peer[watch->peers++] = (struct peer){.fd = fd, .state = PEER_NEW, .since = time(NULL)};
}

/* Strangers who do not speak go again. */
static void strangers_drop(struct watch *watch) {
  for (int i = 0; i < watch->peers; i++)
    if (watch->peer[i].state == PEER_NEW && time(NULL) - watch->peer[i].since > HELLO_SECONDS) peer_drop(&watch->peer[i]);
  int kept = 0;
  for (int i = 0; i < watch->peers; i++)
    if (watch->peer[i].state != PEER_GONE) watch->peer[kept++] = watch->peer[i];
  watch->peers = kept;
}

/* A signal is to be passed on, or this is only to wake up. */
static void woken(const struct watch *watch) {
  unsigned char number = 0;
  if (read(watch->wake[0], &number, 1) == 1 && number > 0) stop_for(watch, number);
}

/* Waits for anything to happen and deals with it. */
static void watch_round(struct watch *watch) {
  int peers = watch->peers;
  struct pollfd *polled = calloc((size_t)peers + 2, sizeof *polled);
  if (!polled) { /* no memory for the moment */
    nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
    return;
  }
  for (int i = 0; i < peers; i++) polled[i] = (struct pollfd){.fd = watch->peer[i].fd, .events = POLLIN};
  polled[peers] = (struct pollfd){.fd = watch->wake[0], .events = POLLIN};
  polled[peers + 1] = (struct pollfd){.fd = watch->listener, .events = POLLIN};
  if (poll(polled, (nfds_t)peers + 2, HELLO_SECONDS * 1000) > 0) {
    for (int i = 0; i < peers; i++)
      if (polled[i].revents) peer_receive(watch, &watch->peer[i]);
    if (polled[peers].revents) woken(watch);
    if (polled[peers + 1].revents) peer_accept(watch);
  }
  free(polled);
  if (watch->rank == 0) strangers_drop(watch);
}

static void *watch_main(void *argument) {
  struct watch *watch = argument;
  while (atomic_load(&watch->last_word) == GOES_ON) watch_round(watch);
  int status = atomic_load(&watch->last_word);
  tell_all(watch, status ? END : BYE, status);
  return NULL;
}

/* ---- meeting ---- */

static void list_addresses(struct meeting_point *point) {
  struct ifaddrs *all = NULL;
  if (getifaddrs(&all) != 0) return;
  for (int loopback = 0; loopback < 2; loopback++) /* those that other hosts may reach come first */
    for (const struct ifaddrs *at = all; at && point->addresses < MOST_ADDRESSES; at = at->ifa_next) {
      bool usable = at->ifa_addr && at->ifa_addr->sa_family == AF_INET && (at->ifa_flags & IFF_UP);
      if (!usable || (at->ifa_flags & IFF_LOOPBACK ? 1 : 0) != loopback) continue;
      point->address[point->addresses++] = ((const struct sockaddr_in *)(const void *)at->ifa_addr)->sin_addr.s_addr;
    }
  freeifaddrs(all);
}

/* Rank 0 needs a descriptor for every rank. */
static void raise_descriptor_limit(int size) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= (rlim_t)size + 512) return;
  limit.rlim_cur = limit.rlim_max < (rlim_t)size + 512 ? limit.rlim_max : (rlim_t)size + 512;
  setrlimit(RLIMIT_NOFILE, &limit);
}

/* Where rank 0 can be met; without a port if it cannot. */
static void meeting_open(struct watch *watch, int size) {
  struct meeting_point *point = &watch->point;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY)};
  socklen_t length = sizeof address;
  raise_descriptor_limit(size);
  gethostname(point->host, sizeof point->host - 1);
  list_addresses(point);
  watch->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (watch->listener < 0 || getrandom(point->key, sizeof point->key, 0) != sizeof point->key ||
      getrandom(point->answer, sizeof point->answer, 0) != sizeof point->answer ||
      bind(watch->listener, (struct sockaddr *)&address, length) != 0 || listen(watch->listener, SOMAXCONN) != 0 ||
      getsockname(watch->listener, (struct sockaddr *)&address, &length) != 0)
    return;
  point->port = address.sin_port;
}

static bool wait_for(int fd, short events) {
  struct pollfd polled = {.fd = fd, .events = events};
  return poll(&polled, 1, CONNECT_MS) == 1;
}

/* Rank 0 over one of its addresses, which may be another host's: it has to know the answer. */
static bool peer_connect(struct watch *watch, in_addr_t to) {
  const struct meeting_point *point = &watch->point;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = to, .sin_port = point->port};
  struct hello hello = {.rank = htonl((uint32_t)watch->rank)};
  unsigned char answer[sizeof point->answer];
  int failed = 0;
  socklen_t length = sizeof failed;
  memcpy(hello.key, point->key, sizeof hello.key);
  gethostname(hello.host, sizeof hello.host - 1);
  int fd = peers_grow(watch) ? socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0) : -1;
  if (fd < 0) return false;
  bool joined = (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 || errno == EINPROGRESS) && wait_for(fd, POLLOUT) &&
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &length) == 0 && !failed &&
                send(fd, &hello, sizeof hello, MSG_NOSIGNAL) == (ssize_t)sizeof hello && wait_for(fd, POLLIN) &&
                recv(fd, answer, sizeof answer, MSG_WAITALL) == (ssize_t)sizeof answer && memcmp(answer, point->answer, sizeof answer) == 0;
  if (!joined) {
    close(fd);
    return false;
  }
  keep_alive(fd);
  struct peer *peer = &watch->peer[watch->peers++];
  *peer = (struct peer){.fd = fd, .state = PEER_JOINED};
  memcpy(peer->host, point->host, sizeof peer->host);
  return true;
}

static bool thread_start(struct watch *watch) {
  sigset_t all, before; /* signals are for the main thread: what they interrupt here would be a wait */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  watch->running = pthread_create(&watch->thread, NULL, watch_main, watch) == 0;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return watch->running;
}

/* Rank 0's thread has to accept while the others connect; theirs start once they are. */
static bool meet(struct watch *watch) {
  if (watch->rank == 0) return watch->point.port && thread_start(watch);
  bool joined = false;
  for (int i = 0; i < watch->point.addresses && watch->point.port && !joined; i++) joined = peer_connect(watch, watch->point.address[i]);
  return joined && thread_start(watch);
}

/* The others wait in a collective that failed here. */
static void give_up(MPI_Comm communicator, int rank) {
  fprintf(stderr, "omniquant: rank %d: MPI failed before the ranks could watch each other\n", rank);
  fflush(stderr);
  MPI_Abort(communicator, ERROR_WORK);
}

void watch_open(MPI_Comm communicator, int rank, int size, int local_rank, struct watch **watch) {
  struct watch *w = *watch = calloc(1, sizeof *w);
  struct meeting_point nowhere = {0}, *point = w ? &w->point : &nowhere;
  if (w) *w = (struct watch){.rank = rank, .local_rank = local_rank, .listener = -1, .wake = {-1, -1}, .last_word = GOES_ON};
  bool able = w && pipe2(w->wake, O_CLOEXEC | O_NONBLOCK) == 0;
  if (able && rank == 0) meeting_open(w, size);
  int mine, all = 0;
  if (MPI_Bcast(point, sizeof *point, MPI_BYTE, 0, communicator) != MPI_SUCCESS) give_up(communicator, rank);
  mine = able && meet(w);
  if (MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, communicator) != MPI_SUCCESS) give_up(communicator, rank);
  if (all) return;
  if (rank == 0)
    fprintf(stderr, "not all ranks can reach rank 0 on %s over TCP: if a rank dies, only the launcher can notice\n", point->host);
  watch_close(w);
  *watch = NULL;
}

/* Ends the thread with a last word: 0 or a status. It looks for it every few seconds, or at once when woken. */
static void thread_end(struct watch *watch, int status) {
  char wake = 0;
  if (!watch->running) return;
  wake_fd = -1;
  atomic_store(&watch->last_word, status);
  if (write(watch->wake[1], &wake, 1) < 0) wake = 0; /* full: it is awake */
  pthread_join(watch->thread, NULL);
  watch->running = false;
}

void watch_close(struct watch *watch) {
  if (!watch) return;
  thread_end(watch, 0);
  for (int i = 0; i < watch->peers; i++)
    if (watch->peer[i].fd >= 0) close(watch->peer[i].fd);
  for (int i = 0; i < 2; i++)
    if (watch->wake[i] >= 0) close(watch->wake[i]);
  if (watch->listener >= 0) close(watch->listener);
  free(watch->peer);
  free(watch);
}

void watch_hold(struct watch *watch) {
  if (watch) atomic_fetch_add(&watch->held, 1);
}

void watch_release(struct watch *watch) {
  if (watch) atomic_fetch_sub(&watch->held, 1);
}

void watch_end_others(struct watch *watch, int status) {
  static pthread_mutex_t first =
      PTHREAD_MUTEX_INITIALIZER; /* never given back: a thread that fails meanwhile waits for the end of the process */
  pthread_mutex_lock(&first);
  if (watch) thread_end(watch, status);
}

/* ---- signals ---- */

static void on_signal(int number) {
  struct timespec time;
  int reason = errno;
  clock_gettime(CLOCK_MONOTONIC, &time);
  int64_t since_ms = (time.tv_sec - stop_time.tv_sec) * 1000 + (time.tv_nsec - stop_time.tv_nsec) / 1000000;
  if (stop_time.tv_sec && since_ms > SAME_SIGNAL_MS) {
    signal(number, SIG_DFL);
    raise(number);
  } else if (!stop_time.tv_sec) {
    char word = (char)number;
    stop_time = time;
    if (!stop_signal) stop_signal = number;
    if (wake_fd >= 0 && write((int)wake_fd, &word, 1) < 0) word = 0; /* full: it is awake */
  }
  errno = reason;
}

void watch_catch_signals(struct watch *watch) {
  static const int numbers[] = {SIGTERM, SIGINT, SIGUSR1};
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  if (watch) wake_fd = watch->wake[1];
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) sigaction(numbers[i], &action, NULL);
}

int watch_stop_signal(void) {
  return stop_signal;
}
