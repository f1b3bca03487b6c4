/* core/store: the audit log and the state database. */
#include "base/hash.h"
#include "base/log.h"
#include "store/audit.h"
#include "store/db.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>

#include <cmocka.h>

static char dir[64]; /* a new one for each test: audit folder, key, database */
static char logs[128], key_path[128], db_path[128];
static struct orch_loop *loop;

static int setup(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/orch-test-store-XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(logs, sizeof logs, "%s/state/audit", dir);
    snprintf(key_path, sizeof key_path, "%s/state/audit.key", dir);
    snprintf(db_path, sizeof db_path, "%s/state/state.db", dir);
    loop = orch_loop_new(NULL);
    return loop ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    orch_loop_free(loop);
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd);
}

static struct orch_audit *open_log(enum orch_audit_sync sync)
{
    struct orch_err err;
    struct orch_audit *a = orch_audit_open(loop, logs, key_path, sync, &err);
    if (!a)
        fail_msg("%s", err.msg);
    return a;
}

static void add(struct orch_audit *a, const char *event, const char *fields, bool reserve)
{
    struct orch_err err;
    if (orch_audit_add(a, event, orch_slice_str(fields), reserve, &err) < 0)
        fail_msg("%s", err.msg);
}

static void flush(struct orch_audit *a)
{
    struct orch_err err;
    if (orch_audit_flush(a, &err) < 0)
        fail_msg("%s", err.msg);
}

/* A closed log of n lines, with its first and its last; its path is the caller's. */
static char *make_log(int n)
{
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    for (int i = 2; i < n; i++) {
        char fields[64];
        snprintf(fields, sizeof fields, "\"call\":\"c%d\",\"args\":{\"x\":[1,\"\\u00e4\"]}", i);
        add(a, "decision", fields, false);
    }
    flush(a);
    char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);
    return path;
}

static void slurp(const char *path, struct orch_buf *out)
{
    out->n = 0;
    assert_int_equal(orch_read_file(AT_FDCWD, path, 64 << 20, out), 0);
}

static void spill(const char *path, const void *p, size_t n)
{
    assert_int_equal(orch_write_file(AT_FDCWD, path, p, n, 0600), 0);
}

static struct orch_audit_report verify_with(const char *path, const char *key,
                                            const char *expect_head)
{
    struct orch_audit_report r;
    struct orch_err err;
    if (orch_audit_verify(path, key, expect_head, &r, &err) < 0)
        fail_msg("%s", err.msg);
    return r;
}

static struct orch_audit_report verify(const char *path)
{
    return verify_with(path, key_path, NULL);
}

static void expect_good(const char *path, uint64_t lines, uint64_t unsigned_lines)
{
    struct orch_audit_report r = verify(path);
    if (!r.ok)
        fail_msg("%s", r.problem);
    assert_int_equal(r.lines, lines);
    assert_int_equal(r.unsigned_lines, unsigned_lines);
}

/* The verdict on path is the problem `what` (a part of it) at line `line` of path + suffix. */
static void expect_problem_with(const char *path, const char *key, const char *expect_head,
                                const char *suffix, uint64_t line, const char *what)
{
    struct orch_audit_report r = verify_with(path, key, expect_head);
    cleanup_free char *start = orch_xasprintf("%s%s:%llu: ", path, suffix,
                                              (unsigned long long)line);
    if (r.ok || strncmp(r.problem, start, strlen(start)) != 0 || !strstr(r.problem, what))
        fail_msg("expected %s…%s…, got %s", start, what, r.ok ? "no problem" : r.problem);
    if (!*suffix && line)
        assert_int_equal(r.lines, expect_head ? line : line - 1);
}

static void expect_problem(const char *path, const char *suffix, uint64_t line, const char *what)
{
    expect_problem_with(path, key_path, NULL, suffix, line, what);
}

/* ---- what is written */

static void test_lines(void **state)
{
    (void)state;
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    add(a, "decision", "\"call\":\"c1\",\"decision\":\"allow\"", true);
    struct orch_err err;
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"call\":\"c1\",\"ms\":3"), &err), 0);
    add(a, "reload", "", false);
    cleanup_buf struct orch_buf text = { 0 };
    slurp(orch_audit_path(a), &text);
    /* the first line alone: what is queued is not written */
    assert_ptr_equal(strchr(text.p, '\n'), text.p + text.n - 1);
    flush(a);
    cleanup_free char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);

    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    assert_int_equal(stat(logs, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0700);
    assert_int_equal(stat(key_path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    assert_int_equal(st.st_size, 32);
    int y, mo, d, h, mi, s, ms, pid, end = 0;
    const char *name = strrchr(path, '/') + 1;
    sscanf(name, "%4d%2d%2dT%2d%2d%2d.%3dZ-%d.jsonl%n", &y, &mo, &d, &h, &mi, &s, &ms, &pid, &end);
    assert_int_equal(name[end], 0);
    assert_true(end > 0);
    assert_int_equal(pid, getpid());

    /* The contract's words, computed here on their own. */
    slurp(path, &text);
    char first[256];
    snprintf(first, sizeof first,
             "\"seq\":1,\"event\":\"start\",\"file\":\"%s\",\"before\":null,\"prev\":\"", name);
    const char *const middle[] = {
        first,
        "\"seq\":2,\"event\":\"decision\",\"call\":\"c1\",\"decision\":\"allow\",\"prev\":\"",
        "\"seq\":3,\"event\":\"outcome\",\"call\":\"c1\",\"ms\":3,\"prev\":\"",
        "\"seq\":4,\"event\":\"reload\",\"prev\":\"",
        "\"seq\":5,\"event\":\"end\",\"prev\":\"",
    };
    char prev[65], hash[65];
    memset(prev, '0', 64);
    prev[64] = 0;
    char *line = text.p;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(middle); i++) {
        assert_memory_equal(line, "{\"ts\":\"20", 9);
        assert_memory_equal(line + 30, "Z\",", 3);
        assert_memory_equal(line + 33, middle[i], strlen(middle[i]));
        char *p = line + 33 + strlen(middle[i]);
        assert_memory_equal(p, prev, 64);
        assert_memory_equal(p + 64, "\",\"hash\":\"", 10);
        orch_sha256_hex(line, (size_t)(p + 65 - line), hash);
        assert_memory_equal(p + 74, hash, 64);
        assert_memory_equal(p + 138, "\"}\n", 3);
        memcpy(prev, hash, 64);
        line = p + 141;
    }
    assert_ptr_equal(line, text.p + text.n);

    /* The head: HMAC over "SEQ:HASH" with the key. */
    cleanup_buf struct orch_buf key = { 0 };
    cleanup_buf struct orch_buf head = { 0 };
    cleanup_free char *head_path = orch_xasprintf("%s.head", path);
    slurp(key_path, &key);
    slurp(head_path, &head);
    struct orch_hmac_key k;
    orch_hmac_key_init(&k, key.p, key.n);
    cleanup_free char *signed_text = orch_xasprintf("5:%s", hash);
    uint8_t mac[32];
    char mac_hex[65];
    orch_hmac(&k, signed_text, strlen(signed_text), mac);
    orch_hex(mac, 32, mac_hex);
    cleanup_free char *expected = orch_xasprintf("{\"seq\":5,\"hash\":\"%s\",\"hmac\":\"%s\"}\n",
                                                 hash, mac_hex);
    assert_string_equal(head.p, expected);
    assert_int_equal(stat(head_path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);

    struct orch_audit_report r = verify_with(path, key_path, hash);
    assert_true(r.ok);
    assert_true(r.has_head);
    assert_int_equal(r.lines, 5);
    assert_true(r.ended);
    assert_int_equal(r.unsigned_lines, 0);
    assert_string_equal(r.head_hash, hash);
}

static void test_refused_lines(void **state)
{
    (void)state;
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    struct orch_err err;
    assert_int_equal(orch_audit_add(a, "x", ORCH_SLICE("\"a\":\n1"), false, &err), -EINVAL);
    assert_int_equal(orch_audit_add(a, "x", ORCH_SLICE("\"a\":\"\0\""), false, &err), -EINVAL);
    /* nothing is reserved */
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"a\":1"), &err), -EINVAL);

    cleanup_buf struct orch_buf big = { 0 };
    orch_buf_str(&big, "\"a\":\"");
    while (big.n < ORCH_AUDIT_LINE_MAX)
        orch_buf_char(&big, 'x');
    orch_buf_char(&big, '"');
    assert_int_equal(orch_audit_add(a, "x", (struct orch_slice){ big.p, big.n }, true, &err),
                     -EMSGSIZE);
    /* The longest that is promised to fit. */
    size_t most = ORCH_AUDIT_LINE_MAX - ORCH_AUDIT_AROUND - 1;
    big.p[most - 1] = '"';
    assert_int_equal(orch_audit_add(a, "x", (struct orch_slice){ big.p, most }, true, &err), 0);
    big.p[most - 1] = 'x';
    size_t most_outcome = ORCH_AUDIT_OUTCOME_MAX - ORCH_AUDIT_AROUND - strlen("outcome");
    assert_int_equal(orch_audit_add_outcome(a, (struct orch_slice){ big.p, most_outcome + 1 },
                                            &err),
                     -EMSGSIZE);
    big.p[most_outcome - 1] = '"'; /* shortened: the reservation is still there */
    assert_int_equal(orch_audit_add_outcome(a, (struct orch_slice){ big.p, most_outcome }, &err),
                     0);
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"a\":1"), &err), -EINVAL);
    assert_false(orch_audit_broken(a));
    flush(a);
    cleanup_free char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);
    expect_good(path, 4, 0);
}

static void test_queue_is_bounded(void **state)
{
    (void)state;
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    cleanup_buf struct orch_buf f = { 0 };
    orch_buf_str(&f, "\"a\":\"");
    while (f.n < 100000)
        orch_buf_char(&f, 'x');
    orch_buf_char(&f, '"');
    for (int i = 0; i < 100; i++)
        add(a, "x", f.p, false);
    struct stat st;
    assert_int_equal(stat(orch_audit_path(a), &st), 0);
    assert_true(st.st_size >= 4 << 20);
    flush(a);
    cleanup_free char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);
    expect_good(path, 102, 0);
}

static void test_digest(void **state)
{
    (void)state;
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_EACH);
    cleanup_buf struct orch_buf key = { 0 };
    slurp(key_path, &key);
    struct orch_hmac_key k;
    orch_hmac_key_init(&k, key.p, key.n);
    uint8_t mac[32];
    char expected[65], got[65];
    orch_hmac(&k, "{\"a\":1}", 7, mac);
    orch_hex(mac, 32, expected);
    orch_audit_digest(a, ORCH_SLICE("{\"a\":1}"), got);
    assert_string_equal(got, expected);
    add(a, "x", "", false);
    flush(a);
    orch_audit_close(a);
}

/* The head follows within about a second by the loop's timer alone, and only lines after it are
 * unsigned. */
static void test_head_by_timer(void **state)
{
    (void)state;
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_INTERVAL);
    add(a, "x", "", false);
    flush(a);
    const char *path = orch_audit_path(a);
    struct orch_audit_report r = verify(path);
    assert_true(r.ok && r.running);
    assert_int_equal(r.unsigned_lines, 1); /* the first line is signed from the beginning */
    int64_t until = orch_now_us() + 60 * 1000000;
    while (verify(path).unsigned_lines && orch_now_us() < until)
        orch_loop_step(loop, 2000);
    expect_good(path, 2, 0);
    add(a, "x", "", false);
    flush(a);
    expect_good(path, 3, 1);
    cleanup_free char *kept = orch_xstrdup(path);
    orch_audit_close(a);
    expect_good(kept, 4, 0);
}

static void test_reservation(void **state)
{
    (void)state;
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    struct stat st;
    for (int i = 0; i < 64; i++)
        add(a, "decision", "\"a\":1", true);
    flush(a);
    assert_int_equal(stat(orch_audit_path(a), &st), 0);
    assert_true(st.st_blocks * 512 >= st.st_size + 64 * ORCH_AUDIT_OUTCOME_MAX);
    assert_true(st.st_size < 64 * 512); /* beyond the end of the file, not in it */
    struct orch_err err;
    for (int i = 0; i < 64; i++)
        assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"a\":1"), &err), 0);
    cleanup_free char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a); /* writes what is queued, gives the rest back */
    assert_int_equal(stat(path, &st), 0);
    assert_true(st.st_blocks * 512 < st.st_size + 16384);
    expect_good(path, 130, 0);
}

static void expect_no_log(const char *msg)
{
    struct orch_err err = { 0 };
    struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err);
    assert_null(a);
    if (!strstr(err.msg, msg))
        fail_msg("expected …%s…, got %s", msg, err.msg);
}

static void test_open_refused(void **state)
{
    (void)state;
    orch_audit_close(open_log(ORCH_AUDIT_SYNC_NONE));
    assert_int_equal(chmod(key_path, 0640), 0);
    expect_no_log("mode 0600 (is 0640");
    spill(key_path, "short", 5);
    expect_no_log("must have 32 bytes");
    cleanup_free char *moved = orch_xasprintf("%s.moved", key_path);
    assert_int_equal(rename(key_path, moved), 0);
    assert_int_equal(symlink(moved, key_path), 0);
    expect_no_log("symbolic links");
    assert_int_equal(unlink(key_path), 0);
    assert_int_equal(chmod(logs, 0777), 0);
    expect_no_log("others may write to it (mode 0777");
    assert_int_equal(chmod(logs, 0700), 0);
    cleanup_free char *in_file = orch_xasprintf("%s/x", key_path);
    orch_audit_close(open_log(ORCH_AUDIT_SYNC_NONE));
    strcpy(logs, in_file);
    expect_no_log("Not a directory");
}

/* Ends the (forked) caller: an assertion of cmocka would not reach the parent. */
#define CHECK(x) \
    do { \
        if (!(x)) { \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #x, errno); \
            _exit(1); \
        } \
    } while (0)

static void await_children(int n)
{
    while (n--) {
        int status = 0;
        assert_true(waitpid(-1, &status, 0) > 0);
        assert_int_equal(status, 0);
    }
}

/* Many at once make one key, and files of their own. */
static void test_open_at_once(void **state)
{
    (void)state;
    enum { N = 8 };
    int go[2];
    assert_int_equal(pipe(go), 0);
    for (int i = 0; i < N; i++) {
        if (fork())
            continue;
        close(go[1]);
        char c;
        CHECK(read(go[0], &c, 1) == 0);
        for (int k = 0; k < 3; k++) { /* of one process too */
            struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE,
                                                   NULL);
            CHECK(a);
            CHECK(orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), false, NULL) == 0);
            orch_audit_close(a);
        }
        _exit(0);
    }
    close(go[0]);
    close(go[1]);
    await_children(N);
    char **paths;
    size_t n;
    assert_int_equal(orch_audit_list(logs, &paths, &n, NULL), 0);
    assert_int_equal(n, 3 * N);
    for (size_t i = 0; i < n; i++) {
        expect_good(paths[i], 3, 0);
        assert_true(i == 0 || strcmp(paths[i - 1], paths[i]) < 0);
    }
    orch_audit_list_free(paths, n);
    assert_int_equal(orch_audit_list("/no/where", &paths, &n, NULL), 0);
    assert_int_equal(n, 0);
    orch_audit_list_free(paths, n);
}

/* ---- tampering */

enum { LINES = 6 };

struct tamper {
    char *path, *head_path;
    struct orch_buf text, head, work;
    size_t at[LINES + 1]; /* where each line begins, and the end */
};

static void tamper_init(struct tamper *t)
{
    *t = (struct tamper){ .path = make_log(LINES) };
    t->head_path = orch_xasprintf("%s.head", t->path);
    slurp(t->path, &t->text);
    slurp(t->head_path, &t->head);
    for (size_t i = 0; i < LINES; i++)
        t->at[i + 1] = (size_t)((char *)memchr(t->text.p + t->at[i], '\n', t->text.n - t->at[i]) -
                                t->text.p) +
                       1;
    assert_int_equal(t->at[LINES], t->text.n);
    expect_good(t->path, LINES, 0);
}

static void tamper_fini(struct tamper *t)
{
    spill(t->path, t->text.p, t->text.n);
    spill(t->head_path, t->head.p, t->head.n);
    expect_good(t->path, LINES, 0);
    free(t->path);
    free(t->head_path);
    orch_buf_free(&t->text);
    orch_buf_free(&t->head);
    orch_buf_free(&t->work);
}

static void take(struct tamper *t, size_t line)
{
    orch_buf_add(&t->work, t->text.p + t->at[line], t->at[line + 1] - t->at[line]);
}

static void put_back(struct tamper *t)
{
    spill(t->path, t->work.p, t->work.n);
    t->work.n = 0;
}

/* Every byte of the file and of the head, three flips each. */
static void test_tamper_bytes(void **state)
{
    (void)state;
    struct tamper t;
    tamper_init(&t);
    static const char masks[] = { 0x01, 0x20, (char)0x80 };
    for (size_t m = 0; m < sizeof masks; m++) {
        size_t line = 1;
        for (size_t i = 0; i < t.text.n; i++) {
            orch_buf_add(&t.work, t.text.p, t.text.n);
            t.work.p[i] ^= masks[m];
            put_back(&t);
            if (i == t.text.n - 1)
                expect_problem(t.path, "", LINES, "cut off");
            else
                expect_problem(t.path, "", line, "");
            line += i + 1 == t.at[line];
        }
        spill(t.path, t.text.p, t.text.n);
        for (size_t i = 0; i < t.head.n; i++) {
            orch_buf_add(&t.work, t.head.p, t.head.n);
            t.work.p[i] ^= masks[m];
            spill(t.head_path, t.work.p, t.work.n);
            t.work.n = 0;
            expect_problem(t.path, ".head", 1, "");
        }
        spill(t.head_path, t.head.p, t.head.n);
    }
    tamper_fini(&t);
}

static void test_tamper_lines(void **state)
{
    (void)state;
    struct tamper t;
    tamper_init(&t);
    for (size_t i = 0; i + 1 < LINES; i++) { /* swapped */
        for (size_t k = 0; k < LINES; k++)
            take(&t, k == i ? i + 1 : k == i + 1 ? i : k);
        put_back(&t);
        expect_problem(t.path, "", i + 1, "lines are missing, or out of order");
    }
    for (size_t i = 0; i < LINES; i++) { /* dropped */
        for (size_t k = 0; k < LINES; k++)
            if (k != i)
                take(&t, k);
        put_back(&t);
        if (i + 1 < LINES)
            expect_problem(t.path, "", i + 1, "lines are missing");
        else
            expect_problem(t.path, ".head", 1, "names line 6, but the file ends after line 5");
    }
    for (size_t i = 0; i < LINES; i++) { /* repeated */
        for (size_t k = 0; k < LINES; k++) {
            take(&t, k);
            if (k == i)
                take(&t, k);
        }
        put_back(&t);
        expect_problem(t.path, "", i + 2, "lines are repeated");
    }
    /* Cut off anywhere. Between lines only the head tells. */
    for (size_t n = 0; n < t.text.n; n += 53) {
        size_t line = 0;
        while (t.at[line + 1] <= n)
            line++;
        spill(t.path, t.text.p, n);
        if (n == t.at[line])
            expect_problem(t.path, ".head", 1, "the file ends after line");
        else
            expect_problem(t.path, "", line + 1, "cut off");
    }
    spill(t.path, t.text.p, t.at[3]);
    expect_problem(t.path, ".head", 1, "names line 6, but the file ends after line 3");
    /* Without its first lines. */
    spill(t.path, t.text.p + t.at[2], t.text.n - t.at[2]);
    expect_problem(t.path, "", 1, "seq is 3, expected 1");

    static const struct {
        const char *line, *what;
    } by_hand[] = {
        { "\n", "not JSON" },
        { "{}\n", "\"hash\"" },
        { "{\"seq\":7,\"hash\":\"\"}\n", "\"hash\"" },
        { "[1]\n", "\"hash\"" },
        { "{\"hash\":\"0000000000000000000000000000000000000000000000000000000000000000\",\"seq\":"
          "7}\n",
          "the last member" },
        { "{\"seq\":7,\"prev\":\"0\",\"hash\":"
          "\"0000000000000000000000000000000000000000000000000000000000000000\"}\n",
          "changed" },
        { "{\"a\":1,\"a\":1,\"hash\":"
          "\"0000000000000000000000000000000000000000000000000000000000000000\"}\n",
          "not JSON: dup" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(by_hand); i++) {
        orch_buf_add(&t.work, t.text.p, t.text.n);
        orch_buf_str(&t.work, by_hand[i].line);
        put_back(&t);
        expect_problem(t.path, "", 7, by_hand[i].what);
    }
    while (t.work.n < 3 * ORCH_AUDIT_LINE_MAX)
        orch_buf_char(&t.work, ' ');
    put_back(&t);
    expect_problem(t.path, "", 1, "a line of more than 262144 bytes");
    tamper_fini(&t);
}

static const char *forged_name; /* of the file whose first line is forged */

/* Appends one line of the right form; replaces prev, a hash of 64 digits, by the line's. */
static void forge(struct orch_buf *out, int seq, const char *what, char *prev)
{
    size_t start = out->n;
    orch_buf_printf(out, "{\"ts\":\"2020-01-01T00:00:00.000Z\",\"seq\":%d,\"event\":\"%s\"", seq,
                    seq == 1 ? "start" : what);
    if (seq == 1)
        orch_buf_printf(out, ",\"file\":\"%s\",\"before\":null", forged_name);
    orch_buf_printf(out, ",\"prev\":\"%s\"", prev);
    orch_sha256_hex(out->p + start, out->n - start, prev);
    orch_buf_printf(out, ",\"hash\":\"%s\"}\n", prev);
}

static void test_tamper_chain(void **state)
{
    (void)state;
    struct tamper t;
    tamper_init(&t);
    struct orch_audit_report good = verify(t.path);
    forged_name = strrchr(t.path, '/') + 1;

    /* One line replaced, with its own hash right: the next one tells, also for the first and the
     * last. */
    for (int i = 0; i < LINES; i++) {
        char prev[65];
        if (i)
            memcpy(prev, t.text.p + t.at[i] - 3 - 64, 64);
        else
            memset(prev, '0', 64);
        prev[64] = 0;
        for (int k = 0; k < LINES; k++) {
            if (k == i)
                forge(&t.work, i + 1, "forged", prev);
            else
                take(&t, (size_t)k);
        }
        put_back(&t);
        if (i + 1 < LINES)
            expect_problem(t.path, "", (uint64_t)i + 2, "that one was replaced");
        else
            expect_problem(t.path, ".head", 1, "its hash is not that of line 6");
    }

    /* All of it again, with the chain right: only the head tells, or one kept elsewhere. */
    char prev[65];
    memset(prev, '0', 64);
    prev[64] = 0;
    for (int i = 0; i < LINES; i++)
        forge(&t.work, i + 1, "forged", prev);
    put_back(&t);
    expect_problem(t.path, ".head", 1, "its hash is not that of line 6");
    assert_int_equal(unlink(t.head_path), 0);
    expect_problem(t.path, ".head", 1, "missing");
    assert_int_equal(verify(t.path).unsigned_lines, LINES);
    spill(t.head_path, t.head.p, t.head.n);

    /* Lines put after the last one, chain right. */
    memcpy(prev, good.head_hash, 65);
    orch_buf_add(&t.work, t.text.p, t.text.n);
    forge(&t.work, 7, "forged", prev);
    forge(&t.work, 8, "forged", prev);
    put_back(&t);
    expect_problem(t.path, "", 7, "after the line that ended the file");
    spill(t.path, t.text.p, t.text.n);
    assert_true(verify_with(t.path, key_path, good.head_hash).ok);
    char upper[65];
    memset(upper, 'A', 64);
    upper[64] = 0;
    expect_problem_with(t.path, key_path, upper, "", LINES, "no line has the expected hash AAAA");

    /* The head of another file, signed with the same key, and one of the same length. */
    cleanup_free char *other = make_log(LINES);
    cleanup_free char *shorter = make_log(3);
    char *const others[] = { other, shorter };
    for (size_t i = 0; i < 2; i++) {
        cleanup_free char *path = orch_xasprintf("%s.head", others[i]);
        slurp(path, &t.work);
        spill(t.head_path, t.work.p, t.work.n);
        t.work.n = 0;
        expect_problem(t.path, ".head", 1,
                       i ? "its hash is not that of line 3" : "its hash is not that of line 6");
    }
    spill(t.head_path, t.head.p, t.head.n);

    /* Another key, no key, a key not looked for. */
    cleanup_free char *key2 = orch_xasprintf("%s.2", key_path);
    expect_problem_with(t.path, key2, NULL, ".head", 1, "cannot be checked: no key at ");
    spill(key2, "0123456789abcdef0123456789abcdef", 32);
    expect_problem_with(t.path, key2, NULL, ".head", 1, "the signature is wrong");
    assert_int_equal(verify_with(t.path, NULL, NULL).ok, true);
    tamper_fini(&t);

    struct orch_audit_report none;
    struct orch_err err;
    assert_int_equal(orch_audit_verify("/no/where", key_path, NULL, &none, &err), -ENOENT);
    assert_int_equal(orch_audit_verify(dir, key_path, NULL, &none, &err), -EINVAL);
}

/* ---- a full disk. Each runs in a child with a small filesystem of its own mounted on `dir`. */

static void own_mount(const char *type, const char *options)
{
    uid_t uid = geteuid();
    gid_t gid = getegid();
    char map[64];
    CHECK(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0);
    static const char deny[] = "deny";
    int fd = open("/proc/self/setgroups", O_WRONLY | O_CLOEXEC);
    CHECK(fd >= 0 && write(fd, deny, sizeof deny - 1) > 0);
    close(fd);
    for (int i = 0; i < 2; i++) {
        int n = snprintf(map, sizeof map, "0 %u 1", i ? gid : uid);
        fd = open(i ? "/proc/self/gid_map" : "/proc/self/uid_map", O_WRONLY | O_CLOEXEC);
        CHECK(fd >= 0 && write(fd, map, (size_t)n) == n);
        close(fd);
    }
    CHECK(mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0);
    CHECK(mount("none", dir, type, 0, options) == 0);
}

/* Takes every byte that is left on `dir`. */
static void fill_disk(void)
{
    char path[128];
    snprintf(path, sizeof path, "%s/filler", dir);
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | O_APPEND, 0600);
    static const char zeros[4096];
    while (write(fd, zeros, sizeof zeros) > 0) {
    }
    CHECK(errno == ENOSPC);
    close(fd);
}

static void check_good(const char *path, uint64_t lines, uint64_t unsigned_lines)
{
    struct orch_audit_report r;
    CHECK(orch_audit_verify(path, key_path, NULL, &r, NULL) == 0);
    if (!r.ok)
        fprintf(stderr, "%s\n", r.problem);
    CHECK(r.ok && r.lines == lines && r.unsigned_lines == unsigned_lines);
}

static void in_child(void (*fn)(void))
{
    pid_t pid = fork();
    if (pid == 0) {
        fn();
        _exit(0);
    }
    await_children(1);
}

static void full_before(void)
{
    own_mount("tmpfs", "size=1m");
    struct orch_err err;
    struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err);
    CHECK(a);
    CHECK(orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), false, &err) == 0);
    char *first = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);
    fill_disk();
    CHECK(!orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err));
    CHECK(err.code == ENOSPC && strstr(err.msg, "no space for the record"));
    char **paths;
    size_t n;
    CHECK(orch_audit_list(logs, &paths, &n, &err) == 0 && n == 1); /* none of nothing is left */
    orch_audit_list_free(paths, n);
    check_good(first, 3, 0);
    free(first);
}

/* Calls are admitted until the reservation fails; then, with nothing left on the disk, every
 * admitted one can still write its longest outcome. */
static void full_during(void)
{
    own_mount("tmpfs", "size=1m");
    struct orch_err err;
    struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err);
    CHECK(a);
    struct orch_buf fields = { 0 };
    orch_buf_str(&fields, "\"a\":\"");
    while (fields.n < ORCH_AUDIT_OUTCOME_MAX - ORCH_AUDIT_AROUND - sizeof "outcome")
        orch_buf_char(&fields, 'x');
    orch_buf_char(&fields, '"');
    int calls = 0, r;
    while ((r = orch_audit_add(a, "decision", ORCH_SLICE("\"a\":1"), true, &err)) == 0) {
        calls++;
        CHECK(orch_audit_flush(a, &err) == 0);
    }
    CHECK(r == -ENOSPC && strstr(err.msg, "no space for the record of a call"));
    CHECK(calls > 40 && calls < 64);
    CHECK(!orch_audit_broken(a));
    fill_disk();
    CHECK(orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), true, &err) == -ENOSPC);
    for (int i = 0; i < calls; i++) {
        CHECK(orch_audit_add_outcome(a, (struct orch_slice){ fields.p, fields.n }, &err) == 0);
        if (i % 3 == 0)
            CHECK(orch_audit_flush(a, &err) == 0);
    }
    CHECK(orch_audit_flush(a, &err) == 0);
    orch_buf_free(&fields);
    /* Space comes back: calls go on. */
    char filler[128];
    snprintf(filler, sizeof filler, "%s/filler", dir);
    CHECK(truncate(filler, 0) == 0);
    CHECK(orch_audit_add(a, "decision", ORCH_SLICE("\"a\":1"), false, &err) == 0);
    char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);
    check_good(path, 2 * (uint64_t)calls + 3, 0);
    free(path);
}

/* The disk breaks its promise: the reservation is taken away and the rest filled. */
static void full_flush(void)
{
    own_mount("tmpfs", "size=1m");
    struct orch_err err;
    struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err);
    CHECK(a);
    for (int i = 0; i < 10; i++)
        CHECK(orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), true, &err) == 0);
    CHECK(orch_audit_flush(a, &err) == 0);
    char *path = orch_xstrdup(orch_audit_path(a));
    struct stat st;
    CHECK(stat(path, &st) == 0);
    off_t whole = st.st_size;
    CHECK(whole % 4096 > 0); /* so that the write begins, and stops in the middle of a line */
    for (int i = 0; i < 10; i++)
        CHECK(orch_audit_add_outcome(
                  a,
                  ORCH_SLICE(
                      "\"a\":\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                      "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                      "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                      "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\""),
                  &err) == 0);
    CHECK(truncate(path, whole) == 0);
    fill_disk();
    CHECK(orch_audit_flush(a, &err) == -ENOSPC);
    CHECK(strstr(err.msg, path) && strstr(err.msg, "cannot be written"));
    CHECK(orch_audit_broken(a));
    CHECK(stat(path, &st) == 0 && st.st_size == whole);
    check_good(path, 11, 10);
    /* For good, also when there is space again. */
    char filler[128];
    snprintf(filler, sizeof filler, "%s/filler", dir);
    CHECK(truncate(filler, 0) == 0);
    CHECK(orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), false, &err) == -ENOSPC);
    CHECK(orch_audit_add_outcome(a, ORCH_SLICE("\"a\":1"), &err) == -ENOSPC);
    CHECK(orch_audit_flush(a, &err) == -ENOSPC);
    orch_audit_close(a);
    check_good(path, 11, 0); /* it broke: no end */
    free(path);
}

/* The same where the write stops at a limit, in the middle of the second of three lines. */
static void limit_flush(void)
{
    signal(SIGXFSZ, SIG_IGN);
    struct orch_err err;
    struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_EACH, &err);
    CHECK(a);
    CHECK(orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), false, &err) == 0);
    CHECK(orch_audit_flush(a, &err) == 0);
    char *path = orch_xstrdup(orch_audit_path(a));
    struct stat st;
    CHECK(stat(path, &st) == 0);
    struct rlimit no_more = { (rlim_t)(2 * st.st_size + 10), RLIM_INFINITY };
    CHECK(setrlimit(RLIMIT_FSIZE, &no_more) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), false, &err) == 0);
    CHECK(orch_audit_flush(a, &err) == -EFBIG);
    off_t size = st.st_size;
    CHECK(stat(path, &st) == 0 && st.st_size == size);
    orch_audit_close(a);
    check_good(path, 2, 0);
    free(path);
}

static uint64_t free_kib(void)
{
    struct statvfs fs;
    CHECK(statvfs(dir, &fs) == 0);
    return (uint64_t)fs.f_bavail * fs.f_frsize / 1024;
}

/* Calls do not take the last hundredth of a disk; what belongs to those under way, and what is no
 * call's, still may. */
static void floor_of_disk(void)
{
    own_mount("tmpfs", "size=64m"); /* a hundredth: 655 KiB */
    struct orch_err err = { 0 };
    struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err);
    CHECK(a && orch_audit_add(a, "decision", ORCH_SLICE("\"a\":1"), true, &err) == 0);
    CHECK(orch_audit_flush(a, &err) == 0);
    char filler[128];
    snprintf(filler, sizeof filler, "%s/filler", dir);
    fill_disk();
    struct stat st;
    CHECK(stat(filler, &st) == 0 && truncate(filler, st.st_size - 900 * 1024) == 0);
    int calls = 1, r;
    while ((r = orch_audit_add(a, "decision", ORCH_SLICE("\"a\":1"), true, &err)) == 0)
        calls++;
    CHECK(r == -ENOSPC && strstr(err.msg, "no space for the record of a call") &&
          strstr(err.msg, "are left to others"));
    CHECK(free_kib() >= 655 && free_kib() < 900);
    CHECK(!orch_audit_broken(a));
    CHECK(orch_audit_add(a, "vm_exit", ORCH_SLICE("\"a\":1"), false, &err) == 0);
    for (int i = 0; i < calls; i++)
        CHECK(orch_audit_add_outcome(a, ORCH_SLICE("\"a\":1"), &err) == 0);
    CHECK(orch_audit_flush(a, &err) == 0);
    CHECK(truncate(filler, 0) == 0);
    CHECK(orch_audit_add(a, "decision", ORCH_SLICE("\"a\":1"), true, &err) == 0);
    CHECK(orch_audit_flush(a, &err) == 0);
    char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);
    check_good(path, 2 * (uint64_t)calls + 4, 0);
    free(path);
}

static void cannot_reserve(void)
{
    own_mount("ramfs", NULL);
    struct orch_err err;
    CHECK(!orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err));
    CHECK(err.code == EOPNOTSUPP &&
          strstr(err.msg, "this filesystem (ramfs) cannot reserve space") &&
          strstr(err.msg, "set audit.dir"));
}

static void test_full_before(void **state)
{
    (void)state;
    in_child(full_before);
}

static void test_full_during(void **state)
{
    (void)state;
    in_child(full_during);
}

static void test_full_flush(void **state)
{
    (void)state;
    in_child(full_flush);
}

static void test_limit_flush(void **state)
{
    (void)state;
    in_child(limit_flush);
}

static void test_floor(void **state)
{
    (void)state;
    in_child(floor_of_disk);
}

static void test_cannot_reserve(void **state)
{
    (void)state;
    in_child(cannot_reserve);
}

/* ---- the folder: a file for each process, each names the one before */

enum { FILES = 4 };

static char *set_files[FILES];

/* A closed log of LINES lines for each of them. */
static void make_set(void)
{
    for (int i = 0; i < FILES; i++)
        set_files[i] = make_log(LINES);
}

static void free_set(void)
{
    for (int i = 0; i < FILES; i++)
        free(set_files[i]);
}

struct found {
    size_t told;
    char bad[8][256]; /* file: problem */
    size_t n_bad;
};

static void take_report(void *ud, const char *path, const struct orch_audit_report *r)
{
    struct found *f = ud;
    f->told++;
    if (!r->ok && f->n_bad < ORCH_ARRAY_LEN(f->bad))
        snprintf(f->bad[f->n_bad++], sizeof f->bad[0], "%.60s: %.180s", strrchr(path, '/') + 1,
                 r->problem + (strncmp(r->problem, logs, strlen(logs)) == 0 ? strlen(logs) : 0));
}

static struct orch_audit_summary verify_set(struct found *f)
{
    struct orch_audit_summary s;
    struct orch_err err;
    *f = (struct found){ 0 };
    if (orch_audit_verify_dir(logs, key_path, NULL, take_report, f, &s, &err) < 0)
        fail_msg("%s", err.msg);
    assert_int_equal(s.bad, f->n_bad);
    assert_int_equal(s.ok, !f->n_bad);
    return s;
}

static void head_of(char out[256], int i)
{
    snprintf(out, 256, "%s.head", set_files[i]);
}

static void rm_file(int i)
{
    assert_int_equal(unlink(set_files[i]), 0);
}

static void rm_head(int i)
{
    char head[256];
    head_of(head, i);
    assert_int_equal(unlink(head), 0);
}

static void rm_both(int i)
{
    rm_file(i);
    rm_head(i);
}

static void cut_and_rm_head(int i)
{
    cleanup_buf struct orch_buf text = { 0 };
    slurp(set_files[i], &text);
    char *at = text.p;
    for (int line = 0; line < 3; line++)
        at = strchr(at, '\n') + 1;
    assert_int_equal(truncate(set_files[i], at - text.p), 0);
    rm_head(i);
}

static void empty_and_rm_head(int i)
{
    assert_int_equal(truncate(set_files[i], 0), 0);
    rm_head(i);
}

/* Without its end, as after a crash, with the head of then: only the file after it tells. */
static void cut_and_sign(int i)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_buf struct orch_buf key = { 0 };
    slurp(set_files[i], &text);
    slurp(key_path, &key);
    char *at = text.p, hash[65] = "", mac_hex[65], head[256];
    for (int line = 0; line < 3; line++)
        at = strchr(at, '\n') + 1;
    memcpy(hash, at - 67, 64);
    assert_int_equal(truncate(set_files[i], at - text.p), 0);
    struct orch_hmac_key k;
    uint8_t mac[32];
    orch_hmac_key_init(&k, key.p, key.n);
    cleanup_free char *signed_text = orch_xasprintf("3:%s", hash);
    orch_hmac(&k, signed_text, strlen(signed_text), mac);
    orch_hex(mac, 32, mac_hex);
    cleanup_free char *again = orch_xasprintf("{\"seq\":3,\"hash\":\"%s\",\"hmac\":\"%s\"}\n", hash,
                                              mac_hex);
    head_of(head, i);
    spill(head, again, strlen(again));
}

static void rename_it(int i)
{
    cleanup_free char *other = orch_xasprintf("%s/20010101T000000.000Z-1.jsonl", logs);
    assert_int_equal(rename(set_files[i], other), 0);
}

static void copy_over(int i) /* by the file before it, with its head */
{
    char from[256], to[256];
    cleanup_buf struct orch_buf text = { 0 };
    slurp(set_files[i - 1], &text);
    spill(set_files[i], text.p, text.n);
    head_of(from, i - 1);
    head_of(to, i);
    slurp(from, &text);
    spill(to, text.p, text.n);
}

static void rm_record(int i)
{
    (void)i;
    cleanup_free char *newest = orch_xasprintf("%s/newest", logs);
    assert_int_equal(unlink(newest), 0);
}

static void forge_record(int i)
{
    cleanup_free char *newest = orch_xasprintf("%s/newest", logs);
    cleanup_free char *text = orch_xasprintf("{\"file\":\"%s\",\"hmac\":\"%064d\"}\n",
                                             strrchr(set_files[i], '/') + 1, 0);
    spill(newest, text, strlen(text));
}

static void test_set(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        void (*harm)(int i);
        int at;
        const char *what; /* a part of the first problem told of that file */
        size_t n;         /* problems told */
    } table[] = {
        { "the first file removed", rm_both, 0, "missing", 1 },
        { "one in the middle removed", rm_both, 1, "missing", 1 },
        { "the newest removed", rm_both, FILES - 1, "the folder's record says", 1 },
        { "a file removed, its head left", rm_file, 2, "missing", 1 },
        { "the newest removed, its head left", rm_file, FILES - 1, "missing", 1 },
        { "a head removed", rm_head, 1, ".head:1: missing", 1 },
        { "the newest's head removed", rm_head, FILES - 1, ".head:1: missing", 1 },
        { "cut between lines, head removed", cut_and_rm_head, 1, ".head:1: missing", 1 },
        { "the newest cut, head removed", cut_and_rm_head, FILES - 1, ".head:1: missing", 1 },
        { "emptied, head removed", empty_and_rm_head, 0, "it is empty", 1 },
        { "cut as by a crash, signed again", cut_and_sign, 1, "lines were cut off", 1 },
        { "renamed", rename_it, 1, "missing", 3 },
        { "a copy of another in its place", copy_over, 2, "had another name", 1 },
        { "the folder's record removed", rm_record, 0, NULL, 1 },
        { "the folder's record forged", forge_record, 1, NULL, 1 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        struct found f;
        cleanup_free char *rm = orch_xasprintf("rm -rf %s", logs);
        assert_int_equal(system(rm), 0);
        make_set();
        struct orch_audit_summary s = verify_set(&f);
        if (!s.ok)
            fail_msg("%s", s.problem);
        assert_int_equal(s.files, FILES);
        assert_int_equal(s.lines, FILES * LINES);
        assert_int_equal(s.unsigned_lines + s.running + s.crashed, 0);
        table[i].harm(table[i].at);
        s = verify_set(&f);
        const char *file = strrchr(set_files[table[i].at], '/') + 1;
        bool told = !table[i].what;
        for (size_t k = 0; k < f.n_bad && !told; k++)
            told = strncmp(f.bad[k], file, strlen(file)) == 0 && strstr(f.bad[k], table[i].what);
        if (!told || f.n_bad != table[i].n)
            fail_msg("%s: %zu problems: %s; %s", table[i].name, f.n_bad, f.bad[0], f.bad[1]);
        free_set();
    }
}

/* What makes no log, one that is written, one of a crash: no harm. */
static void test_set_good(void **state)
{
    (void)state;
    struct found f;
    orch_audit_close(open_log(ORCH_AUDIT_SYNC_NONE)); /* nothing was added: no file */
    struct orch_audit_summary s = verify_set(&f);
    assert_int_equal(s.files + f.told, 0);
    assert_true(s.ok);
    make_set();
    /* others of the user's in the folder are none of the log's */
    cleanup_free char *mine = orch_xasprintf("%s/notes.jsonl", logs);
    spill(mine, "x", 1);
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    struct orch_audit *b = open_log(ORCH_AUDIT_SYNC_NONE);
    add(b, "x", "", true); /* is before a's, though it was opened later */
    add(a, "x", "", true);
    flush(a);
    flush(b);
    s = verify_set(&f);
    if (!s.ok)
        fail_msg("%s", s.problem);
    assert_int_equal(s.files, FILES + 2);
    assert_int_equal(s.running, 2);
    assert_int_equal(s.unsigned_lines, 2);
    orch_audit_close(a);
    orch_audit_close(b);

    /* killed in the middle of a line; then the next process. */
    pid_t pid = fork();
    if (pid == 0) {
        a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE, NULL);
        CHECK(a && orch_audit_add(a, "x", ORCH_SLICE("\"a\":1"), true, NULL) == 0);
        CHECK(orch_audit_flush(a, NULL) == 0);
        int fd = open(orch_audit_path(a), O_WRONLY | O_APPEND | O_CLOEXEC);
        CHECK(fd >= 0 && write(fd, "{\"ts\":\"20", 9) == 9);
        _exit(0);
    }
    await_children(1);
    s = verify_set(&f);
    if (!s.ok)
        fail_msg("%s", s.problem);
    assert_int_equal(s.crashed, 1);
    free(make_log(LINES));
    s = verify_set(&f);
    if (!s.ok)
        fail_msg("%s", s.problem);
    assert_int_equal(s.crashed, 1);
    assert_int_equal(s.files, FILES + 4);
    /* and its whole lines are named by the file after it */
    char **paths;
    size_t n;
    assert_int_equal(orch_audit_list(logs, &paths, &n, NULL), 0);
    cleanup_buf struct orch_buf text = { 0 };
    slurp(paths[n - 2], &text);
    assert_int_equal(truncate(paths[n - 2], strchr(text.p, '\n') + 1 - text.p), 0);
    s = verify_set(&f);
    assert_true(!s.ok && strstr(s.problem, "names line 2: lines were cut off"));
    orch_audit_list_free(paths, n);
    free_set();
}

/* A clock that was set back does not change the order. */
static void test_set_clock(void **state)
{
    (void)state;
    struct found f;
    cleanup_free char *first = make_log(3);
    cleanup_free char *later = orch_xasprintf("%s/21231231T235959.999Z-7.jsonl", logs);
    cleanup_buf struct orch_buf text = { 0 };
    /* by hand: a file of the future, with all that belongs to it */
    char prev[65], before[65], mac_hex[65];
    memset(prev, '0', 64);
    prev[64] = 0;
    slurp(first, &text);
    memcpy(before, text.p + text.n - 67, 64);
    before[64] = 0;
    text.n = 0;
    orch_buf_printf(
        &text,
        "{\"ts\":\"2123-12-31T23:59:59.999Z\",\"seq\":1,\"event\":\"start\",\"file\":"
        "\"21231231T235959.999Z-7.jsonl\",\"before\":{\"file\":\"%s\",\"seq\":3,\"hash\":"
        "\"%s\"},\"prev\":\"%s\"",
        strrchr(first, '/') + 1, before, prev);
    orch_sha256_hex(text.p, text.n, prev);
    orch_buf_printf(&text, ",\"hash\":\"%s\"}\n", prev);
    spill(later, text.p, text.n);
    struct orch_hmac_key k;
    uint8_t mac[32];
    slurp(key_path, &text);
    orch_hmac_key_init(&k, text.p, text.n);
    cleanup_free char *signed_text = orch_xasprintf("1:%s", prev);
    orch_hmac(&k, signed_text, strlen(signed_text), mac);
    orch_hex(mac, 32, mac_hex);
    cleanup_free char *head = orch_xasprintf("{\"seq\":1,\"hash\":\"%s\",\"hmac\":\"%s\"}\n", prev,
                                             mac_hex);
    cleanup_free char *head_path = orch_xasprintf("%s.head", later);
    spill(head_path, head, strlen(head));

    cleanup_free char *next = make_log(3);
    assert_true(strcmp(next, later) > 0);
    assert_non_null(strstr(next, "/21240101T000000.000Z-"));
    struct orch_audit_summary s = verify_set(&f);
    if (!s.ok)
        fail_msg("%s", s.problem);
    assert_int_equal(s.files, 3);
}

static void age(const char *path, int days)
{
    struct timespec t[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_sec = time(NULL) - days * 86400L } };
    assert_int_equal(utimensat(AT_FDCWD, path, t, 0), 0);
}

/* Old files are removed from the oldest on, and what is left says so. */
static void test_keep(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int days[FILES]; /* the age of each */
        size_t kept;
    } table[] = {
        { "none is old", { 3, 2, 1, 0 }, FILES },
        { "the first is", { 11, 9, 8, 7 }, FILES - 1 },
        { "the first three are", { 30, 20, 11, 1 }, 1 },
        { "all are", { 99, 98, 97, 96 }, 0 },
        { "an old one after a young one stays", { 1, 20, 20, 20 }, FILES },
        { "as does one after that", { 20, 1, 20, 20 }, FILES - 1 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        struct found f;
        cleanup_free char *rm = orch_xasprintf("rm -rf %s", logs);
        assert_int_equal(system(rm), 0);
        make_set();
        for (int k = 0; k < FILES; k++)
            age(set_files[k], table[i].days[k]);
        struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
        orch_audit_keep(a, 10LL * 86400 * 1000);
        add(a, "x", "", false);
        flush(a);
        struct orch_audit_summary s = verify_set(&f); /* while it is written */
        if (!s.ok || s.files != table[i].kept + 1)
            fail_msg("%s: %zu files: %s", table[i].name, s.files, s.problem);
        orch_audit_close(a);
        s = verify_set(&f);
        if (!s.ok || s.files != table[i].kept + 1)
            fail_msg("%s: %zu files: %s", table[i].name, s.files, s.problem);
        if (table[i].kept < FILES)
            assert_string_equal(s.pruned, strrchr(set_files[FILES - 1 - table[i].kept], '/') + 1);
        /* One that is removed by somebody else is missing all the same. */
        if (table[i].kept > 0) {
            rm_both(FILES - 1);
            s = verify_set(&f);
            assert_true(!s.ok && strstr(s.problem, "missing"));
        }
        free_set();
    }
}

/* ---- a log that loses its name, or its bytes, while it is written */

static char *lost_path;

static void lose_unlink(void)
{
    assert_int_equal(unlink(lost_path), 0);
}

static void lose_rename(void)
{
    cleanup_free char *to = orch_xasprintf("%s.1", lost_path);
    assert_int_equal(rename(lost_path, to), 0);
}

static void lose_replace(void) /* logrotate's create */
{
    lose_rename();
    spill(lost_path, "", 0);
}

static void lose_copy(void) /* an editor's way of saving: the same bytes, another file */
{
    cleanup_buf struct orch_buf text = { 0 };
    slurp(lost_path, &text);
    spill(lost_path, text.p, text.n);
}

static void lose_truncate(void) /* logrotate's copytruncate */
{
    assert_int_equal(truncate(lost_path, 0), 0);
}

static void lose_some(void)
{
    struct stat st;
    assert_int_equal(stat(lost_path, &st), 0);
    assert_int_equal(truncate(lost_path, st.st_size - 30), 0);
}

static void lose_append(void)
{
    int fd = open(lost_path, O_WRONLY | O_APPEND | O_CLOEXEC);
    assert_int_equal(write(fd, "{}\n", 3), 3);
    close(fd);
}

static void lose_folder(void)
{
    cleanup_free char *rm = orch_xasprintf("rm -rf %s", logs);
    assert_int_equal(system(rm), 0);
}

static void lose_folder_name(void)
{
    cleanup_free char *to = orch_xasprintf("%s.old", logs);
    assert_int_equal(rename(logs, to), 0);
}

static void lose_link(void) /* another folder in its place, by a symbolic link */
{
    cleanup_free char *to = orch_xasprintf("%s.old", logs);
    cleanup_free char *other = orch_xasprintf("%s.other", logs);
    assert_int_equal(rename(logs, to), 0);
    assert_int_equal(mkdir(other, 0700), 0);
    assert_int_equal(symlink(other, logs), 0);
}

static const struct {
    const char *name, *why;
    void (*lose)(void);
    bool later; /* noticed after a millisecond */
} losses[] = {
    { "removed", "removed or moved", lose_unlink, false },
    { "renamed", "removed or moved", lose_rename, false },
    { "renamed, a new one made", "another is in its place", lose_replace, false },
    { "saved by an editor", "another is in its place", lose_copy, false },
    { "emptied", "cut it: it has 0 bytes", lose_truncate, true },
    { "cut", "cut it", lose_some, true },
    { "written to", "wrote to it", lose_append, true },
    { "its folder removed", "removed or moved", lose_folder, false },
    { "its folder renamed", "removed or moved", lose_folder_name, false },
    { "its folder a link to another", "removed or moved", lose_link, false },
};

static void lose_clean(void)
{
    cleanup_free char *rm = orch_xasprintf("rm -rf %s %s.old %s.other", logs, logs, logs);
    assert_int_equal(system(rm), 0);
}

static void test_lost(void **state)
{
    (void)state;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(losses); i++) {
        struct orch_err err = { 0 };
        lose_clean();
        struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
        add(a, "decision", "\"call\":\"first\"", true);
        flush(a);
        assert_int_equal(orch_audit_flush(a, &err), 0);
        lost_path = orch_xstrdup(orch_audit_path(a));
        losses[i].lose();
        orch_loop_step(loop, 0);
        if (losses[i].later) /* the kernel tells only of the others */
            orch_loop_step(loop, 5);
        /* One call is under way, another comes. */
        add(a, "decision", "\"call\":\"second\"", true);
        flush(a);
        assert_false(orch_audit_broken(a));
        assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"call\":\"first\""), &err), 0);
        assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"call\":\"second\""), &err), 0);
        flush(a);
        cleanup_free char *now = orch_xstrdup(orch_audit_path(a));
        if (strcmp(now, lost_path) == 0)
            fail_msg("%s: not noticed", losses[i].name);
        orch_audit_close(a);
        cleanup_buf struct orch_buf text = { 0 };
        slurp(now, &text);
        cleanup_free char *lost = orch_xasprintf("\"lost\":{\"file\":\"%s\",\"seq\":2,",
                                                 strrchr(lost_path, '/') + 1);
        const char *decision = strstr(text.p, "\"event\":\"decision\",\"call\":\"second\"");
        if (!strstr(text.p, lost) || !strstr(text.p, losses[i].why) || !decision ||
            !strstr(decision, "\"event\":\"outcome\",\"call\":\"first\""))
            fail_msg("%s: %s", losses[i].name, text.p);
        expect_good(now, 5, 0);
        struct found f;
        struct orch_audit_summary s = verify_set(&f);
        if (s.ok != (losses[i].lose == lose_copy)) /* all is there */
            fail_msg("%s: %s", losses[i].name, s.ok ? "verify sees nothing" : s.problem);
        free(lost_path);
    }
}

/* No new one can be made: the call is refused and leaves nothing behind; when it can be again,
 * the next one runs, and its file says what was lost. */
static void test_lost_refused(void **state)
{
    (void)state;
    struct orch_err err = { 0 };
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    add(a, "decision", "\"call\":\"first\"", true);
    flush(a);
    lost_path = orch_xstrdup(orch_audit_path(a));
    lose_folder();
    spill(logs, "in the way", 10);
    orch_loop_step(loop, 0);
    for (int i = 0; i < 3; i++) {
        add(a, "decision", "\"call\":\"refused\"", true);
        assert_true(orch_audit_flush(a, &err) < 0);
        assert_non_null(strstr(err.msg, "removed or moved away, and a new one cannot be made"));
        assert_false(orch_audit_broken(a));
    }
    assert_int_equal(unlink(logs), 0);
    add(a, "decision", "\"call\":\"again\"", true);
    flush(a);
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"call\":\"first\""), &err), 0);
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"call\":\"again\""), &err), 0);
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"call\":\"x\""), &err), -EINVAL);
    flush(a);
    cleanup_buf struct orch_buf text = { 0 };
    slurp(orch_audit_path(a), &text);
    assert_non_null(strstr(text.p, "\"lost\":{"));
    assert_null(strstr(text.p, "refused"));
    /* An outcome that cannot be written is another matter. */
    lose_folder();
    spill(logs, "in the way", 10);
    orch_loop_step(loop, 0);
    add(a, "decision", "\"call\":\"x\"", true);
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"call\":\"x\""), &err), 0);
    assert_true(orch_audit_flush(a, &err) < 0);
    assert_true(orch_audit_broken(a));
    orch_audit_close(a);
    assert_int_equal(unlink(logs), 0);
    free(lost_path);
}

/* ---- what verify could not read is not written */

static void test_unreadable(void **state)
{
    (void)state;
    static const char *const table[] = {
        "\"a\":1,\"a\":2",   "\"a\":1,\"\\u0061\":2",
        "\"ts\":\"2020\"",   "\"hash\":\"x\"",
        "\"prev\":1",        "\"seq\":7",
        "\"event\":\"end\"", "\"a\":{\"b\":1,\"b\":1}",
        "\"a\":\"\xff\"",    "\"a\":\"\xed\xa0\x80\"",
        "\"a\":\"\\ud800\"", "\"a\":1e999",
        "\"a\":01",          "\"a\":\"\x01\"",
        "\"a\":1},{\"b\":1", "\"a\":nul",
        "\"a\":[1,]",        "\"a\"",
    };
    struct orch_audit *a = open_log(ORCH_AUDIT_SYNC_NONE);
    struct orch_err err;
    add(a, "x", "\"a\":1", false);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++)
        if (orch_audit_add(a, "x", orch_slice_str(table[i]), false, &err) != -EINVAL)
            fail_msg("%s", table[i]);
    cleanup_buf struct orch_buf deep = { 0 };
    orch_buf_str(&deep, "\"a\":");
    for (int i = 0; i < 300; i++)
        orch_buf_char(&deep, '[');
    for (int i = 0; i < 300; i++)
        orch_buf_char(&deep, ']');
    assert_int_equal(orch_audit_add(a, "x", orch_slice_of(&deep), false, &err), -EINVAL);
    assert_int_equal(orch_audit_add_outcome(a, ORCH_SLICE("\"a\":1"), &err), -EINVAL);
    flush(a);
    cleanup_free char *path = orch_xstrdup(orch_audit_path(a));
    orch_audit_close(a);
    expect_good(path, 3, 0);
}

/* ---- kill -9 of a writer at a random moment */

static void test_killed_writer(void **state)
{
    (void)state;
    uint64_t *acked = mmap(NULL, sizeof *acked, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                           -1, 0);
    assert_ptr_not_equal(acked, MAP_FAILED);
    int partial = 0;
    for (int round = 0; round < 30; round++) {
        *acked = 0;
        pid_t pid = fork();
        if (pid == 0) {
            struct orch_audit *a = orch_audit_open(loop, logs, key_path, ORCH_AUDIT_SYNC_NONE,
                                                   NULL);
            CHECK(a);
            static const char text[] =
                "\"call\":\"c\",\"args\":{\"path\":\"some/where/in/the/workspace.txt\"}";
            for (uint64_t seq = 0;;) {
                for (int i = 0; i < 50; i++, seq += 2) {
                    CHECK(orch_audit_add(a, "decision", ORCH_SLICE(text), true, NULL) == 0);
                    CHECK(orch_audit_add_outcome(a, ORCH_SLICE(text), NULL) == 0);
                }
                CHECK(orch_audit_flush(a, NULL) == 0);
                __atomic_store_n(acked, seq, __ATOMIC_RELEASE);
            }
        }
        uint16_t wait_us;
        orch_random(&wait_us, sizeof wait_us);
        int64_t until = orch_now_us() + 60 * 1000000;
        while (!__atomic_load_n(acked, __ATOMIC_ACQUIRE) && orch_now_us() < until)
            sched_yield();
        usleep(wait_us / 2); /* the moment is what is random here */
        assert_int_equal(kill(pid, SIGKILL), 0);
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, SIGKILL);

        char **paths;
        size_t n;
        assert_int_equal(orch_audit_list(logs, &paths, &n, NULL), 0);
        assert_int_equal(n, round + 1);
        struct orch_audit_report r = verify(paths[n - 1]);
        if (!r.ok)
            fail_msg("%s", r.problem);
        assert_true(r.lines > *acked && *acked > 0);
        assert_int_equal(r.unsigned_lines, r.lines - 1);
        assert_false(r.running || r.ended); /* which is a crash, also with a whole last line */
        partial += r.cut > 0;
        orch_audit_list_free(paths, n);
    }
    printf("partial last lines: %d of 30\n", partial);
    munmap(acked, sizeof *acked);
}

/* ---- the state database */

static struct orch_db *open_db(void)
{
    struct orch_err err;
    struct orch_db *db = orch_db_open(db_path, &err);
    if (!db)
        fail_msg("%s", err.msg);
    return db;
}

static void expect_no_db(int code, const char *msg)
{
    struct orch_err err = { 0 };
    assert_null(orch_db_open(db_path, &err));
    if (err.code != code || !strstr(err.msg, msg) || !strstr(err.msg, db_path))
        fail_msg("expected %d …%s…, got %d %s", code, msg, err.code, err.msg);
}

static char hash_a[] = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

static struct orch_trust_file trust_file(const char *path, char digit)
{
    struct orch_trust_file f = { .path = (char *)(uintptr_t)path };
    memset(f.sha256, digit, 64);
    return f;
}

static void expect_trust(struct orch_db *db, const char *folder, bool edits,
                         const struct orch_trust_file *want, size_t n_want)
{
    struct orch_trust_file *files;
    size_t n;
    bool got;
    assert_int_equal(orch_db_trust_get(db, folder, &got, &files, &n, NULL), 1);
    assert_int_equal(got, edits);
    assert_int_equal(n, n_want);
    for (size_t i = 0; i < n; i++) {
        assert_string_equal(files[i].path, want[i].path);
        assert_string_equal(files[i].sha256, want[i].sha256);
    }
    orch_trust_files_free(files, n);
}

static void expect_no_trust(struct orch_db *db, const char *folder)
{
    struct orch_trust_file *files;
    size_t n;
    bool edits;
    assert_int_equal(orch_db_trust_get(db, folder, &edits, &files, &n, NULL), 0);
    assert_null(files);
    assert_int_equal(n, 0);
    assert_false(edits);
}

static void test_trust(void **state)
{
    (void)state;
    struct orch_db *db = open_db();
    struct stat st;
    assert_int_equal(stat(db_path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    expect_no_trust(db, "/a");

    struct orch_trust_file two[] = { trust_file("orchestrator.lua", 'a'),
                                     trust_file("policies/\xff'; --.lua", 'b') };
    assert_string_equal(two[0].sha256, hash_a);
    struct orch_err err;
    assert_int_equal(orch_db_trust_set(db, "/a", false, two, 2, &err), 0);
    assert_int_equal(orch_db_trust_set(db, "/a/b", true, two + 1, 1, &err), 0);
    assert_int_equal(orch_db_trust_set(db, "/empty", true, NULL, 0, &err), 0);
    expect_trust(db, "/a", false, two, 2);
    expect_trust(db, "/a/b", true, two + 1, 1);
    expect_trust(db, "/empty", true, NULL, 0);
    expect_no_trust(db, "/A");
    expect_no_trust(db, "/a/");

    /* Kept across opens, seen by another handle; set replaces; a failing set changes nothing. */
    struct orch_db *other = open_db();
    expect_trust(other, "/a", false, two, 2);
    struct orch_trust_file twice[] = { trust_file("x", 'c'), trust_file("x", 'd') };
    assert_true(orch_db_trust_set(other, "/a", true, twice, 2, &err) < 0);
    expect_trust(db, "/a", false, two, 2);
    assert_int_equal(orch_db_trust_set(other, "/a", true, twice, 1, &err), 0);
    expect_trust(db, "/a", true, twice, 1);
    assert_int_equal(orch_db_trust_forget(db, "/a", &err), 0);
    assert_int_equal(orch_db_trust_forget(db, "/a", &err), 0);
    expect_no_trust(other, "/a");
    expect_trust(other, "/a/b", true, two + 1, 1);
    orch_db_close(db);
    orch_db_close(other);

    /* No file but the database is left. */
    glob_t g;
    cleanup_free char *pattern = orch_xasprintf("%s*", db_path);
    assert_int_equal(glob(pattern, 0, NULL, &g), 0);
    assert_int_equal(g.gl_pathc, 1);
    globfree(&g);
}

static void test_db_refused(void **state)
{
    (void)state;
    struct orch_db *db = open_db();
    struct orch_trust_file f = trust_file("x", 'a');
    assert_int_equal(orch_db_trust_set(db, "/a", false, &f, 1, NULL), 0);
    orch_db_close(db);
    cleanup_buf struct orch_buf good = { 0 };
    cleanup_buf struct orch_buf after = { 0 };
    slurp(db_path, &good);

    assert_int_equal(chmod(db_path, 0644), 0);
    expect_no_db(EPERM, "mode 0600 (is 0644");
    cleanup_free char *moved = orch_xasprintf("%s.moved", db_path);
    assert_int_equal(rename(db_path, moved), 0);
    assert_int_equal(symlink(moved, db_path), 0);
    expect_no_db(ELOOP, "is a symbolic link");
    assert_int_equal(unlink(db_path), 0);
    assert_int_equal(mkfifo(db_path, 0600), 0);
    expect_no_db(EPERM, "must be a regular file");
    assert_int_equal(unlink(db_path), 0);

    /* Damaged: said, with the way out, and left as it is. */
    cleanup_buf struct orch_buf bad = { 0 };
    orch_buf_slice(&bad, (struct orch_slice){ good.p, good.n });
    memset(bad.p, 'x', 100);
    spill(db_path, bad.p, bad.n);
    expect_no_db(EUCLEAN, "is damaged");
    slurp(db_path, &after);
    assert_int_equal(after.n, bad.n);
    assert_memory_equal(after.p, bad.p, bad.n);

    bad.n = 0;
    orch_buf_slice(&bad, (struct orch_slice){ good.p, good.n });
    memset(bad.p + 4096, 0xee, bad.n - 4096); /* the tables' pages, not the header */
    spill(db_path, bad.p, bad.n);
    db = orch_db_open(db_path, NULL);
    if (db) {
        struct orch_trust_file *files;
        size_t n;
        bool edits;
        struct orch_err err;
        assert_int_equal(orch_db_trust_get(db, "/a", &edits, &files, &n, &err), -EUCLEAN);
        assert_non_null(strstr(err.msg, "is damaged"));
        assert_null(files);
        assert_int_equal(orch_db_trust_set(db, "/a", true, &f, 1, &err), -EUCLEAN);
        orch_db_close(db);
    }
    slurp(db_path, &after);
    assert_memory_equal(after.p, bad.p, bad.n);

    /* The format of a later orch, and somebody else's database. */
    bad.n = 0;
    orch_buf_slice(&bad, (struct orch_slice){ good.p, good.n });
    bad.p[63] = 2; /* user_version: big-endian at 60 */
    spill(db_path, bad.p, bad.n);
    expect_no_db(EPROTO, "has format 2, this orch knows 1");
    bad.p[63] = 0;
    spill(db_path, bad.p, bad.n);
    expect_no_db(EPROTO, "has format 0");
    slurp(db_path, &after);
    assert_memory_equal(after.p, bad.p, bad.n);
}

static void test_db_at_once(void **state)
{
    (void)state;
    enum { N = 8 };
    int go[2];
    assert_int_equal(pipe(go), 0);
    for (int i = 0; i < N; i++) {
        if (fork())
            continue;
        close(go[1]);
        char c, folder[16];
        CHECK(read(go[0], &c, 1) == 0);
        struct orch_err err;
        struct orch_db *db = orch_db_open(db_path, &err);
        if (!db)
            fprintf(stderr, "%s\n", err.msg);
        CHECK(db);
        snprintf(folder, sizeof folder, "/%d", i);
        struct orch_trust_file f = trust_file("x", 'a');
        CHECK(orch_db_trust_set(db, folder, false, &f, 1, &err) == 0);
        orch_db_close(db);
        _exit(0);
    }
    close(go[0]);
    close(go[1]);
    await_children(N);
    struct orch_db *db = open_db();
    for (int i = 0; i < N; i++) {
        char folder[16];
        snprintf(folder, sizeof folder, "/%d", i);
        struct orch_trust_file f = trust_file("x", 'a');
        expect_trust(db, folder, false, &f, 1);
    }
    orch_db_close(db);
}

static void test_db_busy(void **state)
{
    (void)state;
    struct orch_db *db = open_db();
    int up[2];
    assert_int_equal(pipe(up), 0);
    pid_t holder = fork();
    if (holder == 0) {
        /* SQLite's reserved lock, as a process in the middle of a write holds it. */
        int fd = open(db_path, O_RDWR | O_CLOEXEC);
        struct flock l = {
            .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0x40000001, .l_len = 1
        };
        CHECK(fd >= 0 && fcntl(fd, F_SETLK, &l) == 0);
        CHECK(write(up[1], "x", 1) == 1);
        for (;;)
            pause();
    }
    char c;
    assert_int_equal(read(up[0], &c, 1), 1);
    close(up[0]);
    close(up[1]);
    struct orch_err err;
    int64_t start = orch_now_us();
    assert_int_equal(orch_db_trust_set(db, "/a", true, NULL, 0, &err), -EBUSY);
    assert_true(orch_now_us() - start >= 4500000);
    assert_non_null(strstr(err.msg, "another process held it"));
    expect_no_trust(db, "/a"); /* reading goes on */
    kill(holder, SIGKILL);
    waitpid(holder, NULL, 0);
    assert_int_equal(orch_db_trust_set(db, "/a", true, NULL, 0, &err), 0);
    expect_trust(db, "/a", true, NULL, 0);
    orch_db_close(db);
}

/* ---- Handles in threads of one program that start at once: one key, and a log each. */

struct opener {
    pthread_barrier_t *at_once;
    char why[256];
};

static void *open_at_once(void *ud)
{
    struct opener *o = ud;
    struct orch_err err;
    struct orch_loop *own = orch_loop_new(&err);
    pthread_barrier_wait(o->at_once);
    struct orch_audit *a = orch_audit_open(own, logs, key_path, ORCH_AUDIT_SYNC_NONE, &err);
    if (!a)
        snprintf(o->why, sizeof o->why, "%.255s", err.msg);
    orch_audit_close(a);
    orch_loop_free(own);
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    for (int round = 0; round < 50; round++) {
        struct opener openers[4] = { 0 };
        snprintf(logs, sizeof logs, "%s/%d/audit", dir, round);
        snprintf(key_path, sizeof key_path, "%s/%d/audit.key", dir, round);
        pthread_t threads[4];
        pthread_barrier_t at_once;
        pthread_barrier_init(&at_once, NULL, 4);
        for (int i = 0; i < 4; i++) {
            openers[i].at_once = &at_once;
            assert_int_equal(pthread_create(&threads[i], NULL, open_at_once, &openers[i]), 0);
        }
        for (int i = 0; i < 4; i++)
            assert_int_equal(pthread_join(threads[i], NULL), 0);
        pthread_barrier_destroy(&at_once);
        for (int i = 0; i < 4; i++)
            assert_string_equal(openers[i].why, "");
    }
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_lines),        TEST(test_refused_lines),  TEST(test_queue_is_bounded),
        TEST(test_digest),       TEST(test_head_by_timer),  TEST(test_reservation),
        TEST(test_open_refused), TEST(test_open_at_once),   TEST(test_threads),
        TEST(test_tamper_bytes), TEST(test_tamper_lines),   TEST(test_tamper_chain),
        TEST(test_full_before),  TEST(test_full_during),    TEST(test_full_flush),
        TEST(test_limit_flush),  TEST(test_cannot_reserve), TEST(test_killed_writer),
        TEST(test_set),          TEST(test_set_good),       TEST(test_set_clock),
        TEST(test_keep),         TEST(test_lost),           TEST(test_lost_refused),
        TEST(test_unreadable),   TEST(test_floor),          TEST(test_trust),
        TEST(test_db_refused),   TEST(test_db_at_once),     TEST(test_db_busy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
