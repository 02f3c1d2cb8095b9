/* safetensors.h: a checkpoint folder (model.safetensors, or shards behind model.safetensors.index.json). Opening it reads the headers alone. */
#ifndef OMNIQUANT_SAFETENSORS_H
#define OMNIQUANT_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "error.h"

enum { TENSOR_MAX_DIMENSIONS = 8 };

struct tensor {
  const char *name;                     /* as in the file, owned by the checkpoint */
  const char *path;                     /* file that holds it, for messages, owned by the checkpoint */
  enum dtype dtype;                     /* DTYPE_OTHER for integers, F64 and so on: listed, never read */
  int dimensions;                       /* 0 .. TENSOR_MAX_DIMENSIONS */
  int64_t shape[TENSOR_MAX_DIMENSIONS]; /* row-major, slowest first */
  size_t bytes;                         /* of its values */
  size_t offset;                        /* of these in the file */
  const struct input_file *file;        /* owned by the checkpoint */
};

struct input_file;

struct safetensors; /* an open checkpoint */

/* Opens every file of the checkpoint (model.safetensors if there is one, else the shards of the index) and checks its header: length against
 * the file's size, JSON, dtypes, shapes against offsets, overlaps, holes, and names that appear twice. Shard names must be plain file names
 * inside the folder. On failure *checkpoint is NULL and the error (ERROR_INPUT) names the file, the tensor and the mend. */
int safetensors_open(const char *folder,              /* with model.safetensors or model.safetensors.index.json */
                     struct safetensors **checkpoint, /* receives the checkpoint, freed by safetensors_close */
                     struct error *error) __attribute__((nonnull));

/* The same for one file, whatever its name. */
int safetensors_open_file(const char *path, struct safetensors **checkpoint, struct error *error);

/* The tensor of that name, or NULL. Owned by the checkpoint. */
const struct tensor *safetensors_find(const struct safetensors *checkpoint, const char *name);

/* Number of tensors, and the i-th of them in order of name. */
size_t safetensors_count(const struct safetensors *checkpoint);
const struct tensor *safetensors_at(const struct safetensors *checkpoint, size_t i);

/* Reads bytes [offset, offset + bytes) of a tensor's values, which must be inside of it. Any thread. Errors: those of input_read (file.h). */
int safetensors_read(const struct tensor *tensor, size_t offset, size_t bytes, void *to, struct error *error);

/* Closes and frees; NULL is allowed. */
void safetensors_close(struct safetensors *checkpoint);

#endif
