/* The host: what one orch process (or one embedder's handle) is made of. Private to core/. */
#ifndef ORCH_HOST_H
#define ORCH_HOST_H

#include "base/hash.h"
#include "base/log.h"
#include "bind/bind.h"
#include "script/jsonlib.h"
#include "script/regex.h"
#include "http/client.h"
#include "mcp/client.h"
#include "mcp/headers.h"
#include "mcp/session.h"
#include "mcp/stdio.h"
#include "orch.h"
#include "base/dirwatch.h"
#include "store/audit.h"
#include "net/ruleset.h"
#include "store/db.h"
#include "vm/vm.h"

/* ---- where things are */

enum orch_config_origin { ORCH_CONFIG_OPTION, ORCH_CONFIG_ENV, ORCH_CONFIG_CWD, ORCH_CONFIG_XDG, ORCH_CONFIG_ETC, ORCH_CONFIG_BUILTIN };

struct orch_paths {
    char *share;    /* …/share/orch, or the build tree: lua/, policies/, orchestrator.lua */
    char *launcher, *agent;
    char *state, *cache, *runtime;
    char *cwd, *home;
    char *config; /* absolute, without links */
    char *named;  /* the same as it was named or found */
    char *user_config; /* $XDG_CONFIG_HOME/orch */
    enum orch_config_origin origin;
};

#define ORCH_SYSTEM_CONFIG "/etc/orch"
/* Folders beside the configuration that are read when they are there; ended by NULL. */
extern const char *const orch_beside[];

/* config_option: --config or NULL. Fails with class CONFIG when the named file does not exist. */
int orch_paths_find(struct orch_paths *p, const char *config_option, struct orch_err *err);
void orch_paths_fini(struct orch_paths *p);
/* A descriptor of a folder of the configuration, held from its first use on, so that nobody puts another in its place;
 * borrowed, or a negative errno. */
int orch_hold_dir(struct orch *o, const char *path);

/* ---- one generation: configuration, policies and tools as one immutable set */

struct orch_config {
    char *policies, *workspace, *audit_dir;
    char **tools; /* directories, NULL-terminated */
    char *vm_backend, *vm_accel, *vm_image; /* image: NULL when none is named */
    uint64_t vm_memory_bytes;
    int vm_vcpus, vm_max;
    int64_t vm_timeout_ms;
    size_t message_bytes, policy_memory_bytes, tool_memory_bytes;
    unsigned depth, calls;
    int64_t policy_time_ms, tool_cpu_ms;
    enum orch_audit_sync audit_sync;
    struct orch_cidr *permit; /* net.permit_private */
    size_t n_permit;
    char *http_listen, *http_token;
    bool trust_always;
};

struct orch_tool {
    struct orch_state *state; /* where run_ref and output_ref are */
    char *name;      /* qualified */
    char *wire_name; /* as clients see it */
    char *server;    /* "local" or the upstream's name */
    char *file;      /* where it was defined; NULL for an upstream's */
    char *definition; /* MCP tool object as JSON */
    char *input;      /* its JSON Schema */
    struct orch_mcp_param_list headers; /* x-mcp-header in it */
    bool listed, shipped;
    enum { ORCH_TOOL_NO_TASK, ORCH_TOOL_TASK, ORCH_TOOL_TASK_ONLY } task; /* a task where the client can; only so */
    int name_ref;            /* policy state: the name, interned */
    int run_ref, output_ref; /* tool state */
    int64_t timeout_ms; /* 0: the configuration's vm.timeout */
    char *limit;        /* what sets it, for people; NULL: the tool's own */
    orch_tool_fn *fn; /* a tool written in C, by an embedder */
    void *fn_ud;
};

struct orch_trust_list {
    struct orch_trust_file *files;
    size_t n;
};

struct orch_generation {
    struct orch *host;
    unsigned refs;
    char hash[65];
    struct orch_config cfg;
    struct orch_state *policy, *tools_state;
    int judge_ref, engine_ref;
    int handle_ref;    /* tool state: answers resources and prompts of the configuration's folders */
    unsigned features; /* ORCH_MCP_* of those */
    uint8_t offer_digest[ORCH_SHA256_BYTES]; /* of their files */
    struct orch_tool **tools; /* sorted by wire name */
    size_t n_tools;
    struct orch_buf list; /* the JSON array of tools/list */
    struct orch_regex **redact;
    char **redact_text;
    size_t n_redact;
    struct orch_buf audit_field; /* ,"generation":"…" */
    struct orch_buf notes;       /* warnings, a line each */
    char *config_show;           /* JSON for config show */
    struct orch_trust_list sources; /* configuration, policies and tools as they were read */
    char *linked;                /* one of them that has another name too, and is not trusted by its content; NULL: none */
};

/* ANY: whether it is trusted or not, for orch trust. */
enum orch_trust_mode { ORCH_TRUST_CHECK, ORCH_TRUST_ANY };

/* Reads, checks and tests everything; NULL with all errors, a line each, in errors (class in cls). */
struct orch_generation *orch_generation_load(struct orch *o, enum orch_trust_mode mode, struct orch_buf *errors, enum orch_class *cls);
/* What is recorded of the folder in which the configuration was found, which is where a link to it lies (loading.c): files, and whether later edits are accepted (edits) and whether its configuration
 * is held to the record wherever it lies (always). 1 found, 0 nothing is, or a negative errno. */
struct orch_trust {
    struct orch_trust_list list;
    bool edits, always;
};
char *orch_trust_dir(const struct orch *o);
int orch_trust_read(struct orch *o, struct orch_trust *t, struct orch_err *err);
int orch_trust_record(struct orch *o, const struct orch_trust *t, struct orch_err *err);
void orch_trust_fini(struct orch_trust *t);
struct orch_generation *orch_generation_ref(struct orch_generation *g);
void orch_generation_unref(struct orch_generation *g);
struct orch_tool *orch_generation_tool(const struct orch_generation *g, struct orch_slice wire_name);
void orch_tool_fini(struct orch_tool *t); /* frees its strings */
/* Adds an embedder's or an upstream's tool (copied) and rebuilds the list. untrusted: JSON of what an
 * upstream says of it. */
int orch_generation_add_tool(struct orch_generation *g, const struct orch_tool *t, struct orch_slice untrusted, struct orch_err *err);
void orch_generation_list(struct orch_generation *g);
/* The packet filter of a network policy of policies/network.lua; NULL with err (class CONFIG: no such
 * policy). core/network.c. */
struct orch_rules *orch_generation_rules(struct orch_generation *g, const char *network, struct orch_err *err);
/* Its text, a rule a line, for policy show. */
int orch_generation_rules_text(struct orch_generation *g, const char *network, struct orch_buf *out, struct orch_err *err);
/* Whether a new flow to this address (host byte order) would pass, and the rule that decides. */
int orch_generation_explain_packet(struct orch_generation *g, const char *network, uint32_t addr, uint8_t proto, uint16_t port, bool *allowed,
                                   char *rule, size_t n, struct orch_err *err);
/* For env: permit and host of a policy. */
int orch_fill_policy(struct orch *o, struct orch_policy *p, struct orch_err *err);
int orch_luaopen_network_deps(lua_State *L, struct orch_generation *g); /* cidr, ports, bandwidth into the deps table at the top */
/* What predicates saw of a session that ended. */
void orch_generation_forget_session(struct orch_generation *g, const char *id);
/* engine.explain and engine.show as JSON. */
int orch_generation_explain(struct orch_generation *g, const char *tool, struct orch_slice args, struct orch_buf *out, struct orch_err *err);
int orch_generation_show(struct orch_generation *g, struct orch_buf *out, struct orch_err *err);

/* ---- sessions and calls */

struct orch_session {
    struct orch_session *next;
    unsigned refs; /* its owner's and its calls' */
    struct orch *host;
    struct orch_mcp_session *mcp; /* NULL for a call from the embedder */
    char id[40];
    char *caller;
    char **marks;
    size_t n_marks;
    struct orch_buf audit_fields; /* "session":"…","caller":"…" */
};

struct orch_session *orch_session_new(struct orch *o, const char *caller);
void orch_session_unref(struct orch_session *s);

/* The answer of a call that did not come from MCP. members: of the MCP result. */
typedef void orch_call_done_fn(void *ud, struct orch_slice members, bool is_error);

void orch_call_from_mcp(struct orch_session *s, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                        const struct orch_mcp_params *p);
/* A request beyond tools, answered by what a script serves. */
void orch_feature_call(struct orch_session *s, struct orch_mcp_request *rq, const struct orch_json_doc *d, const char *method,
                       const struct orch_mcp_params *p);
/* tasks/get, tasks/update, tasks/cancel. */
void orch_job_request(struct orch_session *s, struct orch_mcp_request *rq, const struct orch_json_doc *d, const char *method,
                      const struct orch_mcp_params *p);
/* The same request again, with requestState: resumes the parked call. */
void orch_call_resume(struct orch_session *s, struct orch_mcp_request *rq, const char *method, const struct orch_json_doc *d,
                      const struct orch_mcp_params *p);
void orch_call_from_host(struct orch_session *s, struct orch_slice name, const struct orch_json_doc *d, uint32_t args,
                         orch_call_done_fn *done, void *ud);
void orch_call_cancel_mcp(struct orch_mcp_request *rq);
/* Writes the decisions of all calls begun since the last time, runs them, writes the outcomes of those
 * that ended, answers. Called when all input at hand was read, or from a posted turn. */
void orch_calls_run(struct orch *o);
/* The same in the next turn. */
void orch_calls_want(struct orch *o);
/* Cancels every call of the session; each still writes its outcome. */
void orch_calls_cancel(struct orch *o, struct orch_session *s, const char *why);
/* Its MCP session goes away: the call ends without an answer. */
void orch_call_detach_mcp(struct orch_mcp_request *rq);
/* Ends the calls of s (NULL: all) that are parked for their client's answer. */
void orch_asking_stop(struct orch *o, const struct orch_session *s);
void orch_calls_free(struct orch *o); /* what is kept for later calls, and rates */
extern const struct orch_env_call_ops orch_call_ops;

/* Appends the JSON value at tok with every match of the patterns in its strings replaced. The bytes stay
 * as they came where nothing matched. Negative when a pattern's match limit or the time for
 * the whole was hit: withhold it. */
int orch_redact_json(const struct orch_generation *g, const uint16_t *patterns, size_t n, const struct orch_json_doc *d, uint32_t tok,
                     struct orch_buf *out);
/* The same in one text, in place: 1 when something matched, 0, or negative as above. */
int orch_redact_text(const struct orch_generation *g, const uint16_t *patterns, size_t n, struct orch_buf *text);

/* Whether calls to this tool's rule and caller are still within limit per window. */
bool orch_rate_take(struct orch *o, const char *key, double limit, int64_t window_ms);
void orch_rates_free(struct orch *o);

struct orch_toolcall;

/* What a script serves (orch.mcp.serve with tools, resources, prompts): served instead of what the
 * configuration's folders hold, judged by the same policy. Its functions live in the script's state. */
struct orch_offer {
    bool on;
    unsigned features; /* ORCH_MCP_* */
    int handle_ref;    /* function (method, params, ctx) */
    char *server_info, *instructions;
};

/* Calls that wait for their modern client's answer (core/asking.c). */
struct orch_parked {
    struct orch_toolcall *first, *last;
    struct orch_toolcall *asking; /* will be parked at the end of this turn */
    size_t n;
    struct orch_timer *timer;
    struct orch_hmac_key key;
    bool keyed;
};

struct orch {
    struct orch_env env;
    struct orch_loop *loop;
    struct orch_paths paths;
    char *kernel, *modules;          /* --kernel, --modules */
    char *script_file;               /* of the script that runs */
    struct orch_held *held;          /* orch_hold_dir */
    struct orch_protect *protects;   /* children that are protected from */
    struct orch_generation *gen;     /* in force */
    struct orch_state *script;       /* trusted state, made at the first script */
    struct orch_audit *audit;
    struct orch_vms *vms;
    struct orch_http_client *http; /* of scripts */
    struct orch_dirwatch *reload;
    struct orch_buf watched;         /* the folders it watches, each ended by NUL */
    struct orch_buf reload_error;    /* of the last failed reload; empty when the last one went well */
    uint64_t reloads;
    struct orch_session *sessions;
    struct orch_toolcall *begun, *ended, *running, *spare;
    struct orch_toolcall **slots;
    size_t n_slots;
    uint64_t next_call;
    char call_prefix[16];
    bool run_posted, in_run;
    struct orch_tool *c_tools; /* embedder's */
    size_t n_c_tools;
    struct orch_rate *rates;
    struct orch_cidr *host_addresses; /* as orch_fill_policy read them last */
    struct orch_parked parked;
    struct orch_job *jobs;
    bool jobs_swept;
    struct orch_offer offer;
    struct orch_upstream *upstream; /* the server behind the thin proxy */
    struct orch_control *control;
    int64_t started_us;
    struct serving *serving;
    bool served;             /* orch_serve_stdio came to its end */
    struct orch_task *main;  /* the script that orch_host_run runs */
};

/* What orch_open does before it loads anything. */
struct orch *orch_host_open(const char *config, const struct orch_options *opts, struct orch_err *err);
int orch_host_generation(struct orch *o, struct orch_err *err); /* loads the first one */
/* Runs a trusted script as a task; its exit status, or -1 with err. */
int orch_host_run(struct orch *o, const char *name, struct orch_slice text, int argc, const char *const *argv, struct orch_err *err);

/* The image of microVMs that name none: the configured one, else debian when it is built, else base. */
const char *orch_host_image(struct orch *o);
int orch_host_audit(struct orch *o, struct orch_err *err); /* opens the audit log of the generation in force */
/* Loads anew and swaps; on failure the old generation stays. 0 or the errors' class as a negative number. */
int orch_host_reload(struct orch *o, const char *why);
void orch_host_watch(struct orch *o); /* the files of the generation in force, for reload */
void orch_host_control(struct orch *o); /* opens the control socket */
void orch_host_event(struct orch *o, const char *event, struct orch_slice fields); /* into the audit log */

/* ---- serving MCP (core/serve.c); ud is the host */
int orch_serve(void *ud, const struct orch_serve_opts *so, struct orch_err *err);
void orch_serve_stop(void *ud);
void orch_serve_changed(void *ud, unsigned what, struct orch_slice uri);
/* Another generation is in force: what is offered may have changed. */
void orch_serve_reloaded(struct orch *o, const struct orch_generation *before);
void orch_serve_task_changed(struct orch *o, struct orch_slice id, struct orch_slice members);
/* Adds the tools in the list at idx (as tool files return them) to every generation. */
int orch_script_tools(struct orch *o, lua_State *L, int idx, struct orch_err *err);

/* What the commands in lua/cli need beyond the public API, "orch.internal": see core/internal.c. */
int orch_luaopen_internal(lua_State *L);

/* The control socket of this process (PID.sock) and requests to those of others. */
struct orch_control *orch_control_new(struct orch *o, struct orch_err *err);
void orch_control_free(struct orch_control *c);
/* Sends one request to each running orch process of this user (or to pid); answers as a JSON array of
 * {"pid":…,"answer":…} or {"pid":…,"error":…}. Waits at most 3 s for each. */
void orch_control_ask(struct orch *o, int pid, struct orch_slice request, struct orch_buf *out);

/* ---- what children cannot change (core/protect.c) */

/* For orch_proc_opts: the program cannot change what orch reads to judge, run or start. Loads a generation when none is.
 * NULL with err (class ISOLATION, or the configuration's). */
struct orch_proc_via *orch_protect_new(struct orch *o, struct orch_err *err);
/* Whether it works here: starts a program that ends at once, and changes nothing. */
int orch_protect_check(struct orch *o, struct orch_err *err);
/* Whether every such child that runs sees the open file, and cannot write to it. */
bool orch_protect_holds(const struct orch *o, int fd);

/* ---- the thin proxy: one server behind the policy (core/upstream.c) */
struct orch_upstream_opts {
    const char *name;            /* in policy */
    const char *const *command;
    int64_t start_ms;            /* from the start until its tools are known; also for each later list */
    int64_t timeout_ms;          /* of a call, anew from each progress notification */
    bool protect;                /* orch's own files are read-only to it */
    void (*on_settled)(void *ud); /* once, from the loop: its tools are known, or it failed (orch_upstream_ready) */
    void *ud;
};
/* NULL with err: orch's files cannot be protected from it. */
struct orch_upstream *orch_upstream_start(struct orch *o, const struct orch_upstream_opts *uo, struct orch_err *err);
/* Ends it, in its own time (orch_proc_end) unless in a hurry. */
void orch_upstream_free(struct orch_upstream *u, bool hurry);
/* Appends what a start is at, for people: "starting npx: the last line of its stderr". */
void orch_upstream_doing(const struct orch_upstream *u, struct orch_buf *out);
/* Adds its tools to a generation, none before it is ready. */
int orch_upstream_add_tools(struct orch_upstream *u, struct orch_generation *g, struct orch_err *err);
bool orch_upstream_ready(const struct orch_upstream *u);
const char *orch_upstream_problem(const struct orch_upstream *u); /* why it is not ready */
struct orch_mcp_client *orch_upstream_client(struct orch_upstream *u);
const char *orch_upstream_name(const struct orch_upstream *u);

#endif
