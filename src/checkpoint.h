/* checkpoint.h: rank 0's reading of a model folder: block images, embedded tokens, and the pieces of the head. Only the tensors in use are
 * touched, and their pages are given back, so that memory does not grow with the model. */
#ifndef OMNIQUANT_CHECKPOINT_H
#define OMNIQUANT_CHECKPOINT_H

#include <stdint.h>

#include "error.h"
#include "model.h"
#include "safetensors.h"

struct checkpoint;

/* Opens config.json and the safetensors of a folder, and checks every tensor that the model needs: there, of the right shape, and of type
 * F32, F16 or BF16. Errors: ERROR_INPUT; *checkpoint is NULL. */
int checkpoint_open(const char *folder, struct model *model, /* receives what the checkpoint is */
                    struct checkpoint **checkpoint, struct error *error);

/* What a folder holds by config.json and, where its safetensors are there, by their headers; without them every tensor is taken to have the
 * type that config.json names (torch_dtype), F32 if it names none. Errors: as checkpoint_open. */
int checkpoint_describe(const char *folder, struct model *model, bool *headers, /* receives whether safetensors are there */
                        struct error *error);

/* Elements of the tensors outside the blocks; a head that is the embedding is counted once. */
int64_t checkpoint_outside_elements(const struct model *model);

/* config.json as it stands; owned by the checkpoint. */
const char *checkpoint_config(const struct checkpoint *checkpoint);

/* SHA-256 over every tensor's name, type and shape and some pieces of its values, in hexadecimal: tells one model's weights from another's
 * without reading them all. Errors: ERROR_WORK. */
int checkpoint_sha256(const struct checkpoint *checkpoint, char hex[65], struct error *error);

/* The file's tensor that tensor `index` of a block is, or is a part of. Owned by the checkpoint, as are those below. */
const struct tensor *checkpoint_block_tensor(const struct checkpoint *checkpoint, int block, int index);

/* The tensors outside the blocks that the model has, number 0, 1, ... in the model's order; NULL behind the last. */
const struct tensor *checkpoint_outside_tensor(const struct checkpoint *checkpoint, int number,
                                               const char **name); /* receives its full name: a file may lack the beginning */

/* Makes the image of a block: its tensors at model->tensor[i].image_offset in the types that `model` says (that of checkpoint_open, or
 * wider). Errors: ERROR_INPUT for a value that is not finite. Other threads may read other things meanwhile. */
int checkpoint_read_block(const struct checkpoint *checkpoint, const struct model *model, int block, void *image, struct error *error);

/* Sleeps as OMNIQUANT_TEST_READ_SECONDS asks for, for tests of what takes long; else nothing. */
void checkpoint_test_delay(const struct checkpoint *checkpoint);

/* One tensor of that image. */
int checkpoint_read_tensor(const struct checkpoint *checkpoint, const struct model *model, int block, int index, void *image,
                           struct error *error);

/* Tokens 0 .. count - 1 of a sample as the first block's input: embedding, projected and with positions in families that have these. */
int checkpoint_embed(const struct checkpoint *checkpoint, const int32_t *ids, int64_t count, float *out, /* [count, hidden] */
                     struct error *error);

/* What stands behind the last block, as fp32; a function of what the model has not must not be called. Of the final norm the weight, [hidden],
 * and the bias of a LayerNorm, [hidden]; the projection, [embedding, hidden]; rows [first, first + count) of the head, [count, embedding]. */
int checkpoint_read_final_norm(const struct checkpoint *checkpoint, float *out, struct error *error);
int checkpoint_read_final_norm_bias(const struct checkpoint *checkpoint, float *out, struct error *error);
int checkpoint_read_project_out(const struct checkpoint *checkpoint, float *out, struct error *error);
int checkpoint_read_head(const struct checkpoint *checkpoint, int64_t first, int64_t count, float *out, struct error *error);

/* NULL is allowed. */
void checkpoint_close(struct checkpoint *checkpoint);

#endif
