# Real microVMs: vm run, run_command, cancellation, many at once, the end of orch in every way.
# as: user
import json, random, re, signal

from orch_e2e import *

RUN_COMMAND = 'return { rules = { { tool = "run_command", action = "allow" }, { tool = "echo", action = "allow" } } }'


def vm(env, *args, input=b"", options=(), deadline_s=START_S, **more):
    return env.shared_cache().project(RUN_COMMAND).orch("vm", "run", *options, "--", *args, config=True, input=input, deadline_s=deadline_s, **more)


def session(env, **project):
    s = env.shared_cache().project(RUN_COMMAND, **project).session()
    s.initialize()
    return s


def command(s, text, deadline_s=START_S):
    return s.call("run_command", {"command": text}, deadline_s=deadline_s)


STATUS = [("true", ["true"], 0), ("exit 3", ["sh", "-c", "exit 3"], 3), ("exit 255", ["sh", "-c", "exit 255"], 255), ("SIGKILL", ["sh", "-c", "kill -9 $$"], 137),
          ("SIGSEGV", ["sh", "-c", "kill -11 $$"], 139), ("not found", ["no-such-command"], 127), ("not executable", ["/etc/passwd"], 126)]


def exit_status(env, argv, status):
    r = vm(env, *argv)
    expect(r.status == status, r)


for name, *rest in STATUS:
    case("vm run: exit status of " + name, *rest)(exit_status)


@case("vm run: stdin, stdout and stderr are the command's, byte by byte")
def streams(env):
    data = bytes(range(256)) * 4000 + b"\0\xff\n"
    r = vm(env, "cat", input=data)
    expect(r.status == 0 and r.out_bytes == data, r.status, len(r.out_bytes), r.err)
    r = vm(env, "sh", "-c", "echo out; echo err >&2")
    expect(r.out == "out\n" and "err\n" in r.err, r)


@case("vm run: arguments arrive as they are")
def arguments(env):
    args = ["a b", "", "*", "$HOME", "é", "new\nline", "--", "-v", "'\"\\"]
    r = vm(env, "sh", "-c", 'for a; do printf "[%s]" "$a"; done', "sh", *args)
    expect(r.out == "".join("[%s]" % a for a in args), r)


@case("vm run: uid 1000 unless said, no network interface but lo, no host files")
def guest(env):
    r = vm(env, "sh", "-c", "id -u; ls /sys/class/net; cat /proc/1/comm; ls -d %s 2>&1" % env.dir)
    lines = r.out.split()
    expect(r.status != 125 and len(lines) > 1, r)
    expect(lines[0] == "1000" and lines[1] == "lo" and "eth0" not in r.out and "No such file" in r.out, r)
    r = vm(env, "id", "-u", options=("--user", "0"))
    expect(r.out == "0\n", r)


@case("vm run --json names isolation and status")
def as_json(env):
    r = vm(env, "sh", "-c", "echo x; exit 4", options=("--json",))
    expect(r.status == 4, r)
    parsed = json.loads(r.out)
    expect( parsed["status"] == 4 and parsed["isolation"] in ("hardware", "emulated") and parsed["stdout"] == "x\n", r)


@case("vm run: time-out is 124 and ends the whole tree")
def timeout(env):
    vm(env, "true")
    r = vm(env, "sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000", options=("--timeout", "500ms"))
    expect(r.status == 124, r)


@case("vm run: a network policy that does not exist is refused before anything runs")
def network(env):
    r = vm(env, "true", options=("--network", "packages"))
    expect(r.status == 125 and r.out == "" and "status 6" in r.err and "no network policy \"packages\"" in r.err, r)


@case("vm run: memory and processors as asked")
def sizes(env):
    r = vm(env, "sh", "-c", "nproc; grep MemTotal /proc/meminfo", options=("--memory", "384M", "--vcpus", "2"))
    expect(r.status == 0, r)
    n, _, kib, _ = r.out.split()
    expect(n == "2" and 300 << 10 < int(kib) < 384 << 10, r)


@case("vm run: SIGINT, SIGTERM and SIGHUP end it, nothing is left; nohup keeps it")
def interrupted(env):
    vm(env, "true")
    nohup = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]
    for number, status, before in ((signal.SIGINT, 130, []), (signal.SIGTERM, 143, []), (signal.SIGHUP, 129, []), (signal.SIGTERM, 143, nohup)):
        s = env.session(argv=before + env.argv("vm", "run", "--", "sh", "-c", "echo up; sleep 1000"))
        expect(s.recv_raw(START_S) == b"up")
        if before:
            os.kill(s.pid, signal.SIGHUP)
        os.kill(s.pid, number)
        expect(s.wait() == status, s.child.returncode, s.stderr())
        left = leftovers()
        expect(not left, left)


@case("spawn-vm prints id, backend, isolation and milliseconds")
def spawn_vm(env):
    r = env.shared_cache().project(RUN_COMMAND).orch("spawn-vm", config=True, deadline_s=START_S)
    expect(r.status == 0 and "qemu" in r.out and re.search("hardware|emulated", r.out) and re.search(r"\d+(\.\d+)? ?ms", r.out), r)


@case("run_command: a microVM for each call, isolation and decision in _meta")
def boot_ids(env):
    s = session(env)
    seen = set()
    for _ in range(3):
        r = command(s, "cat /proc/sys/kernel/random/boot_id; touch /tmp/mark; ls /tmp | wc -l")
        boot_id, marks = text_of(r).split()
        expect(marks == "1" and not r.get("isError"), r)
        expect(r["_meta"]["orch/isolation"] in ("hardware", "emulated") and r["_meta"]["orch/decision"] == "allow", r["_meta"])
        seen.add(boot_id)
    expect(len(seen) == 3, seen)
    for line in (b"random", b"uuid"):
        a, b = (text_of(command(s, "head -c 16 /dev/urandom | od -An -tx1")) for _ in range(2))
        expect(a != b and len(a) > 30, "clones share their random numbers:", a)
    expect(s.end() == 0)
    outcomes = [l for l in env.audit() if l["event"] == "outcome"]
    expect(all(l["isolation"] in ("hardware", "emulated") and l["vm"] for l in outcomes), outcomes[0])


# What a model is given: of a result with a structured part some clients show nothing else.
TEXTS = [("echo out; echo err >&2; exit 3", r"out\n\[stderr\]\nerr\n\[exit status 3\]"), ("printf out; printf err >&2", r"out\n\[stderr\]\nerr"),
         ("echo out", r"out\n"), ("true", r"\[no output\]"), ("exit 3", r"\[exit status 3\]"), ("echo err >&2", r"\[stderr\]\nerr\n"),
         ("printf out; kill -9 $$", r"out\n\[killed by signal 9 \(SIGKILL\)\]"), ("kill -11 $$", r"\[killed by signal 11 \(SIGSEGV\)\]"),
         ("echo a; tail /dev/zero", r"a\n\[killed: no memory left of 256 MiB: vm\.memory\]"),
         ("no-such-command", r"\[stderr\]\n.*not found\n\[exit status 127\]"),
         ("yes | head -c 2000000", r"y\n[y\n]*\[cut: stdout after 1048576 bytes, the rest was dropped\]"),
         ("yes | head -c 2000000; yes | head -c 2000000 >&2; exit 1",
          r"y\n[y\n]*\[stderr\]\ny\n[y\n]*\[cut: stdout and stderr after 1048576 bytes, the rest was dropped\]\n\[exit status 1\]")]


@case("run_command: the text tells the whole, and is all there is; what a command answers is no error")
def texts(env):
    s = session(env)
    for line, pattern in TEXTS:
        r = command(s, line)
        expect(re.fullmatch(pattern, text_of(r)), line, text_of(r)[:200], text_of(r)[-200:])
        expect("structuredContent" not in r and not r.get("isError"), line, r.keys())
    r = s.call("run_command", {"command": "echo begun; sleep 100", "timeout": 0.5}, deadline_s=START_S)
    expect(re.fullmatch(r"begun\n\[ended after [\d.]+ s: .+\]", text_of(r)) and not r.get("isError"), r)


# What a guest does with more memory than there is: (command, what comes of it). One microVM for all of them.
FULL = [("tail /dev/zero", "signal=9 oom=true"), ("x=a; while :; do x=$x$x; done", "signal=9 oom=true"),
        ("tail /dev/zero & wait; echo on", "signal=9 oom=true"), # the command whole, not a part of it
        ("f() { tail /dev/zero & }; f; f; f; wait", "signal=9 oom=true"),
        ("yes > /tmp/full; echo a $?", "status=0 oom=nil a 1"), ("echo more > /dev/shm/b || echo full", "status=0 oom=nil full"),
        ("yes > /var/tmp/c; echo d > $HOME/d || echo full", "status=0 oom=nil full"), ("rm /tmp/full; echo e > $HOME/e && echo room", "status=0 oom=nil room"),
        ("f() { while :; do sleep 100 & done; }; f", "oom="), ("dd if=/dev/zero of=/dev/null bs=1G count=1", "oom=nil")]

# What programs expect of a machine: (user, command, what it prints).
MACHINE = [("1000", "echo hi | cat /dev/stdin", "hi"), ("1000", "echo out > /dev/stdout", "out"), ("1000", "echo err > /dev/stderr; echo $?", "0"),
           ("1000", "ls /dev/fd/0", "/dev/fd/0"), ("1000", "id -G", "1000"), ("root", "id -G", "0"), ("4321", "id -G", "4321"),
           ("root", "printf 'one:x:990:root,user\\ntwo:x:991:user\\nthree:x:992:users,us\\nfour:x:993:\\nuser2:x:1000:user\\n' >> /etc/group", ""),
           ("1000", "id -G", "1000 990 991"), ("user", "id -G", "1000 990 991"), ("root", "id -G", "0 990"), ("4321", "id -G", "4321"),
           ("1000", "for d in /tmp /dev/shm /var/tmp $HOME; do touch $d/x || echo $d; done", ""), ("1000", "touch /run/x /root/x 2>&1 | wc -l", "2"),
           ("1000", "cp /bin/busybox /tmp/ && /tmp/busybox true && echo ran", "ran"), ("root", "mknod /tmp/null c 1 3; cat /tmp/null 2>&1 | grep -c denied", "1")]
MACHINE_SCRIPT = """local vm = assert(orch.vm.spawn { timeout = "10m" })
for i = 1, #arg, 2 do
  local r = assert(vm:exec({ "sh", "-c", arg[i + 1] }, { user = arg[i] }))
  print("said " .. orch.json.encode(r.stdout))
end"""


@case("a guest is as programs expect of a machine: /dev/stdin and its like, groups, places to write")
def machine(env):
    script = env.shared_cache().project().write("machine.lua", MACHINE_SCRIPT)
    r = env.orch(script, *(word for user, command, _ in MACHINE for word in (user, command)), config=True, deadline_s=START_S)
    said = [json.loads(l.split("said ", 1)[1]) for l in r.err.splitlines() if "said " in l]
    expect(r.status == 0 and len(said) == len(MACHINE), r)
    for (user, command, wanted), got in zip(MACHINE, said):
        expect(got.strip() == wanted, user, command, got)


FULL_SCRIPT = """local vm = assert(orch.vm.spawn { timeout = "10m" })
for _, command in ipairs(arg) do
  for _, line in ipairs { command, "echo alive" } do
    local r = assert(vm:exec({ "sh", "-c", line }, { timeout = "10m" }))
    print(("status=%s signal=%s oom=%s %s"):format(r.status, r.signal, r.out_of_memory, r.stdout:gsub("%s", " ")))
  end
end"""


@case("memory and room used up: the command is ended or told at once, the microVM goes on")
def full(env):
    script = env.shared_cache().project().write("full.lua", FULL_SCRIPT)
    r = env.orch(script, *(command for command, _ in FULL), config=True, deadline_s=START_S)
    lines = r.err.splitlines()
    expect(r.status == 0, r)
    said = [l for l in lines if "oom=" in l]
    expect(len(said) == 2 * len(FULL), r)
    for (command, wanted), got, after in zip(FULL, said[::2], said[1::2]):
        expect(all(word in got.split("orch: ")[-1].split() for word in wanted.split() if word != "oom="), command, wanted, got)
        expect("status=0 signal=nil oom=nil alive" in after, command, after)


START = """return {
  name = "start", description = "Runs a program", input = { type = "object", properties = { argv = { type = "array" } } },
  run = function(args, ctx)
    local vm, err, code = ctx:vm()
    if not vm then return nil, err, code end
    return ctx:output(vm:exec(args.argv))
  end,
}
"""


@case("ctx:output in a tool of one's own: a program that cannot be started is an error")
def not_started(env):
    s = env.shared_cache().project(tools={"start": START}).session()
    s.initialize()
    r = s.call("start", {"argv": ["echo", "a b"]}, deadline_s=START_S)
    expect(text_of(r) == "a b\n" and not r.get("isError"), r)
    for program, reason, status in (("no-such", "not found (No such file or directory)", 127), ("/etc/passwd", "not executable (Permission denied)", 126)):
        r = s.call("start", {"argv": [program]}, deadline_s=START_S)
        expect(r["isError"] and text_of(r) == "[stderr]\norch: the command could not be started: %s\n[exit status %d]" % (reason, status), r)


@case("run_command: the clock, and bytes that are not UTF-8")
def results(env):
    s = session(env)
    before = time.time()
    now = int(text_of(command(s, "date +%s")))
    expect(before - 1 <= now <= time.time() + 1, "the guest's clock is off:", before, now, time.time())
    r = command(s, "printf 'a\\377b\\000c'")
    expect("\ufffd" in text_of(r) and text_of(r).startswith("a"), r)


@case("run_command: much output is capped with a mark, memory stays bounded")
def output_cap(env):
    s = session(env)
    r = command(s, "yes | head -c 50000000")
    expect(1 << 19 < len(text_of(r)) < 3 << 20 and re.search("truncated|dropped|cut", json.dumps(r)[-2000:] + text_of(r)[-500:]), len(text_of(r)), text_of(r)[-200:])
    expect(text_of(command(s, "echo next")) == "next\n")


@case("run_command: a fork bomb and a full memory end with their microVM")
def bombs(env):
    s = session(env, more='vm = { timeout = "5s" }')
    for text in (":(){ :|:& };:; wait; sleep 1000", "head -c 2000000000 /dev/zero | tail", "cat /dev/zero > /tmp/full; sleep 1000"):
        r = command(s, text)
        expect("content" in r, r)
    expect(text_of(command(s, "echo next")) == "next\n")


@case("cancellation ends the microVM")
def cancellation(env):
    s = session(env)
    command(s, "true")
    at_rest = 1  # the launcher
    until(lambda: len(descendants(s.pid)) <= at_rest, "the end of the first microVM")
    id = s.start("tools/call", {"name": "run_command", "arguments": {"command": "sleep 1000"}})
    until(lambda: len(descendants(s.pid)) > at_rest, "the microVM's process")
    s.notify("notifications/cancelled", {"requestId": id})
    until(lambda: len(descendants(s.pid)) <= at_rest, "the end of the microVM: %s" % [name_of(p) for p in descendants(s.pid)])
    expect(s.request("ping")["result"] == {})


@case("eight at once, each in its own microVM")
def eight(env):
    s = session(env)
    ids = [s.start("tools/call", {"name": "run_command", "arguments": {"command": "cat /proc/sys/kernel/random/boot_id; sleep 1"}}) for _ in range(8)]
    answers = [s.recv(START_S) for _ in ids]
    expect(sorted(a["id"] for a in answers) == ids, answers)
    expect(len({text_of(a["result"]) for a in answers}) == 8, [text_of(a["result"]) for a in answers])


@case("end of input with a command running: nothing is left")
def end_running(env):
    s = session(env)
    command(s, "true")
    s.start("tools/call", {"name": "run_command", "arguments": {"command": "sleep 1000"}})
    expect(s.request("ping")["result"] == {})
    expect(s.end() == 0)
    left = leftovers()
    expect(not left, left)


@case("kill -9 at 30 random moments: nothing is left, and the next start cleans its folders")
def kill_nine(env):
    rng = random.Random(3)
    s = session(env)
    command(s, "true")
    s.end()
    for n in range(30):
        s = env.session()
        s.start("initialize", {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "e2e", "version": "1"}})
        for _ in range(3):
            s.start("tools/call", {"name": "run_command", "arguments": {"command": "echo x; sleep 0.2"}})
        # The moment is drawn, not awaited: the point is that there is no safe one.
        end = time.monotonic() + rng.uniform(0, 1.5)
        while time.monotonic() < end and select.select([s.child.stdout], [], [], end - time.monotonic())[0]:
            s._read()
        s.kill()
        left = leftovers()
        expect(not left, "moment", n, "left:", left)
    s = session(env)
    expect(text_of(command(s, "echo fine")) == "fine\n")
    expect(s.end() == 0)
    left = [os.path.join(d, f) for d, _, files in os.walk(env.path("run")) for f in files]
    expect(not left, left)


@case("300 calls leave nothing behind in orch: memory, descriptors, processes")
def many(env):
    s = session(env)

    def now():
        with open("/proc/%d/statm" % s.pid) as f:
            return len(os.listdir("/proc/%d/fd" % s.pid)), int(f.read().split()[1]) * 4, len(descendants(s.pid))
    for _ in range(5):
        command(s, "true")
    before = now()
    for _ in range(300):
        expect(not command(s, "true").get("isError"))
    until(lambda: now()[2] <= before[2], "the end of the last microVM")
    after = now()
    expect(after[0] <= before[0] and after[2] <= before[2] and after[1] < before[1] + 2048, before, after)


# ---- what cannot start says why, and nothing ran

def refused(env, words, more=""):
    """vm run exits with 125 and names status 5; run_command answers `not run: …`."""
    env.shared_cache().project(RUN_COMMAND, more=more)
    r = env.orch("vm", "run", "--", "true", config=True)
    expect(r.status == 125 and re.search(words, r.err) and r.out == "", r)
    s = env.session()
    s.initialize()
    result = command(s, "true")
    expect(result["isError"] is True and text_of(result).startswith("not run: ") and re.search(words, text_of(result)), result)
    expect(s.end() == 0)


@case("accel = kvm without a usable /dev/kvm: refused, never emulated")
def no_kvm(env):
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        # Usable or not, the answer must be hardware or a refusal.
        r = vm(env, "true")
        env.write("orchestrator.lua", 'return { policies = "policies", tools = { "lua/tools" }, vm = { accel = "kvm" } }')
        r = env.orch("vm", "run", "--json", "--", "true", config=True)
        expect((r.status == 0 and json.loads(r.out)["isolation"] == "hardware") or (r.status == 125 and "kvm" in r.err.lower()), r)
    else:
        refused(env, "/dev/kvm|kvm", 'vm = { accel = "kvm" }')


if __name__ == "__main__":
    main()
