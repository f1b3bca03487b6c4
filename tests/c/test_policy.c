/* The policy room: what is loaded and what is refused, what a reload changes and what it leaves,
 * what must be trusted, and what a judged call and its result get. */
#include "mcp/session.h"

#include "policy_host.h"

/* ---- the audit log, in the place of store/audit.c */

static struct orch_buf noted; /* reloads, a line each */

void orch_audit_note(struct orch_audit *a, const char *event, struct orch_slice fields)
{
    (void)a;
    orch_buf_printf(&noted, "%s %.*s\n", event, (int)fields.n, fields.p);
}

/* ---- the folder */

static const char config[] = "return { workspace = '.', tools = { 'tools' } }";
static const char rules[] = "return { rules = { { tool = 'own', action = 'allow' } } }";
static const char own[] = "return { name = 'own', description = 'x', input = { type = 'object' },\n"
                          "  run = function() return 'x' end }\n";

static unsigned swaps;

static void swapped(void *ud, const struct orch_generation *before)
{
    (void)ud;
    assert_ptr_not_equal(before, current.gen);
    swaps++;
}

static int open_folder(void **state)
{
    (void)state;
    host_ops.swapped = swapped;
    host_open(config, rules);
    cleanup_free char *tools = orch_xasprintf("%s/tools", dir);
    assert_int_equal(mkdir(tools, 0700), 0);
    put_file("tools/own.lua", own);
    noted.n = swaps = wrong = 0;
    return 0;
}

static int close_folder(void **state)
{
    (void)state;
    host_close();
    orch_buf_free(&noted);
    return 0;
}

static void forget(void) /* as a new orch */
{
    orch_current_fini(&current);
    current = (struct orch_current){ .loop = loop, .paths = &paths, .ops = &host_ops };
}

static char *path_of(const char *name)
{
    return orch_xasprintf("%s/%s", dir, name);
}

static void need(void)
{
    struct orch_err err;
    if (orch_current_need(&current, &err) < 0)
        fail_msg("%s", err.msg);
}

/* Loaded anew, as the row says. */
static void expect_reload(const char *name, const char *error)
{
    int r = orch_current_reload(&current, "the row");
    const char *got = current.error.n ? current.error.p : "no error";
    expect(name, error ? r == -ORCH_CLASS_CONFIG && strstr(got, error) : r == 0, got, error);
}

/* ---- what is refused */

enum how { TEXT, MODE, LINK, FOLDER, FIFO, BIG, GONE, WORLD_FOLDER };

static void spoil(enum how how, const char *name, const char *text)
{
    cleanup_free char *path = path_of(name);
    if (how == WORLD_FOLDER) {
        assert_int_equal(chmod(path, 0777), 0);
        return;
    }
    if (how == MODE) {
        assert_int_equal(chmod(path, (mode_t)strtoul(text, NULL, 8)), 0);
        return;
    }
    unlink(path);
    int r = 0;
    if (how == LINK)
        r = symlink(text, path);
    else if (how == FOLDER)
        r = mkdir(path, 0700);
    else if (how == FIFO)
        r = mkfifo(path, 0600);
    else if (how == TEXT)
        put_file(name, text);
    assert_int_equal(r, 0);
    if (how == BIG) {
        cleanup_buf struct orch_buf b = { 0 };
        orch_buf_str(&b, text);
        while (b.n <= 1 << 20)
            orch_buf_str(&b, "\n-- more and more and more and more and more and more and more\n");
        put_file(name, b.p);
    }
}

static void mend(enum how how, const char *name)
{
    cleanup_free char *path = path_of(name);
    if (how == WORLD_FOLDER) {
        assert_int_equal(chmod(path, 0700), 0);
        return;
    }
    if (how == FOLDER)
        rmdir(path);
    else
        unlink(path);
    if (strcmp(name, "orchestrator.lua") == 0)
        put_file(name, config);
    else if (strcmp(name, "policies/tools.lua") == 0)
        put_file(name, rules);
    else if (strcmp(name, "tools/own.lua") == 0)
        put_file(name, own);
}

#define TOOLS "policies/tools.lua"
#define RULES(text) "return { rules = {\n" text "\n} }"

static const struct {
    const char *name;
    enum how how;
    const char *file, *text, *error; /* error NULL: it is loaded */
} spoilt[] = {
    { "syntax", TEXT, TOOLS, "return {\n  rules = {\n", TOOLS ":3:" },
    { "a Lua error", TEXT, TOOLS, "local x = nil\nreturn x.y\n", TOOLS ":2: attempt to index" },
    { "no table", TEXT, TOOLS, "return 12", TOOLS ": must return a table, got number" },
    { "nothing", TEXT, TOOLS, "", TOOLS ": must return a table, got nil" },
    { "rules of the wrong type", TEXT, TOOLS, "return { rules = 1 }",
      TOOLS ": rules must be a list, got number" },
    { "no such action", TEXT, TOOLS, RULES("{ tool = 'own', action = 'alow' }"),
      TOOLS ":2: action must be \"allow\", \"ask\" or \"deny\", got alow" },
    { "no such key", TEXT, TOOLS, RULES("{ tool = 'own', action = 'allow', raet = '1/s' }"),
      TOOLS ":2: unknown key raet (did you mean rate?)" },
    { "no such network", TEXT, TOOLS, RULES("{ tool = 'own', action = 'allow', network = 'x' }"),
      TOOLS ":2: no network policy \"x\"" },
    { "an effect of a denial", TEXT, TOOLS, RULES("{ tool = 'own', action = 'deny', mark = 'x' }"),
      TOOLS ":2: mark on a deny rule has no effect" },
    { "no such rate", TEXT, TOOLS, RULES("{ tool = 'own', action = 'allow', rate = '1/y' }"),
      TOOLS ":2: rate must be like" },
    { "no such pattern", TEXT, TOOLS, RULES("{ tool = 'own', action = 'allow', redact = { '(' } }"),
      TOOLS ":2: redact[1]:" },
    { "a test of it fails", TEXT, TOOLS,
      "return { rules = {}, tests = {\n{ call = { tool = 'own' }, expect = 'allow' } } }",
      TOOLS ":2: tests[1]: own: expected allow, got deny" },
    { "it does not end", TEXT, TOOLS, "while true do end", "limit: policy time 500 ms" },
    { "bytecode", TEXT, TOOLS, "\033LJ", TOOLS },
    { "a folder in its place", FOLDER, TOOLS, "", TOOLS ": cannot be read: Is a directory" },
    { "a link that leads nowhere", LINK, TOOLS, "nowhere", TOOLS ": cannot be read: No such file" },
    { "a link to itself", LINK, TOOLS, "tools.lua", TOOLS ": cannot be read: Too many levels" },
    { "a pipe", FIFO, TOOLS, "", TOOLS ": must return a table, got nil" },
    { "everybody may write it", MODE, TOOLS, "0606",
      TOOLS ": everybody may write it; run: chmod o-w" },
    { "its group may write it", MODE, TOOLS, "0660", NULL },
    { "1 MiB and more", BIG, TOOLS, "return { rules = {} }", TOOLS ": larger than 1 MiB" },
    { "no rules", GONE, TOOLS, "", TOOLS ": missing; without rules every call would be denied" },
    { "another file", TEXT, "policies/more.lua", "return {}",
      "policies/more.lua: not a policy file" },
    { "everybody may write to its folder", WORLD_FOLDER, "policies", "",
      "policies: everybody may write to the policies directory; run: chmod o-w" },
    { "a network of the wrong type", TEXT, "policies/network.lua", "return { a = 1 }",
      "policies/network.lua:1: a must be a table, got number" },
    { "a network without ports", TEXT, "policies/network.lua",
      "return { a = { allow = {\n{ cidr = '203.0.113.0/24' } } } }",
      "policies/network.lua:2: ports is required" },
    { "configuration: syntax", TEXT, "orchestrator.lua", "return {", "orchestrator.lua:1:" },
    { "configuration: no such key", TEXT, "orchestrator.lua", "return { workspce = '.' }",
      "workspace" },
    { "configuration: of the wrong type", TEXT, "orchestrator.lua", "return { vm = { max = {} } }",
      "vm.max" },
    { "configuration: no such folder", TEXT, "orchestrator.lua", "return { workspace = 'none' }",
      "orchestrator.lua: workspace:" },
    { "configuration: everybody may write it", MODE, "orchestrator.lua", "0606",
      "orchestrator.lua: everybody may write it" },
    { "configuration: a link that leads nowhere", LINK, "orchestrator.lua", "nowhere",
      "orchestrator.lua: cannot be read" },
    { "tool: syntax", TEXT, "tools/own.lua", "return {\n}}", "tools/own.lua:2:" },
    { "tool: of the wrong type", TEXT, "tools/own.lua", "return { name = 1 }", "tools/own.lua" },
    { "tool: its name is taken", TEXT, "tools/p.lua", own,
      "tools/p.lua: the name own is taken by tools/own.lua" },
    { "tool: a schema that is none", TEXT, "tools/own.lua",
      "return { name = 'own', description = 'x', run = print, input = { type = 'objekt' } }",
      "tools/own.lua" },
};

/* Each at the first load and at a reload, which leaves what is in force. */
static void refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(spoilt); i++) {
        const char *name = spoilt[i].name, *error = spoilt[i].error;
        struct orch_err err = { 0 };
        forget();
        spoil(spoilt[i].how, spoilt[i].file, spoilt[i].text);
        bool loaded = orch_current_need(&current, &err) == 0;
        expect(name, loaded != (error && err.cls == ORCH_CLASS_CONFIG && strstr(err.msg, error)),
               loaded ? "it was loaded" : err.msg, error);
        mend(spoilt[i].how, spoilt[i].file);

        forget();
        need();
        struct orch_generation *before = current.gen;
        spoil(spoilt[i].how, spoilt[i].file, spoilt[i].text);
        noted.n = logged.n = swaps = 0;
        expect_reload(name, error);
        expect(name, current.gen == before && !swaps, "another one in force", "the one before");
        if (error) {
            expect(name, strstr(logged.p, error) != NULL, logged.p, error);
            expect(name, strstr(noted.p, "\"ok\":false") && strstr(noted.p, before->hash), noted.p,
                   "the reload that failed");
        }
        mend(spoilt[i].how, spoilt[i].file);
        expect_reload(name, NULL);
        expect(name, current.gen == before && !current.error.n, "an error that stays", "none");
    }
    assert_int_equal(wrong, 0);
}

/* ---- one takes the place of another */

/* "allow", "ask", "deny", or "bad" for wrong arguments, then what there is of ": REASON",
 * "network=", "mark=", "redact=" and "args=". */
static char *judge(struct orch_generation *g, const char *tool, const char *args,
                   const char *caller)
{
    static const char *const words[] = { "bad", "allow", "ask", "deny" };
    ORCH_CLEANUP(orch_judgement_fini) struct orch_judgement j;
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_free char *wrapped = orch_xasprintf("[%s]", args);
    struct orch_json_fault fault;
    struct orch_err err = { 0 };
    struct orch_buf b = { 0 };
    struct orch_tool *t = orch_generation_tool(g, orch_slice_str(tool));
    assert_non_null(t);
    assert_int_equal(orch_json_scan(&d, orch_slice_str(wrapped),
                                    &(struct orch_json_limits){ .depth = 128 }, &fault),
                     0);
    int r = orch_generation_judge(g, t, "s1", caller, &d, 1, &j, &err);
    orch_buf_str(&b, r < 0 ? "deny" : words[j.verdict]);
    if (r < 0 || j.reason)
        orch_buf_printf(&b, ": %s", r < 0 ? err.msg : j.reason);
    if (j.network)
        orch_buf_printf(&b, " network=%s", j.network);
    for (char **m = j.marks; m && *m; m++)
        orch_buf_printf(&b, " mark=%s", *m);
    for (size_t i = 0; i < j.n_redact; i++)
        orch_buf_printf(&b, " redact=%s", g->redact_text[j.redact[i]]);
    if (j.args.n)
        orch_buf_printf(&b, " args=%s", j.args.p);
    return b.p;
}

static void expect_judged(struct orch_generation *g, const char *tool, const char *args,
                          const char *expected)
{
    cleanup_free char *got = judge(g, tool, args, "me");
    expect(args, strncmp(got, expected, strlen(expected)) == 0, got, expected);
}

/* A call that runs goes on by the rules with which it began. */
static void swap(void **state)
{
    (void)state;
    need();
    assert_null(current.watch);
    struct orch_generation *before = orch_generation_ref(current.gen); /* as a call does */
    expect_reload("nothing has changed", NULL);
    assert_ptr_equal(current.gen, before);
    assert_int_equal(swaps, 0);
    assert_int_equal(noted.n, 0);

    put_file(TOOLS, RULES("{ tool = 'own', action = 'deny', reason = 'no more' }"));
    expect_reload("other rules", NULL);
    assert_ptr_not_equal(current.gen, before);
    assert_int_equal(swaps, 1);
    assert_int_equal(current.reloads, 1);
    assert_non_null(strstr(noted.p, "\"ok\":true"));
    assert_non_null(strstr(noted.p, current.gen->hash));
    assert_null(current.watch); /* nobody asked for that */
    assert_int_equal(before->refs, 1);
    expect_judged(before, "own", "{}", "allow");
    expect_judged(current.gen, "own", "{}", "deny: no more (policies/tools.lua:2)");
    assert_string_equal(current.gen->list.p, "[]");
    assert_non_null(strstr(before->list.p, "\"name\":\"own\""));

    put_file(TOOLS, "return {");
    expect_reload("wrong ones", TOOLS ":1:");
    expect_judged(before, "own", "{}", "allow");
    expect_judged(current.gen, "own", "{}", "deny: no more");
    orch_generation_unref(before); /* the call ends: the sanitizer sees what is left of it */
    assert_int_equal(wrong, 0);
}

static void wait_for_swap(void)
{
    while (!swaps)
        orch_loop_step(loop, 100);
}

static void watch(void **state)
{
    (void)state;
    need();
    orch_current_watch(&current);
    put_file(TOOLS, RULES("{ tool = 'own', action = 'ask' }"));
    wait_for_swap();
    expect_judged(current.gen, "own", "{}", "ask: nobody to ask");
    assert_non_null(strstr(noted.p, "a file changed"));
    swaps = 0;
    put_file("tools/p.lua", "return { name = 'p', description = 'x', input = { type = 'object' },"
                            " run = function() end }");
    wait_for_swap();
    expect_judged(current.gen, "p", "{}", "deny: no rule allows it");
    orch_current_unwatch(&current);
    assert_int_equal(wrong, 0);
}

/* ---- trust */

static bool are_steered, not_held;

static bool trust_steered(void *ud)
{
    (void)ud;
    return are_steered;
}

/* Of all files, an agent may write to the rules. */
static bool trust_held(void *ud, int fd)
{
    char link[32], path[PATH_MAX];
    (void)ud;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    assert_true(n > 0);
    path[n] = 0;
    return !not_held || !strstr(path, TOOLS);
}

static void step_trust(bool edits)
{
    cleanup_buf struct orch_buf errors = { 0 };
    enum orch_class cls;
    struct orch_err err;
    struct orch_generation *g = orch_generation_load(&current, ORCH_TRUST_ANY, &errors, &cls);
    assert_non_null(g);
    struct orch_trust t = { .list = g->sources, .edits = edits };
    assert_int_equal(orch_trust_record(&paths, &t, &err), 0);
    orch_generation_unref(g);
}

/* steps: t trusts it, T with later edits; c changes the rules, C changes them back; n puts a new
 * file; l gives the rules another name; s: programs run that an agent steers; h: they may write to
 * the rules; k: they end; o: a new orch; L loads; F does not. */
static const struct {
    const char *name, *steps;
    enum orch_config_origin origin;
    const char *config, *error; /* of the last F */
} trusts[] = {
    { "named", "L", ORCH_CONFIG_OPTION, config, NULL },
    { "named by the environment", "L", ORCH_CONFIG_ENV, config, NULL },
    { "the user's", "L", ORCH_CONFIG_XDG, config, NULL },
    { "found where orch was started", "F", ORCH_CONFIG_CWD, config,
      "orchestrator.lua: not trusted; a configuration in the working directory is only loaded "
      "after: orch trust /" },
    { "found there, trusted", "tL", ORCH_CONFIG_CWD, config, NULL },
    { "changed", "tLcF", ORCH_CONFIG_CWD, config,
      TOOLS ": changed since it was trusted; look at it, then run: orch trust /" },
    { "changed before it was loaded", "tcF", ORCH_CONFIG_CWD, config, TOOLS ": changed" },
    { "changed back", "tLcFCL", ORCH_CONFIG_CWD, config, TOOLS ": changed" },
    { "changed, and trusted so", "tLcFtL", ORCH_CONFIG_CWD, config, TOOLS ": changed" },
    { "a new file", "tLnF", ORCH_CONFIG_CWD, config, "tools/new.lua: not trusted" },
    { "trusted with its edits", "TLcLnL", ORCH_CONFIG_CWD, config, NULL },
    { "named, asks for it", "F", ORCH_CONFIG_OPTION, "return { trust = 'always' }",
      "orchestrator.lua: not trusted; this configuration is only loaded after: orch trust /" },
    { "named, asks for it, trusted", "tLcF", ORCH_CONFIG_OPTION, "return { trust = 'always' }",
      TOOLS ": changed" },
    { "an agent may have written it", "LshcF", ORCH_CONFIG_OPTION, config,
      TOOLS ": put there while a program runs that orch started and that may write to it; "
            "look at it, then run: orch trust /" },
    { "so it is held to what was loaded, from then on", "LshcFkF", ORCH_CONFIG_OPTION, config,
      TOOLS ": changed since it was trusted" },
    { "also by the next orch", "LshcFkoF", ORCH_CONFIG_OPTION, config,
      TOOLS ": changed since it was trusted" },
    { "which loads what was in force", "LshcFkoFCL", ORCH_CONFIG_OPTION, config,
      TOOLS ": changed since it was trusted" },
    { "or what is trusted since", "LshcFktL", ORCH_CONFIG_OPTION, config,
      TOOLS ": put there while" },
    { "an agent may write it, but it is as it was trusted", "tLshL", ORCH_CONFIG_OPTION, config,
      NULL },
    { "it has another name", "lL", ORCH_CONFIG_OPTION, config, NULL },
    { "it has another name, and an agent runs", "LslF", ORCH_CONFIG_OPTION, config,
      TOOLS ": it has another name (a hard link)" },
    { "it has another name, but is trusted", "tLslL", ORCH_CONFIG_OPTION, config, NULL },
};

static void play_trust(size_t row, char step, bool last)
{
    const char *name = trusts[row].name, *error = last ? trusts[row].error : "";
    struct orch_err err = { 0 };
    cleanup_free char *from = path_of(TOOLS), *to = path_of("other");
    int r;
    switch (step) {
    case 't':
    case 'T':
        step_trust(step == 'T');
        break;
    case 'c':
        put_file(TOOLS, RULES("{ tool = '*', action = 'allow' }"));
        break;
    case 'C':
        put_file(TOOLS, rules);
        break;
    case 'n':
        put_file("tools/new.lua", "return { name = 'new', description = 'x', run = print,"
                                  " input = { type = 'object' } }");
        break;
    case 'l':
        assert_int_equal(link(from, to), 0);
        break;
    case 's':
        are_steered = true;
        break;
    case 'h':
        not_held = true;
        break;
    case 'k':
        not_held = are_steered = false;
        break;
    case 'o':
        forget();
        break;
    default:
        if (current.gen) {
            expect_reload(name, step == 'F' ? error : NULL);
            break;
        }
        r = orch_current_need(&current, &err);
        expect(name, step == 'L' ? r == 0 : r < 0 && strstr(err.msg, error),
               r < 0 ? err.msg : "it was loaded", step == 'L' ? "loaded" : error);
    }
}

static void trust(void **state)
{
    (void)state;
    host_ops.steered = trust_steered;
    host_ops.held = trust_held;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(trusts); i++) {
        forget();
        paths.origin = trusts[i].origin;
        are_steered = not_held = false;
        put_file("orchestrator.lua", trusts[i].config);
        for (const char *s = trusts[i].steps; *s; s++)
            play_trust(i, *s, !strchr(s + 1, 'F'));
        cleanup_free char *command = orch_xasprintf("cd %s && rm -rf state other tools/new.lua",
                                                    dir);
        assert_int_equal(system(command), 0);
        put_file(TOOLS, rules);
    }
    paths.origin = ORCH_CONFIG_OPTION;
    assert_int_equal(wrong, 0);
}

/* ---- what a call gets */

static void judged(void **state)
{
    (void)state;
    static const struct {
        const char *rules, *args, *expected;
    } rows[] = {
        { "", "{}", "deny: no rule allows it (policies/tools.lua)" },
        { "{ tool = 'ow', action = 'allow' }", "{}", "deny: no rule allows it" },
        { "{ tool = 'o*n', action = 'allow' }", "{}", "allow" },
        { "{ tool = 'own', action = 'allow' },\n{ tool = '*', action = 'ask' }", "{}",
          "ask: nobody to ask (policies/tools.lua:3)" },
        { "{ tool = 'own', action = 'ask', reason = 'r' }", "{}",
          "ask: nobody to ask: r (policies/tools.lua:2)" },
        { "{ tool = '*', action = 'deny', reason = 'r' },\n{ tool = 'own', action = 'ask' },"
          "{ tool = 'own', action = 'allow' }",
          "{}", "deny: r (policies/tools.lua:2)" },
        { "{ tool = 'own', action = 'allow', mark = 'm', network = 'none', redact = { 'a', 'b' } }",
          "{}", "allow network=none mark=m redact=a redact=b" },
        { "{ tool = 'own', action = 'allow', redact = { 'a' } },\n"
          "{ tool = '*', action = 'allow', redact = { 'b' } }",
          "{}", "allow redact=a redact=b" },
        { "{ tool = 'own', action = 'ask', mark = 'm' }", "{}", "ask: nobody to ask" },
        { "{ tool = 'own', action = 'allow', network = 'a' },\n{ tool = '*', action = 'allow' }",
          "{}", "allow network=a" },
        { "{ tool = 'own', action = 'allow', network = 'a' },\n"
          "{ tool = '*', action = 'allow', network = 'b' }",
          "{}", "deny: ambiguous network: a (policies/tools.lua:2) and b (policies/tools.lua:3)" },
        { "{ tool = 'own', action = 'allow', rewrite = function(a) a.x = 1 return a end }",
          "{\"y\":2}", "allow args=[{" },
        { "{ tool = 'own', action = 'allow', rewrite = function() end }", "{}",
          "deny: rewrite must return the arguments, got nil (policies/tools.lua:2)" },
        { "{ tool = 'own', action = 'allow', rewrite = function(a) a.x = print return a end }",
          "{}", "deny: the rewritten arguments cannot be JSON" },
        { "{ tool = 'own', action = 'allow', when = function(c) return c.args.x == 1 end }",
          "{\"x\":1}", "allow" },
        { "{ tool = 'own', action = 'allow', when = function(c) return c.args.x == 1 end }",
          "{\"x\":2}", "deny: no rule allows it" },
        { "{ tool = 'own', action = 'allow', when = function(c) return c.args.x == nil end }",
          "{\"x\":null}", "allow" },
        { "{ tool = 'own', action = 'allow', when = function(c) error('bang', 0) end }", "{}",
          "deny: `when` failed: bang (policies/tools.lua:2)" },
        { "{ tool = 'own', action = 'allow', when = function(c) while true do end end }", "{}",
          "deny: policies/tools.lua:2: limit: policy time 100 ms used up" },
        { "{ tool = 'own', action = 'allow',\n"
          "  when = function(c) while true do pcall(error) end end }",
          "{}", "deny: policies/tools.lua:2: limit: policy time 100 ms used up" },
    };
    put_file("policies/network.lua", "return { a = { allow = {} }, b = { allow = {} } }");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(rows); i++) {
        cleanup_free char *text = orch_xasprintf(RULES("%s"), rows[i].rules);
        put_file(TOOLS, text);
        forget();
        need();
        for (int k = 0; k < 2; k++) /* nothing is left behind */
            expect_judged(current.gen, "own", rows[i].args, rows[i].expected);
        assert_int_equal(lua_gettop(orch_state_lua(current.gen->policy)), 0);
    }
    assert_int_equal(wrong, 0);
}

/* As deep as limits.depth lets a message be: what is not as it came is read once more. */
static void deep(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf args = { 0 };
    orch_buf_str(&args, "{\"none\":null,\"a\":");
    for (int i = 0; i < 120; i++)
        orch_buf_char(&args, '[');
    for (int i = 0; i < 120; i++)
        orch_buf_char(&args, ']');
    orch_buf_char(&args, '}');
    put_file("tools/own.lua", "return { name = 'own', description = 'x', run = print,\n"
                              "  input = { type = 'object', properties = { none = {"
                              " type = 'string' } } } }");
    need();
    expect_judged(current.gen, "own", args.p, "allow args=[{\"a\":[[");
    assert_int_equal(wrong, 0);
}

/* The rates of rules go on over reloads, whoever wrote the rule's rate anew. */
static void rates(void **state)
{
    (void)state;
    static const struct {
        const char *name, *before;
        unsigned taken; /* calls before the reload */
        const char *after;
        unsigned left; /* that are allowed after it */
    } rows[] = {
        { "kept", "rate = '3/day'", 2, "rate = '3/day', reason = 'x'", 1 },
        { "used up", "rate = '3/day'", 3, "rate = '3/day', reason = 'x'", 0 },
        { "another rate is another rule", "rate = '3/day'", 3, "rate = '2/day'", 2 },
        { "of a rule with an id: kept", "id = 'r', rate = '3/day'", 2, "rate = '3/day', id = 'r'",
          1 },
        { "lowered", "id = 'r', rate = '9/day'", 1, "id = 'r', rate = '3/day'", 2 },
        { "lowered below what was taken", "id = 'r', rate = '9/day'", 5, "id = 'r', rate = '3/day'",
          0 },
        { "raised", "id = 'r', rate = '2/day'", 2, "id = 'r', rate = '5/day'", 3 },
        { "of another window", "id = 'r', rate = '9/h'", 1, "id = 'r', rate = '3/day'", 2 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(rows); i++) {
        unsigned allowed = 0;
        cleanup_free char *before = orch_xasprintf(RULES("{ tool = 'own', action = 'allow', %s }"),
                                                   rows[i].before);
        cleanup_free char *after = orch_xasprintf(RULES("{ tool = 'own', action = 'allow', %s }"),
                                                  rows[i].after);
        put_file(TOOLS, before);
        forget();
        need();
        for (unsigned k = 0; k < rows[i].taken; k++)
            expect_judged(current.gen, "own", "{}", "allow");
        put_file(TOOLS, after);
        expect_reload(rows[i].name, NULL);
        for (unsigned k = 0; k < 10; k++) {
            cleanup_free char *got = judge(current.gen, "own", "{}", "me");
            allowed += strncmp(got, "allow", 5) == 0;
        }
        cleanup_free char *got = orch_xasprintf("%u", allowed);
        cleanup_free char *left = orch_xasprintf("%u", rows[i].left);
        expect(rows[i].name, allowed == rows[i].left, got, left);
        cleanup_free char *other = judge(current.gen, "own", "{}", "another");
        expect(rows[i].name, strncmp(other, "allow", 5) == 0, other, "allow, for another caller");
    }
    assert_int_equal(wrong, 0);
}

/* More callers than are kept track of get nothing, until some have their whole rate again. */
static void too_many_callers(void **state)
{
    (void)state;
    struct orch_rate *list = NULL;
    char key[16];
    for (int i = 0; i < 10000; i++) {
        snprintf(key, sizeof key, "%d", i);
        assert_true(orch_rate_take(&list, key, 1, 86400000));
    }
    assert_false(orch_rate_take(&list, "one more", 1, 86400000));
    assert_false(orch_rate_take(&list, "0", 1, 86400000));
    orch_rates_free(&list);
    assert_null(list);
}

static void redact(void **state)
{
    (void)state;
    static const struct {
        const char *json, *expected; /* NULL: withheld */
    } rows[] = {
        { "{\"a\":\"nothing\"}", "{\"a\":\"nothing\"}" },
        { "{ \"a\" : 1.0e1 , \"b\":\"\\u0041\" }", "{ \"a\" : 1.0e1 , \"b\":\"\\u0041\" }" },
        { "\"sk-1\"", "\"[redacted]\"" },
        { "{\"a\":\"x sk-1 y\",\"b\":[\"sk-2\",3]}",
          "{\"a\":\"x [redacted] y\",\"b\":[\"[redacted]\",3]}" },
        { "{\"sk-1\":1}", "{\"[redacted]\":1}" },
        { "{\"sk-1\":1,\"sk-2\":2}", "{\"[redacted]\":1,\"[redacted] (2)\":2}" },
        { "[\"s\\u006b-1\"]", "[\"[redacted]\"]" },
        { "[\"pin 1234\",\"\\\"\"]", "[\"pin [redacted]\",\"\\\"\"]" },
        { "[\"sk-1\",\"zaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab\"]", NULL },
    };
    put_file(TOOLS, RULES("{ tool = 'own', action = 'allow',\n"
                          "  redact = { [[sk-\\w+]], [[\\d{4}]], [[z(a+)+$]] } }"));
    need();
    const uint16_t patterns[] = { 0, 1, 2 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(rows); i++) {
        cleanup_json struct orch_json_doc d = { 0 };
        cleanup_buf struct orch_buf out = { 0 };
        struct orch_json_fault fault;
        assert_int_equal(orch_json_scan(&d, orch_slice_str(rows[i].json),
                                        &(struct orch_json_limits){ 0 }, &fault),
                         0);
        int r = orch_redact_json(current.gen, patterns, 3, &d, 0, &out);
        const char *wanted = rows[i].expected;
        bool same = wanted && strcmp(wanted, rows[i].json) == 0;
        expect(rows[i].json, wanted ? r == !same && !strcmp(out.p, wanted) : r < 0,
               r < 0 ? "withheld" : out.p, wanted);
    }
    assert_int_equal(wrong, 0);
}

/* ---- what is offered */

static void offered(void **state)
{
    (void)state;
    static const struct {
        const char *rules;
        bool listed;
    } rows[] = {
        { "", false },
        { "{ tool = 'own', action = 'allow' }", true },
        { "{ tool = 'own', action = 'ask' }", true },
        { "{ tool = 'own', action = 'deny' }", false },
        { "{ tool = '*', action = 'allow' }, { tool = 'own', action = 'deny' }", false },
        { "{ tool = '*', action = 'allow' },"
          "{ tool = 'own', action = 'deny', when = function() return true end }",
          true },
        { "{ tool = 'own', action = 'deny', when = function() end }", false },
        { "{ tool = 'own__*', action = 'allow' }", false },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(rows); i++) {
        cleanup_free char *text = orch_xasprintf(RULES("%s"), rows[i].rules);
        put_file(TOOLS, text);
        forget();
        need();
        bool listed = strstr(current.gen->list.p, "\"name\":\"own\"") != NULL;
        expect(rows[i].rules, listed == rows[i].listed, current.gen->list.p,
               rows[i].listed ? "own" : "no own");
    }
    assert_int_equal(wrong, 0);
}

/* Resources and prompts of the folders beside the configuration. */
static void beside(void **state)
{
    (void)state;
#define RESOURCE(uri) "return { uri = '" uri "', name = 'n', text = 'x' }"
#define PROMPT "return { name = 'p', get = function() return 'x' end }"
    static const struct {
        const char *file, *text, *other_file, *other_text;
        unsigned features;
        const char *error;
    } rows[] = {
        { "lua/resources/a.lua", RESOURCE("a:b"), NULL, NULL, ORCH_MCP_RESOURCES, NULL },
        { "lua/prompts/a.lua", PROMPT, NULL, NULL, ORCH_MCP_PROMPTS, NULL },
        { "lua/resources/a.lua", RESOURCE("a:b"), "lua/prompts/a.lua", PROMPT,
          ORCH_MCP_RESOURCES | ORCH_MCP_PROMPTS, NULL },
        { "lua/resources/a.lua",
          "return { uri_template = 'a:{x}', name = 'n', read = function() end }", NULL, NULL,
          ORCH_MCP_RESOURCES, NULL },
        { "lua/resources/a.lua", "return {", NULL, NULL, 0, "lua/resources/a.lua:1:" },
        { "lua/resources/a.lua", "return 1", NULL, NULL, 0,
          "lua/resources/a.lua: must be a table, got number" },
        { "lua/resources/a.lua", RESOURCE("a:b"), "lua/resources/b.lua", RESOURCE("a:b"), 0,
          "lua/resources/b.lua: the uri a:b is there already" },
        { "lua/prompts/a.lua", "return { name = 'p' }", NULL, NULL, 0,
          "lua/prompts/a.lua: get is missing" },
    };
    cleanup_free char *folders =
        orch_xasprintf("cd %s && rm -rf lua && mkdir -p lua/resources lua/prompts", dir);
    uint8_t seen[ORCH_ARRAY_LEN(rows)][ORCH_SHA256_BYTES];
    for (size_t i = 0; i < ORCH_ARRAY_LEN(rows); i++) {
        struct orch_err err = { 0 };
        assert_int_equal(system(folders), 0);
        put_file(rows[i].file, rows[i].text);
        if (rows[i].other_file)
            put_file(rows[i].other_file, rows[i].other_text);
        forget();
        bool loaded = orch_current_need(&current, &err) == 0;
        expect(rows[i].text, rows[i].error ? strstr(err.msg, rows[i].error) != NULL : loaded,
               loaded ? "it was loaded" : err.msg, rows[i].error);
        if (!loaded)
            continue;
        assert_int_equal(current.gen->features, rows[i].features);
        memcpy(seen[i], current.gen->offer_digest, sizeof seen[i]); /* by which a change is told */
        for (size_t k = 0; k < i; k++)
            assert_memory_not_equal(seen[k], seen[i], sizeof seen[i]);
    }
    assert_int_equal(wrong, 0);
}

/* An own tool takes the place of a shipped one; what has that one keeps it. */
static void replaced(void **state)
{
    (void)state;
    struct orch_err err;
    put_file("tools/own.lua", "return { name = 'run_command', description = 'mine', run = print,"
                              " input = { type = 'object' } }");
    put_file(TOOLS, RULES("{ tool = 'run_command', action = 'allow' }"));
    need();
    struct orch_tool *t = orch_generation_tool(current.gen, ORCH_SLICE("run_command"));
    size_t n = current.gen->n_tools;
    assert_false(t->shipped);
    assert_non_null(strstr(t->definition, "mine"));
    struct orch_tool again = *t;
    again.definition = (char *)(uintptr_t) "{\"name\":\"again\"}";
    assert_int_equal(orch_generation_add_tool(current.gen, &again, ORCH_SLICE(""), &err), 0);
    assert_ptr_not_equal(orch_generation_tool(current.gen, ORCH_SLICE("run_command")), t);
    assert_int_equal(current.gen->n_tools, n);
    assert_string_equal(t->name, "run_command");
    assert_non_null(strstr(t->definition, "mine"));
    orch_generation_list(current.gen);
    assert_string_equal(current.gen->list.p, "[{\"name\":\"again\"}]");
}

int main(void)
{
#define CASE(fn) cmocka_unit_test_setup_teardown(fn, open_folder, close_folder)
    const struct CMUnitTest tests[] = {
        CASE(refused), CASE(swap),    CASE(watch),  CASE(trust),
        CASE(judged),  CASE(deep),    CASE(rates),  CASE(too_many_callers),
        CASE(redact),  CASE(offered), CASE(beside), CASE(replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
