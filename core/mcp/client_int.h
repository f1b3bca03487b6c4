/* Inside core/mcp only: what the files of the client share, and its ways to a server. */
#ifndef ORCH_MCP_CLIENT_INT_H
#define ORCH_MCP_CLIENT_INT_H

#include "client.h"
#include "../base/hash.h"

#include <sys/queue.h>

enum {
    ORCH_MCP_OUT_MAX_BYTES = 64 << 20,
    ORCH_MCP_PROBE_MS = 1000, /* a server that has read it answers at once, or not at all */
    ORCH_MCP_RETRIES = 5,     /* of a stream, in a row without success */
};

/* What the message is to its sender: a request, or one whose sending is awaited, or neither. */
enum orch_mcp_kind { ORCH_MCP_REQUEST, ORCH_MCP_NOTE, ORCH_MCP_OTHER };

/* How messages travel. A transport knows lines and exchanges; of methods only what HTTP repeats
 * in headers. */
struct orch_mcp_transport {
    const struct orch_mcp_transport_ops *ops;
    struct orch_mcp_client *client;
};

struct orch_mcp_transport_ops {
    /* Begins, and begins anew with another process: what was under way there is lost without a
     * word. Errors have the class that the client's owner shall see. */
    int (*start)(struct orch_mcp_transport *t, struct orch_err *err);
    /* The client's output from byte `from` on is a message. id: of a REQUEST or a NOTE. */
    void (*send)(struct orch_mcp_transport *t, size_t from, enum orch_mcp_kind kind, int64_t id);
    /* Nobody waits for the answer to this request any more. */
    void (*release)(struct orch_mcp_transport *t, int64_t id);
    /* The legacy handshake is done: whatever else makes the server's messages arrive; then
     * orch_mcp_client_opened. */
    void (*listen)(struct orch_mcp_transport *t);
    /* Who is asked, and as whom. */
    void (*key)(struct orch_mcp_transport *t, struct orch_sha256_ctx *h);
    void (*goodbye)(struct orch_mcp_transport *t); /* then orch_mcp_client_said */
    void (*stop)(struct orch_mcp_transport *t);    /* at once: it has failed */
    /* Not after stop; frees nothing. */
    void (*end)(struct orch_mcp_transport *t, int64_t eof_ms, int64_t term_ms);
    void (*free)(struct orch_mcp_transport *t);
};

struct orch_mcp_transport *orch_mcp_child_new(struct orch_mcp_client *c);
struct orch_mcp_transport *orch_mcp_http_new(struct orch_mcp_client *c);
/* Of the HTTP one: an answer to tools/list came. */
void orch_mcp_http_listed(struct orch_mcp_transport *t, const struct orch_json_doc *d,
                          uint32_t tools);
const char *orch_mcp_http_tool_problem(const struct orch_mcp_transport *t, const char *name);

/* One thing that a modern server wants to know before it goes on with a call. */
struct orch_mcp_input {
    struct orch_buf key, answer; /* JSON; answer: empty until it is there */
};

struct orch_mcp_client_call {
    TAILQ_ENTRY(orch_mcp_client_call) link; /* in the order of their making */
    struct orch_mcp_client *client;
    int64_t id; /* on the wire, of the last time it was sent; 0: nothing is awaited there */
    char *method;
    orch_mcp_client_done_fn *done;
    void (*progress)(void *ud, double done, double total, struct orch_slice message);
    void *ud;
    struct orch_buf members, meta; /* params and _meta without braces, where it may be sent again */
    struct orch_buf state;         /* requestState, as it came */
    struct orch_mcp_input *inputs;
    size_t n_inputs, n_answered;
    uint64_t round; /* of these inputs, of all calls */
    char *refused;  /* why an input will not come */
    unsigned rounds;
    /* own: the client's; waits: for the handshake; again: its session was lost once */
    bool note, own, waits, again;
};

enum orch_mcp_state { ORCH_MCP_PROBING, ORCH_MCP_OPENING, ORCH_MCP_READY };

struct orch_mcp_client {
    struct orch_loop *loop;
    struct orch_mcp_client_opts o; /* its texts are copies */
    char *name;
    struct orch_http_header *headers; /* o.headers, owned */
    struct orch_mcp_auth auth;
    struct orch_mcp_transport *t;
    struct orch_proc *proc; /* the child transport's; NULL over HTTP */
    /* What is to be written; over HTTP a message only while it is handed over. */
    struct orch_buf out;
    size_t answers; /* over HTTP on their way, awaited by nobody */
    struct orch_json_doc doc;
    TAILQ_HEAD(, orch_mcp_client_call) calls;
    int64_t next_id;
    unsigned stray;
    /* era */
    enum orch_mcp_state state;
    bool modern;
    const char *version;  /* agreed; NULL: none yet */
    struct orch_buf meta; /* members of every modern _meta */
    char *log_level;
    struct orch_mcp_client_call *probe, *opening, *listening;
    struct orch_timer *timer; /* of the probe; later of the subscription */
    bool probed;              /* this process was asked server/discover */
    bool fell_back;  /* initialize was refused: there is no other way than the modern era */
    bool discovered; /* it says of itself that it is of the modern era */
    bool restarted, again, session_lost;
    unsigned tries; /* to subscribe */
    struct orch_buf server_info, capabilities, instructions;
    /* within done, within asked */
    uint32_t error; /* token of doc */
    int status;     /* of HTTP, 0: none */
    struct orch_mcp_client_call *asks;
    uint64_t next_round;
    orch_loop_fn *said;
    void *said_ud;
    unsigned depth; /* of entries from the loop; the memory goes with the last */
    bool ready, told, dead, freed, rounds_posted;
    struct orch_err why; /* once dead */
};

/* Around everything that the loop calls. */
void orch_mcp_client_enter(struct orch_mcp_client *c);
void orch_mcp_client_leave(struct orch_mcp_client *c);

/* A message, or an array of them. id: of the request on whose stream it came, 0: none; status:
 * of HTTP, 0: none. True when it was the answer to that. */
bool orch_mcp_client_take(struct orch_mcp_client *c, struct orch_slice text, int64_t id,
                          int status);
void orch_mcp_client_sent(struct orch_mcp_client *c, int64_t id); /* a NOTE; 0: all there are */
/* This request, or NOTE, will not be answered. */
void orch_mcp_client_failed(struct orch_mcp_client *c, int64_t id, int status,
                            const struct orch_err *err);
/* The same of one whose session the server does not know; stale: another one was begun since. */
void orch_mcp_client_forgotten(struct orch_mcp_client *c, int64_t id, bool stale,
                               const struct orch_err *err);
void orch_mcp_client_fail(struct orch_mcp_client *c, const struct orch_err *err); /* all of it */
void orch_mcp_client_opened(struct orch_mcp_client *c);
void orch_mcp_client_said(void *client);

/* A request of the client's own: it does not wait for the handshake. */
struct orch_mcp_client_call *orch_mcp_client_own(struct orch_mcp_client *c,
                                                 const struct orch_mcp_client_request *r);
void orch_mcp_client_drop(struct orch_mcp_client_call *k); /* without a word to anybody */
/* err: they fail of it. */
void orch_mcp_client_send_waiting(struct orch_mcp_client *c, const struct orch_err *err);

/* client_call.c */
const char *orch_mcp_call_method(const struct orch_mcp_client_call *k);
struct orch_mcp_client_call *orch_mcp_call_by_id(struct orch_mcp_client *c, int64_t id);
/* r: what it says, where it was not kept. */
int orch_mcp_call_send(struct orch_mcp_client_call *k, const struct orch_mcp_client_request *r,
                       struct orch_err *err);
void orch_mcp_call_finish(struct orch_mcp_client_call *k, struct orch_slice result,
                          const struct orch_err *err);
void orch_mcp_call_fail(struct orch_mcp_client_call *k, enum orch_class cls, int code,
                        const char *why);
/* Its result, a token of the client's doc, says that the server wants more: its questions, what
 * it wants to see again. */
void orch_mcp_call_round(struct orch_mcp_client_call *k, uint32_t result);
void orch_mcp_rounds_go(void *client);
bool orch_mcp_is_question(const struct orch_mcp_client *c, const struct orch_json_doc *d,
                          uint32_t method, const char **name);
/* 0: it is none. */
uint32_t orch_mcp_object_at(const struct orch_json_doc *d, uint32_t object, const char *key);
void orch_mcp_copy_members(const struct orch_json_doc *d, uint32_t object,
                           bool (*skip)(const struct orch_json_doc *d, uint32_t key),
                           struct orch_buf *out);

/* client_era.c */
void orch_mcp_era_begin(struct orch_mcp_client *c);
/* The child ended; true: what follows is taken care of. */
bool orch_mcp_era_gone(struct orch_mcp_client *c);
void orch_mcp_era_reopen(struct orch_mcp_client *c); /* its session is lost */
void orch_mcp_era_timer(void *client);

#endif
