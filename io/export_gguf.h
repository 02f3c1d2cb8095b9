/* export_gguf.h: GGUF, version 3, as llama.cpp reads it: one file with weights, metadata and tokenizer. */
#ifndef OMNIQUANT_EXPORT_GGUF_H
#define OMNIQUANT_EXPORT_GGUF_H

#include "export_format.h"

/* Functions of struct export_format. */
int export_gguf_open(const struct export_job *job, void **state, struct error *error);
int export_gguf_announce(void *state, const struct export_tensor *tensor, struct error *error);
int export_gguf_begin(void *state, const struct export_folder *folder, struct error *error);
int export_gguf_write(void *state, const struct export_tensor *tensor, struct error *error);
int export_gguf_finish(void *state, struct error *error);
void export_gguf_close(void *state);

#endif
