# The end: end of input, signals, a closed stdout. With the right status, nothing left behind.
# as: user asan
import signal

from orch_e2e import *

SPAWNED = "return { name = 'x', description = 'd', input = { type = 'object' }, run = function(a, ctx) while true do orch.sleep(0.01) ctx:progress(1, 2, 'x') end end }"


def started(env, calls=0):
    s = env.project(tools={"wait": SLEEP, "echo": ECHO, "x": SPAWNED}).session()
    s.initialize()
    for _ in range(calls):
        s.start("tools/call", {"name": "wait", "arguments": {"seconds": 500}})
    expect(s.request("ping")["result"] == {})
    return s


def at_end(env, calls):
    s = started(env, calls)
    expect(s.end() == 0, s.child.returncode, s.stderr())


case("end of input: exit 0", 0)(at_end)
case("end of input with a call running: exit 0, which does not wait for it", 1)(at_end)
case("end of input with 50 calls running", 50)(at_end)


@case("calls that have not ended a moment after the end of input are cancelled, and answered so")
def cancelled(env):
    s = started(env, 3)
    s.close_input()
    answers = [s.recv() for _ in range(3)]
    expect(all(a["result"]["isError"] and text_of(a["result"]) == "cancelled: the client's input ended" for a in answers), answers)
    expect(s.wait(2) == 0)


@case("end of input before anything was said")
def nothing(env):
    expect(env.project().session().end() == 0)


@case("end of input in the middle of a line")
def half(env):
    s = started(env)
    s.send_raw(b'{"jsonrpc":"2.0","id":1,"meth')
    expect(s.end() == 0)


@case("requests that were written before the end of input are answered")
def answered(env):
    s = started(env)
    s.send_raw(b"".join(b'{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"echo","arguments":{"message":"x"}}}\n' % i for i in range(200, 260)))
    s.close_input()
    answers = [s.recv() for _ in range(60)]
    expect({a["id"] for a in answers if "result" in a} == set(range(200, 260)), answers)
    expect(s.wait() == 0)


def by_signal(env, number, status, calls):
    s = started(env, calls)
    os.kill(s.pid, number)
    expect(s.wait() == status, "exit status", s.child.returncode, s.stderr())


for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    for calls in (0, 5):
        case("%s with %d calls running: exit %d" % (number.name, calls, status), number, status, calls)(by_signal)


@case("SIGTERM right after the start")
def at_once(env):
    s = env.project().session()
    os.kill(s.pid, signal.SIGTERM)
    expect(s.wait() in (143, -15), s.child.returncode, s.stderr())


@case("a closed stdout ends it")
def closed_stdout(env):
    s = started(env, 1)
    s.child.stdout.close()
    try:
        for _ in range(3):
            s.child.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
    except OSError:
        pass
    status = s.wait()
    expect(status >= 0, "ended by signal", -status)


@case("a reader that does not read: memory stays bounded, then everything comes")
def slow_reader(env):
    s = started(env)
    message = "x" * 100000
    line = b'{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"echo","arguments":{"message":"' + message.encode() + b'"}}}\n'
    sent, fd = 0, s.child.stdin.fileno()
    data = memoryview(line % 0)
    while sent < 300:  # until orch stops taking input, or 30 MB
        if not select.select([], [fd], [], 0.2)[1]:
            break
        data = data[os.write(fd, data):]
        if not data:
            sent += 1
            data = memoryview(line % sent)
    with open("/proc/%d/status" % s.pid) as f:
        rss = int(re.search(r"VmRSS:\s+(\d+)", f.read()).group(1))
    expect(sent < 300, "orch took 30 MB of input while its output waited")
    expect(rss < (64 << 10) * (8 if ASAN else 1), "resident:", rss, "KiB")
    s.send_raw(bytes(data))
    for i in range(sent + 1):
        expect(s.recv()["id"] == i)


@case("5 starts one after the other leave nothing in the runtime folder")
def folders(env):
    for _ in range(5):
        s = started(env)
        expect(s.end() == 0)
    left = [os.path.join(d, f) for d, _, files in os.walk(env.path("run")) for f in files]
    expect(not left, left)


@case("descriptors and memory do not grow over 2,000 calls")
def leaks(env):
    s = started(env)

    def now():
        with open("/proc/%d/statm" % s.pid) as f:
            return len(os.listdir("/proc/%d/fd" % s.pid)), int(f.read().split()[1]) * 4

    def calls(n):
        for i in range(n):
            s.start("tools/call", {"name": "echo", "arguments": {"message": "x" * 1000}})
            if i % 32 == 31:
                for _ in range(32):
                    s.recv()
    calls(1024)
    before = now()
    calls(2048)
    after = now()
    expect(after[0] == before[0] and after[1] < before[1] + 4096 * ROOM, "descriptors, KiB:", before, after)


if __name__ == "__main__":
    main()
