# microVMs with a network by the commands that users have, where a namespace plays the internet (examples/internet.py);
# what passes and what does not in all its forms is tests/c/test_net_attacks.c.
import json

from orch_e2e import *

START_S = 120
RULES = """return { rules = {
  { tool = "run_command", action = "allow", network = "one" },
  { tool = "fetch_url", action = "allow", network = "one" },
} }"""
NETWORK = 'return { one = { allow = { { cidr = "198.51.100.10/32", ports = { 80 } } } }, other = { allow = {} } }'
GET = "timeout %d wget -qO- http://%s/"


def project(env):
    env.shared_cache()
    env.project(RULES, more='vm = { image = "base" }')
    env.write("policies/network.lua", NETWORK)
    return env


def inside(*argv):
    """argv in front of that internet."""
    return ["unshare", "--net", "--mount", sys.executable, os.path.join(ROOT, "examples/internet.py"), "--inside", "0", "0", *argv]


def vm(env, command, *options):
    return run(inside(*env.argv("vm", "run", *options, "--", "sh", "-c", command)), env.environ, env.path("p"), deadline_s=START_S)


def denied(env):
    return [l for l in env.audit() if l["event"] == "net_deny"]


@case("vm run --network: what the policy allows passes, and nothing else")
def allowed(env):
    project(env)
    r = vm(env, GET % (5, "198.51.100.10"), "--network", "one")
    expect(r.status == 0 and r.out == "198.51.100.10 greets 198.51.100.1\n", r)
    expect(not denied(env), denied(env))
    r = vm(env, GET % (2, "198.51.100.11"), "--network", "one")
    expect(r.status != 0 and r.out == "", r)
    lines = denied(env)
    spawned = [l["vm"] for l in env.audit() if l["event"] == "vm_spawn"]
    expect(lines and all(l["dst"] == "198.51.100.11" and l["port"] == 80 and l["proto"] == "tcp" and l["vm"] == spawned[-1] and l["rule"] for l in lines),
           lines)
    r = vm(env, "(ip link | grep -c '^[0-9]'; %s)" % (GET % (2, "198.51.100.10")), "--network", "none")
    expect(r.out == "1\n", r)
    expect(env.orch("audit", "verify", config=True).status == 0)


@case("tools: run_command and fetch_url under the network of the rule that allows them; the audit log names call and rule")
def tools(env):
    project(env)
    s = env.session(argv=inside(*env.argv("mcp", "stdio")))
    s.initialize()
    call = lambda tool, **args: s.call(tool, args, deadline_s=START_S)
    r = call("run_command", command=GET % (5, "198.51.100.10"))
    expect(text_of(r) == "198.51.100.10 greets 198.51.100.1\n" and r["_meta"]["orch/isolation"], r)
    expect(text_of(call("fetch_url", url="http://198.51.100.10/")) == "198.51.100.10 greets 198.51.100.1\n")
    for tool, args, dst in (("run_command", {"command": GET % (2, "198.51.100.1")}, "198.51.100.1"),
                            ("run_command", {"command": GET % (2, "169.254.169.254")}, "169.254.169.254"),
                            ("fetch_url", {"url": "http://169.254.169.254/"}, "169.254.169.254"),
                            ("fetch_url", {"url": "http://198.51.100.11/"}, "198.51.100.11")):
        r = call(tool, **args)
        expect(r["isError"], r)
        lines = [l for l in denied(env) if l.get("call") == r["_meta"]["orch/call"]]
        expect(lines and all(l["dst"] == dst and l["port"] == 80 and l["rule"] for l in lines), tool, args, lines)
        expect(("never" in lines[0]["rule"]) == (dst != "198.51.100.11"), lines)
    expect(s.end(5) == 0)


@case("two networks for one call: denied as ambiguous, with both lines")
def ambiguous(env):
    project(env)
    env.write("policies/tools.lua", RULES.replace("} }", '{ tool = "run_*", action = "allow", network = "other" },\n} }'))
    s = env.session()
    s.initialize()
    text = text_of(s.call("run_command", {"command": "true"}))
    expect(text.startswith("denied: ambiguous network: ") and "tools.lua:2" in text and "tools.lua:4" in text, text)


main()
