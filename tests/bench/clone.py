#!/usr/bin/env python3
"""Clones: bare QEMU (clone_raw), orch's rooms (clone_orch), and run_command through `orch mcp stdio`; of `base`,
and for comparison of `debian`, which is built when it is not there.

The three take turns, from the same template. A figure is the best round's median, the median round's beside it.
Exit status 1 when a target is missed. usage: clone.py BUILD_DIR [ROUNDS]"""
import statistics, subprocess, sys, time

from bench_vm import *

EACH = 4
GAP_S = 0.1  # the end of one must not cost the next one time


def medians(argv, environ):
    """{phase: median in ms} as the C programs print it."""
    out = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    return {name: float(ms) for name, ms in re.findall(r"^(.{10}) median +([\d.]+)", out.stdout, re.M)}


def calls(session):
    took = []
    for _ in range(EACH):
        began = time.monotonic()
        command(session, "true")
        took.append((time.monotonic() - began) * 1000)
        time.sleep(GAP_S)
    return {"answered  ": statistics.median(took)}


def verdict(what, value, target):
    print("%-58s %6.2f  target <= %g  %s" % (what, value, target, "met" if value <= target else "MISSED"))
    return value <= target


def main():
    build, rounds = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8
    env, session = open_session()
    began = time.monotonic()
    command(session, "true")
    print("first call of this process (template found or made): %.0f ms" % ((time.monotonic() - began) * 1000))
    boot_ids = [command(session, "cat /proc/sys/kernel/random/boot_id") for _ in range(10)]
    assert len(set(boot_ids)) == 10, boot_ids
    raw = [build + "/tests/bench/clone_raw", template(env), str(EACH), "norandmaps"]
    own = [build + "/tests/bench/clone_orch", build + "/launcher", build + "/agent", env.environ["XDG_CACHE_HOME"] + "/orch",
           env.path("run", "clone_orch"), str(EACH)]
    os.mkdir(env.path("run", "clone_orch"), 0o700)
    built = subprocess.run([build + "/orch", "image", "build", "debian"], env=env.environ)
    assert built.returncode == 0, "orch image build debian"
    emulated = {**env.environ, "ACCEL": "tcg"}
    python = own[:-1] + [str(EACH), "1", "python3", "-c", "print(1)"]
    network = os.path.exists("/dev/net/tun") and os.stat("/dev/net/tun").st_mode & 6 == 6
    if not network:
        print("without the row `network`: /dev/net/tun is not for everyone to use")
    rows = {}
    for _ in range(rounds):
        for who, figures in (("raw", medians(raw, env.environ)), ("orch", medians(own, emulated)),
                             ("network", medians(own, {**emulated, "NETWORK": "1"}) if network else {}),
                             ("debian", medians(own, {**emulated, "IMAGE": "debian"})),
                             ("python3", medians(python, {**emulated, "IMAGE": "debian"})),
                             ("with ASLR", medians(python, {**emulated, "IMAGE": "debian", "ASLR": "1"})),
                             ("run_command", calls(session))):
            for name, ms in figures.items():
                rows.setdefault((who, name.strip()), []).append(ms)
    close_session(env, session)

    best = {}
    print("\nms from the start of the clone; emulation; %d rounds of %d, best / median of the rounds' medians" % (rounds, EACH))
    for (who, name), ms in rows.items():
        best[who, name] = min(ms)
        print("%-12s %-10s %7.1f /%7.1f" % (who, name, min(ms), statistics.median(ms)))
    print("boot_id of 10 calls: all different\n")
    ok = verdict("run_command true: orch / raw clone", best["run_command", "answered"] / best["raw", "true ran"], 1.3)
    ok &= verdict("the rooms alone: orch / raw clone", best["orch", "true ran"] / best["raw", "true ran"], 1.3)
    ok &= verdict("a clone of debian / of base, to its first answer", best["debian", "ready"] / best["orch", "ready"], 1.25)
    print("%-58s %6.2f  (its programs are linked dynamically)" % ("a clone of debian / of base, to `true` ran",
                                                                  best["debian", "true ran"] / best["orch", "true ran"]))
    ok &= verdict("raw clone / qemu-system-x86_64 -version", best["raw", "true ran"] / best["raw", "-version"], 9)
    return 0 if ok else 1


sys.exit(main())
