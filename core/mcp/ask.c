/* Questions to a legacy client: requests that the server sends, and what comes back. */
#include "session_int.h"

#include "../base/log.h"

#include <string.h>

enum { QUESTIONS_MAX = 1024 };

static uint32_t member(const struct orch_json_doc *d, uint32_t obj, const char *key)
{
    return obj && d->toks[obj].type == ORCH_JSON_OBJECT ? orch_json_get(d, obj, key) : 0;
}

unsigned orch_mcp_caps_read(const struct orch_json_doc *d, uint32_t capabilities)
{
    if (!capabilities || d->toks[capabilities].type != ORCH_JSON_OBJECT ||
        !d->toks[capabilities].count)
        return 0;
    unsigned caps = 0;
    uint32_t elicitation = member(d, capabilities, "elicitation"),
             sampling = member(d, capabilities, "sampling");
    if (elicitation) {
        bool url = member(d, elicitation, "url") != 0;
        caps |= url ? ORCH_MCP_CAP_URL : 0;
        caps |= !url || member(d, elicitation, "form") ? ORCH_MCP_CAP_FORM : 0; /* {} means form */
    }
    if (sampling)
        caps |= ORCH_MCP_CAP_SAMPLING |
                (member(d, sampling, "tools") ? ORCH_MCP_CAP_SAMPLING_TOOLS : 0);
    if (member(d, capabilities, "roots"))
        caps |= ORCH_MCP_CAP_ROOTS;
    if (member(d, member(d, capabilities, "extensions"), ORCH_MCP_META "tasks"))
        caps |= ORCH_MCP_CAP_TASKS;
    return caps;
}

/* An id names its slot and a serial, so that an answer to a question that is gone finds nothing. */
static uint64_t id_of(const struct orch_mcp_session *s, const struct orch_mcp_question *q)
{
    return ((uint64_t)q->serial << 16 | (uint64_t)(q - s->questions)) + 1;
}

static struct orch_mcp_question *find(struct orch_mcp_session *s, uint64_t id)
{
    uint64_t slot = (id - 1) & 0xffff;
    struct orch_mcp_question *q = id && slot < s->n_questions ? &s->questions[slot] : NULL;
    return q && q->rq && id_of(s, q) == id ? q : NULL;
}

static void forget(struct orch_mcp_session *s, struct orch_mcp_question *q)
{
    q->rq->asks--;
    q->rq = NULL;
    q->serial = (q->serial + 1) & 0x7fffffff;
    s->n_asked--;
}

uint64_t orch_mcp_ask(struct orch_mcp_request *rq, const char *method, struct orch_slice params,
                      orch_mcp_reply_fn *done, void *ud)
{
    struct orch_mcp_session *s = rq->session;
    size_t slot = 0;
    if (rq->cancelled || s->ended || s->n_asked >= QUESTIONS_MAX ||
        s->out.n > ORCH_MCP_NOTES_MAX_BYTES)
        return 0;
    while (slot < s->n_questions && s->questions[slot].rq)
        slot++;
    if (slot == s->n_questions) {
        s->questions = orch_xrealloc(s->questions, ++s->n_questions * sizeof *s->questions);
        s->questions[slot] = (struct orch_mcp_question){ 0 };
    }
    struct orch_mcp_question *q = &s->questions[slot];
    *q = (struct orch_mcp_question){ .rq = rq, .done = done, .ud = ud, .serial = q->serial };
    rq->asks++;
    s->n_asked++;
    uint64_t id = id_of(s, q);
    size_t from = orch_mcp_note_begin(s, method);
    s->out.n--; /* the brace of params, which are given whole */
    orch_buf_slice(&s->out, params);
    orch_buf_printf(&s->out, ",\"id\":%llu", (unsigned long long)id);
    orch_buf_char(&s->out, '}');
    orch_mcp_message_end(s, from, rq->stream, 0);
    return id;
}

static void tell_cancelled(struct orch_mcp_session *s, struct orch_mcp_question *q)
{
    size_t from = orch_mcp_note_begin(s, "notifications/cancelled");
    orch_buf_printf(&s->out, "\"requestId\":%llu", (unsigned long long)id_of(s, q));
    orch_mcp_note_end(s, from, q->rq->stream);
}

void orch_mcp_ask_cancel(struct orch_mcp_request *rq, uint64_t id)
{
    struct orch_mcp_session *s = rq->session;
    struct orch_mcp_question *q = find(s, id);
    if (!q)
        return;
    if (!s->ended)
        tell_cancelled(s, q);
    forget(s, q);
}

void orch_mcp_ask_drop(struct orch_mcp_request *rq, bool tell)
{
    struct orch_mcp_session *s = rq->session;
    for (size_t i = 0; i < s->n_questions; i++) {
        struct orch_mcp_question *q = &s->questions[i];
        if (q->rq != rq)
            continue;
        if (tell)
            tell_cancelled(s, q);
        forget(s, q);
    }
}

void orch_mcp_ask_reply(struct orch_mcp_incoming *in)
{
    struct orch_mcp_session *s = in->s;
    uint64_t id = 0;
    for (size_t i = 0; i < in->m.id.n && id < 1ull << 60; i++) {
        if (in->m.id.p[i] < '0' || in->m.id.p[i] > '9') {
            id = 0;
            break;
        }
        id = id * 10 + (uint64_t)(in->m.id.p[i] - '0');
    }
    struct orch_mcp_question *q = find(s, id);
    if (!q) {
        orch_log(ORCH_DEBUG, "mcp: a response to a request that was never sent was ignored");
        return;
    }
    orch_mcp_reply_fn *done = q->done;
    void *ud = q->ud;
    forget(s, q);
    done(ud, in->d, in->m.result, in->m.error);
}
