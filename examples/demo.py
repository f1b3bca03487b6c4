#!/usr/bin/env python3
"""What `make demo` runs: a real MCP session with orch, every message shown.

    demo.py [ORCH]

Lists the tools, runs a command in a microVM of its own, is refused twice, verifies the audit log, and
prints the lines that make Claude Code, Codex or an IDE use the same binary.
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


def main():
    try:
        orch = find_orch(sys.argv[1] if len(sys.argv) > 1 else None)
    except NotFound as error:
        sys.exit("demo.py: %s" % error)
    state = tempfile.mkdtemp(prefix="orch-demo-")
    config = os.path.join(state, "orchestrator.lua")
    with open(config, "w") as f:  # the example's policy, with an audit log of the demo's own
        f.write("return { policies = %s, tools = { %s }, audit = { dir = %s } }\n"
                % tuple(json.dumps(p) for p in (os.path.join(os.path.dirname(CONFIG), "policies"), os.path.join(os.path.dirname(CONFIG), "tools"), state)))
    command = [orch, "--config", config, "mcp", "stdio"]
    print("$ %s\n(the first start of a microVM on a machine builds its image: that takes a moment)\n" % " ".join(command))
    with Client(command, timeout=600, trace=show) as client:
        client.tools()
        first = call(client, "A command in a microVM of its own:", "run_command", {"command": "uname -a; id; cat /proc/sys/kernel/random/boot_id"})
        second = call(client, "Another call, another microVM (compare the boot id):", "run_command", {"command": "cat /proc/sys/kernel/random/boot_id; ls /; ip addr 2>/dev/null | head"})
        refused = call(client, "A call that a rule denies:", "run_command", {"command": "rm -rf / --no-preserve-root"})
        call(client, "A call that needs a person, and nobody is there to ask:", "publish", {"text": "hello"})
    print("\nThe audit log:")
    verified = subprocess.run([orch, "--config", config, "audit", "verify"]).returncode
    print("""
Use it yourself. run_command then needs no rule of yours: without a configuration the built-in one allows it
in a microVM without network and denies all else. The client's own shell tool is outside: switch it off there.

  Claude Code   claude mcp add orch -- %(orch)s mcp stdio
  Codex         codex mcp add orch -- %(orch)s mcp stdio
                or in ~/.codex/config.toml:
                  [mcp_servers.orch]
                  command = "%(orch)s"
                  args = ["mcp", "stdio"]
  an IDE        {"mcpServers": {"orch": {"command": "%(orch)s", "args": ["mcp", "stdio"]}}}""" % {"orch": orch})
    if first.get("isError") or second.get("isError") or not refused.get("isError") or verified != 0:
        sys.exit("\ndemo.py: something above is not as it should be")


if __name__ == "__main__":
    main()
