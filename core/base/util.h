/* Small building blocks every room uses: scope cleanup, ownership transfer, checked allocation,
 * and the growable byte buffer. Owns nothing; may be included anywhere.
 *
 * Allocation of bounded sizes never fails here: it aborts with a message. A size that a peer chose
 * is checked against its limit before anything is allocated. */
#ifndef ORCH_BASE_UTIL_H
#define ORCH_BASE_UTIL_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#define ORCH_ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define ORCH_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define ORCH_CLEANUP(fn) __attribute__((cleanup(fn)))

/* Bytes borrowed from somewhere else; not NUL-terminated. */
struct orch_slice {
    const char *p;
    size_t n;
};

#define ORCH_SLICE(literal) ((struct orch_slice){ (literal), sizeof(literal) - 1 })
struct orch_slice orch_slice_str(const char *s);
bool orch_slice_eq(struct orch_slice a, const char *s);

/* Scope cleanup: the variable is released when it leaves scope, also when a Lua error unwinds
 * through the function (core/ is compiled with -fexceptions for that). */
static inline void orch_cleanup_free(void *p)
{
    free(*(void **)p);
}
static inline void orch_cleanup_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}
#define cleanup_free ORCH_CLEANUP(orch_cleanup_free)
#define cleanup_close ORCH_CLEANUP(orch_cleanup_close)
#define cleanup_buf ORCH_CLEANUP(orch_buf_free)

/* Take a value out of a variable with cleanup, so that the new owner keeps it. */
static inline int orch_steal_fd(int *fd)
{
    int v = *fd;
    *fd = -1;
    return v;
}
static inline void *orch_steal_ptr(void *pp)
{
    void **p = pp;
    void *v = *p;
    *p = NULL;
    return v;
}

void *orch_xmalloc(size_t n);
void *orch_xcalloc(size_t count, size_t size);
void *orch_xrealloc(void *p, size_t n);
char *orch_xstrdup(const char *s);
char *orch_xstrndup(const char *s, size_t n);
char *orch_xasprintf(const char *fmt, ...) ORCH_PRINTF(1, 2);

/* Growable bytes. Zero-initialise; p is NUL-terminated after every append once it is not NULL. */
struct orch_buf {
    char *p;
    size_t n, cap;
};

void orch_buf_free(struct orch_buf *b);
void orch_buf_reserve(struct orch_buf *b, size_t more); /* room for `more` bytes and a NUL */
void orch_buf_add(struct orch_buf *b, const void *p, size_t n);
void orch_buf_str(struct orch_buf *b, const char *s);
void orch_buf_printf(struct orch_buf *b, const char *fmt, ...) ORCH_PRINTF(2, 3);
void orch_buf_consume(struct orch_buf *b, size_t n); /* drops n bytes from the front */
/* All of it, until the buffer changes; p is never NULL. */
static inline struct orch_slice orch_slice_of(const struct orch_buf *b)
{
    return (struct orch_slice){ b->p ? b->p : "", b->n };
}
static inline void orch_buf_slice(struct orch_buf *b, struct orch_slice s)
{
    orch_buf_add(b, s.p, s.n);
}
static inline void orch_buf_char(struct orch_buf *b, char c)
{
    if (b->n + 2 > b->cap)
        orch_buf_reserve(b, 1);
    b->p[b->n++] = c;
    b->p[b->n] = 0;
}
void orch_buf_hex(struct orch_buf *b, const void *p, size_t n); /* lower-case hexadecimal */
/* RFC 4648's base64; url: with the alphabet for URLs, and without padding. */
void orch_base64(struct orch_buf *b, const void *p, size_t n, bool url);

/* Whole files and paths. Each returns 0 or a negative errno. */
/* -EFBIG */
int orch_read_file(int dirfd, const char *path, size_t max_bytes, struct orch_buf *out);
/* from where it stands to its end */
int orch_read_fd(int fd, size_t max_bytes, struct orch_buf *out);
/* by rename */
int orch_write_file(int dirfd, const char *path, const void *p, size_t n, mode_t mode);
/* A new file "PATH.XXXXXXXX.tmp", for this caller alone, whoever else writes beside it: other
 * threads, other pid namespaces. A descriptor or a negative errno; the caller owns *name. */
int orch_create_beside(int dirfd, const char *path, mode_t mode, char **name);
int orch_mkdir_p(const char *path, mode_t mode);
int orch_mkdir_of(const char *path, mode_t mode); /* the folder that path lies in */
int orch_write_all(int fd, const void *p, size_t n);
/* A descriptor of one of orch's own directories (state, cache, runtime), made 0700 when it is not
 * there. -EPERM when somebody else owns it or may write to it: what lies there is executed or
 * believed. */
struct orch_err;
int orch_own_dir(const char *path, struct orch_err *err);
int orch_random(void *p, size_t n); /* getrandom; never short */

/* "250ms" "30s" "5m" "1h" "90d" to milliseconds, "64K" "256M" "2G" to bytes; -1 when malformed or
 * negative. */
int64_t orch_parse_duration_ms(const char *s);
int64_t orch_parse_size_bytes(const char *s);

/* Nearest of the NULL-terminated `known` by edit distance, or NULL when none is near. */
const char *orch_nearest(const char *word, const char *const *known);

#endif
