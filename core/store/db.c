#include "db.h"

#include "../base/library.h"

#include <errno.h>
#include <string.h>

#if ORCH_FEATURE_TRUST

#include <fcntl.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <time.h>

enum { SCHEMA = 1, BUSY_MS = 5000 };

struct orch_db {
    sqlite3 *handle;
    char *path;
};

/* What is used of SQLite, loaded at the first open. */
#define FUNCTIONS(X) \
    X(open_v2) \
    X(close) \
    X(busy_timeout) \
    X(exec) \
    X(prepare_v2) \
    X(finalize) \
    X(step) \
    X(reset) \
    X(bind_text) \
    X(bind_int64) \
    X(column_text) \
    X(column_bytes) \
    X(column_int64) \
    X(extended_errcode) \
    X(errmsg) \
    X(errstr)

static struct {
#define X(name) __typeof__(&sqlite3_##name) name;
    FUNCTIONS(X)
#undef X
} sq;

ORCH_LIBRARY(sq, FUNCTIONS, .what = "state database", .file = "libsqlite3.so.0",
             .package = "libsqlite3-0", .prefix = "sqlite3_", .cls = ORCH_CLASS_FAILED);

/* The error of the last call on db. Damage never removes anything: the file is the only record. */
static int fail(const struct orch_db *db, int rc, struct orch_err *err)
{
    bool last = db->handle && (sq.extended_errcode(db->handle) & 0xff) == (rc & 0xff);
    const char *text = last ? sq.errmsg(db->handle) : sq.errstr(rc);
    switch (rc & 0xff) {
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
        return orch_err_set(
            err, EUCLEAN,
            "state database %s is damaged (%s): move it away (mv %s %s.damaged) and run "
            "orch trust again for each folder; nothing was changed",
            db->path, text, db->path, db->path);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return orch_err_set(err, EBUSY, "state database %s: another process held it for %d s: %s",
                            db->path, BUSY_MS / 1000, text);
    case SQLITE_FULL:
        return orch_err_set(err, ENOSPC, "state database %s: %s", db->path, text);
    case SQLITE_READONLY:
        return orch_err_set(err, EROFS, "state database %s: %s", db->path, text);
    case SQLITE_CANTOPEN:
    case SQLITE_PERM:
        return orch_err_set(err, EACCES, "state database %s: %s", db->path, text);
    default:
        return orch_err_set(err, EIO, "state database %s: %s", db->path, text);
    }
}

static int run(struct orch_db *db, const char *sql, struct orch_err *err)
{
    int rc = sq.exec(db->handle, sql, NULL, NULL, NULL);
    return rc == SQLITE_OK ? 0 : fail(db, rc, err);
}

static void finalize(sqlite3_stmt **s)
{
    sq.finalize(*s);
}
#define cleanup_stmt ORCH_CLEANUP(finalize)

static int prepare(struct orch_db *db, const char *sql, sqlite3_stmt **s, struct orch_err *err)
{
    int rc = sq.prepare_v2(db->handle, sql, -1, s, NULL);
    return rc == SQLITE_OK ? 0 : fail(db, rc, err);
}

/* 1 when there is a row, 0 at the end. */
static int step(struct orch_db *db, sqlite3_stmt *s, struct orch_err *err)
{
    int rc = sq.step(s);
    return rc == SQLITE_ROW ? 1 : rc == SQLITE_DONE ? 0 : fail(db, rc, err);
}

static int bind(struct orch_db *db, sqlite3_stmt *s, int at, const char *text, struct orch_err *err)
{
    int rc = sq.bind_text(s, at, text, -1, SQLITE_STATIC);
    return rc == SQLITE_OK ? 0 : fail(db, rc, err);
}

static int number(struct orch_db *db, const char *sql, int64_t *out, struct orch_err *err)
{
    cleanup_stmt sqlite3_stmt *s = NULL;
    int r = prepare(db, sql, &s, err);
    if (r == 0 && (r = step(db, s, err)) > 0)
        *out = sq.column_int64(s, 0);
    return r < 0 ? r : 0;
}

/* Made before SQLite sees it, which would follow a link and make it as open as the umask allows. */
static int make_file(const char *path, struct orch_err *err)
{
    int r = orch_mkdir_of(path, 0700);
    if (r < 0)
        return orch_err_set(err, -r, "state database: folder of %s: %s", path, strerror(-r));
    cleanup_close int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        return orch_err_set(err, errno, "state database %s: %s", path,
                            errno == ELOOP
                                ? "is a symbolic link, which is not followed: move it away"
                                : strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 077))
        return orch_err_set(err, EPERM,
                            "state database %s: must be a regular file of this user with mode 0600 "
                            "(is %04o, uid %u): chmod 600 it if nobody else can have written to it",
                            path, (unsigned)st.st_mode & 07777, (unsigned)st.st_uid);
    return 0;
}

static const char schema[] = "CREATE TABLE trust(dir TEXT PRIMARY KEY NOT NULL, edits INTEGER NOT "
                             "NULL, at INTEGER NOT NULL) WITHOUT ROWID;"
                             "CREATE TABLE trust_file(dir TEXT NOT NULL, path TEXT NOT NULL, "
                             "sha256 TEXT NOT NULL, PRIMARY KEY(dir, path))"
                             " WITHOUT ROWID;"
                             "PRAGMA user_version = 1;"; /* = SCHEMA */

static int check_schema(struct orch_db *db, struct orch_err *err)
{
    int64_t version = 0, tables = 0;
    int r = number(db, "PRAGMA user_version", &version, err);
    if (r == 0 && version == SCHEMA)
        return 0;
    /* Empty, or made by another process just now: look again with the file to ourselves. */
    if (r < 0 || (r = run(db, "BEGIN IMMEDIATE", err)) < 0 ||
        (r = number(db, "PRAGMA user_version", &version, err)) < 0 ||
        (r = number(db, "SELECT count(*) FROM sqlite_master", &tables, err)) < 0)
        return r;
    if (version == 0 && tables == 0) {
        r = run(db, schema, err);
        return r < 0 ? r : run(db, "COMMIT", err);
    }
    if (version == SCHEMA)
        return run(db, "COMMIT", err);
    return orch_err_set(
        err, EPROTO,
        "state database %s: has format %lld, this orch knows %d: use the orch that made it, or "
        "move it away; nothing was changed",
        db->path, (long long)version, SCHEMA);
}

struct orch_db *orch_db_open(const char *path, struct orch_err *err)
{
    if (orch_library_load(&library, err) < 0 || make_file(path, err) < 0)
        return NULL;
    struct orch_db *db = orch_xcalloc(1, sizeof *db);
    db->path = orch_xstrdup(path);
    int rc = sq.open_v2(path, &db->handle, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL);
    int r = rc == SQLITE_OK ? 0 : fail(db, rc, err);
    if (r == 0) {
        sq.busy_timeout(db->handle, BUSY_MS);
        /* No WAL: its two files beside the database would have to be trusted and moved with it. */
        r = run(
            db,
            "PRAGMA trusted_schema = OFF; PRAGMA journal_mode = DELETE; PRAGMA synchronous = FULL",
            err);
    }
    if (r == 0)
        r = check_schema(db, err);
    if (r < 0) {
        orch_db_close(db);
        return NULL;
    }
    return db;
}

void orch_db_close(struct orch_db *db)
{
    if (!db)
        return;
    sq.close(db->handle); /* also rolls back what is open */
    free(db->path);
    free(db);
}

static int forget(struct orch_db *db, const char *dir, struct orch_err *err)
{
    static const char *const sql[] = { "DELETE FROM trust_file WHERE dir = ?",
                                       "DELETE FROM trust WHERE dir = ?" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(sql); i++) {
        cleanup_stmt sqlite3_stmt *s = NULL;
        int r = prepare(db, sql[i], &s, err);
        if (r < 0 || (r = bind(db, s, 1, dir, err)) < 0 || (r = step(db, s, err)) < 0)
            return r;
    }
    return 0;
}

static int record(struct orch_db *db, const char *dir, bool edits,
                  const struct orch_trust_file *files, size_t n, struct orch_err *err)
{
    cleanup_stmt sqlite3_stmt *folder = NULL, *file = NULL;
    int r = prepare(db, "INSERT INTO trust(dir, edits, at) VALUES(?, ?, ?)", &folder, err);
    if (r < 0 || (r = bind(db, folder, 1, dir, err)) < 0)
        return r;
    sq.bind_int64(folder, 2, edits);
    sq.bind_int64(folder, 3, time(NULL));
    if ((r = step(db, folder, err)) < 0 ||
        (r = prepare(db, "INSERT INTO trust_file(dir, path, sha256) VALUES(?, ?, ?)", &file, err)) <
            0)
        return r;
    for (size_t i = 0; i < n; i++) {
        if ((r = bind(db, file, 1, dir, err)) < 0 ||
            (r = bind(db, file, 2, files[i].path, err)) < 0 ||
            (r = bind(db, file, 3, files[i].sha256, err)) < 0 || (r = step(db, file, err)) < 0)
            return r;
        sq.reset(file);
    }
    return 0;
}

/* Commits when r is 0; else undoes what was begun, keeping err. */
static int end(struct orch_db *db, int r, struct orch_err *err)
{
    if (r == 0)
        r = run(db, "COMMIT", err);
    if (r < 0)
        run(db, "ROLLBACK", NULL);
    return r;
}

int orch_db_trust_set(struct orch_db *db, const char *dir, bool edits,
                      const struct orch_trust_file *files, size_t n, struct orch_err *err)
{
    int r = run(db, "BEGIN IMMEDIATE", err);
    if (r < 0)
        return r;
    r = forget(db, dir, err);
    if (r == 0)
        r = record(db, dir, edits, files, n, err);
    return end(db, r, err);
}

int orch_db_trust_forget(struct orch_db *db, const char *dir, struct orch_err *err)
{
    int r = run(db, "BEGIN IMMEDIATE", err);
    return r < 0 ? r : end(db, forget(db, dir, err), err);
}

int orch_db_trust_get(struct orch_db *db, const char *dir, bool *edits,
                      struct orch_trust_file **files, size_t *n, struct orch_err *err)
{
    *files = NULL;
    *n = 0;
    *edits = false;
    cleanup_stmt sqlite3_stmt *s = NULL;
    /* One statement, so that both tables are of one moment. */
    int r = prepare(
        db,
        "SELECT t.edits, f.path, f.sha256 FROM trust t LEFT JOIN trust_file f ON f.dir = t.dir "
        "WHERE t.dir = ? ORDER BY f.path",
        &s, err);
    if (r < 0 || (r = bind(db, s, 1, dir, err)) < 0)
        return r;
    bool found = false;
    size_t cap = 0;
    while ((r = step(db, s, err)) > 0) {
        found = true;
        *edits = sq.column_int64(s, 0);
        const char *path = (const char *)sq.column_text(s, 1);
        if (!path)
            continue; /* trusted, without any file */
        const char *sha256 = (const char *)sq.column_text(s, 2);
        if (!sha256 || sq.column_bytes(s, 2) != 64) {
            r = fail(db, SQLITE_CORRUPT, err);
            break;
        }
        if (*n == cap) {
            cap = cap ? 2 * cap : 16;
            *files = orch_xrealloc(*files, cap * sizeof **files);
        }
        struct orch_trust_file *f = &(*files)[(*n)++];
        f->path = orch_xstrdup(path);
        memcpy(f->sha256, sha256, sizeof f->sha256);
    }
    if (r < 0) {
        orch_trust_files_free(*files, *n);
        *files = NULL;
        *n = 0;
        *edits = false;
        return r;
    }
    return found;
}

#else /* without the feature nothing can be opened, so the rest is never reached with a database */

struct orch_db *orch_db_open(const char *path, struct orch_err *err)
{
    orch_err_set(err, ENOTSUP,
                 "state database %s: this orch was built without the trust feature "
                 "(make FEATURES=\"... trust\")",
                 path);
    return NULL;
}

void orch_db_close(struct orch_db *db)
{
    (void)db;
}

static int without(struct orch_err *err)
{
    return orch_err_set(err, ENOTSUP,
                        "built without the trust feature (make FEATURES=\"... trust\")");
}

int orch_db_trust_set(struct orch_db *db, const char *dir, bool edits,
                      const struct orch_trust_file *files, size_t n, struct orch_err *err)
{
    (void)db, (void)dir, (void)edits, (void)files, (void)n;
    return without(err);
}

int orch_db_trust_forget(struct orch_db *db, const char *dir, struct orch_err *err)
{
    (void)db, (void)dir;
    return without(err);
}

int orch_db_trust_get(struct orch_db *db, const char *dir, bool *edits,
                      struct orch_trust_file **files, size_t *n, struct orch_err *err)
{
    (void)db, (void)dir, (void)edits, (void)files, (void)n;
    return without(err);
}

#endif

void orch_trust_files_free(struct orch_trust_file *files, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(files[i].path);
    free(files);
}
