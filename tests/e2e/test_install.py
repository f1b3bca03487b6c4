# The installed tree: moved after `make install`, run from / with no compiler in PATH.
import glob, json

from orch_e2e import *

RUNTIME = ["qemu-system-x86_64", "lz4", "apt-get", "dpkg-deb"]  # what orch itself may start


def installed(env):
    """A moved tree and an environment whose PATH holds nothing but what orch may start."""
    staged = env.path("staged")
    r = run(["make", "-s", "-C", ROOT, "install", "DESTDIR=" + staged, "PREFIX=/usr"], {**os.environ}, ROOT, deadline_s=300)
    expect(r.status == 0, r)
    os.rename(os.path.join(staged, "usr"), env.path("moved"))
    os.mkdir(env.path("bin"))
    for name in RUNTIME:
        if shutil.which(name):
            os.symlink(shutil.which(name), env.path("bin", name))
    env.environ["PATH"] = env.path("bin")
    return env.path("moved")


@case("the tree is complete, and runs from / after it was moved")
def tree(env):
    at = installed(env)
    for path in ("bin/orch", "libexec/orch/launcher", "libexec/orch/agent", "lib/liborch.a", "lib/pkgconfig/orch.pc", "include/orch.h",
                 "share/orch/orchestrator.lua", "share/orch/policies/tools.lua", "share/orch/lua/mcp.lua"):
        expect(os.path.isfile(os.path.join(at, path)), path, "is missing")
    orch = os.path.join(at, "bin/orch")
    r = run([orch, "version", "--json"], env.environ, "/")
    expect(r.status == 0 and json.loads(r.out)["version"], r)
    s = env.session(argv=["/usr/bin/env", "-C", "/", orch, "mcp", "stdio"])
    s.initialize()
    expect("run_command" in [t["name"] for t in s.request("tools/list")["result"]["tools"]])
    expect(s.end() == 0)
    os.symlink(orch, env.path("link"))
    r = run([env.path("link"), "version"], env.environ, "/")
    expect(r.status == 0, "through a symbolic link:", r)


@case("a tool and a policy are served by the moved tree; client.py finds it in PATH")
def serves(env):
    at = installed(env)
    env.project()
    os.symlink(os.path.join(at, "bin/orch"), env.path("bin/orch"))
    r = run([PY, os.path.join(ROOT, "examples/client.py"), "--config", env.config, "--call", "echo", "--args", '{"message":"moved"}'], env.environ, "/")
    expect(r.status == 0 and r.out == "moved\n", r)


def built(env, name):
    """examples/NAME.c built against the installed library, as its comment says; how it is run."""
    at = installed(env)
    environ = {**env.environ, "PATH": os.environ["PATH"], "PKG_CONFIG_PATH": os.path.join(at, "lib/pkgconfig")}
    r = run(["sh", "-c", 'cc -Wall -Wextra -Werror -o "$0" "$1" $(pkg-config --cflags --libs --static orch)', env.path(name),
             os.path.join(ROOT, "examples/%s.c" % name)], environ, env.dir)
    expect(r.status == 0, r)
    # A program elsewhere finds orch's files through the orch in PATH.
    return {**env.environ, "PATH": os.path.join(at, "bin")}


@case("examples/embed.c builds against the installed library by pkg-config, and runs")
def embed(env):
    environ = built(env, "embed")
    r = run([env.path("embed")], environ, env.path("p"))
    expect(r.status == 0 and '"text":"42"' in r.out and "denied: too large" in r.out, r)


@case("examples/loop.c likewise: calls from its stdin, a timer and orch's work in one poll loop")
def loop(env):
    environ = built(env, "loop")
    env.project(rules='return { rules = { { tool = "shout", action = "allow" }, { tool = "shout", action = "deny", '
                'when = function(call) return call.args.text == "quiet" end, reason = "at night" } } }')
    lines = ''.join('{"text":"%s"}\n' % text for text in ("hello", "quiet", "again"))
    r = run([env.path("loop"), env.config], environ, env.path("p"), input=(lines + "no JSON\n").encode())
    expect(r.status == 0 and '"text":"HELLO"' in r.out and '"text":"AGAIN"' in r.out and "denied: at night" in r.out, r)
    expect("must be one JSON object" in r.err and r.out.count("\n") == 3, r)


@case("uninstall removes all of it")
def uninstall(env):
    staged = env.path("staged")
    for target in ("install", "uninstall"):
        r = run(["make", "-s", "-C", ROOT, target, "DESTDIR=" + staged, "PREFIX=/usr"], {**os.environ}, ROOT, deadline_s=300)
        expect(r.status == 0, r)
    left = [p for p in glob.glob(staged + "/**", recursive=True) if os.path.isfile(p)]
    expect(not left, left)


if __name__ == "__main__":
    main()
