# The time of a call: one clock, whose end gives the output so far and names what set it. Limits are short here; what
# they are multiplied by changes nothing.
# as: user asan
import fcntl, http.server, shutil, socketserver, threading

from orch_e2e import *

START_S = 120  # the first start on a machine builds the image


def tool(name, body, timeout=""):
    return ('return { name = "%s", description = "d", input = { type = "object", properties = { timeout = { type = "number" } } }, %s\n'
            "run = function(args, ctx) %s end }\n" % (name, 'timeout = "%s",' % timeout if timeout else "", body))


SHOW = """
  local function show(r, why, code, so_far)
    if r then return orch.json.encode(r) end
    return orch.json.encode { why = why, code = code, so_far = so_far }
  end
"""
# A command for as long as args.timeout and the call's time let it.
RUN = SHOW + """
  return show(assert(ctx:vm()):exec({ "sh", "-c", "echo so far; %s" }, { timeout = args.timeout }))
"""
LONG = {"own": tool("own", RUN % "exec sleep 100", "2s"), "plain": tool("plain", RUN % "exec sleep 100"),
        "stubborn": tool("stubborn", RUN % "trap '' TERM; sleep 100; sleep 100")}


def started(env, limit, tools, **capabilities):
    """A session whose template is there, so that the times are those of the calls."""
    env.shared_cache().project(ALLOW_ALL, tools, 'vm = { image = "base"%s }' % (', timeout = "%s"' % limit if limit else ""))
    expect(env.orch("vm", "run", "--", "true", config=True, deadline_s=START_S).status == 0)
    s = env.session()
    s.request("initialize", {"protocolVersion": LEGACY, "capabilities": capabilities, "clientInfo": {"name": "e2e", "version": "1"}})
    s.notify("notifications/initialized")
    return s


def result(s, name, **arguments):
    r = s.call(name, arguments)
    expect(not r.get("isError"), r)
    return json.loads(text_of(r))


# ---- a command that outlives its time

ENDED = [  # vm.timeout, tool, the argument, what ended it, capped
    ("3s", "plain", 1, "1 s: the argument timeout", None),
    ("3s", "plain", 1000, "3 s: vm.timeout", True),
    ("3s", "stubborn", None, "3 s: vm.timeout", None),
    (None, "own", None, "2 s: timeout of lua/tools/own.lua", None),
    ("1s", "own", None, "2 s: timeout of lua/tools/own.lua", None),  # the file's own wins, it is the nearer to the tool
    (None, "own", 60, "2 s: timeout of lua/tools/own.lua", True),
    (None, "own", 0.5, "0.5 s: the argument timeout", None),
]


def ended(env, limit, name, argument, what, capped):
    s = started(env, limit, LONG)
    r = result(s, name, **({"timeout": argument} if argument else {}))
    expect(r["timed_out"] is True and r["stdout"] == "so far\n" and r.get("limit") == what and r.get("capped") == capped, r)
    expect(s.end() == 0)


for row in ENDED:
    case("a command that does not end: vm.timeout %s, tool %s, argument %s: output so far, and \"%s\"" % row[:4], *row)(ended)


@case("a longer command is a matter of one key; what is capped and ends in time says that it was capped")
def longer(env):
    s = started(env, "2s", {"build": tool("build", RUN % "sleep 3; echo built")})
    r = result(s, "build", timeout=20)
    expect(r["timed_out"] and r["stdout"] == "so far\n" and r["capped"] is True, r)
    env.write("orchestrator.lua", 'return { policies = "policies", tools = { "lua/tools" }, vm = { image = "base", timeout = "30s" } }')
    until(lambda: s.request("ping") and "reload" in [l["event"] for l in env.audit()], "the reload")
    r = result(s, "build", timeout=20)
    expect(not r["timed_out"] and r["stdout"] == "so far\nbuilt\n" and "limit" not in r and "capped" not in r, r)
    r = result(s, "build", timeout=1000)
    expect(not r["timed_out"] and r["stdout"] == "so far\nbuilt\n" and r["capped"] is True and r["limit"] == "30 s: vm.timeout", r)
    expect(s.end() == 0)


@case("run_command: vm.timeout alone bounds it; a larger argument is capped, a smaller one holds; all of it is in the text")
def run_command(env):
    s = started(env, "3s", {"echo": ECHO})
    for arguments, words in (({}, "3 s: vm.timeout"), ({"timeout": 1}, "1 s: the argument timeout"), ({"timeout": 3600}, "3 s: vm.timeout")):
        r = s.call("run_command", {"command": "echo so far; exec sleep 100", **arguments})
        expect(text_of(r).startswith("so far\n") and words in text_of(r), r)
    r = s.call("run_command", {"command": "echo quick", "timeout": 3600})
    expect(not r.get("isError") and text_of(r).startswith("quick\n") and "3 s: vm.timeout" in text_of(r), r)
    expect(text_of(s.call("run_command", {"command": "echo quick", "timeout": 2})) == "quick\n")
    expect(s.end() == 0)


@case("after its time a call can still read what its command left; another command is refused by name; then it ends")
def grace(env):
    body = SHOW + """
      local vm = assert(ctx:vm())
      local r = vm:exec { "sh", "-c", "echo half > /tmp/report; exec sleep 100" }
      local report = vm:read_file("/tmp/report")
      local again, why, code = vm:exec { "true" }
      return orch.json.encode { limit = r.limit, report = report, again = again == nil, why = why, code = code, id = vm.id }"""
    slow = "local vm = assert(ctx:vm()) orch.sleep(100)"
    s = started(env, "2s", {"grace": tool("grace", body), "slow": tool("slow", slow)})
    r = result(s, "grace")
    expect(r["report"] == "half\n" and r["limit"] == "2 s: vm.timeout" and r["again"], r)
    expect(r["why"] == "microVM %s: its time of 2 s is over (vm.timeout)" % r["id"] and r["code"] == "timeout", r)
    r = s.call("slow")
    expect(r["isError"] and text_of(r) == "failed: timeout: not done within 2 s (vm.timeout)", r)
    expect([l["reason"] for l in env.audit() if l["event"] == "vm_exit"][-1] == "timeout", env.audit()[-2:])
    expect(s.end() == 0)


# ---- the microVM fails under a command

# Tells its progress when the command has written something and its guest has handed it over.
UNDER = SHOW + """
  local vm = assert(ctx:vm())
  orch.task.spawn(function()
    for _ = 1, 3 do
      repeat local there = vm:read_file("/tmp/up") if not there then orch.sleep(0.02) end until there
    end
    ctx:progress(1)
    %s
  end)
  return show(vm:exec { "sh", "-c", "echo so far; echo also >&2; touch /tmp/up; exec sleep 100" })
"""
FAILS = [("the guest powers off", 'vm:exec({ "poweroff", "-f" }, { user = "root" })', None, "the guest powered off", "closed"),
         ("its VMM is killed", "", signal.SIGKILL, "the VMM was killed by signal 9 (Killed)", "closed"),
         ("its VMM hangs beyond the call's time", "", signal.SIGSTOP, "its time of 6 s is over (vm.timeout)", "timeout")]


def fails(env, end, act, why, code):
    s = started(env, "6s", {"under": tool("under", UNDER % end)})
    id = s.start("tools/call", {"name": "under", "arguments": {}, "_meta": {"progressToken": "up"}})
    up = s.recv(30)
    expect(up.get("method") == "notifications/progress", up)
    vm = [l["vm"] for l in env.audit() if l["event"] == "vm_spawn"][-1]
    if act:
        os.kill([p for p in descendants(s.pid) if "qemu-system" in name_of(p)][0], act)
    r = json.loads(text_of(s.answer(id)["result"]))
    expect(r["why"] == "microVM %s: %s" % (vm, why) and r["code"] == code, r)
    expect(r["so_far"]["stdout"] == "so far\n" and r["so_far"]["stderr"] == "also\n" and r["so_far"]["truncated"] is False, r)
    expect(s.end() == 0)
    left = leftovers()
    expect(not left, left)


for name, *rest in FAILS:
    case("%s under a command: nil, why, code and the output so far" % name, *rest)(fails)


@case("run_command whose VMM is killed: the text says why and has the output so far")
def killed(env):
    s = started(env, "60s", {"echo": ECHO})
    # No event tells that the output has come; one of these is late enough.
    for wait in (0.5, 2, 8):
        id = s.start("tools/call", {"name": "run_command", "arguments": {"command": "echo so far; exec sleep 100"}})
        until(lambda: [p for p in descendants(s.pid) if "qemu-system" in name_of(p)], "its VMM")
        select.select([s.child.stdout], [], [], wait)
        os.kill([p for p in descendants(s.pid) if "qemu-system" in name_of(p)][0], signal.SIGKILL)
        r = s.answer(id)["result"]
        expect(r["isError"] and "killed by signal 9" in text_of(r), r)
        if "so far\n" in text_of(r):
            break
    expect("so far\n" in text_of(r), r)
    expect(s.end() == 0)


# ---- when the clock stands still

SLEEP_ON = tool("sleep_on", 'orch.sleep(100) return "x"')


def time_passes(s, limit):
    """Comes back when more than vm.timeout has passed: a call of its own was ended by it."""
    r = s.call("sleep_on")
    expect(r["isError"] and text_of(r) == "failed: timeout: not done within %s (vm.timeout)" % limit, r)


@case("a template that is made first is not counted: a new machine's first call ends as every later one")
def template(env):
    quick = tool("quick", 'local r = assert(assert(ctx:vm()):exec { "echo", "ran" }) return r.stdout')
    env.shared_cache().project(ALLOW_ALL, {"quick": quick, "sleep_on": SLEEP_ON}, 'vm = { image = "base", timeout = "3s" }')
    expect(env.orch("vm", "run", "--", "true", config=True, deadline_s=START_S).status == 0)
    # A cache of its own, in which another orch makes the template, as it seems.
    shutil.copytree(os.path.join(env.environ["XDG_CACHE_HOME"], "orch"), env.path("cache", "orch"), symlinks=True,
                    ignore=shutil.ignore_patterns("debian", "templates", "*.lock"))
    env.environ["XDG_CACHE_HOME"] = env.path("cache")
    expect(env.orch("vm", "run", "--", "true", config=True, deadline_s=START_S).status == 0)
    templates = env.path("cache", "orch", "templates")
    key = [n for n in os.listdir(templates) if not n.endswith(".lock")]
    expect(len(key) == 1, key)
    shutil.rmtree(os.path.join(templates, key[0]))
    with open(os.path.join(templates, key[0] + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        s = env.session()
        s.initialize()
        id = s.start("tools/call", {"name": "quick", "arguments": {}})
        until(lambda: "waiting for another orch that makes the template" in s.stderr(), "its wait")
        time_passes(s, "3 s")
        expect(s.request("ping")["result"] == {})
    r = s.answer(id, START_S)["result"]
    expect(text_of(r) == "ran\n", r)
    expect(s.end() == 0)


@case("while a person is asked the call's time stands still, its microVM's too")
def asked(env):
    body = """local vm = assert(ctx:vm())
      assert(vm:write_file("/tmp/before", "kept"))
      local answer, why = ctx:elicit { message = "Go on?" }
      if not answer then return nil, why end
      local r, why, code = vm:exec { "cat", "/tmp/before" }
      if not r then return nil, why, code end
      return answer.action .. " " .. r.stdout"""
    s = started(env, "3s", {"ask": tool("ask", body), "sleep_on": SLEEP_ON}, elicitation={})
    id = s.start("tools/call", {"name": "ask", "arguments": {}})
    question = s.recv(30)
    expect(question.get("method") == "elicitation/create", question)
    time_passes(s, "3 s")
    s.send({"jsonrpc": "2.0", "id": question["id"], "result": {"action": "accept", "content": {}}})
    r = s.answer(id)["result"]
    expect(text_of(r) == "accept kept", r)
    expect(s.end() == 0)


# ---- every other wait

class Silent(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/body":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x")
            self.wfile.flush()
        self.server.over.wait(60)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


@case("ctx:http, a sleep, a resource: what ends each is named, the nearer of both")
def waits(env):
    server = Server(("127.0.0.1", 0), Silent)
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    get = ('local r, why, code = ctx:http { url = "http://127.0.0.1:%d/%s", timeout = args.timeout } '
           'return orch.json.encode { why = why, code = code }')
    try:
        tools = {"head": tool("head", get % (port, "head")), "body": tool("body", get % (port, "body"), "2s"), "sleep_on": SLEEP_ON}
        env.project('return { rules = { { tool = "*", action = "allow", network = "web" } } }', tools,
                    'vm = { timeout = "2s" }, net = { permit_private = { "127.0.0.1/32" } }')
        env.write("policies/network.lua", 'return { web = { allow = { { cidr = "127.0.0.1/32", ports = { %d } } } } }' % port)
        env.write("lua/resources/slow.lua", 'return { uri = "x:slow", name = "slow", read = function() orch.sleep(100) end }')
        s = env.session()
        s.initialize()
        for name, limit in (("head", "vm.timeout"), ("body", "timeout of lua/tools/body.lua")):
            r = s.call(name, {"timeout": 0.5})
            expect(json.loads(text_of(r)) == {"why": "%s within 0.5 s (the argument timeout)" % ("nothing came" if name == "head" else "not done"),
                                              "code": "timeout"}, r)
            for arguments in ({}, {"timeout": 100}):  # by the wait itself or by the call, whichever is first
                r = s.call(name, arguments)
                expect("within 2 s (%s)" % limit in text_of(r), r)
        time_passes(s, "2 s")
        answer = s.request("resources/read", {"uri": "x:slow"})
        expect("not done within 2 s (vm.timeout)" in answer["error"]["message"], answer)
        expect(s.end() == 0)
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@case("ctx:vm { timeout }: can only shorten")
def shorten(env):
    body = SHOW + """
      local vm = assert(ctx:vm { timeout = args.timeout })
      return show(vm:exec { "sh", "-c", "echo so far; exec sleep 100" })"""
    s = started(env, "4s", {"short": tool("short", body)})
    r = result(s, "short", timeout=2)
    expect("its time of 2 s is over (timeout of ctx:vm)" in r["why"] and r["code"] == "timeout" and r["so_far"]["stdout"] == "so far\n", r)
    r = result(s, "short", timeout=3600)
    expect(r["timed_out"] and r["limit"] == "4 s: vm.timeout", r)
    expect(s.end() == 0)


@case("scripts: a microVM lives for vm.timeout unless said, 0 is without end; vm run and vm spawn have no end of their own")
def scripts(env):
    script = """local vm = assert(orch.vm.spawn { %s })
      local r, why, code = vm:exec { "sh", "-c", "sleep 3; echo whole" }
      io.write(r and r.stdout or why:gsub("^microVM %%S+ ", "") .. " " .. code)"""
    env.shared_cache().project(ALLOW_ALL, more='vm = { image = "base", timeout = "2s" }')
    expect(env.orch("vm", "run", "--", "sh", "-c", "sleep 3; echo whole", config=True, deadline_s=START_S).out == "whole\n")
    for options, expected in (("", "its time of 2 s is over (vm.timeout) timeout"), ("timeout = 1", "its time of 1 s is over (timeout) timeout"),
                              ("timeout = 0", "whole\n")):
        r = env.orch("-e", script % options, config=True)
        expect(r.out == expected, options, r)


if __name__ == "__main__":
    main()
