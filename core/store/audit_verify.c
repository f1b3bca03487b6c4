/* Reading the audit log: whether each file is what was written, and the folder all of them. */
#include "audit_int.h"

#include "../base/json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { HEX = ORCH_AUDIT_HEX };

/* What a line says of another file. */
struct claim {
    struct orch_audit_point at;
    enum { BEFORE, LOST, PRUNED } kind;
    char by[ORCH_AUDIT_NAME_MAX];
    uint64_t line;
};

struct claims {
    struct claim *list;
    size_t n;
};

struct verify {
    const char *path, *name;
    struct orch_audit_report *r;
    struct claims *claims; /* what is said of others is added; NULL: of no interest */
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

static void put_problem(struct orch_audit_report *r, const char *fmt, ...) ORCH_PRINTF(2, 3);

static void put_problem(struct orch_audit_report *r, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(r->problem, sizeof r->problem, fmt, ap);
    va_end(ap);
    r->ok = false;
}

#define problem(v, suffix, line, fmt, ...) \
    put_problem((v)->r, "%.200s%s:%" PRIu64 ": " fmt, (v)->path, suffix, \
                (uint64_t)(line)__VA_OPT__(, ) __VA_ARGS__)

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

/* ---- a line */

static bool get_point(const struct orch_json_doc *d, uint32_t obj, struct orch_audit_point *p)
{
    cleanup_buf struct orch_buf name = { 0 };
    int64_t seq;
    uint32_t i = orch_json_get(d, obj, "hash"), n = orch_json_get(d, obj, "seq");
    if (!i || !n || orch_json_string(d, orch_json_get(d, obj, "file"), &name) < 0 || !name.n ||
        name.n >= sizeof p->file || strchr(name.p, '/') || !orch_json_int(d, n, &seq) || seq < 0 ||
        d->toks[i].end - d->toks[i].start != HEX)
        return false;
    memcpy(p->file, name.p, name.n + 1);
    p->seq = (uint64_t)seq;
    memcpy(p->hash, d->text + d->toks[i].start, HEX);
    p->hash[HEX] = 0;
    return true;
}

/* False: it is there and malformed. */
static bool take_claim(struct verify *v, const char *key, int kind)
{
    uint32_t i = orch_json_get(&v->doc, 0, key);
    struct claim c = { .kind = kind, .line = v->r->lines + 1 };
    if (!i || v->doc.toks[i].type == ORCH_JSON_NULL)
        return true;
    if (!get_point(&v->doc, i, &c.at))
        return false;
    snprintf(c.by, sizeof c.by, "%s", v->name);
    if (v->claims) {
        v->claims->list = orch_xrealloc(v->claims->list,
                                        (v->claims->n + 1) * sizeof *v->claims->list);
        v->claims->list[v->claims->n++] = c;
    }
    return true;
}

/* What a line is for the file and the folder, by its event. */
static void take_event(struct verify *v, uint64_t at)
{
    struct orch_audit_report *r = v->r;
    uint32_t event = orch_json_get(&v->doc, 0, "event");
    bool start = orch_json_string_eq(&v->doc, event, "start");
    if (r->ended) {
        problem(v, "", at, "unsigned, and after the line that ended the file: it was added");
    } else if (start != (at == 1)) {
        problem(v, "", at, "%s",
                start ? "a first line in the middle of the file"
                      : "this is not how a file of the log begins");
    } else if (start) {
        uint32_t file = orch_json_get(&v->doc, 0, "file");
        if (!orch_json_string_eq(&v->doc, file, v->name))
            problem(v, "", at, "this file had another name when it was made: %.64s",
                    orch_json_raw(&v->doc, file).p);
        else if (!take_claim(v, "before", BEFORE) || !take_claim(v, "lost", LOST))
            problem(v, "", at, "what it says of the file before is malformed");
    } else if (orch_json_string_eq(&v->doc, event, "prune")) {
        if (!take_claim(v, "until", PRUNED))
            problem(v, "", at, "what it says of the files that were removed is malformed");
    } else {
        r->ended = orch_json_string_eq(&v->doc, event, "end");
    }
}

/* One line without its newline. True when it continues the chain. */
static bool verify_line(struct verify *v, const char *line, size_t n)
{
    struct orch_audit_report *r = v->r;
    uint64_t at = r->lines + 1, seq;
    struct orch_json_fault fault = { 0 };
    struct orch_json_limits limits = { .bytes = ORCH_AUDIT_LINE_MAX,
                                       .depth = ORCH_AUDIT_DEPTH_MAX };
    char prev[HEX + 1], hash[HEX + 1];
    if (orch_json_scan(&v->doc, (struct orch_slice){ line, n }, &limits, &fault) < 0) {
        problem(v, "", at, "not JSON: %s (byte %zu of the line, %" PRIu64 " of the file)",
                fault.rule, fault.byte, v->offset + fault.byte);
        return false;
    }
    static const char before[] = ",\"hash\":\"";
    if (n < ORCH_AUDIT_TAIL || memcmp(line + n - ORCH_AUDIT_TAIL, before, sizeof before - 1) != 0 ||
        !get_hash(&v->doc, "hash", hash)) {
        problem(v, "", at, "the last member is not \"hash\", or is malformed");
        return false;
    }
    char actual[HEX + 1];
    orch_sha256_hex(line, n - ORCH_AUDIT_TAIL, actual);
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
        take_event(v, at);
    if (r->ok)
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
    r = orch_audit_key_read(key_path, &key, &key_err);
    if (r < 0) {
        snprintf(h->problem, sizeof h->problem, "cannot be checked: %s%.180s",
                 r == -ENOENT ? "no key at " : "", r == -ENOENT ? key_path : key_err.msg);
        return 0;
    }
    orch_audit_head_hmac(&key, h->seq, h->hash, expected);
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

/* What the file's end, its head and its writer say together. */
static void judge_end(struct verify *v, const struct head *head, bool head_fits, size_t cut)
{
    struct orch_audit_report *r = v->r;
    if (cut && (head->seq > r->lines || r->ended))
        problem(v, "", r->lines + 1,
                "the last line is cut off (%zu bytes without a newline, from byte %" PRIu64
                " of the file)",
                cut, v->offset);
    else if (!r->lines && !head->there)
        problem(v, "", 1, "it is empty: its lines were removed");
    else if (!head->there)
        problem(v, ".head", 1, "missing: every file has one from its first line on");
    else if (head->problem[0])
        problem(v, ".head", 1, "%s", head->problem);
    else if (head->seq > r->lines)
        problem(v, ".head", 1,
                "names line %" PRIu64 ", but the file ends after line %" PRIu64
                ": lines were cut off",
                head->seq, r->lines);
    else if (!head_fits)
        problem(v, ".head", 1,
                "its hash is not that of line %" PRIu64
                ": the lines up to it were replaced, or it belongs to "
                "another file",
                head->seq);
    else if (r->ended && !r->running && head->seq < r->lines)
        problem(v, ".head", 1, "names line %" PRIu64 " of a file that ended with line %" PRIu64,
                head->seq, r->lines);
    r->cut = r->ok ? cut : 0;
}

struct wanted {
    const struct claims *claims; /* of later files */
    const char *hash;            /* kept elsewhere; NULL */
    bool seen;
};

/* A later file named this line. */
static void check_claims(struct verify *v, const struct wanted *w, bool at_end)
{
    for (size_t i = 0; v->r->ok && w->claims && i < w->claims->n; i++) {
        const struct claim *c = &w->claims->list[i];
        if (strcmp(c->at.file, v->name) != 0)
            continue;
        if (!at_end && c->at.seq == v->r->lines && memcmp(c->at.hash, v->prev, HEX) != 0)
            problem(v, "", v->r->lines, "replaced: it is not the line that %s names", c->by);
        else if (at_end && c->at.seq > v->r->lines)
            problem(v, "", v->r->lines,
                    "the last line, but %s names line %" PRIu64 ": lines were cut off", c->by,
                    c->at.seq);
    }
}

static int verify_file(const char *path, const char *key_path, struct wanted *w,
                       struct claims *claims, struct orch_audit_report *r, struct orch_err *err)
{
    *r = (struct orch_audit_report){ .ok = true };
    const char *slash = strrchr(path, '/');
    struct verify v = { .path = path, .name = slash ? slash + 1 : path, .r = r, .claims = claims };
    size_t first_claim = claims ? claims->n : 0;
    memset(v.prev, '0', HEX);
    /* The writer before the head, the head before the file: of a file that is being written, the
     * file may only be ahead. */
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return orch_err_set(err, errno, "audit file %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return orch_err_set(err, EINVAL, "audit file %s: not a regular file", path);
    r->running = orch_audit_written(fd);
    struct head head = { 0 };
    int rc = read_head(path, key_path, &head, err);
    if (rc < 0)
        return rc;
    r->has_head = head.there;

    bool head_fits = false;
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
            if (w->hash && strcmp(w->hash, v.prev) == 0)
                w->seen = true;
            check_claims(&v, w, false);
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
    bool signed_head = head.there && !head.problem[0] && head_fits;
    r->unsigned_lines = signed_head ? r->lines - head.seq : r->lines;
    if (r->ok)
        judge_end(&v, &head, head_fits, buf.n);
    check_claims(&v, w, true);
    /* That files were removed is believed of a signed line only. */
    for (size_t i = first_claim; claims && i < claims->n;)
        if (claims->list[i].kind == PRUNED && (!signed_head || claims->list[i].line > head.seq))
            claims->list[i] = claims->list[--claims->n];
        else
            i++;
    return 0;
}

int orch_audit_verify(const char *path, const char *key_path, const char *expect_head,
                      struct orch_audit_report *r, struct orch_err *err)
{
    struct wanted w = { .hash = expect_head };
    int rc = verify_file(path, key_path, &w, NULL, r, err);
    if (rc == 0 && r->ok && expect_head && !w.seen)
        put_problem(r,
                    "%.200s:%" PRIu64
                    ": no line has the expected hash %.64s: lines were cut off or replaced",
                    path, r->lines, expect_head);
    return rc;
}

/* ---- the folder */

struct set {
    const char *dir;
    struct orch_audit_summary *s;
    orch_audit_each_fn *each;
    void *ud;
    struct claims claims;
    char **names, **told; /* told: files that are missing, and said to be */
    size_t n, n_told;
    char pruned[ORCH_AUDIT_NAME_MAX]; /* the last file that was removed because it was old */
    char newest[ORCH_AUDIT_NAME_MAX];
};

static void tell(struct set *t, const char *path, const struct orch_audit_report *r)
{
    struct orch_audit_summary *s = t->s;
    if (!r->ok && !s->bad++)
        snprintf(s->problem, sizeof s->problem, "%s", r->problem);
    if (t->each)
        t->each(t->ud, path, r);
}

static bool has_name(char *const *names, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(names[i], name) == 0)
            return true;
    return false;
}

static void missing(struct set *t, const char *name, const char *why)
{
    if (has_name(t->names, t->n, name) || has_name(t->told, t->n_told, name) ||
        strcmp(name, t->pruned) <= 0)
        return;
    t->told = orch_xrealloc(t->told, (t->n_told + 1) * sizeof *t->told);
    t->told[t->n_told++] = orch_xstrdup(name);
    cleanup_free char *path = orch_xasprintf("%s/%s", t->dir, name);
    struct orch_audit_report r = { .missing = true };
    put_problem(&r, "%.200s: missing: %.200s", path, why);
    tell(t, path, &r);
}

static void find_missing(struct set *t, int dir)
{
    for (int kind = LOST; kind >= BEFORE; kind--) /* the one that says more */
        for (size_t i = 0; i < t->claims.n; i++) {
            const struct claim *c = &t->claims.list[i];
            char why[256];
            snprintf(why, sizeof why, "%s:%" PRIu64 " %s", c->by, c->line,
                     kind == LOST ? "says that it was lost while it was written"
                                  : "names it as the file before");
            if ((int)c->kind == kind)
                missing(t, c->at.file, why);
        }
    if (*t->newest)
        missing(t, t->newest, "the folder's record says that it is the newest");
    char **heads;
    size_t n;
    if (orch_audit_names(dir, ".jsonl.head", &heads, &n) < 0)
        return;
    for (size_t i = 0; i < n; i++) {
        heads[i][strlen(heads[i]) - strlen(".head")] = 0;
        /* its process was killed before it had made the file */
        if (!*t->newest || strcmp(heads[i], t->newest) <= 0)
            missing(t, heads[i], "its head is there");
    }
    orch_audit_list_free(heads, n);
}

/* Each file names the one before; of one that is not there find_missing tells. */
static void check_order(struct set *t, size_t i, struct orch_audit_report *r)
{
    const char *before = NULL;
    for (size_t k = 0; k < t->claims.n && !before; k++)
        if (t->claims.list[k].kind == BEFORE && strcmp(t->claims.list[k].by, t->names[i]) == 0)
            before = t->claims.list[k].at.file;
    if (r->ok && i > 0 && (!before || strcmp(before, t->names[i - 1]) < 0))
        put_problem(r, "%.200s/%s:1: does not name %s as the file before", t->dir, t->names[i],
                    t->names[i - 1]);
}

static void count(struct set *t, const struct orch_audit_report *r)
{
    struct orch_audit_summary *s = t->s;
    s->files++;
    s->lines += r->lines;
    s->unsigned_lines += r->unsigned_lines;
    s->running += r->running;
    s->crashed += r->ok && !r->running && !r->ended;
}

static void verify_all(struct set *t, const char *key_path, const char *expect_head)
{
    cleanup_free struct orch_audit_report *all = orch_xcalloc(t->n + 1, sizeof *all);
    struct wanted w = { .hash = expect_head };
    /* From the newest on: what is said of a file is known before it is read. */
    for (size_t i = t->n; i-- > 0;) {
        cleanup_free char *path = orch_xasprintf("%s/%s", t->dir, t->names[i]);
        struct claims later = t->claims, own = { 0 };
        w.claims = &later;
        struct orch_err why = { 0 };
        if (verify_file(path, key_path, &w, &own, &all[i], &why) < 0)
            put_problem(&all[i], "%s", why.msg);
        for (size_t k = 0; k < own.n; k++) {
            if (own.list[k].kind == PRUNED && strcmp(own.list[k].at.file, t->pruned) > 0)
                memcpy(t->pruned, own.list[k].at.file, sizeof t->pruned);
            t->claims.list = orch_xrealloc(t->claims.list,
                                           (t->claims.n + 1) * sizeof *t->claims.list);
            t->claims.list[t->claims.n++] = own.list[k];
        }
        free(own.list);
        check_order(t, i, &all[i]);
    }
    for (size_t i = 0; i < t->n; i++) {
        cleanup_free char *path = orch_xasprintf("%s/%s", t->dir, t->names[i]);
        count(t, &all[i]);
        tell(t, path, &all[i]);
    }
    t->s->head_seen = w.seen;
    memcpy(t->s->head_hash, all[t->n ? t->n - 1 : 0].head_hash, sizeof t->s->head_hash);
}

int orch_audit_verify_dir(const char *dir, const char *key_path, const char *expect_head,
                          orch_audit_each_fn *each, void *ud, struct orch_audit_summary *s,
                          struct orch_err *err)
{
    *s = (struct orch_audit_summary){ 0 };
    struct set t = { .dir = dir, .s = s, .each = each, .ud = ud };
    struct orch_hmac_key key;
    struct orch_err key_err;
    cleanup_close int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT
                   ? 0
                   : orch_err_set(err, errno, "audit folder %s: %s", dir, strerror(errno));
    bool keyed = key_path && orch_audit_key_read(key_path, &key, &key_err) == 0;
    /* The record before the files: one that is made meanwhile is only newer. */
    const char *why = NULL;
    int newest = orch_audit_newest_read(fd, keyed ? &key : NULL, t.newest, &why);
    int r = orch_audit_names(fd, ".jsonl", &t.names, &t.n);
    if (r < 0)
        return orch_err_set(err, -r, "audit folder %s: %s", dir, strerror(-r));
    verify_all(&t, key_path, expect_head);
    if (newest < 0 && t.n) {
        cleanup_free char *path = orch_xasprintf("%s/" ORCH_AUDIT_NEWEST, dir);
        struct orch_audit_report report = { .missing = newest == -ENOENT };
        put_problem(&report, "%.200s: %s: the newest files may be missing", path, why);
        tell(&t, path, &report);
    }
    find_missing(&t, fd);
    s->ok = !s->bad && (!expect_head || s->head_seen);
    if (*t.pruned)
        snprintf(s->pruned, sizeof s->pruned, "%s", t.pruned);
    free(t.claims.list);
    orch_audit_list_free(t.names, t.n);
    orch_audit_list_free(t.told, t.n_told);
    return 0;
}
