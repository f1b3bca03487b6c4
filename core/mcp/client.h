/* An MCP client over a child's stdin and stdout, legacy era (2025-11-25 handshake). It owns the
 * child and the requests under way; how long anything may take is its owner's to say (give_up,
 * cancel). What the server sends is an adversary's: lines over the limit end it, stray text is
 * logged and skipped, ids are checked. */
#ifndef ORCH_MCP_CLIENT_H
#define ORCH_MCP_CLIENT_H

#include "../base/loop.h"
#include "../base/proc.h"
#include "rpc.h"

struct orch_mcp_client;
struct orch_mcp_client_call;

struct orch_mcp_client_opts {
    const char *name; /* for messages */
    const char *const *argv;
    const char *const *env; /* "NAME=value" */
    const char *cwd;
    struct orch_proc_via *via; /* as in orch_proc_opts */
    struct orch_json_limits limits;
    /* The handshake is done, or the server failed (class UPSTREAM, with exit status and stderr
     * tail). Once; later failures come to lost. */
    void (*ready)(void *ud, const struct orch_err *err);
    void (*lost)(void *ud, const struct orch_err *err);
    void (*tools_changed)(void *ud); /* notifications/tools/list_changed; may be NULL */
    /* NULL: the server is told that nobody can be asked. Else its elicitation/create and
     * sampling/createMessage come here (from the loop, all borrowed), each to be answered once
     * under that id (orch_mcp_client_reply, _refuse), unless withdrawn says that the server no
     * longer waits. */
    void (*asked)(void *ud, struct orch_slice id, const char *method, const struct orch_json_doc *d,
                  uint32_t params);
    void (*withdrawn)(void *ud, struct orch_slice id);
    void *ud;
};

/* Errors have the class UPSTREAM, or ISOLATION by via. */
struct orch_mcp_client *orch_mcp_client_new(struct orch_loop *l,
                                            const struct orch_mcp_client_opts *o,
                                            struct orch_err *err);
/* Ends the child as orch_proc_end does. No callbacks follow. */
void orch_mcp_client_free(struct orch_mcp_client *c, int64_t eof_ms, int64_t term_ms);
/* Ends it now as failed, for this reason: what waits for it gets "NAME: WHY; its stderr ends:
 * …". */
void orch_mcp_client_give_up(struct orch_mcp_client *c, const char *why);

bool orch_mcp_client_alive(const struct orch_mcp_client *c);
bool orch_mcp_client_ready(const struct orch_mcp_client *c); /* the handshake is done */
struct orch_slice orch_mcp_client_stderr_line(const struct orch_mcp_client *c); /* the last one */

/* result: the whole JSON value of "result" as it came; err: a JSON-RPC error or a failure (class
 * UPSTREAM). Called once, from the loop. */
typedef void orch_mcp_client_done_fn(void *ud, struct orch_slice result,
                                     const struct orch_err *err);

struct orch_mcp_client_request {
    const char *method;       /* NULL: tools/call of tool, args, meta */
    struct orch_slice params; /* with method: JSON or empty */
    const char *tool;
    struct orch_slice args; /* JSON object */
    struct orch_slice meta; /* params._meta to pass on: JSON object or empty */
    orch_mcp_client_done_fn *done;
    void (*progress)(void *ud, double done, double total, struct orch_slice message);
    void *ud;
};
struct orch_mcp_client_call *orch_mcp_client_call(struct orch_mcp_client *c,
                                                  const struct orch_mcp_client_request *r,
                                                  struct orch_err *err);
/* Sends notifications/cancelled and forgets it; done is not called. */
void orch_mcp_client_cancel(struct orch_mcp_client_call *call, const char *why);

/* Answers what the server asked, by a JSON value or by a JSON-RPC error. */
void orch_mcp_client_reply(struct orch_mcp_client *c, struct orch_slice id,
                           struct orch_slice result);
void orch_mcp_client_refuse(struct orch_mcp_client *c, struct orch_slice id, int code,
                            const char *why);

#endif
