# The tasks extension with tools of a configuration: durable before answered, owned by the caller, bounded to it.
# as: user asan
import json

from orch_e2e import *

JOB = """return {
  name = "job", description = "A task where the client can", task = "%s", timeout = "600s",
  input = { type = "object", properties = { seconds = { type = "number" } } },
  run = function(args, ctx) orch.sleep(args.seconds or 0) return "done" end,
}
"""
ASKING = """return {
  name = "asking", description = "A task that asks", task = "optional",
  input = { type = "object", properties = {} },
  run = function(args, ctx)
    local a, why, code = ctx:elicit { key = "sure", message = "Sure?" }
    if not a then return nil, why, code end
    return a.action
  end,
}
"""
CAPS = {"elicitation": {}, "extensions": {META + "tasks": {}}}


def started(env, kind="optional"):
    return env.project(tools={"job": JOB % kind, "asking": ASKING, "echo": ECHO}).session()


def send(s, method, params, caps=CAPS):
    return s.request(method, {**params, "_meta": {META + "protocolVersion": MODERN, META + "clientCapabilities": caps}})


def create(s, tool, arguments=None):
    result = send(s, "tools/call", {"name": tool, "arguments": arguments or {}})["result"]
    expect(result["resultType"] == "task" and len(result["taskId"]) == 32 and "result" not in result, result)
    return result["taskId"]


def get(s, id):
    return send(s, "tasks/get", {"taskId": id})["result"]


def settled(s, id, status):
    task = until(lambda: (lambda t: t if t["status"] == status else None)(get(s, id)), status)
    expect(task["taskId"] == id and task["resultType"] == "complete", task)
    return task


@case("created, worked on, completed with its result inlined; still there after a restart")
def life(env):
    s = started(env)
    id = create(s, "job", {"seconds": 3})
    expect(get(s, id)["status"] == "working")
    folder = env.path("state", "orch", "tasks")
    expect(os.listdir(folder) == [id + ".json"] and os.stat(os.path.join(folder, id + ".json")).st_mode & 0o777 == 0o600)
    expect(text_of(settled(s, id, "completed")["result"]) == "done")
    s.end()
    again = env.session()
    expect(text_of(get(again, id)["result"]) == "done")
    events = [line["event"] for line in env.audit() if line.get("call")]
    expect(events == ["decision", "outcome"], events)


@case("orch is killed: what it worked on is failed, not lost")
def killed(env):
    s = started(env)
    id = create(s, "job", {"seconds": 300})
    s.kill()
    task = get(env.session(), id)
    expect(task["status"] == "failed" and "ended before" in task["error"]["message"], task)


@case("cancelled; cancelling again is acknowledged as well")
def cancelled(env):
    s = started(env)
    id = create(s, "job", {"seconds": 300})
    for _ in range(2):
        expect(send(s, "tasks/cancel", {"taskId": id})["result"] == {"resultType": "complete"})
        task = settled(s, id, "cancelled")
        expect("result" not in task and "error" not in task, task)


@case("asks by input_required, answered by tasks/update")
def asks(env):
    s = started(env)
    id = create(s, "asking")
    task = settled(s, id, "input_required")
    expect(list(task["inputRequests"]) == ["sure"] and "requestState" not in task, task)
    expect(send(s, "tasks/update", {"taskId": id, "inputResponses": {"other": {}}})["result"] == {"resultType": "complete"})
    expect(get(s, id)["status"] == "input_required")
    send(s, "tasks/update", {"taskId": id, "inputResponses": {"sure": {"action": "decline"}}})
    expect(text_of(settled(s, id, "completed")["result"]) == "decline")


@case("without the extension: an ordinary result, or -32021 where only a task will do")
def without(env):
    s = started(env)
    expect(text_of(send(s, "tools/call", {"name": "job"}, {})["result"]) == "done")
    expect(send(s, "tasks/get", {"taskId": "0" * 32}, {})["error"]["code"] == -32021)
    s.end()
    s = started(env, "required")
    error = send(s, "tools/call", {"name": "job"}, {})["error"]
    expect(error["code"] == -32021 and error["data"] == {"requiredCapabilities": {"extensions": {META + "tasks": {}}}}, error)
    s.initialize()
    result = s.call("job")
    expect(result["isError"] and "tasks extension" in text_of(result), result)


@case("ids that are none, and tasks of another caller")
def unknown(env):
    s = started(env)
    id = create(s, "job", {"seconds": 300})
    for bad in ("", "x", "0" * 32, "../../../etc/passwd", id + "0", id.upper(), id[:31] + "/"):
        expect(send(s, "tasks/get", {"taskId": bad}).get("error", {}).get("code") == -32602 or bad == id, bad)
    path = env.path("state", "orch", "tasks", "f" * 32 + ".json")
    with open(path, "w") as f:
        json.dump({"caller": "another", "pid": 1, "task": {"taskId": "f" * 32, "status": "completed", "result": {}}}, f)
    expect(send(s, "tasks/get", {"taskId": "f" * 32})["error"]["code"] == -32602)
    with open(path, "w") as f:
        f.write("{")
    expect(send(s, "tasks/get", {"taskId": "f" * 32})["error"]["code"] == -32602)


@case("subscribers hear of the end")
def notified(env):
    s = started(env)
    id = create(s, "job", {"seconds": 3})
    s.start("subscriptions/listen", {"notifications": {"taskIds": [id]}}, modern=True)
    expect(s.recv()["params"]["notifications"]["taskIds"] == [id])
    note = s.recv()
    expect(note["method"] == "notifications/tasks" and note["params"]["status"] == "completed" and note["params"]["taskId"] == id, note)


main()
