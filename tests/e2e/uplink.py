"""Runs in a microVM as root, in place of orch: asks the real launcher for a network with an uplink, as root and as
an ordinary user, and prints a line of JSON for each: {"up", "said", "profile"}. core/launch/wire.h is what it speaks.

uplink.py LAUNCHER MODULE.ko...
"""
import array, contextlib, ctypes, fcntl, glob, json, os, select, signal, socket, struct, sys

NEW, ERROR, HELLO, NET = 1, 5, 6, 7
WITH_UPLINK = 4
NEW_ROUTE = 24
WITHIN_S = 20
VMM_ID = 60001 # what orch gives as root
USER = 1000
HEAD = struct.Struct("<10IQ32s") # op flags uid gid fd_mask n_argv n_binds status errno blob_len as_bytes step


def message(op, flags=0, id=0):
    return HEAD.pack(op, flags, id, id, 0, 0, 0, 0, 0, 0, 0, b"")


def receive(sock):
    """op, what an error says, descriptors."""
    if not select.select([sock], [], [], WITHIN_S)[0]:
        return 0, "no answer", []
    data, fds, _, _ = socket.recv_fds(sock, HEAD.size + 4096, 8)
    if len(data) < HEAD.size:
        return 0, "the launcher ended", fds
    head = HEAD.unpack_from(data)
    return head[0], "%s %s" % (head[11].rstrip(b"\0").decode(), data[HEAD.size:].rstrip(b"\0").decode()), fds


def machine(modules):
    """A kernel with tap devices and a default route, which is all that pasta wants of a host."""
    for path in modules:
        with open(path, "rb") as f:
            if ctypes.CDLL(None).syscall(313, f.fileno(), b"", 0): # finit_module
                sys.exit("%s cannot be loaded" % path)
    os.chmod("/dev/net/tun", 0o666)
    tap, device = os.open("/dev/net/tun", os.O_RDWR), b"ext0"
    fcntl.ioctl(tap, 0x400454ca, struct.pack("16sH14x", device, 0x1002)) # TUNSETIFF: IFF_TAP | IFF_NO_PI; it stays with this process
    address = lambda text: struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))
    name = array.array("b", device + b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8916, struct.pack("16s16s", device, address("192.0.2.2"))) # SIOCSIFADDR
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", device, 0x41)) # SIOCSIFFLAGS: up, running
        fcntl.ioctl(s, 0x890b, struct.pack("L16s16s16sHhLPhP32x", 0, address("0.0.0.0"), address("192.0.2.1"), address("0.0.0.0"),
                                           3, 0, 0, 0, 0, name.buffer_info()[0])) # SIOCADDRT: up, by a gateway


def default_route(data):
    while len(data) >= 16:
        size, kind = struct.unpack_from("<IH", data)
        if kind == NEW_ROUTE and data[17] == 0: # the destination's prefix
            return True
        data = data[max(16, (size + 3) & ~3):]
    return False


def profiles():
    """Under which AppArmor profiles pasta runs."""
    found = []
    for path in glob.glob("/proc/[0-9]*/comm"):
        with contextlib.suppress(OSError), open(path) as f: # others come and go
            if f.read().startswith(("pasta", "passt")):
                with open(os.path.dirname(path) + "/attr/current") as g:
                    found.append(g.read().strip())
    return found


def uplink(launcher, uid):
    main, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        if uid:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL) # pasta takes no other
        os.dup2(theirs.fileno(), 3)
        os.execv(launcher, [launcher])
    theirs.close()
    op, said, _ = receive(main)
    if op != HELLO:
        return {"up": False, "said": said, "profile": []}
    ctl, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    socket.send_fds(main, [message(NEW, id=VMM_ID)], [theirs.fileno()])
    theirs.close()
    ctl.send(message(NET, flags=WITH_UPLINK))
    op, said, fds = receive(ctl)
    if op != NET:
        return {"up": False, "said": said, "profile": []}
    route, up = socket.socket(fileno=fds[1]), False
    while not up:
        ready = select.select([route, ctl], [], [], WITHIN_S)[0]
        if route in ready:
            up = default_route(route.recv(65536))
        else:
            said = receive(ctl)[1] if ready else "no route"
            break
    result = {"up": up, "said": said.strip(), "profile": profiles()}
    ctl.close() # ends the network, and main the launcher
    main.close()
    os.waitpid(pid, 0)
    return result


machine(sys.argv[2:])
for uid in (0, USER):
    print(json.dumps(uplink(sys.argv[1], uid)), flush=True)
