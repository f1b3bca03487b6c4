/* What clients want to hear of: subscriptions/listen of the modern era, resources/subscribe and
 * list_changed of the legacy one. */
#include "session_int.h"

#include <string.h>

enum { LISTENS_MAX = 64, NAMES_MAX = 1000, NAME_MAX_BYTES = 4096 };

static void names_free(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

void orch_mcp_filter_fini(struct orch_mcp_filter *f)
{
    names_free(f->uris, f->n_uris);
    names_free(f->tasks, f->n_tasks);
}

static ssize_t find_name(char *const *names, size_t n, struct orch_slice name)
{
    for (size_t i = 0; i < n; i++)
        if (orch_slice_eq(name, names[i]))
            return (ssize_t)i;
    return -1;
}

/* The string token in the list; false when it is none, or there are too many. */
static bool add_name(char ***names, size_t *n, const struct orch_json_doc *d, uint32_t tok)
{
    cleanup_buf struct orch_buf b = { 0 };
    if (orch_json_string(d, tok, &b) < 0 || b.n > NAME_MAX_BYTES || *n >= NAMES_MAX)
        return false;
    if (find_name(*names, *n, (struct orch_slice){ b.p, b.n }) >= 0)
        return true;
    *names = orch_xrealloc(*names, (*n + 1) * sizeof **names);
    (*names)[(*n)++] = b.p ? orch_steal_ptr(&b.p) : orch_xstrdup("");
    return true;
}

static bool add_names(char ***names, size_t *n, const struct orch_json_doc *d, uint32_t list)
{
    if (!list)
        return true;
    if (d->toks[list].type != ORCH_JSON_ARRAY)
        return false;
    uint32_t tok = list + 1;
    for (uint32_t i = 0; i < d->toks[list].count; i++, tok = d->toks[tok].next)
        if (!add_name(names, n, d, tok))
            return false;
    return true;
}

static const struct {
    enum orch_mcp_change change;
    unsigned feature;
    const char *key, *method;
} changes[] = {
    { ORCH_MCP_TOOLS_CHANGED, 0, "toolsListChanged", "notifications/tools/list_changed" },
    { ORCH_MCP_PROMPTS_CHANGED, ORCH_MCP_PROMPTS, "promptsListChanged",
      "notifications/prompts/list_changed" },
    { ORCH_MCP_RESOURCES_CHANGED, ORCH_MCP_RESOURCES, "resourcesListChanged",
      "notifications/resources/list_changed" },
};

static void put_subscription(struct orch_mcp_request *rq)
{
    struct orch_buf *out = &rq->session->out;
    orch_buf_str(out, "\"_meta\":{\"" ORCH_MCP_META "subscriptionId\":");
    orch_buf_add(out, rq->id, rq->id_n);
    orch_buf_char(out, '}');
}

static void put_names(struct orch_buf *out, const char *key, char *const *names, size_t n)
{
    if (!n)
        return;
    orch_buf_printf(out, "\"%s\":", key);
    for (size_t i = 0; i < n; i++) {
        orch_buf_char(out, i ? ',' : '[');
        orch_json_quote(out, orch_slice_str(names[i]));
    }
    orch_buf_str(out, "],");
}

static void acknowledge(struct orch_mcp_request *rq)
{
    struct orch_mcp_session *s = rq->session;
    struct orch_mcp_filter *f = rq->filter;
    size_t from = orch_mcp_note_begin(s, "notifications/subscriptions/acknowledged");
    orch_buf_str(&s->out, "\"notifications\":{");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(changes); i++)
        if (f->changes & changes[i].change)
            orch_buf_printf(&s->out, "\"%s\":true,", changes[i].key);
    put_names(&s->out, "resourceSubscriptions", f->uris, f->n_uris);
    put_names(&s->out, "taskIds", f->tasks, f->n_tasks);
    if (s->out.p[s->out.n - 1] == ',')
        s->out.n--;
    orch_buf_str(&s->out, "},");
    put_subscription(rq);
    orch_mcp_note_end(s, from, rq->stream);
}

void orch_mcp_listen(struct orch_mcp_incoming *in)
{
    struct orch_mcp_session *s = in->s;
    const struct orch_json_doc *d = in->d;
    uint32_t wanted = orch_json_get(d, in->m.params, "notifications");
    if (!wanted || d->toks[wanted].type != ORCH_JSON_OBJECT) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "subscriptions/listen: params.notifications must be an object");
        return;
    }
    if (s->listening >= LISTENS_MAX) {
        orch_mcp_refuse(in, ORCH_RPC_TOO_MANY_CALLS, ORCH_MCP_NO_DATA,
                        "too many subscriptions/listen (limit %d)", LISTENS_MAX);
        return;
    }
    struct orch_mcp_filter f = { 0 };
    unsigned features = s->ops->features;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(changes); i++) {
        uint32_t on = orch_json_get(d, wanted, changes[i].key);
        if (on && d->toks[on].type == ORCH_JSON_TRUE &&
            (features & changes[i].feature) == changes[i].feature)
            f.changes |= changes[i].change;
    }
    uint32_t uris = features & ORCH_MCP_RESOURCES
                        ? orch_json_get(d, wanted, "resourceSubscriptions")
                        : 0;
    uint32_t tasks = features & ORCH_MCP_TASKS ? orch_json_get(d, wanted, "taskIds") : 0;
    if (!add_names(&f.uris, &f.n_uris, d, uris) || !add_names(&f.tasks, &f.n_tasks, d, tasks)) {
        orch_mcp_filter_fini(&f);
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "subscriptions/listen: resourceSubscriptions and taskIds must be lists of "
                        "at most %d strings",
                        NAMES_MAX);
        return;
    }
    struct orch_mcp_request *rq = orch_mcp_request_new(in, ORCH_MCP_NO_DATA);
    orch_mcp_count(s, -1);
    s->listening++;
    rq->filter = orch_xmalloc(sizeof f);
    *rq->filter = f;
    acknowledge(rq);
}

void orch_mcp_subscribe(struct orch_mcp_incoming *in, bool on)
{
    struct orch_mcp_filter *f = &in->s->legacy;
    uint32_t uri = in->m.params ? orch_json_get(in->d, in->m.params, "uri") : 0;
    if (!uri || in->d->toks[uri].type != ORCH_JSON_STRING) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "resources/%s: params.uri must be a string",
                        on ? "subscribe" : "unsubscribe");
        return;
    }
    if (on && !add_name(&f->uris, &f->n_uris, in->d, uri)) {
        orch_mcp_refuse(in, ORCH_RPC_TOO_MANY_CALLS, ORCH_MCP_NO_DATA,
                        "resources/subscribe: at most %d URIs of at most %d bytes", NAMES_MAX,
                        NAME_MAX_BYTES);
        return;
    }
    cleanup_buf struct orch_buf text = { 0 };
    orch_json_string(in->d, uri, &text);
    ssize_t at = on ? -1 : find_name(f->uris, f->n_uris, (struct orch_slice){ text.p, text.n });
    if (at >= 0) {
        free(f->uris[at]);
        f->uris[at] = f->uris[--f->n_uris];
    }
    orch_mcp_answer(in, ORCH_MCP_NO_DATA);
}

void orch_mcp_session_changed(struct orch_mcp_session *s, enum orch_mcp_change what)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(changes); i++) {
        if (!(what & changes[i].change) || s->out.n > ORCH_MCP_NOTES_MAX_BYTES)
            continue;
        if (s->initialized_seen) {
            size_t from = orch_mcp_note_begin(s, changes[i].method);
            s->out.n -= sizeof ",\"params\":{" - 1; /* none in the legacy era */
            orch_buf_char(&s->out, '}');
            orch_mcp_message_end(s, from, NULL, 0);
        }
        for (struct orch_mcp_request *rq = s->listening ? s->first : NULL; rq; rq = rq->next) {
            if (!rq->filter || !(rq->filter->changes & changes[i].change))
                continue;
            size_t from = orch_mcp_note_begin(s, changes[i].method);
            put_subscription(rq);
            orch_mcp_note_end(s, from, rq->stream);
        }
    }
}

static void put_updated(struct orch_mcp_session *s, struct orch_slice uri,
                        struct orch_mcp_request *rq)
{
    size_t from = orch_mcp_note_begin(s, "notifications/resources/updated");
    orch_buf_str(&s->out, "\"uri\":");
    orch_json_quote(&s->out, uri);
    if (rq) {
        orch_buf_char(&s->out, ',');
        put_subscription(rq);
    }
    orch_mcp_note_end(s, from, rq ? rq->stream : NULL);
}

void orch_mcp_session_resource_updated(struct orch_mcp_session *s, struct orch_slice uri)
{
    if (s->out.n > ORCH_MCP_NOTES_MAX_BYTES)
        return;
    if (s->initialized_seen && find_name(s->legacy.uris, s->legacy.n_uris, uri) >= 0)
        put_updated(s, uri, NULL);
    for (struct orch_mcp_request *rq = s->listening ? s->first : NULL; rq; rq = rq->next)
        if (rq->filter && find_name(rq->filter->uris, rq->filter->n_uris, uri) >= 0)
            put_updated(s, uri, rq);
}

void orch_mcp_session_task_changed(struct orch_mcp_session *s, struct orch_slice id,
                                   struct orch_slice members)
{
    for (struct orch_mcp_request *rq = s->listening ? s->first : NULL; rq; rq = rq->next) {
        if (!rq->filter || find_name(rq->filter->tasks, rq->filter->n_tasks, id) < 0)
            continue;
        size_t from = orch_mcp_note_begin(s, "notifications/tasks");
        orch_buf_slice(&s->out, members);
        orch_buf_char(&s->out, ',');
        put_subscription(rq);
        orch_mcp_note_end(s, from, rq->stream);
    }
}
