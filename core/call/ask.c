/* A call's questions to its client: elicitation, sampling, roots. One code path for tools, two on
 * the wire: a legacy client gets requests of its own; a modern one gets `input_required` as the
 * answer, and the call is parked, a coroutine under a slot, until the client repeats the call with
 * its answers.
 *
 * requestState is `SLOT.SERIAL.ROUND.MAC`, the MAC over that, the caller and a digest of method,
 * name and arguments: altered, another's, or used before, it resumes nothing. What is parked is
 * bounded in number and time. Answers may also come with a first call (no state): they are taken
 * when they are asked for. */
#include "call_int.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum {
    PARKED_MAX = 10000,
    PARKED_MS = 10 * 60 * 1000,   /* and a legacy client's time to answer */
    REQUESTS_MAX_BYTES = 1 << 20, /* all questions of one call */
};

#define TOO_LATE "the client did not answer within 10 minutes"
#define BAD_STATE \
    "requestState is not valid: it was altered, has expired, was used already or belongs to " \
    "another call; send the call again without it"

struct orch_ask {
    struct orch_ask *next;
    struct orch_questions *of; /* NULL: the call is over */
    struct orch_ask_item *items;
    size_t n, left;
    void (*done)(void *ud);
    void *ud;
    struct orch_timer
        *timer; /* of a legacy client's answer; a modern one's call is parked instead */
    bool held;
};

/* The part of a call that asks, or that came with answers. */
struct orch_questions {
    struct orch_call_part part;
    struct orch_call *call;
    struct orch_ask *asks;
    struct orch_buf inputs;             /* answers that came with the request at hand */
    char *digest;                       /* of the request; a modern client's */
    struct orch_questions *next, *prev; /* in the list of parked ones, or of those that shall be */
    int64_t ends_us;
    unsigned round;
    bool wants_park, parked;
    bool answered; /* parked, and its result waits for the client to come back */
};

static const struct orch_call_part_ops questions_ops;

static struct orch_questions *questions_of(const struct orch_call *c)
{
    return (struct orch_questions *)orch_call_part(c, &questions_ops);
}

static struct orch_questions *need_questions(struct orch_call *c)
{
    struct orch_questions *q = questions_of(c);
    if (q)
        return q;
    q = orch_xcalloc(1, sizeof *q);
    q->part.ops = &questions_ops;
    q->call = c;
    orch_call_add_part(c, &q->part);
    return q;
}

/* ---- what is parked */

static void park_expired(void *ud);
static void park_turn(void *ud);

static void unpark(struct orch_questions *q)
{
    struct orch_questions_list *p = &q->call->calls->parked;
    if (!q->parked)
        return;
    q->parked = false;
    if (q->prev)
        q->prev->next = q->next;
    else
        p->first = q->next;
    if (q->next)
        q->next->prev = q->prev;
    else
        p->last = q->prev;
    q->next = q->prev = NULL;
    p->n--;
}

/* All wait equally long, so the list is in the order of its ends. */
static void park(struct orch_questions *q)
{
    struct orch_calls *cs = q->call->calls;
    struct orch_questions_list *p = &cs->parked;
    q->parked = true;
    q->round++;
    q->ends_us = orch_now_us() + (int64_t)PARKED_MS * 1000;
    q->prev = p->last;
    q->next = NULL;
    if (p->last)
        p->last->next = q;
    else
        p->first = q;
    p->last = q;
    p->n++;
    if (!p->timer)
        p->timer = orch_timer_new(cs->loop, park_expired, cs);
    if (p->first == q)
        orch_timer_set(p->timer, PARKED_MS);
}

static void give_up(struct orch_questions *q, const char *why)
{
    unpark(q);
    if (q->answered)
        orch_call_free(q->call);
    else
        orch_call_cancel(q->call, why);
}

static void park_expired(void *ud)
{
    struct orch_calls *cs = ud;
    int64_t now = orch_now_us();
    struct orch_questions *q;
    while ((q = cs->parked.first) && q->ends_us <= now)
        give_up(q, TOO_LATE);
    if (q)
        orch_timer_set(cs->parked.timer, (q->ends_us - now) / 1000 + 1);
}

void orch_calls_unpark(struct orch_calls *cs, const struct orch_session *s)
{
    for (struct orch_questions *q = cs->parked.first, *next; q; q = next) {
        next = q->next;
        if (!s || q->call->session == s)
            give_up(q, "its session ended");
    }
    if (!s) {
        orch_loop_unpost(cs->loop, park_turn, cs);
        orch_timer_free(cs->parked.timer);
        cs->parked.timer = NULL;
    }
}

/* ---- the state that a client carries */

static void put_state(const struct orch_questions *q, const char *digest, const char *caller,
                      char out[128])
{
    struct orch_questions_list *p = &q->call->calls->parked;
    uint8_t mac[ORCH_SHA256_BYTES];
    if (!p->keyed) {
        uint8_t key[32];
        if (orch_random(key, sizeof key) < 0)
            abort();
        orch_hmac_key_init(&p->key, key, sizeof key);
        p->keyed = true;
    }
    int n = snprintf(out, 128, "%u.%u.%u.", q->call->slot, q->call->serial, q->round);
    cleanup_buf struct orch_buf text = { 0 };
    orch_buf_add(&text, out, (size_t)n + 1);
    orch_buf_str(&text, digest);
    orch_buf_add(&text, "", 1);
    orch_buf_str(&text, caller);
    orch_hmac(&p->key, text.p, text.n, mac);
    orch_hex(mac, sizeof mac, out + n);
}

static char *digest_of(const char *method, const struct orch_json_doc *d,
                       const struct orch_mcp_params *p)
{
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_add(&b, method, strlen(method) + 1);
    orch_buf_slice(&b, p->name);
    orch_buf_add(&b, "", 1);
    if (p->args)
        orch_json_canonical(d, p->args, &b);
    char *hex = orch_xmalloc(2 * ORCH_SHA256_BYTES + 1);
    orch_sha256_hex(b.p, b.n, hex);
    return hex;
}

void orch_questions_begin(struct orch_call *c, const char *method, const struct orch_json_doc *d,
                          const struct orch_mcp_params *p)
{
    if (!c->modern || !c->caps)
        return;
    struct orch_questions *q = need_questions(c);
    q->digest = digest_of(method, d, p);
    if (p->inputs)
        orch_buf_slice(&q->inputs, orch_json_raw(d, p->inputs));
}

/* ---- asking */

static struct orch_slice buf_slice(const struct orch_buf *b)
{
    return (struct orch_slice){ b->p, b->n };
}

static bool member_is(const struct orch_json_doc *d, uint32_t obj, const char *key,
                      enum orch_json_type type)
{
    uint32_t tok = orch_json_get(d, obj, key);
    return tok && d->toks[tok].type == type;
}

/* Whether the value is an answer to the question at all. */
static bool answer_fits(const struct orch_ask_item *it, const struct orch_json_doc *d, uint32_t tok)
{
    if (d->toks[tok].type != ORCH_JSON_OBJECT)
        return false;
    if (strcmp(it->method, "roots/list") == 0)
        return member_is(d, tok, "roots", ORCH_JSON_ARRAY);
    if (strcmp(it->method, "sampling/createMessage") == 0)
        return member_is(d, tok, "role", ORCH_JSON_STRING) && orch_json_get(d, tok, "content");
    uint32_t action = orch_json_get(d, tok, "action"), content = orch_json_get(d, tok, "content");
    if (!action || (content && d->toks[content].type != ORCH_JSON_OBJECT))
        return false;
    return orch_json_string_eq(d, action, "accept") || orch_json_string_eq(d, action, "decline") ||
           orch_json_string_eq(d, action, "cancel");
}

static void hold(struct orch_ask *a, bool on)
{
    if (a->held != on)
        orch_call_hold(a->of->call, on);
    a->held = on;
}

static void take_answer(struct orch_ask_item *it, struct orch_slice answer)
{
    orch_buf_slice(&it->answer, answer);
    it->answered = true;
    if (--it->ask->left == 0 && it->ask->held) {
        if (it->ask->timer)
            orch_timer_cancel(it->ask->timer);
        hold(it->ask, false);
        it->ask->done(it->ask->ud);
    }
}

static void legacy_reply(void *ud, const struct orch_json_doc *d, uint32_t result, uint32_t error)
{
    struct orch_ask_item *it = ud;
    it->question = 0;
    if (result && answer_fits(it, d, result)) {
        take_answer(it, orch_json_raw(d, result));
        return;
    }
    cleanup_buf struct orch_buf text = { 0 };
    uint32_t message = error && d->toks[error].type == ORCH_JSON_OBJECT
                           ? orch_json_get(d, error, "message")
                           : 0;
    if (!message || orch_json_string(d, message, &text) < 0)
        orch_buf_str(&text, error ? "no reason given"
                                  : "its answer has not the form that the method wants");
    it->failed = ORCH_CLASS_FAILED;
    orch_buf_printf(&it->error, "the client refused %s: %.*s", it->method,
                    text.n > 500 ? 500 : (int)text.n, text.p);
    take_answer(it, (struct orch_slice){ 0 });
}

static void legacy_late(void *ud)
{
    struct orch_ask *a = ud;
    for (size_t left = a->left, i = 0; left && i < a->n;
         i++) { /* with the last one a may be gone */
        struct orch_ask_item *it = &a->items[i];
        if (it->answered)
            continue;
        if (a->of->call->rq)
            orch_mcp_ask_cancel(a->of->call->rq, it->question);
        it->question = 0;
        it->failed = ORCH_CLASS_TIMEOUT;
        orch_buf_str(&it->error, TOO_LATE);
        take_answer(it, (struct orch_slice){ 0 });
        left--;
    }
}

/* Takes the answers that came with the request at hand. */
static void take_inputs(struct orch_questions *q)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (!q->inputs.n ||
        orch_json_scan(&d, buf_slice(&q->inputs), &(struct orch_json_limits){ .bytes = 256 << 20 },
                       &fault) < 0)
        return;
    for (struct orch_ask *a = q->asks; a; a = a->next) { /* done only wakes a task */
        for (size_t i = 0; i < a->n; i++) {
            uint32_t tok = a->items[i].answered ? 0 : orch_json_get(&d, 0, a->items[i].key);
            if (tok && answer_fits(&a->items[i], &d, tok))
                take_answer(&a->items[i], orch_json_raw(&d, tok));
        }
    }
}

static void give_inputs(struct orch_questions *q, struct orch_slice inputs)
{
    q->inputs.n = 0;
    orch_buf_slice(&q->inputs, inputs);
    take_inputs(q);
    q->inputs.n = 0;
}

static bool asks(const struct orch_questions *q)
{
    for (const struct orch_ask *a = q->asks; a; a = a->next)
        if (a->left)
            return true;
    return false;
}

bool orch_call_asks(const struct orch_call *c)
{
    const struct orch_questions *q = questions_of(c);
    return q && asks(q);
}

void orch_call_put_questions(const struct orch_call *c, struct orch_buf *b)
{
    orch_buf_str(b, "\"inputRequests\":{");
    size_t at = b->n;
    for (const struct orch_ask *a = questions_of(c)->asks; a; a = a->next)
        for (size_t i = 0; i < a->n; i++) {
            const struct orch_ask_item *it = &a->items[i];
            if (it->answered)
                continue;
            if (b->n > at)
                orch_buf_char(b, ',');
            orch_json_quote(b, orch_slice_str(it->key));
            orch_buf_str(b, ":{\"method\":\"");
            orch_buf_str(b, it->method);
            orch_buf_str(b, "\",\"params\":");
            orch_buf_slice(b, buf_slice(&it->params));
            orch_buf_char(b, '}');
        }
    orch_buf_char(b, '}');
}

/* The turn after something was asked: what all tasks of the call ask becomes one answer. */
static void park_turn(void *ud)
{
    struct orch_calls *cs = ud;
    struct orch_questions *q, *in_order = NULL;
    while ((q = cs->parked.asking)) {
        cs->parked.asking = q->next;
        q->next = in_order;
        in_order = q;
    }
    cs->parked.asking = in_order; /* the list stays there: a call that ends meanwhile leaves it */
    while ((q = cs->parked.asking)) {
        struct orch_call *c = q->call;
        cs->parked.asking = q->next;
        q->next = NULL;
        q->wants_park = false;
        if (!c->rq || c->cancelled || !asks(q))
            continue;
        cleanup_buf struct orch_buf b = { 0 };
        char state[128];
        struct orch_mcp_request *rq = c->rq;
        park(q);
        put_state(q, q->digest, c->session->caller, state);
        orch_call_put_questions(c, &b);
        orch_buf_printf(&b, ",\"requestState\":\"%s\",", state);
        orch_call_put_origin(c, &b);
        c->rq = NULL;
        orch_mcp_respond_typed(rq, "input_required", buf_slice(&b));
    }
}

static void want_park(struct orch_questions *q)
{
    struct orch_calls *cs = q->call->calls;
    if (q->wants_park || q->parked)
        return;
    q->wants_park = true;
    if (!cs->parked.asking)
        orch_loop_post(cs->loop, park_turn, cs);
    q->next = cs->parked.asking;
    cs->parked.asking = q;
}

/* The part that has a way of its own to show what is asked, or NULL. */
static struct orch_call_part *shower(const struct orch_call *c)
{
    struct orch_call_part *p = c->parts;
    while (p && !p->ops->asked)
        p = p->next;
    return p;
}

static void show(struct orch_questions *q)
{
    struct orch_call_part *p = shower(q->call);
    if (p)
        p->ops->asked(p, q->call);
    else if (q->call->modern)
        want_park(q);
}

static bool key_taken(const struct orch_questions *q, const char *key)
{
    for (const struct orch_ask *a = q->asks; a; a = a->next)
        for (size_t i = 0; i < a->n; i++)
            if (strcmp(a->items[i].key, key) == 0)
                return true;
    return false;
}

static int redact_params(struct orch_call *c, struct orch_ask_item *it)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    struct orch_json_fault fault;
    if (!c->n_redact)
        return 0;
    if (orch_json_scan(&d, buf_slice(&it->params), &(struct orch_json_limits){ 0 }, &fault) < 0 ||
        orch_redact_json(c->gen, c->redact, c->n_redact, &d, 0, &out) < 0)
        return -E2BIG;
    it->params.n = 0;
    orch_buf_slice(&it->params, buf_slice(&out));
    return 0;
}

static int check(struct orch_questions *q, const struct orch_ask_item *items, size_t n,
                 struct orch_err *err)
{
    static const struct {
        unsigned cap;
        const char *text;
    } words[] = { { ORCH_MCP_CAP_FORM, "elicitation by form" },
                  { ORCH_MCP_CAP_URL, "elicitation by URL" },
                  { ORCH_MCP_CAP_SAMPLING_TOOLS, "sampling with tools" },
                  { ORCH_MCP_CAP_SAMPLING, "sampling" },
                  { ORCH_MCP_CAP_ROOTS, "roots" } };
    struct orch_call *c = q->call;
    size_t bytes = 0;
    unsigned missing = 0;
    for (size_t i = 0; i < n; i++) {
        missing |= items[i].needs & ~c->caps;
        bytes += items[i].params.n;
        if (key_taken(q, items[i].key))
            return orch_err_setc(err, ORCH_CLASS_FAILED, EEXIST,
                                 "the call already waits for an answer under the key \"%s\"",
                                 items[i].key);
    }
    c->missing = missing;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(words); i++)
        if (missing & words[i].cap)
            return orch_err_setc(err, ORCH_CLASS_FAILED, ENOTSUP, "the client does not offer %s",
                                 words[i].text);
    /* A script's tool goes on for a while. */
    if (c->cancelled || !(c->rq || q->parked || shower(c)))
        return orch_err_setc(err, ORCH_CLASS_CLOSED, ENOTCONN,
                             "nobody waits for the call any more");
    if (bytes > REQUESTS_MAX_BYTES)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, E2BIG, "the questions are over %d bytes",
                             REQUESTS_MAX_BYTES);
    if (c->modern && c->calls->parked.n >= PARKED_MAX)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN,
                             "%d calls wait for their clients' answers already", PARKED_MAX);
    return 0;
}

static void items_free(struct orch_ask_item *items, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        free(items[i].key);
        orch_buf_free(&items[i].params);
        orch_buf_free(&items[i].answer);
        orch_buf_free(&items[i].error);
    }
    free(items);
}

/* What a legacy client still has to answer. */
static void withdraw(struct orch_ask *a)
{
    struct orch_mcp_request *rq = a->of->call->rq;
    for (size_t i = 0; i < a->n; i++) {
        if (rq && a->items[i].question)
            orch_mcp_ask_cancel(rq, a->items[i].question);
        a->items[i].question = 0;
    }
}

void orch_ask_free(struct orch_ask *a)
{
    struct orch_questions *q = a->of;
    for (struct orch_ask **at = q ? &q->asks : NULL; at && *at; at = &(*at)->next)
        if (*at == a) {
            *at = a->next;
            break;
        }
    if (q) {
        withdraw(a);
        hold(a, false);
    }
    orch_timer_free(a->timer);
    items_free(a->items, a->n);
    free(a);
}

bool orch_ask_done(const struct orch_ask *a)
{
    return a->left == 0;
}

const struct orch_ask_item *orch_ask_items(const struct orch_ask *a, size_t *n)
{
    *n = a->n;
    return a->items;
}

static int ask_legacy(struct orch_ask *a, struct orch_err *err)
{
    struct orch_call *c = a->of->call;
    a->timer = orch_timer_new(c->calls->loop, legacy_late, a);
    orch_timer_set(a->timer, PARKED_MS);
    for (size_t i = 0; i < a->n; i++) {
        struct orch_ask_item *it = &a->items[i];
        it->question = orch_mcp_ask(c->rq, it->method, buf_slice(&it->params), legacy_reply, it);
        if (!it->question)
            return orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN,
                                 "too many questions to this client are open");
    }
    return 0;
}

struct orch_ask *orch_ask_start(struct orch_call *c, struct orch_ask_item *items, size_t n,
                                void (*done)(void *ud), void *ud, struct orch_err *err)
{
    struct orch_questions *q = need_questions(c);
    int r = check(q, items, n, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        if (redact_params(c, &items[i]) < 0)
            r = orch_err_setc(err, ORCH_CLASS_LIMIT, E2BIG,
                              "a question was withheld: a redact pattern hit its match limit");
    if (r < 0) {
        items_free(items, n);
        return NULL;
    }
    struct orch_ask *a = orch_xmalloc(sizeof *a);
    *a = (struct orch_ask){
        .next = q->asks, .of = q, .items = items, .n = n, .left = n, .done = done, .ud = ud
    };
    q->asks = a;
    for (size_t i = 0; i < n; i++)
        items[i].ask = a;
    take_inputs(q);
    if (!a->left)
        return a;
    hold(a, true);
    show(q);
    if (!c->modern && ask_legacy(a, err) < 0) {
        orch_ask_free(a);
        return NULL;
    }
    return a;
}

/* ---- the client comes back */

static void refuse_state(struct orch_mcp_request *rq)
{
    orch_mcp_respond_error(rq, ORCH_RPC_INVALID_PARAMS, ORCH_SLICE(BAD_STATE),
                           (struct orch_slice){ 0 });
}

/* The parked call that this state names, or NULL. */
static struct orch_questions *find_parked(const struct orch_session *s, struct orch_slice given,
                                          const char *digest)
{
    char state[128];
    unsigned slot, serial, round;
    struct orch_call *c = NULL;
    if (given.n && given.n < sizeof state &&
        sscanf(given.p, "%u.%u.%u.", &slot, &serial, &round) == 3)
        c = orch_call_find(s->calls, slot, serial);
    struct orch_questions *q = c ? questions_of(c) : NULL;
    if (!q || !q->parked || q->round != round)
        return NULL;
    put_state(q, digest, s->caller, state);
    bool same = given.n == strlen(state) && orch_equal_ct(given.p, state, given.n) &&
                strcmp(digest, q->digest) == 0;
    return same ? q : NULL;
}

void orch_call_resume(struct orch_session *s, struct orch_mcp_request *rq, const char *method,
                      const struct orch_json_doc *d, const struct orch_mcp_params *p)
{
    cleanup_buf struct orch_buf given = { 0 };
    cleanup_free char *digest = digest_of(method, d, p);
    orch_json_string(d, p->state, &given);
    struct orch_questions *q = find_parked(s, buf_slice(&given), digest);
    if (!q) {
        refuse_state(rq);
        return;
    }
    struct orch_call *c = q->call;
    unpark(q);
    c->rq = rq;
    c->caps = orch_mcp_request_caps(rq);
    orch_mcp_request_set_host(rq, c);
    if (q->answered) {
        q->answered = false;
        orch_call_answer(c);
        return;
    }
    give_inputs(q, p->inputs ? orch_json_raw(d, p->inputs) : ORCH_SLICE(""));
    if (asks(q))
        want_park(q);
}

void orch_call_take_answers(struct orch_call *c, struct orch_slice inputs)
{
    struct orch_questions *q = need_questions(c);
    give_inputs(q, inputs);
    show(q);
}

/* ---- the part */

static bool questions_answer(struct orch_call_part *p, struct orch_call *c)
{
    struct orch_questions *q = (struct orch_questions *)p;
    if (c->cancelled)
        unpark(q);
    q->answered = q->parked;
    return q->answered;
}

/* Of tasks that go on without the call (a script's own). */
static void close_ask(struct orch_ask *a)
{
    if (a->timer)
        orch_timer_cancel(a->timer);
    withdraw(a);
    if (a->held) {
        hold(a, false);
        for (size_t i = 0; i < a->n; i++) {
            if (a->items[i].answered)
                continue;
            a->items[i].answered = true;
            a->items[i].failed = ORCH_CLASS_CLOSED;
            orch_buf_str(&a->items[i].error, "the call is over");
        }
        a->left = 0;
        a->done(a->ud);
    }
    a->of = NULL;
}

static void questions_end(struct orch_call_part *p, struct orch_call *c)
{
    struct orch_questions *q = (struct orch_questions *)p;
    while (q->asks) {
        struct orch_ask *a = q->asks;
        q->asks = a->next;
        close_ask(a);
    }
    if (!q->wants_park)
        return;
    q->wants_park = false;
    for (struct orch_questions **at = &c->calls->parked.asking; *at; at = &(*at)->next)
        if (*at == q) {
            *at = q->next;
            break;
        }
    q->next = NULL;
}

static void questions_free(struct orch_call_part *p)
{
    struct orch_questions *q = (struct orch_questions *)p;
    free(q->digest);
    orch_buf_free(&q->inputs);
    free(q);
}

static const struct orch_call_part_ops questions_ops = {
    .end = questions_end,
    .answer = questions_answer,
    .free = questions_free,
};
