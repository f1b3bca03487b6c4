/* The JSON scanner: whatever the bytes are, a refusal names a byte of the text, and an accepted
 * text gives tokens that nest inside it and a canonical form that is its own canonical form. */
#include "base/json.h"

#include <math.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define MUST(x) \
    do { \
        if (!(x)) \
            __builtin_trap(); \
    } while (0)

static void check_tokens(const struct orch_json_doc *d)
{
    MUST(d->n > 0 && d->n <= d->cap && d->toks[0].next == d->n);
    for (uint32_t i = 0; i < d->n; i++) {
        const struct orch_json_tok *t = &d->toks[i];
        struct orch_slice raw = orch_json_raw(d, i);
        MUST(raw.p >= d->text && raw.n > 0 && raw.p + raw.n <= d->text + d->n_text);
        MUST(t->next > i && t->next <= d->n);
        bool object = t->type == ORCH_JSON_OBJECT;
        uint32_t count = 0, at = i + 1;
        for (; at < t->next; count++) {
            MUST(d->toks[at].start > t->start && d->toks[at].end < t->end);
            MUST(!object || d->toks[at].type == ORCH_JSON_STRING);
            at = object ? d->toks[at + 1].next : d->toks[at].next;
        }
        MUST(at == t->next && count == t->count);
        int64_t whole;
        if (t->type == ORCH_JSON_NUMBER)
            MUST(isfinite(orch_json_number(d, i)));
        if (orch_json_int(d, i, &whole))
            MUST((double)whole == orch_json_number(d, i));
    }
}

/* Every string, unescaped and quoted again, is the same string. */
static void check_strings(const struct orch_json_doc *d)
{
    cleanup_json struct orch_json_doc again = { 0 };
    for (uint32_t i = 0; i < d->n; i++) {
        cleanup_buf struct orch_buf text = { 0 };
        cleanup_buf struct orch_buf quoted = { 0 };
        cleanup_buf struct orch_buf back = { 0 };
        struct orch_json_fault f;
        if (orch_json_string(d, i, &text) < 0)
            continue;
        MUST(orch_utf8_valid((struct orch_slice){ text.p, text.n }));
        orch_json_quote(&quoted, (struct orch_slice){ text.p, text.n });
        MUST(orch_json_scan(&again, (struct orch_slice){ quoted.p, quoted.n }, NULL, &f) == 0);
        MUST(orch_json_string(&again, 0, &back) == 0);
        MUST(back.n == text.n && memcmp(back.p, text.p, text.n) == 0);
        bool nul = memchr(text.p, 0, text.n) != NULL;
        MUST(((d->toks[i].flags & ORCH_JSON_HAS_NUL) != 0) == nul);
        MUST(orch_json_string_eq(d, i, text.p) == !nul);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_json struct orch_json_doc c = { 0 };
    cleanup_buf struct orch_buf once = { 0 };
    cleanup_buf struct orch_buf twice = { 0 };
    struct orch_json_fault f = { 0 };
    struct orch_slice text = { (const char *)data, n };

    orch_json_quote(&twice, text); /* any bytes make a string */
    MUST(orch_json_scan(&c, (struct orch_slice){ twice.p, twice.n }, NULL, &f) == 0);
    twice.n = 0;

    if (orch_json_scan(&d, text, NULL, &f) < 0) {
        MUST(f.byte <= n && f.rule && d.n == 0);
        return 0;
    }
    check_tokens(&d);
    check_strings(&d);
    orch_json_canonical(&d, 0, &once);
    MUST(orch_json_scan(&c, (struct orch_slice){ once.p, once.n }, NULL, &f) == 0);
    check_tokens(&c);
    orch_json_canonical(&c, 0, &twice);
    MUST(once.n == twice.n && memcmp(once.p, twice.p, once.n) == 0);
    return 0;
}
