"""A scripted model on loopback, in the wire shapes of the providers that real clients speak.

A script is a list of calls (tool, arguments). Each request that offers tools is answered with the call after the last
one whose result it holds, one that holds them all with "done", and one without tools (a title, a summary) too. All
requests are kept, and `given` is what the client gave the model back for each call, as it stood in the request.

A wire shape is a class: which path it is asked at, which tools a request offers, which results it holds by call id,
what such a result tells the model (text, and whether it is called an error: None when the shape has no word for that),
and the server-sent events that make a call or say a text.
"""
import http.server, json, re, threading


def call_id(number):
    return "call_%d" % number


class Anthropic:
    """Messages."""
    path = "/v1/messages"

    @staticmethod
    def tools(body):
        return [t["name"] for t in body.get("tools", [])]

    @staticmethod
    def results(body):
        blocks = [b for m in body["messages"] if isinstance(m["content"], list) for b in m["content"]]
        return {b["tool_use_id"]: b for b in blocks if b["type"] == "tool_result"}

    @staticmethod
    def told(result):
        content = result["content"]
        text = content if isinstance(content, str) else "".join(b.get("text", "[%s]" % b["type"]) for b in content)
        return {"text": text, "error": result.get("is_error", False)}

    @staticmethod
    def events(body, name=None, arguments=None, id=None, text=None):
        block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": text}
        if name:
            block = {"type": "tool_use", "id": id, "name": name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
        yield {"type": "message_start", "message": {
            "id": "msg", "type": "message", "role": "assistant", "model": body["model"], "content": [], "stop_reason": None,
            "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}}
        yield {"type": "content_block_start", "index": 0, "content_block": block}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "usage": {"output_tokens": 1},
               "delta": {"stop_reason": "tool_use" if name else "end_turn", "stop_sequence": None}}
        yield {"type": "message_stop"}


class Responses:
    """Responses, with tools in namespaces ("mcp__orch" + "run_command"), and tools that are called from a script in
    JavaScript (the tool `exec`), as Codex offers them to the models that know that."""
    path = "/v1/responses"

    @staticmethod
    def offered(body):
        """(namespace, tool) of each."""
        added = [t for item in body["input"] if item["type"] == "additional_tools" for t in item["tools"]]
        for t in body.get("tools", []) + added:
            for inner in t["tools"] if t["type"] == "namespace" else [t]:
                yield t["name"] if t["type"] == "namespace" else None, inner

    @classmethod
    def tools(cls, body):
        names = []
        for space, t in cls.offered(body):
            name = t.get("name", t["type"])
            names.append("%s__%s" % (space, name) if space and space != "functions" else name)
            # Those that a script can call stand in the description of what runs it, but for some that it has to look for.
            names += re.findall(r"^### `(\w+)`$", t.get("description", ""), re.M) if name == "exec" else []
        return names

    @staticmethod
    def results(body):
        return {i["call_id"]: i for i in body["input"] if i["type"] in ("function_call_output", "custom_tool_call_output")}

    @staticmethod
    def told(result):
        output = result["output"]
        texts = [output] if isinstance(output, str) else [b.get("text", "[%s]" % b["type"]) for b in output]
        frame = re.match(r"(Script completed\n)?Wall time:? [\d.]+ seconds\nOutput:\n?$", texts[0]) # Codex' own
        text = "".join(texts[1:] if frame else texts)
        if not frame or not frame.group(1) or not text.startswith('{"content":'):
            return {"text": text, "error": None}
        whole = json.loads(text) # a script is given all of a result, and showed that
        error, content = whole.pop("isError", False), whole.pop("content")
        return {"text": "".join(b["text"] for b in content) + (json.dumps(whole) if whole else ""), "error": error}

    @classmethod
    def events(cls, body, name=None, arguments=None, id=None, text=None):
        if not name:
            item = {"type": "message", "role": "assistant", "id": "msg", "content": [{"type": "output_text", "text": text}]}
        elif any(t.get("name") == "exec" and t["type"] == "custom" for _, t in cls.offered(body)):
            script = arguments if name == "exec" else "text(await tools.%s(%s))" % (name, json.dumps(arguments))
            item = {"type": "custom_tool_call", "id": "c" + id, "call_id": id, "name": "exec", "input": script}
        elif isinstance(arguments, str):
            item = {"type": "custom_tool_call", "id": "c" + id, "call_id": id, "name": name, "input": arguments}
        else:
            space, _, short = name.rpartition("__")
            item = {"type": "function_call", "id": "f" + id, "call_id": id, "name": short, "arguments": json.dumps(arguments)}
            if space:
                item["namespace"] = space
        yield {"type": "response.created", "response": {"id": "resp"}}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": "response.completed", "response": {"id": "resp", "usage": {
            "input_tokens": 1, "input_tokens_details": None, "output_tokens": 1, "output_tokens_details": None, "total_tokens": 2}}}


class Model:
    """Listens on 127.0.0.1; `port` is where."""

    def __init__(self, wire, script):
        self.wire, self.script, self.lock = wire, script, threading.Lock()
        self.requests, self.given, self.tools = [], {}, []
        model = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                model.answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def do_GET(self):
                model.answer(self, b"")

            do_HEAD = do_GET

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self, body):
        tools, results = self.wire.tools(body), self.wire.results(body)
        self.tools = tools or self.tools
        self.given.update(results)
        number = sum(call_id(n) in results for n in range(len(self.script)))
        if not tools or number == len(self.script):
            return self.wire.events(body, text="done")
        name, arguments = self.script[number]
        return self.wire.events(body, name, arguments, call_id(number))

    def answer(self, request, text):
        path, kind, out = request.path.split("?")[0], "text/event-stream", b""
        with self.lock:
            body = json.loads(text) if text else None
            self.requests.append((path, body))
            if path == self.wire.path and body:
                out = "".join("event: %s\ndata: %s\n\n" % (e["type"], json.dumps(e)) for e in self.events(body)).encode()
        request.send_response(200 if out else 404)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(out)))
        request.end_headers()
        request.wfile.write(out)

    def told(self, number):
        """What the model was given for a call of the script; None when it never was."""
        result = self.given.get(call_id(number))
        return result and self.wire.told(result)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
