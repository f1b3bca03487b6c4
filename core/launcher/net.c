/* A microVM's network namespace: settings, netlink sockets for orch, the tap, and pasta as
 * uplink, which lives in the host's network namespace but otherwise in the microVM's, so that it
 * dies with it. The tap stays down and the namespace without rules until orch has made and
 * verified them. */
#include "launcher.h"

#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

static const char *const programs[] = { "/usr/bin/pasta", "/usr/local/bin/pasta" };
/* Where pasta finds the namespace: a file of its own, since it may read no /proc/PID by then and
 * newer ones close what they inherit. Of all places this is the one that the AppArmor profiles of
 * the distributions' packages let it read. It lies on a tmpfs over /run, so that the host needs
 * nothing below; a resolv.conf that leads there is then missing, which pasta takes. */
#define DIR "/run"
#define NAMESPACE DIR "/user/%u/netns/net"

/* ip_forward first: it sets some of the others. What devices get when they are made is
 * "default". */
static const char *const settings[][2] = {
    { "ipv4/ip_forward", "1" },
    { "ipv4/conf/all/rp_filter", "1" },
    { "ipv4/conf/default/rp_filter", "1" },
    { "ipv4/conf/all/accept_redirects", "0" },
    { "ipv4/conf/default/accept_redirects", "0" },
    { "ipv4/conf/all/send_redirects", "0" },
    { "ipv4/conf/default/send_redirects", "0" },
    { "ipv4/conf/all/accept_source_route", "0" },
    { "ipv4/conf/default/accept_source_route", "0" },
    { "ipv4/conf/all/bc_forwarding", "0" },
    { "ipv4/conf/all/proxy_arp", "0" },
    { "ipv6/conf/all/disable_ipv6", "1" },
    { "ipv6/conf/default/disable_ipv6", "1" },
};

/* Where /proc/sys is read-only (containers), orch sets them by device; IPv6 is dropped by the
 * tables too. */
static bool set_all(void)
{
    bool all = true;
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        char path[80];
        snprintf(path, sizeof path, "/proc/sys/net/%s", settings[i][0]);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        bool ipv6 = !strncmp(settings[i][0], "ipv6", 4);
        if (fd < 0 || write(fd, settings[i][1], 1) != 1)
            all &= ipv6 && errno == ENOENT; /* a kernel without it */
        if (fd >= 0)
            close(fd);
    }
    return all;
}

static int open_netlink(const char *step, int protocol, uint32_t groups)
{
    struct sockaddr_nl sa = { .nl_family = AF_NETLINK, .nl_groups = groups };
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd < 0 || bind(fd, (const struct sockaddr *)&sa, sizeof sa))
        orch_launch_fail(step);
    return fd;
}

static int make_tap(void)
{
    struct ifreq r = { .ifr_name = ORCH_NET_TAP, .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        orch_launch_fail("/dev/net/tun");
    if (ioctl(fd, TUNSETIFF, &r))
        orch_launch_fail("tap");
    return fd;
}

/* What it says goes to the pipe that pasta's words go to. */
static _Noreturn void give_up(const char *step)
{
    dprintf(STDERR_FILENO, "%s: %s", step, strerror(errno));
    _exit(127);
}

static _Noreturn void run_pasta(const struct orch_net *n, const char *program, const char *init,
                                int go, int said)
{
    char at[64], path[64], c, *const env[] = { NULL };
    const char *const argv[] = {
        "pasta",
        "-f",
        "-q",
        "-e",
        "--config-net",
        "-4",
        "-I",
        ORCH_NET_UPLINK_IF,
        "-a",
        ORCH_NET_UPLINK_ADDR,
        "-n",
        ORCH_NET_UPLINK_BITS,
        "-g",
        ORCH_NET_UPLINK_GATEWAY,
        /* Its defaults lead the gateway's address, and all ports that listen on the host's
         * loopback, there. */
        "--no-map-gw",
        "-t",
        "none",
        "-u",
        "none",
        "-T",
        "none",
        "-U",
        "none",
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ndp",
        "--no-ra",
        "--no-netns-quit",
        "--netns-only",
        "--netns",
        at,
        NULL,
    };
    char *args[sizeof argv / sizeof *argv];
    sigset_t none;
    if (read(go, &c, 1) != 1)
        _exit(0);
    if (dup2(said, STDERR_FILENO) < 0)
        _exit(127);
    snprintf(path, sizeof path, "/proc/%s/ns/net", init);
    snprintf(at, sizeof at, NAMESPACE, n->uid);
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("orch", DIR, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC,
              "size=4k,nr_inodes=8,mode=755"))
        give_up("mounts");
    for (char *s = at + sizeof DIR; (s = strchr(s, '/')); *s++ = '/') {
        *s = 0;
        if (mkdir(at, 0755))
            give_up("folder of the network namespace");
    }
    int fd = open(at, O_CREAT | O_WRONLY | O_CLOEXEC, 0400);
    if (fd < 0 || mount(path, at, NULL, MS_BIND, NULL))
        give_up("bind of the network namespace");
    close_range(STDERR_FILENO + 1, ~0U, 0);
    sigemptyset(&none);
    /* All dispositions are the default ones: pasta needs SIGPIPE's. */
    sigprocmask(SIG_SETMASK, &none, NULL);
    memcpy(args, argv, sizeof argv);
    execve(program, args, env);
    give_up(program);
}

/* Forked before init leaves the host's network namespace; waits for `go`. */
static int fork_pasta(struct orch_net *n)
{
    const char *program = NULL;
    char self[32];
    int go[2], said[2];
    for (size_t i = 0; i < sizeof programs / sizeof *programs && !program; i++)
        if (!access(programs[i], X_OK))
            program = programs[i];
    if (!program)
        orch_launch_fail("pasta program");
    /* /proc is the host's: there init is not 1. */
    ssize_t len = readlink("/proc/self", self, sizeof self - 1);
    if (len < 0)
        orch_launch_fail("/proc/self");
    self[len] = 0;
    if (pipe2(go, O_CLOEXEC) || pipe2(said, O_CLOEXEC))
        orch_launch_fail("pipe");
    n->pasta = fork();
    if (!n->pasta) {
        close(go[1]);
        run_pasta(n, program, self, go[0], said[1]);
    }
    if (n->pasta < 0)
        orch_launch_fail("fork");
    close(go[0]);
    close(said[1]);
    fcntl(said[0], F_SETFL, O_NONBLOCK);
    n->said_fd = said[0];
    return go[1];
}

void orch_net_make(struct orch_net *n, uint32_t flags)
{
    static struct orch_launch_msg m;
    int go = flags & ORCH_NET_UPLINK ? fork_pasta(n) : -1;
    for (int tries = 0; unshare(CLONE_NEWNET); tries++) {
        /* As with clones: the namespaces of a microVM just ended go asynchronously. */
        if (errno != ENOSPC || tries == ORCH_LAUNCH_TRIES)
            orch_launch_fail("unshare of the network");
        usleep(20000);
    }
    bool all = set_all();
    const int fds[ORCH_NET_FDS] = {
        [ORCH_NET_FD_NFT] = open_netlink("netfilter socket", NETLINK_NETFILTER, 0),
        [ORCH_NET_FD_ROUTE] = open_netlink("route socket", NETLINK_ROUTE,
                                           RTMGRP_LINK | RTMGRP_IPV4_ROUTE),
        [ORCH_NET_FD_LOG] = open_netlink("netfilter socket", NETLINK_NETFILTER, 0),
    };
    n->tap = make_tap();
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NET, .status = !all };
    int r = orch_launch_send(ORCH_LAUNCH_SOCK, &m, fds, ORCH_NET_FDS);
    errno = -r;
    if (r)
        orch_launch_fail("answer");
    for (size_t i = 0; i < ORCH_NET_FDS; i++)
        close(fds[i]);
    /* After the answer, so that pasta's start takes no time from what orch does next. */
    if (go >= 0) {
        if (write(go, "", 1) != 1)
            orch_launch_fail("pipe");
        close(go);
    }
}

void orch_net_read(struct orch_net *n)
{
    char buf[256];
    ssize_t got;
    while ((got = read(n->said_fd, buf, sizeof buf)) > 0) {
        size_t add = (size_t)got, keep = n->n_said;
        if (keep + add > sizeof n->said) {
            keep = sizeof n->said - add;
            memmove(n->said, n->said + n->n_said - keep, keep);
        }
        memcpy(n->said + keep, buf, add);
        n->n_said = keep + add;
    }
    if (got < 0 && errno == EAGAIN)
        return;
    close(n->said_fd);
    n->said_fd = -1;
}

_Noreturn void orch_net_lost(struct orch_net *n, int status)
{
    char text[sizeof n->said + 64], how[48];
    if (n->said_fd >= 0)
        orch_net_read(n);
    while (n->n_said && n->said[n->n_said - 1] == '\n')
        n->n_said--;
    snprintf(how, sizeof how, WIFSIGNALED(status) ? "killed by signal %d" : "exit status %d",
             WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    snprintf(text, sizeof text, "(%s)%s%.*s", how, n->n_said ? ": " : "", (int)n->n_said, n->said);
    errno = ENETDOWN;
    struct orch_launch_msg *m = orch_launch_error("pasta", text);
    orch_launch_send(ORCH_LAUNCH_SOCK, m, NULL, 0);
    _exit(1);
}
