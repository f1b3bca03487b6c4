/* core/guest/agent: the real program, as PID 1 of namespaces made here, driven through
 * core/vm/channel. Each test runs twice: with cgroups and without (then with the agent's
 * supervisor); an ordinary user, who owns no cgroup, has only the second. Needs busybox-static, and
 * uidmap when not root. */
#include "guest/wire.h"
#include "vm/channel.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cmocka.h>

#define WAIT_MS 60000

static char dir[64];         /* scratch */
static char agent_path[512]; /* the program under test */
static bool with_cgroups;    /* for the running group */

struct rig {
    struct orch_loop *loop;
    struct orch_channel *c;
    pid_t pid; /* parent of the agent; ends with it */
    int hellos, fails;
    uint8_t epoch[16];
    struct orch_err err;
};

/* ---- the guest's namespaces */

#define MUST(call) must((call) >= 0, #call)
static void must(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    _exit(99);
}

static void write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    must(fd >= 0 && orch_write_all(fd, text, strlen(text)) == 0, path);
    close(fd);
}

static void bind_file(const char *from, const char *to)
{
    write_text(to, "");
    must(mount(from, to, NULL, MS_BIND, NULL) == 0, to);
}

static void run_program(const char *const *argv)
{
    pid_t pid = fork();
    if (pid == 0) {
        execv(argv[0], (char *const *)(uintptr_t)argv);
        _exit(127);
    }
    int status = -1;
    must(waitpid(pid, &status, 0) == pid && status == 0, argv[0]);
}

/* PID 1: furnishes a root folder of its own, like that of the base image, and becomes the agent. */
static void become_agent(int port)
{
    int agent = open(agent_path, O_RDONLY | O_CLOEXEC);
    must(agent >= 0, agent_path);
    MUST(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    MUST(mount("tmpfs", dir, "tmpfs", 0, "mode=755"));
    MUST(chdir(dir));
    const char *folders[] = { "bin",       "dev",  "dev/pts", "etc", "home",
                              "home/user", "proc", "sys",     "tmp", "cgroup" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(folders); i++)
        MUST(mkdir(folders[i], 0755));
    MUST(chmod("tmp", 01777));
    MUST(chown("home/user", 1000, 1000));
    bind_file("/bin/busybox", "bin/busybox");
    bind_file("/dev/null", "dev/null");
    bind_file("/dev/zero", "dev/zero");
    MUST(mount("devpts", "dev/pts", "devpts", 0, "newinstance,ptmxmode=0666"));
    MUST(mount("proc", "proc", "proc", 0, NULL));
    MUST(mount("tmpfs", "sys", "tmpfs", 0, "mode=755"));
    MUST(mkdir("sys/fs", 0755));
    MUST(mkdir("sys/fs/cgroup", 0755));
    if (with_cgroups)
        MUST(mount("cgroup2", "sys/fs/cgroup", "cgroup2", 0, NULL));
    write_text("etc/passwd", "root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/"
                             "sh\nlost:x:1001:1001::/nowhere:/bin/sh\n");
    MUST(chroot("."));
    umask(0);
    run_program((const char *const[]){ "/bin/busybox", "--install", "-s", "/bin", NULL });
    char name[] = "agent", flag[] = "--fd", number[] = "3";
    MUST(dup2(agent, 100));
    MUST(dup2(port, 3));
    MUST(close_range(4, 99, 0));
    MUST(close_range(101, ~0U, 0));
    MUST(fcntl(100, F_SETFD, FD_CLOEXEC));
    MUST(setrlimit(RLIMIT_NOFILE, &(struct rlimit){ 1024, 4096 })); /* as the kernel starts PID 1 */
    char *const argv[] = { name, flag, number, NULL }, *const env[] = { NULL };
    execveat(100, "", argv, env, AT_EMPTY_PATH);
    must(false, "execveat");
}

static void write_map(pid_t pid, const char *file, const char *text)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    write_text(path, text);
}

/* Ids 0 to 65534 of the namespace: root's own, or the caller's and its subordinate ones. */
static void map_ids(pid_t pid)
{
    if (geteuid() == 0) {
        write_map(pid, "uid_map", "0 0 65535\n");
        write_map(pid, "gid_map", "0 0 65535\n");
        return;
    }
    char cmd[512];
    snprintf(
        cmd, sizeof cmd,
        "u=$(id -un); for k in u g; do r=$(grep \"^$u:\" /etc/sub${k}id | head -n1 | cut -d: -f2); "
        "new${k}idmap %d 0 $(id -$k) 1 1 $r 65534 || exit 1; done",
        pid);
    must(system(cmd) == 0, "newuidmap (package uidmap, ranges in /etc/subuid and /etc/subgid)");
}

static char cgroup_dir[96]; /* of all agents of a test program that root runs */

static pid_t spawn_agent(int port)
{
    int sync[2];
    char c = 0;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sync), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (with_cgroups) {
            cleanup_free char *own = orch_xasprintf("%s/%d", cgroup_dir, getpid());
            cleanup_free char *procs = orch_xasprintf("%s/cgroup.procs", own);
            MUST(mkdir(own, 0755));
            write_text(procs, "0");
        }
        MUST(unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS |
                     CLONE_NEWNET | CLONE_NEWCGROUP));
        must(write(sync[1], "x", 1) == 1 && read(sync[1], &c, 1) == 1, "the ids are mapped");
        pid_t init = fork();
        MUST(init);
        if (init == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            become_agent(port);
        }
        close_range(3, ~0U, 0); /* above all the host's end of the port */
        int status = 0;
        waitpid(init, &status, 0);
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 0);
    }
    close(sync[1]);
    assert_int_equal(read(sync[0], &c, 1), 1);
    map_ids(pid);
    assert_int_equal(write(sync[0], "x", 1), 1);
    close(sync[0]);
    return pid;
}

static void on_hello(void *ud, const uint8_t epoch[16])
{
    struct rig *r = ud;
    r->hellos++;
    memcpy(r->epoch, epoch, 16);
}

static void on_failed(void *ud, const struct orch_err *err)
{
    struct rig *r = ud;
    r->fails++;
    r->err = *err;
}

static void run_until(struct rig *r, const int *n, int want)
{
    int64_t end = orch_now_us() + WAIT_MS * 1000;
    while (*n < want && !r->fails && orch_now_us() < end)
        orch_loop_step(r->loop, 50);
    if (*n < want)
        fail_msg("waited in vain; channel: %s", r->fails ? r->err.msg : "fine");
}

static int port_bytes; /* what the agent's socket takes before it must wait; 0: as it comes */

static void rig_init(struct rig *r)
{
    int p[2];
    struct orch_err err;
    *r = (struct rig){ 0 };
    r->loop = orch_loop_new(&err);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, p), 0);
    if (port_bytes)
        assert_int_equal(setsockopt(p[1], SOL_SOCKET, SO_SNDBUF, &port_bytes, sizeof port_bytes),
                         0);
    r->pid = spawn_agent(p[1]);
    close(p[1]);
    r->c = orch_channel_new(r->loop, p[0], &(struct orch_channel_cb){ on_hello, on_failed, r });
    run_until(r, &r->hellos, 1);
}

/* The agent ends when its port closes, and everything in its namespace with it. */
static void rig_fini(struct rig *r)
{
    int status;
    orch_channel_free(r->c);
    orch_loop_free(r->loop);
    assert_int_equal(waitpid(r->pid, &status, 0), r->pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* ---- commands */

struct cmd {
    struct rig *rig;
    struct orch_exec *x;
    struct orch_buf out, err;
    int done;
    struct orch_exec_result r;
    const char *in; /* what is still to be written to stdin; the end follows */
    size_t n_in;
    bool discard;
    uint64_t discarded;
};

static void feed(void *ud)
{
    struct cmd *c = ud;
    if (c->n_in) {
        size_t n = orch_exec_write(c->x, c->in, c->n_in);
        c->in += n;
        c->n_in -= n;
        if (!c->n_in)
            orch_exec_close_stdin(c->x);
    }
}

static void on_output(void *ud, int stream, struct orch_slice b)
{
    struct cmd *c = ud;
    c->discarded += b.n;
    if (!c->discard)
        orch_buf_slice(stream == 1 ? &c->out : &c->err, b);
}

static void on_done(void *ud, const struct orch_exec_result *r, const struct orch_err *err)
{
    struct cmd *c = ud;
    c->done++;
    if (r)
        c->r = *r;
    (void)err;
}

static void cmd_free(struct cmd *c)
{
    orch_buf_free(&c->out);
    orch_buf_free(&c->err);
}
#define cleanup_cmd ORCH_CLEANUP(cmd_free)

static void start(struct rig *r, struct cmd *c, struct orch_exec_opts o)
{
    struct orch_err err;
    c->rig = r;
    o.stdin_open |= c->in != NULL;
    o.output = on_output;
    o.drained = feed;
    o.done = on_done;
    o.ud = c;
    c->x = orch_exec_start(r->c, &o, &err);
    assert_non_null(c->x);
    if (c->in && !c->n_in)
        orch_exec_close_stdin(c->x);
    feed(c);
}

static void run(struct rig *r, struct cmd *c, struct orch_exec_opts o)
{
    c->done = 0;
    start(r, c, o);
    run_until(r, &c->done, 1);
    orch_buf_str(&c->out, "");
    orch_buf_str(&c->err, "");
}

/* `sh -c SCRIPT` as `user`; its output, after checking that it ended with 0. */
static char *sh(struct rig *r, const char *user, const char *script)
{
    cleanup_cmd struct cmd c = { 0 };
    run(r, &c,
        (struct orch_exec_opts){ .argv = (const char *const[]){ "sh", "-c", script, NULL },
                                 .user = user });
    if (c.r.fail || c.r.status)
        fail_msg("%s: status %d signal %d fail %d errno %d: %s%s", script, c.r.status, c.r.signal,
                 c.r.fail, c.r.sys_errno, c.out.p, c.err.p);
    return orch_steal_ptr(&c.out.p);
}

static void expect(struct rig *r, const char *user, const char *script, const char *output)
{
    cleanup_free char *out = sh(r, user, script);
    assert_string_equal(out, output);
}

#define SH(script) \
    (const char *const[]) \
    { \
        "sh", "-c", script, NULL \
    }
#define ARGV(...) \
    (const char *const[]) \
    { \
        __VA_ARGS__, NULL \
    }
/* Every process but PID 1, kernel threads, the supervisors and this command itself. */
#define OTHERS \
    "for p in /proc/[0-9]*; do read -r c <$p/cmdline; case \"$c\" in agent*|sh-c*|'') ;; *) echo " \
    "\"$c\" ;; esac; done 2>/dev/null; true"

static void test_results(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    cleanup_cmd struct cmd c = { 0 };
    run(&r, &c, (struct orch_exec_opts){ .argv = SH("echo out; echo err >&2; exit 7") });
    assert_string_equal(c.out.p, "out\n");
    assert_string_equal(c.err.p, "err\n");
    assert_int_equal(c.r.status, 7);
    assert_int_equal(c.r.fail, 0);
    run(&r, &c, (struct orch_exec_opts){ .argv = SH("kill -SEGV $$") });
    assert_int_equal(c.r.status, -1);
    assert_int_equal(c.r.signal, SIGSEGV);

    static const struct {
        const char *argv0, *cwd, *user;
        int fail, error, status;
    } t[] = {
        { "nope", NULL, NULL, ORCH_WIRE_FAIL_NOT_FOUND, ENOENT, 127 },
        { "/nope/nope", NULL, NULL, ORCH_WIRE_FAIL_NOT_FOUND, ENOENT, 127 },
        { "/etc/passwd", NULL, NULL, ORCH_WIRE_FAIL_NOT_EXECUTABLE, EACCES, 127 },
        { "/etc", NULL, NULL, ORCH_WIRE_FAIL_NOT_EXECUTABLE, EACCES, 127 },
        { "true", "/nope", NULL, ORCH_WIRE_FAIL_CWD, ENOENT, 127 },
        { "true", "/etc/passwd", NULL, ORCH_WIRE_FAIL_CWD, ENOTDIR, 127 },
        { "true", NULL, "nobody", ORCH_WIRE_FAIL_USER, ENOENT, 0 },
        { "true", NULL, "", ORCH_WIRE_FAIL_USER, ENOENT, 0 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(t); i++) {
        run(&r, &c,
            (struct orch_exec_opts){
                .argv = ARGV(t[i].argv0), .cwd = t[i].cwd, .user = t[i].user });
        assert_int_equal(c.r.fail, t[i].fail);
        assert_int_equal(c.r.sys_errno, t[i].error);
        assert_int_equal(c.r.status, t[i].status);
    }
    rig_fini(&r);
}

static void test_environment(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    expect(&r, NULL, "id -u; id -G; pwd; umask; env | grep -v SHLVL | grep -v PWD | sort",
           "1000\n1000\n/home/user\n0022\nHOME=/home/user\nLANG=C.UTF-8\n"
           "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nUSER=user\n");
    expect(&r, "user", "id -u", "1000\n");
    expect(&r, "root", "id -u; id -G; pwd", "0\n0\n/\n");
    expect(&r, "lost", "pwd", "/\n"); /* a home that is not there */
    expect(&r, "4242", "id -u; id -g; pwd; echo $HOME", "4242\n4242\n/\n/\n");
    /* Nothing of the agent's: descriptors, blocked or ignored signals, session, terminal. */
    expect(&r, NULL, "ls /proc/self/fd | head -n 3 | tr '\\n' ' '; ls /proc/self/fd | wc -l",
           "0 1 2 4\n");
    expect(&r, NULL, "grep -E 'Sig(Blk|Ign|Cgt)' /proc/self/status | cut -f2 | sort -u",
           "0000000000000000\n");
    expect(&r, NULL, "ulimit -n", "1024\n");
    expect(&r, NULL, "cut -d' ' -f6 /proc/$$/stat | grep -q \"^$$\\$\" && echo leader", "leader\n");
    expect(&r, NULL, "readlink /proc/self/fd/0", "/dev/null\n");

    cleanup_cmd struct cmd c = { 0 };
    run(&r, &c,
        (struct orch_exec_opts){ .argv = SH("echo $HOME,$PATH,$X,$LANG; pwd"),
                                 .cwd = "/tmp",
                                 .env = ARGV("PATH=/bin", "HOME=/h", "X=a b", "LANG=") });
    assert_string_equal(c.out.p, "/h,/bin,a b,\n/tmp\n");
    cmd_free(&c);
    c = (struct cmd){ 0 };
    run(&r, &c,
        (struct orch_exec_opts){ .argv = ARGV("cat", "/proc/self/personality"), .no_aslr = true });
    assert_string_equal(c.out.p, "00040000\n");
    rig_fini(&r);
}

static void test_stdin(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    enum { N = 1 << 20 };
    cleanup_free char *data = orch_xmalloc(N);
    orch_random(data, N);
    {
        cleanup_cmd struct cmd c = { .in = data, .n_in = N };
        run(&r, &c, (struct orch_exec_opts){ .argv = ARGV("cat") });
        assert_int_equal(c.out.n, N);
        assert_memory_equal(c.out.p, data, N);
    }
    { /* the reader goes away: what is left is taken and thrown away */
        cleanup_cmd struct cmd c = { .in = data, .n_in = N };
        run(&r, &c, (struct orch_exec_opts){ .argv = ARGV("head", "-c", "10") });
        assert_int_equal(c.r.status, 0);
        assert_int_equal(c.out.n, 10);
    }
    {
        cleanup_cmd struct cmd c = { .in = data, .n_in = N };
        run(&r, &c,
            (struct orch_exec_opts){
                .argv = SH("exec <&-; while ! [ -e /tmp/go ]; do sleep 0.01; done; echo late"),
                .timeout_ms = 200 });
        assert_true(c.r.timed_out);
        assert_int_equal(c.n_in, 0); /* all of it was taken although nobody read it */
    }
    {
        cleanup_cmd struct cmd c = { .in = "", .n_in = 0 };
        run(&r, &c, (struct orch_exec_opts){ .argv = ARGV("cat") });
        assert_int_equal(c.out.n, 0);
        assert_int_equal(c.r.status, 0);
    }
    rig_fini(&r);
}

static void test_output(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    {
        cleanup_cmd struct cmd c = { 0 };
        run(&r, &c,
            (struct orch_exec_opts){
                .argv = SH("head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2") });
        assert_int_equal(c.out.n, 3000000);
        assert_int_equal(c.err.n, 2000000);
    }
    {
        cleanup_cmd struct cmd c = { 0 };
        run(&r, &c,
            (struct orch_exec_opts){
                .argv = SH("head -c 1000000 /dev/zero; head -c 999 /dev/zero >&2"),
                .max_output = 1000 });
        assert_int_equal(c.r.status, 0);
        assert_int_equal(c.out.n, 1000);
        assert_int_equal(c.err.n, 999);
        assert_true(c.r.cut_stdout && !c.r.cut_stderr);
        assert_int_equal(c.r.dropped_stdout, 999000);
        assert_int_equal(c.r.dropped_stderr, 0);
    }
    { /* a host that does not read: the writer stands still, and nothing is lost */
        cleanup_cmd struct cmd c = { 0 }, probe = { 0 };
        start(&r, &c,
              (struct orch_exec_opts){
                  .argv = SH("echo x; head -c 20000000 /dev/zero; echo done >/tmp/done") });
        while (!c.out.n)
            orch_loop_step(r.loop, 50);
        orch_channel_pause(r.c, true);
        start(
            &r, &probe,
            (struct orch_exec_opts){
                .argv = SH(
                    "sleep 0.3; ls /tmp/done >/tmp/seen 2>&-; echo >/tmp/looked; cat /tmp/seen") });
        cleanup_free char *looked = orch_xasprintf("/proc/%d/root%s/tmp/looked", r.pid, dir);
        for (int64_t end = orch_now_us() + WAIT_MS * 1000; access(looked, F_OK) < 0;
             assert_true(orch_now_us() < end))
            orch_loop_step(r.loop, 10);
        assert_int_equal(c.done, 0);
        orch_channel_pause(r.c, false);
        run_until(&r, &c.done, 1);
        run_until(&r, &probe.done, 1);
        assert_int_equal(c.out.n, 20000002);
        assert_int_equal(probe.out.n, 0); /* when probe looked, the writer had not ended */
    }
    rig_fini(&r);
}

static void test_fairness(void **state)
{
    (void)state;
    struct rig r;
    port_bytes = 16384; /* a slow port, so that the agent's buffer is full all the time */
    rig_init(&r);
    port_bytes = 0;
    enum { N = 16 }; /* more than fit into that buffer at once */
    struct cmd flood[N] = { 0 };
    for (int i = 0; i < N; i++) {
        flood[i].discard = true;
        start(&r, &flood[i],
              (struct orch_exec_opts){ .argv = i % 2 ? ARGV("yes") : SH("yes >&2") });
    }
    for (int i = 0; i < 3; i++) {
        uint64_t before[N];
        expect(&r, NULL, "echo through", "through\n");
        for (int k = 0; k < N; k++)
            before[k] = flood[k].discarded;
        for (int k = 0; k < N; k++) {
            int64_t end = orch_now_us() + WAIT_MS * 1000;
            while (flood[k].discarded == before[k] && orch_now_us() < end) {
                orch_loop_step(r.loop, 50);
                usleep(1000); /* a slow host, too: each program always has more than fits */
            }
            assert_true(flood[k].discarded > before[k]);
        }
    }
    for (int i = 0; i < N; i++) {
        orch_exec_signal(flood[i].x, SIGINT);
        run_until(&r, &flood[i].done, 1);
        assert_int_equal(flood[i].r.signal, SIGINT);
    }
    rig_fini(&r);
}

static void test_timeout(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    cleanup_cmd struct cmd c = { 0 };
    run(&r, &c, (struct orch_exec_opts){ .argv = ARGV("sleep", "1000"), .timeout_ms = 100 });
    assert_true(c.r.timed_out);
    assert_int_equal(c.r.signal, SIGTERM);
    assert_true(c.r.ms >= 100);
    run(&r, &c,
        (struct orch_exec_opts){ .argv = SH("trap '' TERM; while :; do sleep 0.1; done"),
                                 .timeout_ms = 1000 });
    assert_true(c.r.timed_out);
    assert_int_equal(c.r.signal, SIGKILL);
    assert_true(c.r.ms >= 3000);
    /* TERM reaches the whole tree, and what ignores it in a session of its own is killed all the
     * same. */
    run(&r, &c,
        (struct orch_exec_opts){ .argv = SH("setsid sh -c 'trap \"\" TERM; sleep 1001 & wait; "
                                            "sleep 1002' & trap 'echo bye; exit 3' TERM; wait"),
                                 .timeout_ms = 2000 });
    assert_int_equal(c.r.status, 3);
    assert_true(c.r.timed_out);
    assert_string_equal(c.out.p, "bye\n");
    expect(&r, NULL, OTHERS, "");
    rig_fini(&r);
}

static void test_nothing_stays_behind(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    /* A background child that holds the output, and daemons that hold nothing. */
    expect(&r, NULL, "sleep 1000 & echo a", "a\n");
    expect(&r, NULL,
           "(setsid sh -c 'sleep 1000; echo late' &); (trap '' TERM HUP; setsid sleep 1001 "
           "</dev/null >/dev/null 2>&1 &); echo b",
           "b\n");
    expect(&r, NULL,
           "for i in 1 2 3 4 5 6 7 8; do (setsid sh -c 'sleep 1000 & sleep 1000' &) ; done; echo c",
           "c\n");
    expect(&r, NULL, OTHERS, "");
    expect(&r, NULL, "ps -o stat | grep -c Z; true", "0\n");
    /* What was written before the end arrives, also from a child that dies with the command. */
    cleanup_free char *out = sh(&r, NULL,
                                "mkfifo /tmp/up; (echo a; echo >/tmp/up; yes) & read x </tmp/up");
    assert_true(strlen(out) > 0);
    rig_fini(&r);
}

static void test_drop_and_signal(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    struct cmd c = { 0 };
    start(&r, &c,
          (struct orch_exec_opts){
              .argv = SH("(trap '' TERM; setsid sleep 1000 &) ; echo up; sleep 1000") });
    while (!c.out.n)
        orch_loop_step(r.loop, 50);
    orch_exec_drop(c.x);
    cmd_free(&c);
    expect(&r, NULL,
           "while :; do n=$(" OTHERS
           "); case \"$n\" in *sleep1000*) ;; *) break ;; esac; done; echo gone",
           "gone\n");
    assert_int_equal(c.done, 0);

    /* A signal goes to the whole tree. */
    cleanup_cmd struct cmd s = { 0 };
    start(&r, &s,
          (struct orch_exec_opts){
              .argv = SH(
                  "sh -c 'trap \"echo child; exit\" USR1; echo up; while :; do sleep 0.01; done' & "
                  "trap 'echo parent' USR1; wait; wait; exit 5") });
    while (!s.out.n)
        orch_loop_step(r.loop, 50);
    orch_exec_signal(s.x, SIGUSR1);
    run_until(&r, &s.done, 1);
    orch_buf_str(&s.out, "");
    assert_non_null(strstr(s.out.p, "child\n"));
    assert_non_null(strstr(s.out.p, "parent\n"));
    assert_int_equal(s.r.status, 5);
    rig_fini(&r);
}

static void test_terminal(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    cleanup_cmd struct cmd c = { .in = "hello\n", .n_in = 6 };
    start(&r, &c,
          (struct orch_exec_opts){
              .argv = SH("tty; stty size; stty -echo; echo ready; cat; trap 'stty size; exit 4' "
                         "WINCH; echo wait; while :; do sleep 0.01; done"),
              .pty = true });
    int64_t end = orch_now_us() + WAIT_MS * 1000;
    while (!(c.out.p && strstr(c.out.p, "wait")) && orch_now_us() < end)
        orch_loop_step(r.loop, 50);
    orch_exec_resize(c.x, 40, 100);
    run_until(&r, &c.done, 1);
    assert_int_equal(c.r.status, 4);
    assert_non_null(strstr(c.out.p, "/dev/pts/"));
    assert_non_null(strstr(c.out.p, "24 80"));
    assert_non_null(strstr(c.out.p, "hello\r\n"));
    assert_non_null(strstr(c.out.p, "40 100"));
    assert_int_equal(c.err.n, 0);
    rig_fini(&r);
}

static void test_many(void **state)
{
    (void)state;
    enum { N = 256 };
    struct rig r;
    rig_init(&r);
    struct cmd *c = orch_xcalloc(N, sizeof *c);
    for (int i = 0; i < N; i++) {
        char text[32];
        snprintf(text, sizeof text, "echo %d; cat", i);
        c[i].in = "in";
        c[i].n_in = 2;
        start(&r, &c[i], (struct orch_exec_opts){ .argv = SH(text) });
    }
    for (int i = 0; i < N; i++) {
        char text[32];
        run_until(&r, &c[i].done, 1);
        snprintf(text, sizeof text, "%d\nin", i);
        assert_int_equal(c[i].r.fail, 0);
        assert_string_equal(c[i].out.p, text);
        cmd_free(&c[i]);
    }
    free(c);
    expect(&r, NULL, "echo again", "again\n");
    rig_fini(&r);
}

/* ---- files */

struct file {
    int done;
    struct orch_buf data;
    struct orch_err err;
};

static void on_file(void *ud, struct orch_slice d, const struct orch_err *err)
{
    struct file *f = ud;
    f->done = 1;
    f->data.n = 0;
    orch_buf_str(&f->data, "");
    orch_buf_slice(&f->data, d);
    f->err = err ? *err : (struct orch_err){ 0 };
}

static int write_file(struct rig *r, struct file *f, const char *path, struct orch_slice data,
                      mode_t mode)
{
    f->done = 0;
    orch_channel_write_file(r->c, path, data, mode, on_file, f);
    run_until(r, &f->done, 1);
    return f->err.code;
}

static int read_file(struct rig *r, struct file *f, const char *path, uint64_t offset,
                     uint64_t length)
{
    f->done = 0;
    orch_channel_read_file(r->c, path, offset, length, 16 << 20, on_file, f);
    run_until(r, &f->done, 1);
    return f->err.code;
}

static int list_dir(struct rig *r, struct file *f, const char *path)
{
    f->done = 0;
    orch_channel_list_dir(r->c, path, on_file, f);
    run_until(r, &f->done, 1);
    return f->err.code;
}

static void test_files(void **state)
{
    (void)state;
    enum { N = 3000000 };
    struct rig r;
    struct file f = { 0 };
    rig_init(&r);
    cleanup_free char *data = orch_xmalloc(N);
    orch_random(data, N);
    assert_int_equal(write_file(&r, &f, "/tmp/big", (struct orch_slice){ data, N }, 0640), 0);
    expect(&r, "root", "stat -c '%a %u %g %s' /tmp/big; ls -A /tmp",
           "640 1000 1000 3000000\nbig\n");
    assert_int_equal(read_file(&r, &f, "/tmp/big", 0, 0), 0);
    assert_int_equal(f.data.n, N);
    assert_memory_equal(f.data.p, data, N);
    assert_int_equal(read_file(&r, &f, "/tmp/big", 1000, 70000), 0);
    assert_int_equal(f.data.n, 70000);
    assert_memory_equal(f.data.p, data + 1000, 70000);
    assert_int_equal(read_file(&r, &f, "/tmp/big", N - 5, 100), 0);
    assert_int_equal(f.data.n, 5);
    assert_int_equal(read_file(&r, &f, "/tmp/big", N + 5, 0), 0);
    assert_int_equal(f.data.n, 0);
    assert_int_equal(read_file(&r, &f, "/tmp/big", UINT64_MAX, 0), EINVAL);
    assert_int_equal(write_file(&r, &f, "/tmp/big", (struct orch_slice){ "", 0 }, 04755), 0);
    expect(&r, NULL, "stat -c '%a %s' /tmp/big", "4755 0\n");

    /* What is no regular file is refused, and never waited for. */
    expect(&r, NULL, "mkfifo /tmp/fifo; mkdir /tmp/d; ln -s big /tmp/link; ln -s fifo /tmp/flink",
           "");
    assert_int_equal(read_file(&r, &f, "/tmp/fifo", 0, 0), EINVAL);
    assert_int_equal(read_file(&r, &f, "/tmp/flink", 0, 0), EINVAL);
    assert_int_equal(read_file(&r, &f, "/dev/zero", 0, 0), EINVAL);
    assert_int_equal(read_file(&r, &f, "/tmp", 0, 0), EISDIR);
    assert_int_equal(read_file(&r, &f, "/tmp/none", 0, 0), ENOENT);
    assert_int_equal(read_file(&r, &f, "", 0, 0), ENOENT);
    assert_int_equal(write_file(&r, &f, "/tmp/fifo", ORCH_SLICE("x"), 0644), EINVAL);
    assert_int_equal(write_file(&r, &f, "/dev/null", ORCH_SLICE("x"), 0644), EINVAL);
    assert_int_equal(write_file(&r, &f, "/tmp/d", ORCH_SLICE("x"), 0644), EISDIR);
    assert_int_equal(write_file(&r, &f, "/tmp/none/x", ORCH_SLICE("x"), 0644), ENOENT);
    assert_int_equal(list_dir(&r, &f, "/tmp/fifo"), ENOTDIR);
    assert_int_equal(list_dir(&r, &f, "/tmp/none"), ENOENT);
    cleanup_free char *path = orch_xcalloc(1, 9001);
    memset(path, 'p', 9000);
    assert_int_equal(read_file(&r, &f, path, 0, 0), ENAMETOOLONG);
    assert_int_equal(read_file(&r, &f, "/proc/version", 0, 0), 0); /* regular, of unknown size */
    assert_true(f.data.n > 10);

    /* A link is replaced, not followed. */
    assert_int_equal(write_file(&r, &f, "/tmp/link", ORCH_SLICE("new"), 0644), 0);
    expect(&r, NULL, "cat /tmp/link; stat -c %s /tmp/big; ls -A /tmp | tr '\\n' ' '",
           "new0\nbig d fifo flink link ");
    expect(&r, NULL, "touch -d @1700000000 /tmp/link", "");
    assert_int_equal(list_dir(&r, &f, "/tmp"), 0);
    char lines[512] = "";
    for (const char *p = f.data.p; p < f.data.p + f.data.n; p += strlen(p) + 1)
        if (strstr(p, " link"))
            snprintf(lines, sizeof lines, "%s", p);
    assert_string_equal(lines, "f 0644 3 1700000000 link");
    assert_int_equal(list_dir(&r, &f, "/tmp/d"), 0);
    assert_int_equal(f.data.n, 0);
    expect(&r, NULL, "cd /tmp/d; seq 5000 | xargs touch", "");
    assert_int_equal(list_dir(&r, &f, "/tmp/d"), 0);
    int n = 0;
    for (const char *p = f.data.p; p < f.data.p + f.data.n; p += strlen(p) + 1)
        n++;
    assert_int_equal(n, 5000);

    /* Given up half-way: nothing stays behind. */
    struct orch_fileop *w = orch_channel_write_file(r.c, "/tmp/half",
                                                    (struct orch_slice){ data, N }, 0644, on_file,
                                                    &f);
    orch_fileop_drop(w);
    expect(&r, NULL, "ls -A /tmp | tr '\\n' ' '", "big d fifo flink link ");
    orch_buf_free(&f.data);
    rig_fini(&r);
}

/* ---- the agent itself */

static void test_restore(void **state)
{
    (void)state;
    struct rig r;
    uint8_t epoch[16] = "fifteen letters";
    rig_init(&r);
    assert_memory_equal(r.epoch, (uint8_t[16]){ 0 }, 16);
    orch_channel_restore(r.c, epoch);
    run_until(&r, &r.hellos, 2);
    assert_memory_equal(r.epoch, epoch, 16);
    expect(&r, NULL, "while [ -n \"$(" OTHERS ")\" ]; do :; done; echo quiet", "quiet\n");
    assert_int_equal(r.fails, 0);
    rig_fini(&r);
}

/* What a broken host sends: the agent ends, cleanly and at once. */
static void test_protocol_errors(void **state)
{
    (void)state;
    static const struct {
        size_t n;
        const char *bytes;
    } t[] = {
#define B(s) { sizeof(s) - 1, s }
#define ZEROS24 "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        B("\xff\xff\xff\xff\1\0\0\0\2\0\0\0"), /* length */
        B("\0\0\0\0\1\0\0\0\2\0\0\1"),         /* reserved byte */
        B("\0\0\0\0\1\0\0\0\0\0\0\0"),         /* type 0 */
        B("\0\0\0\0\1\0\0\0\x40\0\0\0"),       /* a guest's type */
        B("\0\0\0\0\0\0\0\0\2\0\0\0"),         /* EXEC of id 0 */
        B("\0\0\0\0\1\0\0\0\x0a\0\0\0"),       /* no type */
        B("\4\0\0\0\1\0\0\0\2\0\0\0abcd"),     /* EXEC too short */
        /* EXEC counts */
        B("\x22\0\0\0\1\0\0\0\2\0\0\0"
          "\0\0\0\0"
          "\xff\xff\xff\xff" ZEROS24 "\0\0"),
        B("\x22\0\0\0\1\0\0\0\2\0\0\0"
          "\0\0\0\0"
          "\2\0\0\0" ZEROS24 "\0\0"),          /* EXEC strings */
        B("\4\0\0\0\0\0\0\0\1\0\0\0abcd"),     /* RESTORE too short */
        B("\4\0\0\0\1\0\0\0\4\0\0\0\0\0\0\0"), /* signal 0 */
        B("\1\0\0\0\1\0\0\0\5\0\0\0x"),        /* WRITE too short */
#undef B
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(t); i++) {
        int p[2], status;
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, p), 0);
        fflush(stderr);
        pid_t pid = spawn_agent(p[1]);
        close(p[1]);
        char b[256];
        assert_int_equal(read(p[0], b, sizeof b),
                         sizeof(struct orch_wire_head) + sizeof(struct orch_wire_hello));
        assert_int_equal(send(p[0], t[i].bytes, t[i].n, MSG_NOSIGNAL), t[i].n);
        struct pollfd pfd = { .fd = p[0], .events = POLLIN };
        assert_int_equal(poll(&pfd, 1, WAIT_MS), 1);
        assert_true(recv(p[0], b, sizeof b, 0) <= 0); /* no answer, only the end */
        assert_int_equal(waitpid(pid, &status, 0), pid);
        close(p[0]);
    }
}

static void test_refuses_elsewhere(void **state)
{
    (void)state;
    cleanup_free char *cmd = orch_xasprintf("%s --fd 0 </dev/null 2>/dev/null", agent_path);
    int status = system(cmd);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 2);
}

/* ---- groups */

static int make_cgroup(void)
{
    /* A mount namespace of this process alone, so that nothing but the folder is left behind. */
    char mount_dir[80];
    snprintf(mount_dir, sizeof mount_dir, "%s-cgroup", dir);
    snprintf(cgroup_dir, sizeof cgroup_dir, "%s/orch-test-%d", mount_dir, getpid());
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mkdir(mount_dir, 0755) < 0 || mount("cgroup2", mount_dir, "cgroup2", 0, NULL) < 0 ||
        mkdir(cgroup_dir, 0755) < 0) {
        perror("a cgroup for the test");
        return -1;
    }
    return 0;
}

static int remove_cgroup(void **state)
{
    (void)state;
    char cmd[512];
    snprintf(cmd, sizeof cmd,
             "find %s -depth -type d -exec rmdir {} + && umount %s-cgroup && rmdir %s-cgroup",
             cgroup_dir, dir, dir);
    return system(cmd);
}

int main(void)
{
    ssize_t n = readlink("/proc/self/exe", agent_path, sizeof agent_path - 1);
    char *slash = n > 0 ? strrchr(agent_path, '/') : NULL;
    if (!slash)
        return 1;
    snprintf(slash, sizeof agent_path - (size_t)(slash - agent_path), "/../agent");
    if (access(agent_path, X_OK) < 0) {
        fprintf(stderr, "%s: %s: make VARIANT=asan build/asan/agent\n", agent_path,
                strerror(errno));
        return 1;
    }
    strcpy(dir, "/tmp/orch-test-agent-XXXXXX");
    if (!mkdtemp(dir))
        return 1;
#define TEST(fn) \
    { \
#fn " " KIND, fn, NULL, NULL, NULL \
    }
#define ALL \
    TEST(test_results), TEST(test_environment), TEST(test_stdin), TEST(test_output), \
        TEST(test_fairness), TEST(test_timeout), TEST(test_nothing_stays_behind), \
        TEST(test_drop_and_signal), TEST(test_terminal), TEST(test_many), TEST(test_files), \
        TEST(test_restore), TEST(test_protocol_errors)
#define KIND "with supervisor"
    const struct CMUnitTest plain[] = { cmocka_unit_test(test_refuses_elsewhere), ALL };
#undef KIND
#define KIND "with cgroups"
    const struct CMUnitTest cgroups[] = { ALL };
    int failed = cmocka_run_group_tests(plain, NULL, NULL);
    if (geteuid() == 0) {
        with_cgroups = true;
        failed += make_cgroup() < 0 ? 1 : cmocka_run_group_tests(cgroups, NULL, remove_cgroup);
    }
    rmdir(dir);
    return failed;
}
