/* export_safetensors.h: what the formats that are a model folder with safetensors share: each says only what becomes of a quantized layer
 * and what config.json tells of it. */
#ifndef OMNIQUANT_EXPORT_SAFETENSORS_H
#define OMNIQUANT_EXPORT_SAFETENSORS_H

#include <jansson.h>

#include "export_format.h"

enum { EXPORT_MAX_PARTS = 4 };

/* A tensor that a quantized layer becomes. */
struct export_part {
  const char *suffix; /* behind the layer's name and a point */
  const char *dtype;  /* safetensors' name */
  int dimensions;
  int64_t shape[2];
  size_t bytes;
  void *data; /* freed by the caller; NULL while the layer is announced */
};

struct packing {
  int (*check)(const struct export_job *job, struct error *error); /* of the scheme alone */
  int (*check_layer)(const struct export_job *job, int64_t out_features, int64_t in_features, struct error *error); /* NULL: any shape */
  /* Describes the parts, and fills them where the layer has codes. Returns their number. Errors: ERROR_WORK for memory. */
  int (*parts)(const struct export_job *job, const struct quantized_linear *linear, struct export_part parts[EXPORT_MAX_PARTS],
               struct error *error);
  json_t *(*config)(const struct export_job *job);    /* config.json's quantization_config, a new reference; NULL for none */
  const char *config_copy;                            /* name of another file with the same; NULL for none */
  const char *(*dtype)(const struct export_job *job); /* what config.json's dtype becomes; NULL: stays */
};

/* Functions of struct export_format; packings call the first one. */
int export_folder_format_open(const struct export_job *job, const struct packing *packing, void **state, struct error *error);
int export_folder_format_announce(void *state, const struct export_tensor *tensor, struct error *error);
int export_folder_format_begin(void *state, const struct export_folder *folder, struct error *error);
int export_folder_format_write(void *state, const struct export_tensor *tensor, struct error *error);
int export_folder_format_finish(void *state, struct error *error);
void export_folder_format_close(void *state);

/* Sets a part; its memory comes with it where the layer has codes. */
int export_part_set(struct export_part *part, const struct quantized_linear *linear, const char *suffix, const char *dtype, int dimensions,
                    int64_t rows, int64_t columns, size_t bytes, struct error *error);

/* The open functions of the three, for the table. */
int export_gptq_open(const struct export_job *job, void **state, struct error *error);
int export_compressed_tensors_open(const struct export_job *job, void **state, struct error *error);
int export_hf_open(const struct export_job *job, void **state, struct error *error);

#endif
