"""What the benchmarks with real microVMs share."""
import glob, os, sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../e2e"))
from orch_e2e import *

RULES = 'return { rules = { { tool = "run_command", action = "allow" } } }'


def open_session():
    """An Env and a session whose clones come from the user's own cache. Emulation, pool 0: the same everywhere."""
    env = Env()
    cache = os.environ.get("XDG_CACHE_HOME") or ("/var/cache" if os.geteuid() == 0 else os.path.expanduser("~/.cache"))
    env.environ["XDG_CACHE_HOME"] = cache
    session = env.project(RULES, more='vm = { image = "base", accel = "tcg", pool = 0 }').session()
    session.initialize()
    return env, session


def command(session, text):
    """What run_command printed."""
    result = session.call("run_command", {"command": text}, deadline_s=START_S)
    assert not result.get("isError"), result
    assert result["_meta"]["orch/isolation"] == "emulated", result
    return text_of(result)


def template(env):
    """The template that was used last."""
    return max(glob.glob(os.path.join(env.environ["XDG_CACHE_HOME"], "orch/templates/*/")), key=os.path.getmtime)


def close_session(env, session):
    assert session.end() == 0, session.stderr()
    left = env.close()
    assert not left, left
