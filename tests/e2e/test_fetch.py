# ctx:http and fetch_url: every connection, redirects included, is one that the deciding rules' network allows. Servers on
# loopback addresses, of which the configuration permits one.
# as: user asan
import http.server, json, socket, threading

from orch_e2e import *

RULES = """return { rules = {
  { tool = "fetch_url", action = "allow", network = "web" },
  { tool = "post", action = "allow", network = "web" },
  { tool = "stream", action = "allow", network = "web" },
  { tool = "offline", action = "allow" },
} }"""
NETWORK = 'return { web = { allow = { { cidr = "127.0.0.1/32", ports = { %s } } } } }'
POST = """return {
  name = "post", description = "Posts", input = { type = "object", properties = { url = { type = "string" } } },
  run = function(args, ctx)
    local r, why, code = ctx:http { url = args.url, method = "POST", body = "a=1", headers = { Authorization = "Bearer secret",
      ["Content-Type"] = "text/a", ["X-Kept"] = "yes" } }
    if not r then return nil, why, code end
    return { text = r.body, structured = { status = r.status, url = r.url } }
  end,
}
"""
STREAM = """return {
  name = "stream", description = "Reads piece by piece", input = { type = "object", properties = { url = { type = "string" } } },
  run = function(args, ctx)
    local n, pieces = 0, 0
    local r, why, code = ctx:http { url = args.url, on_data = function(piece) n, pieces = n + #piece, pieces + 1 end }
    if not r then return nil, why, code end
    return tostring(n) .. " " .. tostring(pieces > 1) .. " " .. tostring(r.body)
  end,
}
"""
OFFLINE = POST.replace('"post"', '"offline"')


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, self.path
        server.seen.append((self.command, path, dict(self.headers), self.client_address))
        length = int(self.headers.get("Content-Length") or 0)
        body, status, headers = self.rfile.read(length), 200, {"Content-Type": "text/plain; charset=utf-8"}
        if path.startswith("/to?"):
            status, headers["Location"] = int(path[4:7]), path[8:]
        elif path == "/missing":
            status, body = 404, b"no such page"
        elif path == "/binary":
            headers["Content-Type"], body = "application/zip", b"PK\0\1"
        elif path.startswith("/big?"):
            body = b"x" * int(path[5:])
        elif path == "/echo":
            body = json.dumps([self.command, body.decode(), {k.lower(): v for k, v in self.headers.items()}]).encode()
        elif path == "/slow":
            server.release.wait(600)
        elif path == "/drip": # a head, and a body that does not end
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not server.release.wait(0.05):
                    self.wfile.write(b"x" * 1000)
            return
        elif path == "/101":
            self.send_response(101)
            self.end_headers()
            return
        else:
            body = b"hello from " + path.encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address):
        super().__init__((address, 0), Handler)
        self.seen, self.release, self.accepted = [], threading.Event(), 0
        self.url = "http://%s:%d" % self.server_address[:2]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *why):
        pass

    def get_request(self):
        self.accepted += 1
        return super().get_request()

    def __enter__(self):
        return self

    def __exit__(self, *why):
        self.release.set()
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def fetching(env, ports=None, rules=RULES, permit='"127.0.0.1/32"'):
    """A session, the server that is allowed and one that is not."""
    with Server("127.0.0.1") as good, Server("127.0.0.2") as bad:
        env.project(rules, {"post": POST, "stream": STREAM, "offline": OFFLINE}, "net = { permit_private = { %s } }" % permit)
        env.write("policies/network.lua", NETWORK % (ports or good.server_address[1]))
        s = env.session()
        s.initialize()
        yield s, good, bad


def fetch(s, url, tool="fetch_url", **more):
    return s.call(tool, {"url": url, **more})


def refused(env, result, words, call=True):
    expect(result.get("isError") and words in text_of(result), result, words)
    lines = [l for l in env.audit() if l["event"] == "net_deny"]
    if call:
        expect(lines and lines[-1]["call"] == result["_meta"]["orch/call"] and lines[-1]["rule"] in text_of(result) and lines[-1]["dst"]
               and lines[-1]["proto"] == "tcp" and lines[-1]["port"], lines)


@case("a page; one that is missing; what is no text; a long one in pieces")
def pages(env):
    with fetching(env) as (s, good, _):
        r = fetch(s, good.url + "/a?b=c")
        expect(text_of(r) == "hello from /a?b=c" and "structuredContent" not in r, r)
        r = fetch(s, good.url + "/missing")
        expect(text_of(r) == "no such page\n[HTTP status 404]" and not r.get("isError"), r)
        r = fetch(s, good.url + "/binary")
        expect(text_of(r) == "[application/zip, 4 bytes: not text]", r)
        r = fetch(s, good.url + "/big?300000")
        expect(text_of(r).endswith("\n[more: offset 262144 of 300000]"), text_of(r)[-80:])
        expect(len(text_of(fetch(s, good.url + "/big?300000", offset=262144))) == 300000 - 262144)
        expect(text_of(fetch(s, good.url + "/big?300000", offset=300000)) == "[no more: it has 300000 bytes]")
        expect(text_of(fetch(s, good.url + "/big?0")) == "[empty]")
        expect(text_of(fetch(s, good.url + "/big?5000000", tool="stream")) == "5000000 true nil")
        r = fetch(s, good.url + "/big?17000000")
        expect(r["isError"] and "16 MiB" in text_of(r), r)
        expect(not [l for l in env.audit() if l["event"] == "net_deny"])


@case("what the policy does not allow is not connected to: another address, another port, whatever it is written like")
def denied(env):
    with fetching(env) as (s, good, bad):
        port = good.server_address[1]
        refused(env, fetch(s, bad.url + "/"), "never allowed: loopback")
        refused(env, fetch(s, "http://127.0.0.1:%d/" % bad.server_address[1]), "no entry allows it")
        refused(env, fetch(s, "http://2130706434:%d/" % bad.server_address[1]), "never allowed: loopback")
        refused(env, fetch(s, "http://0x7f.2:%d/" % bad.server_address[1]), "never allowed: loopback")
        refused(env, fetch(s, "http://169.254.169.254/latest/meta-data/"), "never allowed: link-local")
        refused(env, fetch(s, "https://198.51.100.1/"), "no entry allows it")
        for url in ("http://localhost:%d/" % port, "http://[::1]:%d/" % port, "http://[::ffff:127.0.0.1]:%d/" % port, "http://name.invalid/"):
            refused(env, fetch(s, url), "not an IPv4 address", call=False)
        for url in ("file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1/", "127.0.0.1", "http://"):
            refused(env, fetch(s, url), "not an http or https URL", call=False)
        refused(env, fetch(s, "http://me:secret@127.0.0.1:%d/" % port), "user information", call=False)
        expect("secret" not in json.dumps([l for l in env.audit() if l["event"] != "decision"]))
        expect(good.accepted == 0 and bad.accepted == 0, good.accepted, bad.accepted)


@case("no network, by the rules or by name: nothing is connected to")
def none(env):
    with fetching(env) as (s, good, _):
        refused(env, fetch(s, good.url, tool="offline"), "names no network")
        env.write("policies/tools.lua", 'return { rules = { { tool = "fetch_url", action = "allow", network = "none" } } }')
        until(lambda: "reload" in [l["event"] for l in env.audit()], "reload")
        refused(env, fetch(s, good.url), "names no network")
        expect(good.accepted == 0)


@case("redirects: followed within the policy, to a name or an address outside it not, never in a circle")
def redirects(env):
    with fetching(env) as (s, good, bad):
        r = fetch(s, good.url + "/to?302,/there")
        expect(text_of(r) == "hello from /there\n[redirected to %s/there]" % good.url, r)
        before = good.accepted
        expect(text_of(fetch(s, good.url + "/to?307," + good.url + "/to?301,/end")).startswith("hello from /end\n[redirected to "))
        expect(good.accepted == before + 3, "a connection is used for more than one request")
        refused(env, fetch(s, good.url + "/to?302," + bad.url + "/x"), "never allowed: loopback")
        refused(env, fetch(s, good.url + "/to?302,//localhost/x"), "not an IPv4 address", call=False)
        refused(env, fetch(s, good.url + "/to?302,file:///etc/passwd"), "not an http or https URL", call=False)
        refused(env, fetch(s, good.url + "/to?302,/to?302,/to?302,/to?302,/to?302,/to?302,/to?302,/end"), "over 5 redirects", call=False)
        expect(bad.accepted == 0)


@case("a redirect keeps the method as HTTP says, and credentials for their server only")
def methods(env):
    with fetching(env) as (s, good, _), Server("127.0.0.1") as other:
        env.write("policies/network.lua", NETWORK % ("%d, %d" % (good.server_address[1], other.server_address[1])))
        until(lambda: "reload" in [l["event"] for l in env.audit()], "reload")
        for status, method, body in ((302, "GET", ""), (303, "GET", ""), (307, "POST", "a=1"), (308, "POST", "a=1")):
            for server in (good, other):
                got = json.loads(text_of(fetch(s, "%s/to?%d,%s/echo" % (good.url, status, server.url), tool="post")))
                expect(got[:2] == [method, body] and ("authorization" in got[2]) == (server is good) and got[2]["x-kept"] == "yes"
                       and ("content-type" in got[2]) == (method == "POST"), status, got)


@case("a policy that is tightened holds for the next connection, also where the server would keep the last")
def tightened(env):
    with fetching(env) as (s, good, _):
        expect(text_of(fetch(s, good.url + "/1")) == "hello from /1")
        env.write("policies/network.lua", NETWORK % 1)
        until(lambda: "reload" in [l["event"] for l in env.audit()], "reload")
        refused(env, fetch(s, good.url + "/2"), "no entry allows it")
        expect([seen[1] for seen in good.seen] == ["/1"], good.seen)


@case("the host's own addresses are never allowed unless one is permitted by itself")
def host(env):
    with fetching(env, permit='"127.0.0.0/8"') as (s, good, bad):
        refused(env, fetch(s, good.url), "never allowed: an address of the host")
        expect(good.accepted == 0)


def established(server):
    """How many connections to it are open."""
    with open("/proc/net/tcp") as f:
        return sum(line.split()[2].endswith(":%04X" % server.server_address[1]) and line.split()[3] == "01" for line in f.readlines()[1:])


@case("time: the tool's, the call's; a cancelled call closes its connection; proxies of the environment are not used")
def time_limits(env):
    env.environ["http_proxy"] = env.environ["HTTP_PROXY"] = env.environ["ALL_PROXY"] = "http://127.0.0.2:1"
    with fetching(env) as (s, good, _):
        r = fetch(s, good.url + "/slow", timeout=0.3)
        expect(r["isError"] and "nothing came" in text_of(r), r)
        id = s.start("tools/call", {"name": "fetch_url", "arguments": {"url": good.url + "/slow"}})
        until(lambda: sum(seen[1] == "/slow" for seen in good.seen) == 2, "the request")
        s.notify("notifications/cancelled", {"requestId": id})
        until(lambda: established(good) == 0, "the connection's end")
        expect(text_of(fetch(s, good.url + "/after")) == "hello from /after")
        r = fetch(s, good.url + "/101")
        expect(r["isError"] and "another protocol" in text_of(r), r)


@case("a body that does not end: its time-out, a cancelled call, a function that raises, the end of input; nothing stays open")
def bodies(env):
    with fetching(env) as (s, good, _):
        r = fetch(s, good.url + "/drip", timeout=2)
        expect(r["isError"] and "not done within 2 s" in text_of(r), r)
        until(lambda: established(good) == 0, "the connection's end")
        id = s.start("tools/call", {"name": "fetch_url", "arguments": {"url": good.url + "/drip"}})
        until(lambda: established(good) == 1, "the connection")
        s.notify("notifications/cancelled", {"requestId": id})
        until(lambda: established(good) == 0, "the connection's end")
        env.write("lua/tools/raise.lua", STREAM.replace('"stream"', '"raise"').replace("n, pieces = n", 'error("enough") n, pieces = n'))
        env.write("policies/tools.lua", RULES.replace("} }", '{ tool = "raise", action = "allow", network = "web" } } }'))
        until(lambda: "raise" in [t["name"] for t in s.request("tools/list")["result"]["tools"]], "the tool")
        r = fetch(s, good.url + "/drip", tool="raise")
        expect(r["isError"] and "enough" in text_of(r), r)
        until(lambda: established(good) == 0, "the connection's end")
        s.start("tools/call", {"name": "fetch_url", "arguments": {"url": good.url + "/drip"}})
        until(lambda: established(good) == 1, "the connection")
        expect(s.end() == 0)
        until(lambda: established(good) == 0, "the connection's end")
        expect(env.orch("audit", "verify", config=True).status == 0)


@case("many requests at once: 16 of a call, one more is refused; they end with the call, in a script's tools too")
def at_once(env):
    many = """
      local refused, tasks = 0, {}
      for i = 1, 20 do
        tasks[i] = orch.task.spawn(function()
          local r, why, code = ctx:http { url = args.url, on_data = function() end, timeout = 5 }
          if code == "limit" then refused = refused + 1 end
        end)
      end
      orch.sleep(0.3)
      return tostring(refused)"""
    tool = '{ name = "many", description = "d", input = { type = "object", properties = { url = { type = "string" } } }, run = function(args, ctx) %s end }' % many
    with fetching(env, rules='return { rules = { { tool = "many", action = "allow", network = "web" } } }') as (_, good, bad):
        env.write("lua/tools/many.lua", "return " + tool)
        script = env.write("server.lua", "orch.mcp.serve { transport = 'stdio', tools = { %s } }" % tool)
        for argv in (env.argv("mcp", "stdio"), [ORCH, "--config", env.config, script]):
            s = env.session(argv=argv)
            s.initialize()
            expect(text_of(fetch(s, good.url + "/drip", tool="many")) == "4")
            until(lambda: established(good) == 0, "the connections' end")
            expect(s.end() == 0)


@case("a tool that a script serves is held to the same policy")
def served(env):
    with fetching(env, rules='return { rules = { { tool = "get", action = "allow", network = "web" } } }') as (_, good, bad):
        script = env.write("server.lua", """orch.mcp.serve { transport = "stdio", tools = { {
          name = "get", description = "Gets", input = { type = "object", properties = { url = { type = "string" } } },
          run = function(args, ctx)
            local r, why, code = ctx:http { url = args.url }
            if not r then return nil, why, code end
            return r.body
          end } } }""")
        s = env.session(argv=[ORCH, "--config", env.config, script])
        s.initialize()
        expect(text_of(fetch(s, good.url + "/x", tool="get")) == "hello from /x")
        refused(env, fetch(s, bad.url + "/x", tool="get"), "never allowed: loopback")
        expect(bad.accepted == 0)


@case("a tool that tries many addresses: each is refused, 20 are named in the audit log")
def many(env):
    scan = POST.replace('"post"', '"scan"').replace("local r, why", """for i = 1, 100 do
      local r = ctx:http { url = "http://127.0.0.2:" .. i }
      if r then return "got " .. i end
    end
    local r, why""")
    with fetching(env, rules='return { rules = { { tool = "scan", action = "allow", network = "web" } } }') as (s, good, bad):
        env.write("lua/tools/scan.lua", scan)
        until(lambda: "scan" in [t["name"] for t in s.request("tools/list")["result"]["tools"]], "the tool")
        r = fetch(s, bad.url, tool="scan")
        expect(r["isError"], r)
        lines = [l for l in env.audit() if l["event"] == "net_deny"]
        expect(len(lines) == 20 and bad.accepted == 0, len(lines))


main()
