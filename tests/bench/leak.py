#!/usr/bin/env python3
"""1,000 run_command calls one after the other through one `orch mcp stdio`: what grows?

Memory (anonymous, of orch and its launcher: what other processes share or unshare does not move it), descriptors, processes, mounts and files are counted after
WARM calls and again every quarter. Exit status 1 when something grew. usage: leak.py [CALLS]"""
import sys

from bench_vm import *

WARM = 50
GROWTH_KB = 256  # malloc's and the kernel's rounding; a leak of 300 bytes a call would pass it


def anonymous_kb(pid):
    with open("/proc/%d/smaps_rollup" % pid) as f:
        return sum(map(int, re.findall(r"^(?:Anonymous|Swap): +(\d+)", f.read(), re.M)))


def count_files(env):
    """Names below the state, runtime and template folders; audit lines go into one file."""
    roots = [env.dir, os.path.join(env.environ["XDG_CACHE_HOME"], "orch/templates")]
    return sum(len(folders) + len(files) for root in roots for _, folders, files in os.walk(root))


def mounts(pid):
    with open("/proc/%d/mountinfo" % pid) as f:
        return len(f.readlines())


def count(env, session, processes):
    """A microVM's end is not awaited by its call: the processes tell when it is over."""
    tree = lambda: [session.pid] + sorted(descendants(session.pid))
    if processes:
        until(lambda: len(tree()) <= processes, "processes end")
    pids = tree()
    return {"memory KiB": sum(map(anonymous_kb, pids)), "descriptors": sum(len(os.listdir("/proc/%d/fd" % p)) for p in pids),
            "processes": len(pids), "mounts": sum(map(mounts, pids)), "files": count_files(env)}


def main():
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    env, session = open_session()
    for _ in range(WARM):
        command(session, "true")
    session.raw.clear()
    rows = [count(env, session, 2)]  # orch and its launcher
    for quarter in range(4):
        for _ in range(calls // 4):
            command(session, "true")
        session.raw.clear()
        rows.append(count(env, session, 2))
    print("after %d calls to warm up, and every %d calls" % (WARM, calls // 4))
    ok = True
    for name in rows[0]:
        grew = rows[-1][name] - rows[0][name]
        fine = grew <= (GROWTH_KB if name == "memory KiB" else 0)
        ok &= fine
        print("%-12s %s  %s" % (name, " ".join("%7d" % row[name] for row in rows), "does not grow" if fine else "GREW"))
    close_session(env, session)
    return 0 if ok else 1


sys.exit(main())
