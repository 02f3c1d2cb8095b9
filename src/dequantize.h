/* dequantize.h: from stored codes to weights. */
#ifndef OMNIQUANT_DEQUANTIZE_H
#define OMNIQUANT_DEQUANTIZE_H

#include "model.h"
#include "store.h"

/* out = (code - zero_point) * scale, exact in fp32. */
void dequantize_linear(const struct quantized_linear *linear, float *out /* [out_features, in_features] */);

/* Puts a stored block's weights into an image whose linear weights are F32. `where` starts messages.
 * Errors: ERROR_INPUT for a layer that is missing or of another shape than the model's. */
int dequantize_block(const struct block_record *record, const struct model *model, void *image, const char *where, struct error *error);

#endif
