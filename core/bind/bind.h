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

struct orch_calls;
struct orch_call;
struct orch_current;
struct orch_current_ops;
struct orch_http_client;
struct orch_http_header;
struct orch_loading;
struct orch_proc_via;
struct orch_vm_handle;
struct orch_vms;

struct orch_serve_opts {
    const char *transport;      /* "stdio", "http" */
    const char *listen, *token; /* http; NULL: as configured */
    /* What a script serves in place of the configuration's tools: a list of tool tables and a
     * function (method, params, ctx), both on top of the state's stack at these indices; 0:
     * none. */
    lua_State *L;
    int tools, handle;
    unsigned features;                         /* ORCH_MCP_* that handle answers */
    const char *name, *version, *instructions; /* of the server; NULL: orch's */
    const char *const *command;                /* a server to put behind the policy; NULL: none */
    const char *as;                            /* its name in policy, "cmd" unless given */
    bool protect;                              /* orch's files from it */
    int64_t start_ms, timeout_ms;              /* its time to start, and to answer a call */
    void (*done)(void *ud, int status, const char *why);
    void *ud;
};

/* Every state's host pointer (orch_state_host); ud is given to each function. */
struct orch_env {
    struct orch_loop *loop;
    struct orch_current *current;
    struct orch_calls *calls;
    /* The microVM manager and the HTTP client, each made at the first need; NULL with err. */
    struct orch_vms *(*vms)(void *ud, struct orch_err *err);
    struct orch_http_client *(*http)(void *ud, struct orch_err *err);
    /* For orch_proc_opts: the program cannot change what orch reads to judge, run or start. NULL
     * with err. */
    struct orch_proc_via *(*protect)(void *ud, struct orch_err *err);
    /* orch.mcp.serve: returns at once, done is called from the loop when the session ended. */
    int (*serve)(void *ud, const struct orch_serve_opts *o, struct orch_err *err);
    void (*serve_stop)(void *ud); /* ends it at once; done is not called */
    /* Tells clients: ORCH_MCP_*_CHANGED bits, or a resource's URI (bits 0). */
    void (*changed)(void *ud, unsigned what, struct orch_slice uri);
    /* os.exit of scripts: leaves what must not be lost, then exits. */
    void (*exit)(void *ud, int status);
    void *ud;
    struct orch_vm_handle *vm_handles; /* of scripts; closed by orch_bind_close */
};

struct orch_env *orch_env_of(lua_State *L);

/* A function of the API and the contexts it serves; elsewhere calling it raises. */
struct orch_api {
    const char *name;
    lua_CFunction fn; /* NULL: named, but not available yet */
    int contexts;
};
/* Sets the functions into the table at the top of the stack; prefix ("orch.vm.") is for
 * messages. */
void orch_api_set(lua_State *L, const char *prefix, const struct orch_api *api);
/* The same for one function of scripts that a module in lua/ has. */
void orch_api_lua(lua_State *L, const char *prefix, const char *name, const char *module,
                  const char *function);

/* A metatable with methods, that scripts do not see. */
void orch_class_new(lua_State *L, const char *name, const luaL_Reg *methods, lua_CFunction gc);

/* Opens the global `orch` (and package.loaded.orch in scripts) for the state's context; freezes it
 * in bounded states. */
int orch_luaopen_orch(lua_State *L);
/* For orch_current_ops. */
void orch_bind_open(lua_State *L);
int orch_bind_open_tools(struct orch_loading *l, struct orch_state *s);
/* Ends the microVMs of scripts. */
void orch_bind_close(struct orch_env *env);
/* The image of microVMs that name none: the configured one, else debian when it is built, else
 * base. */
const char *orch_bind_image(const struct orch_current *cur);

int orch_luaopen_sys(lua_State *L, int orch_table);      /* now, log, version, env, process, fs */
int orch_luaopen_vm(lua_State *L, int orch_table);       /* vm, image */
int orch_luaopen_mcp(lua_State *L, int orch_table);      /* mcp */
int orch_luaopen_firewall(lua_State *L, int orch_table); /* firewall */
int orch_luaopen_transport(lua_State *L);      /* the module "orch.transport" of scripts */
int orch_luaopen_call_transport(lua_State *L); /* what lua/http.lua needs of it in tool states */
int orch_luaopen_crypto(lua_State *L);         /* the module "orch.crypto" of scripts */
int orch_luaopen_client(lua_State *L);         /* the module "orch.client" of scripts */
int orch_luaopen_ctx(lua_State *L); /* the metatable of ctx, in tool states and scripts */
/* A method of ctx that is Lua's: what `load` (a C function without arguments, at the top of the
 * stack, popped) returns, called when it is first used. */
void orch_ctx_set_lazy(lua_State *L, const char *name);
struct orch_call *orch_ctx_call(lua_State *L); /* of the ctx at 1; raises */
int orch_ctx_elicit(lua_State *L), orch_ctx_sample(lua_State *L), orch_ctx_roots(lua_State *L),
    orch_ctx_ask(lua_State *L);
/* The option `headers`, as userdata left on the stack with the table; NULL: there is none.
 * Raises. */
struct orch_http_header *orch_take_headers(lua_State *L, struct orch_opts *o, size_t *n);

/* Spawns with the option table at idx and waits: returns a wait for the vm object. call: NULL in
 * scripts. */
int orch_vm_spawn_wait(lua_State *L, int idx, struct orch_call *call);

#endif
