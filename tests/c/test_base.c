/* core/base but for JSON: util, err, log, loop, hash, proc. */
#include "base/hash.h"
#include "base/log.h"
#include "base/proc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "odd_locale.h"

static char dir[64];

static int make_dir(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/orch-test-base-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd);
}

/* ---- util */

static void test_buf(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_str(&b, "ab");
    orch_buf_char(&b, 'c');
    orch_buf_add(&b, "\0d", 2);
    assert_int_equal(b.n, 5);
    assert_memory_equal(b.p, "abc\0d", 6);
    orch_buf_consume(&b, 3);
    assert_memory_equal(b.p, "\0d", 3);
    orch_buf_consume(&b, 99);
    assert_int_equal(b.n, 0);
    assert_int_equal(b.p[0], 0);

    char big[1000];
    memset(big, 'x', sizeof big - 1);
    big[sizeof big - 1] = 0;
    orch_buf_printf(&b, "%s-%d", big, 7);
    assert_int_equal(b.n, sizeof big - 1 + 2);
    assert_string_equal(b.p + sizeof big - 1, "-7");
    b.n = 0;
    orch_buf_hex(&b, "\x00\xff\x1a", 3);
    assert_string_equal(b.p, "00ff1a");
    for (size_t i = 0; i < 100000; i++)
        orch_buf_char(&b, 'y');
    assert_int_equal(strlen(b.p), 100006);

    assert_true(orch_slice_eq(ORCH_SLICE("abc"), "abc"));
    assert_false(orch_slice_eq(ORCH_SLICE("abc"), "ab"));
    assert_int_equal(orch_slice_str(NULL).n, 0);
}

/* Many writers of one file, in threads: it is always one writer's, and whole. */

struct writer {
    const char *path;
    char letter;
    int torn, error;
};

static void *write_often(void *ud)
{
    struct writer *w = ud;
    char text[8192];
    memset(text, w->letter, sizeof text);
    for (int i = 0; i < 300 && !w->error && !w->torn; i++) {
        cleanup_buf struct orch_buf b = { 0 };
        w->error = orch_write_file(AT_FDCWD, w->path, text, sizeof text, 0600);
        if (!w->error && (w->error = orch_read_file(AT_FDCWD, w->path, sizeof text, &b)) == 0)
            w->torn = b.n != sizeof text || memcmp(b.p, b.p + 1, b.n - 1) != 0;
    }
    return NULL;
}

static void test_writers(void **state)
{
    (void)state;
    struct writer writers[4];
    pthread_t threads[4];
    cleanup_free char *path = orch_xasprintf("%s/written", dir);
    for (int i = 0; i < 4; i++) {
        writers[i] = (struct writer){ path, (char)('a' + i), 0, 0 };
        assert_int_equal(pthread_create(&threads[i], NULL, write_often, &writers[i]), 0);
    }
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(writers[i].error, 0);
        assert_false(writers[i].torn);
    }
}

static void test_parse(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t ms, bytes;
    } table[] = {
        { "250ms", 250, -1 },      { "30s", 30000, -1 },
        { "5m", 300000, -1 },      { "1h", 3600000, -1 },
        { "90d", 7776000000, -1 }, { "1D", -1, -1 },
        { "1.5s", 1500, -1 },      { "64K", -1, 65536 },
        { "256M", -1, 1 << 28 },   { "2G", -1, INT64_C(1) << 31 },
        { "12", -1, 12 },          { "0", -1, 0 },
        { "0s", 0, -1 },           { "", -1, -1 },
        { "-1s", -1, -1 },         { " 1s", -1, -1 },
        { "1s ", -1, -1 },         { "1 s", -1, -1 },
        { "s", -1, -1 },           { "0x10s", -1, -1 },
        { "1e3s", -1, -1 },        { "infs", -1, -1 },
        { "nan", -1, -1 },         { "1S", -1, -1 },
        { "1k", -1, -1 },          { "99999999999999999G", -1, -1 },
        { "+1s", -1, -1 },         { "1ss", -1, -1 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        if (orch_parse_duration_ms(table[i].text) != table[i].ms ||
            orch_parse_size_bytes(table[i].text) != table[i].bytes)
            fail_msg("\"%s\": %lld ms, %lld bytes", table[i].text,
                     (long long)orch_parse_duration_ms(table[i].text),
                     (long long)orch_parse_size_bytes(table[i].text));
    }
}

static void test_files(void **state)
{
    (void)state;
    cleanup_free char *deep = orch_xasprintf("%s/a/b/c", dir);
    assert_int_equal(orch_mkdir_p(deep, 0700), 0);
    assert_int_equal(orch_mkdir_p(deep, 0700), 0);
    struct stat st;
    assert_int_equal(stat(deep, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0700);

    cleanup_close int fd = open(deep, O_PATH | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(orch_write_file(fd, "f", "one", 3, 0600), 0);
    assert_int_equal(orch_write_file(fd, "f", "second", 6, 0600), 0);
    assert_int_equal(fstatat(fd, "f", &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    cleanup_buf struct orch_buf b = { 0 };
    assert_int_equal(orch_read_file(fd, "f", 6, &b), 0);
    assert_string_equal(b.p, "second");
    assert_int_equal(orch_read_file(fd, "f", 5, &b), -EFBIG);
    assert_int_equal(orch_read_file(fd, "g", 5, &b), -ENOENT);
    assert_int_equal(orch_read_file(fd, ".", 5, &b), -EISDIR);
    /* Size 0 by stat, bytes all the same. */
    b.n = 0;
    assert_int_equal(orch_read_file(AT_FDCWD, "/proc/self/stat", 65536, &b), 0);
    assert_true(b.n > 10);
    assert_int_equal(orch_read_file(AT_FDCWD, "/proc/self/stat", 10, &b), -EFBIG);
    /* Nothing of the writing is left beside the file, and a file is no folder. */
    int n = 0;
    DIR *d = opendir(deep);
    while (readdir(d))
        n++;
    closedir(d);
    assert_int_equal(n, 3);
    cleanup_free char *through = orch_xasprintf("%s/f/x", deep);
    assert_int_equal(orch_mkdir_p(through, 0700), -ENOTDIR);
}

static void test_small(void **state)
{
    (void)state;
    static const char *const known[] = { "status", "reload", "version", NULL };
    assert_string_equal(orch_nearest("statsu", known), "status");
    assert_string_equal(orch_nearest("verson", known), "version");
    assert_null(orch_nearest("banana", known));

    uint8_t a[64] = { 0 }, b[64] = { 0 };
    assert_int_equal(orch_random(a, sizeof a), 0);
    assert_int_equal(orch_random(b, sizeof b), 0);
    assert_memory_not_equal(a, b, sizeof a);

    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC), kept;
    {
        cleanup_close int scoped = fd;
        kept = orch_steal_fd(&scoped);
    }
    assert_int_equal(fcntl(kept, F_GETFD), FD_CLOEXEC);
    {
        cleanup_close int scoped = kept;
        (void)scoped;
    }
    assert_int_equal(fcntl(kept, F_GETFD), -1);
    cleanup_free char *s = orch_xstrdup("x");
    char *taken = orch_steal_ptr(&s);
    assert_null(s);
    free(taken);
    assert_null(orch_xstrdup(NULL));
}

/* ---- err */

static void test_err(void **state)
{
    (void)state;
    struct orch_err err;
    assert_int_equal(orch_err_set(&err, ENOENT, "%s is missing", "x"), -ENOENT);
    assert_int_equal(err.cls, ORCH_CLASS_FAILED);
    assert_int_equal(orch_err_wrap(&err, "open %d", 7), -ENOENT);
    assert_string_equal(err.msg, "open 7: x is missing");
    assert_int_equal(orch_err_setc(&err, ORCH_CLASS_ISOLATION, 0, "no VMM"), -EIO);
    assert_int_equal(orch_class_exit(err.cls), 5);
    assert_string_equal(orch_class_name(err.cls), "isolation");
    assert_int_equal(orch_class_exit(ORCH_CLASS_TIMEOUT), 1);
    assert_string_equal(orch_class_name(ORCH_CLASS_CLOSED), "closed");
    assert_int_equal(orch_err_set(NULL, EPERM, "nobody looks"), -EPERM);

    /* Longer than there is room for: cut, terminated, the code kept. */
    char big[sizeof err.msg];
    memset(big, 'w', sizeof big - 1);
    big[sizeof big - 1] = 0;
    orch_err_set(&err, EPERM, "%s%s", big, big);
    assert_int_equal(strlen(err.msg), sizeof err.msg - 1);
    assert_int_equal(orch_err_wrap(&err, "%s", "context"), -EPERM);
    assert_int_equal(strlen(err.msg), sizeof err.msg - 1);
    assert_memory_equal(err.msg, "context: w", 10);
    orch_err_set(&err, EPERM, "cause");
    orch_err_wrap(&err, "%s%s", big, big);
    assert_int_equal(strlen(err.msg), sizeof err.msg - 1);
}

/* ---- log */

static void collect(void *ud, const char *line, size_t n)
{
    orch_buf_add(ud, line, n);
}

static void test_log(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf out = { 0 };
    struct orch_log log = { ORCH_WARN, false, collect, &out };
    assert_null(orch_log_use(&log));
    orch_log(ORCH_INFO, "not shown");
    assert_int_equal(out.n, 0);
    orch_log(ORCH_WARN, "a\nb \x1b[31m %s",
             "\xe2\x80\xae"
             "c");
    assert_string_equal(out.p, "orch: warn: a\\nb \\x1b[31m \\xe2\\x80\\xaec\n");
    out.n = 0;
    log.least = ORCH_DEBUG;
    orch_log(ORCH_INFO, "shown");
    assert_string_equal(out.p, "orch: shown\n");
    out.n = 0;
    log.json = true;
    orch_log_fields(ORCH_ERROR, ORCH_SLICE("quote \" here"), ORCH_SLICE("{\"k\":1}"));
    assert_non_null(
        strstr(out.p, "\"level\":\"error\",\"msg\":\"quote \\\" here\",\"fields\":{\"k\":1}}\n"));
    assert_memory_equal(out.p, "{\"ts\":\"20", 9);
    assert_ptr_equal(orch_log_use(NULL), &log);
    assert_true(orch_log_on(ORCH_WARN) && !orch_log_on(ORCH_INFO));
    assert_int_equal(orch_log_parse_level("warn"), ORCH_WARN);
    assert_int_equal(orch_log_parse_level("loud"), -1);
}

static void test_escape(void **state)
{
    (void)state;
    static const struct {
        const char *in, *out;
    } table[] = {
        { "plain \xc3\xa4 \xe2\x82\xac \xf0\x9f\x98\x80",
          "plain \xc3\xa4 \xe2\x82\xac \xf0\x9f\x98\x80" },
        { "\x1b]0;t\x07", "\\x1b]0;t\\x07" },
        { "\x7f\r\t", "\\x7f\\x0d\t" },
        { "\xc2\x9b", "\\xc2\\x9b" },                   /* C1 CSI */
        { "\xe2\x80\x8b", "\\xe2\\x80\\x8b" },          /* zero width space */
        { "\xe2\x80\xa8", "\\xe2\\x80\\xa8" },          /* line separator */
        { "\xe2\x81\xa6", "\\xe2\\x81\\xa6" },          /* bidi isolate */
        { "\xef\xbb\xbf", "\\xef\\xbb\\xbf" },          /* byte-order mark */
        { "\xf3\xa0\x81\x81", "\\xf3\\xa0\\x81\\x81" }, /* tag */
        { "\xff\xc3", "\\xff\\xc3" },                   /* not UTF-8 */
        { "\xed\xa0\x80", "\\xed\\xa0\\x80" },          /* surrogate */
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        cleanup_buf struct orch_buf out = { 0 };
        orch_escape_terminal(&out, orch_slice_str(table[i].in), false);
        assert_string_equal(out.p, table[i].out);
    }
    cleanup_buf struct orch_buf out = { 0 };
    orch_escape_terminal(&out, ORCH_SLICE("a\nb"), true);
    assert_string_equal(out.p, "a\nb");
}

/* ---- loop */

static struct orch_loop *loop;

static int make_loop(void **state)
{
    (void)state;
    loop = orch_loop_new(NULL);
    return loop ? 0 : -1;
}

static int free_loop(void **state)
{
    (void)state;
    orch_loop_free(loop);
    loop = NULL;
    return 0;
}

#define WAIT_MS 60000

/* Turns the loop until *done. */
static void await(const int *done)
{
    int64_t until = orch_now_us() + WAIT_MS * 1000;
    while (!*done && orch_now_us() < until)
        orch_loop_step(loop, 1000);
    assert_true(*done);
}

static char order[64];

static void note_a(void *ud)
{
    strcat(order, ud);
}

static void post_more(void *ud)
{
    strcat(order, ud);
    orch_loop_post(loop, note_a, (void *)(uintptr_t) "4");
}

static void test_post(void **state)
{
    (void)state;
    char one[] = "1", two[] = "2", three[] = "3";
    order[0] = 0;
    orch_loop_post(loop, note_a, one);
    orch_loop_post(loop, post_more, two);
    orch_loop_post(loop, note_a, three);
    assert_string_equal(order, "");
    orch_loop_step(loop, 0);
    orch_loop_step(loop, 0);
    assert_string_equal(order, "1234"); /* what a callback posts waits for the next turn */
    orch_loop_post(loop, note_a, one);
    orch_loop_post(loop, note_a, two);
    orch_loop_unpost(loop, note_a, two);
    orch_loop_step(loop, 0);
    assert_string_equal(order, "12341");
}

/* Closed in time, or with the loop. */
static void test_loop_close(void **state)
{
    (void)state;
    for (int late = 0; late < 2; late++) {
        struct orch_err err;
        struct orch_loop *l = orch_loop_new(&err);
        int a[2], b[2];
        char c;
        assert_true(pipe2(a, O_CLOEXEC | O_NONBLOCK) == 0 && pipe2(b, O_CLOEXEC | O_NONBLOCK) == 0);
        orch_loop_close(l, -1, 0);
        orch_loop_close(l, a[1], late ? 60000 : 1);
        orch_loop_close(l, b[1], 60000);
        assert_true(read(a[0], &c, 1) == -1 && errno == EAGAIN);
        for (int64_t end_us = orch_now_us() + WAIT_MS * 1000; !late && read(a[0], &c, 1) != 0;) {
            assert_true(orch_now_us() < end_us);
            orch_loop_step(l, 10);
        }
        assert_true(read(b[0], &c, 1) == -1 && errno == EAGAIN);
        orch_loop_free(l);
        assert_true(read(a[0], &c, 1) == 0 && read(b[0], &c, 1) == 0);
        close(a[0]);
        close(b[0]);
    }
}

static void test_timers(void **state)
{
    (void)state;
    char b[] = "b", a[] = "a", c[] = "c";
    order[0] = 0;
    struct orch_timer *tb = orch_timer_new(loop, note_a, b), *ta = orch_timer_new(loop, note_a, a);
    struct orch_timer *tc = orch_timer_new(loop, note_a, c);
    orch_timer_set(tb, 20);
    orch_timer_set(ta, 5000);
    orch_timer_set(ta, 1); /* replaces */
    orch_timer_set(tc, 2);
    orch_timer_cancel(tc);
    int64_t start = orch_now_us();
    while (strlen(order) < 2 && orch_now_us() - start < WAIT_MS * 1000)
        orch_loop_step(loop, 1000);
    assert_string_equal(order, "ab");
    assert_true(orch_now_us() - start >= 12000); /* the loop's clock is coarse */
    start = orch_now_us();
    orch_loop_step(loop, 30); /* nothing is due: the bound counts */
    assert_true(orch_now_us() - start >= 20000);
    assert_string_equal(order, "ab");
    orch_timer_free(ta);
    orch_timer_free(tb);
    orch_timer_free(tc);
    assert_true(orch_loop_now_ms(loop) <= orch_now_us() / 1000);
}

struct watched {
    struct orch_watch *w;
    int fired, events;
};

static void watch_fired(void *ud, int events)
{
    struct watched *x = ud;
    x->fired++;
    x->events = events;
}

static void watch_fired_and_free(void *ud, int events)
{
    struct watched *x = ud;
    watch_fired(ud, events);
    orch_watch_free(x->w);
    x->w = NULL;
}

static void test_watch(void **state)
{
    (void)state;
    int p[2];
    assert_int_equal(pipe2(p, O_CLOEXEC | O_NONBLOCK), 0);
    struct watched x = { 0 };
    x.w = orch_watch_new(loop, p[0], ORCH_READ, watch_fired, &x);
    orch_loop_step(loop, 0);
    assert_int_equal(x.fired, 0);
    assert_int_equal(write(p[1], "x", 1), 1);
    orch_loop_step(loop, 1000);
    orch_loop_step(loop, 1000); /* persistent and level-triggered */
    assert_int_equal(x.fired, 2);
    assert_int_equal(x.events, ORCH_READ);
    orch_watch_set(x.w, 0);
    orch_loop_step(loop, 0);
    assert_int_equal(x.fired, 2);
    orch_watch_set(x.w, ORCH_READ);
    orch_loop_step(loop, 1000);
    assert_int_equal(x.fired, 3);
    orch_watch_free(x.w);

    struct watched y = { 0 };
    y.w = orch_watch_new(loop, p[1], ORCH_WRITE, watch_fired_and_free, &y);
    orch_loop_step(loop, 1000);
    orch_loop_step(loop, 0);
    assert_int_equal(y.fired, 1);
    assert_int_equal(y.events, ORCH_WRITE);
    close(p[0]);
    close(p[1]);
}

static int hups;

static void on_hup(void *ud)
{
    hups++;
    orch_loop_stop(ud);
}

static void test_signal(void **state)
{
    (void)state;
    assert_int_equal(orch_loop_signal(loop, SIGHUP, on_hup, loop), 0);
    raise(SIGHUP);
    orch_loop_run(loop);
    assert_int_equal(hups, 1);
}

/* ---- hash */

static void assert_hex(const uint8_t *digest, const char *hex)
{
    char text[2 * ORCH_SHA256_BYTES + 1];
    orch_hex(digest, ORCH_SHA256_BYTES, text);
    assert_string_equal(text, hex);
}

static void test_sha256(void **state)
{
    (void)state;
    char hex[65];
    orch_sha256_hex("", 0, hex);
    assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    orch_sha256_hex("abc", 3, hex);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    static const char two[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    orch_sha256_hex(two, sizeof two - 1, hex);
    assert_string_equal(hex, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");

    char *million = malloc(1000000);
    uint8_t digest[ORCH_SHA256_BYTES];
    memset(million, 'a', 1000000);
    struct orch_sha256_ctx c;
    orch_sha256_init(&c);
    for (size_t at = 0, n = 1; at < 1000000; at += n, n = n * 3 + 1) {
        if (n > 1000000 - at)
            n = 1000000 - at;
        orch_sha256_update(&c, million + at, n);
    }
    orch_sha256_final(&c, digest);
    free(million);
    assert_hex(digest, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

/* RFC 4231; case 5 is a truncated digest, its first 128 bits are compared. */
static void test_hmac(void **state)
{
    (void)state;
    uint8_t k[131], data[50];
    static const char big[] = "This is a test using a larger than block-size key and a larger than "
                              "block-size data. The key "
                              "needs to be hashed before being used by the HMAC algorithm.";
    struct {
        size_t n_key;
        int fill; /* 0: the key is 01 02 03 …, -1: "Jefe" */
        const char *text;
        size_t n_text;
        const char *hex;
    } table[] = {
        { 20, 0x0b, "Hi There", 8,
          "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7" },
        { 4, -1, "what do ya want for nothing?", 28,
          "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843" },
        { 20, 0xaa, NULL, 0xdd,
          "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe" },
        { 25, 0, NULL, 0xcd, "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b" },
        { 20, 0x0c, "Test With Truncation", 20, "a3b6167473100ee06e0c796c2955552b" },
        { 131, 0xaa, "Test Using Larger Than Block-Size Key - Hash Key First", 54,
          "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54" },
        { 131, 0xaa, big, sizeof big - 1,
          "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        memset(k, table[i].fill, sizeof k);
        if (table[i].fill == -1)
            memcpy(k, "Jefe", 4);
        for (size_t j = 0; !table[i].fill && j < table[i].n_key; j++)
            k[j] = (uint8_t)(j + 1);
        if (!table[i].text)
            memset(data, (int)table[i].n_text, sizeof data);
        struct orch_hmac_key key;
        orch_hmac_key_init(&key, k, table[i].n_key);
        for (int again = 0; again < 2; again++) { /* the saved states are not used up */
            uint8_t mac[ORCH_SHA256_BYTES];
            char text[65];
            orch_hmac(&key, table[i].text ? table[i].text : (char *)data,
                      table[i].text ? table[i].n_text : sizeof data, mac);
            orch_hex(mac, sizeof mac, text);
            assert_memory_equal(text, table[i].hex, strlen(table[i].hex));
        }
    }
    assert_true(orch_equal_ct("abc", "abc", 3));
    assert_false(orch_equal_ct("abc", "abd", 3));
}

/* ---- proc */

struct run {
    struct orch_proc *p;
    int done, status, calls;
    bool free_inside;
    struct orch_buf tail;
};

static void on_exit_call(void *ud, int status)
{
    struct run *r = ud;
    r->done = 1;
    r->calls++;
    r->status = status;
    orch_buf_slice(&r->tail, orch_proc_stderr(r->p));
    if (r->free_inside) {
        orch_proc_free(r->p);
        r->p = NULL;
    }
}

static const char *const path_env[] = { "PATH=/usr/bin:/bin", NULL };

static struct orch_proc_opts shell(struct run *r, const char *const *argv)
{
    return (
        struct orch_proc_opts){ .argv = argv, .env = path_env, .on_exit = on_exit_call, .ud = r };
}

static void start(struct run *r, const struct orch_proc_opts *o)
{
    struct orch_err err;
    r->p = orch_proc_start(loop, o, &err);
    if (!r->p)
        fail_msg("%s", err.msg);
    assert_int_equal(r->calls, 0);
}

static void end(struct run *r)
{
    orch_proc_free(r->p);
    orch_buf_free(&r->tail);
    assert_true(r->calls <= 1);
}

#define SH(script) ((const char *const[]){ "sh", "-c", script, NULL })

/* Reads fd, which is a non-blocking pipe, to its end. */
static void read_end(int fd, struct orch_buf *out)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };
    char chunk[4096];
    for (;;) {
        assert_int_equal(poll(&pfd, 1, WAIT_MS), 1);
        ssize_t n = read(fd, chunk, sizeof chunk);
        assert_true(n >= 0);
        if (n == 0)
            return;
        orch_buf_add(out, chunk, (size_t)n);
    }
}

static void test_proc_status(void **state)
{
    (void)state;
    static const struct {
        const char *script, *text;
    } table[] = {
        { "exit 0", "exit status 0" },
        { "exit 3", "exit status 3" },
        { "exit 255", "exit status 255" },
        { "kill -9 $$", "killed by signal 9 (Killed)" },
        { "kill -TERM $$", "killed by signal 15 (Terminated)" },
        { "ulimit -c 0; kill -SEGV $$", "killed by signal 11 (Segmentation fault)" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        struct run r = { 0 };
        struct orch_proc_opts o = shell(&r, SH(table[i].script));
        start(&r, &o);
        await(&r.done);
        char text[64];
        orch_proc_describe(r.status, text, sizeof text);
        assert_string_equal(text, table[i].text);
        end(&r);
    }
}

static void test_proc_stdio(void **state)
{
    (void)state;
    struct run r = { .free_inside = true };
    struct orch_proc_opts o = shell(&r, (const char *const[]){ "cat", NULL });
    start(&r, &o);
    assert_true(fcntl(orch_proc_stdin(r.p), F_GETFL) & O_NONBLOCK);
    assert_true(fcntl(orch_proc_stdout(r.p), F_GETFL) & O_NONBLOCK);
    assert_int_equal(write(orch_proc_stdin(r.p), "hello", 5), 5);
    orch_proc_close_stdin(r.p);
    assert_int_equal(orch_proc_stdin(r.p), -1);
    cleanup_buf struct orch_buf out = { 0 };
    read_end(orch_proc_stdout(r.p), &out);
    assert_string_equal(out.p, "hello");
    await(&r.done);
    assert_int_equal(r.status, 0);
    end(&r);

    struct run null = { 0 };
    o = shell(&null,
              SH("read x && exit 9; echo gone; [ \"$(readlink /proc/$$/fd/0)\" = /dev/null ]"));
    o.null_stdio = true;
    start(&null, &o);
    assert_int_equal(orch_proc_stdin(null.p), -1);
    assert_int_equal(orch_proc_stdout(null.p), -1);
    await(&null.done);
    assert_int_equal(null.status, 0);
    end(&null);
}

static void test_proc_stderr(void **state)
{
    (void)state;
    struct run r = { 0 };
    struct orch_proc_opts o =
        shell(&r, SH("head -c 10000000 /dev/zero | tr '\\0' x >&2; printf end >&2; exit 3"));
    o.stderr_keep = 1000;
    start(&r, &o);
    await(&r.done);
    assert_int_equal(WEXITSTATUS(r.status), 3);
    assert_int_equal(r.tail.n, 1000);
    assert_string_equal(r.tail.p + 996, "xend");
    assert_int_equal(r.tail.p[0], 'x');
    end(&r);

    /* The exit is known before stderr is read: the last words are not lost. */
    struct run late = { 0 };
    o = shell(&late, SH("head -c 60000 /dev/zero | tr '\\0' x >&2; printf end >&2"));
    start(&late, &o);
    siginfo_t si;
    assert_int_equal(waitid(P_PID, (id_t)orch_proc_pid(late.p), &si, WEXITED | WNOWAIT), 0);
    await(&late.done);
    assert_int_equal(late.tail.n, 8192);
    assert_string_equal(late.tail.p + 8188, "xend");
    end(&late);
}

/* A pipe whose writing end only children hold: its end of file tells that all of them are gone. */
static void await_gone(int fd)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };
    assert_int_equal(poll(&pfd, 1, WAIT_MS), 1);
    char c;
    assert_int_equal(read(fd, &c, 1), 0);
    close(fd);
}

static void test_proc_group(void **state)
{
    (void)state;
    /* What a child leaves behind holds stderr: on_exit comes all the same, and free ends it. */
    struct run r = { 0 };
    struct orch_proc_opts o = shell(&r, SH("sleep 1000 & echo said >&2; exit 4"));
    int p[2];
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    o.fds[o.n_fds++] = p[1];
    start(&r, &o);
    close(p[1]);
    await(&r.done);
    assert_int_equal(WEXITSTATUS(r.status), 4);
    assert_string_equal(r.tail.p, "said\n");
    end(&r);
    await_gone(p[0]);

    /* kill reaches the whole group. */
    struct run k = { 0 };
    o = shell(&k, SH("sleep 1000 & echo up; wait"));
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    o.fds[o.n_fds++] = p[1];
    start(&k, &o);
    close(p[1]);
    struct pollfd pfd = { .fd = orch_proc_stdout(k.p), .events = POLLIN };
    assert_int_equal(poll(&pfd, 1, WAIT_MS), 1);
    assert_int_equal(getpgid(orch_proc_pid(k.p)), orch_proc_pid(k.p));
    orch_proc_kill(k.p, SIGTERM);
    await_gone(p[0]);
    await(&k.done);
    assert_int_equal(WTERMSIG(k.status), SIGTERM);
    end(&k);

    /* A child that left its group is reached too; free of a running child calls nobody. */
    struct run s = { 0 };
    o = shell(&s, (const char *const[]){
                      "perl", "-e",
                      "setpgrp(0, getpgrp(getppid())); syswrite(STDOUT, 'x'); sleep 1000", NULL });
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    o.fds[o.n_fds++] = p[1];
    start(&s, &o);
    close(p[1]);
    pfd.fd = orch_proc_stdout(s.p);
    assert_int_equal(poll(&pfd, 1, WAIT_MS), 1);
    assert_int_equal(getpgid(orch_proc_pid(s.p)), getpgrp());
    end(&s);
    assert_int_equal(s.calls, 0);
    await_gone(p[0]);
}

static void test_proc_log(void **state)
{
    (void)state;
    struct run r = { 0 };
    cleanup_buf struct orch_buf log = { 0 };
    struct orch_proc_opts o =
        shell(&r,
              SH("printf 'one\\ntwo' >&2; printf ' halves\\n\\n10%%\\r20%%\\r\\033[1mbold' >&2; "
                 "printf '\\n%5000s' x >&2"));
    o.log_as = "it";
    orch_log_use(&(struct orch_log){ ORCH_INFO, false, collect, &log });
    start(&r, &o);
    await(&r.done);
    struct orch_slice last = orch_proc_stderr_line(r.p);
    assert_int_equal(last.n, 5000);
    end(&r);
    static const char head[] = "orch: it: one\norch: it: two halves\norch: it: 10%\norch: it: "
                               "20%\norch: it: \\x1b[1mbold\norch: it:     ";
    assert_memory_equal(log.p, head, sizeof head - 1);
    assert_in_range(log.n, 1000, 1300); /* the last line is cut */

    /* Many lines at once: some, and how many more there were. */
    struct run many = { 0 };
    o = shell(&many,
              SH("yes 'a line' | head -n 100000 >&2; printf '\\n  \\nlast of them \\r\\n' >&2"));
    o.log_as = "it";
    log.n = 0;
    start(&many, &o);
    await(&many.done);
    last = orch_proc_stderr_line(many.p);
    assert_true(orch_slice_eq(last, "last of them"));
    end(&many);
    assert_non_null(strstr(log.p, "lines of its stderr are left out here\n"));
    assert_true(log.n < 1 << 20);
    orch_log_use(NULL);
}

static void nothing(int signo)
{
    (void)signo;
}

/* Each child says on its descriptor 3 how it ended; all but the last end as they want to. */
static void test_proc_end(void **state)
{
    (void)state;
    static const struct {
        const char *script, *says;
        int64_t eof_ms, term_ms;
        bool signal; /* to us, while we wait */
    } table[] = {
        { "echo up; cat >&2; echo input ended >&3", "input ended\n", 20000, 20000, false },
        { "echo up; cat; head -c 10000000 /dev/zero; head -c 1000000 /dev/zero >&2; echo all "
          "written >&3",
          "all written\n", 20000, 20000, false },
        { "trap 'echo term >&3; exit' TERM; echo up; while :; do sleep 0.01; done", "term\n", 50,
          20000, false },
        { "trap 'echo term >&3; exit' TERM; echo up; while :; do sleep 0.01; done", "term\n", 20000,
          20000, true },
        /* The wrapper goes at once, what it started has something to save. */
        { "(trap 'sleep 0.2; echo saved >&3; exit' TERM; echo up; while :; do sleep 0.01; done) & "
          "wait",
          "saved\n", 50, 20000, false },
        { "trap '' TERM; echo up; while :; do sleep 0.01; done", "", 50, 50, false },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        struct run r = { 0 };
        struct orch_proc_opts o = shell(&r, SH(table[i].script));
        cleanup_buf struct orch_buf said = { 0 };
        int p[2];
        assert_int_equal(pipe2(p, O_CLOEXEC), 0);
        o.fds[o.n_fds++] = p[1];
        start(&r, &o);
        close(p[1]);
        struct pollfd pfd = { .fd = orch_proc_stdout(r.p), .events = POLLIN };
        assert_int_equal(poll(&pfd, 1, 10000), 1);
        if (i == 0)
            assert_int_equal(write(orch_proc_stdin(r.p), "bye\n", 4), 4);
        int64_t begun = orch_now_us();
        if (table[i].signal) {
            assert_int_equal(sigaction(SIGALRM,
                                       &(struct sigaction){ .sa_handler = nothing,
                                                            .sa_flags = SA_RESTART },
                                       NULL),
                             0);
            setitimer(ITIMER_REAL, &(struct itimerval){ .it_value = { .tv_usec = 100000 } }, NULL);
        }
        orch_proc_end(r.p, table[i].eof_ms, table[i].term_ms);
        /* no limit was waited for that is not the last one's */
        assert_true(orch_now_us() - begun < 15000000);
        if (i == 0)
            assert_true(orch_slice_eq(orch_proc_stderr(r.p), "bye\n"));
        end(&r);
        assert_int_equal(r.calls, 0);
        read_end(p[0], &said);
        assert_string_equal(said.p ? said.p : "", table[i].says);
        close(p[0]);
    }
}

static void test_proc_inherits_nothing(void **state)
{
    (void)state;
    /* As a careless embedder opens: without CLOEXEC. */
    int leak = fcntl(open("/dev/null", O_RDONLY | O_CLOEXEC), F_DUPFD, 50),
        high = fcntl(leak, F_DUPFD, 500);
    int given = fcntl(open("/etc/passwd", O_RDONLY | O_CLOEXEC), F_DUPFD_CLOEXEC, 50);
    /* The number a passed descriptor gets may be another's source. */
    assert_int_equal(dup2(given, 3), 3);
    assert_int_equal(dup2(leak, 4), 4);
    loop = orch_loop_new(NULL);
    int in = fcntl(0, F_DUPFD_CLOEXEC, 50);
    close(0); /* pipes may get the numbers of stdin to stderr */

    signal(SIGUSR1, SIG_IGN);
    sigset_t set, before;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigprocmask(SIG_BLOCK, &set, &before);

    struct run r = { 0 };
    static const char *const env[] = { "PATH=/usr/bin:/bin", "ONLY=this", NULL };
    struct orch_proc_opts o = shell(&r, SH("readlink /proc/$$/fd/3 /proc/$$/fd/4; ls /proc/self/fd "
                                           "| tr '\\n' ' '; env | grep -v _=;"
                                           "pwd; grep -E 'Sig(Blk|Ign)' /proc/self/status"));
    o.env = env;
    o.cwd = "/usr";
    o.fds[0] = 4;
    o.fds[1] = 3;
    o.n_fds = 2;
    start(&r, &o);
    cleanup_buf struct orch_buf out = { 0 };
    read_end(orch_proc_stdout(r.p), &out);
    await(&r.done);
    end(&r);
    assert_int_equal(dup2(in, 0), 0);
    close(in);
    sigprocmask(SIG_SETMASK, &before, NULL);
    signal(SIGUSR1, SIG_DFL);
    close(leak);
    close(high);
    close(given);
    close(3);
    close(4);
    /* 5 is the folder that ls reads. */
    assert_string_equal(
        out.p, "/dev/null\n/etc/passwd\n0 1 2 3 4 5 PATH=/usr/bin:/bin\nONLY=this\nPWD=/usr\n/usr\n"
               "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

static void write_mode(const char *name, const char *text, mode_t mode)
{
    cleanup_free char *path = orch_xasprintf("%s/%s", dir, name);
    assert_int_equal(orch_write_file(AT_FDCWD, path, text, strlen(text), 0600), 0);
    assert_int_equal(chmod(path, mode), 0);
}

static void test_proc_errors(void **state)
{
    (void)state;
    write_mode("plain", "x", 0644);
    write_mode("noint", "#!/no/such/interpreter\n", 0755);
    write_mode("data", "\x01\x02", 0755);
    write_mode("fine", "#!/bin/sh\nexit 5\n", 0755);
    cleanup_free char *path = orch_xasprintf("PATH=:relative:%s:/nowhere", dir);
    cleanup_free char *plain = orch_xasprintf("%s/plain: not executable", dir);
    cleanup_free char *none =
        orch_xasprintf("nosuch: program not found in PATH (:relative:%s:/nowhere)", dir);
    cleanup_free char *noint =
        orch_xasprintf("%s/noint: the interpreter its first line or header names does not exist",
                       dir);
    cleanup_free char *data =
        orch_xasprintf("%s/data: not a program of this machine (a script needs a #! line)", dir);
    cleanup_free char *away =
        orch_xasprintf("./nosuch: No such file or directory (working directory %s)", dir);
    const struct {
        const char *name, *cwd, *msg;
        int code;
    } table[] = {
        { "nosuch", NULL, none, ENOENT },
        { "plain", NULL, plain, EACCES },
        { "noint", NULL, noint, ENOENT },
        { "data", NULL, data, ENOEXEC },
        { "./nosuch", dir, away, ENOENT },
        { "./plain", dir, "./plain: not executable", EACCES },
        { "/", NULL, "/: not executable", EACCES },
        { "", NULL, "the name of the program is empty", ENOENT },
        { "fine", "/no/where", "fine: working directory /no/where: No such file or directory",
          ENOENT },
        { "fine", "/etc/passwd", "fine: working directory /etc/passwd: Not a directory", ENOTDIR },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(table); i++) {
        const char *const argv[] = { table[i].name, NULL }, *const env[] = { path, NULL };
        struct orch_proc_opts o = { .argv = argv, .env = env, .cwd = table[i].cwd };
        struct orch_err err = { 0 };
        assert_null(orch_proc_start(loop, &o, &err));
        assert_string_equal(err.msg, table[i].msg);
        assert_int_equal(err.code, table[i].code);
    }
    /* A relative entry of PATH is not looked through, the working directory of "./" is the
     * child's. */
    struct orch_err err;
    const char *const dot[] = { "PATH=.:", NULL };
    struct orch_proc_opts o = { .argv = (const char *const[]){ "fine", NULL },
                                .env = dot,
                                .cwd = dir };
    cleanup_close int home = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(chdir(dir), 0);
    assert_null(orch_proc_start(loop, &o, &err));
    assert_int_equal(fchdir(home), 0);
    struct run r = { 0 };
    o = shell(&r, (const char *const[]){ "./fine", NULL });
    o.cwd = dir;
    start(&r, &o);
    await(&r.done);
    assert_int_equal(WEXITSTATUS(r.status), 5);
    end(&r);
}

static int count_fds(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void test_proc_many(void **state)
{
    (void)state;
    int before = count_fds();
    enum { ROUNDS = 10, EACH = 20 };
    for (int i = 0; i < ROUNDS; i++) {
        struct run r[EACH] = { 0 };
        for (int k = 0; k < EACH; k++) {
            r[k].free_inside = k & 1;
            struct orch_proc_opts o = shell(&r[k], (const char *const[]){
                                                       k % 4 == 3 ? "false" : "true", NULL });
            start(&r[k], &o);
        }
        for (int k = 0; k < EACH; k++) {
            await(&r[k].done);
            assert_int_equal(WEXITSTATUS(r[k].status), k % 4 == 3);
            end(&r[k]);
        }
    }
    struct orch_proc_opts bad = { .argv = (const char *const[]){ "nosuch", NULL } };
    for (int i = 0; i < 20; i++)
        assert_null(orch_proc_start(loop, &bad, NULL));
    assert_int_equal(count_fds(), before);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
}

static void test_proc_dies_with_parent(void **state)
{
    (void)state;
    int alive[2], started[2];
    assert_int_equal(pipe2(alive, O_CLOEXEC), 0);
    assert_int_equal(pipe2(started, O_CLOEXEC), 0);
    pid_t middle = fork();
    if (middle == 0) {
        struct orch_loop *l = orch_loop_new(NULL);
        struct orch_proc_opts o = { .argv = (const char *const[]){ "sleep", "1000", NULL },
                                    .env = path_env };
        o.fds[o.n_fds++] = alive[1];
        bool ok = l && orch_proc_start(l, &o, NULL) && write(started[1], "x", 1) == 1;
        for (;;)
            ok ? pause() : (_exit(1), 0);
    }
    close(alive[1]);
    close(started[1]);
    char c;
    assert_int_equal(read(started[0], &c, 1), 1);
    close(started[0]);
    assert_int_equal(kill(middle, SIGKILL), 0);
    assert_int_equal(waitpid(middle, NULL, 0), middle);
    await_gone(alive[0]);
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
#define LOOP_TEST(f) cmocka_unit_test_setup_teardown(f, make_loop, free_loop)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_buf),
        cmocka_unit_test(test_parse),
        cmocka_unit_test(test_writers),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_small),
        cmocka_unit_test(test_err),
        cmocka_unit_test(test_log),
        cmocka_unit_test(test_escape),
        LOOP_TEST(test_post),
        LOOP_TEST(test_timers),
        LOOP_TEST(test_watch),
        LOOP_TEST(test_signal),
        cmocka_unit_test(test_loop_close),
        cmocka_unit_test(test_sha256),
        cmocka_unit_test(test_hmac),
        LOOP_TEST(test_proc_status),
        LOOP_TEST(test_proc_stdio),
        LOOP_TEST(test_proc_stderr),
        LOOP_TEST(test_proc_group),
        LOOP_TEST(test_proc_log),
        LOOP_TEST(test_proc_end),
        cmocka_unit_test_teardown(test_proc_inherits_nothing, free_loop),
        LOOP_TEST(test_proc_errors),
        LOOP_TEST(test_proc_many),
        LOOP_TEST(test_proc_dies_with_parent),
    };
    odd_locale();
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
