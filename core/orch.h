/* orch as a C library: a host for tool calls of AI agents.
 *
 *   struct orch *o = orch_open(&(struct orch_options){ .size = sizeof(struct orch_options) },
 *   &err);
 *   orch_add_tool(o, &tool, &err);
 *   orch_serve_stdio(o, &err);          or: orch_call(…), orch_run_file(…)
 *   while (orch_step(o, -1)) ;
 *   orch_close(o);
 *
 * Threads: a handle belongs to one thread; several handles are independent. Signals: none are
 * changed, except that writes to a closed pipe must not kill the program: ignore SIGPIPE. Memory:
 * what a function returns or passes to a callback is orch's, valid until that callback returns or
 * the handle is closed, unless it says otherwise. Link with -lorch and what `pkg-config orch`
 * says. */
#ifndef ORCH_H
#define ORCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ORCH_API __attribute__((visibility("default")))

struct orch;

/* What went wrong: a text with what, where, why and how to fix; status as orch's exit status
 * (1 failed, 3 denied, 4 approval, 5 isolation, 6 configuration, 7 upstream, 8 limit). */
struct orch_error {
    int status;
    char message[2048];
};

struct orch_options {
    size_t size;        /* sizeof(struct orch_options): lets the struct grow */
    const char *config; /* orchestrator.lua; NULL: searched as `orch` does */
    /* share/orch of the installation; NULL: beside the program or the prefix */
    const char *share;
    const char *launcher; /* libexec/orch/launcher; NULL: beside the program or the prefix */
    const char *agent;    /* libexec/orch/agent, likewise */
    void (*log)(void *ud, const char *line, size_t n); /* NULL: stderr */
    void *log_ud;
};

ORCH_API struct orch *orch_open(const struct orch_options *options, struct orch_error *err);
ORCH_API void orch_close(struct orch *o); /* ends microVMs, writes the audit head; NULL is fine */
ORCH_API const char *orch_version(void);

/* A tool written in C. Called in the handle's thread when policy allowed the call. `args` is the
 * JSON object (validated against `input`, without a null that stands for an absent member), as
 * NUL-terminated text. Answer at once or later, once, with orch_answer; after the configuration's
 * vm.timeout the call has failed. */
struct orch_tool_call;
typedef void orch_tool_fn(void *ud, struct orch_tool_call *call, const char *args);
struct orch_tool_def {
    const char *name; /* 1–64 of A-Za-z0-9_.- without "__" */
    const char *description;
    const char *input; /* JSON Schema of the arguments, type object */
    orch_tool_fn *fn;
    void *ud;
};
/* Replaces a tool of the same name; kept across reloads. Everything in def is copied. */
ORCH_API int orch_add_tool(struct orch *o, const struct orch_tool_def *def, struct orch_error *err);
/* text is UTF-8 (what is not becomes U+FFFD). */
ORCH_API void orch_answer(struct orch_tool_call *call, const char *text, int is_error);

/* Judges and runs one tool call as if an agent had made it. result: the MCP result object as JSON
 * text; denied, not run and failed are results too (is_error). Called once, from orch_step or
 * orch_close. */
typedef void orch_result_fn(void *ud, const char *result, int is_error);
ORCH_API int orch_call(struct orch *o, const char *tool, const char *args_json, const char *caller,
                       orch_result_fn *fn, void *ud, struct orch_error *err);

/* Serves MCP on descriptors 0 and 1 until end of input; orch_step returns 0 then. */
ORCH_API int orch_serve_stdio(struct orch *o, struct orch_error *err);
/* Runs a trusted script; returns its exit status, or -1 with err. Steps the loop meanwhile. */
ORCH_API int orch_run_file(struct orch *o, const char *path, int argc, const char *const *argv,
                           struct orch_error *err);

/* Waits at most max_ms (-1: no bound) for events and handles them. 0 when serving ended, else 1. */
ORCH_API int orch_step(struct orch *o, int64_t max_ms);
/* Loads configuration, policies and tools anew; on failure the old ones stay in force. */
ORCH_API int orch_reload(struct orch *o, struct orch_error *err);

#ifdef __cplusplus
}
#endif

#endif
