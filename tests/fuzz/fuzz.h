/* fuzz.h: what the harnesses share. Each is one file NAME.c with LLVMFuzzerTestOneInput: libFuzzer calls it (run.sh), or replay.c with the
 * inputs of files, which needs no clang. Whatever the input, no file that it makes may bring more than a refusal in one line. */
#ifndef OMNIQUANT_FUZZ_H
#define OMNIQUANT_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

/* Ends the program with the words if the condition does not hold: a finding. */
void fuzz_expect(bool condition, const char *words);

/* A stranger's input that is refused is bad input, and says why in one line without control characters. */
void fuzz_expect_refusal(int code, const struct error *error);

/* From here to fuzz_end no single allocation may be larger than 16 MiB + 16 x `bytes`, the size of the files: watched where
 * AddressSanitizer is. */
void fuzz_begin(size_t bytes);
void fuzz_end(void);

/* Takes one part of an input that makes several files: its length as a little-endian uint32, then its bytes, as many as there are. */
struct fuzz_part {
  const uint8_t *bytes;
  size_t size;
};
struct fuzz_part fuzz_take(struct fuzz_part *rest);

/* A temporary folder of this process, in $TMPDIR, removed at the end. */
const char *fuzz_folder(void);

/* Writes FOLDER/NAME, or removes it where the part's bytes are NULL. */
void fuzz_write(const char *name, struct fuzz_part part);

/* The part as zero-terminated text, freed by the caller. */
char *fuzz_text(struct fuzz_part part);

#endif
