/* Rates of rules: a token bucket a key, kept across reloads. */
#include "current.h"

#include <math.h>
#include <string.h>

struct orch_rate {
    struct orch_rate *next;
    double tokens, limit;
    int64_t at_ms, window_ms;
    char key[];
};

static void rate_refill(struct orch_rate *r, int64_t now)
{
    r->tokens = fmin(r->limit,
                     r->tokens + (double)(now - r->at_ms) * r->limit / (double)r->window_ms);
    r->at_ms = now;
}

/* Its rule, known by its id, has another rate now: what was taken stays taken. */
static void rate_change(struct orch_rate *r, double limit, int64_t window_ms)
{
    r->tokens = fmax(0, r->tokens + limit - r->limit);
    r->limit = limit;
    r->window_ms = window_ms;
}

/* Full buckets say nothing: they are as good as new ones. */
static unsigned drop_full(struct orch_rate **rates, int64_t now)
{
    unsigned n = 0;
    for (struct orch_rate **at = rates; *at;) {
        struct orch_rate *r = *at;
        rate_refill(r, now);
        if (r->tokens < r->limit) {
            at = &r->next;
            n++;
            continue;
        }
        *at = r->next;
        free(r);
    }
    return n;
}

bool orch_rate_take(struct orch_rate **rates, const char *key, double limit, int64_t window_ms)
{
    enum { KEYS_MAX = 10000 };
    int64_t now = orch_now_us() / 1000;
    unsigned n = 0;
    struct orch_rate *r = *rates;
    for (; r && strcmp(r->key, key) != 0; r = r->next)
        n++;
    if (!r) {
        if (n >= KEYS_MAX && drop_full(rates, now) >= KEYS_MAX)
            return false; /* more callers than are kept track of: fail closed */
        r = orch_xmalloc(sizeof *r + strlen(key) + 1);
        *r = (struct orch_rate){
            .next = *rates, .tokens = limit, .limit = limit, .at_ms = now, .window_ms = window_ms
        };
        strcpy(r->key, key);
        *rates = r;
    }
    rate_refill(r, now);
    if (r->limit != limit || r->window_ms != window_ms)
        rate_change(r, limit, window_ms);
    if (r->tokens < 1)
        return false;
    r->tokens -= 1;
    return true;
}

void orch_rates_free(struct orch_rate **rates)
{
    while (*rates) {
        struct orch_rate *r = *rates;
        *rates = r->next;
        free(r);
    }
}
