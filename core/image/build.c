#include "image_int.h"

#include "../base/hash.h"
#include "../base/proc.h"
#include "initrd.h"
#include "kernel.h"
#include "tar.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

enum {
    BUSYBOX_MAX = 16 << 20,
    TEXT_MAX = 256 * 1024, /* a child's output that is read as text */
    LOCK_RETRY_MS = 100,
    LIMIT_MS = 20 * 60 * 1000, /* for everything, a slow download included */
};

/* One build, in steps from the loop: the kernel, its modules, the disk, the initrd. */
struct orch_image_build {
    struct orch_loop *loop;
    struct orch_image_opts o; /* strings are owned */
    char *name;
    orch_image_done_fn *done;
    void *ud;
    void (*step)(struct orch_image_build *); /* posted, or after the child */
    struct orch_timer *timer, *limit;
    int lock;
    bool waited;
    char *tmp; /* the folder being made */

    struct orch_proc *proc;
    struct orch_watch *watch;
    bool in_tar, at_eof, exited;
    int status;
    struct orch_buf text;
    struct orch_tar tar;

    char *package, *deb, *source, *release;
    struct orch_recipe *recipe; /* NULL: none given */
    char recipe_hash[65];       /* of the disk; empty: the image has none */
    char disk_hash[65];
    uint64_t disk_bytes;
    struct orch_buf line; /* of the child's progress */
    struct orch_buf kernel;
    struct orch_modules modules;
    char agent_hash[65];
};

static void say(struct orch_image_build *b, const char *fmt, ...) ORCH_PRINTF(2, 3);
static void say(struct orch_image_build *b, const char *fmt, ...)
{
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (b->o.progress)
        b->o.progress(b->o.ud, line);
}

static void on_step(void *ud)
{
    struct orch_image_build *b = ud;
    b->step(b);
}

static void next(struct orch_image_build *b, void (*step)(struct orch_image_build *))
{
    b->step = step;
    orch_loop_post(b->loop, on_step, b);
}

static void child_end(struct orch_image_build *b)
{
    orch_watch_free(b->watch);
    orch_proc_free(b->proc);
    b->watch = NULL;
    b->proc = NULL;
}

static void build_free(struct orch_image_build *b)
{
    orch_loop_unpost(b->loop, on_step, b);
    child_end(b);
    orch_timer_free(b->timer);
    orch_timer_free(b->limit);
    if (b->tmp)
        orch_image_folder_remove(b->tmp);
    if (b->lock >= 0)
        close(b->lock);
    orch_modules_fini(&b->modules);
    orch_tar_fini(&b->tar);
    orch_buf_free(&b->text);
    orch_buf_free(&b->line);
    free(b->recipe);
    orch_buf_free(&b->kernel);
    char *strings[] = { b->name, b->tmp, b->package, b->deb, b->source, b->release };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(strings); i++)
        free(strings[i]);
    const char *owned[] = { b->o.cache_dir, b->o.agent_path, b->o.kernel, b->o.modules };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(owned); i++)
        free((void *)(uintptr_t)owned[i]);
    free(b);
}

static void finish(struct orch_image_build *b, const struct orch_image *image,
                   const struct orch_err *err)
{
    orch_image_done_fn *done = b->done;
    void *ud = b->ud;
    build_free(b); /* first: whoever waits for the lock may go on */
    done(ud, image, err);
}

static void failed(struct orch_image_build *b, struct orch_err *err)
{
    orch_err_wrap(err, "image %s", b->name);
    finish(b, NULL, err);
}

void orch_image_build_cancel(struct orch_image_build *b)
{
    if (b)
        build_free(b);
}

/* ---- children ---- */

/* What a kernel's package has for the build. */
static struct orch_buf *tar_into(void *ud, const char *path, uint64_t size)
{
    struct orch_image_build *b = ud;
    if (strstr(path, "/boot/vmlinuz-") && !b->kernel.n)
        return size <= ORCH_KERNEL_MAX ? &b->kernel : NULL;
    return strstr(path, "/lib/modules/") ? orch_modules_into(&b->modules, path, size) : NULL;
}

static void child_over(struct orch_image_build *b)
{
    if (b->at_eof && b->exited)
        b->step(b);
}

/* False at the end of the output. */
static bool child_read(struct orch_image_build *b)
{
    char chunk[64 * 1024];
    ssize_t n = read(orch_proc_stdout(b->proc), chunk, sizeof chunk);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (n <= 0)
        return false;
    if (b->in_tar)
        orch_tar_feed(&b->tar, chunk, (size_t)n);
    else if (b->text.n + (size_t)n <= TEXT_MAX)
        orch_buf_add(&b->text, chunk, (size_t)n);
    return true;
}

static void on_output(void *ud, int events)
{
    struct orch_image_build *b = ud;
    (void)events;
    if (child_read(b))
        return;
    orch_watch_free(b->watch);
    b->watch = NULL;
    b->at_eof = true;
    child_over(b);
}

/* mmdebstrap's lines "I: what it does now...", without details of how. */
static void on_said(void *ud, struct orch_slice bytes)
{
    struct orch_image_build *b = ud;
    for (size_t i = 0; i < bytes.n; i++) {
        if (bytes.p[i] != '\n') {
            if (b->line.n < 200)
                orch_buf_char(&b->line, bytes.p[i]);
            continue;
        }
        if (b->line.n > 6 && strncmp(b->line.p, "I: ", 3) == 0 &&
            strcmp(b->line.p + b->line.n - 3, "...") == 0 && !strstr(b->line.p, " tempdir ") &&
            !strstr(b->line.p, "-hook "))
            say(b, "%s", b->line.p + 3);
        b->line.n = 0;
    }
}

static void on_exit_status(void *ud, int status)
{
    struct orch_image_build *b = ud;
    b->exited = true;
    b->status = status;
    child_over(b);
}

/* Starts a program; then `step` finds its output in text (or taken from the tar) and its status. */
static bool child(struct orch_image_build *b, const char *const *argv, bool tar,
                  void (*step)(struct orch_image_build *), struct orch_err *err)
{
    static const char *const names[] = { "PATH", "http_proxy", "https_proxy", "no_proxy",
                                         "APT_CONFIG" };
    const char *env[ORCH_ARRAY_LEN(names) + 4] = { "LC_ALL=C", orch_disk_env[0], orch_disk_env[1] };
    char *more[ORCH_ARRAY_LEN(names)];
    size_t n = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(names); i++) {
        if (!getenv(names[i]))
            continue;
        more[n] = orch_xasprintf("%s=%s", names[i], getenv(names[i]));
        env[3 + n] = more[n];
        n++;
    }
    b->in_tar = tar;
    b->at_eof = b->exited = false;
    b->text.n = b->line.n = 0;
    orch_buf_str(&b->text, "");
    orch_tar_restart(&b->tar);
    b->step = step;
    b->proc = orch_proc_start(b->loop,
                              &(struct orch_proc_opts){ .argv = argv,
                                                        .env = env,
                                                        .cwd = b->tmp,
                                                        .on_exit = on_exit_status,
                                                        .on_stderr = on_said,
                                                        .ud = b },
                              err);
    for (size_t i = 0; i < n; i++)
        free(more[i]);
    if (!b->proc)
        return false;
    orch_proc_close_stdin(b->proc);
    b->watch = orch_watch_new(b->loop, orch_proc_stdout(b->proc), ORCH_READ, on_output, b);
    return true;
}

/* Ends the child; false with err when it failed. */
static bool child_ok(struct orch_image_build *b, const char *what, struct orch_err *err)
{
    char how[64];
    struct orch_slice tail = orch_proc_stderr(b->proc);
    while (tail.n && tail.p[tail.n - 1] == '\n')
        tail.n--;
    orch_proc_describe(b->status, how, sizeof how);
    if (b->status)
        orch_err_set(err, EIO, "%s failed (%s): %.*s", what, how,
                     (int)(tail.n < 1000 ? tail.n : 1000),
                     tail.n < 1000 ? tail.p : tail.p + tail.n - 1000);
    child_end(b);
    return b->status == 0;
}

/* Ends the build with the image that is there already, when it is made of the same. */
static bool finish_found(struct orch_image_build *b, const char *source)
{
    b->o.digests = true;
    struct orch_image found;
    cleanup_free char *from = NULL,
                      *recipe = orch_image_built_hash(b->o.cache_dir, b->name, "recipe");
    if (orch_image_find_built(b->name, &b->o, b->agent_hash, &found, &from, NULL) < 0)
        return false;
    bool same = (!source || strcmp(from, source) == 0) &&
                strcmp(recipe ? recipe : "", b->recipe_hash) == 0;
    if (same)
        finish(b, &found, NULL);
    orch_image_fini(&found);
    return same;
}

/* The host's busybox, which must be linked statically. */
static int read_busybox(struct orch_buf *elf, struct orch_err *err)
{
    Elf64_Ehdr e;
    int r = orch_read_file(AT_FDCWD, ORCH_BUSYBOX, BUSYBOX_MAX, elf);
    bool ok = r == 0 && elf->n > sizeof e && memcmp(elf->p, ELFMAG, SELFMAG) == 0;
    if (ok)
        memcpy(&e, elf->p, sizeof e);
    for (unsigned i = 0; ok && i < e.e_phnum; i++) {
        Elf64_Phdr ph;
        ok = e.e_phoff < elf->n && (i + 1ULL) * sizeof ph <= elf->n - e.e_phoff;
        if (ok)
            memcpy(&ph, elf->p + e.e_phoff + i * sizeof ph, sizeof ph);
        ok = ok && ph.p_type != PT_INTERP;
    }
    if (ok)
        return 0;
    return orch_err_set(err, r < 0 ? -r : ENOEXEC, "%s %s: sudo apt-get install busybox-static",
                        ORCH_BUSYBOX, r < 0 ? strerror(-r) : "is not linked statically");
}

static void step_install(struct orch_image_build *b)
{
    struct orch_err err;
    cleanup_buf struct orch_buf agent = { 0 }, busybox = { 0 }, initrd = { 0 };
    char id[65];
    uint64_t bytes;
    if (!child_ok(b, ORCH_BUSYBOX " --list-full", &err) ||
        orch_image_hash_agent(b->o.agent_path, &agent, b->agent_hash, &err) < 0 ||
        read_busybox(&busybox, &err) < 0) {
        failed(b, &err);
        return;
    }
    orch_initrd_make(&b->modules, b->release, orch_slice_of(&agent), orch_slice_of(&busybox),
                     b->text.p, &initrd);
    say(b, "initrd: %.1f MB, %zu modules", (double)initrd.n / 1e6, b->modules.n);
    struct orch_image_made made = {
        .name = b->name,
        .release = b->release,
        .source = b->source,
        .agent_hash = b->agent_hash,
        .disk_hash = b->disk_hash,
        .recipe_hash = b->recipe_hash,
        .kernel = orch_slice_of(&b->kernel),
        .initrd = orch_slice_of(&initrd),
        .disk_bytes = b->disk_bytes,
        /* Stock kernels find virtio-mmio devices by ACPI; those that take them from the command
         * line need none. */
        .acpi = !memmem(b->kernel.p, b->kernel.n, "virtio_mmio.device", 18),
    };
    if (orch_image_install(b->o.cache_dir, &b->tmp, &made, id, &bytes, &err) < 0) {
        failed(b, &err);
        return;
    }
    say(b, "image %s %.12s: kernel %s, %.1f MB", b->name, id, b->release, (double)bytes / 1e6);
    if (!finish_found(b, NULL)) {
        orch_err_set(&err, EIO, "it cannot be found again in %s", b->o.cache_dir);
        failed(b, &err);
    }
}

static void step_busybox(struct orch_image_build *b)
{
    struct orch_err err;
    cleanup_buf struct orch_buf elf = { 0 };
    if (read_busybox(&elf, &err) < 0 ||
        !child(b, (const char *const[]){ ORCH_BUSYBOX, "--list-full", NULL }, false, step_install,
               &err))
        failed(b, &err);
}

/* ---- the disk ---- */

static int disk_hash(struct orch_image_build *b, struct orch_err *err)
{
    cleanup_free char *path = orch_xasprintf("%s/disk", b->tmp);
    cleanup_close int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    int r = fd < 0 ? -errno : orch_image_digest(fd, b->disk_hash, &b->disk_bytes);
    return r < 0 ? orch_err_set(err, -r, "%s: %s", path, strerror(-r)) : 0;
}

static void disk_ready(struct orch_image_build *b)
{
    say(b, "disk: %.1f MB", (double)b->disk_bytes / 1e6);
    next(b, step_busybox);
}

static void step_disk_made(struct orch_image_build *b)
{
    struct orch_err err;
    char how[64];
    cleanup_free char *work = orch_xasprintf("%s/" ORCH_DISK_WORK, b->tmp);
    orch_proc_describe(b->status, how, sizeof how);
    if (b->status)
        orch_disk_explain(how, orch_proc_stderr(b->proc), &err);
    child_end(b);
    if (b->status) {
        failed(b, &err);
        return;
    }
    rmdir(work);
    if (disk_hash(b, &err) < 0)
        failed(b, &err);
    else
        disk_ready(b);
}

static void disk_make(struct orch_image_build *b, enum orch_disk_way way)
{
    struct orch_err err;
    cleanup_free char *work = orch_xasprintf("%s/" ORCH_DISK_WORK, b->tmp);
    cleanup_free const char **argv = orch_disk_argv(b->recipe, way);
    int r = orch_disk_programs(way, &err);
    if (r == 0 && mkdir(work, 0755) < 0)
        r = orch_err_set(&err, errno, "%s: %s", work, strerror(errno));
    if (r < 0 || !child(b, argv, false, step_disk_made, &err))
        failed(b, &err);
}

static void step_probed(struct orch_image_build *b)
{
    enum orch_disk_way way = b->status ? ORCH_DISK_FAKE : ORCH_DISK_RANGE;
    child_end(b);
    disk_make(b, way);
}

/* Links a file of an image that is there into the folder being made. */
static bool keep(struct orch_image_build *b, const char *name, const char *file)
{
    cleanup_free char *kept = orch_xasprintf("%s/%s/%s", b->o.cache_dir, name, file);
    cleanup_free char *here = orch_xasprintf("%s/%s", b->tmp, file);
    return link(kept, here) == 0;
}

/* The disk that is there already, if it is still what was built. */
static bool keep_disk(struct orch_image_build *b)
{
    struct orch_err err;
    cleanup_free char *wanted = orch_image_built_hash(b->o.cache_dir, b->name, "disk");
    if (!wanted || !keep(b, b->name, "disk"))
        return false;
    if (disk_hash(b, &err) == 0 && strcmp(b->disk_hash, wanted) == 0)
        return true;
    cleanup_free char *here = orch_xasprintf("%s/disk", b->tmp);
    unlink(here);
    *b->disk_hash = 0;
    return false;
}

static void step_disk(struct orch_image_build *b)
{
    struct orch_err err;
    cleanup_free char *recipe = orch_image_built_hash(b->o.cache_dir, b->name, "recipe");
    if (!*b->recipe_hash) {
        step_busybox(b);
    } else if (!b->o.fresh && recipe && strcmp(recipe, b->recipe_hash) == 0 && keep_disk(b)) {
        disk_ready(b);
    } else if (!b->recipe) {
        orch_image_not_built(b->name, &err);
        failed(b, &err);
    } else if (geteuid() == 0) {
        disk_make(b, ORCH_DISK_ROOT);
    } else if (!child(b, orch_disk_probe, false, step_probed, &err)) {
        failed(b, &err);
    }
}

/* What the disk is made of: the recipe, or what the image's is made of already. */
static int want_disk(struct orch_image_build *b, struct orch_err *err)
{
    bool base = strcmp(b->name, "base") == 0;
    if (b->recipe && base)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "base is made without a recipe: give yours another name");
    if (b->recipe)
        orch_recipe_hash(b->recipe, b->recipe_hash);
    if (b->recipe || base)
        return 0;
    cleanup_free char *recipe = orch_image_built_hash(b->o.cache_dir, b->name, "recipe");
    if (!recipe)
        return orch_image_not_built(b->name, err);
    memcpy(b->recipe_hash, recipe, sizeof b->recipe_hash);
    return 0;
}

/* b->kernel becomes the unpacked ELF; release is read from it. */
static int kernel_unpack(struct orch_image_build *b, struct orch_err *err)
{
    if (b->kernel.n > 4 && memcmp(b->kernel.p, ELFMAG, SELFMAG) != 0) {
        cleanup_buf struct orch_buf elf = { 0 };
        if (orch_bzimage_unpack(orch_slice_of(&b->kernel), &elf, err) < 0)
            return -err->code;
        struct orch_buf packed = b->kernel;
        b->kernel = elf;
        elf = packed;
    }
    if (orch_kernel_check(orch_slice_of(&b->kernel), err) < 0)
        return -err->code;
    free(b->release);
    b->release = orch_kernel_release(orch_slice_of(&b->kernel));
    if (!b->release || strchr(b->release, '/'))
        return orch_err_set(err, EINVAL, "the kernel does not say its version");
    say(b, "kernel %s: %.1f MB unpacked", b->release, (double)b->kernel.n / 1e6);
    return 0;
}

static void step_kernel_file(struct orch_image_build *b)
{
    struct orch_err err;
    int r = orch_read_file(AT_FDCWD, b->o.kernel, ORCH_KERNEL_MAX, &b->kernel);
    if (r < 0) {
        orch_err_set(&err, -r, "%s: %s", b->o.kernel, strerror(-r));
        failed(b, &err);
        return;
    }
    b->source = orch_xasprintf("file %s", b->o.kernel);
    if ((r = kernel_unpack(b, &err)) == 0 && b->o.modules) {
        orch_modules_want(&b->modules, *b->recipe_hash);
        do
            r = orch_modules_read(&b->modules, b->o.modules, &err);
        while (r == 0 && (r = orch_modules_resolve(&b->modules, b->release, b->source, &err)) > 0);
    }
    if (r < 0) {
        orch_err_wrap(&err, "%s", b->o.kernel);
        failed(b, &err);
        return;
    }
    next(b, step_disk);
}

#if ORCH_FEATURE_APT_KERNEL
static void step_unpacked(struct orch_image_build *b);

static void unpack_start(struct orch_image_build *b)
{
    struct orch_err err;
    if (!child(b, (const char *const[]){ "dpkg-deb", "--fsys-tarfile", b->deb, NULL }, true,
               step_unpacked, &err))
        failed(b, &err);
}

static void step_unpacked(struct orch_image_build *b)
{
    struct orch_err err;
    int r = 0;
    if (!child_ok(b, "dpkg-deb", &err)) {
        failed(b, &err);
        return;
    }
    if (b->tar.failed || !b->kernel.n)
        r = orch_err_set(&err, EBADMSG, "no kernel is in the package %s", b->deb);
    if (r == 0 && !b->release)
        r = kernel_unpack(b, &err);
    if (r == 0)
        r = orch_modules_resolve(&b->modules, b->release, b->source, &err);
    if (r < 0)
        failed(b, &err);
    else if (r > 0)
        unpack_start(b); /* once more, for what they depend on */
    else
        next(b, step_disk);
}

static void package_ready(struct orch_image_build *b)
{
    orch_modules_want(&b->modules, *b->recipe_hash);
    unpack_start(b);
}

static void step_downloaded(struct orch_image_build *b)
{
    struct orch_err err;
    if (!child_ok(b, "apt-get download", &err)) {
        orch_err_wrap(&err, "cannot fetch Debian's kernel (is there a network? are the lists old? "
                            "sudo apt-get update; or give one with --kernel FILE)");
        failed(b, &err);
        return;
    }
    package_ready(b);
}

/* 'URL' FILE SIZE HASH */
static void step_uris(struct orch_image_build *b)
{
    struct orch_err err;
    if (!child_ok(b, "apt-get download --print-uris", &err)) {
        failed(b, &err);
        return;
    }
    char file[200];
    unsigned long long size;
    const char *space = strchr(b->text.p, ' ');
    if (!space || sscanf(space, " %199[A-Za-z0-9._+~%:-] %llu", file, &size) != 2 || *file == '.') {
        orch_err_set(&err, EBADMSG, "apt-get does not say where %s is: sudo apt-get update",
                     b->package);
        failed(b, &err);
        return;
    }
    b->deb = orch_xstrdup(file);
    b->source = orch_xasprintf("deb %s", file);
    if (!b->o.fresh && finish_found(b, b->source))
        return;
    /* It stays with the image, so that another agent, or another image, needs no network. */
    if (keep(b, b->name, file) || keep(b, "base", file)) {
        package_ready(b);
        return;
    }
    say(b, "downloading %s (%.1f MB)", file, (double)size / 1e6);
    if (!child(b, (const char *const[]){ "apt-get", "-q", "download", b->package, NULL }, false,
               step_downloaded, &err))
        failed(b, &err);
}

static void step_depends(struct orch_image_build *b)
{
    struct orch_err err;
    bool ok = child_ok(b, "apt-cache depends", &err);
    const char *p = ok ? strstr(b->text.p, "Depends: linux-image-") : NULL;
    if (!p) {
        orch_err_set(&err, ENOENT,
                     "apt knows no linux-image-cloud-amd64: sudo apt-get update; or give a kernel "
                     "with --kernel FILE");
        failed(b, &err);
        return;
    }
    p += strlen("Depends: ");
    b->package = orch_xstrndup(p, strcspn(p, " \n"));
    if (!child(b, (const char *const[]){ "apt-get", "download", "--print-uris", b->package, NULL },
               false, step_uris, &err))
        failed(b, &err);
}

static void step_kernel_apt(struct orch_image_build *b)
{
    struct orch_err err;
    if (!child(b, (const char *const[]){ "apt-cache", "depends", "linux-image-cloud-amd64", NULL },
               false, step_depends, &err)) {
        if (err.code == ENOENT)
            orch_err_wrap(&err, "no apt here to fetch Debian's kernel with; give one with "
                                "--kernel FILE (bzImage or vmlinux) and its modules");
        failed(b, &err);
    }
}
#else
static void step_kernel_apt(struct orch_image_build *b)
{
    struct orch_err err;
    orch_err_setc(&err, ORCH_CLASS_USAGE, ENOTSUP,
                  "this orch is built without the feature apt-kernel: give a kernel with "
                  "--kernel FILE");
    failed(b, &err);
}
#endif

/* One builder at a time. What a killed one left has a name that starts with .build- */
static void step_lock(struct orch_image_build *b)
{
    struct orch_err err;
    if (flock(b->lock, LOCK_EX | LOCK_NB) < 0) {
        if (!b->waited)
            say(b, "waiting for another orch that builds images");
        b->waited = true;
        orch_timer_set(b->timer, LOCK_RETRY_MS);
        return;
    }
    if (b->waited && !b->o.kernel && !b->o.fresh && finish_found(b, NULL))
        return;
    if (orch_image_folder_new(b->o.cache_dir, &b->tmp, &err) < 0) {
        failed(b, &err);
        return;
    }
    next(b, b->o.kernel ? step_kernel_file : step_kernel_apt);
}

static void step_first(struct orch_image_build *b)
{
    struct orch_err err;
    cleanup_buf struct orch_buf agent = { 0 };
    cleanup_free char *lock = orch_xasprintf("%s/.lock", b->o.cache_dir);
    int r = orch_image_check_name(b->name, &err);
    if (r == 0)
        r = orch_image_hash_agent(b->o.agent_path, &agent, b->agent_hash, &err);
    if (r == 0)
        r = want_disk(b, &err);
    if (r == 0 && (r = orch_mkdir_p(b->o.cache_dir, 0700)) < 0)
        orch_err_set(&err, -r, "%s: %s", b->o.cache_dir, strerror(-r));
    if (r == 0 && (b->lock = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600)) < 0)
        r = orch_err_set(&err, errno, "%s: %s", lock, strerror(errno));
    if (r < 0)
        failed(b, &err);
    else
        step_lock(b);
}

static void on_timer(void *ud)
{
    step_lock(ud);
}

static void on_limit(void *ud)
{
    struct orch_image_build *b = ud;
    struct orch_err err;
    orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, "not built within %d minutes%s",
                  LIMIT_MS / 60000,
                  b->tmp ? "" : ": another orch holds the lock; end it, or look what it waits for");
    failed(b, &err);
}

struct orch_image_build *orch_image_build_start(struct orch_loop *l, const char *name,
                                                const struct orch_image_opts *o,
                                                orch_image_done_fn *done, void *ud)
{
    struct orch_image_build *b = orch_xcalloc(1, sizeof *b);
    b->loop = l;
    b->o = *o;
    b->o.cache_dir = orch_xstrdup(o->cache_dir);
    b->o.agent_path = orch_xstrdup(o->agent_path);
    b->o.kernel = orch_xstrdup(o->kernel);
    b->o.modules = orch_xstrdup(o->modules);
    b->o.recipe = NULL;
    b->recipe = orch_recipe_dup(o->recipe);
    b->name = orch_xstrdup(name);
    b->done = done;
    b->ud = ud;
    b->lock = -1;
    b->tar.into = tar_into;
    b->tar.ud = b;
    b->timer = orch_timer_new(l, on_timer, b);
    b->limit = orch_timer_new(l, on_limit, b);
    orch_timer_set(b->limit, LIMIT_MS);
    next(b, step_first);
    return b;
}
