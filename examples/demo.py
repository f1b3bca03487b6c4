#!/usr/bin/env python3
"""What `make demo` runs: a real MCP session with orch, every message shown.

    demo.py [ORCH]

Lists the tools, runs a command in a microVM of its own, is refused twice, verifies the audit log; does the same with a
network policy, where a namespace plays the internet (internet.py); and prints the lines that make Claude Code, Codex or
an IDE use the same binary.
"""
import json, os, subprocess, sys, tempfile, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from client import Client, NotFound, find_orch

CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "policy", "orchestrator.lua")


def show(direction, line):
    print("  %s %s" % (direction, line if len(line) <= 1000 else line[:1000] + " … (%d bytes)" % len(line)), flush=True)


def call(client, title, name, arguments):
    print("\n%s" % title)
    started = time.monotonic()
    result = client.call(name, arguments)
    ms, meta = (time.monotonic() - started) * 1000, result.get("_meta", {})
    print("  decision %s, isolation %s, %.1f ms" % (meta.get("orch/decision"), meta.get("orch/isolation", "no microVM"), ms))
    print("".join("  | %s\n" % line for item in result["content"] for line in item.get("text", "").splitlines()), end="")
    return result


NETWORK = {
    "policies/network.lua": 'return { one = { allow = { { cidr = "198.51.100.10/32", ports = { 80 } } } } }\n',
    "policies/tools.lua": """return { rules = {
  { tool = "run_command", action = "allow", network = "one" },
  { tool = "fetch_url", action = "allow", network = "one" },
} }
""",
    "orchestrator.lua": 'return { vm = { image = "base" }, audit = { dir = "audit" } }\n',
}


def verify(orch, config):
    print("\nThe audit log:", flush=True)
    return subprocess.run([orch, "--config", config, "audit", "verify"]).returncode == 0


def with_network(orch, folder):
    """In a namespace whose internet is two web servers, of which the policy allows one."""
    config = os.path.join(folder, "orchestrator.lua")
    for name, text in NETWORK.items():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with open(os.path.join(folder, name), "w") as f:
            f.write(text)
    print("\nA network policy, where a namespace plays the internet (policies/network.lua):\n  %s" % NETWORK["policies/network.lua"])
    with Client([orch, "--config", config, "mcp", "stdio"], timeout=600, trace=show) as client:
        results = [call(client, title, tool, arguments) for title, tool, arguments in (
            ("From a microVM, what the policy allows:", "run_command", {"command": "timeout 5 wget -qO- http://198.51.100.10/"}),
            ("And what it does not; the packets are dropped:", "run_command", {"command": "timeout 2 wget -qO- http://198.51.100.11/"}),
            ("From this host, held to the same policy:", "fetch_url", {"url": "http://198.51.100.10/"}),
            ("And what it does not allow:", "fetch_url", {"url": "http://169.254.169.254/latest/meta-data/"}))]
    verified = verify(orch, config)
    denied = subprocess.run([orch, "--config", config, "audit", "tail", "-n", "100", "--json"], stdout=subprocess.PIPE, text=True).stdout
    for line in denied.splitlines():
        if '"net_deny"' in line:
            print("  " + line)
    # A command that could not connect has done its work: what it says of that is its result.
    greets = [bool(r.get("isError") is None and "greets" in r["content"][0]["text"]) for r in results]
    return 0 if verified and greets == [True, False, True, False] and results[3].get("isError") else 1


def main():
    if sys.argv[1:2] == ["--with-network"]:
        return with_network(*sys.argv[2:])
    try:
        orch = find_orch(sys.argv[1] if len(sys.argv) > 1 else None)
    except NotFound as error:
        sys.exit("demo.py: %s" % error)
    state = tempfile.mkdtemp(prefix="orch-demo-")
    config = os.path.join(state, "orchestrator.lua")
    with open(config, "w") as f:  # the example's policy, with an audit log of the demo's own
        f.write("return { policies = %s, tools = { %s }, vm = { image = \"base\" }, audit = { dir = %s } }\n"
                % tuple(json.dumps(p) for p in (os.path.join(os.path.dirname(CONFIG), "policies"), os.path.join(os.path.dirname(CONFIG), "tools"), state)))
    command = [orch, "--config", config, "mcp", "stdio"]
    print("$ %s\n(the first start of a microVM on a machine builds its image: that takes a moment)\n" % " ".join(command))
    with Client(command, timeout=600, trace=show) as client:
        client.tools()
        first = call(client, "A command in a microVM of its own:", "run_command", {"command": "uname -a; id; cat /proc/sys/kernel/random/boot_id"})
        second = call(client, "Another call, another microVM (compare the boot id):", "run_command", {"command": "cat /proc/sys/kernel/random/boot_id; ls /; ip addr 2>/dev/null | head"})
        refused = call(client, "A call that a rule denies:", "run_command", {"command": "rm -rf / --no-preserve-root"})
        call(client, "A call that needs a person, and nobody is there to ask:", "publish", {"text": "hello"})
    verified = verify(orch, config)
    here = os.path.dirname(os.path.abspath(__file__))
    network = subprocess.call([sys.executable, os.path.join(here, "internet.py"), sys.executable, os.path.abspath(__file__), "--with-network", orch, os.path.join(state, "network")])
    print("""
Use it yourself. run_command then needs no rule of yours: without a configuration the built-in one allows it
in a microVM without network and denies all else. The client's own tools are outside: switch them off there (for
Codex by the lines of README.md, "Point an agent at it").

  Claude Code   claude mcp add orch -- %(orch)s mcp stdio
                claude --tools "" --allowedTools "mcp__orch__*"
  Codex         codex mcp add orch -- %(orch)s mcp stdio
  an IDE        {"mcpServers": {"orch": {"command": "%(orch)s", "args": ["mcp", "stdio"]}}}""" % {"orch": orch})
    if first.get("isError") or second.get("isError") or not refused.get("isError") or not verified or network not in (0, 77):
        sys.exit("\ndemo.py: something above is not as it should be")


if __name__ == "__main__":
    sys.exit(main())
