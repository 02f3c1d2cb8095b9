/* cuda_dry.h: a device of the emulation (cuda_emulation.h) that computes nothing: memory is counted, and every launch, copy and product is looked at as
 * CUDA and cuBLASLt would, so that models can be run whose blocks no machine at hand could hold. What comes back from it is zero. */
#ifndef OMNIQUANT_CUDA_DRY_H
#define OMNIQUANT_CUDA_DRY_H

#include <stddef.h>

struct dry_device {
  int major, minor;    /* compute capability */
  size_t shared_bytes; /* that a block may have */

  size_t taken, peak; /* bytes of memory as they were asked for */
  size_t paged_taken; /* the same in pages of 2 MiB, */
  size_t paged_peak;  /* which is the most that a card takes for it */
  unsigned long launches, products;
  unsigned long empty;     /* launches of no block */
  unsigned long unaligned; /* operations that could have moved 16 bytes at a time, but for where their memory lies */
  char failure[256];       /* the first thing that is beyond the device, or wrong; "": nothing */
};

/* From now on this one is the emulated device, until it is another; NULL: the one that computes. No memory may be left when it changes. The caller sets
 * the fields above the blank line and the rest to zero. */
void emulation_use(struct dry_device *device);

#endif
