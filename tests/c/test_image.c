/* core/image: unpacking kernels, and building the base image from made-up kernels and packages (the
 * real one is built and booted by the end-to-end tests). Needs root, busybox-static, lz4, xz-utils,
 * zstd, dpkg. */
#include "base/hash.h"
#include "image/image.h"
#include "image/kernel.h"
#include "image/tar.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "child.h"

static char dir[64];

static int make_dir(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/orch-test-image-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd);
}

static char *in_dir(const char *name)
{
    return orch_xasprintf("%s/%s", dir, name);
}

static void shell(const char *fmt, ...) ORCH_PRINTF(1, 2);
static void shell(const char *fmt, ...)
{
    char cmd[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(cmd, sizeof cmd, fmt, ap);
    va_end(ap);
    if (system(cmd) != 0)
        fail_msg("%s", cmd);
}

static void put(const char *path, const void *p, size_t n)
{
    assert_int_equal(orch_write_file(AT_FDCWD, path, p, n, 0644), 0);
}

/* ---- made-up kernels */

/* An ELF with the PVH note and a banner, about 100 kB, that compresses. */
static void make_elf(struct orch_buf *b, const char *release, uint32_t note_type, const char *more)
{
    Elf64_Ehdr e = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, 1 },
                     .e_type = ET_EXEC,
                     .e_machine = EM_X86_64,
                     .e_phoff = sizeof e,
                     .e_phentsize = sizeof(Elf64_Phdr),
                     .e_phnum = 2 };
    Elf64_Phdr ph[2] = { { .p_type = PT_LOAD },
                         { .p_type = PT_NOTE,
                           .p_offset = sizeof e + sizeof ph,
                           .p_filesz = 2 * (sizeof(Elf64_Nhdr) + 12) } };
    Elf64_Nhdr other = { .n_namesz = 4, .n_descsz = 6, .n_type = 3 },
               pvh = { .n_namesz = 4, .n_descsz = 8, .n_type = note_type };
    orch_buf_add(b, &e, sizeof e);
    orch_buf_add(b, ph, sizeof ph);
    orch_buf_add(b, &other, sizeof other);
    orch_buf_add(b, "GNU\0abcdef\0\0", 12);
    orch_buf_add(b, &pvh, sizeof pvh);
    orch_buf_add(b, "Xen\0abcdefgh", 12);
    orch_buf_str(b, "Linux version %s (format) ");
    orch_buf_printf(b, "Linux version %s (builder@host) #1 SMP%s", release, more);
    for (int i = 0; i < 20000; i++)
        orch_buf_printf(b, "%d ", i % 700);
}

/* Packs `data` the way the kernel's build does, and puts the boot header before it. */
static void make_bzimage(struct orch_buf *out, const struct orch_buf *data, const char *command,
                         bool suffix)
{
    cleanup_free char *plain = in_dir("plain"), *packed = in_dir("packed");
    cleanup_buf struct orch_buf payload = { 0 };
    put(plain, data->p, data->n);
    shell("%s <%s >%s", command, plain, packed);
    assert_int_equal(orch_read_file(AT_FDCWD, packed, 1 << 20, &payload), 0);
    uint32_t n = (uint32_t)data->n;
    if (suffix)
        orch_buf_add(&payload, &n, 4);
    char head[1024] = { 0 };
    head[0x1f1] = 1;
    memcpy(head + 0x202, "HdrS", 4);
    uint32_t at = 7, len = (uint32_t)payload.n;
    memcpy(head + 0x248, &at, 4);
    memcpy(head + 0x24c, &len, 4);
    orch_buf_add(out, head, sizeof head);
    orch_buf_add(out, "padding", 7);
    orch_buf_add(out, payload.p, payload.n);
    orch_buf_str(out, "signature and so on");
}

static const struct {
    const char *command;
    bool suffix;
} packers[] = { { "lz4 -l -9 -c", true },
                { "gzip -9c", false },
                { "xz --check=crc32 --x86 --lzma2=dict=1MiB -c", true },
                { "zstd -22 --ultra -c", true } };

static void test_unpack(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf elf = { 0 };
    make_elf(&elf, "6.1.0-test", 18, "");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(packers); i++) {
        cleanup_buf struct orch_buf bz = { 0 }, out = { 0 };
        struct orch_err err = { 0 };
        make_bzimage(&bz, &elf, packers[i].command, packers[i].suffix);
        assert_true(bz.n < elf.n);
        if (orch_bzimage_unpack((struct orch_slice){ bz.p, bz.n }, &out, &err) < 0)
            fail_msg("%s: %s", packers[i].command, err.msg);
        assert_int_equal(out.n, elf.n);
        assert_memory_equal(out.p, elf.p, elf.n);
    }
}

static void test_unpack_damaged(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf elf = { 0 }, good = { 0 };
    make_elf(&elf, "6.1.0-test", 18, "");
    make_bzimage(&good, &elf, packers[0].command, true);
    uint32_t len;
    memcpy(&len, good.p + 0x24c, 4);
    const struct {
        size_t at, n, cut;
        const char *bytes, *error;
    } t[] = {
        { 0, 0, 100, "", "not a Linux bzImage" },
        { 0x202, 4, 0, "Hdrs", "not a Linux bzImage" },
        { 0x248, 4, 0, "\xff\xff\xff\xff", "does not fit" },
        { 0x24c, 4, 0, "\xff\xff\xff\xff", "does not fit" },
        { 0x24c, 4, 0, "\1\0\0\0", "does not fit" },
        { 0x1f1, 1, 0, "\xff", "does not fit" },
        { 0, 0, good.n - 30, "", "does not fit" },
        { 1031, 4, 0, "BZh9", "unknown way (42 5a 68 39)" },
        { 1031 + 2000, 300, 0, NULL, "lz4 says that the data is damaged" },
        { 1031 + len - 4, 4, 0, "\1\0\0\0", "bytes came out instead of 1" },
        { 1031 + len - 4, 4, 0, "\xff\xff\xff\xff", "at most" },
    };
    char noise[300];
    memset(noise, 0xff, sizeof noise);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(t); i++) {
        cleanup_buf struct orch_buf bz = { 0 }, out = { 0 };
        struct orch_err err = { 0 };
        orch_buf_add(&bz, good.p, t[i].cut ? t[i].cut : good.n);
        memcpy(bz.p + t[i].at, t[i].bytes ? t[i].bytes : noise, t[i].n);
        /* An exact copy on the heap: a read beyond it is seen. */
        cleanup_free char *exact = orch_xmalloc(bz.n);
        memcpy(exact, bz.p, bz.n);
        assert_true(orch_bzimage_unpack((struct orch_slice){ exact, bz.n }, &out, &err) < 0);
        if (!strstr(err.msg, t[i].error))
            fail_msg("case %zu: expected \"%s\", got \"%s\"", i, t[i].error, err.msg);
    }
}

static void test_unpack_plain(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf out = { 0 };
    struct orch_err err;
    assert_int_equal(orch_unpack(ORCH_SLICE("\x7f"
                                            "ELF and nothing else"),
                                 1 << 20, &out, &err),
                     0);
    assert_int_equal(orch_unpack((struct orch_slice){ "", 0 }, 1 << 20, &out, &err), 0);
    assert_int_equal(out.n, 0);
    cleanup_free char *packed = in_dir("packed-plain");
    cleanup_buf struct orch_buf in = { 0 };
    shell("echo 0123456789 | gzip -c >%s", packed);
    assert_int_equal(orch_read_file(AT_FDCWD, packed, 1 << 20, &in), 0);
    assert_int_equal(orch_unpack(orch_slice_of(&in), 10, &out, &err), -EFBIG);
    assert_int_equal(orch_unpack(orch_slice_of(&in), 11, &out, &err), 1);
    assert_string_equal(out.p, "0123456789\n");
}

/* ---- tar */

struct unpacked {
    struct orch_buf names, bytes;
};

/* What is called "want…" is. */
static struct orch_buf *want(void *ud, const char *path, uint64_t size)
{
    struct unpacked *u = ud;
    const char *slash = strrchr(path, '/');
    orch_buf_printf(&u->names, "%s %llu\n", path, (unsigned long long)size);
    return slash && strncmp(slash, "/want", 5) == 0 ? &u->bytes : NULL;
}

static void feed(struct orch_tar *t, struct orch_slice s, size_t chunk)
{
    for (size_t at = 0; at < s.n; at += chunk) {
        size_t n = s.n - at < chunk ? s.n - at : chunk;
        cleanup_free char *exact = orch_xmalloc(n); /* a read beyond it is seen */
        memcpy(exact, s.p + at, n);
        orch_tar_feed(t, exact, n);
    }
}

static void test_tar(void **state)
{
    (void)state;
    cleanup_free char *gnu_path = in_dir("gnu.tar"), *ustar_path = in_dir("ustar.tar");
    cleanup_buf struct orch_buf gnu = { 0 }, ustar = { 0 }, names = { 0 };
    char deep[121], deeper[121];
    memset(deep, 'd', 120);
    memset(deeper, 'e', 120);
    deep[120] = deeper[120] = 0;
    /* One name for the header's prefix (ustar), one that GNU's tar writes before the file. */
    shell("cd %s && mkdir -p t/%.60s/%.60s t/%s/%s && printf 512-%%0508d 1 >t/want-a && printf xyz "
          ">t/%.60s/%.60s/want-b && "
          "printf gnu >t/%s/%s/want-c && : >t/want-d && printf no >t/other && ln t/want-a "
          "t/want-hard && ln -s want-a t/want-soft && "
          "tar -cf gnu.tar --format=gnu --sort=name t/%s t/other t/want-a t/want-d t/want-hard "
          "t/want-soft && "
          "tar -cf ustar.tar --format=ustar t/%.60s/%.60s/want-b && rm -r t",
          dir, deep, deep, deep, deeper, deep, deep, deep, deeper, deep, deep, deep);
    assert_int_equal(orch_read_file(AT_FDCWD, gnu_path, 1 << 20, &gnu), 0);
    assert_int_equal(orch_read_file(AT_FDCWD, ustar_path, 1 << 20, &ustar), 0);
    orch_buf_printf(
        &names, "t/%.60s/%.60s/want-b 3\nt/%s/%s/want-c 3\nt/other 2\nt/want-a 512\nt/want-d 0\n",
        deep, deep, deep, deeper);

    static const size_t chunks[] = { 1, 7, 511, 512, 513, 1 << 20 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(chunks); i++) {
        struct unpacked u = { 0 };
        struct orch_tar t = { .into = want, .ud = &u };
        feed(&t, (struct orch_slice){ gnu.p, 600 }, chunks[i]); /* cut off in a long name */
        orch_tar_restart(&t);
        feed(&t, (struct orch_slice){ ustar.p, ustar.n - 100 }, chunks[i]);
        orch_tar_restart(&t);
        feed(&t, orch_slice_of(&gnu), chunks[i]);
        assert_false(t.failed);
        assert_string_equal(u.names.p, names.p);
        assert_int_equal(u.bytes.n, 3 + 512 + 3);
        assert_memory_equal(u.bytes.p, "xyzgnu512-0000", 14);
        orch_tar_fini(&t);
        orch_buf_free(&u.names);
        orch_buf_free(&u.bytes);
    }

    /* Not a tar, one with a damaged head, and sizes that are none: nothing is taken from there
     * on. */
    static const struct {
        size_t at;
        const char *bytes;
    } damages[] = { { 0, "X" }, { 130, "9" }, { 124, "\x80" }, { 148, "0000000" } };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(damages); i++) {
        struct unpacked u = { 0 };
        struct orch_tar t = { .into = want, .ud = &u };
        cleanup_buf struct orch_buf bad = { 0 };
        orch_buf_slice(&bad, orch_slice_of(&gnu));
        memcpy(bad.p + damages[i].at, damages[i].bytes, strlen(damages[i].bytes));
        feed(&t, orch_slice_of(&bad), 4096);
        assert_true(t.failed);
        assert_int_equal(u.names.n, 0);
        orch_tar_fini(&t);
    }
}

/* ---- building */

struct build {
    struct orch_loop *loop;
    struct orch_image_opts o;
    int done, lines, die_at; /* die_at: kills the process at that line of progress */
    struct orch_image image;
    struct orch_err err;
    char last[512];
};

static void on_progress(void *ud, const char *line)
{
    struct build *b = ud;
    snprintf(b->last, sizeof b->last, "%s", line);
    if (++b->lines == b->die_at)
        kill(getpid(), SIGKILL);
}

static void on_done(void *ud, const struct orch_image *image, const struct orch_err *err)
{
    struct build *b = ud;
    b->done++;
    assert_true(!image != !err);
    if (err) {
        b->err = *err;
        return;
    }
    orch_image_copy(&b->image, image);
}

static void wait_for(struct build *b)
{
    int64_t end = orch_now_us() + 60000000;
    while (!b->done && orch_now_us() < end)
        orch_loop_step(b->loop, 100);
    assert_int_equal(b->done, 1);
}

static void build_init(struct build *b, const char *cache, const char *kernel, const char *modules)
{
    struct orch_err err;
    *b = (struct build){ 0 };
    b->loop = orch_loop_new(&err);
    b->o = (struct orch_image_opts){ .cache_dir = in_dir(cache),
                                     .agent_path = in_dir("agent"),
                                     .kernel = kernel ? in_dir(kernel) : NULL,
                                     .modules = modules ? in_dir(modules) : NULL,
                                     .progress = on_progress,
                                     .ud = b };
}

static void build_fini(struct build *b)
{
    orch_image_fini(&b->image);
    orch_loop_free(b->loop);
    free((void *)(uintptr_t)b->o.cache_dir);
    free((void *)(uintptr_t)b->o.agent_path);
    free((void *)(uintptr_t)b->o.kernel);
    free((void *)(uintptr_t)b->o.modules);
}

static void build(struct build *b)
{
    orch_image_build_start(b->loop, "base", &b->o, on_done, b);
    assert_int_equal(b->done, 0); /* never from inside */
    wait_for(b);
}

static void must_build(struct build *b)
{
    build(b);
    if (b->err.code)
        fail_msg("%s", b->err.msg);
}

/* "NAME depends" lines become files of a kernel's module folder; "lib/NAME" sits deeper. */
static void make_modules(const char *name, const char *release, const char *const *list)
{
    cleanup_free char *root = in_dir(name);
    shell("rm -rf %s && mkdir -p %s/kernel/drivers/virtio && ln -s / %s/build", root, root, root);
    for (; *list; list++) {
        cleanup_buf struct orch_buf b = { 0 };
        char file[64], deps[128] = "";
        assert_true(sscanf(*list, "%63s %127s", file, deps) >= 1);
        orch_buf_add(&b,
                     "\x7f"
                     "ELFmodule\0license=GPL\0depends=",
                     31);
        orch_buf_add(&b, deps, strlen(deps) + 1);
        orch_buf_printf(&b, "vermagic=%s SMP preempt mod_unload ", release);
        orch_buf_add(&b, "\0rest", 5);
        cleanup_free char *path = orch_xasprintf("%s/kernel/drivers/virtio/%s.ko", root, file);
        put(path, b.p, b.n);
    }
}

static const char *const modules[] = { "virtio",
                                       "virtio_ring other-dep",
                                       "virtio_mmio virtio,virtio_ring",
                                       "other-dep",
                                       "virtio_console virtio",
                                       "virtio-rng virtio",
                                       "unwanted",
                                       "virtio_net virtio,failover",
                                       "failover",
                                       "erofs virtio",
                                       NULL };

static void make_inputs(void)
{
    cleanup_buf struct orch_buf elf = { 0 }, bz = { 0 };
    cleanup_free char *agent = in_dir("agent"), *vmlinuz = in_dir("vmlinuz"),
                      *vmlinux = in_dir("vmlinux"), *own = in_dir("own");
    make_elf(&elf, "6.1.0-test", 18, "");
    make_bzimage(&bz, &elf, packers[0].command, true);
    put(vmlinux, elf.p, elf.n);
    put(vmlinuz, bz.p, bz.n);
    elf.n = 0;
    make_elf(&elf, "6.9.0-own", 18, "virtio_mmio.device");
    put(own, elf.p, elf.n);
    put(agent,
        "\x7f"
        "ELF the agent",
        14);
    make_modules("modules", "6.1.0-test", modules);
}

/* What the cpio holds under `path`: "mode uid gid mtime size|text"; NULL: nothing. Checks the
 * order. */
static char *cpio_get(const struct orch_buf *b, const char *path)
{
    char *found = NULL, *before = NULL;
    for (size_t at = 0; at + 110 < b->n;) {
        unsigned f[13];
        assert_memory_equal(b->p + at, "070701", 6);
        for (int i = 0; i < 13; i++) {
            char hex[9] = "";
            memcpy(hex, b->p + at + 6 + 8 * i, 8);
            f[i] = (unsigned)strtoul(hex, NULL, 16);
        }
        const char *name = b->p + at + 110;
        size_t data = (at + 110 + f[11] + 3) & ~3UL;
        assert_int_equal(strlen(name) + 1, f[11]);
        assert_true(data + f[6] <= b->n);
        if (strcmp(name, "TRAILER!!!") == 0)
            break;
        assert_true(!before || strcmp(before, name) < 0);
        free(before);
        before = orch_xstrdup(name);
        assert_int_equal(f[5], 0);
        if (strcmp(name, path) == 0)
            found = orch_xasprintf("%o %u %u %.*s", f[1], f[2], f[3], (int)f[6], b->p + data);
        at = (data + f[6] + 3) & ~3UL;
    }
    free(before);
    return found;
}

static void test_base(void **state)
{
    (void)state;
    struct build a, b;
    make_inputs();
    build_init(&a, "cache-a", "vmlinuz", "modules");
    must_build(&a);
    assert_string_equal(a.image.name, "base");
    assert_string_equal(a.image.kernel_release, "6.1.0-test");
    assert_true(a.image.acpi);
    cleanup_buf struct orch_buf kernel = { 0 }, initrd = { 0 }, elf = { 0 };
    assert_int_equal(orch_read_file(AT_FDCWD, a.image.kernel, 1 << 20, &kernel), 0);
    make_elf(&elf, "6.1.0-test", 18, "");
    assert_int_equal(kernel.n, elf.n);
    assert_memory_equal(kernel.p, elf.p, elf.n);
    assert_int_equal(orch_read_file(AT_FDCWD, a.image.initrd, 16 << 20, &initrd), 0);
    assert_int_equal(a.image.bytes, kernel.n + initrd.n);
    static const struct {
        const char *path, *is;
    } t[] = {
        { "bin", "40755 0 0 " },
        { "home/user", "40755 1000 1000 " },
        { "tmp", "41777 0 0 " },
        { "root", "40700 0 0 " },
        { "init", "100755 0 0 \x7f"
                  "ELF the agent" },
        { "bin/sh", "120777 0 0 /bin/busybox" },
        { "etc/hostname", "100644 0 0 orch\n" },
        { "etc/resolv.conf", "100644 0 0 " },
        { "etc/passwd",
          "100644 0 0 root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n" },
        { "etc/orch/modules",
          "100644 0 0 "
          "/lib/modules/6.1.0-test/other_dep.ko\n/lib/modules/6.1.0-test/virtio_ring.ko\n/lib/"
          "modules/6.1.0-test/virtio.ko\n"
          "/lib/modules/6.1.0-test/virtio_mmio.ko\n/lib/modules/6.1.0-test/virtio_console.ko\n/lib/"
          "modules/6.1.0-test/virtio_rng.ko\n"
          "/lib/modules/6.1.0-test/failover.ko 1\n/lib/modules/6.1.0-test/virtio_net.ko "
          "1\n/lib/modules/6.1.0-test/erofs.ko 2\n" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(t); i++) {
        cleanup_free char *is = cpio_get(&initrd, t[i].path);
        assert_non_null(is);
        assert_string_equal(is, t[i].is);
    }
    cleanup_free char *module = cpio_get(&initrd, "lib/modules/6.1.0-test/virtio_mmio.ko"),
                      *none = cpio_get(&initrd, "lib/modules/6.1.0-test/unwanted.ko");
    assert_non_null(module);
    assert_null(none);

    /* The same inputs give the same image, packed or not, wherever it is built. */
    build_init(&b, "cache-b", "vmlinux", "modules");
    must_build(&b);
    assert_string_equal(a.image.id, b.image.id);
    build_fini(&b);

    /* It is found, until the agent is another. */
    struct orch_image found;
    struct orch_err err;
    assert_int_equal(orch_image_find("base", &a.o, &found, &err), 0);
    assert_string_equal(found.id, a.image.id);
    assert_string_equal(found.kernel, a.image.kernel);
    assert_string_equal(found.initrd, a.image.initrd);
    orch_image_fini(&found);
    assert_int_equal(orch_image_find("../nope", &a.o, &found, &err), -EINVAL);
    assert_int_equal(orch_image_find("nope", &a.o, &found, &err), -ENOENT);
    put(a.o.agent_path,
        "\x7f"
        "ELF other",
        10);
    assert_int_equal(orch_image_find("base", &a.o, &found, &err), -ESTALE);
    assert_non_null(strstr(err.msg, "another guest agent"));
    char old[65];
    memcpy(old, a.image.id, 65);
    orch_image_fini(&a.image);
    a.done = 0;
    must_build(&a);
    assert_string_not_equal(old, a.image.id);
    assert_int_equal(unlink(a.image.initrd), 0); /* somebody cleaned up a little */
    assert_int_equal(orch_image_find("base", &a.o, &found, &err), -ESTALE);
    orch_image_fini(&a.image);
    a.done = 0;
    must_build(&a);
    assert_int_equal(orch_image_find("base", &a.o, &found, &err), 0);
    orch_image_fini(&found);
    build_fini(&a);
}

/* ---- nobody writes to what microVMs start from */

static void set_modes(const char *folder, mode_t mode)
{
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.')
            assert_int_equal(fchmodat(dirfd(d), e->d_name, mode, 0), 0);
    closedir(d);
}

/* How many files there are, all of this mode. */
static int count_modes(const char *folder, mode_t mode)
{
    struct stat st;
    int n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.' && ++n &&
            (fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 ||
             st.st_mode != (S_IFREG | mode)))
            fail_msg("%s has mode %o", e->d_name, st.st_mode);
    closedir(d);
    return n;
}

static void test_modes(void **state)
{
    (void)state;
    struct build b;
    struct orch_image found;
    struct orch_err err = { 0 };
    make_inputs();
    build_init(&b, "cache-modes", "vmlinuz", "modules");
    mode_t before = umask(077); /* root's VMM has another uid, and is to read them all the same */
    must_build(&b);
    umask(before);
    cleanup_free char *folder = orch_xasprintf("%s/%s", b.o.cache_dir, b.image.id);
    assert_int_equal(count_modes(folder, 0444), 3);
    /* As earlier versions left them, or somebody who meant well. */
    set_modes(folder, 0644);
    assert_int_equal(orch_image_find("base", &b.o, &found, &err), 0);
    orch_image_fini(&found);
    assert_int_equal(count_modes(folder, 0444), 3);
    set_modes(folder, 0666);
    int fd = orch_image_open(AT_FDCWD, b.image.kernel, &err);
    assert_true(fd >= 0 && fcntl(fd, F_GETFL) != -1 &&
                (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
    close(fd);
    struct stat st;
    assert_int_equal(stat(b.image.kernel, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0444);
    /* By name only; a folder is no file; what is not there is damage. */
    cleanup_free char *link = orch_xasprintf("%s/link", folder);
    assert_int_equal(symlink("vmlinux", link), 0);
    assert_int_equal(orch_image_open(AT_FDCWD, link, &err), -ELOOP);
    assert_int_equal(orch_image_open(AT_FDCWD, folder, &err), -EINVAL);
    assert_int_equal(orch_image_open(AT_FDCWD, "/none", &err), -ENOENT);
    assert_int_equal(err.cls, ORCH_CLASS_FAILED);
    build_fini(&b);
}

static char *kept; /* a file of an image */

static void expect_open(const char *const *parts)
{
    struct orch_err err = { 0 };
    int fd = orch_image_open(AT_FDCWD, kept, &err);
    CHECK(*parts ? fd == -EPERM && err.cls == ORCH_CLASS_ISOLATION : fd >= 0, "%d: %s", fd,
          err.msg);
    for (; *parts; parts++)
        CHECK(strstr(err.msg, *parts), "no `%s` in: %s", *parts, err.msg);
}
#define EXPECT_OPEN(...) expect_open((const char *const[]){ __VA_ARGS__ NULL })

static void of_another(void)
{
    char chown_[64];
    snprintf(chown_, sizeof chown_, "sudo chown %u '", geteuid());
    EXPECT_OPEN(kept, "belongs to uid 12345", "orch image rm", chown_, );
}

static void open_to_all(void)
{
    EXPECT_OPEN(kept, "has mode 0666", "sudo chmod a-w '", "XDG_CACHE_HOME", );
}

static void fine(void)
{
    EXPECT_OPEN();
}

static void on_read_only(void)
{
    CHECK(!unshare(CLONE_NEWNS) && !mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) &&
              !mount(kept, kept, NULL, MS_BIND, NULL) &&
              !mount(NULL, kept, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL),
          "%m");
    EXPECT_OPEN();
}

/* What can be changed by others, and is not this user's to mend, is refused by name. */
static void test_owners(void **state)
{
    (void)state;
    struct stat st;
    kept = in_dir("kept");
    put(kept, "x", 1);
    assert_int_equal(chmod(dir, 0755) | chown(kept, 12345, 12345), 0);
    run_as_both(of_another);
    assert_int_equal(chown(kept, 0, 0) | chmod(kept, 0666), 0);
    run_as(USER, open_to_all);
    run_as(0, on_read_only);
    assert_int_equal(stat(kept, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0666);
    /* Of root, and root alone may write: a user's VMM is not root. */
    assert_int_equal(chmod(kept, 0644), 0);
    run_as(USER, fine);
    run_as(0, fine);
    assert_int_equal(stat(kept, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0444);
    free(kept);
}

static void test_own_kernel(void **state)
{
    (void)state;
    struct build b;
    make_inputs();
    build_init(&b, "cache-own", "own", NULL);
    must_build(&b);
    assert_false(b.image.acpi);
    assert_string_equal(b.image.kernel_release, "6.9.0-own");
    cleanup_buf struct orch_buf initrd = { 0 };
    assert_int_equal(orch_read_file(AT_FDCWD, b.image.initrd, 16 << 20, &initrd), 0);
    cleanup_free char *list = cpio_get(&initrd, "etc/orch/modules");
    assert_string_equal(list, "100644 0 0 ");
    build_fini(&b);
}

static void expect_error(const char *kernel, const char *mods, const char *error)
{
    struct build b;
    build_init(&b, "cache-bad", kernel, mods);
    build(&b);
    if (!b.err.code || !strstr(b.err.msg, error))
        fail_msg("%s, %s: expected \"%s\", got \"%s\"", kernel ? kernel : "apt",
                 mods ? mods : "none", error, b.err.msg);
    DIR *d = opendir(b.o.cache_dir); /* nothing is left but the lock */
    for (struct dirent *e; d && (e = readdir(d));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            assert_string_equal(e->d_name, ".lock");
    if (d)
        closedir(d);
    build_fini(&b);
}

static void test_refused(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf elf = { 0 };
    cleanup_free char *bad = in_dir("bad"), *agent = in_dir("agent"),
                      *list = in_dir("partial/modules.builtin");
    make_inputs();
    expect_error("none", NULL, "none: No such file");
    put(bad, "text", 4);
    expect_error("bad", NULL, "neither a bzImage nor an ELF");
    make_elf(&elf, "6.1.0-test", 17, "");
    put(bad, elf.p, elf.n);
    expect_error("bad", NULL, "CONFIG_PVH=y");
    elf.p[18] = EM_AARCH64;
    put(bad, elf.p, elf.n);
    expect_error("bad", NULL, "not of x86-64");
    elf.n = 0;
    make_elf(&elf, "", 18, "");
    put(bad, elf.p, elf.n);
    expect_error("bad", NULL, "does not say its version");

    expect_error("vmlinuz", "none", "No such file");
    make_modules("partial", "6.1.0-test",
                 (const char *const[]){ "virtio", "virtio_console virtio", NULL });
    expect_error("vmlinuz", "partial", "module virtio_mmio is missing");
    put(list, "kernel/drivers/virtio/virtio_mmio.ko\n", 37);
    make_modules("strange", "6.2.0-test", modules);
    expect_error("vmlinuz", "strange", "was built for kernel 6.2.0-test");
    make_modules("strange", "6.1.0-testing", modules);
    expect_error("vmlinuz", "strange", "was built for kernel 6.1.0-testing");
    make_modules("lost", "6.1.0-test",
                 (const char *const[]){ "virtio_mmio lost", "virtio_console", NULL });
    expect_error("vmlinuz", "lost", "module lost is missing");
    /* In the kernel itself is as good; a circle of dependencies ends. */
    struct build b;
    make_modules("circle", "6.1.0-test",
                 (const char *const[]){ "virtio_console a", "a b", "b a", NULL });
    cleanup_free char *builtin = in_dir("circle/modules.builtin");
    put(builtin, "kernel/drivers/virtio/virtio-mmio.ko\n", 37);
    build_init(&b, "cache-circle", "vmlinuz", "circle");
    must_build(&b);
    build_fini(&b);

    build_init(&b, "cache-bad", "vmlinuz", "modules");
    assert_int_equal(unlink(agent), 0);
    build(&b);
    assert_non_null(strstr(b.err.msg, "agent: No such file"));
    build_fini(&b);
}

static int count_entries(const char *path, const char *prefix)
{
    int n = 0;
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));)
        n += strncmp(e->d_name, prefix, strlen(prefix)) == 0;
    if (d)
        closedir(d);
    return n;
}

static void test_two_builders(void **state)
{
    (void)state;
    struct build a, b;
    make_inputs();
    build_init(&a, "cache-two", "vmlinuz", "modules");
    build_init(&b, "cache-two", "vmlinuz", "modules");
    struct orch_loop *other = b.loop;
    b.loop = a.loop;
    orch_image_build_start(a.loop, "base", &a.o, on_done, &a);
    orch_image_build_start(a.loop, "base", &b.o, on_done, &b);
    wait_for(&a);
    wait_for(&b);
    assert_string_equal(a.image.id, b.image.id);
    assert_int_equal(count_entries(a.o.cache_dir, ".build-"), 0);
    b.loop = other;
    build_fini(&a);
    build_fini(&b);
}

static void test_cancel(void **state)
{
    (void)state;
    make_inputs();
    for (int turns = 0; turns < 6; turns++) {
        struct build b;
        build_init(&b, "cache-cancel", "vmlinuz", "modules");
        struct orch_image_build *run = orch_image_build_start(b.loop, "base", &b.o, on_done, &b);
        for (int i = 0; i < turns && !b.done; i++)
            orch_loop_step(b.loop, 100);
        if (!b.done)
            orch_image_build_cancel(run);
        orch_loop_step(b.loop, 0);
        assert_int_equal(count_entries(b.o.cache_dir, ".build-"), 0);
        build_fini(&b);
    }
}

static void test_kill_9(void **state)
{
    (void)state;
    struct build b;
    make_inputs();
    for (int line = 1; line <= 3; line++) {
        pid_t pid = fork();
        build_init(&b, "cache-kill", "vmlinuz", "modules"); /* each its own loop */
        if (pid == 0) {
            b.die_at = line;
            orch_image_build_start(b.loop, "base", &b.o, on_done, &b);
            for (int i = 0; i < 1000 && !b.done; i++)
                orch_loop_step(b.loop, 100);
            _exit(0);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status));
        struct orch_image found;
        struct orch_err err;
        bool last = line == 3; /* said when all is in place */
        assert_int_equal(count_entries(b.o.cache_dir, ".build-"), !last);
        assert_int_equal(orch_image_find("base", &b.o, &found, &err), last ? 0 : -ENOENT);
        if (last)
            orch_image_fini(&found);
        else
            build_fini(&b);
    }
    must_build(&b);
    assert_int_equal(count_entries(b.o.cache_dir, ".build-"), 0);
    build_fini(&b);
}

#if ORCH_FEATURE_APT_KERNEL
/* A real package, offered by programs that stand in for apt-cache and apt-get. */
static void test_apt(void **state)
{
    (void)state;
    struct build b;
    make_inputs();
    cleanup_free char *path = orch_xasprintf("%s/bin:%s", dir, getenv("PATH")),
                      *before = orch_xstrdup(getenv("PATH"));
    char deep[200];
    memset(deep, 'd', sizeof deep - 1);
    deep[sizeof deep - 1] = 0;
    shell(
        "cd %s && mkdir -p bin p/DEBIAN p/boot p/lib/modules/6.1.0-test p/usr/share/%s && "
        "printf 'Package: linux-image-6.1.0-test\\nVersion: 1\\nArchitecture: amd64\\nMaintainer: "
        "m\\nDescription: d\\n' >p/DEBIAN/control && "
        "cp vmlinuz p/boot/vmlinuz-6.1.0-test && cp -r modules/kernel p/lib/modules/6.1.0-test && "
        ": >p/usr/share/%s/file && "
        ": >p/lib/modules/6.1.0-test/modules.builtin && ln -s vmlinuz-6.1.0-test p/boot/vmlinuz && "
        "dpkg-deb --build --root-owner-group p real.deb >/dev/null && "
        "printf '#!/bin/sh\\necho \"linux-image-cloud-amd64\\n  Depends: linux-image-6.1.0-test\"' "
        ">bin/apt-cache && "
        "printf '#!/bin/sh\\n[ \"$2\" = --print-uris ] && { echo \"'\"'http://x/real.deb'\"' "
        "real.deb 1234567 SHA256:00\"; exit; }\\n"
        "echo \"$*\" >>%s/calls; cp %s/real.deb .' >bin/apt-get && chmod +x bin/*",
        dir, deep, deep, dir, dir);
    setenv("PATH", path, 1);
    build_init(&b, "cache-apt", NULL, NULL);
    must_build(&b);
    assert_string_equal(b.image.kernel_release, "6.1.0-test");
    cleanup_buf struct orch_buf initrd = { 0 };
    assert_int_equal(orch_read_file(AT_FDCWD, b.image.initrd, 16 << 20, &initrd), 0);
    /* other-dep is asked for by virtio_ring only: it takes a second pass over the package. */
    cleanup_free char *dep = cpio_get(&initrd, "lib/modules/6.1.0-test/other_dep.ko");
    assert_non_null(dep);
    /* Nothing new: nothing is downloaded. */
    orch_image_fini(&b.image);
    b.done = 0;
    must_build(&b);
    shell("[ $(wc -l <%s/calls) = 1 ]", dir);
    char old[65];
    memcpy(old, b.image.id, 65);
    put(b.o.agent_path,
        "\x7f"
        "ELF other",
        10);
    orch_image_fini(&b.image);
    b.done = 0;
    must_build(&b);
    assert_string_not_equal(old, b.image.id);
    shell("[ $(wc -l <%s/calls) = 1 ]", dir);
    build_fini(&b);

    static const struct {
        const char *program, *script, *error;
    } t[] = {
        { "apt-cache", "echo 'E: No packages found' >&2; exit 100", "sudo apt-get update" },
        { "apt-cache", "echo linux-image-cloud-amd64", "sudo apt-get update" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(t); i++) {
        shell("printf '#!/bin/sh\\n%s\\n' >%s/bin/%s", t[i].script, dir, t[i].program);
        expect_error(NULL, NULL, t[i].error);
    }
    shell("printf '#!/bin/sh\\necho \"  Depends: linux-image-6.1.0-test\"' >%s/bin/apt-cache; "
          "printf '#!/bin/sh\\n[ \"$2\" = --print-uris ] && { echo \"u real.deb 1 h\"; exit; "
          "}\\necho \"Temporary failure resolving\" >&2; exit 100' >%s/bin/apt-get",
          dir, dir);
    expect_error(NULL, NULL, "Temporary failure resolving");
    shell("printf '#!/bin/sh\\n[ \"$2\" = --print-uris ] && { echo \"u real.deb 1 h\"; exit; "
          "}\\nhead -c 1000 %s/real.deb >real.deb' >%s/bin/apt-get",
          dir, dir);
    expect_error(NULL, NULL, "dpkg-deb failed");
    cleanup_free char *empty = in_dir("empty");
    setenv("PATH", empty, 1);
    expect_error(NULL, NULL, "give one with --kernel FILE");
    setenv("PATH", before, 1);
}
#else
static void test_apt(void **state)
{
    (void)state;
    make_inputs();
    expect_error(NULL, NULL, "without the feature apt-kernel");
}
#endif

/* ---- disks: `unshare` in PATH is a script that makes one, and counts */

static void say_disk(const char *text)
{
    shell("mkdir -p %s/fakes && cd %s/fakes && for p in mmdebstrap mkfs.erofs fakechroot fakeroot; "
          "do "
          "printf '#!/bin/sh\n' >$p; done && printf '#!/bin/sh\n[ \"$3\" = true ] && exit\necho "
          "made >>%s/count\n"
          "%s\n' >unshare && chmod 755 *",
          dir, dir, dir, text);
}

static int disks_made(void)
{
    cleanup_free char *path = in_dir("count");
    cleanup_buf struct orch_buf b = { 0 };
    return orch_read_file(AT_FDCWD, path, 4096, &b) == 0 ? (int)(b.n / 5) : 0;
}

static void build_named(struct build *b, const char *name, const struct orch_recipe *recipe,
                        bool fresh)
{
    orch_image_fini(&b->image);
    b->done = 0;
    b->err.code = 0;
    b->o.recipe = recipe;
    b->o.fresh = fresh;
    orch_image_build_start(b->loop, name, &b->o, on_done, b);
    wait_for(b);
}

static const char *const none[] = { NULL }, *const jq[] = { "--include=jq", NULL };
static const struct orch_recipe some = { "bookworm", jq, none },
                                others = { "bookworm", none, none };

static void test_disk(void **state)
{
    (void)state;
    struct build b;
    struct orch_image found;
    struct orch_err err;
    make_inputs();
    make_modules("modules", "6.1.0-test", modules);
    say_disk("echo the disk >disk");
    cleanup_free char *before = orch_xstrdup(getenv("PATH")),
                      *path = orch_xasprintf("%s/fakes:%s", dir, before);
    setenv("PATH", path, 1);
    build_init(&b, "cache-disk", "vmlinuz", NULL);

    /* nobody asked for its disk: it is not made by the way */
    build_named(&b, "toolbox", NULL, false);
    assert_int_equal(b.err.cls, ORCH_CLASS_ISOLATION);
    assert_non_null(strstr(b.err.msg, "orch image build toolbox.lua"));
    build_named(&b, "base", &some, false);
    assert_int_equal(b.err.cls, ORCH_CLASS_USAGE);

    build_named(&b, "toolbox", &some, false);
    if (b.err.code)
        fail_msg("%s", b.err.msg);
    assert_int_equal(disks_made(), 1);
    assert_int_equal(orch_image_find("toolbox", &b.o, &found, &err), 0);
    assert_string_equal(found.disk, b.image.disk);
    cleanup_buf struct orch_buf disk = { 0 };
    assert_int_equal(orch_read_file(AT_FDCWD, found.disk, 100, &disk), 0);
    assert_string_equal(disk.p, "the disk\n");
    struct stat first, st;
    assert_int_equal(stat(found.disk, &first), 0);
    assert_int_equal(first.st_mode & 07777, 0444);
    orch_image_fini(&found);

    /* Another agent: the same disk, whether the recipe is at hand or not. */
    for (int i = 0; i < 2; i++) {
        char old[65];
        memcpy(old, b.image.id, 65);
        put(b.o.agent_path,
            i ? "\x7f"
                "ELF third"
              : "\x7f"
                "ELF other",
            10);
        assert_int_equal(orch_image_find("toolbox", &b.o, &found, &err), -ESTALE);
        build_named(&b, "toolbox", i ? &some : NULL, false);
        assert_int_equal(b.err.code, 0);
        assert_string_not_equal(b.image.id, old);
        assert_int_equal(disks_made(), 1);
        assert_int_equal(stat(b.image.disk, &st), 0);
        assert_int_equal(st.st_ino, first.st_ino);
        assert_int_equal(count_entries(b.o.cache_dir, old), 0); /* nobody needs it any more */
        assert_int_equal(count_entries(b.o.cache_dir, b.image.id), 1);
    }
    /* Another recipe, and another day: another disk. The servers they come from are all the
     * same. */
    const struct orch_recipe mirror = {
        "bookworm", jq, (const char *const[]){ "deb http://mirror bookworm main", NULL }
    };
    build_named(&b, "toolbox", &mirror, false);
    assert_int_equal(disks_made(), 1);
    build_named(&b, "toolbox", &others, false);
    assert_int_equal(disks_made(), 2);
    build_named(&b, "toolbox", &others, true);
    assert_int_equal(disks_made(), 3);
    assert_int_equal(b.err.code, 0);

    /* Files that are not what was built: another size is seen at once, other bytes by who reads
     * them all; a build makes anew what it cannot take. */
    size_t made = disks_made();
    for (size_t i = 0; i < 6; i++) {
        const char *file = i % 3 == 0 ? b.image.kernel : i % 3 == 1 ? b.image.initrd : b.image.disk;
        cleanup_buf struct orch_buf was = { 0 };
        assert_int_equal(orch_read_file(AT_FDCWD, file, 1 << 24, &was), 0);
        assert_int_equal(unlink(file), 0);
        was.p[was.n / 2] ^= 1;
        put(file, was.p, i < 3 ? was.n : was.n - 1);
        assert_int_equal(orch_image_find("toolbox", &b.o, &found, &err), i < 3 ? 0 : -ESTALE);
        if (i < 3)
            orch_image_fini(&found);
        b.o.digests = true;
        assert_int_equal(orch_image_find("toolbox", &b.o, &found, &err), -ESTALE);
        assert_non_null(strstr(err.msg, i < 3 ? "is not what was built" : "damaged"));
        b.o.digests = false;
        build_named(&b, "toolbox", &others, false);
        assert_int_equal(b.err.code, 0);
        made += i % 3 == 2;
        assert_int_equal(disks_made(), made);
        b.o.digests = true;
        assert_int_equal(orch_image_find("toolbox", &b.o, &found, &err), 0);
        orch_image_fini(&found);
        b.o.digests = false;
    }

    /* One that is damaged, and one that cannot be made. */
    assert_int_equal(unlink(b.image.disk), 0);
    assert_int_equal(orch_image_find("toolbox", &b.o, &found, &err), -ESTALE);
    build_named(&b, "toolbox", NULL, false);
    assert_non_null(strstr(b.err.msg, "not built yet"));
    say_disk("echo I: trying... >&2; echo E: Could not resolve this >&2; exit 3");
    build_named(&b, "toolbox", &others, false);
    assert_non_null(strstr(b.err.msg, "is there a network"));
    assert_non_null(strstr(b.err.msg, "E: Could not resolve this"));
    assert_null(strstr(b.err.msg, "trying"));
    assert_string_equal(b.last, "trying...");
    say_disk("exit 0"); /* it lies */
    build_named(&b, "toolbox", &others, false);
    assert_non_null(strstr(b.err.msg, "/disk: No such file"));
    assert_int_equal(count_entries(b.o.cache_dir, ".build-"), 0);
    build_fini(&b);

    /* Its kernel must be able to read a disk. */
    build_init(&b, "cache-disk", "vmlinuz", "modules");
    build_named(&b, "toolbox", &some, false);
    assert_non_null(strstr(b.err.msg, "module virtio_blk is missing"));
    build_fini(&b);
    setenv("PATH", before, 1);
}

static void test_recipe(void **state)
{
    (void)state;
    static const char *const options[] = { "--a", "b c", "", NULL }, *const more[] = { "--a", "b",
                                                                                       "c", "",
                                                                                       NULL };
    static const char *const sources[] = { "deb x y z", NULL };
    const struct orch_recipe r = { "sid", options, sources }, other = { "sid", more, none };
    cleanup_free struct orch_recipe *copy = orch_recipe_dup(&r);
    assert_null(orch_recipe_dup(NULL));
    char a[65], b[65];
    orch_recipe_hash(&r, a);
    orch_recipe_hash(copy, b);
    assert_string_equal(a, b);
    orch_recipe_hash(&other, b);
    assert_string_not_equal(a, b);
    for (enum orch_disk_way way = ORCH_DISK_ROOT; way <= ORCH_DISK_FAKE; way++) {
        cleanup_free const char **argv = orch_disk_argv(copy, way);
        size_t n = 0;
        while (argv[n])
            n++;
        assert_string_equal(argv[0], "unshare");
        assert_string_equal(argv[n - 7],
                            way == ORCH_DISK_FAKE ? "--mode=fakechroot" : "--mode=root");
        const char *const end[] = {
            "--a",      "b c", "", "sid", way == ORCH_DISK_FAKE ? "work/root.tar" : "work/root",
            "deb x y z"
        };
        for (size_t i = 0; i < 6; i++)
            assert_string_equal(argv[n - 6 + i], end[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unpack),  cmocka_unit_test(test_unpack_damaged),
        cmocka_unit_test(test_base),    cmocka_unit_test(test_own_kernel),
        cmocka_unit_test(test_refused), cmocka_unit_test(test_two_builders),
        cmocka_unit_test(test_cancel),  cmocka_unit_test(test_kill_9),
        cmocka_unit_test(test_apt),     cmocka_unit_test(test_recipe),
        cmocka_unit_test(test_disk),    cmocka_unit_test(test_modes),
        cmocka_unit_test(test_owners),  cmocka_unit_test(test_unpack_plain),
        cmocka_unit_test(test_tar),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
