/* A source (one template in the making or made) goes through its steps in this order:
 *   image → accel → programs → open a kept copy ─────────────────────────→ load → ready
 *                                └ none: lock → open again → boot → warm → freeze → ready, save
 * Each step ends by calling the next, from the loop. A failed KVM trial goes back to `programs`
 * without KVM; a damaged copy goes on as if there were none. boot.c has boot, warm and freeze. */
#include "template.h"

#include "../base/hash.h"
#include "../base/json.h"
#include "../base/log.h"
#include "accel.h"
#include "boot.h"
#include "frozen.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <x86intrin.h>

#define LOCK_MS 360000 /* another process boots the same template; about 2 s */
#define LOCK_POLL_MS 50
#define SAVE_WAIT_MS 30000
#define KEEP 8 /* templates on disk */
#define HOLD 4 /* ready templates in memory, about 90 MB each */
#define TSC_MEASURE_US 20000
#define TSC_CHECK_US 2000

struct tsc_sample {
    uint64_t tsc;
    int64_t ns;
};

struct saver {
    struct saver *next, **link;
    struct orch_templates *ts;
    pid_t pid;
    int pidfd;
    struct orch_watch *watch;
};

struct source;

struct orch_template_wait {
    struct orch_template_wait *next;
    struct source *source;
    orch_template_fn *fn;
    void *ud;
    bool told; /* about the template of this loading */
};

struct source {
    struct orch_template t;
    struct source *next;
    struct orch_templates *ts;
    char *image_name;
    enum orch_accel want;
    struct orch_template_wait *waits;

    struct orch_image_build *build;
    char key[33], host_key[65];
    uint64_t used; /* when it was wanted last, in wants */
    /* kept: it came from, or cannot go to, the disk; trial: KVM's verdict is open */
    bool ready, kept, have_trial;
    struct orch_frozen frozen;
    struct orch_frozen_load *load;
    struct orch_boot *boot;
    int lock_fd;
    int64_t lock_until;
    struct orch_timer *timer; /* waits for the lock */
};

struct orch_templates {
    struct orch_templates_opts o;
    char *cache_dir, *runtime_dir, *agent_path, *kernel, *modules, *dir, *image_dir;
    struct source *sources;
    struct saver *savers;
    uint64_t wants;
    struct tsc_sample start;
    uint32_t tsc_khz; /* 0: not measured yet */
};

static void step_image(void *ud);
static void step_programs(struct source *s);
static void without_kvm(struct source *s, const char *why);
static void step_lock(void *ud);
static void step_load(void *ud);
static void tell_late(void *ud);

/* ---- the host's TSC, which is also the emulated guest's */

/* The tightest of some reads of both clocks: one that nothing interrupted. */
static struct tsc_sample tsc_now(void)
{
    struct tsc_sample best = { 0 };
    uint64_t width = UINT64_MAX;
    for (int i = 0; i < 8; i++) {
        struct timespec t;
        uint64_t a = __rdtsc();
        clock_gettime(CLOCK_MONOTONIC_RAW, &t);
        uint64_t b = __rdtsc();
        if (b - a < width) {
            width = b - a;
            best = (struct tsc_sample){ a + (b - a) / 2,
                                        (int64_t)t.tv_sec * 1000000000 + t.tv_nsec };
        }
    }
    return best;
}

/* kHz since the manager was made; waits when that is less than min_us ago. */
static uint32_t tsc_khz(struct orch_templates *ts, int64_t min_us)
{
    struct tsc_sample now = tsc_now();
    int64_t left = min_us * 1000 - (now.ns - ts->start.ns);
    if (left > 0) {
        struct timespec t = { 0, left };
        nanosleep(&t, NULL);
        now = tsc_now();
    }
    return (uint32_t)((double)(now.tsc - ts->start.tsc) * 1e6 / (double)(now.ns - ts->start.ns) +
                      0.5);
}

/* ---- waits */

static void progress(struct source *s, const char *fmt, ...) ORCH_PRINTF(2, 3);
static void progress(struct source *s, const char *fmt, ...)
{
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (s->ts->o.progress)
        s->ts->o.progress(s->ts->o.progress_ud, line);
}

static void drop_boot(struct source *s)
{
    orch_boot_free(s->boot);
    s->boot = NULL;
}

static void unlock(struct source *s)
{
    if (s->lock_fd >= 0)
        close(orch_steal_fd(&s->lock_fd));
}

static void drop_load(struct source *s)
{
    orch_loop_unpost(s->ts->o.loop, step_load, s);
    orch_frozen_close(s->load);
    s->load = NULL;
    orch_frozen_fini(&s->frozen);
    s->t.mem_fd = s->t.state_fd = -1;
    s->t.loaded = false;
}

static void source_free(struct source *s)
{
    struct orch_loop *l = s->ts->o.loop;
    orch_loop_unpost(l, step_image, s);
    orch_loop_unpost(l, step_lock, s);
    orch_image_build_cancel(s->build);
    s->ts->o.backend->unprepare(s->ts->o.host, s);
    drop_boot(s);
    orch_timer_free(s->timer);
    unlock(s);
    drop_load(s);
    while (s->waits) {
        struct orch_template_wait *next = s->waits->next;
        orch_loop_unpost(l, tell_late, s->waits);
        free(s->waits);
        s->waits = next;
    }
    orch_image_fini(&s->t.image);
    if (s->t.disk_fd >= 0)
        close(s->t.disk_fd);
    free(s->image_name);
    free(s);
}

static void source_unlink(struct source *s)
{
    struct source **ss = &s->ts->sources;
    while (*ss != s)
        ss = &(*ss)->next;
    *ss = s->next;
}

/* To each wait that does not know yet: it is usable, or (false) no longer. Callbacks may cancel
 * waits, their own too, and ask for others. */
static void tell_usable(struct source *s, bool usable)
{
    for (struct orch_template_wait *w = s->waits; w;) {
        if (w->told == usable) {
            w = w->next;
            continue;
        }
        w->told = usable;
        w->fn(w->ud, usable ? &s->t : NULL, NULL);
        w = s->waits;
    }
}

static void tell_end(struct source *s, const struct orch_err *err)
{
    while (s->waits) {
        struct orch_template_wait w = *s->waits;
        orch_loop_unpost(s->ts->o.loop, tell_late, s->waits);
        free(s->waits);
        s->waits = w.next;
        w.fn(w.ud, err ? NULL : &s->t, err);
    }
}

static void source_failed(struct source *s, const struct orch_err *err)
{
    source_unlink(s);
    drop_boot(s);
    unlock(s);
    tell_end(s, err);
    source_free(s);
}

static void drop_oldest(struct orch_templates *ts)
{
    struct source *oldest = NULL;
    int n = 0;
    for (struct source *s = ts->sources; s; s = s->next) {
        n += s->ready;
        if (s->ready && !s->waits && (!oldest || s->used < oldest->used))
            oldest = s;
    }
    if (n <= HOLD || !oldest)
        return;
    source_unlink(oldest);
    source_free(oldest);
}

static void source_ready(struct source *s)
{
    s->ready = true;
    s->t.loaded = true;
    tell_end(s, NULL);
    drop_oldest(s->ts);
}

/* ---- image and acceleration */

static void step_accel(struct source *s)
{
    struct orch_err err;
    s->t.kvm = s->want != ORCH_ACCEL_TCG;
    if (s->t.kvm && orch_accel_device(&err) < 0) {
        if (s->want == ORCH_ACCEL_KVM) {
            orch_err_wrap(&err, "acceleration kvm");
            source_failed(s, &err);
            return;
        }
        without_kvm(s, err.msg);
        return;
    }
    step_programs(s);
}

/* The disk stays open: it is there for the template's clones even when the image is removed or
 * built anew. */
static void image_there(struct source *s)
{
    struct orch_err err;
    const char *disk = s->t.image.disk;
    if (disk && (s->t.disk_fd = orch_image_open(AT_FDCWD, disk, &err)) < 0) {
        orch_err_wrap(&err, "image %s", s->image_name);
        source_failed(s, &err);
        return;
    }
    step_accel(s);
}

static void image_built(void *ud, const struct orch_image *image, const struct orch_err *err)
{
    struct source *s = ud;
    s->build = NULL;
    if (err) {
        source_failed(s, err);
        return;
    }
    orch_image_copy(&s->t.image, image);
    image_there(s);
}

static void step_image(void *ud)
{
    struct source *s = ud;
    struct orch_templates *ts = s->ts;
    struct orch_err err;
    struct orch_image_opts o = { .cache_dir = ts->image_dir,
                                 .agent_path = ts->agent_path,
                                 .kernel = ts->kernel,
                                 .modules = ts->modules,
                                 .progress = ts->o.progress,
                                 .ud = ts->o.progress_ud };
    int r = orch_image_find(s->image_name, &o, &s->t.image, &err);
    if (r == 0) {
        image_there(s);
    } else if (r != -ESTALE && (r != -ENOENT || strcmp(s->image_name, "base") != 0)) {
        /* a disk is made only when somebody asks for it: it takes a minute and a network */
        source_failed(s, &err);
    } else {
        progress(s, "building image %s (once)", s->image_name);
        s->build = orch_image_build_start(ts->o.loop, s->image_name, &o, image_built, s);
    }
}

static struct orch_vmm_spec boot_spec(const struct source *s)
{
    return (struct orch_vmm_spec){
        .image = &s->t.image,
        .kvm = s->t.kvm,
        .network = s->t.network,
        .memory_bytes = s->t.memory_bytes,
        .vcpus = s->t.vcpus,
        .tsc_khz = s->ts->tsc_khz,
        .log_fd = -1,
        .mem_fd = -1,
        .disk_fd = -1,
        .state_fd = -1,
    };
}

static int host_key(struct orch_templates *ts, char out[65], struct orch_err *err)
{
    cleanup_buf struct orch_buf programs = { 0 };
    int r = ts->o.backend->identity(ts->o.host, true, NULL, &programs, err);
    if (r == 0)
        orch_accel_host_key((struct orch_slice){ programs.p, programs.n }, out);
    return r;
}

static int make_keys(struct source *s, struct orch_err *err)
{
    cleanup_buf struct orch_buf all = { 0 };
    char hex[65];
    struct orch_vmm_spec spec = boot_spec(s);
    if (s->t.kvm && host_key(s->ts, s->host_key, err) < 0)
        return -1;
    orch_buf_printf(&all, "orch %s\nimage %s\n%s\n", ORCH_VERSION, s->t.image.id,
                    s->t.kvm ? s->host_key : "tcg");
    if (s->ts->o.backend->identity(s->ts->o.host, s->t.kvm, &spec, &all, err) < 0)
        return -1;
    orch_sha256_hex(all.p, all.n, hex);
    snprintf(s->key, sizeof s->key, "%.32s", hex);
    return 0;
}

static void without_kvm(struct source *s, const char *why)
{
    orch_log(ORCH_INFO, "KVM is not used: %s", why);
    s->t.kvm = false;
    s->have_trial = false;
    step_programs(s);
}

static void step_open(struct source *s)
{
    struct orch_err err;
    if (make_keys(s, &err) < 0) {
        source_failed(s, &err);
        return;
    }
    if (s->t.kvm) {
        cleanup_buf struct orch_buf why = { 0 };
        enum orch_accel_verdict v = orch_accel_recall(s->ts->cache_dir, s->host_key, s->t.image.id,
                                                      &why);
        s->have_trial = v != ORCH_ACCEL_WORKS;
        if (v == ORCH_ACCEL_FAILS && s->want == ORCH_ACCEL_AUTO) {
            without_kvm(s, why.p ? why.p : "it failed before");
            return;
        }
        if (v == ORCH_ACCEL_FAILS) {
            orch_err_setc(&err, ORCH_CLASS_ISOLATION, ENOTSUP,
                          "acceleration kvm: it was tried here and does not work: %s (remembered "
                          "in %s/accel.json; remove that "
                          "file to try again)",
                          why.p ? why.p : "", s->ts->cache_dir);
            source_failed(s, &err);
            return;
        }
    }
    step_lock(s);
}

static void programs_found(void *ud, const struct orch_err *err)
{
    struct source *s = ud;
    if (!err)
        step_open(s);
    else if (s->t.kvm && s->want == ORCH_ACCEL_AUTO)
        without_kvm(s, err->msg);
    else
        source_failed(s, err);
}

static void step_programs(struct source *s)
{
    s->ts->o.backend->prepare(s->ts->o.host, s->t.kvm, programs_found, s);
}

/* ---- the copy on disk */

static void boot(struct source *s);

static bool try_open(struct source *s)
{
    struct orch_err err;
    s->load = orch_frozen_open(s->ts->dir, s->key, s->t.memory_bytes, &s->frozen, &err);
    if (!s->load) {
        if (err.code != ENOENT)
            orch_log(ORCH_WARN, "%s; it is made anew", err.msg);
        return false;
    }
    unlock(s);
    s->t.mem_fd = s->frozen.mem_fd;
    s->t.state_fd = s->frozen.state_fd;
    s->kept = true;
    orch_loop_post(s->ts->o.loop, step_load, s);
    tell_usable(s, true);
    return true;
}

/* The lock file may be removed with its template by another process that prunes; then it is no
 * lock. */
static int try_lock(struct source *s)
{
    cleanup_free char *path = orch_xasprintf("%s/%s.lock", s->ts->dir, s->key);
    struct stat st;
    int r = orch_mkdir_p(s->ts->dir, 0700);
    if (r < 0)
        return r;
    s->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (s->lock_fd < 0)
        return -errno;
    if (flock(s->lock_fd, LOCK_EX | LOCK_NB) == 0 && fstat(s->lock_fd, &st) == 0 && st.st_nlink > 0)
        return 0;
    unlock(s);
    return -EAGAIN;
}

static void step_lock(void *ud)
{
    struct source *s = ud;
    if (s->timer) {
        orch_timer_free(s->timer);
        s->timer = NULL;
    }
    if (try_open(s))
        return;
    int r = try_lock(s);
    int64_t now = orch_loop_now_ms(s->ts->o.loop);
    if (r == -EAGAIN && !s->lock_until) {
        s->lock_until = now + LOCK_MS;
        progress(s, "waiting for another orch that makes the template of image %s",
                 s->t.image.name);
    }
    if (r == -EAGAIN && now < s->lock_until) {
        s->timer = orch_timer_new(s->ts->o.loop, step_lock, s);
        orch_timer_set(s->timer, LOCK_POLL_MS);
        return;
    }
    if (r < 0) {
        s->kept = true;
        orch_log(ORCH_WARN, "%s: the template is not kept, each process boots its own: %s",
                 s->ts->dir, strerror(-r));
    } else if (try_open(s)) {
        return; /* it was finished between our look and our lock */
    }
    boot(s);
}

static void step_load(void *ud)
{
    struct source *s = ud;
    struct orch_err err;
    int r = orch_frozen_step(s->load, &err);
    if (r > 0) {
        orch_loop_post(s->ts->o.loop, step_load, s);
        return;
    }
    if (r == 0) {
        uint32_t khz = tsc_khz(s->ts, TSC_CHECK_US), was = s->frozen.tsc_khz;
        if (khz > was + was / 1000 || khz < was - was / 1000)
            r = orch_err_set(
                &err, ESTALE,
                "a template was made on a processor of another frequency (TSC %u kHz, here %u)",
                was, khz);
    }
    orch_frozen_close(s->load);
    s->load = NULL;
    if (r == 0) {
        source_ready(s);
        return;
    }
    orch_log(ORCH_WARN, "%s; it is made anew", err.msg);
    tell_usable(s, false);
    drop_load(s);
    s->kept = false;
    orch_frozen_remove(s->ts->dir, s->key);
    step_lock(s);
}

static void saver_free(struct saver *v)
{
    orch_watch_free(v->watch);
    close(v->pidfd);
    *v->link = v->next;
    if (v->next)
        v->next->link = v->link;
    free(v);
}

static void saved(void *ud, int events)
{
    (void)events;
    struct saver *v = ud;
    siginfo_t si = { 0 };
    if (waitid(P_PIDFD, (id_t)v->pidfd, &si, WEXITED | WNOHANG) == 0 && si.si_pid == 0)
        return;
    if (si.si_code != CLD_EXITED || si.si_status != 0)
        orch_log(ORCH_WARN, "%s: the template is not kept, each process boots its own: %s",
                 v->ts->dir,
                 si.si_code == CLD_EXITED ? strerror(si.si_status) : "its writer was killed");
    else
        orch_frozen_prune(v->ts->dir, KEEP);
    saver_free(v);
}

/* The child inherits the lock and holds it until the copy is there. */
static void start_saving(struct source *s)
{
    struct orch_err err;
    cleanup_buf struct orch_buf about = { 0 };
    int pidfd;
    orch_buf_str(&about, "\"image\":");
    orch_json_quote(&about, orch_slice_str(s->t.image.name));
    orch_buf_printf(
        &about, ",\"image_id\":\"%s\",\"accel\":\"%s\",\"vcpus\":%d,\"network\":%s,\"orch\":\"%s\"",
        s->t.image.id, s->t.kvm ? "kvm" : "tcg", s->t.vcpus, s->t.network ? "true" : "false",
        ORCH_VERSION);
    pid_t pid = orch_frozen_save(s->ts->dir, s->key, &s->frozen,
                                 (struct orch_slice){ about.p, about.n }, s->lock_fd, &pidfd, &err);
    if (pid < 0) {
        orch_log(ORCH_WARN, "%s: the template is not kept, each process boots its own: %s",
                 s->ts->dir, err.msg);
        return;
    }
    struct saver *v = orch_xmalloc(sizeof *v);
    *v = (struct saver){ s->ts->savers, &s->ts->savers, s->ts, pid, pidfd, NULL };
    if (v->next)
        v->next->link = &v->next;
    s->ts->savers = v;
    v->watch = orch_watch_new(s->ts->o.loop, pidfd, ORCH_READ, saved, v);
}

/* ---- booting one */

static void boot_failed(struct source *s, struct orch_err *err)
{
    unlock(s);
    bool trial = s->t.kvm && s->have_trial && err->cls != ORCH_CLASS_ISOLATION;
    if (trial) {
        const char *log = strstr(err->msg, "\nlog: "); /* will not be there for long */
        cleanup_free char *reason = orch_xstrndup(err->msg, log ? (size_t)(log - err->msg)
                                                                : strlen(err->msg));
        orch_accel_remember(s->ts->cache_dir, s->host_key, s->t.image.id, ORCH_ACCEL_FAILS, reason);
    }
    if (trial && s->want == ORCH_ACCEL_AUTO) {
        progress(s, "KVM does not work here, going on emulated");
        without_kvm(s, err->msg);
        return;
    }
    if (trial) {
        err->cls = ORCH_CLASS_ISOLATION;
        orch_err_wrap(err, "acceleration kvm: it was tried here and does not work");
    }
    source_failed(s, err);
}

static void booted(void *ud, const struct orch_frozen *f, const struct orch_err *why)
{
    struct source *s = ud;
    drop_boot(s);
    if (!f) {
        struct orch_err err = *why;
        boot_failed(s, &err);
        return;
    }
    s->frozen = *f;
    if (s->t.kvm && s->have_trial)
        orch_accel_remember(s->ts->cache_dir, s->host_key, s->t.image.id, ORCH_ACCEL_WORKS, NULL);
    s->t.mem_fd = s->frozen.mem_fd;
    s->t.state_fd = s->frozen.state_fd;
    if (!s->kept)
        start_saving(s);
    unlock(s);
    source_ready(s);
}

static void boot(struct source *s)
{
    struct orch_templates *ts = s->ts;
    struct orch_err err;
    progress(s, "booting image %s %s to make its template%s (once)", s->t.image.name,
             s->t.kvm ? "with KVM" : "emulated", s->t.network ? " with a network device" : "");
    if (!ts->tsc_khz)
        ts->tsc_khz = tsc_khz(ts, TSC_MEASURE_US);
    struct orch_boot_opts o = {
        .loop = ts->o.loop,
        .backend = ts->o.backend,
        .host = ts->o.host,
        .launcher = ts->o.launcher,
        .launcher_ud = ts->o.launcher_ud,
        .runtime_dir = ts->runtime_dir,
        .spec = boot_spec(s),
        .boot_ms = ts->o.boot_ms,
        .done = booted,
        .ud = s,
    };
    o.spec.disk_fd = s->t.disk_fd;
    s->boot = orch_boot_new(&o, &err);
    if (!s->boot)
        boot_failed(s, &err);
}

/* ---- the manager */

struct orch_templates *orch_templates_new(const struct orch_templates_opts *o)
{
    struct orch_templates *ts = orch_xcalloc(1, sizeof *ts);
    ts->o = *o;
    ts->cache_dir = orch_xstrdup(o->cache_dir);
    ts->runtime_dir = orch_xstrdup(o->runtime_dir);
    ts->agent_path = orch_xstrdup(o->agent_path);
    ts->kernel = orch_xstrdup(o->kernel);
    ts->modules = orch_xstrdup(o->modules);
    ts->dir = orch_xasprintf("%s/templates", o->cache_dir);
    ts->image_dir = orch_xasprintf("%s/images", o->cache_dir);
    ts->start = tsc_now();
    return ts;
}

void orch_templates_free(struct orch_templates *ts)
{
    if (!ts)
        return;
    while (ts->sources) {
        struct source *s = ts->sources;
        ts->sources = s->next;
        source_free(s);
    }
    while (ts->savers) {
        struct saver *v = ts->savers;
        struct pollfd p = { v->pidfd, POLLIN, 0 };
        if (poll(&p, 1, SAVE_WAIT_MS) != 1)
            kill(v->pid, SIGKILL);
        siginfo_t si;
        waitid(P_PIDFD, (id_t)v->pidfd, &si, WEXITED);
        saver_free(v);
    }
    free(ts->cache_dir);
    free(ts->runtime_dir);
    free(ts->agent_path);
    free(ts->kernel);
    free(ts->modules);
    free(ts->dir);
    free(ts->image_dir);
    free(ts);
}

static struct source *find_source(struct orch_templates *ts, const struct orch_template_want *w)
{
    for (struct source *s = ts->sources; s; s = s->next)
        if (s->want == w->accel && s->t.network == w->network &&
            s->t.memory_bytes == w->memory_bytes && s->t.vcpus == w->vcpus &&
            strcmp(s->image_name, w->image) == 0)
            return s;
    return NULL;
}

static struct source *new_source(struct orch_templates *ts, const struct orch_template_want *w)
{
    struct source *s = orch_xcalloc(1, sizeof *s);
    s->ts = ts;
    s->next = ts->sources;
    ts->sources = s;
    s->image_name = orch_xstrdup(w->image);
    s->want = w->accel;
    s->t.network = w->network;
    s->t.memory_bytes = w->memory_bytes;
    s->t.vcpus = w->vcpus;
    s->frozen = ORCH_FROZEN_NONE;
    s->t.mem_fd = s->t.state_fd = s->t.disk_fd = s->lock_fd = -1;
    orch_loop_post(ts->o.loop, step_image, s);
    return s;
}

static void tell_late(void *ud)
{
    struct orch_template_wait *w = ud;
    struct source *s = w->source;
    if (s->ready) {
        tell_end(s, NULL);
    } else if (s->load && !w->told) {
        tell_usable(s, true);
    }
}

struct orch_template_wait *orch_template_want(struct orch_templates *ts,
                                              const struct orch_template_want *want,
                                              orch_template_fn *fn, void *ud)
{
    struct source *s = find_source(ts, want);
    if (!s)
        s = new_source(ts, want);
    s->used = ++ts->wants;
    struct orch_template_wait *w = orch_xmalloc(sizeof *w);
    *w = (struct orch_template_wait){ s->waits, s, fn, ud, false };
    s->waits = w;
    if (s->ready || s->load)
        orch_loop_post(ts->o.loop, tell_late, w);
    return w;
}

void orch_template_cancel(struct orch_template_wait *w)
{
    if (!w)
        return;
    orch_loop_unpost(w->source->ts->o.loop, tell_late, w);
    struct orch_template_wait **ww = &w->source->waits;
    while (*ww != w)
        ww = &(*ww)->next;
    *ww = w->next;
    free(w);
}

int orch_template_open_state(const struct orch_template *t, struct orch_err *err)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", t->state_fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : orch_err_set(err, errno, "template: state: %s", strerror(errno));
}

enum orch_isolation orch_templates_known(struct orch_templates *ts, struct orch_buf *why)
{
    struct orch_err err;
    char key[65];
    cleanup_buf struct orch_buf reason = { 0 };
    cleanup_buf struct orch_buf programs = { 0 };
    if (ts->o.backend->identity(ts->o.host, false, NULL, &programs, &err) < 0) {
        orch_buf_str(why, err.msg);
        return ORCH_ISOLATION_NONE;
    }
    if (orch_accel_device(&err) < 0 || host_key(ts, key, &err) < 0) {
        orch_buf_str(why, err.msg);
        return ORCH_ISOLATION_EMULATED;
    }
    switch (orch_accel_recall(ts->cache_dir, key, NULL, &reason)) {
    case ORCH_ACCEL_WORKS:
        orch_buf_str(why, "KVM worked when it was tried");
        return ORCH_ISOLATION_HARDWARE;
    case ORCH_ACCEL_FAILS:
        orch_buf_printf(why,
                        "KVM failed when it was tried: %s (remembered in %s/accel.json; remove "
                        "that file to try again)",
                        reason.p ? reason.p : "", ts->cache_dir);
        return ORCH_ISOLATION_EMULATED;
    case ORCH_ACCEL_UNTRIED:
        break;
    }
    orch_buf_str(why, "KVM was not tried yet; the first microVM tries it");
    return ORCH_ISOLATION_NONE;
}
