# The thin proxy: `orch mcp stdio -- CMD` in front of good and bad servers, and a client that is as simple
# as an earlier Python client was: no notifications/initialized, one line read for each request.
# as: user asan
import json, re

from orch_e2e import *

UPSTREAM = os.path.join(SERVERS, "upstream.py")
FAILED = -31002


class OneLineClient:
    """Sends a request, reads one line, and takes it for the answer."""

    def __init__(self, session):
        self.s, self.id = session, 0

    def request(self, method, params=None):
        self.id += 1
        self.s.send({"jsonrpc": "2.0", "id": self.id, "method": method, **({"params": params} if params is not None else {})})
        answer = self.s.recv()
        expect(answer.get("id") == self.id, "the next line is not the answer to", method, ":", answer)
        expect("result" in answer, answer)
        return answer["result"]

    def start(self):
        return self.request("initialize", {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "client", "version": "0"}})


def proxy(env, mode, *more, rules='return { rules = { { tool = "cmd__*", action = "allow" } } }', options=("--",)):
    env.project(rules)
    return env.session(*options, PY, UPSTREAM, mode, *more)


def one_line(env, mode):
    c = OneLineClient(proxy(env, mode))
    expect(c.start()["serverInfo"]["name"], "no serverInfo")
    names = [t["name"] for t in c.request("tools/list", {})["tools"]]
    expect(set(names) >= {"echo", "big", "env"}, names)
    for text in ("hello", "", "é😀\u2028", "x" * 100000):
        expect(c.request("tools/call", {"name": "echo", "arguments": {"message": text}})["content"] == [{"type": "text", "text": text}])
    c.request("ping")
    expect(c.s.end() == 0)


for mode in ("good", "chatty", "junk", "stderr", "request"):
    case("one line an answer, in front of a server that is " + mode, mode)(one_line)


@case("with -v the server's stderr is on ours, and stdout holds JSON-RPC alone")
def verbose(env):
    s = proxy(env, "stderr", options=("-v", "--"))
    s.initialize()
    s.call("echo", {"message": "x"})
    expect(s.end() == 0)
    expect(all(json.loads(line)["jsonrpc"] == "2.0" for line in s.raw), s.raw)
    expect("upstream ready" in s.stderr(), "the server's stderr is not in ours:", s.stderr()[:500])


@case("without `--`, and with options of the command itself")
def no_dashes(env):
    s = proxy(env, "good", "-v", "--config", options=())
    s.initialize()
    expect(text_of(s.call("echo", {"message": "x"})) == "x")


@case("--as names the upstream for the policy; names on the wire stay bare")
def named(env):
    s = proxy(env, "good", rules='return { rules = { { tool = "disk__echo", action = "allow" } } }', options=("--as", "disk", "--"))
    s.initialize()
    expect([t["name"] for t in s.request("tools/list")["result"]["tools"] if t["name"] in ("echo", "big", "env")] == ["echo"])
    expect(text_of(s.call("echo", {"message": "x"})) == "x")


@case("results and tool definitions pass as the bytes that came")
def bytes_kept(env):
    s = proxy(env, "good")
    s.initialize()
    s.request("tools/list")
    expect(b'"x-vendor": {"big": 9007199254740993}' in s.raw[-1] and b'"x-unknown-keyword": 1' in s.raw[-1], s.raw[-1])
    s.call("big")
    for part in (b'"text":"\\u00e9\\/"', b'"priority":1.0', b'[1e2,-0,9007199254740993]', b'{"n":9007199254740993,"f":0.10,"z":1.0,"empty":[],"none":{}}',
                 b'"unknownMember":{"a":null}', b'"vendor/x":12345678901234567890'):
        expect(part in s.raw[-1], part, "is not in", s.raw[-1])


# Typed clients send null for what was not given: (arguments as they come, as the server, the tool and the audit log get them).
NULLS = {"type": "object", "required": ["n"], "additionalProperties": False,
         "properties": {"n": {"type": ["number", "null"]}, "s": {"type": "string", "minLength": 1}, "any": {},
                        "o": {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["r"]}, "l": {"items": {"$ref": "#/properties/o"}},
                        "e": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
KEPT = ['{ "n": 1.0 }', '{"n":null}', '{"n":1,"any": null ,"e":null}', '{"e":"x", "n":9007199254740993}']
LOST = [('{"s":null,"n":1.0}', '{"n":1.0}'), ('{"n":null,"s":null}', '{"n":null}'), ('{"n": 1e2, "any":null, "s":null, "e":null}', '{"n":1e2,"any":null,"e":null}'),
        ('{"n":1,"o":{"s":null,"r":null},"l":[{"r":0,"s":null},{"s":"\\u0061","r":[null]}]}', '{"n":1,"o":{"r":null},"l":[{"r":0},{"s":"\\u0061","r":[null]}]}'),
        ('{"o":null,"n":9007199254740993,"l":[]}', '{"n":9007199254740993,"l":[]}')]
WRONG = ['{"s":null}', '{"n":1,"x":null}', '{"n":"1","s":null}', '{"n":1,"o":{"s":null}}', '{"n":1,"o":{"r":1,"s":1},"s":null}', '{"n":1,"l":[null]}']
OWN = """local null = orch.json.null
return { name = "own", description = "Its arguments", run = function(args) return { text = orch.json.encode(args) } end,
  input = orch.json.decode [==[%s]==] }
"""


def send(s, args, tool, meta=""):
    s.next_id += 1
    s.send(b'{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"%s","arguments":%s%s}}' % (s.next_id, tool.encode(), args.encode(), meta.encode()))
    return s.answer(s.next_id)


def arguments_of(line):
    return re.search(r'"arguments": ?(.*?)(,"_meta".*)?\}\}$', line.strip()).group(1)


def decisions(env):
    return [l for l in env.audit() if l["event"] == "decision"]


@case("null for an optional argument is no argument: for the server, the policy and the audit log; what the schema accepts passes as it came")
def nulls(env):
    # A rule that sees an absent member sees nil, and one that is there otherwise its value.
    rules = 'return { rules = { { tool = "cmd__raw", action = "allow", when = function(c) return c.args.s == nil end } } }'
    s = proxy(env, "raw", env.write("schema.json", json.dumps(NULLS)), rules=rules)
    s.initialize()
    for args, left in [(args, args) for args in KEPT] + LOST:
        got = text_of(send(s, args, "raw")["result"])
        expect(arguments_of(got) == left, args, "became", got, "not", left)
        send(s, left, "raw")
        asked, plain = decisions(env)[-2:]
        expect(asked["args"] == plain["args"] == json.loads(left) and asked["args_digest"] == plain["args_digest"], args, asked, plain)
    for args in WRONG:
        expect("error" in send(s, args, "raw") or s.raw[-1].count(b"bad arguments"), args, s.raw[-1])
        expect(decisions(env)[-1]["args"] == json.loads(args), decisions(env)[-1])
    expect(text_of(send(s, '{"n":1,"s":"x","e":null,"o":null}', "raw")["result"]).startswith("denied: "))
    expect(decisions(env)[-1]["args"] == {"n": 1, "s": "x", "e": None}, decisions(env)[-1])


@case("the same for a tool of one's own, which gets no null at all")
def own_nulls(env):
    env.project(tools={"own": OWN % json.dumps(NULLS)})
    s = env.session()
    s.initialize()
    for args, left in LOST:
        without = json.loads(left, object_pairs_hook=lambda members: {k: v for k, v in members if v is not None})
        expect(json.loads(text_of(send(s, args, "own")["result"])) == without, args, s.raw[-1])
        expect(decisions(env)[-1]["args"] == json.loads(left), decisions(env)[-1])


@case("_meta passes whether the arguments are rewritten, lose a null, or neither")
def meta_kept(env):
    rules = ('return { rules = { { tool = "cmd__raw", action = "allow" }, { tool = "cmd__raw", action = "allow", '
             'when = function(c) return c.args.n == 2 end, rewrite = function(args) args.s = "rewritten" return args end } } }')
    s = proxy(env, "raw", env.write("schema.json", json.dumps(NULLS)), rules=rules)
    s.initialize()
    for args in ('{"n":1}', '{"n":2}', '{"n":1,"s":null}', '{"n":2,"s":null}'):
        line = text_of(send(s, args, "raw", ',"_meta":{"vendor/x":{"deep":["%s"]}}' % ("m" * 2000))["result"])
        expect(json.loads(line)["params"]["_meta"]["vendor/x"] == {"deep": ["m" * 2000]}, args, line[-300:])
        expect(('"rewritten"' in line) == ("2" in args), line)


@case("policy stands in front: a denied call does not reach the server, the text names the rule")
def denied(env):
    rules = ('return { rules = {\n  { tool = "cmd__*", action = "allow" },\n'
             '  { tool = "cmd__echo", action = "deny", reason = "no shouting", when = function(c) return c.args.message == "LOUD" end },\n} }')
    s = proxy(env, "crash", rules=rules)
    s.initialize()
    result = s.call("echo", {"message": "LOUD"})
    expect(result.get("isError") is True and text_of(result).startswith("denied: no shouting (") and "tools.lua:3" in text_of(result), result)
    expect(result["_meta"]["orch/decision"] == "deny" and result["_meta"]["orch/call"], result)


@case("a tool that no rule allows is not listed, and denied")
def unlisted(env):
    s = proxy(env, "good", rules='return { rules = { { tool = "cmd__echo", action = "allow" } } }')
    s.initialize()
    expect([t["name"] for t in s.request("tools/list")["result"]["tools"] if t["name"] != "run_command"] == ["echo"])
    expect(text_of(s.call("env")).startswith("denied:"))


@case("a local rule without __ does not reach the server's tools")
def local_only(env):
    s = proxy(env, "good", rules='return { rules = { { tool = "echo", action = "allow" }, { tool = "e*", action = "allow" } } }')
    s.initialize()
    expect(text_of(s.call("echo", {"message": "x"})).startswith("denied:"))


@case("the server gets PATH, HOME, LANG and nothing else")
def environment(env):
    env.environ["ORCH_E2E_SECRET"] = "s3cret"
    s = proxy(env, "good")
    s.initialize()
    got = json.loads(text_of(s.call("env")))
    expect("ORCH_E2E_SECRET" not in got and got["HOME"] == env.environ["HOME"] and "PATH" in got, got)
    expect(set(got) <= {"PATH", "HOME", "LANG", "LC_CTYPE", "ORCH_DEPTH"}, sorted(got))


@case("two audit lines a call")
def audited(env):
    s = proxy(env, "good")
    s.initialize()
    s.call("echo", {"message": "x"})
    expect(s.end() == 0)
    lines = env.audit()
    decision = [l for l in lines if l["event"] == "decision"]
    expect(len(decision) == 1 and decision[0]["tool"] == "cmd__echo" and decision[0]["decision"] == "allow", lines)
    expect(len([l for l in lines if l["event"] == "outcome" and l["call"] == decision[0]["call"]]) == 1, lines)


@case("the server crashes in a call: error with exit status and stderr, in time, and orch lives")
def crash(env):
    s = proxy(env, "crash")
    s.initialize()
    s.request("tools/list")
    answer = s.request("tools/call", {"name": "echo", "arguments": {"message": "x"}})
    expect("error" in answer, answer)
    text = answer["error"]["message"] + json.dumps(answer["error"].get("data", ""))
    expect(answer["error"]["code"] == FAILED and re.search(r"status 3\b", text) and "boom: the disk is on fire" in text, answer)
    expect(s.request("ping")["result"] == {})
    answer = s.request("tools/call", {"name": "echo", "arguments": {"message": "again"}})
    expect("error" in answer or "result" in answer, answer)
    expect(s.end() == 0)


@case("eight calls in flight when the server crashes: each is answered")
def crash_many(env):
    s = proxy(env, "crash")
    s.initialize()
    ids = [s.start("tools/call", {"name": "echo", "arguments": {"message": "x"}}) for _ in range(8)]
    answers = [s.recv() for _ in ids]
    expect(sorted(a["id"] for a in answers) == ids and all(a["error"]["code"] == FAILED for a in answers), answers)


def no_start(env, argv, words, status):
    env.project('return { rules = { { tool = "cmd__*", action = "allow" } } }')
    s = env.session("--", *argv)
    try:
        s.initialize()
        answer = s.request("tools/list")
        expect("error" in answer, answer)
        text = answer["error"]["message"] + json.dumps(answer["error"].get("data", ""))
        expect(s.request("ping")["result"] == {})
    except Closed:
        expect(s.wait() == 7, "exit status", s.child.returncode)
        text = s.stderr()
    expect(all(re.search(w, text) for w in words), text)


for name, argv, words in (("is missing", ["/no/such/server"], ["/no/such/server", "No such file"]),
                          ("is not executable", ["/etc/passwd"], ["/etc/passwd", "[Pp]ermission|not executable"]),
                          ("is a folder", ["/etc"], ["/etc", "[Pp]ermission|directory|not executable"]),
                          ("exits at once", [PY, UPSTREAM, "crash-start"], [r"status 9\b", "no licence found"]),
                          ("exits at once with 0", ["/bin/true"], [r"status 0\b"]),
                          ("is killed", ["/bin/sh", "-c", "kill -9 $$"], ["signal 9|SIGKILL|Killed"])):
    case("the server %s: an error that says so" % name, argv, words, 7)(no_start)


@case("a call to a server that hangs can be cancelled, and the server is told")
def hang(env):
    s = proxy(env, "hang", env.path("cancelled"))
    s.initialize()
    s.request("tools/list")
    id = s.start("tools/call", {"name": "echo", "arguments": {"message": "x"}})
    expect(s.request("ping")["result"] == {})
    s.notify("notifications/cancelled", {"requestId": id})
    expect(s.request("ping")["result"] == {})
    until(lambda: os.path.exists(env.path("cancelled")), "notifications/cancelled at the server")
    expect(s.end() == 0)


@case("end of input while the server hangs: orch ends")
def hang_end(env):
    s = proxy(env, "hang")
    s.initialize()
    s.start("tools/call", {"name": "echo", "arguments": {"message": "x"}})
    expect(s.request("ping")["result"] == {})
    expect(s.end() == 0)


@case("end of input while a server that answers nothing starts: what was asked is answered within its time to start, then orch ends")
def silent(env):
    s = proxy(env, "silent", options=("--start-timeout", "1s", "--"))
    s.initialize()
    id = s.start("tools/list")
    s.close_input()
    expect("--start-timeout" in s.answer(id)["error"]["message"])
    expect(s.wait() == 0)


@case("a server that ignores end of input and SIGTERM, with a child: both are gone after 2 s and 3 s")
def stubborn(env):
    s = proxy(env, "nobody")
    s.initialize()
    expect(text_of(s.call("echo", {"message": "x"})) == "x")
    expect(s.end() == 0)


@case("kill -9 of orch: a server that ignores the end of its input is ended too")
def killed(env):
    s = proxy(env, "stubborn")
    s.initialize()
    s.call("echo", {"message": "x"})
    s.kill()
    left = leftovers()
    expect(not left, "left:", left)


@case("a result over 16 MiB is refused by name, the next call is served")
def flood(env):
    s = proxy(env, "flood")
    s.initialize()
    answer = s.request("tools/call", {"name": "echo", "arguments": {"message": "x"}})
    expect("error" in answer and "16777216" in json.dumps(answer["error"]), json.dumps(answer)[:400])
    expect(s.request("ping")["result"] == {})


ASK_RULES = 'return { rules = { { tool = "cmd__*", action = "allow", redact = { [[sk-\\w+]] } } } }'


def asking(env, capabilities):
    s = proxy(env, "ask", env.path("cancelled"), rules=ASK_RULES)
    s.request("initialize", {"protocolVersion": LEGACY, "capabilities": capabilities, "clientInfo": {"name": "e2e", "version": "1"}})
    s.notify("notifications/initialized")
    s.request("tools/list")
    return s


def question(s, method="elicitation/create"):
    m = s.recv()
    expect(m.get("method") == method and "id" in m, m)
    return m


def came_back(answer):
    return json.loads(text_of(answer["result"]))


@case("the server asks the client's user: forwarded as it came but for redaction, and so is the answer")
def elicit(env):
    s = asking(env, {"elicitation": {}, "sampling": {}})
    id = s.start("tools/call", {"name": "echo", "arguments": {"message": "x"}})
    q = question(s)
    expect(q["params"]["message"] == "Really? [redacted]" and q["params"]["x-big"] == 9007199254740993 and q["params"]["requestedSchema"], q)
    s.send_raw(b'{"jsonrpc":"2.0","id":%d,"result":{"action":"accept","content":{"n":9007199254740993}}}\n' % q["id"])
    expect(came_back(s.answer(id)) == {"jsonrpc": "2.0", "id": "q-1", "result": {"action": "accept", "content": {"n": 9007199254740993}}})
    id = s.start("tools/call", {"name": "echo", "arguments": {"message": "x"}})
    s.send({"jsonrpc": "2.0", "id": question(s)["id"], "error": {"code": -1, "message": "go away"}})
    got = came_back(s.answer(id))
    expect(got["id"] == "q-1" and got["error"]["code"] == -32603 and "go away" in got["error"]["message"], got)
    id = s.start("tools/call", {"name": "echo", "arguments": {"message": "sample"}})
    s.send({"jsonrpc": "2.0", "id": question(s, "sampling/createMessage")["id"],
            "result": {"role": "assistant", "model": "m", "content": {"type": "text", "text": "yes"}}})
    expect(came_back(s.answer(id))["result"]["content"]["text"] == "yes")
    expect(s.end() == 0)


@case("a client that cannot be asked: the server is told so")
def elicit_none(env):
    s = asking(env, {"sampling": {}})
    got = came_back(s.request("tools/call", {"name": "echo", "arguments": {"message": "x"}}))
    expect(got["error"]["code"] == -32601 and "elicitation" in got["error"]["message"], got)
    expect(s.end() == 0)


@case("a question is withdrawn, a call is cancelled: nobody waits for the answer")
def elicit_withdrawn(env):
    s = asking(env, {"elicitation": {}})
    id = s.start("tools/call", {"name": "echo", "arguments": {"message": "withdraw"}})
    q = question(s)
    m = s.recv()
    expect(m.get("method") == "notifications/cancelled" and m["params"]["requestId"] == q["id"], m)
    expect(text_of(s.answer(id)["result"]) == "withdrawn")
    s.send({"jsonrpc": "2.0", "id": q["id"], "result": {"action": "accept"}})
    id = s.start("tools/call", {"name": "echo", "arguments": {"message": "x"}})
    question(s)
    s.notify("notifications/cancelled", {"requestId": id})
    until(lambda: os.path.exists(env.path("cancelled")), "notifications/cancelled at the server")
    expect(s.recv()["method"] == "notifications/cancelled" and s.request("ping")["result"] == {})
    expect(s.end() == 0)


@case("a modern client gets the server's question as input_required; with two calls under way it cannot be told whose it is")
def elicit_modern(env):
    s = proxy(env, "ask", rules=ASK_RULES)
    meta = modern_meta()
    meta[META + "clientCapabilities"] = {"elicitation": {}}
    params = {"name": "echo", "arguments": {"message": "x"}, "_meta": meta}
    first = s.request("tools/call", params)["result"]
    expect(first["resultType"] == "input_required" and list(first["inputRequests"]) == ["cmd-1"], first)
    expect(first["inputRequests"]["cmd-1"]["params"]["message"] == "Really? [redacted]", first)
    answer = s.request("tools/call", {**params, "requestState": first["requestState"], "inputResponses": {"cmd-1": {"action": "decline"}}})
    expect(answer["result"]["resultType"] == "complete" and came_back(answer)["result"] == {"action": "decline"}, answer)
    first = s.request("tools/call", params)["result"]
    expect(first["resultType"] == "input_required", first)
    second = s.request("tools/call", {**params, "arguments": {"message": "y"}})
    expect("several calls" in came_back(second)["error"]["message"], second)
    answer = s.request("tools/call", {**params, "requestState": first["requestState"], "inputResponses": {"cmd-1": {"action": "cancel"}}})
    expect(came_back(answer)["result"] == {"action": "cancel"}, answer)
    expect(s.end() == 0)


def modern_only(env, *options):
    s = proxy(env, "modern", env.path("cancelled"), rules=ASK_RULES, options=(*options, "--"))
    s.request("initialize", {"protocolVersion": LEGACY, "capabilities": {"elicitation": {}, "sampling": {}}, "clientInfo": {"name": "e2e", "version": "1"}})
    s.notify("notifications/initialized")
    return s


@case("a server of the modern era alone, in front of a legacy client: bytes, progress, cancelling, its list changed")
def modern_server(env):
    s = modern_only(env)
    tools = s.request("tools/list")["result"]["tools"]
    expect({"echo", "ask", "grow"} <= {t["name"] for t in tools} and b'"x-vendor": {"big": 9007199254740993}' in s.raw[-1], s.raw[-1])
    expect(text_of(s.call("echo", {"message": "é\u2028"})) == "é\u2028")
    s.call("big")
    expect(b"resultType" not in s.raw[-1] and b'[1e2,-0,9007199254740993]' in s.raw[-1], s.raw[-1])
    id = s.start("tools/call", {"name": "steps", "arguments": {"a": 1}, "_meta": {"progressToken": "t", "vendor/x": 1}})
    sent = json.loads(text_of(s.answer(id)["result"]))["params"]
    expect([n["params"]["progress"] for n in s.notes if n["method"] == "notifications/progress" and n["params"]["progressToken"] == "t"] == [1, 2, 3], s.notes)
    expect(sent["_meta"]["vendor/x"] == 1 and sent["_meta"]["progressToken"] != "t" and sent["_meta"][META + "clientInfo"]["name"] == "orch", sent)
    id = s.start("tools/call", {"name": "hold", "arguments": {}})
    expect(s.request("ping")["result"] == {})
    s.notify("notifications/cancelled", {"requestId": id})
    until(lambda: os.path.exists(env.path("cancelled")), "notifications/cancelled at the server")
    s.notes.clear()
    s.call("grow")
    note = s.notes.pop() if s.notes else s.recv()
    expect(note["method"] == "notifications/tools/list_changed", note)
    expect("grown" in [t["name"] for t in s.request("tools/list")["result"]["tools"]])
    expect(s.end() == 0)


@case("the same for a modern client")
def modern_both(env):
    s = proxy(env, "modern", env.path("cancelled"))
    expect("echo" in [t["name"] for t in s.request("tools/list", modern=True)["result"]["tools"]])
    result = s.call("big", modern=True)
    expect(result["resultType"] == "complete" and s.raw[-1].count(b"resultType") == 1 and result["unknownMember"] == {"a": None}, s.raw[-1])
    expect(s.end() == 0)


@case("what a modern server wants to know is asked of a legacy client by requests, and goes back with the server's state; a refusal ends the call")
def modern_asks(env):
    s = modern_only(env)
    s.request("tools/list")
    for refused in (False, True):
        id = s.start("tools/call", {"name": "ask", "arguments": {"a": 1}})
        asked = {}
        while len(asked) < 2:
            q = s.recv()
            asked[q["method"]] = q
        expect(asked["elicitation/create"]["params"]["requestedSchema"] and asked["sampling/createMessage"]["params"]["maxTokens"] == 10, asked)
        s.send({"jsonrpc": "2.0", "id": asked["elicitation/create"]["id"], "result": {"action": "accept", "content": {"n": 7}}})
        if refused:
            s.send({"jsonrpc": "2.0", "id": asked["sampling/createMessage"]["id"], "error": {"code": -1, "message": "go away"}})
            error = s.answer(id)["error"]
            expect(error["code"] == FAILED and "asks for what cannot be had" in error["message"] and "go away" in error["message"], error)
        else:
            s.send({"jsonrpc": "2.0", "id": asked["sampling/createMessage"]["id"], "result": {"role": "assistant", "model": "m", "content": {"type": "text", "text": "yes"}}})
            params = json.loads(text_of(s.answer(id)["result"]))["params"]
            expect(params["requestState"] == "st\u00e9" and params["arguments"] == {"a": 1}, params)
            expect(params["inputResponses"]["who"] == {"action": "accept", "content": {"n": 7}} and params["inputResponses"]["what"]["content"]["text"] == "yes", params)
    expect(s.end() == 0)


@case("and of a modern client as input_required, all of it at once")
def modern_asks_modern(env):
    s = proxy(env, "modern", env.path("cancelled"))
    meta = modern_meta()
    meta[META + "clientCapabilities"] = {"elicitation": {}, "sampling": {}}
    params, answers, state = {"name": "ask", "arguments": {"a": 1}, "_meta": meta}, {}, {}
    for _ in range(3):
        result = s.request("tools/call", {**params, **state})["result"]
        if result["resultType"] == "complete":
            break
        for key, q in result["inputRequests"].items():
            answers[key] = {"action": "decline"} if q["method"] == "elicitation/create" else {"role": "assistant", "model": "m", "content": {"type": "text", "text": "no"}}
        state = {"requestState": result["requestState"], "inputResponses": answers}
    got = json.loads(text_of(result))["params"]["inputResponses"]
    expect(got["who"] == {"action": "decline"} and got["what"]["content"]["text"] == "no", got)
    expect(s.end() == 0)


@case("one message is one line, whatever its reader takes for a line's end: no call slips past the policy inside another")
def one_line_each(env):
    seen = env.path("lines")
    s = proxy(env, "lines", seen, rules='return { rules = { { tool = "cmd__echo", action = "allow" }, { tool = "cmd__big", action = "allow" } } }')
    s.request("initialize", {"protocolVersion": LEGACY, "capabilities": {"elicitation": {}}, "clientInfo": {"name": "e2e", "version": "1"}})
    s.notify("notifications/initialized")
    s.request("tools/list")
    smuggled = '{"jsonrpc":"2.0","id":77,"method":"tools/call","params":{"name":"env","arguments":{}}}'
    for end in ("\u0085", "\u2028", "\u2029"): # inside a string
        message = json.dumps({"message": end + smuggled + end}, ensure_ascii=False)
        s.send_raw(('{"jsonrpc":"2.0","id":9,"method":"tools/call","params":{"name":"echo","arguments":%s}}\n' % message).encode())
        q = question(s)
        s.send({"jsonrpc": "2.0", "id": q["id"], "result": {"action": "accept", "content": {"n": 1, "text": end + smuggled + end}}})
        expect(came_back(s.answer(9))["result"]["content"]["text"] == end + smuggled + end)
    between = '\r%s\r' % smuggled # and between tokens
    s.send_raw(('{"jsonrpc":"2.0","id":10,"method":"tools/call","params":{"name":"echo","arguments":{"message":"x","a":%s},"_meta":{"b":%s}}}\n' % (between, between)).encode())
    q = question(s)
    s.send_raw(('{"jsonrpc":"2.0","id":%d,"result":{"action":"accept","content":{"a":%s}}}\n' % (q["id"], between)).encode())
    expect(came_back(s.answer(10))["result"]["content"]["a"]["id"] == 77)
    expect(text_of(s.call("big")) == "a\x85b\u2028c\u2029d")
    expect(len(s.raw[-1].decode().splitlines()) == 1 and b"\r" not in s.raw[-1], s.raw[-1])
    expect(s.end() == 0)
    with open(seen) as f:
        messages = [json.loads(json.loads(line)) for line in f]
    names = [m["params"]["name"] for m in messages if m.get("method") == "tools/call"]
    expect(names == ["echo"] * 4 + ["big"], names)
    expect(all(line["tool"] in ("cmd__echo", "cmd__big") for line in env.audit() if line["event"] == "decision") and
           env.orch("audit", "verify", config=True).status == 0)


@case("CMD without a configuration: exit 6 and a tools.lua to paste")
def unconfigured(env):
    r = run([ORCH, "mcp", "stdio", "--", PY, UPSTREAM, "good"], env.environ, env.path("p"))
    expect(r.status == 6 and "cmd__*" in r.err and "tools.lua" in r.err and r.out == "", r)


if __name__ == "__main__":
    main()
