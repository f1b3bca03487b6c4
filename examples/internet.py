#!/usr/bin/env python3
"""Runs a command in a network of its own, in which another namespace plays the internet.

    internet.py COMMAND [ARG...]

The command sees one network device and a default route; web servers at 198.51.100.10 and 198.51.100.11, port 80, say who
asked. Nothing of the host's network is touched, and nothing is left. Making the namespaces needs root: an ordinary
user is asked for sudo's password, and COMMAND runs as that user. Status 77: there is neither root nor sudo.
"""
import http.server, os, shutil, stat, subprocess, sys, tempfile, threading

SERVERS = ("198.51.100.10", "198.51.100.11")
TUN = "/dev/net/tun"


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"%s greets %s\n" % (self.server.server_address[0].encode(), self.client_address[0].encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def ip(*args):
    subprocess.run(["ip", *args], check=True)


def world():
    """The namespace that plays the internet: lives until its standard input ends."""
    print("made", flush=True)
    sys.stdin.readline()
    for server in SERVERS:
        ip("address", "add", server + "/24", "dev", "world")
    ip("link", "set", "world", "up")
    for server in SERVERS:
        threading.Thread(target=http.server.ThreadingHTTPServer((server, 80), Page).serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


def open_tun():
    """Where only root may open the device, one that everybody may, in this mount namespace."""
    if not os.stat(TUN).st_mode & stat.S_IWOTH:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "tun")
            os.mknod(path, stat.S_IFCHR, os.makedev(10, 200))
            os.chmod(path, 0o666)
            subprocess.run(["mount", "--bind", path, TUN], check=True)


def heard(child, word):
    if child.stdout.readline() != word + "\n":
        sys.exit("internet.py: the namespace that plays the internet is not %s; see above" % word)


def inside(uid, gid, command):
    child = subprocess.Popen(["unshare", "--net", sys.executable, __file__, "--world"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    heard(child, "made")
    open_tun()
    ip("link", "add", "uplink", "type", "veth", "peer", "name", "world", "netns", str(child.pid))
    ip("address", "add", "198.51.100.1/24", "dev", "uplink")
    ip("link", "set", "lo", "up")
    ip("link", "set", "uplink", "up")
    ip("route", "add", "default", "via", SERVERS[0])
    child.stdin.write("\n")
    child.stdin.flush()
    heard(child, "ready")
    try:
        return subprocess.call(command) if uid == "0" else subprocess.call(["setpriv", "--reuid", uid, "--regid", gid, "--init-groups", *command])
    finally:
        child.stdin.close()
        child.wait()


def main():
    if sys.argv[1:] == ["--world"]:
        return world()
    if sys.argv[1:2] == ["--inside"]:
        return inside(sys.argv[2], sys.argv[3], sys.argv[4:])
    if not sys.argv[1:]:
        sys.exit(__doc__)
    root = os.geteuid() == 0
    if not root and not (shutil.which("sudo") and subprocess.call(["sudo", "-v"]) == 0):
        print("internet.py: neither root nor sudo: the namespaces cannot be made", file=sys.stderr)
        return 77
    # sudo drops the environment: what programs need of it is set again.
    env = [] if root else ["env"] + ["%s=%s" % (name, os.environ[name]) for name in ("HOME", "PATH", "LANG", "XDG_RUNTIME_DIR") if name in os.environ]
    argv = ([] if root else ["sudo"]) + ["unshare", "--net", "--mount", sys.executable, os.path.abspath(__file__), "--inside", str(os.getuid()), str(os.getgid()), *env]
    os.execvp(argv[0], argv + sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
