/* The embedder's API: where a program's tool and a call's end get in each other's way, several
 * handles, a loop of the program's own, and what an older or newer program passes. */
#include "orch.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <locale.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[64];
static char share[4096]; /* of the build */
static struct orch_tool_call *calls[8];
static int n_calls;

static void put(const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void keep(void *ud, struct orch_tool_call *call, const char *args)
{
    (void)ud;
    (void)args;
    assert_true(n_calls < 8);
    calls[n_calls++] = call;
}

static void say(int fd, const char *line)
{
    assert_int_equal(write(fd, line, strlen(line)), (ssize_t)strlen(line));
}

#define CALL(id) \
    "{\"jsonrpc\":\"2.0\",\"id\":" id \
    ",\"method\":\"tools/call\",\"params\":{\"name\":\"late\",\"arguments\":{}}}\n"

/* The folder of a handle: a configuration and policies, and state of its own. */
static void make_dir(const char *configuration)
{
    char path[256];
    snprintf(dir, sizeof dir, "/tmp/orch-test-embed-XXXXXX");
    n_calls = 0;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(setenv("XDG_STATE_HOME", dir, 1) | setenv("XDG_RUNTIME_DIR", dir, 1), 0);
    snprintf(path, sizeof path, "%s/policies", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    put("policies/tools.lua", "return { rules = { { tool = '*', action = 'allow' } } }");
    put("orchestrator.lua", configuration);

    /* build/VARIANT/tests/test_embed */
    ssize_t length = readlink("/proc/self/exe", share, sizeof share - 1);
    assert_true(length > 0);
    share[length] = 0;
    for (int i = 0; i < 2; i++)
        *strrchr(share, '/') = 0;
}

static struct orch *open_with(struct orch_options options, struct orch_error *err)
{
    char config[256];
    snprintf(config, sizeof config, "%s/orchestrator.lua", dir);
    options.config = config;
    options.share = share;
    struct orch *o = orch_open(&options, err);
    memset(config, 'x', sizeof config);
    memset(&options, 'x', sizeof options);
    return o;
}

static void add_tool(struct orch *o, const char *name, orch_tool_fn *fn, void *ud)
{
    struct orch_error err;
    struct orch_tool_def def = { name, "A tool", "{\"type\":\"object\"}", fn, ud };
    assert_int_equal(orch_add_tool(o, &def, &err), 0);
}

#define PLAIN "return { workspace = '.', audit = { dir = 'audit' } }"

/* A handle with the tool `late`, which answers when the test does. */
static struct orch *open_host(const char *configuration)
{
    struct orch_error err;
    make_dir(configuration);
    struct orch *o = open_with((struct orch_options){ .size = sizeof(struct orch_options) }, &err);
    assert_non_null(o);
    add_tool(o, "late", keep, NULL);
    return o;
}

static void remove_dir(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

/* An answer that comes after its call was cancelled must not become the answer of a later call. */
static void late_answer(void **state)
{
    (void)state;
    char out[16384];
    struct orch_error err;
    int in[2], answers[2], kept[2] = { dup(0), dup(1) };
    assert_int_equal(pipe(in) | pipe(answers), 0);
    struct orch *o = open_host(PLAIN);
    dup2(in[0], 0);
    dup2(answers[1], 1);
    int served = orch_serve_stdio(o, &err);
    say(in[1], "{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"initialize\",\"params\":{"
               "\"protocolVersion\":\"2025-11-25\",\"capabilities\":{}}}\n");
    say(in[1], CALL("1"));
    while (n_calls < 1)
        orch_step(o, 100);
    say(in[1], "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
               "cancelled\",\"params\":{\"requestId\":1}}\n");
    say(in[1], "{\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"ping\"}\n");
    size_t n = 0;
    fcntl(answers[0], F_SETFL, O_NONBLOCK);
    while (n < sizeof out - 1 && (out[n] = 0, !strstr(out, "\"id\":9"))) {
        orch_step(o, 100);
        ssize_t r = read(answers[0], out + n, sizeof out - 1 - n);
        n += r > 0 ? (size_t)r : 0;
    }
    say(in[1], CALL("2"));
    while (n_calls < 2)
        orch_step(o, 100);
    orch_answer(calls[0], "the first call's", 0);
    orch_answer(calls[1], "the second call's", 0);
    say(in[1], CALL("3")); /* takes the first one's record */
    while (n_calls < 3)
        orch_step(o, 100);
    orch_answer(calls[2], "the third call's", 0);
    close(in[1]);
    while (orch_step(o, 100))
        ;
    ssize_t r = read(answers[0], out + n, sizeof out - 1 - n);
    out[n + (r > 0 ? (size_t)r : 0)] = 0;
    orch_close(o);
    dup2(kept[0], 0);
    dup2(kept[1], 1);

    assert_int_equal(served, 0);
    assert_null(strstr(out, "the first call's"));
    assert_non_null(strstr(
        out,
        "\"id\":2,\"result\":{\"content\":[{\"type\":\"text\",\"text\":\"the second call's\""));
    assert_non_null(strstr(
        out, "\"id\":3,\"result\":{\"content\":[{\"type\":\"text\",\"text\":\"the third call's\""));
    remove_dir();
}

static void on_result(void *ud, const char *result, int is_error)
{
    snprintf(ud, 512, "%d %s", is_error, result);
}

/* A program's tool has the configuration's time, and what it says later is nobody's answer. */
static void no_answer(void **state)
{
    (void)state;
    struct orch_error err;
    char first[512] = "", second[512] = "";
    struct orch *o = open_host(
        "return { workspace = '.', audit = { dir = 'audit' }, vm = { timeout = '1s' } }");
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, first, &err), 0);
    while (!*first)
        orch_step(o, 100);
    assert_non_null(strstr(first, "1 {\"content\":[{\"type\":\"text\",\"text\":\"failed: no answer "
                                  "within 1 s (vm.timeout)\""));
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, second, &err), 0);
    while (n_calls < 2)
        orch_step(o, 100);
    orch_answer(calls[0], "the first call's", 0);
    orch_answer(calls[1], "the second call's", 0);
    while (!*second)
        orch_step(o, 100);
    assert_non_null(strstr(second, "the second call's"));
    orch_close(o);
    remove_dir();
}

/* A program that answers once more than it was asked must not give two calls one record. */
static void answers_twice(void **state)
{
    (void)state;
    struct orch_error err;
    char results[3][512] = { "", "", "" };
    struct orch *o = open_host("return { workspace = '.', audit = { dir = 'audit' } }");
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, results[0], &err), 0);
    while (n_calls < 1)
        orch_step(o, 100);
    orch_answer(calls[0], "first", 0);
    orch_answer(calls[0], "again", 0);
    while (!*results[0])
        orch_step(o, 100);
    orch_answer(calls[0], "and again", 0);
    for (int i = 1; i < 3; i++)
        assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, results[i], &err), 0);
    while (n_calls < 3)
        orch_step(o, 100);
    assert_ptr_not_equal(calls[1], calls[2]);
    orch_answer(calls[1], "second", 0);
    orch_answer(calls[2], "third", 0);
    while (!*results[1] || !*results[2])
        orch_step(o, 100);
    assert_non_null(strstr(results[0], "\"first\""));
    assert_non_null(strstr(results[1], "\"second\""));
    assert_non_null(strstr(results[2], "\"third\""));
    orch_close(o);
    remove_dir();
}

/* ---- what programs of other times pass */

static void options_of_other_versions(void **state)
{
    (void)state;
    struct {
        struct orch_options known;
        void *unknown[2];
    } newer = { .known = { .size = sizeof newer } };
    struct orch_error err = { 0 };
    make_dir(PLAIN);

    char config[256];
    snprintf(config, sizeof config, "%s/orchestrator.lua", dir);
    newer.known.config = config;
    newer.known.share = share;
    struct orch *o = orch_open(&newer.known, &err);
    assert_non_null(o);
    orch_close(o);
    newer.unknown[1] = config;
    assert_null(orch_open(&newer.known, &err));
    assert_int_equal(err.status, 2);
    assert_non_null(strstr(err.message, "options has members that are set and that orch "));

    /* An older one: what is behind its members is not read. */
    struct orch_options older = newer.known;
    older.size = offsetof(struct orch_options, launcher);
    memset((char *)&older + older.size, 0xee, sizeof older - older.size);
    o = orch_open(&older, &err);
    assert_non_null(o);
    orch_close(o);

    const size_t wrong[] = { 0, 4, sizeof older - 1 };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        older.size = wrong[i];
        assert_null(orch_open(&older, &err));
        assert_non_null(strstr(err.message, "it must be sizeof(struct orch_options)"));
    }
    newer.known.size = sizeof newer.known;
    newer.known.log_level = ORCH_LOG_ERROR + 1;
    assert_null(orch_open(&newer.known, &err));
    assert_non_null(strstr(err.message, "options.log_level is 5"));
    remove_dir();
}

/* ---- logs */

static void keep_log(void *ud, const char *line, size_t n)
{
    char *log = ud;
    snprintf(log + strlen(log), 4096 - strlen(log), "%.*s", (int)n, line);
}

static void reload_other(void *ud, struct orch_tool_call *call, const char *args)
{
    struct orch_error err;
    (void)args;
    orch_answer(call, orch_reload(ud, &err) < 0 ? "refused" : "reloaded", 0);
}

static void on_result(void *ud, const char *result, int is_error);

static void log_of_each(void **state)
{
    (void)state;
    char first_log[4096] = "", second_log[4096] = "", said[512] = "";
    struct orch_error err;
    make_dir(PLAIN);
    struct orch_options options = { .size = sizeof options,
                                    .log = keep_log,
                                    .log_ud = first_log,
                                    .log_level = ORCH_LOG_INFO,
                                    .log_json = 1 };
    struct orch *first = open_with(options, &err);
    options.log_ud = second_log;
    options.log_level = ORCH_LOG_DEFAULT;
    options.log_json = 0;
    struct orch *second = open_with(options, &err);
    assert_true(first && second);

    /* From inside a callback of the one, a function of the other; then the one's own again. */
    add_tool(first, "reload_other", reload_other, second);
    put("policies/tools.lua", "return { rules = { { tool = '*', action = 'maybe' } } }");
    assert_int_equal(orch_call(first, "reload_other", "{}", NULL, on_result, said, &err), 0);
    while (!*said)
        orch_step(first, 100);
    assert_non_null(strstr(said, "refused"));
    assert_string_equal(first_log, "");
    assert_memory_equal(second_log, "orch: error: reload failed", 26);
    second_log[0] = 0;
    put("policies/tools.lua", "return { rules = { { tool = 'reload_*', action = 'allow' } } }");
    assert_int_equal(orch_reload(second, &err), 0); /* info: below its level */
    assert_int_equal(orch_reload(first, &err), 0);
    assert_string_equal(second_log, "");
    assert_non_null(strstr(first_log, "\"level\":\"info\",\"msg\":\"reloaded (orch_reload)"));
    orch_close(second);
    orch_close(first);
    remove_dir();
}

/* ---- functions where they do not belong */

static struct misuse {
    struct orch *o;
    int step, run;
    struct orch_error err;
} misuse;

static void misused(void *ud, struct orch_tool_call *call, const char *args)
{
    struct misuse *m = ud;
    (void)args;
    m->step = orch_step(m->o, -1);
    m->run = orch_run_file(m->o, "/nonexistent.lua", 0, NULL, &m->err);
    orch_close(m->o);
    orch_answer(call, "still there", 0);
}

static void *misused_by_thread(void *ud)
{
    struct misuse *m = ud;
    m->step = orch_step(m->o, -1);
    m->run = orch_call(m->o, "late", "{}", NULL, on_result, NULL, &m->err);
    orch_answer(calls[0], "from a thread", 0);
    orch_close(m->o);
    return NULL;
}

static void misplaced(void **state)
{
    (void)state;
    char log[4096] = "", said[512] = "";
    struct orch_error err;
    make_dir(PLAIN);
    struct orch *o = open_with((struct orch_options){ .size = sizeof(struct orch_options),
                                                      .log = keep_log,
                                                      .log_ud = log },
                               &err);
    misuse = (struct misuse){ .o = o };
    add_tool(o, "misused", misused, &misuse);
    add_tool(o, "late", keep, NULL);
    assert_int_equal(orch_call(o, "misused", "{}", NULL, on_result, said, &err), 0);
    while (!*said)
        assert_int_equal(orch_step(o, 100), 1);
    assert_non_null(strstr(said, "still there"));
    assert_int_equal(misuse.step, -EDEADLK);
    assert_int_equal(misuse.run, -1);
    assert_non_null(strstr(misuse.err.message, "orch_run_file: called from inside a callback"));
    assert_non_null(strstr(log, "error: orch_step: called from inside a callback"));
    assert_non_null(strstr(log, "error: orch_close: called from inside a callback"));

    said[0] = 0;
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, said, &err), 0);
    while (n_calls < 1)
        orch_step(o, 100);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, misused_by_thread, &misuse), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_true(misuse.step == -EPERM && misuse.run == -EPERM);
    assert_non_null(strstr(misuse.err.message, "orch_call: called by another thread"));
    orch_answer(calls[0], "from its own", 0);
    while (!*said)
        orch_step(o, 100);
    assert_non_null(strstr(said, "from its own"));
    orch_close(o);
    remove_dir();
}

/* A tool is replaced while a call of it waits, and while one was begun. */
static void replaced_meanwhile(void **state)
{
    (void)state;
    char running[512] = "", begun[512] = "", later[512] = "";
    struct orch_error err;
    make_dir("return { workspace = '.', audit = { dir = 'audit' }, tools = { 'lua/tools' } }");
    char path[256];
    snprintf(path, sizeof path, "%s/lua", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(path, sizeof path, "%s/lua/tools", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    put("lua/tools/late.lua",
        "local orch = orch\n"
        "return { name = 'late', description = 'Waits', input = { type = 'object' },\n"
        "  run = function(args, ctx) orch.sleep('50ms') return 'of Lua' end }\n");
    struct orch *o = open_with((struct orch_options){ .size = sizeof(struct orch_options) }, &err);
    assert_non_null(o);
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, running, &err), 0);
    orch_step(o, 0);
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, begun, &err), 0);
    for (int i = 0; i < 3; i++)
        add_tool(o, "late", keep, NULL);
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, later, &err), 0);
    while (!*running || !*begun || n_calls < 1)
        orch_step(o, 100);
    orch_answer(calls[0], "of C", 0);
    while (!*later)
        orch_step(o, 100);
    assert_non_null(strstr(running, "of Lua"));
    assert_non_null(strstr(begun, "of Lua"));
    assert_non_null(strstr(later, "of C"));
    orch_close(o);
    remove_dir();
}

/* What has not begun when orch closes does not begin any more, and says so. */
static void closed_before_it_ran(void **state)
{
    (void)state;
    struct orch_error err;
    char result[512] = "";
    struct orch *o = open_host("return { workspace = '.', audit = { dir = 'audit' } }");
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, result, &err), 0);
    orch_close(o);
    assert_int_equal(n_calls, 0);
    assert_non_null(strstr(result, "cancelled: before it ran"));
    remove_dir();
}

/* ---- a loop of the program's own */

/* Waits for the handle's descriptor alone, for as long as it takes, and does not wait in a step. */
static void turn(struct orch *o)
{
    struct pollfd p = { .fd = orch_fd(o), .events = POLLIN };
    assert_int_equal(poll(&p, 1, 30000), 1);
    assert_int_equal(orch_step(o, 0), 1);
}

static void own_loop(void **state)
{
    (void)state;
    char first[512] = "", second[512] = "", log[4096] = "";
    struct orch_error err;
    make_dir("return { workspace = '.', audit = { dir = 'audit' }, vm = { timeout = '1s' } }");
    struct orch *o = open_with((struct orch_options){ .size = sizeof(struct orch_options),
                                                      .log = keep_log,
                                                      .log_ud = log,
                                                      .log_level = ORCH_LOG_INFO },
                               &err);
    add_tool(o, "late", keep, NULL);
    assert_true(orch_fd(o) >= 0);
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, first, &err), 0);
    assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, second, &err), 0);
    while (n_calls < 2)
        turn(o);
    orch_answer(calls[1], "in time", 0);
    while (!*second) /* told without any descriptor's event */
        turn(o);
    assert_true(strstr(second, "in time") && !*first);
    while (!*first) /* told by a timer */
        turn(o);
    assert_non_null(strstr(first, "no answer within 1 s"));
    orch_answer(calls[0], "too late", 0);

    /* A child, and a file that changes: what serving watches for. */
    int in[2], kept[2] = { dup(0), dup(1) }, null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    assert_int_equal(pipe(in), 0);
    dup2(in[0], 0);
    dup2(null, 1);
    int served = orch_serve_stdio(o, &err);
    put("policies/tools.lua", "return { rules = {} }");
    while (!strstr(log, "reloaded (a file changed)"))
        turn(o);
    close(in[1]);
    struct pollfd p = { .fd = orch_fd(o), .events = POLLIN };
    while (poll(&p, 1, 30000) == 1 && orch_step(o, 0))
        ;
    assert_int_equal(p.revents, POLLIN);
    dup2(kept[0], 0);
    dup2(kept[1], 1);
    close(kept[0]);
    close(kept[1]);
    close(in[0]);
    close(null);
    assert_int_equal(served, 0);
    orch_close(o);
    remove_dir();
}

/* ---- what belongs to the process */

/* Its umask, signals, folder, locale and environment, as text. */
static void describe_process(char *out, size_t size)
{
    char line[4096];
    size_t n = 0;
    FILE *f = fopen("/proc/self/status", "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f))
        if (strncmp(line, "Umask:", 6) == 0 || strncmp(line, "SigBlk:", 7) == 0 ||
            strncmp(line, "SigIgn:", 7) == 0 || strncmp(line, "SigCgt:", 7) == 0)
            n += (size_t)snprintf(out + n, size - n, "%s", line);
    fclose(f);
    assert_non_null(getcwd(line, sizeof line));
    n += (size_t)snprintf(out + n, size - n, "%s\n%s\n", line, setlocale(LC_ALL, NULL));
    for (char **e = environ; *e && n < size; e++)
        n += (size_t)snprintf(out + n, size - n, "%s\n", *e);
    assert_true(n < size);
}

static void process_is_left_alone(void **state)
{
    (void)state;
    static char before[65536], after[65536];
    struct orch_error err = { 0 };
    char path[256];
    make_dir(PLAIN);
    put("script.lua", "local orch = require 'orch'\n"
                      "local r, why = orch.http.request{ url = 'http://127.0.0.1:1/' }\n"
                      "assert(not r and why)\n"
                      "return assert(orch.process.run{ 'sh', '-c', 'exit 3' }).status\n");
    umask(027);
    describe_process(before, sizeof before);
    struct orch *o = open_with((struct orch_options){ .size = sizeof(struct orch_options) }, &err);
    assert_non_null(o);
    assert_true(orch_fd(o) >= 0);
    snprintf(path, sizeof path, "%s/script.lua", dir);
    int r = orch_run_file(o, path, 0, NULL, &err);
    assert_string_equal(err.message, "");
    assert_int_equal(r, 3);
    describe_process(after, sizeof after);
    assert_string_equal(after, before);
    orch_close(o);
    describe_process(after, sizeof after);
    assert_string_equal(after, before);
    umask(022);
    remove_dir();
}

/* ---- opened and closed, and nothing is left */

extern size_t __sanitizer_get_current_allocated_bytes(void) __attribute__((weak));

static unsigned entries(const char *path)
{
    unsigned n = 0;
    DIR *d = opendir(path);
    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void opened_often(void **state)
{
    (void)state;
    enum { TIMES = 1000, WARM = 50 };
    struct orch_error err;
    size_t bytes = 0;
    unsigned fds = 0, threads = 0;
    make_dir(PLAIN);
    for (int i = 0; i < TIMES; i++) {
        char said[512] = "";
        struct orch *o = open_with((struct orch_options){ .size = sizeof(struct orch_options) },
                                   &err);
        assert_non_null(o);
        if (i % 2)
            assert_true(orch_fd(o) >= 0);
        add_tool(o, "late", keep, NULL);
        n_calls = 0;
        assert_int_equal(orch_call(o, "late", "{}", NULL, on_result, said, &err), 0);
        while (n_calls < 1)
            orch_step(o, 100);
        if (i % 4) { /* else it is still running */
            orch_answer(calls[0], "yes", 0);
            while (!*said)
                orch_step(o, 100);
        }
        orch_close(o);
        assert_true(*said);
        if (i == WARM) {
            fds = entries("/proc/self/fd");
            threads = entries("/proc/self/task");
            if (__sanitizer_get_current_allocated_bytes)
                bytes = __sanitizer_get_current_allocated_bytes();
        }
    }
    assert_int_equal(entries("/proc/self/fd"), fds);
    assert_int_equal(entries("/proc/self/task"), threads);
    if (__sanitizer_get_current_allocated_bytes) {
        size_t now = __sanitizer_get_current_allocated_bytes();
        print_message("%zu bytes allocated after %d, %zu after %d\n", bytes, WARM, now, TIMES);
        assert_true(now <= bytes + 1024);
    }
    remove_dir();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(late_answer),
        cmocka_unit_test(no_answer),
        cmocka_unit_test(answers_twice),
        cmocka_unit_test(closed_before_it_ran),
        cmocka_unit_test(options_of_other_versions),
        cmocka_unit_test(log_of_each),
        cmocka_unit_test(misplaced),
        cmocka_unit_test(replaced_meanwhile),
        cmocka_unit_test(own_loop),
        cmocka_unit_test(process_is_left_alone),
        cmocka_unit_test(opened_often),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
