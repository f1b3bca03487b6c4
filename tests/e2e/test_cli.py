# The command line: every command of the contract is there or refused by name; exit codes; scripts.
# as: user
import json, re, subprocess

from orch_e2e import *

COMMANDS = """mcp; mcp stdio; mcp http; mcp test; test-mcp; run; chat; vm; vm run; vm spawn; vm list; vm exec; vm logs; vm stats; vm kill; vm pool;
spawn-vm; image; image build; image list; image inspect; image rm; policy; policy check; policy test; policy explain; policy show; policy diff; policy grants;
policy revoke; approvals; approvals list; approvals show; approvals approve; approvals deny; audit; audit tail; audit show; audit verify; trust; check; test; repl;
types; init; doctor; status; config; config show; config check; reload; version; help"""
COMMANDS = [c.split() for c in re.split(r";\s*", COMMANDS.strip())]
# What this version must have; the others may say that they are not available yet.
BUILT = ["mcp stdio", "mcp test", "test-mcp", "vm run", "spawn-vm", "image build", "policy check", "policy test", "policy explain", "policy show",
         "trust", "init", "reload", "config check", "config show", "status", "doctor", "version", "help", "audit tail", "audit show", "audit verify"]


def command(env, words):
    r = env.orch(*words, "--help")
    name = " ".join(words)
    if r.status == 0:
        expect(words[-1] in r.out and len(r.out) > 30, r)
    else:
        expect(name not in BUILT, "must be built", r)
        expect(r.status == 2 and "not available yet" in r.err and words[0] in r.err, r)
        again = env.orch(*words)
        expect(again.status == 2 and "not available yet" in again.err, again)


for words in COMMANDS:
    case(" ".join(words) + " --help", words)(command)


@case("help lists what exists, and help COMMAND is COMMAND --help")
def help_lists(env):
    for r in (env.orch("help"), env.orch("--help"), env.orch("-h")):
        expect(r.status == 0 and not r.err, r)
        for name in ("mcp", "vm", "image", "policy", "audit", "trust", "init", "doctor", "status", "config", "reload", "version", "help"):
            expect(re.search(r"\b%s\b" % name, r.out), name, "is not in", r.out)
    expect(env.orch("help", "mcp").out == env.orch("mcp", "--help").out, env.orch("help", "mcp"))


@case("help names no command that does not answer")
def help_is_true(env):
    names = set(re.findall(r"^ {2,4}(?:orch )?([a-z][a-z-]+)(?= )", env.orch("help").out, re.M))
    expect(len(names) >= 10, names)
    for name in names:
        r = env.orch(name, "--help")
        expect(r.status == 0 or "not available yet" in r.err, name, r)


@case("no arguments: usage, exit 2")
def nothing(env):
    r = env.orch()
    expect(r.status == 2 and "help" in r.err and not r.out, r)


NEAR = [("mpc", "mcp"), ("verion", "version"), ("docter", "doctor"), ("polcy", "policy"), ("relaod", "reload"), ("hlep", "help"), ("test-mpc", "test-mcp")]


def near(env, wrong, right):
    r = env.orch(wrong)
    expect(r.status == 2 and wrong in r.err and re.search(r"did you mean.*\b%s\b" % right, r.err), r)


for wrong, right in NEAR:
    case("unknown command %s: nearest is %s" % (wrong, right), wrong, right)(near)


def usage(env, args, words):
    r = env.orch(*args)
    expect(r.status == 2 and re.search(words, r.err) and not r.out, r)


for args, words in ((["mcp"], "stdio"), (["mcp", "stido"], "stdio"), (["mcp", "stdio", "--asx", "y"], "--as"), (["vm", "rum"], "run"), (["audit", "verfy"], "verify"),
                    (["policy", "chekc"], "check"), (["--confg", "x", "version"], "--config"), (["version", "--jsno"], "--json"), (["-Z"], "-Z"), (["--log-format", "xml", "version"], "xml"),
                    (["--config"], "--config"), (["-e"], "-e"), (["mcp", "stdio", "--as"], "--as"), (["mcp", "stdio", "--as", "Bad Name", "--", "true"], "--as"),
                    (["mcp", "stdio", "--as", "local", "--", "true"], "local"), (["mcp", "stdio", "--start-timeout", "soon", "--", "true"], "--start-timeout"),
                    (["mcp", "stdio", "--timeout", "90", "--", "true"], "--timeout"), (["mcp", "stdio", "--timeout", "0s", "--", "true"], "--timeout"),
                    (["mcp", "stdio", "--start-timeout", "5m"], "--start-timeout"), (["mcp", "test", "--timeout", "1d", "--", "true"], "--timeout"), (["no-such-command-at-all"], "no-such-command-at-all"), (["version", "extra"], "extra")):
    case("usage error: orch " + " ".join(args), args, words)(usage)


@case("version, and version --json with features")
def version(env):
    r = env.orch("version")
    expect(r.status == 0 and re.search(r"\b\d+\.\d+\.\d+", r.out), r)
    expect(env.orch("--version").out.split("\n")[0] == r.out.split("\n")[0], env.orch("--version"))
    r = env.orch("version", "--json")
    parsed = json.loads(r.out)
    expect(r.status == 0 and re.fullmatch(r"\d+\.\d+\.\d+.*", parsed["version"]) and isinstance(parsed["features"], (list, dict)), parsed)


@case("global options stand anywhere before the command's own")
def global_options(env):
    env.project()
    for args in (["-v", "version"], ["--log-format", "json", "version"], ["--log-level", "debug", "version"], ["-c", env.config, "version"], ["--config=" + env.config, "version"]):
        expect(env.orch(*args).status == 0, args, env.orch(*args))


# ---- scripts

SCRIPTS = [
    ("returns an integer", "return 3", 3, ""), ("returns nothing", "print('x')", 0, ""), ("os.exit", "os.exit(5)", 5, ""), ("os.exit(true)", "os.exit(true)", 0, ""),
    ("os.exit(false)", "os.exit(false)", 1, ""), ("error", "error('broken')", 1, r"broken"), ("syntax error", "return (", 6, ":1:"), ("error has file:line and traceback", "\nlocal function f() error('deep') end\nf()", 1, r":2: deep[\s\S]*:3"),
    ("returns true", "return true", 0, ""), ("writes to stdout", "io.write('out')", 0, ""),
]


def script(env, text, status, words):
    path = env.write("script.lua", text)
    r = env.orch(path)
    expect(r.status == status and re.search(words, r.err), r)
    if "error" in text:
        expect("script.lua" in r.err, r)
    r = env.orch("-e", text)
    expect(r.status == status and re.search(words, r.err), "-e", r)
    r = env.orch("-", input=text.encode())
    expect(r.status == status and re.search(words, r.err), "-", r)


for name, *rest in SCRIPTS:
    case("script: " + name, *rest)(script)


@case("script: arg, ... and options after the name are the script's own")
def script_arg(env):
    path = env.write("script.lua", "io.write(arg[0], '|', table.concat(arg, ','), '|', select('#', ...), '|', tostring(...))")
    r = env.orch(path, "a", "-v", "--help", "--", "")
    expect(r.status == 0 and r.out == path + "|a,-v,--help,--,|5|a", r)


@case("script: orch is global and a module; tasks, sleep, json, now")
def script_api(env):
    r = env.orch("-e", """
        assert(require "orch" == orch and type(orch.version) == "string")
        local t0, order = orch.now(), {}
        local a = orch.task.spawn(function(x) orch.sleep("30ms") order[#order + 1] = x return x * 2 end, 21)
        local b = orch.task.spawn(function() orch.sleep(0.01) order[#order + 1] = "b" end)
        assert(a:join() == 42) b:join()
        assert(order[1] == "b" and order[2] == 21 and orch.now() - t0 >= 0.028)
        assert(orch.json.encode(orch.json.decode('{"a":[1,null,"x"]}')) == '{"a":[1,null,"x"]}')
        assert(orch.json.encode(orch.json.array({})) == "[]" and orch.json.encode({}) == "{}")
        assert(tostring(orch.json.decode("[9007199254740993]")[1]) == "9007199254740993")
        local ok, err = pcall(orch.sleep, "soon") assert(not ok and err:find("duration"), err)
        local v, why = orch.json.decode("[1,") assert(v == nil and why:find("byte"), why)
        assert(not pcall(orch.json.encode, "\\255"))
    """)
    expect(r.status == 0, r)


@case("script: a file that does not exist")
def script_missing(env):
    r = env.orch("no/such/script.lua")
    expect(r.status in (2, 6, 1) and "no/such/script.lua" in r.err, r)


@case("script: runs with the full standard library and the JIT, and ends on SIGINT with 130")
def script_trusted(env):
    expect(env.orch("-e", "assert(io.open and os.execute and require 'ffi' and jit.status())").status == 0, env.orch("-e", "assert(jit.status())"))
    s = env.session(argv=[ORCH, "-e", "io.write('on\\n') io.flush() orch.sleep(600)"])
    expect(s.recv_raw() == b"on")
    os.kill(s.pid, 2)
    expect(s.wait() == 130, s.child.returncode)


@case("print goes to the log, not to stdout")
def script_print(env):
    r = env.orch("-e", "print('to the log', 1, nil)")
    expect(r.status == 0 and r.out == "" and re.search(r"to the log\s+1\s+nil", r.err), r)


@case("lua/mcp.lua is the same as mcp stdio")
def entry_script(env):
    env.project()
    share = os.path.dirname(ORCH)
    path = next(p for p in (os.path.join(share, "lua/mcp.lua"), os.path.join(share, "../share/orch/lua/mcp.lua")) if os.path.exists(p))
    s = env.session(argv=[ORCH, "--config", env.config, path, "stdio"])
    s.initialize()
    expect(text_of(s.call("echo", {"message": "x"})) == "x")
    expect(s.end() == 0)


# ---- configuration and trust

def in_folder(env, *args, **more):
    """orch in the project folder, its configuration found there."""
    return run([ORCH, *args], env.environ, env.path("p"), **more)


@case("trust: a configuration in the working directory is refused until trusted, and again when a file changes")
def trust(env):
    env.project()
    def start():
        s = env.session(argv=[ORCH, "mcp", "stdio"])
        return s, s.end()
    s, status = start()
    expect(status == 6 and "orch trust" in s.stderr(), status, s.stderr())
    for args in (["version"], ["doctor"], ["init"], ["audit", "tail"], ["help"]):
        expect(in_folder(env, *args).status != 6, args, in_folder(env, *args))
    r = env.person("trust")
    expect(r.status == 0 and "orchestrator.lua" in r.out + r.err, r)
    s, status = start()
    expect(status == 0, status, s.stderr())
    env.write("policies/tools.lua", 'return { rules = { { tool = "echo", action = "allow" } } }')
    s, status = start()
    expect(status == 6 and "tools.lua" in s.stderr() and "orch trust" in s.stderr(), status, s.stderr())
    expect(env.person("trust").status == 0)
    env.write("lua/tools/more.lua", ECHO.replace('"echo"', '"more"'))
    s, status = start()
    expect(status == 6 and "more.lua" in s.stderr(), status, s.stderr())
    expect(env.person("trust", "--edits").status == 0)
    env.write("policies/tools.lua", ALLOW_ALL)
    s, status = start()
    expect(status == 0, status, s.stderr())


@case("trust: an edit that is not trusted is not loaded by a running process")
def trust_reload(env):
    env.project()
    expect(env.person("trust").status == 0)
    s = env.session(argv=[ORCH, "mcp", "stdio"])
    s.initialize()
    env.write("policies/tools.lua", 'return { rules = { { tool = "echo", action = "deny", reason = "new" } } }')
    until(lambda: "orch trust" in s.stderr(), "the refusal in the log")
    expect(text_of(s.call("echo", {"message": "old"})) == "old")
    expect(env.person("trust").status == 0)
    os.kill(s.pid, 1)
    until(lambda: text_of(s.call("echo", {"message": "x"})).startswith("denied: new"), "the trusted edit")


@case("no configuration at all: the built-in one, run_command listed")
def built_in(env):
    s = env.session(argv=[ORCH, "mcp", "stdio"])
    s.initialize()
    expect("run_command" in [t["name"] for t in s.request("tools/list")["result"]["tools"]])
    expect(s.end() == 0)


@case("config check and show; a secret is never shown; --origin")
def config(env):
    env.project(more='llm = { api_key = env("E2E_KEY", nil) }')
    environ = {**env.environ, "E2E_KEY": "s3cret-value"}
    r = env.orch("config", "check", config=True, environ=environ)
    expect(r.status == 0, r)
    for args in (["config", "show"], ["config", "show", "--origin"]):
        r = env.orch(*args, config=True, environ=environ)
        expect(r.status == 0 and "s3cret-value" not in r.out + r.err and "policies" in r.out, r)
    env.write("orchestrator.lua", "return {}")
    r = env.orch("config", "show", config=True)
    expect(re.search("^audit.dir +%s/orch/audit$" % env.environ["XDG_STATE_HOME"], r.out, re.M), "the one that is used:", r)
    env.write("orchestrator.lua", "return { polices = 'x' }")
    r = env.orch("config", "check", config=True)
    expect(r.status == 6 and "policies" in r.err, r)


@case("policy check, test, show and explain")
def policy(env):
    env.project('return { rules = {\n  { tool = "echo", action = "allow" },\n  { tool = "echo", action = "deny", reason = "quiet", when = function(c) return c.args.message == "x" end },\n},\n'
                '  tests = { { call = { tool = "echo", args = { message = "x" } }, expect = "deny" }, { call = { tool = "echo", args = { message = "y" } }, expect = "allow" } } }')
    for args, words in ((["check"], ""), (["test"], "2"), (["show"], "echo"), (["explain", "echo", '{"message":"x"}'], r"deny[\s\S]*tools\.lua:3|tools\.lua:3[\s\S]*deny"),
                        (["explain", "echo", '{"message":"y"}'], r"allow")):
        r = env.orch("policy", *args, config=True)
        expect(r.status == 0 and re.search(words, r.out), args, r)
    env.write("policies/tools.lua", "return { rules = { { tool = 'x' } } }")
    r = env.orch("policy", "check", config=True)
    expect(r.status == 6 and re.search(r"tools\.lua.*action", r.err + r.out), r)
    env.write("policies/tools.lua", "return { rules = { { tool = 'echo', action = 'allow' } }, tests = { { call = { tool = 'echo', args = { message = 'x' } }, expect = 'deny' } } }")
    r = env.orch("policy", "test", config=True)
    expect(r.status in (1, 6) and "deny" in r.err + r.out and "allow" in r.err + r.out, r)


@case("mcp test: lists and calls a server given as a command")
def mcp_test(env):
    upstream = [PY, os.path.join(SERVERS, "upstream.py"), "good"]
    r = env.orch("mcp", "test", "--list", "--", *upstream)
    expect(r.status == 0 and "echo" in r.out and "big" in r.out, r)
    r = env.orch("test-mcp", "--call", "echo", "--args", '{"message":"héllo"}', "--", *upstream)
    expect(r.status == 0 and "héllo" in r.out, r)
    r = env.orch("mcp", "test", "--", "/no/such/server")
    expect(r.status == 7 and "/no/such/server" in r.err, r)
    env.project()
    r = env.orch("mcp", "test", "--list", "--", ORCH, "--config", env.config, "mcp", "stdio")
    expect(r.status == 0 and "echo" in r.out, r)


@case("--json: what a terminal would obey is escaped as JSON does it, and stays the same value")
def json_escaped(env):
    text = "x\x9by\u202ez\x7f\u200b\U000e0001 \xe9\u20ac\U0001f600\x1b[31m"
    code = 'require "cli".json({ text = "%s" })' % "".join("\\%03d" % b for b in text.encode())
    r = env.orch("-e", code)
    expect(r.status == 0 and json.loads(r.out) == {"text": text}, r)
    expect(not re.search("[\x1b\x7f\x80-\x9f\u200b\u202e\U000e0001]", r.out) and "\xe9\u20ac\U0001f600" in r.out, repr(r.out))


@case("mcp test: what a server wrote is shown with control and bidi characters escaped")
def mcp_test_escapes(env):
    r = env.orch("mcp", "test", "--call", "echo", "--args", '{"message":"a\\u001b[31mb\\u202ec\\u200bd"}', "--", PY, os.path.join(SERVERS, "upstream.py"), "good")
    expect(r.status == 0 and not re.search("[\x1b\u202e\u200b]", r.out) and "a" in r.out, repr(r.out))


@case("init writes a configuration that starts once trusted, and never overwrites")
def init(env):
    r = in_folder(env, "init")
    expect(r.status == 0 and os.path.exists(env.path("p/orchestrator.lua")), r)
    expect(env.person("trust").status == 0, env.person("trust"))
    s = env.session(argv=[ORCH, "mcp", "stdio"])
    s.initialize()
    expect(s.end() == 0)
    with open(env.config) as f:
        before = f.read()
    r = in_folder(env, "init")
    with open(env.config) as f:
        expect(f.read() == before and "orchestrator.lua" in r.out + r.err, r)


@case("status: with and without a running process")
def status(env):
    r = env.orch("status")
    expect(r.status == 0, r)
    s = env.project().session()
    s.initialize()
    r = env.orch("status", config=True)
    expect(r.status == 0 and str(s.pid) in r.out, r)
    json.loads(env.orch("status", "--json", config=True).out)


@case("reload without a running process says so")
def reload(env):
    r = env.orch("reload")
    expect(r.err + r.out != "" and r.status in (0, 1), r)


@case("doctor is read-only and answers in JSON too")
def doctor(env):
    before = sorted(os.walk(env.dir))
    r = env.orch("doctor")
    expect(r.status in (0, 1) and re.search("qemu|kvm", r.out, re.I), r)
    expect(sorted(os.walk(env.dir)) == before, "doctor wrote something")
    r = env.orch("doctor", "--json")
    json.loads(r.out)


# ---- standard output that cannot be written

def onto(env, out, *args):
    with open(out, "wb") as f:
        child = subprocess.Popen(env.argv(*args), stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.PIPE, env=env.environ, cwd=env.path("p"))
        err = child.communicate(timeout=WAIT_S)[1]
    return child.returncode, err.decode()


WRITES = [("help",), ("version",), ("version", "--json"), ("config", "show"), ("status",), ("status", "--json"), ("audit", "verify", "--help"),
          ("-e", "print = io.write; print(1)"), ("-e", 'io.write(("x"):rep(100000))'), ("-e", "io.write(1); os.exit(0)"), ("-e", 'io.write(("x"):rep(100000)); os.exit(0)'),
          ("check", "orchestrator.lua", "--help")]


@case("what cannot be written to standard output is no success; a status of its own stays")
def full(env):
    env.project()
    for args in WRITES:
        status, err = onto(env, "/dev/full", *args)
        expect(status == 1 and "orch: standard output: " in err, args, status, err)
        expect(onto(env, "/dev/null", *args) == (0, ""), args, onto(env, "/dev/null", *args))
    status, err = onto(env, "/dev/full", "-e", "io.write(1) return 7")
    expect(status == 7 and "No space left on device" in err, status, err)


@case("a reader that is gone wanted no more: nothing is said of it")
def gone(env):
    env.project()
    for args in WRITES:
        read, write = os.pipe()
        os.close(read)
        child = subprocess.Popen(env.argv(*args), stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, env=env.environ, cwd=env.path("p"))
        os.close(write)
        err = child.communicate(timeout=WAIT_S)[1]
        expect(child.returncode == 0 and err == b"", args, child.returncode, err)


if __name__ == "__main__":
    main()
