# orch.mcp.connect and orch.http.request: scripts against servers that are written here, good and bad, over
# Streamable HTTP and stdio, of both eras; OAuth with the tokens kept.
# as: user asan
import hashlib, http.client, http.server, socketserver, stat, threading, urllib.parse

from orch_e2e import *

JSON = "application/json"
INFO = {"name": "fixture", "version": "1"}


class Server:
    """answer(message, request) gives a result, or writes to the request itself and returns None."""

    def __init__(self, answer, get=None):
        self.seen, self.errors = [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def reply(self, status, body=b"", type=JSON, **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", type)
                self.send_header("Content-Length", str(len(body)))
                for k, v in headers.items():
                    self.send_header(k.replace("_", "-"), v)
                self.end_headers()
                self.wfile.write(body)

            def stream(self, *events):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for e in events:
                    self.event(e)

            def event(self, e):
                self.wfile.write((e if isinstance(e, str) else "data: %s\n\n" % json.dumps(e)).encode())
                self.wfile.flush()

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Type"] != JSON:
                    self.form = dict(urllib.parse.parse_qsl(body.decode()))
                    outer.seen.append((self.path, self.form))
                    return get(self)
                message = json.loads(body)
                if "method" not in message:  # an answer to what the server asked
                    outer.seen.append(("answer", message))
                    return self.reply(202)
                outer.seen.append((message["method"], message))
                try:
                    result = answer(message, self)
                except Exception as e:
                    outer.errors.append(repr(e))
                    result = None
                if result is not None and "id" in message:
                    self.reply(200, {"jsonrpc": "2.0", "id": message["id"], "result": result}, Mcp_Session_Id="s1")
                elif result is not None:
                    self.reply(202)

            def do_GET(self):
                outer.seen.append(("GET", dict(self.headers)))
                if get:
                    return get(self)
                self.reply(405)

            def do_DELETE(self):
                outer.seen.append(("DELETE", dict(self.headers)))
                self.reply(200)

        class Threads(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # a client that went away
                pass

        self.http = Threads(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d/mcp" % self.http.server_port
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def methods(self):
        return [m for m, _ in self.seen]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def handshake(message):
    method = message["method"]
    if method == "initialize":
        return {"protocolVersion": LEGACY, "capabilities": {"tools": {}}, "serverInfo": INFO}
    return {} if method.startswith("notifications/") or method == "ping" else None


def text(s):
    return {"content": [{"type": "text", "text": s}]}


SAY = """local orch = require "orch"
local function say(...)
  local list = { n = select("#", ...), ... }
  for i = 1, list.n do list[i] = tostring(list[i]) end
  io.write(table.concat(list, "\\t"), "\\n")
end
"""


def script(env, server, body, options="", **more):
    """Runs a script whose `client` is connected to the server; what it prints."""
    path = env.write("script.lua", SAY + 'local url = arg[1]\n'
                     'local client, why, code = orch.mcp.connect { url = url, %s }\n' % options + body + "\nif client then client:close() end\nreturn 0\n")
    r = env.orch(path, server.url if isinstance(server, Server) else server, **more)
    expect(r.status == 0 and not getattr(server, "errors", None), r, getattr(server, "errors", None))
    return r


@case("without a word about eras a server of the older one is found: probe, handshake, pages, session ended")
def legacy_found(env):
    def answer(m, q):
        if m["method"] == "server/discover":
            return q.reply(400, {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "no session"}})
        if m["method"] == "tools/list":
            page = m.get("params", {}).get("cursor")
            return {"tools": [{"name": "b" if page else "a", "inputSchema": {"type": "object"}}], **({} if page else {"nextCursor": "2"})}
        return handshake(m)

    with Server(answer) as server:
        r = script(env, server, 'for _, t in ipairs(client:list_tools()) do io.write(t.name, "\\n") end say(client.era, client.protocol_version, client.server_info.name)')
        expect(r.out.split() == ["a", "b", "legacy", LEGACY, "fixture"], r)
        expect(server.methods() == ["server/discover", "initialize", "notifications/initialized", "GET", "tools/list", "tools/list", "DELETE"], server.methods())
        meta = server.seen[0][1]["params"]["_meta"]
        expect(meta[META + "protocolVersion"] == MODERN and meta[META + "clientInfo"]["name"] == "orch", meta)
        expect("Mcp-Session-Id" in server.seen[3][1] and server.seen[3][1]["MCP-Protocol-Version"] == LEGACY, server.seen[3])


@case("a failing server is no evidence of its era")
def no_evidence(env):
    for status in (401, 403, 500, 503):
        with Server(lambda m, q: q.reply(status)) as server:
            r = script(env, server, "say(client, code, why)")
            expect(r.out.startswith("nil\tupstream") and str(status) in r.out and server.methods() == ["server/discover"], r, server.methods())


@case("an answer as a stream: questions are answered meanwhile, progress is told, the defaults of a form filled in")
def streamed(env):
    answered = threading.Event()

    def answer(m, q):
        if m["method"] == "tools/call":
            token = m["params"]["_meta"]["progressToken"]
            q.stream({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": token, "progress": 1, "total": 2, "message": "half"}},
                     {"jsonrpc": "2.0", "id": "q1", "method": "elicitation/create", "params": {"message": "who?", "requestedSchema": {
                         "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "default": 30}}}}},
                     {"jsonrpc": "2.0", "id": "q2", "method": "sampling/createMessage", "params": {}})
            until(lambda: [x for x in server.seen if x[0] == "answer"][1:], "two answers")
            return q.event({"jsonrpc": "2.0", "id": m["id"], "result": text("done")})
        return handshake(m)

    with Server(answer) as server:
        r = script(env, server, '''
local result = client:call_tool("t", {}, { progress = function(done, total, message) say(done, total, message) end })
say(result.content[1].text)''', 'protocol = "2025-11-25", elicit = function(p) return { action = "accept", content = { name = "Ada" } } end')
        answers = {m["id"]: m for k, m in server.seen if k == "answer"}
        expect(r.out == "1\t2\thalf\ndone\n", r)
        expect(answers["q1"]["result"] == {"action": "accept", "content": {"name": "Ada", "age": 30}}, answers)
        expect(answers["q2"]["error"]["code"] == -32601, answers)
        expect(server.seen[0][1]["params"]["capabilities"] == {"elicitation": {"form": {}}}, server.seen[0])


@case("a stream that breaks off is taken up after its retry time, with the last event's id")
def resumed(env):
    times = {}

    def get(q):
        if "Last-Event-ID" not in q.headers:
            return q.reply(405)
        times["again"] = time.monotonic()
        times["id"] = q.headers["Last-Event-ID"]
        q.stream({"jsonrpc": "2.0", "id": times["call"], "result": text("late")})
        q.close_connection = True

    def answer(m, q):
        if m["method"] == "tools/call":
            times["call"] = m["id"]
            q.stream("id: e7\nretry: 300\ndata: \n\n")
            q.close_connection = True
            times["cut"] = time.monotonic()
            return None
        return handshake(m)

    with Server(answer, get) as server:
        r = script(env, server, 'say(client:call_tool("t").content[1].text)', 'protocol = "2025-11-25"')
        expect(r.out == "late\n" and times["id"] == "e7" and times["again"] - times["cut"] >= 0.29, r, times)


@case("a session that the server forgot is begun anew, once")
def forgotten(env):
    state = {"lost": True}

    def answer(m, q):
        if m["method"] == "tools/call":
            if state.pop("lost", None):
                return q.reply(404)
            return text("again")
        return handshake(m)

    with Server(answer) as server:
        r = script(env, server, 'say(client:call_tool("t").content[1].text)', 'protocol = "2025-11-25"')
        expect(r.out == "again\n" and server.methods().count("initialize") == 2 and server.methods().count("tools/call") == 2, r, server.methods())


@case("a call that takes too long ends with timeout, and the server is told; progress sets the clock back, but not for ever")
def slow(env):
    def answer(m, q):
        if m["method"] == "tools/call":
            if m["params"]["name"] == "told":
                return text(str(server.methods().count("notifications/cancelled")))
            q.stream()
            while True:
                if m["params"]["name"] == "steps":
                    q.event({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": m["params"]["_meta"]["progressToken"], "progress": len(took)}})
                    took.append(1)
                if [x for x in server.seen if x[0] == "notifications/cancelled" and x[1]["params"]["requestId"] == m["id"]]:
                    return None
                time.sleep(0.05)
        return handshake(m)

    took = []

    with Server(answer) as server:
        r = script(env, server, '''
local took = {}
for i, name in ipairs { "silent", "steps" } do
  local t = orch.now()
  local result, why, code = client:call_tool(name, {}, { timeout = 1, max_timeout = 5, progress = function() end })
  took[i] = orch.now() - t
  say(result, why:match("no .*"), code)
end
say(took[1] < took[2])
repeat until client:call_tool("told", {}).content[1].text == "2"''', 'protocol = "2025-11-25"')
        expect(r.out == "nil\tno tools/call answer within 1 s (timeout)\ttimeout\n"
               "nil\tno tools/call answer within 5 s, for all its progress (max_timeout)\ttimeout\ntrue\n", r)
        expect(server.methods().count("notifications/cancelled") == 2, server.methods())


@case("the modern era: headers, arguments as headers, bad tools left out, questions as results, states kept apart")
def modern(env):
    def tool(name, **properties):
        return {"name": name, "inputSchema": {"type": "object", "properties": properties}}

    def answer(m, q):
        p, headers = m.get("params", {}), dict(q.headers)
        if headers.get("MCP-Protocol-Version") != MODERN or headers.get("Mcp-Method") != m["method"] or p["_meta"][META + "protocolVersion"] != MODERN or "Mcp-Session-Id" in headers:
            server.errors.append(headers)
        if m["method"] == "server/discover":
            return {"resultType": "complete", "supportedVersions": [MODERN], "capabilities": {}, "_meta": {META + "serverInfo": INFO}}
        if m["method"] == "tools/list":
            return {"tools": [tool("good", region={"type": "string", "x-mcp-header": "Region"}, n={"type": "integer", "x-mcp-header": "N"}),
                              tool("bad", x={"type": "number", "x-mcp-header": "X"}), tool("deep", x={"type": "array", "items": {"type": "string", "x-mcp-header": "X"}})]}
        if "inputResponses" in p:
            return text(json.dumps([p["inputResponses"], p.get("requestState"), p["arguments"], p["name"]]))
        server.seen.append(("param", (headers.get("Mcp-Name"), headers.get("Mcp-Param-Region"), headers.get("Mcp-Param-N"))))
        return {"resultType": "input_required", "requestState": "opaque", "inputRequests": {"who": {"method": "elicitation/create", "params": {"requestedSchema": {}}}}}

    with Server(answer) as server:
        r = script(env, server, '''
local names = {}
for _, t in ipairs(client:list_tools()) do names[#names + 1] = t.name end
say(table.concat(names, " "), client.era, client.server_info.name)
say(client:call_tool("good", { region = "Zürich", n = 42 }).content[1].text)''', 'elicit = function() return "decline" end')
        lines = r.out.splitlines()
        expect(lines[0] == "good\tmodern\tfixture", r)
        expect(json.loads(lines[1]) == [{"who": {"action": "decline"}}, "opaque", {"region": "Zürich", "n": 42}, "good"], r)
        expect(("param", ("good", "=?base64?WsO8cmljaA==?=", "42")) in server.seen, server.seen)
        ids = [m["id"] for k, m in server.seen if k == "tools/call"]
        expect(len(set(ids)) == 2, ids)


@case("each header is sent once: what the protocol needs goes before what the script says, all else is added")
def headers(env):
    def answer(m, q):
        for name in ("Accept", "Content-Type", "MCP-Protocol-Version", "Mcp-Method", "Mcp-Param-N", "X-Own"):
            lists.setdefault(name, []).append(q.headers.get_all(name))
        if m["method"] == "server/discover":
            return {"resultType": "complete", "supportedVersions": [MODERN], "capabilities": {}}
        if m["method"] == "tools/list":
            return {"tools": [{"name": "t", "inputSchema": {"type": "object", "properties": {"p%d" % i: {"type": "integer", "x-mcp-header": "P%d" % i} for i in range(60)}}}]}
        params.extend(q.headers.get_all("Mcp-Param-P%d" % i) == [str(i)] for i in range(60))
        return text("y")

    http.client._MAXHEADERS = 1000  # of the server
    lists, params = {}, []
    with Server(answer) as server:
        script(env, server, """
local args = {}
for i = 0, 59 do args["p" .. i] = i end
say(client:call_tool("t", args).content[1].text)""", """headers = (function()
  local h = { accept = "text/plain", ["content-type"] = "text/plain", ["MCP-Method"] = "x", ["mcp-protocol-version"] = "1", ["X-Own"] = "1" }
  for i = 1, 100 do h["X-Own-" .. i] = "x" end
  return h
end)()""")
        expect(params == [True] * 60 and lists["X-Own"] == [["1"]] * 3, lists, params)
        expect(lists["Accept"] == [["application/json, text/event-stream"]] * 3 and lists["Content-Type"] == [[JSON]] * 3, lists)
        expect(lists["MCP-Protocol-Version"] == [[MODERN]] * 3 and lists["Mcp-Method"] == [["server/discover"], ["tools/list"], ["tools/call"]], lists)


@case("what a server answers wrongly is said, never an error in Lua")
def wrong(env):
    for body in (b"", b"[]", b"{", b'{"jsonrpc":"2.0","id":1,"result":7}', b'{"jsonrpc":"2.0","id":99,"result":{}}', b'{"jsonrpc":"2.0","id":1,"error":"x"}'):
        with Server(lambda m, q: q.reply(200, body)) as server:
            for protocol in (LEGACY, MODERN):
                r = script(env, server, "say(client, code, why)", 'protocol = "%s"' % protocol)
                expect(r.out.startswith("nil\tupstream\thttp://127.0.0.1"), body, r)


@case("orch's own servers, each era over each transport: listed and called")
def own(env):
    env.project()
    for protocol in (LEGACY, MODERN):
        path = env.write("s.lua", SAY + '''local c = assert(orch.mcp.connect { command = { "%s", "--config", "%s", "mcp", "stdio" }, protocol = "%s" })
say(c.era, c:list_tools()[1].name, c:call_tool("echo", { message = "hi" }).content[1].text)
c:close() return 0''' % (ORCH, env.config, protocol))
        r = env.orch(path)
        expect(r.status == 0 and r.out.split() == ["legacy" if protocol == LEGACY else "modern", "echo", "hi"], r)
    s = env.session(argv=[ORCH, "--config", env.config, "mcp", "http", "--listen", "127.0.0.1:0"])
    url = until(lambda: re.search(r"http://\S+/mcp", s.stderr()), "the address").group(0)
    with open(env.path("state", "orch", "http.token")) as f:
        token = f.read().strip()
    for protocol in (LEGACY, MODERN):
        r = script(env, url, 'say(client.era, client:list_tools()[1].name, client:call_tool("echo", { message = "hi" }).content[1].text)',
                   'protocol = "%s", headers = { Authorization = "Bearer %s" }' % (protocol, token))
        expect(r.out.split() == ["legacy" if protocol == LEGACY else "modern", "echo", "hi"], r)
    r = env.orch("mcp", "test", "--url", url, "--header", "Authorization: Bearer " + token, "--call", "echo", "--args", '{"message":"over http"}')
    expect(r.status == 0 and "over http" in r.out and MODERN in r.err, r)
    s.kill()


FRAGILE = """import json, sys
first = json.loads(sys.stdin.readline())
if first["method"] != "initialize":
    sys.exit("not initialized")
def put(m): print(json.dumps(m), flush=True)
put({"jsonrpc": "2.0", "id": first["id"], "result": {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "fragile", "version": "1"}}})
calls = []
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "tools/call":
        calls.append(m)
        put({"jsonrpc": "2.0", "id": "r", "method": "roots/list"})
    elif m.get("id") == "r" and len(calls) == 2:  # both at once, the later one first
        while calls:
            m2 = calls.pop()
            put({"jsonrpc": "2.0", "id": m2["id"], "result": {"content": [{"type": "text", "text": m["result"]["roots"][0]["uri"] + str(m2["params"]["arguments"]["big"])}]}})
"""


@case("stdio: a server that ends at a request it does not know is started again; roots are answered, numbers kept, two calls at once")
def fragile(env):
    server = env.write("fragile.py", FRAGILE)
    path = env.write("s.lua", SAY + """
local c = assert(orch.mcp.connect { command = { "%s", "%s" }, roots = { { uri = "file:///w" } } })
local big = orch.json.decode("9007199254740993")
local tasks = {}
for i = 1, 2 do tasks[i] = orch.task.spawn(function() return c:call_tool("t", { big = big, i = i }).content[1].text end) end
say(c.era, c.protocol_version, (tasks[1]:join()), (tasks[2]:join()))
c:close() return 0""" % (PY, server))
    r = env.orch(path)
    expect(r.status == 0 and r.out.split() == ["legacy", "2025-06-18", "file:///w9007199254740993", "file:///w9007199254740993"], r)


UPSTREAM = os.path.join(SERVERS, "upstream.py")


def child(env, mode, body, options="", *args):
    """Runs a script whose `client` is connected to the server of tests/e2e/servers; what it prints."""
    command = ", ".join("%r" % a for a in (PY, UPSTREAM, mode, *args))
    path = env.write("child.lua", SAY + "local client, why, code = orch.mcp.connect { command = { %s }, %s }\n%s\nreturn 0\n" % (command, options, body))
    r = env.orch(path)
    expect(r.status == 0, r)
    return r


@case("close ends what is under way, with its reason; so does everything later")
def closed(env):
    body = """
local task = orch.task.spawn(function() return client:call_tool("hold", {}) end)
client:call_tool("echo", { message = "x" })
client:close()
say(task:join())
say(client:call_tool("echo", {}))
say(client:notify("notifications/x"))
client:close()"""
    r = child(env, "modern", body, "", env.path("cancelled"))
    expect(r.out.count("nil\t%s: the client was closed\tclosed" % PY) == 3, r)

    def answer(m, q):
        if m["method"] == "tools/call" and m["params"]["name"] == "hold":
            q.stream()
            return until(lambda: "DELETE" in server.methods(), "the session's end") and None
        return text("y") if m["method"] == "tools/call" else handshake(m)

    with Server(answer) as server:
        r = script(env, server, body, 'protocol = "2025-11-25"')
        expect(r.out.count(": the client was closed\tclosed") == 3 and server.methods().count("DELETE") == 1, r, server.methods())


@case("what comes after close, while the server is still told, gets the same reason")
def closing(env):
    with Server(lambda m, q: text("y") if m["method"] == "tools/call" else handshake(m)) as server:
        server.http.RequestHandlerClass.do_DELETE = lambda q: (server.seen.append(("DELETE", {})), time.sleep(0.5), q.reply(200))
        r = script(env, server, """
local task = orch.task.spawn(function() client:close() closed = true end)
orch.sleep(0)
say(closed, client:call_tool("echo", {}))
say(client:ping())
task:join()""", 'protocol = "2025-11-25"')
        lines = r.out.splitlines()
        expect(lines[0].startswith("nil\tnil\thttp://127") and all(line.endswith(": the client was closed\tclosed") for line in lines), r)
        expect(server.methods()[-1] == "DELETE", server.methods())


@case("a server that ends is the reason of everything that waits, and of everything later")
def ended(env):
    r = child(env, "crash", """
local tasks = {}
for i = 1, 3 do tasks[i] = orch.task.spawn(function() return client:call_tool("echo", { message = "x" }) end) end
for i = 1, 3 do say(tasks[i]:join()) end
say(client:ping())
client:close()
say(client:ping())""")
    expect(r.out.count("the server ended (exit status 3)") == 5 and r.out.count("the disk is on fire\tupstream") == 5, r)


@case("a server of the modern era alone over stdio: its list, a question, progress; a script that does not close it ends all the same")
def modern_child(env):
    r = child(env, "modern", """
say(client.era, #client:list_tools())
local seen = {}
local result = client:call_tool("steps", { a = 1 }, { progress = function(done, total, message) seen[#seen + 1] = done .. message end })
say(table.concat(seen, " "))
result = client:call_tool("ask", {})
say(orch.json.decode(result.content[1].text).params.inputResponses.who.content.n)""", 'elicit = function() return { content = { n = 7 } } end, sample = function() return { role = "x" } end',
              env.path("cancelled"))
    expect(r.out == "modern\t7\n1step 2step 3step\n7\n", r)


@case("notifications subscribed to come until the task is cancelled, which closes the stream; a function of theirs that fails ends nothing")
def subscribed(env):
    gone = threading.Event()

    def answer(m, q):
        if m["method"] == "server/discover":
            return {"resultType": "complete", "supportedVersions": [MODERN], "capabilities": {}}
        if m["method"] == "subscriptions/listen":
            q.stream()
            for i in range(3):
                q.event({"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "r:%d" % i}})
            try:
                while True:
                    q.event(": still here\n\n")
                    time.sleep(0.02)
            except OSError:
                return gone.set()
        return {}

    with Server(answer) as server:
        r = script(env, server, """
local task = client:subscribe("r:1")
while #(seen or {}) < 3 do orch.sleep(0.01) end
task:cancel()
say(table.concat(seen, " "), client:ping() ~= nil)""".replace("seen", "Seen"), 'on_notification = function(method, params) Seen = Seen or {} Seen[#Seen + 1] = params.uri if #Seen == 2 then error("no") end end')
        expect(r.out == "r:0 r:1 r:2\ttrue\n" and r.err.count("a function for notifications/resources/updated failed") == 1, r)
        expect(gone.wait(WAIT_S), "the stream is still open")
        expect([m["params"]["notifications"] for k, m in server.seen if k == "subscriptions/listen"] == [{"resourceSubscriptions": ["r:1"]}], server.seen)


NOTES = """import json, sys
def put(*list): print("\\n".join(json.dumps({"jsonrpc": "2.0", **m}) for m in list), flush=True)
def progress(call, n, message=""): return {"method": "notifications/progress", "params": {"progressToken": call["params"]["_meta"]["progressToken"], "progress": n, "message": message}}
calls = {}
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "initialize":
        put({"id": m["id"], "result": {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "notes"}}})
    elif m.get("method") == "tools/call":
        name = m["params"]["name"]
        calls[name] = m
        if name in "ab" and len(calls) == 2:
            put({"id": calls["a"]["id"], "result": {"content": []}}, progress(calls["b"], 1))
        if name == "ask":
            put({"id": "q", "method": "elicitation/create", "params": {"message": "?"}})
        if name == "many":
            for i in range(64):
                put(progress(m, i, "x" * (1 << 20)))
            put({"id": m["id"], "result": {"content": []}})
    elif m.get("id") == "q":
        put({"id": calls["ask"]["id"], "result": {"content": [{"type": "text", "text": m["result"]["action"]}]}})
    elif m.get("method") == "ping":
        put({"id": m["id"], "result": {}})
"""


@case("the progress of a call that is cancelled ends nothing else: the next question is answered")
def cancelled_progress(env):
    path = env.write("s.lua", SAY + """
local c = assert(orch.mcp.connect { command = { "%s", "%s" }, protocol = "2025-11-25", elicit = function() return "decline" end })
local b = orch.task.spawn(function() c:call_tool("b", {}, { progress = function() say("progress") end }) end)
c:call_tool("a")
b:cancel()
local result, why = c:call_tool("ask", {}, { timeout = 20 })
say(result and result.content[1].text or why)
c:close() return 0""" % (PY, env.write("notes.py", NOTES)))
    r = env.orch(path)
    expect(r.status == 0 and r.out == "decline\n", r)


@case("what a script does not take is bounded, however it comes: the rest is left out, and that is said")
def bounded(env):
    path = env.write("s.lua", SAY + """
local c = assert(orch.mcp.connect { command = { "%s", "%s" }, protocol = "2025-11-25" })
local over
local task = orch.task.spawn(function()
  return c:call_tool("many", {}, { progress = function() repeat orch.sleep(0.01) until over end })
end)
task:join()
over = true
say(c:ping() ~= nil)
c:close() return 0""" % (PY, env.write("notes.py", NOTES)))
    r = env.orch(path)
    expect(r.status == 0 and r.out == "true\n" and r.err.count("some are left out") == 1, r)


@case("more questions than can wait for answers are refused, and those that the server takes back are dropped")
def many_questions(env):
    server = env.write("many.py", """import json, sys
def put(m): print(json.dumps({"jsonrpc": "2.0", **m}), flush=True)
answers = {}
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "initialize":
        put({"id": m["id"], "result": {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "many"}}})
    elif m.get("method") == "tools/call":
        call = m["id"]
        for i in range(100):
            put({"id": "q%d" % i, "method": "elicitation/create", "params": {"message": str(i)}})
        put({"method": "notifications/cancelled", "params": {"requestId": "q7"}})
        put({"id": "last", "method": "ping"})
    elif "method" not in m:
        answers[m["id"]] = m
        if m["id"] == "last":  # the others wait, or were refused
            put({"method": "notifications/go", "params": {}})
        if len(answers) == 100:  # all but the one taken back, and the ping
            refused = sorted(int(k[1:]) for k, a in answers.items() if "error" in a)
            put({"id": call, "result": {"content": [{"type": "text", "text": json.dumps([refused, "q7" in answers])}]}})
    elif "id" in m:
        put({"id": m["id"], "error": {"code": -32601, "message": "no"}})
""")
    path = env.write("s.lua", SAY + """
local go
local c = assert(orch.mcp.connect { command = { "%s", "%s" }, elicit = function() while not go do orch.sleep(0.01) end return "decline" end,
  on_notification = function(method) go = method == "notifications/go" end })
say(c:call_tool("t").content[1].text)
c:close() return 0""" % (PY, server))
    r = env.orch(path)
    expect(r.status == 0 and json.loads(r.out) == [list(range(64, 100)), False], r)


@case("who is slow to authorize has connect's time, no more")
def slow_person(env):
    def get(q):
        base = server.url[:-4]
        if q.path == "/.well-known/oauth-protected-resource/mcp":
            return q.reply(200, {"resource": server.url, "authorization_servers": [base]})
        if q.path == "/.well-known/oauth-authorization-server":
            return q.reply(200, {"issuer": base, "authorization_endpoint": base + "/authorize", "token_endpoint": base + "/token", "code_challenge_methods_supported": ["S256"]})
        q.reply(405)

    with Server(lambda m, q: q.reply(401, WWW_Authenticate="Bearer"), get) as server:
        r = script(env, server, "say(client, why, code)",
                   'timeout = 2, auth = { client_id = "me", keep = false, authorize = function() orch.sleep(600) end }')
        expect(r.out.startswith("nil\thttp://127.0.0.1") and r.out.endswith("no server/discover answer within 2 s (timeout)\ttimeout\n"), r)


@case("a skill's files are used only when they are what its entry says")
def skills(env):
    main = "---\nname: a\ndescription: \"What it is\"\nmetadata:\n  version: 1\n---\nBody\n"
    entry = lambda text, **front: {"uri": "skill://a/SKILL.md", "frontmatter": {"name": "a", "description": "What it is", "metadata": {"version": 1}, **front},
                                   "resources": [{"uri": "skill://a/SKILL.md", "size": len(text), "digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}]}
    entries = [entry(main), entry(main.replace("B", "C")), entry(main + "x"), entry(main, description="Other"), entry(main, more="x")]

    def answer(m, q):
        if m["method"] == "skills/list":
            return {"skills": entries}
        return {"contents": [{"uri": m["params"]["uri"], "text": main}]} if m["method"] == "resources/read" else handshake(m)

    with Server(answer) as server:
        r = script(env, server, """
for _, s in ipairs(client:list_skills()) do local text, why, code = client:read_skill(s) say(text and #text, code) end
say(client:read_skill(client:list_skills()[1], "skill://a/other"))""", 'protocol = "2025-11-25"')
        expect(r.out.splitlines()[:5] == ["%d\tnil" % len(main)] + ["nil\tdenied"] * 4 and "not a file" in r.out.splitlines()[5], r)


@case("OAuth: the flow once, the token kept 0600 and used by the next run, refreshed when refused, in no log")
def oauth(env):
    state = {"valid": "secret-1", "asked": []}

    def get(q):
        base = server.url[:-4]
        if q.path == "/.well-known/oauth-protected-resource/mcp":
            return q.reply(200, {"resource": server.url, "authorization_servers": [base], "scopes_supported": ["a"]})
        if q.path == "/.well-known/oauth-authorization-server":
            return q.reply(200, {"issuer": base, "authorization_endpoint": base + "/authorize", "token_endpoint": base + "/token",
                                 "code_challenge_methods_supported": ["S256"], "token_endpoint_auth_methods_supported": ["none"]})
        if q.path.startswith("/authorize"):
            p = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(q.path).query))
            state["asked"].append(p)
            return q.reply(302, Location=p["redirect_uri"] + "?" + urllib.parse.urlencode({"code": "c0de", "state": p["state"]}))
        if q.path == "/token":
            state["asked"].append(q.form)
            return q.reply(200, {"access_token": state["valid"], "token_type": "Bearer", "expires_in": 3600, "refresh_token": "secret-r"})
        q.reply(405)

    def answer(m, q):
        if q.headers["Authorization"] != "Bearer " + state["valid"]:
            return q.reply(401, WWW_Authenticate="Bearer")
        return text("in") if m["method"] == "tools/call" else handshake(m)

    with Server(answer, get) as server:
        ask = lambda: script(env, server, 'say(client and client:call_tool("t").content[1].text, why)', 'protocol = "2025-11-25", auth = { client_id = "me", follow = true }')
        r = ask()
        expect(r.out.startswith("in") and "secret" not in r.out + r.err, r)
        first, second = state["asked"]
        expect(first["resource"] == second["resource"] == server.url and first["scope"] == "a" and first["code_challenge_method"] == "S256", state)
        expect(second["grant_type"] == "authorization_code" and second["client_id"] == "me" and len(second["code_verifier"]) >= 43, state)
        files = [os.path.join(d, f) for d, _, fs in os.walk(env.path()) for f in fs if d.endswith("/oauth")]
        expect(len(files) == 1 and stat.S_IMODE(os.stat(files[0]).st_mode) == 0o600 and stat.S_IMODE(os.stat(os.path.dirname(files[0])).st_mode) == 0o700, files)
        expect(ask().out.startswith("in") and len(state["asked"]) == 2, state)
        state["valid"] = "secret-2"
        expect(ask().out.startswith("in") and state["asked"][2]["grant_type"] == "refresh_token" and len(state["asked"]) == 3, state)


@case("orch.http.request: status and headers, a body in pieces, what fails, what is refused")
def request(env):
    def get(q):
        if q.path == "/slow":
            q.stream("x" * 10)
            time.sleep(3)
            return None
        q.reply(418, q.path.encode() * 3, "text/plain", X_One="1")

    with Server(lambda m, q: {}, get) as server:
        path = env.write("s.lua", SAY + '''local base = arg[1]:gsub("/mcp$", "")
local r = orch.http.request { url = base .. "/a" }
say(r.status, r.headers["x-one"], r.body)
local parts = {}
r = orch.http.request { url = base .. "/b", on_data = function(s) parts[#parts + 1] = s end }
say(r.status, r.body, table.concat(parts))
say(select(3, orch.http.request { url = base .. "/slow", timeout = 1 }))
say(select(3, orch.http.request { url = "http://127.0.0.1:1/" }))
say(pcall(orch.http.request, { url = base, tiemout = 1 }))
say(select(2, orch.http.request { url = "file:///etc/passwd" }))
return 0''')
        r = env.orch(path, server.url)
        lines = r.out.splitlines()
        expect(r.status == 0 and lines[:4] == ["418\t1\t/a/a/a", "418\tnil\t/b/b/b", "timeout", "upstream"], r)
        expect("tiemout" in lines[4] and lines[4].startswith("false") and "not an http" in lines[5], r)


if __name__ == "__main__":
    main()
