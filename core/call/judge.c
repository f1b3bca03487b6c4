/* How a call begins: judged by the generation in force, its decision queued for the audit log. */
#include "call_int.h"

#include "../script/jsonlib.h"

#include <lauxlib.h>
#include <string.h>

enum { NAME_SHOWN_BYTES = 200 };

/* Keeps the arguments in the form that the tool's backend wants. */
static void keep_args(struct orch_call *c, const struct orch_json_doc *d, uint32_t args,
                      struct orch_slice meta)
{
    if (!c->tool->backend->lua_args) {
        orch_buf_slice(&c->args, args ? orch_json_raw(d, args) : ORCH_SLICE("{}"));
        orch_buf_slice(&c->meta, meta);
        return;
    }
    lua_State *L = orch_state_lua(c->tool->state);
    if (args)
        orch_lua_push_json(L, d, args, 0);
    else
        lua_newtable(L);
    c->args_ref = luaL_ref(L, LUA_REGISTRYINDEX);
}

static void deny(struct orch_call *c, const char *kind, const char *why)
{
    c->decision = ORCH_DENY;
    c->rpc_code = 0;
    orch_call_fail_text(c, kind, orch_slice_str(why));
}

/* The decision, and the answer of one that does not run. err: storage for a reason. */
static void judge(struct orch_call *c, struct orch_slice name, const struct orch_json_doc *d,
                  uint32_t args, struct orch_judgement *j, struct orch_err *err)
{
    const char *problem = c->calls->current->problem;
    c->tool = problem ? NULL : orch_generation_tool(c->gen, name);
    if (problem) {
        orch_call_rpc_error(c, ORCH_RPC_UPSTREAM_FAILED, orch_slice_str(problem));
        j->reason = "the upstream is not running";
        return;
    }
    if (!c->tool) {
        cleanup_free char *text = orch_xasprintf("Unknown tool: %.*s",
                                                 name.n > NAME_SHOWN_BYTES ? NAME_SHOWN_BYTES
                                                                           : (int)name.n,
                                                 name.p);
        orch_call_rpc_error(c, ORCH_RPC_INVALID_PARAMS, orch_slice_str(text));
        j->reason = "unknown tool";
        return;
    }
    int r = orch_generation_judge(c->gen, c->tool, c->session->id, c->session->caller, d, args, j,
                                  err);
    c->decision = j->verdict;
    c->network = orch_steal_ptr(&j->network);
    c->redact = orch_steal_ptr(&j->redact);
    c->n_redact = j->n_redact;
    for (char **mark = j->marks; r == 0 && mark && *mark; mark++)
        orch_session_mark(c->session, *mark);
    if (r < 0) {
        j->reason = err->msg;
        deny(c, "denied", err->msg);
    } else if (j->verdict == 0) {
        orch_call_rpc_error(c, ORCH_RPC_INVALID_PARAMS,
                            orch_slice_str(j->reason ? j->reason : "bad arguments"));
    } else if (j->verdict != ORCH_ALLOW) {
        orch_call_fail_text(c, "denied", orch_slice_str(j->reason ? j->reason : "?"));
    }
}

/* The call then is in the list of begun ones. */
static void begin(struct orch_call *c, struct orch_slice name, const struct orch_json_doc *d,
                  uint32_t args, uint32_t meta)
{
    struct orch_audit *log = c->calls->audit;
    struct orch_err err = { 0 }, unwritten = { 0 };
    ORCH_CLEANUP(orch_judgement_fini) struct orch_judgement j = { .rules = "[]" };
    struct orch_slice passed_on = meta ? orch_json_raw(d, meta) : ORCH_SLICE("");
    judge(c, name, d, args, &j, &err);
    if (j.doc.n) {
        d = &j.doc;
        args = 1;
    }
    if (!log || orch_audit_broken(log))
        deny(c, "not run",
             "the audit log cannot be written; calls are refused until orch is started again");
    else if (orch_record_decision(c, name, d, args, j.reason, j.rules, &unwritten) != 0)
        deny(c, "not run", unwritten.msg);
    else if (c->decision == ORCH_ALLOW && !c->rpc_code)
        keep_args(c, d, args, passed_on);
    orch_call_list_push(&c->calls->begun, c);
}

void orch_call_from_mcp(struct orch_session *s, struct orch_mcp_request *rq,
                        const struct orch_json_doc *d, const struct orch_mcp_params *p)
{
    struct orch_call *c = orch_call_new(s);
    orch_call_of_request(c, rq);
    orch_questions_begin(c, "tools/call", d, p);
    begin(c, p->name, d, p->args, p->meta);
}

void orch_call_from_host(struct orch_session *s, struct orch_slice name,
                         const struct orch_json_doc *d, uint32_t args, orch_call_done_fn *done,
                         void *ud)
{
    struct orch_call *c = orch_call_new(s);
    c->done = done;
    c->done_ud = ud;
    begin(c, name, d, args, 0);
    orch_calls_want(s->calls);
}
