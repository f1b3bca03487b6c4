/* Redaction: the policy's patterns over every decoded string of a JSON value. */
#include "policy.h"

#include "../script/regex.h"

#include <errno.h>
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
        int r = orch_regex_replace(g->redact[patterns[i]], (struct orch_slice){ text->p, text->n },
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

int orch_redact_json(const struct orch_generation *g, const uint16_t *patterns, size_t n,
                     const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out)
{
    /* Strings lie in order in the text: copy what is between them, replace those that match. Keys
     * too. */
    size_t copied = d->toks[tok].start - (d->toks[tok].type == ORCH_JSON_STRING);
    cleanup_buf struct orch_buf text = { 0 };
    int64_t deadline_us = cpu_us() + BUDGET_US +
                          (int64_t)(n * (d->toks[tok].end - copied) / BYTES_PER_US);
    for (uint32_t i = tok; i < d->toks[tok].next; i++) {
        const struct orch_json_tok *t = &d->toks[i];
        if (t->type != ORCH_JSON_STRING)
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
        orch_buf_add(out, d->text + copied, t->start - 1 - copied);
        orch_json_quote(out, (struct orch_slice){ text.p, text.n });
        copied = t->end + 1;
    }
    size_t end = d->toks[tok].end + (d->toks[tok].type == ORCH_JSON_STRING);
    orch_buf_add(out, d->text + copied, end - copied);
    return 0;
}
