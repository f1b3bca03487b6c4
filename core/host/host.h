/* The host: what one process, or one handle of an embedder, is made of. Its services (services.c)
 * open in order and close in reverse; the rest of the room serves, answers and runs with them. */
#ifndef ORCH_HOST_HOST_H
#define ORCH_HOST_HOST_H

#include "../base/log.h"
#include "../bind/bind.h"
#include "../call/call.h"
#include "../orch.h"
#include "../upstream/upstream.h"
#include "control.h"

#include <pthread.h>

struct serving;

/* Who is served (serve.c). */
struct orch_serving {
    struct serving *list;
    struct orch_upstream *upstream;   /* the server behind the thin proxy */
    char *server_info, *instructions; /* a script's; NULL: orch's own */
    bool ended;                       /* orch_serve_stdio came to its end */
};

/* Tools that an embedder or a script adds to every generation. */
struct orch_own_tools {
    struct orch_tool_source source;
    struct orch_tool *list;
    size_t n;
};

/* An embedder's functions in the handle (api.c): what they may do, and where its log is. */
struct visits {
    pthread_t thread;
    struct orch_log log;
    unsigned depth;
};

/* The trusted state, made at the first script (script.c). */
struct orch_script {
    struct orch_state *state;
    struct orch_task *task; /* that orch_host_run runs */
    char *file;
};

struct orch {
    unsigned n_open; /* services */
    struct visits visits;
    int64_t started_us;
    struct orch_paths paths;
    struct orch_loop *loop;
    struct orch_calls calls;
    struct orch_current current;
    struct orch_env env;
    struct orch_vms *vms;          /* made at the first need, as is http */
    struct orch_http_client *http; /* of scripts and tools */
    struct orch_own_tools tools;
    struct orch_script script;
    struct orch_serving serving;
    struct orch_protect *protects; /* children that are protected from */
    struct orch_control *control;
};

/* ---- services.c */

/* What orch_open does before it loads anything. */
struct orch *orch_host_open(const char *config, const struct orch_options *opts,
                            struct orch_err *err);
void orch_host_close(struct orch *o); /* NULL is fine */

/* ---- host.c */

/* opens the audit log of the generation in force */
int orch_host_audit(struct orch *o, struct orch_err *err);
/* Writes what stdout still holds. Where it could not be written, that is said on stderr, and 0
 * becomes 1: a file that is not whole is no success. A reader that is gone wanted no more. */
int orch_host_flush(int status);
void orch_host_control(struct orch *o); /* opens the control socket */
/* The tool, which is taken, joins every generation from now on. */
void orch_host_keep_tool(struct orch *o, const struct orch_tool *t);

/* ---- script.c */

/* Runs a trusted script as a task; its exit status, or -1 with err. */
int orch_host_run(struct orch *o, const char *name, struct orch_slice text, int argc,
                  const char *const *argv, struct orch_err *err);
/* What a script serves itself, instead of what the configuration's folders hold. */
int orch_script_offer(struct orch *o, const struct orch_serve_opts *so, struct orch_err *err);

/* ---- serve.c; ud is the host */

int orch_serve(void *ud, const struct orch_serve_opts *so, struct orch_err *err);
void orch_serve_stop(void *ud);
void orch_serve_changed(void *ud, unsigned what, struct orch_slice uri);
/* For orch_current_ops and orch_calls. */
void orch_serve_swapped(void *ud, const struct orch_generation *before);
void orch_serve_task_changed(void *ud, struct orch_slice id, struct orch_slice members);

/* ---- status.c: what a running orch answers other commands of its user */

extern const struct orch_control_verb orch_control_verbs[];

/* ---- cli.c: the module "orch.internal" of the commands in lua/cli */

int orch_luaopen_internal(lua_State *L);

/* ---- protect.c: what children cannot change */

/* For orch_proc_opts: the program cannot change what orch reads to judge, run or start. Loads a
 * generation when none is. NULL with err (class ISOLATION, or the configuration's). */
struct orch_proc_via *orch_protect_new(struct orch *o, struct orch_err *err);
/* Whether it works here: starts a program that ends at once, and changes nothing. */
int orch_protect_check(struct orch *o, struct orch_err *err);
/* Whether every such child that runs sees the open file, and cannot write to it. */
bool orch_protect_holds(const struct orch *o, int fd);

#endif
