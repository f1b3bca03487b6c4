# The audit log: two lines a call, its fields, its chain, what verify finds.
# as: user asan
import hashlib, json, re, signal

from orch_e2e import *

RULES = """return { rules = {
  { tool = "echo", action = "allow", redact = { [[sk-\\w+]] } },
  { tool = "echo", action = "deny", reason = "no", when = function(c) return c.args.message == "deny" end },
  { tool = "echo", action = "ask", when = function(c) return c.args.message == "ask" end },
} }
"""


def session(env, messages=("one", "deny", "ask", "key sk-abcdef123 end")):
    """A finished session with one call for each message; its audit lines."""
    s = env.project(RULES).session()
    s.initialize()
    for message in messages:
        s.call("echo", {"message": message})
    expect(s.end() == 0)
    return env.audit()


def verify(env, *args):
    return env.orch("audit", "verify", *args, config=True)


@case("two lines a call, in order, with the fields of the contract")
def two_lines(env):
    lines = session(env)
    calls = {}
    for line in lines:
        if "call" in line and line["event"] in ("decision", "outcome"):
            calls.setdefault(line["call"], []).append(line)
    expect(len(calls) == 4, lines)
    for pair, decided in zip(calls.values(), ("allow", "deny", "deny|ask", "allow")):
        expect([l["event"] for l in pair] == ["decision", "outcome"], pair)
        decision, outcome = pair
        expect(re.fullmatch(decided, decision["decision"]), decision)
        for field in ("ts", "seq", "session", "caller", "tool", "args", "args_digest", "rules", "generation", "prev", "hash"):
            expect(field in decision, field, "is missing in", decision)
        expect(decision["tool"] == "echo" and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", decision["ts"]), decision)
        expect(re.fullmatch("[0-9a-f]{64}", decision["args_digest"]) and re.fullmatch("[0-9a-f]{64}", decision["generation"]), decision)
        expect(any(re.search(r"tools\.lua:\d+$", r) for r in decision["rules"]), decision["rules"])
        result = outcome["result"]
        expect(isinstance(outcome["ms"], (int, float)) and isinstance(result["bytes"], int) and re.fullmatch("[0-9a-f]{64}", result["sha256"]), outcome)
        expect(result["is_error"] == (decided != "allow"), outcome)
    expect(next(iter(calls.values()))[0]["args"] == {"message": "one"})


@case("every rule that matched is named with its line")
def rules_named(env):
    lines = session(env, ["deny"])
    decision = next(l for l in lines if l["event"] == "decision")
    expect({r.rsplit(":", 1)[1] for r in decision["rules"]} >= {"3"}, decision["rules"])


@case("what a redact pattern matches is neither in the log nor in the result")
def redacted(env):
    s = env.project(RULES).session()
    s.initialize()
    text = text_of(s.call("echo", {"message": "key sk-abcdef123 end"}))
    expect("sk-abcdef123" not in text and text.startswith("key ") and text.endswith(" end"), text)
    expect(s.end() == 0)
    with open(env.audit_file(), "rb") as f:
        expect(b"sk-abcdef123" not in f.read(), "the secret is in the log")


@case("equal arguments have equal digests, whatever their spelling")
def digests(env):
    s = env.project().session()
    s.initialize()
    for args in ('{"message":"\\u0061b"}', '{ "message" : "ab" }', '{"message":"abc"}'):
        s.send(('{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":%s}}' % args).encode())
        s.answer(1)
    expect(s.end() == 0)
    d = [l["args_digest"] for l in env.audit() if l["event"] == "decision"]
    expect(d[0] == d[1] != d[2], d)


@case("the chain can be checked by anyone: prev, hash, seq")
def chain(env):
    session(env)
    prev, seq = "0" * 64, None
    with open(env.audit_file(), "rb") as f:
        for line in f.read().splitlines():
            parsed = json.loads(line)
            body = line[:line.rindex(b',"hash"')]
            expect(parsed["prev"] == prev and parsed["hash"] == hashlib.sha256(body).hexdigest(), line)
            expect(seq is None or parsed["seq"] == seq + 1, line)
            prev, seq = parsed["hash"], parsed["seq"]
    with open(env.audit_file() + ".head") as f:
        head = json.load(f)
    expect(head["seq"] == seq and head["hash"] == prev and head["hmac"], head)


@case("verify: ok; the file is 0600; tail and show print")
def verify_ok(env):
    lines = session(env)
    r = verify(env)
    expect(r.status == 0 and str(len(lines)) in r.out, r)
    expect(os.stat(env.audit_file()).st_mode & 0o777 == 0o600, oct(os.stat(env.audit_file()).st_mode))
    r = env.orch("audit", "tail", config=True)
    expect(r.status == 0 and "echo" in r.out, r)
    call = next(l["call"] for l in lines if l["event"] == "decision")
    r = env.orch("audit", "show", str(call), config=True)
    expect(r.status == 0 and "echo" in r.out and "allow" in r.out, r)


def change(old, new):
    return lambda lines: [line.replace(old, new) for line in lines]


TAMPER = [
    ("an argument changed", change(b'"one"', b'"two"')),
    ("a decision changed", change(b'"decision":"deny"', b'"decision":"allow"')),
    ("a line removed", lambda lines: lines[:2] + lines[3:]),
    ("the first line removed", lambda lines: lines[1:]),
    ("the last line removed", lambda lines: lines[:-1]),
    ("two lines exchanged", lambda lines: [lines[1], lines[0]] + lines[2:]),
    ("a line doubled", lambda lines: lines[:3] + lines[2:]),
    ("white space added", lambda lines: [lines[0].replace(b",", b", ", 1)] + lines[1:]),
    ("the last line cut", lambda lines: lines[:-1] + [lines[-1][:-20]]),
    ("everything removed", lambda lines: []),
]


def tampered(env, how):
    session(env)
    path = env.audit_file()
    with open(path, "rb") as f:
        lines = f.read().splitlines()
    with open(path, "wb") as f:
        f.write(b"".join(line + b"\n" for line in how(lines)))
    r = verify(env)
    expect(r.status == 1 and os.path.basename(path) in r.out + r.err, r)


for name, how in TAMPER:
    case("verify finds: " + name, how)(tampered)


@case("verify: a line forged with a right hash is after the end, and unsigned; a head kept elsewhere is looked for")
def forged(env):
    lines = session(env)
    last = lines[-1]
    body = b'{"ts":"2026-01-01T00:00:00Z","seq":%d,"event":"outcome","prev":"%s"' % (last["seq"] + 1, last["hash"].encode())
    with open(env.audit_file(), "ab") as f:
        f.write(body + b',"hash":"%s"}\n' % hashlib.sha256(body).hexdigest().encode())
    r = verify(env)
    expect(r.status == 1 and "unsigned" in r.out, r)
    with open(env.audit_file(), "r+b") as f:
        f.seek(-len(body) - 76, os.SEEK_END)
        f.truncate()
    r = verify(env, "--head", last["hash"].upper())
    expect(r.status == 0 and "the hash is there" in r.out.splitlines()[-1], r)
    r = verify(env, "--head", "0" * 64)
    expect(r.status == 1 and "NOT there" in r.out.splitlines()[-1], r)


@case("kill -9 in the middle: what is there verifies, and the next process starts a file of its own")
def killed(env):
    s = env.project(RULES).session()
    s.initialize()
    for _ in range(50):
        s.call("echo", {"message": "x"})
    s.kill()
    lines = env.audit()
    expect(len([l for l in lines if l["event"] == "outcome"]) == 50, len(lines))
    r = verify(env)
    expect(r.status == 0, r)
    session(env, ["x"])
    expect(len([n for n in os.listdir(env.path("p/audit")) if n.endswith(".jsonl")]) == 2)
    expect(verify(env).status == 0, verify(env))


@case("no room for the outcome: the call is not run, and says so")
def full(env):
    env.project(RULES)
    s = env.session(argv=["/bin/sh", "-c", 'ulimit -f 24; exec "$@"', "sh"] + env.argv("mcp", "stdio"))
    s.initialize()
    texts = [text_of(s.call("echo", {"message": "x" * 500})) for _ in range(40)]
    expect(texts[0] == "x" * 500 or texts[0].startswith("not run: "), texts[0])
    expect(texts[-1].startswith(("not run: ", "denied: ")) and "audit" in texts[-1], texts[-1])
    expect(s.request("ping")["result"] == {})


@case("an audit folder that cannot be made: nothing starts")
def no_folder(env):
    env.project(more="")
    env.write("orchestrator.lua", 'return { policies = "policies", tools = { "lua/tools" }, audit = { dir = "/proc/nowhere/audit" } }')
    s = env.session()
    status = s.end()
    expect(status != 0 and "/proc/nowhere" in s.stderr(), status, s.stderr())


@case("caller and session are named; two sessions differ")
def sessions(env):
    session(env, ["x"])
    session(env, ["x"])
    decisions = [l for l in env.audit() if l["event"] == "decision"]
    expect(len({d["session"] for d in decisions}) == 2, decisions)
    expect(all(str(os.geteuid()) in json.dumps(d["caller"]) for d in decisions), decisions[0]["caller"])


# ---- what cannot be recorded is not run

def decisions(env):
    return [l for l in env.audit() if l["event"] == "decision"]


def longest(args):
    return max((len(v) for v in args.values() if isinstance(v, str)), default=0)


# arguments as bytes; what the log must hold of them
HIDING = [
    ("white space around them", b'{"message":"ls"' + b" " * 70000 + b"}", lambda d: d["args"] == {"message": "ls"}),
    ("white space between them", b'{' + b"\t" * 70000 + b'"message" :\n\r "ls"}'.replace(b"\n\r", b"  "), lambda d: d["args"] == {"message": "ls"}),
    ("a long string beside them", b'{"message":"ls","x":"' + b"y" * 200000 + b'"}',
     lambda d: d["args"]["message"] == "ls" and d["args"]["x"] == "y" * 4096
     and d["args_cut"] == [{"at": "/x", "bytes": 200000, "sha256": hashlib.sha256(b"y" * 200000).hexdigest()}]),
    ("a long string itself", b'{"message":"' + b"z" * 300000 + b'"}',
     lambda d: d["args_cut"] == [{"at": "/message", "bytes": 300000, "sha256": hashlib.sha256(b"z" * 300000).hexdigest()}]),
    ("escapes, each six bytes for one", b'{"message":"' + b"\\u0041" * 30000 + b'"}',
     lambda d: d["args"]["message"] == "A" * 4096 and d["args_cut"][0]["bytes"] == 30000),
    ("characters of four bytes, cut between two", '{"message":"a'.encode() + "\U0001f600".encode() * 20000 + b'"}',
     lambda d: d["args"]["message"].startswith("a\U0001f600") and len(d["args"]["message"].encode()) == 4093 and d["args_cut"][0]["bytes"] == 80001),
    ("many strings of some length", b'{"message":"ls",' + b",".join(b'"k%d":"%s"' % (i, b"v" * 3000) for i in range(100)) + b"}",
     lambda d: d["args"]["message"] == "ls" and len(d["args_cut"]) == 100 and longest(d["args"]) == 256),
    ("deep within", b'{"message":"ls","a":{"b~/c":[1,{"d":"' + b"w" * 9000 + b'"}]}}',
     lambda d: [c["at"] for c in d["args_cut"]] == ["/a/b~0~1c/1/d"]),
    ("what looks like a cut and is none", b'{"message":"ls","args_cut":[{"at":"/message","bytes":1}]}',
     lambda d: "args_cut" not in d and d["args"]["args_cut"] == [{"at": "/message", "bytes": 1}]),
    ("line ends that some readers see", '{"message":"l\u2028s\u0085\u2029"}'.encode(), lambda d: d["args"] == {"message": "l\u2028s\u0085\u2029"}),
]


@case("arguments that run are in the log, whatever is around them: compact, long strings cut, told beside")
def hiding(env):
    s = env.project(tools={"echo": ECHO.replace(', required = { "message" }', "")}).session()
    s.initialize()
    for what, args, _ in HIDING:
        s.send(b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":%s}}' % args)
        result = s.answer(7)["result"]
        expect(not result.get("isError"), what, text_of(result)[:200])
    expect(s.end() == 0)
    found = decisions(env)
    for (what, _, good), d in zip(HIDING, found):
        expect(d["decision"] == "allow" and good(d), what, str(d)[:600])
    with open(env.audit_file(), "rb") as f:
        expect(max(len(l) for l in f) < 80000, "a long line")
    expect(verify(env).status == 0, verify(env))


# arguments that cannot be recorded
UNRECORDABLE = [
    ("too many members", b'{"message":"ls",' + b",".join(b'"k%d":%d' % (i, i) for i in range(20000)) + b"}", "too many bytes"),
    ("too many elements", b'{"message":"ls","a":[' + b",".join([b"12345678"] * 20000) + b"]}", "too many bytes"),
    ("a long name", b'{"message":"ls","' + b"n" * 70000 + b'":1}', "too many bytes"),
    ("many long names", b'{"message":"ls",' + b",".join(b'"%s%d":0' % (b"n" * 900, i) for i in range(100)) + b"}", "too many bytes"),
    ("many strings to cut", b'{"message":"ls","a":[' + b",".join([b'"%s"' % (b"s" * 5000)] * 400) + b"]}", "too many bytes"),
    ("a redact pattern at its limit", b'{"message":"' + b"a" * 60000 + b'"}', "match limit"),
    ("the same in a name", b'{"message":"ls","' + b"a" * 60000 + b'":1}', "match limit"),
    ("the same deep within", b'{"message":"ls","x":[[{"y":"' + b"a" * 60000 + b'"}]]}', "match limit"),
    ("the same among white space", b'{"message":"ls","x":"' + b"a" * 60000 + b'"' + b" " * 70000 + b"}", "match limit"),
    ("its time, by many strings", b'{"message":"ls","x":[' + b",".join([b'"%s!"' % (b"a" * 13)] * 5000) + b"]}", "match limit"),
    ("the same by escapes", b'{"message":"' + b"\\u0061" * 30000 + b'"}', "match limit"),
]
TOUCH = """return { name = "echo", description = "", input = { type = "object", properties = { message = { type = "string" } } },
  run = function(args) orch.log.warn("RAN") return { text = "ran" } end }
"""


@case("arguments that cannot be recorded are not run: said to the client, and in the log")
def unrecordable(env):
    rules = 'return { rules = { { tool = "echo", action = "allow", redact = { "(a+\\\\s?)+[:;]" } } } }\n'
    s = env.project(rules, tools={"echo": TOUCH}).session()
    s.initialize()
    for what, args, why in UNRECORDABLE:
        s.send(b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":%s}}' % args)
        result = s.answer(7)["result"]
        expect(text_of(result).startswith("not run: its arguments cannot be recorded: ") and why in text_of(result), what, text_of(result)[:300])
        expect(result["_meta"]["orch/decision"] == "deny", what, result["_meta"])
    expect(text_of(s.call("echo", {"message": "ls"})) == "ran")
    expect(s.end() == 0)
    expect(s.stderr().count("RAN") == 1, s.stderr()[:500])
    found = decisions(env)
    expect(len(found) == len(UNRECORDABLE) + 1)
    for (what, args, why), d in zip(UNRECORDABLE, found):
        expect(d["decision"] == "deny" and d["args"] is None and d["args_bytes"] == len(args) and why in d["reason"], what, str(d)[:600])
        expect(re.fullmatch("[0-9a-f]{64}", d["args_digest"]), d)
    expect(verify(env).status == 0, verify(env))


# arguments two of whose names become one when they are redacted
POISON = [
    ("two", '{"sk-a":1,"sk-b":2}', {"[redacted]": 1, "[redacted] (2)": 2}),
    ("three, not in a row", '{"sk-a":1,"m":0,"sk-b":2,"n":0,"sk-c":3}', {"[redacted]": 1, "m": 0, "[redacted] (2)": 2, "n": 0, "[redacted] (3)": 3}),
    ("one, beside the word itself", '{"[redacted]":1,"sk-b":2}', {"[redacted]": 1, "[redacted] (2)": 2}),
    ("the word itself behind it", '{"sk-b":2,"[redacted]":1}', {"[redacted] (2)": 2, "[redacted]": 1}),
    ("the next name is taken too", '{"sk-a":1,"[redacted] (2)":7,"sk-b":2}', {"[redacted]": 1, "[redacted] (2)": 7, "[redacted] (3)": 2}),
    ("parts of names", '{"xsk-ay":1,"xsk-by":2}', None),
    ("in an object in an array", '{"a":[{"sk-a":1,"sk-b":{"sk-c":1,"sk-d":2}}]}',
     {"a": [{"[redacted]": 1, "[redacted] (2)": {"[redacted]": 1, "[redacted] (2)": 2}}]}),
    ("written with escapes", '{"\\u0073k-a":1,"sk\\u002db":2,"\\u005bredacted\\u005d":3}', {"[redacted] (2)": 1, "[redacted] (3)": 2, "[redacted]": 3}),
    ("the same in two objects", '{"a":{"sk-a":1},"b":{"sk-a":1}}', {"a": {"[redacted]": 1}, "b": {"[redacted]": 1}}),
    ("a hundred", "{" + ",".join('"sk-%d":%d' % (i, i) for i in range(100)) + "}", None),
]


@case("names that differ still differ when they are redacted, in the log and in results")
def poison(env):
    tool = """return { name = "echo", description = "", input = { type = "object" }, output = { type = "object" },
      run = function(args) return { structured = args } end }"""
    rules = 'return { rules = { { tool = "echo", action = "allow", redact = { [[sk-\\w+]] } } } }\n'
    s = env.project(rules, tools={"echo": tool}).session()
    s.initialize()
    results = []
    for what, args, _ in POISON:
        s.send(b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":%s}}' % args.encode())
        results.append(s.answer(7))
    expect(s.end() == 0)
    pairs = []
    json.loads(b"[" + b",".join(l for l in s.raw if b'"id":7' in l) + b"]", object_pairs_hook=lambda p: pairs.append(p) or dict(p))
    with open(env.audit_file()) as f:
        json.loads("[" + ",".join(f.read().splitlines()) + "]", object_pairs_hook=lambda p: pairs.append(p) or dict(p))
    for p in pairs:
        expect(len({k for k, _ in p}) == len(p), "two names are one:", str(p)[:300])
    for (what, _, want), d, r in zip(POISON, decisions(env), results):
        expect(want is None or d["args"] == want, what, d["args"])
        expect(want is None or r["result"]["structuredContent"].keys() == want.keys(), what, r)
        expect("sk-" not in json.dumps([d["args"], r["result"]["structuredContent"]]), what, d["args"], r)
    expect(verify(env).status == 0, verify(env))


# ---- calls that are denied do not fill the disk

DENIED = [
    ("by a rule", "echo", lambda i: {"message": "deny", "x": "y" * 60000}),
    ("asked about", "echo", lambda i: {"message": "ask", "x": "y" * 60000}),
    ("bad arguments", "echo", lambda i: {"message": [i] * 9000}),
    ("an unknown tool", "n" * 9000, lambda i: {"message": "x" * 60000}),
    ("an argument that a predicate quotes", "echo", lambda i: {"message": "quote", "x": "q" * 60000}),
    ("many names", "echo", lambda i: {"message": "deny", **{"k%d" % k: k for k in range(9000)}}),
]
FLOOD = """return { rules = {
  { tool = "echo", action = "allow" },
  { tool = "echo", action = "deny", when = function(c) return c.args.message == "deny" end },
  { tool = "echo", action = "ask", when = function(c) return c.args.message == "ask" end },
  { tool = "echo", action = "deny", when = function(c) if c.args.message == "quote" then error(c.args.x) end end },
} }
"""
EACH = 60


@case("denied again and again: small records, then a number; what is allowed is recorded all the same")
def flood(env):
    s = env.project(FLOOD).session()
    s.initialize()
    for _, tool, args in DENIED:
        for i in range(EACH):
            answer = s.request("tools/call", {"name": tool, "arguments": args(i)})
            expect("error" in answer or answer["result"]["isError"], answer)
        expect(text_of(s.call("echo", {"message": "good"})) == "good")
    expect(s.end() == 0)
    lines = env.audit()
    denied = [l for l in decisions(env) if l["decision"] != "allow"]
    counted = sum(l["count"] for l in lines if l["event"] == "denied")
    expect(counted > 0 and len(denied) + counted == EACH * len(DENIED), len(denied), counted)
    expect(len([l for l in decisions(env) if l["decision"] == "allow"]) == len(DENIED))
    expect(len({l["call"] for l in lines if l["event"] == "outcome"}) == len(decisions(env)))
    for l in lines:
        if l["event"] == "denied":
            expect(str(os.geteuid()) in l["caller"] and re.match(r"\d{4}-", l["since"]), l)
    with open(env.audit_file(), "rb") as f:
        text = f.read().splitlines()
    expect(max(map(len, text)) < 8000 and sum(map(len, text)) < 400 * 1024, max(map(len, text)), sum(map(len, text)))
    expect(verify(env).status == 0, verify(env))


# ---- a log that is lost while orch runs

LOSSES = [
    ("removed", lambda path: os.unlink(path)),
    ("renamed", lambda path: os.rename(path, path + ".1")),
    ("renamed, an empty one made", lambda path: (os.rename(path, path + ".1"), open(path, "w").close())),
    ("all files of the folder removed", lambda path: [os.unlink(os.path.join(os.path.dirname(path), n)) for n in os.listdir(os.path.dirname(path))]),
    ("its folder removed", lambda path: shutil.rmtree(os.path.dirname(path))),
    ("its folder renamed", lambda path: os.rename(os.path.dirname(path), os.path.dirname(path) + ".old")),
    ("linked elsewhere, and removed", lambda path: (os.link(path, path + ".1"), os.unlink(path))),
]


def losing(env, lose):
    """The next call after it, at once, is in a file that has a name, which says what happened."""
    s = env.project().session()
    s.initialize()
    for k in range(3):
        expect(text_of(s.call("echo", {"message": "before %d" % k})) == "before %d" % k)
    path = env.audit_file()
    lose(path)
    expect(text_of(s.call("echo", {"message": "after"})) == "after")
    lines = env.audit()
    after = [l for l in lines if l["event"] == "decision" and l["args"]["message"] == "after"]
    expect(len(after) == 1, lines)
    starts = [l for l in lines if l["event"] == "start" and "lost" in l]
    expect(len(starts) == 1 and starts[0]["lost"]["file"] == os.path.basename(path) and starts[0]["why"], lines)
    expect(s.end() == 0)
    expect("the log goes on in a new file" in s.stderr(), s.stderr())
    r = verify(env)
    expect(r.status == 1 and os.path.basename(path) in r.out.splitlines()[-1], r)


for name, lose in LOSSES:
    case("the log goes on in a new file when it was " + name, lose)(losing)


@case("a log that was removed, and no new one can be made: not run, until it can")
def losing_place(env):
    s = env.project().session()
    s.initialize()
    expect(text_of(s.call("echo", {"message": "a"})) == "a")
    folder = env.path("p/audit")
    shutil.rmtree(folder)
    open(folder, "w").close()
    for _ in range(3):
        text = text_of(s.call("echo", {"message": "b"}))
        expect(text.startswith("not run: audit file ") and "removed" in text, text)
    os.unlink(folder)
    expect(text_of(s.call("echo", {"message": "c"})) == "c")
    expect([l["args"]["message"] for l in decisions(env)] == ["c"], env.audit())
    expect(s.end() == 0)


# ---- the folder as a whole, from outside

@case("commands that fail, and those that log nothing, leave no file")
def empty(env):
    env.project()
    env.orch("mcp", "stdio", config=True)
    env.orch("vm", "run", "--image", "nosuch", "--", "true", config=True)
    folder = env.path("p/audit")
    expect(not os.path.isdir(folder) or os.listdir(folder) == [], os.listdir(folder) if os.path.isdir(folder) else "")
    r = verify(env)
    expect(r.status == 1 and "no audit log" in r.err, r)


@case("verify: one summary at the end; a missing file, a head alone, a file without head are found")
def whole(env):
    for _ in range(4):
        session(env, ["x"])
    r = verify(env)
    expect(r.status == 0 and r.out.splitlines()[-1].startswith("good: 4 files, ") and len(r.out.splitlines()) == 5, r)
    folder = env.path("p/audit")
    names = sorted(n for n in os.listdir(folder) if n.endswith(".jsonl"))
    for remove in ([names[1], names[1] + ".head"], [names[3], names[3] + ".head"], [names[2]], [names[0] + ".head"]):
        kept = {n: open(os.path.join(folder, n), "rb").read() for n in remove}
        for n in remove:
            os.unlink(os.path.join(folder, n))
        r = verify(env)
        expect(r.status == 1 and r.out.splitlines()[-1].startswith("BROKEN: ") and remove[0].replace(".head", "") in r.out.splitlines()[-1], remove, r)
        for n, text in kept.items():
            with open(os.path.join(folder, n), "wb") as f:
                f.write(text)
        expect(verify(env).status == 0, verify(env))


@case("kill -9 in the middle of a line is named as that, and is no fault")
def crash(env):
    s = env.project(RULES).session()
    s.initialize()
    s.call("echo", {"message": "x"})
    s.kill()
    with open(env.audit_file(), "ab") as f:
        f.write(b'{"ts":"2026-01-01T00:00:00.000Z","se')
    s = env.session()
    s.initialize()
    s.call("echo", {"message": "x"})
    expect(s.end() == 0)
    r = verify(env)
    expect(r.status == 0 and "ended by a crash, in the middle of a last line (36 bytes)" in r.out and "1 ended by a crash" in r.out.splitlines()[-1], r)


@case("audit.keep: old files are removed, and what is left says so and verifies")
def keep(env):
    for _ in range(3):
        session(env, ["x"])
    env.project(RULES)
    env.write("orchestrator.lua", 'return { policies = "policies", tools = { "lua/tools" }, audit = { dir = "audit", keep = "7d" } }\n')
    folder = env.path("p/audit")
    names = sorted(n for n in os.listdir(folder) if n.endswith(".jsonl"))
    for n in names[:2]:
        os.utime(os.path.join(folder, n), (0, 0))
    s = env.session()
    s.initialize()
    s.call("echo", {"message": "new"})
    expect(s.end() == 0)
    left = sorted(n for n in os.listdir(folder) if n.endswith(".jsonl"))
    expect(left[0] == names[2] and len(left) == 2, left)
    r = verify(env)
    expect(r.status == 0 and names[1] in r.out.splitlines()[-1], r)
    prune = [l for l in env.audit() if l["event"] == "prune"]
    expect(len(prune) == 1 and prune[0]["files"] == 2 and prune[0]["until"]["file"] == names[1], prune)
    os.unlink(os.path.join(folder, names[2]))
    expect(verify(env).status == 1, verify(env))


# ---- what a person reads

def told(env, *args):
    r = env.orch("audit", *args, config=True)
    expect(r.status == 0, r)
    return r.out.splitlines()


@case("show and tail: one line a call; --since, --denied, --tool, --session, --caller")
def filters(env):
    more = RULES.replace('  { tool = "echo", action = "allow"', '  { tool = "ec*o2", action = "allow" },\n  { tool = "echo", action = "allow"', 1)
    env.project(more, tools={"echo": ECHO, "echo2": ECHO.replace('"echo"', '"echo2"')})
    s = env.session()
    s.initialize()
    for m in ("one", "deny", "key sk-abcdef123"):
        s.call("echo", {"message": m})
    s.call("echo2", {"message": "two"})
    expect(s.end() == 0)
    s = env.session()
    s.initialize()
    s.call("echo", {"message": "three"})
    expect(s.end() == 0)
    first, second = sorted({l["session"] for l in decisions(env)}, key=lambda x: [l["session"] for l in decisions(env)].index(x))
    lines = told(env, "show")
    expect(len(lines) == 5, lines)
    for word in (" uid:%d " % os.geteuid(), "  echo  ", "  allow  ", "policies/tools.lua:3", " ms  ", "  ok, ", '{"message":"one"}'):
        expect(word in lines[0], word, lines[0])
    expect(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  ", lines[0]), lines[0])
    expect("  deny  " in lines[1] and "  no (policies/tools.lua:4)  " in lines[1], lines[1])
    table = [
        (["--denied"], 1), (["--tool", "echo"], 4), (["--tool", "echo*"], 5), (["--tool", "e.ho"], 0), (["--tool", "*2"], 1),
        (["--session", first], 4), (["--session", second], 1), (["--session", "nobody"], 0), (["--caller", "uid:"], 5),
        (["--caller", "nobody"], 0), (["--since", "1h"], 5), (["--since", "2000-01-01"], 5), (["--since", "2999-01-01T10:30"], 0),
        (["--since", "7d", "--denied", "--tool", "echo2"], 0), (["--session", first, "--denied"], 1),
    ]
    for args, n in table:
        expect(len(told(env, "show", *args)) == n, args, told(env, "show", *args))
        calls = [l for l in told(env, "tail", "-n", "100", *args) if "  echo" in l]
        expect(len(calls) == n, args, calls)
        expect(len(told(env, "show", "--json", *args)) == 2 * n, args)
    expect(len(told(env, "tail", "-n", "2", "--tool", "echo")) == 2)
    for bad in ("yesterday", "2026", "5", "1y", "2026-01-01T"):
        r = env.orch("audit", "show", "--since", bad, config=True)
        expect((r.status == 2 and "--since" in r.err) or bad == "2026-01-01T", bad, r)


# what an agent writes to drive the terminal of who reads the log
TERMINAL = ["\x1b]0;owned\x07", "\u202etxt.exe", "\u200b\u2066\u2069", "\x9b31m", "\u2028\u0085", "\x7f\x08\x08", "a\rb", "\ufeff", "\U000e0041"]


@case("nothing an agent wrote drives the terminal: show, tail, show CALL, with and without --json")
def terminals(env):
    s = env.project().session()
    s.initialize()
    calls = []
    for text in TERMINAL:
        calls.append(s.call("echo", {"message": text})["_meta"]["orch/call"])
        s.request("tools/call", {"name": text, "arguments": {}})
    expect(s.end() == 0)
    for args in (["show"], ["tail", "-n", "100"], ["show", "--json"], ["tail", "--json", "-n", "100"]) + tuple(["show", c] for c in calls) + tuple(["show", "--json", c] for c in calls):
        r = env.orch("audit", *args, config=True)
        expect(r.status == 0, r)
        bad = re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]", r.out)
        expect(not bad, args, bad)
        if "--json" in args:
            for line in r.out.splitlines():
                json.loads(line)
    shown = [json.loads(l) for l in told(env, "show", "--json")]
    expect([l["args"]["message"] for l in shown if l["event"] == "decision" and l["tool"] == "echo"] == TERMINAL, shown)


@case("status and its --json say what runs, for whom, since when; the log calls it running")
def runs(env):
    s = env.project(tools={"echo": ECHO, "wait": SLEEP}).session()
    s.initialize()
    s.call("echo", {"message": "x"})
    id = s.start("tools/call", {"name": "wait", "arguments": {"seconds": 500}})
    running = until(lambda: json.loads(env.orch("status", "--json").out)[0]["running"], "a running call")
    expect(len(running) == 1 and running[0]["tool"] == "wait" and ("uid:%d" % os.geteuid()) in running[0]["caller"], running)
    expect(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", running[0]["since"]) and running[0]["ms"] >= 0 and running[0]["session"], running)
    out = env.orch("status").out
    expect(re.search(r"wait +uid:%d \S+ +\d{4}-" % os.geteuid(), out) and running[0]["call"] in out, out)
    line = [l for l in told(env, "show") if "  wait  " in l]
    expect(len(line) == 1 and "  runs  " in line[0], line)
    s.notify("notifications/cancelled", {"requestId": id})
    until(lambda: not json.loads(env.orch("status", "--json").out)[0]["running"], "its end")
    expect("  cancelled" in [l for l in told(env, "show") if "  wait  " in l][0], told(env, "show"))
    s.kill()
    line = [l for l in told(env, "show") if "  echo  " in l]
    expect("  ok" in line[0], line)


@case("a call that orch did not live to end is told as that")
def unfinished(env):
    s = env.project(tools={"wait": SLEEP}).session()
    s.initialize()
    s.start("tools/call", {"name": "wait", "arguments": {"seconds": 500}})
    until(lambda: any(l["event"] == "decision" for l in env.audit()), "the decision")
    s.kill()
    line = told(env, "show")
    expect(len(line) == 1 and "no outcome" in line[0], line)


if __name__ == "__main__":
    main()
