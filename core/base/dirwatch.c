#include "dirwatch.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/inotify.h>

enum {
    SELF_GONE = IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED | IN_UNMOUNT,
    DIR_MASK = IN_CLOSE_WRITE | IN_MOVED_TO | IN_MOVED_FROM | IN_CREATE | IN_DELETE | IN_ATTRIB |
               IN_DELETE_SELF | IN_MOVE_SELF,
    PARENT_MASK = IN_MOVED_TO | IN_MOVED_FROM | IN_CREATE | IN_DELETE | IN_DELETE_SELF |
                  IN_MOVE_SELF,
};

struct dir {
    struct dir *next;
    char *path;
    int wd;        /* -1: does not exist */
    int parent_wd; /* nearest existing one */
    char *child;   /* the name below it that leads to path */
};

struct orch_dirwatch {
    struct orch_loop *loop;
    int fd;
    struct orch_watch *watch;
    struct orch_timer *timer;
    int64_t quiet_ms, first_ms; /* first_ms: of the changes not called back yet; 0: none */
    orch_loop_fn *fn;
    void *ud;
    struct dir *dirs;
};

/* The kernel gives one descriptor an inode, so that several directories may share it. */
static void release(struct orch_dirwatch *r, int wd)
{
    for (struct dir *d = r->dirs; d; d = d->next)
        if (d->wd == wd || d->parent_wd == wd)
            return;
    if (wd >= 0)
        inotify_rm_watch(r->fd, wd);
}

static int watch_path(struct orch_dirwatch *r, const char *path, uint32_t mask)
{
    int wd = inotify_add_watch(r->fd, path, mask | IN_ONLYDIR | IN_MASK_ADD);
    return wd < 0 ? -errno : wd;
}

static bool missing(int r)
{
    return r == -ENOENT || r == -ENOTDIR;
}

/* Watches the nearest existing parent; direct: it is the directory's own. */
static int watch_parent(struct orch_dirwatch *r, struct dir *d, bool *direct)
{
    cleanup_free char *path = orch_xstrdup(d->path);
    for (*direct = true;; *direct = false) {
        char *slash = strrchr(path, '/');
        const char *parent = !slash ? "." : slash == path ? "/" : path;
        free(d->child);
        d->child = orch_xstrdup(slash ? slash + 1 : path);
        if (slash)
            *slash = 0;
        d->parent_wd = watch_path(r, parent, PARENT_MASK);
        if (!missing(d->parent_wd) || parent != path)
            return d->parent_wd < 0 ? d->parent_wd : 0;
    }
}

/* Watches path and parent as they are now. Directories may appear meanwhile: it is done again until
 * a parent was watched already when the rest of the path was looked up; what comes later is an
 * event. */
static int watch_dir(struct orch_dirwatch *r, struct dir *d)
{
    int old_wd = d->wd, old_parent = d->parent_wd, last = -1, status;
    bool direct;
    do {
        release(r, last);
        last = d->parent_wd;
        status = watch_parent(r, d, &direct);
        if (status < 0)
            break;
        d->wd = watch_path(r, d->path, DIR_MASK);
        status = d->wd >= 0 || missing(d->wd) ? 0 : d->wd;
    } while (!direct && d->parent_wd != last);
    if (d->wd < 0)
        d->wd = -1;
    if (d->parent_wd < 0)
        d->parent_wd = -1;
    release(r, last);
    release(r, old_wd);
    release(r, old_parent);
    return status;
}

static void changed(struct orch_dirwatch *r)
{
    int64_t now = orch_loop_now_ms(r->loop);
    if (!r->first_ms)
        r->first_ms = now;
    int64_t left = r->first_ms + 4 * r->quiet_ms - now;
    if (left <= 0)
        return; /* due: setting it again would put it off */
    orch_timer_set(r->timer, left < r->quiet_ms ? left : r->quiet_ms);
}

static void quiet(void *ud)
{
    struct orch_dirwatch *r = ud;
    r->first_ms = 0;
    r->fn(r->ud);
}

static void handle(struct orch_dirwatch *r, const struct inotify_event *ev)
{
    const char *name = ev->len ? ev->name : "";
    for (struct dir *d = r->dirs; d; d = d->next) {
        bool overflow = ev->mask & IN_Q_OVERFLOW, gone = ev->mask & SELF_GONE;
        bool self = ev->wd == d->wd;
        bool parent = ev->wd == d->parent_wd && (gone || strcmp(name, d->child) == 0);
        if (overflow || parent || (self && gone))
            (void)watch_dir(r, d); /* when it fails now, the parent's next event tries again */
        if (overflow || parent || self)
            changed(r);
    }
}

static void readable(void *ud, int events)
{
    (void)events;
    struct orch_dirwatch *r = ud;
    char buf[16 * (sizeof(struct inotify_event) + NAME_MAX + 1)]
        __attribute__((aligned(__alignof__(struct inotify_event))));
    ssize_t n;
    while ((n = read(r->fd, buf, sizeof buf)) > 0) {
        for (char *p = buf; p < buf + n;) {
            const struct inotify_event *ev = (const void *)p;
            handle(r, ev);
            p += sizeof *ev + ev->len;
        }
    }
}

struct orch_dirwatch *orch_dirwatch_new(struct orch_loop *l, int64_t quiet_ms, orch_loop_fn *fn,
                                        void *ud, struct orch_err *err)
{
    int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (fd < 0) {
        int e = errno;
        orch_err_set(err, e, "watching files: inotify: %s; raise fs.inotify.max_user_instances",
                     strerror(e));
        return NULL;
    }
    struct orch_dirwatch *r = orch_xcalloc(1, sizeof *r);
    *r = (struct orch_dirwatch){ .loop = l, .fd = fd, .quiet_ms = quiet_ms, .fn = fn, .ud = ud };
    r->watch = orch_watch_new(l, fd, ORCH_READ, readable, r);
    r->timer = orch_timer_new(l, quiet, r);
    return r;
}

static void free_dir(struct orch_dirwatch *r, struct dir *d)
{
    int wd = d->wd, parent_wd = d->parent_wd;
    free(d->path);
    free(d->child);
    free(d);
    release(r, wd);
    release(r, parent_wd);
}

int orch_dirwatch_add_dir(struct orch_dirwatch *r, const char *path, struct orch_err *err)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        n--;
    struct dir *d = orch_xcalloc(1, sizeof *d);
    d->path = orch_xstrndup(path, n);
    d->wd = d->parent_wd = -1;
    d->next = r->dirs;
    r->dirs = d;
    int status = watch_dir(r, d);
    if (status == 0)
        return 0;
    r->dirs = d->next;
    free_dir(r, d);
    return orch_err_set(err, -status, "watching %s: %s%s", path, strerror(-status),
                        status == -ENOSPC ? "; raise fs.inotify.max_user_watches" : "");
}

void orch_dirwatch_clear(struct orch_dirwatch *r)
{
    while (r->dirs) {
        struct dir *d = r->dirs;
        r->dirs = d->next;
        free_dir(r, d);
    }
}

void orch_dirwatch_free(struct orch_dirwatch *r)
{
    if (!r)
        return;
    orch_dirwatch_clear(r);
    orch_watch_free(r->watch);
    orch_timer_free(r->timer);
    close(r->fd);
    free(r);
}
