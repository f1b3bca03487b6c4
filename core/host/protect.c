/* What programs on the host that an agent may steer cannot change: everything orch reads to judge,
 * run or start. They are executed by `launcher protect` in a mount namespace in which it is
 * read-only (core/launcher/protect.c).
 *
 * A name is held as well as a file: where a child could rename a folder or replace a link on the
 * way, that is a mount point there too. What is not there yet is made, where orch reads it as soon
 * as it is there. The mounts are on files: what somebody else puts in the place of one is not
 * protected any more, which every reload asks about (orch_protect_holds). */
#include "host.h"

#include "../base/log.h"
#include "../base/proc.h"
#include "../launch/launch.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>

enum {
    LINKS_MAX = 40,
    PATHS_MAX = 2000,
    DEPTH = 1, /* folders below one that is protected in which links are looked for */
    MOUNTS_MAX_BYTES = 8 << 20,
};

struct orch_protect {
    struct orch_proc_via via; /* first */
    struct orch *o;
    struct orch_protect *next;
};

/* Words for the launcher: "r/path" or "p/path". */
struct plan {
    char **words;
    size_t n;
    struct orch_err *err;
};

static int push(struct plan *pl, char how, const char *path)
{
    if (pl->n >= PATHS_MAX)
        return orch_err_set(pl->err, E2BIG, "%s: more than %d files to protect", path, PATHS_MAX);
    pl->words = orch_xrealloc(pl->words, (pl->n + 1) * sizeof *pl->words);
    pl->words[pl->n++] = orch_xasprintf("%c%s", how, path);
    return 0;
}

static void plan_free(struct plan *pl)
{
    for (size_t i = 0; i < pl->n; i++)
        free(pl->words[i]);
    free(pl->words);
}

/* A child could change entries of the folder, if need be after a chmod. */
static bool may_change(const char *dir)
{
    struct stat st;
    return (stat(dir, &st) == 0 && st.st_uid == geteuid()) ||
           faccessat(AT_FDCWD, dir, W_OK, AT_EACCESS) == 0;
}

static bool is_mount(const char *path)
{
    struct statx st;
    return statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, 0, &st) == 0 &&
           (st.stx_attributes & STATX_ATTR_MOUNT_ROOT);
}

/* Goes the way to an absolute path, pins what a child could replace on it, and leaves the real
 * path. 0, -ENOENT or -ENOTDIR when it ends before (real: the first name that is missing, or below
 * what is no folder), or a negative errno with err. */
static int walk(struct plan *pl, const char *path, char real[PATH_MAX])
{
    cleanup_free char *rest = orch_xstrdup(path);
    size_t n = 0;
    int links = 0;
    real[0] = 0;
    for (char *s = rest;;) {
        s += strspn(s, "/");
        size_t len = strcspn(s, "/");
        if (!len)
            return n ? 0 : (strcpy(real, "/"), 0);
        if (len == 1 && s[0] == '.') {
            s += len;
            continue;
        }
        if (len == 2 && s[0] == '.' && s[1] == '.') {
            while (n && real[--n] != '/')
                ;
            real[n] = 0;
            s += len;
            continue;
        }
        if (n + len + 2 > PATH_MAX)
            return orch_err_set(pl->err, ENAMETOOLONG, "%s: %s", path, strerror(ENAMETOOLONG));
        bool open_to_change = may_change(n ? real : "/");
        size_t parent = n;
        n += (size_t)snprintf(real + n, PATH_MAX - n, "/%.*s", (int)len, s);
        struct stat st;
        if (lstat(real, &st) < 0)
            return errno == ENOENT || errno == ENOTDIR
                       ? -errno
                       : orch_err_set(pl->err, errno, "%s: %s", real, strerror(errno));
        if (open_to_change && (S_ISLNK(st.st_mode) || !is_mount(real)) && push(pl, 'p', real) < 0)
            return -E2BIG;
        s += len;
        if (!S_ISLNK(st.st_mode))
            continue;
        char target[PATH_MAX];
        ssize_t t = readlink(real, target, sizeof target - 1);
        if (t < 0 || ++links > LINKS_MAX)
            return orch_err_set(pl->err, t < 0 ? errno : ELOOP, "%s: %s", real,
                                strerror(t < 0 ? errno : ELOOP));
        target[t] = 0;
        n = target[0] == '/' ? 0 : parent;
        real[n] = 0;
        char *next = orch_xasprintf("%s/%s", target, s);
        free(rest);
        rest = s = next;
    }
}

static int protect_links(struct plan *pl, const char *dir, int depth);

/* Read-only, with all below, and what links in it lead to, down to depth. What is not there is
 * passed over. */
static int protect(struct plan *pl, const char *path, int depth)
{
    char real[PATH_MAX];
    int r = walk(pl, path, real);
    if (r == -ENOTDIR) { /* a file is in the place of one of its folders: that stays */
        *strrchr(real, '/') = 0;
        return push(pl, 'r', real);
    }
    if (r < 0)
        return r == -ENOENT ? 0 : r;
    if (push(pl, 'r', real) < 0)
        return -E2BIG;
    return depth >= 0 ? protect_links(pl, real, depth) : 0;
}

static int protect_links(struct plan *pl, const char *dir, int depth)
{
    DIR *d = opendir(dir);
    int r = 0;
    for (struct dirent *e; d && r == 0 && (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        cleanup_free char *path = orch_xasprintf("%s/%s", dir, e->d_name);
        struct stat st;
        if (e->d_type == DT_UNKNOWN && lstat(path, &st) == 0)
            e->d_type = (unsigned char)IFTODT(st.st_mode);
        if (e->d_type == DT_LNK)
            r = protect(pl, path, -1);
        else if (e->d_type == DT_DIR && depth > 0)
            r = protect_links(pl, path, depth - 1);
    }
    if (d)
        closedir(d);
    return r;
}

/* The same for a folder that is made when it is not there. Where orch may not make it, neither may
 * a child. */
static int protect_made(struct plan *pl, const char *dir, mode_t mode)
{
    int r = orch_mkdir_p(dir, mode);
    if (r < 0 && r != -EACCES && r != -EPERM && r != -EROFS && r != -ENOTDIR && r != -EEXIST)
        return orch_err_set(pl->err, -r, "%s: cannot be made: %s", dir, strerror(-r));
    return protect(pl, dir, DEPTH);
}

/* ---- the same files by other names: mounts of the same file system elsewhere */

struct mount {
    int id;
    char *device, *root, *at; /* in the text */
};

static void unescape(char *s)
{
    char *out = s;
    for (; *s; s++) {
        if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3]) {
            *out++ = (char)((s[1] - '0') * 64 + (s[2] - '0') * 8 + (s[3] - '0'));
            s += 3;
        } else {
            *out++ = *s;
        }
    }
    *out = 0;
}

/* The lines of /proc/self/mountinfo: "36 35 98:0 /root /at …". */
static size_t split_mounts(char *text, struct mount **out)
{
    size_t n = 0;
    *out = NULL;
    for (char *save, *line = strtok_r(text, "\n", &save); line;
         line = strtok_r(NULL, "\n", &save)) {
        char *field, *id = strtok_r(line, " ", &field), *parent = strtok_r(NULL, " ", &field),
                     *device = strtok_r(NULL, " ", &field);
        char *root = strtok_r(NULL, " ", &field), *at = strtok_r(NULL, " ", &field);
        if (!id || !parent || !device || !root || !at)
            continue;
        unescape(root);
        unescape(at);
        *out = orch_xrealloc(*out, (n + 1) * sizeof **out);
        (*out)[n++] = (struct mount){ atoi(id), device, root, at };
    }
    return n;
}

/* What of path is below dir, "" for itself; NULL: it is not. */
static const char *below(const char *path, const char *dir)
{
    size_t n = strcmp(dir, "/") == 0 ? 0 : strlen(dir);
    return strncmp(path, dir, n) == 0 && (path[n] == '/' || !path[n]) ? path + n : NULL;
}

static int protect_alias(struct plan *pl, const char *path, const struct mount *own,
                         const struct mount *m)
{
    const char *rest = below(path, own->at), *tail;
    struct stat st, same;
    if (!rest || m == own || strcmp(m->device, own->device) != 0)
        return 0;
    cleanup_free char *inside = orch_xasprintf("%s%s", strcmp(own->root, "/") == 0 ? "" : own->root,
                                               rest);
    if ((tail = below(inside, m->root))) { /* it is seen there too */
        cleanup_free char *alias = orch_xasprintf("%s%s", strcmp(m->at, "/") == 0 ? "" : m->at,
                                                  tail);
        if (strcmp(alias, path) == 0 || lstat(alias, &same) < 0 || lstat(path, &st) < 0 ||
            st.st_dev != same.st_dev || st.st_ino != same.st_ino)
            return 0;
        return protect(pl, alias, -1);
    }
    /* Something of it is, unless at a place that is protected by its way. */
    return below(m->root, inside) && !below(m->at, path) ? protect(pl, m->at, -1) : 0;
}

static int protect_aliases(struct plan *pl)
{
    cleanup_buf struct orch_buf text = { 0 };
    int r = orch_read_file(AT_FDCWD, "/proc/self/mountinfo", MOUNTS_MAX_BYTES, &text);
    if (r < 0)
        return orch_err_set(pl->err, -r, "/proc/self/mountinfo: %s", strerror(-r));
    cleanup_free struct mount *mounts = NULL;
    size_t n_mounts = split_mounts(text.p, &mounts);
    for (size_t i = 0, n = pl->n; i < n && r == 0; i++) {
        struct statx st;
        const struct mount *own = NULL;
        if (pl->words[i][0] != 'r')
            continue;
        cleanup_free char *path = orch_xstrdup(pl->words[i] + 1);
        if (statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_MNT_ID, &st) == 0)
            for (size_t m = 0; m < n_mounts && !own; m++)
                if ((uint64_t)mounts[m].id == st.stx_mnt_id)
                    own = &mounts[m];
        for (size_t m = 0; own && m < n_mounts && r == 0; m++)
            r = protect_alias(pl, path, own, &mounts[m]);
    }
    return r;
}

/* ---- all of it */

static int by_path(const void *a, const void *b)
{
    const char *x = *(char *const *)a, *y = *(char *const *)b;
    int c = strcmp(x + 1, y + 1);
    return c ? c : *y - *x; /* 'r' before 'p' */
}

/* Outer ones first, each once, none below one that is read-only with all below. */
static void tidy(struct plan *pl)
{
    size_t kept = 0;
    if (pl->n)
        qsort(pl->words, pl->n, sizeof *pl->words, by_path);
    for (size_t i = 0; i < pl->n; i++) {
        bool drop = kept && strcmp(pl->words[i] + 1, pl->words[kept - 1] + 1) == 0;
        for (size_t k = 0; k < kept && !drop; k++)
            drop = pl->words[k][0] == 'r' && below(pl->words[i] + 1, pl->words[k] + 1);
        if (drop)
            free(pl->words[i]);
        else
            pl->words[kept++] = pl->words[i];
    }
    pl->n = kept;
}

/* The program of this process; where it was replaced, what a next start would execute. */
static char *own_program(void)
{
    static const char gone[] = " (deleted)";
    char exe[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    size_t len = n > 0 ? (size_t)n : 0, tail = sizeof gone - 1;
    if (len > tail && memcmp(exe + len - tail, gone, tail) == 0)
        len -= tail;
    return len ? orch_xstrndup(exe, len) : NULL;
}

static int protect_configuration(struct plan *pl, struct orch *o)
{
    const struct orch_paths *p = &o->paths;
    const struct orch_config *c = &o->current.gen->cfg;
    cleanup_free char *base = orch_xstrdup(p->config);
    *strrchr(base, '/') = 0;
    int r = protect(pl, p->named, -1);
    r = r < 0 ? r : protect(pl, c->policies, DEPTH);
    for (char **dir = c->tools; *dir && r == 0; dir++)
        r = protect(pl, *dir, DEPTH);
    /* Where the whole folder is protected, nothing can come in. */
    bool whole = below(base, p->user_config) || below(base, ORCH_SYSTEM_CONFIG);
    for (const char *const *name = orch_beside; *name && !whole && r == 0; name++) {
        cleanup_free char *dir = orch_xasprintf("%s/%s", base, *name);
        r = protect_made(pl, dir, 0755);
    }
    return r;
}

static int protect_all(struct plan *pl, struct orch *o)
{
    const struct orch_paths *p = &o->paths;
    cleanup_free char *program = own_program();
    int r = p->origin == ORCH_CONFIG_BUILTIN ? 0 : protect_configuration(pl, o);
    /* Where it is looked for, too: what is put there would be in force at the next start. */
    r = r < 0 ? r : protect_made(pl, p->user_config, 0700);
    r = r < 0 ? r : protect_made(pl, ORCH_SYSTEM_CONFIG, 0755);
    const char *const own[] = { p->state, p->cache, p->runtime };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(own) && r == 0; i++)
        r = protect_made(pl, own[i], 0700);
    r = r < 0 ? r : protect_made(pl, o->current.gen->cfg.audit_dir, 0700);
    static const char *const shared[] = { "lua", "policies", "orchestrator.lua" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(shared) && r == 0; i++) {
        cleanup_free char *path = orch_xasprintf("%s/%s", p->share, shared[i]);
        r = protect(pl, path, DEPTH);
    }
    const char *const files[] = { p->launcher,    p->agent,  program,
                                  o->script.file, p->kernel, p->modules };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(files) && r == 0; i++)
        if (files[i])
            r = protect(pl, files[i], -1);
    return r < 0 ? r : protect_aliases(pl);
}

static int refused(const struct orch_proc_via *v, const struct orch_proc_report *report,
                   struct orch_err *err)
{
    return orch_launch_unprotected(v->words[0], report, err);
}

static void release(struct orch_proc_via *v)
{
    struct orch_protect *p = (struct orch_protect *)v;
    for (struct orch_protect **at = &p->o->protects; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            break;
        }
    orch_cleanup_close(&v->root);
    for (char **w = v->words; *w; w++)
        free(*w);
    free(v->words);
    free(p);
}

/* Takes the plan's words. */
static struct orch_proc_via *begin(struct orch *o, struct plan *pl, char *launcher)
{
    tidy(pl);
    struct orch_protect *p = orch_xcalloc(1, sizeof *p);
    *p = (struct orch_protect){ .via = { .words = orch_xcalloc(pl->n + 4, sizeof(char *)),
                                         .root = -1,
                                         .refused = refused,
                                         .release = release },
                                .o = o,
                                .next = o->protects };
    o->protects = p;
    p->via.words[0] = launcher;
    p->via.words[1] = orch_xstrdup("protect");
    memcpy(p->via.words + 2, pl->words, pl->n * sizeof *pl->words);
    p->via.words[pl->n + 2] = orch_xstrdup("--");
    free(pl->words);
    return &p->via;
}

static char *find_launcher(const struct orch *o, struct orch_err *err)
{
    char *launcher = realpath(o->paths.launcher, NULL);
    if (!launcher)
        orch_err_setc(err, ORCH_CLASS_ISOLATION, errno,
                      "launcher %s: %s; reinstall orch, or give its path", o->paths.launcher,
                      strerror(errno));
    return launcher;
}

struct orch_proc_via *orch_protect_new(struct orch *o, struct orch_err *err)
{
    struct plan pl = { .err = err };
    if (orch_current_need(&o->current, err) < 0)
        return NULL;
    const char *linked = o->current.gen->linked;
    if (linked) {
        orch_err_setc(
            err, ORCH_CLASS_ISOLATION, EMLINK,
            "%s: it has another name (a hard link), by which a child of orch could write to it; "
            "give it a file of its own: cp -p %s %s.new && mv %s.new %s",
            linked, linked, linked, linked, linked);
        return NULL;
    }
    char *launcher = find_launcher(o, err);
    if (launcher && protect_all(&pl, o) == 0)
        return begin(o, &pl, launcher);
    err->cls = ORCH_CLASS_ISOLATION;
    free(launcher);
    plan_free(&pl);
    return NULL;
}

int orch_protect_check(struct orch *o, struct orch_err *err)
{
    static const char *const argv[] = { "/bin/true", NULL };
    struct plan pl = { .err = err };
    char *launcher = find_launcher(o, err);
    if (!launcher || push(&pl, 'r', launcher) < 0)
        return -ENOENT;
    struct orch_proc *p =
        orch_proc_start(o->loop,
                        &(struct orch_proc_opts){
                            .argv = argv, .null_stdio = true, .via = begin(o, &pl, launcher) },
                        err);
    orch_proc_free(p);
    return p ? 0 : -EPERM;
}

bool orch_protect_holds(const struct orch *o, int fd)
{
    char link[32], path[PATH_MAX];
    struct stat here, there;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    if (path[0] != '/' || fstat(fd, &here) < 0)
        return false;
    struct open_how how = { .flags = O_PATH | O_NOFOLLOW | O_CLOEXEC,
                            .resolve = RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS };
    for (const struct orch_protect *p = o->protects; p; p = p->next) {
        struct statvfs fs;
        cleanup_close int seen = (int)syscall(SYS_openat2, p->via.root, path + 1, &how, sizeof how);
        if (seen < 0 || fstat(seen, &there) < 0 || fstatvfs(seen, &fs) < 0 ||
            !(fs.f_flag & ST_RDONLY) || here.st_dev != there.st_dev || here.st_ino != there.st_ino)
            return false;
    }
    return true;
}
