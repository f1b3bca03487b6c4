/* One generation: the configuration, the policies and the tools of a moment, each in Lua states of
 * their own, checked and tested as one immutable set before it is used. current.h says which is in
 * force.
 *
 * A generation is referenced by the calls that began on it, and freed with the last of them. */
#ifndef ORCH_POLICY_POLICY_H
#define ORCH_POLICY_POLICY_H

#include "../base/hash.h"
#include "../base/json.h"
#include "../mcp/headers.h"
#include "../net/ruleset.h"
#include "../script/state.h"
#include "../store/audit.h"
#include "../store/db.h"
#include "paths.h"

struct orch_call;
struct orch_current;
struct orch_generation;
struct orch_hostaddr;
struct orch_regex;

/* ---- the configuration */

struct orch_config {
    char *policies, *workspace, *audit_dir;
    char **tools;                           /* directories, NULL-terminated */
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

/* ---- tools */

/* How a tool's calls are carried out. */
struct orch_tool_backend {
    /* the call's arguments are wanted as a Lua value of the tool's state, not as bytes */
    bool lua_args;
    const char *unfinished; /* what to say of one whose time is over: "no answer" */
    /* The call was judged, recorded and may run: it ends by orch_call_end, at once or later. */
    void (*start)(struct orch_call *c);
    /* It shall end before it is done: cancelled, or its time is over (cls). true: it ends by itself
     * soon; false: nothing of it runs any more, and the caller ends it. */
    bool (*stop)(struct orch_call *c, enum orch_class cls, const char *why);
};

struct orch_tool {
    struct orch_tool *replaced; /* the next of a generation's replaced ones */
    struct orch_state *state;   /* where run_ref and output_ref are; NULL: it is not Lua's */
    char *name;                 /* qualified */
    char *wire_name;            /* as clients see it */
    char *server;               /* "local" or the upstream's name */
    char *file;                 /* where it was defined; NULL for an upstream's */
    char *definition;           /* MCP tool object as JSON */
    char *input;                /* its JSON Schema */
    struct orch_mcp_param_list headers; /* x-mcp-header in it */
    bool listed, shipped;
    enum {
        ORCH_TOOL_NO_TASK,
        ORCH_TOOL_TASK,
        ORCH_TOOL_TASK_ONLY
    } task;                  /* where the client can; only so */
    int name_ref;            /* policy state: the name, interned */
    int run_ref, output_ref; /* tool state */
    int64_t timeout_ms;      /* 0: the configuration's vm.timeout */
    char *limit;             /* what sets it, for people; NULL: the tool's own */
    const struct orch_tool_backend *backend;
    void *backend_ud; /* the backend's own, as is backend_fn */
    void (*backend_fn)(void);
};

/* Who gives tools to every generation: an embedder, a script, an upstream. */
struct orch_tool_source {
    struct orch_tool_source *next;
    bool alone; /* there are no tools but these, and no resources or prompts of the folders */
    int (*add)(void *ud, struct orch_generation *g,
               struct orch_err *err); /* by orch_generation_add_tool */
    void *ud;
};

void orch_tool_fini(struct orch_tool *t); /* frees its strings */
/* The tools in the list at idx of L, written as tool files return them, whose functions stay in s.
 * Each is the caller's. where: what messages call the list. */
int orch_tools_read(struct orch_current *cur, struct orch_state *s, lua_State *L, int idx,
                    const char *where, void (*each)(void *ud, struct orch_tool *t), void *ud,
                    struct orch_err *err);

/* ---- the generation */

struct orch_network; /* a policy of policies/network.lua, read and checked */

struct orch_trust_list {
    struct orch_trust_file *files;
    size_t n;
};

struct orch_generation {
    unsigned refs;
    char hash[65];
    struct orch_config cfg;
    struct orch_state *policy, *tools_state;
    int judge_ref, engine_ref;
    int handle_ref; /* tool state: answers resources and prompts of the configuration's folders */
    unsigned features;                       /* ORCH_MCP_* of those */
    uint8_t offer_digest[ORCH_SHA256_BYTES]; /* of their files */
    bool alone;                              /* it has a source's tools alone */
    struct orch_tool **tools;                /* sorted by wire name */
    size_t n_tools;
    struct orch_tool *replaced; /* by another of the name: calls may still have them */
    struct orch_buf list;       /* the JSON array of tools/list */
    struct orch_network *networks;
    size_t n_networks;
    struct orch_hostaddr *hostaddr; /* the current's */
    struct orch_regex **redact;
    char **redact_text;
    size_t n_redact;
    struct orch_buf audit_field;    /* ,"generation":"…" */
    struct orch_buf notes;          /* warnings, a line each */
    char *config_show;              /* JSON for config show */
    struct orch_trust_list sources; /* configuration, policies and tools as they were read */
    char *linked; /* one of them that has another name too, not trusted by its content; NULL */
};

/* ANY: whether it is trusted or not, for orch trust. */
enum orch_trust_mode { ORCH_TRUST_CHECK, ORCH_TRUST_ANY };

/* Reads, checks and tests everything; NULL with all errors, a line each, in errors (class in
 * cls). */
struct orch_generation *orch_generation_load(struct orch_current *cur, enum orch_trust_mode mode,
                                             struct orch_buf *errors, enum orch_class *cls);
struct orch_generation *orch_generation_ref(struct orch_generation *g);
void orch_generation_unref(struct orch_generation *g);

struct orch_tool *orch_generation_tool(const struct orch_generation *g,
                                       struct orch_slice wire_name);
/* Adds a tool (copied). untrusted: JSON of what an upstream says of it, or empty. */
int orch_generation_add_tool(struct orch_generation *g, const struct orch_tool *t,
                             struct orch_slice untrusted, struct orch_err *err);
void orch_generation_list(struct orch_generation *g); /* makes g->list anew */

/* ---- judging */

enum { ORCH_ALLOW = 1, ORCH_ASK, ORCH_DENY }; /* as lua/policy/engine.lua returns them */

struct orch_judgement {
    int verdict;                /* 0: the arguments are wrong, reason says how */
    const char *reason, *rules; /* rules: a JSON array of file:line; good until fini */
    char *network;              /* NULL: none */
    uint16_t *redact;           /* indices of the generation's patterns */
    size_t n_redact;
    char **marks; /* NULL-terminated, or NULL */
    /* What is called in place of the arguments that came, rewritten or without nulls that stand for
     * absent members: "[" JSON "]", so that the object is token 1 of doc; empty: as they came. */
    struct orch_buf args;
    struct orch_json_doc doc;
    struct orch_generation *g;
};

/* Negative with err: a predicate's time was over and the like; deny. args: token of an object, 0:
 * none. */
int orch_generation_judge(struct orch_generation *g, const struct orch_tool *tool,
                          const char *session, const char *caller, const struct orch_json_doc *d,
                          uint32_t args, struct orch_judgement *j, struct orch_err *err);
void orch_judgement_fini(struct orch_judgement *j);
/* What predicates saw of a session that ended. */
void orch_generation_forget_session(struct orch_generation *g, const char *id);
/* As JSON, for policy explain and show. */
int orch_generation_explain(struct orch_generation *g, const char *tool, struct orch_slice args,
                            struct orch_buf *out, struct orch_err *err);
int orch_generation_show(struct orch_generation *g, struct orch_buf *out, struct orch_err *err);

/* Appends the JSON value at tok with every match of the patterns in its strings replaced. The bytes
 * stay as they came where nothing matched. Negative when a pattern's match limit or the time for
 * the whole was hit: withhold it. */
int orch_redact_json(const struct orch_generation *g, const uint16_t *patterns, size_t n,
                     const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out);
/* The same in one text, in place: 1 when something matched, 0, or negative as above. */
int orch_redact_text(const struct orch_generation *g, const uint16_t *patterns, size_t n,
                     struct orch_buf *text);

/* ---- networks */

/* The packet filter of a policy of policies/network.lua; NULL with err (class CONFIG: no such
 * policy). */
struct orch_rules *orch_generation_rules(const struct orch_generation *g, const char *network,
                                         struct orch_err *err);
/* Its text, a rule a line, for policy show. */
int orch_generation_rules_text(const struct orch_generation *g, const char *network,
                               struct orch_buf *out, struct orch_err *err);
/* Whether a new flow to this address (host byte order) would pass, and the rule that decides. */
int orch_generation_explain_packet(const struct orch_generation *g, const char *network,
                                   uint32_t addr, uint8_t proto, uint16_t port, bool *allowed,
                                   char *rule, size_t n, struct orch_err *err);
/* permit and host of a policy: what the configuration permits, and the host's addresses, borrowed
 * until the next turn of the loop. */
int orch_generation_fill_policy(const struct orch_generation *g, struct orch_policy *p,
                                struct orch_err *err);

/* A policy with what it points to. */
struct orch_policy_box {
    struct orch_policy p;
    struct orch_allow *allow;
    struct orch_ports *ports;
};
void orch_policy_box_fini(struct orch_policy_box *b);
/* Reads { allow = { { cidr =, ports = { 443, "8000-8010" }, proto = "tcp" | "udp" }… }, connections
 * =, bandwidth = "10mbit" } at idx. permit and host stay empty. -EINVAL, class CONFIG: entry and
 * reason. Reads raw: no metamethod runs. */
int orch_policy_box_read(lua_State *L, int idx, struct orch_policy_box *b, struct orch_err *err);

/* ---- trust: what a person has accepted of a folder's files */

struct orch_trust {
    struct orch_trust_list list;
    bool edits;  /* later edits are accepted too */
    bool always; /* its configuration is held to the record wherever it lies */
};
/* The folder in which the configuration was found, which is where a link to it lies. */
char *orch_trust_dir(const struct orch_paths *p);
int orch_trust_read(const struct orch_paths *p, struct orch_trust *t, struct orch_err *err);
int orch_trust_record(const struct orch_paths *p, const struct orch_trust *t, struct orch_err *err);
void orch_trust_fini(struct orch_trust *t);

#endif
