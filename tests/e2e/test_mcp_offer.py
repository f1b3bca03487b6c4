# Resources and prompts as files of the configuration, one each, reloaded like tools; and what scripts serve over stdio.
# as: user asan
import json, re

from orch_e2e import *

FIXED = 'return { uri = "notes://a", name = "a", mimeType = "text/plain", text = "A" }'
READ = '''return { uri = "notes://b", name = "b", read = function(uri, ctx)
  ctx:log("info", "reading")
  return { text = "B of " .. uri }
end }'''
TEMPLATE = '''return { uri_template = "notes://{folder}/{+path}", name = "t", mimeType = "text/plain",
  read = function(uri, ctx, v)
    if v.folder == "none" then return nil end
    if v.folder == "bad" then return nil, "the disk is full" end
    return v.folder .. " " .. v.path
  end }'''
PROMPT = '''return { name = "greet", description = "Greets", arguments = { { name = "who", required = true } },
  get = function(args) return "Greet " .. args.who end }'''


def started(env, **files):
    env.project()
    for name, text in {"resources/a": FIXED, "resources/b": READ, "resources/t": TEMPLATE, "prompts/greet": PROMPT, **files}.items():
        env.write("lua/%s.lua" % name, text)
    s = env.session()
    return s


def ask(s, method, **params):
    return s.request(method, params, modern=True)


@case("listed, read, templates, prompts: both eras")
def offered(env):
    s = started(env)
    capabilities = ask(s, "server/discover")["result"]["capabilities"]
    expect("resources" in capabilities and "prompts" in capabilities and "completions" not in capabilities, capabilities)
    listed = ask(s, "resources/list")["result"]
    expect([r["uri"] for r in listed["resources"]] == ["notes://a", "notes://b"] and listed["cacheScope"] == "private", listed)
    expect(ask(s, "resources/templates/list")["result"]["resourceTemplates"][0]["uriTemplate"] == "notes://{folder}/{+path}")
    for uri, text in (("notes://a", "A"), ("notes://b", "B of notes://b"), ("notes://x/y/z", "x y/z")):
        expect(ask(s, "resources/read", uri=uri)["result"]["contents"][0]["text"] == text, uri)
    prompt = ask(s, "prompts/get", name="greet", arguments={"who": "Ann"})["result"]
    expect(prompt["messages"] == [{"role": "user", "content": {"type": "text", "text": "Greet Ann"}}], prompt)
    s.initialize()
    legacy = s.request("resources/read", {"uri": "notes://a"})["result"]
    expect(legacy == {"contents": [{"uri": "notes://a", "mimeType": "text/plain", "text": "A"}]}, legacy)
    s.end()
    logged = [(line["method"], line["name"]) for line in env.audit() if line["event"] == "request"]
    expect(logged == [("resources/read", uri) for uri in ("notes://a", "notes://b", "notes://x/y/z")] + [("prompts/get", "greet"),
                      ("resources/read", "notes://a")], logged)


@case("what is asked for is in the audit log, with its arguments; what cannot be recorded is not given")
def recorded(env):
    started(env).end()
    env.write("policies/tools.lua", 'return { rules = { { tool = "*", action = "allow", redact = { "sk-%w+", "(q+ ?)+[:;]" } } } }'.replace("%w", "\\\\w"))
    s = env.session()
    table = [
        ("prompts/get", {"name": "greet", "arguments": {"who": "Ann"}}, "Greet Ann", {"args": {"who": "Ann"}}),
        ("prompts/get", {"name": "greet", "arguments": {"who": "sk-abc"}}, "Greet sk-abc", {"args": {"who": "[redacted]"}}),
        ("prompts/get", {"name": "greet", "arguments": {"who": "x" * 9000}}, "Greet x", {"args": {"who": "x" * 4096}}),
        ("prompts/get", {"name": "greet", "arguments": {"who": "q" * 60 + "!"}}, "match limit", None),
        ("prompts/get", {"name": "greet", "arguments": {"who": "a", **{"k%d" % k: "v" for k in range(9000)}}}, "too many bytes", None),
        ("prompts/get", {"name": "g" * 5000}, "5000 bytes", None),
        ("resources/read", {"uri": "notes://x/" + "y" * 4000}, "x y", {"name": "notes://x/" + "y" * 4000}),
        ("resources/read", {"uri": "notes://x/" + "y" * 5000}, "5010 bytes", None),
        ("resources/read", {"uri": "notes://x/sk-abc"}, "x sk-abc", {"name": "notes://x/[redacted]"}),
        ("resources/read", {"uri": "notes://x/" + "q" * 60 + "!"}, "match limit", None),
    ]
    for method, params, text, _ in table:
        answer = ask(s, method, **params)
        expect(text in json.dumps(answer), method, str(params)[:100], str(answer)[:300])
    expect(s.end() == 0)
    logged = [line for line in env.audit() if line["event"] == "request"]
    wanted = [w for _, _, _, w in table if w]
    expect(len(logged) == len(wanted), logged)
    for line, want in zip(logged, wanted):
        expect(all(line[k] == v for k, v in want.items()), str(line)[:300])


@case("what is not there, and what fails")
def failing(env):
    s = started(env)
    for method, params, code, words in (("resources/read", {"uri": "other://a"}, -32602, "not found"),
                                        ("resources/read", {"uri": "notes://none/x"}, -32602, "not found"),
                                        ("resources/read", {"uri": "notes://bad/x"}, -32603, "disk is full"),
                                        ("resources/read", {}, -32602, "uri"), ("resources/read", {"uri": 7}, -32602, "uri"),
                                        ("resources/list", {"cursor": "nope"}, -32602, "cursor"),
                                        ("prompts/get", {"name": "nope"}, -32602, "Unknown prompt"),
                                        ("prompts/get", {"name": "greet"}, -32602, "who"),
                                        ("prompts/get", {"name": "greet", "arguments": {"who": 1}}, -32602, "who"),
                                        ("completion/complete", {}, -32601, "")):
        error = ask(s, method, **params).get("error", {})
        expect(error.get("code") == code and words in error["message"], method, params, error)
    expect(ask(s, "resources/read", uri="other://a")["error"]["data"] == {"uri": "other://a"})


@case("a changed file is served, clients are told; a bad one leaves what was")
def reload(env):
    s = started(env)
    s.start("subscriptions/listen", {"notifications": {"resourcesListChanged": True, "promptsListChanged": True}}, modern=True)
    s.recv()
    env.write("lua/resources/c.lua", FIXED.replace("notes://a", "notes://c"))
    methods = sorted(s.recv()["method"] for _ in range(2))
    expect(methods == ["notifications/prompts/list_changed", "notifications/resources/list_changed"], methods)
    expect(ask(s, "resources/read", uri="notes://c")["result"]["contents"][0]["text"] == "A")
    env.write("lua/resources/d.lua", 'return { uri = 7, name = "d", text = "" }')
    until(lambda: "reload failed" in s.stderr(), "the failed reload")
    expect("lua/resources/d.lua: uri must be a string, got number" in s.stderr(), s.stderr())
    expect("result" in ask(s, "resources/read", uri="notes://c"))


@case("errors of the files name them, exit 6")
def errors(env):
    for name, text, words in (("resources/x", 'return { uri = "x://", name = "x" }', "one of read, text, blob"),
                              ("resources/x", "return 7", "must be a table"), ("resources/x", "return {", "x.lua:1"),
                              ("resources/x", 'return { uri = "notes://a", name = "x", text = "" }', "there already"),
                              ("resources/x", 'return { uri_template = "x://", name = "x", read = function() end }', "needs a variable"),
                              ("prompts/x", 'return { name = "x" }', "get is missing"), ("prompts/x", 'return { name = "x", gte = 1 }', "unknown key|is missing")):
        world = Env()
        s = started(world, **{name: text})
        status, err = s.wait(), s.stderr()
        left = world.close()
        expect(status == 6 and "lua/%s.lua" % name in err and re.search(words, err) and not left, name, text, err)


@case("a prompt that asks: input_required on prompts/get")
def asking(env):
    s = started(env, **{"prompts/ask": '''return { name = "ask", get = function(args, ctx)
      local a, why, code = ctx:elicit { key = "k", message = "What?" }
      if not a then return nil, why, code end
      return a.action
    end }'''})
    meta = {"_meta": {META + "clientCapabilities": {"elicitation": {}}}}
    first = ask(s, "prompts/get", name="ask", **meta)["result"]
    expect(first["resultType"] == "input_required", first)
    wrong = ask(s, "resources/read", uri="notes://a", requestState=first["requestState"], **meta)
    expect(wrong["error"]["code"] == -32602, wrong)
    done = ask(s, "prompts/get", name="ask", requestState=first["requestState"], inputResponses={"k": {"action": "accept"}}, **meta)["result"]
    expect(done["messages"][0]["content"]["text"] == "accept", done)
    expect(ask(s, "prompts/get", name="ask")["error"]["code"] == -32021)


SCRIPT = """
local orch = require "orch"
return orch.mcp.serve { name = "mine", version = "3", instructions = "Ask.", tools = { { name = "mine", description = "d",
  input = { type = "object", properties = { x = { type = "string" } }, required = { "x" } }, run = function(a) return a.x:upper() end } },
  complete = function(ref, argument) return { argument.value .. "1", argument.value .. "2" } end, prompts = { { name = "p", get = function() return "t" end } } }
"""


@case("a script serves its own tools, judged and audited by the configuration's policy")
def script(env):
    env.project('return { rules = { { tool = "mine", action = "allow" }, { tool = "mine", when = function(c) return c.args.x == "no" end, action = "deny", reason = "not that" } } }')
    path = env.write("s.lua", SCRIPT)
    s = env.session(argv=[ORCH, "--config", env.config, path])
    found = ask(s, "server/discover")["result"]
    expect(found["_meta"][META + "serverInfo"] == {"name": "mine", "version": "3"} and found["instructions"] == "Ask.", found)
    expect([t["name"] for t in ask(s, "tools/list")["result"]["tools"]] == ["mine"])
    expect(text_of(s.call("mine", {"x": "abc"}, modern=True)) == "ABC")
    expect("not that" in text_of(s.call("mine", {"x": "no"}, modern=True)))
    expect(ask(s, "tools/call", name="mine", arguments={})["error"]["code"] == -32602)
    expect(ask(s, "tools/call", name="echo", arguments={"message": "x"})["error"]["code"] == -32602)
    done = ask(s, "completion/complete", ref={"type": "ref/prompt", "name": "p"}, argument={"name": "a", "value": "v"})["result"]
    expect(done["completion"] == {"values": ["v1", "v2"], "total": 2, "hasMore": False}, done)
    expect(s.end() == 0)
    decisions = [line["decision"] for line in env.audit() if line["event"] == "decision"]
    expect(decisions == ["allow", "deny", "deny", "deny"], decisions)


main()
