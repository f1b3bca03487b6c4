/* ECDSA over P-256 with SHA-256 (JWT's ES256): keys and signatures, by libcrypto, which is loaded
 * at the first use. Only OAuth needs it, so that a start pays nothing. */
#ifndef ORCH_BASE_ES256_H
#define ORCH_BASE_ES256_H

#include "err.h"

#define ORCH_ES256_BYTES 64

struct orch_es256; /* a private key */

/* pem: a private key in PKCS 8 or SEC 1; empty: a new key. NULL with err (EINVAL: no P-256 key). */
struct orch_es256 *orch_es256_new(struct orch_slice pem, struct orch_err *err);
void orch_es256_free(struct orch_es256 *k);
/* r and s, 32 bytes each. */
int orch_es256_sign(struct orch_es256 *k, struct orch_slice text, uint8_t out[ORCH_ES256_BYTES],
                    struct orch_err *err);
/* The public point: x and y, 32 bytes each. */
int orch_es256_public(struct orch_es256 *k, uint8_t out[ORCH_ES256_BYTES], struct orch_err *err);

#endif
