/* gguf_tokenizer.h: a model folder's tokenizer as GGUF's keys. Known are byte-level BPE and BPE with byte fallback in sentencepiece's manner
 * (LLaMA 2, Mistral). */
#ifndef OMNIQUANT_GGUF_TOKENIZER_H
#define OMNIQUANT_GGUF_TOKENIZER_H

#include "error.h"
#include "gguf_writer.h"

/* Sets the keys from tokenizer.json, tokenizer_config.json, chat_template.jinja. Errors: ERROR_INPUT naming the file and the mend, also for a
 * tokenizer of another kind, for one that llama.cpp would not follow exactly, and for a way to split text that has no name here. */
int gguf_tokenizer(struct gguf_writer *writer, const char *folder, int vocabulary, /* rows of the embedding: tokens there have to be */
                   const char *pretokenizer,                                       /* NULL: as tokenizer.json says */
                   struct error *error);

#endif
