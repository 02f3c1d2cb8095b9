/* safetensors_writer.h: tensors as safetensors files: model.safetensors, or shards and model.safetensors.index.json. All tensors are announced
 * first, since the headers come before the data; then each is written, in the same order, in as many pieces as the caller likes. */
#ifndef OMNIQUANT_SAFETENSORS_WRITER_H
#define OMNIQUANT_SAFETENSORS_WRITER_H

#include <stdint.h>

#include "error.h"
#include "export_folder.h"

struct safetensors_writer;

/* A shard holds at most shard_bytes of data, or one tensor. ERROR_WORK without memory. */
int safetensors_writer_open(int64_t shard_bytes, struct safetensors_writer **writer, struct error *error);

int safetensors_writer_announce(struct safetensors_writer *writer, const char *name,
                                const char *dtype, /* "F16", "BF16", "F32", "I32", "I64" or "I8"; kept, not copied */
                                int dimensions, const int64_t *shape, struct error *error);

/* Lays out the shards and writes their headers and the index. The folder must live until the end. */
int safetensors_writer_begin(struct safetensors_writer *writer, const struct export_folder *folder, struct error *error);

/* The next piece of data; `name` is that of the tensor that it belongs to, which is checked, as is that it fits. */
int safetensors_writer_write(struct safetensors_writer *writer, const char *name, const void *bytes, size_t count, struct error *error);

/* Syncs; all must have been written. */
int safetensors_writer_finish(struct safetensors_writer *writer, struct error *error);

/* NULL is allowed. */
void safetensors_writer_close(struct safetensors_writer *writer);

#endif
