/* The client's way over Streamable HTTP: an exchange for each message, whose answer is JSON or a
 * stream of events. In the legacy era also a session, one GET stream for what belongs to no
 * request, and streams that are taken up where they broke off; in the modern era headers that
 * repeat what the message says. */
#include "client_int.h"

#include "headers.h"
#include "../base/log.h"

#include <errno.h>
#include <string.h>

enum {
    HEADERS_MAX = 2 * ORCH_HTTP_HEADERS_MAX, /* the owner's, and the client's own */
    TOOLS_MAX = 4096,                        /* whose arguments are repeated in headers */
    SESSION_ID_MAX = 1024,
    EVENT_ID_MAX = 1024, /* of one that can be gone back to */
    CONNECT_MS = 30 * 1000,
    TAKEN_MS = 60 * 1000,      /* for what has no answer */
    LISTEN_MS = 2000,          /* what is asked before the GET stream stands may be lost */
    PAUSE_MAX_MS = 30 * 1000,  /* before a stream is asked for again */
    RETRY_MAX_MS = 600 * 1000, /* if the server says when */
    GOODBYE_MS = 1000,
};

enum what { REQUEST, NOTE, OTHER, LISTEN, GOODBYE };

struct http;

struct orch_mcp_challenge {
    struct exchange *x;
};

/* Header text: name NUL value NUL … */
struct orch_mcp_headers {
    struct orch_buf text;
};

struct exchange {
    TAILQ_ENTRY(exchange) link;
    struct http *h;
    enum what what;
    int64_t id;
    struct orch_buf body;
    struct orch_mcp_headers extra; /* what the modern era repeats */
    struct orch_http_call *call;
    struct orch_mcp_challenge challenge;
    struct orch_timer *timer; /* it is tried again, or fails of err */
    struct orch_err *err;
    struct orch_sse_reader sse;
    struct orch_buf answer;
    char *last_id; /* of the stream that broke off */
    int64_t retry_ms;
    unsigned tries, times; /* after a stream's end; answered 401 or 403 */
    unsigned session;      /* serial of the one it belongs to; 0: none */
    int status;
    bool initialize, get, stream, json, deciding, dropped;
};

struct tool {
    char *name;
    const char *problem; /* static */
    struct orch_mcp_param_list params;
};

struct http {
    struct orch_mcp_transport t;
    TAILQ_HEAD(exchanges, exchange) exchanges, dropped;
    char *session;
    unsigned serial; /* of sessions */
    struct orch_timer *listen_timer;
    struct tool *tools;
    size_t n_tools;
};

static void open_exchange(struct exchange *x);
static void lose(struct exchange *x, int status, const struct orch_err *why);

/* ---- exchanges */

static void free_exchange(struct exchange *x)
{
    orch_buf_free(&x->body);
    orch_buf_free(&x->extra.text);
    orch_buf_free(&x->answer);
    orch_sse_reader_fini(&x->sse);
    orch_timer_free(x->timer);
    free(x->last_id);
    free(x->err);
    free(x);
}

static void reap(struct http *h)
{
    struct exchange *x;
    while ((x = TAILQ_FIRST(&h->dropped))) {
        TAILQ_REMOVE(&h->dropped, x, link);
        free_exchange(x);
    }
}

/* Its memory goes when nothing of it is on the stack. */
static void drop(struct exchange *x)
{
    struct http *h = x->h;
    struct orch_mcp_client *c = h->t.client;
    if (x->dropped)
        return;
    x->dropped = true;
    c->answers -= x->what == OTHER;
    orch_http_call_cancel(x->call);
    x->call = NULL;
    orch_timer_cancel(x->timer);
    TAILQ_REMOVE(&h->exchanges, x, link);
    TAILQ_INSERT_TAIL(&h->dropped, x, link);
    if (x->deciding && !c->freed)
        c->auth.withdrawn(c->auth.ud, &x->challenge);
    x->deciding = false;
    if (!c->depth)
        reap(h);
}

static void enter(struct http *h)
{
    orch_mcp_client_enter(h->t.client);
}

static void leave(struct http *h)
{
    if (h->t.client->depth == 1)
        reap(h);
    orch_mcp_client_leave(h->t.client);
}

static void again(void *ud)
{
    struct exchange *x = ud;
    struct http *h = x->h;
    enter(h);
    if (x->err)
        lose(x, 0, x->err);
    else
        open_exchange(x);
    leave(h);
}

static struct exchange *exchange_new(struct http *h, enum what what)
{
    struct exchange *x = orch_xcalloc(1, sizeof *x);
    *x = (struct exchange){ .h = h, .what = what, .challenge = { x }, .get = what == LISTEN };
    x->timer = orch_timer_new(h->t.client->loop, again, x);
    TAILQ_INSERT_TAIL(&h->exchanges, x, link);
    return x;
}

/* The GET stream stands, or there is none. */
static void opened(void *ud)
{
    struct http *h = ud;
    orch_timer_cancel(h->listen_timer);
    enter(h);
    orch_mcp_client_opened(h->t.client);
    leave(h);
}

/* Nothing more comes of it. */
static void lose(struct exchange *x, int status, const struct orch_err *why)
{
    struct http *h = x->h;
    struct orch_mcp_client *c = h->t.client;
    struct orch_err err = *why; /* it may be x's own */
    enum what what = x->what;
    int64_t id = x->id;
    drop(x);
    if (what == REQUEST || what == NOTE)
        orch_mcp_client_failed(c, id, status, &err);
    else if (what == LISTEN)
        opened(h);
    else if (what == GOODBYE)
        orch_mcp_client_said(c);
    else
        orch_log(ORCH_WARN, "%s", err.msg);
}

static void lose_for(struct exchange *x, enum orch_class cls, int code, const char *why)
{
    struct orch_err err = { 0 };
    orch_err_setc(&err, cls, code, "%s: %s", x->h->t.client->name, why);
    lose(x, x->status, &err);
}

/* The answer is of HTTP alone. */
static void lose_for_status(struct exchange *x)
{
    struct orch_err err = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    cleanup_buf struct orch_buf method = { 0 };
    if (orch_json_scan(&d, (struct orch_slice){ x->body.p, x->body.n },
                       &(struct orch_json_limits){ .bytes = ORCH_MCP_OUT_MAX_BYTES }, &fault) == 0)
        orch_json_string(&d, orch_json_get(&d, 0, "method"), &method);
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EPROTO, "%s: HTTP %d to %s: %s", x->h->t.client->name,
                  x->status, method.n ? method.p : "an answer",
                  x->get ? "a stream broke off and cannot be resumed"
                  : x->status == 401
                      ? "it wants authorization (connect with auth or an Authorization header)"
                  : x->status == 403 ? "it forbids this"
                  : x->answer.n      ? "with no JSON-RPC answer in it"
                                     : "without a body");
    lose(x, x->status, &err);
}

/* ---- asking */

void orch_mcp_header_add(struct orch_mcp_headers *h, const char *name, struct orch_slice value)
{
    orch_buf_add(&h->text, name, strlen(name) + 1);
    if (!memchr(value.p, 0, value.n))
        orch_buf_slice(&h->text, value);
    orch_buf_char(&h->text, 0);
}

static void add_if(struct orch_mcp_headers *h, const char *name, const char *value)
{
    if (value)
        orch_mcp_header_add(h, name, orch_slice_str(value));
}

/* Each name once: the client's own go before its owner's. */
static size_t list_headers(const struct orch_mcp_client *c, const struct orch_mcp_headers *own,
                           struct orch_http_header out[HEADERS_MAX])
{
    size_t n = 0;
    struct orch_slice other;
    for (const char *p = own->text.p, *end = p + own->text.n; p && p < end && n < HEADERS_MAX;
         n++) {
        const char *value = p + strlen(p) + 1;
        out[n] = (struct orch_http_header){ orch_slice_str(p), orch_slice_str(value) };
        p = value + strlen(value) + 1;
    }
    for (size_t i = 0, n_own = n; i < c->o.n_headers && n < HEADERS_MAX; i++)
        if (!orch_http_find(out, n_own, c->headers[i].name.p, &other))
            out[n++] = c->headers[i];
    return n;
}

static void on_head(void *ud, const struct orch_http_response *r);
static void on_data(void *ud, struct orch_slice data);
static void on_done(void *ud, const struct orch_http_response *r, const struct orch_err *err);

static void open_exchange(struct exchange *x)
{
    struct http *h = x->h;
    struct orch_mcp_client *c = h->t.client;
    const char *method = x->what == GOODBYE ? "DELETE" : x->get ? "GET" : "POST";
    struct orch_mcp_headers own = { 0 };
    struct orch_http_header list[HEADERS_MAX];
    struct orch_err err = { 0 };
    if (!x->get && x->what != GOODBYE)
        add_if(&own, "Content-Type", "application/json");
    add_if(&own, "Accept", x->get ? "text/event-stream" : "application/json, text/event-stream");
    if (!x->initialize) {
        add_if(&own, "MCP-Protocol-Version", c->version);
        add_if(&own, "Mcp-Session-Id", c->modern ? NULL : h->session);
    }
    add_if(&own, "Last-Event-ID", x->get ? x->last_id : NULL);
    if (c->o.auth)
        c->auth.sign(c->auth.ud, &own, method, c->o.url);
    orch_buf_slice(&own.text, (struct orch_slice){ x->extra.text.p, x->extra.text.n });
    size_t n = list_headers(c, &own, list);
    x->session = x->initialize || c->modern || !h->session ? 0 : h->serial;
    x->stream = x->json = false;
    x->answer.n = 0;
    x->sse.max_line_bytes = x->sse.max_event_bytes = c->o.limits.bytes;
    x->call = orch_http_call_start(c->o.http,
                                   &(struct orch_http_call_opts){
                                       .method = method,
                                       .url = c->o.url,
                                       .headers = list,
                                       .n_headers = n,
                                       .body = x->get ? (struct orch_slice){ 0 }
                                                      : (struct orch_slice){ x->body.p, x->body.n },
                                       .connect_ms = CONNECT_MS,
                                       .total_ms = x->what == GOODBYE ? GOODBYE_MS
                                                   : x->what == NOTE || x->what == OTHER ? TAKEN_MS
                                                                                         : -1,
                                       .idle_ms = -1,
                                       .max_body_bytes = SIZE_MAX / 2,
                                       .on_head = on_head,
                                       .on_data = on_data,
                                       .on_done = on_done,
                                       .ud = x },
                                   &err);
    orch_buf_free(&own.text);
    if (x->call)
        return;
    /* Told later: whoever sends is in the midst of something. */
    x->err = orch_xmalloc(sizeof *x->err);
    *x->err = err;
    orch_timer_set(x->timer, 0);
}

/* ---- answers */

/* The stream is over, and what was waited for has not come. */
static void stream_ended(struct exchange *x, const struct orch_err *err)
{
    struct orch_mcp_client *c = x->h->t.client;
    struct orch_slice id = { x->sse.id.p, x->sse.id.n };
    if (x->sse.retry_ms > 0)
        x->retry_ms = x->sse.retry_ms < RETRY_MAX_MS ? x->sse.retry_ms : RETRY_MAX_MS;
    if (id.n && id.n <= EVENT_ID_MAX && !(x->last_id && orch_slice_eq(id, x->last_id))) {
        free(x->last_id);
        x->last_id = orch_xstrndup(id.p, id.n);
        x->tries = 0;
    }
    orch_sse_reader_fini(&x->sse);
    x->sse = (struct orch_sse_reader){ 0 };
    if (c->modern || x->tries == ORCH_MCP_RETRIES || (x->what == REQUEST && !x->last_id)) {
        lose_for(x, err ? err->cls : ORCH_CLASS_CLOSED, ECONNRESET,
                 err ? err->msg : "the stream ended before the answer");
        return;
    }
    int64_t pause = x->retry_ms ? x->retry_ms : 1000 << x->tries;
    x->tries++;
    x->get = true;
    orch_timer_set(x->timer, x->retry_ms || pause < PAUSE_MAX_MS ? pause : PAUSE_MAX_MS);
}

static bool take_session(struct exchange *x, const struct orch_http_response *r)
{
    struct http *h = x->h;
    struct orch_slice id;
    size_t n = orch_http_find(r->headers, r->n_headers, "Mcp-Session-Id", &id);
    bool ok = n <= 1 && id.n <= SESSION_ID_MAX && (!n || id.n);
    for (size_t i = 0; n && i < id.n; i++)
        ok &= id.p[i] >= 0x21 && id.p[i] <= 0x7e;
    if (!ok) {
        lose_for(x, ORCH_CLASS_UPSTREAM, EPROTO, "its Mcp-Session-Id is no session's id");
        return false;
    }
    free(h->session);
    h->session = n ? orch_xstrndup(id.p, id.n) : NULL;
    h->serial++;
    return true;
}

/* The session that it was sent in is not known there any more. */
static void forgotten(struct exchange *x)
{
    struct http *h = x->h;
    struct orch_mcp_client *c = h->t.client;
    bool stale = x->session != h->serial;
    int64_t id = x->id;
    struct orch_err err = { 0 };
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ENOENT,
                  "%s: the server does not know the session any more (HTTP 404)", c->name);
    drop(x);
    if (!stale) {
        free(h->session);
        h->session = NULL;
    }
    orch_mcp_client_forgotten(c, id, stale, &err);
}

static void act_on_head(struct exchange *x)
{
    struct orch_mcp_client *c = x->h->t.client;
    bool good = x->status >= 200 && x->status < 300;
    switch (x->what) {
    case REQUEST:
        if (x->get && !x->stream)
            lose_for_status(x);
        else if (x->status == 404 && x->session)
            forgotten(x);
        break;
    case NOTE:
    case OTHER:
        if (!good)
            lose_for_status(x);
        else if (x->what == NOTE)
            orch_mcp_client_sent(c, x->id);
        break;
    case LISTEN:
        if (x->status == 200 && x->stream)
            opened(x->h);
        else
            lose_for_status(x);
        break;
    case GOODBYE:
        break;
    }
}

static bool begins(struct orch_slice type, const char *with)
{
    size_t n = strlen(with);
    return type.n >= n && orch_http_name_eq((struct orch_slice){ type.p, n }, with);
}

static void on_head(void *ud, const struct orch_http_response *r)
{
    struct exchange *x = ud;
    struct http *h = x->h;
    struct orch_mcp_client *c = h->t.client;
    struct orch_slice type;
    enter(h);
    x->status = r->status;
    orch_http_find(r->headers, r->n_headers, "Content-Type", &type);
    x->stream = r->status == 200 && begins(type, "text/event-stream");
    x->json = begins(type, "application/json");
    if (c->o.auth && (r->status == 401 || r->status == 403)) {
        x->deciding = true;
        orch_http_call_pause(x->call, true);
        c->auth.challenged(c->auth.ud, &x->challenge, r, ++x->times);
    } else if (!x->initialize || r->status != 200 || take_session(x, r)) {
        act_on_head(x);
    }
    leave(h);
}

void orch_mcp_challenge_end(struct orch_mcp_challenge *q, enum orch_mcp_verdict verdict,
                            const struct orch_err *why)
{
    struct exchange *x = q->x;
    struct http *h = x->h;
    if (!x->deciding)
        return;
    enter(h);
    x->deciding = false;
    if (verdict == ORCH_MCP_AS_IT_IS) {
        orch_http_call_pause(x->call, false);
        act_on_head(x);
    } else if (verdict == ORCH_MCP_AGAIN) {
        orch_http_call_cancel(x->call);
        open_exchange(x);
    } else {
        lose_for(x, why->cls, why->code, why->msg);
    }
    leave(h);
}

static int on_event(void *ud, const struct orch_sse_event *e)
{
    struct exchange *x = ud;
    if (e->data.n)
        orch_mcp_client_take(x->h->t.client, e->data, x->what == REQUEST ? x->id : 0, x->status);
    return x->dropped;
}

static void on_data(void *ud, struct orch_slice data)
{
    struct exchange *x = ud;
    struct http *h = x->h;
    size_t most = h->t.client->o.limits.bytes;
    bool over = false;
    enter(h);
    if (x->stream && (x->what == REQUEST || x->what == LISTEN))
        over = orch_sse_feed(&x->sse, data, on_event, x) < 0;
    else if (x->what == REQUEST && x->answer.n + data.n > most)
        over = true;
    else if (x->what == REQUEST)
        orch_buf_slice(&x->answer, data);
    if (over) {
        cleanup_free char *why = orch_xasprintf("%s is over %zu bytes (limits.message)",
                                                x->stream ? "an event of the stream"
                                                          : "the answer's body",
                                                most);
        lose_for(x, ORCH_CLASS_LIMIT, EMSGSIZE, why);
    }
    leave(h);
}

static void on_done(void *ud, const struct orch_http_response *r, const struct orch_err *err)
{
    struct exchange *x = ud;
    struct http *h = x->h;
    struct orch_mcp_client *c = h->t.client;
    (void)r;
    enter(h);
    x->call = NULL;
    if (x->what == GOODBYE) {
        drop(x);
        orch_mcp_client_said(c);
    } else if (x->what == NOTE || x->what == OTHER) {
        if (err && !x->status)
            lose(x, 0, err);
        else
            drop(x);
    } else if (x->stream || (err && x->get)) {
        stream_ended(x, err);
    } else if (err) {
        lose(x, 0, err);
    } else {
        bool answered = x->json &&
                        orch_mcp_client_take(c, (struct orch_slice){ x->answer.p, x->answer.n },
                                             x->id, x->status);
        if (!answered && !x->dropped)
            lose_for_status(x);
        else
            drop(x);
    }
    leave(h);
}

/* ---- what the modern era says twice */

static struct tool *find_tool(const struct http *h, struct orch_slice name)
{
    for (size_t i = 0; i < h->n_tools; i++)
        if (orch_slice_eq(name, h->tools[i].name))
            return &h->tools[i];
    return NULL;
}

static void tool_fini(struct tool *t)
{
    free(t->name);
    orch_mcp_params_free(&t->params);
}

static void learn_tool(struct http *h, const struct orch_json_doc *d, uint32_t tok)
{
    cleanup_buf struct orch_buf name = { 0 };
    struct tool new = { 0 };
    if (orch_json_string(d, orch_json_get(d, tok, "name"), &name) < 0)
        return;
    struct tool *t = find_tool(h, (struct orch_slice){ name.p, name.n });
    uint32_t schema = orch_json_get(d, tok, "inputSchema");
    if (schema && orch_mcp_params_read(d, schema, &new.params, &new.problem) == 0)
        new.problem = orch_mcp_params_astray(d, schema);
    bool known = t != NULL;
    if (!known && (new.problem || new.params.n) && h->n_tools < TOOLS_MAX) {
        h->tools = orch_xrealloc(h->tools, (h->n_tools + 1) * sizeof *h->tools);
        t = &h->tools[h->n_tools++];
    } else if (!t) {
        orch_mcp_params_free(&new.params);
        return;
    }
    new.name = orch_xstrdup(name.p ? name.p : "");
    if (known)
        tool_fini(t);
    *t = new;
}

void orch_mcp_http_listed(struct orch_mcp_transport *t, const struct orch_json_doc *d,
                          uint32_t tools)
{
    uint32_t tok = tools + 1;
    if (d->toks[tools].type != ORCH_JSON_ARRAY)
        return;
    for (uint32_t i = 0; i < d->toks[tools].count; i++, tok = d->toks[tok].next)
        if (d->toks[tok].type == ORCH_JSON_OBJECT)
            learn_tool((struct http *)t, d, tok);
}

const char *orch_mcp_http_tool_problem(const struct orch_mcp_transport *t, const char *name)
{
    const struct tool *known = find_tool((const struct http *)t, orch_slice_str(name));
    return known ? known->problem : NULL;
}

/* Which member of params names what a method is about. */
static const char *named_by(const struct orch_json_doc *d, uint32_t method)
{
    static const char *const names[][2] = {
        { "tools/call", "name" },  { "prompts/get", "name" },    { "resources/read", "uri" },
        { "tasks/get", "taskId" }, { "tasks/update", "taskId" }, { "tasks/cancel", "taskId" }
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(names); i++)
        if (orch_json_string_eq(d, method, names[i][0]))
            return names[i][1];
    return NULL;
}

static void add_coded(struct orch_mcp_headers *h, const char *name, struct orch_slice text)
{
    cleanup_buf struct orch_buf value = { 0 };
    orch_mcp_header_encode(text, &value);
    orch_mcp_header_add(h, name, (struct orch_slice){ value.n ? value.p : "", value.n });
}

static void repeat_in_headers(struct exchange *x)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf text = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, (struct orch_slice){ x->body.p, x->body.n },
                       &(struct orch_json_limits){ .bytes = ORCH_MCP_OUT_MAX_BYTES }, &fault) < 0)
        return;
    uint32_t method = orch_json_get(&d, 0, "method"), params = orch_json_get(&d, 0, "params");
    if (!method || orch_json_string(&d, method, &text) < 0)
        return;
    add_coded(&x->extra, "Mcp-Method", (struct orch_slice){ text.p, text.n });
    const char *member = named_by(&d, method);
    text.n = 0;
    if (!member || !params || orch_json_string(&d, orch_json_get(&d, params, member), &text) < 0)
        return;
    add_coded(&x->extra, "Mcp-Name", (struct orch_slice){ text.n ? text.p : "", text.n });
    const struct tool *t = orch_json_string_eq(&d, method, "tools/call")
                               ? find_tool(x->h, (struct orch_slice){ text.p, text.n })
                               : NULL;
    uint32_t args = orch_json_get(&d, params, "arguments");
    for (size_t i = 0; t && args && i < t->params.n; i++) {
        cleanup_buf struct orch_buf value = { 0 };
        if (orch_mcp_param_value(&t->params.params[i], &d, args, &value))
            orch_mcp_header_add(&x->extra, t->params.params[i].header,
                                (struct orch_slice){ value.n ? value.p : "", value.n });
    }
}

/* ---- the transport */

static int http_start(struct orch_mcp_transport *t, struct orch_err *err)
{
    (void)t, (void)err;
    return 0;
}

static void http_send(struct orch_mcp_transport *t, size_t from, enum orch_mcp_kind kind,
                      int64_t id)
{
    struct http *h = (struct http *)t;
    struct orch_mcp_client *c = t->client;
    struct exchange *x = exchange_new(h, kind == ORCH_MCP_REQUEST ? REQUEST
                                         : kind == ORCH_MCP_NOTE  ? NOTE
                                                                  : OTHER);
    x->id = id;
    c->answers += x->what == OTHER;
    orch_buf_add(&x->body, c->out.p + from, c->out.n - from);
    c->out.n = from;
    if (c->modern)
        repeat_in_headers(x);
    x->initialize = !c->modern && !c->version;
    if (x->initialize) {
        free(h->session);
        h->session = NULL;
    }
    open_exchange(x);
}

static void http_release(struct orch_mcp_transport *t, int64_t id)
{
    struct http *h = (struct http *)t;
    struct exchange *x;
    TAILQ_FOREACH (x, &h->exchanges, link)
        if (x->id == id) {
            drop(x);
            return;
        }
}

static void http_listen(struct orch_mcp_transport *t)
{
    struct http *h = (struct http *)t;
    struct exchange *x, *next;
    for (x = TAILQ_FIRST(&h->exchanges); x; x = next) {
        next = TAILQ_NEXT(x, link);
        if (x->what == LISTEN)
            drop(x);
    }
    orch_timer_set(h->listen_timer, LISTEN_MS);
    open_exchange(exchange_new(h, LISTEN));
}

static void http_key(struct orch_mcp_transport *t, struct orch_sha256_ctx *s)
{
    struct orch_mcp_client *c = t->client;
    struct orch_mcp_headers own = { 0 };
    struct orch_http_header list[HEADERS_MAX];
    struct orch_slice as = { "", 0 };
    orch_sha256_update(s, c->o.url, strlen(c->o.url) + 1);
    if (c->o.auth)
        c->auth.sign(c->auth.ud, &own, "POST", c->o.url);
    if (orch_http_find(list, list_headers(c, &own, list), "Authorization", &as))
        orch_sha256_update(s, as.p, as.n);
    orch_buf_free(&own.text);
}

static void http_stop(struct orch_mcp_transport *t)
{
    struct http *h = (struct http *)t;
    struct exchange *x;
    orch_timer_cancel(h->listen_timer);
    while ((x = TAILQ_FIRST(&h->exchanges)))
        drop(x);
}

static void http_end(struct orch_mcp_transport *t, int64_t eof_ms, int64_t term_ms)
{
    (void)eof_ms, (void)term_ms;
    http_stop(t);
}

static void http_goodbye(struct orch_mcp_transport *t)
{
    struct http *h = (struct http *)t;
    http_stop(t);
    if (h->session)
        open_exchange(exchange_new(h, GOODBYE));
    else
        orch_loop_post(t->client->loop, orch_mcp_client_said, t->client);
}

static void http_free(struct orch_mcp_transport *t)
{
    struct http *h = (struct http *)t;
    http_stop(t);
    reap(h);
    orch_timer_free(h->listen_timer);
    for (size_t i = 0; i < h->n_tools; i++)
        tool_fini(&h->tools[i]);
    free(h->tools);
    free(h->session);
    free(h);
}

struct orch_mcp_transport *orch_mcp_http_new(struct orch_mcp_client *c)
{
    static const struct orch_mcp_transport_ops ops = { .start = http_start,
                                                       .send = http_send,
                                                       .release = http_release,
                                                       .listen = http_listen,
                                                       .key = http_key,
                                                       .goodbye = http_goodbye,
                                                       .stop = http_stop,
                                                       .end = http_end,
                                                       .free = http_free };
    struct http *h = orch_xcalloc(1, sizeof *h);
    h->t = (struct orch_mcp_transport){ &ops, c };
    TAILQ_INIT(&h->exchanges);
    TAILQ_INIT(&h->dropped);
    h->listen_timer = orch_timer_new(c->loop, opened, h);
    return &h->t;
}
