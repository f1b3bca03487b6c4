/* MCP over Streamable HTTP: one endpoint, both eras at once. A legacy client has a session
 * (Mcp-Session-Id) with a stream for each POST, one GET stream for what belongs to no request, and
 * replay by Last-Event-ID; its disconnecting cancels nothing. A modern client's POST stands for
 * itself, and closing it cancels.
 *
 * Host, Origin and the bearer token are checked before anything else; on a unix socket the server
 * below lets in this uid only. Nothing is kept without bound: sessions, streams, events and their
 * bytes. */
#ifndef ORCH_MCP_STREAM_H
#define ORCH_MCP_STREAM_H

#include "../http/server.h"
#include "session.h"

struct orch_mcp_endpoint;

struct orch_mcp_endpoint_opts {
    const struct orch_mcp_server_ops *ops; /* borrowed */
    /* What the sessions of this peer give to the ops; lives as long as the endpoint. */
    void *(*peer)(void *ud, const struct orch_http_peer *peer);
    /* Where the requests in flight of a peer's modern clients, which have no sessions, are counted
     * together. */
    unsigned *(*in_flight)(void *peer);
    /* A message was handled: what the host deferred should run soon. */
    void (*handled)(void *ud);
    /* What the headers Mcp-Param-* have against this tools/call: NULL or the text of -32020. */
    const char *(*check_params)(void *ud, const struct orch_http_request *q,
                                const struct orch_json_doc *d, struct orch_slice tool,
                                uint32_t args);
    void *ud;
    struct orch_json_limits limits;
    const uint8_t *token_sha256; /* borrowed; NULL: only for unix sockets */
    /* what Host and Origin may say, as orch_http_name_refused; NULL: unix socket */
    const char *const *hosts;
};

struct orch_mcp_endpoint *orch_mcp_endpoint_new(struct orch_loop *l,
                                                const struct orch_mcp_endpoint_opts *o);
/* An orch_http_handler (ud: the endpoint). */
void orch_mcp_endpoint_request(void *ud, const struct orch_http_request *q,
                               struct orch_http_reply *r);
/* For each session that may have subscribers. */
void orch_mcp_endpoint_each(struct orch_mcp_endpoint *e,
                            void (*fn)(void *ud, struct orch_mcp_session *s), void *ud);
/* Cancels and ends everything. The HTTP server is freed after it. */
void orch_mcp_endpoint_free(struct orch_mcp_endpoint *e);

/* Ends the connection of a legacy request's stream, not the request: its client comes back after
 * retry_ms with Last-Event-ID. stream: orch_mcp_request_stream. */
void orch_mcp_stream_release(void *stream, int64_t retry_ms);

#endif
