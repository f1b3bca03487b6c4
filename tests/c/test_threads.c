/* Two handles, each in a thread of its own, doing all that needs no microVM at the same time. Made
 * to run under ThreadSanitizer (make VARIANT=tsan), which sees what they share. LuaJIT and the
 * libraries are not instrumented: of them it sees the calls of libc. */
#include "orch.h"

#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { HANDLES = 2, ROUNDS = 20, CALLS = 8 };

static char share[4096];
static unsigned short port;

/* cmocka's checks are the main thread's: a thread ends the program. */
#define CHECK(that) \
    do { \
        if (!(that)) { \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #that); \
            abort(); \
        } \
    } while (0)

struct one {
    int number;
    pthread_t thread;
    char dir[64], log[1 << 16];
    size_t n_log;
    int answered, failed;
};

static void put(const struct one *h, const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", h->dir, name);
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static void keep_log(void *ud, const char *line, size_t n)
{
    struct one *h = ud;
    CHECK(pthread_equal(h->thread, pthread_self()));
    CHECK(h->n_log + n < sizeof h->log);
    memcpy(h->log + h->n_log, line, n);
    h->n_log += n;
}

static void from_c(void *ud, struct orch_tool_call *call, const char *args)
{
    struct one *h = ud;
    CHECK(pthread_equal(h->thread, pthread_self()) && strcmp(args, "{}") == 0);
    orch_answer(call, "of C", 0);
}

static void on_result(void *ud, const char *result, int is_error)
{
    struct one *h = ud;
    CHECK(pthread_equal(h->thread, pthread_self()));
    h->answered++;
    h->failed += is_error;
    if (is_error)
        fprintf(stderr, "%s\n", result);
}

static const char policies[] =
    "return { rules = { { tool = 'from_*', action = 'allow', reason = 'round %d',\n"
    "  when = function(call) return call.args ~= nil end } } }";

static const char lua_tool[] =
    "return { name = 'from_lua', description = 'Waits', input = { type = 'object' },\n"
    "  run = function(args, ctx) orch.log.info('tool of %d') orch.sleep('2ms') return 'of Lua' end "
    "}";

static const char script[] =
    "local orch = require 'orch'\n"
    "local tasks = {}\n"
    "for i = 1, 3 do\n"
    "  tasks[i] = orch.task.spawn(function()\n"
    "    return assert(orch.http.request{ url = 'http://127.0.0.1:' .. arg[1] .. '/' }).body\n"
    "  end)\n"
    "end\n"
    "local r = assert(orch.process.run{ 'sh', '-c', 'echo out; exit 3' })\n"
    "assert(r.stdout == 'out\\n', r.stdout)\n"
    "for i = 1, 3 do\n"
    "  local body = tasks[i]:join()\n"
    "  assert(body == 'hello', body)\n"
    "end\n"
    "orch.log.info('script of ' .. arg[2])\n"
    "return 5\n";

static struct orch *open_one(struct one *h, const char *config)
{
    char path[256];
    struct orch_error err = { 0 };
    snprintf(path, sizeof path, "%s/%s", h->dir, config);
    struct orch_options options = { .size = sizeof options,
                                    .config = path,
                                    .share = share,
                                    .log = keep_log,
                                    .log_ud = h,
                                    .log_level = ORCH_LOG_INFO,
                                    .log_json = h->number % 2 };
    struct orch *o = orch_open(&options, &err);
    if (!o && !strstr(err.message, "trust"))
        fprintf(stderr, "%s\n", err.message);
    return o;
}

static void step_until(struct orch *o, const int *count, int n)
{
    while (*count < n) {
        struct pollfd p = { .fd = orch_fd(o), .events = POLLIN };
        CHECK(poll(&p, 1, 60000) == 1 && orch_step(o, 0) == 1);
    }
}

static void round_of(struct one *h, int round)
{
    struct orch_error err = { 0 };
    char text[512], path[256], port_text[16], number[16];
    h->answered = h->failed = 0;
    struct orch *o = open_one(h, "orchestrator.lua");
    CHECK(o);
    struct orch_tool_def def = { "from_c", "Answers", "{\"type\":\"object\"}", from_c, h };
    CHECK(orch_add_tool(o, &def, &err) == 0);
    for (int i = 0; i < CALLS; i++) {
        CHECK(orch_call(o, i % 2 ? "from_c" : "from_lua", "{}", "test", on_result, h, &err) == 0);
        if (i == CALLS / 2) { /* while calls run */
            snprintf(text, sizeof text, policies, round);
            put(h, "policies/tools.lua", text);
            CHECK(orch_reload(o, &err) == 0);
        }
    }
    step_until(o, &h->answered, CALLS);
    CHECK(!h->failed);
    snprintf(path, sizeof path, "%s/script.lua", h->dir);
    snprintf(port_text, sizeof port_text, "%d", port);
    snprintf(number, sizeof number, "%d", h->number);
    int r = orch_run_file(o, path, 2, (const char *const[]){ port_text, number }, &err);
    if (r != 5)
        fprintf(stderr, "%s\n", err.message);
    CHECK(r == 5);
    orch_close(o);
}

static void *run_one(void *ud)
{
    struct one *h = ud;
    h->thread = pthread_self();
    CHECK(!open_one(h, "untrusted.lua")); /* which the database, shared by both, was asked for */
    for (int i = 0; i < ROUNDS; i++)
        round_of(h, i + 1);
    return NULL;
}

/* What both ask over HTTP. */
static void *serve(void *ud)
{
    static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n"
                                 "hello";
    int listener = *(int *)ud;
    for (int fd; (fd = accept(listener, NULL, NULL)) >= 0; close(fd)) {
        char request[4096];
        (void)!read(fd, request, sizeof request);
        (void)!write(fd, answer, sizeof answer - 1);
    }
    return NULL;
}

static unsigned count(const char *in, const char *what)
{
    unsigned n = 0;
    for (const char *at = in; (at = strstr(at, what)); at += strlen(what))
        n++;
    return n;
}

static void make(struct one *h, int number)
{
    char path[256], text[512];
    *h = (struct one){ .number = number };
    snprintf(h->dir, sizeof h->dir, "/tmp/orch-test-threads-XXXXXX");
    assert_non_null(mkdtemp(h->dir));
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", h->dir,
                 (const char *const[]){ "policies", "lua", "lua/tools" }[i]);
        assert_int_equal(mkdir(path, 0700), 0);
    }
    put(h, "orchestrator.lua",
        "return { workspace = '.', audit = { dir = 'audit' }, tools = { 'lua/tools' } }");
    put(h, "untrusted.lua", "return { trust = 'always' }");
    snprintf(text, sizeof text, policies, 0);
    put(h, "policies/tools.lua", text);
    snprintf(text, sizeof text, lua_tool, number);
    put(h, "lua/tools/from_lua.lua", text);
    put(h, "script.lua", script);
}

static void two_handles(void **state)
{
    (void)state;
    static struct one handles[HANDLES];
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t n = sizeof a;
    pthread_t server, threads[HANDLES];
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&a, n) | listen(listener, 16), 0);
    assert_int_equal(getsockname(listener, (struct sockaddr *)&a, &n), 0);
    port = ntohs(a.sin_port);
    assert_int_equal(pthread_create(&server, NULL, serve, &listener), 0);
    for (int i = 0; i < HANDLES; i++)
        make(&handles[i], i);
    assert_int_equal(setenv("XDG_STATE_HOME", handles[0].dir, 1) |
                         setenv("XDG_RUNTIME_DIR", handles[0].dir, 1),
                     0);
    for (int i = 0; i < HANDLES; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, run_one, &handles[i]), 0);
    for (int i = 0; i < HANDLES; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    shutdown(listener, SHUT_RDWR);
    assert_int_equal(pthread_join(server, NULL), 0);
    close(listener);
    for (int i = 0; i < HANDLES; i++) {
        char own[32], others[32], command[128];
        snprintf(own, sizeof own, "script of %d", i);
        snprintf(others, sizeof others, " of %d", !i);
        assert_int_equal(count(handles[i].log, own), ROUNDS);
        assert_int_equal(count(handles[i].log, "tool of "), ROUNDS * CALLS / 2);
        assert_int_equal(count(handles[i].log, "reloaded (orch_reload)"), ROUNDS);
        assert_int_equal(count(handles[i].log, others), 0);
        assert_true(handles[i].log[0] == (i % 2 ? '{' : 'o'));
        snprintf(command, sizeof command, "rm -r %s", handles[i].dir);
        assert_int_equal(system(command), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(two_handles) };
    /* build/VARIANT/tests/test_threads */
    ssize_t length = readlink("/proc/self/exe", share, sizeof share - 1);
    if (length <= 0)
        return 1;
    share[length] = 0;
    for (int i = 0; i < 2; i++)
        *strrchr(share, '/') = 0;
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
