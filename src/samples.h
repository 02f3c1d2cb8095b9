/* samples.h: a rank's hidden states, one [T, hidden] a sample: in the device's memory, or where that has no room for them in pinned host memory, of
 * which the device then holds two samples: the one in work, and the next, which is copied beside the work. Samples are taken in the order of their
 * numbers and from the first again, so that the next is known; another order costs waiting. What was written goes back the same way. */
#ifndef OMNIQUANT_SAMPLES_H
#define OMNIQUANT_SAMPLES_H

#include "kernels.h"

/* A sample's place on the device, where samples live on the host. */
struct sample_window {
  struct lane *lane; /* its copies */
  data *at;
  int sample;   /* that it holds, or that is on its way; -1: none */
  bool changed; /* since it came: it has to go back */
};

struct samples {
  struct kernels *k;
  int count;
  int64_t elements; /* of a sample: T * hidden */
  int rank;         /* for messages */
  data *all;        /* device memory, [count, elements], where it is not the host's each at a multiple of 256 bytes; NULL: on the host */
  char *host;       /* the same, pinned; NULL: on the device */
  struct sample_window window[2];
  int latest; /* the window that was taken */
};

/* Takes the windows' memory, so that what is allocated up to samples_place cannot leave them without. Errors: ERROR_WORK (memory); samples_free even
 * then. `k` must outlive it. */
int samples_init(struct samples *samples, struct kernels *k, int count, int64_t elements, int rank, struct error *error);

/* Takes the samples' memory: the device's while that keeps what k->room holds back, else the host's. For when all else has been allocated. Values are
 * to be written. Errors: ERROR_WORK (memory). */
int samples_place(struct samples *samples, struct error *error);
void samples_free(struct samples *samples);

/* A sample in device memory, for work that is asked for until another sample is taken: to be read, to be written whole, or to be read and changed. */
data *samples_read(struct samples *samples, int sample);
data *samples_write(struct samples *samples, int sample);
data *samples_change(struct samples *samples, int sample);

/* All of them, of as many. */
void samples_copy(struct samples *to, struct samples *from);

#endif
