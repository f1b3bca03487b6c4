/* One call's life: judged, its decision recorded, run by its tool's backend, its outcome recorded,
 * answered. Resources, prompts and completion are calls too, without judgement.
 *
 * Calls are handled in batches: the decisions of all calls at hand are written with one write
 * before any of them runs, their outcomes with another before any of them is answered (turn.c).
 *
 * What a call can have besides hangs on it as parts: questions to its client, the task of the tasks
 * extension that it became, microVMs, HTTP requests. The call knows none of them; it tells each of
 * its end. */
#ifndef ORCH_CALL_CALL_H
#define ORCH_CALL_CALL_H

#include "../mcp/session.h"
#include "../policy/current.h"
#include "../script/task.h"

struct orch_ask;
struct orch_call_part;
struct orch_job;
struct orch_questions;
struct sockaddr;

/* ---- all calls of a host */

/* What a script serves (orch.mcp.serve with tools, resources, prompts) in place of what the
 * configuration's folders hold, judged by the same policy. Its functions live in the script's
 * state. */
struct orch_offer {
    struct orch_state *state; /* NULL: nothing is offered */
    unsigned features;        /* ORCH_MCP_* */
    int handle_ref;           /* function (method, params, ctx) */
};

struct orch_calls {
    struct orch_loop *loop;
    struct orch_current *current;
    struct orch_audit *audit; /* NULL: not open, every call is denied */
    struct orch_offer offer;
    /* A task of the tasks extension has changed: members of it as tasks/get shows them. */
    void (*task_changed)(void *ud, struct orch_slice id, struct orch_slice members);
    void *ud;

    struct orch_session *sessions;
    struct orch_call *begun, *ended, *running, *spare;
    struct orch_call **slots;
    size_t n_slots;
    uint64_t next_call;
    unsigned next_session;
    char prefix[16];
    orch_loop_fn *run_later; /* turn.c's */
    bool run_posted, in_run;
    struct orch_questions_list {
        struct orch_questions *first, *last; /* parked, in the order of their ends */
        struct orch_questions *asking;       /* to be parked at the end of this turn */
        size_t n;
        struct orch_timer *timer;
        struct orch_hmac_key key;
        bool keyed;
    } parked;
    struct orch_job *jobs;
    bool jobs_swept;
    struct orch_denials *denials; /* record.c's: calls that are only counted */
    struct orch_timer *counts;
    /* record.c's, empty between its functions */
    struct orch_buf fields, canonical, redacted;
    struct orch_json_doc recorded;
};

int orch_calls_init(struct orch_calls *cs, struct orch_err *err); /* loop and current are set */
void orch_calls_fini(struct orch_calls *cs);
/* Writes the decisions of all calls begun since the last time, runs them, writes the outcomes of
 * those that ended, answers. Called when all input at hand was read, or from a posted turn. */
void orch_calls_run(struct orch_calls *cs);
void orch_calls_want(struct orch_calls *cs); /* the same in the next turn */
/* The number of those that were denied and not recorded each goes to the audit log, which is going
 * to be closed. */
void orch_record_close(struct orch_calls *cs);

/* ---- sessions */

struct orch_session {
    struct orch_session *next;
    unsigned refs; /* its owner's and its calls' */
    struct orch_calls *calls;
    struct orch_mcp_session *mcp; /* NULL for a call from the embedder */
    char id[40];
    char *caller;
    char **marks;
    size_t n_marks;
    struct orch_buf audit_fields; /* "session":"…","caller":"…" */
};

struct orch_session *orch_session_new(struct orch_calls *cs, const char *caller);
void orch_session_unref(struct orch_session *s);
void orch_session_mark(struct orch_session *s, const char *mark);
/* For orch_current_ops. */
void orch_session_push(void *calls, lua_State *L, const char *id);
/* Cancels every call of the session; each still writes its outcome. */
void orch_calls_cancel(struct orch_session *s, const char *why);

/* ---- a call begins */

/* The answer of a call that did not come from MCP. members: of the MCP result. */
typedef void orch_call_done_fn(void *ud, struct orch_slice members, bool is_error);

void orch_call_from_mcp(struct orch_session *s, struct orch_mcp_request *rq,
                        const struct orch_json_doc *d, const struct orch_mcp_params *p);
void orch_call_from_host(struct orch_session *s, struct orch_slice name,
                         const struct orch_json_doc *d, uint32_t args, orch_call_done_fn *done,
                         void *ud);
/* A request beyond tools: resources, prompts, completion. */
void orch_call_request(struct orch_session *s, struct orch_mcp_request *rq,
                       const struct orch_json_doc *d, const char *method,
                       const struct orch_mcp_params *p);
/* The same request again, with requestState: resumes the parked call. */
void orch_call_resume(struct orch_session *s, struct orch_mcp_request *rq, const char *method,
                      const struct orch_json_doc *d, const struct orch_mcp_params *p);
/* tasks/get, tasks/update, tasks/cancel. */
void orch_job_request(struct orch_session *s, struct orch_mcp_request *rq,
                      const struct orch_json_doc *d, const char *method,
                      const struct orch_mcp_params *p);
void orch_call_cancel_mcp(struct orch_mcp_request *rq);
/* Its MCP session goes away: the call ends without an answer. */
void orch_call_detach_mcp(struct orch_mcp_request *rq);
/* Ends the calls of s (NULL: all) that are parked for their client's answer. */
void orch_calls_unpark(struct orch_calls *cs, const struct orch_session *s);

/* ---- the call */

struct orch_call_part_ops {
    /* Nothing of the call runs any more: it gets its outcome and its answer. */
    void (*end)(struct orch_call_part *p, struct orch_call *c);
    /* The outcome is written, the answer follows. true: the part keeps the call, to be answered
     * later by orch_call_answer. */
    bool (*answer)(struct orch_call_part *p, struct orch_call *c);
    /* What its client is asked has changed: the part, one of a call at most, shows it to the
     * client. */
    void (*asked)(struct orch_call_part *p, struct orch_call *c);
    /* The call's time is over: whether something of it ends by itself soon and is worth waiting
     * for. now: it was waited for, what still runs shall end. */
    bool (*late)(struct orch_call_part *p, struct orch_call *c, bool now);
    void (*free)(struct orch_call_part *p); /* with the call; p is the part's own */
};

/* The first member of each. Only free must be there. */
struct orch_call_part {
    const struct orch_call_part_ops *ops;
    struct orch_call_part *next;
};

struct orch_call {
    struct orch_call *next, *prev; /* in one of the lists */
    struct orch_calls *calls;
    struct orch_generation *gen;
    struct orch_session *session;
    struct orch_tool *tool; /* NULL: unknown, or a request beyond tools */
    const char *method;     /* of a request beyond tools */
    struct orch_call_part *parts;
    char id[40];
    uint32_t slot, serial;

    /* who asked: an MCP request, or a function */
    struct orch_mcp_request *rq;
    const char *server_info; /* of the MCP server that was called */
    unsigned caps, missing;  /* ORCH_MCP_CAP_*: declared by its client; needed but not declared */
    bool modern;
    orch_call_done_fn *done;
    void *done_ud;

    /* what was decided */
    int decision; /* ORCH_ALLOW, ORCH_ASK, ORCH_DENY; 0: bad arguments or unknown */
    char *network;
    uint16_t *redact;
    size_t n_redact;
    int args_ref;         /* tool state: decoded arguments */
    struct orch_buf args; /* or their bytes, as the backend wants them */
    struct orch_buf meta; /* params._meta as it came, likewise */

    /* how it runs: its backend's own, and its time, which stands still while held */
    const struct orch_tool_backend *backend; /* NULL: it does not run */
    void *run;
    struct orch_timer *timer; /* kept with the record; armed when the call waits */
    int64_t begun_us, deadline_us, held_since_us, time_ms, grace_ms;
    const char *limit;                  /* what sets time_ms, for people */
    unsigned holds, refused, questions; /* refused: connections; questions: asked so far */
    bool cancelled, timed_out, finished,
        owed; /* owed: the record is not used again before its backend lets it go */

    /* what came of it */
    struct orch_buf text; /* the error's text, or the result's members */
    int rpc_code;         /* the answer is a JSON-RPC error */
    struct orch_buf rpc_data;
    bool reserved, is_error; /* reserved: the audit log has space for its outcome */
    const char *isolation;   /* of the last microVM it had; NULL */
    char vm_id[32];
};

void orch_call_add_part(struct orch_call *c, struct orch_call_part *p);
/* The part with these ops, or NULL. */
struct orch_call_part *orch_call_part(const struct orch_call *c,
                                      const struct orch_call_part_ops *ops);

struct orch_call *orch_call_find(struct orch_calls *cs, uint32_t slot,
                                 uint32_t serial); /* NULL: freed */
/* Starts its time. limit: what sets it ("vm.timeout"). */
void orch_call_clock(struct orch_call *c, int64_t ms, const char *limit);
/* Anew, from now. */
void orch_call_clock_again(struct orch_call *c);
/* It waits: from now on the end of its time ends it. */
void orch_call_arm(struct orch_call *c);
/* Its time stands still while it waits for what has a time of its own (a person's answer, a
 * template that is made). Each on is matched by an off. */
void orch_call_hold(struct orch_call *c, bool on);
/* It has its answer in text: it leaves the running ones, and is answered in a turn of its own. */
void orch_call_end(struct orch_call *c);
void orch_call_cancel(struct orch_call *c, const char *why);
/* The record is let go by the backend that owed it. */
void orch_call_release(struct orch_call *c);

/* ---- its result (result.c); each sets text */

void orch_call_text(struct orch_call *c, struct orch_slice text, bool is_error);
/* "KIND: TEXT" with isError, by the error's class. */
void orch_call_fail(struct orch_call *c, const struct orch_err *err);
void orch_call_fail_text(struct orch_call *c, const char *kind, struct orch_slice text);
void orch_call_rpc_error(struct orch_call *c, int code, struct orch_slice text);
/* The members of an MCP result as they came. */
void orch_call_members(struct orch_call *c, struct orch_slice members);
/* The answer is the error for what its client lacks (missing). */
void orch_call_missing(struct orch_call *c);

/* ---- what a tool's ctx reaches (context.c) */

/* What a call has of time. limit: what sets the whole of it, for people. */
struct orch_call_time {
    int64_t left_ms,
        whole_ms; /* left: negative when it is over, and the call has a moment to answer */
    const char *limit;
};
struct orch_call_time orch_call_time(const struct orch_call *c);
/* NULL for one that has its answer, also while that is kept for a client to come back. */
struct orch_call *orch_call_live(struct orch_calls *cs, uint32_t slot, uint32_t serial);
void orch_call_progress(struct orch_call *c, double done, double total, struct orch_slice message);
void orch_call_log(struct orch_call *c, const char *level, struct orch_slice message);
const char *orch_call_network(const struct orch_call *c); /* as the deciding rules say; "none" */
/* Whether a request of the call's tool may connect there, by the policies in force; false with err
 * (class DENIED), and the audit log says so. */
bool orch_call_may_connect(struct orch_call *c, const struct sockaddr *to, struct orch_err *err);
/* Over HTTP a legacy client's connection is ended and the answer kept. */
void orch_call_let_go(struct orch_call *c, int64_t retry_ms);

/* ---- Lua tools (lua_tool.c) */

extern const struct orch_tool_backend orch_lua_backend;
void orch_push_ctx(lua_State *L, uint32_t slot, uint32_t serial);
struct orch_call *orch_check_call(lua_State *L,
                                  struct orch_calls *cs); /* of the ctx at 1; raises */
#define ORCH_CTX_META "orch.ctx"

/* ---- questions to its client (ask.c) */

struct orch_ask_item {
    struct orch_ask *ask;
    char *key;          /* owned, as are the buffers */
    const char *method; /* elicitation/create, sampling/createMessage, roots/list */
    unsigned needs;     /* ORCH_MCP_CAP_* */
    uint64_t question;  /* of a legacy client; 0: none is under way */
    struct orch_buf params, answer, error;
    bool answered;
    enum orch_class failed; /* answer is empty, error says why; 0: it did not fail */
};
/* Asks the client all of it; takes items (an array made by malloc). done is called once, unless all
 * is answered when this returns (orch_ask_done) or orch_ask_free comes first. NULL with err; code
 * ENOTSUP: the client does not declare what is needed. */
struct orch_ask *orch_ask_start(struct orch_call *c, struct orch_ask_item *items, size_t n,
                                void (*done)(void *ud), void *ud, struct orch_err *err);
void orch_ask_free(struct orch_ask *a);
bool orch_ask_done(const struct orch_ask *a);
const struct orch_ask_item *orch_ask_items(const struct orch_ask *a, size_t *n);
bool orch_call_asks(const struct orch_call *c); /* some answer is still awaited */
void orch_call_put_questions(const struct orch_call *c,
                             struct orch_buf *b); /* "inputRequests":{…} */
void orch_call_take_answers(struct orch_call *c, struct orch_slice inputs);

/* ---- the tasks extension (job.c) */

/* The call becomes a task: its request is answered with the task's id. -ENOTSUP: the client has no
 * tasks. */
int orch_job_begin(struct orch_call *c, struct orch_err *err);

#endif
