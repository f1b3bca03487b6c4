/* Inside core/call: what its files call of each other. */
#ifndef ORCH_CALL_CALL_INT_H
#define ORCH_CALL_CALL_INT_H

#include "call.h"

/* call.c */
struct orch_call *orch_call_new(struct orch_session *s);
void orch_call_free(struct orch_call *c);
/* What its request says of it and of its client. */
void orch_call_of_request(struct orch_call *c, struct orch_mcp_request *rq);
void orch_call_running(struct orch_call *c); /* joins the running ones */
void orch_call_finish(struct orch_call *c);  /* one that is in no list: to the ended ones */
void orch_call_list_push(struct orch_call **list, struct orch_call *c);
/* A whole list in the order in which its elements were pushed. */
struct orch_call *orch_call_list_take(struct orch_call **list);

/* record.c */
extern const char *const orch_decision_words[]; /* by a call's decision */
/* Queues the decision line. args: token of what will be used, 0: none. 1 with err:
 * that cannot be recorded, so that the call is denied, which is. Of calls that are denied again and
 * again only the number is recorded. */
int orch_record_decision(struct orch_call *c, struct orch_slice name, const struct orch_json_doc *d,
                         uint32_t args, const char *reason, const char *rules,
                         struct orch_err *err);
int orch_record_outcome(struct orch_call *c, struct orch_err *err);
/* What a client was given beyond tools: written before it is. */
int orch_record_request(struct orch_call *c, struct orch_slice name, const struct orch_json_doc *d,
                        uint32_t args, struct orch_err *err);

/* record_args.c: appends ,"args":… of the token (0: none). Negative, with why: they cannot be
 * recorded; then it is ,"args":null. runs: of a call that is not denied, which may take more
 * space. */
int orch_record_args(struct orch_calls *cs, const struct orch_generation *g,
                     const struct orch_json_doc *d, uint32_t args, bool runs, struct orch_buf *b,
                     const char **why);

/* result.c */
/* What a Lua tool returned: the nres values at the top. */
void orch_call_take_lua(struct orch_call *c, lua_State *L, int nres);
void orch_call_withhold(struct orch_call *c, const char *text);
void orch_call_redact(struct orch_call *c); /* by the deciding rules */
/* "_meta":{…} of what is answered before there is a result. */
void orch_call_put_origin(const struct orch_call *c, struct orch_buf *b);

/* lua_tool.c: runs the function below nargs arguments on the state's stack. */
void orch_lua_start(struct orch_call *c, struct orch_state *s, int nargs, orch_task_done_fn *take);

/* turn.c */
void orch_call_answer(struct orch_call *c);

/* ask.c: keeps what questions need of the request; when the call begins. */
void orch_questions_begin(struct orch_call *c, const char *method, const struct orch_json_doc *d,
                          const struct orch_mcp_params *p);

#endif
