# The examples that need no microVM.
# as: user
from orch_e2e import *

EXAMPLE = os.path.join(ROOT, "examples/policy/orchestrator.lua")


@case("examples/policy: its tests pass, its tools are served")
def example_policy(env):
    r = run([ORCH, "--config", EXAMPLE, "policy", "test"], env.environ, env.path("p"))
    expect(r.status == 0 and "5" in r.out, r)
    s = env.session(argv=[ORCH, "--config", EXAMPLE, "mcp", "stdio"])
    s.initialize()
    result = s.call("word_count", {"text": "one two  three\n"})
    expect(result["structuredContent"] == {"words": 3} and text_of(result) == "3 words", result)
    expect(text_of(s.call("publish", {"text": "x"})).startswith("denied: "), s.call("publish", {"text": "x"}))
    expect(text_of(s.call("run_command", {"command": "rm -rf /"})).startswith("denied: destroys"), "not denied")
    expect(s.end() == 0)


if __name__ == "__main__":
    main()
