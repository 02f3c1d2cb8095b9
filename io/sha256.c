/* sha256.c: one digest context. */
#include "sha256.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>

struct sha256 {
  const char *where;
  EVP_MD_CTX *context;
};

static int failed(const char *where, struct error *error) {
  return error_set(error, ERROR_WORK, "%s: OpenSSL cannot compute SHA-256", where);
}

struct sha256 *sha256_open(const char *where, struct error *error) {
  struct sha256 *hash = calloc(1, sizeof *hash);
  if (hash) *hash = (struct sha256){where, EVP_MD_CTX_new()};
  if (hash && hash->context && EVP_DigestInit_ex(hash->context, EVP_sha256(), NULL) == 1) return hash;
  failed(where, error);
  sha256_close(hash, NULL, error);
  return NULL;
}

int sha256_update(struct sha256 *hash, const void *bytes, size_t count, struct error *error) {
  return EVP_DigestUpdate(hash->context, bytes, count) == 1 ? 0 : failed(hash->where, error);
}

int sha256_close(struct sha256 *hash, uint8_t digest[SHA256_BYTES], struct error *error) {
  if (!hash) return error->code;
  if (!error->code && EVP_DigestFinal_ex(hash->context, digest, NULL) != 1) failed(hash->where, error);
  EVP_MD_CTX_free(hash->context);
  free(hash);
  return error->code;
}

void sha256_text(const uint8_t digest[SHA256_BYTES], char hex[SHA256_HEX]) {
  for (int i = 0; i < SHA256_BYTES; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
}
