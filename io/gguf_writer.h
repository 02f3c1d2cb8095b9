/* gguf_writer.h: the container GGUF, version 3: keys, then descriptions of tensors, then their data, each at a multiple of 32 bytes. Keys are
 * set and tensors announced first; data may be written in any order. */
#ifndef OMNIQUANT_GGUF_WRITER_H
#define OMNIQUANT_GGUF_WRITER_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "export_folder.h"

/* ggml's numbers. */
enum gguf_type { GGUF_F32 = 0, GGUF_F16 = 1, GGUF_Q4_0 = 2, GGUF_Q4_1 = 3, GGUF_Q5_0 = 6, GGUF_Q5_1 = 7, GGUF_Q8_0 = 8 };
enum { GGUF_BLOCK = 32 }; /* elements of a block of the quantized types, and the alignment of data */

struct gguf_writer;

/* NULL without memory. */
struct gguf_writer *gguf_writer_open(void);

/* Keys. Without memory they fail when the file begins. */
void gguf_u32(struct gguf_writer *writer, const char *key, uint32_t value);
void gguf_f32(struct gguf_writer *writer, const char *key, float value);
void gguf_bool(struct gguf_writer *writer, const char *key, bool value);
void gguf_text(struct gguf_writer *writer, const char *key, const char *value);

/* Arrays: announced with their length, and then filled. */
void gguf_texts(struct gguf_writer *writer, const char *key, uint64_t count);
void gguf_add_text(struct gguf_writer *writer, const char *value, size_t length);
void gguf_f32s(struct gguf_writer *writer, const char *key, const float *values, uint64_t count);
void gguf_i32s(struct gguf_writer *writer, const char *key, const int32_t *values, uint64_t count);

/* Bytes of a row of that type; columns are a multiple of GGUF_BLOCK for quantized types. */
int64_t gguf_row_bytes(enum gguf_type type, int64_t columns);

/* Sizes fastest first, as the file has them. ERROR_WORK without memory. */
int gguf_writer_announce(struct gguf_writer *writer, const char *name, enum gguf_type type, int dimensions, const int64_t *sizes,
                         struct error *error);

/* Makes the file and writes all but the data. The folder must live until the end. */
int gguf_writer_begin(struct gguf_writer *writer, const struct export_folder *folder, const char *name, struct error *error);

/* Writes bytes [offset, offset + count) of a tensor. */
int gguf_writer_write(struct gguf_writer *writer, const char *name, int64_t offset, const void *bytes, size_t count, struct error *error);

/* Syncs; as many bytes as announced must have been written of each. */
int gguf_writer_finish(struct gguf_writer *writer, struct error *error);

/* NULL is allowed. */
void gguf_writer_close(struct gguf_writer *writer);

#endif
