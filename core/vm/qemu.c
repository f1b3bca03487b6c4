/* QEMU's microvm machine as a VMM: where its files are, its arguments, its control protocol (QMP).
 *
 * Everything QEMU is told is written ahead into its two socketpairs, so that a clone is one exec
 * and no round trip. A template is frozen while it runs (no QMP "stop"): the state then says
 * "running", and a clone goes on by itself once it has loaded it. QEMU is not trusted once a guest
 * has run in it: lines of its QMP are bounded, scanned strictly, and nothing it says makes orch do
 * more than note it. */
#include "vmm.h"

#include "../base/json.h"
#include "../base/log.h"
#include "../base/proc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define LD_SO "/lib64/ld-linux-x86-64.so.2"
#define QMP_LINE_MAX (64 * 1024)
#define QMP_TOTAL_MAX (1024 * 1024) /* all it may say in one life; it says about 2 KiB */
#define LIST_MAX (64 * 1024)        /* bytes of ld.so's output */
#define MAX_BINDS 128
#define MAX_ARGV 80
#define DISK_THREADS 8

/* Relative to the root that the launcher makes for it. */
#define GUEST_FIRMWARE_DIR "/fw"
#define FD(slot) (ORCH_VMM_FD_BASE + ORCH_LAUNCH_FD_##slot)

/* Debian's second binary, KVM only, needs a fifth of the libraries and starts 11 ms sooner. */
static const char *const kvm_programs[] = { "/usr/bin/qemu-system-x86_64-microvm",
                                            "/usr/bin/qemu-system-x86_64",
                                            "/usr/local/bin/qemu-system-x86_64", NULL };
static const char *const tcg_programs[] = { "/usr/bin/qemu-system-x86_64",
                                            "/usr/local/bin/qemu-system-x86_64", NULL };
/* QEMU loads its translator as a module where the distribution builds it so, from a fixed place. */
static const char *const tcg_modules[] = { "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
                                           "/usr/lib64/qemu/accel-tcg-x86_64.so",
                                           "/usr/lib/qemu/accel-tcg-x86_64.so", NULL };
static const char *const firmwares[] = { "/usr/share/qemu/qboot.rom",
                                         "/usr/share/qemu/bios-microvm.bin",
                                         "/usr/local/share/qemu/bios-microvm.bin",
                                         "/usr/share/qboot/bios-microvm.bin", NULL };

struct waiter {
    struct waiter *next;
    orch_vmm_ready_fn *done;
    void *ud;
};

/* One QEMU binary and what must be bound into a root for it to start. */
struct program {
    struct orch_vmm_host *host;
    bool kvm, ready;
    char *path, *firmware;
    char *libs[MAX_BINDS];
    size_t n_libs;
    struct waiter *waiters;
    struct orch_proc *lister; /* ld.so --list, while it runs */
    struct orch_watch *watch;
    struct orch_buf listed;
    struct orch_err err; /* the last prepare's failure, when code != 0 */
};

struct orch_vmm_host {
    struct orch_loop *loop;
    char *cache_dir, *override;
    struct program programs[2]; /* by kvm */
};

struct orch_vmm {
    struct orch_loop *loop;
    struct orch_vmm_cb cb;
    struct orch_cell *cell;
    int qmp_fd;
    struct orch_watch *watch;
    struct orch_buf in;
    struct orch_json_doc doc;
    size_t total;
    bool clone, greeted, freezing, completed;
    bool stopped;           /* by its guest */
    char said[512];         /* QMP's last error, or how the guest stopped */
    struct orch_err broken; /* protocol error, delivered from the next turn */
};

/* ---- files on this host */

static const char *first_existing(const char *const *paths, struct stat *st)
{
    for (; *paths; paths++)
        if (stat(*paths, st) == 0 && S_ISREG(st->st_mode))
            return *paths;
    return NULL;
}

static int find_program(struct program *p, struct stat *st, struct orch_err *err)
{
    const char *const given[] = { p->host->override, NULL };
    const char *const *places = p->host->override ? given : p->kvm ? kvm_programs : tcg_programs;
    const char *path = first_existing(places, st);
    if (!path) {
        cleanup_buf struct orch_buf tried = { 0 };
        for (size_t i = 0; places[i]; i++)
            orch_buf_printf(&tried, "%s%s", i ? ", " : "", places[i]);
        return orch_err_setc(
            err, ORCH_CLASS_ISOLATION, ENOENT,
            "QEMU not found (looked for %s); install it: apt-get install qemu-system-x86", tried.p);
    }
    struct stat fw;
    const char *firmware = first_existing(firmwares, &fw);
    if (!firmware)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, ENOENT,
                             "QEMU's microvm firmware not found (looked for %s and others); "
                             "install it: apt-get install "
                             "qemu-system-data",
                             firmwares[0]);
    free(p->path);
    free(p->firmware);
    p->path = orch_xstrdup(path);
    p->firmware = orch_xstrdup(firmware);
    return 0;
}

static void add_file_identity(struct orch_buf *out, const char *path, const struct stat *st)
{
    orch_buf_printf(out, "%s %lld %lld.%09ld\n", path, (long long)st->st_size,
                    (long long)st->st_mtim.tv_sec, st->st_mtim.tv_nsec);
}

/* What the list of libraries depends on. */
static void list_identity(struct program *p, const struct stat *st, struct orch_buf *out)
{
    struct stat cache;
    add_file_identity(out, p->path, st);
    if (stat("/etc/ld.so.cache", &cache) == 0)
        add_file_identity(out, "/etc/ld.so.cache", &cache);
}

/* A library that others than root (or this user, when not root) can change would let them into the
 * VMM. */
static bool trusted_file(const char *path)
{
    struct stat st;
    return path[0] == '/' && stat(path, &st) == 0 && S_ISREG(st.st_mode) &&
           !(st.st_mode & (S_IWGRP | S_IWOTH)) && (st.st_uid == 0 || st.st_uid == geteuid());
}

static void clear_libs(struct program *p)
{
    while (p->n_libs)
        free(p->libs[--p->n_libs]);
}

static bool add_lib(struct program *p, const char *s, size_t n)
{
    cleanup_free char *path = orch_xstrndup(s, n);
    for (size_t i = 0; i < p->n_libs; i++)
        if (strcmp(p->libs[i], path) == 0)
            return true;
    if (p->n_libs == MAX_BINDS - 8 || !trusted_file(path))
        return false;
    p->libs[p->n_libs++] = orch_steal_ptr(&path);
    return true;
}

static char *list_cache_path(const struct program *p)
{
    return orch_xasprintf("%s/qemu-%s.libs", p->host->cache_dir, p->kvm ? "kvm" : "tcg");
}

/* The file: the identity's lines, an empty line, one path a line. */
static bool read_cached_list(struct program *p, struct orch_slice identity)
{
    cleanup_free char *path = list_cache_path(p);
    cleanup_buf struct orch_buf text = { 0 };
    if (!trusted_file(path) || orch_read_file(AT_FDCWD, path, LIST_MAX, &text) < 0)
        return false;
    if (text.n <= identity.n + 1 || memcmp(text.p, identity.p, identity.n) != 0 ||
        text.p[identity.n] != '\n')
        return false;
    clear_libs(p);
    for (const char *s = text.p + identity.n + 1, *end; *s; s = end + 1) {
        end = strchr(s, '\n');
        if (!end || !add_lib(p, s, (size_t)(end - s))) {
            clear_libs(p);
            return false;
        }
    }
    return p->n_libs > 0;
}

static void write_cached_list(struct program *p)
{
    struct stat st;
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_free char *path = list_cache_path(p);
    if (stat(p->path, &st) < 0)
        return;
    list_identity(p, &st, &text);
    orch_buf_char(&text, '\n');
    for (size_t i = 0; i < p->n_libs; i++)
        orch_buf_printf(&text, "%s\n", p->libs[i]);
    int e = orch_write_file(AT_FDCWD, path, text.p, text.n, 0600);
    if (e < 0)
        orch_log(ORCH_INFO, "%s: cannot be written, QEMU's libraries are listed anew each time: %s",
                 path, strerror(-e));
}

/* Lines of ld.so --list: "\tNAME => PATH (0x…)", "\tPATH (0x…)"; the vdso has no path. */
static int parse_list(struct program *p, struct orch_err *err)
{
    clear_libs(p);
    for (const char *s = p->listed.p ? p->listed.p : ""; *s;) {
        size_t n = strcspn(s, "\n");
        const char *slash = memchr(s, '/', n), *arrow = memmem(s, n, " => ", 4);
        if (arrow)
            slash = arrow + 4;
        size_t len = slash && slash < s + n ? strcspn(slash, " \n") : 0;
        if (len && !add_lib(p, slash, len))
            return orch_err_setc(err, ORCH_CLASS_ISOLATION, EPERM,
                                 "QEMU's library %.*s is missing or can be changed by others than "
                                 "root; reinstall it",
                                 (int)len, slash);
        s += n + (s[n] == '\n');
    }
    if (!p->n_libs)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, ENOEXEC, "%s --list %s: lists no library",
                             LD_SO, p->path);
    return add_lib(p, LD_SO, strlen(LD_SO))
               ? 0
               : orch_err_setc(err, ORCH_CLASS_ISOLATION, EPERM, "%s cannot be used", LD_SO);
}

/* ---- prepare */

static void tell_waiters(void *ud)
{
    struct program *p = ud;
    while (p->waiters && !p->lister) {
        struct waiter w = *p->waiters;
        free(p->waiters);
        p->waiters = w.next;
        w.done(w.ud, p->ready ? NULL : &p->err);
    }
}

static void listed_some(void *ud, int events)
{
    (void)events;
    struct program *p = ud;
    char buf[8192];
    ssize_t n = read(orch_proc_stdout(p->lister), buf, sizeof buf);
    if (n > 0 && p->listed.n + (size_t)n <= LIST_MAX)
        orch_buf_add(&p->listed, buf, (size_t)n);
    else if (n >= 0 || errno != EAGAIN)
        orch_watch_set(p->watch, 0);
}

static void lister_end(struct program *p)
{
    orch_watch_free(p->watch);
    orch_proc_free(p->lister);
    p->watch = NULL;
    p->lister = NULL;
}

static void listed_all(void *ud, int status)
{
    struct program *p = ud;
    for (size_t before = SIZE_MAX; before != p->listed.n;) {
        before = p->listed.n;
        listed_some(p, ORCH_READ);
    }
    if (status != 0) {
        char how[64];
        orch_proc_describe(status, how, sizeof how);
        struct orch_slice said = orch_proc_stderr(p->lister);
        orch_err_setc(&p->err, ORCH_CLASS_ISOLATION, ENOEXEC, "%s --list %s: %s: %.*s", LD_SO,
                      p->path, how, (int)said.n, said.p);
    } else if (parse_list(p, &p->err) == 0) {
        p->ready = true;
        write_cached_list(p);
    }
    lister_end(p);
    orch_buf_free(&p->listed);
    tell_waiters(p);
}

static int start_lister(struct program *p)
{
    const char *argv[] = { LD_SO, "--list", p->path, NULL };
    struct orch_proc_opts o = { .argv = argv, .on_exit = listed_all, .ud = p };
    p->lister = orch_proc_start(p->host->loop, &o, &p->err);
    if (!p->lister)
        return orch_err_wrap(&p->err, "listing QEMU's libraries");
    orch_proc_close_stdin(p->lister);
    p->watch = orch_watch_new(p->host->loop, orch_proc_stdout(p->lister), ORCH_READ, listed_some,
                              p);
    return 0;
}

static void qemu_prepare(struct orch_vmm_host *h, bool kvm, orch_vmm_ready_fn *done, void *ud)
{
    struct program *p = &h->programs[kvm];
    struct waiter **end = &p->waiters;
    while (*end)
        end = &(*end)->next;
    *end = orch_xmalloc(sizeof **end);
    **end = (struct waiter){ NULL, done, ud };
    if (p->lister)
        return;
    struct stat st;
    cleanup_buf struct orch_buf identity = { 0 };
    p->ready = false;
    if (find_program(p, &st, &p->err) == 0) {
        list_identity(p, &st, &identity);
        p->ready = read_cached_list(p, (struct orch_slice){ identity.p, identity.n });
        if (!p->ready && start_lister(p) == 0)
            return;
    }
    orch_loop_unpost(h->loop, tell_waiters, p);
    orch_loop_post(h->loop, tell_waiters, p);
}

static void qemu_unprepare(struct orch_vmm_host *h, void *ud)
{
    for (int kvm = 0; kvm < 2; kvm++)
        for (struct waiter **ww = &h->programs[kvm].waiters; *ww;) {
            struct waiter *w = *ww;
            if (w->ud != ud) {
                ww = &w->next;
                continue;
            }
            *ww = w->next;
            free(w);
        }
}

static struct orch_vmm_host *qemu_host_new(struct orch_loop *l, const char *cache_dir,
                                           const char *program)
{
    struct orch_vmm_host *h = orch_xcalloc(1, sizeof *h);
    h->loop = l;
    h->cache_dir = orch_xstrdup(cache_dir);
    h->override = orch_xstrdup(program);
    for (int kvm = 0; kvm < 2; kvm++) {
        h->programs[kvm].host = h;
        h->programs[kvm].kvm = kvm;
    }
    return h;
}

static void qemu_host_free(struct orch_vmm_host *h)
{
    if (!h)
        return;
    for (int kvm = 0; kvm < 2; kvm++) {
        struct program *p = &h->programs[kvm];
        orch_loop_unpost(h->loop, tell_waiters, p);
        lister_end(p);
        while (p->waiters) {
            struct waiter *next = p->waiters->next;
            free(p->waiters);
            p->waiters = next;
        }
        clear_libs(p);
        orch_buf_free(&p->listed);
        free(p->path);
        free(p->firmware);
    }
    free(h->cache_dir);
    free(h->override);
    free(h);
}

/* ---- arguments */

struct args {
    char *v[MAX_ARGV + 1];
    size_t n;
};

static void args_free(struct args *a)
{
    while (a->n)
        free(a->v[--a->n]);
}

static ORCH_PRINTF(2, 3) void arg(struct args *a, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    if (a->n == MAX_ARGV || vasprintf(&a->v[a->n], fmt, ap) < 0)
        abort();
    va_end(ap);
    a->v[++a->n] = NULL;
}

/* Emulated: without a TSC deadline the kernel checks the local APIC's timer against the PIT, and
 * with neither PIT nor ACPI a guest has no timer at all. The frequency is given because calibrating
 * it on a busy host fails often, and then the boot hangs. Freed memory is the guest's; nothing is
 * gained from loglevel=0, which would also silence a panic. */
static void add_kernel(struct args *a, const struct orch_vmm_spec *s)
{
    cleanup_buf struct orch_buf line = { 0 };
    orch_buf_str(&line, "console=ttyS0 quiet loglevel=1 reboot=t panic=-1 cryptomgr.notests "
                        "i8042.nokbd i8042.noaux "
                        "random.trust_cpu=on");
    if (!s->kvm)
        orch_buf_printf(&line, " tsc_early_khz=%u tsc=reliable", s->tsc_khz);
    arg(a, "-kernel");
    arg(a, ORCH_VMM_FD_DIR "/%d", FD(KERNEL));
    arg(a, "-initrd");
    arg(a, ORCH_VMM_FD_DIR "/%d", FD(INITRD));
    arg(a, "-append");
    arg(a, "%s", line.p);
}

/* Read-only, so that all clones and templates may have it at once. QEMU would start up to 64
 * threads to read it, more than its limit of processes lets it, and would abort; and it would drop
 * the file from the host's page cache at each clone's start, which its filter forbids. */
static void add_disk(struct args *a)
{
    arg(a, "-object");
    arg(a, "main-loop,id=loop,thread-pool-max=%d", DISK_THREADS);
    arg(a, "-blockdev");
    arg(a,
        "driver=file,node-name=file,filename=" ORCH_VMM_FD_DIR
        "/%d,read-only=on,auto-read-only=off,locking=off,"
        "drop-cache=off",
        FD(DISK));
    arg(a, "-blockdev");
    arg(a, "driver=raw,node-name=disk,file=file,read-only=on");
    arg(a, "-device");
    arg(a, "virtio-blk-device,drive=disk");
}

static void build_args(struct args *a, const char *program, const struct orch_vmm_spec *s)
{
    unsigned mib = (unsigned)(s->memory_bytes >> 20);
    const char *timer = s->kvm ? "off" : "on";
    arg(a, "%s", program);
    arg(a, "-L");
    arg(a, GUEST_FIRMWARE_DIR);
    arg(a, "-accel");
    arg(a, s->kvm ? "kvm" : "tcg,tb-size=64"); /* more would not fit the address space limit */
    arg(a, "-M");
    arg(a,
        "microvm,acpi=%s,pit=%s,pic=%s,rtc=on,isa-serial=on,x-option-roms=off,memory-backend=mem",
        s->image->acpi ? "on" : "off", timer, timer);
    arg(a, "-cpu");
    arg(a, s->kvm ? "host" : "max");
    arg(a, "-smp");
    arg(a, "%d", s->vcpus);
    arg(a, "-m");
    arg(a, "%uM", mib);
    arg(a, "-nodefaults");
    arg(a, "-no-user-config");
    arg(a, "-no-reboot");
    arg(a, "-display");
    arg(a, "none");
    arg(a, "-object");
    arg(a, "memory-backend-file,id=mem,size=%uM,mem-path=" ORCH_VMM_FD_DIR "/%d,share=%s", mib,
        FD(MEM), s->clone ? "off" : "on");
    arg(a, "-chardev");
    arg(a, "stdio,id=console,signal=off");
    arg(a, "-serial");
    arg(a, "chardev:console");
    arg(a, "-chardev");
    arg(a, "socket,id=agent,fd=%d", FD(AGENT));
    arg(a, "-device");
    arg(a, "virtio-serial-device");
    arg(a, "-device");
    arg(a, "virtserialport,chardev=agent,name=orch.0");
    arg(a, "-object");
    arg(a, "rng-builtin,id=rng");
    arg(a, "-device");
    arg(a, "virtio-rng-device,rng=rng");
    if (s->network) {
        const uint8_t *mac = (const uint8_t *)ORCH_NET_GUEST_MAC;
        arg(a, "-netdev");
        arg(a, "tap,id=net,fd=%d,vhost=off", FD(TAP));
        arg(a, "-device");
        arg(a, "virtio-net-device,netdev=net,mac=%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1],
            mac[2], mac[3], mac[4], mac[5]);
    }
    if (s->image->disk)
        add_disk(a);
    arg(a, "-chardev");
    arg(a, "socket,id=qmp,fd=%d", FD(QMP));
    arg(a, "-mon");
    arg(a, "chardev=qmp,mode=control");
    /* Debian builds the small binary without it; orch's own filter, which allows less, is over
     * both. */
    const char *dash = strrchr(program, '-');
    if (!dash || strcmp(dash, "-microvm") != 0) {
        arg(a, "-sandbox");
        arg(a, "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    }
    if (s->clone) {
        arg(a, "-incoming");
        arg(a, "defer");
    } else {
        add_kernel(a, s);
    }
}

static int qemu_identity(struct orch_vmm_host *h, bool kvm, const struct orch_vmm_spec *spec,
                         struct orch_buf *out, struct orch_err *err)
{
    struct program *p = &h->programs[kvm];
    struct stat st;
    if (find_program(p, &st, err) < 0)
        return -ENOENT;
    add_file_identity(out, p->path, &st);
    if (stat(p->firmware, &st) == 0)
        add_file_identity(out, p->firmware, &st);
    if (!spec)
        return 0;
    /* The frequency is no part of it: it is measured, and compared with a tolerance. */
    struct orch_vmm_spec s = *spec;
    struct args a = { 0 };
    s.tsc_khz = 0;
    s.clone = false;
    build_args(&a, p->path, &s);
    for (size_t i = 0; i < a.n; i++)
        orch_buf_printf(out, "%s\n", a.v[i]);
    args_free(&a);
    return 0;
}

/* ---- QMP */

static void qmp_send(struct orch_vmm *v, const char *text, int pass_fd)
{
    struct iovec iov = { (void *)(uintptr_t)text, strlen(text) };
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = { { 0 } };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };
    if (pass_fd >= 0) {
        m.msg_control = &control;
        m.msg_controllen = sizeof control.bytes;
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &pass_fd, sizeof(int));
    }
    /* A few hundred bytes in an empty socket buffer; when its reader is gone, its exit tells. */
    if (sendmsg(v->qmp_fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        orch_log(ORCH_DEBUG, "QMP: not sent: %s", strerror(errno));
}

static void tell_broken(void *ud)
{
    struct orch_vmm *v = ud;
    v->cb.ended(v->cb.ud, &v->broken, -1);
}

static void qmp_stop(struct orch_vmm *v)
{
    orch_watch_free(v->watch);
    v->watch = NULL;
}

static ORCH_PRINTF(2, 3) void break_off(struct orch_vmm *v, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    cleanup_free char *text = NULL;
    if (vasprintf(&text, fmt, ap) < 0)
        abort();
    va_end(ap);
    qmp_stop(v);
    orch_cell_free(v->cell);
    v->cell = NULL;
    orch_err_set(&v->broken, EPROTO, "QEMU's control channel: %s", text);
    orch_loop_post(v->loop, tell_broken, v);
}

/* Keeps what can be shown: QMP's texts repeat paths and names that orch gave. */
static void note_error(struct orch_vmm *v, uint32_t tok)
{
    cleanup_buf struct orch_buf desc = { 0 }, shown = { 0 };
    if (orch_json_string(&v->doc, orch_json_get(&v->doc, tok, "desc"), &desc) == 0) {
        orch_escape_terminal(&shown, (struct orch_slice){ desc.p, desc.n }, false);
        snprintf(v->said, sizeof v->said, "%s", shown.p ? shown.p : "");
    }
}

static void migration_event(struct orch_vmm *v)
{
    uint32_t status = orch_json_get(&v->doc, orch_json_get(&v->doc, 0, "data"), "status");
    if (!status)
        return;
    if (orch_json_string_eq(&v->doc, status, "completed") && !v->completed) {
        v->completed = true;
        if (v->freezing)
            qmp_send(v, "{\"execute\":\"quit\"}\n", -1);
        else if (v->clone)
            v->cb.phase(v->cb.ud, "state");
    } else if (orch_json_string_eq(&v->doc, status, "failed")) {
        break_off(v, "%s failed: %s", v->freezing ? "freezing" : "loading the state",
                  *v->said ? v->said : "no reason given");
    }
}

static void guest_stopped(struct orch_vmm *v)
{
    uint32_t reason = orch_json_get(&v->doc, orch_json_get(&v->doc, 0, "data"), "reason");
    bool off = reason && orch_json_string_eq(&v->doc, reason, "guest-shutdown");
    snprintf(v->said, sizeof v->said, "%s",
             off ? "the guest powered off"
                 : "the guest stopped (a reboot, a kernel panic, or its init ended)");
    v->stopped = true;
}

/* false: the rest must not be looked at, the callback may have freed v. */
static void qmp_line(struct orch_vmm *v, struct orch_slice line)
{
    struct orch_json_limits lim = { QMP_LINE_MAX, 32, 4096 };
    struct orch_json_fault fault;
    if (orch_json_scan(&v->doc, line, &lim, &fault) < 0) {
        break_off(v, "byte %zu: %s", fault.byte, fault.rule);
        return;
    }
    uint32_t error = orch_json_get(&v->doc, 0, "error"), event = orch_json_get(&v->doc, 0, "event");
    if (error) {
        note_error(v, error);
        break_off(v, "%s", *v->said ? v->said : "an error without a text");
    } else if (event && orch_json_string_eq(&v->doc, event, "MIGRATION")) {
        migration_event(v);
    } else if (event && orch_json_string_eq(&v->doc, event, "SHUTDOWN") && !v->freezing) {
        guest_stopped(v);
    } else if (!v->greeted && orch_json_get(&v->doc, 0, "QMP")) {
        v->greeted = true;
        v->cb.phase(v->cb.ud, "vmm");
    }
}

static void qmp_readable(void *ud, int events)
{
    (void)events;
    struct orch_vmm *v = ud;
    char buf[16384];
    ssize_t n = recv(v->qmp_fd, buf, sizeof buf, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        qmp_stop(v); /* its exit follows */
        return;
    }
    v->total += (size_t)n;
    orch_buf_add(&v->in, buf, (size_t)n);
    if (v->total > QMP_TOTAL_MAX) {
        break_off(v, "it sent more than %d KiB", QMP_TOTAL_MAX / 1024);
        return;
    }
    while (v->watch) {
        char *nl = memchr(v->in.p, '\n', v->in.n);
        size_t len = nl ? (size_t)(nl - v->in.p) : v->in.n;
        if (len > QMP_LINE_MAX)
            break_off(v, "a line of more than %d KiB", QMP_LINE_MAX / 1024);
        if (!nl || !v->watch)
            return;
        size_t text = len && nl[-1] == '\r' ? len - 1 : len;
        if (text)
            qmp_line(v, (struct orch_slice){ v->in.p, text });
        orch_buf_consume(&v->in, len + 1);
    }
}

/* ---- life */

static void vmm_exited(void *ud, int status)
{
    struct orch_vmm *v = ud;
    /* What it said before it went explains the exit. */
    for (int i = 0; i < 16 && v->watch; i++)
        qmp_readable(v, ORCH_READ);
    if (v->broken.code)
        return;
    if (v->freezing && v->completed && status == 0) {
        v->cb.frozen(v->cb.ud);
        return;
    }
    char how[64];
    struct orch_err err;
    orch_proc_describe(status, how, sizeof how);
    if (v->stopped && status == 0)
        orch_err_set(&err, ECHILD, "%s", v->said);
    else
        orch_err_set(&err, ECHILD,
                     WIFSIGNALED(status) ? "the VMM was %s%s%s" : "the VMM ended (%s)%s%s", how,
                     *v->said ? ": " : "", v->said);
    v->cb.ended(v->cb.ud, &err, status);
}

static void vmm_not_run(void *ud, const struct orch_err *err)
{
    struct orch_vmm *v = ud;
    v->cb.ended(v->cb.ud, err, -1);
}

static void qemu_free(struct orch_vmm *v)
{
    if (!v)
        return;
    qmp_stop(v);
    orch_loop_unpost(v->loop, tell_broken, v);
    orch_cell_free(v->cell);
    if (v->qmp_fd >= 0)
        close(v->qmp_fd);
    orch_buf_free(&v->in);
    orch_json_doc_free(&v->doc);
    free(v);
}

static int socket_pair(int fds[2], struct orch_err *err)
{
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return orch_err_set(err, errno, "socketpair for QEMU: %s", strerror(errno));
    fcntl(fds[0], F_SETFL, O_NONBLOCK);
    return 0;
}

static void qemu_go(struct orch_vmm *v)
{
    char text[96];
    snprintf(text, sizeof text,
             "{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"fd:%d\"}}\n", FD(STATE));
    qmp_send(v, text, -1);
}

static int start_cell(struct orch_vmm *v, struct program *p, struct orch_launcher *la,
                      const struct orch_vmm_spec *s, int agent, int qmp, struct orch_err *err)
{
    struct args a = { 0 };
    struct stat st;
    struct orch_cell_bind binds[MAX_BINDS];
    size_t n = 0;
    binds[n++] = (struct orch_cell_bind){ p->path, p->path };
    binds[n++] = (struct orch_cell_bind){ p->firmware, GUEST_FIRMWARE_DIR "/bios-microvm.bin" };
    const char *module = s->kvm ? NULL : first_existing(tcg_modules, &st);
    if (module)
        binds[n++] = (struct orch_cell_bind){ module, module };
    /* By descriptor: root's VMM has a uid that cannot reach into root's cache. */
    cleanup_close int kernel = -1, initrd = -1;
    if (!s->clone && ((kernel = orch_image_open(AT_FDCWD, s->image->kernel, err)) < 0 ||
                      (initrd = orch_image_open(AT_FDCWD, s->image->initrd, err)) < 0))
        return -1;
    for (size_t i = 0; i < p->n_libs; i++)
        binds[n++] = (struct orch_cell_bind){ p->libs[i], p->libs[i] };
    build_args(&a, p->path, s);
    struct orch_cell_opts o = {
        .argv = (const char *const *)a.v,
        .binds = binds,
        .n_binds = n,
        .flags = (s->kvm ? ORCH_VMM_KVM : 0) | (s->clone ? 0 : ORCH_VMM_FREEZING),
        .as_bytes = (1ULL << 30) + s->memory_bytes,
        .on_exit = vmm_exited,
        .on_error = vmm_not_run,
        .ud = v,
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(o.fds); i++)
        o.fds[i] = -1;
    o.fds[ORCH_LAUNCH_FD_LOG] = s->log_fd;
    o.fds[ORCH_LAUNCH_FD_AGENT] = agent;
    o.fds[ORCH_LAUNCH_FD_QMP] = qmp;
    o.fds[ORCH_LAUNCH_FD_MEM] = s->mem_fd;
    o.fds[ORCH_LAUNCH_FD_STATE] = s->clone ? s->state_fd : -1;
    o.fds[ORCH_LAUNCH_FD_DISK] = s->disk_fd;
    o.fds[ORCH_LAUNCH_FD_KERNEL] = kernel;
    o.fds[ORCH_LAUNCH_FD_INITRD] = initrd;
    v->cell = s->netns ? orch_netns_start(s->netns, &o, err) : orch_cell_new(la, &o, err);
    args_free(&a);
    return v->cell ? 0 : -1;
}

static struct orch_vmm *qemu_start(struct orch_vmm_host *h, struct orch_launcher *la,
                                   const struct orch_vmm_spec *s, const struct orch_vmm_cb *cb,
                                   int *agent_fd, struct orch_err *err)
{
    int agent[2] = { -1, -1 }, qmp[2] = { -1, -1 };
    if (socket_pair(agent, err) < 0)
        return NULL;
    cleanup_close int agent_host = agent[0], agent_vmm = agent[1];
    if (socket_pair(qmp, err) < 0)
        return NULL;
    cleanup_close int qmp_vmm = qmp[1];
    struct orch_vmm *v = orch_xcalloc(1, sizeof *v);
    v->loop = h->loop;
    v->cb = *cb;
    v->clone = s->clone;
    v->qmp_fd = qmp[0];
    if (start_cell(v, &h->programs[s->kvm], la, s, agent_vmm, qmp_vmm, err) < 0) {
        qemu_free(v);
        return NULL;
    }
    v->watch = orch_watch_new(h->loop, v->qmp_fd, ORCH_READ, qmp_readable, v);
    qmp_send(v,
             "{\"execute\":\"qmp_capabilities\"}\n"
             "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":["
             "{\"capability\":\"x-ignore-shared\",\"state\":true},{\"capability\":\"events\","
             "\"state\":true}]}}\n"
             /* Else a clone's VMM announces its address by RARP, which the packet filter stops. */
             "{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"announce-rounds\":0}}\n",
             -1);
    if (s->clone && !s->hold)
        qemu_go(v);
    *agent_fd = orch_steal_fd(&agent_host);
    return v;
}

static void qemu_freeze(struct orch_vmm *v, int state_fd)
{
    v->freezing = true;
    qmp_send(v, "{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"state\"}}\n", state_fd);
    qmp_send(v, "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"fd:state\"}}\n", -1);
}

static struct orch_cell *qemu_cell(const struct orch_vmm *v)
{
    return v->cell;
}

const struct orch_vmm_backend orch_vmm_qemu = {
    .name = "qemu",
    .host_new = qemu_host_new,
    .host_free = qemu_host_free,
    .prepare = qemu_prepare,
    .unprepare = qemu_unprepare,
    .identity = qemu_identity,
    .start = qemu_start,
    .go = qemu_go,
    .freeze = qemu_freeze,
    .cell = qemu_cell,
    .free = qemu_free,
};
