#!/usr/bin/env python3
"""Real agents, unmodified, with a scripted model against orch: clients.py CLIENT ORCH CACHE   (tests/peers/run does)

Sets a temporary home up by README's own lines, starts the client in it, lets the model (model.py) make the calls of
CASES, and prints as JSON what the model was offered and what it was given for each call. The client is told to keep
from telemetry and updates by its own settings; as root it gets a network of its own with nothing but loopback.
"""
import fcntl, json, os, re, shlex, signal, socket, struct, subprocess, sys, tempfile

import model

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MODULES = os.path.join(ROOT, "build/peers/node_modules")
LIMIT_S = 240 # of a client's whole session, on a busy machine
CODEX = "@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex"
ORCH = "mcp__orch__" # both clients write the names of orch's tools so

CONFIG = 'return { policies = "policies" }\n'
POLICY = """return { rules = {
  { tool = "run_command", action = "allow" }, { tool = "read_file", action = "allow" },
  { tool = "run_command", action = "deny", reason = "no package managers",
    when = function(call) return call.args.command:find("apt", 1, true) ~= nil end },
} }
"""

# What is called, and what the model must be given, word for word.
CASES = {
    "a command": ("run_command", {"command": "echo 'é ✓'"}, "é ✓\n"),
    "exit status 3 with stderr": ("run_command", {"command": "echo out; echo err >&2; exit 3"},
                                  "out\n[stderr]\nerr\n[exit status 3]"),
    "killed": ("run_command", {"command": "echo out; kill -9 $$"}, "out\n[killed by signal 9 (SIGKILL)]"),
    "no output": ("run_command", {"command": "true"}, "[no output]"),
    "time is up": ("run_command", {"command": "echo out; sleep 60", "timeout": 0.5}, r"out\n\[ended after [\d.]+ s: .+\]"),
    "null for optional arguments": ("run_command", {"command": "cat", "stdin": None, "timeout": None}, "[no output]"),
    "denied": ("run_command", {"command": "apt install x"}, "denied: no package managers (policies/tools.lua:3)"),
    "bad arguments": ("run_command", {"command": 5}, r".*arguments\.command: expected string, got number \(type\)"),
    "a file": ("read_file", {"path": "notes.txt"}, "one\ntwo\n"),
    "a file that is not there": ("read_file", {"path": "none"}, "failed: none: No such file or directory"),
}
ERRORS = {"denied", "bad arguments", "a file that is not there"} # the others are answers
PATTERNS = {"time is up", "bad arguments"}


def readme(language, word):
    """The fenced block of README in this language that holds the word."""
    with open(os.path.join(ROOT, "README.md")) as f:
        blocks = re.findall(r"^```(\w+)\n(.*?)^```", f.read(), re.M | re.S)
    blocks = [text for kind, text in blocks if kind == language and word in text]
    assert len(blocks) == 1, "README has %d blocks of %s with %r" % (len(blocks), language, word)
    return blocks[0]


ALL_TOOLS = "what a script can call" # asked of Codex where it runs one


class Claude:
    wire, program = model.Anthropic, "@anthropic-ai/claude-code-linux-x64/claude"
    environ = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:PORT", "ANTHROPIC_API_KEY": "none", "DISABLE_TELEMETRY": "1",
               "DISABLE_ERROR_REPORTING": "1", "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
               "CLAUDE_CODE_MCP_STARTUP_WAIT_MS": "60000"} # else it goes without a server that is slow to start
    own = {"its shell": ("Bash", {"command": "touch OWN"}),
           "its editor": ("Write", {"file_path": "HOME/project/OWN", "content": "x"})}
    harmless = {"DeferredToolPlaceholder"}

    @staticmethod
    def commands(home):
        add, start = readme("sh", "claude mcp add").splitlines()
        return [add, start + " -p go"]


class Codex:
    wire, program, environ = model.Responses, CODEX, {}
    own = {"its shell": ("exec_command", {"cmd": "touch OWN"}), "its older shell": ("shell", {"command": ["touch", "OWN"]}),
           "its editor": ("apply_patch", "*** Begin Patch\n*** Add File: OWN\n+x\n*** End Patch\n")}
    # exec runs JavaScript that reaches nothing but tools.
    harmless = {"exec", "wait", "apply_patch", "tool_search", "request_user_input", "request_user_input_async",
                "send_message_to_user_async", "clock__sleep", "clock__curr_time", "get_goal", "create_goal", "update_goal",
                "list_mcp_resources", "list_mcp_resource_templates", "read_mcp_resource"}

    def __init__(self, model_name, script=False):
        self.model_name = model_name
        if script: # what it can call need not stand in the description
            names = 'text({ content: [{ type: "text", text: ALL_TOOLS.map(t => t.name).join(" ") }] })'
            self.own = {**self.own, ALL_TOOLS: ("exec", names)}

    def commands(self, home):
        os.mkdir(os.path.join(home, ".codex"))
        with open(os.path.join(home, ".codex/config.toml"), "w") as f:
            f.write(readme("toml", "mcp_servers.orch"))
        provider = '{name="s",base_url="http://127.0.0.1:PORT/v1",wire_api="responses"}'
        settings = ['model="%s"' % self.model_name, 'model_provider="s"', "model_providers.s=" + provider,
                    "analytics.enabled=false", "check_for_update_on_startup=false"]
        more = " ".join("-c " + shlex.quote(s) for s in settings)
        return ["codex exec --strict-config --skip-git-repo-check %s go" % more]


# Codex offers tools to the models of one list as functions, to those of another in a script.
CLIENTS = {"claude": Claude(), "codex": Codex("gpt-5.5"), "codex-script": Codex("gpt-6.2-sol", script=True)}


def furnish(home, client, orch, cache):
    """Puts client and orch on PATH, orch's configuration where it looks for it; the environment of it all."""
    for folder in ("bin", "project", "state", "run", ".config/orch/policies"):
        os.makedirs(os.path.join(home, folder), 0o700)
    os.symlink(os.path.join(MODULES, client.program), os.path.join(home, "bin", os.path.basename(client.program)))
    places = {"CONFIG": home + "/.config", "STATE": home + "/state", "CACHE": cache}
    script = "#!/bin/sh\nexport XDG_RUNTIME_DIR=%s/run\n" % home # by a script, since clients pass few variables on
    script += "".join("export XDG_%s_HOME=%s\n" % (name, shlex.quote(place)) for name, place in places.items())
    files = {".config/orch/orchestrator.lua": CONFIG, ".config/orch/policies/tools.lua": POLICY,
             "project/notes.txt": "one\ntwo\n", "bin/orch": script + 'exec %s "$@"\n' % shlex.quote(orch)}
    for name, text in files.items():
        with open(os.path.join(home, name), "w") as f:
            f.write(text)
    os.chmod(os.path.join(home, "bin/orch"), 0o755)
    return {"PATH": "%s/bin:/usr/local/bin:/usr/bin:/bin" % home, "HOME": home, "LANG": "C.UTF-8",
            "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", **client.environ}


def loopback_up():
    """In a network namespace that leads nowhere."""
    with open("/proc/net/route") as f:
        assert len(f.readlines()) <= 1, "as root: unshare --net %s …" % sys.argv[0]
    with socket.socket() as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 1)) # SIOCSIFFLAGS, IFF_UP


def run(line, environ, folder):
    """One command line of README to its end; what it said."""
    child = subprocess.Popen(["sh", "-c", line], cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said = child.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        said = "no end within %d s; it said: %s" % (LIMIT_S, child.communicate()[0])
    assert child.returncode == 0, "%s: status %d: %s" % (line, child.returncode, said[-3000:])
    return said


def main(name, orch, cache):
    client = CLIENTS[name]
    if os.geteuid() == 0:
        loopback_up()
    with tempfile.TemporaryDirectory(prefix="orch-client-") as home:
        environ = furnish(home, client, orch, cache)
        fill = lambda text: text.replace("HOME", home)
        calls = [(ORCH + tool, arguments) for tool, arguments, _ in CASES.values()]
        calls += [(tool, json.loads(fill(json.dumps(arguments)))) for tool, arguments in client.own.values()]
        scripted = model.Model(client.wire, calls)
        placed = lambda text: text.replace("PORT", str(scripted.port))
        environ = {name: placed(value) for name, value in environ.items()}
        said = "".join(run(placed(line), environ, home + "/project") for line in client.commands(home))
        scripted.close()
        given = {case: scripted.told(n) for n, case in enumerate([*CASES, *client.own])}
        offered = set(scripted.tools) | set((given.get(ALL_TOOLS) or {"text": ""})["text"].split())
        print(json.dumps({"given": given, "tools": sorted(offered - client.harmless), "said": said[-3000:],
                          "project": sorted(os.listdir(home + "/project"))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
