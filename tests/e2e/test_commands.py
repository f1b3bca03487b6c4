# The commands in depth: streams of vm run, what works beside a broken configuration, what is refused, what is escaped.
# as: user
import array, fcntl, json, re, signal, termios

from orch_e2e import *

RULES = 'return { rules = { { tool = "run_command", action = "allow" }, { tool = "echo", action = "allow" } } }'


def vm(env, *args, **more):
    return env.shared_cache().orch("vm", "run", *args, deadline_s=START_S, **more)


# ---- the streams of vm run

DATA = os.urandom(1 << 20) * 10


@case("vm run: 10 MiB through a pipe, out of a file and into a file")
def big(env):
    r = vm(env, "--", "cat", input=DATA)
    expect(r.status == 0 and r.out_bytes == DATA, r.status, len(r.out_bytes), r.err)
    for name in ("in", "out"):
        env.write(name, DATA if name == "in" else b"")
    with open(env.path("p/in"), "rb") as i, open(env.path("p/out"), "wb") as o:
        done = subprocess.run([ORCH, "vm", "run", "--", "sh", "-c", "cat; exit 3"], stdin=i, stdout=o, env=env.environ, cwd=env.path("p"), timeout=60)
    with open(env.path("p/out"), "rb") as f:
        expect(done.returncode == 3 and f.read() == DATA, done.returncode, os.path.getsize(env.path("p/out")))


@case("vm run: a file of more than 16 MiB on stdin is not cut")
def big_file(env):
    vm(env, "--", "true")
    path = env.write("in", b"x" * (20 << 20))
    with open(path, "rb") as i:
        done = subprocess.run([ORCH, "vm", "run", "--", "wc", "-c"], stdin=i, capture_output=True, env=env.environ, cwd=env.path("p"), timeout=60)
    expect(done.stdout.split() == [b"%d" % (20 << 20)], done)


@case("vm run: when nobody reads its output any more, CMD gets SIGPIPE")
def broken_pipe(env):
    vm(env, "--", "true")
    s = env.session(argv=[ORCH, "vm", "run", "--", "yes"])
    expect(s.recv_raw(START_S) == b"y")
    s.child.stdout.close()
    expect(s.wait() == 141, s.child.returncode, s.stderr())


@case("vm run: a reader that stands still holds up neither SIGTERM nor the end")
def stuck_reader(env):
    vm(env, "--", "true")
    s = env.session(argv=[ORCH, "vm", "run", "--", "yes"])
    expect(s.recv_raw(START_S) == b"y")  # more comes, nobody reads it

    def waiting():
        n = array.array("i", [0])
        fcntl.ioctl(s.child.stdout, termios.FIONREAD, n)
        return n[0]
    until(lambda: waiting() >= fcntl.fcntl(s.child.stdout, fcntl.F_GETPIPE_SZ), "a full pipe")
    os.kill(s.pid, signal.SIGTERM)
    expect(s.wait() == 143, s.child.returncode)
    expect(not leftovers(), "something is left")


@case("vm run: closed standard streams")
def closed(env):
    vm(env, "--", "true")
    for redirect in (">&-", "<&-", "2>&-", "<&- >&- 2>&-", "</dev/null >/dev/null"):
        r = run(["/bin/sh", "-c", 'exec "$@" ' + redirect, "sh", ORCH, "vm", "run", "--", "sh", "-c", "cat; exit 5"], env.environ, env.path("p"))
        expect(r.status == 5, redirect, r)


@case("vm run: more than 16 arguments, and what --help, --json and -v behind -- are: CMD's")
def arguments(env):
    r = vm(env, "--", "sh", "-c", 'echo $# $1 $2 $3', "sh", "--help", "--json", "-v", *map(str, range(300)))
    expect(r.status == 0 and r.out == "303 --help --json -v\n", r)


@case("vm run --json: bytes that are not UTF-8, a signal, a time-out, a command that is not there")
def as_json(env):
    for argv, options, status, want in ((["printf", "a\\377b"], [], 0, {"stdout": "a\ufffdb", "status": 0}), (["sh", "-c", "kill -15 $$"], [], 143, {"signal": 15}),
                                        (["sleep", "100"], ["--timeout", "300ms"], 124, {"timed_out": True}), (["no-such"], [], 127, {"status": 127})):
        r = vm(env, "--json", *options, "--", *argv)
        parsed = json.loads(r.out)
        expect(r.status == status and parsed["exit"] == status and want.items() <= parsed.items(), r)


@case("vm run: what cannot start is 125, with orch's own status in words and in JSON; nothing runs")
def not_run(env):
    env.shared_cache().write("orchestrator.lua", "return {")
    r = env.orch("vm", "run", "--", "true", config=True)
    expect(r.status == 125 and "status 6" in r.err and "orchestrator.lua" in r.err and not r.out, r)
    r = env.orch("vm", "run", "--json", "--", "true", config=True)
    parsed = json.loads(r.out)
    expect(r.status == 125 and parsed["status_of_orch"] == 6 and parsed["code"] == "config" and "orchestrator.lua" in parsed["error"], r)
    r = env.orch("vm", "run", "--kernel", "/no/such/kernel", "--", "true")
    expect(r.status == 125 and "/no/such/kernel" in r.err, r)


@case("vm run: options that are wrong are usage, 2")
def vm_usage(env):
    for args, words in ((["true"], "--"), ([], "CMD"), (["--"], "CMD"), (["--memory", "12X", "--", "true"], "12X"), (["--vcpus", "two", "--", "true"], "two"),
                        (["--timeout", "soon", "--", "true"], "soon"), (["--imag", "x", "--", "true"], "--image"), (["--image"], "--image"), (["--json=yes", "--", "true"], "--json"),
                        (["--memory", "1K", "--", "true"], "64M"), (["--image", "No.pe", "--", "true"], "No.pe"), (["--modules", "/x", "--", "true"], "--kernel")):
        r = vm(env, *args)
        expect(r.status == 2 and words in r.err and not r.out, args, r)


@case("vm run: output that cannot be written is no success")
def full_output(env):
    vm(env, "--", "true")
    for stream, args, wanted in (("stdout", ["--", "echo", "x"], {1, 141}), ("stdout", ["--", "head", "-c", "300000", "/dev/zero"], {1, 141}), ("stdout", ["--json", "--", "echo", "x"], {1}),
                                 ("stderr", ["--", "sh", "-c", "echo x >&2"], {1, 141}), ("stdout", ["--", "sh", "-c", "echo x; sleep 0.2; exit 3"], {3, 141}),
                                 ("stdout", ["--json", "--", "sh", "-c", "exit 3"], {3})):
        with open("/dev/full", "wb") as f:
            done = subprocess.run([ORCH, "vm", "run"] + args, stdin=subprocess.DEVNULL, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: f},
                                  env=env.environ, cwd=env.path("p"), timeout=START_S)
        expect(done.returncode in wanted, args, done)
        expect(stream == "stderr" or b"standard output: No space left on device" in done.stderr, args, done)


# ---- microVMs and images

@case("vm list and status say for which call a microVM runs, for whom, since when")
def serves(env):
    s = env.shared_cache().project(RULES).session()
    s.initialize()
    id = s.start("tools/call", {"name": "run_command", "arguments": {"command": "sleep 500"}})
    listed = until(lambda: [v for v in json.loads(env.orch("vm", "list", "--json").out or "[]") if v.get("call")], "the microVM")
    expect(len(listed) == 1 and listed[0]["tool"] == "run_command" and "uid:%d " % os.geteuid() in listed[0]["caller"] and listed[0]["session"], listed)
    expect(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", listed[0]["since"]), listed)
    line = env.orch("vm", "list").out.splitlines()[1]
    expect("run_command (%s)" % listed[0]["call"] in line and "uid:%d " % os.geteuid() in line and listed[0]["since"] in line, line)
    running = json.loads(env.orch("status", "--json").out)[0]["running"]
    expect([(r["call"], r["tool"]) for r in running] == [(listed[0]["call"], "run_command")], running)
    until(lambda: json.loads(env.orch("status", "--json").out)[0]["running"][0].get("vm") == listed[0]["id"], "its microVM in status")
    s.notify("notifications/cancelled", {"requestId": id})
    until(lambda: json.loads(env.orch("vm", "list", "--json").out) == [], "its end")
    expect(s.end() == 0)
    line = env.orch("audit", "show", "--tool", "run_command", config=True).out
    expect("  %s  " % listed[0]["id"] in line and "  cancelled" in line, line)


@case("vm spawn holds one, vm list and status see it, SIGINT ends it")
def spawn_and_list(env):
    expect(env.shared_cache().orch("vm", "list").out == "no orch process of yours is running\n")
    s = env.session(argv=[ORCH, "vm", "spawn", "--name", "held\x1b[31m"])
    id = s.recv_raw(START_S).decode()
    listed = json.loads(env.orch("vm", "list", "--json").out)
    expect([(v["id"], v["pid"]) for v in listed] == [(id, s.pid)], listed)
    r = env.orch("vm", "list")
    expect(id in r.out and str(s.pid) in r.out and "\x1b" not in r.out, repr(r.out))
    expect(str(s.pid) in env.orch("status", "--pid", str(s.pid)).out)
    expect("is running" in env.orch("vm", "list", "--pid", "1").out)
    stats = json.loads(env.orch("vm", "stats", "--json", id).out)
    expect(stats[0]["network"] == "none" and stats[0]["vmm_bytes"] > 20e6 and stats[0]["uplink_bytes"] == 0 and stats[0]["rules"] == [], stats)
    r = env.orch("vm", "stats")
    expect(re.search(id + r" +\d+ +none +[\d.]+ MB +0.0 MB +0 ", r.out), r.out)
    r = env.orch("vm", "stats", "vm-no")
    expect(r.status == 1 and "no microVM vm-no is running" in r.err, r)
    os.kill(s.pid, signal.SIGINT)
    expect(s.wait() == 130, s.child.returncode)
    expect(not leftovers(), "something is left")


@case("spawn-vm -v names the phases; --json")
def phases(env):
    r = env.shared_cache().orch("spawn-vm", "-v", deadline_s=START_S)
    expect(r.status == 0 and re.search(r"\n +ready +\d", r.out), r)
    parsed = json.loads(env.orch("spawn-vm", "--json", deadline_s=START_S).out)
    expect(parsed["phases"][-1]["name"] == "ready" and parsed["spawn_ms"] > 0 and parsed["backend"] == "qemu", parsed)


@case("image: list, inspect, build again, rm of what is not there")
def image(env):
    r = env.orch("image", "list")
    expect(r.status == 0 and "image build" in r.out, r)
    r = env.orch("image", "rm", "base")
    expect(r.status == 1 and "base" in r.err, r)
    r = env.shared_cache().orch("image", "build", "base", deadline_s=START_S)
    expect(r.status == 0 and r.out.startswith("base"), r)
    expect(json.loads(env.orch("image", "list", "--json").out)[0]["name"] == "base")
    expect("vmlinux" in env.orch("image", "inspect", "base").out, env.orch("image", "inspect", "base"))
    r = env.orch("image", "build", "nope")
    expect(r.status == 2 and "base" in r.err, r)


@case("image rm removes the image and its templates; another build makes them again")
def image_rm(env):
    source = env.shared_cache().environ["XDG_CACHE_HOME"]
    env.orch("spawn-vm", deadline_s=START_S)
    env.environ["XDG_CACHE_HOME"] = env.path("cache")
    shutil.copytree(os.path.join(source, "orch"), env.path("cache/orch"), symlinks=True)
    expect(json.loads(env.orch("image", "inspect", "base", "--json").out)["templates"])
    r = env.orch("image", "rm", "base")
    expect(r.status == 0, r)
    left = [n for d, _, files in os.walk(env.path("cache")) for n in files if n in ("vmlinux", "initrd", "mem", "state", "manifest")]
    expect(not left and env.orch("image", "inspect", "base").status != 0, left)


# ---- beside a configuration that is broken or not trusted

@case("help, version, doctor, trust, init, audit and check work beside a broken configuration")
def broken(env):
    env.write("orchestrator.lua", "return { polices = 1 }")
    for args, status in ((["help"], 0), (["help", "vm", "run"], 0), (["version"], 0), (["audit", "tail"], 0), (["init"], 0), (["check", "policies/tools.lua"], 0)):
        r = env.orch(*args)
        expect(r.status == status, args, r)
    r = env.orch("doctor")
    expect(r.status == 1 and re.search("error +configuration .*not trusted", r.out), r)
    r = env.person("trust")
    expect(r.status == 6 and "policies" in r.err and "polices" in r.err, r)
    r = env.orch("policy", "check")
    expect(r.status == 6 and "orch trust" in r.err, r)


@case("doctor: every line has a state and a reason, an error has a fix; what is missing is named")
def doctor(env):
    r = env.orch("doctor", "--json")
    parsed = json.loads(r.out)
    names = {c["name"] for c in parsed["checks"]}
    expect(names >= {"version", "configuration", "confinement", "QEMU", "/dev/kvm", "isolation", "image", "busybox", "apt-get", "state", "cache", "runtime", "disk",
                     "audit log", "your agent"}, names)
    for c in parsed["checks"]:
        expect(c["state"] in ("ok", "warn", "error") and c["why"] and (c["state"] != "error" or c["fix"]), c)
    expect(parsed["ok"] == (r.status == 0) and r.status == any(c["state"] == "error" for c in parsed["checks"]), r)
    env.environ["PATH"] = env.path("home")
    found = {c["name"]: c for c in json.loads(env.orch("doctor", "--json").out)["checks"]}
    expect(found["apt-get"]["state"] == "error" and "--kernel" in found["apt-get"]["fix"], found["apt-get"])
    os.mkdir(env.path("state/orch"))
    os.chmod(env.path("state/orch"), 0o777)
    found = {c["name"]: c for c in json.loads(env.orch("doctor", "--json").out)["checks"]}
    expect(found["state"]["state"] == "warn" and "chmod 700" in found["state"]["fix"], found["state"])


@case("trust DIR and trust of the working directory; a folder without a configuration")
def trust(env):
    r = env.person("trust")
    expect(r.status == 6 and "orch init" in r.err, r)
    env.project()
    r = env.person("trust", env.path("p"), cwd=env.path("home"))
    expect(r.status == 0 and "orchestrator.lua" in r.out and "echo.lua" in r.out and re.search("4 files|3 files", r.out), r)
    expect(env.orch("policy", "check").status == 0, env.orch("policy", "check"))
    env.write("lua/tools/echo.lua", ECHO + "\n")
    r = env.orch("policy", "check")
    expect(r.status == 6 and "echo.lua" in r.err, r)


@case("trust and reload are refused below a process that orch started")
def below(env):
    env.project()
    for words in ("trust", "reload"):
        r = env.orch("-e", 'local r = orch.process.run({ "%s", "%s" }) io.stderr:write(r.stderr) return r.status' % (ORCH, words))
        expect(r.status == 3 and "refused" in r.err, r)
    expect(env.orch("policy", "check").status == 6)


@case("init: four files, a second time kept; into another folder")
def init(env):
    r = env.orch("init", "new/folder")
    expect(r.status == 0 and r.out.count("wrote") == 4 and "orch trust new/folder" in r.out, r)
    r = env.orch("init", "new/folder")
    expect(r.status == 0 and r.out.count("kept") == 4 and "wrote" not in r.out, r)
    r = env.orch("policy", "check", "new/folder")
    expect(r.status == 0 and "2 rules, 3 tests, 6 tools: ok" in r.out, r)
    r = env.orch("init", "/proc/nowhere")
    expect(r.status == 1 and "/proc/nowhere" in r.err, r)


# ---- policy

@case("policy check: all errors, by folder, configuration or policy file")
def policy_check(env):
    env.project('return { rules = {\n { tool = "echo", action = "allw" },\n { tool = "x", action = "deny", rate = "1/min" },\n} }')
    env.write("lua/tools/bad.lua", "return { name = 'bad__name' }")
    for args in ([], ["."], ["orchestrator.lua"], ["policies/tools.lua"], ["policies"]):
        r = env.orch("policy", "check", *args, config=not args)
        expect(r.status == 6 and "tools.lua:2" in r.err and "tools.lua:3" in r.err and "bad.lua" in r.err, args, r)
    r = env.orch("policy", "check", env.path("home"))
    expect(r.status == 6 and "orchestrator.lua" in r.err, r)


@case("policy test: 1 when a test fails, 6 when the file is broken")
def policy_test(env):
    env.project('return { rules = { { tool = "echo", action = "allow" } }, tests = { { call = { tool = "echo" }, expect = "deny" } } }')
    r = env.orch("policy", "test", config=True)
    expect(r.status == 1 and "tests[1]" in r.err, r)
    env.write("policies/tools.lua", "return {")
    expect(env.orch("policy", "test", config=True).status == 6)


@case("policy explain: an unknown tool, arguments that are no object, JSON")
def explain(env):
    env.project()
    r = env.orch("policy", "explain", "files__write", config=True)
    expect(r.status == 0 and "allow" in r.out and "only its name" in r.out, r)
    for args in ("[]", "{", '{"a":1,"a":2}'):
        r = env.orch("policy", "explain", "echo", args, config=True)
        expect(r.status == 2 and "arguments" in r.err, args, r)
    parsed = json.loads(env.orch("policy", "explain", "echo", "--json", config=True).out)
    expect(parsed["decision"] == "allow" and parsed["rules"][0]["where"].endswith("tools.lua:1"), parsed)
    parsed = json.loads(env.orch("policy", "show", "--json", config=True).out)
    expect(parsed["rules"][0]["tool"] == "*" and {t["name"] for t in parsed["tools"]} == {"echo", "run_command", "run_python", "read_file", "list_dir", "fetch_url"}, parsed)


SAME = """return { rules = {
  { tool = "*", action = "allow" },
  { tool = "echo", action = "deny", reason = "quiet", when = function(c) return c.args.message == "hush" end },
  { tool = "echo", action = "ask", when = function(c) return c.args.message == "ask" end },
  { tool = "echo", action = "deny", when = function(c) return c.args.message == "wrong" and c.none.such end },
  { tool = "echo", action = "deny", when = function(c) while c.args.message == "loop" do end end },
  { tool = "echo", action = "allow", when = function(c) return c.args.message == "go" end,
    rewrite = function(a) a.message = "hush" return a end },
  { tool = "echo", action = "allow", when = function(c) return c.args.message == "number" end,
    rewrite = function(a) a.message = 1 return a end },
  { tool = "echo", action = "allow", when = function(c) return c.args.message == "code" end,
    rewrite = function(a) a.more = print return a end },
  { tool = "echo", action = "allow", when = function(c) return c.args.message == "louder" or c.args.message == "LOUD" end,
    rewrite = function(a) a.message = "LOUD" return a end, rate = "1/day", redact = { "U" }, mark = "heard" },
  { tool = "echo", action = "allow", network = "one", when = function(c) return c.args.message == "net" end },
  { tool = "echo", action = "allow", network = "two", when = function(c) return c.args.message == "net" end },
  { tool = "echo", action = "deny", when = function(c) return c.args.more ~= nil end },
} }
"""


@case("policy explain says what the call then gets: decision, reason and rules; it takes nothing")
def explain_is_the_call(env):
    env.write("policies/network.lua", "return { one = { allow = {} }, two = { allow = {} } }")
    s = env.project(SAME).session()
    s.initialize()
    for n, args in enumerate([{"message": m} for m in ("x", "hush", "ask", "wrong", "loop", "go", "number", "code", "louder", "net")] +
                             [{"message": "x", "more": None}, {"message": "x", "more": 1}, {"message": None}, {"mesage": "x"}, {}]):
        x = json.loads(env.orch("policy", "explain", "echo", json.dumps(args), "--json", config=True).out)
        answer = s.request("tools/call", {"name": "echo", "arguments": args})
        line = [l for l in env.audit() if l["event"] == "decision"][n]
        expect(x["decision"] == line["decision"], args, x, line)
        told = answer["error"]["message"] if "error" in answer else text_of(answer["result"])
        for prefix in ("denied: ", "bad arguments: "):
            told, x["reason"] = told.removeprefix(prefix), x.get("reason", "").removeprefix(prefix)
        expect(x["decision"] == "allow" or told == x["reason"], args, x, answer)
        if args.get("message") not in ("loop", "code"):  # cut short on the way: named in the reason alone
            expect(x["by"] == line["rules"], args, x, line)
        if args.get("message") == "louder":
            expect(x["args"] == {"message": "LOUD"} and line["args"] == {"message": "LO[redacted]D"}, x, line)
            expect(x["rates"][0]["rate"] == "1/day" and x["redact"][0]["pattern"] == "U" and x["marks"][0]["mark"] == "heard", x)
    expect(text_of(s.call("echo", {"message": "louder"})).startswith("denied: rate limit 1/day is used up"))


@case("policy explain, for people: effects, what a rewrite made, what cannot be enforced, what a call would need")
def explain_lines(env):
    env.write("policies/network.lua", "return { one = { allow = {} }, two = { allow = {} } }")
    env.project(SAME.replace("} }\n", '{ tool = "up__*", action = "allow", network = "one" },\n} }\n'))
    for words, lines in (
            (("echo", '{"message":"louder"}'), ("allow\n", 'rewritten (policies/tools.lua:13): {"message":"LOUD"}', "redacted in the result: U (policies/tools.lua:13)",
                                                 "rate 1/day for each caller, of which this took none (policies/tools.lua:13)", "marks the session heard (policies/tools.lua:13)")),
            (("echo", '{"message":"go"}'), ("deny: quiet (policies/tools.lua:3)", "policies/tools.lua:7   allow  does not apply (when) to what was rewritten, applied before", 'rewritten (policies/tools.lua:7): {"message":"hush"}')),
            (("echo", '{"message":"wrong"}'), ("when failed: ", "not asked")),
            (("echo", '{"message":"loop"}'), ("deny: policies/tools.lua:6: ",)),
            (("echo", '{"message":5}'), ("deny: bad arguments: arguments.message: ", "not asked")),
            (("echo",), ("allow\n", "no arguments given")),
            (("up__x",), ("deny: network one cannot be enforced here", "no tool up__x"))):
        r = env.orch("policy", "explain", *words, config=True)
        expect(r.status == 0, words, r)
        for line in lines:
            expect(line in r.out, words, line, r)


# ---- audit

@case("audit: tail -n, --json, -f; show; beside an untrusted configuration; what was logged is escaped")
def audit(env):
    s = env.project().session()
    s.initialize()
    result = s.call("echo", {"message": "first \u202e\u001b[31m"})
    r = env.orch("audit", "tail", "-n", "1", config=True)
    expect(r.status == 0 and r.out.count("\n") == 1 and "  allow  " in r.out and "  ok, " in r.out, r)
    r = env.orch("audit", "tail", config=True)
    expect("first" in r.out and not re.search("[\x1b\u202e]", r.out), repr(r.out))
    r = env.orch("audit", "tail", "--json", config=True)
    expect(json.loads(r.out.splitlines()[0])["tool"] == "echo", r)
    r = env.orch("audit", "show", result["_meta"]["orch/call"], "--json", config=True)
    expect(r.status == 0 and [json.loads(l)["event"] for l in r.out.splitlines()] == ["decision", "outcome"], r)
    expect(env.orch("audit", "show", "c0-1", config=True).status == 1)
    follower = env.session(argv=env.argv("audit", "tail", "-f", "-n", "1"))
    expect(b"first" in follower.recv_raw())
    for text in ("second", "third"):  # a line each, when it has ended
        s.call("echo", {"message": text})
        line = follower.recv_raw()
        expect(text.encode() in line and b"  ok, " in line, line)
    os.kill(follower.pid, signal.SIGINT)
    expect(follower.wait() == 130)
    r = env.orch("audit", "tail")  # the project's configuration is not trusted
    expect(r.status == 0 and "configuration" in r.err, r)
    r = env.orch("audit", "verify", "--dir", env.path("p/audit"))
    expect(r.status == 0 and "lines" in r.out, r)
    r = env.orch("audit", "verify", "--dir", env.path("home"))
    expect(r.status == 1 and "no audit log" in r.err, r)


# ---- for script authors

@case("check: syntax errors with file:line, without running anything")
def check(env):
    good, bad = env.write("good.lua", "#!/usr/bin/env orch\nos.exit(7)"), env.write("bad.lua", "\nlocal x = = 1")
    expect(env.orch("check", good).status == 0, env.orch("check", good))
    r = env.orch("check", good, bad, "no-such.lua")
    expect(r.status == 6 and "bad.lua:2:" in r.err and "no-such.lua" in r.err, r)
    env.project()
    for text, words in ((b"\x1bLJ\x02\x02\x00", "bytecode is not accepted, only source text"), (b"--" + b"x" * (1 << 20), "1 MiB")):
        env.write("policies/tools.lua", text)
        for args in (["check", "policies/tools.lua"], ["policy", "check", "--config", env.config]):
            r = env.orch(*args)
            expect(r.status == 6 and words in r.err, "check says what loading says:", r)


@case("test: TAP on stdout; files do not share globals, modules, or their end")
def test(env):
    tap = os.path.join(ROOT, "tests/lua/tap.lua")
    shutil.copy(tap, env.path("p/tap.lua"))
    ok = env.write("ok.lua", 'local t = require "tap" leaked = 1\nt.test("waits", function() orch.sleep(0.001) end) return t.done()')
    fails = env.write("fails.lua", 'assert(leaked == nil) local t = require "tap" t.test("bad", function() t.eq(1, 2) end) os.exit(t.done())')
    breaks, broken = env.write("breaks.lua", "error('deep')"), env.write("broken.lua", "return (")
    r = env.orch("test", ok)
    expect(r.status == 0 and r.out == "ok 1 - waits\n1..1\n", r)
    r = env.orch("test", fails, ok)
    expect(r.status == 1 and "not ok 1 - bad" in r.out and "ok 1 - waits" in r.out, r)
    r = env.orch("test", breaks, ok)
    expect(r.status == 1 and "breaks.lua:1: deep" in r.err and "ok 1 - waits" in r.out, r)
    r = env.orch("test", broken, ok)
    expect(r.status == 6 and "broken.lua:1:" in r.err and "ok 1 - waits" in r.out, r)


@case("a script gets all of its arguments, however many")
def many_arguments(env):
    r = env.orch("-e", "io.write(select('#', ...), ' ', #arg, ' ', (select(500, ...)))", *map(str, range(500)))
    expect(r.status == 0 and r.out == "500 500 499", r)


@case("global options among a command's own; behind -- they are CMD's")
def global_options(env):
    env.project()
    for args in (["policy", "check", "--config", env.config], ["policy", "--config=" + env.config, "check"], ["policy", "check", "-c", env.config, "-v"]):
        r = env.orch(*args)
        expect(r.status == 0 and "1 rule" in r.out, args, r)
    r = env.orch("policy", "check", "--log-format", "xml")
    expect(r.status == 2 and "xml" in r.err, r)
    r = env.orch("image", "--version")
    expect(r.status == 0 and re.match(r"orch \d", r.out), r)


@case("help: topics, subcommands, unknown words")
def help_topics(env):
    expect("125" in env.orch("help", "exit").out and "126" in env.orch("help", "exit").out)
    r = env.orch("help", "config")
    expect(r.status == 0 and "workspace" in r.out and "config show" in r.out, r)
    expect(env.orch("help", "vm", "run").out == env.orch("vm", "run", "--help").out)
    expect(env.orch("-h", "policy").out == env.orch("policy", "--help").out)
    for words in (["vmm"], ["chat"]):
        r = env.orch("help", *words)
        expect(r.status == 2 and words[0] in r.err, r)


@case("a failing mcp test is 7, a tool that says isError 1")
def mcp_test(env):
    env.project('return { rules = { { tool = "echo", action = "allow" }, { tool = "echo", action = "deny", when = function(c) return c.args.message == "no" end } } }')
    server = ["--", ORCH, "--config", env.config, "mcp", "stdio"]
    r = env.orch("mcp", "test", "--call", "echo", "--args", '{"message":"no"}', *server)
    expect(r.status == 1 and "denied" in r.out, r)
    r = env.orch("mcp", "test", "--json", *server)
    expect(r.status == 0 and json.loads(r.out)[0]["name"] == "echo", r)
    r = env.orch("mcp", "test", "--", "/bin/sh", "-c", "echo words >&2; exit 9")
    expect(r.status == 7 and "words" in r.err and "9" in r.err, r)
    for args in (["--args", "{}"], ["--call", "x", "--args", "[1]"], ["--url", "http://127.0.0.1:1"], ["extra"]):
        expect(env.orch("mcp", "test", *args, *server).status == 2, args)


HOSTILE = """import json, sys
answers = json.loads(sys.argv[1])
for line in sys.stdin:
    m = json.loads(line)
    if "id" in m:
        print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": answers[m["method"]]}), flush=True)
"""


@case("mcp test: a server that answers with the wrong things is shown or refused, never an error in Lua")
def hostile(env):
    server = env.write("server.py", HOSTILE)
    for info, tools, result, status in (("x", {"tools": [1, {"name": 3, "inputSchema": {"properties": {"a": 1}, "required": [{}]}}]}, {"content": [1, {"type": "text", "text": 4}]}, 0),
                                        (5, {}, {}, 7), (None, {"tools": 7}, {}, 7), ({"name": "\x1b[31m"}, {"tools": []}, {"content": {"a": 1}}, 0), ({}, {"tools": []}, "text", 7)):
        answers = {"initialize": {"protocolVersion": LEGACY, "capabilities": {}, "serverInfo": info}, "tools/list": tools, "tools/call": result}
        r = env.orch("mcp", "test", "--list", "--call", "x", "--", PY, server, json.dumps(answers))
        expect(r.status == status and "traceback" not in r.err and "\x1b" not in r.out + r.err, answers, r)


# ---- examples

@case("examples/spawn.lua: microVMs side by side")
def spawn_example(env):
    r = env.shared_cache().orch(os.path.join(ROOT, "examples/spawn.lua"), "3", deadline_s=START_S)
    expect(r.status == 0 and len(set(re.findall(r"boot (\S+),", r.out))) == 3 and "3 microVMs in" in r.out and "uid 1000" in r.out, r)


@case("examples/tools/word_count.lua: progress, the workspace and nothing beside it")
def tool_example(env):
    env.write("policies/tools.lua", ALLOW_ALL)
    env.write("orchestrator.lua", 'return { tools = { "%s" }, workspace = ".", audit = { dir = "audit" } }' % os.path.join(ROOT, "examples/tools"))
    env.write("docs/a.txt", "one two\n")
    env.write("docs/b.txt", "three")
    os.symlink("/etc/passwd", env.path("p/link"))
    s = env.session()
    s.initialize()
    answer = s.answer(s.start("tools/call", {"name": "word_count", "arguments": {"path": "docs"}, "_meta": {"progressToken": "t"}}))["result"]
    expect(answer["structuredContent"] == {"total": 3, "files": {"a.txt": 2, "b.txt": 1}}, answer)
    expect([n["params"]["progress"] for n in s.notes if n["method"] == "notifications/progress"] == [1, 2], s.notes)
    for path in ("link", "../outside", "/etc/passwd", "missing"):
        result = s.call("word_count", {"path": path})
        expect(result["isError"] and path in text_of(result), path, result)
    expect(s.end() == 0)


if __name__ == "__main__":
    main()
