/* The embedder's API where a program's tool and a call's end get in each other's way. */
#include "orch.h"

#include <fcntl.h>
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

/* A handle with the tool `late`, which answers when the test does. */
static struct orch *open_host(const char *configuration)
{
    char config[256], share[4096];
    struct orch_error err;
    snprintf(dir, sizeof dir, "/tmp/orch-test-embed-XXXXXX");
    n_calls = 0;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(setenv("XDG_STATE_HOME", dir, 1) | setenv("XDG_RUNTIME_DIR", dir, 1), 0);
    snprintf(config, sizeof config, "%s/policies", dir);
    assert_int_equal(mkdir(config, 0700), 0);
    put("policies/tools.lua", "return { rules = { { tool = 'late', action = 'allow' } } }");
    put("orchestrator.lua", configuration);
    snprintf(config, sizeof config, "%s/orchestrator.lua", dir);

    /* build/VARIANT/tests/test_embed */
    ssize_t length = readlink("/proc/self/exe", share, sizeof share - 1);
    assert_true(length > 0);
    share[length] = 0;
    for (int i = 0; i < 2; i++)
        *strrchr(share, '/') = 0;

    struct orch *o = orch_open(&(struct orch_options){ .size = sizeof(struct orch_options),
                                                       .config = config,
                                                       .share = share },
                               &err);
    assert_non_null(o);
    assert_int_equal(orch_add_tool(o,
                                   &(struct orch_tool_def){ "late", "Answers later",
                                                            "{\"type\":\"object\"}", keep, NULL },
                                   &err),
                     0);
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
    struct orch *o = open_host("return { workspace = '.', audit = { dir = 'audit' } }");
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

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(late_answer), cmocka_unit_test(no_answer),
                                        cmocka_unit_test(answers_twice),
                                        cmocka_unit_test(closed_before_it_ran) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
