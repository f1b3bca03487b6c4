/* One MCP session in the server role: the state machine of both eras over JSON-RPC lines. It owns the
 * requests in flight; the host above answers them. No I/O: a transport feeds it lines and takes its
 * output.
 *
 * Legacy revisions (2025-11-25, 2025-06-18, 2025-03-26 with batches, 2024-11-05) open with initialize;
 * the modern one (2026-07-28) carries its version in each request's _meta. Both are served at once, by
 * request. Nothing unasked-for is sent to a legacy client before its notifications/initialized. */
#ifndef ORCH_MCP_SESSION_H
#define ORCH_MCP_SESSION_H

#include "rpc.h"

struct orch_mcp_session;
struct orch_mcp_request;

struct orch_mcp_server_ops {
    /* Appends the JSON array of tool definitions; an error of class UPSTREAM is answered as such. */
    int (*tools_list)(void *ud, struct orch_buf *out, struct orch_err *err);
    /* A tools/call whose envelope is right. doc and tokens are valid during this call only; args is 0
     * when absent, meta 0 when absent. Answer at any time with one of orch_mcp_respond*. */
    void (*tool_call)(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d, struct orch_slice name,
                      uint32_t args, uint32_t meta);
    /* The client gave up on it: stop, then orch_mcp_request_drop. */
    void (*cancel)(void *ud, struct orch_mcp_request *rq);
    const char *instructions; /* or NULL */
    unsigned max_calls;       /* in flight at once */
};

struct orch_mcp_session *orch_mcp_session_new(const struct orch_mcp_server_ops *ops, void *ud,
                                              const struct orch_json_limits *limits);
/* Cancels what is in flight (ops->cancel is called for each, which must drop it at once or later). */
void orch_mcp_session_end(struct orch_mcp_session *s);
void orch_mcp_session_free(struct orch_mcp_session *s);

/* One line without its newline. Answers that are ready are appended to the output. */
void orch_mcp_session_line(struct orch_mcp_session *s, struct orch_slice line);
/* A line longer than limits->bytes was skipped by the transport. */
void orch_mcp_session_oversized(struct orch_mcp_session *s, size_t limit);
/* Bytes to send; the transport consumes them. */
struct orch_buf *orch_mcp_session_out(struct orch_mcp_session *s);
/* Called when output appears outside of session_line (an answer that came later). */
void orch_mcp_session_on_output(struct orch_mcp_session *s, void (*fn)(void *ud), void *ud);

/* Called when the last request in flight ended. */
void orch_mcp_session_on_idle(struct orch_mcp_session *s, void (*fn)(void *ud), void *ud);

/* What the client says of itself, for call.untrusted: JSON bytes of clientInfo or empty. */
struct orch_slice orch_mcp_session_client(const struct orch_mcp_session *s);
const char *orch_mcp_session_version(const struct orch_mcp_session *s); /* negotiated, or "2026-07-28" */
unsigned orch_mcp_session_in_flight(const struct orch_mcp_session *s);
void orch_mcp_session_tools_changed(struct orch_mcp_session *s);

/* A slot for the host's own object of this request. */
void orch_mcp_request_set_host(struct orch_mcp_request *rq, void *host);
void *orch_mcp_request_host(const struct orch_mcp_request *rq);
bool orch_mcp_request_modern(const struct orch_mcp_request *rq);

/* The result object's members without braces, e.g. "content":[…],"isError":true. Ends the request. */
void orch_mcp_respond(struct orch_mcp_request *rq, struct orch_slice members);
void orch_mcp_respond_error(struct orch_mcp_request *rq, int code, struct orch_slice text, struct orch_slice data);
/* Ends it without an answer (after cancel). */
void orch_mcp_request_drop(struct orch_mcp_request *rq);
/* Nothing is sent when the request carried no token. total < 0: none; message may be empty. */
void orch_mcp_progress(struct orch_mcp_request *rq, double done, double total, struct orch_slice message);
/* `data` is JSON. Sent when the client asked for messages of this level. */
void orch_mcp_log(struct orch_mcp_request *rq, const char *level, struct orch_slice logger, struct orch_slice data);

#endif
