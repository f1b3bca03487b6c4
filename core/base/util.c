#include "util.h"

#include "err.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>

struct orch_slice orch_slice_str(const char *s)
{
    return (struct orch_slice){ s, s ? strlen(s) : 0 };
}

bool orch_slice_eq(struct orch_slice a, const char *s)
{
    size_t n = strlen(s);
    return a.n == n && (!n || memcmp(a.p, s, n) == 0); /* nothing may be NULL */
}

static __attribute__((noreturn)) void out_of_memory(size_t n)
{
    dprintf(STDERR_FILENO, "orch: out of memory (%zu bytes)\n", n);
    abort();
}

void *orch_xmalloc(size_t n)
{
    void *p = malloc(n ? n : 1);
    if (!p)
        out_of_memory(n);
    return p;
}

void *orch_xcalloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p)
        out_of_memory(count * size);
    return p;
}

void *orch_xrealloc(void *p, size_t n)
{
    void *q = realloc(p, n ? n : 1);
    if (!q)
        out_of_memory(n);
    return q;
}

char *orch_xstrndup(const char *s, size_t n)
{
    char *p = orch_xmalloc(n + 1);
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

char *orch_xstrdup(const char *s)
{
    return s ? orch_xstrndup(s, strlen(s)) : NULL;
}

char *orch_xasprintf(const char *fmt, ...)
{
    char *p = NULL;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&p, fmt, ap);
    va_end(ap);
    if (n < 0)
        out_of_memory(0);
    return p;
}

void orch_buf_free(struct orch_buf *b)
{
    free(b->p);
    *b = (struct orch_buf){ 0 };
}

void orch_buf_reserve(struct orch_buf *b, size_t more)
{
    if (b->cap - b->n > more)
        return;
    size_t want = b->n + more + 1;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < want)
        cap *= 2;
    b->p = orch_xrealloc(b->p, cap);
    b->cap = cap;
}

void orch_buf_add(struct orch_buf *b, const void *p, size_t n)
{
    orch_buf_reserve(b, n);
    if (n)
        memcpy(b->p + b->n, p, n);
    b->n += n;
    b->p[b->n] = 0;
}

void orch_buf_str(struct orch_buf *b, const char *s)
{
    orch_buf_add(b, s, strlen(s));
}

void orch_buf_printf(struct orch_buf *b, const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    orch_buf_reserve(b, 128);
    int n = vsnprintf(b->p + b->n, b->cap - b->n, fmt, ap);
    va_end(ap);
    if (n > 0 && (size_t)n >= b->cap - b->n) {
        orch_buf_reserve(b, (size_t)n);
        vsnprintf(b->p + b->n, b->cap - b->n, fmt, again);
    }
    va_end(again);
    if (n > 0)
        b->n += (size_t)n;
}

void orch_buf_consume(struct orch_buf *b, size_t n)
{
    if (n >= b->n) {
        b->n = 0;
    } else if (n) {
        b->n -= n;
        memmove(b->p, b->p + n, b->n);
    }
    if (b->p)
        b->p[b->n] = 0;
}

void orch_buf_hex(struct orch_buf *b, const void *p, size_t n)
{
    static const char digits[] = "0123456789abcdef";
    const uint8_t *u = p;
    orch_buf_reserve(b, 2 * n);
    for (size_t i = 0; i < n; i++) {
        b->p[b->n++] = digits[u[i] >> 4];
        b->p[b->n++] = digits[u[i] & 15];
    }
    b->p[b->n] = 0;
}

void orch_base64(struct orch_buf *b, const void *p, size_t n, bool url)
{
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    static const char safe[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    const char *digits = url ? safe : plain;
    const uint8_t *s = p;
    for (size_t i = 0; i < n; i += 3) {
        size_t left = n - i, put = left > 2 ? 4 : left + 1;
        uint32_t v = (uint32_t)s[i] << 16 | (left > 1 ? (uint32_t)s[i + 1] << 8 : 0) |
                     (left > 2 ? s[i + 2] : 0u);
        for (size_t k = 0; k < 4; k++) {
            if (k < put)
                orch_buf_char(b, digits[v >> (18 - 6 * k) & 63]);
            else if (!url)
                orch_buf_char(b, '=');
        }
    }
}

int orch_read_fd(int fd, size_t max_bytes, struct orch_buf *out)
{
    size_t start = out->n;
    for (;;) {
        orch_buf_reserve(out, 4096);
        ssize_t r = read(fd, out->p + out->n, out->cap - out->n - 1);
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return -errno;
        out->n += (size_t)r;
        out->p[out->n] = 0;
        if (out->n - start > max_bytes)
            return -EFBIG;
        if (r == 0)
            return 0;
    }
}

int orch_read_file(int dirfd, const char *path, size_t max_bytes, struct orch_buf *out)
{
    cleanup_close int fd = openat(dirfd, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISDIR(st.st_mode))
        return -EISDIR;
    if (st.st_size > 0 && (uint64_t)st.st_size > max_bytes)
        return -EFBIG;
    orch_buf_reserve(out, st.st_size > 0 ? (size_t)st.st_size : 4096);
    return orch_read_fd(fd, max_bytes, out);
}

int orch_write_all(int fd, const void *p, size_t n)
{
    const char *s = p;
    while (n) {
        ssize_t w = write(fd, s, n);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0)
            return -errno;
        s += w;
        n -= (size_t)w;
    }
    return 0;
}

int orch_create_beside(int dirfd, const char *path, mode_t mode, char **name)
{
    uint32_t n;
    int fd, r = orch_random(&n, sizeof n);
    if (r < 0)
        return r;
    *name = orch_xasprintf("%s.%08x.tmp", path, n);
    fd = openat(dirfd, *name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode);
    return fd < 0 ? -errno : fd;
}

int orch_write_file(int dirfd, const char *path, const void *p, size_t n, mode_t mode)
{
    cleanup_free char *tmp = NULL;
    cleanup_close int fd = orch_create_beside(dirfd, path, mode, &tmp);
    if (fd < 0)
        return fd;
    int r = orch_write_all(fd, p, n);
    if (r == 0 && renameat(dirfd, tmp, dirfd, path) < 0)
        r = -errno;
    if (r < 0)
        unlinkat(dirfd, tmp, 0);
    return r;
}

int orch_mkdir_p(const char *path, mode_t mode)
{
    if (!*path)
        return -ENOENT;
    cleanup_free char *p = orch_xstrdup(path);
    for (char *s = p + 1; *s; s++) {
        if (*s != '/')
            continue;
        *s = 0;
        if (mkdir(p, mode) < 0 && errno != EEXIST)
            return -errno;
        *s = '/';
    }
    if (mkdir(p, mode) < 0 && errno != EEXIST)
        return -errno;
    struct stat st;
    if (stat(p, &st) < 0)
        return -errno;
    return S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
}

int orch_mkdir_of(const char *path, mode_t mode)
{
    const char *slash = strrchr(path, '/');
    if (!slash || slash == path)
        return 0;
    cleanup_free char *folder = orch_xstrndup(path, (size_t)(slash - path));
    return orch_mkdir_p(folder, mode);
}

int orch_own_dir(const char *path, struct orch_err *err)
{
    struct stat st;
    int r = orch_mkdir_p(path, 0700);
    cleanup_close int fd = r < 0 ? -1 : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0) {
        r = r < 0 ? -r : errno;
        return orch_err_set(err, r, "%s: this directory of orch's cannot be used: %s", path,
                            strerror(r));
    }
    if ((st.st_uid != geteuid() && st.st_uid != 0) || (st.st_mode & 022))
        return orch_err_set(err, EPERM,
                            "%s: others may write to this directory of orch's (mode %04o, uid %u): "
                            "remove it, or chmod 700 "
                            "and chown it when nobody else can have written to it",
                            path, (unsigned)st.st_mode & 07777, (unsigned)st.st_uid);
    return orch_steal_fd(&fd);
}

int orch_random(void *p, size_t n)
{
    uint8_t *u = p;
    while (n) {
        ssize_t r = getrandom(u, n, 0);
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return -errno;
        u += r;
        n -= (size_t)r;
    }
    return 0;
}

/* "12" or "1.5" followed by a unit; the factor comes from the table. */
static int64_t parse_with_unit(const char *s, const char *const *units, const double *factors,
                               size_t n_units)
{
    size_t whole = strspn(s, "0123456789"),
           fraction = s[whole] == '.' ? strspn(s + whole + 1, "0123456789") : 0;
    if (!whole || (s[whole] == '.' && !fraction) || whole + fraction > 20)
        return -1;
    const char *end = s + whole + (fraction ? fraction + 1 : 0);
    double v = 0, scale = 1; /* not by strtod: its decimal point is the locale's */
    for (const char *p = s; p < end; p++)
        if (*p != '.')
            v = v * 10 + (*p - '0');
    for (; fraction; fraction--)
        scale *= 10;
    v /= scale;
    for (size_t i = 0; i < n_units; i++) {
        if (strcmp(end, units[i]) != 0)
            continue;
        v *= factors[i];
        return v <= 9e15 ? (int64_t)(v + 0.5) : -1;
    }
    return -1;
}

int64_t orch_parse_duration_ms(const char *s)
{
    static const char *const units[] = { "ms", "s", "m", "h", "d" };
    static const double factors[] = { 1, 1000, 60000, 3600000, 86400000 };
    return parse_with_unit(s, units, factors, ORCH_ARRAY_LEN(units));
}

int64_t orch_parse_size_bytes(const char *s)
{
    static const char *const units[] = { "", "K", "M", "G" };
    static const double factors[] = { 1, 1024, 1024.0 * 1024, 1024.0 * 1024 * 1024 };
    return parse_with_unit(s, units, factors, ORCH_ARRAY_LEN(units));
}

static size_t edit_distance(const char *a, const char *b)
{
    enum { MAX = 64 };
    size_t n = strlen(a), m = strlen(b);
    if (n >= MAX || m >= MAX)
        return MAX;
    size_t row[MAX + 1];
    for (size_t j = 0; j <= m; j++)
        row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t above = row[j];
            size_t best = diagonal + (a[i - 1] != b[j - 1]);
            if (above + 1 < best)
                best = above + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            diagonal = above;
            row[j] = best;
        }
    }
    return row[m];
}

const char *orch_nearest(const char *word, const char *const *known)
{
    const char *best = NULL;
    size_t best_distance = strlen(word) / 3 + 2;
    for (; *known; known++) {
        size_t d = edit_distance(word, *known);
        if (d < best_distance) {
            best_distance = d;
            best = *known;
        }
    }
    return best;
}
