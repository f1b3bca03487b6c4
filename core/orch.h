/* orch as a C library: a host for tool calls of AI agents.
 *
 *   struct orch_options options = { .size = sizeof options };
 *   struct orch *o = orch_open(&options, &err);
 *   orch_add_tool(o, &tool, &err);
 *   orch_serve_stdio(o, &err);          or: orch_call(…), orch_run_file(…)
 *   while (orch_step(o, -1) > 0) ;
 *   orch_close(o);
 *
 * Link with -lorch and what `pkg-config --libs --static orch` says. Memory: what a function is
 * given it copies, but for pointers named ud; what it returns or passes to a callback is orch's,
 * valid until that callback returns or the handle is closed, unless it says otherwise.
 *
 * Event loop
 * ----------
 * Nothing happens on its own: microVMs, children, connections, timers and reloads go on in
 * orch_step, and callbacks are called from it (from orch_run_file and orch_close too, which step;
 * the log's from every function). A program without a loop calls orch_step(o, -1). One with a loop
 * watches orch_fd(o) for reading and calls orch_step(o, 0) when it is readable:
 *
 *   struct pollfd fds[] = { { .fd = orch_fd(o), .events = POLLIN }, … };
 *   while (poll(fds, n, my_timeout) >= 0)
 *       if (fds[0].revents && orch_step(o, 0) <= 0)
 *           break;
 *
 * After any function of the handle has returned, nothing is left to do that the descriptor does not
 * tell of, timers included: no other timeout is needed. It is readable until orch_step was called,
 * so edge-triggered watching works only where each wakeup is followed by steps until it is not
 * readable any more. It is orch's: never read, written or closed, and gone after orch_close.
 *
 * Callbacks may call every function of the handle but orch_step, orch_run_file and orch_close:
 * these are refused there with -EDEADLK, an error, or (orch_close) a line in the log and nothing
 * else. The log callback calls none. Callbacks return; they do not leave by longjmp or an
 * exception.
 *
 * What takes time: orch_step(o, 0) waits for no event, but runs policies (at most policy.time a
 * call), reads changed files, waits for the audit log's disk where audit.sync says so, and starts
 * programs (a child that is kept from orch's files may take 5 s). orch_open and orch_reload read
 * and compile all files. orch_close gives calls 1 s, a child 1.5 s and an image's template that is
 * being saved 30 s to end. orch_run_file returns when the script has ended.
 *
 * Threading
 * ---------
 * A handle belongs to the thread that opened it, which outlives it: the kernel ends a child when
 * the thread that started it does. Other threads are refused with -EPERM, an error or a line in
 * their log; a tool that works in threads of its own hands its result to the handle's thread, which
 * answers (an eventfd in the program's loop). poll on orch_fd may be any thread's. Handles have
 * nothing in common, log included; each may have a thread, or several one.
 *
 * Of what belongs to the whole process orch changes nothing: no signal handler or mask, locale,
 * umask, working directory, environment. It reads environment and working directory in orch_open
 * and when it starts programs or loads a configuration (do not setenv meanwhile), and it needs:
 *
 * SIGPIPE   ignored, or a peer that closes its pipe ends the program.
 * SIGCHLD   not ignored (SA_NOCLDWAIT neither), and no wait for any child (wait, waitpid(-1)):
 *           exit statuses would be lost. orch waits for its own children by pidfd, without the
 *           signal.
 * fork      the child calls no function of the handle, and executes something or ends: while it
 *           lives, microVMs do not notice that the program ended. Descriptors close on exec.
 *
 * libcurl, libsqlite3 and libnftnl are loaded when first used, under a lock, and stay.
 * curl_global_init is called then: not while another thread calls it too, in old libcurls. */
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

enum orch_log_level {
    ORCH_LOG_DEFAULT, /* as ORCH_LOG_WARN */
    ORCH_LOG_DEBUG,
    ORCH_LOG_INFO,
    ORCH_LOG_WARN,
    ORCH_LOG_ERROR
};

/* Copied, strings included. A program with an older orch.h may be linked with a newer orch; the
 * reverse works unless it sets members that orch does not know. */
struct orch_options {
    size_t size;        /* sizeof(struct orch_options): lets the struct grow, in words of 8 bytes */
    const char *config; /* orchestrator.lua; NULL: searched as `orch` does */
    /* share/orch of the installation; NULL: beside the program or the prefix */
    const char *share;
    const char *launcher; /* libexec/orch/launcher; NULL: beside the program or the prefix */
    const char *agent;    /* libexec/orch/agent, likewise */
    /* Gets whole lines, newline included, of this handle alone; NULL: they go to stderr. */
    void (*log)(void *ud, const char *line, size_t n);
    void *log_ud;
    int log_level; /* enum orch_log_level: nothing below it */
    int log_json;  /* else text */
};

ORCH_API struct orch *orch_open(const struct orch_options *options, struct orch_error *err);
/* Cancels what runs (callbacks are still called), ends microVMs and children, writes the audit
 * head. NULL is fine. */
ORCH_API void orch_close(struct orch *o);
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
/* Runs a trusted script; returns its exit status, or -1 with err. Steps the loop meanwhile. Its
 * os.exit ends the whole program. */
ORCH_API int orch_run_file(struct orch *o, const char *path, int argc, const char *const *argv,
                           struct orch_error *err);

/* Waits at most max_ms (-1: no bound) for events and handles them. 0 when serving ended, else 1;
 * negative at once where it must not be called. */
ORCH_API int orch_step(struct orch *o, int64_t max_ms);
/* The descriptor for a loop of the program's own, made at the first call; a negative errno with a
 * line in the log when it cannot be. */
ORCH_API int orch_fd(struct orch *o);
/* Loads configuration, policies and tools anew; on failure the old ones stay in force. */
ORCH_API int orch_reload(struct orch *o, struct orch_error *err);

#ifdef __cplusplus
}
#endif

#endif
