/* OpenSSL 3 deprecates the low-level functions in favour of EVP, which looks a provider up at the
 * first use: about a millisecond and 2 MiB that every start would pay for one hash. They remain in
 * 3.x, and libcrypto is linked statically, so only the objects of SHA-256 come along. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include "hash.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <string.h>

enum { BLOCK = 64 };

_Static_assert(sizeof(SHA256_CTX) <= sizeof(struct orch_sha256_ctx),
               "orch_sha256_ctx is too small");
_Static_assert(_Alignof(SHA256_CTX) <= _Alignof(struct orch_sha256_ctx),
               "orch_sha256_ctx is aligned too weakly");

void orch_sha256_init(struct orch_sha256_ctx *c)
{
    SHA256_Init((SHA256_CTX *)c);
}

void orch_sha256_update(struct orch_sha256_ctx *c, const void *p, size_t n)
{
    SHA256_Update((SHA256_CTX *)c, p, n);
}

void orch_sha256_final(struct orch_sha256_ctx *c, uint8_t out[ORCH_SHA256_BYTES])
{
    SHA256_Final(out, (SHA256_CTX *)c);
}

void orch_sha256(const void *p, size_t n, uint8_t out[ORCH_SHA256_BYTES])
{
    struct orch_sha256_ctx c;
    orch_sha256_init(&c);
    orch_sha256_update(&c, p, n);
    orch_sha256_final(&c, out);
}

void orch_hex(const void *p, size_t n, char *out)
{
    static const char digits[] = "0123456789abcdef";
    const uint8_t *u = p;
    for (size_t i = 0; i < n; i++) {
        *out++ = digits[u[i] >> 4];
        *out++ = digits[u[i] & 15];
    }
    *out = 0;
}

void orch_sha256_hex(const void *p, size_t n, char out[2 * ORCH_SHA256_BYTES + 1])
{
    uint8_t digest[ORCH_SHA256_BYTES];
    orch_sha256(p, n, digest);
    orch_hex(digest, sizeof digest, out);
}

void orch_hmac_key_init(struct orch_hmac_key *k, const void *key, size_t n)
{
    uint8_t block[BLOCK] = { 0 };
    if (n > BLOCK)
        orch_sha256(key, n, block);
    else if (n)
        memcpy(block, key, n);
    for (size_t i = 0; i < BLOCK; i++)
        block[i] ^= 0x36;
    orch_sha256_init(&k->inner);
    orch_sha256_update(&k->inner, block, BLOCK);
    for (size_t i = 0; i < BLOCK; i++)
        block[i] ^= 0x36 ^ 0x5c;
    orch_sha256_init(&k->outer);
    orch_sha256_update(&k->outer, block, BLOCK);
    OPENSSL_cleanse(block, sizeof block);
}

void orch_hmac(const struct orch_hmac_key *k, const void *p, size_t n,
               uint8_t out[ORCH_SHA256_BYTES])
{
    struct orch_sha256_ctx c = k->inner;
    orch_sha256_update(&c, p, n);
    orch_sha256_final(&c, out);
    c = k->outer;
    orch_sha256_update(&c, out, ORCH_SHA256_BYTES);
    orch_sha256_final(&c, out);
}

bool orch_equal_ct(const void *a, const void *b, size_t n)
{
    return CRYPTO_memcmp(a, b, n) == 0;
}
