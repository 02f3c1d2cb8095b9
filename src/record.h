/* record.h: what calibration leaves of a block, as the store takes it. */
#ifndef OMNIQUANT_RECORD_H
#define OMNIQUANT_RECORD_H

#include "learn.h"
#include "store.h"

/* Where a quantized tensor of the checkpoint stands in what the device fills: bytes from the beginning. */
struct record_place {
  size_t codes, zero_point, scale;
  size_t factor[2]; /* gamma and beta, or f_hi and f_lo; where they are learned */
};

/* All that a block's record points to, for one block after the other. Memory of the device, and on the host as much that the device copies to at its
 * full speed; where the device's memory is the host's, that is one. */
struct record_room {
  struct kernels *k;
  struct lane *lane;      /* of the copy; NULL: there is none */
  int64_t panel;          /* weights that are quantized at a time; may be lowered */
  uint8_t *device, *host; /* [bytes] */
  uint8_t *own;           /* [own_bytes] */
  size_t bytes, own_bytes;
  struct record_place weight[MODEL_MAX_TENSORS]; /* of the first of the tensors that are parts of one */
  size_t let;
  size_t folded[MODEL_MAX_TENSORS], losses, timing; /* in `own` */
};

/* Errors: ERROR_WORK (memory); record_room_free even then. */
int record_room_init(struct record_room *room, const struct learner *learner, struct error *error);
void record_room_free(struct record_room *room); /* waits for a copy; {0} is allowed */

/* Asks the device for a block's codes, and what they were learned with, in the room. */
void record_pack(const struct record_room *room, const struct learner *learner, struct learned learned);

/* Makes the record of the block that learner_run has just ended: packed codes under the checkpoint's names, what LET folded into tensors
 * that stay unquantized, and what was learned. It points into the room, and what it points to is there after record_wait: until the record is done
 * with, no other is made. Errors: ERROR_WORK (memory); block_record_free even then. */
int record_block(struct block_record *record, const struct record_room *room, const struct learner *learner, int index,
                 const struct outcome *outcome, struct error *error);

/* Puts into the record what timing_gather has gathered. */
void record_timing(struct block_record *record, const struct record_room *room, const float *rank_seconds, double seconds);

/* Waits until the room holds what was asked for. Any thread may. Errors: ERROR_WORK: the device failed. */
int record_wait(const struct record_room *room, struct error *error);

/* Bytes that a block's file takes, a few per cent at most too many: for who has to know before. */
int64_t record_bytes(const struct model *model, const struct recipe *recipe);

/* "rtn", "start", "end" */
const char *record_kept_name(enum kept kept);

#endif
