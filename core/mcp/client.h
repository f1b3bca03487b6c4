/* An MCP client: of both eras, over a child's stdin and stdout or over Streamable HTTP. It owns
 * the child or the HTTP exchanges, and the requests under way; how long anything may take is its
 * owner's to say (give_up, cancel).
 *
 * The legacy era is 2025-11-25 and before (initialize; sessions; requests from the server), the
 * modern one 2026-07-28 (each request stands alone; questions come as input_required results).
 * Unless told, the client asks by server/discover which it is, and goes on with initialize in
 * the same process or at the same address. A server that reads that and then ends or falls
 * silent is started again and spoken to in the older era, which is remembered where its owner says:
 * of a command for good, of a URL for a few minutes.
 *
 * What the server sends is an adversary's: messages over the limit end it, stray text is logged
 * and skipped, ids are checked, questions, rounds and states are bounded.
 *
 * Files: client.c its life and what comes, client_call.c requests, client_era.c the handshake,
 * client_child.c and client_http.c the ways. */
#ifndef ORCH_MCP_CLIENT_H
#define ORCH_MCP_CLIENT_H

#include "../base/hash.h"
#include "../base/loop.h"
#include "../base/proc.h"
#include "../http/client.h"
#include "rpc.h"

struct orch_mcp_client;
struct orch_mcp_client_call;

/* ---- a giver of tokens, for HTTP */

struct orch_mcp_headers;
struct orch_mcp_challenge;

struct orch_mcp_auth {
    /* Adds what authorizes a request that is about to be sent. */
    void (*sign)(void *ud, struct orch_mcp_headers *h, const char *method, const char *url);
    /* A request was answered 401 or 403, for the times-th time. To be decided once, at any time
     * (orch_mcp_challenge_end), unless it is withdrawn first: nobody waits for the request any
     * more. */
    void (*challenged)(void *ud, struct orch_mcp_challenge *q, const struct orch_http_response *r,
                       unsigned times);
    void (*withdrawn)(void *ud, struct orch_mcp_challenge *q);
    void *ud;
};
void orch_mcp_header_add(struct orch_mcp_headers *h, const char *name, struct orch_slice value);
enum orch_mcp_verdict { ORCH_MCP_AGAIN, ORCH_MCP_AS_IT_IS, ORCH_MCP_REFUSED };
/* Again: it is sent once more, signed anew. As it is: the answer is what it is. Refused: it
 * fails with why. */
void orch_mcp_challenge_end(struct orch_mcp_challenge *q, enum orch_mcp_verdict verdict,
                            const struct orch_err *why);

/* ---- the client */

/* Servers known to be of the legacy era, for the clients that share it; { 0 } knows none. */
struct orch_mcp_verdicts {
    struct orch_mcp_judged {
        uint8_t key[ORCH_SHA256_BYTES]; /* who is asked, and as whom */
        int64_t until_ms;               /* 0: free; INT64_MAX: for good */
    } list[256];
    size_t next;
};

struct orch_mcp_client_opts {
    const char *name; /* for messages */
    /* A child, */
    const char *const *argv;
    const char *const *env; /* "NAME=value" */
    const char *cwd;
    /* as in orch_proc_opts, asked for at each start; NULL: none */
    struct orch_proc_via *(*via)(void *via_ud, struct orch_err *err);
    void *via_ud;
    /* or an address: */
    const char *url;
    struct orch_http_client *http; /* outlives the client */
    const struct orch_http_header *headers;
    size_t n_headers;
    const struct orch_mcp_auth *auth; /* NULL: none */

    struct orch_mcp_verdicts *verdicts; /* outlives the client; NULL: nothing is remembered */
    const char *protocol;               /* the one revision to speak; NULL: found out */
    const char *info_name;              /* as it calls itself; NULL: orch */
    const char *capabilities;           /* JSON, declared; NULL: those of asked */
    int64_t start_ms;                   /* how long ready is waited for; 0: unknown */
    struct orch_json_limits limits;
    /* The handshake is done, or the server failed (class UPSTREAM, with exit status and stderr
     * tail; over HTTP also that of the exchange). Once; later failures come to lost. */
    void (*ready)(void *ud, const struct orch_err *err);
    void (*lost)(void *ud, const struct orch_err *err);
    /* notifications/tools/list_changed, subscribed to in the modern era; may be NULL */
    void (*tools_changed)(void *ud);
    /* NULL: the server is told that nobody can be asked. Else its elicitation/create,
     * sampling/createMessage and, with roots, roots/list come here (from the loop, all borrowed;
     * params 0: there are none), each to be answered once under that id (orch_mcp_client_reply,
     * _refuse), unless withdrawn says that the server no longer waits. */
    void (*asked)(void *ud, struct orch_slice id, const char *method, const struct orch_json_doc *d,
                  uint32_t params);
    void (*withdrawn)(void *ud, struct orch_slice id);
    bool roots;
    /* Any notification that is not for the functions above, nor progress; params 0: none. May be
     * NULL. */
    void (*notified)(void *ud, const char *method, const struct orch_json_doc *d, uint32_t params);
    void *ud;
};

/* All of o is copied but http, verdicts, auth's functions and ud. Errors have the class UPSTREAM,
 * or ISOLATION by via. */
struct orch_mcp_client *orch_mcp_client_new(struct orch_loop *l,
                                            const struct orch_mcp_client_opts *o,
                                            struct orch_err *err);
/* Ends the child as orch_proc_end does, exchanges at once. No callbacks follow; it may be called
 * from one. */
void orch_mcp_client_free(struct orch_mcp_client *c, int64_t eof_ms, int64_t term_ms);
/* Over HTTP, before the free: ends the session at the server, if there is one; said is called
 * once, within a second. */
void orch_mcp_client_goodbye(struct orch_mcp_client *c, orch_loop_fn *said, void *ud);
/* Ends it now as failed, for this reason: what waits for it gets "NAME: WHY; its stderr ends:
 * …". */
void orch_mcp_client_give_up(struct orch_mcp_client *c, const char *why);

bool orch_mcp_client_alive(const struct orch_mcp_client *c);
bool orch_mcp_client_ready(const struct orch_mcp_client *c); /* the handshake is done */
/* The request of the handshake that it waits for: initialize, where either may be answered. */
const char *orch_mcp_client_opening(const struct orch_mcp_client *c);
struct orch_slice orch_mcp_client_stderr_line(const struct orch_mcp_client *c); /* the last one */
/* Appends "; its stderr ends: …", if it is a child. */
void orch_mcp_client_tail(const struct orch_mcp_client *c, struct orch_buf *out);

/* What the server said of itself in the handshake: JSON, or empty. */
struct orch_mcp_about {
    bool modern;
    const char *version;
    struct orch_slice server_info, capabilities, instructions;
};
struct orch_mcp_about orch_mcp_client_about(const struct orch_mcp_client *c);

/* result: the whole JSON value of "result" as it came, without a "resultType"; err: a JSON-RPC
 * error or a failure (class UPSTREAM). Called once, from the loop. */
typedef void orch_mcp_client_done_fn(void *ud, struct orch_slice result,
                                     const struct orch_err *err);

struct orch_mcp_client_request {
    const char *method;       /* NULL: tools/call of tool, args, meta */
    struct orch_slice params; /* with method: a JSON object or empty */
    const char *tool;
    struct orch_slice args; /* JSON object */
    struct orch_slice meta; /* of a tool's call, params._meta to pass on: JSON object or empty */
    bool note;              /* a notification; done: it was sent, over HTTP taken */
    orch_mcp_client_done_fn *done;
    /* NULL: not asked for; total < 0: not said */
    void (*progress)(void *ud, double done, double total, struct orch_slice message);
    void *ud;
};
/* Before the handshake is done it waits for that. */
struct orch_mcp_client_call *orch_mcp_client_call(struct orch_mcp_client *c,
                                                  const struct orch_mcp_client_request *r,
                                                  struct orch_err *err);
/* Tells the server and forgets it; done is not called. */
void orch_mcp_client_cancel(struct orch_mcp_client_call *call, const char *why);
/* Within done: the JSON of the server's "error", or empty. */
struct orch_slice orch_mcp_client_error(const struct orch_mcp_client *c);

/* Within asked: the call for which the server asks, or NULL when it cannot be told. */
struct orch_mcp_client_call *orch_mcp_client_asking(const struct orch_mcp_client *c);
/* Answers what the server asked, by a JSON value or by a JSON-RPC error. In the modern era the
 * latter ends the call. */
void orch_mcp_client_reply(struct orch_mcp_client *c, struct orch_slice id,
                           struct orch_slice result);
void orch_mcp_client_refuse(struct orch_mcp_client *c, struct orch_slice id, int code,
                            const char *why);

/* Modern: from this level on the server may log during requests (JSON string's text); NULL: not
 * at all. */
void orch_mcp_client_log_level(struct orch_mcp_client *c, const char *level);
/* Modern over HTTP, of a tool in an answer to tools/list: why it must not be used
 * (x-mcp-header), or NULL. */
const char *orch_mcp_client_tool_problem(const struct orch_mcp_client *c, const char *name);

#endif
