#include "stream.h"

#include "headers.h"
#include "../base/hash.h"
#include "../base/log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum {
    SESSIONS_MAX = 4096,
    SESSION_IDLE_MS = 60 * 60 * 1000,
    STREAMS_MAX = 1024, /* of one session, ended ones that are kept included */
    ENDED_MAX = 16,     /* ended streams kept for a client that lost the end */
    EVENTS_MAX = 256,   /* kept of one stream */
    EVENTS_MAX_BYTES = 1 << 20,
    KEPT_MAX_BYTES = 64 << 20, /* of all streams */
    SPARE_SESSIONS = 64,
    BUCKETS = 1024,
};

struct event {
    uint64_t seq;
    struct orch_buf data;
};

struct session;

/* A stream: a POST and its answer, or a session's GET stream (number 0). */
struct stream {
    struct stream *next, *prev; /* of its session, or of the endpoint */
    struct orch_mcp_endpoint *e;
    struct session *session; /* legacy; NULL otherwise */
    /* of a modern POST, or of an initialize until its session is made */
    struct orch_mcp_session *mcp;
    struct orch_http_reply *reply;     /* NULL: not connected */
    const struct orch_http_request *q; /* while the message is handed over */
    void *peer;
    uint64_t number, seq;
    struct event *events; /* a ring */
    size_t n_events, first, bytes;
    bool started, done, dead;
};

struct session {
    struct session *chain, *next, *prev; /* of its bucket; by last use */
    char id[33];
    struct orch_mcp_session *mcp;
    struct orch_mcp_endpoint *e;
    struct stream general, *streams; /* streams: newest first */
    size_t n_streams, n_ended;
    uint64_t next_number;
    int64_t used_ms;
};

struct orch_mcp_endpoint {
    struct orch_loop *loop;
    struct orch_mcp_endpoint_opts o;
    struct session *buckets[BUCKETS], *oldest, *newest;
    size_t n_sessions, n_spare, kept_bytes;
    struct stream *streams, *dead; /* without a session; to be freed in the next turn */
    struct spare {
        void *peer;
        struct orch_mcp_session *mcp;
    } spare[SPARE_SESSIONS];
    struct orch_timer *sweep;
    char why[256]; /* what check_headers found */
    bool reaping;
};

/* ---- plain answers */

static void reply_json(struct orch_http_reply *r, int status, struct orch_slice body,
                       const char *session_id)
{
    struct orch_http_header h[2] = { { ORCH_SLICE("Content-Type"), ORCH_SLICE("application/json") },
                                     { ORCH_SLICE("Mcp-Session-Id"), orch_slice_str(session_id) } };
    orch_http_reply_send(r, status, h, session_id ? 2 : 1, body);
}

static void refuse(struct orch_http_reply *r, int status, int code, const char *text)
{
    cleanup_buf struct orch_buf b = { 0 };
    orch_rpc_error(&b, (struct orch_slice){ 0 }, code, orch_slice_str(text),
                   (struct orch_slice){ 0 });
    reply_json(r, status, (struct orch_slice){ b.p, b.n }, NULL);
}

static void refuse_method(struct orch_http_reply *r, const char *allow)
{
    struct orch_http_header h = { ORCH_SLICE("Allow"), orch_slice_str(allow) };
    orch_http_reply_send(r, 405, &h, 1, (struct orch_slice){ 0 });
}

/* ---- streams and their events */

static bool resumable(const struct stream *st)
{
    return st->session && strcmp(orch_mcp_session_version(st->session->mcp), ORCH_MCP_LEGACY) == 0;
}

static void event_id(const struct stream *st, uint64_t seq, char out[64])
{
    snprintf(out, 64, "%llu-%llu", (unsigned long long)st->number, (unsigned long long)seq);
}

static void drop_oldest(struct stream *st)
{
    struct event *ev = &st->events[st->first];
    st->bytes -= ev->data.n;
    st->e->kept_bytes -= ev->data.n;
    orch_buf_free(&ev->data);
    st->first = (st->first + 1) % EVENTS_MAX;
    st->n_events--;
}

static void keep_event(struct stream *st, struct orch_slice data)
{
    if (!st->events)
        st->events = orch_xcalloc(EVENTS_MAX, sizeof *st->events);
    while (st->n_events && (st->n_events == EVENTS_MAX || st->bytes + data.n > EVENTS_MAX_BYTES ||
                            st->e->kept_bytes + data.n > KEPT_MAX_BYTES))
        drop_oldest(st);
    if (st->e->kept_bytes + data.n > KEPT_MAX_BYTES)
        return; /* it cannot be replayed: a client that has lost it asks again */
    struct event *ev = &st->events[(st->first + st->n_events++) % EVENTS_MAX];
    *ev = (struct event){ .seq = st->seq };
    orch_buf_slice(&ev->data, data);
    st->bytes += data.n;
    st->e->kept_bytes += data.n;
}

static void send_event(struct stream *st, uint64_t seq, struct orch_slice data, int64_t retry_ms)
{
    char id[64];
    event_id(st, seq, id);
    if (st->reply)
        orch_http_sse_send(st->reply,
                           &(struct orch_sse_event){ .id = resumable(st) ? orch_slice_str(id)
                                                                         : (struct orch_slice){ 0 },
                                                     .data = data,
                                                     .has_data = true,
                                                     .retry_ms = retry_ms });
}

static void on_gone(void *ud, enum orch_http_gone why);

static void attach(struct stream *st, struct orch_http_reply *r)
{
    st->reply = r;
    orch_http_reply_on_gone(r, on_gone, st);
}

static void start(struct stream *st)
{
    struct orch_http_header h = { ORCH_SLICE("Mcp-Session-Id"),
                                  st->session ? orch_slice_str(st->session->id)
                                              : (struct orch_slice){ 0 } };
    st->started = true;
    if (!st->reply)
        return;
    orch_http_sse_start(st->reply, &h, st->session ? 1 : 0);
    if (resumable(st)) /* so that the client can come back from the first moment on */
        send_event(st, st->seq, ORCH_SLICE(""), 0);
}

static void stream_fini(struct stream *st)
{
    while (st->n_events)
        drop_oldest(st);
    free(st->events);
    st->events = NULL;
}

/* ---- ending streams */

static void unlink_stream(struct stream *st)
{
    struct session *s = st->session;
    struct stream **head = s ? &s->streams : &st->e->streams;
    if (st->prev)
        st->prev->next = st->next;
    else
        *head = st->next;
    if (st->next)
        st->next->prev = st->prev;
    if (s) {
        s->n_streams--;
        s->n_ended -= st->done;
    }
}

static void link_stream(struct stream *st)
{
    struct stream **head = st->session ? &st->session->streams : &st->e->streams;
    st->prev = NULL;
    st->next = *head;
    if (*head)
        (*head)->prev = st;
    *head = st;
    if (st->session)
        st->session->n_streams++;
}

/* Its MCP session may be on the C stack now, so what is left of a stream goes in a turn of its
 * own. */
static void reap(void *ud)
{
    struct orch_mcp_endpoint *e = ud;
    e->reaping = false;
    while (e->dead) {
        struct stream *st = e->dead;
        e->dead = st->next;
        if (st->mcp && e->n_spare < SPARE_SESSIONS && orch_mcp_session_unused(st->mcp))
            e->spare[e->n_spare++] = (struct spare){ st->peer, st->mcp };
        else
            orch_mcp_session_free(st->mcp);
        stream_fini(st);
        free(st);
    }
}

static void bury(struct stream *st)
{
    struct orch_mcp_endpoint *e = st->e;
    if (st->dead)
        return;
    unlink_stream(st);
    st->dead = true;
    st->next = e->dead;
    e->dead = st;
    if (!e->reaping)
        orch_loop_post(e->loop, reap, e);
    e->reaping = true;
}

/* The answer is out. What a client may still come back for is kept, up to a number. */
static void finish(struct stream *st)
{
    struct session *s = st->session;
    st->reply = NULL;
    if (!s || !resumable(st) || !st->n_events) {
        bury(st);
        return;
    }
    st->done = true;
    if (++s->n_ended <= ENDED_MAX)
        return;
    struct stream *oldest = NULL;
    for (struct stream *o = s->streams; o; o = o->next)
        if (o->done && !o->reply)
            oldest = o;
    if (oldest)
        bury(oldest);
}

static void end_reply(struct stream *st)
{
    struct orch_http_reply *r = orch_steal_ptr(&st->reply);
    if (!r)
        return;
    orch_http_reply_on_gone(r, NULL, NULL);
    if (st->started)
        orch_http_sse_end(r);
    else
        /* as a message that has no answer */
        orch_http_reply_send(r, 202, NULL, 0, (struct orch_slice){ 0 });
}

static void on_gone(void *ud, enum orch_http_gone why)
{
    struct stream *st = ud;
    (void)why;
    end_reply(st);
    if (st->session)
        return; /* disconnecting cancels nothing in the legacy era */
    orch_mcp_session_end(st->mcp);
    st->e->o.handled(st->e->o.ud);
    bury(st);
}

/* ---- what sessions send */

static void make_session(struct stream *st);

static void send_message(void *ud, void *stream, struct orch_slice message, int status)
{
    struct session *s = ud;
    struct stream *st = stream ? stream : s ? &s->general : NULL;
    if (!st)
        return; /* a modern session has nothing to say beside its request */
    if (!message.n) {
        end_reply(st);
        finish(st);
        return;
    }
    if (!st->session && st->mcp && orch_mcp_session_version_agreed(st->mcp))
        make_session(st);
    if (status && !st->started && st->reply) {
        struct orch_http_reply *r = st->reply;
        orch_http_reply_on_gone(r, NULL, NULL);
        reply_json(r, status, message, st->session && st->mcp ? st->session->id : NULL);
        st->mcp = st->session ? NULL : st->mcp;
        finish(st);
        return;
    }
    if (!st->started)
        start(st);
    st->seq++;
    if (st->session && resumable(st))
        keep_event(st, message);
    send_event(st, st->seq, message, 0);
    if (status) {
        end_reply(st);
        finish(st);
    }
}

static const char *check_header(struct stream *st, const char *name, struct orch_slice want,
                                const char *what)
{
    char *text = st->e->why;
    struct orch_slice value;
    cleanup_buf struct orch_buf decoded = { 0 };
    size_t n = orch_http_header(st->q, name, &value);
    if (n != 1) {
        snprintf(text, sizeof st->e->why, "the header %s is %s; it must be the same as %s", name,
                 n ? "there more than once" : "missing", what);
        return text;
    }
    if (orch_mcp_header_decode(value, &decoded) < 0 || decoded.n != want.n ||
        memcmp(decoded.p, want.p, want.n) != 0) {
        snprintf(text, sizeof st->e->why, "the header %s is not the same as %s", name, what);
        return text;
    }
    return NULL;
}

static const char *check_member(struct stream *st, const char *header,
                                const struct orch_json_doc *d, uint32_t obj, const char *key,
                                const char *what)
{
    cleanup_buf struct orch_buf text = { 0 };
    uint32_t tok = obj ? orch_json_get(d, obj, key) : 0;
    if (!tok || orch_json_string(d, tok, &text) < 0)
        return NULL; /* the session says what is wrong with it */
    return check_header(st, header, orch_slice_of(&text), what);
}

/* The headers that an intermediary may act on must say what the body says. */
static const char *check_headers(void *ud, void *stream, const struct orch_json_doc *d,
                                 const struct orch_rpc_msg *m)
{
    static const char *const named[][3] = {
        { "tools/call", "name", "params.name" },       { "prompts/get", "name", "params.name" },
        { "resources/read", "uri", "params.uri" },     { "tasks/get", "taskId", "params.taskId" },
        { "tasks/update", "taskId", "params.taskId" }, { "tasks/cancel", "taskId", "params.taskId" }
    };
    struct stream *st = stream;
    const struct orch_http_request *q = st ? st->q : NULL;
    (void)ud;
    if (!q)
        return NULL;
    uint32_t meta = m->params ? orch_json_get(d, m->params, "_meta") : 0;
    const char *why = check_member(st, "MCP-Protocol-Version", d, meta,
                                   ORCH_MCP_META "protocolVersion", "the protocolVersion in _meta");
    cleanup_buf struct orch_buf method = { 0 };
    orch_json_string(d, m->method, &method);
    if (!why)
        why = check_header(st, "Mcp-Method", (struct orch_slice){ method.p, method.n },
                           "the method");
    for (size_t i = 0; !why && i < ORCH_ARRAY_LEN(named); i++) {
        if (strcmp(method.p, named[i][0]) != 0)
            continue;
        why = check_member(st, "Mcp-Name", d, m->params, named[i][1], named[i][2]);
        cleanup_buf struct orch_buf name = { 0 };
        uint32_t tok = m->params ? orch_json_get(d, m->params, "name") : 0,
                 args = tok ? orch_json_get(d, m->params, "arguments") : 0;
        if (!why && i == 0 && tok && orch_json_string(d, tok, &name) == 0)
            why = st->e->o.check_params(st->e->o.ud, q, d, (struct orch_slice){ name.p, name.n },
                                        args);
    }
    return why;
}

/* ---- sessions */

static struct session **bucket(struct orch_mcp_endpoint *e, const char *id)
{
    uint32_t h = 2166136261u;
    for (; *id; id++)
        h = (h ^ (unsigned char)*id) * 16777619u;
    return &e->buckets[h % BUCKETS];
}

static void unlink_use(struct session *s)
{
    struct orch_mcp_endpoint *e = s->e;
    if (s->prev)
        s->prev->next = s->next;
    else
        e->oldest = s->next;
    if (s->next)
        s->next->prev = s->prev;
    else
        e->newest = s->prev;
}

static void link_use(struct session *s)
{
    struct orch_mcp_endpoint *e = s->e;
    s->used_ms = orch_loop_now_ms(e->loop);
    s->next = NULL;
    s->prev = e->newest;
    if (e->newest)
        e->newest->next = s;
    else
        e->oldest = s;
    e->newest = s;
}

static struct session *find_session(struct orch_mcp_endpoint *e, struct orch_slice id)
{
    char text[33];
    if (id.n != 32)
        return NULL;
    memcpy(text, id.p, 32);
    text[32] = 0;
    struct session *s = *bucket(e, text);
    while (s && strcmp(s->id, text) != 0)
        s = s->chain;
    return s;
}

static void session_free(struct session *s)
{
    struct orch_mcp_endpoint *e = s->e;
    struct session **at = bucket(e, s->id);
    while (*at != s)
        at = &(*at)->chain;
    *at = s->chain;
    unlink_use(s);
    e->n_sessions--;
    orch_mcp_session_end(s->mcp);
    e->o.handled(e->o.ud);
    orch_mcp_session_free(s->mcp);
    while (s->streams) {
        struct stream *st = s->streams;
        end_reply(st);
        unlink_stream(st);
        stream_fini(st);
        free(st);
    }
    end_reply(&s->general);
    stream_fini(&s->general);
    free(s);
}

static bool idle(const struct session *s)
{
    return !s->general.reply && orch_mcp_session_in_flight(s->mcp) == 0;
}

static void sweep(void *ud)
{
    struct orch_mcp_endpoint *e = ud;
    int64_t now = orch_loop_now_ms(e->loop);
    for (struct session *s = e->oldest, *next; s && now - s->used_ms >= SESSION_IDLE_MS; s = next) {
        next = s->next;
        if (idle(s)) {
            session_free(s);
        } else {
            unlink_use(s);
            link_use(s);
        }
    }
    orch_timer_set(e->sweep, SESSION_IDLE_MS / 4);
}

/* The stream's initialize was accepted: its MCP session becomes one with an id. */
static void make_session(struct stream *st)
{
    struct orch_mcp_endpoint *e = st->e;
    struct session *s = orch_xcalloc(1, sizeof *s);
    uint8_t random[16];
    if (orch_random(random, sizeof random) < 0)
        abort();
    orch_hex(random, sizeof random, s->id);
    s->e = e;
    s->mcp = st->mcp;
    s->general = (struct stream){ .e = e, .session = s };
    struct session **at = bucket(e, s->id);
    s->chain = *at;
    *at = s;
    link_use(s);
    e->n_sessions++;
    unlink_stream(st);
    st->session = s;
    st->number = ++s->next_number;
    link_stream(st);
    orch_mcp_session_sink(s->mcp, send_message, check_headers, s);
    orch_mcp_session_share(s->mcp, NULL);
}

/* ---- requests */

static struct orch_mcp_session *take_modern(struct orch_mcp_endpoint *e, void *peer)
{
    if (e->n_spare && e->spare[e->n_spare - 1].peer == peer)
        return e->spare[--e->n_spare].mcp;
    struct orch_mcp_session *mcp = orch_mcp_session_new(e->o.ops, peer, &e->o.limits);
    orch_mcp_session_sink(mcp, send_message, check_headers, NULL);
    orch_mcp_session_share(mcp, e->o.in_flight(peer));
    return mcp;
}

static bool accepts(const struct orch_http_request *q, const char *type)
{
    struct orch_slice value;
    if (!orch_http_header(q, "Accept", &value))
        return false;
    cleanup_free char *family = orch_xasprintf("%.*s/*", (int)strcspn(type, "/"), type);
    for (size_t i = 0; i < q->n_headers; i++) {
        struct orch_slice v = q->headers[i].value;
        if (!orch_http_name_eq(q->headers[i].name, "Accept"))
            continue;
        for (size_t k = 0; k < v.n; k++) {
            struct orch_slice rest = { v.p + k, v.n - k };
            if ((k == 0 || v.p[k - 1] == ',' || v.p[k - 1] == ' ') &&
                (orch_http_begins(rest, type) || orch_http_begins(rest, family) ||
                 orch_http_begins(rest, "*/*")))
                return true;
        }
    }
    return false;
}

static bool is_json(const struct orch_http_request *q)
{
    struct orch_slice v;
    static const char type[] = "application/json";
    size_t n = sizeof type - 1;
    return orch_http_header(q, "Content-Type", &v) == 1 && orch_http_begins(v, type) &&
           (v.n == n || v.p[n] == ';' || v.p[n] == ' ');
}

static void post(struct orch_mcp_endpoint *e, const struct orch_http_request *q,
                 struct orch_http_reply *r, struct session *s)
{
    if (s && s->n_streams >= STREAMS_MAX) {
        refuse(r, 503, ORCH_RPC_TOO_MANY_CALLS, "too many requests of this session are under way");
        return;
    }
    struct stream *st = orch_xcalloc(1, sizeof *st);
    st->e = e;
    st->session = s;
    st->q = q;
    if (s)
        st->number = ++s->next_number;
    else
        st->mcp = take_modern(e, st->peer = e->o.peer(e->o.ud, q->peer));
    link_stream(st);
    attach(st, r);
    bool answers = orch_mcp_session_feed(s ? s->mcp : st->mcp, q->body, st);
    st->q = NULL;
    if (!answers) {
        orch_http_reply_on_gone(r, NULL, NULL);
        st->reply = NULL;
        orch_http_reply_send(r, 202, NULL, 0, (struct orch_slice){ 0 });
        bury(st);
    }
    e->o.handled(e->o.ud);
}

static bool make_room(struct orch_mcp_endpoint *e)
{
    if (e->n_sessions < SESSIONS_MAX)
        return true;
    if (!idle(e->oldest))
        return false;
    session_free(e->oldest);
    return true;
}

static void do_post(struct orch_mcp_endpoint *e, const struct orch_http_request *q,
                    struct orch_http_reply *r)
{
    struct orch_slice id, version;
    size_t n_id = orch_http_header(q, "Mcp-Session-Id", &id),
           n_version = orch_http_header(q, "MCP-Protocol-Version", &version);
    bool modern = n_version == 1 && orch_slice_eq(version, ORCH_MCP_MODERN);
    struct session *s = NULL;
    if (!is_json(q)) {
        refuse(r, 415, ORCH_RPC_INVALID_REQUEST, "Content-Type must be application/json");
    } else if (!accepts(q, "application/json") || !accepts(q, "text/event-stream")) {
        refuse(r, 406, ORCH_RPC_INVALID_REQUEST,
               "Accept must name application/json and text/event-stream");
    } else if (n_id > 1 || n_version > 1) {
        refuse(r, 400, ORCH_RPC_INVALID_REQUEST,
               "Mcp-Session-Id and MCP-Protocol-Version may be there once");
    } else if (n_id && !modern && !(s = find_session(e, id))) {
        refuse(r, 404, ORCH_RPC_INVALID_REQUEST,
               "there is no such session (any more); initialize again");
    } else if (s && n_version && !orch_rpc_legacy_version(version)) {
        refuse(r, 400, ORCH_RPC_INVALID_REQUEST,
               "MCP-Protocol-Version is none that a session here can have");
    } else if (!s && !modern && !make_room(e)) {
        refuse(r, 503, ORCH_RPC_TOO_MANY_CALLS, "too many sessions");
    } else {
        if (s) {
            unlink_use(s);
            link_use(s);
        }
        post(e, q, r, s);
    }
}

/* The stream and event that Last-Event-ID names, NULL when it is gone. */
static struct stream *find_stream(struct session *s, struct orch_slice last, uint64_t *seq)
{
    char text[64];
    unsigned long long number, at;
    if (last.n >= sizeof text)
        return NULL;
    memcpy(text, last.p, last.n);
    text[last.n] = 0;
    if (sscanf(text, "%llu-%llu", &number, &at) != 2)
        return NULL;
    struct stream *st = number ? s->streams : &s->general;
    while (st && st->number != number)
        st = st->next;
    *seq = at;
    return st && at <= st->seq ? st : NULL;
}

static void do_get(struct orch_mcp_endpoint *e, const struct orch_http_request *q,
                   struct orch_http_reply *r, struct session *s)
{
    struct orch_slice last;
    uint64_t seq = 0;
    bool resume = orch_http_header(q, "Last-Event-ID", &last) == 1;
    struct stream *st = resume ? find_stream(s, last, &seq) : &s->general;
    if (!accepts(q, "text/event-stream")) {
        refuse(r, 406, ORCH_RPC_INVALID_REQUEST, "Accept must name text/event-stream");
        return;
    }
    if (!st) {
        refuse(r, 400, ORCH_RPC_INVALID_REQUEST,
               "Last-Event-ID names no stream that can be resumed");
        return;
    }
    if (st->reply && !resume) {
        refuse(r, 409, ORCH_RPC_INVALID_REQUEST, "the session has a GET stream already");
        return;
    }
    (void)e;
    end_reply(st); /* a connection that its client has given up */
    if (!resume)
        seq = st->n_events ? st->events[st->first].seq - 1 : st->seq;
    attach(st, r);
    uint64_t newest = st->seq;
    st->seq = seq;
    start(st);
    st->seq = newest;
    for (size_t i = 0; i < st->n_events; i++) {
        struct event *ev = &st->events[(st->first + i) % EVENTS_MAX];
        if (ev->seq > seq)
            send_event(st, ev->seq, (struct orch_slice){ ev->data.p, ev->data.n }, 0);
    }
    if (st->done)
        end_reply(st);
}

static const char *refused(const struct orch_mcp_endpoint *e, const struct orch_http_request *q)
{
    return e->o.hosts ? orch_http_name_refused(q, e->o.hosts) : NULL;
}

void orch_mcp_endpoint_request(void *ud, const struct orch_http_request *q,
                               struct orch_http_reply *r)
{
    struct orch_mcp_endpoint *e = ud;
    const char *why = refused(e, q);
    struct orch_slice id, version;
    if (why) {
        orch_log(ORCH_WARN, "mcp http: refused: %s", why);
        refuse(r, 403, ORCH_RPC_INVALID_REQUEST, "this Host or Origin is not served");
        return;
    }
    if (e->o.token_sha256 && !orch_http_bearer_ok(q, e->o.token_sha256)) {
        struct orch_http_header h = { ORCH_SLICE("WWW-Authenticate"), ORCH_SLICE("Bearer") };
        orch_http_reply_send(r, 401, &h, 1, (struct orch_slice){ 0 });
        return;
    }
    if (orch_slice_eq(q->method, "POST")) {
        do_post(e, q, r);
        return;
    }
    bool get = orch_slice_eq(q->method, "GET"), delete = orch_slice_eq(q->method, "DELETE");
    orch_http_header(q, "MCP-Protocol-Version", &version);
    if ((!get && !delete) || orch_slice_eq(version, ORCH_MCP_MODERN)) {
        refuse_method(r, "POST");
        return;
    }
    if (orch_http_header(q, "Mcp-Session-Id", &id) != 1) {
        refuse(r, 400, ORCH_RPC_INVALID_REQUEST, "Mcp-Session-Id is missing");
        return;
    }
    struct session *s = find_session(e, id);
    if (!s) {
        refuse(r, 404, ORCH_RPC_INVALID_REQUEST,
               "there is no such session (any more); initialize again");
    } else if (get) {
        unlink_use(s);
        link_use(s);
        do_get(e, q, r, s);
    } else {
        session_free(s);
        orch_http_reply_send(r, 204, NULL, 0, (struct orch_slice){ 0 });
    }
}

/* ---- the endpoint */

struct orch_mcp_endpoint *orch_mcp_endpoint_new(struct orch_loop *l,
                                                const struct orch_mcp_endpoint_opts *o)
{
    struct orch_mcp_endpoint *e = orch_xcalloc(1, sizeof *e);
    e->loop = l;
    e->o = *o;
    e->sweep = orch_timer_new(l, sweep, e);
    orch_timer_set(e->sweep, SESSION_IDLE_MS / 4);
    return e;
}

void orch_mcp_endpoint_each(struct orch_mcp_endpoint *e,
                            void (*fn)(void *ud, struct orch_mcp_session *s), void *ud)
{
    for (struct session *s = e->oldest; s; s = s->next)
        fn(ud, s->mcp);
    for (struct stream *st = e->streams; st; st = st->next)
        fn(ud, st->mcp);
}

void orch_mcp_endpoint_free(struct orch_mcp_endpoint *e)
{
    if (!e)
        return;
    while (e->oldest)
        session_free(e->oldest);
    while (e->streams) {
        struct stream *st = e->streams;
        end_reply(st);
        orch_mcp_session_end(st->mcp);
        bury(st);
    }
    e->o.handled(e->o.ud);
    orch_loop_unpost(e->loop, reap, e);
    reap(e);
    while (e->n_spare)
        orch_mcp_session_free(e->spare[--e->n_spare].mcp);
    orch_timer_free(e->sweep);
    free(e);
}

void orch_mcp_stream_release(void *stream, int64_t retry_ms)
{
    struct stream *st = stream;
    if (!st->session || !resumable(st) || !st->reply)
        return;
    if (!st->started)
        start(st);
    orch_http_sse_send(st->reply, &(struct orch_sse_event){ .retry_ms = retry_ms });
    end_reply(st);
}
