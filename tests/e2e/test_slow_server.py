# The thin proxy in front of servers that take their time: to start, to list, to answer, to end.
# as: user asan
import errno, json, time

from orch_e2e import *

UPSTREAM = os.path.join(SERVERS, "upstream.py")
RULES = 'return { rules = { { tool = "cmd__*", action = "allow" } } }'
FAILED = -31002


class Fifo:
    """What the server waits for: write() tells it something, close() lets it go on."""

    def __init__(self, env):
        self.path, self.fd = env.path("fifo"), None
        os.mkfifo(self.path)

    def open(self):
        def try_it():
            try:
                return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                expect(error.errno == errno.ENXIO, error)
        self.fd = until(try_it, "the server waits")
        return self

    def write(self, data):
        os.write(self.fd, data)

    def close(self):
        os.close(self.fd)


def proxy(env, mode, *more, options=("--",)):
    return env.project(RULES).session(*options, PY, UPSTREAM, mode, *more)


def slow(env, *options):
    """A session in front of a server that is starting, and what it waits for."""
    fifo = Fifo(env)
    return proxy(env, "slow", fifo.path, options=(*options, "--")), fifo.open()


def say(s, message, modern=False, **meta):
    return s.start("tools/call", {"name": "echo", "arguments": {"message": message}, **({"_meta": meta} if meta else {})}, modern)


def held(env, modern):
    s, fifo = slow(env)
    if modern:
        expect(MODERN in s.request("server/discover", modern=True)["result"]["supportedVersions"])
    else:
        s.initialize()
    ids = [s.start("tools/list", modern=modern), say(s, "a", modern), say(s, "b", modern)]
    expect(s.request("server/discover" if modern else "ping", modern=modern)["result"] is not None) # before them
    fifo.close()
    answers = [s.recv(), s.recv(), s.recv()]
    expect([a.get("id") for a in answers] == ids, answers)
    expect("echo" in [t["name"] for t in answers[0]["result"]["tools"]], answers[0])
    expect([text_of(a["result"]) for a in answers[1:]] == ["a", "b"], answers)
    expect(not modern or all(a["result"]["resultType"] == "complete" for a in answers), answers)
    expect(s.end() == 0 and not s.notes, s.notes)
    expect([l["args"]["message"] for l in env.audit() if l["event"] == "decision"] == ["a", "b"], env.audit())


for modern in (False, True):
    case("a client%s is answered while the server starts; its list and calls are held, and keep their order" % (" of the modern era" if modern else ""),
         modern)(held)


@case("a batch that asks for the list and a call is one answer, once the server is there")
def batch(env):
    s, fifo = slow(env)
    s.initialize("2025-03-26")
    s.send([{"jsonrpc": "2.0", "id": 7, "method": "ping"}, {"jsonrpc": "2.0", "id": 8, "method": "tools/list"},
            {"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "echo", "arguments": {"message": "x"}}}])
    expect(s.request("ping")["result"] == {})
    fifo.close()
    got = s.recv()
    expect([a["id"] for a in got] == [7, 8, 9] and text_of(got[2]["result"]) == "x", got)
    expect(s.end() == 0)


def told(env, modern):
    s, fifo = slow(env)
    if not modern:
        s.initialize()
    listing, call = s.start("tools/list", {"_meta": {"progressToken": 0}}, modern), say(s, "x", modern, progressToken="t")
    say(s, "y", modern) # has no token, so hears nothing
    fifo.write(b"npm warn exec \x1b[31mfetching\r\n")
    seen = {}
    while len(seen) < 2:
        note = s.recv()
        expect(note["method"] == "notifications/progress" and note["params"]["message"].startswith("starting " + PY), note)
        if "npm warn" in note["params"]["message"]:
            seen[note["params"]["progressToken"]] = note["params"]
    expect(set(seen) == {0, "t"} and all(p["message"] == "starting %s: npm warn exec \\x1b[31mfetching" % PY for p in seen.values()), seen)
    more = s.recv()["params"]
    expect(more["progress"] > seen[more["progressToken"]]["progress"], more, seen)
    fifo.close()
    expect("tools" in s.answer(listing)["result"] and text_of(s.answer(call)["result"]) == "x")


for modern in (False, True):
    case("while it waits, a%s call with a progress token hears what the server last said on its stderr" % (" modern" if modern else ""), modern)(told)


def cancelled(env, modern):
    s, fifo = slow(env)
    if not modern:
        s.initialize()
    gone = [s.start("tools/list", modern=modern), say(s, "gone", modern)]
    kept = say(s, "kept", modern)
    for id in gone:
        s.notify("notifications/cancelled", {"requestId": id})
    fifo.close()
    expect(text_of(s.answer(kept)["result"]) == "kept") # and nothing for the others
    expect("result" in s.request("tools/list", modern=modern) and s.end() == 0)
    expect([l["args"]["message"] for l in env.audit() if l["event"] == "decision"] == ["kept"], env.audit())


for modern in (False, True):
    case("what is cancelled while it is held%s is not answered and never runs" % (", modern," if modern else ""), modern)(cancelled)


@case("the input ends while the server starts: what was asked is answered, then orch ends")
def eof(env):
    s, fifo = slow(env)
    s.initialize()
    ids = [s.start("tools/list"), say(s, "x")]
    s.close_input()
    fifo.write(b"nearly there\n")
    fifo.close()
    answers = [s.recv(), s.recv()]
    expect([a["id"] for a in answers] == ids and text_of(answers[1]["result"]) == "x", answers)
    expect(s.wait() == 0)


@case("the client is gone while the server starts: orch ends, and so does the server")
def client_gone(env):
    s, fifo = slow(env)
    s.initialize()
    s.start("tools/list")
    expect(s.request("ping")["result"] == {})
    s.child.stdout.close()
    s.close_input()
    expect(s.wait() == 0)


@case("nothing was asked, and the input ends while the server starts: orch does not wait for it")
def idle_eof(env):
    s, fifo = slow(env)
    s.initialize()
    expect(s.end() == 0)


def expired(env, mode, method, modern):
    s = proxy(env, mode, options=("--start-timeout", "1s", "--"))
    if not modern:
        s.initialize()
    ids = [s.start("tools/list", modern=modern), say(s, "x", modern)]
    for id in ids:
        error = s.answer(id)["error"]
        expect(error["code"] == FAILED and "no %s answer within 1 s (--start-timeout); its stderr ends: upstream ready" % method in error["message"], error)
    until(lambda: all(stat_of(pid)[1] == "Z" for pid in descendants(s.pid)), "the server's end")
    expect(("result" if not modern else "error") in s.request("ping", modern=modern))
    expect(s.end() == 0)


for mode, method in (("silent", "initialize"), ("listless", "tools/list")):
    for modern in (False, True):
        case("a server that never answers %s%s is ended; the error names the limit and its option" % (method, ", modern client," if modern else ""),
             mode, method, modern)(expired)


@case("a server that ends while it starts: what is held gets its exit status and the end of its stderr")
def dies(env):
    s, fifo = slow(env)
    s.initialize()
    ids = [s.start("tools/list"), say(s, "x")]
    fifo.write(b"registry unreachable\ndie\n")
    for id in ids:
        error = s.answer(id)["error"]
        expect("signal 15" in error["message"] and "its stderr ends: registry unreachable" in error["message"], error)
    expect(s.end() == 0)


@case("a file changes while the server starts: the policies are loaded anew, the calls stay held")
def reloaded(env):
    s, fifo = slow(env)
    s.initialize()
    call = say(s, "x")
    expect(re.search(r"upstream\s+starting", env.orch("status").out), env.orch("status"))
    env.write("policies/tools.lua", 'return { rules = { { tool = "cmd__*", action = "deny", reason = "changed" } } }')
    until(lambda: any(l["event"] == "reload" for l in env.audit()), "a reload")
    fifo.close()
    expect(text_of(s.answer(call)["result"]).startswith("denied: changed"))
    expect(re.search(r"upstream\s+ready", env.orch("status").out), env.orch("status"))
    expect(s.end() == 0)


@case("the server's list changes later: the client is told, and gets the new one")
def grows(env):
    s, fifo = slow(env)
    s.initialize()
    fifo.close()
    expect("grown" not in [t["name"] for t in s.request("tools/list")["result"]["tools"]])
    expect("result" in s.request("tools/call", {"name": "grow"}))
    note = s.notes.pop() if s.notes else s.recv()
    expect(note["method"] == "notifications/tools/list_changed", note)
    expect("grown" in [t["name"] for t in s.request("tools/list")["result"]["tools"]])
    expect(s.end() == 0)


@case("with -v what it writes to stderr is in the log as it comes, a line each, escaped and cut")
def logged(env):
    s, fifo = slow(env, "-v")
    s.initialize()
    fifo.write(b"added 12 packages\nbar 1%\rbar 2%\r\x1b]0;title\x07" + b"x" * 3000 + b"\n")
    until(lambda: "cmd: \\x1b]0;title\\x07xxx" in s.stderr(), "the line in the log")
    lines = s.stderr().splitlines()
    for want in ("orch: cmd: added 12 packages", "orch: cmd: bar 1%", "orch: cmd: bar 2%"):
        expect(want in lines, want, "is not in", lines)
    expect(len(max(lines, key=len)) < 1100, "longest line:", len(max(lines, key=len)))
    fifo.close()
    expect(s.end() == 0)


@case("a flood of stderr does not become one of the log; how much is missing is said")
def flood(env):
    s = proxy(env, "stderr", options=("-v", "--"))
    s.initialize()
    for _ in range(2):
        s.call("echo", {"message": "x"})
    expect(s.end() == 0)
    size = os.path.getsize(s.stderr_path)
    expect(size < 3 << 20 and re.search(r"cmd: \d{4,} lines of its stderr are left out", s.stderr()), "20 MiB of stderr are", size, "bytes of log")


@case("progress sets a call's clock back; without it the call ends at the limit, which the error names")
def progress(env):
    fifo = Fifo(env)
    s = proxy(env, "steps", fifo.path, options=("--timeout", "3s", "--"))
    s.initialize()
    call, begun, steps = say(s, "x", progressToken="t"), time.monotonic(), 0
    fifo.open()
    while time.monotonic() < begun + 4: # longer than the limit, which is what is tested
        fifo.write(b"step\n")
        note = s.recv()
        steps += 1
        expect(note["method"] == "notifications/progress" and note["params"] == {"progressToken": "t", "progress": steps, "message": "step"}, note)
        time.sleep(0.4)
    fifo.close()
    expect(text_of(s.answer(call)["result"]) == "x")
    result = s.call("echo", {"message": "y"}) # nobody writes into the fifo
    expect(result["isError"] and text_of(result) == "failed: no answer and no progress within 3 s (--timeout)", result)


@case("with another call's progress alone a call ends at its limit; the server is told")
def silence(env):
    s = proxy(env, "hang", env.path("cancelled"), options=("--timeout", "500ms", "--"))
    s.initialize()
    expect("within 0.5 s (--timeout)" in text_of(s.call("echo", {"message": "x"})))
    until(lambda: os.path.exists(env.path("cancelled")), "notifications/cancelled at the server")
    expect(s.end() == 0)


def ends(env, mode, said, deadline):
    s = proxy(env, mode, env.path("end"))
    s.initialize()
    s.call("echo", {"message": "x"})
    expect(s.end(deadline) == 0)
    with open(env.path("end")) as f:
        expect(f.read().split("\n") == said, "the server came as far as", said)


case("a server that needs a second after the end of its input to save has it", "saver", ["end of input", "saved", ""], 5)(ends)
case("a server that goes on after the end of its input gets SIGTERM", "deaf", ["end of input", "SIGTERM", ""], 6)(ends)


@case("SIGTERM to orch while the server starts: both end at once")
def terminated(env):
    s, fifo = slow(env)
    s.initialize()
    s.start("tools/list")
    expect(s.request("ping")["result"] == {})
    os.kill(s.pid, signal.SIGTERM)
    expect(s.wait() == 143)


def test(env, *options):
    return env.orch("mcp", "test", *options)


@case("mcp test: a limit that is too short is named, and the option that sets it")
def test_limit(env):
    r = test(env, "--timeout", "1s", "--", PY, UPSTREAM, "silent")
    expect(r.status == 7 and "no initialize answer within 1 s (timeout); its stderr ends: upstream ready" in r.err and "--timeout TIME" in r.err, r)
    r = test(env, "--timeout", "2s", "--", PY, UPSTREAM, "listless")
    expect(r.status == 7 and "no tools/list answer within 2 s (timeout)" in r.err and "--timeout TIME" in r.err, r)
    r = test(env, "--timeout", "2s", "--call", "echo", "--args", '{"message":"x"}', "--", PY, UPSTREAM, "hang")
    expect(r.status == 7 and "no tools/call answer within 2 s (timeout)" in r.err and "--timeout TIME" in r.err, r)


@case("a server that ends at the probe of its era is started again; what is held meanwhile waits for that one")
def strict(env):
    fifo = Fifo(env)
    s = proxy(env, "strict", fifo.path)
    s.initialize()
    ids = [s.start("tools/list"), say(s, "x")]
    fifo.open()
    first = descendants(s.pid)
    fifo.close()
    expect(first and all(wait_exit(pid, WAIT_S) for pid in first), "the first one is still there")
    fifo.open().close()
    answers = [s.recv(), s.recv()]
    expect([a["id"] for a in answers] == ids and text_of(answers[1]["result"]) == "x", answers)
    expect(s.end() == 0)


@case("a server that says nothing to a first request that it does not know is asked by initialize, in the same process")
def dumb(env):
    server = env.write("dumb.py", """import json, os, sys
answers = {"initialize": {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "dumb", "version": "1"}},
           "tools/list": {"tools": [{"name": "pid", "inputSchema": {"type": "object"}}]}, "tools/call": {"content": [{"type": "text", "text": ""}]}}
methods = []
for line in sys.stdin:
    m = json.loads(line)
    methods.append(m["method"])
    if m["method"] in answers:
        answers["tools/call"]["content"][0]["text"] = json.dumps(methods)
        print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": answers[m["method"]]}), flush=True)
""")
    s = env.project(RULES).session("--", PY, server)
    s.initialize()
    expect(json.loads(text_of(s.call("pid"))) == ["server/discover", "initialize", "notifications/initialized", "tools/list", "tools/call"])
    expect(s.end() == 0)


@case("orch.mcp.connect: a server that starts late, reads the probe only then and ends of it, is started again")
def late_and_strict(env):
    fifo = Fifo(env)
    path = env.write("connect.lua", """local client, why = require("orch").mcp.connect { command = { %s } }
print(client and client.era, why)
client:close()
""" % ", ".join("%r" % a for a in (PY, UPSTREAM, "strict", fifo.path)))
    s = env.session(argv=[ORCH, path])
    fifo.open()
    time.sleep(6) # longer than the probe, which is what is tested
    first = descendants(s.pid)
    fifo.close()
    expect(first and all(wait_exit(pid, WAIT_S) for pid in first), "the first one is still there")
    fifo.open().close()
    expect(s.wait() == 0 and "legacy" in s.stderr(), s.stderr())


@case("orch.mcp.connect: a server that needs a second to save at its end has it")
def client_ends(env):
    r = test(env, "--", PY, UPSTREAM, "saver", env.path("end"))
    expect(r.status == 0, r)
    with open(env.path("end")) as f:
        expect(f.read() == "end of input\nsaved\n")


if __name__ == "__main__":
    main()
