# What an agent steers cannot change what judges it: a server behind `orch mcp stdio -- CMD` against every file orch reads to
# judge, run or start; what happens when the user's own editor replaces one; trust.
# as: user asan
import hashlib, re, shlex, signal

from orch_e2e import *

FILES = os.path.join(SERVERS, "files.py")
RULES = "policies/tools.lua"


def law(reason, *more):
    """Allows what the server offers, but for `about`, whose denial says which law is in force."""
    return ('return { rules = { { tool = "cmd__*", action = "allow" }, { tool = "cmd__about", action = "deny", reason = "%s" }, %s } }\n'
            % (reason, " ".join(more)))


OPEN = 'return { rules = { { tool = "*", action = "allow" } } }\n'


def in_force(s):
    text = text_of(s.call("about"))
    return re.match(r"denied: (.*) \(", text).group(1) if text.startswith("denied: ") else "none"


def start(env, *options, rules=law("first"), more="", argv=None, **session):
    if not os.path.exists(env.config):
        env.project(rules, more=more)
    s = env.session(*options, "--", PY, FILES, argv=argv, **session)
    s.initialize()
    s.request("tools/list")
    return s


def attempt(s, op, path, to=None, nested=False):
    return text_of(s.call("try", {"op": op, "path": path, **({"to": to} if to else {}), "nested": nested}))


def reload(env, s):
    """The files are read again, and that has been done."""
    before = len([l for l in env.audit() if l["event"] == "reload"])
    os.kill(s.pid, signal.SIGHUP)
    until(lambda: len([l for l in env.audit() if l["event"] == "reload"]) > before, "a reload")


# ---- the story

@case("one write_file to the policy: refused by the kernel, and the law stays")
def story(env):
    s = start(env)
    expect(in_force(s) == "first")
    r = s.call("write_file", {"path": env.path("p", RULES), "content": OPEN})
    expect(r["isError"] and text_of(r) == "EROFS", r)
    r = s.call("write_file", {"path": RULES, "content": OPEN})
    expect(r["isError"] and text_of(r) == "EROFS", "by the working directory:", r)
    reload(env, s)
    expect(in_force(s) == "first")
    r = s.call("write_file", {"path": env.path("p", "notes.txt"), "content": "work"})
    expect(text_of(r) == "ok" and open(env.path("p", "notes.txt")).read() == "work", r)
    env.write(RULES, law("second"))  # the user's own editor
    until(lambda: in_force(s) == "second", "the user's edit")
    expect(s.end() == 0)


@case("with --no-protect the same write is the law a moment later, and the log says what that means")
def unprotected(env):
    s = start(env, "--no-protect")
    expect(text_of(s.call("write_file", {"path": env.path("p", RULES), "content": OPEN})) == "ok")
    until(lambda: in_force(s) == "none", "the server's law")
    expect("rewriting the policies" in s.stderr(), s.stderr())
    expect(s.end() == 0)


@case("the server is as it would be without: number, group, descriptors, folder, exit status")
def same(env):
    env.project(OPEN)
    said = []
    for options in ((), ("--no-protect",)):
        s = start(env, *options)
        about = json.loads(text_of(s.call("about")))
        expect(about["pid"] == about["pgid"] and about["uid"] == os.getuid(), about)
        said.append((about["fds"], about["cwd"], about["uid"], len(descendants(s.pid))))
        expect(s.end() == 0)
    expect(said[0] == said[1], said)
    for code, words in (("exit 3", r"status 3\b"), ("kill -11 $$", "signal 11")):
        s = env.session("--", "/bin/sh", "-c", code)
        s.request("initialize", {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "e2e", "version": "1"}})
        expect(re.search(words, json.dumps(s.request("tools/list"))), code)
        expect(s.end() == 0)


# ---- every file, every way

def install_dir(name):
    """As orch finds them: beside the program, or in the tree it was installed in."""
    at = os.path.dirname(os.path.realpath(ORCH))
    tree = os.path.join(at, name)
    installed = {"launcher": "../libexec/orch/launcher", "agent": "../libexec/orch/agent"}.get(name, "../share/orch/" + name)
    return os.path.realpath(tree if os.path.exists(tree) else os.path.join(at, installed))


# of a case's own: all ways are tried on them
def own(env):
    state, run_dir = env.path("state/orch"), env.path("run/orch")
    return {"the configuration": env.config, "policies": env.path("p/policies"), "a policy": env.path("p", RULES),
            "tools": env.path("p/lua/tools"), "a tool": env.path("p/lua/tools/echo.lua"), "resources": env.path("p/lua/resources"),
            "prompts": env.path("p/lua/prompts"), "the state": state, "the trust database": state + "/state.db", "the audit log": env.path("p/audit"),
            "the log's key": state + "/audit.key", "the runtime folder": run_dir, "the cache": env.path("cache/orch"),
            "the user's configuration folder": env.path("config/orch")}


# Ways that stay within what a program can do to the files it sees, and those that begin with namespaces of its own.
WAYS = ["write", "create", "rename_away", "rename_over", "replace", "relative", "truncate", "chmod", "utime", "unlink", "rmdir", "link", "xattr", "orch_root",
        "init_root", "orch_cwd", "setns", "ptrace", "mount_over", "bind_over", "remount", "move", "umount", "detach", "below", "by_handle"]
NESTED = ["write", "create", "rename_away", "replace", "unlink", "link", "orch_root", "setns", "remount", "move", "umount", "detach", "below", "below_all",
          "by_handle", "mount_over"]
REFUSALS = {"EROFS", "EBUSY", "EPERM", "EACCES", "EXDEV", "EINVAL", "ENOTDIR", "EISDIR", "ENOENT", "ESTALE", "ENOTSUP", "ENOTEMPTY", "ESRCH"}


def picture(paths):
    """What lies there: numbers and modes, and of what orch does not write meanwhile also names, times and contents."""
    out = {}
    for top in paths:
        for path in [top] + [os.path.join(d, n) for d, ds, fs in os.walk(top) for n in ds + fs]:
            st = os.lstat(path)
            if path.endswith(".head"):
                continue
            out[path] = (st.st_ino, st.st_mode)
            if os.path.isfile(path) and not path.endswith(".jsonl"):
                with open(path, "rb") as f:
                    out[path] += (st.st_nlink, st.st_mtime_ns, hashlib.sha256(f.read()).hexdigest())
    return out


@case("files of orch by ways to change them: none works, nothing changed, the law stays")
def table(env):
    env.project(law("first"))
    env.person("trust", env.path("p"))  # so that there is a database
    s = start(env)
    things = own(env)
    for name, path in things.items():
        expect(os.path.exists(path), name, "is not there:", path)
    before = picture(things.values())
    got = {}
    for name, path in things.items():
        for nested, ways in ((False, WAYS), (True, NESTED)):
            for way in ways:
                if way in ("create",) and not os.path.isdir(path):
                    continue
                if way == "relative":
                    to = env.path("p")
                else:
                    to = env.path("p", "link") if way == "link" else env.path("p", "elsewhere")
                said = attempt(s, way, path, to, nested)
                got.setdefault(said, []).append((name, way, nested))
                fine = said in REFUSALS or (nested and way == "mount_over" and said == "ok" and os.path.isdir(path))
                expect(fine, "%s: %s%s: %s" % (name, way, " in namespaces of its own" if nested else "", said))
    expect(picture(things.values()) == before, [k for k, v in picture(things.values()).items() if before.get(k) != v])
    expect(len(got["EROFS"]) > 60 and len(got["EBUSY"]) > 20, {k: len(v) for k, v in got.items()})
    reload(env, s)
    expect(in_force(s) == "first")
    expect(s.end() == 0)


@case("what orch is installed with, and the folders on the way to its files")
def product(env):
    s = start(env)
    for name in ("lua/policy/engine.lua", "lua/cli.lua", "lua/tools/run_command.lua", "lua/images/debian.lua", "policies/tools.lua", "orchestrator.lua", "launcher", "agent"):
        path = install_dir(name)
        for nested in (False, True):
            said = attempt(s, "write", path, nested=nested)
            expect(said in ("EROFS", "EACCES"), name, said)
    for way in ("create", "rename_away"):
        said = attempt(s, way, install_dir("lua"))
        expect(said in ("EROFS", "EACCES", "EBUSY"), way, said)
    said = attempt(s, "write", os.path.realpath(ORCH))
    expect(said in ("EROFS", "EACCES", "ETXTBSY"), said)
    at = os.path.dirname(os.path.realpath(ORCH))
    expect(attempt(s, "rename_away", os.path.realpath(ORCH)) in ("EBUSY", "EACCES"))
    if os.path.islink(os.path.join(at, "lua")):  # a build tree
        expect(attempt(s, "rename_away", os.path.join(at, "lua")) == "EBUSY" and attempt(s, "rename_away", at) == "EBUSY")
    for path in ("p", "p/lua", "state", "config", "cache", "run"):
        for nested in (False, True):
            said = attempt(s, "rename_away", env.path(path), nested=nested)
            expect(said == "EBUSY", path, said)
    expect(attempt(s, "rename_away", env.dir) == "EBUSY")
    expect(s.end() == 0)


@case("a configuration reached by links: neither they nor what they lead to can be replaced")
def links(env):
    env.project(law("first"))
    os.mkdir(env.path("real"))
    os.rename(env.path("p/policies"), env.path("real/policies"))
    os.rename(env.path("real/policies/tools.lua"), env.path("real/the-rules.lua"))
    os.symlink("../the-rules.lua", env.path("real/policies/tools.lua"))
    os.symlink("../real/policies", env.path("p/policies"))
    os.symlink("p", env.path("short"))
    os.symlink("orchestrator.lua", env.path("p/conf.lua"))
    s = start(env, argv=[ORCH, "--config", env.path("short/conf.lua"), "mcp", "stdio", "--", PY, FILES])
    for path in ("short", "p/conf.lua", "p/policies"):
        for way in ("rename_away", "rename_over", "unlink"):
            for nested in (False, True):
                said = attempt(s, way, env.path(path), nested=nested)
                expect(said == "EBUSY", path, way, said)
    for path, want in (("real/the-rules.lua", "EROFS"), ("real/policies/tools.lua", "ELOOP"), ("p/orchestrator.lua", "EROFS")):
        expect(attempt(s, "write", env.path(path)) == want, path, attempt(s, "write", env.path(path)))
    expect(attempt(s, "create", env.path("p/policies")) == "EROFS" and attempt(s, "rename_away", env.path("real")) == "EBUSY")
    reload(env, s)
    expect(in_force(s) == "first")


def in_namespaces(env, setup, *words):
    """orch in user and mount namespaces of the test's, after a piece of shell."""
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", setup + '; exec "$@"', "sh", *words]


@case("the same file system mounted elsewhere: the files are protected there as well")
def aliases(env):
    env.project(law("first"))
    for name in ("all", "rules"):
        os.mkdir(env.path(name))
    setup = "mount --bind %s %s && mount --bind %s %s" % tuple(shlex.quote(env.path(p)) for p in ("p", "all", "p/policies", "rules"))
    s = start(env, argv=in_namespaces(env, setup, *env.argv("mcp", "stdio", "--", PY, FILES)))
    for path in ("p/policies/tools.lua", "all/policies/tools.lua", "all/orchestrator.lua", "rules/tools.lua"):
        expect(attempt(s, "write", env.path(path)) == "EROFS", path, attempt(s, "write", env.path(path)))
    expect(attempt(s, "rename_away", env.path("all/policies")) == "EBUSY" and attempt(s, "create", env.path("rules")) == "EROFS")
    r = s.call("write_file", {"path": env.path("all/free.txt"), "content": "x"})
    expect(text_of(r) == "ok" and os.path.exists(env.path("p/free.txt")), r)


@case("mounted elsewhere while the server runs: it does not see that")
def later_alias(env):
    env.project(law("first"))
    os.mkdir(env.path("all"))
    os.mkfifo(env.path("now"))
    # The folder's mount is shared, as a machine's are: what is mounted reaches namespaces that do not mind.
    setup = ("mount --bind {0} {0}; mount --make-shared {0}; (read x <{1}/now; mount --bind {1}/p {1}/all; touch {1}/mounted) & true"
             .format(shlex.quote(env.dir), shlex.quote(env.dir)))
    s = start(env, argv=in_namespaces(env, setup, *env.argv("mcp", "stdio", "--", PY, FILES)))
    with open(env.path("now"), "w") as f:
        f.write("go\n")
    until(lambda: os.path.exists(env.path("mounted")), "the mount")
    said = attempt(s, "write", env.path("all/policies/tools.lua"))
    expect(said == "ENOENT", said)


@case("a script's server: open unless the script says protect = true; then the script is protected too")
def script(env):
    env.project(law("first"))
    path = env.write("s.lua", '''local orch = require "orch"
for _, protect in ipairs { false, true } do
  local c = assert(orch.mcp.connect { command = { "%s", "%s" }, protect = protect })
  for _, file in ipairs { "%s", "%s", "%s" } do
    io.write(c:call_tool("try", { op = "write", path = file }).content[1].text, " ")
  end
  c:close()
end
print(select(2, orch.mcp.connect { command = { "/no/such/server" }, protect = true }))''' % (PY, FILES, env.path("p", RULES), env.path("p/s.lua"), env.path("p/free")))
    env.write("free", "")
    r = env.orch(path, config=True)
    expect(r.status == 0 and r.out.startswith("ok ok ok EROFS EROFS ok ") and "/no/such/server: No such file" in r.err and "upstream" in r.err, r)


@case("a policy with a second name is refused before the server starts")
def hard_link(env):
    env.project(law("first"))
    os.link(env.path("p", RULES), env.path("p/other-name"))
    s = env.session("--", PY, FILES)
    expect(s.end() == 5 and RULES in s.stderr() and "hard link" in s.stderr(), s.stderr())
    os.unlink(env.path("p/other-name"))
    s = start(env)
    os.link(env.path("p", RULES), env.path("p/other-name"))
    reload(env, s)
    until(lambda: "hard link" in s.stderr(), "the refusal in the log")
    expect(in_force(s) == "first")


# ---- where it cannot be had

@case("without user namespaces: exit 5, the step, the system's error and the fix; --no-protect runs")
def no_namespaces(env):
    env.project(law("first"))
    setup = "echo 0 > /proc/sys/user/max_user_namespaces"
    s = env.session(argv=in_namespaces(env, setup, *env.argv("mcp", "stdio", "--", PY, FILES)))
    expect(s.end() == 5, s.stderr())
    expect(all(w in s.stderr() for w in ("unshare of the user namespace", "No space left", "user.max_user_namespaces=0", "--no-protect")), s.stderr())
    expect("files.py" not in " ".join(name_of(p) for p in descendants(os.getpid())))
    s = start(env, argv=in_namespaces(env, setup, *env.argv("mcp", "stdio", "--no-protect", "--", PY, FILES)))
    expect(in_force(s) == "first" and s.end() == 0)


@case("the working directory is gone: refused, since what lies below the mounts could be reached by it")
def lost_folder(env):
    env.project(law("first"))
    os.mkdir(env.path("p/gone"))
    s = env.session(argv=["sh", "-c", 'cd gone && rmdir ../gone && exec "$@"', "sh", *env.argv("mcp", "stdio", "--", PY, FILES)])
    expect(s.end() != 0 and "working directory" in s.stderr(), s.stderr())


# ---- what others replace

def save(path, text):
    with open(path + ".new", "w") as f:
        f.write(text)
    os.rename(path + ".new", path)


@case("the configuration is replaced by an editor while a server runs: open to the server, so not loaded before the user trusts it")
def replaced(env):
    s = start(env)
    with open(env.config) as f:
        text = f.read()
    with open(env.config, "w") as f:  # in place: the file is still the protected one
        f.write("-- one\n" + text)
    env.write("other/tools.lua", law("other"))
    reload(env, s)
    expect("not loaded" not in s.stderr() and "orch trust" not in s.stderr() and in_force(s) == "first", s.stderr())
    save(env.config, text.replace('"policies"', '"other"'))
    until(lambda: "orch trust " + env.path("p") in s.stderr(), "the refusal in the log")
    expect(in_force(s) == "first")
    # The server writes to it, and to a folder that was none of orch's when it started.
    expect(text_of(s.call("write_file", {"path": env.config, "content": text.replace('"policies"', '"planted"')})) == "ok")
    os.mkdir(env.path("p/planted"))
    expect(text_of(s.call("write_file", {"path": env.path("p/planted/tools.lua"), "content": OPEN})) == "ok")
    reload(env, s)
    expect(in_force(s) == "first")
    expect(s.end() == 0)
    # Nor by the next orch.
    s = env.session("--", PY, FILES)
    expect(s.end() == 6 and "changed since it was trusted" in s.stderr() and "orch trust" in s.stderr(), s.stderr())
    # The user looks at it, and has his way.
    save(env.config, text.replace('"policies"', '"other"'))
    r = env.person("trust", env.path("p"))
    expect(r.status == 0 and re.search(r'changed +\w+ +\S*orchestrator\.lua', r.out), r)
    s = start(env)
    expect(in_force(s) == "other")
    env.write("other/tools.lua", law("edited"))  # protected again, and so the user's alone
    until(lambda: in_force(s) == "edited", "the edit")


@case("what was trusted is loaded by the running orch too")
def trusted_while_running(env):
    s = start(env)
    with open(env.config) as f:
        text = f.read()
    env.write("other/tools.lua", law("other"))
    save(env.config, text.replace('"policies"', '"other"'))
    until(lambda: "orch trust" in s.stderr(), "the refusal in the log")
    expect(env.person("trust", env.path("p")).status == 0)
    r = env.orch("reload")
    expect(r.status == 0 and in_force(s) == "other", r)
    expect(text_of(s.call("write_file", {"path": env.path("p/other/tools.lua"), "content": OPEN})) == "ok")
    until(lambda: "changed since it was trusted" in s.stderr() or s.stderr().count("orch trust") > 1, "the refusal of the server's edit")
    expect(in_force(s) == "other")


@case("a folder of policies is replaced while a server runs: orch reads the one it opened")
def replaced_folder(env):
    s = start(env)
    os.rename(env.path("p/policies"), env.path("p/before"))
    env.write(RULES, law("replaced"))
    reload(env, s)
    expect(in_force(s) == "first")
    expect("policies: moved or replaced" in s.stderr(), s.stderr())


@case("the folder above is moved and another put in its place: the law stays, with a server and without")
def moved_above(env):
    for command in (["--", PY, FILES], []):
        env.project('return { rules = { { tool = "echo", action = "deny", reason = "first" }, { tool = "cmd__about", action = "deny", reason = "first" }, { tool = "cmd__*", action = "allow" } } }')
        s = Session(env.argv("mcp", "stdio", *command), env.environ, env.dir, env.path("stderr-moved"))
        env.sessions.append(s)
        s.initialize()
        tool = ("about", {}) if command else ("echo", {"message": "x"})
        expect(text_of(s.call(*tool)).startswith("denied: first"))
        os.rename(env.path("p"), env.path("q"))
        env.write(RULES, OPEN)
        env.write("orchestrator.lua", 'return { policies = "policies", tools = { "lua/tools" }, audit = { dir = "audit" } }\n')
        env.write("lua/tools/echo.lua", ECHO)
        env.write("lua/resources/planted.lua", 'return { uri = "x:y", name = "planted", read = function() return "planted" end }')
        os.kill(s.pid, signal.SIGHUP)
        s.request("ping")
        for _ in range(20):
            expect(text_of(s.call(*tool)).startswith("denied: first"))
        expect("moved or replaced" in s.stderr(), s.stderr())
        expect(s.end() == 0)
        shutil.rmtree(env.path("p"))
        os.rename(env.path("q"), env.path("p"))


# ---- the ways around files

@case("the server asks orch by the command line: reload, trust and the socket are refused, from an orphan too")
def commands(env):
    s = start(env)
    env.write("evil/orchestrator.lua", "return {}\n")
    env.write("evil/policies/tools.lua", OPEN)
    same = {k: v for k, v in env.environ.items() if k.startswith("XDG_")}
    def run(*argv):
        return text_of(s.call("run", {"argv": list(argv), "env": same}))
    expect(re.match("3 .*refused", run(ORCH, "reload")), run(ORCH, "reload"))
    expect(re.match("3 .*refused", run(ORCH, "trust", env.path("p/evil"))))
    # One whose parents are gone, at a terminal of its own.
    script = """import os, pty, sys
pid, fd = pty.fork()
if pid == 0: os.execv(sys.argv[2], sys.argv[2:])
out = b""
try:
    while not out or data:
        data = os.read(fd, 999)
        out += data
except OSError: pass
out += b"\\n%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
with open(sys.argv[1] + ".new", "wb") as f: f.write(out)
os.rename(sys.argv[1] + ".new", sys.argv[1])
"""
    for words, refusal in ((["reload"], "refused: asked by a process that orch started"), (["trust", "--edits", env.path("p/evil")], "[Rr]ead-?only"),
                           (["status"], "refused: asked by a process that orch started")):
        out = env.path("p/out-" + words[0])
        run("setsid", "-f", PY, "-c", script, out, ORCH, *words)
        until(lambda: os.path.exists(out), "the orphan's end")
        with open(out) as f:
            said = f.read()
        expect(re.search(refusal, said) and (words == ["status"] or not said.endswith("\n0")), words, said)
    expect(env.orch("reload").status == 0)  # the user's own


# ---- trust

@case("trust needs a terminal on standard input and standard error")
def terminal(env):
    env.project()
    r = env.orch("trust")
    expect(r.status == 6 and "terminal" in r.err, r)
    expect(env.orch("policy", "check").status == 6)
    r = env.person("trust")
    expect(r.status == 0 and re.search(r"new +\w{16} .*orchestrator\.lua \(1 lines\)", r.out) and "files trusted" in r.out, r)
    expect(env.orch("policy", "check").status == 0)


@case("trust says what is new, changed and how, and gone")
def trust_says(env):
    env.project()
    expect(env.person("trust").status == 0)
    env.write(RULES, ALLOW_ALL + '-- tool = "y\x1b[31m"\n')
    env.write("lua/tools/more.lua", ECHO.replace('"echo"', '"more"'))
    os.unlink(env.path("p/lua/tools/echo.lua"))
    r = env.person("trust")
    expect(r.status == 0, r)
    for words in (r"as before +\w{16} +\S*orchestrator\.lua", r"changed +\w{16} +\S*tools\.lua", r"\+ 2: -- tool = \"y", r"new +\w{16} +\S*more\.lua", r"gone +\S*echo\.lua"):
        expect(re.search(words, r.out), words, r)
    expect("\x1b" not in r.out)


@case("a link in the working directory to a configuration that is trusted elsewhere is not trusted there")
def linked(env):
    env.project()
    expect(env.person("trust").status == 0 and env.orch("policy", "check").status == 0)
    os.mkdir(env.path("cloned"))
    os.symlink(env.config, env.path("cloned/orchestrator.lua"))
    r = env.orch("policy", "check", cwd=env.path("cloned"))
    expect(r.status == 6 and "orch trust " + env.path("cloned") in r.err, r)
    expect(env.person("trust", cwd=env.path("cloned")).status == 0 and env.orch("policy", "check", cwd=env.path("cloned")).status == 0)


def always(env, origin):
    if origin == "--config":
        run, options, where = lambda *a: env.orch(*a, config=True), ["--config", env.config], env.path("p")
    else:
        os.rename(env.path("p"), env.path("config/orch"))
        os.mkdir(env.path("p"))
        run, options, where = lambda *a: env.orch(*a), [], env.path("config/orch")
    r = run("policy", "check")
    expect(r.status == 6 and "orch trust " + where in r.err and "working directory" not in r.err, r)
    r = env.person(*options, "trust")
    expect(r.status == 0, r)
    expect(run("policy", "check").status == 0, run("policy", "check"))
    with open(where + "/policies/tools.lua", "a") as f:
        f.write("-- changed\n")
    r = run("policy", "check")
    expect(r.status == 6 and "changed since it was trusted" in r.err, r)
    expect(env.person(*options, "trust").status == 0 and run("policy", "check").status == 0)
    # Who takes the key away changes the file too.
    with open(where + "/orchestrator.lua") as f:
        text = f.read()
    with open(where + "/orchestrator.lua", "w") as f:
        f.write(text.replace('trust = "always"', ""))
    r = run("policy", "check")
    expect(r.status == 6 and "orchestrator.lua: changed since it was trusted" in r.err, r)
    expect(env.person(*options, "trust").status == 0)
    with open(where + "/policies/tools.lua", "a") as f:
        f.write("-- free again\n")
    expect(run("policy", "check").status == 0)


for origin in ("--config", "the user's configuration"):
    @case('trust = "always" asks it for a configuration by ' + origin, origin)
    def always_case(env, where):
        env.project(more='trust = "always"')
        always(env, where)


@case('trust takes no other word')
def trust_word(env):
    env.project(more='trust = "never"')
    r = env.orch("config", "check", config=True)
    expect(r.status == 6 and 'trust: must be one of always, got "never"' in r.err, r)


# ---- doctor

@case("doctor says whether protection works, and warns of a configuration beneath the workspace or the current folder")
def doctor(env):
    def checks(**more):
        return {c["name"]: c for c in json.loads(env.orch("doctor", "--json", **more).out)["checks"]}
    env.project(more='workspace = "."')
    found = checks(config=True, cwd=env.path("home"))
    expect(found["protection"]["state"] == "ok", found["protection"])
    expect(found["place"]["state"] == "warn" and "workspace" in found["place"]["why"] and env.path("config/orch") in found["place"]["fix"], found["place"])
    expect("unjudged" in found["your agent"]["why"] and "--tools" in found["your agent"]["fix"], found["your agent"])
    env.write("work/x", "")
    env.project(more='workspace = "work"')
    found = checks(config=True, cwd=env.path("home"))
    expect(found["place"]["state"] == "ok", found["place"])
    found = checks(config=True, cwd=env.path("p"))
    expect(found["place"]["state"] == "warn" and "current folder" in found["place"]["why"], found["place"])


if __name__ == "__main__":
    main()
