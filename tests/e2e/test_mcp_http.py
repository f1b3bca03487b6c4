# MCP over Streamable HTTP: `orch mcp http` and a serving script, byte for byte. One row a rule.
# as: user asan
import contextlib, json, re, select, socket

from orch_e2e import *

TOKEN = "e2e-token-0123456789"
SERVER = r"""
local orch = require "orch"
local function tool(name, run, input) return { name = name, description = name, input = input or { type = "object", properties = orch.json.decode("{}") }, run = run } end
return orch.mcp.serve { transport = "http", listen = arg[1], token = os.getenv "ORCH_TOKEN", name = "e2e", version = "7", tools = {
  tool("hello", function() return "hello" end),
  tool("steps", function(_, ctx) for i = 1, 3 do ctx:progress(i, 3) end return "stepped" end),
  tool("slow", function() while not io.open("go") do orch.sleep(0.01) end return "slow" end),
  tool("forever", function() orch.sleep(600) return "never" end),
  tool("ask", function(_, ctx)
    local a, why, code = ctx:elicit { message = "Go on?" }
    if not a then return nil, why, code end
    return a.action
  end),
  tool("release", function(_, ctx) ctx:progress(1) ctx:release("200ms") orch.sleep(0.1) return "after all" end),
  tool("touch", function() orch.mcp.changed { tools = true, uri = "t://a" } return "touched" end),
  tool("region", function(a) return a.region or "none" end, { type = "object", properties = { region = { type = "string", ["x-mcp-header"] = "Region" } } }),
}, resources = { { uri = "t://a", name = "a", text = "A" } }, prompts = { { name = "p", get = function() return "prompt" end } } }
"""


class Http:
    def __init__(self, env, *argv, token=TOKEN):
        self.env, self.token = env, token
        self.stderr = env.path("http-stderr")
        with open(self.stderr, "wb") as err:
            self.child = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err,
                                          env={**env.environ, "ORCH_TOKEN": TOKEN}, cwd=env.path("p"))
        LIVE.add(self.child.pid)
        env.sessions.append(self)
        def address():
            with open(self.stderr, errors="replace") as f:
                text = f.read()
            expect(self.child.poll() is None, "it ended:", text)
            return re.search(r"listening on (\S+)", text)
        where = until(address, "the address").group(1)
        self.unix = where[5:] if where.startswith("unix:") else None
        self.port = None if self.unix else int(re.search(r":(\d+)/", where).group(1))

    def kill(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        LIVE.discard(self.child.pid)

    def connect(self):
        if self.unix:
            s = socket.socket(socket.AF_UNIX)
            s.connect(self.unix)
        else:
            s = socket.create_connection(("127.0.0.1", self.port))
        s.settimeout(WAIT_S)
        return s

    def open(self, method="POST", body=None, headers=None, path="/mcp"):
        """Sends a request; a Reader of its answer. headers: None as value leaves the default out."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        all = {"Host": "127.0.0.1", "Authorization": "Bearer " + self.token, "Content-Type": "application/json",
               "Accept": "application/json, text/event-stream"}
        if data:
            all["Content-Length"] = str(len(data))
        all.update(headers or {})
        s = self.connect()
        head = "%s %s HTTP/1.1\r\n" % (method, path) + "".join("%s: %s\r\n" % kv for kv in all.items() if kv[1] is not None) + "\r\n"
        s.sendall(head.encode("latin-1") + data)
        return Reader(s)

    def ask(self, *args, **more):
        reader = self.open(*args, **more)
        with contextlib.closing(reader):
            return reader.whole()

    def legacy(self, capabilities=None):
        r = self.ask(body=init(capabilities))
        expect(r.status == 200, r.status, r.body)
        headers = {"Mcp-Session-Id": r.headers["mcp-session-id"], "MCP-Protocol-Version": LEGACY}
        expect(self.ask(body={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=headers).status == 202)
        return headers


class Reader:
    def __init__(self, s):
        self.s, self.f, self.status, self.headers = s, s.makefile("rb"), None, {}

    def head(self):
        if self.status is None:
            line = self.f.readline()
            expect(line.startswith(b"HTTP/1.1 "), "no answer:", line)
            self.status = int(line.split()[1])
            for line in iter(self.f.readline, b"\r\n"):
                name, _, value = line.decode("latin-1").partition(":")
                self.headers[name.strip().lower()] = value.strip()
        return self

    def chunks(self):
        while True:
            size = int(self.f.readline() or b"0", 16)
            data = self.f.read(size)
            self.f.readline()
            if not size:
                return
            yield data

    def events(self):
        """(id, retry, parsed data or None) of each event of a stream."""
        self.head()
        expect(self.headers.get("content-type") == "text/event-stream", self.status, self.headers)
        text = b""
        for chunk in self.chunks():
            text += chunk
            while b"\n\n" in text:
                block, _, text = text.partition(b"\n\n")
                fields = dict(re.match(rb"([a-z]*): ?(.*)", line).groups() for line in block.split(b"\n") if line)
                if fields.keys() - {b""}:
                    data = fields.get(b"data", b"")
                    yield fields.get(b"id", b"").decode(), fields.get(b"retry"), json.loads(data) if data else None

    def whole(self):
        self.head()
        if self.headers.get("content-type") == "text/event-stream":
            self.messages = [data for _, _, data in self.events() if data]
            self.body = self.messages[-1] if self.messages else None
        elif "transfer-encoding" in self.headers:
            self.body = b"".join(self.chunks())
        else:
            raw = self.f.read(int(self.headers.get("content-length", 0)))
            self.body = json.loads(raw) if raw else None
        return self

    def close(self):
        self.f.close()
        self.s.close()


def init(capabilities=None):
    return {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {"protocolVersion": LEGACY, "capabilities": capabilities or {},
            "clientInfo": {"name": "c", "version": "1"}}}


def modern(method, params=None, capabilities=None, id=1, token=None, **headers):
    """(body, headers) of a request of the modern era."""
    meta = {META + "protocolVersion": MODERN, META + "clientCapabilities": capabilities or {}}
    if token is not None:
        meta["progressToken"] = token
    params = {**(params or {}), "_meta": meta}
    all = {"MCP-Protocol-Version": MODERN, "Mcp-Method": method}
    name = params.get("uri", params.get("name", params.get("taskId")))
    if name:
        all["Mcp-Name"] = name
    all.update({k.replace("_", "-"): v for k, v in headers.items()})
    return {"body": {"jsonrpc": "2.0", "id": id, "method": method, "params": params}, "headers": all}


def call(tool, arguments=None, **more):
    return modern("tools/call", {"name": tool, "arguments": arguments or {}}, **more)


def script(env, listen="127.0.0.1:0", more=""):
    env.project(more=more)
    path = env.write("server.lua", SERVER)
    return Http(env, ORCH, "--config", env.config, path, listen)


PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
# name, arguments of ask(), status, JSON-RPC code
ROWS = [
    ("no token", {"body": PING, "headers": {"Authorization": None}}, 401, None),
    ("another token", {"body": PING, "headers": {"Authorization": "Bearer " + TOKEN[:-1] + "x"}}, 401, None),
    ("another scheme", {"body": PING, "headers": {"Authorization": "Basic " + TOKEN}}, 401, None),
    ("foreign Host", {"body": PING, "headers": {"Host": "evil.example"}}, 403, -32600),
    ("foreign Host before the token", {"body": PING, "headers": {"Host": "evil.example", "Authorization": None}}, 403, -32600),
    ("foreign Origin", {"body": PING, "headers": {"Origin": "http://evil.example"}}, 403, -32600),
    ("another path", {"body": PING, "path": "/"}, 404, None),
    ("PUT", {"method": "PUT", "body": PING}, 405, None),
    ("Content-Type text", {"body": PING, "headers": {"Content-Type": "text/plain"}}, 415, -32600),
    ("no Content-Type", {"body": PING, "headers": {"Content-Type": None}}, 415, -32600),
    ("Accept JSON only", {"body": PING, "headers": {"Accept": "application/json"}}, 406, -32600),
    ("Accept events only", {"body": PING, "headers": {"Accept": "text/event-stream"}}, 406, -32600),
    ("no body", {}, 400, -32700),
    ("half a body", {"body": b'{"jsonrpc":"2.0"'}, 400, -32700),
    ("not JSON-RPC", {"body": b"[1]"}, 400, -32600),
    ("no session, no _meta", {"body": PING, "headers": {"MCP-Protocol-Version": LEGACY}}, 200, None),
    ("unknown session", {"body": PING, "headers": {"Mcp-Session-Id": "0" * 32}}, 404, -32600),
    ("session id too short", {"body": PING, "headers": {"Mcp-Session-Id": "x"}}, 404, -32600),
    ("GET without session", {"method": "GET"}, 400, -32600),
    ("DELETE without session", {"method": "DELETE"}, 400, -32600),
    ("GET in the modern era", {"method": "GET", "headers": {"MCP-Protocol-Version": MODERN}}, 405, None),
    ("DELETE in the modern era", {"method": "DELETE", "headers": {"MCP-Protocol-Version": MODERN}}, 405, None),
    ("modern: right", call("hello"), 200, None),
    ("modern: a session id is ignored", call("hello", Mcp_Session_Id="0" * 32), 200, None),
    ("modern: version header missing", call("hello", MCP_Protocol_Version=None), 400, -32020),
    ("modern: version header another", call("hello", MCP_Protocol_Version=LEGACY), 400, -32020),
    ("modern: Mcp-Method missing", call("hello", Mcp_Method=None), 400, -32020),
    ("modern: Mcp-Method another", call("hello", Mcp_Method="tools/list"), 400, -32020),
    ("modern: Mcp-Method in capitals", call("hello", Mcp_Method="TOOLS/CALL"), 400, -32020),
    ("modern: Mcp-Name missing", call("hello", Mcp_Name=None), 400, -32020),
    ("modern: Mcp-Name another", call("hello", Mcp_Name="steps"), 400, -32020),
    ("modern: Mcp-Name with space around", call("hello", Mcp_Name="  hello "), 200, None),
    ("modern: Mcp-Name in base64", call("hello", Mcp_Name="=?base64?aGVsbG8=?="), 200, None),
    ("modern: Mcp-Name in bad base64", call("hello", Mcp_Name="=?base64?aGVsbG8?="), 400, -32020),
    ("modern: uri", modern("resources/read", {"uri": "t://a"}), 200, None),
    ("modern: uri another", modern("resources/read", {"uri": "t://a"}, Mcp_Name="t://b"), 400, -32020),
    ("modern: resource not found", modern("resources/read", {"uri": "t://b"}), 200, -32602),
    ("modern: prompt", modern("prompts/get", {"name": "p"}), 200, None),
    ("modern: Mcp-Param right", call("region", {"region": "eu"}, Mcp_Param_Region="eu"), 200, None),
    ("modern: Mcp-Param in base64", call("region", {"region": "\u00fc"}, Mcp_Param_Region="=?base64?w7w=?="), 200, None),
    ("modern: Mcp-Param missing", call("region", {"region": "eu"}), 400, -32020),
    ("modern: Mcp-Param another", call("region", {"region": "eu"}, Mcp_Param_Region="us"), 400, -32020),
    ("modern: Mcp-Param without argument", call("region", {}, Mcp_Param_Region="us"), 400, -32020),
    ("modern: Mcp-Param null", call("region", {}), 200, None),
    ("modern: other Mcp-Param", call("hello", Mcp_Param_Other="x"), 200, None),
    ("modern: unknown method", modern("tools/nope"), 404, -32601),
    ("modern: removed method", modern("ping"), 404, -32601),
    ("modern: unknown tool", call("nope"), 200, -32602),
    ("modern: capability missing", call("ask"), 400, -32021),
    ("modern: tasks without the extension", modern("tasks/get", {"taskId": "x"}), 400, -32021),
    ("modern: unknown task", modern("tasks/get", {"taskId": "x"}, {"extensions": {META + "tasks": {}}}), 200, -32602),
]


@case("the table of requests")
def table(env):
    h = script(env)
    wrong = []
    for name, request, status, code in ROWS:
        r = h.ask(**request)
        got = (r.body or {}).get("error", {}).get("code") if isinstance(r.body, dict) else None
        if (r.status, got) != (status, code):
            wrong.append("%s: %s %s, wanted %s %s: %s" % (name, r.status, got, status, code, r.body))
    expect(not wrong, "\n".join(wrong))


@case("legacy: a session from initialize to DELETE")
def session(env):
    h = script(env)
    headers = h.legacy()
    expect(re.fullmatch("[0-9a-f]{32}", headers["Mcp-Session-Id"]))
    r = h.ask(body={"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "hello"}}, headers=headers)
    expect(r.status == 200 and r.headers["content-type"] == "application/json" and text_of(r.body["result"]) == "hello", r.body)
    expect(h.ask(body=PING, headers={**headers, "MCP-Protocol-Version": "1999-01-01"}).status == 400)
    expect(h.ask(body=PING, headers={**headers, "MCP-Protocol-Version": None}).status == 200)
    expect(h.ask(body=init(), headers=headers).body["error"]["code"] == -32600)
    expect(h.ask("DELETE", headers=headers).status == 204)
    expect(h.ask(body=PING, headers=headers).status == 404)
    expect(h.ask("DELETE", headers=headers).status == 404)


@case("legacy: progress makes it a stream; a question goes out on it and comes back by another POST")
def questions(env):
    h = script(env)
    headers = h.legacy({"elicitation": {}})
    r = h.ask(body={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "steps", "_meta": {"progressToken": "t"}}}, headers=headers)
    expect([m.get("method", "answer") for m in r.messages] == ["notifications/progress"] * 3 + ["answer"], r.messages)
    reader = h.open(body={"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "ask"}}, headers=headers)
    with contextlib.closing(reader):
        events = reader.events()
        question = next(data for _, _, data in events if data)
        expect(h.ask(body={"jsonrpc": "2.0", "id": question["id"], "result": {"action": "accept"}}, headers=headers).status == 202)
        answer = next(data for _, _, data in events if data)
    expect(text_of(answer["result"]) == "accept", answer)


@case("legacy: disconnecting cancels nothing; Last-Event-ID brings what was missed")
def resume(env):
    h = script(env)
    headers = h.legacy()
    reader = h.open(body={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "release", "_meta": {"progressToken": 1}}}, headers=headers)
    with contextlib.closing(reader):
        events = list(reader.events())  # the server ends it
    expect(events[0][0] and events[0][2] is None, "no priming event", events)
    expect(any(retry == b"200" for _, retry, _ in events) and not any(d and "result" in d for _, _, d in events), events)
    last = [id for id, _, _ in events if id][-1]
    again = h.open("GET", headers={**headers, "Last-Event-ID": last})
    with contextlib.closing(again):
        answer = next(d for _, _, d in again.events() if d)
    expect(text_of(answer["result"]) == "after all", answer)
    first = h.open("GET", headers={**headers, "Last-Event-ID": events[0][0]})  # everything once more, though it has ended
    with contextlib.closing(first):
        messages = [d for _, _, d in first.events() if d]
    expect([m.get("method", "answer") for m in messages] == ["notifications/progress", "answer"], messages)
    for bad in ("x", "99-1", "1-99", "1", "-", "1-" + "9" * 100):
        expect(h.ask("GET", headers={**headers, "Last-Event-ID": bad}).status == 400, bad)


@case("legacy: a cancelled request's stream ends, also where nothing was sent on it")
def cancelled(env):
    h = script(env)
    headers = h.legacy()
    for id in (1, 2):
        reader = h.open(body={"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": "forever"}}, headers=headers)
        with contextlib.closing(reader):
            until(lambda: sum(line["event"] == "decision" for line in env.audit()) == id, "the decision")
            expect(h.ask(body={"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}, headers=headers).status == 202)
            expect(reader.whole().status == 202 and reader.body is None, reader.status, reader.body)


@case("legacy: the GET stream carries what belongs to no request, once at a time")
def general(env):
    h = script(env)
    headers = h.legacy()
    expect(h.ask(body={"jsonrpc": "2.0", "id": 1, "method": "resources/subscribe", "params": {"uri": "t://a"}}, headers=headers).status == 200)
    reader = h.open("GET", headers=headers)
    with contextlib.closing(reader):
        reader.head()
        expect(h.ask("GET", headers=headers).status == 409)
        h.ask(**call("touch"))
        events = reader.events()
        got = [next(d for _, _, d in events if d)["method"] for _ in range(2)]
    expect(got == ["notifications/tools/list_changed", "notifications/resources/updated"], got)


@case("modern: subscriptions/listen, and closing the stream ends it")
def listen(env):
    h = script(env)
    request = modern("subscriptions/listen", {"notifications": {"toolsListChanged": True}}, id="L")
    reader = h.open(**request)
    with contextlib.closing(reader):
        events = reader.events()
        ack = next(d for _, _, d in events if d)
        expect(ack["method"] == "notifications/subscriptions/acknowledged" and ack["params"]["_meta"][META + "subscriptionId"] == "L", ack)
        h.ask(**call("touch"))
        change = next(d for _, _, d in events if d)
        expect(change["method"] == "notifications/tools/list_changed", change)
    expect(h.ask(**call("touch")).status == 200)


@case("modern: closing the connection cancels the call")
def closing(env):
    h = script(env)
    reader = h.open(**call("forever"))
    until(lambda: any(line["event"] == "decision" for line in env.audit()), "the decision")
    reader.close()
    until(lambda: any(line["event"] == "outcome" and line.get("cancelled") for line in env.audit()), "the outcome")


@case("modern: input_required over two POSTs, state bound to the caller's call")
def mrtr(env):
    h = script(env)
    first = h.ask(**call("ask", capabilities={"elicitation": {}})).body["result"]
    key, = first["inputRequests"]
    body = {"name": "ask", "arguments": {}, "requestState": first["requestState"], "inputResponses": {key: {"action": "decline"}}}
    done = h.ask(**modern("tools/call", body, {"elicitation": {}}, id=2)).body
    expect(text_of(done["result"]) == "decline", done)


@case("a slow call does not hold up another connection")
def concurrent(env):
    h = script(env)
    slow = h.open(**call("slow"))
    with contextlib.closing(slow):
        expect(text_of(h.ask(**call("hello")).body["result"]) == "hello")
        expect(not select.select([slow.s], [], [], 0)[0], "the slow one is done already")
        env.write("go", "")
        expect(text_of(slow.whole().body["result"]) == "slow")


@case("a request in many lines: what it says is one line in the audit log and in the answer")
def many_lines(env):
    h = script(env)
    body = json.dumps(call("touch")["body"], indent=2).replace("{}", "{\r\n\t\"a\": [1,\r\n2]\r\n}").encode()
    r = h.ask(**{**call("touch"), "body": body})
    expect(r.status == 200 and "result" in r.body and not r.body["result"].get("isError"), r.body)
    expect([l["args"] for l in env.audit() if l["event"] == "decision"] == [{"a": [1, 2]}], env.audit())


@case("two legacy sessions of one caller have limits.calls each")
def sessions(env):
    h = script(env, more="limits = { calls = 1 }")
    one, two = h.legacy(), h.legacy()
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "slow", "arguments": {}}}
    with contextlib.closing(h.open(body=body, headers=one)) as slow:
        until(lambda: any(line["event"] == "decision" for line in env.audit()), "the decision")
        r = h.ask(body={**body, "id": 2}, headers=one)
        expect(r.body["error"]["code"] == -31001, r.body)
        r = h.ask(body={**body, "id": 2, "params": {"name": "hello", "arguments": {}}}, headers=two)
        expect(text_of(r.body["result"]) == "hello", r.body)
        env.write("go", "")
        slow.whole()


@case("limits.calls holds for a caller without sessions over all its connections")
def limit(env):
    h = script(env, more="limits = { calls = 3 }")
    readers = [h.open(**call("forever")) for _ in range(3)]
    until(lambda: sum(line["event"] == "decision" for line in env.audit()) == 3, "the decisions")
    r = h.ask(**call("hello"))
    expect(r.body["error"]["code"] == -31001 and "limits.calls" in r.body["error"]["message"], r.body)
    readers.pop().close()
    until(lambda: any(line["event"] == "outcome" for line in env.audit()), "the outcome")
    expect(text_of(h.ask(**call("hello")).body["result"]) == "hello")
    for reader in readers:
        reader.close()


@case("orch mcp http: a token is made, 0600, and kept; without it nothing is served")
def command(env):
    env.project()
    env.environ.pop("ORCH_TOKEN", None)
    h = Http(env, *env.argv("mcp", "http", "--listen", "127.0.0.1:0"))
    path = env.path("state", "orch", "http.token")
    expect(os.stat(path).st_mode & 0o777 == 0o600)
    with open(path) as f:
        made = f.read()
    expect(len(made) == 64, made)
    expect(h.ask(**call("echo", {"message": "x"})).status == 401)
    h.token = made
    expect(text_of(h.ask(**call("echo", {"message": "x"})).body["result"]) == "x")
    lines = [line for line in env.audit() if line["event"] == "decision"]
    expect(len(lines) == 1 and lines[0]["caller"] == "http token", lines)
    h.kill()
    again = Http(env, *env.argv("mcp", "http", "--listen", "127.0.0.1:0"), token=made)
    expect(again.ask(**call("echo", {"message": "y"})).status == 200)


@case("orch mcp http: a unix socket needs no token, the caller is the peer's uid")
def unix(env):
    env.project(more='http = { listen = "unix:run/mcp.sock" }')
    h = Http(env, *env.argv("mcp", "http"))
    r = h.ask(**{**call("echo", {"message": "x"}), "headers": {**call("echo")["headers"], "Authorization": None}})
    expect(text_of(r.body["result"]) == "x", r.body)
    expect(os.stat(env.path("p", "run", "mcp.sock")).st_mode & 0o777 == 0o600)
    expect([line["caller"] for line in env.audit() if line["event"] == "decision"] == ["uid:%d" % os.getuid()])


@case("orch mcp http: what is wrong with the address or the token is said")
def refused(env):
    env.project(more='http = { token = env("SHORT", nil) }')
    env.environ["SHORT"] = "short"
    r = env.orch("mcp", "http", config=True)
    expect(r.status == 6 and "16 characters" in r.err, r)
    env.project()
    r = env.orch("mcp", "http", "--listen", "127.0.0.1:99999", config=True)
    expect(r.status != 0 and "99999" in r.err, r)


@case("1,000 idle streams: at most 20 MiB more")
def idle(env):
    h = script(env)
    def rss():
        with open("/proc/%d/status" % h.child.pid) as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmRSS:"))
    h.ask(**call("hello"))
    before, readers = rss(), []
    request = modern("subscriptions/listen", {"notifications": {"toolsListChanged": True}})
    for _ in range(1000):
        readers.append(h.open(**request).head())
    grown = rss() - before
    for reader in readers:
        reader.close()
    expect(ASAN or grown < 20 * 1024, "KiB more:", grown)


main()
