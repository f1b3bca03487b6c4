# A tool that asks its client: the same tool for both eras. What a client may answer, what it may not, and bounds.
# as: user asan
import json, time

from orch_e2e import *

ASK = """return {
  name = "ask", description = "Asks for a name",
  input = { type = "object", properties = { greeting = { type = "string" } } },
  timeout = "60s",
  run = function(args, ctx)
    local answer, why, code = ctx:elicit { key = "who", message = "Who? sk-12345",
      schema = { type = "object", properties = { name = { type = "string" } }, required = { "name" } } }
    if not answer then return nil, why, code end
    return (args.greeting or "Hello") .. ", " .. (answer.content and answer.content.name or answer.action)
  end,
}
"""
MANY = """return {
  name = "many", description = "Asks several things at once, then one more",
  input = { type = "object", properties = {} },
  run = function(args, ctx)
    local answers, why, code = ctx:ask { a = { elicit = { message = "A?" } }, b = { roots = true }, c = { sample = { prompt = "C?" } } }
    if not answers then return nil, why, code end
    local last
    last, why, code = ctx:elicit { message = "Sure?" }
    if not last then return nil, why, code end
    return table.concat({ answers.a.action, answers.b.roots[1].uri, answers.c.content.text, last.action }, " ")
  end,
}
"""
ALL = {"elicitation": {}, "sampling": {}, "roots": {}}
ANSWER_C = {"role": "assistant", "content": {"type": "text", "text": "yes"}, "model": "m"}


def meta(capabilities=ALL):
    return {"_meta": {META + "protocolVersion": MODERN, META + "clientCapabilities": capabilities}}


def ask(s, tool="ask", arguments=None, capabilities=ALL, **more):
    return s.request("tools/call", {"name": tool, "arguments": arguments or {}, **more, **meta(capabilities)})


def accept(**content):
    return {"action": "accept", "content": content}


def started(env, rules=ALLOW_ALL, more=""):
    return env.project(rules, {"ask": ASK, "many": MANY, "echo": ECHO}, more).session()


def parked(answer):
    expect(answer.get("result", {}).get("resultType") == "input_required", answer)
    return answer["result"]


def error(answer, code, words):
    expect(answer.get("error", {}).get("code") == code and words in answer["error"]["message"], answer)


@case("modern: input_required, the call again with the answer, one decision and one outcome")
def modern(env):
    s = started(env)
    first = parked(ask(s))
    who = first["inputRequests"]["who"]
    expect(who["method"] == "elicitation/create" and who["params"]["requestedSchema"]["required"] == ["name"], who)
    done = ask(s, requestState=first["requestState"], inputResponses={"who": accept(name="Ann")})["result"]
    expect(done["resultType"] == "complete" and text_of(done) == "Hello, Ann", done)
    expect(done["_meta"]["orch/call"] == first["_meta"]["orch/call"], done, first)
    s.end()
    events = [line["event"] for line in env.audit() if line.get("call")]
    expect(events == ["decision", "outcome"], events)


@case("legacy: a request of its own, answered")
def legacy(env):
    s = started(env)
    s.request("initialize", {"protocolVersion": LEGACY, "capabilities": ALL, "clientInfo": {"name": "c", "version": "1"}})
    s.notify("notifications/initialized")
    id = s.start("tools/call", {"name": "ask", "arguments": {"greeting": "Hi"}})
    question = s.recv()
    expect(question["method"] == "elicitation/create" and "id" in question, question)
    s.send({"jsonrpc": "2.0", "id": question["id"], "result": accept(name="Bo")})
    expect(text_of(s.answer(id)["result"]) == "Hi, Bo")


@case("legacy: the client answers with an error, with nonsense, not at all")
def legacy_bad(env):
    s = started(env)
    s.request("initialize", {"protocolVersion": LEGACY, "capabilities": ALL, "clientInfo": {"name": "c", "version": "1"}})
    s.notify("notifications/initialized")
    for answer, words in (({"error": {"code": -1, "message": "no user"}}, "no user"), ({"result": {"action": "maybe"}}, "form"),
                          ({"result": {}}, "form"), ({"error": {"code": -1, "message": "x"}}, "x")):
        id = s.start("tools/call", {"name": "ask", "arguments": {}})
        s.send({"jsonrpc": "2.0", "id": s.recv()["id"], **answer})
        result = s.answer(id)["result"]
        expect(result["isError"] and words in text_of(result), result)
    s.start("tools/call", {"name": "ask", "arguments": {}})
    question = s.recv()
    s.notify("notifications/cancelled", {"requestId": s.next_id})
    expect(s.recv()["params"]["requestId"] == question["id"])
    expect("result" in s.request("ping"))


@case("a person takes longer than the tool's timeout: both eras")
def patience(env):
    s = env.project(tools={"ask": ASK.replace("60s", "2s")}).session()
    first = parked(ask(s))
    time.sleep(3)  # more than the timeout, which is what is tested
    done = ask(s, requestState=first["requestState"], inputResponses={"who": accept(name="Ann")})
    expect(text_of(done["result"]) == "Hello, Ann", done)


@case("requestState: altered, of other arguments, of another tool, used before, nonsense")
def states(env):
    s = started(env)
    first = parked(ask(s))["requestState"]
    answers = {"inputResponses": {"who": accept(name="Ann")}}
    flipped = first[:-1] + ("0" if first[-1] != "0" else "1")
    for state, arguments, tool in ((flipped, {}, "ask"), (first + "0", {}, "ask"), (first, {"greeting": "x"}, "ask"), (first, {}, "many"),
                                   ("", {}, "ask"), ("0.1.1.", {}, "ask"), ("9999999.1.1.aa", {}, "ask"), ("x" * 5000, {}, "ask"),
                                   (first.replace("0.", "00.", 1), {}, "ask")):
        error(ask(s, tool, arguments, requestState=state, **answers), -32602, "requestState")
    expect(text_of(ask(s, requestState=first, **answers)["result"]) == "Hello, Ann")
    error(ask(s, requestState=first, **answers), -32602, "requestState")


@case("missing and bad answers ask again under a new state; extra ones are ignored")
def again(env):
    s = started(env)
    state = parked(ask(s))["requestState"]
    for responses in ({}, {"other": accept()}, {"who": 7}, {"who": {"action": "perhaps"}}, {"who": {"action": "accept", "content": []}}):
        new = parked(ask(s, requestState=state, inputResponses=responses))
        expect(list(new["inputRequests"]) == ["who"] and new["requestState"] != state, new)
        state = new["requestState"]
    done = ask(s, requestState=state, inputResponses={"who": {"action": "decline"}, "extra": {}})
    expect(text_of(done["result"]) == "Hello, decline", done)


@case("answers that come with a first call are taken when they are asked for")
def at_once(env):
    s = started(env)
    expect(text_of(ask(s, inputResponses={"who": accept(name="Ann")})["result"]) == "Hello, Ann")
    parked(ask(s, inputResponses={"who": 12345}))


@case("several questions at once, answered one by one, then another round")
def several(env):
    s = started(env)
    first = parked(ask(s, "many"))
    expect(sorted(first["inputRequests"]) == ["a", "b", "c"], first)
    second = parked(ask(s, "many", requestState=first["requestState"], inputResponses={"b": {"roots": [{"uri": "file:///x"}]}}))
    expect(sorted(second["inputRequests"]) == ["a", "c"], second)
    third = parked(ask(s, "many", requestState=second["requestState"], inputResponses={"a": {"action": "cancel"}, "c": ANSWER_C}))
    key, = third["inputRequests"]
    done = ask(s, "many", requestState=third["requestState"], inputResponses={key: accept()})
    expect(text_of(done["result"]) == "cancel file:///x yes accept", done)


@case("what the client does not declare is not asked: -32021 with requiredCapabilities, and a failed result for legacy")
def undeclared(env):
    s = started(env)
    answer = ask(s, capabilities={})
    error(answer, -32021, "")
    expect(answer["error"]["data"] == {"requiredCapabilities": {"elicitation": {"form": {}}}}, answer)
    error(ask(s, capabilities={"elicitation": {"url": {}}}), -32021, "")
    error(ask(s, "many", capabilities={"elicitation": {}, "roots": {}}), -32021, "")
    s.initialize()
    result = s.call("ask")
    expect(result["isError"] and "does not offer elicitation" in text_of(result), result)


@case("redact patterns apply to what is asked")
def redacted(env):
    s = started(env, 'return { rules = { { tool = "*", action = "allow", redact = { [[sk-\\d+]] } } } }')
    first = parked(ask(s))
    expect("sk-" not in json.dumps(first["inputRequests"]) and "Who?" in json.dumps(first), first)


@case("a parked call ends on the generation it began with")
def reload(env):
    s = started(env)
    first = parked(ask(s))
    env.write("lua/tools/ask.lua", ASK.replace('"Hello"', '"Good day"'))
    def reloaded():
        return text_of(ask(s, inputResponses={"who": accept(name="B")}).get("result", {})) == "Good day, B"
    until(reloaded, "the reload")
    done = ask(s, requestState=first["requestState"], inputResponses={"who": accept(name="Ann")})
    expect(text_of(done["result"]) == "Hello, Ann", done)


@case("end of input ends what is parked, and says so in the audit log")
def ended(env):
    s = started(env)
    parked(ask(s))
    parked(ask(s))
    expect(s.end() == 0)
    outcomes = [line for line in env.audit() if line["event"] == "outcome"]
    expect(len(outcomes) == 2 and all(line["cancelled"] for line in outcomes), outcomes)


@case("10,000 parked calls: no process or thread for each, bounded memory, one more is refused")
def parked_bound(env):
    s = started(env, more="limits = { tool = { memory = \"1G\" } }")
    ask(s, capabilities={})
    def status(key):
        with open("/proc/%d/status" % s.pid) as f:
            return next(int(line.split()[1]) for line in f if line.startswith(key + ":"))
    before, count = status("VmRSS"), 200 if ASAN else 10000
    states = []
    for batch in range(0, count, 50):
        ids = [s.start("tools/call", {"name": "ask", "arguments": {}, **meta()}) for _ in range(min(50, count - batch))]
        states += [parked(s.answer(id))["requestState"] for id in ids]
    expect(status("Threads") == 1 and not descendants(s.pid), status("Threads"), descendants(s.pid))
    if ASAN:
        return
    grown = status("VmRSS") - before
    expect(grown < 200 * 1024, "KiB for 10,000:", grown)
    result = ask(s)["result"]
    expect(result["isError"] and "wait for their clients" in text_of(result), result)
    for state in (states[0], states[4999], states[9999]):
        done = ask(s, requestState=state, inputResponses={"who": accept(name="Ann")})
        expect(text_of(done["result"]) == "Hello, Ann", done)
    expect(s.end() == 0)


main()
