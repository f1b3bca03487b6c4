/* JSON. Two halves:
 *  - the strict scanner: RFC 8259 with nothing let through. It yields a flat array of tokens that
 *    point into the original bytes, so that what is forwarded is forwarded as it came. Everything a
 *    peer sends is read with it.
 *  - the builder: cJSON behind a few functions, for cold paths that compose documents (doctor,
 *    status, QMP commands). json_build.c is cJSON's only user.
 *
 * Refused by the scanner, each with rule and byte offset: syntax errors, trailing text, a
 * byte-order mark, invalid UTF-8 (overlong, surrogates, > U+10FFFF), raw control characters in
 * strings, lone surrogate escapes, duplicate keys (compared after unescaping), nesting beyond the
 * limit, numbers whose text is over 64 bytes or whose value overflows a double to infinity, more
 * tokens than the limit. */
#ifndef ORCH_BASE_JSON_H
#define ORCH_BASE_JSON_H

#include "err.h"

enum orch_json_type {
    ORCH_JSON_NULL = 1,
    ORCH_JSON_FALSE,
    ORCH_JSON_TRUE,
    ORCH_JSON_NUMBER,
    ORCH_JSON_STRING,
    ORCH_JSON_ARRAY,
    ORCH_JSON_OBJECT,
};

#define ORCH_JSON_ESCAPED 1 /* string: has at least one backslash */
#define ORCH_JSON_HAS_NUL 2 /* string: contains U+0000 (as \u0000) */
#define ORCH_JSON_INTEGER 4 /* number: no fraction, no exponent */
#define ORCH_JSON_BIG 8     /* integer beyond ±2^53: not exact as a double */

/* One value. Strings: start/end are the bytes between the quotes. Containers: from bracket to one
 * past bracket; `count` is the number of elements or members; their tokens follow (an object's as
 * key, value, key, value). `next` is the index of the token after this value and all below it. */
struct orch_json_tok {
    uint32_t start, end, next, count;
    uint8_t type, flags;
};

struct orch_json_doc {
    const char *text; /* borrowed */
    size_t n_text;
    struct orch_json_tok *toks; /* toks[0] is the root; owned, reused by the next scan */
    uint32_t n, cap;
    uint32_t nul_flag; /* some string contains U+0000 */
};

struct orch_json_limits {
    size_t bytes;    /* 0: 16 MiB */
    unsigned depth;  /* 0: 64; never more than 1024 */
    uint32_t tokens; /* 0: 1,000,000 */
};

struct orch_json_fault {
    size_t byte;      /* offset of the first byte that breaks the rule */
    const char *rule; /* a static sentence, e.g. "duplicate key" */
};

/* Scans the whole text. 0, or -EBADMSG (malformed), -EMSGSIZE (a limit of lim) with fault filled
 * and d->n 0. The doc is zero-initialised by the caller before first use and freed with
 * orch_json_doc_free. A text over 4 GiB is refused whatever the limit. Linear in the text, also for
 * keys chosen to collide. */
int orch_json_scan(struct orch_json_doc *d, struct orch_slice text,
                   const struct orch_json_limits *lim, struct orch_json_fault *fault);
void orch_json_doc_free(struct orch_json_doc *d);
#define cleanup_json ORCH_CLEANUP(orch_json_doc_free)

/* Index of the value of member `key` of the object token `obj`, or 0 when absent or obj is none. */
uint32_t orch_json_get(const struct orch_json_doc *d, uint32_t obj, const char *key);
/* The value's bytes as they came (a string with its quotes). */
struct orch_slice orch_json_raw(const struct orch_json_doc *d, uint32_t tok);
/* What was written to b from byte `from` on, JSON whose parts are as they came, becomes one line
 * for every reader: line ends between tokens become spaces; U+0085, U+2028 and U+2029 in strings,
 * which some readers take for line ends, are escaped. The values stay the same. Else who reads
 * otherwise than we do would be told messages that nobody judged. */
void orch_json_one_line(struct orch_buf *b, size_t from);
/* Unescaped text of a string token appended to out; 0, or -EINVAL when it is not a string. */
int orch_json_string(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out);
bool orch_json_string_eq(const struct orch_json_doc *d, uint32_t tok, const char *s);
double orch_json_number(const struct orch_json_doc *d, uint32_t tok); /* NAN when not a number */
/* An integer text (no fraction, no exponent) within int64; false otherwise. */
bool orch_json_int(const struct orch_json_doc *d, uint32_t tok, int64_t *out);

/* Appends s as a quoted JSON string. s must be UTF-8; what is not becomes U+FFFD. */
void orch_json_quote(struct orch_buf *out, struct orch_slice s);
/* false at the first byte that is not UTF-8. */
bool orch_utf8_valid(struct orch_slice s);
/* Appends the shortest number text that reads back as v, in ECMAScript's form (no exponent below
 * 10^21); -0 keeps its sign. What JSON cannot hold (NAN, infinity) becomes null. */
void orch_json_put_number(struct orch_buf *out, double v);
/* Appends the RFC 8785 canonical form of the value at tok (numbers are taken as doubles). */
void orch_json_canonical(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out);

/* Builder. Every function copies its input; a failed allocation aborts. Setting a key again
 * replaces its value; text that is not UTF-8 is printed with U+FFFD. */
struct orch_json; /* a cJSON node */
struct orch_json *orch_json_object(void);
struct orch_json *orch_json_array(void);
void orch_json_free(struct orch_json *j);
void orch_json_set_str(struct orch_json *obj, const char *key, const char *v); /* v NULL: null */
void orch_json_set_num(struct orch_json *obj, const char *key, double v);
void orch_json_set_bool(struct orch_json *obj, const char *key, bool v);
void orch_json_set_take(struct orch_json *obj, const char *key, struct orch_json *v);
void orch_json_add_take(struct orch_json *arr, struct orch_json *v);
void orch_json_print(const struct orch_json *j, bool pretty, struct orch_buf *out);

#endif
