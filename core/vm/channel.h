/* The host's end of the guest agent's protocol (guest/wire.h) over one socket: many execs and file
 * operations at once, every length checked, every queue bounded. Loop callbacks only; nothing
 * waits. The guest is an adversary: whatever it sends, memory stays bounded and the channel either
 * goes on or fails with a reason. */
#ifndef ORCH_VM_CHANNEL_H
#define ORCH_VM_CHANNEL_H

#include "../base/loop.h"
#include "../guest/wire.h" /* enum orch_wire_fail */

struct orch_channel;
struct orch_exec;
struct orch_fileop;

struct orch_channel_cb {
    void (*hello)(void *ud, const uint8_t epoch[16]);
    /* End of file, a protocol error, or no answer; once. What is under way stays so, and what is
     * started meanwhile, until orch_channel_end: the owner may soon know why it failed. */
    void (*failed)(void *ud, const struct orch_err *err);
    void *ud;
};

/* fd: a connected stream socket, owned by the channel. The guest's first frame must be HELLO. What
 * it still sends for an id that has ended or was dropped is ignored; an id never given out, or
 * anything its state does not allow, fails the channel. */
struct orch_channel *orch_channel_new(struct orch_loop *l, int fd,
                                      const struct orch_channel_cb *cb);
/* Every exec and file operation ends with this error, in a turn of its own; nothing comes from the
 * guest any more, nor a failed. */
void orch_channel_end(struct orch_channel *c, const struct orch_err *why);
void orch_channel_free(struct orch_channel *c); /* no callbacks afterwards, also not of execs */

/* Sends RESTORE with fresh entropy, the time now and this epoch; hello answers. */
void orch_channel_restore(struct orch_channel *c, const uint8_t epoch[16]);
/* Stops reading from the guest, whose programs then block on their pipes, while the consumer of
 * some output cannot keep up. Deadlines stand still meanwhile. */
void orch_channel_pause(struct orch_channel *c, bool paused);
/* Bytes queued towards the guest, for tests and stats. */
size_t orch_channel_queued(const struct orch_channel *c);

struct orch_exec_result {
    int fail;      /* enum orch_wire_fail */
    int sys_errno; /* with fail */
    int status;    /* -1 when signalled */
    int signal;
    bool timed_out, cut_stdout, cut_stderr;
    bool out_of_memory; /* its tree, or a part of it, was ended for want of memory */
    uint64_t dropped_stdout, dropped_stderr;
    int64_t ms; /* from EXEC sent to EXIT received */
};

struct orch_exec_opts {
    const char *const *argv; /* NULL-terminated, at least one */
    const char *const *env;  /* NULL-terminated "NAME=value", or NULL */
    const char *cwd, *user;  /* NULL: home, "1000" */
    int64_t timeout_ms;      /* 0: none; 12 s later the guest agent is taken for dead */
    uint64_t max_output;     /* per stream; the rest is dropped and counted; 0: all */
    bool stdin_open;         /* orch_exec_write will follow; else /dev/null */
    bool pty;
    bool no_aslr;
    void (*output)(void *ud, int stream, struct orch_slice bytes); /* stream 1 or 2 */
    void (*drained)(void *ud); /* stdin: credit came back, more may be written */
    /* Ends it, once; the exec is gone then. err is set (and r NULL) only by orch_channel_end. */
    void (*done)(void *ud, const struct orch_exec_result *r, const struct orch_err *err);
    void *ud;
};

/* Fails with -E2BIG when argv, env and the rest do not fit one frame, -EBUSY at 256 at once. */
struct orch_exec *orch_exec_start(struct orch_channel *c, const struct orch_exec_opts *o,
                                  struct orch_err *err);
/* Takes at most what the window allows; returns how many bytes, 0 = wait for drained. */
size_t orch_exec_write(struct orch_exec *x, const void *p, size_t n);
void orch_exec_close_stdin(struct orch_exec *x);
void orch_exec_signal(struct orch_exec *x, int signo);
void orch_exec_resize(struct orch_exec *x, int rows, int cols);
/* Forgets it: the guest kills the tree; no callback follows. */
void orch_exec_drop(struct orch_exec *x);

typedef void orch_fileop_fn(void *ud, struct orch_slice data, const struct orch_err *err);

/* data is copied; the file belongs to uid 1000. done(ud, {0}, err or NULL). A file operation that
 * stands still for 30 s is dropped and ends with class TIMEOUT. */
struct orch_fileop *orch_channel_write_file(struct orch_channel *c, const char *path,
                                            struct orch_slice data, mode_t mode,
                                            orch_fileop_fn *done, void *ud);
/* At most max bytes are collected, more is an error of class LIMIT. length 0: to the end. */
struct orch_fileop *orch_channel_read_file(struct orch_channel *c, const char *path,
                                           uint64_t offset, uint64_t length, size_t max,
                                           orch_fileop_fn *done, void *ud);
/* Entries as the wire gives them (guest/wire.h LIST), checked for form. */
struct orch_fileop *orch_channel_list_dir(struct orch_channel *c, const char *path,
                                          orch_fileop_fn *done, void *ud);
void orch_fileop_drop(struct orch_fileop *f);

#endif
