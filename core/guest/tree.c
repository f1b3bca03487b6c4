/* The tree of processes that a command is: by its cgroup, or by /proc where there are no
 * cgroups. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KILL_RETRY_MS 20

/* Of all commands together, so that the agent and the kernel have room whatever they do. */
#define RESERVE_KB (12 * 1024)
#define PIDS_MAX "4096" /* of one command */

/* Where commands have nothing left but what they run themselves, the kernel goes on for minutes
 * evicting what is read again at once. It tells of each 2 s, a tenth of which all of them stood
 * still for want of memory; nothing is being done in them when all that is kept of files was read
 * again several times meanwhile. */
#define PRESSURE "full 200000 2000000"
enum { READ_AGAIN = 4 };

int pressure_fd = -1;

static int cgroup_fd = -1;
static struct cgroup groups[MAX_EXECS];
static unsigned n_groups; /* ever made, for their names */

static bool put(int dir, const char *file, const char *text)
{
    int fd = openat(dir, file, O_WRONLY | O_CLOEXEC);
    bool ok = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    close_fd(&fd);
    return ok;
}

/* The number behind `key` in a file of lines "KEY NUMBER"; "": the file is the number. */
static unsigned long number(int dir, const char *file, const char *key)
{
    char b[4096];
    int fd = openat(dir, file, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, b, sizeof b - 1);
    close_fd(&fd);
    b[n > 0 ? n : 0] = 0;
    const char *at = strstr(b, key);
    return at ? strtoul(at + strlen(key), NULL, 10) : 0;
}

struct cgroup *group_take(void)
{
    for (int i = 0; i < MAX_EXECS; i++) {
        struct cgroup *g = &groups[i];
        if (g->busy)
            continue;
        if (!g->events) {
            snprintf(g->name, sizeof g->name, "exec-%u", n_groups++);
            if (mkdirat(cgroup_fd, g->name, 0755) < 0)
                return NULL;
            int dir = openat(cgroup_fd, g->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            int events = openat(dir, "cgroup.events", O_RDONLY | O_CLOEXEC);
            if (events < 0) {
                close_fd(&dir);
                return NULL;
            }
            g->dir = dir;
            g->events = events;
            put(dir, "memory.oom.group", "1"); /* a command without half of it is none */
            put(dir, "pids.max", PIDS_MAX);
        }
        g->busy = true;
        g->squeezed = false;
        g->oom_kills = (unsigned)number(g->dir, "memory.events", "oom_kill ");
        return g;
    }
    errno = EAGAIN;
    return NULL;
}

void group_give(struct cgroup *g)
{
    if (g->killed) {
        close(g->events);
        close(g->dir);
        unlinkat(cgroup_fd, g->name, AT_REMOVEDIR);
        *g = (struct cgroup){ 0 };
    }
    g->busy = false;
}

bool group_empty(const struct cgroup *g)
{
    char b[128];
    ssize_t n = pread(g->events, b, sizeof b - 1, 0);
    b[n > 0 ? n : 0] = 0;
    return strstr(b, "populated 0") != NULL;
}

bool group_starved(const struct cgroup *g)
{
    return g->squeezed || number(g->dir, "memory.events", "oom_kill ") > g->oom_kills;
}

void pressure_relieve(void)
{
    static unsigned long last;
    unsigned long refaults = number(cgroup_fd, "memory.stat", "workingset_refault_file "),
                  pages = (number(cgroup_fd, "memory.stat", "\nfile ") -
                           number(cgroup_fd, "memory.stat", "\nshmem ")) /
                          4096,
                  again = refaults - last;
    bool known = last != 0;
    last = refaults;
    if (!known || again < READ_AGAIN * pages)
        return;
    struct op *most = NULL;
    unsigned long most_bytes = 0;
    for (struct op *op = ops; op; op = op->next) {
        unsigned long bytes = op->kind == EXEC && op->group
                                  ? number(op->group->dir, "memory.current", "")
                                  : 0;
        if (bytes > most_bytes) {
            most = op;
            most_bytes = bytes;
        }
    }
    if (most && !most->killing) {
        most->group->squeezed = true;
        tree_kill(most);
    }
}

struct proc {
    pid_t pid, parent;
    bool in;
};

static int procs_read(struct proc *p, int max)
{
    DIR *d = opendir("/proc");
    int n = 0;
    for (struct dirent *e; d && n < max && (e = readdir(d));) {
        char path[280], b[512], *paren;
        if (e->d_name[0] < '1' || e->d_name[0] > '9')
            continue;
        snprintf(path, sizeof path, "/proc/%s/stat", e->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t k = fd < 0 ? -1 : read(fd, b, sizeof b - 1);
        close_fd(&fd);
        if (k <= 0)
            continue;
        b[k] = 0;
        if ((paren = strrchr(b, ')')) && sscanf(paren, ") %*c %d", &p[n].parent) == 1) {
            p[n].pid = atoi(e->d_name);
            p[n++].in = false;
        }
    }
    if (d)
        closedir(d);
    return n;
}

void descendants_signal(pid_t top, int signo)
{
    enum { MAX = 8192 };
    static struct proc p[MAX];
    int n = procs_read(p, MAX);
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < n; i++) {
            bool in = p[i].parent == top;
            for (int k = 0; !in && !p[i].in && k < n; k++)
                in = p[k].in && p[k].pid == p[i].parent;
            more |= in && !p[i].in;
            p[i].in |= in;
        }
    }
    for (int i = 0; i < n; i++)
        if (p[i].in)
            kill(p[i].pid, signo);
}

void tree_signal(const struct op *op, int signo)
{
    if (op->pid <= 0 || (op->reaped && !op->group)) /* the number may be another's by now */
        return;
    if (!op->group) {
        descendants_signal(op->pid, signo);
        return;
    }
    int fd = openat(op->group->dir, signo == SIGKILL ? "cgroup.kill" : "cgroup.procs",
                    (signo == SIGKILL ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
    if (fd < 0)
        return;
    if (signo == SIGKILL) {
        op->group->killed = true;
        if (write(fd, "1", 1) != 1 && !op->reaped)
            kill(op->pid, SIGKILL);
    } else {
        FILE *f = fdopen(fd, "re");
        for (int pid; f && fscanf(f, "%d", &pid) == 1;)
            kill(pid, signo);
        if (f)
            fclose(f);
        return;
    }
    close(fd);
}

void tree_kill(struct op *op)
{
    op->killing = true;
    op->deadline = now_ms() + KILL_RETRY_MS;
    tree_signal(op, SIGKILL);
}

/* All commands in one group, whose memory is bounded. Without these controllers the kernel's own
 * last resort stands in, which takes a process and not a command. */
static void bound_commands(void)
{
    int root = cgroup_fd;
    put(root, "cgroup.subtree_control", "+memory");
    put(root, "cgroup.subtree_control", "+pids");
    if (mkdirat(root, "commands", 0755) < 0)
        return;
    cgroup_fd = openat(root, "commands", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    close(root);
    put(cgroup_fd, "cgroup.subtree_control", "+memory");
    put(cgroup_fd, "cgroup.subtree_control", "+pids");
    unsigned long kb = number(AT_FDCWD, "/proc/meminfo", "MemAvailable:");
    char text[32];
    snprintf(text, sizeof text, "%luK", kb > 2 * RESERVE_KB ? kb - RESERVE_KB : kb / 2);
    put(cgroup_fd, "memory.max", text);
    pressure_fd = openat(cgroup_fd, "memory.pressure", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (pressure_fd >= 0 && write(pressure_fd, PRESSURE, sizeof PRESSURE) < 0)
        close_fd(&pressure_fd);
}

void find_cgroups(void)
{
    cgroup_fd = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (cgroup_fd >= 0 && !hosted)
        bound_commands();
    struct cgroup *g = cgroup_fd < 0 ? NULL : group_take();
    if (g)
        g->busy = false;
    if (!g || faccessat(g->dir, "cgroup.kill", W_OK, 0) < 0)
        close_fd(&cgroup_fd);
}

bool has_cgroups(void)
{
    return cgroup_fd >= 0;
}
