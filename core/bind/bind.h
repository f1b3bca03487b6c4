/* Shared helpers of the Lua modules, and what they may reach of the host. A binder checks arguments
 * and converts; the comfortable API is Lua's business. A caller's mistake raises;
 * a failure of the world returns nil, message, code (script/args.h). */
#ifndef ORCH_BIND_BIND_H
#define ORCH_BIND_BIND_H

#include "../base/loop.h"
#include "../script/args.h"
#include "../script/state.h"
#include "../script/task.h"
#include <lauxlib.h>

struct sockaddr;
struct orch_proc_via;
struct orch_policy;
struct orch_vm;
struct orch_vms;
struct orch_vm_opts;
struct orch_rules;
struct orch_vm_handle;
struct orch_toolcall;

struct orch_task;
struct orch_ask;
struct orch_http_client;
struct orch_http_header;
struct orch_http_stream;

/* One question to a call's client, and its answer. */
struct orch_ask_item {
    struct orch_ask *ask;
    char *key;            /* owned, as are the buffers */
    const char *method;   /* elicitation/create, sampling/createMessage, roots/list */
    unsigned needs;       /* ORCH_MCP_CAP_* */
    uint64_t question;    /* of a legacy client; 0: none is under way */
    struct orch_buf params, answer, error;
    bool answered;
    enum orch_class failed; /* answer is empty, error says why; 0: it did not fail */
};
bool orch_asking_done(const struct orch_ask *a);
const struct orch_ask_item *orch_asking_items(const struct orch_ask *a, size_t *n);

/* What a call has of time. limit: what sets the whole of it, for people ("vm.timeout"). */
struct orch_call_time {
    int64_t left_ms, whole_ms; /* left: negative when it is over, and the call has a moment to answer */
    const char *limit;
};

/* One tool call as its ctx sees it. A ctx that outlives its call finds NULL. */
struct orch_env_call_ops {
    struct orch_toolcall *(*get)(void *ud, uint32_t slot, uint32_t serial);
    void (*progress)(struct orch_toolcall *c, double done, double total, struct orch_slice message);
    void (*log)(struct orch_toolcall *c, const char *level, struct orch_slice message);
    bool (*cancelled)(const struct orch_toolcall *c);
    const char *(*id)(const struct orch_toolcall *c);
    const char *(*session)(const struct orch_toolcall *c);
    const char *(*workspace)(const struct orch_toolcall *c);
    const char *(*network)(const struct orch_toolcall *c); /* as the deciding rules say; "none" */
    struct orch_http_stream **(*streams)(struct orch_toolcall *c); /* the call's list */
    /* Whether a request of the call's tool may connect there; false with err (class DENIED), and the audit log
     * says so. */
    bool (*may_connect)(struct orch_toolcall *c, const struct sockaddr *to, struct orch_err *err);
    struct orch_call_time (*time)(const struct orch_toolcall *c);
    /* Its time stands still, on, while it waits for what has a time of its own; each on is matched by an off. */
    void (*hold)(struct orch_toolcall *c, bool on);
    struct orch_vm_handle **(*vms)(struct orch_toolcall *c); /* the call's list */
    void (*ran)(struct orch_toolcall *c, const struct orch_vm *vm); /* its isolation goes into answer and audit */
    /* From here on a task of the tasks extension. code ENOTSUP: the client has none. */
    int (*task)(struct orch_toolcall *c, struct orch_err *err);
    void (*release)(struct orch_toolcall *c, int64_t retry_ms);
    unsigned (*caps)(const struct orch_toolcall *c); /* ORCH_MCP_CAP_* of the client */
    bool (*modern)(const struct orch_toolcall *c);   /* its client is of the modern era */
    unsigned (*next_key)(struct orch_toolcall *c);   /* 1, 2, …: names of questions */
    /* Asks the client all of it; takes items (an array made by malloc). done is called once, unless all is
     * answered when this returns (orch_asking_done) or ask_free comes first. NULL with err; code ENOTSUP:
     * the client does not declare what is needed. */
    struct orch_ask *(*ask)(struct orch_toolcall *c, struct orch_ask_item *items, size_t n, void (*done)(void *ud), void *ud,
                            struct orch_err *err);
    void (*ask_free)(struct orch_ask *a);
};

struct orch_serve_opts {
    const char *transport;      /* "stdio", "http" */
    const char *listen, *token; /* http; NULL: as configured */
    /* What a script serves in place of the configuration's tools: a list of tool tables and a function
     * (method, params, ctx), both on top of the state's stack at these indices; 0: none. */
    lua_State *L;
    int tools, handle;
    unsigned features;          /* ORCH_MCP_* that handle answers */
    const char *name, *version, *instructions; /* of the server; NULL: orch's */
    const char *const *command; /* a server to put behind the policy; NULL: none */
    const char *as;             /* its name in policy, "cmd" unless given */
    bool protect;               /* orch's files from it */
    int64_t start_ms, timeout_ms; /* its time to start, and to answer a call */
    void (*done)(void *ud, int status, const char *why);
    void *ud;
};

/* Every state's host pointer (orch_state_host). Filled by core/host.c. */
struct orch_env {
    struct orch_loop *loop;
    /* The microVM manager, made at the first need; NULL with err. */
    struct orch_vms *(*vms)(void *ud, struct orch_err *err);
    /* The HTTP client, made at the first need; NULL with err. */
    struct orch_http_client *(*http)(void *ud, struct orch_err *err);
    /* Lowers and fills what the configuration bounds (image, accel, memory, vcpus, a timeout of -1). */
    int (*vm_defaults)(void *ud, struct orch_vm_opts *o, struct orch_err *err);
    /* A network policy's filter, for orch_vm_opts. Class CONFIG when there is no such policy. */
    int (*rules)(void *ud, const char *name, struct orch_rules **out, struct orch_err *err);
    /* Fills permit and host: what the configuration permits, and the host's addresses as they are now.
     * What it points to is the host's, good until the next call. */
    int (*fill_policy)(void *ud, struct orch_policy *p, struct orch_err *err);
    /* For orch_proc_opts: the program cannot change what orch reads to judge, run or start. NULL with err. */
    struct orch_proc_via *(*protect)(void *ud, struct orch_err *err);
    /* orch.mcp.serve: returns at once, done is called from the loop when the session ended. */
    int (*serve)(void *ud, const struct orch_serve_opts *o, struct orch_err *err);
    void (*serve_stop)(void *ud); /* ends it at once; done is not called */
    /* Tells clients: ORCH_MCP_*_CHANGED bits, or a resource's URI (bits 0). */
    void (*changed)(void *ud, unsigned what, struct orch_slice uri);
    /* os.exit of scripts: leaves what must not be lost, then exits. */
    void (*exit)(void *ud, int status);
    const struct orch_env_call_ops *call;
    struct orch_vm_handle *vm_handles; /* of scripts; closed with the host */
    void *ud;
};

struct orch_env *orch_env_of(lua_State *L);

/* A function of the API and the contexts it serves; elsewhere calling it raises. */
struct orch_api {
    const char *name;
    lua_CFunction fn; /* NULL: named, but not available yet */
    int contexts;
};
/* Sets the functions into the table at the top of the stack; prefix ("orch.vm.") is for messages. */
void orch_api_set(lua_State *L, const char *prefix, const struct orch_api *api);
/* The same for one function of scripts that a module in lua/ has. */
void orch_api_lua(lua_State *L, const char *prefix, const char *name, const char *module, const char *function);

/* A metatable with methods, that scripts do not see. */
void orch_class_new(lua_State *L, const char *name, const luaL_Reg *methods, lua_CFunction gc);

/* Opens the global `orch` (and package.loaded.orch in scripts) for the state's context; freezes it in
 * bounded states. */
int orch_luaopen_orch(lua_State *L);

/* The ctx of a tool call. */
void orch_push_ctx(lua_State *L, uint32_t slot, uint32_t serial);

int orch_luaopen_sys(lua_State *L, int orch_table); /* now, log, version, env, process, fs */
int orch_luaopen_vm(lua_State *L, int orch_table);  /* vm, image */
int orch_luaopen_mcp(lua_State *L, int orch_table); /* mcp */
int orch_luaopen_transport(lua_State *L);           /* the module "orch.transport" of scripts */
int orch_luaopen_call_transport(lua_State *L);      /* what lua/http.lua needs of it in tool states */
int orch_luaopen_client(lua_State *L);              /* the module "orch.client" of scripts */
int orch_luaopen_ctx(lua_State *L);                 /* the metatable of ctx, in tool states and scripts */
void orch_ctx_set(lua_State *L, const char *name);  /* a method that is Lua's, from the top of the stack (popped) */
struct orch_toolcall *orch_check_call(lua_State *L); /* of the ctx at 1; raises */
int orch_ctx_elicit(lua_State *L), orch_ctx_sample(lua_State *L), orch_ctx_roots(lua_State *L), orch_ctx_ask(lua_State *L);

/* The option `headers`, as userdata left on the stack with the table; NULL: there is none. Raises. */
struct orch_http_header *orch_take_headers(lua_State *L, struct orch_opts *o, size_t *n);

/* The HTTP requests of a tool's call end with it. */
void orch_http_streams_close(struct orch_http_stream **list);

/* A microVM as Lua holds it, from the wish on in its owner's list (a call's, or the host's for scripts). It
 * outlives neither the owner nor close(); the object then answers with why. */
void orch_vm_handles_close(struct orch_vm_handle **list, const char *why);
/* Ends those that have one, as if by itself: their objects get this error. */
void orch_vm_handles_end(struct orch_vm_handle *list, const struct orch_err *why);
/* Spawns with the option table at idx and waits: returns a wait for the vm object. call: NULL in scripts. */
int orch_vm_spawn_wait(lua_State *L, int idx, struct orch_toolcall *call);

#endif
