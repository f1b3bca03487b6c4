/* A call's questions to its client: elicitation, sampling, roots. One code path for tools, two on the
 * wire: a legacy client gets requests of its own; a modern one gets `input_required` as the answer, and
 * the call is parked, a coroutine under a slot, until the client repeats the call with its answers.
 *
 * requestState is `SLOT.SERIAL.ROUND.MAC`, the MAC over that, the caller and a digest of method, name and
 * arguments: altered, another's, or used before, it resumes nothing. What is parked is bounded in number
 * and time. Answers may also come with a first call (no state): they are taken when they are asked for. */
#include "call.h"


#include <errno.h>
#include <stdio.h>
#include <string.h>

enum {
    PARKED_MAX = 10000,
    PARKED_MS = 10 * 60 * 1000, /* and a legacy client's time to answer */
    REQUESTS_MAX_BYTES = 1 << 20, /* all questions of one call */
};

#define TOO_LATE "the client did not answer within 10 minutes"
#define BAD_STATE \
    "requestState is not valid: it was altered, has expired, was used already or belongs to another call; send the call again without it"

struct orch_ask {
    struct orch_ask *next;
    struct orch_call *call;
    struct orch_ask_item *items;
    size_t n, left;
    void (*done)(void *ud);
    void *ud;
    struct orch_timer *timer; /* of a legacy client's answer; a modern one's call is parked instead */
    bool held;
};

/* ---- what is parked */

static void park_expired(void *ud);
static void park_turn(void *ud);

static void unpark(struct orch_call *c)
{
    struct orch_parked *p = &c->o->parked;
    if (!c->parked)
        return;
    c->parked = false;
    if (c->park_prev)
        c->park_prev->park_next = c->park_next;
    else
        p->first = c->park_next;
    if (c->park_next)
        c->park_next->park_prev = c->park_prev;
    else
        p->last = c->park_prev;
    c->park_next = c->park_prev = NULL;
    p->n--;
}

/* All wait equally long, so the list is in the order of its ends. */
static void park(struct orch_call *c)
{
    struct orch_parked *p = &c->o->parked;
    c->parked = true;
    c->round++;
    c->park_ends_us = orch_now_us() + (int64_t)PARKED_MS * 1000;
    c->park_prev = p->last;
    c->park_next = NULL;
    if (p->last)
        p->last->park_next = c;
    else
        p->first = c;
    p->last = c;
    p->n++;
    if (!p->timer)
        p->timer = orch_timer_new(c->o->loop, park_expired, c->o);
    if (p->first == c)
        orch_timer_set(p->timer, PARKED_MS);
}

static void park_expired(void *ud)
{
    struct orch *o = ud;
    int64_t now = orch_now_us();
    struct orch_call *c;
    while ((c = o->parked.first) && c->park_ends_us <= now) {
        unpark(c);
        if (c->answered)
            orch_call_free(c);
        else
            orch_call_cancel(c, TOO_LATE);
    }
    if (c)
        orch_timer_set(o->parked.timer, (c->park_ends_us - now) / 1000 + 1);
}

void orch_asking_stop(struct orch *o, const struct orch_session *s)
{
    for (struct orch_call *c = o->parked.first, *next; c; c = next) {
        next = c->park_next;
        if (s && c->session != s)
            continue;
        unpark(c);
        if (c->answered)
            orch_call_free(c);
        else
            orch_call_cancel(c, "its session ended");
    }
    if (!s) {
        orch_loop_unpost(o->loop, park_turn, o);
        orch_timer_free(o->parked.timer);
        o->parked.timer = NULL;
    }
}

/* ---- the state that a client carries */

static void put_state(struct orch_call *c, const char *digest, const char *caller, char out[128])
{
    struct orch_parked *p = &c->o->parked;
    uint8_t mac[ORCH_SHA256_BYTES];
    if (!p->keyed) {
        uint8_t key[32];
        if (orch_random(key, sizeof key) < 0)
            abort();
        orch_hmac_key_init(&p->key, key, sizeof key);
        p->keyed = true;
    }
    int n = snprintf(out, 128, "%u.%u.%u.", c->slot, c->serial, c->round);
    cleanup_buf struct orch_buf text = { 0 };
    orch_buf_add(&text, out, (size_t)n + 1);
    orch_buf_str(&text, digest);
    orch_buf_add(&text, "", 1);
    orch_buf_str(&text, caller);
    orch_hmac(&p->key, text.p, text.n, mac);
    orch_hex(mac, sizeof mac, out + n);
}

static char *digest_of(const char *method, const struct orch_json_doc *d, const struct orch_mcp_params *p)
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

void orch_asking_begin(struct orch_call *c, const char *method, const struct orch_json_doc *d, const struct orch_mcp_params *p)
{
    if (!c->modern)
        return;
    c->digest = digest_of(method, d, p);
    if (p->inputs)
        orch_buf_slice(&c->inputs, orch_json_raw(d, p->inputs));
}

/* ---- asking */

static struct orch_slice buf_slice(const struct orch_buf *b)
{
    return (struct orch_slice){ b->p, b->n };
}

static bool member_is(const struct orch_json_doc *d, uint32_t obj, const char *key, enum orch_json_type type)
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
    return orch_json_string_eq(d, action, "accept") || orch_json_string_eq(d, action, "decline") || orch_json_string_eq(d, action, "cancel");
}

static void hold(struct orch_ask *a, bool on)
{
    if (a->held != on)
        orch_call_hold(a->call, on);
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
    uint32_t message = error && d->toks[error].type == ORCH_JSON_OBJECT ? orch_json_get(d, error, "message") : 0;
    if (!message || orch_json_string(d, message, &text) < 0)
        orch_buf_str(&text, error ? "no reason given" : "its answer has not the form that the method wants");
    it->failed = ORCH_CLASS_FAILED;
    orch_buf_printf(&it->error, "the client refused %s: %.*s", it->method, text.n > 500 ? 500 : (int)text.n, text.p);
    take_answer(it, (struct orch_slice){ 0 });
}

static void legacy_late(void *ud)
{
    struct orch_ask *a = ud;
    for (size_t left = a->left, i = 0; left && i < a->n; i++) { /* with the last one a may be gone */
        struct orch_ask_item *it = &a->items[i];
        if (it->answered)
            continue;
        if (a->call->rq)
            orch_mcp_ask_cancel(a->call->rq, it->question);
        it->question = 0;
        it->failed = ORCH_CLASS_TIMEOUT;
        orch_buf_str(&it->error, TOO_LATE);
        take_answer(it, (struct orch_slice){ 0 });
        left--;
    }
}

/* Takes the answers that came with the request at hand. */
static void take_inputs(struct orch_call *c)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (!c->inputs.n || orch_json_scan(&d, buf_slice(&c->inputs), &(struct orch_json_limits){ .bytes = 256 << 20 }, &fault) < 0)
        return;
    for (struct orch_ask *a = c->asks; a; a = a->next) { /* done only wakes a task */
        for (size_t i = 0; i < a->n; i++) {
            uint32_t tok = a->items[i].answered ? 0 : orch_json_get(&d, 0, a->items[i].key);
            if (tok && answer_fits(&a->items[i], &d, tok))
                take_answer(&a->items[i], orch_json_raw(&d, tok));
        }
    }
}

void orch_asking_requests(struct orch_call *c, struct orch_buf *b)
{
    orch_buf_str(b, "\"inputRequests\":{");
    size_t at = b->n;
    for (struct orch_ask *a = c->asks; a; a = a->next)
        for (size_t i = 0; i < a->n; i++) {
            struct orch_ask_item *it = &a->items[i];
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

bool orch_asking_open(const struct orch_call *c)
{
    for (struct orch_ask *a = c->asks; a; a = a->next)
        if (a->left)
            return true;
    return false;
}

/* The turn after something was asked: what all tasks of the call ask becomes one answer. */
static void park_turn(void *ud)
{
    struct orch *o = ud;
    struct orch_call *c, *in_order = NULL;
    while ((c = o->parked.asking)) {
        o->parked.asking = c->park_next;
        c->park_next = in_order;
        in_order = c;
    }
    o->parked.asking = in_order; /* the list stays the host's: a call that ends meanwhile leaves it */
    while ((c = o->parked.asking)) {
        o->parked.asking = c->park_next;
        c->park_next = NULL;
        c->wants_park = false;
        if (!c->rq || c->cancelled || !orch_asking_open(c))
            continue;
        cleanup_buf struct orch_buf b = { 0 };
        char state[128];
        struct orch_mcp_request *rq = c->rq;
        park(c);
        put_state(c, c->digest, c->session->caller, state);
        orch_asking_requests(c, &b);
        orch_buf_printf(&b, ",\"requestState\":\"%s\",\"_meta\":{\"orch/call\":\"%s\",\"io.modelcontextprotocol/serverInfo\":%s}", state, c->id,
                        c->server_info);
        c->rq = NULL;
        orch_mcp_respond_typed(rq, "input_required", buf_slice(&b));
    }
}

static void want_park(struct orch_call *c)
{
    struct orch *o = c->o;
    if (c->wants_park || c->parked)
        return;
    c->wants_park = true;
    if (!o->parked.asking)
        orch_loop_post(o->loop, park_turn, o);
    c->park_next = o->parked.asking;
    o->parked.asking = c;
}

static bool key_taken(const struct orch_call *c, const char *key)
{
    for (struct orch_ask *a = c->asks; a; a = a->next)
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

static int check(struct orch_call *c, const struct orch_ask_item *items, size_t n, struct orch_err *err)
{
    static const struct {
        unsigned cap;
        const char *text;
    } words[] = { { ORCH_MCP_CAP_FORM, "elicitation by form" }, { ORCH_MCP_CAP_URL, "elicitation by URL" },
                  { ORCH_MCP_CAP_SAMPLING_TOOLS, "sampling with tools" }, { ORCH_MCP_CAP_SAMPLING, "sampling" },
                  { ORCH_MCP_CAP_ROOTS, "roots" } };
    size_t bytes = 0;
    unsigned missing = 0;
    for (size_t i = 0; i < n; i++) {
        missing |= items[i].needs & ~c->caps;
        bytes += items[i].params.n;
        if (key_taken(c, items[i].key))
            return orch_err_setc(err, ORCH_CLASS_FAILED, EEXIST, "the call already waits for an answer under the key \"%s\"", items[i].key);
    }
    c->missing = missing;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(words); i++)
        if (missing & words[i].cap)
            return orch_err_setc(err, ORCH_CLASS_FAILED, ENOTSUP, "the client does not offer %s", words[i].text);
    if (bytes > REQUESTS_MAX_BYTES)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, E2BIG, "the questions are over %d bytes", REQUESTS_MAX_BYTES);
    if (c->modern && c->o->parked.n >= PARKED_MAX)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN, "%d calls wait for their clients' answers already", PARKED_MAX);
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

void orch_asking_free(struct orch_ask *a)
{
    struct orch_call *c = a->call;
    for (struct orch_ask **at = c ? &c->asks : NULL; at && *at; at = &(*at)->next)
        if (*at == a) {
            *at = a->next;
            break;
        }
    for (size_t i = 0; c && c->rq && i < a->n; i++)
        if (a->items[i].question)
            orch_mcp_ask_cancel(c->rq, a->items[i].question);
    if (c)
        hold(a, false);
    orch_timer_free(a->timer);
    items_free(a->items, a->n);
    free(a);
}

bool orch_asking_done(const struct orch_ask *a)
{
    return a->left == 0;
}

const struct orch_ask_item *orch_asking_items(const struct orch_ask *a, size_t *n)
{
    *n = a->n;
    return a->items;
}

struct orch_ask *orch_asking_start(struct orch_call *c, struct orch_ask_item *items, size_t n, void (*done)(void *ud), void *ud,
                                   struct orch_err *err)
{
    int r = check(c, items, n, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        if (redact_params(c, &items[i]) < 0)
            r = orch_err_setc(err, ORCH_CLASS_LIMIT, E2BIG, "a question was withheld: a redact pattern hit its match limit");
    if (r < 0) {
        items_free(items, n);
        return NULL;
    }
    struct orch_ask *a = orch_xcalloc(1, sizeof *a);
    *a = (struct orch_ask){ .next = c->asks, .call = c, .items = items, .n = n, .left = n, .done = done, .ud = ud };
    c->asks = a;
    for (size_t i = 0; i < n; i++)
        items[i].ask = a;
    take_inputs(c);
    if (!a->left)
        return a;
    hold(a, true);
    if (c->job)
        orch_job_asks(c);
    else if (c->modern)
        want_park(c);
    if (c->modern)
        return a;
    a->timer = orch_timer_new(c->o->loop, legacy_late, a);
    orch_timer_set(a->timer, PARKED_MS);
    for (size_t i = 0; i < n; i++) {
        items[i].question = orch_mcp_ask(c->rq, items[i].method, buf_slice(&items[i].params), legacy_reply, &items[i]);
        if (items[i].question)
            continue;
        orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN, "too many questions to this client are open");
        orch_asking_free(a);
        return NULL;
    }
    return a;
}

/* ---- the client comes back */

static void refuse_state(struct orch_mcp_request *rq)
{
    orch_mcp_respond_error(rq, ORCH_RPC_INVALID_PARAMS, ORCH_SLICE(BAD_STATE), (struct orch_slice){ 0 });
}

void orch_call_resume(struct orch_session *s, struct orch_mcp_request *rq, const char *method, const struct orch_json_doc *d,
                      const struct orch_mcp_params *p)
{
    struct orch *o = s->host;
    cleanup_buf struct orch_buf given = { 0 };
    cleanup_free char *digest = digest_of(method, d, p);
    char state[128];
    unsigned slot, serial, round;
    orch_json_string(d, p->state, &given);
    struct orch_call *c = NULL;
    if (given.n && given.n < sizeof state && sscanf(given.p, "%u.%u.%u.", &slot, &serial, &round) == 3)
        c = orch_call_find(o, slot, serial);
    if (!c || !c->parked || c->round != round) {
        refuse_state(rq);
        return;
    }
    put_state(c, digest, s->caller, state);
    if (given.n != strlen(state) || !orch_equal_ct(given.p, state, given.n) || strcmp(digest, c->digest) != 0) {
        refuse_state(rq);
        return;
    }
    unpark(c);
    c->rq = rq;
    c->caps = orch_mcp_request_caps(rq);
    orch_mcp_request_set_host(rq, c);
    if (c->answered) {
        c->answered = false;
        orch_call_answer(c);
        return;
    }
    c->inputs.n = 0;
    if (p->inputs)
        orch_buf_slice(&c->inputs, orch_json_raw(d, p->inputs));
    take_inputs(c);
    c->inputs.n = 0;
    if (orch_asking_open(c))
        want_park(c);
}

void orch_asking_update(struct orch_call *c, struct orch_slice inputs)
{
    c->inputs.n = 0;
    orch_buf_slice(&c->inputs, inputs);
    take_inputs(c);
    c->inputs.n = 0;
    orch_job_asks(c);
}

bool orch_asking_answer(struct orch_call *c)
{
    if (c->parked && c->cancelled)
        unpark(c);
    c->answered = c->parked;
    return c->answered;
}

void orch_asking_end(struct orch_call *c)
{
    /* Of tasks that go on without the call (a script's own). */
    while (c->asks) {
        struct orch_ask *a = c->asks;
        c->asks = a->next;
        if (a->timer)
            orch_timer_cancel(a->timer);
        if (a->held) {
            hold(a, false);
            for (size_t i = 0; i < a->n; i++) {
                a->items[i].question = 0;
                if (!a->items[i].answered) {
                    a->items[i].answered = true;
                    a->items[i].failed = ORCH_CLASS_CLOSED;
                    orch_buf_str(&a->items[i].error, "the call is over");
                }
            }
            a->left = 0;
            a->done(a->ud);
        }
        a->call = NULL;
    }
    if (!c->wants_park)
        return;
    c->wants_park = false;
    for (struct orch_call **at = &c->o->parked.asking; *at; at = &(*at)->park_next)
        if (*at == c) {
            *at = c->park_next;
            break;
        }
    c->park_next = NULL;
}

void orch_asking_missing(struct orch_call *c)
{
    struct orch_buf *b = &c->rpc_data;
    unsigned m = c->missing;
    b->n = 0;
    orch_buf_str(b, "{\"requiredCapabilities\":{");
    if (m & (ORCH_MCP_CAP_FORM | ORCH_MCP_CAP_URL))
        orch_buf_printf(b, "\"elicitation\":{\"%s\":{}},", m & ORCH_MCP_CAP_URL ? "url" : "form");
    if (m & (ORCH_MCP_CAP_SAMPLING | ORCH_MCP_CAP_SAMPLING_TOOLS))
        orch_buf_str(b, m & ORCH_MCP_CAP_SAMPLING_TOOLS ? "\"sampling\":{\"tools\":{}}," : "\"sampling\":{},");
    if (m & ORCH_MCP_CAP_ROOTS)
        orch_buf_str(b, "\"roots\":{},");
    if (m & ORCH_MCP_CAP_TASKS)
        orch_buf_str(b, "\"extensions\":{\"io.modelcontextprotocol/tasks\":{}},");
    b->n--;
    orch_buf_str(b, "}}");
    orch_call_rpc_error(c, ORCH_RPC_MISSING_CAPABILITY, "Missing required client capability");
}
