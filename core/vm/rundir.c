#include "rundir.h"

#include "../base/log.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#define LOG_NAME "vmm.log"
#define KEPT_DIR "failed"

struct orch_rundir {
    char id[32];
    char *base, *path; /* path: the folder, or the log's when it was kept */
    int lock_fd;       /* the folder itself, locked */
    int read_fd, write_fd, file_fd;
    size_t file_bytes;
    struct orch_watch *watch;
    struct orch_buf ring; /* at most twice ORCH_RUNDIR_TAIL, the end counts */
};

static bool is_folder_name(const char *name)
{
    const char *dash = strrchr(name, '-');
    return dash && (!strncmp(name, "vm-", 3) || !strncmp(name, "template-", 9)) &&
           strlen(dash + 1) == 8 && strspn(dash + 1, "0123456789abcdef") == 8;
}

/* A folder holds nothing but the log. */
static void remove_folder(int base_fd, int folder_fd, const char *name)
{
    unlinkat(folder_fd, LOG_NAME, 0);
    unlinkat(base_fd, name, AT_REMOVEDIR);
}

int orch_rundir_open(const char *runtime_dir, struct orch_err *err)
{
    int r = orch_mkdir_p(runtime_dir, 0700);
    if (r < 0)
        return orch_err_set(err, -r, "runtime directory %s: cannot be made: %s", runtime_dir,
                            strerror(-r));
    cleanup_close int base = open(runtime_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = base < 0 ? NULL : fdopendir(dup(base));
    if (!d)
        return orch_err_set(err, errno, "runtime directory %s: cannot be read: %s", runtime_dir,
                            strerror(errno));
    for (struct dirent *e; (e = readdir(d));) {
        if (!is_folder_name(e->d_name))
            continue;
        cleanup_close int fd = openat(base, e->d_name,
                                      O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0)
            remove_folder(base, fd, e->d_name);
    }
    closedir(d);
    return 0;
}

static void ring_add(struct orch_rundir *r, const char *p, size_t n)
{
    if (n > ORCH_RUNDIR_TAIL) {
        p += n - ORCH_RUNDIR_TAIL;
        n = ORCH_RUNDIR_TAIL;
    }
    if (r->ring.n + n > 2 * ORCH_RUNDIR_TAIL)
        orch_buf_consume(&r->ring, r->ring.n - ORCH_RUNDIR_TAIL);
    orch_buf_add(&r->ring, p, n);
}

static void file_add(struct orch_rundir *r, const char *p, size_t n)
{
    static const char mark[] = "\n[orch: 1 MiB of log is kept; what followed was dropped]\n";
    if (r->file_fd < 0)
        return;
    bool full = n > ORCH_RUNDIR_LOG_MAX - r->file_bytes;
    if (full)
        n = ORCH_RUNDIR_LOG_MAX - r->file_bytes;
    r->file_bytes += n;
    int e = orch_write_all(r->file_fd, p, n);
    if (e == 0 && full)
        e = orch_write_all(r->file_fd, mark, sizeof mark - 1);
    if (e < 0)
        orch_log(ORCH_WARN, "%s/%s: cannot be written, the rest of the log is lost: %s", r->path,
                 LOG_NAME, strerror(-e));
    if (e < 0 || full) {
        close(r->file_fd);
        r->file_fd = -1;
    }
}

/* One read; false at the end, on error or when nothing is there. */
static bool drain_once(struct orch_rundir *r)
{
    char buf[65536];
    ssize_t n = read(r->read_fd, buf, sizeof buf);
    if (n > 0) {
        ring_add(r, buf, (size_t)n);
        file_add(r, buf, (size_t)n);
        return true;
    }
    if (n == 0 || (errno != EAGAIN && errno != EINTR))
        orch_watch_set(r->watch, 0);
    return false;
}

static void readable(void *ud, int events)
{
    (void)events;
    drain_once(ud);
}

/* The folder is locked between mkdir and use; a sweeper that came first has removed or will remove
 * it, then another name is taken. */
static int make_folder(struct orch_rundir *r, int base_fd, const char *prefix)
{
    for (int tries = 0; tries < 16; tries++) {
        uint32_t n;
        if (orch_random(&n, sizeof n) < 0)
            return -errno;
        snprintf(r->id, sizeof r->id, "%s-%08x", prefix, n);
        if (mkdirat(base_fd, r->id, 0700) < 0) {
            if (errno == EEXIST)
                continue;
            return -errno;
        }
        r->lock_fd = openat(base_fd, r->id, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        struct stat st;
        if (r->lock_fd >= 0 && flock(r->lock_fd, LOCK_EX | LOCK_NB) == 0 &&
            fstat(r->lock_fd, &st) == 0 && st.st_nlink > 0)
            return 0;
        if (r->lock_fd < 0 && errno != ENOENT)
            return -errno;
        if (r->lock_fd >= 0)
            close(orch_steal_fd(&r->lock_fd));
    }
    return -EBUSY;
}

struct orch_rundir *orch_rundir_new(struct orch_loop *l, const char *runtime_dir,
                                    const char *prefix, struct orch_err *err)
{
    struct orch_rundir *r = orch_xmalloc(sizeof *r);
    *r = (struct orch_rundir){ .base = orch_xstrdup(runtime_dir),
                               .lock_fd = -1,
                               .read_fd = -1,
                               .write_fd = -1,
                               .file_fd = -1 };
    cleanup_close int base = open(runtime_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int e = base < 0 ? -errno : make_folder(r, base, prefix);
    if (e < 0) {
        orch_err_set(err, -e, "runtime directory %s: no folder for a microVM can be made: %s",
                     runtime_dir, strerror(-e));
        orch_rundir_free(r);
        return NULL;
    }
    r->path = orch_xasprintf("%s/%s", runtime_dir, r->id);
    int fds[2];
    r->file_fd = openat(r->lock_fd, LOG_NAME, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC,
                        0600);
    if (r->file_fd < 0 || pipe2(fds, O_CLOEXEC) < 0) {
        orch_err_set(err, errno, "%s/%s: cannot be made: %s", r->path, LOG_NAME, strerror(errno));
        orch_rundir_free(r);
        return NULL;
    }
    r->read_fd = fds[0];
    r->write_fd = fds[1];
    fcntl(r->read_fd, F_SETFL, O_NONBLOCK);
    r->watch = orch_watch_new(l, r->read_fd, ORCH_READ, readable, r);
    return r;
}

void orch_rundir_free(struct orch_rundir *r)
{
    if (!r)
        return;
    orch_watch_free(r->watch);
    int base = open(r->base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (base >= 0 && r->lock_fd >= 0)
        remove_folder(base, r->lock_fd, r->id);
    int fds[] = { base, r->lock_fd, r->read_fd, r->write_fd, r->file_fd };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    orch_buf_free(&r->ring);
    free(r->base);
    free(r->path);
    free(r);
}

const char *orch_rundir_id(const struct orch_rundir *r)
{
    return r->id;
}

int orch_rundir_log_fd(const struct orch_rundir *r)
{
    return r->write_fd;
}

void orch_rundir_log_handed_over(struct orch_rundir *r)
{
    if (r->write_fd >= 0)
        close(orch_steal_fd(&r->write_fd));
}

struct orch_slice orch_rundir_tail(const struct orch_rundir *r)
{
    size_t n = r->ring.n < ORCH_RUNDIR_TAIL ? r->ring.n : ORCH_RUNDIR_TAIL;
    return (struct orch_slice){ n ? r->ring.p + r->ring.n - n : "", n };
}

size_t orch_dir_oldest(int dir_fd, mode_t type, char name[256])
{
    int again = openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = again < 0 ? NULL : fdopendir(again);
    struct timespec when = { 0 };
    size_t n = 0;
    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat st;
        if (e->d_name[0] == '.' || fstatat(dir_fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 ||
            (st.st_mode & S_IFMT) != type)
            continue;
        if (n++ == 0 || st.st_mtim.tv_sec < when.tv_sec ||
            (st.st_mtim.tv_sec == when.tv_sec && st.st_mtim.tv_nsec < when.tv_nsec)) {
            snprintf(name, 256, "%s", e->d_name);
            when = st.st_mtim;
        }
    }
    if (d)
        closedir(d);
    return n;
}

static bool keep_log(struct orch_rundir *r)
{
    cleanup_free char *dir = orch_xasprintf("%s/" KEPT_DIR, r->base);
    cleanup_free char *name = orch_xasprintf("%s.log", r->id);
    if (orch_mkdir_p(dir, 0700) < 0)
        return false;
    cleanup_close int kept = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (kept < 0 || renameat(r->lock_fd, LOG_NAME, kept, name) < 0)
        return false;
    char oldest[256];
    while (orch_dir_oldest(kept, S_IFREG, oldest) > ORCH_RUNDIR_KEPT &&
           unlinkat(kept, oldest, 0) == 0)
        ;
    free(r->path);
    r->path = orch_xasprintf("%s/%s", dir, name);
    return true;
}

/* The last lines that fit; after a panic the first ones of it, which say more than the trace's
 * end. */
static struct orch_slice telling_lines(struct orch_slice text, size_t lines, size_t max_bytes)
{
    static const char panic[] = "Kernel panic";
    const char *at = memmem(text.p, text.n, panic, sizeof panic - 1);
    if (at) {
        while (at > text.p && at[-1] != '\n')
            at--;
        text.n -= (size_t)(at - text.p);
        text.p = at;
        size_t n = 0;
        while (n < text.n && n < max_bytes && (text.p[n] != '\n' || --lines > 0))
            n++;
        return (struct orch_slice){ text.p, n };
    }
    while (text.n && text.p[text.n - 1] == '\n')
        text.n--;
    size_t start = text.n;
    for (size_t i = text.n; i-- > 0 && text.n - i <= max_bytes;) {
        if (text.p[i] == '\n' && --lines == 0)
            break;
        start = i;
    }
    while (start < text.n && text.p[start] == '\n')
        start++;
    return (struct orch_slice){ text.p + start, text.n - start };
}

/* A serial console ends its lines with both characters. */
static void escape_log(struct orch_buf *out, struct orch_slice text)
{
    cleanup_buf struct orch_buf plain = { 0 };
    for (size_t i = 0; i < text.n; i++)
        if (text.p[i] != '\r' || i + 1 == text.n || text.p[i + 1] != '\n')
            orch_buf_char(&plain, text.p[i]);
    orch_escape_terminal(out, (struct orch_slice){ plain.p, plain.n }, true);
}

void orch_rundir_explain(struct orch_rundir *r, struct orch_err *err)
{
    for (int i = 0; i < 32 && drain_once(r); i++)
        ;
    bool kept = keep_log(r);
    size_t used = strlen(err->msg), room = sizeof err->msg - used;
    size_t path_bytes = kept ? strlen(r->path) + 8 : 0;
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_buf struct orch_buf shown = { 0 };
    escape_log(&shown, orch_rundir_tail(r));
    struct orch_slice lines = { 0 };
    if (shown.n && room > path_bytes + 64)
        lines = telling_lines((struct orch_slice){ shown.p, shown.n }, 20, room - path_bytes - 32);
    if (lines.n)
        orch_buf_printf(&text, "\nlast output:\n%.*s", (int)lines.n, lines.p);
    else
        orch_buf_str(&text, " (it wrote nothing)");
    if (kept)
        orch_buf_printf(&text, "\nlog: %s", r->path);
    snprintf(err->msg + used, room, "%s", text.p);
}
