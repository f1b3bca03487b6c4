/* Writing the audit log. What is added waits in a queue; the flush makes it the next lines of the
 * chain. So when the file is found to be gone, what waits is chained into the next one. */
#include "audit_int.h"

#include "../base/json.h"
#include "../base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <time.h>

enum {
    HEX = ORCH_AUDIT_HEX,
    QUEUE_MAX = 4 * 1024 * 1024, /* more than that is written without being asked to */
    /* disk space is reserved in steps between these two, so that the system call is rare, and
     * little is left over when orch is killed */
    STEP_MIN = 256 * 1024,
    STEP_MAX = 4 * 1024 * 1024,
    /* of the disk, which calls leave to others */
    FLOOR_PART = 100,
    FLOOR_MAX = 1 << 30,
    TICK_MS = 1000,
    LOOK_MS = 1, /* so long after the file was looked at, what the kernel tells of it suffices */
    AROUND = ORCH_AUDIT_AROUND,
    END = AROUND + 8, /* the last line of all */
};

struct item {
    struct timespec at;
    uint32_t n_event, n_fields; /* whose bytes follow, the fields' with braces around them */
};

struct orch_audit {
    char *dir_path, *key_path;
    char *path, *name; /* NULL: no file is there yet; name: the file's, within dir */
    int dir, fd;
    int events; /* inotify: what happens to the file and the folder; -1: it cannot be had */
    struct orch_watch *watch;
    bool happened;
    dev_t dev;
    ino_t ino;
    int64_t looked_ms;
    enum orch_audit_sync sync;
    int64_t keep_s; /* 0: all */
    struct orch_hmac_key key;

    uint64_t seq; /* of the last written line, as prev is its hash */
    char prev[HEX + 1];
    struct orch_buf queue, text; /* text: what is being written */
    size_t queued;               /* bytes that the queue takes in the file, at most */
    unsigned queued_calls, queued_outcomes;
    /* size + queued + OUTCOME_MAX for each open call + END never exceeds `allocated`. */
    uint64_t size, allocated, open_calls;

    time_t second; /* that `stamp` shows */
    char stamp[sizeof "yyyy-mm-ddThh:mm:ss"];

    struct orch_json_doc doc;
    struct orch_loop *loop;
    struct orch_timer *tick;
    bool ticking, unsynced, head_failed;
    int broken; /* 0 or the positive errno that broke it */
    char broken_why[512];
};

/* ---- space */

static const char *filesystem_name(int fd, char *buf, size_t n)
{
    static const struct {
        long magic;
        const char *name;
    } known[] = {
        { 0x6969, "nfs" },          { 0xff534d42, "cifs" },      { 0xfe534d42, "smb" },
        { 0x65735546, "fuse" },     { 0x01021997, "9p" },        { 0x2fc12fc1, "zfs" },
        { 0x4d44, "vfat" },         { 0x794c7630, "overlayfs" }, { 0x858458f6, "ramfs" },
        { 0xef53, "ext2/3/4" },     { 0x52654973, "reiserfs" },  { 0x2011bab0, "exfat" },
        { 0x5346544e, "ntfs" },     { 0xf15f, "ecryptfs" },      { 0x3153464a, "jfs" },
        { 0x6a656a63, "virtiofs" },
    };
    struct statfs fs;
    if (fstatfs(fd, &fs) == 0) {
        for (size_t i = 0; i < ORCH_ARRAY_LEN(known); i++)
            if ((unsigned)known[i].magic == (unsigned)fs.f_type)
                return known[i].name;
        snprintf(buf, n, "type 0x%x", (unsigned)fs.f_type);
        return buf;
    }
    return "unknown";
}

/* What is left of the disk for others: no more calls are admitted beyond it, so that an agent does
 * not fill it. */
static int leave_some(struct orch_audit *a, uint64_t *to, uint64_t need, struct orch_err *err)
{
    struct statvfs fs;
    if (fstatvfs(a->fd, &fs) < 0)
        return 0;
    uint64_t whole = (uint64_t)fs.f_blocks * fs.f_frsize, left = whole / FLOOR_PART;
    uint64_t free = (uint64_t)fs.f_bavail * fs.f_frsize;
    if (left > FLOOR_MAX)
        left = FLOOR_MAX;
    if (free >= left + (*to - a->allocated))
        return 0;
    *to = need;
    return free >= left + (need - a->allocated)
               ? 0
               : orch_err_set(
                     err, ENOSPC,
                     "audit file %s: no space for the record of a call: %" PRIu64
                     " KiB are free, and the last %" PRIu64
                     " KiB are left to others: make room, or set audit.dir to another disk",
                     a->path, free / 1024, left / 1024);
}

/* Makes sure that the file can grow to `need` bytes. When a whole step does not fit any more, just
 * what is needed may still. call: it is for one that does not run when there is no space. */
static int allocate(struct orch_audit *a, uint64_t need, bool call, struct orch_err *err)
{
    if (need <= a->allocated)
        return 0;
    uint64_t step = a->size < STEP_MIN ? STEP_MIN : a->size < STEP_MAX ? a->size : STEP_MAX;
    uint64_t to = need > a->allocated + step ? need : a->allocated + step;
    int r = call ? leave_some(a, &to, need, err) : 0;
    if (r < 0)
        return r;
    do {
        r = fallocate(a->fd, FALLOC_FL_KEEP_SIZE, (off_t)a->allocated, (off_t)(to - a->allocated)) <
                    0
                ? -errno
                : 0;
        if ((r == -ENOSPC || r == -EDQUOT) && to > need)
            to = need;
        else if (r != -EINTR)
            break;
    } while (true);
    if (r == -EOPNOTSUPP || r == -ENOSYS) {
        char buf[32];
        return orch_err_set(
            err, EOPNOTSUPP,
            "audit file %s: this filesystem (%s) cannot reserve space (fallocate), so the "
            "record of a call could not be promised before it runs: set audit.dir to a folder on "
            "another "
            "one (ext4, xfs, btrfs and tmpfs can)",
            a->path, filesystem_name(a->fd, buf, sizeof buf));
    }
    if (r < 0)
        return orch_err_set(err, -r, "audit file %s: no space for the record of a call: %s",
                            a->path, strerror(-r));
    a->allocated = to;
    return 0;
}

/* ---- lines */

/* Digits of v into the three characters at p. */
static void put_millis(char *p, unsigned v)
{
    p[0] = (char)('0' + v / 100);
    p[1] = (char)('0' + v / 10 % 10);
    p[2] = (char)('0' + v % 10);
}

static char *put(char *p, const char *s, size_t n)
{
    memcpy(p, s, n);
    return p + n;
}

#define PUT(p, literal) put(p, literal, sizeof(literal) - 1)

/* Composes the next line at the end of `text`; seq and prev become its. */
static void compose(struct orch_audit *a, struct timespec at, const char *event, size_t n_event,
                    struct orch_slice fields, uint64_t *seq, char prev[HEX + 1])
{
    if (at.tv_sec != a->second) {
        struct tm tm;
        gmtime_r(&at.tv_sec, &tm);
        strftime(a->stamp, sizeof a->stamp, "%Y-%m-%dT%H:%M:%S", &tm);
        a->second = at.tv_sec;
    }
    orch_buf_reserve(&a->text, n_event + fields.n + AROUND);
    char *line = a->text.p + a->text.n, *p = line;
    p = PUT(p, "{\"ts\":\"");
    p = put(p, a->stamp, sizeof a->stamp - 1);
    *p++ = '.';
    put_millis(p, (unsigned)(at.tv_nsec / 1000000));
    p += 3;
    p = PUT(p, "Z\",\"seq\":");
    char digits[20], *d = digits + sizeof digits;
    uint64_t v = ++*seq;
    do
        *--d = (char)('0' + v % 10);
    while (v /= 10);
    p = put(p, d, (size_t)(digits + sizeof digits - d));
    p = PUT(p, ",\"event\":\"");
    p = put(p, event, n_event);
    *p++ = '"';
    if (fields.n) {
        *p++ = ',';
        p = put(p, fields.p, fields.n);
    }
    p = PUT(p, ",\"prev\":\"");
    p = put(p, prev, HEX);
    *p++ = '"';
    orch_sha256_hex(line, (size_t)(p - line), prev);
    p = PUT(p, ",\"hash\":\"");
    p = put(p, prev, HEX);
    p = PUT(p, "\"}\n");
    a->text.n += (size_t)(p - line);
    *p = 0;
}

static struct timespec wall(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now;
}

/* Names that every line has besides its fields. */
static bool is_ours(const char *key, size_t n)
{
    switch (n) {
    case 2:
        return memcmp(key, "ts", 2) == 0;
    case 3:
        return memcmp(key, "seq", 3) == 0;
    case 4:
        return memcmp(key, "prev", 4) == 0 || memcmp(key, "hash", 4) == 0;
    case 5:
        return memcmp(key, "event", 5) == 0;
    default:
        return false;
    }
}

/* Whether verify will read the line with these fields, which have their braces around them. */
static int check_fields(struct orch_audit *a, const char *event, struct orch_slice object,
                        struct orch_err *err)
{
    static const struct orch_json_limits limits = { .bytes = ORCH_AUDIT_LINE_MAX,
                                                    .depth = ORCH_AUDIT_DEPTH_MAX };
    struct orch_json_fault fault = { 0 };
    const struct orch_json_doc *d = &a->doc;
    if (memchr(object.p, '\n', object.n))
        fault.rule = "a newline";
    else if (orch_json_scan(&a->doc, object, &limits, &fault) == 0)
        for (uint32_t i = 0, tok = 1; i < d->toks[0].count; i++, tok = d->toks[tok + 1].next)
            if ((d->toks[tok].flags & ORCH_JSON_ESCAPED) ||
                is_ours(d->text + d->toks[tok].start, d->toks[tok].end - d->toks[tok].start))
                fault.rule = "duplicate key";
    return fault.rule ? orch_err_set(err, EINVAL,
                                     "audit: the record of this %s could not be read again: %s",
                                     event, fault.rule)
                      : 0;
}

static int check_size(const char *event, struct orch_slice fields, size_t max_bytes,
                      struct orch_err *err)
{
    size_t n = strlen(event) + fields.n + AROUND;
    return n <= max_bytes
               ? 0
               : orch_err_set(err, EMSGSIZE, "audit: a line of %zu bytes, at most %zu are allowed",
                              n, max_bytes);
}

/* ---- the file */

/* The name says when and who; the folder's names are in the order in which the files were made,
 * also when the clock was set back. */
static char *new_name(const char *before)
{
    struct timespec now = wall();
    for (bool again = false;; again = true) {
        struct tm tm = { 0 };
        int ms;
        char start[32];
        gmtime_r(&now.tv_sec, &tm);
        strftime(start, sizeof start, "%Y%m%dT%H%M%S", &tm);
        char *name = orch_xasprintf("%s.%03ldZ-%d.jsonl", start, now.tv_nsec / 1000000, getpid());
        if (again || strcmp(name, before) > 0 ||
            sscanf(before, "%4d%2d%2dT%2d%2d%2d.%3dZ-", &tm.tm_year, &tm.tm_mon, &tm.tm_mday,
                   &tm.tm_hour, &tm.tm_min, &tm.tm_sec, &ms) != 7)
            return name;
        free(name);
        tm.tm_year -= 1900;
        tm.tm_mon--;
        now.tv_sec = timegm(&tm) + (ms == 999);
        now.tv_nsec = (ms + 1) % 1000 * 1000000L;
    }
}

/* The file before: the one that was made last, as the folder's record says; where that is missing
 * or wrong, by name. */
static int find_before(struct orch_audit *a, const struct orch_audit_point *lost,
                       struct orch_audit_point *before, struct orch_err *err)
{
    const char *why;
    char **names;
    size_t n;
    *before = (struct orch_audit_point){ .seq = 0 };
    orch_audit_newest_read(a->dir, &a->key, before->file, &why);
    int r = orch_audit_names(a->dir, ".jsonl", &names, &n);
    if (r < 0)
        return orch_err_set(err, -r, "audit folder %s: %s", a->dir_path, strerror(-r));
    /* a process was killed while it made one */
    if (n && strcmp(names[n - 1], before->file) > 0)
        snprintf(before->file, sizeof before->file, "%s", names[n - 1]);
    orch_audit_list_free(names, n);
    if (*before->file)
        orch_audit_last_line(a->dir, before);
    if (lost && strcmp(before->file, lost->file) == 0)
        *before = *lost;
    return 0;
}

static void put_point(struct orch_buf *b, const char *key, const struct orch_audit_point *p)
{
    orch_buf_printf(b, ",\"%s\":{\"file\":", key);
    orch_json_quote(b, orch_slice_str(p->file));
    orch_buf_printf(b, ",\"seq\":%" PRIu64 ",\"hash\":\"%s\"}", p->seq, p->hash);
}

static void drop_file(struct orch_audit *a)
{
    orch_cleanup_close(&a->fd);
    orch_watch_free(a->watch);
    a->watch = NULL;
    orch_cleanup_close(&a->events);
    a->fd = a->events = -1;
    free(orch_steal_ptr(&a->name));
    free(orch_steal_ptr(&a->path));
    a->size = a->allocated = a->seq = 0;
    memset(a->prev, '0', HEX);
}

/* Its first line is in it, and its head beside it, before it has its name: one that is there is
 * whole, however this process ends. */
static int write_first(struct orch_audit *a, const struct orch_audit_point *before,
                       const struct orch_audit_point *lost, const char *why, struct orch_err *err)
{
    cleanup_free char *tmp = NULL;
    cleanup_buf struct orch_buf fields = { 0 };
    orch_buf_str(&fields, "\"file\":");
    orch_json_quote(&fields, orch_slice_str(a->name));
    if (*before->file)
        put_point(&fields, "before", before);
    else
        orch_buf_str(&fields, ",\"before\":null");
    if (lost) {
        put_point(&fields, "lost", lost);
        orch_buf_str(&fields, ",\"why\":");
        orch_json_quote(&fields, orch_slice_str(why));
    }
    int r;
    a->fd = orch_create_beside(a->dir, a->name, 0600, &tmp);
    if (a->fd < 0)
        return orch_err_set(err, -a->fd, "audit file %s: cannot be made: %s", a->path,
                            strerror(-a->fd));
    uint64_t seq = 0;
    a->text.n = 0;
    compose(a, wall(), "start", sizeof "start" - 1, orch_slice_of(&fields), &seq, a->prev);
    struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat st;
    r = allocate(a,
                 a->text.n + a->queued +
                     (a->open_calls ? a->open_calls : 1) * ORCH_AUDIT_OUTCOME_MAX + END,
                 a->open_calls == 0, err);
    if (r == 0 && ((r = orch_write_all(a->fd, a->text.p, a->text.n)) < 0 ||
                   (r = orch_audit_head_write(a->dir, a->name, &a->key, seq, a->prev)) < 0 ||
                   (r = fcntl(a->fd, F_SETFL, O_APPEND) < 0 ||
                                fcntl(a->fd, F_OFD_SETLK, &whole) < 0 || fstat(a->fd, &st) < 0 ||
                                (a->sync != ORCH_AUDIT_SYNC_NONE && fdatasync(a->fd) < 0) ||
                                linkat(a->dir, tmp, a->dir, a->name, 0) < 0
                            ? -errno
                            : 0) < 0))
        orch_err_set(err, -r, "audit file %s: cannot be made: %s", a->path, strerror(-r));
    unlinkat(a->dir, tmp, 0);
    if (r < 0) {
        cleanup_free char *head = orch_xasprintf("%s.head", a->name);
        unlinkat(a->dir, head, 0);
        return r;
    }
    a->dev = st.st_dev;
    a->ino = st.st_ino;
    a->size = a->text.n;
    a->seq = seq;
    return 0;
}

static int write_line(struct orch_audit *a, const char *event, struct orch_slice fields)
{
    uint64_t seq = a->seq;
    char prev[HEX + 1];
    memcpy(prev, a->prev, sizeof prev);
    a->text.n = 0;
    compose(a, wall(), event, strlen(event), fields, &seq, prev);
    int r = orch_write_all(a->fd, a->text.p, a->text.n);
    if (r < 0)
        return r;
    a->size += a->text.n;
    a->seq = seq;
    memcpy(a->prev, prev, sizeof prev);
    return 0;
}

/* The files that are going to be removed, in a line that the head signs before they are. */
static int say_pruned(void *ud, const struct orch_audit_point *last, size_t n)
{
    struct orch_audit *a = ud;
    cleanup_buf struct orch_buf fields = { 0 };
    orch_buf_printf(&fields, "\"files\":%zu", n);
    put_point(&fields, "until", last);
    struct orch_err err;
    int r = allocate(a, a->allocated + fields.n + AROUND, false, &err);
    r = r < 0 ? r : write_line(a, "prune", orch_slice_of(&fields));
    return r < 0 ? r : orch_audit_head_write(a->dir, a->name, &a->key, a->seq, a->prev);
}

static void something_happened(void *ud, int events)
{
    struct orch_audit *a = ud;
    char text[4096];
    (void)events;
    while (read(a->events, text, sizeof text) > 0)
        a->happened = true;
}

/* What happens to the file is told by the loop before what comes after it, so that looking anew
 * for each call is not needed. */
static void watch_file(struct orch_audit *a)
{
    static const uint32_t self = IN_MOVE_SELF | IN_DELETE_SELF;
    a->looked_ms = 0;
    a->events = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (a->events >= 0 && inotify_add_watch(a->events, a->path, self | IN_ATTRIB) >= 0 &&
        inotify_add_watch(a->events, a->dir_path, self) >= 0) {
        a->watch = orch_watch_new(a->loop, a->events, ORCH_READ, something_happened, a);
        orch_watch_first(a->watch);
    }
}

static int make_file(struct orch_audit *a, const struct orch_audit_point *lost, const char *why,
                     struct orch_err *err)
{
    int dir = orch_audit_dir_open(a->dir_path, err);
    if (dir < 0)
        return dir;
    orch_cleanup_close(&a->dir);
    a->dir = dir;
    cleanup_close int lock = orch_audit_lock(a->key_path, err);
    struct orch_audit_point before;
    int r = lock < 0 ? lock : find_before(a, lost, &before, err);
    if (r == 0) {
        a->name = new_name(lost && strcmp(lost->file, before.file) > 0 ? lost->file : before.file);
        a->path = orch_xasprintf("%s/%s", a->dir_path, a->name);
        r = write_first(a, &before, lost, why, err);
    }
    if (r == 0 && (r = orch_audit_newest_write(a->dir, &a->key, a->name)) < 0)
        orch_err_set(err, -r, "audit folder %s: %s", a->dir_path, strerror(-r));
    /* What is promised to be on the disk needs its name there too. */
    if (r == 0 && a->sync != ORCH_AUDIT_SYNC_NONE && fsync(a->dir) < 0)
        r = orch_err_set(err, errno, "audit folder %s: cannot be brought to the disk: %s",
                         a->dir_path, strerror(errno));
    if (r < 0) {
        drop_file(a);
        return r;
    }
    watch_file(a);
    if (a->keep_s &&
        (r = orch_audit_prune(a->dir, a->name, wall().tv_sec - a->keep_s, say_pruned, a)) < 0)
        orch_log(ORCH_WARN, "audit folder %s: old files cannot be removed: %s", a->dir_path,
                 strerror(-r));
    return 0;
}

/* What happened to the file, or NULL. What has no name any more, or another's bytes in it, is no
 * record. */
static const char *lost_why(struct orch_audit *a, char *why, size_t n)
{
    struct stat st;
    if (stat(a->path, &st) < 0)
        snprintf(why, n, "%s",
                 errno == ENOENT || errno == ENOTDIR ? "it was removed or moved away"
                                                     : strerror(errno));
    else if (st.st_dev != a->dev || st.st_ino != a->ino)
        snprintf(why, n, "it was moved away, and another is in its place");
    else if ((uint64_t)st.st_size != a->size)
        snprintf(why, n, "somebody else %s: it has %lld bytes, not %" PRIu64,
                 (uint64_t)st.st_size < a->size ? "cut it" : "wrote to it", (long long)st.st_size,
                 a->size);
    else
        return NULL;
    return why;
}

static int next_file(struct orch_audit *a, const char *why, struct orch_err *err)
{
    struct orch_audit_point lost = { .seq = a->seq };
    snprintf(lost.file, sizeof lost.file, "%s", a->name);
    memcpy(lost.hash, a->prev, sizeof lost.hash);
    orch_log(ORCH_ERROR, "audit file %s: %s; the log goes on in a new file", a->path, why);
    /* space that was reserved, where it still is somewhere */
    struct stat st;
    if (fstat(a->fd, &st) == 0 && (uint64_t)st.st_size == a->size &&
        ftruncate(a->fd, st.st_size) < 0)
        orch_log(ORCH_WARN, "audit file %s: reserved space cannot be given back: %s", a->path,
                 strerror(errno));
    cleanup_free char *name = orch_steal_ptr(&a->name);
    cleanup_free char *path = orch_steal_ptr(&a->path);
    cleanup_close int fd = orch_steal_fd(&a->fd);
    dev_t dev = a->dev;
    ino_t ino = a->ino;
    uint64_t size = a->size, seq = a->seq;
    drop_file(a);
    int r = make_file(a, &lost, why, err);
    if (r == 0)
        return 0;
    /* So that the next try says it too. */
    a->name = orch_steal_ptr(&name);
    a->path = orch_steal_ptr(&path);
    a->fd = orch_steal_fd(&fd);
    a->dev = dev;
    a->ino = ino;
    a->size = a->allocated = size;
    a->seq = seq;
    memcpy(a->prev, lost.hash, sizeof a->prev);
    return r;
}

/* ---- opening and closing */

/* That a file can be made and space reserved in it, before anything relies on it. */
static int probe(struct orch_audit *a, struct orch_err *err)
{
    cleanup_free char *tmp = NULL;
    a->path = orch_xasprintf("%s/probe", a->dir_path);
    a->fd = orch_create_beside(a->dir, "probe", 0600, &tmp);
    int r = a->fd < 0 ? orch_err_set(err, -a->fd, "audit folder %s: no file can be made there: %s",
                                     a->dir_path, strerror(-a->fd))
                      : allocate(a, ORCH_AUDIT_OUTCOME_MAX, false, err);
    if (a->fd >= 0)
        unlinkat(a->dir, tmp, 0);
    drop_file(a);
    return r;
}

static void tick(void *ud);

static void free_it(struct orch_audit *a)
{
    drop_file(a);
    orch_timer_free(a->tick);
    orch_cleanup_close(&a->dir);
    orch_buf_free(&a->queue);
    orch_buf_free(&a->text);
    orch_json_doc_free(&a->doc);
    free(a->dir_path);
    free(a->key_path);
    explicit_bzero(&a->key, sizeof a->key);
    free(a);
}

struct orch_audit *orch_audit_open(struct orch_loop *l, const char *dir, const char *key_path,
                                   enum orch_audit_sync sync, struct orch_err *err)
{
    struct orch_audit *a = orch_xcalloc(1, sizeof *a);
    a->dir = a->fd = a->events = -1;
    a->loop = l;
    a->sync = sync;
    a->second = -1;
    a->dir_path = orch_xstrdup(dir);
    a->key_path = orch_xstrdup(key_path);
    a->tick = orch_timer_new(l, tick, a);
    if (orch_audit_key_need(key_path, &a->key, err) < 0 ||
        (a->dir = orch_audit_dir_open(dir, err)) < 0 || probe(a, err) < 0) {
        free_it(a);
        return NULL;
    }
    return a;
}

void orch_audit_keep(struct orch_audit *a, int64_t ms)
{
    a->keep_s = ms / 1000;
}

/* ---- writing */

static int fail_broken(const struct orch_audit *a, struct orch_err *err)
{
    return orch_err_set(err, a->broken, "%s", a->broken_why);
}

static void drop_queue(struct orch_audit *a)
{
    a->open_calls -= a->queued_calls;
    a->queue.n = a->queued = 0;
    a->queued_calls = a->queued_outcomes = 0;
}

static int break_it(struct orch_audit *a, int code, const char *what, struct orch_err *err)
{
    a->broken = code;
    snprintf(a->broken_why, sizeof a->broken_why,
             "audit file %s: %s: %s; calls are refused until orch is started again", a->path, what,
             strerror(code));
    /* Nothing after the last whole line; when even that fails, verify reports the partial line. */
    if (ftruncate(a->fd, (off_t)a->size) < 0)
        orch_log(ORCH_ERROR, "audit file %s: cannot be cut back to its last whole line: %s",
                 a->path, strerror(errno));
    a->allocated = a->size;
    drop_queue(a);
    return fail_broken(a, err);
}

/* Queues it, or not when it could not be read again; checked: its caller has seen to that. */
static int enqueue(struct orch_audit *a, const char *event, struct orch_slice fields, bool checked,
                   struct orch_err *err)
{
    struct item it = { wall(), (uint32_t)strlen(event), (uint32_t)fields.n };
    size_t from = a->queue.n;
    orch_buf_reserve(&a->queue, sizeof it + it.n_event + fields.n + 2);
    orch_buf_add(&a->queue, &it, sizeof it);
    orch_buf_add(&a->queue, event, it.n_event);
    orch_buf_char(&a->queue, '{');
    orch_buf_slice(&a->queue, fields);
    orch_buf_char(&a->queue, '}');
    const char *object = a->queue.p + from + sizeof it + it.n_event;
    int r = checked ? 0 : check_fields(a, event, (struct orch_slice){ object, fields.n + 2 }, err);
    if (r < 0)
        a->queue.n = from;
    else
        a->queued += it.n_event + fields.n + AROUND;
    return r;
}

/* Where nobody is told of the calls whose decisions are in the queue: they must not run. */
static int flush_or_break(struct orch_audit *a, struct orch_err *err)
{
    unsigned calls = a->queued_calls;
    int r = orch_audit_flush(a, err);
    return r < 0 && calls && !a->broken ? break_it(a, -r, "cannot be written", err) : r;
}

int orch_audit_add(struct orch_audit *a, const char *event, struct orch_slice fields, bool reserve,
                   struct orch_err *err)
{
    int r = a->broken ? fail_broken(a, err) : check_size(event, fields, ORCH_AUDIT_LINE_MAX, err);
    if (r == 0 && a->fd < 0)
        r = make_file(a, NULL, NULL, err);
    if (r == 0 && a->queued > QUEUE_MAX)
        r = flush_or_break(a, err);
    if (r == 0)
        r = allocate(a,
                     a->size + a->queued + strlen(event) + fields.n + AROUND +
                         (a->open_calls + reserve) * ORCH_AUDIT_OUTCOME_MAX + END,
                     reserve, err);
    if (r < 0 || (r = enqueue(a, event, fields, reserve, err)) < 0)
        return r;
    a->open_calls += reserve;
    a->queued_calls += reserve;
    return 0;
}

int orch_audit_add_outcome(struct orch_audit *a, struct orch_slice fields, struct orch_err *err)
{
    int r = a->broken ? fail_broken(a, err)
                      : check_size("outcome", fields, ORCH_AUDIT_OUTCOME_MAX, err);
    if (r == 0 && !a->open_calls)
        r = orch_err_set(err, EINVAL, "audit: an outcome without a reserved call");
    if (r < 0 || (r = enqueue(a, "outcome", fields, true, err)) < 0)
        return r;
    a->queued_outcomes++;
    a->open_calls--;
    a->queued_calls -= a->queued_calls > a->open_calls; /* its decision is not written yet */
    return 0;
}

/* Whether to look at the file: something happened to it, or nobody looked for a while. */
static bool must_look(struct orch_audit *a)
{
    struct item first;
    memcpy(&first, a->queue.p, sizeof first);
    int64_t now_ms = (int64_t)first.at.tv_sec * 1000 + first.at.tv_nsec / 1000000;
    if (now_ms >= a->looked_ms && now_ms - a->looked_ms <= LOOK_MS && !a->happened &&
        (a->watch || !a->queued_calls))
        return false;
    a->looked_ms = now_ms;
    a->happened = false;
    return true;
}

/* What is queued goes where it can be found. */
static int find_file(struct orch_audit *a, struct orch_err *err)
{
    char why[256];
    if (!must_look(a) || !lost_why(a, why, sizeof why))
        return 0;
    int r = next_file(a, why, err);
    if (r < 0 && a->queued_outcomes)
        return break_it(a, -r, why, err);
    if (r < 0) {
        orch_err_wrap(err, "audit file %s: %s, and a new one cannot be made", a->path, why);
        a->looked_ms = 0;
        drop_queue(a);
    }
    return r;
}

int orch_audit_flush(struct orch_audit *a, struct orch_err *err)
{
    if (a->broken)
        return fail_broken(a, err);
    if (!a->queue.n)
        return 0;
    int r = find_file(a, err);
    if (r < 0)
        return r;
    uint64_t seq = a->seq;
    char prev[HEX + 1];
    memcpy(prev, a->prev, sizeof prev);
    a->text.n = 0;
    for (const char *p = a->queue.p, *end = p + a->queue.n; p < end;) {
        struct item it;
        memcpy(&it, p, sizeof it);
        p += sizeof it;
        compose(a, it.at, p, it.n_event, (struct orch_slice){ p + it.n_event + 1, it.n_fields },
                &seq, prev);
        p += it.n_event + it.n_fields + 2;
    }
    r = orch_write_all(a->fd, a->text.p, a->text.n);
    if (r < 0)
        return break_it(a, -r, "cannot be written", err);
    if (a->sync == ORCH_AUDIT_SYNC_EACH && fdatasync(a->fd) < 0)
        return break_it(a, errno, "cannot be brought to the disk", err);
    a->size += a->text.n;
    a->seq = seq;
    memcpy(a->prev, prev, sizeof prev);
    a->queued_calls = 0;
    drop_queue(a);
    a->unsynced = true;
    if (!a->ticking) {
        a->ticking = true;
        orch_timer_set(a->tick, TICK_MS);
    }
    return 0;
}

/* Once a second after something was written: the disk first, so that the head never names a line
 * that is not there. A head that cannot be written leaves lines unsigned, no more; it is tried
 * again. */
static void sync_and_sign(struct orch_audit *a)
{
    if (a->sync == ORCH_AUDIT_SYNC_INTERVAL && a->unsynced && !a->broken && fdatasync(a->fd) < 0) {
        struct orch_err err;
        break_it(a, errno, "cannot be brought to the disk", &err);
        orch_log(ORCH_ERROR, "%s", err.msg);
        return;
    }
    a->unsynced = false;
    int r = orch_audit_head_write(a->dir, a->name, &a->key, a->seq, a->prev);
    if (r < 0 && !a->head_failed)
        orch_log(ORCH_WARN,
                 "audit file %s: head cannot be written: %s; lines stay unsigned until it can",
                 a->path, strerror(-r));
    a->head_failed = r < 0;
}

static void tick(void *ud)
{
    struct orch_audit *a = ud;
    sync_and_sign(a);
    a->ticking = a->head_failed;
    if (a->ticking)
        orch_timer_set(a->tick, TICK_MS);
}

/* The last line says that it is the last, and the head signs it. */
static void end_file(struct orch_audit *a)
{
    struct orch_err err = { 0 };
    char why[256];
    if (!a->broken && orch_audit_flush(a, &err) < 0)
        orch_log(ORCH_ERROR, "%s", err.msg);
    const char *lost = a->broken ? NULL : lost_why(a, why, sizeof why);
    if (lost) {
        orch_log(ORCH_ERROR, "audit file %s: %s", a->path, lost);
        return;
    }
    int r = a->broken ? 0 : write_line(a, "end", (struct orch_slice){ 0 });
    if (r < 0)
        break_it(a, -r, "cannot be written", &err);
    sync_and_sign(a);
    if (a->allocated > a->size && ftruncate(a->fd, (off_t)a->size) < 0)
        orch_log(ORCH_WARN, "audit file %s: reserved space cannot be given back: %s", a->path,
                 strerror(errno));
}

void orch_audit_close(struct orch_audit *a)
{
    if (!a)
        return;
    if (a->fd >= 0)
        end_file(a);
    free_it(a);
}

void orch_audit_note(struct orch_audit *a, const char *event, struct orch_slice fields)
{
    struct orch_err err = { 0 };
    if (a && (orch_audit_add(a, event, fields, false, &err) < 0 || flush_or_break(a, &err) < 0))
        orch_log(ORCH_ERROR, "%s", err.msg);
}

bool orch_audit_broken(const struct orch_audit *a)
{
    return a->broken;
}

const char *orch_audit_path(const struct orch_audit *a)
{
    return a->path ? a->path : a->dir_path;
}

void orch_audit_digest(struct orch_audit *a, struct orch_slice canonical, char out[65])
{
    /* No head can be made from this: its text begins with a digit, that of the newest file's record
     * with a letter, and args are a JSON object. */
    uint8_t mac[ORCH_SHA256_BYTES];
    orch_hmac(&a->key, canonical.p, canonical.n, mac);
    orch_hex(mac, sizeof mac, out);
}
