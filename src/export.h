/* export.h: from a store and the checkpoint it was made from to what an inference engine reads. */
#ifndef OMNIQUANT_EXPORT_H
#define OMNIQUANT_EXPORT_H

#include "error.h"
#include "export_format.h"
#include "setting.h"

struct export_options {
  const char *model;               /* checkpoint folder */
  const char *quantized;           /* store */
  const char *format;              /* name of a row of export_formats */
  const char *output;              /* folder to make */
  int shard_mib;                   /* largest safetensors file */
  enum export_dtype dtype;         /* hf */
  enum export_gptq gptq;           /* gptq: checkpoint_format */
  bool f16_fallback;               /* gguf */
  enum export_embedding embedding; /* gguf */
  bool exact;                      /* gguf */
  const char *pretokenizer;        /* gguf; NULL: as tokenizer.json says */
  struct setting_texts results;    /* JSON files of `omniquant eval --json`, for the model card */
};

/* One process, without MPI. Memory: one tensor and its codes. On failure nothing is left. ERROR_INPUT with what fits instead for
 * a store that the format cannot hold, before anything is written; ERROR_STOPPED after SIGTERM or SIGINT. */
int export_model(const struct export_options *options, struct error *error);

#endif
