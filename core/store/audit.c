#include "audit.h"

#include "../base/hash.h"
#include "../base/json.h"
#include "../base/log.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>

enum {
    KEY_BYTES = 32,
    HEX = 2 * ORCH_SHA256_BYTES,
    QUEUE_MAX = 4 * 1024 * 1024, /* more than that is written without being asked to */
    /* disk space is reserved in steps between these two, so that the */
    STEP_MIN = 256 * 1024,
    STEP_MAX = 4 * 1024 *
               1024, /* system call is rare, and little is left over when orch is killed */
    TICK_MS = 1000,
    TAIL = sizeof ",\"hash\":\"\"}" - 1 + HEX, /* what follows the hashed bytes of a line */
    AROUND = ORCH_AUDIT_AROUND,
};

struct orch_audit {
    char *path, *name; /* name: the file's, within dir */
    int dir, fd;
    enum orch_audit_sync sync;
    struct orch_hmac_key key;

    /* The chain up to the last queued line, and up to the last written one, which the head
     * names. */
    uint64_t seq, written_seq;
    char prev[HEX + 1], written_prev[HEX + 1];
    struct orch_buf queue;
    /* size + queue + OUTCOME_MAX for each open call never exceeds `allocated`. */
    uint64_t size, allocated, open_calls;

    time_t second; /* that `stamp` shows */
    char stamp[sizeof "yyyy-mm-ddThh:mm:ss"];

    struct orch_timer *tick;
    bool ticking, unsynced, head_failed;
    int broken; /* 0 or the positive errno that broke it */
    char broken_why[512];
};

static void head_hmac(const struct orch_hmac_key *key, uint64_t seq, const char *hash,
                      char out[HEX + 1])
{
    char text[24 + HEX];
    int n = snprintf(text, sizeof text, "%" PRIu64 ":%s", seq, hash);
    uint8_t mac[ORCH_SHA256_BYTES];
    orch_hmac(key, text, (size_t)n, mac);
    orch_hex(mac, sizeof mac, out);
}

/* ---- the key */

static int key_read(const char *path, struct orch_hmac_key *key, struct orch_err *err)
{
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return errno == ENOENT
                   ? -ENOENT
                   : orch_err_set(err, errno, "audit key %s: %s", path, strerror(errno));
    struct stat st;
    uint8_t bytes[KEY_BYTES + 1];
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || (st.st_mode & 077) ||
        (st.st_uid != geteuid() && geteuid() != 0))
        return orch_err_set(
            err, EPERM,
            "audit key %s: must be a regular file of this user with mode 0600 (is %04o, uid %u)",
            path, (unsigned)st.st_mode & 07777, (unsigned)st.st_uid);
    ssize_t n = read(fd, bytes, sizeof bytes);
    if (n != KEY_BYTES)
        return orch_err_set(err, EINVAL,
                            "audit key %s: must have 32 bytes; move it away to get a new one "
                            "(heads signed with the old one then no longer verify)",
                            path);
    orch_hmac_key_init(key, bytes, KEY_BYTES);
    explicit_bzero(bytes, sizeof bytes);
    return 0;
}

/* Several handles may start at once, also in one process: each makes a whole file, and the first
 * link wins. */
static int key_make(const char *path, struct orch_err *err)
{
    int r = orch_mkdir_of(path, 0700);
    if (r < 0)
        return orch_err_set(err, -r, "audit key: folder of %s: %s", path, strerror(-r));
    uint8_t bytes[KEY_BYTES];
    cleanup_free char *tmp = NULL;
    cleanup_close int fd = orch_create_beside(AT_FDCWD, path, 0600, &tmp);
    r = fd < 0 ? fd : orch_random(bytes, sizeof bytes);
    if (r == 0)
        r = orch_write_all(fd, bytes, sizeof bytes);
    explicit_bzero(bytes, sizeof bytes);
    if (r == 0 && link(tmp, path) < 0 && errno != EEXIST)
        r = -errno;
    if (fd >= 0)
        unlink(tmp);
    return r < 0 ? orch_err_set(err, -r, "audit key %s: cannot be made: %s", path, strerror(-r))
                 : 0;
}

/* ---- opening */

static int open_dir(const char *dir, struct orch_err *err)
{
    int r = orch_mkdir_p(dir, 0700);
    cleanup_close int fd = r < 0 ? -1 : open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return orch_err_set(err, r < 0 ? -r : errno, "audit folder %s: %s", dir,
                            strerror(r < 0 ? -r : errno));
    bool shared = (st.st_mode & 022) && !(st.st_mode & S_ISVTX);
    if (shared || (st.st_uid != geteuid() && st.st_uid != 0))
        return orch_err_set(
            err, EPERM,
            "audit folder %s: others may write to it (mode %04o, uid %u): chmod 700 and chown it, "
            "or set audit.dir to another",
            dir, (unsigned)st.st_mode & 07777, (unsigned)st.st_uid);
    return orch_steal_fd(&fd);
}

/* The name says when and who; two processes that share both (pid namespaces) differ in the
 * millisecond. */
static int create_file(struct orch_audit *a, const char *dir, struct orch_err *err)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    for (int tries = 0; tries < 100; tries++) {
        struct tm tm;
        gmtime_r(&now.tv_sec, &tm);
        char start[32];
        strftime(start, sizeof start, "%Y%m%dT%H%M%S", &tm);
        free(a->name);
        a->name = orch_xasprintf("%s.%03ldZ-%d.jsonl", start, now.tv_nsec / 1000000, getpid());
        a->fd = openat(a->dir, a->name,
                       O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (a->fd >= 0 || errno != EEXIST)
            break;
        now.tv_nsec += 1000000;
        if (now.tv_nsec >= 1000000000) {
            now.tv_nsec -= 1000000000;
            now.tv_sec++;
        }
    }
    int code = errno;
    a->path = orch_xasprintf("%s/%s", dir, a->name);
    if (a->fd < 0)
        return orch_err_set(err, code, "audit file %s: cannot be made: %s", a->path,
                            strerror(code));
    return 0;
}

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

/* Makes sure that the file can grow to `need` bytes. When a whole step does not fit any more, just
 * what is needed may still. */
static int allocate(struct orch_audit *a, uint64_t need, struct orch_err *err)
{
    if (need <= a->allocated)
        return 0;
    uint64_t step = a->size < STEP_MIN ? STEP_MIN : a->size < STEP_MAX ? a->size : STEP_MAX;
    uint64_t to = need > a->allocated + step ? need : a->allocated + step;
    int r;
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

static void tick(void *ud);

struct orch_audit *orch_audit_open(struct orch_loop *l, const char *dir, const char *key_path,
                                   enum orch_audit_sync sync, struct orch_err *err)
{
    struct orch_audit *a = orch_xcalloc(1, sizeof *a);
    a->dir = a->fd = -1;
    a->sync = sync;
    a->second = -1;
    memset(a->prev, '0', HEX);
    memset(a->written_prev, '0', HEX);
    a->tick = orch_timer_new(l, tick, a);
    int r = key_read(key_path, &a->key, err);
    if (r == -ENOENT && (r = key_make(key_path, err)) == 0 &&
        (r = key_read(key_path, &a->key, err)) == -ENOENT)
        orch_err_set(err, ENOENT, "audit key %s: vanished while it was made", key_path);
    if (r == 0 && (r = a->dir = open_dir(dir, err)) >= 0 && (r = create_file(a, dir, err)) == 0) {
        r = allocate(a, ORCH_AUDIT_OUTCOME_MAX, err);
        /* What is promised to be on the disk needs its name there too. */
        if (r == 0 && sync != ORCH_AUDIT_SYNC_NONE && fsync(a->dir) < 0)
            r = orch_err_set(err, errno, "audit folder %s: cannot be brought to the disk: %s", dir,
                             strerror(errno));
        if (r < 0)
            unlinkat(a->dir, a->name, 0);
    }
    if (r < 0) {
        orch_timer_free(a->tick);
        orch_cleanup_close(&a->dir);
        orch_cleanup_close(&a->fd);
        free(a->name);
        free(a->path);
        free(a);
        return NULL;
    }
    return a;
}

/* ---- writing */

static int fail_broken(const struct orch_audit *a, struct orch_err *err)
{
    return orch_err_set(err, a->broken, "%s", a->broken_why);
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
    a->queue.n = 0;
    return fail_broken(a, err);
}

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

/* Composes the line at the queue's end. The caller has checked the sizes. */
static void compose(struct orch_audit *a, const char *event, size_t n_event,
                    struct orch_slice fields)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (now.tv_sec != a->second) {
        struct tm tm;
        gmtime_r(&now.tv_sec, &tm);
        strftime(a->stamp, sizeof a->stamp, "%Y-%m-%dT%H:%M:%S", &tm);
        a->second = now.tv_sec;
    }
    orch_buf_reserve(&a->queue, n_event + fields.n + AROUND);
    char *line = a->queue.p + a->queue.n, *p = line;
    p = PUT(p, "{\"ts\":\"");
    p = put(p, a->stamp, sizeof a->stamp - 1);
    *p++ = '.';
    put_millis(p, (unsigned)(now.tv_nsec / 1000000));
    p += 3;
    p = PUT(p, "Z\",\"seq\":");
    char digits[20], *d = digits + sizeof digits;
    uint64_t v = ++a->seq;
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
    p = put(p, a->prev, HEX);
    *p++ = '"';
    orch_sha256_hex(line, (size_t)(p - line), a->prev);
    p = PUT(p, ",\"hash\":\"");
    p = put(p, a->prev, HEX);
    p = PUT(p, "\"}\n");
    a->queue.n += (size_t)(p - line);
    *p = 0;
}

static int check_line(const struct orch_audit *a, const char *event, struct orch_slice fields,
                      size_t max_bytes, struct orch_err *err)
{
    if (a->broken)
        return fail_broken(a, err);
    size_t n = strlen(event) + fields.n + AROUND;
    if (n > max_bytes)
        return orch_err_set(err, EMSGSIZE, "audit: a line of %zu bytes, at most %zu are allowed", n,
                            max_bytes);
    if (fields.n && (memchr(fields.p, '\n', fields.n) || memchr(fields.p, 0, fields.n)))
        return orch_err_set(err, EINVAL, "audit: fields contain a newline or a zero byte");
    return 0;
}

int orch_audit_add(struct orch_audit *a, const char *event, struct orch_slice fields, bool reserve,
                   struct orch_err *err)
{
    int r = check_line(a, event, fields, ORCH_AUDIT_LINE_MAX, err);
    if (r == 0 && a->queue.n > QUEUE_MAX)
        r = orch_audit_flush(a, err);
    size_t n_event = strlen(event), n_line = n_event + fields.n + AROUND;
    if (r == 0)
        r = allocate(a,
                     a->size + a->queue.n + n_line +
                         (a->open_calls + reserve) * ORCH_AUDIT_OUTCOME_MAX,
                     err);
    if (r < 0)
        return r;
    compose(a, event, n_event, fields);
    a->open_calls += reserve;
    return 0;
}

int orch_audit_add_outcome(struct orch_audit *a, struct orch_slice fields, struct orch_err *err)
{
    int r = check_line(a, "outcome", fields, ORCH_AUDIT_OUTCOME_MAX, err);
    if (r < 0)
        return r;
    if (!a->open_calls)
        return orch_err_set(err, EINVAL, "audit: an outcome without a reserved call");
    compose(a, "outcome", sizeof "outcome" - 1, fields);
    a->open_calls--;
    return 0;
}

int orch_audit_flush(struct orch_audit *a, struct orch_err *err)
{
    if (a->broken)
        return fail_broken(a, err);
    if (!a->queue.n)
        return 0;
    int r = orch_write_all(a->fd, a->queue.p, a->queue.n);
    if (r < 0)
        return break_it(a, -r, "cannot be written", err);
    if (a->sync == ORCH_AUDIT_SYNC_EACH && fdatasync(a->fd) < 0)
        return break_it(a, errno, "cannot be brought to the disk", err);
    a->size += a->queue.n;
    a->queue.n = 0;
    a->written_seq = a->seq;
    memcpy(a->written_prev, a->prev, sizeof a->prev);
    a->unsynced = true;
    if (!a->ticking) {
        a->ticking = true;
        orch_timer_set(a->tick, TICK_MS);
    }
    return 0;
}

static int write_head(struct orch_audit *a)
{
    char mac[HEX + 1], text[256];
    cleanup_free char *name = orch_xasprintf("%s.head", a->name);
    head_hmac(&a->key, a->written_seq, a->written_prev, mac);
    int n = snprintf(text, sizeof text, "{\"seq\":%" PRIu64 ",\"hash\":\"%s\",\"hmac\":\"%s\"}\n",
                     a->written_seq, a->written_prev, mac);
    return orch_write_file(a->dir, name, text, (size_t)n, 0600);
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
    int r = write_head(a);
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

void orch_audit_close(struct orch_audit *a)
{
    if (!a)
        return;
    struct orch_err err;
    if (!a->broken && orch_audit_flush(a, &err) < 0)
        orch_log(ORCH_ERROR, "%s", err.msg);
    if (a->ticking)
        sync_and_sign(a);
    if (a->allocated > a->size && ftruncate(a->fd, (off_t)a->size) < 0)
        orch_log(ORCH_WARN, "audit file %s: reserved space cannot be given back: %s", a->path,
                 strerror(errno));
    orch_timer_free(a->tick);
    close(a->fd);
    close(a->dir);
    orch_buf_free(&a->queue);
    free(a->name);
    free(a->path);
    explicit_bzero(&a->key, sizeof a->key);
    free(a);
}

void orch_audit_note(struct orch_audit *a, const char *event, struct orch_slice fields)
{
    struct orch_err err = { 0 };
    if (a && (orch_audit_add(a, event, fields, false, &err) < 0 || orch_audit_flush(a, &err) < 0))
        orch_log(ORCH_ERROR, "%s", err.msg);
}

bool orch_audit_broken(const struct orch_audit *a)
{
    return a->broken;
}

const char *orch_audit_path(const struct orch_audit *a)
{
    return a->path;
}

void orch_audit_digest(struct orch_audit *a, struct orch_slice canonical, char out[65])
{
    /* No head can be made from this: its text begins with a digit, and args are a JSON object. */
    uint8_t mac[ORCH_SHA256_BYTES];
    orch_hmac(&a->key, canonical.p, canonical.n, mac);
    orch_hex(mac, sizeof mac, out);
}

/* ---- reading */

struct verify {
    const char *path;
    struct orch_audit_report *r;
    struct orch_json_doc doc;
    uint64_t offset; /* of the current line in the file */
    char prev[HEX + 1];
};

struct head {
    bool there;
    uint64_t seq;
    char hash[HEX + 1];
    char problem[256]; /* empty: signed with the key */
};

static void problem(struct verify *v, const char *suffix, uint64_t line, const char *fmt, ...)
    ORCH_PRINTF(4, 5);

static void problem(struct verify *v, const char *suffix, uint64_t line, const char *fmt, ...)
{
    struct orch_audit_report *r = v->r;
    int n = snprintf(r->problem, sizeof r->problem, "%.200s%s:%" PRIu64 ": ", v->path, suffix,
                     line);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(r->problem + n, sizeof r->problem - (size_t)n, fmt, ap);
    va_end(ap);
    r->ok = false;
}

static bool is_hex(const char *s, size_t n)
{
    return strspn(s, "0123456789abcdef") >= n;
}

/* A member that is a string of 64 lower-case digits, without escapes. */
static bool get_hash(const struct orch_json_doc *d, const char *key, char out[HEX + 1])
{
    uint32_t i = orch_json_get(d, 0, key);
    const struct orch_json_tok *t = &d->toks[i];
    if (!i || t->type != ORCH_JSON_STRING || t->end - t->start != HEX ||
        !is_hex(d->text + t->start, HEX))
        return false;
    memcpy(out, d->text + t->start, HEX);
    out[HEX] = 0;
    return true;
}

static bool get_seq(const struct orch_json_doc *d, uint64_t *out)
{
    int64_t v;
    uint32_t i = orch_json_get(d, 0, "seq");
    if (!i || !orch_json_int(d, i, &v) || v < 0)
        return false;
    *out = (uint64_t)v;
    return true;
}

/* One line without its newline. True when it continues the chain. */
static bool verify_line(struct verify *v, const char *line, size_t n)
{
    struct orch_audit_report *r = v->r;
    uint64_t at = r->lines + 1, seq;
    struct orch_json_fault fault = { 0 };
    /* Deeper than a message may be: a line wraps the arguments of one. */
    struct orch_json_limits limits = { .bytes = ORCH_AUDIT_LINE_MAX, .depth = 256 };
    char prev[HEX + 1], hash[HEX + 1];
    if (orch_json_scan(&v->doc, (struct orch_slice){ line, n }, &limits, &fault) < 0) {
        problem(v, "", at, "not JSON: %s (byte %zu of the line, %" PRIu64 " of the file)",
                fault.rule, fault.byte, v->offset + fault.byte);
        return false;
    }
    static const char before[] = ",\"hash\":\"";
    if (n < TAIL || memcmp(line + n - TAIL, before, sizeof before - 1) != 0 ||
        !get_hash(&v->doc, "hash", hash)) {
        problem(v, "", at, "the last member is not \"hash\", or is malformed");
        return false;
    }
    char actual[HEX + 1];
    orch_sha256_hex(line, n - TAIL, actual);
    if (memcmp(actual, hash, HEX) != 0)
        problem(v, "", at, "the line was changed: its hash does not fit its bytes");
    else if (!get_seq(&v->doc, &seq) || !get_hash(&v->doc, "prev", prev))
        problem(v, "", at, "no \"seq\" or no \"prev\"");
    else if (seq != at)
        problem(v, "", at,
                "seq is %" PRIu64 ", expected %" PRIu64 ": lines are %s, or out of order", seq, at,
                seq > at ? "missing" : "repeated");
    else if (memcmp(prev, v->prev, HEX) != 0)
        problem(v, "", at, "prev is not the hash of the line before: that one was replaced");
    else
        memcpy(v->prev, hash, sizeof hash);
    return r->ok;
}

static int read_head(const char *path, const char *key_path, struct head *h, struct orch_err *err)
{
    cleanup_free char *file = orch_xasprintf("%s.head", path);
    cleanup_buf struct orch_buf text = { 0 };
    int r = orch_read_file(AT_FDCWD, file, 4096, &text);
    if (r == -ENOENT)
        return 0;
    if (r < 0)
        return orch_err_set(err, -r, "audit head %s: %s", file, strerror(-r));
    h->there = true;
    cleanup_json struct orch_json_doc doc = { 0 };
    struct orch_json_fault fault = { 0 };
    char hmac[HEX + 1], expected[HEX + 1];
    if (orch_json_scan(&doc, (struct orch_slice){ text.p, text.n }, NULL, &fault) < 0) {
        snprintf(h->problem, sizeof h->problem, "not JSON: %s (byte %zu)", fault.rule, fault.byte);
        return 0;
    }
    if (!get_seq(&doc, &h->seq) || !get_hash(&doc, "hash", h->hash) ||
        !get_hash(&doc, "hmac", hmac)) {
        snprintf(h->problem, sizeof h->problem,
                 "\"seq\", \"hash\" or \"hmac\" is missing or malformed");
        return 0;
    }
    if (!key_path)
        return 0;
    struct orch_hmac_key key;
    struct orch_err key_err;
    r = key_read(key_path, &key, &key_err);
    if (r < 0) {
        snprintf(h->problem, sizeof h->problem, "cannot be checked: %s%.180s",
                 r == -ENOENT ? "no key at " : "", r == -ENOENT ? key_path : key_err.msg);
        return 0;
    }
    head_hmac(&key, h->seq, h->hash, expected);
    if (!orch_equal_ct(expected, hmac, HEX))
        snprintf(h->problem, sizeof h->problem,
                 "the signature is wrong: not made with the key %.150s", key_path);
    return 0;
}

/* Reads on at fd into buf. A writer may be in the middle of a write: at the end of a file that does
 * not end with a newline it gets a moment. */
static ssize_t read_more(int fd, struct orch_buf *buf)
{
    orch_buf_reserve(buf, ORCH_AUDIT_LINE_MAX);
    for (bool waited = false;;) {
        ssize_t n = read(fd, buf->p + buf->n, ORCH_AUDIT_LINE_MAX);
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0 && buf->n && !waited) {
            nanosleep(&(struct timespec){ .tv_nsec = 20 * 1000 * 1000 }, NULL);
            waited = true;
            continue;
        }
        if (n > 0)
            buf->n += (size_t)n;
        return n;
    }
}

int orch_audit_verify(const char *path, const char *key_path, const char *expect_head,
                      struct orch_audit_report *r, struct orch_err *err)
{
    *r = (struct orch_audit_report){ .ok = true };
    struct verify v = { .path = path, .r = r };
    memset(v.prev, '0', HEX);
    /* The head before the file: of a file that is being written, the file may only be ahead. */
    struct head head = { 0 };
    int rc = read_head(path, key_path, &head, err);
    if (rc < 0)
        return rc;
    r->has_head = head.there;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return orch_err_set(err, errno, "audit file %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return orch_err_set(err, EINVAL, "audit file %s: not a regular file", path);

    bool head_fits = head.there && head.seq == 0 && memcmp(head.hash, v.prev, HEX) == 0;
    bool expected_seen = false;
    cleanup_buf struct orch_buf buf = { 0 };
    ssize_t n = 0;
    while (r->ok && (n = read_more(fd, &buf)) > 0) {
        size_t done = 0;
        for (const char *nl; r->ok && (nl = memchr(buf.p + done, '\n', buf.n - done));) {
            size_t n_line = (size_t)(nl - (buf.p + done));
            if (!verify_line(&v, buf.p + done, n_line))
                break;
            r->lines++;
            if (r->lines == head.seq)
                head_fits = memcmp(head.hash, v.prev, HEX) == 0;
            if (expect_head && strcmp(expect_head, v.prev) == 0)
                expected_seen = true;
            done += n_line + 1;
            v.offset += n_line + 1;
        }
        orch_buf_consume(&buf, done);
        if (r->ok && buf.n > ORCH_AUDIT_LINE_MAX)
            problem(&v, "", r->lines + 1, "a line of more than %d bytes", ORCH_AUDIT_LINE_MAX);
    }
    orch_json_doc_free(&v.doc);
    if (n < 0)
        return orch_err_set(err, errno, "audit file %s: %s", path, strerror(errno));
    memcpy(r->head_hash, v.prev, sizeof r->head_hash);
    if (r->ok && buf.n)
        problem(&v, "", r->lines + 1,
                "the last line is cut off (%zu bytes without a newline, from byte %" PRIu64
                " of the file)",
                buf.n, v.offset);

    bool signed_head = head.there && !head.problem[0] && head_fits;
    r->unsigned_lines = signed_head ? r->lines - head.seq : r->lines;
    if (!r->ok)
        return 0;
    if (head.problem[0])
        problem(&v, ".head", 1, "%s", head.problem);
    else if (head.there && head.seq > r->lines)
        problem(&v, ".head", 1,
                "names line %" PRIu64 ", but the file ends after line %" PRIu64
                ": lines were cut off",
                head.seq, r->lines);
    else if (head.there && !head_fits)
        problem(&v, ".head", 1,
                "its hash is not that of line %" PRIu64
                ": the lines up to it were replaced, or it belongs to "
                "another file",
                head.seq);
    else if (expect_head && !expected_seen)
        problem(&v, "", r->lines,
                "no line has the expected hash %.64s: lines were cut off or replaced", expect_head);
    return 0;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int orch_audit_list(const char *dir, char ***paths, size_t *n, struct orch_err *err)
{
    *paths = NULL;
    *n = 0;
    DIR *d = opendir(dir);
    if (!d)
        return errno == ENOENT
                   ? 0
                   : orch_err_set(err, errno, "audit folder %s: %s", dir, strerror(errno));
    size_t cap = 0;
    for (struct dirent *e; (e = readdir(d));) {
        size_t length = strlen(e->d_name), suffix = sizeof ".jsonl" - 1;
        if (e->d_name[0] == '.' || length <= suffix ||
            strcmp(e->d_name + length - suffix, ".jsonl") != 0)
            continue;
        if (*n == cap) {
            cap = cap ? 2 * cap : 16;
            *paths = orch_xrealloc(*paths, cap * sizeof **paths);
        }
        (*paths)[(*n)++] = orch_xasprintf("%s/%s", dir, e->d_name);
    }
    closedir(d);
    if (*n)
        qsort(*paths, *n, sizeof **paths, by_name);
    return 0;
}

void orch_audit_list_free(char **paths, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(paths[i]);
    free(paths);
}
