/* export_format.c: the table of formats, and what they share. */
#include "export_format.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "export_gguf.h"
#include "export_safetensors.h"

#define FOLDER_FORMAT                                                                                                                      \
  export_folder_format_announce, export_folder_format_begin, export_folder_format_write, export_folder_format_finish,                      \
      export_folder_format_close

const struct export_format export_formats[] = {
    {"gptq", export_gptq_open, FOLDER_FORMAT},
    {"compressed-tensors", export_compressed_tensors_open, FOLDER_FORMAT},
    {"gguf", export_gguf_open, export_gguf_announce, export_gguf_begin, export_gguf_write, export_gguf_finish, export_gguf_close},
    {"hf", export_hf_open, FOLDER_FORMAT},
    {0},
};

static float to_float(enum dtype dtype, const uint8_t *bytes) {
  float value;
  uint16_t bits;
  if (dtype == DTYPE_F32) {
    memcpy(&value, bytes, 4);
    return value;
  }
  memcpy(&bits, bytes, 2);
  return dtype == DTYPE_F16 ? half_to_float(bits) : bf16_to_float(bits);
}

int export_values(const struct export_tensor *tensor, int64_t first, int64_t count, float *out, struct error *error) {
  enum { PIECE = 4096 };
  uint8_t piece[PIECE * sizeof(float)];
  const struct tensor *source = tensor->source;
  size_t size = dtype_size(source->dtype);
  bool finite = true;
  for (int64_t done = 0; done < count; done += PIECE) {
    int64_t left = count - done, length = left < PIECE ? left : PIECE;
    if (!tensor->values && safetensors_read(source, (size_t)(first + done) * size, (size_t)length * size, piece, error)) return error->code;
    for (int64_t i = 0; i < length; i++) {
      float value = tensor->values ? tensor->values[first + done + i] : to_float(source->dtype, piece + (size_t)i * size);
      out[done + i] = value;
      finite = finite && isfinite(value);
    }
  }
  if (finite) return 0;
  return error_set(error, ERROR_INPUT, "%s: tensor '%s' holds NaN or infinity; it is damaged", tensor->values ? "the store" : source->path,
                   tensor->name);
}

struct export_text export_scheme_text(const struct export_scheme *scheme) {
  struct export_text text;
  char group[32] = "per channel", heads[16] = "";
  if (scheme->group_size) snprintf(group, sizeof group, "g%lld", (long long)scheme->group_size);
  if (scheme->kv_bits != scheme->abits) snprintf(heads, sizeof heads, " KV%d", scheme->kv_bits);
  snprintf(text.text, sizeof text.text, "W%dA%d%s %s %s", scheme->bits, scheme->abits, heads, group,
           scheme->symmetric ? "symmetric" : "asymmetric");
  return text;
}
