#include "kernel.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

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

/* Runs `program -dc` from one memory file to another and waits. */
static int decompress(const char *program, struct orch_slice in, size_t max, struct orch_buf *out,
                      struct orch_err *err)
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
        return orch_err_set(err, r, "cannot unpack: %s: %s; install it: sudo apt-get install %s",
                            program, strerror(r),
                            strcmp(program, "xz") == 0 ? "xz-utils" : program);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    struct stat st;
    if (fstat(to, &st) < 0 || status || st.st_size == 0)
        return orch_err_set(err, EBADMSG, "cannot unpack: %s says that the data is damaged",
                            program);
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
    { "\xfd"
      "7zXZ",
      6, "xz", 4 },
    { "\x28\xb5\x2f\xfd", 4, "zstd", 4 },
};

static const struct packing *packing_of(struct orch_slice s)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(packings); i++)
        if (s.n > packings[i].n_magic + 8 &&
            memcmp(s.p, packings[i].magic, packings[i].n_magic) == 0)
            return &packings[i];
    return NULL;
}

int orch_unpack(struct orch_slice in, size_t max, struct orch_buf *out, struct orch_err *err)
{
    const struct packing *p = packing_of(in);
    int r = p ? decompress(p->program, in, max, out, err) : 0;
    return r < 0 ? r : p != NULL;
}

int orch_bzimage_unpack(struct orch_slice bz, struct orch_buf *out, struct orch_err *err)
{
    if (bz.n < 0x250 || memcmp(bz.p + 0x202, "HdrS", 4) != 0)
        return orch_err_set(err, EINVAL, "not a Linux bzImage");
    unsigned sectors = (unsigned char)bz.p[0x1f1] ? (unsigned char)bz.p[0x1f1] : 4;
    uint64_t at = (sectors + 1) * 512ULL + le32(bz.p + 0x248), n = le32(bz.p + 0x24c);
    if (at > bz.n || n > bz.n - at || n < 16)
        return orch_err_set(
            err, EINVAL,
            "a damaged bzImage: its payload of %llu bytes at %llu does not fit %zu bytes",
            (unsigned long long)n, (unsigned long long)at, bz.n);
    struct orch_slice payload = { bz.p + at, (size_t)n };
    const struct packing *p = packing_of(payload);
    if (!p)
        return orch_err_set(
            err, ENOTSUP,
            "a bzImage packed in an unknown way (%02x %02x %02x %02x); known are lz4, gzip, xz and "
            "zstd: give the unpacked vmlinux instead",
            payload.p[0] & 255, payload.p[1] & 255, payload.p[2] & 255, payload.p[3] & 255);
    uint32_t want = le32(payload.p + payload.n - 4);
    payload.n -= p->suffix;
    if (want > ORCH_KERNEL_MAX)
        return orch_err_set(err, EFBIG, "a bzImage that unpacks to %u bytes; at most %d", want,
                            ORCH_KERNEL_MAX);
    size_t before = out->n;
    int r = decompress(p->program, payload, ORCH_KERNEL_MAX, out, err);
    if (r < 0)
        return orch_err_wrap(err, "bzImage");
    if (out->n - before != want)
        return orch_err_set(err, EBADMSG, "a damaged bzImage: %zu bytes came out instead of %u",
                            out->n - before, want);
    return 0;
}

int orch_kernel_check(struct orch_slice s, struct orch_err *err)
{
    Elf64_Ehdr e;
    if (s.n < sizeof e || memcmp(s.p, ELFMAG, SELFMAG) != 0)
        return orch_err_set(err, EINVAL, "neither a bzImage nor an ELF file");
    memcpy(&e, s.p, sizeof e);
    if (e.e_ident[EI_CLASS] != ELFCLASS64 || e.e_machine != EM_X86_64 ||
        e.e_phentsize != sizeof(Elf64_Phdr))
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
            uint64_t body = at + sizeof n,
                     size = ((n.n_namesz + 3ULL) & ~3ULL) + ((n.n_descsz + 3ULL) & ~3ULL);
            if (size > ph.p_filesz - body)
                break;
            if (n.n_namesz == 4 && n.n_type == 18 &&
                memcmp(s.p + ph.p_offset + body, "Xen", 4) == 0)
                return 0;
            at = body + size;
        }
    }
    return orch_err_set(err, EINVAL, "a kernel without the PVH entry: build it with CONFIG_PVH=y");
}

char *orch_kernel_release(struct orch_slice elf)
{
    static const char banner[] = "Linux version ";
    while (true) {
        const char *p = memmem(elf.p, elf.n, banner, sizeof banner - 1);
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
