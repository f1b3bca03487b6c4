/* Inside core/mcp only: what session.c, message.c, ask.c and listen.c share. */
#ifndef ORCH_MCP_SESSION_INT_H
#define ORCH_MCP_SESSION_INT_H

#include "session.h"

#define ORCH_MCP_NO_DATA ((struct orch_slice){ 0 })

/* Progress, log and other unanswered notes are left out while this much output waits for a slow
 * reader. */
#define ORCH_MCP_NOTES_MAX_BYTES (1u << 20)

/* A 2025-03-26 batch: answers are collected and sent as one array when the last one is there. */
struct orch_mcp_batch {
    unsigned pending;
    bool closed, awaited; /* awaited: it had a request, so its stream waits for an answer */
    void *stream;
    struct orch_buf out;
};

enum { ORCH_MCP_HELD_MAX_BYTES = 16 << 20, ORCH_MCP_LOG_LEVELS = 8 };
extern const char *const orch_mcp_log_levels[ORCH_MCP_LOG_LEVELS];

/* What a client wants to hear of: a modern subscriptions/listen, or the URIs of a legacy
 * session. */
struct orch_mcp_filter {
    unsigned changes; /* enum orch_mcp_change */
    char **uris, **tasks;
    size_t n_uris, n_tasks;
};

struct orch_mcp_request {
    struct orch_mcp_request *prev, *next;
    struct orch_mcp_session *session;
    struct orch_mcp_batch *batch;
    struct orch_mcp_filter *filter; /* subscriptions/listen */
    void *host, *stream;
    char *id;   /* id bytes, then progress token bytes */
    char *held; /* the message, while the session is held; else NULL */
    uint32_t id_n, token_n, held_n;
    unsigned asks;    /* questions to the client under way */
    int8_t log_level; /* -1: none */
    uint8_t caps;
    bool modern, cancelled, answered;
};

struct orch_mcp_question {
    struct orch_mcp_request *rq; /* NULL: free */
    orch_mcp_reply_fn *done;
    void *ud;
    uint32_t serial;
};

struct orch_mcp_session {
    const struct orch_mcp_server_ops *ops;
    void *ud;
    struct orch_json_limits limits;
    struct orch_json_doc doc;
    struct orch_buf out;
    orch_mcp_send_fn *send;
    orch_mcp_check_fn *check;
    void *sink_ud;
    void *stream; /* of the message being handled */
    struct orch_mcp_request *first, *spare;
    unsigned in_flight, listening;
    unsigned *shared;    /* in flight of all sessions of its caller; NULL: it is counted alone */
    const char *version; /* legacy, after initialize */
    bool initialized_seen, ended, feeding, answers, holding;
    size_t held_bytes;
    int8_t log_level;
    uint8_t caps; /* legacy */
    char *client;
    struct orch_mcp_filter legacy; /* resources/subscribe */
    struct orch_mcp_question *questions;
    size_t n_questions, n_asked;
    void (*on_output)(void *ud);
    void *on_output_ud;
    void (*on_idle)(void *ud);
    void *on_idle_ud;
};

/* One message being handled. */
struct orch_mcp_incoming {
    struct orch_mcp_session *s;
    const struct orch_json_doc *d;
    struct orch_rpc_msg m;
    struct orch_mcp_batch *batch;
    uint32_t tok;  /* of the message */
    uint32_t meta; /* params._meta when it is an object */
    bool modern;
};

void orch_mcp_refuse(struct orch_mcp_incoming *in, int code, struct orch_slice data,
                     const char *fmt, ...) ORCH_PRINTF(4, 5);
void orch_mcp_answer(struct orch_mcp_incoming *in, struct orch_slice members);
void orch_mcp_count(struct orch_mcp_session *s, int n); /* requests in flight: more, or less */
struct orch_mcp_request *orch_mcp_request_new(struct orch_mcp_incoming *in,
                                              struct orch_slice token);
/* A message that is no answer: begin gives where it starts in the output, end sends it. */
size_t orch_mcp_note_begin(struct orch_mcp_session *s, const char *method);
void orch_mcp_note_end(struct orch_mcp_session *s, size_t from, void *stream);
void orch_mcp_message_end(struct orch_mcp_session *s, size_t from, void *stream, int status);

/* NULL: none of that id is in flight. */
struct orch_mcp_request *orch_mcp_request_find(struct orch_mcp_session *s, struct orch_slice id);
/* An answer goes to the session's output or into its batch. Returns where it starts. */
size_t orch_mcp_answer_begin(struct orch_mcp_session *s, struct orch_mcp_batch *batch,
                             struct orch_buf **out);
void orch_mcp_put_result(struct orch_buf *out, struct orch_slice id, const char *type,
                         struct orch_slice members);
void orch_mcp_batch_flush(struct orch_mcp_session *s, struct orch_mcp_batch *batch);
/* What HTTP says beside a JSON-RPC error. */
int orch_mcp_status_of(int code, bool modern);
int orch_mcp_level(struct orch_slice name); /* its index; -1: none */

/* ask.c */
unsigned orch_mcp_caps_read(const struct orch_json_doc *d, uint32_t capabilities);
void orch_mcp_ask_reply(struct orch_mcp_incoming *in);
void orch_mcp_ask_drop(struct orch_mcp_request *rq, bool tell);

/* listen.c */
void orch_mcp_listen(struct orch_mcp_incoming *in);
void orch_mcp_subscribe(struct orch_mcp_incoming *in, bool on);
void orch_mcp_filter_fini(struct orch_mcp_filter *f);

#endif
