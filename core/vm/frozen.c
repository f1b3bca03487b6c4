#include "frozen.h"

#include "../base/hash.h"
#include "../base/json.h"
#include "../image/image.h"
#include "rundir.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

#define PAGE 4096
#define CHUNK (256 * 1024)
#define STEP (16 * 1024 * 1024) /* bytes a step of loading handles: about 10 ms */
#define STATE_MAX (16 * 1024 * 1024)
#define META_MAX (16 * 1024)
#define FORMAT 1

/* Position-dependent sum over the pages that are not zero, against truncation and bad disks, not
 * against people: the folder is the user's own. Four lanes, so that it runs at the speed of
 * memory. */
struct sum {
    uint64_t a[4], b[4], pages;
};

static void sum_page(struct sum *s, uint64_t number, const uint64_t *w)
{
    s->a[0] += number;
    for (size_t i = 0; i < PAGE / 8; i += 4)
        for (size_t k = 0; k < 4; k++) {
            s->a[k] += w[i + k];
            s->b[k] += s->a[k];
        }
    s->pages++;
}

static uint64_t sum_value(const struct sum *s)
{
    uint64_t v = s->pages;
    for (size_t k = 0; k < 4; k++)
        v = (v ^ s->a[k]) * 0x9e3779b97f4a7c15u + s->b[k];
    return v;
}

static bool page_is_zero(const uint64_t *w)
{
    return w[0] == 0 && memcmp(w, w + 1, PAGE - 8) == 0;
}

/* Copies [*at, end) of from to the same place of to, without its zero pages and holes, by way of
 * buf (CHUNK bytes). Only system calls: it also runs after fork. 0 or a negative errno. */
static int copy_pages(int from, int to, uint64_t *at, uint64_t end, struct sum *sum, uint64_t *buf)
{
    while (*at < end) {
        off_t data = lseek(from, (off_t)*at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            data = (off_t)end;
        if (data < 0)
            return -errno;
        uint64_t start = (uint64_t)data / PAGE * PAGE;
        if (start >= end) {
            *at = start;
            return 0;
        }
        ssize_t n = pread(from, buf, CHUNK, (off_t)start);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0 || n % PAGE)
            return n < 0 ? -errno : -EIO;
        size_t run = 0, pages = (size_t)n / PAGE;
        for (size_t i = 0; i <= pages; i++) {
            const uint64_t *page = buf + i * (PAGE / 8);
            if (i < pages && !page_is_zero(page)) {
                sum_page(sum, start / PAGE + i, page);
                run++;
                continue;
            }
            size_t first = i - run;
            while (run) {
                ssize_t w = pwrite(to, buf + first * (PAGE / 8), run * PAGE,
                                   (off_t)(start + first * PAGE));
                if (w < 0 && errno == EINTR)
                    continue;
                if (w <= 0 || w % PAGE)
                    return w < 0 ? -errno : -ENOSPC;
                first += (size_t)w / PAGE;
                run -= (size_t)w / PAGE;
            }
        }
        *at = start + (uint64_t)n;
    }
    return 0;
}

/* ---- memfds */

static int memfd(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    return fd >= 0 || errno != EINVAL ? fd : memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
}

static int seal(int fd)
{
    return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
}

int orch_frozen_new(struct orch_frozen *f, uint64_t memory_bytes, struct orch_err *err)
{
    *f = (struct orch_frozen){ memfd("orch-mem"), memfd("orch-state"), memory_bytes, 0 };
    if (f->mem_fd >= 0 && f->state_fd >= 0 && ftruncate(f->mem_fd, (off_t)memory_bytes) == 0)
        return 0;
    int e = errno;
    orch_frozen_fini(f);
    return orch_err_set(err, e, "memory for a template (memfd of %llu MiB): %s",
                        (unsigned long long)(memory_bytes >> 20), strerror(e));
}

int orch_frozen_seal(struct orch_frozen *f, struct orch_err *err)
{
    if (seal(f->mem_fd) == 0 && seal(f->state_fd) == 0)
        return 0;
    return orch_err_set(err, errno, "sealing a template's memory: %s", strerror(errno));
}

void orch_frozen_fini(struct orch_frozen *f)
{
    if (f->mem_fd >= 0)
        close(f->mem_fd);
    if (f->state_fd >= 0)
        close(f->state_fd);
    *f = ORCH_FROZEN_NONE;
}

/* ---- reading */

struct orch_frozen_load {
    int file_fd, mem_fd; /* mem_fd is the orch_frozen's */
    uint64_t at, bytes, pages;
    char want_sum[17];
    struct sum sum;
    uint64_t buf[CHUNK / 8];
};

static int damaged(struct orch_err *err, const char *dir, const char *key, const char *what)
{
    return orch_err_set(err, EBADMSG, "template %s/%s: %s", dir, key, what);
}

static bool meta_string(const struct orch_json_doc *d, const char *key, char *out, size_t n)
{
    cleanup_buf struct orch_buf text = { 0 };
    if (orch_json_string(d, orch_json_get(d, 0, key), &text) < 0 || text.n + 1 != n)
        return false;
    memcpy(out, text.p, n);
    return true;
}

/* 0 or a negative errno. */
static int read_kept(int dir_fd, const char *name, size_t max, struct orch_buf *out)
{
    cleanup_close int fd = orch_image_open(dir_fd, name, NULL);
    return fd < 0 ? fd : orch_read_fd(fd, max, out);
}

static const char *read_meta(int dir_fd, struct orch_frozen_load *l, struct orch_frozen *out,
                             char state_hash[65], int64_t *state_bytes)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_json struct orch_json_doc doc = { 0 };
    struct orch_json_limits lim = { META_MAX, 4, 256 };
    struct orch_json_fault fault;
    int64_t format = 0, memory = 0, pages = 0, khz = 0;
    if (read_kept(dir_fd, "meta.json", META_MAX, &text) < 0)
        return "meta.json cannot be read";
    if (orch_json_scan(&doc, (struct orch_slice){ text.p, text.n }, &lim, &fault) < 0)
        return "meta.json is malformed";
    if (!orch_json_int(&doc, orch_json_get(&doc, 0, "format"), &format) || format != FORMAT)
        return "its format is another version's";
    if (!orch_json_int(&doc, orch_json_get(&doc, 0, "memory_bytes"), &memory) ||
        (uint64_t)memory != l->bytes ||
        !orch_json_int(&doc, orch_json_get(&doc, 0, "pages"), &pages) || pages < 0 ||
        !orch_json_int(&doc, orch_json_get(&doc, 0, "tsc_khz"), &khz) || khz < 0 ||
        khz > UINT32_MAX ||
        !orch_json_int(&doc, orch_json_get(&doc, 0, "state_bytes"), state_bytes) ||
        !meta_string(&doc, "mem_sum", l->want_sum, sizeof l->want_sum) ||
        !meta_string(&doc, "state_sha256", state_hash, 65))
        return "meta.json lacks something";
    l->pages = (uint64_t)pages;
    out->tsc_khz = (uint32_t)khz;
    return NULL;
}

/* NULL, or what is wrong. */
static const char *open_copy(int dir_fd, struct orch_frozen_load *l, struct orch_frozen *out)
{
    char want[65], have[65];
    int64_t state_bytes;
    struct stat st;
    cleanup_buf struct orch_buf state = { 0 };
    const char *wrong = read_meta(dir_fd, l, out, want, &state_bytes);
    if (wrong)
        return wrong;
    if (read_kept(dir_fd, "state", STATE_MAX, &state) < 0)
        return "the state cannot be read";
    orch_sha256_hex(state.p, state.n, have);
    if ((int64_t)state.n != state_bytes || memcmp(want, have, 64) != 0)
        return "the state is damaged";
    l->file_fd = orch_image_open(dir_fd, "mem", NULL);
    if (l->file_fd < 0 || fstat(l->file_fd, &st) < 0)
        return "the memory cannot be read";
    if ((uint64_t)st.st_size != l->bytes)
        return "the memory is truncated";
    if (orch_write_all(out->state_fd, state.p, state.n) < 0 || seal(out->state_fd) < 0)
        return "the state cannot be copied";
    return NULL;
}

struct orch_frozen_load *orch_frozen_open(const char *dir, const char *key, uint64_t memory_bytes,
                                          struct orch_frozen *out, struct orch_err *err)
{
    cleanup_free char *path = orch_xasprintf("%s/%s", dir, key);
    cleanup_close int dir_fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir_fd < 0) {
        orch_err_set(err, errno, "template %s: %s", path, strerror(errno));
        return NULL;
    }
    if (orch_frozen_new(out, memory_bytes, err) < 0)
        return NULL;
    struct orch_frozen_load *l = orch_xcalloc(1, sizeof *l);
    l->file_fd = -1;
    l->mem_fd = out->mem_fd;
    l->bytes = memory_bytes;
    const char *wrong = open_copy(dir_fd, l, out);
    if (!wrong) {
        futimens(dir_fd, NULL); /* prune goes by it */
        return l;
    }
    damaged(err, dir, key, wrong);
    orch_frozen_close(l);
    orch_frozen_fini(out);
    return NULL;
}

int orch_frozen_step(struct orch_frozen_load *l, struct orch_err *err)
{
    uint64_t end = l->at + STEP < l->bytes ? l->at + STEP : l->bytes;
    int e = copy_pages(l->file_fd, l->mem_fd, &l->at, end, &l->sum, l->buf);
    if (e < 0)
        return orch_err_set(err, -e, "loading a template's memory: %s", strerror(-e));
    if (l->at < l->bytes)
        return 1;
    char have[17];
    snprintf(have, sizeof have, "%016llx", (unsigned long long)sum_value(&l->sum));
    if (l->sum.pages != l->pages || memcmp(have, l->want_sum, 16) != 0)
        return orch_err_set(err, EBADMSG, "a template's memory is damaged");
    if (seal(l->mem_fd) < 0)
        return orch_err_set(err, errno, "sealing a template's memory: %s", strerror(errno));
    return 0;
}

void orch_frozen_close(struct orch_frozen_load *l)
{
    if (!l)
        return;
    if (l->file_fd >= 0)
        close(l->file_fd);
    free(l);
}

/* ---- writing */

static void remove_in(int dir_fd, const char *name)
{
    static const char *const files[] = { "mem", "state", "meta.json" };
    cleanup_close int fd = openat(dir_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(files); i++)
        unlinkat(fd, files[i], 0);
    unlinkat(dir_fd, name, AT_REMOVEDIR);
}

static void temp_name(char out[80], const char *key)
{
    snprintf(out, 80, ".%.64s.tmp", key);
}

void orch_frozen_remove(const char *dir, const char *key)
{
    char temp[80];
    cleanup_close int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    temp_name(temp, key);
    remove_in(fd, temp);
    remove_in(fd, key);
}

static int create(int dir_fd, const char *name)
{
    return openat(dir_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0400);
}

/* Everything that the child does: system calls only, for in an embedder other threads may have held
 * locks when it was forked. buf: CHUNK bytes. Returns 0 or an errno. */
static int save(int dir_fd, const char *temp, const char *key, const struct orch_frozen *f,
                const char *meta_head, char *buf)
{
    struct sum sum = { 0 };
    uint64_t at = 0;
    struct stat st;
    if (mkdirat(dir_fd, temp, 0700) < 0)
        return errno;
    int fd = openat(dir_fd, temp, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int mem = create(fd, "mem"), state = create(fd, "state"), about = create(fd, "meta.json");
    if (fd < 0 || mem < 0 || state < 0 || about < 0 || fstat(f->state_fd, &st) < 0)
        return errno;
    if (ftruncate(mem, (off_t)f->memory_bytes) < 0)
        return errno;
    int e = copy_pages(f->mem_fd, mem, &at, f->memory_bytes, &sum, (void *)buf);
    if (e < 0)
        return -e;
    for (off_t off = 0; off < st.st_size;) {
        ssize_t n = pread(f->state_fd, buf, CHUNK, off);
        if (n <= 0)
            return n < 0 ? errno : EIO;
        if ((e = orch_write_all(state, buf, (size_t)n)) < 0)
            return -e;
        off += n;
    }
    int n = snprintf(buf, META_MAX, "%s\"pages\":%llu,\"mem_sum\":\"%016llx\"}\n", meta_head,
                     (unsigned long long)sum.pages, (unsigned long long)sum_value(&sum));
    if ((e = orch_write_all(about, buf, (size_t)n)) < 0)
        return -e;
    if (fsync(mem) < 0 || fsync(state) < 0 || fsync(about) < 0 || fsync(fd) < 0)
        return errno;
    if (renameat(dir_fd, temp, dir_fd, key) < 0 || fsync(dir_fd) < 0)
        return errno;
    return 0;
}

static int hash_state(const struct orch_frozen *f, char hex[65], long long *bytes,
                      struct orch_err *err)
{
    cleanup_buf struct orch_buf state = { 0 };
    struct stat st;
    if (fstat(f->state_fd, &st) < 0 || st.st_size > STATE_MAX)
        return orch_err_set(err, EFBIG, "the state is too large");
    orch_buf_reserve(&state, (size_t)st.st_size);
    if (pread(f->state_fd, state.p, (size_t)st.st_size, 0) != st.st_size)
        return orch_err_set(err, EIO, "the state cannot be read");
    orch_sha256_hex(state.p, (size_t)st.st_size, hex);
    *bytes = st.st_size;
    return 0;
}

/* The child must not keep microVMs alive, whose life is an open descriptor. */
static void close_others(const int *keep, size_t n)
{
    unsigned from = 3;
    for (;;) {
        int next = -1; /* the smallest that is kept and not below from */
        for (size_t i = 0; i < n; i++)
            if (keep[i] >= (int)from && (next < 0 || keep[i] < next))
                next = keep[i];
        if (next < 0)
            break;
        if (next > (int)from)
            close_range(from, (unsigned)next - 1, 0);
        from = (unsigned)next + 1;
    }
    close_range(from, ~0U, 0);
}

pid_t orch_frozen_save(const char *dir, const char *key, const struct orch_frozen *f,
                       struct orch_slice about, int lock_fd, int *pidfd, struct orch_err *err)
{
    char temp[80], hash[65];
    long long state_bytes = 0;
    cleanup_buf struct orch_buf meta = { 0 };
    temp_name(temp, key);
    orch_frozen_remove(dir, key);
    if (hash_state(f, hash, &state_bytes, err) < 0)
        return -1;
    orch_buf_printf(&meta,
                    "{\"format\":%d,%.*s,\"memory_bytes\":%llu,\"tsc_khz\":%u,\"state_bytes\":%lld,"
                    "\"state_sha256\":\"%s\",",
                    FORMAT, (int)about.n, about.p, (unsigned long long)f->memory_bytes, f->tsc_khz,
                    state_bytes, hash);
    cleanup_close int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir_fd < 0) {
        orch_err_set(err, errno, "%s: %s", dir, strerror(errno));
        return -1;
    }
    cleanup_free char *buf = orch_xmalloc(CHUNK); /* the child must not allocate */
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        close_others((const int[]){ dir_fd, f->mem_fd, f->state_fd, lock_fd }, 4);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(ECANCELED);
        int e = save(dir_fd, temp, key, f, meta.p, buf);
        if (e)
            remove_in(dir_fd, temp);
        _exit(e);
    }
    *pidfd = pid < 0 ? -1 : pidfd_open(pid, 0);
    if (*pidfd >= 0)
        return pid;
    orch_err_set(err, errno, "a process to write the template: %s", strerror(errno));
    if (pid > 0) {
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    return -1;
}

void orch_frozen_prune(const char *dir, size_t keep)
{
    cleanup_close int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    char oldest[256];
    struct stat st;
    while (dir_fd >= 0 && orch_dir_oldest(dir_fd, S_IFDIR, oldest) > keep) {
        cleanup_free char *lock = orch_xasprintf("%s.lock", oldest);
        remove_in(dir_fd, oldest);
        unlinkat(dir_fd, lock, 0);
        if (fstatat(dir_fd, oldest, &st, AT_SYMLINK_NOFOLLOW) == 0)
            return; /* it cannot be removed */
    }
}
