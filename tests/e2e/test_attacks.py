# What an agent, a server behind the proxy and a tool's slip may try, each found once and held since.
# as: user
import json

from orch_e2e import *

SERVER = r'''
import json, os, sys
def out(m):
    sys.stdout.write((m if isinstance(m, str) else json.dumps(m)) + "\n")
    sys.stdout.flush()
def result(m, r):
    out('{"jsonrpc":"2.0","id":%s,"result":%s}' % (json.dumps(m["id"]), r if isinstance(r, str) else json.dumps(r)))
lists = 0
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "initialize":
        result(m, {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"}})
    elif m.get("method") == "tools/list":
        lists += 1
        on_list(m) if lists > 1 else result(m, {"tools": [{"name": "t", "inputSchema": {"type": "object"}}]})
    elif m.get("method") == "tools/call":
        on_call(m, m["params"]["_meta"]["progressToken"])
    elif "id" in m and "method" in m:
        out({"jsonrpc": "2.0", "id": m["id"], "error": {"code": -32601, "message": "unknown"}})
'''
REDACT = 'return { rules = { { tool = "*", action = "allow", redact = { [=[%s]=] } } } }'


def proxy(env, on_call, rules=ALLOW_ALL, on_list="pass"):
    body = "def on_call(m, token):\n%s\ndef on_list(m):\n    %s\n" % ("\n".join("    " + line for line in on_call.splitlines()), on_list)
    env.project(rules)
    return env.session("--", PY, env.write("server.py", body + SERVER))


def rss_mb(pid):
    with open("/proc/%d/status" % pid) as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) >> 10


@case("a result whose metatable raises, or never ends, is read raw")
def metatable(env):
    bad = lambda name, body: ECHO.replace('"echo"', '"%s"' % name).replace("{ text = args.message }", "setmetatable({}, { __index = function() %s end })" % body)
    s = env.project(tools={"raises": bad("raises", "error('no')"), "loops": bad("loops", "while true do end"), "echo": ECHO}).session()
    s.initialize()
    for name in ("raises", "loops"):
        expect(text_of(s.call(name, {"message": "x"})) == "")
    expect(text_of(s.call("echo", {"message": "alive"})) == "alive")


@case("redact: progress and log messages of a tool, and the reason in the audit log")
def redact_messages(env):
    tool = ECHO.replace("function(args)", "function(args, ctx) ctx:progress(1, 2, 'p ' .. args.message) ctx:log('info', 'l ' .. args.message)")
    env.project('return { rules = { { tool = "*", action = "allow", redact = { [[sk-\\w+]] } },\n'
                '  { tool = "*", action = "deny", when = function(c) if c.args.fail then error(c.args.message) end end } } }', {"echo": tool})
    s = env.session("-v")
    s.initialize()
    s.request("logging/setLevel", {"level": "debug"})
    s.request("tools/call", {"name": "echo", "arguments": {"message": "sk-1"}, "_meta": {"progressToken": 7}})
    params = [n["params"] for n in s.notes]
    expect([p.get("message") or p.get("data") for p in params] == ["p [redacted]", "l [redacted]"], params)
    expect(s.call("echo", {"message": "sk-2", "fail": True})["isError"])
    expect(s.end() == 0)
    reasons = [line["reason"] for line in env.audit() if line.get("reason")]
    expect(len(reasons) == 1 and "[redacted]" in reasons[0], reasons)
    expect("sk-" not in json.dumps(env.audit()) and "sk-" not in s.stderr(), "the secret is in the audit log or in ours")


@case("redact: progress of a server behind the proxy; numbers that are none do not reach the wire")
def redact_progress(env):
    s = proxy(env, 'for n in (1, "x"): out({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": token, "progress": n, "message": "sk-1"}})\n'
                   'result(m, {"content": []})', REDACT % r"sk-\w+")
    s.initialize()
    s.request("tools/call", {"name": "t", "arguments": {}, "_meta": {"progressToken": 7}})
    expect([n["params"] for n in s.notes] == [{"progressToken": 7, "progress": 1, "message": "[redacted]"}], s.notes)


@case("redact: many strings that are each just within a pattern's limit do not hold the loop")
def redact_time(env):
    s = proxy(env, 'result(m, {"content": [{"type": "text", "text": "a" * 13 + "!"}] * 5000})', REDACT % r"(\w+\s?)+[:;]")
    s.initialize()
    expect("withheld" in text_of(s.call("t")))
    s.call("t", {"list": ["a" * 13 + "!"] * 5000}) # its audit line


@case("a result that is empty but for a space, to a modern client")
def empty_result(env):
    s = proxy(env, 'result(m, "{ }")')
    expect(s.request("tools/call", {"name": "t", "arguments": {}}, modern=True)["result"] == {"resultType": "complete"})


@case("a reload while the server's tools are listed again keeps its tools")
def reload_while_listing(env):
    s = proxy(env, 'out({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})\nresult(m, {"content": []})',
              on_list='open("listing", "w").close()')
    s.initialize()
    s.call("t")
    until(lambda: os.path.exists(env.path("p", "listing")), "the server is asked again")
    env.write("policies/tools.lua", 'return { rules = { { tool = "*", action = "deny", reason = "reloaded" } } }')
    until(lambda: "reloaded" in text_of(s.call("t")), "the new rules, with the server's tool")


@case("what an agent sends while the server starts is bounded")
def flood_while_starting(env):
    env.project()
    s = env.session("--", PY, "-c", "import sys; sys.stdin.read()")
    s.initialize()
    for i in range(100, 200):
        s.send_raw(b'{"jsonrpc":"2.0","method":"x","params":{"a":"%s"}}\n' % (b"a" * 1000000))
        s.send_raw(b'{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"t","arguments":{"a":"%s"}}}\n' % (i, b"a" * 1000000))
    refused = [s.recv() for _ in range(84)] # 16 are held
    expect(all("bytes of calls wait for the server to start" in a["error"]["message"] for a in refused), refused)
    expect(s.request("ping")["result"] == {} and rss_mb(s.pid) < 60 * ROOM, "%d MiB" % rss_mb(s.pid))


@case("a server that asks without end and reads no answer is ended")
def ping_flood(env):
    s = proxy(env, 'for _ in range(300): out({"jsonrpc": "2.0", "id": "x" * 1000000, "method": "ping"})\ntime.sleep(100)')
    s.initialize()
    answer = s.request("tools/call", {"name": "t", "arguments": {}})
    expect("does not read its input" in answer["error"]["message"], answer)
    expect(rss_mb(s.pid) < 160 * ROOM, "%d MiB" % rss_mb(s.pid))


@case("directories that everybody may write to are not believed")
def open_directories(env):
    env.project()
    for name in ("policies", "lua/tools"):
        os.chmod(env.path("p", name), 0o777)
        r = env.orch("mcp", "stdio", config=True)
        expect(r.status == 6 and "everybody may write" in r.err and name in r.err, r)
        os.chmod(env.path("p", name), 0o700)
    os.makedirs(env.path("run", "orch"))
    os.chmod(env.path("run", "orch"), 0o777)
    r = env.orch("status")
    expect("others may write" in r.err and "no orch process" in r.out, r)
    s = env.session()
    s.initialize()
    expect(s.end() == 0 and "others may write" in s.stderr() and not os.listdir(env.path("run", "orch")), s.stderr())
    for name in ("cache", "state"):
        os.makedirs(env.path(name, "orch"), exist_ok=True)
        os.chmod(env.path("run", "orch"), 0o700)
        os.chmod(env.path(name, "orch"), 0o777)
        r = env.orch("vm", "run", "--", "id", config=True)
        expect(r.status == 125 and "others may write" in r.err and env.path(name) in r.err, r)
    r = env.person("trust", env.path("p"))
    expect(r.status == 1 and "others may write" in r.err, r)


@case("a secret is joined with strings only")
def secrets(env):
    env.environ["TOKEN"] = "t0ken"
    env.project(more='vm = { image = env("TOKEN") .. orch.json.null }')
    s = env.session()
    expect(s.end() == 6 and "can only be joined with strings" in s.stderr() and "t0ken" not in s.stderr(), s.stderr())


@case("a call is recorded however long its tool's name or the reason of its denial is")
def long_texts(env):
    env.project('return { rules = { { tool = "*", action = "allow" }, { tool = "echo", action = "deny", when = function(c) error(c.args.message) end } } }')
    s = env.session()
    s.initialize()
    expect(s.request("tools/call", {"name": "n" * 2000000, "arguments": {}})["error"]["code"] == -32602)
    expect(text_of(s.call("echo", {"message": "m" * 2000000})).startswith("denied: "))
    expect(s.end() == 0)
    lines = [line for line in env.audit() if line["event"] == "decision"]
    expect([line["decision"] for line in lines] == ["deny", "deny"], lines)
    expect(len(lines[0]["tool"]) <= 256 and len(lines[1]["reason"]) <= 4096, [len(json.dumps(line)) for line in lines])


if __name__ == "__main__":
    main()
