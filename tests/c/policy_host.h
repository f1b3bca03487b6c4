/* For tests of what needs policies in force but not the whole of orch: a folder with a
 * configuration, and what loads it. */
#ifndef POLICY_HOST_H
#define POLICY_HOST_H

#include "base/log.h"
#include "policy/current.h"
#include "script/jsonlib.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[64];
static struct orch_loop *loop;
static struct orch_paths paths;
static struct orch_current current;
static struct orch_buf logged; /* what was written to the log */

static void host_log(void *ud, const char *line, size_t n)
{
    (void)ud;
    orch_buf_add(&logged, line, n);
}

/* Rows say all that is wrong with them; the case fails at its end, when something was. */
static unsigned wrong;

static void expect(const char *name, bool right, const char *got, const char *expected)
{
    if (right)
        return;
    print_error("%s:\n  got      %s\n  expected %s\n", name, got, expected ? expected : "none");
    wrong++;
}

static void put_file(const char *name, const char *text)
{
    cleanup_free char *path = orch_xasprintf("%s/%s", dir, name);
    assert_int_equal(orch_write_file(AT_FDCWD, path, text, strlen(text), 0600), 0);
}

/* A state's `orch` is its json alone. */
static void host_open_state(lua_State *L)
{
    lua_newtable(L);
    orch_luaopen_json(L);
    lua_setfield(L, -2, "json");
    lua_pushstring(L, "orch");
    lua_insert(L, -2);
    lua_rawset(L, LUA_GLOBALSINDEX);
}

static int host_open_tools(struct orch_loading *l, struct orch_state *s)
{
    (void)l;
    (void)s;
    return 0;
}

static void host_session(void *ud, lua_State *L, const char *id)
{
    (void)ud;
    (void)id;
    lua_newtable(L);
    lua_newtable(L);
    lua_setfield(L, -2, "marks");
    lua_newtable(L);
}

static bool host_steered(void *ud)
{
    (void)ud;
    return false;
}

static bool host_held(void *ud, int fd)
{
    (void)ud;
    (void)fd;
    return true;
}

static void host_swapped(void *ud, const struct orch_generation *before)
{
    (void)ud;
    (void)before;
}

/* A test puts its own in place of these. */
static struct orch_current_ops host_ops = { .open = host_open_state,
                                            .open_tools = host_open_tools,
                                            .session = host_session,
                                            .steered = host_steered,
                                            .held = host_held,
                                            .swapped = host_swapped };

/* Nothing is loaded yet. */
static void host_open(const char *configuration, const char *tools_lua)
{
    struct orch_err err;
    char exe[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1); /* build/VARIANT/tests/test_NAME */
    assert_true(n > 0);
    exe[n] = 0;
    for (int i = 0; i < 2; i++)
        *strrchr(exe, '/') = 0;
    static const struct orch_log to_host = { .least = ORCH_WARN, .write = host_log };
    orch_log_use(&to_host);
    strcpy(dir, "/tmp/orch-test-policy-XXXXXX");
    assert_non_null(mkdtemp(dir));
    cleanup_free char *policies = orch_xasprintf("%s/policies", dir);
    assert_int_equal(mkdir(policies, 0700), 0);
    put_file("orchestrator.lua", configuration);
    put_file("policies/tools.lua", tools_lua);
    paths = (struct orch_paths){ .share = orch_xstrdup(exe),
                                 .state = orch_xasprintf("%s/state", dir),
                                 .cwd = orch_xstrdup(dir),
                                 .home = orch_xstrdup("/nonexistent"),
                                 .config = orch_xasprintf("%s/orchestrator.lua", dir),
                                 .named = orch_xasprintf("%s/orchestrator.lua", dir),
                                 .origin = ORCH_CONFIG_OPTION };
    loop = orch_loop_new(&err);
    assert_non_null(loop);
    current = (struct orch_current){ .loop = loop, .paths = &paths, .ops = &host_ops };
}

static void host_close(void)
{
    cleanup_free char *command = orch_xasprintf("rm -rf %s", dir);
    orch_current_fini(&current);
    orch_loop_free(loop);
    orch_paths_fini(&paths);
    orch_buf_free(&logged);
    orch_log_use(NULL);
    assert_int_equal(system(command), 0);
}

#endif
