# A machine that this one may not be: AppArmor is on, as Debian and Ubuntu have it, with the profile that package passt
# brings. It is a microVM; in it the launcher makes a network with an uplink, without orch (uplink.py).
import glob, io, json, tarfile

from orch_e2e import *

START_S = 120
BUILD_S = 280
LAUNCHER = os.path.join(os.path.dirname(ORCH), "launcher")
MODULES = ("tun.ko", "nfnetlink.ko")
# What the guest gets of this machine, at the same places.
FILES = ["/usr/bin/passt*", "/usr/bin/pasta*", "/sbin/apparmor_parser", "/etc/apparmor", "/etc/apparmor.d",
         "/usr/share/apparmor*"]
SCRIPT = """set -e
tar -xzf - -C /
mount -t securityfs none /sys/kernel/security
apparmor_parser -r $(ls /etc/apparmor.d/usr.bin.pass[t] /etc/apparmor.d/usr.bin.past[a] 2>/dev/null)
python3 /test/uplink.py /test/launcher /test/*.ko
dmesg | grep DENIED || true
"""


def debian(env):
    """The project's image debian, whose kernel has AppArmor on; test_debian.py says how it is built."""
    env.shared_cache()
    env.environ["XDG_CACHE_HOME"] = os.path.join(env.environ["XDG_CACHE_HOME"], "debian")
    os.makedirs(env.environ["XDG_CACHE_HOME"], 0o700, exist_ok=True)
    r = env.orch("image", "build", "debian", deadline_s=BUILD_S)
    expect(r.status == 0, r)
    return os.path.dirname(json.loads(env.orch("image", "inspect", "debian", "--json").out)["disk"])


def kernel_modules(image):
    """Of the kernel's package, which stays with the image: (name, bytes)."""
    package = glob.glob(os.path.join(image, "linux-image-*.deb"))
    expect(len(package) == 1, package)
    found = []
    child = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package[0]], stdout=subprocess.PIPE)
    with child.stdout, tarfile.open(fileobj=child.stdout, mode="r|") as tar:
        for member in tar:
            if os.path.basename(member.name) in MODULES:
                found.append((os.path.basename(member.name), tar.extractfile(member).read()))
    child.wait()
    expect(len(found) == len(MODULES), found)
    return found


def bundle(image):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for pattern in FILES:
            paths = glob.glob(pattern)
            expect(paths, pattern, "is missing")
            for path in paths:
                tar.add(path)
        tar.add(LAUNCHER, "test/launcher")
        tar.add(os.path.join(ROOT, "tests/e2e/uplink.py"), "test/uplink.py")
        for name, data in kernel_modules(image):
            info = tarfile.TarInfo("test/" + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@case("where AppArmor holds pasta to its package's profile, a microVM gets its uplink, root's and an ordinary user's")
def uplink(env):
    data = bundle(debian(env))
    r = env.orch("vm", "run", "--image", "debian", "--user", "root", "--memory", "512M", "--", "bash", "-c", SCRIPT, input=data,
                 deadline_s=START_S)
    lines = r.out.splitlines()
    expect(r.status == 0 and len(lines) >= 2, r)
    for who, line in zip(("root", "user"), lines):
        got = json.loads(line)
        expect(got["up"] and got["profile"], who, got, r)
        expect(all(p.endswith("(enforce)") for p in got["profile"]), who, got, "runs without its profile")
    expect(len(lines) == 2, "AppArmor denied something:", r)


main()
