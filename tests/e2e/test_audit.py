# The audit log: two lines a call, its fields, its chain, what verify finds.
# as: user
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


if __name__ == "__main__":
    main()
