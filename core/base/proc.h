/* Child processes on the host: started without a shell, with an explicit environment, every other
 * descriptor closed, watched through a pidfd (no SIGCHLD handler, so an embedder keeps its own).
 * The child leads a process group of its own and gets SIGKILL when the thread that started it ends,
 * so start children from the loop's thread. Its stderr is always drained; the last bytes are kept.
 *
 * The process must not ignore SIGCHLD, and nothing in it may wait for any child (-1): the exit
 * status would be lost (reported as 255, with a warning). It ignores SIGPIPE, as writers to stdin
 * need. */
#ifndef ORCH_BASE_PROC_H
#define ORCH_BASE_PROC_H

#include "loop.h"

struct orch_proc;

/* status: as wait(2) gives it; called once, after stderr reached its end or 200 ms passed. */
typedef void orch_proc_exit_fn(void *ud, int status);

/* A program that executes another in its own place, changed in some way: `words… PATH ARGV0 ARG…`.
 * Its descriptor 3 is a SEQPACKET socket: it sends a report when it cannot, else a byte with the
 * root directory the other will have, and execs. The start waits for that, at most 5 s. */
struct orch_proc_report {
    int32_t code; /* errno */
    char step[32];
    char file[4096]; /* that the step was about, or empty */
};
struct orch_proc_via {
    char **words; /* NULL-terminated; words[0]: absolute path */
    int root;     /* set by the start: O_PATH, or -1 */
    int (*refused)(const struct orch_proc_via *v, const struct orch_proc_report *r,
                   struct orch_err *err);
    void (*release)(struct orch_proc_via *v); /* closes root and frees v */
};

struct orch_proc_opts {
    /* argv[0] is looked up in the absolute entries of the child's PATH unless it has a slash; then
     * a relative one is relative to cwd. */
    const char *const *argv;
    const char *const *env; /* "NAME=value"; NULL: an empty environment */
    const char *cwd;        /* NULL: unchanged */
    int fds[16];            /* passed as descriptors 3…; n_fds of them; borrowed; none with via */
    size_t n_fds;
    bool null_stdio;           /* stdin and stdout are /dev/null instead of pipes */
    struct orch_proc_via *via; /* taken, also when the start fails; released with the process */
    size_t stderr_keep;        /* bytes of stderr kept, default 8 KiB */
    orch_proc_exit_fn *on_exit;
    void (*on_stderr)(void *ud, struct orch_slice bytes); /* as it comes; optional */
    /* its stderr goes to the log under this name, a line each (info); borrowed until free */
    const char *log_as;
    void *ud;
};

/* Errors: ENOENT (the message says which PATH was looked through), EACCES, ENOEXEC, a missing
 * cwd. */
struct orch_proc *orch_proc_start(struct orch_loop *l, const struct orch_proc_opts *o,
                                  struct orch_err *err);
int orch_proc_pid(const struct orch_proc *p);
/* Non-blocking ends of the child's stdin and stdout; -1 with null_stdio or when closed. The proc
 * owns them. */
int orch_proc_stdin(const struct orch_proc *p);
int orch_proc_stdout(const struct orch_proc *p);
void orch_proc_close_stdin(struct orch_proc *p);
struct orch_slice orch_proc_stderr(const struct orch_proc *p); /* the last bytes, borrowed */
/* The last line with anything in it of those; empty when there is none. */
struct orch_slice orch_proc_stderr_line(const struct orch_proc *p);
/* Appends "its stderr ends: …" or that it wrote nothing, escaped for a terminal. */
void orch_proc_stderr_describe(const struct orch_proc *p, struct orch_buf *b);
void orch_proc_kill(struct orch_proc *p, int signo); /* the child's whole process group */
/* Waits while the child ends in its own time: its stdin is closed; eof_ms later its group gets
 * SIGTERM, and has term_ms from then. What it writes to stdout meanwhile is thrown away. It has
 * ended when its stdout is closed too, since what the caller spoke to may be a child of a wrapper
 * that goes first. A signal to this process ends the first of the two waits. orch_proc_free
 * follows; on_exit is not called. */
void orch_proc_end(struct orch_proc *p, int64_t eof_ms, int64_t term_ms);
/* For servers that speak over stdin and stdout, as MCP's clients are told to end them; and where
 * somebody waits for our own end, or there is nothing yet that the child could lose. */
enum {
    ORCH_PROC_EOF_MS = 2000,
    ORCH_PROC_TERM_MS = 3000,
    ORCH_PROC_HURRY_EOF_MS = 500,
    ORCH_PROC_HURRY_TERM_MS = 1000
};
/* "exit status 3" or "killed by signal 9 (Killed)". */
void orch_proc_describe(int status, char *out, size_t n);
/* Kills what is still running of the process group, reaps (waits up to 2 s for that), on_exit is
 * not called. May be called from on_exit. Free watches on stdin and stdout first. */
void orch_proc_free(struct orch_proc *p);

/* Of any process, by /proc. */
enum { ORCH_ANCESTORS_MAX = 64 }; /* looked at */
int orch_proc_parent(int pid);    /* 0: unknown */
bool orch_proc_descends(int pid, int of);
/* When it started, in ticks since boot: with the pid a name that is not given twice. -1: there is
 * none. */
int64_t orch_proc_started(int pid);

#endif
