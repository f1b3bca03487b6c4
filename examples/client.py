#!/usr/bin/env python3
"""An agent's MCP client for orch, in Python's standard library.

    client.py [--orch FILE] [--config FILE] [--list] [--call NAME [--args JSON]] [-- SERVER ARG...]

Finds orch by --orch, then $ORCH_BIN, then PATH. With SERVER, orch puts its policy in front of that
MCP server. As a module:

    with Client(["orch", "mcp", "stdio"]) as client:
        print(client.call("run_command", {"command": "uname -a"}))
"""
import argparse, json, os, select, shutil, subprocess, sys, time


class NotFound(Exception):
    pass


class RpcError(Exception):
    """An error answer: .code and the server's text."""

    def __init__(self, error):
        super().__init__("%s (code %s)" % (error.get("message"), error.get("code")))
        self.code = error.get("code")


def find_orch(given=None):
    """Path of the orch binary; NotFound names every place that was looked at."""
    looked = []
    for where, path in (("--orch", given), ("$ORCH_BIN", os.environ.get("ORCH_BIN"))):
        if path:
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return os.path.abspath(path)
            raise NotFound("%s is %s: no executable file there" % (where, path))
        looked.append("%s: not given" % where)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = os.path.join(folder or ".", "orch")
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
        looked.append("PATH: %s: no executable file there" % path)
    raise NotFound("orch was not found:\n  " + "\n  ".join(looked))


class Client:
    """One MCP session with `command` over its stdin and stdout. trace(direction, line) sees every message."""

    def __init__(self, command, timeout=60, trace=None):
        self.timeout, self.trace, self.last_id, self.buffer = timeout, trace or (lambda direction, line: None), 0, b""
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self):
        self.server = self.request("initialize", {"protocolVersion": "2025-11-25", "capabilities": {},
                                                  "clientInfo": {"name": "client.py", "version": "1"}})
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, message):
        line = json.dumps(message, separators=(",", ":"))
        self.trace("->", line)
        try:
            self.child.stdin.write(line.encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise ConnectionError("orch ended with status %s" % self.child.wait()) from None

    def receive(self):
        end = time.monotonic() + self.timeout
        while b"\n" not in self.buffer:
            if not select.select([self.child.stdout], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("no answer within %g s" % self.timeout)
            data = os.read(self.child.stdout.fileno(), 1 << 16)
            if not data:
                raise ConnectionError("orch ended with status %s" % self.child.wait())
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        self.trace("<-", line.decode())
        return json.loads(line)

    def request(self, method, params=None):
        """The result; RpcError for an error answer. Notifications that come in between are left to trace."""
        self.last_id += 1
        self.send({"jsonrpc": "2.0", "id": self.last_id, "method": method, "params": params or {}})
        while True:
            message = self.receive()
            if message.get("id") == self.last_id and "method" not in message:
                if "error" in message:
                    raise RpcError(message["error"])
                return message["result"]

    def tools(self):
        found, cursor = [], None
        while True:
            page = self.request("tools/list", {"cursor": cursor} if cursor else {})
            found += page["tools"]
            cursor = page.get("nextCursor")
            if not cursor:
                return found

    def call(self, name, arguments=None):
        """The whole result: content, structuredContent, isError, _meta (orch/decision, orch/isolation, …)."""
        return self.request("tools/call", {"name": name, "arguments": arguments or {}})

    def close(self):
        """End of input ends orch; its exit status."""
        self.child.stdin.close()
        try:
            return self.child.wait(5)
        except subprocess.TimeoutExpired:
            self.child.kill()
            return self.child.wait()
        finally:
            self.child.stdout.close()


def main():
    parser = argparse.ArgumentParser(usage="client.py [--orch FILE] [--config FILE] [--list] [--call NAME [--args JSON]] [-- SERVER ARG...]")
    parser.add_argument("--orch")
    parser.add_argument("--config")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--call")
    parser.add_argument("--args", type=json.loads, default={})
    parser.add_argument("server", nargs="*")
    options = parser.parse_args()
    try:
        command = [find_orch(options.orch)] + (["--config", options.config] if options.config else []) + ["mcp", "stdio"]
        with Client(command + (["--"] + options.server if options.server else [])) as client:
            if options.list or not options.call:
                for tool in client.tools():
                    print("%s: %s" % (tool["name"], tool.get("description", "")))
            if options.call:
                result = client.call(options.call, options.args)
                print("".join(item.get("text", "") for item in result["content"]))
                return 1 if result.get("isError") else 0
    except (NotFound, RpcError, OSError) as error:
        print("client.py: %s" % error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
