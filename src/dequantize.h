/* dequantize.h: from a stored block to its weights. */
#ifndef OMNIQUANT_DEQUANTIZE_H
#define OMNIQUANT_DEQUANTIZE_H

#include "checkpoint.h"
#include "model.h"
#include "store.h"

/* out = (code - zero_point) * scale, exact in fp32. */
void dequantize_linear(const struct quantized_linear *linear, float *out /* [out_features, in_features] */);

/* One row of it. */
void dequantize_row(const struct quantized_linear *linear, int64_t row, float *out /* [in_features] */);

/* Whether a stored block has all that the model's blocks have, in its shapes. `where` starts messages. Errors: ERROR_INPUT for a layer that is
 * missing, for what the model has not or has in another shape, for NaN. */
int dequantize_check(const struct block_record *record, const struct model *model, const char *where, struct error *error);

/* Puts a stored block's linear layers, and the tensors that a transformation changed, into an image in which all of these are F32. Errors:
 * those of dequantize_check. */
int dequantize_block(const struct block_record *record, const struct model *model, void *image, const char *where, struct error *error);

/* A stored block as an image of all its tensors: those that were quantized or changed from the store, the others from the checkpoint. */
int dequantize_read_block(struct store *store, const struct checkpoint *checkpoint,
                          const struct model *wide, /* all tensors F32 (model_widen) */
                          int block, void *image, const char *where, struct error *error);

#endif
