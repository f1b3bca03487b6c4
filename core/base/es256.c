#include "es256.h"

#include "library.h"

#include <errno.h>
#include <openssl/bn.h>
#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

enum { HALF = ORCH_ES256_BYTES / 2, DER_MAX = 128 };

/* What is used of libcrypto. */
#define FUNCTIONS(X) \
    X(BIO_new_mem_buf) \
    X(BIO_free) \
    X(PEM_read_bio_PrivateKey) \
    X(EVP_PKEY_Q_keygen) \
    X(EVP_PKEY_free) \
    X(EVP_PKEY_get_bn_param) \
    X(EVP_PKEY_get_group_name) \
    X(EVP_MD_CTX_new) \
    X(EVP_MD_CTX_free) \
    X(EVP_sha256) \
    X(EVP_DigestSignInit) \
    X(EVP_DigestSign) \
    X(d2i_ECDSA_SIG) \
    X(ECDSA_SIG_free) \
    X(ECDSA_SIG_get0) \
    X(BN_bn2binpad) \
    X(BN_free)

static struct {
#define X(name) __typeof__(&name) name;
    FUNCTIONS(X)
#undef X
} ossl;

struct orch_es256 {
    EVP_PKEY *key;
};

ORCH_LIBRARY(ossl, FUNCTIONS, .what = "es256", .file = "libcrypto.so.3", .package = "libssl3",
             .prefix = "", .cls = ORCH_CLASS_FAILED);

/* No key of ours is encrypted: without this the library would ask at the terminal. */
static int no_password(char *out, int n, int writing, void *ud)
{
    (void)out;
    (void)n;
    (void)writing;
    (void)ud;
    return -1;
}

struct orch_es256 *orch_es256_new(struct orch_slice pem, struct orch_err *err)
{
    char group[32] = "";
    size_t n;
    EVP_PKEY *key = NULL;
    if (orch_library_load(&library, err) < 0)
        return NULL;
    if (pem.n > 64 * 1024) {
        orch_err_set(err, EINVAL, "es256: the key is over 64 KiB");
        return NULL;
    }
    if (!pem.n) {
        key = ossl.EVP_PKEY_Q_keygen(NULL, NULL, "EC", "P-256");
    } else {
        BIO *bio = ossl.BIO_new_mem_buf(pem.p, (int)pem.n);
        key = bio ? ossl.PEM_read_bio_PrivateKey(bio, NULL, no_password, NULL) : NULL;
        ossl.BIO_free(bio);
    }
    if (!key || ossl.EVP_PKEY_get_group_name(key, group, sizeof group, &n) != 1 ||
        !orch_slice_eq(orch_slice_str(group), "prime256v1")) {
        ossl.EVP_PKEY_free(key);
        orch_err_set(err, EINVAL, "es256: not a private key of P-256 in PEM");
        return NULL;
    }
    struct orch_es256 *k = orch_xcalloc(1, sizeof *k);
    k->key = key;
    return k;
}

void orch_es256_free(struct orch_es256 *k)
{
    if (!k)
        return;
    ossl.EVP_PKEY_free(k->key);
    free(k);
}

int orch_es256_sign(struct orch_es256 *k, struct orch_slice text, uint8_t out[ORCH_ES256_BYTES],
                    struct orch_err *err)
{
    uint8_t der[DER_MAX];
    const uint8_t *p = der;
    size_t n = sizeof der;
    ECDSA_SIG *sig = NULL;
    const BIGNUM *r, *s;
    EVP_MD_CTX *ctx = ossl.EVP_MD_CTX_new();
    bool ok = ctx && ossl.EVP_DigestSignInit(ctx, NULL, ossl.EVP_sha256(), NULL, k->key) == 1 &&
              ossl.EVP_DigestSign(ctx, der, &n, (const uint8_t *)text.p, text.n) == 1 &&
              (sig = ossl.d2i_ECDSA_SIG(NULL, &p, (long)n));
    if (ok) {
        ossl.ECDSA_SIG_get0(sig, &r, &s);
        ok = ossl.BN_bn2binpad(r, out, HALF) == HALF &&
             ossl.BN_bn2binpad(s, out + HALF, HALF) == HALF;
    }
    ossl.ECDSA_SIG_free(sig);
    ossl.EVP_MD_CTX_free(ctx);
    return ok ? 0 : orch_err_set(err, EIO, "es256: libcrypto cannot sign");
}

int orch_es256_public(struct orch_es256 *k, uint8_t out[ORCH_ES256_BYTES], struct orch_err *err)
{
    BIGNUM *x = NULL, *y = NULL;
    bool ok = ossl.EVP_PKEY_get_bn_param(k->key, OSSL_PKEY_PARAM_EC_PUB_X, &x) == 1 &&
              ossl.EVP_PKEY_get_bn_param(k->key, OSSL_PKEY_PARAM_EC_PUB_Y, &y) == 1 &&
              ossl.BN_bn2binpad(x, out, HALF) == HALF &&
              ossl.BN_bn2binpad(y, out + HALF, HALF) == HALF;
    ossl.BN_free(x);
    ossl.BN_free(y);
    return ok ? 0 : orch_err_set(err, EIO, "es256: libcrypto does not give the public key");
}
