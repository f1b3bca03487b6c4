/* The audit log's folder: its key, its files by name, which is the newest, which are kept. */
#include "audit_int.h"

#include "../base/json.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum {
    KEY_BYTES = 32,
    HEX = ORCH_AUDIT_HEX,
    LOCK_TRIES = 2000, /* a millisecond each: what is done under the lock takes less than one */
};

/* ---- the key */

int orch_audit_key_read(const char *path, struct orch_hmac_key *key, struct orch_err *err)
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

int orch_audit_key_need(const char *path, struct orch_hmac_key *key, struct orch_err *err)
{
    int r = orch_audit_key_read(path, key, err);
    if (r == -ENOENT && (r = key_make(path, err)) == 0 &&
        (r = orch_audit_key_read(path, key, err)) == -ENOENT)
        orch_err_set(err, ENOENT, "audit key %s: vanished while it was made", path);
    return r;
}

int orch_audit_lock(const char *key_path, struct orch_err *err)
{
    cleanup_close int fd = open(key_path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return orch_err_set(err, errno, "audit key %s: %s", key_path, strerror(errno));
    struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    for (int tries = 0; fcntl(fd, F_OFD_SETLK, &whole) < 0; tries++) {
        if ((errno != EAGAIN && errno != EACCES && errno != EINTR) || tries == LOCK_TRIES)
            return orch_err_set(err, errno, "audit key %s: another process holds it: %s", key_path,
                                strerror(errno));
        nanosleep(&(struct timespec){ .tv_nsec = 1000 * 1000 }, NULL);
    }
    return orch_steal_fd(&fd);
}

/* ---- the folder */

int orch_audit_dir_open(const char *dir, struct orch_err *err)
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

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* YYYYMMDDThhmmss.mmmZ-PID.jsonl: other files in the folder are somebody's own. */
static bool is_name(const char *name, size_t n, const char *suffix)
{
    static const char form[] = "00000000T000000.000Z-";
    size_t n_form = sizeof form - 1, n_suffix = strlen(suffix);
    if (n <= n_form + n_suffix || n >= ORCH_AUDIT_NAME_MAX ||
        strcmp(name + n - n_suffix, suffix) != 0)
        return false;
    for (size_t i = 0; i < n - n_suffix; i++) {
        char want = i < n_form ? form[i] : '0';
        if (want == '0' ? name[i] < '0' || name[i] > '9' : name[i] != want)
            return false;
    }
    return true;
}

int orch_audit_names(int dir, const char *suffix, char ***names, size_t *n)
{
    *names = NULL;
    *n = 0;
    cleanup_close int own = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = own < 0 ? NULL : fdopendir(own);
    if (!d)
        return -errno;
    own = -1;
    size_t cap = 0;
    for (struct dirent *e; (e = readdir(d));) {
        if (!is_name(e->d_name, strlen(e->d_name), suffix))
            continue;
        if (*n == cap) {
            cap = cap ? 2 * cap : 16;
            *names = orch_xrealloc(*names, cap * sizeof **names);
        }
        (*names)[(*n)++] = orch_xstrdup(e->d_name);
    }
    closedir(d);
    if (*n)
        qsort(*names, *n, sizeof **names, by_name);
    return 0;
}

int orch_audit_list(const char *dir, char ***paths, size_t *n, struct orch_err *err)
{
    *paths = NULL;
    *n = 0;
    cleanup_close int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int r = fd < 0 ? -errno : orch_audit_names(fd, ".jsonl", paths, n);
    if (r < 0)
        return r == -ENOENT ? 0 : orch_err_set(err, -r, "audit folder %s: %s", dir, strerror(-r));
    for (size_t i = 0; i < *n; i++) {
        char *name = (*paths)[i];
        (*paths)[i] = orch_xasprintf("%s/%s", dir, name);
        free(name);
    }
    return 0;
}

void orch_audit_list_free(char **paths, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(paths[i]);
    free(paths);
}

/* ---- its small files */

void orch_audit_head_hmac(const struct orch_hmac_key *key, uint64_t seq, const char *hash,
                          char out[HEX + 1])
{
    char text[24 + HEX];
    int n = snprintf(text, sizeof text, "%" PRIu64 ":%s", seq, hash);
    uint8_t mac[ORCH_SHA256_BYTES];
    orch_hmac(key, text, (size_t)n, mac);
    orch_hex(mac, sizeof mac, out);
}

int orch_audit_head_write(int dir, const char *name, const struct orch_hmac_key *key, uint64_t seq,
                          const char *hash)
{
    char mac[HEX + 1], text[256];
    cleanup_free char *file = orch_xasprintf("%s.head", name);
    orch_audit_head_hmac(key, seq, hash, mac);
    int n = snprintf(text, sizeof text, "{\"seq\":%" PRIu64 ",\"hash\":\"%s\",\"hmac\":\"%s\"}\n",
                     seq, hash, mac);
    return orch_write_file(dir, file, text, (size_t)n, 0600);
}

static void newest_hmac(const struct orch_hmac_key *key, const char *name, char out[HEX + 1])
{
    cleanup_free char *text = orch_xasprintf(ORCH_AUDIT_NEWEST ":%s", name);
    uint8_t mac[ORCH_SHA256_BYTES];
    orch_hmac(key, text, strlen(text), mac);
    orch_hex(mac, sizeof mac, out);
}

int orch_audit_newest_write(int dir, const struct orch_hmac_key *key, const char *name)
{
    char mac[HEX + 1];
    newest_hmac(key, name, mac);
    cleanup_free char *text = orch_xasprintf("{\"file\":\"%s\",\"hmac\":\"%s\"}\n", name, mac);
    return orch_write_file(dir, ORCH_AUDIT_NEWEST, text, strlen(text), 0600);
}

int orch_audit_newest_read(int dir, const struct orch_hmac_key *key, char name[ORCH_AUDIT_NAME_MAX],
                           const char **why)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf file = { 0 };
    struct orch_json_fault fault = { 0 };
    char expected[HEX + 1];
    int r = orch_read_file(dir, ORCH_AUDIT_NEWEST, 4096, &text);
    *why = r == -ENOENT ? "is missing" : "cannot be read";
    if (r == -ENOENT)
        return r;
    if (r < 0 || orch_json_scan(&d, (struct orch_slice){ text.p, text.n }, NULL, &fault) < 0 ||
        orch_json_string(&d, orch_json_get(&d, 0, "file"), &file) < 0 || !file.n ||
        file.n >= ORCH_AUDIT_NAME_MAX || strchr(file.p, '/'))
        return -EBADMSG;
    if (key) {
        newest_hmac(key, file.p, expected);
        if (!orch_json_string_eq(&d, orch_json_get(&d, 0, "hmac"), expected)) {
            *why = "has a wrong signature";
            return -EBADMSG;
        }
    }
    memcpy(name, file.p, file.n + 1);
    return 0;
}

/* ---- its files */

/* A line's place is known: {"ts":"…","seq":N, at its beginning, the hash at its end. */
static bool take_line(const char *line, size_t n, struct orch_audit_point *p)
{
    static const char seq[] = "\",\"seq\":", hash[] = ",\"hash\":\"";
    size_t at = sizeof "{\"ts\":\"yyyy-mm-ddThh:mm:ss.mmmZ" - 1;
    if (n < at + sizeof seq + ORCH_AUDIT_TAIL || memcmp(line + at, seq, sizeof seq - 1) != 0 ||
        memcmp(line + n - ORCH_AUDIT_TAIL, hash, sizeof hash - 1) != 0)
        return false;
    p->seq = strtoull(line + at + sizeof seq - 1, NULL, 10);
    memcpy(p->hash, line + n - 2 - HEX, HEX);
    p->hash[HEX] = 0;
    return strspn(p->hash, "0123456789abcdef") == HEX;
}

void orch_audit_last_line(int dir, struct orch_audit_point *p)
{
    p->seq = 0;
    memset(p->hash, '0', HEX);
    p->hash[HEX] = 0;
    cleanup_close int fd = openat(dir, p->file, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        return;
    cleanup_buf struct orch_buf end = { 0 };
    /* Mostly it is short; a cut one of the longest may follow. */
    for (size_t most = 8192; most <= 2 * ORCH_AUDIT_LINE_MAX; most = 2 * ORCH_AUDIT_LINE_MAX) {
        off_t from = st.st_size > (off_t)most ? st.st_size - (off_t)most : 0;
        end.n = 0;
        orch_buf_reserve(&end, most);
        ssize_t got = pread(fd, end.p, most, from);
        const char *nl = got > 0 ? memrchr(end.p, '\n', (size_t)got) : NULL;
        const char *before = nl && nl > end.p ? memrchr(end.p, '\n', (size_t)(nl - end.p)) : NULL;
        if (nl && (before || from == 0)) {
            const char *line = before ? before + 1 : end.p;
            struct orch_audit_point found = *p;
            if (take_line(line, (size_t)(nl - line), &found))
                *p = found;
            return;
        }
        if (from == 0 || most > 8192)
            return;
    }
}

bool orch_audit_written(int fd)
{
    struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET };
    return fcntl(fd, F_OFD_GETLK, &l) == 0 && l.l_type != F_UNLCK;
}

bool orch_audit_running(const char *path)
{
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    return fd >= 0 && orch_audit_written(fd);
}

static bool ended_before(int dir, const char *name, time_t before)
{
    cleanup_close int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat st;
    return fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_mtime < before &&
           !orch_audit_written(fd);
}

int orch_audit_prune(int dir, const char *own, time_t before,
                     int (*say)(void *ud, const struct orch_audit_point *last, size_t n), void *ud)
{
    char **names;
    size_t n, old = 0;
    int r = orch_audit_names(dir, ".jsonl", &names, &n);
    while (r == 0 && old < n && strcmp(names[old], own) != 0 &&
           ended_before(dir, names[old], before))
        old++;
    if (old) {
        struct orch_audit_point last;
        snprintf(last.file, sizeof last.file, "%s", names[old - 1]);
        orch_audit_last_line(dir, &last);
        r = say(ud, &last, old);
    }
    for (size_t i = 0; r == 0 && i < old; i++) {
        cleanup_free char *head = orch_xasprintf("%s.head", names[i]);
        if ((unlinkat(dir, names[i], 0) < 0 || unlinkat(dir, head, 0) < 0) && errno != ENOENT)
            r = -errno;
    }
    orch_audit_list_free(names, n);
    return r;
}
