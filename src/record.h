/* record.h: what calibration leaves of a block, as the store takes it. */
#ifndef OMNIQUANT_RECORD_H
#define OMNIQUANT_RECORD_H

#include "learn.h"
#include "store.h"

/* Where codes stand on their way from the device, some rows of a layer at a time. */
struct record_room {
  struct kernels *k;
  int64_t panel;   /* weights at a time; may be lowered */
  uint8_t *device; /* codes, zero points and scales */
  uint8_t *host;   /* memory that the device copies to at its full speed */
};

/* Errors: ERROR_WORK (memory); record_room_free even then. */
int record_room_init(struct record_room *room, const struct learner *learner, struct error *error);
void record_room_free(struct record_room *room);

/* Makes the record of the block that learner_run has just ended: packed codes under the checkpoint's names, what LET folded into tensors
 * that stay unquantized, and what was learned. Errors: ERROR_WORK (memory); block_record_free even then. */
int record_block(struct block_record *record, const struct record_room *room, const struct learner *learner, int index,
                 const struct outcome *outcome, struct error *error);

/* Puts into the record what timing_gather has gathered. Errors: ERROR_WORK (memory). */
int record_timing(struct block_record *record, const float *rank_seconds, double seconds, struct error *error);

/* Bytes that a block's file takes, a few per cent at most too many: for who has to know before. */
int64_t record_bytes(const struct model *model, const struct recipe *recipe);

/* "rtn", "start", "end" */
const char *record_kept_name(enum kept kept);

#endif
