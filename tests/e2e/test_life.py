# Handles that outlive what they stand for, and the times that end it: every handle × every way of ending × every
# method; and one clock for a call, whose expiry names the key to raise.
# as: user asan
import json, re, signal, socket

from orch_e2e import *

START_S = 120  # the first start on a machine builds the image
BASE = 'image = "base"'


def project(env, vm="", tools=None, rules=ALLOW_ALL, more=""):
    return env.shared_cache().project(rules, tools or {"echo": ECHO}, "vm = { %s, %s }, %s" % (BASE, vm, more))


def tool(name, body, more=""):
    """A tool file; body has args and ctx, and what the file keeps from call to call."""
    return ('local kept = {}\nreturn { name = "%s", description = "d", input = { type = "object" }, %s\n'
            "run = function(args, ctx) %s end }\n" % (name, more, body))


# ---- a microVM, in a script

# Every method is called until it fails, so that some are under way at the end and some begin in the midst of it;
# then each once more. `running` is a command that has written something.
TABLE = """
local function wait_for(vm, path)
  for _ = 1, 3 do -- seen, and the loop of the guest went round twice since
    repeat local there = vm:read_file(path) if not there then orch.sleep(0.02) end until there
  end
end
local vm = assert(orch.vm.spawn { %(options)s })
local methods = {
  exec = function() return vm:exec { "true" } end,
  write_file = function() return vm:write_file("/tmp/w", ("x"):rep(100000)) end,
  read_file = function() return vm:read_file("/tmp/started") end,
  list_dir = function() return vm:list_dir("/etc") end,
  logs = function() return vm:logs() end,
  network = function() return vm:network() end,
  stats = function() return vm:stats() end,
  phases = function() return vm:phases() end,
}
local running = orch.task.spawn(function() return vm:exec { "sh", "-c", "echo so far; touch /tmp/started; exec sleep 100" } end)
wait_for(vm, "/tmp/started")
local fields = vm.id .. vm.image .. vm.backend .. vm.isolation .. vm.spawn_ms
local tasks, got = {}, {}
for name, method in pairs(methods) do
  tasks[name] = orch.task.spawn(function()
    while true do
      local r, why, code = method()
      if not r then return why, code end
      orch.sleep(0)
    end
  end)
end
orch.sleep(0.05)
print_line("under way " .. vm.id)
%(end)s
local r, why, code, so_far = running:join()
got.running = { r == nil, why, code, so_far and so_far.stdout, so_far and so_far.stderr, so_far and so_far.truncated, so_far and so_far.ms > 0 }
for name, task in pairs(tasks) do got[name] = { task:join() } end
for name, method in pairs(methods) do
  local r, why, code = method()
  got["later " .. name] = { why, code, r == nil }
end
vm:close() vm:close()
local r, why, code, more = methods.exec()
got.closed = { why, code, more == nil }
got.fields = fields == vm.id .. vm.image .. vm.backend .. vm.isolation .. vm.spawn_ms and tostring(vm)
print_line(orch.json.encode(got))
return 0
"""
PRINT = "local function print_line(text) io.stdout:write(text, '\\n') io.stdout:flush() end\n"


def by_name(s, word):
    """The one process of the session whose command has the word in it."""
    found = [p for p in descendants(s.pid) if word in name_of(p)]
    expect(len(found) == 1, word, [name_of(p) for p in descendants(s.pid)])
    return found[0]


def kill_vmm(s):
    os.kill(by_name(s, "qemu-system"), signal.SIGKILL)


def kill_launcher(s):
    os.kill([p for p in descendants(s.pid) if stat_of(p)[0] == s.pid][0], signal.SIGKILL)


def kill_init(s):
    os.kill(stat_of(by_name(s, "qemu-system"))[0], signal.SIGKILL)


ENDS = [  # how, options of spawn, Lua of the end, a function of the session, what the error says, its code
    ("its own time", 'timeout = "6s"', "", None, r"its time of 6 s is over \(timeout\)", "timeout"),
    ("vm.timeout", "", "", None, r"its time of 6 s is over \(vm\.timeout\)", "timeout"),
    ("power-off", "timeout = 0", 'vm:exec({ "poweroff", "-f" }, { user = "root" })', None, "the guest powered off", "closed"),
    ("reboot", "timeout = 0", 'vm:exec({ "reboot", "-f" }, { user = "root" })', None, r"the guest stopped \(a reboot, .*", "closed"),
    ("close()", "timeout = 0", "vm:close()", None, "it was closed", "closed"),
    ("kill -9 of its VMM", "timeout = 0", "", kill_vmm, r"the VMM was killed by signal 9 \(Killed\)", "closed"),
    ("kill -9 of its init", "timeout = 0", "", kill_init, "launcher .*: the microVM's init was killed.*", "closed"),
    ("kill -9 of the launcher", "timeout = 0", "", kill_launcher, r"launcher .*: (was killed by signal 9 \(Killed\)|the microVM's init was killed.*)", "closed"),
]


def ends(env, options, code, act, why, cls):
    project(env, 'timeout = "6s"')
    expect(env.orch("vm", "run", "--", "true", config=True, deadline_s=START_S).status == 0)
    script = env.write("end.lua", PRINT + TABLE % {"options": options, "end": code})
    s = env.session(argv=[ORCH, "--config", env.config, script])
    _, _, id = s.recv_raw(60).decode().rpartition(" ")
    if act:
        act(s)
    got = json.loads(s.recv_raw(60))
    expect(s.wait() == 0, s.stderr())
    text = got["running"][1]
    expect(re.fullmatch("microVM %s: %s" % (id, why), text), got["running"])
    expect(got["running"] == [True, text, cls, "so far\n", "", False, True], got["running"])
    for name, seen in got.items():
        if name not in ("running", "fields"):
            expect(seen[:2] == [text, cls] and seen[2:] in ([], [True]), name, seen, "expected", text)
    expect(len(got) == 2 * 8 + 3 and got["fields"] == "orch.vm(%s, closed)" % id, got)
    left = leftovers()
    expect(not left, left)


for name, *rest in ENDS:
    case("a microVM's end by %s: what is under way, what begins then and later gets the same error; output so far is kept" % name, *rest)(ends)


# ---- handles of a call

KEEP = """
  if not kept.vm then
    kept.vm, kept.ctx = assert(ctx:vm()), ctx
    kept.task = orch.task.spawn(function() return kept.vm:exec { "sleep", "100" } end)
    orch.sleep(0)
    return "kept"
  end
  local vm, out = kept.vm, {}
  for i, call in ipairs {
    function() return vm:exec { "true" } end, function() return vm:write_file("/tmp/w", "x") end, function() return vm:read_file("/etc/passwd") end,
    function() return vm:list_dir("/") end, function() return vm:logs() end, function() return vm:network() end, function() return vm:stats() end } do
    local r, why, code = call()
    out[i] = tostring(r) .. " " .. tostring(why) .. " " .. tostring(code)
  end
  vm:close()
  local _, why, code = kept.task:join()
  out[#out + 1] = why .. " " .. code .. " " .. tostring(kept.task:cancel())
  for _, method in ipairs { "vm", "progress", "log", "cancelled", "release", "task", "read_file", "list_dir", "elicit", "sample", "roots", "ask", "http" } do
    -- The method is a living one's: a dead ctx has no fields either.
    local ok, why = pcall(ctx[method], kept.ctx, ({ http = { url = "http://127.0.0.1/" }, read_file = "x", list_dir = "x" })[method] or {}, "x")
    out[#out + 1] = tostring(ok) .. " " .. tostring(why)
  end
  return orch.json.encode(out)
"""


@case("a tool that keeps its microVM, ctx and task from call to call: each says that the call is over")
def kept(env):
    s = project(env, tools={"keep": tool("keep", KEEP)}).session()
    s.initialize()
    expect(text_of(s.call("keep", deadline_s=START_S)) == "kept")
    vm = [l["vm"] for l in env.audit() if l["event"] == "vm_spawn"][-1]
    r = s.call("keep")
    expect(not r.get("isError"), r)
    out = json.loads(text_of(r))
    expect(out[:7] == ["nil microVM %s: the call is over closed" % vm] * 7, out[:7])
    expect(out[7] == "cancelled: the call that spawned it ended cancelled false", out[7])
    expect(len(out) == 21 and all(o.startswith("false ") and "ctx: the call is over" in o for o in out[8:]), out[8:])
    expect(s.end() == 0)


SERVED = PRINT + """
local got, waiting = {}, nil
local function stay(tasks)
  for name, task in pairs(tasks) do
    orch.task.spawn(function() got[name] = { task() } if waiting then waiting:cancel() end end)
  end
  orch.sleep(0)
end
orch.mcp.serve { transport = "stdio", tools = {
  { name = "leave", description = "Goes, but its task stays", input = { type = "object" }, run = function(_, ctx)
      local vm, new, fetch = assert(ctx:vm()), ctx.vm, ctx.http
      local tasks = {
        exec = function() return vm:exec { "sleep", "100" } end,
        read_file = function() while true do local r, why, code = vm:read_file("/etc/passwd") if not r then return r, why, code end end end,
        spawn = function() return ctx:vm() end,
        late = function() orch.sleep(0.5) return pcall(new, ctx) end,
        late_http = function() orch.sleep(0.5) return pcall(fetch, ctx, { url = "http://127.0.0.1/" }) end,
      }
      stay(tasks)
      return vm.id
    end },
  { name = "leave_others", description = "The same with what is not in a microVM", input = { type = "object" }, run = function(_, ctx)
      stay {
        http = function() return ctx:http { url = "http://127.0.0.1:PORT/" } end, -- where nobody answers
        elicit = function() return ctx:elicit { message = "Who?" } end,
      }
      return "left"
    end },
  { name = "got", description = "What they got", input = { type = "object" }, run = function()
      while true do
        local n = 0
        for _ in pairs(got) do n = n + 1 end
        if n == 7 then break end
        waiting = orch.task.spawn(orch.sleep, 30)
        waiting:join()
      end
      local out = {}
      for name, r in pairs(got) do out[name] = tostring(r[1]) .. " " .. tostring(r[2]) .. " " .. tostring(r[3]) end
      return orch.json.encode(out)
    end },
  { name = "fresh", description = "Another call takes the record that the first one had", input = { type = "object" }, run = function(_, ctx)
      local vm = assert(ctx:vm())
      return vm.id .. " " .. tostring(vm:exec({ "true" }).status)
    end } } }
"""


@case("a script's tool whose tasks outlive its call: what they wait for ends with the call, also a microVM that is being started")
def served(env):
    deaf = socket.create_server(("127.0.0.1", 0))
    port = str(deaf.getsockname()[1])
    project(env, rules='return { rules = { { tool = "leave_others", action = "allow", network = "web" }, { tool = "*", action = "allow" } } }',
            more='net = { permit_private = { "127.0.0.1/32" } }')
    env.write("policies/network.lua", 'return { web = { allow = { { cidr = "127.0.0.1/32", ports = { %s } } } } }' % port)
    expect(env.orch("vm", "run", "--", "true", config=True, deadline_s=START_S).status == 0)
    s = env.session(argv=[ORCH, "--config", env.config, env.write("served.lua", SERVED.replace("PORT", port))])
    s.request("initialize", {"protocolVersion": LEGACY, "capabilities": {"elicitation": {}}, "clientInfo": {"name": "c", "version": "1"}})
    s.notify("notifications/initialized")
    vm = text_of(s.call("leave", deadline_s=START_S))
    expect(text_of(s.call("leave_others")) == "left")
    fresh, status = text_of(s.call("fresh")).split()
    expect(fresh != vm and status == "0", vm, fresh, status)
    got = json.loads(text_of(s.call("got")))
    for name in ("exec", "read_file"):
        expect(got[name] == "nil microVM %s: the call is over closed" % vm, name, got[name])
    expect(re.fullmatch(r"nil microVM vm-\w+: the call is over closed", got["spawn"]) and vm not in got["spawn"], got["spawn"])
    expect(got["http"] == "nil the call is over closed", got["http"])
    expect(got["elicit"] == "nil the call is over closed", got["elicit"])
    for name in ("late", "late_http"):
        expect(got[name].startswith("false ") and "ctx: the call is over" in got[name], name, got[name])
    deaf.close()
    expect(s.end() == 0)
    outcomes = [l for l in env.audit() if l["event"] == "outcome"]
    expect([l.get("vm") for l in outcomes] == [vm, None, fresh, None], outcomes)
    left = leftovers()
    expect(not left, left)


@case("a reload while a tool waits in its microVM: the call goes on to its end with what it has")
def reload(env):
    body = """local vm = assert(ctx:vm())
      orch.task.spawn(function()
        while not ctx:read_file("go") do orch.sleep(0.02) end
        vm:write_file("/tmp/go", "on")
      end)
      local r = assert(vm:exec({ "sh", "-c", "until [ -e /tmp/go ]; do sleep 0.1; done; echo went" }))
      return r.stdout .. assert(vm:read_file("/tmp/go"))"""
    s = project(env, tools={"long": tool("long", body)}, more='workspace = "."').session()
    s.initialize()
    id = s.start("tools/call", {"name": "long", "arguments": {}})
    until(lambda: any("qemu-system" in name_of(p) for p in descendants(s.pid)), "its microVM")
    for n in range(3):
        env.write("lua/tools/long%d.lua" % n, tool("long%d" % n, 'return "x"'))
        until(lambda: "long%d" % n in [t["name"] for t in s.request("tools/list")["result"]["tools"]], "the reload")
    env.write("go", "x")
    r = s.answer(id)["result"]
    expect(text_of(r) == "went\non", r)
    expect(s.end() == 0)


# ---- a client of orch.mcp.connect

CLIENT = PRINT + """
local c = assert(orch.mcp.connect { %(connect)s, timeout = 20 })
local methods = {
  request = function() return c:request("tools/call", { name = "wait" }) end,
  call_tool = function() return c:call_tool("wait", {}) end,
  list_tools = function() return c:list_tools() end,
  list_resources = function() return c:list_resources() end,
  list_resource_templates = function() return c:list_resource_templates() end,
  read_resource = function() return c:read_resource("x:y") end,
  list_prompts = function() return c:list_prompts() end,
  get_prompt = function() return c:get_prompt("p") end,
  complete = function() return c:complete({ type = "ref/prompt", name = "p" }, { name = "a", value = "b" }) end,
  ping = function() return c:ping() end,
  subscribe = function() return c:subscribe("x:y") end,
}
local notes = { notify = function() return c:notify("notifications/x", {}) end, set_log_level = function() return c:set_log_level("info") end }
local tasks, got = {}, {}
for name, method in pairs(methods) do tasks[name] = orch.task.spawn(method) end
orch.sleep(0.1)
print_line("under way")
%(end)s
for name, task in pairs(tasks) do got[name] = { task:join() } end
for name, method in pairs(methods) do got["later " .. name] = { method() } end
for name, method in pairs(notes) do got["later " .. name] = { method() } end
got.listen = { c:listen({ toolsListChanged = true }):join() }
c:close() c:close()
got.closed = { c:ping() }
for name, r in pairs(got) do got[name] = { tostring(r[1]), r[2], r[3] } end
print_line(orch.json.encode(got))
return 0
"""
DEAF = """
import json, sys, time
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "initialize":
        print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": {"protocolVersion": "%s", "capabilities": {}, "serverInfo": {"name": "deaf", "version": "1"}}}), flush=True)
""" % LEGACY


def client(env, transport, end, act, why, cls):
    env.project()
    server, stop = None, lambda: None
    if transport == "stdio":
        connect = 'command = { "%s", "%s" }, protocol = "%s"' % (sys.executable, env.write("deaf.py", DEAF), LEGACY)
    else:
        server, stop = deaf_http()
        connect = 'url = "%s", protocol = "%s"' % (server, LEGACY)
    try:
        s = env.session(argv=[ORCH, "--config", env.config, env.write("client.lua", CLIENT % {"connect": connect, "end": end})])
        expect(s.recv_raw(30) == b"under way")
        if act:
            os.kill([p for p in descendants(s.pid) if stat_of(p)[0] == s.pid][0], act)
        got = json.loads(s.recv_raw(30))
        expect(s.wait() == 0, s.stderr())
    finally:
        stop()
    text = got["ping"][1]
    expect(re.search(why, text), text)
    for name, seen in got.items():
        expect(seen == ["nil", text, cls], name, seen, "expected", text)
    expect(len(got) == 2 * 11 + 4, sorted(got))


def deaf_http():
    """A server over HTTP that answers initialize alone: its url, and a function that ends it."""
    import http.server, socketserver, threading
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            m = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if m.get("method") == "initialize":
                body = json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": {"protocolVersion": LEGACY, "capabilities": {},
                                   "serverInfo": {"name": "deaf", "version": "1"}}}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Mcp-Session-Id", "s1")
            elif "id" in m:
                over.wait(60)
                return
            else:
                body = b""
                self.send_response(202)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.send_error(405)

        def do_DELETE(self):
            self.send_response(204)
            self.end_headers()

    class Threading(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True
        request_queue_size = 64
    httpd = Threading(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    def stop():
        over.set()
        httpd.shutdown()
        httpd.server_close()
    return "http://127.0.0.1:%d/mcp" % httpd.server_address[1], stop


for name, *rest in [("close(), stdio", "stdio", "c:close()", None, "the client was closed$", "closed"),
                    ("close(), HTTP", "http", "c:close()", None, "the client was closed$", "closed"),
                    ("kill -9 of its server", "stdio", "", signal.SIGKILL, r"the server ended \(killed by signal 9", "upstream"),
                    ("the server's exit", "stdio", "", signal.SIGTERM, r"the server ended \(killed by signal 15", "upstream")]:
    case("an MCP client's end by %s: what is under way and every later use gets the same error" % name, *rest)(client)


if __name__ == "__main__":
    main()
