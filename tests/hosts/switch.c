/* switch.c: an Ethernet switch in user space. Every port is a TAP device on a full-duplex link of a given rate, and a frame takes a given time from one
 * device to another: what tc's netem does on kernels that have it. Frames may be the kernel's large ones (64 KiB, not yet cut into segments).
 *
 * Usage: switch BITS_A_SECOND SECONDS DEVICE...   makes the devices, prints a line when they are there, and goes on until it is killed.
 * The device in place i (from 1) has the address 02:00:00:00:00:i. A BITS_A_SECOND of 0 is as fast as it goes. */
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if_arp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum {
  MOST_PORTS = 64,
  FRAME_BYTES = 1 << 17,       /* more than the kernel's largest */
  ETHERNET_BYTES = 14,         /* of a frame's own header */
  GAP_BYTES = 24,              /* that a link is busy beside a frame: preamble, checksum, gap */
  MOST_QUEUED_BYTES = 64 << 20 /* of one port; then it is left to the kernel's queue */
};

struct frame {
  struct frame *next;
  double due; /* seconds of the clock when it is whole at the other end */
  size_t bytes;
  unsigned char data[]; /* virtio header and frame */
};

struct port {
  int fd;
  double up_free, down_free;   /* when its link is free again */
  struct frame *first, **last; /* what comes down to it, in the order of `due` */
  size_t queued_bytes;
};

static struct port port[MOST_PORTS];
static int ports;
static double rate, delay; /* bytes a second, seconds */

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void fail(const char *what) {
  fprintf(stderr, "switch: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void port_open(int index, const char *name) {
  struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
  struct port *p = &port[index];
  strncpy(request.ifr_name, name, sizeof request.ifr_name - 1);
  p->last = &p->first;
  p->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (p->fd < 0 || ioctl(p->fd, TUNSETIFF, &request) != 0) fail(name);
  if (ioctl(p->fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) != 0) fail("TUNSETOFFLOAD");
  request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
  const char address[6] = {2, 0, 0, 0, 0, (char)(index + 1)};
  memcpy(request.ifr_hwaddr.sa_data, address, sizeof address);
  if (ioctl(p->fd, SIOCSIFHWADDR, &request) != 0) fail("SIOCSIFHWADDR");
}

/* What a frame is on the link: a large one as the segments that an adapter would make of it, each with its headers. */
static double wire_bytes(const struct virtio_net_hdr *header, size_t frame_bytes) {
  size_t segments = 1;
  if (header->gso_type != VIRTIO_NET_HDR_GSO_NONE && header->gso_size && frame_bytes > header->hdr_len)
    segments = (frame_bytes - header->hdr_len + header->gso_size - 1) / header->gso_size;
  return (double)(frame_bytes + (segments - 1) * header->hdr_len + segments * GAP_BYTES);
}

/* Cut through: on an idle link to the receiver the frame is whole there `delay` after it has left the sender's. */
static void frame_deliver(struct port *to, const struct frame *frame, double left, double seconds) {
  struct frame *copy = malloc(sizeof *copy + frame->bytes);
  if (!copy) return; /* lost, as on a real one */
  memcpy(copy->data, frame->data, frame->bytes);
  copy->bytes = frame->bytes;
  copy->next = NULL;
  copy->due = left + delay > to->down_free + seconds ? left + delay : to->down_free + seconds;
  to->down_free = copy->due;
  to->queued_bytes += copy->bytes;
  *to->last = copy;
  to->last = &copy->next;
}

/* Whether a frame came. */
static bool port_receive(struct port *from) {
  static union {
    struct frame frame;
    char room[sizeof(struct frame) + FRAME_BYTES];
  } in;
  ssize_t got = read(from->fd, in.frame.data, FRAME_BYTES);
  if (got < (ssize_t)(sizeof(struct virtio_net_hdr) + ETHERNET_BYTES)) return false;
  struct virtio_net_hdr header;
  memcpy(&header, in.frame.data, sizeof header);
  in.frame.bytes = (size_t)got;
  double seconds = rate > 0 ? wire_bytes(&header, in.frame.bytes - sizeof header) / rate : 0, begin = now();
  if (from->up_free > begin) begin = from->up_free;
  from->up_free = begin + seconds;
  const unsigned char *address = in.frame.data + sizeof header;
  for (int i = 0; i < ports; i++) {
    bool everybody = address[0] & 1, is_it = address[0] == 2 && address[5] == i + 1;
    if (&port[i] != from && (everybody || is_it)) frame_deliver(&port[i], &in.frame, from->up_free, seconds);
  }
  return true;
}

/* Hands over what is due; when the next one is. A device that is down takes nothing: its frames are lost. */
static double port_send(struct port *to) {
  while (to->first && to->first->due <= now()) {
    struct frame *frame = to->first;
    if (write(to->fd, frame->data, frame->bytes) < 0 && errno == EAGAIN) return now() + 1e-4;
    to->first = frame->next;
    if (!to->first) to->last = &to->first;
    to->queued_bytes -= frame->bytes;
    free(frame);
  }
  return to->first ? to->first->due : now() + 1;
}

static bool any_full(void) {
  for (int i = 0; i < ports; i++)
    if (port[i].queued_bytes > MOST_QUEUED_BYTES) return true;
  return false;
}

static void switch_round(void) {
  struct pollfd polled[MOST_PORTS];
  double next = now() + 1;
  for (int i = 0; i < ports; i++) {
    double due = port_send(&port[i]);
    if (due < next) next = due;
  }
  double left = next - now();
  if (left < 0) left = 0;
  for (int i = 0; i < ports; i++) polled[i] = (struct pollfd){.fd = port[i].fd, .events = any_full() ? 0 : POLLIN};
  struct timespec wait = {.tv_sec = (time_t)left, .tv_nsec = (long)((left - (double)(time_t)left) * 1e9)};
  if (ppoll(polled, (nfds_t)ports, &wait, NULL) <= 0) return;
  for (int i = 0; i < ports; i++)
    for (int frames = 0; polled[i].revents & POLLIN && frames < 8 && port_receive(&port[i]); frames++) port_send(&port[i]);
}

int main(int argc, char **argv) {
  if (argc < 4 || argc - 3 > MOST_PORTS) {
    fprintf(stderr, "usage: switch BITS_A_SECOND SECONDS DEVICE...\n");
    return 2;
  }
  rate = atof(argv[1]) / 8;
  delay = atof(argv[2]);
  ports = argc - 3;
  for (int i = 0; i < ports; i++) port_open(i, argv[3 + i]);
  prctl(PR_SET_TIMERSLACK, 1); /* ns: a delay is not to be longer than asked for */
  puts("ready");
  fflush(stdout);
  for (;;) switch_round();
}
