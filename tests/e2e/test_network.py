# microVMs with a network by the commands that users have, where a namespace plays the internet (examples/internet.py);
# what passes and what does not in all its forms is tests/c/test_net_attacks.c.
import json

from orch_e2e import *

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
    r = vm(env, GET % (60, "198.51.100.10"), "--network", "one")
    expect(r.status == 0 and r.out == "198.51.100.10 greets 198.51.100.1\n", r)
    expect(not denied(env), denied(env))
    r = vm(env, GET % (5, "198.51.100.11"), "--network", "one")
    expect(r.status != 0 and r.out == "", r)
    lines = denied(env)
    spawned = [l["vm"] for l in env.audit() if l["event"] == "vm_spawn"]
    expect(lines and all(l["dst"] == "198.51.100.11" and l["port"] == 80 and l["proto"] == "tcp" and l["vm"] == spawned[-1] and l["rule"] for l in lines),
           lines)
    r = vm(env, "(ip link | grep -c '^[0-9]'; %s)" % (GET % (5, "198.51.100.10")), "--network", "none")
    expect(r.out == "1\n", r)
    expect(env.orch("audit", "verify", config=True).status == 0)


@case("tools: run_command and fetch_url under the network of the rule that allows them; the audit log names call and rule")
def tools(env):
    project(env)
    s = env.session(argv=inside(*env.argv("mcp", "stdio")))
    s.initialize()
    call = lambda tool, **args: s.call(tool, args, deadline_s=START_S)
    r = call("run_command", command=GET % (60, "198.51.100.10"))
    expect(text_of(r) == "198.51.100.10 greets 198.51.100.1\n" and r["_meta"]["orch/isolation"], r)
    expect(text_of(call("fetch_url", url="http://198.51.100.10/")) == "198.51.100.10 greets 198.51.100.1\n")
    for tool, args, dst in (("run_command", {"command": GET % (5, "198.51.100.1")}, "198.51.100.1"),
                            ("run_command", {"command": GET % (5, "169.254.169.254")}, "169.254.169.254"),
                            ("fetch_url", {"url": "http://169.254.169.254/"}, "169.254.169.254"),
                            ("fetch_url", {"url": "http://198.51.100.11/"}, "198.51.100.11")):
        r = call(tool, **args)
        expect("greets" not in text_of(r) and (tool == "run_command" or r["isError"]), r)
        lines = [l for l in denied(env) if l.get("call") == r["_meta"]["orch/call"]]
        expect(lines and all(l["dst"] == dst and l["port"] == 80 and l["rule"] for l in lines), tool, args, lines)
        expect(("never" in lines[0]["rule"]) == (dst != "198.51.100.11"), lines)
    expect(s.end() == 0)


ENTRY = 'return { web = { allow = {\n  { %s },\n} } }'
BAD = [
    ("a host rule", ENTRY % 'host = "example.org", ports = { 443 }', 2, "not available yet"),
    ("an address without cidr", ENTRY % 'ports = { 443 }', 2, "cidr"),
    ("every address", ENTRY % 'cidr = "0.0.0.0/0", ports = { 443 }', 2, "every address"),
    ("a star", ENTRY % 'cidr = "*", ports = { 443 }', 2, "not an IPv4 network"),
    ("host bits", ENTRY % 'cidr = "198.51.100.7/24", ports = { 443 }', 2, "198.51.100.0/24"),
    ("a private range", ENTRY % 'cidr = "192.168.7.0/24", ports = { 443 }', 2, "net.permit_private"),
    ("the metadata address", ENTRY % 'cidr = "169.254.169.254/32", ports = { 80 }', 2, "never allowed"),
    ("IPv6", ENTRY % 'cidr = "2001:db8::/32", ports = { 443 }', 2, "not an IPv4 network"),
    ("no ports", ENTRY % 'cidr = "198.51.100.0/24"', 2, "ports is required"),
    ("no port in ports", ENTRY % 'cidr = "198.51.100.0/24", ports = {}', 2, "ports is required"),
    ("port 0", ENTRY % 'cidr = "198.51.100.0/24", ports = { 0 }', 2, "ports[1]"),
    ("a port too high", ENTRY % 'cidr = "198.51.100.0/24", ports = { 443, 65536 }', 2, "ports[2]"),
    ("half a port", ENTRY % 'cidr = "198.51.100.0/24", ports = { 80.5 }', 2, "ports[1]"),
    ("a range backwards", ENTRY % 'cidr = "198.51.100.0/24", ports = { "90-80" }', 2, "80-90"),
    ("another protocol", ENTRY % 'cidr = "198.51.100.0/24", ports = { 80 }, proto = "icmp"', 2, "proto"),
    ("an unknown key", ENTRY % 'cidr = "198.51.100.0/24", port = { 80 }', 2, "port"),
    ("an entry that is text", 'return { web = { allow = {\n  "198.51.100.0/24",\n} } }', 2, "must be a table"),
    ("bandwidth without unit", 'return {\n  web = { allow = {}, bandwidth = 10 } }', 2, "10mbit"),
    ("bandwidth too low", 'return {\n  web = { allow = {}, bandwidth = "1kbit" } }', 2, "8kbit"),
    ("half a connection", 'return {\n  web = { allow = {}, connections = 1.5 } }', 2, "connections"),
    ("no list", 'return {\n  web = {} }', 2, "allow must be a list"),
    ("the name none", 'return {\n  none = { allow = {} } }', 2, "none"),
    ("an odd name", 'return {\n  ["a b"] = { allow = {} } }', None, "name"),
    ("no table", 'return 1', None, "must return a table"),
    ("a syntax error", 'return {\n  web = = }', 2, "unexpected symbol"),
]


@case("network.lua: what is wrong is said with file and line, and nothing is loaded")
def bad_policies(env):
    project(env)
    for name, text, line, words in BAD:
        env.write("policies/network.lua", text)
        r = env.orch("policy", "check", config=True)
        where = "network.lua:%d" % line if line else "network.lua"
        expect(r.status == 6 and where in r.err + r.out and words in r.err + r.out, name, r)
    env.write("policies/network.lua", NETWORK.replace("one", "packages"))
    env.write("policies/tools.lua", RULES.replace("one", "pakages"))
    r = env.orch("policy", "check", config=True)
    expect(r.status == 6 and "tools.lua:2" in r.err + r.out and "did you mean packages?" in r.err + r.out, r)


@case("policy explain and show say what a network policy lets pass, and by which rule")
def explained(env):
    project(env)
    for words, decision, rule in ((("one", "198.51.100.10", "80"), "allow", ""), (("one", "198.51.100.10", "81"), "deny", "no entry"),
                                  (("one", "198.51.100.10", "80", "udp"), "deny", "no entry"), (("one", "10.1.2.3", "80"), "deny", "private"),
                                  (("other", "198.51.100.10", "80"), "deny", "no entry"),
                                  (("none", "198.51.100.10", "80"), "deny", "no network interface")):
        r = env.orch("policy", "explain", "--network", *words, config=True)
        expect(r.status == 0 and r.out.startswith(decision) and rule in r.out, words, r)
    r = env.orch("policy", "show", "--nft", "one", config=True)
    expect(r.status == 0 and "allow: set 1 tcp 80" in r.out and "never: 169.254.0.0/16" in r.out and " o_denied " in r.out, r)
    expect("\nset 1" in r.out and " 198.51.100.10" in r.out.split("\nset 1")[1], "which addresses a set holds", r)
    r = env.orch("policy", "show", "--nft", "none", config=True)
    expect(r.status == 0 and "no network interface" in r.out, r)
    for name in ("one", "none"):
        r = env.orch("policy", "explain", "--network", name, "::1", "80", config=True)
        expect(r.status == 2 and "IPv4" in r.err, r)
    r = env.orch("policy", "explain", "--network", "nine", "198.51.100.10", "80", config=True)
    expect(r.status == 6 and "nine" in r.err, r)


@case("orch.firewall of a script: a policy or packet that is none is said, not taken for another")
def firewall_of_scripts(env):
    for call, words in (("check{ allow = {}, conections = 4 }", "did you mean connections?"),
                        ("check{ allow = {}, connections = 1.5 }", "whole number"),
                        ('check{ allow = { { cidr = "198.51.100.0/24", port = { 443 } } } }', "allow[1]: unknown key port; did you mean ports?"),
                        ('explain({ allow = {} }, { ip = "198.51.100.1", port = 1, proto = "icmp" })', 'proto must be "tcp" or "udp"')):
        script = env.write("check.lua", "local ok, a, b = pcall(function() return orch.firewall.%s end) print(a == nil and b or a)" % call)
        r = env.orch(script)
        expect(r.status == 0 and words in r.err, call, r)


@case("two networks for one call: denied as ambiguous, with both lines")
def ambiguous(env):
    project(env)
    env.write("policies/tools.lua", RULES.replace("} }", '{ tool = "run_*", action = "allow", network = "other" },\n} }'))
    s = env.session()
    s.initialize()
    text = text_of(s.call("run_command", {"command": "true"}))
    expect(text.startswith("denied: ambiguous network: ") and "tools.lua:2" in text and "tools.lua:4" in text, text)


main()
