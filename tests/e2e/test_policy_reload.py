# Hot reload: whatever way the file is saved; what is broken stays out; no call is lost.
# as: user
import re, signal

from orch_e2e import *

RULES = "policies/tools.lua"


def says(reason):
    """A policy whose denials show which one is in force."""
    return 'return { rules = { { tool = "echo", action = "deny", reason = "%s" } } }\n' % reason


def reason(s):
    text = text_of(s.call("echo", {"message": "x"}))
    return re.match(r"denied: (.*) \(", text).group(1) if text.startswith("denied: ") else text


def in_force(s, wanted):
    """Calls until the answer changes."""
    until(lambda: reason(s) == wanted, "%r in force; stderr: %s" % (wanted, s.stderr()[-500:]))


def in_place(path, text):
    with open(path, "w") as f:
        f.write(text)


def rename_over(path, text):
    with open(path + ".tmp", "w") as f:
        f.write(text)
    os.rename(path + ".tmp", path)


def unlink_create(path, text):
    os.unlink(path)
    in_place(path, text)


def backup_first(path, text):  # vim's default
    os.rename(path, path + "~")
    with open(path, "w") as f:
        f.write(text)
        os.fsync(f.fileno())
    os.unlink(path + "~")


def from_elsewhere(path, text):  # emacs and others: made in another folder, moved in
    with open(os.path.join(os.path.dirname(path), "..", "new.lua"), "w") as f:
        f.write(text)
    os.rename(f.name, path)


def in_pieces(path, text):
    with open(path, "w", buffering=1) as f:
        for piece in (text[:10], text[10:20], text[20:]):
            f.write(piece)
            f.flush()
            os.fsync(f.fileno())


def truncate_later(path, text):  # written over, then cut
    with open(path, "r+") as f:
        f.write(text)
        f.truncate()


def hard_link(path, text):
    with open(path + ".new", "w") as f:
        f.write(text)
    os.unlink(path)
    os.link(path + ".new", path)
    os.unlink(path + ".new")


def saved(env, save):
    env.project(says("first"))
    s = env.session()
    s.initialize()
    expect(reason(s) == "first")
    for n in range(3):
        save(env.path("p", RULES), says("edit %d" % n))
        in_force(s, "edit %d" % n)


for save in (in_place, rename_over, unlink_create, backup_first, from_elsewhere, in_pieces, truncate_later, hard_link):
    case("an edit comes in force: " + save.__name__.replace("_", " "), save)(saved)


@case("editors' side files do not count as policies and break nothing")
def side_files(env):
    s = env.project(says("first")).session()
    s.initialize()
    for name in (".tools.lua.swp", "tools.lua~", "#tools.lua#", "4913", ".#tools.lua"):
        env.write("policies/" + name, "return {")
    rename_over(env.path("p", RULES), says("second"))
    in_force(s, "second")


BROKEN = [
    ("a syntax error", "return { rules = {\n  { tool = 'echo' action = 'deny' },\n} }", r"tools\.lua:2"),
    ("an unknown key", "return { rules = { { tool = 'echo', acton = 'deny' } } }", r"tools\.lua.*acton"),
    ("a failing test", "return { rules = { { tool = 'echo', action = 'allow' } },\n  tests = { { call = { tool = 'echo', args = { message = 'x' } }, expect = 'deny' } } }", r"tools\.lua.*(test|expect)"),
    ("a loop", "while true do end", r"tools\.lua:1"),
    ("an empty file", "", r"tools\.lua"),
]


def broken(env, text, words):
    s = env.project(says("old")).session()
    s.initialize()
    env.write(RULES, text)
    until(lambda: re.search(words, s.stderr()), "the error in the log")
    expect(reason(s) == "old", "the broken policy is in force")
    expect(re.search(r"old generation|stay in force", s.stderr()), "log should say what goes on:", s.stderr())
    rename_over(env.path("p", RULES), says("mended"))
    in_force(s, "mended")


for name, text, words in BROKEN:
    case("keeps the old generation: " + name, text, words)(broken)


@case("keeps the old generation when the policy file is removed")
def removed(env):
    s = env.project(says("old")).session()
    s.initialize()
    os.unlink(env.path("p", RULES))
    os.kill(s.pid, signal.SIGHUP)
    until(lambda: "tools.lua" in s.stderr(), "the error in the log")
    expect(reason(s) == "old")
    env.write(RULES, says("back"))
    in_force(s, "back")


def two(n):
    """Two rules, far apart in the file, that must be of one edit."""
    return ('return { rules = {\n  { tool = "echo", action = "allow", rewrite = function(a) a.message = a.message .. "|a%d" return a end },\n%s'
            '  { tool = "echo", action = "allow", rewrite = function(a) a.message = a.message .. "|b%d" return a end },\n} }\n') % (n, "-- padding\n" * 5000, n)


@case("a stream of calls over 50 edits: none lost, none judged by a half-loaded set")
def stream(env):
    s = env.project(two(0)).session()
    s.initialize()
    seen, sent, done = set(), 0, 0
    saves = (in_place, rename_over, unlink_create, backup_first)

    def pump(calls):
        nonlocal sent, done
        ids = [s.start("tools/call", {"name": "echo", "arguments": {"message": "x%d" % i}}) for i in range(calls)]
        sent += calls
        for i, id in enumerate(ids):
            text = text_of(s.answer(id)["result"])
            match = re.fullmatch(r"x%d\|a(\d+)\|b(\d+)" % i, text)
            expect(match and match.group(1) == match.group(2), "judged by a half-loaded set:", text)
            seen.add(int(match.group(1)))
            done += 1
        return max(seen)

    for n in range(1, 51):
        saves[n % len(saves)](env.path("p", RULES), two(n))
        started = time.monotonic()
        if n % 5 == 0:
            while pump(20) != n:
                expect(time.monotonic() - started < WAIT_S, "edit", n, "never came in force")
        else:
            pump(40)
    expect(sent == done and 50 in seen and len(seen) >= 10, "seen:", sorted(seen))
    expect(s.end() == 0)
    ids = {}
    for line in env.audit():
        if line["event"] in ("decision", "outcome"):
            ids.setdefault(line["call"], []).append(line["event"])
    expect(len(ids) == sent and all(sorted(v) == ["decision", "outcome"] for v in ids.values()), "audit lines:", len(ids), "calls of", sent)


@case("SIGHUP loads again; the audit log has a reload line with the new generation")
def sighup(env):
    s = env.project(says("one")).session()
    s.initialize()
    expect(reason(s) == "one")
    env.write(RULES, says("two"))
    os.kill(s.pid, signal.SIGHUP)
    in_force(s, "two")
    expect(s.end() == 0)
    lines = env.audit()
    decided = [l["generation"] for l in lines if l["event"] == "decision"]
    reload = [l for l in lines if l["event"] == "reload"]
    expect(decided[0] != decided[-1] and all(re.fullmatch(r"[0-9a-f]{64}", g) for g in decided), decided)
    expect(any(l.get("generation") == decided[-1] for l in reload), reload)


@case("orch reload reaches the running process")
def reload_command(env):
    s = env.project(says("one")).session()
    s.initialize()
    expect(reason(s) == "one")
    env.write(RULES, says("two"))
    r = env.orch("reload", config=True)
    expect(r.status == 0, r)
    in_force(s, "two")


@case("tools: added, changed, removed; the client is told")
def tools(env):
    s = env.project(tools={"echo": ECHO, "wait": SLEEP}).session()
    s.initialize()
    s.request("tools/list")

    def names():
        return sorted(t["name"] for t in s.request("tools/list")["result"]["tools"])

    def told():
        s.request("ping")
        return any(n["method"] == "notifications/tools/list_changed" for n in s.notes)
    env.write("lua/tools/second.lua", ECHO.replace('"echo"', '"second"'))
    until(lambda: "second" in names(), "the new tool")
    until(told, "list_changed")
    env.write("lua/tools/second.lua", ECHO.replace('"echo"', '"second"').replace("args.message", '"changed"'))
    until(lambda: text_of(s.call("second", {"message": "x"})) == "changed", "the changed tool")
    id = s.start("tools/call", {"name": "wait", "arguments": {"seconds": 0.6}})
    until(lambda: any(l["event"] == "decision" and l["tool"] == "wait" for l in env.audit()), "the call")
    env.write("lua/tools/wait.lua", SLEEP.replace("waited", "waited anew"))
    os.unlink(env.path("p", "lua/tools/second.lua"))
    os.kill(s.pid, signal.SIGHUP)
    expect(text_of(s.answer(id)["result"]) == "waited", "a call in flight ends on its generation")
    until(lambda: "second" not in names(), "the removal")
    until(lambda: text_of(s.call("wait", {"seconds": 0})) == "waited anew", "the changed tool")


@case("a rule that hides a tool takes it off the list")
def hides(env):
    s = env.project(tools={"echo": ECHO, "wait": SLEEP}).session()
    s.initialize()
    env.write(RULES, 'return { rules = { { tool = "*", action = "allow" }, { tool = "wait", action = "deny", reason = "no" } } }')
    until(lambda: "wait" not in [t["name"] for t in s.request("tools/list")["result"]["tools"]], "the list")


@case("orchestrator.lua itself is watched")
def config(env):
    s = env.project(says("one")).session()
    s.initialize()
    expect(reason(s) == "one")
    env.write("other/tools.lua", says("other folder"))
    in_place(env.config, 'return { policies = "other", tools = { "lua/tools" }, audit = { dir = "audit" } }')
    in_force(s, "other folder")


if __name__ == "__main__":
    main()
