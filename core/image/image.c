#include "image.h"

#include "../base/hash.h"
#include "../base/proc.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

/* What the recipe makes of equal inputs; a new number makes every image built before stale. */
#define RECIPE "orch-image 1"
#define BUSYBOX "/bin/busybox"

enum {
    KERNEL_MAX = 256 << 20, /* Debian's: 14 MB packed, 53 MB unpacked */
    MODULE_MAX = 32 << 20,
    AGENT_MAX = 32 << 20,
    BUSYBOX_MAX = 16 << 20,
    TEXT_MAX = 256 * 1024, /* a child's output that is read as text */
    MAX_MODULES = 64,
    LOCK_RETRY_MS = 100,
    DISK_CHUNK = 1 << 20,
    LIMIT_MS = 20 * 60 * 1000, /* for everything, a slow download included */
};

/* ---- kernels ---- */

static uint32_t le32(const char *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static int memfd_of(struct orch_slice s)
{
    cleanup_close int fd = memfd_create("orch-unpack", MFD_CLOEXEC);
    if (fd < 0 || orch_write_all(fd, s.p, s.n) < 0 || lseek(fd, 0, SEEK_SET) < 0)
        return -1;
    return orch_steal_fd(&fd);
}

/* Runs `program -dc` from one memory file to another and waits: rare, and well under a second. */
static int decompress(const char *program, struct orch_slice in, size_t max, struct orch_buf *out, struct orch_err *err)
{
    cleanup_close int from = memfd_of(in);
    cleanup_close int to = memfd_create("orch-unpack", MFD_CLOEXEC);
    if (from < 0 || to < 0)
        return orch_err_set(err, errno, "cannot unpack: no memory file: %s", strerror(errno));
    posix_spawn_file_actions_t fa;
    posix_spawn_file_actions_init(&fa);
    posix_spawn_file_actions_adddup2(&fa, from, 0);
    posix_spawn_file_actions_adddup2(&fa, to, 1);
    posix_spawn_file_actions_addopen(&fa, 2, "/dev/null", O_WRONLY, 0);
    char name[16], flags[] = "-dc";
    snprintf(name, sizeof name, "%s", program);
    char *const argv[] = { name, flags, NULL };
    pid_t pid;
    int r = posix_spawnp(&pid, program, &fa, NULL, argv, environ), status = 0;
    posix_spawn_file_actions_destroy(&fa);
    if (r)
        return orch_err_set(err, r, "cannot unpack: %s: %s; install it: sudo apt-get install %s", program, strerror(r),
                            strcmp(program, "xz") == 0 ? "xz-utils" : program);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    struct stat st;
    if (fstat(to, &st) < 0 || status || st.st_size == 0)
        return orch_err_set(err, EBADMSG, "cannot unpack: %s says that the data is damaged", program);
    if ((uint64_t)st.st_size > max)
        return orch_err_set(err, EFBIG, "cannot unpack: more than %zu bytes come out", max);
    orch_buf_reserve(out, (size_t)st.st_size);
    for (off_t at = 0; at < st.st_size;) {
        ssize_t n = pread(to, out->p + out->n, (size_t)(st.st_size - at), at);
        if (n <= 0)
            return orch_err_set(err, EIO, "cannot read back what was unpacked");
        at += n;
        out->n += (size_t)n;
    }
    out->p[out->n] = 0;
    return 0;
}

static const struct packing {
    const char *magic;
    size_t n_magic;
    const char *program;
    size_t suffix; /* bytes of the unpacked length that the kernel's build adds behind */
} packings[] = {
    { "\x02\x21\x4c\x18", 4, "lz4", 4 }, /* the "legacy" frame */
    { "\x1f\x8b", 2, "gzip", 0 },
    { "\xfd" "7zXZ", 6, "xz", 4 },
    { "\x28\xb5\x2f\xfd", 4, "zstd", 4 },
};

static const struct packing *packing_of(struct orch_slice s)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(packings); i++)
        if (s.n > packings[i].n_magic + 8 && memcmp(s.p, packings[i].magic, packings[i].n_magic) == 0)
            return &packings[i];
    return NULL;
}

int orch_bzimage_unpack(struct orch_slice bz, struct orch_buf *out, struct orch_err *err)
{
    if (bz.n < 0x250 || memcmp(bz.p + 0x202, "HdrS", 4) != 0)
        return orch_err_set(err, EINVAL, "not a Linux bzImage");
    unsigned sectors = (unsigned char)bz.p[0x1f1] ? (unsigned char)bz.p[0x1f1] : 4;
    uint64_t at = (sectors + 1) * 512ULL + le32(bz.p + 0x248), n = le32(bz.p + 0x24c);
    if (at > bz.n || n > bz.n - at || n < 16)
        return orch_err_set(err, EINVAL, "a damaged bzImage: its payload of %llu bytes at %llu does not fit %zu bytes",
                            (unsigned long long)n, (unsigned long long)at, bz.n);
    struct orch_slice payload = { bz.p + at, (size_t)n };
    const struct packing *p = packing_of(payload);
    if (!p)
        return orch_err_set(err, ENOTSUP, "a bzImage packed in an unknown way (%02x %02x %02x %02x); known are lz4, gzip, xz and "
                            "zstd: give the unpacked vmlinux instead", payload.p[0] & 255, payload.p[1] & 255,
                            payload.p[2] & 255, payload.p[3] & 255);
    uint32_t want = le32(payload.p + payload.n - 4);
    payload.n -= p->suffix;
    if (want > KERNEL_MAX)
        return orch_err_set(err, EFBIG, "a bzImage that unpacks to %u bytes; at most %d", want, KERNEL_MAX);
    size_t before = out->n;
    int r = decompress(p->program, payload, KERNEL_MAX, out, err);
    if (r < 0)
        return orch_err_wrap(err, "bzImage");
    if (out->n - before != want)
        return orch_err_set(err, EBADMSG, "a damaged bzImage: %zu bytes came out instead of %u", out->n - before, want);
    return 0;
}

/* An x86-64 ELF that QEMU can enter: it has the Xen note 18 (PHYS32_ENTRY), as CONFIG_PVH makes it. */
static int elf_check(struct orch_slice s, struct orch_err *err)
{
    Elf64_Ehdr e;
    if (s.n < sizeof e || memcmp(s.p, ELFMAG, SELFMAG) != 0)
        return orch_err_set(err, EINVAL, "neither a bzImage nor an ELF file");
    memcpy(&e, s.p, sizeof e);
    if (e.e_ident[EI_CLASS] != ELFCLASS64 || e.e_machine != EM_X86_64 || e.e_phentsize != sizeof(Elf64_Phdr))
        return orch_err_set(err, EINVAL, "an ELF file, but not of x86-64");
    for (unsigned i = 0; i < e.e_phnum; i++) {
        Elf64_Phdr ph;
        if (e.e_phoff > s.n || (i + 1ULL) * sizeof ph > s.n - e.e_phoff)
            break;
        memcpy(&ph, s.p + e.e_phoff + i * sizeof ph, sizeof ph);
        if (ph.p_type != PT_NOTE || ph.p_offset > s.n || ph.p_filesz > s.n - ph.p_offset)
            continue;
        Elf64_Nhdr n;
        for (uint64_t at = 0; ph.p_filesz - at >= sizeof n;) {
            memcpy(&n, s.p + ph.p_offset + at, sizeof n);
            uint64_t body = at + sizeof n, size = ((n.n_namesz + 3ULL) & ~3ULL) + ((n.n_descsz + 3ULL) & ~3ULL);
            if (size > ph.p_filesz - body)
                break;
            if (n.n_namesz == 4 && n.n_type == 18 && memcmp(s.p + ph.p_offset + body, "Xen", 4) == 0)
                return 0;
            at = body + size;
        }
    }
    return orch_err_set(err, EINVAL, "a kernel without the PVH entry: build it with CONFIG_PVH=y");
}

static const char *find_text(struct orch_slice in, const char *text, size_t n)
{
    return memmem(in.p, in.n, text, n);
}

/* "6.1.0-56-cloud-amd64" from the banner in an unpacked kernel; owned by the caller, NULL: none. */
static char *release_of(struct orch_slice elf)
{
    static const char banner[] = "Linux version ";
    while (true) {
        const char *p = find_text(elf, banner, sizeof banner - 1);
        if (!p)
            return NULL;
        p += sizeof banner - 1;
        elf.n -= (size_t)(p - elf.p);
        elf.p = p;
        size_t n = 0;
        while (n < elf.n && n < 64 && p[n] > ' ' && p[n] < 127)
            n++;
        if (n && *p >= '0' && *p <= '9')
            return orch_xstrndup(p, n);
    }
}

/* ---- the build ---- */

/* In the order the guest loads them; what they depend on comes before. Those for a virtio device that
 * a microVM may lack are loaded only where it is there: each costs the cold boot about 15 ms. */
static const struct wanted {
    const char *name;
    bool required;
    int device; /* type of virtio device, 0: always */
} wanted[] = {
    { "virtio_ring", false, 0 }, { "virtio", false, 0 },  { "virtio_mmio", true, 0 }, { "virtio_console", true, 0 },
    { "virtio_rng", false, 0 },  { "failover", false, 1 }, { "net_failover", false, 1 }, { "virtio_net", false, 1 },
    { "virtio_blk", false, 2 },  { "erofs", false, 2 },      { "overlay", false, 2 },
};

struct module {
    char name[56];
    bool required, placed;
    struct orch_buf data; /* empty: not found yet */
};

/* A tar stream, read as it comes: regular files that `into` wants are kept, all else is skipped. */
struct tar {
    char head[512];
    size_t n_head;
    uint64_t left, pad;
    char type;
    struct orch_buf longname, *keep;
    bool failed;
};

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
    struct tar tar;

    char *package, *deb, *source, *release;
    struct orch_recipe *recipe; /* NULL: none given */
    char recipe_hash[65];       /* of the disk; empty: the image has none */
    char disk_hash[65];
    uint64_t disk_bytes;
    struct orch_buf line; /* of the child's progress */
    struct orch_buf kernel, builtin;
    struct module modules[MAX_MODULES];
    size_t n_modules;
    struct orch_buf initrd;
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

/* The folders of a build are flat, but for an empty one. */
static void remove_folder(const char *path)
{
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            unlinkat(dirfd(d), e->d_name, strcmp(e->d_name, ORCH_DISK_WORK) == 0 ? AT_REMOVEDIR : 0);
    if (d)
        closedir(d);
    rmdir(path);
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
        remove_folder(b->tmp);
    if (b->lock >= 0)
        close(b->lock);
    for (size_t i = 0; i < b->n_modules; i++)
        orch_buf_free(&b->modules[i].data);
    orch_buf_free(&b->text);
    orch_buf_free(&b->line);
    free(b->recipe);
    orch_buf_free(&b->tar.longname);
    orch_buf_free(&b->kernel);
    orch_buf_free(&b->builtin);
    orch_buf_free(&b->initrd);
    char *strings[] = { b->name, b->tmp, b->package, b->deb, b->source, b->release };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(strings); i++)
        free(strings[i]);
    const char *owned[] = { b->o.cache_dir, b->o.agent_path, b->o.kernel, b->o.modules };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(owned); i++)
        free((void *)(uintptr_t)owned[i]);
    free(b);
}

static void finish(struct orch_image_build *b, const struct orch_image *image, const struct orch_err *err)
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

/* ---- modules ---- */

/* By name, where '-' and '_' are the same. */
static struct module *module_find(struct orch_image_build *b, const char *name, size_t n)
{
    for (size_t i = 0; i < b->n_modules; i++) {
        const char *have = b->modules[i].name;
        size_t k = 0;
        while (k < n && have[k] && (name[k] == '-' ? '_' : name[k]) == have[k])
            k++;
        if (k == n && !have[k])
            return &b->modules[i];
    }
    return NULL;
}

static struct module *module_add(struct orch_image_build *b, const char *name, size_t n, bool required)
{
    struct module *m = module_find(b, name, n);
    if (!m && n < sizeof m->name && b->n_modules < MAX_MODULES) {
        m = &b->modules[b->n_modules++];
        for (size_t i = 0; i < n; i++)
            m->name[i] = name[i] == '-' ? '_' : name[i];
    }
    if (m)
        m->required |= required;
    return m;
}

/* The wanted module whose file this is, while it has not been found. */
static struct module *module_of_path(struct orch_image_build *b, const char *path)
{
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path, *end = strstr(base, ".ko");
    struct module *m = end && (!end[3] || end[3] == '.') ? module_find(b, base, (size_t)(end - base)) : NULL;
    return m && !m->data.n ? m : NULL;
}

/* The value of one line of a module's information, NULL when it has none. */
static const char *modinfo(const struct module *m, const char *key)
{
    cleanup_free char *text = orch_xasprintf("%s=", key);
    struct orch_slice rest = { m->data.p, m->data.n };
    for (const char *p; (p = find_text(rest, text, strlen(text)));) {
        if (p > m->data.p && !p[-1] && memchr(p, 0, rest.n - (size_t)(p - rest.p)))
            return p + strlen(text);
        rest.n -= (size_t)(p + 1 - rest.p);
        rest.p = p + 1;
    }
    return NULL;
}

static bool is_builtin(const struct orch_image_build *b, const char *name)
{
    char dashed[60], under[60];
    snprintf(under, sizeof under, "/%s.ko", name);
    snprintf(dashed, sizeof dashed, "%s", under);
    for (char *p = dashed; *p; p++)
        *p = *p == '_' ? '-' : *p;
    return b->builtin.n && (strstr(b->builtin.p, under) || strstr(b->builtin.p, dashed));
}

/* Unpacks what came packed, and asks for what the found ones depend on. More to be found: 1. */
static int modules_resolve(struct orch_image_build *b, struct orch_err *err)
{
    size_t before = b->n_modules;
    for (size_t i = 0; i < b->n_modules; i++) {
        struct module *m = &b->modules[i];
        const struct packing *p = packing_of((struct orch_slice){ m->data.p, m->data.n });
        if (p) {
            struct orch_buf plain = { 0 };
            if (decompress(p->program, (struct orch_slice){ m->data.p, m->data.n }, MODULE_MAX, &plain, err) < 0)
                return orch_err_wrap(err, "module %s", m->name);
            orch_buf_free(&m->data);
            m->data = plain;
        }
        const char *deps = m->data.n ? modinfo(m, "depends") : NULL;
        while (deps && *deps) {
            size_t n = strcspn(deps, ",");
            struct module *d = module_add(b, deps, n, true);
            if (!d)
                return orch_err_set(err, E2BIG, "module %s depends on too much", m->name);
            deps += n + (deps[n] == ',');
        }
    }
    if (b->n_modules > before)
        return 1;
    for (size_t i = 0; i < b->n_modules; i++) {
        const struct module *m = &b->modules[i];
        if (!m->data.n && m->required && !is_builtin(b, m->name))
            return orch_err_set(err, ENOENT, "the kernel's module %s is missing in %s", m->name, b->source);
        const char *magic = m->data.n ? modinfo(m, "vermagic") : NULL;
        if (m->data.n && (!magic || strncmp(magic, b->release, strlen(b->release)) != 0 || magic[strlen(b->release)] != ' '))
            return orch_err_set(err, EINVAL, "module %s was built for kernel %.60s, but the kernel is %s", m->name,
                                magic ? magic : "(unknown)", b->release);
    }
    return 0;
}

static int modules_from_folder(struct orch_image_build *b, struct orch_err *err)
{
    char *roots[] = { (char *)(uintptr_t)b->o.modules, NULL };
    cleanup_free char *builtin = orch_xasprintf("%s/modules.builtin", b->o.modules);
    b->builtin.n = 0;
    orch_read_file(AT_FDCWD, builtin, KERNEL_MAX, &b->builtin);
    FTS *fts = fts_open(roots, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, NULL);
    int r = 0;
    for (FTSENT *e; r == 0 && fts && (e = fts_read(fts));) {
        struct module *m = e->fts_info == FTS_F ? module_of_path(b, e->fts_path) : NULL;
        if (m && (r = orch_read_file(AT_FDCWD, e->fts_path, MODULE_MAX, &m->data)) < 0)
            orch_err_set(err, -r, "%s: %s", e->fts_path, strerror(-r));
        if (e->fts_level == 0 && (e->fts_info == FTS_NS || e->fts_info == FTS_DNR))
            r = orch_err_set(err, e->fts_errno, "%s: %s", e->fts_path, strerror(e->fts_errno));
    }
    if (fts)
        fts_close(fts);
    return r;
}

/* ---- cpio ---- */

struct entry {
    char *path; /* without a leading slash */
    unsigned mode, uid;
    struct orch_slice data; /* of a link: its target */
};

struct entries {
    struct entry *e;
    size_t n, cap;
};

static void add(struct entries *l, const char *path, unsigned mode, unsigned uid, struct orch_slice data)
{
    if (l->n == l->cap)
        l->e = orch_xrealloc(l->e, (l->cap = l->cap ? 2 * l->cap : 512) * sizeof *l->e);
    l->e[l->n++] = (struct entry){ orch_xstrdup(path), mode, uid, data };
}

static int by_path(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->path, ((const struct entry *)b)->path);
}

static void cpio_entry(struct orch_buf *out, const struct entry *e, unsigned ino)
{
    const unsigned field[] = { ino, e->mode, e->uid, e->uid, 1, 0, (unsigned)e->data.n, 0, 0, 0, 0,
                               (unsigned)strlen(e->path) + 1, 0 };
    orch_buf_str(out, "070701");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(field); i++)
        orch_buf_printf(out, "%08X", field[i]);
    orch_buf_add(out, e->path, strlen(e->path) + 1);
    orch_buf_add(out, "\0\0\0", -out->n & 3);
    if (e->data.n)
        orch_buf_add(out, e->data.p, e->data.n);
    orch_buf_add(out, "\0\0\0", -out->n & 3);
}

/* A "newc" archive: sorted, without times, so that equal inputs make equal bytes. Plain, since the
 * guest would take longer to unpack it than to copy it. Empties the list. */
static void cpio_write(struct entries *l, struct orch_buf *out)
{
    qsort(l->e, l->n, sizeof *l->e, by_path);
    for (size_t i = 0; i < l->n; i++)
        if (i == 0 || strcmp(l->e[i].path, l->e[i - 1].path) != 0)
            cpio_entry(out, &l->e[i], (unsigned)i + 1);
    char end[] = "TRAILER!!!";
    cpio_entry(out, &(struct entry){ .path = end }, 0);
    for (size_t i = 0; i < l->n; i++)
        free(l->e[i].path);
    free(l->e);
    *l = (struct entries){ 0 };
}

/* Appends m's and its dependencies' lines to the list of modules, each once, dependencies first. */
static void module_place(struct orch_image_build *b, struct module *m, int device, struct entries *l, struct orch_buf *list)
{
    if (!m || m->placed || !m->data.n)
        return;
    m->placed = true;
    for (const char *d = modinfo(m, "depends"); d && *d;) {
        size_t n = strcspn(d, ",");
        module_place(b, module_find(b, d, n), device, l, list);
        d += n + (d[n] == ',');
    }
    char path[100];
    snprintf(path, sizeof path, "lib/modules/%.64s", b->release);
    add(l, path, S_IFDIR | 0755, 0, (struct orch_slice){ 0 });
    cleanup_free char *file = orch_xasprintf("%s/%s.ko", path, m->name);
    add(l, file, S_IFREG | 0644, 0, (struct orch_slice){ m->data.p, m->data.n });
    orch_buf_printf(list, device ? "/%s %d\n" : "/%s\n", file, device);
}

/* The applets' links, from `busybox --list-full` in b->text. */
static void applets(struct orch_image_build *b, struct entries *l)
{
    for (const char *p = b->text.p; p && *p;) {
        size_t n = strcspn(p, "\n");
        cleanup_free char *path = orch_xstrndup(p, n);
        if (n && strcmp(path, &BUSYBOX[1]) != 0 && !strstr(path, ".."))
            add(l, path, S_IFLNK | 0777, 0, ORCH_SLICE(BUSYBOX));
        p += n + (p[n] == '\n');
    }
}

static void initrd_make(struct orch_image_build *b, struct orch_slice agent, struct orch_slice busybox)
{
    static const struct {
        const char *path;
        unsigned mode, uid;
    } folders[] = {
        { "bin", 0755, 0 },     { "dev", 0755, 0 },         { "etc", 0755, 0 },      { "etc/orch", 0755, 0 },
        { "home", 0755, 0 },    { "home/user", 0755, 1000 }, { "lib", 0755, 0 },     { "lib/modules", 0755, 0 },
        { "mnt", 0755, 0 },     { "proc", 0755, 0 },        { "root", 0700, 0 },     { "run", 0755, 0 },
        { "sbin", 0755, 0 },    { "sys", 0755, 0 },         { "tmp", 01777, 0 },     { "usr", 0755, 0 },
        { "usr/bin", 0755, 0 }, { "usr/sbin", 0755, 0 },    { "var", 0755, 0 },      { "var/tmp", 01777, 0 },
    };
    static const struct {
        const char *path, *text;
    } files[] = {
        { "etc/group", "root:x:0:\ntty:x:5:\nuser:x:1000:\n" },
        { "etc/hostname", "orch\n" },
        { "etc/hosts", "127.0.0.1 localhost orch\n::1 localhost\n" },
        { "etc/os-release", "ID=orch-base\nNAME=\"orch base\"\nPRETTY_NAME=\"orch base image\"\nVERSION_ID=" ORCH_VERSION "\n" },
        { "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n" },
        { "etc/resolv.conf", "" },
    };
    struct entries l = { 0 };
    cleanup_buf struct orch_buf list = { 0 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(folders); i++)
        add(&l, folders[i].path, S_IFDIR | folders[i].mode, folders[i].uid, (struct orch_slice){ 0 });
    for (size_t i = 0; i < ORCH_ARRAY_LEN(files); i++)
        add(&l, files[i].path, S_IFREG | 0644, 0, orch_slice_str(files[i].text));
    for (size_t i = 0; i < ORCH_ARRAY_LEN(wanted); i++)
        module_place(b, module_find(b, wanted[i].name, strlen(wanted[i].name)), wanted[i].device, &l, &list);
    add(&l, "etc/orch/modules", S_IFREG | 0644, 0, (struct orch_slice){ list.p ? list.p : "", list.n });
    add(&l, "init", S_IFREG | 0755, 0, agent);
    add(&l, &BUSYBOX[1], S_IFREG | 0755, 0, busybox);
    applets(b, &l);
    cpio_write(&l, &b->initrd);
}

/* ---- tar ---- */

static struct orch_buf *tar_into(struct orch_image_build *b, const char *path, uint64_t size)
{
    struct module *m;
    if (strstr(path, "/boot/vmlinuz-") && !b->kernel.n)
        return size <= KERNEL_MAX ? &b->kernel : NULL;
    if (!strstr(path, "/lib/modules/"))
        return NULL;
    if (strstr(path, "/modules.builtin") && strlen(strstr(path, "/modules.builtin")) == strlen("/modules.builtin")) {
        b->builtin.n = 0;
        return size <= KERNEL_MAX ? &b->builtin : NULL;
    }
    m = module_of_path(b, path);
    return m && size <= MODULE_MAX ? &m->data : NULL;
}

static bool tar_head(struct orch_image_build *b)
{
    struct tar *t = &b->tar;
    char name[260], *end, number[13] = "";
    unsigned sum = 0, want;
    memcpy(number, t->head + 124, 12);
    t->left = strtoull(number, &end, 8);
    t->type = t->head[156];
    if (!t->head[0]) { /* the end, blocks of zeros */
        t->left = t->pad = 0;
        return true;
    }
    memcpy(number, t->head + 148, 8);
    number[8] = 0;
    want = (unsigned)strtoul(number, NULL, 8);
    memset(t->head + 148, ' ', 8);
    for (size_t i = 0; i < sizeof t->head; i++)
        sum += (unsigned char)t->head[i];
    if (sum != want || (*end && *end != ' '))
        return false;
    t->pad = -t->left & 511;
    snprintf(name, sizeof name, "%.155s%s%.100s", t->head + 345, t->head[345] ? "/" : "", t->head);
    if (t->type == 'L') {
        t->longname.n = 0;
        t->keep = t->left < 4096 ? &t->longname : NULL;
    } else {
        t->keep = t->type == '0' || !t->type ? tar_into(b, t->longname.n ? t->longname.p : name, t->left) : NULL;
        t->longname.n = 0;
    }
    return true;
}

static void tar_feed(struct orch_image_build *b, const char *p, size_t n)
{
    struct tar *t = &b->tar;
    while (n && !t->failed) {
        size_t k;
        if (t->left) {
            k = n < t->left ? n : (size_t)t->left;
            if (t->keep)
                orch_buf_add(t->keep, p, k);
            t->left -= k;
        } else if (t->pad) {
            k = n < t->pad ? n : (size_t)t->pad;
            t->pad -= k;
        } else {
            k = sizeof t->head - t->n_head < n ? sizeof t->head - t->n_head : n;
            memcpy(t->head + t->n_head, p, k);
            t->n_head += k;
            if (t->n_head == sizeof t->head) {
                t->n_head = 0;
                t->failed = !tar_head(b);
            }
        }
        p += k;
        n -= k;
    }
}

/* ---- children ---- */

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
        tar_feed(b, chunk, (size_t)n);
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
        if (b->line.n > 6 && strncmp(b->line.p, "I: ", 3) == 0 && strcmp(b->line.p + b->line.n - 3, "...") == 0 &&
            !strstr(b->line.p, " tempdir ") && !strstr(b->line.p, "-hook "))
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
static bool child(struct orch_image_build *b, const char *const *argv, bool tar, void (*step)(struct orch_image_build *),
                  struct orch_err *err)
{
    static const char *const names[] = { "PATH", "http_proxy", "https_proxy", "no_proxy", "APT_CONFIG" };
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
    b->tar.n_head = 0;
    b->tar.left = b->tar.pad = 0;
    b->step = step;
    b->proc = orch_proc_start(b->loop, &(struct orch_proc_opts){ .argv = argv, .env = env, .cwd = b->tmp,
                                                                 .on_exit = on_exit_status, .on_stderr = on_said, .ud = b },
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
        orch_err_set(err, EIO, "%s failed (%s): %.*s", what, how, (int)(tail.n < 1000 ? tail.n : 1000),
                     tail.n < 1000 ? tail.p : tail.p + tail.n - 1000);
    child_end(b);
    return b->status == 0;
}

/* ---- finding ---- */

/* "key value" lines. The value up to the end of the line, or NULL; owned by the caller. */
static char *field(const struct orch_buf *text, const char *key)
{
    size_t n = strlen(key);
    for (const char *p = text->p; p && *p;) {
        size_t line = strcspn(p, "\n");
        if (line > n && strncmp(p, key, n) == 0 && p[n] == ' ')
            return orch_xstrndup(p + n + 1, line - n - 1);
        p += line + (p[line] == '\n');
    }
    return NULL;
}

static int hash_file(const char *path, size_t max, struct orch_buf *data, char hex[65], struct orch_err *err)
{
    int r = orch_read_file(AT_FDCWD, path, max, data);
    if (r < 0)
        return orch_err_set(err, -r, "%s: %s", path, strerror(-r));
    orch_sha256_hex(data->p, data->n, hex);
    return 0;
}

static int check_name(const char *name, struct orch_err *err)
{
    size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-");
    if (*name >= 'a' && *name <= 'z' && !name[n] && n < sizeof ((struct orch_image *)NULL)->name)
        return 0;
    return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "no image can be named \"%.64s\": a-z, then a-z, 0-9 and -, at most 63", name);
}

void orch_image_fini(struct orch_image *i)
{
    free(i->kernel);
    free(i->initrd);
    free(i->disk);
    free(i->kernel_release);
    *i = (struct orch_image){ 0 };
}

void orch_image_copy(struct orch_image *to, const struct orch_image *from)
{
    *to = *from;
    to->kernel = orch_xstrdup(from->kernel);
    to->initrd = orch_xstrdup(from->initrd);
    to->disk = orch_xstrdup(from->disk);
    to->kernel_release = orch_xstrdup(from->kernel_release);
}

static int not_built(const char *name, struct orch_err *err)
{
    static const char *const shipped[] = { "base", "debian", NULL };
    const char *near = orch_nearest(name, shipped);
    if (near && strcmp(near, name) != 0)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, ENOENT, "there is no image %s; did you mean %s?", name, near);
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, ENOENT, "image %s is not built yet: orch image build %s%s", name, name,
                         near ? "" : ".lua (the file of its recipe)");
}

/* Whether a VMM could: it has this user's id, but when that is root's; so of root's files, found by a user, what
 * everybody may do counts. */
static bool writable(const struct stat *st)
{
    return st->st_mode & (st->st_uid == geteuid() ? 0222 : 0022);
}

int orch_image_open(int dir_fd, const char *path, struct orch_err *err)
{
    cleanup_close int fd = openat(dir_fd, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0 || (!S_ISREG(st.st_mode) && (errno = EINVAL)))
        return orch_err_set(err, errno, "%s: %s; build the image again (orch image build)", path, strerror(errno));
    if (st.st_uid != geteuid() && st.st_uid != 0)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, EPERM,
                             "%s belongs to uid %u, who could change what every later microVM starts from; remove the image "
                             "(orch image rm) and build it again, or: sudo chown %u '%s'", path, st.st_uid, geteuid(), path);
    /* On a read-only filesystem nobody writes, whatever the mode. */
    if (!writable(&st) || (fchmod(fd, st.st_mode & 07555) < 0 && errno == EROFS))
        return orch_steal_fd(&fd);
    if (fstat(fd, &st) == 0 && !writable(&st))
        return orch_steal_fd(&fd);
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, EPERM,
                         "%s has mode %04o, and who may write to it could change what every later microVM starts from; fix: "
                         "sudo chmod a-w '%s' (on a filesystem without modes: another cache directory, XDG_CACHE_HOME)", path,
                         st.st_mode & 07777, path);
}

/* The hash of the recipe that the built image's disk was made of, whatever agent it has; NULL: no disk. */
static char *built_recipe(const char *cache_dir, const char *name)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_free char *path = orch_xasprintf("%s/%s/manifest", cache_dir, name);
    cleanup_free char *hash = orch_read_file(AT_FDCWD, path, TEXT_MAX, &text) == 0 ? field(&text, "recipe") : NULL;
    return hash && strlen(hash) == 64 ? orch_steal_ptr(&hash) : NULL;
}

/* All of them are there, and nobody can write to them. */
static int check_files(const char *manifest, const struct orch_image *i, struct orch_err *err)
{
    const char *const paths[] = { manifest, i->kernel, i->initrd, i->disk };
    for (size_t k = 0; k < ORCH_ARRAY_LEN(paths) && paths[k]; k++) {
        struct orch_err why;
        cleanup_close int fd = orch_image_open(AT_FDCWD, paths[k], &why);
        if (fd < 0 && why.cls != ORCH_CLASS_ISOLATION)
            return orch_err_set(err, ESTALE, "image %s is damaged: orch image build %s", i->name, i->name);
        if (fd < 0)
            return orch_err_setc(err, why.cls, why.code, "image %s: %s", i->name, why.msg);
    }
    return 0;
}

/* The manifest is written last into a folder that is renamed whole: where it is, everything is. */
static int find(const char *name, const struct orch_image_opts *o, const char *agent_hash, struct orch_image *out,
                char **source, struct orch_err *err)
{
    cleanup_free char *path = orch_xasprintf("%s/%s/manifest", o->cache_dir, name);
    cleanup_buf struct orch_buf text = { 0 };
    if (orch_read_file(AT_FDCWD, path, TEXT_MAX, &text) < 0)
        return not_built(name, err);
    cleanup_free char *id = field(&text, "id"), *agent = field(&text, "agent"), *bytes = field(&text, "bytes");
    cleanup_free char *acpi = field(&text, "acpi"), *release = field(&text, "release"), *from = field(&text, "source");
    cleanup_free char *disk = field(&text, "disk");
    if (strncmp(text.p, RECIPE "\n", sizeof RECIPE) != 0 || !id || strlen(id) != 64 || !agent || !bytes || !acpi || !release || !from)
        return orch_err_set(err, ESTALE, "image %s was built by another version of orch: orch image build %s", name, name);
    if (strcmp(agent, agent_hash) != 0)
        return orch_err_set(err, ESTALE, "image %s holds another guest agent than %s: orch image build %s", name, o->agent_path, name);
    *out = (struct orch_image){ .bytes = strtoull(bytes, NULL, 10), .acpi = *acpi == '1' };
    snprintf(out->name, sizeof out->name, "%s", name);
    memcpy(out->id, id, 65);
    out->kernel = orch_xasprintf("%s/%s/vmlinux", o->cache_dir, id);
    out->initrd = orch_xasprintf("%s/%s/initrd", o->cache_dir, id);
    out->disk = disk ? orch_xasprintf("%s/%s/disk", o->cache_dir, id) : NULL;
    out->kernel_release = orch_steal_ptr(&release);
    int r = check_files(path, out, err);
    if (r < 0) {
        orch_image_fini(out);
        return r;
    }
    if (source)
        *source = orch_steal_ptr(&from);
    return 0;
}

int orch_image_find(const char *name, const struct orch_image_opts *o, struct orch_image *out, struct orch_err *err)
{
    cleanup_buf struct orch_buf agent = { 0 };
    char hash[65];
    int r = check_name(name, err);
    if (r == 0)
        r = hash_file(o->agent_path, AGENT_MAX, &agent, hash, err);
    return r < 0 ? r : find(name, o, hash, out, NULL, err);
}

/* Ends the build with the image that is there already, when it is made of the same. */
static bool finish_found(struct orch_image_build *b, const char *source)
{
    struct orch_image found;
    cleanup_free char *from = NULL, *recipe = built_recipe(b->o.cache_dir, b->name);
    if (find(b->name, &b->o, b->agent_hash, &found, &from, NULL) < 0)
        return false;
    bool same = (!source || strcmp(from, source) == 0) && strcmp(recipe ? recipe : "", b->recipe_hash) == 0;
    if (same)
        finish(b, &found, NULL);
    orch_image_fini(&found);
    return same;
}

/* ---- steps ---- */

/* What was made is on the disk, nobody is to write to it again, and root's VMM, which has another uid, is to read it. */
static int finish_files(int dir)
{
    DIR *d = fdopendir(fcntl(dir, F_DUPFD_CLOEXEC, 0));
    int r = d ? 0 : -errno;
    for (struct dirent *e; r == 0 && (e = readdir(d));) {
        cleanup_close int fd = openat(dir, e->d_name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        struct stat st;
        if (fd < 0 || fstat(fd, &st) < 0 || (S_ISREG(st.st_mode) && (fchmod(fd, 0444) < 0 || fsync(fd) < 0)))
            r = -errno;
    }
    if (d)
        closedir(d);
    return r < 0 ? r : fsync(dir) < 0 ? -errno : 0;
}

static struct orch_slice slice(const struct orch_buf *b)
{
    return (struct orch_slice){ b->p ? b->p : "", b->n };
}

/* Under its final name only when it is whole and on disk; the name's link last. */
static int install(struct orch_image_build *b, const char *id, struct orch_slice manifest)
{
    cleanup_close int tmp = open(b->tmp, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cleanup_close int cache = open(b->o.cache_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cleanup_free char *link = orch_xasprintf(".%s.link", b->name), *whole = orch_xasprintf("%s/%s", b->o.cache_dir, id);
    int r;
    if (tmp < 0 || cache < 0)
        return -errno;
    if ((r = orch_write_file(tmp, "vmlinux", b->kernel.p, b->kernel.n, 0400)) < 0 ||
        (r = orch_write_file(tmp, "initrd", b->initrd.p, b->initrd.n, 0400)) < 0 ||
        (r = orch_write_file(tmp, "manifest", manifest.p, manifest.n, 0400)) < 0 || (r = finish_files(tmp)) < 0)
        return r;
    /* The same content may be there already, or what somebody left of it. */
    if (rename(b->tmp, whole) < 0) {
        remove_folder(whole);
        if (rename(b->tmp, whole) < 0)
            return -errno;
    }
    free(orch_steal_ptr(&b->tmp));
    unlinkat(cache, link, 0);
    if (symlinkat(id, cache, link) < 0 || renameat(cache, link, cache, b->name) < 0 || fsync(cache) < 0)
        return -errno;
    return 0;
}

/* Removes what no name leads to any more. Templates in use have their disk open. */
static void prune(const char *cache_dir)
{
    char used[32][65], target[66];
    size_t n = 0;
    DIR *d = opendir(cache_dir);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d));)
        if (readlinkat(dirfd(d), e->d_name, target, sizeof target) == 64) {
            if (n == ORCH_ARRAY_LEN(used)) { /* so many that it cannot be told */
                closedir(d);
                return;
            }
            snprintf(used[n++], sizeof *used, "%.64s", target);
        }
    rewinddir(d);
    for (struct dirent *e; (e = readdir(d));) {
        bool keeps = strspn(e->d_name, "0123456789abcdef") != 64 || e->d_name[64];
        for (size_t i = 0; i < n && !keeps; i++)
            keeps = strcmp(used[i], e->d_name) == 0;
        if (!keeps) {
            cleanup_free char *left = orch_xasprintf("%s/%s", cache_dir, e->d_name);
            remove_folder(left);
        }
    }
    closedir(d);
}

static void step_install(struct orch_image_build *b)
{
    struct orch_err err;
    cleanup_buf struct orch_buf agent = { 0 }, busybox = { 0 }, manifest = { 0 };
    char hash[65], kernel_hash[65], initrd_hash[65], id[65];
    if (!child_ok(b, BUSYBOX " --list-full", &err) ||
        hash_file(b->o.agent_path, AGENT_MAX, &agent, hash, &err) < 0 ||
        hash_file(BUSYBOX, BUSYBOX_MAX, &busybox, initrd_hash, &err) < 0) {
        failed(b, &err);
        return;
    }
    initrd_make(b, slice(&agent), slice(&busybox));
    say(b, "initrd: %.1f MB, %zu modules", (double)b->initrd.n / 1e6, b->n_modules);
    /* Stock kernels find virtio-mmio devices by ACPI; those that take them from the command line need none. */
    bool acpi = !find_text(slice(&b->kernel), "virtio_mmio.device", 18);
    orch_sha256_hex(b->kernel.p, b->kernel.n, kernel_hash);
    orch_sha256_hex(b->initrd.p, b->initrd.n, initrd_hash);
    orch_buf_printf(&manifest, RECIPE "\nname %s\nkernel %s\ninitrd %s\nagent %s\nacpi %d\n", b->name, kernel_hash, initrd_hash,
                    hash, acpi);
    if (*b->disk_hash)
        orch_buf_printf(&manifest, "disk %s\n", b->disk_hash);
    orch_sha256_hex(manifest.p, manifest.n, id);
    uint64_t bytes = b->kernel.n + b->initrd.n + b->disk_bytes;
    orch_buf_printf(&manifest, "id %s\nrelease %s\nbytes %llu\nsource %s\n", id, b->release, (unsigned long long)bytes, b->source);
    if (*b->disk_hash)
        orch_buf_printf(&manifest, "recipe %s\n", b->recipe_hash);
    memcpy(b->agent_hash, hash, sizeof hash);
    int r = install(b, id, slice(&manifest));
    if (r < 0) {
        orch_err_set(&err, -r, "cannot write %s: %s", b->o.cache_dir, strerror(-r));
        failed(b, &err);
        return;
    }
    prune(b->o.cache_dir);
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
    Elf64_Ehdr e;
    int r = orch_read_file(AT_FDCWD, BUSYBOX, BUSYBOX_MAX, &elf);
    bool ok = r == 0 && elf.n > sizeof e && memcmp(elf.p, ELFMAG, SELFMAG) == 0;
    if (ok)
        memcpy(&e, elf.p, sizeof e);
    for (unsigned i = 0; ok && i < e.e_phnum; i++) {
        Elf64_Phdr ph;
        ok = e.e_phoff < elf.n && (i + 1ULL) * sizeof ph <= elf.n - e.e_phoff;
        if (ok)
            memcpy(&ph, elf.p + e.e_phoff + i * sizeof ph, sizeof ph);
        ok = ok && ph.p_type != PT_INTERP;
    }
    if (!ok)
        orch_err_set(&err, r < 0 ? -r : ENOEXEC, "%s %s: sudo apt-get install busybox-static", BUSYBOX,
                     r < 0 ? strerror(-r) : "is not linked statically");
    if (!ok || !child(b, (const char *const[]){ BUSYBOX, "--list-full", NULL }, false, step_install, &err))
        failed(b, &err);
}

/* ---- the disk */

static int disk_hash(struct orch_image_build *b, struct orch_err *err)
{
    struct orch_sha256_ctx c;
    uint8_t hash[ORCH_SHA256_BYTES];
    cleanup_free char *path = orch_xasprintf("%s/disk", b->tmp), *buf = orch_xmalloc(DISK_CHUNK);
    cleanup_close int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    ssize_t n = -1;
    orch_sha256_init(&c);
    while (fd >= 0 && (n = read(fd, buf, DISK_CHUNK)) > 0) {
        orch_sha256_update(&c, buf, (size_t)n);
        b->disk_bytes += (uint64_t)n;
    }
    if (n < 0)
        return orch_err_set(err, errno, "%s: %s", path, strerror(errno));
    orch_sha256_final(&c, hash);
    orch_hex(hash, sizeof hash, b->disk_hash);
    return 0;
}

static void disk_ready(struct orch_image_build *b)
{
    struct orch_err err;
    if (disk_hash(b, &err) < 0) {
        failed(b, &err);
        return;
    }
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

static void step_disk(struct orch_image_build *b)
{
    struct orch_err err;
    cleanup_free char *recipe = built_recipe(b->o.cache_dir, b->name);
    if (!*b->recipe_hash) {
        step_busybox(b);
    } else if (!b->o.fresh && recipe && strcmp(recipe, b->recipe_hash) == 0 && keep(b, b->name, "disk")) {
        disk_ready(b);
    } else if (!b->recipe) {
        not_built(b->name, &err);
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
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "base is made without a recipe: give yours another name");
    if (b->recipe)
        orch_recipe_hash(b->recipe, b->recipe_hash);
    if (b->recipe || base)
        return 0;
    cleanup_free char *recipe = built_recipe(b->o.cache_dir, b->name);
    if (!recipe)
        return not_built(b->name, err);
    memcpy(b->recipe_hash, recipe, sizeof b->recipe_hash);
    return 0;
}

/* b->kernel becomes the unpacked ELF; release is read from it. */
static int kernel_unpack(struct orch_image_build *b, struct orch_err *err)
{
    if (b->kernel.n > 4 && memcmp(b->kernel.p, ELFMAG, SELFMAG) != 0) {
        cleanup_buf struct orch_buf elf = { 0 };
        if (orch_bzimage_unpack(slice(&b->kernel), &elf, err) < 0)
            return -err->code;
        struct orch_buf packed = b->kernel;
        b->kernel = elf;
        elf = packed;
    }
    if (elf_check(slice(&b->kernel), err) < 0)
        return -err->code;
    free(b->release);
    b->release = release_of(slice(&b->kernel));
    if (!b->release || strchr(b->release, '/'))
        return orch_err_set(err, EINVAL, "the kernel does not say its version");
    say(b, "kernel %s: %.1f MB unpacked", b->release, (double)b->kernel.n / 1e6);
    return 0;
}

static void modules_want(struct orch_image_build *b)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(wanted); i++)
        module_add(b, wanted[i].name, strlen(wanted[i].name), wanted[i].required || (wanted[i].device == 2 && *b->recipe_hash));
}

static void step_kernel_file(struct orch_image_build *b)
{
    struct orch_err err;
    int r = orch_read_file(AT_FDCWD, b->o.kernel, KERNEL_MAX, &b->kernel);
    if (r < 0) {
        orch_err_set(&err, -r, "%s: %s", b->o.kernel, strerror(-r));
        failed(b, &err);
        return;
    }
    b->source = orch_xasprintf("file %s", b->o.kernel);
    if ((r = kernel_unpack(b, &err)) == 0 && b->o.modules) {
        modules_want(b);
        do
            r = modules_from_folder(b, &err);
        while (r == 0 && (r = modules_resolve(b, &err)) > 0);
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
    if (!child(b, (const char *const[]){ "dpkg-deb", "--fsys-tarfile", b->deb, NULL }, true, step_unpacked, &err))
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
        r = modules_resolve(b, &err);
    if (r < 0)
        failed(b, &err);
    else if (r > 0)
        unpack_start(b); /* once more, for what they depend on */
    else
        next(b, step_disk);
}

static void package_ready(struct orch_image_build *b)
{
    modules_want(b);
    unpack_start(b);
}

static void step_downloaded(struct orch_image_build *b)
{
    struct orch_err err;
    if (!child_ok(b, "apt-get download", &err)) {
        orch_err_wrap(&err, "cannot fetch Debian's kernel (is there a network? are the lists old? sudo apt-get update; or give "
                            "one with --kernel FILE)");
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
    double size;
    const char *space = strchr(b->text.p, ' ');
    if (!space || sscanf(space, " %199[A-Za-z0-9._+~%:-] %lf", file, &size) != 2 || *file == '.') {
        orch_err_set(&err, EBADMSG, "apt-get does not say where %s is: sudo apt-get update", b->package);
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
    say(b, "downloading %s (%.1f MB)", file, size / 1e6);
    if (!child(b, (const char *const[]){ "apt-get", "-q", "download", b->package, NULL }, false, step_downloaded, &err))
        failed(b, &err);
}

static void step_depends(struct orch_image_build *b)
{
    struct orch_err err;
    bool ok = child_ok(b, "apt-cache depends", &err);
    const char *p = ok ? strstr(b->text.p, "Depends: linux-image-") : NULL;
    if (!p) {
        orch_err_set(&err, ENOENT, "apt knows no linux-image-cloud-amd64: sudo apt-get update; or give a kernel with --kernel FILE");
        failed(b, &err);
        return;
    }
    p += strlen("Depends: ");
    b->package = orch_xstrndup(p, strcspn(p, " \n"));
    if (!child(b, (const char *const[]){ "apt-get", "download", "--print-uris", b->package, NULL }, false, step_uris, &err))
        failed(b, &err);
}

static void step_kernel_apt(struct orch_image_build *b)
{
    struct orch_err err;
    if (!child(b, (const char *const[]){ "apt-cache", "depends", "linux-image-cloud-amd64", NULL }, false, step_depends, &err)) {
        if (err.code == ENOENT)
            orch_err_wrap(&err, "no apt here to fetch Debian's kernel with; give one with --kernel FILE (bzImage or vmlinux) "
                                "and its modules");
        failed(b, &err);
    }
}
#else
static void step_kernel_apt(struct orch_image_build *b)
{
    struct orch_err err;
    orch_err_setc(&err, ORCH_CLASS_USAGE, ENOTSUP, "this orch is built without the feature apt-kernel: give a kernel with --kernel FILE");
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
    DIR *d = opendir(b->o.cache_dir);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strncmp(e->d_name, ".build-", 7) == 0) {
            cleanup_free char *left = orch_xasprintf("%s/%s", b->o.cache_dir, e->d_name);
            remove_folder(left);
        }
    if (d)
        closedir(d);
    b->tmp = orch_xasprintf("%s/.build-XXXXXX", b->o.cache_dir);
    if (!mkdtemp(b->tmp)) {
        orch_err_set(&err, errno, "%s: %s", b->o.cache_dir, strerror(errno));
        free(orch_steal_ptr(&b->tmp));
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
    int r = check_name(b->name, &err);
    if (r == 0)
        r = hash_file(b->o.agent_path, AGENT_MAX, &agent, b->agent_hash, &err);
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
    orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, "not built within %d minutes%s", LIMIT_MS / 60000,
                  b->tmp ? "" : ": another orch holds the lock; end it, or look what it waits for");
    failed(b, &err);
}

static const char *dup_or_null(const char *s)
{
    return s ? orch_xstrdup(s) : NULL;
}

struct orch_image_build *orch_image_build_start(struct orch_loop *l, const char *name, const struct orch_image_opts *o,
                                                orch_image_done_fn *done, void *ud)
{
    struct orch_image_build *b = orch_xcalloc(1, sizeof *b);
    b->loop = l;
    b->o = *o;
    b->o.cache_dir = dup_or_null(o->cache_dir);
    b->o.agent_path = dup_or_null(o->agent_path);
    b->o.kernel = dup_or_null(o->kernel);
    b->o.modules = dup_or_null(o->modules);
    b->o.recipe = NULL;
    b->recipe = orch_recipe_dup(o->recipe);
    b->name = orch_xstrdup(name);
    b->done = done;
    b->ud = ud;
    b->lock = -1;
    b->timer = orch_timer_new(l, on_timer, b);
    b->limit = orch_timer_new(l, on_limit, b);
    orch_timer_set(b->limit, LIMIT_MS);
    next(b, step_first);
    return b;
}
