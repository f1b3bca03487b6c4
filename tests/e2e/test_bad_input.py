# Broken policies, tools and configurations. Each: exit 6 with place and reason at the start, and a running
# process keeps its old generation.
# as: user
import re, signal

from orch_e2e import *

P, T, C = "policies/tools.lua", "lua/tools/echo.lua", "orchestrator.lua"
GOOD = 'return { policies = "policies", tools = { "lua/tools" }, audit = { dir = "audit" }%s }'
RULE = "return { rules = {\n  { tool = '*', action = 'allow' },\n  %s\n} }"
rule = lambda text: RULE % text
tool = lambda old, new: ECHO.replace(old, new)
conf = lambda text: GOOD % (",\n  " + text)

# name, {file: content}, place, reason
ROWS = [
    # policies
    ("policy: syntax error", {P: "return {\n  rules = { {\n"}, r"tools\.lua:\d", "expected|unexpected"),
    ("policy: error at load", {P: "local x\n\nreturn x.rules"}, r"tools\.lua:3", "nil"),
    ("policy: error() with a table", {P: "error({})"}, r"tools\.lua", ""),
    ("policy: returns nothing", {P: "local a = 1"}, r"tools\.lua", "table"),
    ("policy: returns a string", {P: "return 'rules'"}, r"tools\.lua", "table"),
    ("policy: without rules", {P: "return {}"}, r"tools\.lua", "rules"),
    ("policy: rules is no table", {P: "return { rules = 7 }"}, r"tools\.lua", "rules"),
    ("policy: unknown key", {P: "return { rulez = {} }"}, r"tools\.lua", "rulez.*rules"),
    ("policy: unknown key in a rule", {P: rule("{ tool = 'x', acton = 'deny' }")}, r"tools\.lua", "acton.*action"),
    ("policy: unknown action", {P: rule("{ tool = 'x', action = 'alow' }")}, r"tools\.lua", r"(?=[\s\S]*\balow\b)(?=[\s\S]*\ballow\b)"),
    ("policy: action missing", {P: rule("{ tool = 'x' }")}, r"tools\.lua", "action"),
    ("policy: tool missing", {P: rule("{ action = 'deny' }")}, r"tools\.lua", "tool"),
    ("policy: tool a number", {P: rule("{ tool = 1, action = 'deny' }")}, r"tools\.lua", "tool"),
    ("policy: a rule is a string", {P: rule("'run_command'")}, r"tools\.lua", "rule|table"),
    ("policy: network other than none", {P: rule("{ tool = 'x', action = 'allow', network = 'packages' }")}, r"tools\.lua", "packages"),
    ("policy: effect on a deny rule", {P: rule("{ tool = 'x', action = 'deny', mark = 'm' }")}, r"tools\.lua", "mark"),
    ("policy: rewrite is no function", {P: rule("{ tool = 'x', action = 'allow', rewrite = {} }")}, r"tools\.lua", "rewrite"),
    ("policy: when is no function", {P: rule("{ tool = 'x', action = 'deny', when = true }")}, r"tools\.lua", "when"),
    ("policy: redact is no pattern", {P: rule("{ tool = 'x', action = 'allow', redact = { '(' } }")}, r"tools\.lua", "redact"),
    ("policy: redact is a string", {P: rule("{ tool = 'x', action = 'allow', redact = 'x' }")}, r"tools\.lua", "redact"),
    ("policy: rate without unit", {P: rule("{ tool = 'x', action = 'allow', rate = '30' }")}, r"tools\.lua", "rate"),
    ("policy: rate of an unknown unit", {P: rule("{ tool = 'x', action = 'allow', rate = '30/fortnight' }")}, r"tools\.lua", "rate"),
    ("policy: mark a number", {P: rule("{ tool = 'x', action = 'allow', mark = 1 }")}, r"tools\.lua", "mark"),
    ("policy: reason a table", {P: rule("{ tool = 'x', action = 'deny', reason = {} }")}, r"tools\.lua", "reason"),
    ("policy: failing test", {P: "return { rules = { { tool = '*', action = 'allow' } },\n  tests = { { call = { tool = 'echo', args = { message = 'x' } }, expect = 'deny' } } }"}, r"tools\.lua", "test.*deny|deny.*test"),
    ("policy: test without expect", {P: "return { rules = { { tool = '*', action = 'allow' } },\n  tests = { { call = { tool = 'echo', args = {} } } } }"}, r"tools\.lua", "expect"),
    ("policy: another file in policies/", {"policies/more.lua": "return { rules = {} }"}, r"more\.lua", ""),
    ("policy: over 1 MiB", {P: "--" + "x" * (1 << 20) + "\n" + ALLOW_ALL}, r"tools\.lua", "1 ?MiB|1048576|big|large"),
    ("policy: bytecode", {P: b"\x1bLJ\x02\x02\x00"}, r"tools\.lua", "bytecode|text|binary|unexpected"),
    ("policy: io", {P: "io.open('/etc/passwd')\n" + ALLOW_ALL}, r"tools\.lua:1", "io"),
    ("policy: os.execute", {P: "os.execute('true')\n" + ALLOW_ALL}, r"tools\.lua:1", ""),
    ("policy: require ffi", {P: "require 'ffi'\n" + ALLOW_ALL}, r"tools\.lua:1", ""),
    ("policy: debug", {P: "debug.sethook()\n" + ALLOW_ALL}, r"tools\.lua:1", "debug"),
    ("policy: loop", {P: "\nwhile true do end"}, r"tools\.lua:2", "limit|steps|time|budget"),
    ("policy: loop inside pcall", {P: "while true do\n  pcall(function() while true do end end)\nend"}, r"tools\.lua:\d", "limit|steps|time|budget"),
    ("policy: loop in an error handler", {P: "xpcall(error, function() while true do end end)"}, r"tools\.lua:\d", "limit|steps|time|budget"),
    ("policy: loop in a coroutine", {P: "coroutine.wrap(function() while true do end end)()"}, r"tools\.lua:\d", "limit|steps|time|budget|coroutine"),
    ("policy: loop in a metamethod that the loader reads", {P: "return setmetatable({}, { __index = function() while true do end end })"}, r"tools\.lua", ""),
    ("policy: backtracking pattern", {P: "(('a'):rep(40)):find(('a*'):rep(40) .. 'b')"}, r"tools\.lua:\d", "limit|steps|time|budget|complex"),
    ("policy: gsub on much text", {P: "local s = ('a'):rep(65536)\nfor i = 1, 1000 do s:gsub('a-b', '') end"}, r"tools\.lua:\d", "limit|steps|time|budget"),
    ("policy: too much memory", {P: "local t = {}\nfor i = 1, 1e9 do t[i] = ('x'):rep(1e5) .. i end"}, r"tools\.lua:\d", "memory|limit|steps|budget"),
    ("policy: one huge string", {P: "local s = ('x'):rep(1e9)"}, r"tools\.lua:\d", "memory|limit|steps|budget"),
    ("policy: endless recursion", {P: "local function f() return 1 + f() end\nf()"}, r"tools\.lua:1", "overflow|limit|steps|memory"),
    # tools
    ("tool: syntax error", {T: "return { name = }"}, r"echo\.lua:1", "unexpected|expected"),
    ("tool: returns nothing", {T: ""}, r"echo\.lua", "table"),
    ("tool: without name", {T: tool('name = "echo", ', "")}, r"echo\.lua", "name"),
    ("tool: name with __", {T: tool('"echo"', '"a__b"')}, r"echo\.lua", "name.*__"),
    ("tool: name with a space", {T: tool('"echo"', '"a b"')}, r"echo\.lua", "name"),
    ("tool: name of 65 characters", {T: tool('"echo"', '"%s"' % ("x" * 65))}, r"echo\.lua", "name|64"),
    ("tool: without run", {T: "return { name = 'echo', description = 'd', input = { type = 'object' } }"}, r"echo\.lua", "run"),
    ("tool: run is no function", {T: "return { name = 'echo', description = 'd', input = { type = 'object' }, run = 'id' }"}, r"echo\.lua", "run"),
    ("tool: unknown key", {T: tool("description", "desciption")}, r"echo\.lua", "desciption.*description"),
    ("tool: input is no table", {T: "return { name = 'echo', description = 'd', input = 'object', run = function() end }"}, r"echo\.lua", "input"),
    ("tool: input is no object schema", {T: tool('type = "object", p', 'type = "array", p')}, r"echo\.lua", "object"),
    ("tool: unknown schema keyword", {T: tool("required =", "requird =")}, r"echo\.lua", "requird"),
    ("tool: unknown schema type", {T: tool('type = "string"', 'type = "text"')}, r"echo\.lua", "text"),
    ("tool: schema pattern broken", {T: tool('type = "string"', 'type = "string", pattern = "("')}, r"echo\.lua", "pattern"),
    ("tool: timeout in words", {T: tool("input =", "timeout = 'soon', input =")}, r"echo\.lua", "timeout"),
    ("tool: two of one name", {"lua/tools/echo2.lua": ECHO}, r"echo2?\.lua", "echo"),
    ("tool: loop at load", {T: "while true do end"}, r"echo\.lua:1", "limit|steps|time|budget"),
    ("tool: io", {T: "local f = io.open('/etc/passwd')\n" + ECHO}, r"echo\.lua:1", "io"),
    # configuration
    ("configuration: syntax error", {C: "return {\n  policies = \n}"}, r"orchestrator\.lua:3", "unexpected|expected"),
    ("configuration: returns a function", {C: "return function() end"}, r"orchestrator\.lua", "table"),
    ("configuration: loop", {C: "while true do end"}, r"orchestrator\.lua:1", "limit|steps|time|budget"),
    ("configuration: unknown key", {C: conf("polices = 'x'")}, r"orchestrator\.lua|polices", "polices.*policies"),
    ("configuration: unknown key below", {C: conf("vm = { memroy = '256M' }")}, r"vm\.memroy|orchestrator\.lua:", "memroy.*memory"),
    ("configuration: policies a number", {C: "return { policies = 7 }"}, r"orchestrator\.lua|policies", "path|string"),
    ("configuration: policies missing on disk", {C: "return { policies = 'nowhere' }"}, r"nowhere", ""),
    ("configuration: tools folder missing", {C: "return { policies = 'policies', tools = { 'nowhere' } }"}, r"nowhere", ""),
    ("configuration: memory in words", {C: conf("vm = { memory = 'lots' }")}, r"vm\.memory|orchestrator\.lua:", "memory|lots"),
    ("configuration: memory far too small", {C: conf("vm = { memory = '1K' }")}, r"vm\.memory|orchestrator\.lua:", "memory|1K"),
    ("configuration: no processor", {C: conf("vm = { vcpus = 0 }")}, r"vm\.vcpus|orchestrator\.lua:", "vcpus"),
    ("configuration: half a processor", {C: conf("vm = { vcpus = 1.5 }")}, r"vm\.vcpus|orchestrator\.lua:", "vcpus"),
    ("configuration: unknown backend", {C: conf("vm = { backend = 'xen' }")}, r"vm\.backend|orchestrator\.lua:", "xen|qemu"),
    ("configuration: backend not available yet", {C: conf("vm = { backend = 'firecracker' }")}, r"vm\.backend|orchestrator\.lua:", "not available yet"),
    ("configuration: unknown accel", {C: conf("vm = { accel = 'fast' }")}, r"vm\.accel|orchestrator\.lua:", "fast|kvm"),
    ("configuration: timeout negative", {C: conf("vm = { timeout = -1 }")}, r"vm\.timeout|orchestrator\.lua:", "timeout"),
    ("configuration: depth 0", {C: conf("limits = { depth = 0 }")}, r"limits\.depth|orchestrator\.lua:", "depth"),
    ("configuration: calls in words", {C: conf("limits = { calls = 'many' }")}, r"limits\.calls|orchestrator\.lua:", "calls"),
    ("configuration: policy time in words", {C: conf("limits = { policy = { time = 'soon' } }")}, r"limits\.policy\.time|orchestrator\.lua:", "time|soon"),
    ("configuration: sync unknown", {C: "return { policies = 'policies', audit = { sync = 'sometimes' } }"}, r"audit\.sync|orchestrator\.lua:", "sometimes|none"),
    ("configuration: workspace missing on disk", {C: conf("workspace = 'nowhere'")}, r"workspace|nowhere", "nowhere"),
    ("configuration: upstream without sandbox", {C: conf("upstreams = { files = { command = { 'x' } } }")}, r"upstreams", ""),
    ("configuration: upstream named local", {C: conf("upstreams = { ['local'] = { command = { 'x' }, sandbox = 'host' } }")}, r"upstreams", ""),
]


def at_start(env, files, place, reason):
    env.project()
    for name, text in files.items():
        env.write(name, text)
    s = env.session()
    status = s.end()
    err = s.stderr()
    expect(status == 6, "exit status %d\n%s" % (status, err))
    expect(re.search(place, err) and re.search(reason, err), "should hold /%s/ and /%s/:\n%s" % (place, reason, err))
    expect(s.child.stdout.read() in (b"", None), "something on stdout")
    expect(len(err) < 4000, "a wall of text:", err[:1000])


def at_reload(env, files, place, reason):
    s = env.project().session()
    s.initialize()
    expect(text_of(s.call("echo", {"message": "before"})) == "before")
    for name, text in files.items():
        env.write(name, text)
    os.kill(s.pid, signal.SIGHUP)
    until(lambda: re.search(place, s.stderr()) and re.search(reason, s.stderr()), "/%s/ and /%s/ in the log: %s" % (place, reason, s.stderr()))
    expect(text_of(s.call("echo", {"message": "after"})) == "after", "the old generation is gone")
    expect(s.end() == 0)


for name, *rest in ROWS:
    case(name + ", at the start", *rest)(at_start)
    case(name + ", at reload", *rest)(at_reload)


def no_file(env, path, words):
    r = run([ORCH, "--config", path, "mcp", "stdio"], env.environ, env.path("p"))
    expect(r.status == 6 and path in r.err and re.search(words, r.err) and not r.out, r)


case("configuration: no such file", "/no/such/orchestrator.lua", "[Nn]o such")(no_file)
case("configuration: a folder", "/etc", "directory|regular")(no_file)
case("configuration: a device", "/dev/zero", "regular|may write")(no_file)


WHEN = [
    ("loops", "while true do end"), ("loops inside pcall", "while true do pcall(function() while true do end end) end"), ("raises", "error('no')"),
    ("raises a table", "error({})"), ("takes much memory", "local t = {} for i = 1, 1e9 do t[i] = ('x'):rep(1e5) .. i end"),
    ("matches for ever", "return (('a'):rep(40)):find(('a*'):rep(40) .. 'b')"), ("sorts for ever", "local t = {} for i = 1, 1000 do t[i] = i end table.sort(t, function() while true do end end)"),
    ("yields", "coroutine.yield()"), ("waits", "orch.sleep(1)"), ("reads a field of nil", "return c.args.x.y"), ("recurses", "local function f() return 1 + f() end return f()"),
]


def when(env, body):
    """A predicate that fails denies its call, and the next call is judged."""
    env.project('return { rules = {\n  { tool = "echo", action = "allow" },\n  { tool = "echo", action = "deny", reason = "never", when = function(c)\n'
                '    if c.args.message == "bad" then %s end\n  end },\n} }' % ("do " + body + " end"))
    s = env.session()
    s.initialize()
    result = s.call("echo", {"message": "bad"})
    expect(result["isError"] is True and text_of(result).startswith("denied: ") and re.search(r"tools\.lua:\d", text_of(result)), result)
    expect(text_of(s.call("echo", {"message": "good"})) == "good")


for name, body in WHEN:
    case("when " + name + ": denied", body)(when)


RUN = [("loops", "while true do end"), ("raises", "error('broken here')"), ("returns nothing", ""), ("returns a number", "return 7"),
       ("takes much memory", "local t = {} for i = 1, 1e9 do t[i] = ('x'):rep(1e5) .. i end"), ("loops inside pcall", "while true do pcall(function() while true do end end) end"),
       ("returns nil and a reason", "return nil, 'not today'"), ("writes a global", "x_global = 1")]


def tool_run(env, body):
    env.project(tools={"bad": ECHO.replace('"echo"', '"bad"').replace("return { text = args.message }", "do " + body + " end"), "echo": ECHO},
                more="limits = { tool = { cpu = '300ms', memory = '64M' } }")
    s = env.session()
    s.initialize()
    result = s.call("bad", {"message": "x"})
    expect(result["isError"] is True and text_of(result).startswith("failed: "), result)
    expect(text_of(s.call("echo", {"message": "good"})) == "good")


for name, body in RUN:
    case("a tool that %s: failed, and the next call is served" % name, body)(tool_run)


if __name__ == "__main__":
    main()
