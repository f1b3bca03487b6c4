/* A call's arguments as the audit log shows them: without white space, long strings cut, with what
 * was cut told beside them: of what is whole nothing can be mistaken for a cut. */
#include "call_int.h"

#include <errno.h>
#include <string.h>

enum { OF_CALL_BYTES = 64 * 1024, OF_DENIED_BYTES = 2 * 1024 };

/* Strings longer than these are cut, the shorter where the longer do not fit. */
static const size_t of_call[] = { 4096, 256 }, of_denied[] = { 256, 32 };

/* Where the value is that is being written. */
struct place {
    const struct place *up;
    uint32_t key; /* token of its name; 0: index counts */
    uint32_t index;
};

struct writer {
    const struct orch_json_doc *d;
    struct orch_buf *out, cuts;
    size_t longest, limit; /* of a string; of all of out */
};

/* As a JSON pointer (RFC 6901). */
static void put_place(const struct writer *w, const struct place *p, struct orch_buf *b)
{
    if (!p->up)
        return;
    put_place(w, p->up, b);
    if (!p->key) {
        orch_buf_printf(b, "/%u", p->index);
        return;
    }
    cleanup_buf struct orch_buf key = { 0 };
    orch_json_string(w->d, p->key, &key);
    orch_buf_char(b, '/');
    for (size_t i = 0; i < key.n; i++)
        if (key.p[i] == '~' || key.p[i] == '/')
            orch_buf_str(b, key.p[i] == '~' ? "~0" : "~1");
        else
            orch_buf_char(b, key.p[i]);
}

static void put_string(struct writer *w, uint32_t tok, const struct place *p)
{
    const struct orch_json_tok *t = &w->d->toks[tok];
    if (t->end - t->start <= w->longest) {
        orch_buf_slice(w->out, orch_json_raw(w->d, tok));
        return;
    }
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_buf struct orch_buf at = { 0 };
    orch_json_string(w->d, tok, &text);
    size_t n = text.n < w->longest ? text.n : w->longest;
    while (n && n < text.n && (text.p[n] & 0xc0) == 0x80) /* whole characters */
        n--;
    orch_json_quote(w->out, (struct orch_slice){ text.p, n });
    if (n == text.n)
        return;
    char sha[2 * ORCH_SHA256_BYTES + 1];
    orch_sha256_hex(text.p, text.n, sha);
    put_place(w, p, &at);
    orch_buf_str(&w->cuts, w->cuts.n ? ",{\"at\":" : "{\"at\":");
    orch_json_quote(&w->cuts, orch_slice_of(&at));
    orch_buf_printf(&w->cuts, ",\"bytes\":%zu,\"sha256\":\"%s\"}", text.n, sha);
}

static int put_value(struct writer *w, uint32_t tok, const struct place *p)
{
    const struct orch_json_tok *t = &w->d->toks[tok];
    bool object = t->type == ORCH_JSON_OBJECT;
    if (w->out->n + w->cuts.n > w->limit)
        return -EMSGSIZE;
    if (t->type == ORCH_JSON_STRING) {
        put_string(w, tok, p);
        return 0;
    }
    if (!object && t->type != ORCH_JSON_ARRAY) {
        orch_buf_slice(w->out, orch_json_raw(w->d, tok));
        return 0;
    }
    struct place below = { .up = p };
    int r = 0;
    orch_buf_char(w->out, object ? '{' : '[');
    tok++;
    for (uint32_t i = 0; r == 0 && i < t->count; i++) {
        if (i)
            orch_buf_char(w->out, ',');
        below.index = i;
        if (object) {
            below.key = tok;
            orch_buf_slice(w->out, orch_json_raw(w->d, tok++));
            orch_buf_char(w->out, ':');
        }
        r = put_value(w, tok, &below);
        tok = w->d->toks[tok].next;
    }
    orch_buf_char(w->out, object ? '}' : ']');
    return r;
}

static int put_short(const struct orch_json_doc *d, uint32_t args, size_t longest, size_t limit,
                     struct orch_buf *b)
{
    size_t from = b->n;
    struct writer w = { .d = d, .out = b, .longest = longest, .limit = from + limit };
    const struct place top = { 0 };
    orch_buf_str(b, ",\"args\":");
    int r = put_value(&w, args, &top);
    if (r == 0 && b->n + w.cuts.n > w.limit)
        r = -EMSGSIZE;
    if (r == 0 && w.cuts.n) {
        orch_buf_str(b, ",\"args_cut\":[");
        orch_buf_slice(b, orch_slice_of(&w.cuts));
        orch_buf_char(b, ']');
    }
    if (r < 0)
        b->n = from;
    orch_buf_free(&w.cuts);
    return r;
}

/* That ,"args":… from `from` on can be read again: it is what came from outside in a line. */
static int check(struct orch_json_doc *d, struct orch_buf *b, size_t from)
{
    static const struct orch_json_limits limits = { .bytes = 2 * OF_CALL_BYTES, .depth = 250 };
    struct orch_json_fault fault = { 0 };
    b->p[from] = '{';
    orch_buf_char(b, '}');
    int r = orch_json_scan(d, (struct orch_slice){ b->p + from, b->n - from }, &limits, &fault);
    b->n--;
    b->p[from] = ',';
    return r;
}

int orch_record_args(struct orch_calls *cs, const struct orch_generation *g,
                     const struct orch_json_doc *d, uint32_t args, bool runs, struct orch_buf *b,
                     const char **why)
{
    struct orch_buf *redacted = &cs->redacted;
    cleanup_json struct orch_json_doc again = { 0 };
    struct orch_json_fault fault = { 0 };
    const size_t *longest = runs ? of_call : of_denied;
    size_t limit = runs ? OF_CALL_BYTES : OF_DENIED_BYTES;
    size_t from = b->n, whole = args ? d->toks[args].end - d->toks[args].start : 2;
    if (!args) {
        orch_buf_str(b, ",\"args\":{}");
        return 0;
    }
    int r = 0;
    if (g->n_redact) {
        redacted->n = 0;
        *why = "a redact pattern hit its match limit";
        r = orch_redact_json(g, NULL, g->n_redact, d, args, redacted);
        if (r > 0) {
            *why = "they cannot be read any more once they are redacted";
            r = orch_json_scan(&again, orch_slice_of(redacted),
                               &(struct orch_json_limits){ .bytes = 256 << 20, .depth = 1000 },
                               &fault);
            d = &again;
            args = 0;
        }
    }
    if (r == 0) {
        *why = "they are too many bytes, even with long strings cut";
        r = put_short(d, args, longest[0], limit, b);
        if (r < 0)
            r = put_short(d, args, longest[1], limit, b);
    }
    if (r == 0 && (r = check(&cs->recorded, b, from)) < 0) {
        *why = "what would be recorded cannot be read again";
        b->n = from;
    }
    if (r < 0)
        orch_buf_printf(b, ",\"args\":null,\"args_bytes\":%zu", whole);
    if (redacted->cap > OF_CALL_BYTES)
        orch_buf_free(redacted);
    return r;
}
