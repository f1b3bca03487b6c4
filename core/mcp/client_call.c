/* The client's calls: as they go out, how they end, and what a modern server wants to know
 * before it goes on with one. */
#include "client_int.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum {
    ROUNDS_MAX = 16,   /* of questions, for one call */
    INPUTS_MAX = 32,   /* of a round */
    ANSWERS_MAX = 256, /* on their way over HTTP */
};

static const struct orch_slice NOTHING = { "", 0 };

static void drop_inputs(struct orch_mcp_client_call *k);

/* ---- calls */

const char *orch_mcp_call_method(const struct orch_mcp_client_call *k)
{
    return k->method ? k->method : "tools/call";
}

static struct orch_mcp_client_call *call_new(struct orch_mcp_client *c,
                                             const struct orch_mcp_client_request *r)
{
    struct orch_mcp_client_call *k = orch_xcalloc(1, sizeof *k);
    *k = (struct orch_mcp_client_call){
        .client = c, .done = r->done, .progress = r->progress, .ud = r->ud, .note = r->note
    };
    if (r->method)
        k->method = orch_xstrdup(r->method);
    TAILQ_INSERT_TAIL(&c->calls, k, link);
    return k;
}

struct orch_mcp_client_call *orch_mcp_call_by_id(struct orch_mcp_client *c, int64_t id)
{
    struct orch_mcp_client_call *k;
    if (id <= 0)
        return NULL;
    TAILQ_FOREACH (k, &c->calls, link)
        if (k->id == id)
            return k;
    return NULL;
}

void orch_mcp_client_drop(struct orch_mcp_client_call *k)
{
    if (!k)
        return;
    TAILQ_REMOVE(&k->client->calls, k, link);
    drop_inputs(k);
    orch_buf_free(&k->members);
    orch_buf_free(&k->meta);
    orch_buf_free(&k->state);
    free(k->refused);
    free(k->method);
    free(k);
}

void orch_mcp_call_finish(struct orch_mcp_client_call *k, struct orch_slice result,
                          const struct orch_err *err)
{
    orch_mcp_client_done_fn *done = k->done;
    void *ud = k->ud;
    orch_mcp_client_drop(k);
    if (done)
        done(ud, result, err);
}

void orch_mcp_call_fail(struct orch_mcp_client_call *k, enum orch_class cls, int code,
                        const char *why)
{
    struct orch_err err = { 0 };
    orch_err_setc(&err, cls, code, "%s: %s", k->client->name, why);
    orch_mcp_call_finish(k, NOTHING, &err);
}

/* ---- what goes out */

/* A comma, unless nothing stands before. */
static void separate(struct orch_buf *b)
{
    if (b->n && b->p[b->n - 1] != '{')
        orch_buf_char(b, ',');
}

void orch_mcp_copy_members(const struct orch_json_doc *d, uint32_t object,
                           bool (*skip)(const struct orch_json_doc *d, uint32_t key),
                           struct orch_buf *out)
{
    uint32_t key = object + 1;
    for (uint32_t i = 0; i < d->toks[object].count; i++, key = d->toks[key + 1].next) {
        if (skip(d, key))
            continue;
        separate(out);
        orch_buf_slice(out, orch_json_raw(d, key));
        orch_buf_char(out, ':');
        orch_buf_slice(out, orch_json_raw(d, key + 1));
    }
}

static bool is_ours(const struct orch_json_doc *d, uint32_t key)
{
    return orch_json_string_eq(d, key, "_meta") || orch_json_string_eq(d, key, "inputResponses") ||
           orch_json_string_eq(d, key, "requestState");
}

static bool is_reserved(const struct orch_json_doc *d, uint32_t key)
{
    cleanup_buf struct orch_buf text = { 0 };
    orch_json_string(d, key, &text);
    size_t n = sizeof ORCH_MCP_META - 1;
    return orch_slice_eq((struct orch_slice){ text.p, text.n }, "progressToken") ||
           (text.n >= n && memcmp(text.p, ORCH_MCP_META, n) == 0);
}

static int scan_object(struct orch_json_doc *d, struct orch_slice text, const char *what,
                       struct orch_err *err)
{
    struct orch_json_fault fault;
    if (orch_json_scan(d, text, &(struct orch_json_limits){ .bytes = ORCH_MCP_OUT_MAX_BYTES },
                       &fault) < 0)
        return orch_err_set(err, EINVAL, "%s: %s", what, fault.rule);
    return d->toks[0].type == ORCH_JSON_OBJECT
               ? 0
               : orch_err_set(err, EINVAL, "%s must be an object", what);
}

/* The members of params and those of its _meta. */
static int put_params(const struct orch_mcp_client_request *r, struct orch_buf *members,
                      struct orch_buf *meta, struct orch_err *err)
{
    cleanup_json struct orch_json_doc d = { 0 };
    uint32_t given = 0;
    if (!r->method) {
        orch_buf_str(members, "\"name\":");
        orch_json_quote(members, orch_slice_str(r->tool));
        orch_buf_str(members, ",\"arguments\":");
        orch_buf_slice(members, r->args);
        if (r->meta.n && scan_object(&d, r->meta, "_meta", NULL) == 0)
            orch_mcp_copy_members(&d, 0, is_reserved, meta);
        return 0;
    }
    if (!r->params.n)
        return 0;
    int rc = scan_object(&d, r->params, "params", err);
    if (rc < 0)
        return rc;
    orch_mcp_copy_members(&d, 0, is_ours, members);
    given = orch_json_get(&d, 0, "_meta");
    if (given && d.toks[given].type == ORCH_JSON_OBJECT)
        orch_mcp_copy_members(&d, given, is_reserved, meta);
    return 0;
}

static void put_answers(struct orch_mcp_client_call *k, struct orch_buf *b)
{
    if (k->state.n) {
        separate(b);
        orch_buf_str(b, "\"requestState\":");
        orch_buf_slice(b, (struct orch_slice){ k->state.p, k->state.n });
    }
    if (!k->n_inputs)
        return;
    separate(b);
    orch_buf_str(b, "\"inputResponses\":{");
    for (size_t i = 0; i < k->n_inputs; i++) {
        separate(b);
        orch_buf_slice(b, (struct orch_slice){ k->inputs[i].key.p, k->inputs[i].key.n });
        orch_buf_char(b, ':');
        orch_buf_slice(b, (struct orch_slice){ k->inputs[i].answer.p, k->inputs[i].answer.n });
    }
    orch_buf_char(b, '}');
}

static void put_meta(const struct orch_mcp_client_call *k, struct orch_slice given,
                     struct orch_buf *b)
{
    const struct orch_mcp_client *c = k->client;
    if (k->note || (!k->progress && !given.n && !c->modern))
        return;
    separate(b);
    orch_buf_str(b, "\"_meta\":{");
    if (k->progress)
        orch_buf_printf(b, "\"progressToken\":%lld", (long long)k->id);
    if (given.n)
        separate(b);
    orch_buf_slice(b, given);
    if (c->modern) {
        separate(b);
        orch_buf_slice(b, (struct orch_slice){ c->meta.p, c->meta.n });
        if (c->log_level) {
            orch_buf_str(b, ",\"" ORCH_MCP_META "logLevel\":");
            orch_json_quote(b, orch_slice_str(c->log_level));
        }
    }
    orch_buf_char(b, '}');
}

static void message_end(struct orch_mcp_client *c, size_t from, enum orch_mcp_kind kind, int64_t id)
{
    orch_json_one_line(&c->out, from);
    c->t->ops->send(c->t, from, kind, id);
}

/* r: what it says, where it was not kept. */
int orch_mcp_call_send(struct orch_mcp_client_call *k, const struct orch_mcp_client_request *r,
                       struct orch_err *err)
{
    struct orch_mcp_client *c = k->client;
    struct orch_buf *b = &c->out;
    cleanup_buf struct orch_buf meta = { 0 };
    size_t from = b->n;
    k->id = ++c->next_id;
    k->waits = false;
    orch_buf_str(b, "{\"jsonrpc\":\"2.0\"");
    if (!k->note)
        orch_buf_printf(b, ",\"id\":%lld", (long long)k->id);
    orch_buf_str(b, ",\"method\":");
    orch_json_quote(b, orch_slice_str(orch_mcp_call_method(k)));
    size_t before = b->n;
    orch_buf_str(b, ",\"params\":{");
    size_t begun = b->n;
    if (r && put_params(r, b, &meta, err) < 0) {
        b->n = from;
        return -EINVAL;
    }
    orch_buf_slice(b, (struct orch_slice){ k->members.p, k->members.n });
    put_answers(k, b);
    drop_inputs(k);
    put_meta(k,
             r ? (struct orch_slice){ meta.p, meta.n }
               : (struct orch_slice){ k->meta.p, k->meta.n },
             b);
    if (b->n == begun)
        b->n = before;
    else
        orch_buf_char(b, '}');
    orch_buf_char(b, '}');
    message_end(c, from, k->note ? ORCH_MCP_NOTE : ORCH_MCP_REQUEST, k->id);
    return 0;
}

struct orch_mcp_client_call *orch_mcp_client_call(struct orch_mcp_client *c,
                                                  const struct orch_mcp_client_request *r,
                                                  struct orch_err *err)
{
    if (c->dead) {
        if (err)
            *err = c->why;
        return NULL;
    }
    if (c->out.n + r->args.n + r->params.n > ORCH_MCP_OUT_MAX_BYTES) {
        orch_err_setc(err, ORCH_CLASS_UPSTREAM, ENOBUFS,
                      "%s: the server does not read its input (%zu bytes wait)", c->name, c->out.n);
        return NULL;
    }
    struct orch_mcp_client_call *k = call_new(c, r);
    bool waits = c->state != ORCH_MCP_READY || c->session_lost,
         kept = waits || c->modern || c->o.url;
    int rc = kept ? put_params(r, &k->members, &k->meta, err) : orch_mcp_call_send(k, r, err);
    if (rc < 0) {
        orch_mcp_client_drop(k);
        return NULL;
    }
    k->waits = waits;
    if (kept && !waits)
        orch_mcp_call_send(k, NULL, NULL);
    if (waits && c->state == ORCH_MCP_READY)
        orch_mcp_era_reopen(c);
    return k;
}

struct orch_mcp_client_call *orch_mcp_client_own(struct orch_mcp_client *c,
                                                 const struct orch_mcp_client_request *r)
{
    struct orch_mcp_client_call *k = call_new(c, r);
    k->own = true;
    put_params(r, &k->members, &k->meta, NULL);
    orch_mcp_call_send(k, NULL, NULL);
    return k;
}

void orch_mcp_client_send_waiting(struct orch_mcp_client *c, const struct orch_err *err)
{
    struct orch_mcp_client_call *k = TAILQ_FIRST(&c->calls);
    while (k && !c->dead) {
        struct orch_mcp_client_call *next = TAILQ_NEXT(k, link);
        if (k->waits && !err)
            orch_mcp_call_send(k, NULL, NULL);
        if (k->waits && err) { /* whose function may end others */
            orch_mcp_call_finish(k, NOTHING, err);
            next = TAILQ_FIRST(&c->calls);
        }
        k = next;
    }
}

void orch_mcp_client_cancel(struct orch_mcp_client_call *k, const char *why)
{
    struct orch_mcp_client *c = k->client;
    int64_t id = k->id;
    bool told = !c->dead && id && !k->note && !k->own;
    orch_mcp_client_drop(k);
    if (c->dead || !id)
        return;
    c->t->ops->release(c->t, id);
    if (!told || (c->modern && c->o.url)) /* there the end of its stream says so */
        return;
    size_t from = c->out.n;
    orch_buf_printf(&c->out,
                    "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
                    "cancelled\",\"params\":{\"requestId\":%lld,\"reason\":",
                    (long long)id);
    orch_json_quote(&c->out, orch_slice_str(why));
    orch_buf_str(&c->out, "}}");
    message_end(c, from, ORCH_MCP_OTHER, 0);
}

static void reply_end(struct orch_mcp_client *c, size_t from)
{
    message_end(c, from, ORCH_MCP_OTHER, 0);
    struct orch_err err = { 0 };
    if (c->out.n > ORCH_MCP_OUT_MAX_BYTES)
        orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ENOBUFS,
                      "%s: the server asks but does not read its input (%zu bytes wait)", c->name,
                      c->out.n);
    else if (c->answers > ANSWERS_MAX)
        orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ENOBUFS,
                      "%s: the server asks faster than it takes answers (%zu wait)", c->name,
                      c->answers);
    if (err.cls)
        orch_mcp_client_fail(c, &err);
}

/* ---- what is wanted to go on with a call */

static void input_id(const struct orch_mcp_client_call *k, size_t i, char out[64])
{
    snprintf(out, 64, "\"orch-%llu-%zu\"", (unsigned long long)k->round, i);
}

static void drop_inputs(struct orch_mcp_client_call *k)
{
    struct orch_mcp_client *c = k->client;
    for (size_t i = 0; i < k->n_inputs; i++) {
        char id[64];
        input_id(k, i, id);
        if (!k->inputs[i].answer.n && c->o.withdrawn && !c->freed)
            c->o.withdrawn(c->o.ud, orch_slice_str(id));
        orch_buf_free(&k->inputs[i].key);
        orch_buf_free(&k->inputs[i].answer);
    }
    free(k->inputs);
    k->inputs = NULL;
    k->n_inputs = k->n_answered = 0;
    k->state.n = 0;
}

/* The one that waits for an answer under this id. */
static struct orch_mcp_input *input_by_id(struct orch_mcp_client *c, struct orch_slice id,
                                          struct orch_mcp_client_call **of)
{
    struct orch_mcp_client_call *k;
    TAILQ_FOREACH (k, &c->calls, link)
        for (size_t i = 0; i < k->n_inputs; i++) {
            char own[64];
            input_id(k, i, own);
            if (!k->inputs[i].answer.n && orch_slice_eq(id, own)) {
                *of = k;
                return &k->inputs[i];
            }
        }
    return NULL;
}

/* In a turn of its own: the one who answers may be in the midst of something. */
static void rounds_soon(struct orch_mcp_client *c)
{
    if (!c->rounds_posted)
        orch_loop_post(c->loop, orch_mcp_rounds_go, c);
    c->rounds_posted = true;
}

void orch_mcp_rounds_go(void *ud)
{
    struct orch_mcp_client *c = ud;
    struct orch_mcp_client_call *k = TAILQ_FIRST(&c->calls);
    c->rounds_posted = false;
    orch_mcp_client_enter(c);
    while (k && !c->dead) {
        struct orch_mcp_client_call *next = TAILQ_NEXT(k, link);
        if (k->refused) {
            cleanup_free char *why = orch_steal_ptr(&k->refused);
            orch_mcp_call_fail(k, ORCH_CLASS_UPSTREAM, EREMOTEIO, why);
            next = TAILQ_FIRST(&c->calls);
        } else if (k->n_inputs && k->n_answered == k->n_inputs) {
            orch_mcp_call_send(k, NULL, NULL);
        }
        k = next;
    }
    orch_mcp_client_leave(c);
}

static void refuse_call(struct orch_mcp_client_call *k, const char *why)
{
    if (k->refused)
        return;
    k->refused = orch_xasprintf("%s asks for what cannot be had: %s", orch_mcp_call_method(k), why);
    rounds_soon(k->client);
}

bool orch_mcp_is_question(const struct orch_mcp_client *c, const struct orch_json_doc *d,
                          uint32_t method, const char **name)
{
    static const char *const questions[] = { "elicitation/create", "sampling/createMessage",
                                             "roots/list" };
    for (size_t i = 0; c->o.asked && i < ORCH_ARRAY_LEN(questions) - !c->o.roots; i++)
        if (orch_json_string_eq(d, method, questions[i])) {
            *name = questions[i];
            return true;
        }
    return false;
}

uint32_t orch_mcp_object_at(const struct orch_json_doc *d, uint32_t object, const char *key)
{
    uint32_t tok = orch_json_get(d, object, key);
    return tok && d->toks[tok].type == ORCH_JSON_OBJECT ? tok : 0;
}

/* Asks for all of it. The calls of asked may answer, refuse, cancel. */
static void ask_inputs(struct orch_mcp_client *c, int64_t round, const struct orch_json_doc *d,
                       uint32_t requests)
{
    uint32_t key = requests + 1;
    for (uint32_t i = 0; i < d->toks[requests].count && !c->dead;
         i++, key = d->toks[key + 1].next) {
        struct orch_mcp_client_call *k;
        const char *name;
        char id[64];
        TAILQ_FOREACH (k, &c->calls, link)
            if (k->n_inputs && (int64_t)k->round == round)
                break;
        if (!k || k->refused)
            return;
        uint32_t method = orch_json_get(d, key + 1, "method");
        if (!method || !orch_mcp_is_question(c, d, method, &name)) {
            struct orch_slice asked = method ? orch_json_raw(d, method)
                                             : ORCH_SLICE("something without a method");
            cleanup_free char *why = orch_xasprintf("%.*s is not offered by this client",
                                                    asked.n > 100 ? 100 : (int)asked.n, asked.p);
            refuse_call(k, why);
            return;
        }
        input_id(k, i, id);
        c->asks = k;
        c->o.asked(c->o.ud, orch_slice_str(id), name, d, orch_mcp_object_at(d, key + 1, "params"));
        c->asks = NULL;
    }
}

/* The server wants more before it can answer: its questions, and what it wants to see again. */
void orch_mcp_call_round(struct orch_mcp_client_call *k, uint32_t result)
{
    struct orch_mcp_client *c = k->client;
    const struct orch_json_doc *d = &c->doc;
    uint32_t requests = orch_json_get(d, result, "inputRequests"),
             state = orch_json_get(d, result, "requestState");
    k->id = 0;
    if (++k->rounds > ROUNDS_MAX) {
        cleanup_free char *why = orch_xasprintf("%s was not done after %d rounds of questions",
                                                orch_mcp_call_method(k), ROUNDS_MAX);
        orch_mcp_call_fail(k, ORCH_CLASS_LIMIT, ELOOP, why);
        return;
    }
    if (requests &&
        (d->toks[requests].type != ORCH_JSON_OBJECT || d->toks[requests].count > INPUTS_MAX)) {
        orch_mcp_call_fail(k, ORCH_CLASS_UPSTREAM, EPROTO,
                           "the inputRequests of its answer are no object, or too many");
        return;
    }
    if (state && d->toks[state].type != ORCH_JSON_STRING) {
        orch_mcp_call_fail(k, ORCH_CLASS_UPSTREAM, EPROTO,
                           "the requestState of its answer is no string");
        return;
    }
    size_t n = requests ? d->toks[requests].count : 0;
    if (!n && !state) {
        orch_mcp_call_fail(k, ORCH_CLASS_UPSTREAM, EPROTO,
                           "input_required without a question and without a state");
        return;
    }
    if (state)
        orch_buf_slice(&k->state, orch_json_raw(d, state));
    if (!n) {
        orch_mcp_call_send(k, NULL, NULL);
        return;
    }
    k->inputs = orch_xcalloc(n, sizeof *k->inputs);
    k->n_inputs = n;
    k->round = ++c->next_round;
    uint32_t key = requests + 1;
    for (size_t i = 0; i < n; i++, key = d->toks[key + 1].next)
        orch_buf_slice(&k->inputs[i].key, orch_json_raw(d, key));
    ask_inputs(c, (int64_t)k->round, d, requests);
}

struct orch_mcp_client_call *orch_mcp_client_asking(const struct orch_mcp_client *c)
{
    return c->asks;
}

void orch_mcp_client_reply(struct orch_mcp_client *c, struct orch_slice id,
                           struct orch_slice result)
{
    struct orch_mcp_client_call *k;
    if (c->dead)
        return;
    if (c->modern) {
        struct orch_mcp_input *in = input_by_id(c, id, &k);
        if (!in || !result.n)
            return;
        orch_buf_slice(&in->answer, result);
        if (++k->n_answered == k->n_inputs)
            rounds_soon(c);
        return;
    }
    size_t from = c->out.n;
    orch_rpc_result_head(&c->out, id);
    orch_buf_slice(&c->out, result);
    orch_buf_char(&c->out, '}');
    reply_end(c, from);
}

void orch_mcp_client_refuse(struct orch_mcp_client *c, struct orch_slice id, int code,
                            const char *why)
{
    struct orch_mcp_client_call *k;
    if (c->dead)
        return;
    if (c->modern) {
        if (input_by_id(c, id, &k))
            refuse_call(k, why);
        return;
    }
    size_t from = c->out.n;
    orch_rpc_error(&c->out, id, code, orch_slice_str(why), (struct orch_slice){ 0 });
    reply_end(c, from);
}
