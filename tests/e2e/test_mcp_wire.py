# What a client may send wrong: JSON, JSON-RPC, both MCP eras. One row a rule; each gets the decided code
# and text, and the connection lives on.
# as: user asan
import json, re

from orch_e2e import *

RPC = b'{"jsonrpc":"2.0","id":7,"method":"ping"'
IN_STRING = b'{"jsonrpc":"2.0","id":7,"method":"ping","params":{"x":"%s"}}'
IN_VALUE = b'{"jsonrpc":"2.0","id":7,"method":"ping","params":{"x":%s}}'
DEEP_64 = IN_VALUE % (b"[" * 62 + b"]" * 62)  # the message and params are two levels
DEEP_65 = IN_VALUE % (b"[" * 63 + b"]" * 63)
LIMIT = 16 * 1024 * 1024

# name, bytes, words that the text must hold
JSON_ROWS = [
    ("truncated object", RPC, "end"),
    ("truncated string", b'{"jsonrpc":"2.0","id":7,"method":"pi', "end"),
    ("truncated literal", IN_VALUE % b"tru", "value|literal"),
    ("truncated escape", b'{"jsonrpc":"2.0","method":"\\u00', "escape|end"),
    ("one brace", b"{", "end"),
    ("white space only", b"   \t ", "value|end"),
    ("no JSON at all", b"hello", "value"),
    ("HTTP instead", b"GET / HTTP/1.1", "value"),
    ("two values on a line", RPC + b"}" + RPC + b"}", "after"),
    ("trailing word", RPC + b"} x", "after"),
    ("trailing comma in object", RPC + b",}", "key"),
    ("trailing comma in array", IN_VALUE % b"[1,]", "value"),
    ("missing comma", b'{"jsonrpc":"2.0" "id":7}', "','"),
    ("missing colon", b'{"jsonrpc" "2.0"}', "':'"),
    ("key without quotes", b"{jsonrpc:2}", "key"),
    ("single quotes", b"{'jsonrpc':'2.0'}", "key"),
    ("mismatched brackets", IN_VALUE % b"[1}", "'\\]'"),
    ("comment", b'{/* x */"jsonrpc":"2.0"}', "key"),
    ("unknown escape", IN_STRING % b"\\x41", "escape"),
    ("escape of a quote only", IN_STRING % b"\\'", "escape"),
    ("short \\u escape", IN_STRING % b"\\u12", "escape"),
    ("\\u with a sign", IN_STRING % b"\\u+123", "escape"),
    ("raw newline by \\r", IN_STRING % b"a\rb", "control"),
    ("raw tab", IN_STRING % b"a\tb", "control"),
    ("raw NUL", IN_STRING % b"a\0b", "control"),
    ("raw 0x1f", IN_STRING % b"a\x1fb", "control"),
    ("UTF-8: lone continuation", IN_STRING % b"\x80", "UTF-8"),
    ("UTF-8: overlong slash", IN_STRING % b"\xc0\xaf", "UTF-8"),
    ("UTF-8: overlong in three", IN_STRING % b"\xe0\x80\xaf", "UTF-8"),
    ("UTF-8: overlong in four", IN_STRING % b"\xf0\x80\x80\xaf", "UTF-8"),
    ("UTF-8: surrogate", IN_STRING % b"\xed\xa0\x80", "UTF-8"),
    ("UTF-8: over U+10FFFF", IN_STRING % b"\xf4\x90\x80\x80", "UTF-8"),
    ("UTF-8: five bytes", IN_STRING % b"\xf8\x88\x80\x80\x80", "UTF-8"),
    ("UTF-8: cut off", IN_STRING % b"\xe2\x82", "UTF-8"),
    ("UTF-8: 0xff", IN_STRING % b"\xff", "UTF-8"),
    ("UTF-8: in a key", b'{"jsonrpc":"2.0","\xff":1}', "UTF-8"),
    ("Latin-1", IN_STRING % "é".encode("latin-1"), "UTF-8"),
    ("UTF-16", (RPC + b"}").decode().encode("utf-16-le"), "value|key|control"),
    ("lone high surrogate", IN_STRING % b"\\ud800", "surrogate"),
    ("lone low surrogate", IN_STRING % b"\\udc00", "surrogate"),
    ("two high surrogates", IN_STRING % b"\\ud800\\ud800", "surrogate"),
    ("byte-order mark", b"\xef\xbb\xbf" + RPC + b"}", "byte-order mark"),
    ("duplicate key, top level", RPC + b',"method":"tools/list"}', "duplicate key"),
    ("duplicate key, nested", IN_VALUE % b'{"a":1,"b":2,"a":3}', "duplicate key"),
    ("duplicate key, other spelling", IN_VALUE % b'{"path":1,"p\\u0061th":2}', "duplicate key"),
    ("leading zero", IN_VALUE % b"012", "leading zero"),
    ("plus sign", IN_VALUE % b"+1", "value"),
    ("lone minus", IN_VALUE % b"-", "digit"),
    ("point without digits", IN_VALUE % b"1.", "digit"),
    ("point first", IN_VALUE % b".5", "value"),
    ("exponent without digits", IN_VALUE % b"1e", "digit"),
    ("hexadecimal", IN_VALUE % b"0x10", "','|number|digit"),
    ("NaN", IN_VALUE % b"NaN", "value"),
    ("Infinity", IN_VALUE % b"-Infinity", "digit|value"),
    ("1e400", IN_VALUE % b"1e400", "number"),
    ("70 digits", IN_VALUE % (b"1" * 70), "number"),
    ("True", IN_VALUE % b"True", "value"),
    ("depth 65", DEEP_65, "deep"),
    ("array bomb", b"[" * 100000, "deep"),
    ("object bomb", b'{"a":' * 100000, "deep"),
]

# name, bytes, id in the answer
REQUEST_ROWS = [
    ("a number", b"7", None), ("a string", b'"ping"', None), ("null", b"null", None), ("true", b"true", None), ("empty object", b"{}", None),
    ("jsonrpc missing", b'{"id":7,"method":"ping"}', 7),
    ("jsonrpc 1.0", b'{"jsonrpc":"1.0","id":7,"method":"ping"}', 7),
    ("jsonrpc a number", b'{"jsonrpc":2.0,"id":7,"method":"ping"}', 7),
    ("keys in capitals", b'{"JSONRPC":"2.0","ID":7,"METHOD":"ping"}', None),
    ("id null", b'{"jsonrpc":"2.0","id":null,"method":"ping"}', None),
    ("id a fraction", b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', None),
    ("id an object", b'{"jsonrpc":"2.0","id":{"a":1},"method":"ping"}', None),
    ("id an array", b'{"jsonrpc":"2.0","id":[7],"method":"ping"}', None),
    ("id a boolean", b'{"jsonrpc":"2.0","id":true,"method":"ping"}', None),
    ("id over 1024 bytes", b'{"jsonrpc":"2.0","id":"%s","method":"ping"}' % (b"x" * 2000), None),
    ("method missing", b'{"jsonrpc":"2.0","id":7}', 7),
    ("method a number", b'{"jsonrpc":"2.0","id":7,"method":1}', 7),
    ("method null", b'{"jsonrpc":"2.0","id":7,"method":null}', 7),
    ("params an array", b'{"jsonrpc":"2.0","id":7,"method":"ping","params":[1]}', 7),
    ("params a string", b'{"jsonrpc":"2.0","id":7,"method":"ping","params":"x"}', 7),
    ("params null", b'{"jsonrpc":"2.0","id":7,"method":"ping","params":null}', 7),
    ("method and result", b'{"jsonrpc":"2.0","id":7,"method":"ping","result":{}}', 7),
    ("result and error", b'{"jsonrpc":"2.0","id":7,"result":{},"error":{"code":1,"message":"x"}}', 7),
    ("empty batch", b"[]", None), ("batch of numbers", b"[1,2]", None),
]

# name, method, params, code, words; sent in an initialized legacy session
LEGACY_ROWS = [
    ("unknown method", "tools/run", {}, -32601, "tools/run"),
    ("method of the modern era", "subscriptions/listen", {}, -32601, ""),
    ("method in other case", "Tools/List", {}, -32601, ""),
    ("empty method", "", {}, -32601, ""),
    ("second initialize", "initialize", {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}, -32600, "initialized already"),
    ("initialize without protocolVersion", "initialize", {"capabilities": {}}, -32602, "protocolVersion"),
    ("initialize with a number", "initialize", {"protocolVersion": 2025}, -32602, "protocolVersion"),
    ("tools/call without params", "tools/call", None, -32602, "name"),
    ("tools/call without name", "tools/call", {"arguments": {}}, -32602, "name"),
    ("name a number", "tools/call", {"name": 1}, -32602, "name"),
    ("arguments an array", "tools/call", {"name": "echo", "arguments": ["x"]}, -32602, "arguments"),
    ("arguments a string", "tools/call", {"name": "echo", "arguments": "x"}, -32602, "arguments"),
    ("U+0000 in arguments", "tools/call", {"name": "echo", "arguments": {"message": "a\0b"}}, -32602, "0000"),
    ("U+0000 in a key", "tools/call", {"name": "echo", "arguments": {"message": "a", "x\0": 1}}, -32602, "0000"),
    ("unknown tool", "tools/call", {"name": "no_such_tool", "arguments": {}}, -32602, "no_such_tool"),
    ("unknown tool, other case", "tools/call", {"name": "Echo", "arguments": {"message": "x"}}, -32602, "Echo"),
    ("unknown tool, control characters", "tools/call", {"name": "a\n\x1b[2J"}, -32602, ""),
    ("argument missing", "tools/call", {"name": "echo", "arguments": {}}, -32602, "message"),
    ("argument of the wrong type", "tools/call", {"name": "echo", "arguments": {"message": 1}}, -32602, "message"),
    ("argument null", "tools/call", {"name": "echo", "arguments": {"message": None}}, -32602, "message"),
    ("unknown cursor", "tools/list", {"cursor": "abc"}, -32602, "cursor"),
    ("_meta an array", "tools/call", {"name": "echo", "arguments": {"message": "x"}, "_meta": []}, -32602, "_meta"),
    ("progressToken an object", "tools/call", {"name": "echo", "arguments": {"message": "x"}, "_meta": {"progressToken": {}}}, -32602, "progressToken"),
    ("log level unknown", "logging/setLevel", {"level": "loud"}, -32602, "level"),
]

OK_META = modern_meta()
ONLY = lambda **members: {META + key: value for key, value in members.items()}
# name, method, params, code, words; sent on a connection without initialize
MODERN_ROWS = [
    ("call before initialize", "tools/call", {"name": "echo", "arguments": {"message": "x"}}, -32602, "initialize"),
    ("list before initialize", "tools/list", {}, -32602, "initialize"),
    ("list before initialize, no params", "tools/list", None, -32602, "initialize"),
    ("_meta empty", "tools/list", {"_meta": {}}, -32602, "protocolVersion"),
    ("protocolVersion missing", "tools/list", {"_meta": ONLY(clientCapabilities={})}, -32602, "protocolVersion"),
    ("protocolVersion a number", "tools/list", {"_meta": ONLY(protocolVersion=2026, clientCapabilities={})}, -32602, "protocolVersion"),
    ("clientCapabilities missing", "tools/list", {"_meta": ONLY(protocolVersion=MODERN)}, -32602, "clientCapabilities"),
    ("clientCapabilities an array", "tools/list", {"_meta": ONLY(protocolVersion=MODERN, clientCapabilities=[])}, -32602, "clientCapabilities"),
    ("server/discover without _meta", "server/discover", {}, -32602, "protocolVersion"),
    ("ping is removed", "ping", {"_meta": OK_META}, -32601, "ping"),
    ("logging/setLevel is removed", "logging/setLevel", {"level": "info", "_meta": OK_META}, -32601, ""),
    ("resources/subscribe is removed", "resources/subscribe", {"uri": "x", "_meta": OK_META}, -32601, ""),
    ("initialize with modern _meta", "initialize", {"protocolVersion": MODERN, "_meta": OK_META}, -32601, ""),
    ("unknown method", "tools/run", {"_meta": OK_META}, -32601, "tools/run"),
    ("unknown tool", "tools/call", {"name": "nope", "_meta": OK_META}, -32602, "nope"),
    ("arguments an array", "tools/call", {"name": "echo", "arguments": [], "_meta": OK_META}, -32602, "arguments"),
    ("unknown cursor", "tools/list", {"cursor": "x", "_meta": OK_META}, -32602, "cursor"),
]


class Table:
    """One session for many rows; a new one when a row has broken it."""

    def __init__(self, legacy):
        self.legacy, self.env, self.now = legacy, None, None

    def session(self):
        if not self.now:
            self.env = Env().project()
            self.now = self.env.session()
            if self.legacy:
                self.now.initialize()
        return self.now

    def alive(self):
        s = self.session()
        if self.legacy:
            answer = s.request("ping")
            expect(answer.get("result") == {}, "ping after it:", answer)
        result = s.call("echo", {"message": "still here"}, modern=not self.legacy)
        expect(text_of(result) == "still here", "call after it:", result)

    def drop(self):
        if self.env:
            self.env.close()
        self.env = self.now = None


legacy, modern = Table(True), Table(False)


def row(table, send, id, code, words):
    """Sends, checks the error, checks that the connection lives; returns the error."""
    try:
        s = table.session()
        send(s)
        answer = s.recv()
        expect(answer.get("jsonrpc") == "2.0" and "result" not in answer and "id" in answer, "no error:", answer)
        expect(answer["id"] == (s.next_id if id == "last" else id), "id:", answer)
        error = answer["error"]
        expect(error["code"] == code, "code %d awaited:" % code, error)
        expect(re.search(words, error["message"]), "text should say /%s/:" % words, error)
        table.alive()
        return error
    except BaseException:
        table.drop()
        raise


def json_row(env, data, words):
    error = row(legacy, lambda s: s.send(data), None, -32700, words)
    expect(re.search(r"byte \d+", error["message"]), "text should name the byte:", error)


def request_row(env, data, id):
    row(legacy, lambda s: s.send(data), id, -32600, "")


def method_row(env, table, method, params, code, words):
    row(table, lambda s: s.start(method, params), "last", code, words)


for name, data, words in JSON_ROWS:
    case("JSON: " + name, data, words)(json_row)
for name, data, id in REQUEST_ROWS:
    case("JSON-RPC: " + name, data, id)(request_row)
for name, *rest in LEGACY_ROWS:
    case("legacy: " + name, legacy, *rest)(method_row)
for name, *rest in MODERN_ROWS:
    case("modern: " + name, modern, *rest)(method_row)


@case("JSON: 17 MiB line")
def big_line(env):
    data = IN_STRING % (b"x" * (17 << 20))
    error = row(legacy, lambda s: s.send(data, 30), None, -32600, "over %d bytes" % LIMIT)
    row(legacy, lambda s: s.send(data, 30), None, -32600, "over")  # and once more: the rest of the line was skipped


@case("JSON: what is right passes")
def right(env):
    s = env.project().session()
    s.initialize()
    for data in (DEEP_64, IN_VALUE % b"9007199254740993", IN_VALUE % b"-0.5e-300", IN_VALUE % (b"1" * 60), IN_STRING % b"\\ud83d\\ude00 \\/ \\u0000",
                 IN_STRING % "é€😀\u2028".encode(), b" \t" + RPC + b"} \r", b'{"id":7,"params":{},"method":"ping","jsonrpc":"2.0","extra":{"a":[]}}'):
        s.send(data)
        expect(s.recv() == {"jsonrpc": "2.0", "id": 7, "result": {}}, "not answered:", data[:80])


@case("JSON: a 15 MiB message is answered")
def large(env):
    s = env.project().session()
    s.initialize()
    message = "x" * (15 << 20)
    expect(text_of(s.call("echo", {"message": message})) == message, "the echo differs")


@case("JSON: an empty line is ignored")
def empty_line(env):
    s = env.project().session()
    s.initialize()
    s.send(b"")
    s.send(b"\r")
    expect(s.request("ping")["result"] == {})


@case("ids come back as the bytes that came")
def ids(env):
    s = env.project().session()
    s.initialize()
    for id in (b"9007199254740993", b"-1", b"0", b'"\\u0041\\/"', '"é"'.encode(), b'""', b"123456789012345678901234567890"):
        s.send(b'{"jsonrpc":"2.0","id":%s,"method":"ping"}' % id)
        line = s.recv_raw()
        expect(b'"id":' + id + b"," in line, id, "came back as", line)


@case("an answer to nothing and unknown notifications are ignored")
def ignored(env):
    s = env.project().session()
    s.initialize()
    for data in (b'{"jsonrpc":"2.0","id":99,"result":{}}', b'{"jsonrpc":"2.0","id":"x","error":{"code":1,"message":"m"}}',
                 b'{"jsonrpc":"2.0","method":"notifications/nothing"}', b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"echo"}}',
                 b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":12345}}',
                 b'{"jsonrpc":"2.0","method":"notifications/cancelled"}', b'{"jsonrpc":"2.0","method":"notifications/initialized"}'):
        s.send(data)
        expect(s.request("ping")["result"] == {}, "after", data)


@case("an id in flight cannot be used again; both are answered")
def reused(env):
    s = env.project(tools={"wait": SLEEP, "echo": ECHO}).session()
    s.initialize()
    s.send_raw(b"".join(json.dumps({"jsonrpc": "2.0", "id": 5, **m}).encode() + b"\n" for m in (
        {"method": "tools/call", "params": {"name": "wait", "arguments": {"seconds": 0.5}}}, {"method": "ping"})))
    refused = s.recv()
    expect(refused["error"]["code"] == -32600 and "in use" in refused["error"]["message"], refused)
    expect(text_of(s.answer(5)["result"]) == "waited")
    s.send({"jsonrpc": "2.0", "id": 5, "method": "ping"})
    expect(s.answer(5)["result"] == {})


@case("65 calls at once: 64 run, one is refused with -31001")
def too_many(env):
    s = env.project(tools={"wait": SLEEP}).session()
    s.initialize()
    ids = [s.start("tools/call", {"name": "wait", "arguments": {"seconds": 300}}) for _ in range(65)]
    refused = s.recv()
    expect(refused["id"] == ids[-1] and refused["error"]["code"] == -31001 and "64" in refused["error"]["message"], refused)
    expect(len([l for l in env.audit() if l["event"] == "decision"]) == 64, env.audit())
    for id in ids[:-1]:
        s.notify("notifications/cancelled", {"requestId": id})
    expect(s.request("ping")["result"] == {}, "a cancelled call is answered")


@case("thousands of requests written at once are all answered in order")
def burst(env):
    s = env.project().session()
    s.initialize()
    s.send_raw(b"".join(b'{"jsonrpc":"2.0","id":%d,"method":"ping"}\n' % i for i in range(1000, 6000)))
    for i in range(1000, 6000):
        expect(s.recv()["id"] == i, "order at", i)


@case("a message byte by byte")
def dribble(env):
    s = env.project().session()
    s.initialize()
    for byte in RPC + b"}\n":
        s.send_raw(bytes([byte]))
    expect(s.recv()["result"] == {})


@case("initialize: known versions are answered with themselves, others with the newest")
def versions(env):
    env.project()
    for asked, given in [(v, v) for v in ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")] + [("1999-01-01", LEGACY), ("", LEGACY), (MODERN, LEGACY)]:
        s = env.session()
        result = s.initialize(asked)
        expect(result["protocolVersion"] == given, asked, "→", result["protocolVersion"])
        expect(result["serverInfo"]["name"] == "orch" and "tools" in result["capabilities"], result)
        expect(text_of(s.call("echo", {"message": asked})) == asked)
        expect(s.end() == 0)


@case("tools/list: every tool has a name, a description and an object schema")
def tools_list(env):
    s = env.project().session()
    s.initialize()
    tools = s.request("tools/list")["result"]["tools"]
    expect([t["name"] for t in tools if t["name"] == "echo"] == ["echo"], tools)
    for tool in tools:
        expect(tool["inputSchema"]["type"] == "object" and tool["description"], tool)


@case("batch: answered as one array in 2025-03-26")
def batch(env):
    s = env.project().session()
    s.initialize("2025-03-26")
    s.send([{"jsonrpc": "2.0", "id": 1, "method": "ping"}, {"jsonrpc": "2.0", "method": "notifications/initialized"}, {"jsonrpc": "2.0", "id": "b", "method": "nope"},
            {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": "echo", "arguments": {"message": "in a batch"}}}, 7])
    answers = s.recv()
    expect(isinstance(answers, list) and len(answers) == 4, answers)
    by_id = {m["id"]: m for m in answers}
    expect(by_id[1]["result"] == {} and by_id["b"]["error"]["code"] == -32601 and by_id[None]["error"]["code"] == -32600, answers)
    expect(text_of(by_id[3]["result"]) == "in a batch", answers)
    s.send([{"jsonrpc": "2.0", "method": "notifications/initialized"}])
    expect(s.request("ping")["result"] == {}, "a batch of notifications has no answer")


def no_batch(env, version):
    s = env.project().session()
    if version:
        s.initialize(version)
    s.send([{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"_meta": OK_META}}])
    answer = s.recv()
    expect(isinstance(answer, dict) and answer["error"]["code"] == -32600 and "batch" in answer["error"]["message"], answer)
    expect(text_of(s.call("echo", {"message": "x"}, modern=not version)) == "x")


for version in ("2025-11-25", "2025-06-18", "2024-11-05", None):
    case("batch: refused in " + (version or MODERN), version)(no_batch)


@case("modern: server/discover")
def discover(env):
    s = env.project().session()
    result = s.request("server/discover", modern=True)["result"]
    expect(result["resultType"] == "complete" and MODERN in result["supportedVersions"], result)
    expect("tools" in result["capabilities"] and isinstance(result["ttlMs"], int) and result["cacheScope"] in ("private", "public"), result)
    expect(result["_meta"][META + "serverInfo"]["name"] == "orch", result)


@case("modern: results carry resultType; lists are cacheable in private")
def modern_results(env):
    s = env.project().session()
    listed = s.request("tools/list", modern=True)["result"]
    expect(listed["resultType"] == "complete" and listed["cacheScope"] == "private" and isinstance(listed["ttlMs"], int), listed)
    expect(s.call("echo", {"message": "x"}, modern=True)["resultType"] == "complete")


@case("modern: an unsupported version is -32022 with supported and requested")
def unsupported(env):
    s = env.project().session()
    answer = s.request("tools/list", {"_meta": {**OK_META, META + "protocolVersion": "2031-01-01"}})
    error = answer["error"]
    expect(error["code"] == -32022 and error["data"]["requested"] == "2031-01-01" and MODERN in error["data"]["supported"], error)
    expect(text_of(s.call("echo", {"message": "x"}, modern=True)) == "x")


@case("both eras on one connection, by request")
def both(env):
    s = env.project().session()
    expect(text_of(s.call("echo", {"message": "modern"}, modern=True)) == "modern")
    s.initialize()
    legacy_result = s.call("echo", {"message": "legacy"})
    expect(text_of(legacy_result) == "legacy" and "resultType" not in legacy_result, legacy_result)
    expect(s.call("echo", {"message": "modern"}, modern=True)["resultType"] == "complete")


PROGRESS = """return {
  name = "steps", description = "Reports progress", input = { type = "object" },
  run = function(args, ctx) for i = 1, 3 do ctx:progress(i, 3, "step " .. i) end return { text = "done" } end,
}
"""


@case("progress: sent under the request's token, before the answer; none without a token")
def progress(env):
    s = env.project(tools={"steps": PROGRESS}).session()
    s.initialize()
    for token in ("p-1", 0, 9007199254740993):
        s.notes.clear()
        answer = s.request("tools/call", {"name": "steps", "arguments": {}, "_meta": {"progressToken": token}})
        expect(text_of(answer["result"]) == "done", answer)
        notes = [n["params"] for n in s.notes if n["method"] == "notifications/progress"]
        expect([(n["progressToken"], n["progress"], n["total"]) for n in notes] == [(token, i, 3) for i in (1, 2, 3)], notes)
    s.notes.clear()
    s.call("steps")
    expect(not s.notes, s.notes)


@case("cancellation: no answer, and the next call is served")
def cancel(env):
    s = env.project(tools={"wait": SLEEP, "echo": ECHO}).session()
    s.initialize()
    id = s.start("tools/call", {"name": "wait", "arguments": {"seconds": 300}})
    s.notify("notifications/cancelled", {"requestId": id, "reason": "enough"})
    expect(text_of(s.call("echo", {"message": "next"})) == "next")  # answer() fails on any other answer
    def outcome():
        return [line for line in env.audit() if line["event"] == "outcome" and line.get("tool") == "wait"] or \
               [line for line in env.audit() if line["event"] == "outcome" and line["call"] in
                {d["call"] for d in env.audit() if d["event"] == "decision" and d.get("tool") == "wait"}]
    until(outcome, "an outcome line of the cancelled call")


@case("with -v and a tool that prints, stdout holds JSON-RPC alone")
def clean_stdout(env):
    noisy = ECHO.replace("function(args) return", 'function(args, ctx) print("printed") orch.log.info("logged", { a = 1 }) return')
    s = env.project(tools={"echo": noisy}).session("-v", "-v")
    s.initialize()
    for _ in range(20):
        s.call("echo", {"message": "x"})
    s.send(b"junk")
    s.recv()
    expect(s.end() == 0)
    for line in s.raw:
        expect(json.loads(line)["jsonrpc"] == "2.0", line)
    expect("printed" in s.stderr() and "logged" in s.stderr(), "stderr:", s.stderr())


if __name__ == "__main__":
    try:
        main()
    finally:
        legacy.drop()
        modern.drop()
