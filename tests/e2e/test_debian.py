# The image debian: built once from Debian's packages, what is in it, what its microVMs share; recipes and what
# can go wrong with them, there with a stand-in for mmdebstrap.
# as: user
import fcntl, hashlib, json, re, resource, stat

from orch_e2e import *

BUILD_S = 1200


def debian(env, image=True, more="", **project):
    """A project whose cache holds debian (and nothing that other test files use)."""
    env.shared_cache()
    env.environ["XDG_CACHE_HOME"] = os.path.join(env.environ["XDG_CACHE_HOME"], "debian")
    os.makedirs(env.environ["XDG_CACHE_HOME"], 0o700, exist_ok=True)
    vm = ["workspace = \".\"", more] + (["vm = { image = \"debian\" }"] if image else [])
    return env.project(more=", ".join(v for v in vm if v), **project)


def vm(env, *args, options=(), **more):
    return debian(env, **more).orch("vm", "run", *options, "--", *args, config=True, deadline_s=START_S)


def out(env, text, *options):
    r = vm(env, "bash", "-c", text, options=options)
    expect(r.status == 0, r)
    return r.out


def cache(env, *parts):
    """Where orch keeps its images."""
    r = json.loads(env.orch("image", "inspect", "debian", "--json").out)
    return os.path.join(os.path.dirname(os.path.dirname(r["disk"])), *parts)


def script(env, text, **more):
    env.write("script.lua", text)
    r = env.orch("script.lua", config=True, deadline_s=START_S, **more)
    expect(r.status == 0, r)
    return r.out


@case("image build debian: progress with sizes, found again, listed, inspected")
def build(env):
    debian(env)
    r = env.orch("image", "build", "debian", deadline_s=BUILD_S)
    expect(r.status == 0 and r.out.startswith("debian"), r)
    again = env.orch("image", "build", "debian")
    expect(again.status == 0 and again.out == r.out and "packages" not in again.err, again)
    if "packing" in r.err: # it was not there from an earlier run
        expect(re.search(r"packing \d+ MB", r.err) and re.search(r"disk: \d+\.\d MB", r.err) and "downloading" in r.err, r)
        expect("-hook" not in r.err, r)
    info = json.loads(env.orch("image", "inspect", "debian", "--json").out)
    expect(80e6 < os.path.getsize(info["disk"]) < 160e6, info)
    with open(os.path.join(os.path.dirname(info["disk"]), "manifest")) as f:
        kept = dict(line.split(" ", 1) for line in f.read().splitlines())
    with open(info["disk"], "rb") as f:
        expect(hashlib.sha256(f.read()).hexdigest() == kept["disk"], "the disk is not what its hash says")
    expect("debian" in env.orch("image", "list").out)
    left = [n for n in os.listdir(cache(env)) if n.startswith(".build")]
    expect(not left, left)


PROGRAMS = [("python3", "python3 -c 'print(6*7)'", "42\n"), ("git", "git init -q x && cd x && git -c user.name=a -c user.email=b commit -q --allow-empty -m m && git log --oneline | wc -l", "1\n"),
            ("curl", "curl --version | grep -c ^curl", "1\n"), ("jq", "echo '{\"a\":[1,2]}' | jq -c .a", "[1,2]\n"),
            ("Debian", ". /etc/os-release; echo $ID $VERSION_ID", "debian 12\n"),
            ("certificates", "test -s /etc/ssl/certs/ca-certificates.crt && echo yes", "yes\n"),
            ("its own name and no servers of the host's", "hostname; cat /etc/hostname; grep -c ^deb /etc/apt/sources.list; ls /etc/apt/sources.list.d | wc -l", "orch\norch\n0\n0\n")]


@case("what an agent needs is there")
def programs(env):
    got = script(debian(env), "local vm = assert(orch.vm.spawn{})\n" + "".join(
        "io.write(vm:exec({ 'bash', '-c', [==[%s]==] }, { timeout = '300s' }).stdout, '--\\n')\n" % text for _, text, _ in PROGRAMS))
    for (name, _, want), have in zip(PROGRAMS, got.split("--\n")):
        expect(have == want, name, have)


@case("uid 1000 in its home; root, a name or a number with --user")
def users(env):
    expect(out(env, "id -u; id -gn; pwd; echo $HOME $USER; touch a && stat -c %U a") == "1000\nuser\n/home/user\n/home/user user\nuser\n")
    expect(out(env, "id -u; pwd; touch /usr/bin/mine && echo made", "--user", "root") == "0\n/root\nmade\n")
    expect(out(env, "id -u; pwd", "--user", "user") == "1000\n/home/user\n")
    expect(out(env, "id -u", "--user", "4242") == "4242\n")
    r = vm(env, "true", options=("--user", "nobody-such"))
    expect(r.status == 125 and "user" in r.err, r)
    expect(vm(env, "touch", "/usr/bin/mine").status == 1)


@case("the disk is read-only, all over it is writable, and each microVM has a layer of its own")
def layers(env):
    got = out(env, "mount | grep ' on / '; ls -d /proc/1 /sys/class /dev/null /tmp /run /dev/pts/ptmx | wc -l; dd if=/dev/zero of=/dev/vda count=1 2>&1 | tail -n1; blockdev --getro /dev/vda",
              "--user", "root")
    expect(got.startswith("overlay on / ") and "\n6\n" in got and "\n0 bytes" in got and got.endswith("\n1\n"), got)
    got = script(debian(env), """
      local a, b = assert(orch.vm.spawn{}), assert(orch.vm.spawn{})
      local function sh(vm, text) local r = vm:exec({ "sh", "-c", text }, { user = "root" }) return r.stdout .. r.stderr end
      io.write(sh(a, "echo mine >/etc/motd; rm /usr/bin/jq; echo x >/usr/lib/new; cat /etc/motd"))
      io.write(sh(b, "ls /usr/bin/jq; ls /usr/lib/new 2>&1 | grep -c 'No such'; cat /etc/motd | grep -c mine"))
      io.write(sh(a, "ls /usr/bin/jq 2>&1 | grep -c 'No such'"))
    """)
    expect(got == "mine\n/usr/bin/jq\n1\n0\n1\n", got)


@case("a VMM holds nothing open that it could write to and that a later microVM would start from")
def held(env):
    debian(env)
    path = env.write("hold.lua", "local vm = assert(orch.vm.spawn{})\nassert(vm:exec({ 'true' }).status == 0)\n"
                     "io.stdout:write('up\\n') io.stdout:flush()\norch.sleep(600)\n")
    s = env.session(argv=env.argv(path))
    expect(s.recv_raw(START_S) == b"up")
    vmm = [pid for pid in descendants(s.pid) if "qemu" in name_of(pid)]
    expect(len(vmm) == 1, [name_of(pid) for pid in descendants(s.pid)])
    seen = set()
    for n in os.listdir("/proc/%d/fd" % vmm[0]):
        link = "/proc/%d/fd/%s" % (vmm[0], n)
        name, mode = os.readlink(link), os.stat(link).st_mode
        expect(not stat.S_ISDIR(mode), n, name)
        if not stat.S_ISREG(mode):
            continue
        seen.add(os.path.basename(name.split()[0]))
        if name.startswith("/memfd:"):
            fd = os.open(link, os.O_RDONLY)
            expect(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE, n, name)
            os.close(fd)
        else:
            expect(mode & 0o222 == 0, n, name, oct(mode))
    expect({"disk", "memfd:orch-mem"} <= seen, seen)


@case("many readers at once: the VMM lives within its limits")
def readers(env):
    got = out(env, "find /usr/lib /usr/share -type f | head -n 4000 >/tmp/all; for i in $(seq 40); do tail -n +$((i * 100)) /tmp/all | head -n 60 | xargs cat >/dev/null & done; wait; echo fine")
    expect(got == "fine\n", got)


@case("it is the default once it is built, base before, and what is configured always")
def default(env):
    r = json.loads(vm(env, "true", options=("--json",), image=False).out)
    expect(r["image"] == "debian", r)
    debian(env, image=False)
    expect("debian when built" in env.orch("config", "show", config=True).out)
    # A cache in which only base can be found, without building it here.
    env.environ["XDG_CACHE_HOME"] = env.path("cache")
    r = env.orch("doctor", "--json", config=True)
    expect(any("image base" in c["why"] for c in json.loads(r.out)["checks"] if c["name"] == "image"), r)


@case("doctor: where unshare makes no namespaces for a user, as AppArmor has it on Ubuntu, the image cannot be built")
def doctor(env):
    find = lambda: {c["name"]: c for c in json.loads(env.orch("doctor", "--json", deadline_s=60).out)["checks"]}
    expect("unshare" not in find())
    path = env.write("fakes/unshare", "#!/bin/sh\necho 'unshare: write failed /proc/self/uid_map: Operation not permitted' >&2\nexit 1\n")
    os.chmod(path, 0o755)
    env.environ["PATH"] = os.path.dirname(path) + ":" + env.environ["PATH"]
    if os.geteuid() == 0:
        expect("unshare" not in find())
        return
    found = find()["unshare"]
    expect(found["state"] == "warn" and "uid_map: Operation not permitted" in found["why"] and found["fix"], found)
    r = env.orch("image", "build", "debian", "--fresh", deadline_s=60)
    expect(r.status == 1 and "orch doctor" in r.err, r)


@case("before it is built: refused at once, by the command that builds it")
def not_built(env):
    env.project(more='vm = { image = "debian" }')
    env.environ["XDG_CACHE_HOME"] = env.path("cache")
    r = env.orch("vm", "run", "--", "true", config=True)
    expect(r.status == 125 and "orch image build debian" in r.err and "status 5" in r.err and "building" not in r.err, r)
    s = env.session()
    s.initialize()
    text = text_of(s.call("run_command", {"command": "true"}))
    expect(text.startswith("not run: ") and "orch image build debian" in text, text)
    r = env.orch("vm", "run", "--image", "toolbox", "--", "true", config=True)
    expect(r.status == 125 and "toolbox.lua" in r.err, r)
    r = env.orch("vm", "run", "--image", "debain", "--", "true", config=True)
    expect(r.status == 125 and "did you mean debian?" in r.err, r)


@case("run_python: what it printed and how it ended")
def python(env):
    debian(env, more="")
    s = env.session()
    s.initialize()
    for code, text in (("import sys, json\nprint(json.dumps(sys.argv[1:]))\nsys.exit(3)", '["a b", "\\u00e9"]\n[exit status 3]'), ("pass", "[no output]"),
                       ("import os\nos.kill(os.getpid(), 15)", "[killed by signal 15 (SIGTERM)]")):
        r = s.call("run_python", {"code": code, "args": ["a b", "é"]}, deadline_s=START_S)
        expect(text_of(r) == text and "structuredContent" not in r and not r.get("isError"), r)
    text = text_of(s.call("run_python", {"code": "1/0"}, deadline_s=START_S))
    expect(text.startswith("[stderr]\nTraceback") and text.endswith("ZeroDivisionError: division by zero\n[exit status 1]"), text)


@case("run_python: more memory than there is ends it at once")
def memory(env):
    debian(env, more="")
    s = env.session()
    s.initialize()
    for code, said in (("x = bytearray(1 << 33)", "MemoryError"), ("x = [0]\nwhile True: x += x", ""), ("import os\nwhile os.fork() >= 0: pass", "BlockingIOError"),
                       ("import mmap\nfor m in [mmap.mmap(-1, 1 << 26) for _ in range(8)]:\n  for at in range(0, 1 << 26, 4096): m[at] = 1", ""),
                       ("import os\nos.memfd_create('x')\nos.write(3, b'x' * (1 << 20)) and [os.write(3, b'x' * (1 << 20)) for _ in range(1000)]", "")):
        text = text_of(s.call("run_python", {"code": code}, deadline_s=START_S))
        expect(text == "[killed: no memory left of 256 MiB: vm.memory]" or said and said in text, code, text)
        expect(text_of(s.call("run_python", {"code": "print('alive')"}, deadline_s=START_S)) == "alive\n")


@case("read_file and list_dir of the workspace")
def workspace(env):
    env.project()
    env.write("notes.txt", "one\ntwo\nthree\n")
    env.write("sub/deep.bin", b"a\0b")
    os.symlink("/etc/passwd", env.path("p", "out"))
    s = env.session()
    s.initialize()
    names = {t["name"] for t in s.request("tools/list")["result"]["tools"]}
    expect({"run_command", "run_python", "read_file", "list_dir"} <= names, names)
    expect(text_of(s.call("read_file", {"path": "notes.txt"})) == "one\ntwo\nthree\n")
    r = s.call("read_file", {"path": "notes.txt", "offset": 2, "limit": 1})
    expect(text_of(r) == "two\n[more: offset 3]" and "structuredContent" not in r, r)
    env.write("nothing.txt", "")
    expect(text_of(s.call("read_file", {"path": "nothing.txt"})) == "[empty file]")
    for path, why in (("sub/deep.bin", "not a text file"), ("out", "out of the workspace"), ("../stderr-0", "out of the workspace"), ("none", "No such file"), ("sub", "directory")):
        r = s.call("read_file", {"path": path})
        expect(r["isError"] and why in text_of(r), path, r)
    r = s.call("read_file", {"path": "notes.txt", "offset": 9})
    expect(r["isError"] and "it has 3" in text_of(r), r)
    env.write("long.txt", "x" * 300000 + "\nend\n")
    r = s.call("read_file", {"path": "long.txt"})
    expect(len(text_of(r)) < 270000 and text_of(r).endswith("[more: offset 2]"), text_of(r)[-80:])
    expect(text_of(s.call("read_file", {"path": "long.txt", "offset": 2})) == "end\n")
    r = s.call("list_dir")
    expect({"notes.txt  14", "sub/", "out  (link)"} <= set(text_of(r).split("\n")) and "structuredContent" not in r, r)
    expect(s.call("list_dir", {"path": ".."})["isError"])
    os.mkdir(env.path("p", "empty"))
    expect(text_of(s.call("list_dir", {"path": "empty"})) == "[empty folder]")


# ---- recipes, with a program in mmdebstrap's place: what it is given, and what it does to us

FAKE = """#!/bin/sh
for a; do case "$a" in work/root*) target=$PWD/$a ;; esac; done
{ for a; do printf '%%s\\n' "$a"; done; } >%(dir)s/args
cd "$TMPDIR"
%(body)s
mkdir -p root/etc root/dev && cp %(dir)s/args root/etc/args
case $target in *.tar) tar -cf "$target" -C root . ;; *) mv root "$target" ;; esac
"""
BUILD = ("image", "build", "./toolbox.lua")


def stand_in(env, body="", recipe=""):
    """A project with a recipe and a script as its mmdebstrap; what to pass to build it, on the kernel of debian."""
    debian(env)
    kernel = json.loads(env.orch("image", "inspect", "debian", "--json").out)["kernel"]
    env.environ["XDG_CACHE_HOME"] = env.path("cache")
    os.makedirs(env.path("bin"))
    with open(env.path("bin", "mmdebstrap"), "w") as f:
        f.write(FAKE % {"dir": env.dir, "body": body})
    os.chmod(env.path("bin", "mmdebstrap"), 0o755)
    env.environ["PATH"] = env.path("bin") + ":/usr/local/bin:/usr/bin:/bin"
    env.write("toolbox.lua", 'return { name = "toolbox", packages = { "jq", "git" }, %s }\n' % recipe)
    return BUILD + ("--kernel", kernel)


def nothing_taken(env):
    r = env.orch("image", "inspect", "toolbox")
    expect(r.status != 0 and "not built" in r.err, r)
    images = env.path("cache", "orch", "images")
    left = [n for n in os.listdir(images) if n != ".lock"] if os.path.isdir(images) else []
    expect(not left, left)


@case("an own recipe: what mmdebstrap is given; its image is found and removed")
def own(env):
    build = stand_in(env, recipe='leave_out = { "/usr/share/doc/*" }, files = { { path = "/etc/it\'s", text = "a\'b\\n$HOME", mode = "0755" } }, commands = { "echo \'x y\' >/z" }, warm = { "jq ." }')
    r = env.orch(*build)
    expect(r.status == 0 and r.out.startswith("toolbox "), r)
    with open(env.path("args")) as f:
        args = f.read()
    for want in ("--variant=minbase\n", "--include=jq,git\n", "--dpkgopt=path-exclude=/usr/share/doc/*\n", "\nbookworm\nwork/root", "useradd --uid 1000",
                 "'/etc/it'\\''s' 'a'\\''b\n$HOME' '0755'", "echo '\\''x y'\\'' >/z", "'/etc/orch/warm' 'exec >/dev/null 2>&1 </dev/null\njq .\n:\n'"):
        expect(want in args, want, args)
    info = json.loads(env.orch("image", "inspect", "toolbox", "--json").out)
    expect(os.path.exists(info["disk"]) and os.stat(info["disk"]).st_mode & 0o777 == 0o444, info)
    r = env.orch(*build)
    expect(r.status == 0 and "packing" not in r.err, r)
    os.remove(env.path("args"))
    r = env.orch(*build, "--fresh")
    expect(r.status == 0 and "packing" in r.err and os.path.exists(env.path("args")), r)
    expect(json.loads(env.orch("image", "list", "--json").out)[0]["name"] == "toolbox")
    expect(env.orch("image", "rm", "toolbox").status == 0)
    nothing_taken(env)


BAD = [("unknown key", 'package = {}', "package: unknown key"), ("a function", "commands = { function() end }", "function"), ("no list", "leave_out = 5", "leave_out: expected a list"),
       ("an option for a package", 'commands = {}, packages = { "--simulate" }', "packages[1]"), ("a path that climbs", 'files = { { path = "/a/../b", text = "" } }', "files[1]"),
       ("base", 'suite = "bookworm", name = "base"', "base is made without a recipe"), ("a loop", "suite = (function() while true do end end)()", "limit"),
       ("io", "suite = io.open('/etc/passwd')", "io")]


def bad_recipe(env, text, why):
    stand_in(env, recipe=text)
    r = env.orch(*BUILD)
    expect(r.status == 6 and "toolbox.lua" in r.err and why in r.err, r)


for name, *rest in BAD:
    case("a recipe with " + name + ": refused with the file's name", *rest)(bad_recipe)


@case("no such recipe, no such file")
def no_recipe(env):
    r = env.orch("image", "build", "debain")
    expect(r.status == 2 and "base, debian" in r.err, r)
    r = env.orch("image", "build", "./none.lua")
    expect(r.status == 1 and "none.lua" in r.err and "No such file" in r.err, r)


FAILS = [("a package that does not exist", 'echo "E: Unable to locate package nope" >&2; exit 100', "a package of the recipe does not exist"),
         ("no network", 'echo "E: Could not resolve \'mirror.example\'" >&2; exit 100', "is there a network"),
         ("a command that fails", 'echo "I: running..." >&2; echo "frobnicate: not found" >&2; exit 25', "frobnicate: not found")]


def fails(env, body, why):
    r = env.orch(*stand_in(env, body))
    expect(r.status == 1 and why in r.err and "toolbox" in r.err, r)
    nothing_taken(env)


for name, *rest in FAILS:
    case("image build: " + name + ": says so, nothing is left", *rest)(fails)


@case("image build without mmdebstrap: names the packages")
def missing(env):
    build = stand_in(env)
    os.remove(env.path("bin", "mmdebstrap"))
    for name in ("unshare", "true", "lz4"):
        os.symlink("/usr/bin/" + name, env.path("bin", name))
    env.environ["PATH"] = env.path("bin")
    r = env.orch(*build)
    expect(r.status == 1 and "mmdebstrap" in r.err and "apt-get install" in r.err and "erofs-utils" in r.err, r)
    nothing_taken(env)


@case("image build on a full disk: says so, nothing is left")
def full(env):
    build = stand_in(env, 'mkdir -p root/big && head -c 60000000 /dev/urandom >root/big/file')
    argv = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=20M t "$0" && "$@"; s=$?; ls -A "$0"/orch/images >"$0".left; exit $s', env.path("cache")]
    r = run(argv + env.argv(*build, config=False), env.environ, env.path("p"))
    expect(r.status == 1 and "No space left on device" in r.err, r)
    with open(env.path("cache.left")) as f:
        left = f.read()
    expect(left in ("", ".lock\n"), left)


@case("kill -9 in the middle of a build: nothing runs, nothing is taken for an image, the next build goes well")
def killed(env):
    build = stand_in(env, 'mkdir -p root/x; head -c 1000000 /dev/zero >root/x/y; echo "I: extracting archives..." >&2; test -e %s/go || sleep 1000' % env.dir)
    child = subprocess.Popen(env.argv(*build, config=False), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env.environ, cwd=env.path("p"))
    while True:
        line = child.stderr.readline()
        expect(line, "no progress")
        if b"extracting" in line:
            break
    child.kill()
    child.wait()
    child.stderr.close()
    left = leftovers()
    expect(not left, left)
    expect(env.orch("image", "inspect", "toolbox").status != 0)
    open(env.path("go"), "w").close()
    r = env.orch(*build)
    expect(r.status == 0, r)
    names = os.listdir(env.path("cache", "orch", "images"))
    expect(not [n for n in names if n.startswith(".build")] and len(names) == 3, names)


@case("an image that is removed or built anew goes on in the processes that use it")
def removed(env):
    debian(env)
    env.environ["XDG_CACHE_HOME"] = env.path("cache")
    kept = os.path.join(os.environ.get("ORCH_TEST_CACHE") or os.path.join(ROOT, "build/test-cache"), "debian")
    shutil.copytree(kept, env.path("cache"), symlinks=True, dirs_exist_ok=True)
    s = env.session()
    s.initialize()
    expect(text_of(s.call("run_command", {"command": "echo a"}, deadline_s=START_S)) == "a\n")
    expect(env.orch("image", "rm", "debian").status == 0)
    expect(text_of(s.call("run_command", {"command": "cat /etc/orch/warm >/dev/null; python3 -c 'print(2)'"}, deadline_s=START_S)) == "2\n")
    expect(s.end() == 0)


if __name__ == "__main__":
    main()
