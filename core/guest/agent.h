/* Inside the guest agent: what its files call of each other. One thread; every operation is in one
 * list until it has told its end. A protocol error of the host ends the guest (die). */
#ifndef ORCH_GUEST_AGENT_H
#define ORCH_GUEST_AGENT_H

#include "wire.h"

#include <dirent.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/types.h>

#define MAX_OPS 512
#define MAX_EXECS 256
#define MAX_GROUPS 64
/* bytes taken from one stream per turn; what the port takes in one write */
#define CHUNK (32 * 1024)
#define OUT_DATA (128 * 1024) /* bulk data is added while less than this is queued */
/* frames from the host are handled while less than this is queued */
#define OUT_REPLY (192 * 1024)

enum kind { EXEC, WRITE, READ, LIST };

struct stream {
    int fd; /* -1: ended */
    uint64_t sent, dropped;
};

/* A cgroup for an exec; events is its cgroup.events, 0: not made yet. Used again, since making one
 * costs as much as a fork, but not after cgroup.kill: Linux 6.14 and later compare the count of
 * kills of the wrong cgroup, and kill at birth what is cloned into one that was killed before. */
struct cgroup {
    int dir, events;
    bool busy, killed;
    bool squeezed;      /* ended by the agent, see pressure_relieve */
    unsigned oom_kills; /* when it was taken */
    char name[16];
};

struct op {
    struct op *next;
    uint32_t id;
    enum kind kind;
    bool dropped; /* the host forgot it: end it, send nothing */

    /* EXEC */
    pid_t pid;
    struct cgroup *group; /* NULL: pid is a supervisor */
    int fail_fd;          /* CLOEXEC pipe: empty at its end when the exec succeeded; -1 after */
    uint32_t fail[2];     /* enum orch_wire_fail, errno */
    bool reaped, killing, timed_out, draining, pty;
    int status;
    int64_t deadline; /* next step against the tree; 0: none */
    uint64_t max_output;
    struct stream out[2];
    int in_fd;    /* -1: closed */
    bool in_open; /* stdin frames may come */
    char *in;     /* bytes for in_fd: in[in_off..in_n) */
    size_t in_off, in_n, in_cap;
    uint32_t uncredited; /* taken, not yet told */
    bool in_eof;

    /* files */
    int fd;
    DIR *dir;
    char *path, *temp;
    uint64_t left, bytes;
    uint32_t entries;

    short at[4]; /* this turn's places in the poll set: fail_fd, in_fd, out[0], out[1]; -1: none */
};

/* agent.c */
extern bool hosted; /* --fd */
extern struct op *ops;
extern unsigned n_ops, n_execs;
extern struct rlimit nofile; /* what commands get */
_Noreturn void power(int how);
/* The host broke the protocol, or the guest cannot be run: nothing sensible is left to be done. */
_Noreturn void die(const char *why);
int64_t now_ms(void);
void close_fd(int *fd);
bool set_nonblock(int fd);
struct op *op_find(uint32_t id);
struct op *op_new(uint32_t id, enum kind kind); /* NULL: no memory */
void op_free(struct op *op);

/* port.c: the port's two queues. */
extern int port;
size_t queued(void); /* bytes to be written */
/* Room for a payload of at most n bytes at the end of the queue; out_commit makes of what was put
 * there a frame. */
uint8_t *out_room(size_t n);
void out_commit(uint32_t id, enum orch_wire_type type, size_t n);
void send_frame(uint32_t id, enum orch_wire_type type, const void *p, size_t n);
void send_done(uint32_t id, int error, uint64_t bytes);
void send_hello(const uint8_t *epoch);
void send_credit(struct op *op, uint32_t n);
void flush(void);
bool in_room(void); /* more can be received */
void receive(void);
/* Hands on the whole frames that were received while their answers have room. */
void each_frame(void (*handle)(const struct orch_wire_head *h, const char *b));

/* tree.c: the processes of a command. */
void find_cgroups(void); /* they are used only if trees can be killed through them */
bool has_cgroups(void);
struct cgroup *group_take(void); /* a free one, or NULL with errno */
void group_give(struct cgroup *g);
bool group_empty(const struct cgroup *g);
extern int pressure_fd; /* POLLPRI: commands wait for memory; -1: not told */
void pressure_relieve(void);
bool group_starved(const struct cgroup *g);    /* since it was taken, ended for want of memory */
void descendants_signal(pid_t top, int signo); /* every one of top, not itself */
void tree_signal(const struct op *op, int signo);
void tree_kill(struct op *op);

/* exec.c */
struct user {
    uid_t uid;
    gid_t gid;
    char name[64], home[256];
    gid_t groups[MAX_GROUPS]; /* for what is executed; the first is gid */
    size_t n_groups;
};
bool user_find(const char *who, struct user *u);
void exec_frame(uint32_t id, const char *b, size_t n);
void stdin_frame(struct op *op, const char *b, size_t n);
/* One turn of an exec; frees it when it is over. set: what poll found. */
void exec_turn(struct op *op, int64_t now, const struct pollfd *set);

/* file.c */
/* Opens what cannot block: a regular file. errno EINVAL or EISDIR for anything else. */
int open_regular(const char *path, int flags);
void file_frame(uint32_t id, enum kind kind, const char *b, size_t n);
void write_data(struct op *op, const void *b, size_t n);
void read_turn(struct op *op);
void list_turn(struct op *op);

/* boot.c: mounts, modules, the network; returns when the port is open at both ends. */
void boot(void);

#endif
