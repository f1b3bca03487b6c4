"""An MCP server that does to files what it is asked: tools write_file { path, content } and try { op, path, to, nested }.

try answers "ok" or the error's name (EROFS…). Each op is undone where it works, but for what the test then finds.
nested: in user and mount namespaces of its own, with all capabilities there.
"""
import ctypes, errno, json, os, subprocess, sys

LIBC = ctypes.CDLL(None, use_errno=True)
ORCH = os.getppid()
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 1, 32, 4096, 8192, 16384
DETACH = 2


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "failed")
    return result


def mount(source, target, kind, flags):
    check(LIBC.mount(source and source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), None))


def write(path, to):
    os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW))


def create(path, to):
    new = os.path.join(path, "planted.lua")
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT, 0o644))
    os.unlink(new)


def rename_away(path, to):
    os.rename(path, path + ".away")
    os.rename(path + ".away", path)


def rename_over(path, to):
    """Something of the same kind in the place of path; for good."""
    new = path + ".over"
    os.mkdir(new) if os.path.isdir(path) and not os.path.islink(path) else os.close(os.open(new, os.O_WRONLY | os.O_CREAT, 0o644))
    try:
        check(LIBC.renameat2(-100, new.encode(), -100, path.encode(), 2))  # RENAME_EXCHANGE
    finally:
        os.rmdir(new) if os.path.isdir(new) else os.unlink(new)


def replace(path, to):
    new = path + ".over"
    os.mkdir(new) if os.path.isdir(path) and not os.path.islink(path) else os.close(os.open(new, os.O_WRONLY | os.O_CREAT, 0o644))
    try:
        os.rename(new, path)
    except OSError:
        os.rmdir(new) if os.path.isdir(new) else os.unlink(new)
        raise


def relative(path, to):
    """By the working directory, which was open before the mounts were there."""
    os.chdir(to)
    os.close(os.open(os.path.relpath(path, to), os.O_WRONLY))


def through(pid):
    return lambda path, to: os.close(os.open("/proc/%d/root%s" % (pid, path), os.O_WRONLY))


def by_cwd(path, to):
    os.close(os.open("/proc/%d/cwd/%s" % (ORCH, os.path.relpath(path, os.getcwd())), os.O_WRONLY))


def enter(path, to):
    check(LIBC.setns(os.open("/proc/%d/ns/mnt" % ORCH, os.O_RDONLY), 0))


def attach(path, to):
    check(LIBC.ptrace(16, ORCH, None, None))  # PTRACE_ATTACH


def below(path, to):
    """What lies below the mount: a mount of its folder without what is mounted there."""
    os.makedirs(to, exist_ok=True)
    mount(os.path.dirname(path), to, None, MS_BIND)
    os.close(os.open(os.path.join(to, os.path.basename(path)), os.O_WRONLY))


def below_all(path, to):
    os.makedirs(to, exist_ok=True)
    mount(os.path.dirname(path), to, None, MS_BIND | MS_REC)
    target = os.path.join(to, os.path.basename(path))
    LIBC.umount2(target.encode(), DETACH)
    mount(None, target, None, MS_REMOUNT | MS_BIND)
    os.close(os.open(target, os.O_WRONLY))


def by_handle(path, to):
    """The file by its handle, seen from a mount of another folder."""
    handle = ctypes.create_string_buffer(8 + 128)
    handle[0:4] = (128).to_bytes(4, "little")
    number = ctypes.c_int()
    check(LIBC.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(number), 0))
    os.makedirs(to, exist_ok=True)
    flags = os.O_RDONLY | os.O_DIRECTORY if os.path.isdir(path) else os.O_WRONLY
    fd = check(LIBC.open_by_handle_at(os.open(to, os.O_RDONLY), handle, flags))
    if flags & os.O_DIRECTORY:
        os.close(os.open("planted.lua", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd))


OPS = {
    "write": write, "create": create, "rename_away": rename_away, "rename_over": rename_over, "replace": replace, "relative": relative,
    "truncate": lambda path, to: os.truncate(path, os.stat(path).st_size), "chmod": lambda path, to: os.chmod(path, 0o777),
    "utime": lambda path, to: os.utime(path), "unlink": lambda path, to: os.unlink(path), "rmdir": lambda path, to: os.rmdir(path),
    "link": lambda path, to: os.link(path, to), "xattr": lambda path, to: os.setxattr(path, "user.x", b"1"),
    "orch_root": through(ORCH), "init_root": through(1), "orch_cwd": by_cwd, "setns": enter, "ptrace": attach,
    "mount_over": lambda path, to: mount("t", path, "tmpfs", 0), "bind_over": lambda path, to: mount("/tmp", path, None, MS_BIND),
    "remount": lambda path, to: mount(None, path, None, MS_REMOUNT | MS_BIND), "move": lambda path, to: mount(path, "/mnt", None, MS_MOVE),
    "umount": lambda path, to: check(LIBC.umount2(path.encode(), 0)), "detach": lambda path, to: check(LIBC.umount2(path.encode(), DETACH)),
    "below": below, "below_all": below_all, "by_handle": by_handle,
}


def unshare():
    uid, gid = os.getuid(), os.getgid()
    check(LIBC.unshare(0x10000000 | 0x20000))
    for name, text in (("setgroups", "deny"), ("uid_map", "0 %d 1" % uid), ("gid_map", "0 %d 1" % gid)):
        with open("/proc/self/" + name, "w") as f:
            f.write(text)


def attempt(a):
    """In a child, whose namespaces and mistakes go with it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if a.get("nested"):
                unshare()
            OPS[a["op"]](a["path"], a.get("to"))
            said = "ok"
        except OSError as e:
            said = errno.errorcode.get(e.errno, str(e.errno))
        except BaseException as e:
            said = repr(e)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as f:
        said = f.read()
    os.waitpid(pid, 0)
    return said


def write_file(a):
    with open(a["path"], "w") as f:
        f.write(a["content"])
    return "ok"


def run(a):
    r = subprocess.run(a["argv"], capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **(a.get("env") or {})})
    return "%d %s" % (r.returncode, r.stdout + r.stderr)


def about(a):
    return json.dumps({"fds": sorted(os.listdir("/proc/self/fd")), "pgid": os.getpgid(0), "pid": os.getpid(), "cwd": os.getcwd(), "uid": os.getuid()})


TOOLS = {"write_file": write_file, "try": attempt, "run": run, "about": about}

for line in sys.stdin:
    m = json.loads(line)
    if "id" not in m:
        continue
    result = {"initialize": {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": {"name": "files", "version": "1"}},
              "tools/list": {"tools": [{"name": n, "inputSchema": {"type": "object"}} for n in TOOLS]}}.get(m["method"], {})
    if m["method"] == "tools/call":
        try:
            said, bad = TOOLS[m["params"]["name"]](m["params"]["arguments"]), False
        except OSError as e:
            said, bad = errno.errorcode.get(e.errno, str(e.errno)), True
        result = {"content": [{"type": "text", "text": said}], "isError": bad}
    print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": result}), flush=True)
