"""Harness of the end-to-end tests: Python's standard library only.

A test file registers cases with @case("what holds") and ends with main(). Each case gets an Env: a
temporary home of its own, an environment made from nothing, a configuration to write, commands and
sessions to start. Everything started ends with the case; a process that is left is a failure.
Waiting is always for an event (a line, an exit), never for a length of time; its end is for a slow and
busy machine, and no case asserts how long something takes (tests/bench measures).
"""
import contextlib, ctypes, json, os, pty, re, select, shutil, signal, subprocess, sys, tempfile, time, traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ORCH = os.path.abspath(os.environ.get("ORCH_BIN") or os.path.join(ROOT, "build/release/orch"))
ASAN = "build/asan" in ORCH
SERVERS = os.path.join(ROOT, "tests/e2e/servers")
PY = sys.executable
LEGACY = "2025-11-25"
MODERN = "2026-07-28"
META = "io.modelcontextprotocol/"
WAIT_S = 60    # how long an event is awaited
START_S = 300  # one that takes a microVM: the first start on a machine builds the image
ROOM = 4 if ASAN else 1  # sanitizers take a few times the memory

# Orphans come to this process instead of init, so that none can be overlooked.
ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


# ---- processes

def stat_of(pid):
    """(parent, state, start time) of a process, or None."""
    try:
        with open("/proc/%d/stat" % pid) as f:
            text = f.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    rest = text[text.rindex(")") + 2:].split()
    return int(rest[1]), rest[0], int(rest[19])


LIVE = set()  # sessions that have not ended: theirs is not left over


def descendants(root):
    """Pids below root, zombies included, by /proc; without live sessions and what is below them."""
    below = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            st = stat_of(int(name))
            if st:
                below.setdefault(st[0], []).append(int(name))
    out, todo = [], [root]
    while todo:
        for pid in below.get(todo.pop(), []):
            if pid not in LIVE:
                out.append(pid)
                todo.append(pid)
    return out


def name_of(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as f:
            return "%d (%s)" % (pid, f.read().replace(b"\0", b" ").decode("utf-8", "replace").strip() or "?")
    except OSError:
        return "%d (gone)" % pid


def wait_exit(pid, deadline_s):
    """True when the process has ended within the time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0, deadline_s) * 1000))
    finally:
        os.close(fd)


def leftovers():
    """Names of processes below this one that do not end by themselves; zombies are reaped."""
    end = time.monotonic() + WAIT_S
    left = []
    for pid in descendants(os.getpid()):
        gone = wait_exit(pid, end - time.monotonic())
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if not gone:
            left.append(name_of(pid))
            os.kill(pid, signal.SIGKILL)
    return left


def until(condition, what):
    """Asks condition() until it is true: for files, which have no event in the standard library."""
    end = time.monotonic() + WAIT_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("waited in vain: %s" % what)
        select.select([], [], [], 0.002)


# ---- a session with `orch mcp stdio`

class Closed(AssertionError):
    pass


class Session:
    """Raw lines to and from a child. stderr goes to a file."""

    def __init__(self, argv, env, cwd, stderr_path):
        self.stderr_path = stderr_path
        self.argv = argv
        with open(stderr_path, "wb") as err:
            self.child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, cwd=cwd, env=env, bufsize=0)
        self.pid = self.child.pid
        LIVE.add(self.pid)
        self.buf = b""
        self.notes = []  # notifications and requests that came while an answer was awaited
        self.raw = []    # every line of stdout
        self.next_id = 0
        os.set_blocking(self.child.stdin.fileno(), False)
        os.set_blocking(self.child.stdout.fileno(), False)

    def stderr(self):
        with open(self.stderr_path, errors="replace") as f:
            return f.read()

    def _fail(self, why):
        raise Closed("%s\n  stderr: %s" % (why, self.stderr()[-2000:].strip() or "(nothing)"))

    def _read(self):
        """Reads what is there into buf; False at the end of the stream."""
        try:
            data = os.read(self.child.stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return True
        self.buf += data
        return bool(data)

    def send(self, message, deadline_s=WAIT_S):
        """A dict, or bytes sent as they are plus a newline. Answers are read meanwhile."""
        data = message + b"\n" if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        self.send_raw(data, deadline_s)

    def send_raw(self, data, deadline_s=WAIT_S):
        end = time.monotonic() + deadline_s
        view, fd, out = memoryview(data), self.child.stdin.fileno(), self.child.stdout.fileno()
        while view:
            readable, writable, _ = select.select([out], [fd], [], max(0, end - time.monotonic()))
            if readable and not self._read():
                self._fail("end of stdout")
            if writable:
                try:
                    view = view[os.write(fd, view):]
                except BrokenPipeError:
                    self._fail("orch closed its standard input")
            elif time.monotonic() > end:
                self._fail("orch does not read its standard input")

    def recv_raw(self, deadline_s=WAIT_S):
        """The next line without its newline; Closed at the end of the stream or the deadline."""
        end = time.monotonic() + deadline_s
        while b"\n" not in self.buf:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0, end - time.monotonic()))
            if not ready:
                self._fail("no line within %g s" % deadline_s)
            if not self._read():
                self._fail("end of stdout%s" % ("; last: %r" % self.buf[:200] if self.buf else ""))
        line, _, self.buf = self.buf.partition(b"\n")
        self.raw.append(line)
        return line

    def recv(self, deadline_s=WAIT_S):
        line = self.recv_raw(deadline_s)
        try:
            return json.loads(line)
        except ValueError:
            raise AssertionError("stdout is not JSON: %r" % line[:300])

    def answer(self, id, deadline_s=WAIT_S):
        """The answer with this id; notifications and requests are kept in notes."""
        while True:
            message = self.recv(deadline_s)
            if isinstance(message, dict) and "method" in message:
                self.notes.append(message)
            elif isinstance(message, dict) and message.get("id") == id:
                return message
            else:
                raise AssertionError("answer to %r awaited, got %r" % (id, message))

    def start(self, method, params=None, modern=False):
        """Sends a request, returns its id."""
        self.next_id += 1
        message = {"jsonrpc": "2.0", "id": self.next_id, "method": method}
        if modern:
            params = {**(params or {}), "_meta": {**modern_meta(), **((params or {}).get("_meta") or {})}}
        if params is not None:
            message["params"] = params
        self.send(message)
        return self.next_id

    def request(self, method, params=None, modern=False, deadline_s=WAIT_S):
        return self.answer(self.start(method, params, modern), deadline_s)

    def notify(self, method, params=None):
        self.send({"jsonrpc": "2.0", "method": method, **({"params": params} if params is not None else {})})

    def initialize(self, version=LEGACY, notify=True):
        answer = self.request("initialize", {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "e2e", "version": "1"}})
        assert "result" in answer, answer
        if notify:
            self.notify("notifications/initialized")
        return answer["result"]

    def call(self, tool, arguments=None, modern=False, deadline_s=WAIT_S):
        """tools/call; its result object."""
        answer = self.request("tools/call", {"name": tool, "arguments": arguments or {}}, modern, deadline_s)
        assert "result" in answer, answer
        return answer["result"]

    def close_input(self):
        if not self.child.stdin.closed:
            self.child.stdin.close()

    def wait(self, deadline_s=WAIT_S):
        """Exit status within the time, or an assertion."""
        if not wait_exit(self.pid, deadline_s):
            self._fail("orch did not end within %g s" % deadline_s)
        LIVE.discard(self.pid)
        return self.child.wait()

    def end(self, deadline_s=WAIT_S):
        """End of input; the exit status."""
        self.close_input()
        return self.wait(deadline_s)

    def kill(self):
        if self.child.returncode is None:
            self.child.kill()
            self.child.wait()
        LIVE.discard(self.pid)
        self.close_input()
        self.child.stdout.close()


def modern_meta(version=MODERN):
    return {META + "protocolVersion": version, META + "clientCapabilities": {}, META + "clientInfo": {"name": "e2e", "version": "1"}}


def text_of(result):
    """The text of a tool result."""
    return "".join(item.get("text", "") for item in result.get("content", []))


# ---- one case's world

ECHO = """return {
  name = "echo", description = "Returns its message",
  input = { type = "object", properties = { message = { type = "string" } }, required = { "message" } },
  run = function(args) return { text = args.message } end,
}
"""
SLEEP = """return {
  name = "wait", description = "Waits, then says so",
  input = { type = "object", properties = { seconds = { type = "number" } }, required = { "seconds" } },
  timeout = "600s",
  run = function(args) orch.sleep(args.seconds) return { text = "waited" } end,
}
"""
ALLOW_ALL = 'return { rules = { { tool = "*", action = "allow" } } }\n'


class Env:
    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="orch-e2e-")
        self.sessions = []
        self.environ = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
        for name, value in os.environ.items():
            if name.startswith(("ASAN_", "UBSAN_")):
                self.environ[name] = value
        for name, folder in (("HOME", "home"), ("XDG_RUNTIME_DIR", "run"), ("XDG_STATE_HOME", "state"),
                             ("XDG_CONFIG_HOME", "config"), ("XDG_CACHE_HOME", "cache")):
            self.environ[name] = self.path(folder)
            os.mkdir(self.path(folder), 0o700)
        os.mkdir(self.path("p"))

    def shared_cache(self):
        """Guest images are built once for all cases, not once a case."""
        self.environ["XDG_CACHE_HOME"] = os.environ.get("ORCH_TEST_CACHE") or os.path.join(ROOT, "build/test-cache")
        os.makedirs(self.environ["XDG_CACHE_HOME"], 0o700, exist_ok=True)
        return self

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def write(self, name, text):
        """A file below the project folder p/; text or bytes; its path."""
        path = self.path("p", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(text if isinstance(text, bytes) else text.encode())
        return path

    def project(self, rules=ALLOW_ALL, tools=None, more=""):
        """orchestrator.lua with policies, tools and an audit folder; `more` are further keys."""
        self.write("policies/tools.lua", rules)
        for name, text in (tools or {"echo": ECHO}).items():
            self.write("lua/tools/%s.lua" % name, text)
        self.write("orchestrator.lua", 'return { policies = "policies", tools = { "lua/tools" }, audit = { dir = "audit" }, %s }\n' % more)
        return self

    @property
    def config(self):
        return self.path("p", "orchestrator.lua")

    def argv(self, *args, config=True):
        return [ORCH] + (["--config", self.config] if config else []) + list(args)

    def session(self, *args, config=True, argv=None, environ=None):
        """`orch mcp stdio ARG…` with the project's configuration."""
        session = Session(argv or self.argv("mcp", "stdio", *args, config=config), environ or self.environ, self.path("p"),
                          self.path("stderr-%d" % len(self.sessions)))
        self.sessions.append(session)
        return session

    def orch(self, *args, config=False, input=b"", deadline_s=WAIT_S, environ=None, cwd=None):
        """One command to its end: status, stdout, stderr (text)."""
        return run(self.argv(*args, config=config), environ or self.environ, cwd or self.path("p"), input, deadline_s)

    def person(self, *args, config=False, environ=None, cwd=None):
        """The same at a terminal, which has what orch says on stderr."""
        return run_pty(self.argv(*args, config=config), environ or self.environ, cwd or self.path("p"))

    def audit(self):
        """All lines of the audit log, parsed, in order."""
        lines = []
        folder = self.path("p", "audit")
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if name.endswith(".jsonl"):
                with open(os.path.join(folder, name), "rb") as f:
                    lines += [json.loads(line) for line in f.read().split(b"\n") if line.strip(b"\0")]
        return lines

    def audit_file(self):
        files = [n for n in os.listdir(self.path("p", "audit")) if n.endswith(".jsonl")]
        assert len(files) == 1, files
        return self.path("p", "audit", files[0])

    def close(self):
        for session in self.sessions:
            session.kill()
        left = leftovers()
        shutil.rmtree(self.dir, ignore_errors=True)
        return left


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
        self.out_bytes = out

    def __repr__(self):
        return "status %d\n  stdout: %s\n  stderr: %s" % (self.status, self.out.strip(), self.err.strip())


def run(argv, environ, cwd, input=b"", deadline_s=WAIT_S):
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, cwd=cwd)
    try:
        out, err = child.communicate(input, deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError("no end within %g s: %s\n%s" % (deadline_s, " ".join(argv), err.decode("utf-8", "replace")))
    return Result(child.returncode, out, err)


def run_pty(argv, environ, cwd, deadline_s=WAIT_S):
    """One command to its end with a terminal as standard input and error; nobody types."""
    terminal, theirs = pty.openpty()
    child = subprocess.Popen(argv, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environ, cwd=cwd, start_new_session=True)
    os.close(theirs)
    out, end = {terminal: b"", child.stdout.fileno(): b""}, time.monotonic() + deadline_s
    waiting = set(out)
    try:
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0, end - time.monotonic()))
            if not ready:
                child.kill()
                raise AssertionError("no end within %g s: %s\n%r" % (deadline_s, " ".join(argv), out))
            for fd in ready:
                try:
                    data = os.read(fd, 1 << 16)
                except OSError:  # EIO: the terminal has no user any more
                    data = b""
                out[fd] += data
                if not data:
                    waiting.remove(fd)
        child.wait()
        return Result(child.returncode, out[child.stdout.fileno()], out[terminal].replace(b"\r\n", b"\n"))
    finally:
        child.wait()
        child.stdout.close()
        os.close(terminal)


# ---- registry

CASES = []


def case(name, *args):
    """Registers a function of (env, *args); stacked or called in a loop for tables."""
    def add(function):
        CASES.append((name, function, args))
        return function
    return add


def expect(condition, *what):
    if not condition:
        raise AssertionError(" ".join(w if isinstance(w, str) else repr(w) for w in what))


def main():
    """Runs the cases (those whose name contains an argument, when there are arguments); prints TAP."""
    wanted = [c for c in CASES if not sys.argv[1:] or any(a in c[0] for a in sys.argv[1:])]
    print("1..%d" % len(wanted))
    failed = 0
    for number, (name, function, args) in enumerate(wanted, 1):
        env, why = Env(), None
        try:
            function(env, *args)
        except AssertionError as error:
            line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename != __file__), 0)
            why = "line %d: %s" % (line, error or "assertion")
        except Exception:
            why = traceback.format_exc()
        left = env.close()
        if left and not why:
            why = "processes left: " + ", ".join(left)
        print("%s %d - %s" % ("not ok" if why else "ok", number, name))
        if why:
            failed += 1
            print("\n".join("# " + line for line in why.splitlines()))
        sys.stdout.flush()
    sys.exit(1 if failed else 0)
