/* Calls: tool calls and the other requests that run Lua. Private to call.c, asking.c and feature.c. */
#ifndef ORCH_CALL_H
#define ORCH_CALL_H

#include "host.h"

enum { ORCH_ALLOW = 1, ORCH_ASK, ORCH_DENY }; /* as lua/policy.lua returns them; 0: bad arguments */

struct orch_toolcall {
    struct orch_toolcall *next, *prev; /* in one of the host's lists */
    struct orch *o;
    struct orch_generation *gen;
    struct orch_session *session;
    struct orch_tool *tool; /* NULL: unknown, or a request beyond tools */
    const char *method;     /* of a request beyond tools */
    const char *server_info; /* of the MCP server that was called */
    struct orch_mcp_request *rq;
    orch_call_done_fn *done;
    void *done_ud;
    char id[40];
    uint32_t slot, serial;
    int64_t begun_us;
    /* Its time: starts when it runs, stands still while held. */
    struct orch_timer *timer; /* kept with the record; armed when the call waits */
    int64_t deadline_us, held_since_us, time_ms, grace_ms;
    const char *limit; /* what sets time_ms, for people; its generation's */
    unsigned holds;
    int decision; /* ORCH_ALLOW, ORCH_ASK, ORCH_DENY; 0: bad arguments or unknown */
    bool reserved, cancelled, is_error, finished, raw, modern;
    bool owed; /* a C tool has not called orch_answer yet: the record is not used again before */
    int rpc_code; /* the answer is a JSON-RPC error */
    struct orch_buf rpc_data;
    int args_ref; /* tool state: decoded arguments */
    struct orch_buf args; /* for upstreams and C tools: the arguments' bytes */
    struct orch_buf meta; /* for upstreams: params._meta as it came */
    struct orch_buf text; /* the error's text, or the result's members */
    uint16_t *redact;
    size_t n_redact;
    char *network; /* of the deciding rules; NULL: none */
    unsigned refused; /* connections that it did not allow */
    struct orch_task *task;
    struct orch_mcp_client_call *upstream;
    struct orch_vm_handle *vms;
    struct orch_http_stream *streams;
    enum orch_isolation isolation;
    char vm_id[32];

    /* Questions to the client (asking.c). */
    unsigned caps, missing;      /* ORCH_MCP_CAP_*: declared; needed but not declared */
    struct orch_ask *asks;
    struct orch_buf inputs;      /* inputResponses of the request at hand */
    unsigned round, keys;
    char *digest;                /* of method, name and arguments, when the client can be asked */
    bool wants_park, parked, answered; /* answered: its answer waits for the client's retry */
    int64_t park_ends_us;
    struct orch_toolcall *park_next, *park_prev;
    struct orch_job *job;        /* it became a task (jobs.c) */
};

struct orch_toolcall *orch_call_new(struct orch *o, struct orch_session *s);
struct orch_toolcall *orch_call_find(struct orch *o, uint32_t slot, uint32_t serial); /* NULL: freed */
void orch_call_free(struct orch_toolcall *c);
void orch_call_running(struct orch_toolcall *c); /* joins the list of running ones */
/* Starts its time. limit: what sets it ("vm.timeout"). */
void orch_call_clock(struct orch_toolcall *c, int64_t ms, const char *limit);
/* It waits: from now on the end of its time ends it. */
void orch_call_arm(struct orch_toolcall *c);
/* Its time stands still while it waits for what has a time of its own (a person's answer, a template that is
 * made). Each on is matched by an off. */
void orch_call_hold(struct orch_toolcall *c, bool on);
/* The task of it ended: leaves the list, and is answered in a turn of its own. */
void orch_call_end(struct orch_toolcall *c);
void orch_call_cancel(struct orch_toolcall *c, const char *why);
void orch_call_answer(struct orch_toolcall *c);
/* The result's members for a failure: "KIND: TEXT" with isError. */
void orch_call_fail(struct orch_toolcall *c, const struct orch_err *err);
/* The answer is a JSON-RPC error. */
void orch_call_rpc_error(struct orch_toolcall *c, int code, const char *text);

/* Keeps what questions need of the request; called when the call begins. */
void orch_asking_begin(struct orch_toolcall *c, const char *method, const struct orch_json_doc *d, const struct orch_mcp_params *p);
/* The call is over for the client: nothing waits any more. True when its answer waits for a retry. */
bool orch_asking_answer(struct orch_toolcall *c);
void orch_asking_end(struct orch_toolcall *c);
void orch_asking_missing(struct orch_toolcall *c); /* makes the answer the error for c->missing */
bool orch_asking_open(const struct orch_toolcall *c); /* some answer is still awaited */
void orch_asking_requests(struct orch_toolcall *c, struct orch_buf *b); /* "inputRequests":{…} */
void orch_asking_update(struct orch_toolcall *c, struct orch_slice inputs);
struct orch_ask *orch_asking_start(struct orch_toolcall *c, struct orch_ask_item *items, size_t n, void (*done)(void *ud), void *ud,
                                   struct orch_err *err);
void orch_asking_free(struct orch_ask *a);

/* The call becomes a task: its request is answered with the task's id. -ENOTSUP: the client has no tasks. */
int orch_job_begin(struct orch_toolcall *c, struct orch_err *err);
void orch_job_asks(struct orch_toolcall *c); /* what it waits for has changed */
void orch_job_end(struct orch_toolcall *c);  /* keeps the outcome */

#endif
