/* `launcher protect`: executes a program in a mount namespace in which what orch judges by is
 * read-only.
 *
 * Two user namespaces: A makes the mounts, B owns none of them. The kernel locks what a mount
 * namespace inherits from a more privileged one, so that in B, and in whatever is nested in it,
 * they cannot be taken away, moved or made writable, not even with B's capabilities. The program
 * keeps its number, group, session, terminal and descriptors. */
#include "launcher.h"

#include "../base/proc.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* What root keeps of its capabilities, which are those over its ids and their files: no mounts. */
#define KEPT \
    (1U << CAP_CHOWN | 1U << CAP_DAC_OVERRIDE | 1U << CAP_DAC_READ_SEARCH | 1U << CAP_FOWNER | \
     1U << CAP_FSETID | 1U << CAP_KILL | 1U << CAP_SETGID | 1U << CAP_SETUID | 1U << CAP_SETFCAP)

static _Noreturn void refuse(const char *step, const char *file)
{
    struct orch_proc_report r = { .code = errno };
    snprintf(r.step, sizeof r.step, "%s", step);
    snprintf(r.file, sizeof r.file, "%s", file ? file : "");
    if (write(ORCH_LAUNCH_SOCK, &r, sizeof r) < 0)
        _exit(126);
    _exit(127);
}

static void write_file(pid_t pid, const char *name, const char *text)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        refuse(strcmp(name, "setgroups") ? name : "setgroups file", NULL);
    close(fd);
}

/* Each id to itself, of all that there are here: what the new namespace's parent may map. */
static void identity(const char *name, char *out, size_t n)
{
    char path[32];
    unsigned in, outside, count;
    snprintf(path, sizeof path, "/proc/self/%s", name);
    FILE *f = fopen(path, "re");
    size_t at = 0;
    while (f && at < n && fscanf(f, "%u %u %u", &in, &outside, &count) == 3)
        at += (size_t)snprintf(out + at, n - at, "%u %u %u\n", in, in, count);
    if (!f || !at || at >= n)
        refuse(name, NULL);
    fclose(f);
}

/* Into a new user namespace with the same ids, and a mount namespace of its own. The maps are
 * written by a child, which stays behind: who may map more than itself is who has the capability
 * outside. */
static void enter(bool all)
{
    char uids[4096], gids[4096], c;
    int go[2], status;
    if (all) {
        identity("uid_map", uids, sizeof uids);
        identity("gid_map", gids, sizeof gids);
    } else {
        snprintf(uids, sizeof uids, "%u %u 1", geteuid(), geteuid());
        snprintf(gids, sizeof gids, "%u %u 1", getegid(), getegid());
    }
    pid_t self = getpid();
    if (pipe2(go, O_CLOEXEC))
        refuse("pipe", NULL);
    pid_t child = fork();
    if (child < 0)
        refuse("fork", NULL);
    if (!child) {
        close(go[1]);
        if (read(go[0], &c, 1) != 1)
            _exit(1);
        if (!all)
            write_file(self, "setgroups", "deny");
        write_file(self, "uid_map", uids);
        write_file(self, "gid_map", gids);
        _exit(0);
    }
    for (int tries = 0; unshare(CLONE_NEWUSER | CLONE_NEWNS); tries++) {
        if (errno != ENOSPC || tries == 50) /* namespaces go asynchronously */
            refuse("unshare of the user namespace", NULL);
        poll(NULL, 0, 20);
    }
    if (write(go[1], "", 1) != 1)
        refuse("pipe", NULL);
    close(go[0]);
    close(go[1]);
    if (waitpid(child, &status, 0) < 0 || status)
        _exit(127);
}

static bool may_map_all(void)
{
    struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct d[2] = { { 0 } };
    unsigned want = 1U << CAP_SETUID | 1U << CAP_SETGID;
    return !syscall(SYS_capget, &h, d) && (d[0].effective & want) == want;
}

/* 'r' read-only with all below; 'p' pinned: a mount point cannot be renamed, removed or replaced. A
 * link is not followed. */
static void cover(char how, const char *path)
{
    struct mount_attr ro = { .attr_set = MOUNT_ATTR_RDONLY };
    struct stat st;
    int fd = open_tree(AT_FDCWD, path,
                       OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE | AT_SYMLINK_NOFOLLOW);
    if (fd < 0 || fstat(fd, &st))
        refuse("mount", path);
    if (how == 'r' && mount_setattr(fd, "", AT_EMPTY_PATH | AT_RECURSIVE, &ro, sizeof ro))
        refuse("read-only mounts", path);
    if (move_mount(fd, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH))
        refuse(S_ISLNK(st.st_mode) ? "mount of a link" : "mount", path);
    close(fd);
}

static void limit_root(void)
{
    struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct kept[2] = { { KEPT, KEPT, 0 }, { 0, 0, 0 } };
    for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        if ((cap > 31 || !(KEPT >> cap & 1)) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0))
            refuse("bounding set", NULL);
    if (syscall(SYS_capset, &h, kept))
        refuse("capset", NULL);
}

/* The root of B, by which orch sees later what can be written from here. */
static void send_root(void)
{
    union orch_launch_control c = { .bytes = { 0 } };
    struct iovec iov = { &(char){ 0 }, 1 };
    struct msghdr h = { .msg_iov = &iov,
                        .msg_iovlen = 1,
                        .msg_control = c.bytes,
                        .msg_controllen = CMSG_SPACE(sizeof(int)) };
    int fd = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    struct cmsghdr *k = CMSG_FIRSTHDR(&h);
    k->cmsg_level = SOL_SOCKET;
    k->cmsg_type = SCM_RIGHTS;
    k->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(k), &fd, sizeof fd);
    if (fd < 0 || sendmsg(ORCH_LAUNCH_SOCK, &h, MSG_NOSIGNAL) != 1)
        refuse("root of the mount namespace", NULL);
    close(fd);
}

_Noreturn void orch_protect_exec(char **words)
{
    char cwd[PATH_MAX];
    struct stat before, after;
    bool all = may_map_all();
    fcntl(ORCH_LAUNCH_SOCK, F_SETFD, FD_CLOEXEC);
    /* Else /proc/PID/uid_map belongs to root with a file capability. */
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    if (!getcwd(cwd, sizeof cwd) || cwd[0] != '/' || stat(".", &before))
        refuse("working directory", NULL);
    enter(all);
    /* Private: what the host mounts later, these files elsewhere perhaps, does not come in. */
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        refuse("private mounts", NULL);
    for (; *words && strcmp(*words, "--"); words++)
        cover(**words, *words + 1);
    errno = EINVAL;
    if (!*words || !words[1] || !words[2])
        refuse("message", NULL);
    enter(all);
    if (all)
        limit_root();
    /* By its name: the descriptor it is held by leads below the mounts. */
    if (chdir(cwd) || stat(".", &after))
        refuse("working directory", cwd);
    errno = ESTALE;
    if (before.st_dev != after.st_dev || before.st_ino != after.st_ino)
        refuse("working directory", cwd);
    send_root();
    execv(words[1], words + 2);
    refuse("execve", words[1]);
}
