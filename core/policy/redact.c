/* Redaction: the policy's patterns over every decoded string of a JSON value. */
#include "policy.h"

#include "../script/regex.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* For a whole value, beside the patterns' limit for one string: many strings must not hold the
 * loop. Of the CPU, as theirs: a busy machine does not use it up. */
enum { BUDGET_US = 500000, BYTES_PER_US = 10 };

static int64_t cpu_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

int orch_redact_text(const struct orch_generation *g, const uint16_t *patterns, size_t n,
                     struct orch_buf *text)
{
    int matched = 0;
    for (size_t i = 0; i < n; i++) {
        cleanup_buf struct orch_buf out = { 0 };
        int r = orch_regex_replace(g->redact[patterns ? patterns[i] : i],
                                   (struct orch_slice){ text->p, text->n },
                                   ORCH_SLICE("[redacted]"), &out);
        if (r < 0)
            return r;
        if (r > 0) {
            matched = 1;
            orch_buf_free(text);
            *text = out;
            out = (struct orch_buf){ 0 };
        }
    }
    return matched;
}

/* A string in which something matched. */
struct changed {
    uint32_t tok;
    struct orch_buf text;
};

struct changes {
    struct changed *list; /* by token */
    size_t n, cap;
};

static void changes_fini(struct changes *c)
{
    for (size_t i = 0; i < c->n; i++)
        orch_buf_free(&c->list[i].text);
    free(c->list);
}

static struct changed *changes_find(const struct changes *c, uint32_t tok)
{
    size_t from = 0, to = c->n;
    while (from < to) {
        size_t mid = (from + to) / 2;
        if (c->list[mid].tok < tok)
            from = mid + 1;
        else
            to = mid;
    }
    return from < c->n && c->list[from].tok == tok ? &c->list[from] : NULL;
}

/* ---- keys: two that differed must not become one */

struct key {
    struct orch_slice text;
    struct changed *changed; /* NULL: as it came */
    struct orch_buf own;     /* text's, where it came with escapes */
};

static int compare(struct orch_slice a, struct orch_slice b)
{
    int r = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return r ? r : (a.n > b.n) - (a.n < b.n);
}

/* Of equal ones, those that came so are first. */
static int by_text(const void *a, const void *b)
{
    const struct key *x = a, *y = b;
    int r = compare(x->text, y->text);
    uint32_t tx = x->changed ? x->changed->tok : 0, ty = y->changed ? y->changed->tok : 0;
    return r ? r : (tx > ty) - (tx < ty);
}

static int has_text(const void *text, const void *key)
{
    return compare(*(const struct orch_slice *)text, ((const struct key *)key)->text);
}

/* "[redacted] (2)" and so on: what no other key of the object is. */
static void name_apart(const struct key *keys, size_t n, struct orch_buf *text, unsigned *count)
{
    size_t whole = text->n;
    struct orch_slice s;
    do {
        text->n = whole;
        orch_buf_printf(text, " (%u)", ++*count);
        s = orch_slice_of(text);
    } while (bsearch(&s, keys, n, sizeof *keys, has_text));
}

static void keys_apart(const struct orch_json_doc *d, uint32_t obj, const struct changes *c)
{
    uint32_t n = d->toks[obj].count;
    struct key *keys = orch_xcalloc(n + 1, sizeof *keys);
    uint32_t tok = obj + 1;
    for (uint32_t i = 0; i < n; i++, tok = d->toks[tok + 1].next) {
        struct key *k = &keys[i];
        k->changed = changes_find(c, tok);
        if (!k->changed)
            orch_json_string(d, tok, &k->own);
        k->text = orch_slice_of(k->changed ? &k->changed->text : &k->own);
    }
    qsort(keys, n, sizeof *keys, by_text);
    unsigned count = 1;
    /* The texts stay as they are until all are named: they are looked up. */
    cleanup_free struct orch_buf *named = orch_xcalloc(n + 1, sizeof *named);
    for (uint32_t i = 1; i < n; i++) {
        bool same = compare(keys[i - 1].text, keys[i].text) == 0;
        count = same ? count : 1;
        if (!same || !keys[i].changed)
            continue;
        orch_buf_slice(&named[i], keys[i].text);
        name_apart(keys, n, &named[i], &count);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (named[i].n) {
            orch_buf_free(&keys[i].changed->text);
            keys[i].changed->text = named[i];
        }
        orch_buf_free(&keys[i].own);
    }
    free(keys);
}

static bool has_changed_key(const struct orch_json_doc *d, uint32_t obj, const struct changes *c)
{
    uint32_t tok = obj + 1;
    for (uint32_t i = 0; i < d->toks[obj].count; i++, tok = d->toks[tok + 1].next)
        if (changes_find(c, tok))
            return true;
    return false;
}

/* ---- a whole value */

int orch_redact_json(const struct orch_generation *g, const uint16_t *patterns, size_t n,
                     const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out)
{
    size_t copied = d->toks[tok].start - (d->toks[tok].type == ORCH_JSON_STRING);
    cleanup_buf struct orch_buf text = { 0 };
    ORCH_CLEANUP(changes_fini) struct changes c = { 0 };
    int64_t deadline_us = cpu_us() + BUDGET_US +
                          (int64_t)(n * (d->toks[tok].end - copied) / BYTES_PER_US);
    for (uint32_t i = tok; i < d->toks[tok].next; i++) { /* keys too */
        if (d->toks[i].type != ORCH_JSON_STRING)
            continue;
        text.n = 0;
        orch_buf_reserve(&text, 1);
        orch_json_string(d, i, &text);
        int r = orch_redact_text(g, patterns, n, &text);
        if (r < 0)
            return r;
        if (cpu_us() > deadline_us)
            return -EOVERFLOW;
        if (!r)
            continue;
        if (c.n == c.cap) {
            c.cap = c.cap ? 2 * c.cap : 8;
            c.list = orch_xrealloc(c.list, c.cap * sizeof *c.list);
        }
        c.list[c.n++] = (struct changed){ i, text };
        text = (struct orch_buf){ 0 };
    }
    for (uint32_t i = tok; c.n && i < d->toks[tok].next; i++)
        if (d->toks[i].type == ORCH_JSON_OBJECT && has_changed_key(d, i, &c))
            keys_apart(d, i, &c);
    /* Strings lie in order in the text: copy what is between those that matched. */
    for (size_t i = 0; i < c.n; i++) {
        const struct orch_json_tok *t = &d->toks[c.list[i].tok];
        orch_buf_add(out, d->text + copied, t->start - 1 - copied);
        orch_json_quote(out, orch_slice_of(&c.list[i].text));
        copied = t->end + 1;
    }
    size_t end = d->toks[tok].end + (d->toks[tok].type == ORCH_JSON_STRING);
    orch_buf_add(out, d->text + copied, end - copied);
    return c.n > 0;
}
