/* Sessions: who calls, and what predicates know of them. */
#include "call_int.h"

#include "../script/jsonlib.h"

#include <stdio.h>
#include <string.h>

enum { MARKS_MAX = 256 };

struct orch_session *orch_session_new(struct orch_calls *cs, const char *caller)
{
    struct orch_session *s = orch_xcalloc(1, sizeof *s);
    s->calls = cs;
    s->refs = 1;
    s->caller = orch_xstrdup(caller);
    snprintf(s->id, sizeof s->id, "%s-s%u", cs->prefix, ++cs->next_session);
    orch_buf_printf(&s->audit_fields, "\"session\":\"%s\",\"caller\":", s->id);
    orch_json_quote(&s->audit_fields, orch_slice_str(caller));
    s->next = cs->sessions;
    cs->sessions = s;
    return s;
}

void orch_session_unref(struct orch_session *s)
{
    if (--s->refs)
        return;
    for (struct orch_session **at = &s->calls->sessions; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    if (s->calls->current->gen)
        orch_generation_forget_session(s->calls->current->gen, s->id);
    for (size_t i = 0; i < s->n_marks; i++)
        free(s->marks[i]);
    free(s->marks);
    free(s->caller);
    orch_buf_free(&s->audit_fields);
    free(s);
}

void orch_session_mark(struct orch_session *s, const char *mark)
{
    for (size_t i = 0; i < s->n_marks; i++)
        if (strcmp(s->marks[i], mark) == 0)
            return;
    if (s->n_marks == MARKS_MAX)
        return;
    s->marks = orch_xrealloc(s->marks, (s->n_marks + 1) * sizeof *s->marks);
    s->marks[s->n_marks++] = orch_xstrdup(mark);
}

static void push_client(lua_State *L, const struct orch_session *s)
{
    struct orch_slice client = s && s->mcp ? orch_mcp_session_client(s->mcp) : ORCH_SLICE("");
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (client.n && orch_json_scan(&d, client, &(struct orch_json_limits){ 0 }, &fault) == 0)
        orch_lua_push_json(L, &d, 0, 0);
    else
        lua_newtable(L);
}

void orch_session_push(void *calls, lua_State *L, const char *id)
{
    const struct orch_calls *cs = calls;
    const struct orch_session *s = cs->sessions;
    while (s && strcmp(s->id, id) != 0)
        s = s->next;
    lua_newtable(L);
    lua_pushstring(L, id);
    lua_setfield(L, -2, "id");
    lua_newtable(L);
    for (size_t i = 0; s && i < s->n_marks; i++) {
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, s->marks[i]);
    }
    lua_setfield(L, -2, "marks");
    push_client(L, s);
}
