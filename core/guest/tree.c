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

static int cgroup_fd = -1;
static struct cgroup groups[MAX_EXECS];
static unsigned n_groups; /* ever made, for their names */

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
        }
        g->busy = true;
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

void find_cgroups(void)
{
    cgroup_fd = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
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
