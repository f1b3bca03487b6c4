/* Which era a server is of, and the handshake. One request finds it out: server/discover, which
 * servers of the modern era must answer. Others mostly refuse it, and initialize follows in the
 * same process. Some end or fall silent at a first request that they do not know: those are
 * started again. That a child has not read its input yet is not silence. */
#include "client_int.h"

#include "../base/log.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

enum {
    URL_VERDICT_MS = 300 * 1000, /* the server behind it may be another one later */
    HANG = 20, /* probe times that one may be silent after initialize was sent behind the probe */
};

/* ---- servers known to be of the legacy era */

static struct orch_mcp_judged *find_verdict(struct orch_mcp_verdicts *v,
                                            const uint8_t key[ORCH_SHA256_BYTES])
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(v->list); i++)
        if (v->list[i].until_ms && memcmp(v->list[i].key, key, ORCH_SHA256_BYTES) == 0)
            return &v->list[i];
    return NULL;
}

static void verdict_key(struct orch_mcp_client *c, uint8_t key[ORCH_SHA256_BYTES])
{
    struct orch_sha256_ctx h;
    orch_sha256_init(&h);
    c->t->ops->key(c->t, &h);
    orch_sha256_final(&h, key);
}

static bool known_legacy(struct orch_mcp_client *c)
{
    uint8_t key[ORCH_SHA256_BYTES];
    if (!c->o.verdicts)
        return false;
    verdict_key(c, key);
    const struct orch_mcp_judged *v = find_verdict(c->o.verdicts, key);
    return v && v->until_ms > orch_now_us() / 1000;
}

static void remember(struct orch_mcp_client *c, bool legacy)
{
    struct orch_mcp_verdicts *all = c->o.verdicts;
    uint8_t key[ORCH_SHA256_BYTES];
    if (!all)
        return;
    verdict_key(c, key);
    struct orch_mcp_judged *v = find_verdict(all, key);
    if (!v && legacy)
        v = &all->list[all->next++ % ORCH_ARRAY_LEN(all->list)];
    if (!v)
        return;
    memcpy(v->key, key, sizeof key);
    v->until_ms = !legacy ? 0 : c->o.url ? orch_now_us() / 1000 + URL_VERDICT_MS : INT64_MAX;
}

/* ---- what the answers hold */

static bool pinned(const struct orch_mcp_client *c, bool modern)
{
    return c->o.protocol && (strcmp(c->o.protocol, ORCH_MCP_MODERN) == 0) == modern;
}

static void keep(struct orch_buf *b, const struct orch_json_doc *d, uint32_t tok)
{
    b->n = 0;
    if (tok)
        orch_buf_slice(b, orch_json_raw(d, tok));
}

static bool names_modern(const struct orch_json_doc *d, uint32_t list)
{
    uint32_t tok = list + 1;
    if (!list || d->toks[list].type != ORCH_JSON_ARRAY)
        return false;
    for (uint32_t i = 0; i < d->toks[list].count; i++, tok = d->toks[tok].next)
        if (orch_json_string_eq(d, tok, ORCH_MCP_MODERN))
            return true;
    return false;
}

/* The JSON-RPC error of the answer: its code, and whether it says that the modern era is spoken.
 * 0: there is none. */
static int64_t error_code(const struct orch_mcp_client *c, bool *modern)
{
    int64_t code = 0;
    *modern = false;
    if (!c->error)
        return 0;
    uint32_t tok = orch_json_get(&c->doc, c->error, "code"),
             data = orch_json_get(&c->doc, c->error, "data");
    if (!tok || !orch_json_int(&c->doc, tok, &code) || !code)
        return 1; /* some error */
    *modern = code == ORCH_RPC_UNSUPPORTED_VERSION && data &&
              names_modern(&c->doc, orch_json_get(&c->doc, data, "supported"));
    return code;
}

static void fail_with(struct orch_mcp_client *c, const char *why, const char *more)
{
    struct orch_err err = { 0 };
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EPROTO, "%s: %s%s", c->name, why, more);
    orch_mcp_client_fail(c, &err);
}

/* ---- ready */

static void subscribe(struct orch_mcp_client *c);

/* Refused: then its lists do not change. Broken off: what happened meanwhile is not known. */
static void listened(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_mcp_client *c = ud;
    (void)result;
    c->listening = NULL;
    if (!err || c->error || !c->o.url || c->tries >= ORCH_MCP_RETRIES)
        return;
    orch_timer_set(c->timer, 1000 << c->tries++);
}

static void subscribe(struct orch_mcp_client *c)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (!c->o.tools_changed || !c->capabilities.n ||
        orch_json_scan(&d, (struct orch_slice){ c->capabilities.p, c->capabilities.n },
                       &c->o.limits, &fault) < 0)
        return;
    uint32_t tools = orch_json_get(&d, 0, "tools"),
             changes = tools ? orch_json_get(&d, tools, "listChanged") : 0;
    if (!changes || d.toks[changes].type != ORCH_JSON_TRUE)
        return;
    c->listening = orch_mcp_client_own(c,
                                       &(struct orch_mcp_client_request){
                                           .method = "subscriptions/listen",
                                           .params = ORCH_SLICE(
                                               "{\"notifications\":{\"toolsListChanged\":true}}"),
                                           .done = listened,
                                           .ud = c });
}

static void ready(struct orch_mcp_client *c)
{
    orch_timer_cancel(c->timer);
    orch_mcp_client_drop(c->probe);
    c->probe = NULL;
    c->state = ORCH_MCP_READY;
    c->ready = true;
    c->session_lost = false;
    if (!c->told) {
        c->told = true;
        c->o.ready(c->o.ud, NULL);
    }
    if (!c->dead)
        orch_mcp_client_send_waiting(c, NULL);
    if (!c->dead && c->modern)
        subscribe(c);
}

void orch_mcp_client_opened(struct orch_mcp_client *c)
{
    if (!c->dead && c->state == ORCH_MCP_OPENING && c->version && !c->opening)
        ready(c);
}

/* ---- the legacy handshake */

static void probe(struct orch_mcp_client *c);
static void modern_ready(struct orch_mcp_client *c);

/* A session that cannot be begun anew fails those that wait for it; the next one tries again. */
static void not_opened(struct orch_mcp_client *c, const struct orch_err *err)
{
    if (!c->ready) {
        orch_mcp_client_fail(c, err);
        return;
    }
    c->state = ORCH_MCP_READY;
    struct orch_err why = *err; /* it may be in what is freed now */
    orch_mcp_client_send_waiting(c, &why);
}

static void announced(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_mcp_client *c = ud;
    (void)result;
    c->opening = NULL;
    if (err)
        not_opened(c, err);
    else
        c->t->ops->listen(c->t);
}

static void opened(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_mcp_client *c = ud;
    bool modern;
    c->opening = NULL;
    if (err && c->discovered)
        modern_ready(c);
    if (err && (c->discovered || c->probe)) /* the answer to the probe says what follows */
        return;
    if (err && error_code(c, &modern) && !pinned(c, false) && !c->ready && (modern || !c->probed) &&
        !c->fell_back) {
        remember(c, false);
        c->fell_back = true;
        probe(c);
        return;
    }
    if (err) {
        not_opened(c, err);
        return;
    }
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf version = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, result, &c->o.limits, &fault) == 0)
        orch_json_string(&d, orch_json_get(&d, 0, "protocolVersion"), &version);
    c->version = orch_rpc_legacy_version((struct orch_slice){ version.p, version.n });
    if (!c->version) {
        fail_with(c, "the server speaks no revision that orch knows: ",
                  version.n ? version.p : "its answer to initialize has no protocolVersion");
        return;
    }
    orch_mcp_client_drop(c->probe); /* it is of the older era, whatever it says to the probe now */
    c->probe = NULL;
    keep(&c->server_info, &d, orch_json_get(&d, 0, "serverInfo"));
    keep(&c->capabilities, &d, orch_json_get(&d, 0, "capabilities"));
    keep(&c->instructions, &d, orch_json_get(&d, 0, "instructions"));
    c->opening = orch_mcp_client_own(c, &(struct orch_mcp_client_request){
                                            .method = "notifications/initialized",
                                            .note = true,
                                            .done = announced,
                                            .ud = c });
}

static void open_legacy(struct orch_mcp_client *c)
{
    cleanup_buf struct orch_buf params = { 0 };
    c->modern = false;
    c->version = NULL;
    c->state = ORCH_MCP_OPENING;
    orch_buf_printf(&params,
                    "{\"protocolVersion\":\"%s\",\"capabilities\":%s,\"clientInfo\":{\"name\":",
                    pinned(c, false) ? c->o.protocol : ORCH_MCP_LEGACY, c->o.capabilities);
    orch_json_quote(&params, orch_slice_str(c->o.info_name));
    orch_buf_str(&params, ",\"version\":\"" ORCH_VERSION "\"}}");
    c->opening = orch_mcp_client_own(c, &(struct orch_mcp_client_request){
                                            .method = "initialize",
                                            .params = { params.p, params.n },
                                            .done = opened,
                                            .ud = c });
}

/* ---- the probe */

static int64_t probe_ms(const struct orch_mcp_client *c)
{
    return c->o.start_ms && c->o.start_ms / 2 < ORCH_MCP_PROBE_MS ? c->o.start_ms / 2
                                                                  : ORCH_MCP_PROBE_MS;
}

/* It does not speak the modern era. */
static void fall_back(struct orch_mcp_client *c, const struct orch_err *err)
{
    struct orch_err why = *err;
    if (pinned(c, true) || c->fell_back) {
        orch_mcp_client_fail(c, &why);
        return;
    }
    remember(c, true);
    if (!c->opening) /* which was sent before, since the answer took long */
        open_legacy(c);
}

static void modern_ready(struct orch_mcp_client *c)
{
    orch_mcp_client_drop(c->opening);
    c->opening = NULL;
    c->modern = true;
    c->version = ORCH_MCP_MODERN;
    ready(c);
}

static void discovered(struct orch_mcp_client *c, struct orch_slice result)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    uint32_t versions = 0;
    if (orch_json_scan(&d, result, &c->o.limits, &fault) == 0)
        versions = orch_json_get(&d, 0, "supportedVersions");
    if (!names_modern(&d, versions)) {
        struct orch_err err = { 0 };
        orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EPROTONOSUPPORT,
                      "%s: its answer to server/discover does not name " ORCH_MCP_MODERN
                      " in supportedVersions",
                      c->name);
        fall_back(c, &err);
        return;
    }
    uint32_t meta = orch_json_get(&d, 0, "_meta"),
             info = meta ? orch_json_get(&d, meta, ORCH_MCP_META "serverInfo") : 0;
    keep(&c->server_info, &d, info ? info : orch_json_get(&d, 0, "serverInfo"));
    keep(&c->capabilities, &d, orch_json_get(&d, 0, "capabilities"));
    keep(&c->instructions, &d, orch_json_get(&d, 0, "instructions"));
    c->discovered = true;
    if (!c->opening) /* else its answer says of which era this process is from now on */
        modern_ready(c);
}

static void probed(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_mcp_client *c = ud;
    bool modern;
    c->probe = NULL;
    if (!c->opening)
        orch_timer_cancel(c->timer);
    if (!err) {
        discovered(c, result);
        return;
    }
    int64_t code = error_code(c, &modern);
    bool again = modern && !c->again;
    if (again) { /* it wants to be asked once more */
        c->again = true;
        probe(c);
    } else if (modern || code == ORCH_RPC_HEADER_MISMATCH || code == ORCH_RPC_MISSING_CAPABILITY) {
        orch_mcp_client_fail(c, err);
    } else if (code ||
               (c->status >= 400 && c->status < 500 && c->status != 401 && c->status != 403)) {
        fall_back(c, err);
    } else { /* a failing server is no evidence */
        orch_mcp_client_fail(c, err);
    }
}

static void probe(struct orch_mcp_client *c)
{
    c->state = ORCH_MCP_PROBING;
    c->modern = c->probed = true;
    c->version = ORCH_MCP_MODERN;
    c->probe = orch_mcp_client_own(c, &(struct orch_mcp_client_request){
                                          .method = "server/discover", .done = probed, .ud = c });
    if (c->proc && !pinned(c, true) && !c->fell_back)
        orch_timer_set(c->timer, probe_ms(c));
}

void orch_mcp_era_begin(struct orch_mcp_client *c)
{
    if (pinned(c, false) || (!c->o.protocol && known_legacy(c)))
        open_legacy(c);
    else
        probe(c);
}

void orch_mcp_era_reopen(struct orch_mcp_client *c)
{
    if (c->state == ORCH_MCP_READY)
        open_legacy(c);
}

/* The first message that this process got did it no good. */
static void restart_legacy(struct orch_mcp_client *c)
{
    struct orch_err err = { 0 };
    orch_mcp_client_drop(c->probe);
    orch_mcp_client_drop(c->opening);
    c->probe = c->opening = NULL;
    c->restarted = true;
    c->probed = false;
    orch_timer_cancel(c->timer);
    remember(c, true);
    orch_log(ORCH_INFO, "%s: it does not take server/discover as its first request; started again",
             c->name);
    if (c->t->ops->start(c->t, &err) < 0)
        orch_mcp_client_fail(c, &err);
    else
        open_legacy(c);
}

static bool unread(const struct orch_mcp_client *c)
{
    int n = 0;
    return c->out.n || (ioctl(orch_proc_stdin(c->proc), FIONREAD, &n) == 0 && n > 0);
}

bool orch_mcp_era_gone(struct orch_mcp_client *c)
{
    if (c->ready || !c->probed || c->restarted || c->fell_back || c->discovered ||
        pinned(c, true) || (!c->opening && unread(c)))
        return false;
    restart_legacy(c);
    return true;
}

static void silent(struct orch_mcp_client *c)
{
    if (!c->opening && unread(c)) {
        orch_timer_set(c->timer, probe_ms(c));
    } else if (!c->opening) {
        open_legacy(c);
        orch_timer_set(c->timer, HANG * probe_ms(c));
    } else if (c->discovered) {
        modern_ready(c);
    } else {
        restart_legacy(c);
    }
}

void orch_mcp_era_timer(void *ud)
{
    struct orch_mcp_client *c = ud;
    orch_mcp_client_enter(c);
    if (c->ready) {
        subscribe(c);
        if (c->listening && !c->dead)
            c->o.tools_changed(c->o.ud);
    } else if (c->proc) {
        silent(c);
    }
    orch_mcp_client_leave(c);
}
