"""A small MCP server of the 2025-11-25 era over stdio, good or bad: upstream.py MODE [FILE].

good      echo, big (members and numbers that do not survive a careless proxy), env (the environment)
crash     exits with 3 in the middle of a call, after words on stderr
crash-start  the same before it reads anything (9)
hang      never answers a call; what is cancelled goes to FILE
silent    never answers anything
listless  never answers tools/list
slow      starts when FILE, a fifo, ends; what is written into it goes to stderr meanwhile, and "die" is its end by
          SIGTERM. The tool grow adds one
strict    the same, and ends at a request that comes before initialize
steps     each line that is written into FILE, a fifo, is progress of the call; it is answered when FILE ends
saver     at the end of its input it needs a second to save what it has; FILE says how far it came
deaf      does not end at the end of its input, but at SIGTERM; FILE says so
junk      prints lines that are no JSON between its messages
chatty    sends log and list_changed notifications around every answer
flood     answers a call with 20 MiB in one line
stderr    writes 10 MiB to stderr during a call
request   asks the client something (roots/list) before it answers
ask       asks the client's user (elicitation/create) and answers with what came back; the message is its id and
          what it does: "withdraw" takes the question back, "sample" asks the model instead
raw       its tool's schema is in FILE, and answers with the request's line
lines     as ask, but reads lines as text tools do: CR, U+0085 and U+2028 end one too; each goes to FILE
modern    of the era of 2026-07-28 alone: the tool ask asks the client's user and model before it answers with what
          it got, grow and steps as above (steps: three, at once), hold never answers; what is cancelled goes to FILE
stubborn  ignores end of input and SIGTERM
nobody    the same, and has a child that does so too
"""
import io, json, os, signal, subprocess, sys, time

mode, file = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
STRING = {"type": "object", "properties": {"message": {"type": "string", "x-unknown-keyword": 1}}, "required": ["message"]}
TOOLS = [
    {"name": "echo", "title": "Echo", "description": "Returns its message", "inputSchema": STRING, "annotations": {"readOnlyHint": True}, "x-vendor": {"big": 9007199254740993}},
    {"name": "big", "description": "Odd members", "inputSchema": {"type": "object"}},
    {"name": "env", "description": "The environment", "inputSchema": {"type": "object"}},
]
if mode == "raw":
    with open(file) as f:
        TOOLS = [{"name": "raw", "description": "Its own request", "inputSchema": json.load(f)}]
BIG = ('{"content":[{"type":"text","text":"\\u00e9\\/","annotations":{"audience":["user"],"priority":1.0}},{"type":"x-new","data":[1e2,-0,9007199254740993]}],'
       '"structuredContent":{"n":9007199254740993,"f":0.10,"z":1.0,"empty":[],"none":{}},"unknownMember":{"a":null},"_meta":{"vendor/x":12345678901234567890}}')


asking = {}  # the calls that wait, by the ids of their questions


def put(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def result(id, text):
    put('{"jsonrpc":"2.0","id":%s,"result":%s}' % (json.dumps(id), text))


def call(message):
    name, args = message["params"]["name"], message["params"].get("arguments", {})
    if mode == "crash":
        sys.stderr.write("first line\nboom: the disk is on fire\n")
        sys.stderr.flush()
        os._exit(3)
    if mode == "hang":
        return
    if mode == "steps":
        with open(file) as fifo:
            for i, line in enumerate(fifo):
                note("notifications/progress", {"progressToken": message["params"]["_meta"]["progressToken"], "progress": i + 1, "message": line.strip()})
    if name == "grow":
        TOOLS.append({"name": "grown", "inputSchema": {"type": "object"}})
        note("notifications/tools/list_changed", {})
    if mode == "flood":
        return result(message["id"], json.dumps({"content": [{"type": "text", "text": "x" * (20 << 20)}]}))
    if mode == "stderr":
        sys.stderr.write(("noise " * 20 + "\n") * 90000)
        sys.stderr.flush()
    if name == "big" and mode == "lines":
        return put('{"jsonrpc":"2.0",\r"id":%s,"result":{"content":[\r{"type":"text","text":"a\u0085b\u2028c\u2029d"}]\r}}' % json.dumps(message["id"]))
    if mode in ("ask", "lines"):
        question, what = "q-%d" % (len(asking) + 1), args.get("message")
        asking[question] = message["id"]
        method, params = "elicitation/create", {"message": "Really? sk-12345678", "requestedSchema": {"type": "object", "properties": {"n": {"type": "integer"}}}, "x-big": 9007199254740993}
        if what == "sample":
            method, params = "sampling/createMessage", {"messages": [{"role": "user", "content": {"type": "text", "text": "hi"}}], "maxTokens": 10}
        put(json.dumps({"jsonrpc": "2.0", "id": question, "method": method, "params": params}))
        if what == "withdraw":
            note("notifications/cancelled", {"requestId": question})
            result(asking.pop(question), json.dumps({"content": [{"type": "text", "text": "withdrawn"}]}))
        return
    if mode == "request":
        put('{"jsonrpc":"2.0","id":"server-1","method":"roots/list"}')
    if name == "big":
        return result(message["id"], BIG)
    text = json.dumps(dict(os.environ)) if name == "env" else args.get("message", "")
    result(message["id"], json.dumps({"content": [{"type": "text", "text": text}]}))


def note(method, params):
    put(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}))


if mode == "crash-start":
    sys.stderr.write("cannot start: no licence found\n")
    sys.exit(9)
def say(text):
    with open(file, "a") as f:
        f.write(text + "\n")


if mode in ("slow", "strict"):
    TOOLS.append({"name": "grow", "inputSchema": {"type": "object"}})
    with open(file, "rb") as fifo:
        for line in fifo:
            if line == b"die\n":
                os.kill(os.getpid(), signal.SIGTERM)
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
if mode == "deaf":
    signal.signal(signal.SIGTERM, lambda *_: (say("SIGTERM"), os._exit(0)))
if mode in ("stubborn", "nobody"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "nobody":
    subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"])
sys.stderr.write("upstream ready\n")
sys.stderr.flush()
def lines():
    if mode != "lines":
        yield from sys.stdin
    for chunk in io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", newline=None):
        for line in chunk.splitlines():
            with open(file, "a") as f:
                f.write(json.dumps(line) + "\n")
            yield line


META = "io.modelcontextprotocol/"


def modern(message):
    method, params = message["method"], message.get("params", {})
    meta = params.get("_meta", {})
    if method == "initialize":
        return put(json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32022, "message": "Unsupported protocol version", "data": {"supported": ["2026-07-28"]}}}))
    if method == "notifications/cancelled":
        with open(file, "a") as f:
            f.write(line)
        return
    if meta.get(META + "protocolVersion") != "2026-07-28" or META + "clientCapabilities" not in meta:
        return put(json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32602, "message": "_meta is incomplete"}}))
    cached = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
    if method == "server/discover":
        return result(message["id"], json.dumps({**cached, "supportedVersions": ["2026-07-28"], "capabilities": {"tools": {"listChanged": True}}}))
    if method == "tools/list":
        return result(message["id"], json.dumps({**cached, "tools": TOOLS + [{"name": n, "inputSchema": {"type": "object"}} for n in ("ask", "grow", "steps", "hold")]}))
    if method == "subscriptions/listen":
        asking["listen"] = message["id"]
        return note("notifications/subscriptions/acknowledged", {"notifications": params["notifications"], "_meta": {META + "subscriptionId": message["id"]}})
    if method != "tools/call" or params["name"] == "hold":
        return
    if params["name"] == "grow":
        TOOLS.append({"name": "grown", "inputSchema": {"type": "object"}})
        note("notifications/tools/list_changed", {"_meta": {META + "subscriptionId": asking["listen"]}})
    for i in range(3 if params["name"] == "steps" else 0):
        note("notifications/progress", {"progressToken": meta["progressToken"], "progress": i + 1, "message": "step"})
    if params["name"] == "ask" and "inputResponses" not in params:
        return result(message["id"], json.dumps({"resultType": "input_required", "requestState": "st\u00e9", "inputRequests": {
            "who": {"method": "elicitation/create", "params": {"message": "Really?", "requestedSchema": {"type": "object", "properties": {"n": {"type": "integer"}}}}},
            "what": {"method": "sampling/createMessage", "params": {"messages": [{"role": "user", "content": {"type": "text", "text": "hi"}}], "maxTokens": 10}}}}))
    if params["name"] == "big":
        return result(message["id"], '{"resultType": "complete", ' + BIG[1:])
    result(message["id"], json.dumps({"resultType": "complete", "content": [{"type": "text", "text": line if params["name"] in ("ask", "steps") else params["arguments"].get("message", "")}]}))


for line in lines():
    message = json.loads(line)
    method = message.get("method")
    if mode == "modern":
        modern(message)
        continue
    if mode == "silent" or mode == "listless" and method == "tools/list":
        continue
    if mode == "strict" and method not in ("initialize", "notifications/initialized", "tools/list", "tools/call"):
        sys.exit("unexpected " + method)
    if mode == "junk":
        put("Server listening on stdio...")
        put("")
    if mode == "chatty":
        note("notifications/message", {"level": "info", "data": "about to answer"})
    if method == "initialize":
        result(message["id"], json.dumps({"protocolVersion": "2025-11-25", "capabilities": {"tools": {"listChanged": True}}, "serverInfo": {"name": "upstream", "version": "1"}}))
    elif method == "tools/list":
        result(message["id"], json.dumps({"tools": TOOLS}))
    elif method == "tools/call" and mode == "raw":
        result(message["id"], json.dumps({"content": [{"type": "text", "text": line}]}))
    elif method == "tools/call":
        call(message)
    elif method == "ping":
        result(message["id"], "{}")
    elif method is None and message.get("id") in asking:
        result(asking.pop(message["id"]), json.dumps({"content": [{"type": "text", "text": line.strip()}]}))
    elif method == "notifications/cancelled" and file:
        with open(file, "a") as f:
            f.write(line)
    elif "id" in message and method:
        put(json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32601, "message": "Method not found"}}))
    if mode == "chatty":
        note("notifications/tools/list_changed", {})
        note("notifications/progress", {"progressToken": "nobody's", "progress": 1})
if mode in ("saver", "deaf"):
    say("end of input")
if mode == "saver":
    time.sleep(1)
    say("saved")
if mode in ("stubborn", "nobody", "deaf"):
    signal.pause()
