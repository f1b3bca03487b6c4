/* One MCP session in the server role: the state machine of both eras over JSON-RPC messages. It
 * owns the requests in flight; the host above answers them. No I/O: a transport feeds it messages
 * and takes its output.
 *
 * Legacy revisions (2025-11-25, 2025-06-18, 2025-03-26 with batches, 2024-11-05) open with
 * initialize; the modern one (2026-07-28) carries its version in each request's _meta. Both are
 * served at once, by request. Nothing unasked-for is sent to a legacy client before its
 * notifications/initialized.
 *
 * Files: session.c the state machine, ask.c requests to legacy clients, listen.c subscriptions. */
#ifndef ORCH_MCP_SESSION_H
#define ORCH_MCP_SESSION_H

#include "rpc.h"

struct orch_mcp_session;
struct orch_mcp_request;

/* What the server offers beside tools and logging. */
enum { ORCH_MCP_RESOURCES = 1, ORCH_MCP_PROMPTS = 2, ORCH_MCP_COMPLETIONS = 4, ORCH_MCP_TASKS = 8 };

/* What a client declares that it can be asked for. */
enum {
    ORCH_MCP_CAP_FORM = 1, /* elicitation by form */
    ORCH_MCP_CAP_URL = 2,  /* elicitation by URL */
    ORCH_MCP_CAP_SAMPLING = 4,
    ORCH_MCP_CAP_SAMPLING_TOOLS = 8,
    ORCH_MCP_CAP_ROOTS = 16,
    ORCH_MCP_CAP_TASKS = 32, /* the extension */
};

/* The parts of tools/call, prompts/get (arguments) and resources/read (name is the uri). Tokens are
 * 0 when absent; inputs and state only in the modern era. */
struct orch_mcp_params {
    struct orch_slice name;
    uint32_t all, args, meta, inputs, state;
};

struct orch_mcp_server_ops {
    /* Appends the JSON array of tool definitions of the page at cursor (empty: the first), and to
     * next the cursor of the following one. -EINVAL: no such cursor; else an error of class
     * UPSTREAM. */
    int (*tools_list)(void *ud, struct orch_slice cursor, struct orch_buf *out,
                      struct orch_buf *next, struct orch_err *err);
    /* A tools/call whose envelope is right. doc and tokens are valid during this call only. Answer
     * at any time with one of orch_mcp_respond*. */
    void (*tool_call)(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                      const struct orch_mcp_params *p);
    /* The same for what `features` names: resources/list, resources/templates/list, resources/read,
     * prompts/list, prompts/get, completion/complete, tasks/get, tasks/update, tasks/cancel. */
    void (*request)(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                    const char *method, const struct orch_mcp_params *p);
    /* The client gave up on it: stop, then orch_mcp_request_drop or any answer, which is not
     * sent. */
    void (*cancel)(void *ud, struct orch_mcp_request *rq);
    /* The session goes away: forget the request, which is gone when this returns. */
    void (*detach)(void *ud, struct orch_mcp_request *rq);
    const char *server_info;  /* JSON */
    const char *instructions; /* or NULL */
    unsigned features;
    unsigned max_calls; /* in flight at once */
};

struct orch_mcp_session *orch_mcp_session_new(const struct orch_mcp_server_ops *ops, void *ud,
                                              const struct orch_json_limits *limits);
/* Cancels what is in flight (ops->cancel is called for each, which must drop it at once or
 * later). */
void orch_mcp_session_end(struct orch_mcp_session *s);
void orch_mcp_session_free(struct orch_mcp_session *s);

/* One message without its newline; stream: what a transport with a stream for each request knows it
 * by, else NULL. Answers that are ready are sent. True when there was or will be an answer. */
bool orch_mcp_session_feed(struct orch_mcp_session *s, struct orch_slice line, void *stream);
/* A line longer than limits->bytes was skipped by the transport. */
void orch_mcp_session_oversized(struct orch_mcp_session *s, size_t limit);

/* Where messages go: to the output, a line each, which the transport consumes; it is told when some
 * appears outside of session_feed. */
struct orch_buf *orch_mcp_session_out(struct orch_mcp_session *s);
void orch_mcp_session_on_output(struct orch_mcp_session *s, void (*fn)(void *ud), void *ud);
/* Or to the transport one by one. stream: of the request it belongs to, NULL: of none. status: 0
 * when more will follow, else it is the stream's answer, and this its HTTP status; an empty one
 * ends a stream whose request was cancelled. */
typedef void orch_mcp_send_fn(void *ud, void *stream, struct orch_slice message, int status);
/* What a transport has against a modern request (Mcp-* headers): NULL, or the text for -32020. */
typedef const char *orch_mcp_check_fn(void *ud, void *stream, const struct orch_json_doc *d,
                                      const struct orch_rpc_msg *m);
void orch_mcp_session_sink(struct orch_mcp_session *s, orch_mcp_send_fn *send,
                           orch_mcp_check_fn *check, void *ud);

/* While on, tools/list and tools/call are kept, as requests in flight that can be cancelled; what
 * is kept is bounded. Let go, they are handled in the order in which they came. */
void orch_mcp_session_hold(struct orch_mcp_session *s, bool on);
/* orch_mcp_progress for each of them. */
void orch_mcp_session_held_progress(struct orch_mcp_session *s, double done,
                                    struct orch_slice message);

/* Called when the last request in flight ended. */
void orch_mcp_session_on_idle(struct orch_mcp_session *s, void (*fn)(void *ud), void *ud);

/* What the client says of itself, for call.untrusted: JSON bytes of clientInfo or empty. */
struct orch_slice orch_mcp_session_client(const struct orch_mcp_session *s);
/* negotiated, or ORCH_MCP_MODERN */
const char *orch_mcp_session_version(const struct orch_mcp_session *s);
/* initialize was accepted: it is legacy */
bool orch_mcp_session_version_agreed(const struct orch_mcp_session *s);
/* as new: nothing in flight, nothing agreed */
bool orch_mcp_session_unused(const struct orch_mcp_session *s);
unsigned orch_mcp_session_in_flight(const struct orch_mcp_session *s); /* without subscriptions */

/* Its requests are counted in *in_flight too, and limited by that: of a caller with many sessions.
 * NULL: alone again. */
void orch_mcp_session_share(struct orch_mcp_session *s, unsigned *in_flight);

/* Tells clients that asked for it. */
enum orch_mcp_change {
    ORCH_MCP_TOOLS_CHANGED = 1,
    ORCH_MCP_PROMPTS_CHANGED = 2,
    ORCH_MCP_RESOURCES_CHANGED = 4
};
void orch_mcp_session_changed(struct orch_mcp_session *s, enum orch_mcp_change what);
void orch_mcp_session_resource_updated(struct orch_mcp_session *s, struct orch_slice uri);
/* status: the DetailedTask as members. */
void orch_mcp_session_task_changed(struct orch_mcp_session *s, struct orch_slice id,
                                   struct orch_slice members);

/* A slot for the host's own object of this request. */
void orch_mcp_request_set_host(struct orch_mcp_request *rq, void *host);
void *orch_mcp_request_host(const struct orch_mcp_request *rq);
bool orch_mcp_request_modern(const struct orch_mcp_request *rq);
unsigned orch_mcp_request_caps(const struct orch_mcp_request *rq); /* ORCH_MCP_CAP_* */
const char *orch_mcp_request_server_info(const struct orch_mcp_request *rq);
void *orch_mcp_request_stream(const struct orch_mcp_request *rq);

/* The result object's members without braces, e.g. "content":[…],"isError":true. Ends the
 * request. */
void orch_mcp_respond(struct orch_mcp_request *rq, struct orch_slice members);
/* The same with another resultType than "complete" (modern era only). */
void orch_mcp_respond_typed(struct orch_mcp_request *rq, const char *type,
                            struct orch_slice members);
void orch_mcp_respond_error(struct orch_mcp_request *rq, int code, struct orch_slice text,
                            struct orch_slice data);
/* Ends it without an answer (after cancel). */
void orch_mcp_request_drop(struct orch_mcp_request *rq);
/* Nothing is sent when the request carried no token. total < 0: none; message may be empty. */
void orch_mcp_progress(struct orch_mcp_request *rq, double done, double total,
                       struct orch_slice message);
/* `data` is JSON. Sent when the client asked for messages of this level. */
void orch_mcp_log(struct orch_mcp_request *rq, const char *level, struct orch_slice logger,
                  struct orch_slice data);

/* Asks a legacy client, on the request's stream: elicitation/create, sampling/createMessage,
 * roots/list. done is called once with the answer's result or error token (the other is 0), unless
 * the request ends or the question is taken back first: then the client is told that it is
 * cancelled. 0 when there are too many. */
typedef void orch_mcp_reply_fn(void *ud, const struct orch_json_doc *d, uint32_t result,
                               uint32_t error);
uint64_t orch_mcp_ask(struct orch_mcp_request *rq, const char *method, struct orch_slice params,
                      orch_mcp_reply_fn *done, void *ud);
void orch_mcp_ask_cancel(struct orch_mcp_request *rq, uint64_t id);

#endif
