/* Inside core/bind: the module "orch.client", the MCP client as scripts have it. lua_client.c is a
 * link's life, client_request.c what is asked of its server, client_event.c what comes unasked: no
 * Lua runs inside the client's callbacks but sign, so that what they bring waits for next, and is
 * bounded. */
#ifndef ORCH_BIND_CLIENT_LINK_H
#define ORCH_BIND_CLIENT_LINK_H

#include "bind.h"

#include "../mcp/client.h"

#include <sys/queue.h>

#define ORCH_CLIENT_META "orch.mcp.link"

struct orch_client_event;
struct orch_client_request;
struct orch_client_challenge;

struct orch_client_link {
    struct orch_env *env;
    lua_State *main;
    struct orch_state *state;
    struct orch_mcp_client *c; /* NULL once closed */
    char *name;
    TAILQ_HEAD(orch_client_events, orch_client_event) events;
    LIST_HEAD(, orch_client_request) requests;
    LIST_HEAD(, orch_client_challenge) challenges;
    size_t event_bytes, n_challenges;
    uint64_t next_serial;
    unsigned left_out;
    int sign_ref;
    struct orch_timer *timer; /* of the handshake */
    int64_t timeout_ms;
    struct orch_wait opening, taking, closing;
    int opening_ref, taking_ref, closing_ref; /* while a task waits */
    bool settled, over_http;                  /* settled: ready or failed */
    struct orch_err why;                      /* why it failed, or was closed; class 0: neither */
};

static inline struct orch_client_link *orch_client_check(lua_State *L)
{
    return luaL_checkudata(L, 1, ORCH_CLIENT_META);
}

/* The link at 1 lives as long as somebody waits. */
static inline int orch_client_hold(lua_State *L)
{
    lua_pushvalue(L, 1);
    return luaL_ref(L, LUA_REGISTRYINDEX);
}

static inline void orch_client_release(struct orch_client_link *k, int *ref)
{
    luaL_unref(k->main, LUA_REGISTRYINDEX, *ref);
    *ref = LUA_NOREF;
}

/* ---- client_event.c */

/* The functions of o and auth for what comes unasked. */
void orch_client_hear(struct orch_mcp_client_opts *o, struct orch_mcp_auth *auth, bool questions);
/* The progress of a request, for the function at that reference; what it is of only names it. */
void orch_client_progress(struct orch_client_link *k, const void *of, int function_ref, double done,
                          double total, struct orch_slice message);
/* Its function is not called any more. */
void orch_client_disown(struct orch_client_link *k, const void *of);
void orch_client_forget(struct orch_client_link *k); /* everything that came */
void orch_client_wake(struct orch_client_link *k);   /* who waits for what comes, if anybody */
void orch_client_push_json(lua_State *L, struct orch_slice text); /* nil for nothing */
/* The JSON of the value at idx; raises. */
void orch_client_check_json(lua_State *L, int idx, const char *what, struct orch_buf *out);
int orch_client_next(lua_State *L), orch_client_reply(lua_State *L),
    orch_client_refuse(lua_State *L), orch_client_decide(lua_State *L);

/* ---- client_request.c */

int orch_client_request(lua_State *L), orch_client_notify(lua_State *L);
void orch_client_requests_end(struct orch_client_link *k);  /* all are told why */
void orch_client_requests_free(struct orch_client_link *k); /* nobody waits any more */

#endif
