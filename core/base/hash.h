/* SHA-256 and HMAC-SHA-256 (libcrypto's low-level functions: no provider is loaded, which alone
 * costs about a millisecond at start). Never fails. */
#ifndef ORCH_BASE_HASH_H
#define ORCH_BASE_HASH_H

#include "util.h"

#define ORCH_SHA256_BYTES 32

void orch_sha256(const void *p, size_t n, uint8_t out[ORCH_SHA256_BYTES]);
/* n bytes as 2n lower-case digits and a NUL. */
void orch_hex(const void *p, size_t n, char *out);
void orch_sha256_hex(const void *p, size_t n, char out[2 * ORCH_SHA256_BYTES + 1]);

/* Incremental, for files and for generations. */
struct orch_sha256_ctx {
    uint64_t opaque[14];
};
void orch_sha256_init(struct orch_sha256_ctx *c);
void orch_sha256_update(struct orch_sha256_ctx *c, const void *p, size_t n);
void orch_sha256_final(struct orch_sha256_ctx *c, uint8_t out[ORCH_SHA256_BYTES]);

/* The key's two inner states are kept, so that one digest costs the message and two blocks. */
struct orch_hmac_key {
    struct orch_sha256_ctx inner, outer;
};
void orch_hmac_key_init(struct orch_hmac_key *k, const void *key, size_t n);
void orch_hmac(const struct orch_hmac_key *k, const void *p, size_t n,
               uint8_t out[ORCH_SHA256_BYTES]);
bool orch_equal_ct(const void *a, const void *b, size_t n); /* constant time */

#endif
