/* tokens.c: any bytes as a token file. */
#include "tokens.h"

#include <stdio.h>
#include <stdlib.h>

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  enum { VOCABULARY = 1000, COUNT = 100 };
  char path[500], hex[65];
  int32_t ids[COUNT];
  struct error error = {0};
  struct tokens *tokens;
  fuzz_write("tokens.h5", (struct fuzz_part){bytes, size});
  snprintf(path, sizeof path, "%s/tokens.h5", fuzz_folder());
  fuzz_begin(size);
  int code = tokens_open(path, &tokens, &error);
  if (code) {
    fuzz_end();
    fuzz_expect(tokens == NULL, "what is refused is not opened");
    fuzz_expect_refusal(code, &error);
    return 0;
  }
  int64_t total = tokens_count(tokens);
  fuzz_expect(total >= 0 && (uint64_t)total <= size, "every token has a byte of the file at least");
  int64_t count = total < COUNT ? total : COUNT;
  code = tokens_read(tokens, total - count, count, VOCABULARY, ids, &error);
  if (code) fuzz_expect_refusal(code, &error);
  for (int64_t i = 0; i < count && !code; i++) fuzz_expect(ids[i] >= 0 && ids[i] < VOCABULARY, "ids are below the vocabulary's size");
  struct error other = {0};
  code = tokens_sha256(tokens, hex, &other);
  if (code) fuzz_expect_refusal(code, &other);
  fuzz_end();
  tokens_close(tokens);
  return 0;
}
