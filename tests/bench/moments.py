#!/usr/bin/env python3
"""How soon: an edit of a policy is in force, a rule that loops is denied, orch ends with its input, and nothing
is left of it after kill -9 with microVMs running.

Median and most of ROUNDS each. Exit status 1 when a target is missed. usage: moments.py [ROUNDS]"""
import statistics, sys, time

from bench_vm import *

SAYS = 'return { rules = { { tool = "echo", action = "deny", reason = "%d" } } }\n'
LOOPS = 'return { rules = { { tool = "echo", action = "deny", reason = "x", when = function() while true do end end } } }\n'


def started(rules):
    env = Env().project(rules, {"echo": ECHO, "wait": SLEEP})
    s = env.session()
    s.initialize()
    return env, s


def close(env):
    left = env.close()
    assert not left, left


def edits(rounds):
    env, s = started(SAYS % 0)
    for n in range(1, rounds + 1):
        env.write("policies/tools.lua", SAYS % n)
        began = time.monotonic()
        while "denied: %d " % n not in text_of(s.call("echo", {"message": "x"})):
            pass
        yield time.monotonic() - began
    close(env)


def loops(rounds):
    env, s = started(LOOPS)
    for _ in range(rounds):
        began = time.monotonic()
        assert "denied" in text_of(s.call("echo", {"message": "x"}))
        yield time.monotonic() - began
    close(env)


def ends(rounds):
    for _ in range(rounds):
        env, s = started(ALLOW_ALL)
        s.start("tools/call", {"name": "wait", "arguments": {"seconds": 300}})
        s.request("ping")
        began = time.monotonic()
        assert s.end() == 0
        yield time.monotonic() - began
        close(env)


def kills(rounds):
    for _ in range(rounds):
        env, s = open_session()
        command(s, "true")
        for _ in range(3):
            s.start("tools/call", {"name": "run_command", "arguments": {"command": "sleep 1000"}})
        until(lambda: len(descendants(s.pid)) >= 7, "three microVMs")  # a launcher, and two processes each
        s.kill()
        began = time.monotonic()
        assert not leftovers()
        yield time.monotonic() - began
        close(env)


def main(rounds):
    ok = True
    print("ms, median / most of %d" % rounds)
    for what, took, target in (("an edit of policies/tools.lua is in force", edits, 300), ("a rule that loops is denied", loops, 1000),
                               ("end of input with a call running", ends, 2000), ("kill -9 with three microVMs, until nothing is left", kills, 1000)):
        ms = [s * 1000 for s in took(rounds)]
        ok &= max(ms) <= target
        print("%-52s %7.1f /%7.1f  target <= %d  %s" % (what, statistics.median(ms), max(ms), target, "met" if max(ms) <= target else "MISSED"))
    return 0 if ok else 1


sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
