/* sha256.h: SHA-256 over pieces, by OpenSSL. */
#ifndef OMNIQUANT_SHA256_H
#define OMNIQUANT_SHA256_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

enum { SHA256_BYTES = 32, SHA256_HEX = 2 * SHA256_BYTES + 1 };

struct sha256;

/* NULL with the error set (ERROR_WORK) if OpenSSL cannot. `where` starts messages. */
struct sha256 *sha256_open(const char *where, struct error *error);
int sha256_update(struct sha256 *hash, const void *bytes, size_t count, struct error *error);
/* Gives the digest and frees; after an error recorded before, only frees. NULL is allowed. */
int sha256_close(struct sha256 *hash, uint8_t digest[SHA256_BYTES], struct error *error);

void sha256_text(const uint8_t digest[SHA256_BYTES], char hex[SHA256_HEX]);

#endif
