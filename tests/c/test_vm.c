/* core/vm against real microVMs: QEMU, emulated. Needs root (namespaces of its own for broken file
 * systems and devices) and, once, the network for Debian's kernel; images and templates stay in
 * ORCH_TEST_CACHE or build/test-cache. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <libgen.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>

#include <cmocka.h>

#include "base/hash.h"
#include "base/log.h"
#include "vm/accel.h"
#include "vm/frozen.h"
#include "vm/rundir.h"
#include "vm/vm.h"

#define START_MS 180000 /* the first start of all downloads a kernel */

static char build_dir[512], launcher[600], agent[600], cache[4096], work[64];
static struct orch_loop *loop;

/* ---- a bed: one manager, and what its microVMs said */

struct bed {
    struct orch_vms *m;
    char run_dir[128], cache_dir[4096];
    struct orch_buf events, progress, log;
};

struct guest {
    struct orch_vm *vm;
    bool ready, failed, lost;
    struct orch_err err;
};

struct command {
    bool done;
    int status, signal;
    struct orch_buf out;
    struct orch_err err;
    bool failed;
};

static struct orch_buf *log_text;

static void log_line(void *ud, const char *line, size_t n)
{
    (void)ud;
    if (log_text) {
        orch_buf_add(log_text, line, n);
        orch_buf_char(log_text, '\n');
    }
}

static void on_event(void *ud, const char *event, struct orch_slice fields)
{
    struct bed *b = ud;
    orch_buf_printf(&b->events, "%s %.*s\n", event, (int)fields.n, fields.p);
}

static void on_progress(void *ud, const char *line)
{
    struct bed *b = ud;
    orch_buf_printf(&b->progress, "%s\n", line);
}

static struct orch_vms_opts bed_opts(struct bed *b)
{
    return (struct orch_vms_opts){
        .launcher_path = launcher,
        .agent_path = agent,
        .cache_dir = b->cache_dir,
        .runtime_dir = b->run_dir,
        .max = 16,
        .progress = on_progress,
        .event = on_event,
        .ud = b,
    };
}

static void bed_init(struct bed *b)
{
    static int number;
    memset(b, 0, sizeof *b);
    snprintf(b->run_dir, sizeof b->run_dir, "%s/run-%d-%d", work, getpid(), number++);
    snprintf(b->cache_dir, sizeof b->cache_dir, "%s", cache);
    log_text = &b->log;
}

static void bed_open(struct bed *b, const struct orch_vms_opts *o)
{
    struct orch_err err = { 0 };
    b->m = orch_vms_new(loop, o, &err);
    if (!b->m)
        fail_msg("%s", err.msg);
}

static size_t entries(const char *dir, const char *prefix)
{
    DIR *d = opendir(dir);
    size_t n = 0;
    for (struct dirent *e; d && (e = readdir(d));)
        n += strncmp(e->d_name, prefix, strlen(prefix)) == 0 && e->d_name[0] != '.';
    if (d)
        closedir(d);
    return n;
}

static void bed_close(struct bed *b)
{
    orch_vms_free(b->m);
    assert_int_equal(entries(b->run_dir, "vm-") + entries(b->run_dir, "template-"), 0);
    orch_buf_free(&b->events);
    orch_buf_free(&b->progress);
    orch_buf_free(&b->log);
    log_text = NULL;
}

static void on_ready(void *ud, struct orch_vm *vm, const struct orch_err *err)
{
    struct guest *g = ud;
    assert_ptr_equal(vm, g->vm);
    assert_false(g->ready || g->failed);
    if (err) {
        g->failed = true;
        g->err = *err;
    } else {
        g->ready = true;
    }
}

static void on_lost(void *ud, struct orch_vm *vm, const struct orch_err *err)
{
    struct guest *g = ud;
    assert_ptr_equal(vm, g->vm);
    assert_true(g->ready && !g->lost);
    g->lost = true;
    g->err = *err;
}

static struct orch_vm_opts guest_opts(struct guest *g)
{
    return (struct orch_vm_opts){ .accel = "tcg", .ready = on_ready, .lost = on_lost, .ud = g };
}

static void spawn(struct bed *b, struct guest *g, const struct orch_vm_opts *o)
{
    struct orch_err err = { 0 };
    g->vm = orch_vm_spawn(b->m, o, &err);
    if (!g->vm)
        fail_msg("%s", err.msg);
    assert_false(g->ready || g->failed); /* never from inside spawn */
}

#define WAIT_FOR(cond) \
    do { \
        int64_t until_ = orch_now_us() / 1000 + START_MS; \
        while (!(cond) && orch_now_us() / 1000 < until_) \
            orch_loop_step(loop, 100); \
        if (!(cond)) \
            fail_msg("%s: waited in vain", #cond); \
    } while (0)

static void start_with(struct bed *b, struct guest *g, const struct orch_vm_opts *o)
{
    spawn(b, g, o);
    WAIT_FOR(g->ready || g->failed);
    if (g->failed)
        fail_msg("%s", g->err.msg);
}

static void start(struct bed *b, struct guest *g)
{
    memset(g, 0, sizeof *g);
    struct orch_vm_opts o = guest_opts(g);
    start_with(b, g, &o);
}

static void start_failing(struct bed *b, struct guest *g, const struct orch_vm_opts *o)
{
    spawn(b, g, o);
    WAIT_FOR(g->ready || g->failed);
    assert_true(g->failed);
}

static void on_output(void *ud, int stream, struct orch_slice bytes)
{
    struct command *c = ud;
    (void)stream;
    orch_buf_slice(&c->out, bytes);
}

static void on_done(void *ud, const struct orch_exec_result *r, const struct orch_err *err)
{
    struct command *c = ud;
    c->done = true;
    c->failed = err != NULL;
    if (err)
        c->err = *err;
    else
        c->status = r->fail ? 1000 + r->fail : r->status;
}

static void run_start(struct guest *g, struct command *c, const char *script, const char *user)
{
    const char *argv[] = { "/bin/sh", "-c", script, NULL };
    struct orch_exec_opts o = { .argv = argv,
                                .user = user,
                                .no_aslr = orch_vm_no_aslr(g->vm),
                                .max_output = 1 << 20,
                                .output = on_output,
                                .done = on_done,
                                .ud = c };
    struct orch_err err;
    memset(c, 0, sizeof *c);
    struct orch_channel *channel = orch_vm_channel(g->vm, &err);
    if (!channel || !orch_exec_start(channel, &o, &err))
        fail_msg("%s", err.msg);
}

/* The script's output, in a static buffer. */
static const char *run(struct guest *g, const char *script)
{
    static char out[65536];
    struct command c;
    run_start(g, &c, script, "root");
    WAIT_FOR(c.done);
    if (c.failed)
        fail_msg("%s: %s", script, c.err.msg);
    snprintf(out, sizeof out, "%s", c.out.p ? c.out.p : "");
    orch_buf_free(&c.out);
    if (c.status != 0)
        fail_msg("%s: status %d: %s", script, c.status, out);
    return out;
}

static void assert_contains(const char *text, const char *part)
{
    if (!text || !strstr(text, part))
        fail_msg("\"%s\" is not in:\n%s", part, text ? text : "(nothing)");
}

/* ---- other processes and places */

static pid_t parent_of(pid_t pid, char comm[32])
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "re");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    if (f)
        fclose(f);
    text[n] = 0;
    char *open = strchr(text, '('), *close = strrchr(text, ')');
    int parent = 0;
    if (!open || !close || sscanf(close, ") %*c %d", &parent) != 1)
        return 0;
    snprintf(comm, 32, "%.*s", (int)(close - open - 1), open + 1);
    return parent;
}

/* QEMUs below this process. */
static size_t find_vmms(pid_t *pids, size_t max)
{
    DIR *d = opendir("/proc");
    size_t n = 0;
    for (struct dirent *e; d && (e = readdir(d));) {
        char comm[32], ignored[32];
        pid_t pid = atoi(e->d_name), up = pid > 0 ? parent_of(pid, comm) : 0;
        if (up <= 0 || strncmp(comm, "qemu-system", 11) != 0)
            continue;
        while (up > 1 && up != getpid())
            up = parent_of(up, ignored);
        if (up == getpid() && n < max)
            pids[n++] = pid;
    }
    closedir(d);
    return n;
}

/* Runs fn as a test in a process of its own, with a loop of its own. */
static pid_t child_start(void (*fn)(void))
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!freopen("/dev/null", "w", stdout))
        _exit(99);
    loop = orch_loop_new(NULL);
    cmocka_set_test_filter(NULL);
    const struct CMUnitTest one[] = { { "child", (CMUnitTestFunction)(void (*)(void))fn, NULL, NULL,
                                        NULL } };
    int r = cmocka_run_group_tests_name("child", one, NULL, NULL);
    orch_loop_free(loop);
    fflush(NULL);
    _exit(r ? 1 : 0);
}

static void child_wait(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
}

static void own_mounts(void)
{
    assert_int_equal(unshare(CLONE_NEWNS), 0);
    assert_int_equal(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), 0);
}

/* A cache directory of its own that shares the images. */
static void own_cache(struct bed *b, const char *dir)
{
    char from[4200], to[4200];
    snprintf(b->cache_dir, sizeof b->cache_dir, "%s", dir);
    mkdir(dir, 0700);
    snprintf(from, sizeof from, "%s/images", cache);
    snprintf(to, sizeof to, "%s/images", dir);
    if (symlink(from, to) < 0)
        assert_int_equal(errno, EEXIST);
}

static char *own_path(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", work, name);
    return path;
}

static void write_text(const char *path, const char *text, size_t n, mode_t mode)
{
    assert_int_equal(orch_write_file(AT_FDCWD, path, text, n, mode), 0);
    assert_int_equal(chmod(path, mode), 0);
}

/* ---- life */

static void test_spawn_exec_free(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    assert_int_equal(strlen(orch_vm_id(g.vm)), 11);
    assert_memory_equal(orch_vm_id(g.vm), "vm-", 3);
    assert_string_equal(orch_vm_backend(g.vm), "qemu");
    assert_string_equal(orch_vm_image(g.vm), "base");
    assert_int_equal(orch_vm_isolation(g.vm), ORCH_ISOLATION_EMULATED);
    assert_true(orch_vm_no_aslr(g.vm));
    assert_string_equal(run(&g, "echo hello; id -u"), "hello\n0\n");
    const char *const want[] = { "template", "vmm", "state", "ready", NULL };
    size_t i = 0;
    for (const struct orch_vm_phase *p = orch_vm_phases(g.vm); p->name; p++) {
        for (; want[i] && strcmp(want[i], p->name) != 0; i++)
            ;
        assert_non_null(want[i]);
    }
    assert_true(orch_vm_spawn_ms(g.vm) > 1);
    assert_int_equal(entries(b.run_dir, "vm-"), 1);
    char path[256];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", b.run_dir, orch_vm_id(g.vm));
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0700);
    strcat(path, "/vmm.log");
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    char want_event[128];
    snprintf(
        want_event, sizeof want_event,
        "vm_spawn "
        "\"vm\":\"%s\",\"image\":\"base\",\"backend\":\"qemu\",\"isolation\":\"emulated\",\"ms\":",
        orch_vm_id(g.vm));
    assert_contains(b.events.p, want_event);
    orch_vm_free(g.vm);
    assert_contains(b.events.p, "\"reason\":\"closed\",\"status\":null,\"ms\":");
    assert_int_equal(entries(b.run_dir, "vm-"), 0);
    assert_false(g.lost);
    bed_close(&b);
}

static void test_clones_differ(void **state)
{
    (void)state;
    struct bed b;
    struct guest g[2];
    char first[2][512];
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    for (int i = 0; i < 2; i++) {
        struct timespec before, after;
        clock_gettime(CLOCK_REALTIME, &before);
        start(&b, &g[i]);
        snprintf(first[i], sizeof first[i], "%s",
                 run(&g[i], "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | "
                            "hexdump -v -e '/1 \"%02x\"'; echo"));
        double guest_s = atof(run(&g[i], "date +%s"));
        clock_gettime(CLOCK_REALTIME, &after);
        assert_true(guest_s >= (double)before.tv_sec - 1 && guest_s <= (double)after.tv_sec + 1);
    }
    char *nl[2] = { strchr(first[0], '\n'), strchr(first[1], '\n') };
    assert_true(nl[0] && nl[1] && strlen(nl[0]) == 34 && strlen(nl[1]) == 34);
    assert_string_not_equal(nl[0], nl[1]); /* urandom */
    *nl[0] = *nl[1] = 0;
    assert_string_not_equal(first[0], first[1]); /* boot_id */
    bed_close(&b);                               /* ends both */
}

static void test_timer_in_guest(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    int64_t t = orch_now_us();
    run(&g, "sleep 0.02");
    assert_true(orch_now_us() - t >= 20000);
    bed_close(&b);
}

static void test_many_at_once(void **state)
{
    (void)state;
    enum { N = 8 };
    struct bed b;
    struct guest g[N] = { 0 };
    struct command c[N];
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    o.max = N;
    bed_open(&b, &o);
    for (int i = 0; i < N; i++) {
        struct orch_vm_opts vo = guest_opts(&g[i]);
        spawn(&b, &g[i], &vo);
    }
    struct orch_err err = { 0 };
    struct orch_vm_opts vo = guest_opts(&g[0]);
    assert_null(orch_vm_spawn(b.m, &vo, &err));
    assert_int_equal(err.cls, ORCH_CLASS_LIMIT);
    assert_contains(err.msg, "the limit (vm.max) is 8");
    for (int i = 0; i < N; i++) {
        WAIT_FOR(g[i].ready || g[i].failed);
        if (g[i].failed)
            fail_msg("%s", g[i].err.msg);
        run_start(&g[i], &c[i], "echo $((40 + 2))", NULL);
    }
    for (int i = 0; i < N; i++) {
        WAIT_FOR(c[i].done);
        assert_false(c[i].failed);
        assert_string_equal(c[i].out.p, "42\n");
        orch_buf_free(&c[i].out);
    }
    /* A place is free again at once. */
    orch_vm_free(g[3].vm);
    start(&b, &g[3]);
    bed_close(&b);
}

static int open_fds(void)
{
    return (int)entries("/proc/self/fd", "");
}

static void test_nothing_is_left(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    pid_t pids[8];
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    orch_vm_free(g.vm);
    int fds = open_fds();
    for (int i = 0; i < 50; i++) {
        memset(&g, 0, sizeof g);
        struct orch_vm_opts vo = guest_opts(&g);
        spawn(&b, &g, &vo);
        if (i % 2)
            WAIT_FOR(g.ready || g.failed);
        else /* cancelled somewhere on its way */
            for (int k = 0; k < i / 6; k++)
                orch_loop_step(loop, 10);
        assert_false(g.failed);
        orch_vm_free(g.vm);
    }
    WAIT_FOR(find_vmms(pids, 8) == 0);
    WAIT_FOR(open_fds() == fds);
    assert_int_equal(entries(b.run_dir, ""), 0);
    bed_close(&b);
}

/* ---- the end, by itself */

/* Who was under way, the owner, and who asks afterwards get the same error. */
static void assert_same_end(struct guest *g, const struct command *c, enum orch_class cls,
                            const char *why)
{
    struct orch_err after = { 0 };
    cleanup_free char *prefix = orch_xasprintf("microVM %s: ", orch_vm_id(g->vm));
    assert_true(c->done && c->failed);
    assert_contains(g->err.msg, why);
    assert_int_equal(strncmp(g->err.msg, prefix, strlen(prefix)), 0);
    assert_string_equal(c->err.msg, g->err.msg);
    assert_null(orch_vm_channel(g->vm, &after));
    assert_string_equal(after.msg, g->err.msg);
    assert_int_equal(g->err.cls, cls);
    assert_int_equal(c->err.cls, cls);
    assert_int_equal(after.cls, cls);
}

static void test_crash_is_lost(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    struct command c;
    pid_t pid;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    run_start(&g, &c, "sleep 100", NULL);
    assert_int_equal(find_vmms(&pid, 1), 1);
    kill(pid, SIGKILL);
    WAIT_FOR(g.lost);
    assert_same_end(&g, &c, ORCH_CLASS_CLOSED, "the VMM was killed by signal 9 (Killed)");
    assert_contains(b.events.p, "\"reason\":\"vmm\",\"status\":\"killed by signal 9 (Killed)\"");
    orch_vm_free(g.vm);
    bed_close(&b);
}

static void test_guest_powers_off(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    struct command c;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    static const char *const ways[][2] = {
        { "echo so far; poweroff -f; sleep 100", "the guest powered off" },
        { "echo so far; echo b >/proc/sysrq-trigger; sleep 100",
          "the guest stopped (a reboot, a kernel panic, or its init ended)" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(ways); i++) {
        start(&b, &g);
        run_start(&g, &c, ways[i][0], "root");
        WAIT_FOR(g.lost);
        assert_same_end(&g, &c, ORCH_CLASS_CLOSED, ways[i][1]);
        assert_string_equal(c.out.p, "so far\n");
        orch_buf_free(&c.out);
        orch_vm_free(g.vm);
    }
    bed_close(&b);
}

static void test_launcher_dies(void **state)
{
    (void)state;
    struct bed b;
    struct guest g[2];
    struct command c;
    char comm[32];
    pid_t pid;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g[0]);
    run_start(&g[0], &c, "sleep 100", NULL);
    assert_int_equal(find_vmms(&pid, 1), 1);
    for (pid_t up = pid; up != getpid(); up = parent_of(up, comm))
        pid = up;
    kill(pid, SIGKILL);
    WAIT_FOR(g[0].lost);
    assert_same_end(&g[0], &c, ORCH_CLASS_CLOSED, "launcher");
    assert_contains(b.events.p, "\"reason\":\"launcher\"");
    start(&b, &g[1]); /* with another launcher */
    assert_string_equal(run(&g[1], "echo again"), "again\n");
    bed_close(&b);
}

static void test_timeout(void **state)
{
    (void)state;
    struct bed b;
    struct guest g = { 0 };
    struct command c;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    struct orch_vm_opts vo = guest_opts(&g);
    vo.timeout_ms = 2000;
    vo.timeout_name = "vm.timeout";
    vo.call = "call-7";
    start_with(&b, &g, &vo);
    run_start(&g, &c, "sleep 100", NULL);
    WAIT_FOR(g.lost);
    assert_same_end(&g, &c, ORCH_CLASS_TIMEOUT, "its time of 2 s is over (vm.timeout)");
    assert_contains(b.events.p, "\"call\":\"call-7\"");
    assert_contains(b.events.p, "\"reason\":\"timeout\"");
    orch_vm_free(g.vm);
    /* One that has no time to get ready. */
    memset(&g, 0, sizeof g);
    vo = guest_opts(&g);
    vo.timeout_ms = 1;
    start_failing(&b, &g, &vo);
    assert_int_equal(g.err.cls, ORCH_CLASS_TIMEOUT);
    bed_close(&b);
}

/* ---- the log */

static void test_log_is_capped(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    char path[256];
    struct stat st;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    run(&g, "head -c 1500000 /dev/zero | tr '\\0' x >/dev/console; echo the end >/dev/console");
    WAIT_FOR(memmem(orch_vm_log_tail(g.vm).p, orch_vm_log_tail(g.vm).n, "the end", 7));
    assert_int_equal(orch_vm_log_tail(g.vm).n, ORCH_RUNDIR_TAIL);
    snprintf(path, sizeof path, "%s/%s/vmm.log", b.run_dir, orch_vm_id(g.vm));
    assert_int_equal(stat(path, &st), 0);
    assert_true(st.st_size > ORCH_RUNDIR_LOG_MAX && st.st_size < ORCH_RUNDIR_LOG_MAX + 100);
    cleanup_buf struct orch_buf text = { 0 };
    assert_int_equal(orch_read_file(AT_FDCWD, path, 2 << 20, &text), 0);
    assert_contains(text.p + ORCH_RUNDIR_LOG_MAX,
                    "[orch: 1 MiB of log is kept; what followed was dropped]");
    bed_close(&b);
}

static void test_folders(void **state)
{
    (void)state;
    struct orch_err err;
    char live[256], path[256];
    char *dir = own_path("folders");
    assert_int_equal(orch_rundir_open(dir, &err), 0);
    struct orch_rundir *r = orch_rundir_new(loop, dir, "vm", &err);
    assert_non_null(r);
    snprintf(live, sizeof live, "%s/%s", dir, orch_rundir_id(r));
    /* A dead one's, one that is none of ours, one in which somebody put something. */
    snprintf(path, sizeof path, "%s/vm-00000001", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    strcat(path, "/vmm.log");
    write_text(path, "x", 1, 0600);
    snprintf(path, sizeof path, "%s/vm-other", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(orch_rundir_open(dir, &err), 0);
    assert_int_equal(access(live, F_OK), 0);
    assert_int_equal(access(path, F_OK), 0);
    snprintf(path, sizeof path, "%s/vm-00000001", dir);
    assert_int_equal(access(path, F_OK), -1);
    orch_rundir_free(r);
    assert_int_equal(access(live, F_OK), -1);
    /* Logs of failed starts are kept, but not for ever. */
    for (int i = 0; i < ORCH_RUNDIR_KEPT + 3; i++) {
        r = orch_rundir_new(loop, dir, "vm", &err);
        assert_non_null(r);
        for (int k = 0; k < 30; k++)
            dprintf(orch_rundir_log_fd(r), "line %d \x1b[2J\n", k);
        orch_err_set(&err, EIO, "it failed");
        orch_rundir_explain(r, &err);
        orch_rundir_free(r);
        assert_contains(err.msg, "it failed\nlast output:\nline 10 ");
        assert_null(strchr(err.msg, '\x1b'));
        assert_contains(err.msg, "line 29 ");
        assert_contains(err.msg, "\nlog: ");
        assert_int_equal(access(strstr(err.msg, "\nlog: ") + 6, R_OK), 0);
    }
    snprintf(path, sizeof path, "%s/failed", dir);
    assert_int_equal(entries(path, "vm-"), ORCH_RUNDIR_KEPT);
    snprintf(path, sizeof path, "%s/none/such", dir);
    assert_null(orch_rundir_new(loop, path, "vm", &err));
    assert_contains(err.msg, "No such file or directory");
}

/* ---- templates */

static void test_template_is_kept_and_checked(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    char key[256] = "", path[1024];
    char *dir = own_path("kept-cache");
    bed_init(&b);
    own_cache(&b, dir);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    assert_contains(b.progress.p, "booting image base emulated");
    bed_close(&b); /* waits until it is written */
    snprintf(path, sizeof path, "%s/templates", dir);
    DIR *d = opendir(path);
    for (struct dirent *e; (e = readdir(d));)
        if (e->d_name[0] != '.' && strlen(e->d_name) == 32)
            snprintf(key, sizeof key, "%s", e->d_name);
    closedir(d);
    assert_int_equal(strlen(key), 32);

    static const struct {
        const char *file, *what;
        int damage; /* 0: none, 1: cut, 2: a byte changed */
    } cases[] = {
        { "mem", NULL, 0 },
        { "mem", "the memory is truncated", 1 },
        { "mem", "a template's memory is damaged", 2 },
        { "state", "the state is damaged", 2 },
        { "meta.json", "meta.json is malformed", 1 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        snprintf(path, sizeof path, "%s/templates/%s/%s", dir, key, cases[i].file);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        assert_true(fd >= 0);
        struct stat st;
        fstat(fd, &st);
        off_t at = lseek(fd, st.st_size / 3, SEEK_DATA);
        char byte;
        if (cases[i].damage == 1) {
            assert_int_equal(ftruncate(fd, st.st_size / 2), 0);
        } else if (cases[i].damage == 2) {
            assert_int_equal(pread(fd, &byte, 1, at), 1);
            byte ^= 0x10;
            assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        }
        close(fd);
        bed_init(&b);
        own_cache(&b, dir);
        bed_open(&b, &o);
        start(&b, &g);
        assert_string_equal(run(&g, "echo fine"), "fine\n");
        if (cases[i].damage) {
            assert_contains(b.log.p, cases[i].what);
            assert_contains(b.log.p, "made anew");
            assert_contains(b.progress.p, "booting");
        } else {
            assert_null(b.log.p);
            assert_null(b.progress.p);
        }
        bed_close(&b);
    }
}

/* Several processes at once: one boots, the others wait for its template. */
static int race_pipe[2];

static void racer(void)
{
    struct bed b;
    struct guest g;
    bed_init(&b);
    own_cache(&b, own_path("race-cache"));
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    bool booted = b.progress.p && strstr(b.progress.p, "booting");
    bed_close(&b);
    assert_int_equal(write(race_pipe[1], booted ? "b" : ".", 1), 1);
}

static void test_one_builder(void **state)
{
    (void)state;
    pid_t pids[3];
    int booted = 0;
    char c;
    assert_int_equal(pipe2(race_pipe, O_CLOEXEC), 0);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(pids); i++)
        pids[i] = child_start(racer);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(pids); i++) {
        child_wait(pids[i]);
        assert_int_equal(read(race_pipe[0], &c, 1), 1);
        booted += c == 'b';
    }
    close(race_pipe[0]);
    close(race_pipe[1]);
    assert_int_equal(booted, 1);
}

static void test_frozen_files(void **state)
{
    (void)state;
    struct orch_err err;
    struct orch_frozen f, back;
    char dir[128];
    snprintf(dir, sizeof dir, "%s", own_path("frozen"));
    mkdir(dir, 0700);
    assert_int_equal(orch_frozen_new(&f, 64 << 20, &err), 0);
    static char page[4096], many[32 << 20];
    for (int i = 0; i < 150; i++) {
        memset(page, i, sizeof page);
        assert_int_equal(pwrite(f.mem_fd, page, sizeof page, (off_t)i * 53 * 4096), sizeof page);
    }
    memset(many, 'm', sizeof many);
    assert_int_equal(pwrite(f.mem_fd, many, sizeof many, 32 << 20), sizeof many);
    assert_int_equal(write(f.state_fd, "state", 5), 5);
    f.tsc_khz = 12345;
    assert_int_equal(orch_frozen_seal(&f, &err), 0);
    assert_int_equal(pwrite(f.mem_fd, page, 1, 0), -1);
    assert_int_equal(errno, EPERM);
    int pidfd = -1, status, ends[2];
    char nothing;
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    pid_t pid = orch_frozen_save(dir, "key", &f, ORCH_SLICE("\"image\":\"x\""), -1, &pidfd, &err);
    assert_true(pid > 0);
    /* The child that writes holds none of our other descriptors while it writes. */
    close(ends[1]);
    assert_int_equal(read(ends[0], &nothing, 1), 0);
    close(ends[0]);
    assert_int_equal(access(own_path("frozen/key"), F_OK), -1);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    close(pidfd);
    assert_null(orch_frozen_open(dir, "other", 64 << 20, &back, &err));
    assert_int_equal(err.code, ENOENT);
    assert_null(orch_frozen_open(dir, "key", 65 << 20, &back, &err));
    assert_int_equal(err.code, EBADMSG);
    /* Nobody writes to it again, however it was left. */
    static const char *const files[] = { "frozen/key/mem", "frozen/key/state",
                                         "frozen/key/meta.json" };
    struct stat st;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(files); i++) {
        assert_int_equal(stat(own_path(files[i]), &st), 0);
        assert_int_equal(st.st_mode & 07777, 0400);
        assert_int_equal(chmod(own_path(files[i]), 0600), 0);
    }
    struct orch_frozen_load *l = orch_frozen_open(dir, "key", 64 << 20, &back, &err);
    assert_non_null(l);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(files); i++) {
        assert_int_equal(stat(own_path(files[i]), &st), 0);
        assert_int_equal(st.st_mode & 07777, 0400);
    }
    int r, steps = 0;
    while ((r = orch_frozen_step(l, &err)) > 0)
        steps++;
    assert_int_equal(r, 0);
    assert_true(steps >= 1);
    assert_int_equal(back.tsc_khz, 12345);
    for (int i = 0; i < 150; i++) {
        char want[4096];
        memset(want, i, sizeof want);
        assert_int_equal(pread(back.mem_fd, page, sizeof page, (off_t)i * 53 * 4096), sizeof page);
        assert_memory_equal(page, want, sizeof page);
    }
    assert_int_equal(pwrite(back.mem_fd, page, 1, 0), -1);
    assert_int_equal(pwrite(back.state_fd, page, 1, 0), -1);
    orch_frozen_close(l);
    orch_frozen_fini(&back);
    orch_frozen_fini(&f);
}

/* Two of a program's threads load templates, each in a handle of its own. */

struct loading {
    const char *dir, *key;
    char fill;
    struct orch_err err;
    const char *failed;
};

static void *load_often(void *ud)
{
    struct loading *own = ud;
    cleanup_free char *page = orch_xmalloc(4096), *want = orch_xmalloc(4096);
    for (int round = 0; round < 8 && !own->failed; round++) {
        struct orch_frozen f;
        struct orch_frozen_load *l = orch_frozen_open(own->dir, own->key, 64 << 20, &f, &own->err);
        int r = l ? 1 : -1;
        while (r > 0)
            r = orch_frozen_step(l, &own->err);
        if (r < 0)
            own->failed = own->err.msg;
        for (off_t at = 0; at < 4096 && !own->failed; at++) {
            memset(want, own->fill + (int)at % 7, 4096);
            if (pread(f.mem_fd, page, 4096, at * 4096) != 4096 || memcmp(page, want, 4096) != 0)
                own->failed = "a page is another's";
        }
        orch_frozen_close(l);
        if (l)
            orch_frozen_fini(&f);
    }
    return NULL;
}

static void test_frozen_threads(void **state)
{
    (void)state;
    struct loading of[2] = { { .key = "one", .fill = 'a' }, { .key = "two", .fill = 'n' } };
    pthread_t threads[2];
    char dir[128], page[4096];
    snprintf(dir, sizeof dir, "%s", own_path("frozen-threads"));
    assert_int_equal(mkdir(dir, 0700), 0);
    for (int i = 0; i < 2; i++) {
        struct orch_frozen f;
        struct orch_err err;
        int pidfd = -1, status;
        of[i].dir = dir;
        assert_int_equal(orch_frozen_new(&f, 64 << 20, &err), 0);
        for (off_t at = 0; at < 4096; at++) {
            memset(page, of[i].fill + (int)at % 7, sizeof page);
            assert_int_equal(pwrite(f.mem_fd, page, sizeof page, at * 4096), sizeof page);
        }
        assert_int_equal(write(f.state_fd, "state", 5), 5);
        assert_int_equal(orch_frozen_seal(&f, &err), 0);
        pid_t pid = orch_frozen_save(dir, of[i].key, &f, ORCH_SLICE("\"image\":\"x\""), -1, &pidfd,
                                     &err);
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, 0);
        close(pidfd);
        orch_frozen_fini(&f);
    }
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, load_often, &of[i]), 0);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < 2; i++)
        if (of[i].failed)
            fail_msg("%s: %s", of[i].key, of[i].failed);
}

/* ---- failing starts */

static void expect_failure(const struct orch_vms_opts *o, struct bed *b, const char *const *parts,
                           enum orch_class cls)
{
    struct guest g = { 0 };
    bed_open(b, o);
    struct orch_vm_opts vo = guest_opts(&g);
    start_failing(b, &g, &vo);
    for (; *parts; parts++)
        assert_contains(g.err.msg, *parts);
    if (g.err.cls != cls)
        fail_msg("class %s: %s", orch_class_name(g.err.cls), g.err.msg);
    if (strstr(g.err.msg, "\nlog: ")) {
        char path[256];
        snprintf(path, sizeof path, "%s", strstr(g.err.msg, "\nlog: ") + 6);
        assert_int_equal(access(path, R_OK), 0);
    }
    orch_vm_free(g.vm);
    bed_close(b);
}

static void test_missing_programs(void **state)
{
    (void)state;
    struct bed b;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    o.qemu = "/nonexistent/qemu";
    expect_failure(&o, &b,
                   (const char *const[]){ "QEMU not found (looked for /nonexistent/qemu)",
                                          "apt-get install qemu-system-x86", NULL },
                   ORCH_CLASS_ISOLATION);
    char *dir = own_path("missing-cache");
    bed_init(&b);
    own_cache(&b, dir);
    o = bed_opts(&b);
    o.launcher_path = "/nonexistent/launcher";
    expect_failure(&o, &b,
                   (const char *const[]){ "/nonexistent/launcher", "No such file or directory",
                                          NULL },
                   ORCH_CLASS_ISOLATION);
}

/* The kernel's ELF out of the built image, for images of other inits. */
static const char *base_kernel(void)
{
    static char path[4200];
    snprintf(path, sizeof path, "%s/images/base/vmlinux", cache);
    return path;
}

static void test_bad_kernels(void **state)
{
    (void)state;
    struct bed b;
    char *dir = own_path("kernel-cache"), garbage[256];
    snprintf(garbage, sizeof garbage, "%s/garbage", work);
    write_text(garbage, "not a kernel\n", 13, 0644);
    bed_init(&b);
    snprintf(b.cache_dir, sizeof b.cache_dir, "%s", dir);
    struct orch_vms_opts o = bed_opts(&b);
    o.kernel = "/nonexistent/vmlinuz";
    expect_failure(&o, &b,
                   (const char *const[]){ "/nonexistent/vmlinuz", "No such file or directory",
                                          NULL },
                   ORCH_CLASS_FAILED);
    bed_init(&b);
    snprintf(b.cache_dir, sizeof b.cache_dir, "%s", dir);
    o.kernel = garbage;
    expect_failure(&o, &b, (const char *const[]){ "garbage", NULL }, ORCH_CLASS_FAILED);
    bed_init(&b);
    snprintf(b.cache_dir, sizeof b.cache_dir, "%s", dir);
    o.kernel = "/bin/true";
    expect_failure(&o, &b, (const char *const[]){ "/bin/true", "PVH", NULL }, ORCH_CLASS_FAILED);
}

/* A static program of a few bytes: its code after the ELF header. */
static void write_elf(const char *path, const void *code, size_t n)
{
    static const unsigned char head[120] = {
        0x7f, 'E',  'L',  'F', 2,  1, 1,  0, 0,    0, 0,    0, 0, 0, 0, 0,
        2,    0,    62,   0,   1,  0, 0,  0, /* executable, x86-64 */
        0x78, 0,    0x40, 0,   0,  0, 0,  0, 64,   0, 0,    0, 0, 0, 0, 0,
        0,    0,    0,    0,   0,  0, 0,  0, /* entry 0x400078, headers at 64 */
        0,    0,    0,    0,   64, 0, 56, 0, 1,    0, 64,   0, 0, 0, 0, 0, /* one program header */
        1,    0,    0,    0,   5,  0, 0,  0, 0,    0, 0,    0, 0, 0, 0, 0,
        0,    0,    0x40, 0,   0,  0, 0,  0, 0,    0, 0x40, 0, 0, 0, 0, 0, /* load r-x */
        0xff, 0,    0,    0,   0,  0, 0,  0, 0xff, 0, 0,    0, 0, 0, 0, 0,
        0,    0x10, 0,    0,   0,  0, 0,  0,
    };
    char file[255] = { 0 };
    memcpy(file, head, sizeof head);
    memcpy(file + sizeof head, code, n);
    write_text(path, file, sizeof file, 0755);
}

static void test_bad_inits(void **state)
{
    (void)state;
    struct bed b;
    char silent[256], dying[256], dir[256];
    snprintf(silent, sizeof silent, "%s/silent", work);
    snprintf(dying, sizeof dying, "%s/dying", work);
    snprintf(dir, sizeof dir, "%s/init-cache", work);
    write_elf(silent, "\xb8\x22\0\0\0\x0f\x05\xeb\xf7", 9);       /* for (;;) pause(); */
    write_elf(dying, "\xb8\x3c\0\0\0\xbf\x03\0\0\0\x0f\x05", 12); /* exit(3) */
    bed_init(&b);
    snprintf(b.cache_dir, sizeof b.cache_dir, "%s", dir);
    struct orch_vms_opts o = bed_opts(&b);
    o.kernel = base_kernel();
    o.agent_path = silent;
    o.boot_ms = 5000;
    expect_failure(&o, &b,
                   (const char *const[]){ "template of image base (emulated, 256 MiB): booting: "
                                          "the guest agent did not answer within ",
                                          "\nlog: ", NULL },
                   ORCH_CLASS_TIMEOUT);
    bed_init(&b);
    snprintf(b.cache_dir, sizeof b.cache_dir, "%s", dir);
    o.agent_path = dying;
    o.boot_ms = 0;
    expect_failure(&o, &b,
                   (const char *const[]){
                       "booting: the guest stopped (a reboot, a kernel panic, or its init ended)",
                       "last output:",
                       "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300",
                       "\nlog: ", NULL },
                   ORCH_CLASS_FAILED);
}

/* The guest's kernel gives up, or on a busy host now and then goes on waiting for memory. */
static void test_little_memory(void **state)
{
    (void)state;
    struct bed b;
    struct guest g = { 0 };
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    o.boot_ms = 20000;
    bed_open(&b, &o);
    struct orch_vm_opts vo = guest_opts(&g);
    vo.memory_bytes = 64 << 20;
    start_failing(&b, &g, &vo);
    assert_contains(g.err.msg, "template of image base (emulated, 64 MiB): booting: ");
    if (!strstr(g.err.msg, "booting: the guest agent did not answer within ")) {
        assert_contains(g.err.msg, "booting: the guest stopped");
        assert_contains(g.err.msg, "Kernel panic - not syncing: System is deadlocked on memory");
    }
    bed_close(&b);
}

/* The template is there, and its clone does not come up in time. */
static void test_slow_clone(void **state)
{
    (void)state;
    struct bed b;
    struct guest g = { 0 };
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    o.clone_ms = 5;
    bed_open(&b, &o);
    struct orch_vm_opts vo = guest_opts(&g);
    start_failing(&b, &g, &vo);
    assert_int_equal(g.err.cls, ORCH_CLASS_TIMEOUT);
    char part[128];
    snprintf(part, sizeof part, "microVM %s (image base, emulated): start failed ",
             orch_vm_id(g.vm));
    assert_contains(g.err.msg, part);
    assert_contains(g.err.msg, ": no answer within 0.0 s");
    assert_contains(g.err.msg, "\nlog: ");
    assert_contains(b.events.p, "\"reason\":\"start\",\"status\":null");
    bed_close(&b);
}

/* A kept list of QEMU's libraries is not believed when it names what others can change. */
static void test_library_list(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    char list[256], evil[128];
    cleanup_buf struct orch_buf text = { 0 };
    char *dir = own_path("libs-cache");
    snprintf(evil, sizeof evil, "%s/evil.so", work);
    snprintf(list, sizeof list, "%s/qemu-tcg.libs", dir);
    write_text(evil, "x", 1, 0644);
    assert_int_equal(chown(evil, 1000, 1000), 0);
    bed_init(&b);
    own_cache(&b, dir);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    bed_close(&b);
    assert_int_equal(orch_read_file(AT_FDCWD, list, 1 << 16, &text), 0);
    assert_contains(text.p, "/libc.so.6\n");
    size_t honest = text.n;
    orch_buf_printf(&text, "%s\n", evil);
    write_text(list, text.p, text.n, 0600);
    bed_init(&b);
    own_cache(&b, dir);
    bed_open(&b, &o);
    start(&b, &g);
    bed_close(&b);
    orch_buf_consume(&text, text.n);
    assert_int_equal(orch_read_file(AT_FDCWD, list, 1 << 16, &text), 0);
    assert_int_equal(text.n, honest);
}

static void test_mistakes(void **state)
{
    (void)state;
    struct bed b;
    struct guest g = { 0 };
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    static const struct {
        struct orch_vm_opts o;
        enum orch_class cls;
        const char *part;
    } cases[] = {
        { { .backend = "firecracker" },
          ORCH_CLASS_ISOLATION,
          "backend: \"firecracker\" is not available" },
        { { .network = "packages" },
          ORCH_CLASS_USAGE,
          "network: a policy's name comes with its filter" },
        { { .accel = "kmv" }, ORCH_CLASS_USAGE, "did you mean kvm?" },
        { { .memory_bytes = 32 << 20 }, ORCH_CLASS_USAGE, "memory: 33554432 bytes; 64M to 4G" },
        { { .memory_bytes = (256 << 20) + 1 }, ORCH_CLASS_USAGE, "whole MiB" },
        { { .vcpus = 9 }, ORCH_CLASS_USAGE, "vcpus: 9; 1 to 8" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        struct orch_err err = { 0 };
        struct orch_vm_opts vo = cases[i].o;
        vo.ready = on_ready;
        vo.ud = &g;
        assert_null(orch_vm_spawn(b.m, &vo, &err));
        assert_int_equal(err.cls, cases[i].cls);
        assert_contains(err.msg, cases[i].part);
    }
    struct orch_vm_opts vo = guest_opts(&g);
    vo.vcpus = 2;
    start_with(&b, &g, &vo);
    assert_int_equal(orch_vm_isolation(g.vm), ORCH_ISOLATION_EMULATED);
    bed_close(&b);
}

/* ---- broken file systems and devices, in a namespace of their own */

static void mount_small(const char *dir, const char *options)
{
    mkdir(dir, 0700);
    assert_int_equal(mount("tmpfs", dir, "tmpfs", 0, options), 0);
}

static void cache_read_only(void)
{
    struct bed b;
    struct guest g;
    char *dir = own_path("ro-cache");
    own_mounts();
    mount_small(dir, "size=1m");
    bed_init(&b);
    own_cache(&b, dir);
    assert_int_equal(mount(NULL, dir, NULL, MS_REMOUNT | MS_RDONLY, NULL), 0);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    assert_string_equal(run(&g, "echo fine"), "fine\n");
    assert_contains(b.log.p, "ro-cache/templates: the template is not kept, each process boots its "
                             "own: Read-only file system");
    bed_close(&b);
}

static void cache_full(void)
{
    struct bed b;
    struct guest g;
    char *dir = own_path("full-cache"), path[256];
    own_mounts();
    mount_small(dir, "size=8m");
    bed_init(&b);
    own_cache(&b, dir);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g);
    WAIT_FOR(b.log.p && strstr(b.log.p, "not kept"));
    assert_contains(b.log.p, "full-cache/templates: the template is not kept, each process boots "
                             "its own: No space left on device");
    assert_string_equal(run(&g, "echo fine"), "fine\n");
    snprintf(path, sizeof path, "%s/templates", dir);
    assert_int_equal(entries(path, ""), 1); /* the lock alone */
    bed_close(&b);
}

static void runtime_full(void)
{
    struct bed b;
    struct guest g = { 0 };
    own_mounts();
    bed_init(&b);
    mount_small(b.run_dir, "size=64k,nr_inodes=2");
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    struct orch_vm_opts vo = guest_opts(&g);
    start_failing(&b, &g, &vo);
    assert_contains(g.err.msg, b.run_dir);
    assert_contains(g.err.msg, "No space left on device");
    bed_close(&b);
}

/* /dev with a kvm that opens and is none. */
static void own_dev(mode_t kvm_mode)
{
    static const struct {
        const char *name;
        int major, minor;
    } nodes[] = { { "null", 1, 3 },    { "zero", 1, 5 }, { "random", 1, 8 },
                  { "urandom", 1, 9 }, { "tty", 5, 0 },  { "kvm", 1, 3 } };
    char path[64];
    assert_int_equal(mount("tmpfs", "/dev", "tmpfs", 0, "mode=755"), 0);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(nodes); i++) {
        snprintf(path, sizeof path, "/dev/%s", nodes[i].name);
        assert_int_equal(mknod(path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)), 0);
        assert_int_equal(chmod(path, strcmp(nodes[i].name, "kvm") == 0 ? kvm_mode : 0666), 0);
    }
}

static void kvm_pretends(void)
{
    struct bed b;
    struct guest g = { 0 };
    char *dir = own_path("kvm-cache");
    own_mounts();
    own_dev(0666);
    bed_init(&b);
    own_cache(&b, dir);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    cleanup_buf struct orch_buf why = { 0 };
    assert_int_equal(orch_known_isolation(loop, &o, &why), ORCH_ISOLATION_NONE);
    assert_contains(why.p, "not tried yet");
    struct orch_vm_opts vo = guest_opts(&g);
    vo.accel = NULL;
    start_with(&b, &g, &vo);
    assert_int_equal(orch_vm_isolation(g.vm), ORCH_ISOLATION_EMULATED);
    assert_contains(b.progress.p, "booting image base with KVM");
    assert_contains(b.progress.p, "KVM does not work here, going on emulated");
    orch_buf_consume(&why, why.n);
    assert_int_equal(orch_known_isolation(loop, &o, &why), ORCH_ISOLATION_EMULATED);
    assert_contains(why.p, "the VMM ended (exit status 1)");
    bed_close(&b);

    /* Remembered: not tried again, neither for another size nor when it is asked for. */
    bed_init(&b);
    own_cache(&b, dir);
    bed_open(&b, &o);
    memset(&g, 0, sizeof g);
    vo.memory_bytes = 128 << 20;
    start_with(&b, &g, &vo);
    assert_null(strstr(b.progress.p ? b.progress.p : "", "with KVM"));
    memset(&g, 0, sizeof g);
    vo.accel = "kvm";
    start_failing(&b, &g, &vo);
    assert_int_equal(g.err.cls, ORCH_CLASS_ISOLATION);
    assert_contains(g.err.msg, "it was tried here and does not work");
    assert_contains(g.err.msg, "accel.json; remove that file to try again");
    bed_close(&b);
}

static void kvm_forbidden(void)
{
    struct bed b;
    struct guest g = { 0 };
    own_mounts();
    own_dev(0600);
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    struct orch_vm_opts vo = guest_opts(&g);
    vo.accel = "kvm";
    start_failing(&b, &g, &vo);
    assert_int_equal(g.err.cls, ORCH_CLASS_ISOLATION);
    assert_contains(g.err.msg, "acceleration kvm: /dev/kvm: permission denied (mode 0600, uid 0, "
                               "gid 0); give it to group kvm");
    cleanup_buf struct orch_buf why = { 0 };
    assert_int_equal(orch_known_isolation(loop, &o, &why), ORCH_ISOLATION_EMULATED);
    assert_contains(why.p, "permission denied");
    assert_int_equal(unlink("/dev/kvm"), 0);
    memset(&g, 0, sizeof g);
    start_failing(&b, &g, &vo);
    assert_contains(g.err.msg, "/dev/kvm: No such file or directory");
    bed_close(&b);
}

static void test_cache_read_only(void **state)
{
    (void)state;
    child_wait(child_start(cache_read_only));
}

static void test_cache_full(void **state)
{
    (void)state;
    child_wait(child_start(cache_full));
}

static void test_runtime_full(void **state)
{
    (void)state;
    child_wait(child_start(runtime_full));
}

static void test_kvm_pretends(void **state)
{
    (void)state;
    child_wait(child_start(kvm_pretends));
}

static void test_kvm_forbidden(void **state)
{
    (void)state;
    child_wait(child_start(kvm_forbidden));
}

/* ---- orch is killed */

static char victim_dir[128], victim_file[160]; /* made when it has begun */

static void victim(void)
{
    struct bed b;
    struct guest g[3];
    bed_init(&b);
    snprintf(b.run_dir, sizeof b.run_dir, "%s", victim_dir);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    for (;;) {
        for (int i = 0; i < 3; i++) {
            memset(&g[i], 0, sizeof g[i]);
            struct orch_vm_opts vo = guest_opts(&g[i]);
            spawn(&b, &g[i], &vo);
        }
        write_text(victim_file, "", 0, 0600);
        for (int i = 0; i < 3; i++)
            WAIT_FOR(g[i].ready);
        for (int i = 0; i < 3; i++)
            orch_vm_free(g[i].vm);
    }
}

static void test_killed_orch(void **state)
{
    (void)state;
    struct bed b;
    struct guest g;
    bed_init(&b);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g); /* a live one in the same directory, all the while */
    snprintf(victim_dir, sizeof victim_dir, "%s", b.run_dir);
    snprintf(victim_file, sizeof victim_file, "%s/victim", work);
    size_t left = 0;
    for (int i = 0; i < 8; i++) {
        unlink(victim_file);
        pid_t pid = child_start(victim);
        struct timespec t = { 0, (5 + rand() % 400) * 1000000L };
        if (i % 2)
            nanosleep(&t, NULL);
        else
            WAIT_FOR(access(victim_file, F_OK) == 0);
        kill(pid, SIGKILL);
        int status;
        waitpid(pid, &status, 0);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        left += entries(b.run_dir, "vm-") - 1;
    }
    assert_true(left > 0);
    struct bed c;
    struct guest h;
    bed_init(&c);
    snprintf(c.run_dir, sizeof c.run_dir, "%s", b.run_dir);
    o.ud = &c;
    bed_open(&c, &o);
    assert_int_equal(entries(b.run_dir, "vm-"), 1);
    assert_string_equal(run(&g, "echo alive"), "alive\n");
    start(&c, &h);
    assert_int_equal(entries(b.run_dir, "vm-"), 2);
    orch_vms_free(b.m);
    b.m = NULL;
    bed_close(&c);
    bed_close(&b);
}

/* ---- as an ordinary user */

static void copy_tree(const char *from, const char *to)
{
    char command[2048];
    snprintf(command, sizeof command, "cp -r '%s' '%s' && chown -R 1000:1000 '%s'", from, to, to);
    assert_int_equal(system(command), 0);
}

static void user_runs(void)
{
    struct bed b;
    struct guest g[2];
    char dir[100];
    snprintf(dir, sizeof dir, "%s", own_path("user"));
    assert_int_equal(setgroups(0, NULL), 0);
    assert_int_equal(setresgid(1000, 1000, 1000), 0);
    assert_int_equal(setresuid(1000, 1000, 1000), 0);
    prctl(PR_SET_DUMPABLE, 1);
    bed_init(&b);
    snprintf(b.cache_dir, sizeof b.cache_dir, "%s", dir);
    snprintf(b.run_dir, sizeof b.run_dir, "%s/run", dir);
    snprintf(agent, sizeof agent, "%s/agent", dir);
    snprintf(launcher, sizeof launcher, "%s/launcher", dir);
    struct orch_vms_opts o = bed_opts(&b);
    bed_open(&b, &o);
    start(&b, &g[0]);
    start(&b, &g[1]);
    assert_string_equal(run(&g[1], "echo hello"), "hello\n");
    bed_close(&b);
}

static void test_as_user(void **state)
{
    (void)state;
    char images[4200], to[256];
    snprintf(images, sizeof images, "%s/images", cache);
    const char *const from[] = { images, agent, launcher }, *const names[] = { "images", "agent",
                                                                               "launcher" };
    mkdir(own_path("user"), 0755);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(from); i++) {
        snprintf(to, sizeof to, "%s/%s", own_path("user"), names[i]);
        copy_tree(from[i], to);
    }
    assert_int_equal(chown(own_path("user"), 1000, 1000), 0);
    child_wait(child_start(user_runs));
}

/* ---- a VMM that lies: a program of a few lines in QEMU's place */

static void test_lying_vmm(void **state)
{
    (void)state;
    static const struct {
        const char *code, *part;
    } cases[] = {
        { "for (;;) write(12, \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\", 32);",
          "QEMU's control channel: a line of more than 64 KiB" },
        { "write(12, \"{\\\"QMP\\\":1}\\r\\n{]\\n\", 15); for (;;) poll(0, 0, 1000);",
          "QEMU's control channel: byte 1:" },
        { "for (;;) write(12, \"{\\\"event\\\":\\\"X\\\"}\\n\", 14);",
          "QEMU's control channel: it sent more than 1024 KiB" },
        { "write(12, \"{\\\"error\\\":{\\\"desc\\\":\\\"no \\\\u001b[2J\\\"}}\\n\", 37); for (;;) "
          "poll(0, 0, 1000);",
          "QEMU's control channel: no \\x1b[2J" },
        { "write(12, "
          "\"{\\\"event\\\":\\\"MIGRATION\\\",\\\"data\\\":{\\\"status\\\":\\\"failed\\\"}}\\n\", "
          "51); for (;;) poll(0, 0, 1000);",
          "failed: no reason given" },
        { "write(11, \"AAAAAAAAAAAAAAAAAAAAAAAA\", 24); for (;;) poll(0, 0, 1000);",
          "protocol error: the guest agent sent" },
        { "close(11); for (;;) poll(0, 0, 1000);", "the microVM closed its channel" },
        { "for (int i = 0; i < 1000000; i++) write(2, \"0123456789\", 10); write(2, \"\\nbye\\n\", "
          "5); return 7;",
          "the VMM ended (exit status 7)\nlast output:\n" },
        { "*(volatile int *)0 = 1;",
          "the VMM was killed by signal 11 (Segmentation fault) (it wrote nothing)\nlog: " },
    };
    char source[256], program[256], command[1024];
    snprintf(source, sizeof source, "%s/lying.c", work);
    snprintf(program, sizeof program, "%s/lying", work);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        cleanup_buf struct orch_buf text = { 0 };
        orch_buf_printf(&text,
                        "#include <poll.h>\n#include <unistd.h>\n#include <signal.h>\n#pragma GCC "
                        "diagnostic ignored \"-Wunused-result\"\n"
                        "int main(void) { %s }\n",
                        cases[i].code);
        write_text(source, text.p, text.n, 0644);
        snprintf(command, sizeof command, "cc -w -O1 -o '%s' '%s'", program, source);
        assert_int_equal(system(command), 0);
        struct bed b;
        char *dir = own_path("lying-cache");
        bed_init(&b);
        own_cache(&b, dir);
        struct orch_vms_opts o = bed_opts(&b);
        o.qemu = program;
        expect_failure(&o, &b,
                       (const char *const[]){
                           cases[i].part,
                           "template of image base (emulated, 256 MiB): booting:", NULL },
                       strstr(cases[i].part, "closed") ? ORCH_CLASS_CLOSED : ORCH_CLASS_FAILED);
    }
}

/* ---- verdicts */

static void test_verdicts(void **state)
{
    (void)state;
    char *dir = own_path("verdicts"), path[256], key[65], other[65], image[65];
    cleanup_buf struct orch_buf why = { 0 };
    mkdir(dir, 0700);
    orch_accel_host_key(ORCH_SLICE("qemu 1"), key);
    orch_accel_host_key(ORCH_SLICE("qemu 2"), other);
    assert_string_not_equal(key, other);
    assert_int_equal(orch_accel_recall(dir, key, "i", &why), ORCH_ACCEL_UNTRIED);
    orch_accel_remember(dir, key, "i", ORCH_ACCEL_FAILS, "it \"hung\"\n");
    assert_int_equal(orch_accel_recall(dir, key, "i", &why), ORCH_ACCEL_FAILS);
    assert_string_equal(why.p, "it \"hung\"\n");
    assert_int_equal(orch_accel_recall(dir, other, "i", &why), ORCH_ACCEL_UNTRIED);
    assert_int_equal(orch_accel_recall(dir, key, "j", &why), ORCH_ACCEL_UNTRIED);
    assert_int_equal(orch_accel_recall(dir, key, NULL, &why), ORCH_ACCEL_FAILS);
    orch_accel_remember(dir, key, "i", ORCH_ACCEL_WORKS, NULL);
    assert_int_equal(orch_accel_recall(dir, key, "i", &why), ORCH_ACCEL_WORKS);
    for (int i = 0; i < 20; i++) {
        snprintf(image, sizeof image, "image-%d", i);
        orch_accel_remember(dir, key, image, ORCH_ACCEL_WORKS, NULL);
    }
    assert_int_equal(orch_accel_recall(dir, key, "image-19", &why), ORCH_ACCEL_WORKS);
    assert_int_equal(orch_accel_recall(dir, key, "i", &why), ORCH_ACCEL_UNTRIED);
    snprintf(path, sizeof path, "%s/accel.json", dir);
    write_text(path, "{\"verdicts\":[{}", 15, 0600);
    assert_int_equal(orch_accel_recall(dir, key, NULL, &why), ORCH_ACCEL_UNTRIED);
    orch_accel_remember(dir, key, "i", ORCH_ACCEL_WORKS, NULL);
    assert_int_equal(orch_accel_recall(dir, key, "i", &why), ORCH_ACCEL_WORKS);
}

static int setup(void **state)
{
    (void)state;
    char self[512];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n < 0)
        return -1;
    self[n] = 0;
    snprintf(build_dir, sizeof build_dir, "%s", dirname(dirname(self)));
    snprintf(launcher, sizeof launcher, "%s/launcher", build_dir);
    snprintf(agent, sizeof agent, "%s/agent", build_dir);
    const char *shared = getenv("ORCH_TEST_CACHE");
    snprintf(work, sizeof work, "/tmp/orch-vm-XXXXXX");
    static const struct orch_log log = { ORCH_WARN, false, log_line, NULL };
    orch_log_use(&log);
    srand((unsigned)getpid());
    loop = orch_loop_new(NULL);
    char dir[600];
    if (shared)
        snprintf(dir, sizeof dir, "%s/orch", shared);
    else
        snprintf(dir, sizeof dir, "%s/../test-cache/orch", build_dir);
    /* Others than root reach it too: a VMM's user, an ordinary one. */
    return !mkdtemp(work) || chmod(work, 0755) < 0 || orch_mkdir_p(dir, 0700) < 0 ||
                   !realpath(dir, cache)
               ? -1
               : 0;
}

static int teardown(void **state)
{
    (void)state;
    char command[128];
    orch_loop_free(loop);
    snprintf(command, sizeof command, "rm -rf '%s'", work);
    return system(command);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_folders),
        cmocka_unit_test(test_frozen_files),
        cmocka_unit_test(test_frozen_threads),
        cmocka_unit_test(test_verdicts),
        cmocka_unit_test(test_spawn_exec_free),
        cmocka_unit_test(test_clones_differ),
        cmocka_unit_test(test_timer_in_guest),
        cmocka_unit_test(test_many_at_once),
        cmocka_unit_test(test_nothing_is_left),
        cmocka_unit_test(test_crash_is_lost),
        cmocka_unit_test(test_guest_powers_off),
        cmocka_unit_test(test_launcher_dies),
        cmocka_unit_test(test_timeout),
        cmocka_unit_test(test_log_is_capped),
        cmocka_unit_test(test_template_is_kept_and_checked),
        cmocka_unit_test(test_one_builder),
        cmocka_unit_test(test_missing_programs),
        cmocka_unit_test(test_bad_kernels),
        cmocka_unit_test(test_bad_inits),
        cmocka_unit_test(test_little_memory),
        cmocka_unit_test(test_slow_clone),
        cmocka_unit_test(test_library_list),
        cmocka_unit_test(test_mistakes),
        cmocka_unit_test(test_cache_read_only),
        cmocka_unit_test(test_cache_full),
        cmocka_unit_test(test_runtime_full),
        cmocka_unit_test(test_kvm_forbidden),
        cmocka_unit_test(test_kvm_pretends),
        cmocka_unit_test(test_killed_orch),
        cmocka_unit_test(test_as_user),
        cmocka_unit_test(test_lying_vmm),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("vm", tests, setup, teardown);
}
