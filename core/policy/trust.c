/* What may be loaded: what a person has accepted (orch trust), and nothing that a program which an
 * agent steers may have put there. */
#include "policy_int.h"

#include "../base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

/* ---- the record */

static char *trust_db(const struct orch_paths *p)
{
    return orch_xasprintf("%s/state.db", p->state);
}

/* Not the folder that a link leads to: what lies in the working directory is not trusted because it
 * says so elsewhere. */
char *orch_trust_dir(const struct orch_paths *p)
{
    cleanup_free char *dir = orch_xstrdup(p->named);
    char *slash = strrchr(dir, '/');
    slash[slash == dir] = 0; /* "/" stays */
    char *real = realpath(dir, NULL);
    return real ? real : orch_steal_ptr(&dir);
}

/* In the record, an entry with an empty name says `always`. */
int orch_trust_read(const struct orch_paths *p, struct orch_trust *t, struct orch_err *err)
{
    *t = (struct orch_trust){ .edits = false };
    cleanup_free char *path = trust_db(p), *dir = orch_trust_dir(p);
    if (!ORCH_FEATURE_TRUST || access(path, F_OK) < 0)
        return 0;
    struct orch_db *db = orch_db_open(path, err);
    if (!db)
        return -EIO;
    int r = orch_db_trust_get(db, dir, &t->edits, &t->list.files, &t->list.n, err);
    orch_db_close(db);
    for (size_t i = 0; i < t->list.n; i++)
        t->always = t->always || !*t->list.files[i].path;
    return r;
}

int orch_trust_record(const struct orch_paths *p, const struct orch_trust *t, struct orch_err *err)
{
    cleanup_free char *path = trust_db(p), *dir = orch_trust_dir(p);
    cleanup_close int state = orch_own_dir(p->state, err);
    struct orch_db *db = state < 0 ? NULL : orch_db_open(path, err);
    if (!db)
        return -EIO;
    cleanup_free struct orch_trust_file *files = orch_xcalloc(t->list.n + 1, sizeof *files);
    size_t n = 0;
    for (size_t i = 0; i < t->list.n; i++)
        if (*t->list.files[i].path)
            files[n++] = t->list.files[i];
    if (t->always) {
        files[n].path = (char *)(uintptr_t) "";
        memset(files[n++].sha256, '0', 64);
    }
    int r = orch_db_trust_set(db, dir, t->edits, files, n, err);
    orch_db_close(db);
    return r;
}

void orch_trust_fini(struct orch_trust *t)
{
    orch_trust_files_free(t->list.files, t->list.n);
    *t = (struct orch_trust){ .edits = false };
}

/* ---- what may be loaded */

int orch_load_find_trust(struct orch_loading *l, struct orch_err *err)
{
    const struct orch_paths *p = l->cur->paths;
    if (l->mode != ORCH_TRUST_CHECK || p->origin == ORCH_CONFIG_BUILTIN)
        return 0;
    if (orch_trust_read(p, &l->trust, err) < 0)
        return orch_err_wrap(err, "trust");
    l->needs_trust = p->origin == ORCH_CONFIG_CWD || l->trust.always;
    return 0;
}

void orch_load_hold_to_trust(const struct orch_loading *l)
{
    struct orch_err err = { 0 };
    struct orch_trust t = { .list = l->cur->gen->sources, .always = true };
    if (orch_trust_record(l->cur->paths, &t, &err) < 0)
        orch_log(ORCH_ERROR, "that %s must be trusted could not be recorded: %s",
                 l->cur->paths->config, err.msg);
}

static const struct orch_trust_file *trusted_file(const struct orch_loading *l, const char *path)
{
    for (size_t i = 0; i < l->trust.list.n; i++)
        if (strcmp(l->trust.list.files[i].path, path) == 0)
            return &l->trust.list.files[i];
    return NULL;
}

/* Whether the user has seen these very bytes. */
static bool trusted_content(const struct orch_loading *l, const char *path)
{
    const struct orch_trust_file *f = trusted_file(l, path);
    return f && strcmp(f->sha256, l->sha) == 0;
}

static int check_record(const struct orch_loading *l, const char *path, struct orch_err *err)
{
    if (!l->needs_trust || l->trust.edits || trusted_content(l, path))
        return 0;
    const char *why =
        trusted_file(l, path) ? "changed since it was trusted; look at it, then run"
        : l->cur->paths->origin == ORCH_CONFIG_CWD
            ? "not trusted; a configuration in the working directory is only loaded after"
            : "not trusted; this configuration is only loaded after";
    return orch_err_setc(err, ORCH_CLASS_CONFIG, EPERM, "%s: orch trust %s", why, l->trust_dir);
}

/* What a program that an agent steers may have written is the law only when the user has seen
 * it. */
static int check_writers(struct orch_loading *l, int fd, unsigned links, const char *path,
                         bool product, struct orch_err *err)
{
    const struct orch_current *cur = l->cur;
    if (trusted_content(l, path))
        return 0;
    if (!cur->ops->held(cur->ud, fd)) {
        l->unheld = l->unheld || !product;
        return orch_err_setc(
            err, ORCH_CLASS_CONFIG, EPERM,
            "put there while a program runs that orch started and that may write to "
            "it; %s%s",
            product ? "start orch anew" : "look at it, then run: orch trust ",
            product ? "" : l->trust_dir);
    }
    if (product || links < 2)
        return 0;
    if (!l->g->linked)
        l->g->linked = orch_xstrdup(path);
    if (!cur->ops->steered(cur->ud))
        return 0;
    return orch_err_setc(
        err, ORCH_CLASS_CONFIG, EPERM,
        "it has another name (a hard link), by which a program that orch started may "
        "write to it; remove that one");
}

int orch_load_check_trust(struct orch_loading *l, int fd, unsigned links, const char *path,
                          bool product, struct orch_err *err)
{
    int r = product ? 0 : check_record(l, path, err);
    return r < 0 ? r : check_writers(l, fd, links, path, product, err);
}

int orch_load_trust_config(struct orch_loading *l, struct orch_err *err)
{
    if (l->mode != ORCH_TRUST_CHECK || l->needs_trust)
        return 0;
    l->needs_trust = true;
    return check_record(l, l->cur->paths->config, err);
}

/* ---- folders by descriptor */

struct orch_held {
    struct orch_held *next;
    char *path;
    int fd;
    bool told;
};

/* Below one that is held already, since the way to that may lead elsewhere by now. */
static int open_held(const struct orch_current *cur, const char *path)
{
    const struct orch_held *best = NULL;
    size_t n = 0;
    for (const struct orch_held *h = cur->held; h; h = h->next) {
        size_t len = strlen(h->path);
        if (len > n && strncmp(path, h->path, len) == 0 && path[len] == '/') {
            best = h;
            n = len;
        }
    }
    int fd = openat(best ? best->fd : AT_FDCWD, best ? path + n + 1 : path,
                    O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int orch_hold_dir(struct orch_current *cur, const char *path)
{
    struct orch_held *h = cur->held;
    struct stat is, was;
    while (h && strcmp(h->path, path) != 0)
        h = h->next;
    if (!h) {
        int fd = open_held(cur, path);
        if (fd < 0)
            return fd;
        h = orch_xmalloc(sizeof *h);
        *h = (struct orch_held){ .next = cur->held, .path = orch_xstrdup(path), .fd = fd };
        cur->held = h;
    }
    bool moved = stat(path, &is) < 0 || fstat(h->fd, &was) < 0 || is.st_dev != was.st_dev ||
                 is.st_ino != was.st_ino;
    if (moved && !h->told)
        orch_log(ORCH_WARN,
                 "%s: moved or replaced since orch opened it; what is there now is not read before "
                 "orch is started anew",
                 path);
    h->told = moved;
    return h->fd;
}

void orch_held_free(struct orch_held **held)
{
    while (*held) {
        struct orch_held *h = *held;
        *held = h->next;
        close(h->fd);
        free(h->path);
        free(h);
    }
}
