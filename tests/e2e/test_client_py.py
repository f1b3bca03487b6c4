# examples/client.py as a user runs it.
# as: user
from orch_e2e import *

CLIENT = os.path.join(ROOT, "examples/client.py")
UPSTREAM = os.path.join(SERVERS, "upstream.py")


def client(env, *args, **environ):
    return run([PY, CLIENT, *args], {**env.environ, **environ}, env.path("p"))


@case("lists tools; finds orch by --orch, ORCH_BIN and PATH, in this order")
def finds(env):
    env.project()
    for args, environ in ((("--orch", ORCH), {"ORCH_BIN": "/no/such/orch"}), ((), {"ORCH_BIN": ORCH}),
                          ((), {"PATH": "/no/such/folder:%s:%s" % (os.path.dirname(ORCH), env.environ["PATH"])})):
        r = client(env, *args, "--config", env.config, "--list", **environ)
        expect(r.status == 0 and "echo: Returns its message" in r.out, args, environ, r)


@case("calls a tool and prints its text")
def calls(env):
    env.project()
    r = client(env, "--config", env.config, "--call", "echo", "--args", '{"message":"h\\u00e9llo"}', ORCH_BIN=ORCH)
    expect(r.status == 0 and r.out == "héllo\n", r)


@case("a denied call is printed with its reason, status 1")
def denied(env):
    env.project('return { rules = { { tool = "echo", action = "deny", reason = "quiet please" } } }')
    r = client(env, "--config", env.config, "--call", "echo", "--args", '{"message":"x"}', ORCH_BIN=ORCH)
    expect(r.status == 1 and r.out.startswith("denied: quiet please ("), r)


@case("an error answer is printed with its code")
def error(env):
    env.project()
    r = client(env, "--config", env.config, "--call", "nope", ORCH_BIN=ORCH)
    expect(r.status == 1 and "nope" in r.err and "-32602" in r.err, r)


@case("in front of another server")
def server(env):
    env.project()
    r = client(env, "--config", env.config, "--call", "echo", "--args", '{"message":"through"}', "--", PY, UPSTREAM, "good", ORCH_BIN=ORCH)
    expect(r.status == 0 and r.out == "through\n", r)


@case("orch not found: every place looked at is named")
def missing(env):
    r = client(env, PATH="/no/such/a:/no/such/b")
    expect(r.status == 1 and all(w in r.err for w in ("--orch", "$ORCH_BIN", "/no/such/a/orch", "/no/such/b/orch")), r)
    r = client(env, ORCH_BIN="/no/such/orch")
    expect(r.status == 1 and "$ORCH_BIN is /no/such/orch" in r.err, r)


@case("orch that refuses to start: status and its own words")
def broken(env):
    env.project("return { rules = 7 }")
    r = client(env, "--config", env.config, ORCH_BIN=ORCH)
    expect(r.status == 1 and "status 6" in r.err and "tools.lua" in r.err, r)


if __name__ == "__main__":
    main()
