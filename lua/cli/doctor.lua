local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"

local paths = internal.paths()
local root = internal.uid == 0
local checks = {}

-- state: "ok", "warn" (works, but…) or "error".
local function add(name, state, why, fix)
  checks[#checks + 1] = { name = name, state = state, why = why, fix = fix }
end

local function first_file(list)
  for _, path in ipairs(list) do
    local stat = orch.fs.stat(path)
    if stat and stat.type == "file" then return path end
  end
end

local function in_path(program)
  local list = {}
  for dir in (orch.env("PATH") or "/usr/bin:/bin"):gmatch("[^:]+") do list[#list + 1] = dir .. "/" .. program end
  return first_file(list)
end

local function read_line(path)
  local f = io.open(path)
  local line = f and f:read("*l")
  if f then f:close() end
  return line
end

local function program()
  local features = internal.features ~= "" and internal.features or "none"
  add("version", "ok", ("orch %s, features: %s, %s"):format(orch.version, features, jit.version))
  if jit.arch ~= "x64" then
    add("processor", "error", "this is " .. jit.arch .. "; microVMs need x86-64", "use an x86-64 machine")
  end
  for name, path in pairs { launcher = paths.launcher, ["guest agent"] = paths.agent } do
    if not first_file { path } then add(name, "error", path .. " is missing", "install orch whole: make install") end
  end
end

-- Returns the loaded configuration, or nil.
local function configuration()
  local g, why = internal.load()
  if not g then
    add("configuration", "error", why,
      why:find("orch trust", 1, true) and "read the files, then: orch trust" or "orch config check")
    return nil
  end
  add("configuration", (g.notes == "" or paths.origin == "built-in") and "ok" or "warn",
    ("%s (%s), %d tools%s"):format(paths.config, paths.origin, #g.tools, g.notes ~= "" and "\n" .. g.notes or ""))
  return g
end

-- Ubuntu's own; a profile gives a program what it takes from all others.
local restricted = not root and read_line("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1"
local LIFT = "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"

local function confinement()
  local ok, why = internal.launch_check()
  if restricted and not ok then
    add("AppArmor", "error",
      "kernel.apparmor_restrict_unprivileged_userns is 1: this Ubuntu does not let ordinary users make user namespaces",
      LIFT .. "   (to keep it: a line in /etc/sysctl.d/)")
  elseif restricted then
    add("AppArmor", "ok", "limits user namespaces, but the launcher has what it needs")
  end
  if ok then
    add("confinement", "ok", "user, mount, pid and network namespaces and the system call filter work")
  else
    add("confinement", "error", why, restricted and "see AppArmor" or "orch vm run -- true says it again after the fix")
  end
end

-- Whether the servers that orch starts on this machine can be kept from changing what judges them.
local function protection()
  local ok, why = internal.protect_check()
  if ok then
    add("protection", "ok", "a server behind `orch mcp stdio -- CMD` cannot change orch's own files")
  else
    add("protection", "error", why, "`orch mcp stdio -- CMD` is refused until then")
  end
end

local function beneath(path, dir)
  return dir and (path == dir or dir == "/" or path:sub(1, #dir + 1) == dir .. "/")
end

-- Where an agent works, its client's own tools write, as the user.
local function place(g)
  if not g or paths.origin == "built-in" then return end
  for _, path in ipairs(g.sources) do
    local where = beneath(path, g.workspace) and "the workspace " .. g.workspace or beneath(path, paths.cwd) and "the current folder"
    if where then
      add("place", "warn", ("%s lies in %s: your agent's own Write and Edit can change it without orch"):format(path, where),
        "keep configuration, policies and tools in " .. paths.user_config .. ', or say trust = "always" in the configuration')
      return
    end
  end
  add("place", "ok", "configuration, policies and tools lie outside of the workspace and the current folder")
end

local function machine()
  local qemu = first_file { "/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64" }
  if qemu then
    local r, why = orch.process.run({ qemu, "-version" }, { timeout = "10s" })
    local line = r and r.status == 0 and r.stdout:match("^[^\n]+")
    if line then
      add("QEMU", "ok", qemu .. ": " .. line)
    else
      add("QEMU", "error", qemu .. " does not start: " .. (why or r.stderr),
        "sudo apt-get install --reinstall qemu-system-x86")
    end
  else
    add("QEMU", "error", "not found in /usr/bin or /usr/local/bin",
      "sudo apt-get install --no-install-recommends qemu-system-x86")
  end
  local device, why = internal.kvm_device()
  if device then
    add("/dev/kvm", "ok", "can be opened")
  elseif cli.exists("/dev/kvm") then
    local reason, fix = why:match("^(.-); (.*)$")
    add("/dev/kvm", "warn", (reason or why) .. "; microVMs are emulated, which is slower and isolates less", fix)
  else
    add("/dev/kvm", "warn", "not there; microVMs are emulated, which is slower and isolates less",
      "switch virtualisation on in the firmware (in a virtual machine: nested virtualisation), then: "
        .. "sudo modprobe kvm_intel || sudo modprobe kvm_amd")
  end
  local isolation
  isolation, why = internal.isolation()
  if not device and isolation == "emulated" then why = "see /dev/kvm" end
  add("isolation", isolation == "hardware" and "ok" or "warn", isolation == "none" and why or isolation .. ": " .. why,
    isolation == "none" and qemu and "orch spawn-vm tries it" or nil)
end

-- What microVMs with a network need besides; without a network policy nothing of it is.
local function network()
  if not cli.exists("/usr/bin/pasta") then
    add("network", "warn", "pasta is missing: microVMs with a network are refused", "sudo apt-get install --no-install-recommends passt")
    return
  end
  local tun = orch.fs.stat("/dev/net/tun")
  if not tun or tun.mode % 8 < 6 then
    add("network", "warn", "/dev/net/tun " .. (tun and "is not for everyone to use" or "is missing") .. ": microVMs with a network are refused",
      tun and "sudo chmod 666 /dev/net/tun" or "sudo modprobe tun")
    return
  end
  add("network", "ok", "pasta and /dev/net/tun are there")
end

local function images(g)
  local name = g and g.image or "base"
  local image, why = internal.image_find(name, true)
  if image then
    local n = 0
    for _, key in ipairs(orch.fs.list(paths.cache .. "/templates") or {}) do
      if cli.exists(paths.cache .. "/templates/" .. key .. "/meta.json") then n = n + 1 end
    end
    add("image", "ok", ("%s, kernel %s"):format(name, image.kernel_release))
    add("template", "ok", n > 0 and n .. " in the cache" or "none yet; the first microVM makes one")
  else
    add("image", "warn", name == "base" and why .. "; the first microVM builds it" or why, "orch image build " .. name)
  end
  local needed = image and "warn" or "error"
  local busybox = orch.fs.stat("/bin/busybox") and io.open("/bin/busybox", "rb")
  local start = busybox and busybox:read(4096)
  if busybox then busybox:close() end
  if not start then
    add("busybox", needed, "/bin/busybox is missing; image build needs it", "sudo apt-get install busybox-static")
  elseif start:find("/ld-", 1, true) then
    add("busybox", needed, "/bin/busybox is linked dynamically; the guest needs the static one",
      "sudo apt-get install busybox-static")
  else
    add("busybox", "ok", "/bin/busybox is static")
  end
  if not internal.features:find("apt-kernel", 1, true) then
    add("apt-get", needed, "this orch is built without the feature apt-kernel",
      "orch image build base --kernel FILE --modules DIR")
  elseif not in_path("apt-get") then
    add("apt-get", needed, "not found; image build takes Debian's kernel with it",
      "orch image build base --kernel FILE --modules DIR")
  else
    add("apt-get", "ok", "takes the guest's kernel; installs nothing")
  end
  if name ~= "debian" and not internal.image_find("debian") then
    add("debian", "ok", "the image with git, curl, jq and python3 is not built; guests have busybox alone: "
      .. "orch image build debian")
  end
  local lacking = {}
  for program, package in pairs { mmdebstrap = "mmdebstrap", ["mkfs.erofs"] = "erofs-utils",
    fakechroot = "fakechroot", fakeroot = "fakeroot" } do
    if not in_path(program) and not first_file { "/usr/sbin/" .. program } then lacking[#lacking + 1] = package end
  end
  table.sort(lacking)
  if lacking[1] then
    add("mmdebstrap", "warn", table.concat(lacking, ", ") .. " not found; image build debian needs it",
      "sudo apt-get install --no-install-recommends " .. table.concat(lacking, " "))
  elseif not root then
    local r, why = orch.process.run({ "unshare", "--map-root-user", "--mount", "true" }, { timeout = "10s" })
    if not r or r.status ~= 0 then
      add("unshare", "warn", "makes no namespaces for this user, which image build debian needs: " .. (r and r.stderr or why),
        restricted and LIFT .. "   (until the image is built)" or "see confinement")
    end
  end
  if not in_path("lz4") then
    add("lz4", needed, "not found; image build unpacks Debian's kernel with it", "sudo apt-get install lz4")
  end
end

local function octal(mode) return ("%04o"):format(mode) end

local function directory(name, path)
  local stat = orch.fs.stat(path)
  if stat then
    local group_or_other = stat.mode % 64
    if stat.type ~= "directory" then
      add(name, "error", path .. " is no directory", "remove it")
    elseif not internal.disk(path).writable then
      add(name, "error", path .. " cannot be written", "sudo chown " .. internal.uid .. " " .. path)
    elseif group_or_other ~= 0 then
      add(name, "warn", path .. " has mode " .. octal(stat.mode) .. "; others should not get in", "chmod 700 " .. path)
    else
      add(name, "ok", path .. ", mode " .. octal(stat.mode))
    end
    return
  end
  local parent = path
  repeat parent = parent:match("^(.*)/[^/]*$") until parent == "" or cli.exists(parent)
  if parent == "" then parent = "/" end
  if internal.disk(parent).writable then
    add(name, "ok", path .. " is made when it is needed")
  else
    add(name, "error", path .. " cannot be made: " .. parent .. " cannot be written",
      "sudo chown " .. internal.uid .. " " .. parent)
  end
end

local function disk()
  local at = paths.cache
  while at ~= "" and not cli.exists(at) do at = at:match("^(.*)/[^/]*$") end
  local free = internal.disk(at == "" and "/" or at).free_bytes / 1048576
  add("disk", free < 512 and "warn" or "ok", ("%.0f MiB free for %s"):format(free, paths.cache),
    free < 512 and "an image and its template need about 400 MiB; orch image rm NAME gives some back" or nil)
end

local function audit(g)
  local dir = g and g.audit_dir or paths.state .. "/audit"
  local list, why = internal.audit_list(dir)
  if not list then return add("audit log", "error", why, "see who owns " .. dir) end
  if not list[1] then return add("audit log", "ok", "nothing is logged yet in " .. dir) end
  local r
  r, why = internal.audit_verify(list[#list])
  if not r then return add("audit log", "error", why, "orch audit verify") end
  add("audit log", r.ok and "ok" or "error",
    r.ok and ("%s: %d lines, chain good"):format(list[#list], r.lines) or r.problem,
    not r.ok and "orch audit verify; somebody or something changed it: keep a copy" or nil)
end

return cli.main("doctor", {
  usage = "[--json]",
  about = "Looks at everything orch needs on this machine and says what is wrong, why, and the fix. Changes nothing.",
  options = { { "--json", nil, "print one JSON object" } },
  status = "0 nothing stands in the way, 1 an error was found, 2 usage",
  words = { 0, 0 },
  run = function(opts)
    program()
    local g = configuration()
    confinement()
    protection()
    place(g)
    machine()
    network()
    images(g)
    directory("state", paths.state)
    directory("cache", paths.cache)
    directory("runtime", paths.runtime)
    disk()
    audit(g)
    add("your agent", "ok",
      "orch judges only the calls that go through it: a client's own tools (shell, editor, web) run beside it, unjudged, as you",
      'switch them off there; for Claude Code: claude --tools "" --allowedTools "mcp__orch__*"; for Codex see the README')
    local errors = 0
    for _, c in ipairs(checks) do
      if c.state == "error" then errors = errors + 1 end
    end
    if opts.json then
      cli.json { ok = errors == 0, version = orch.version, checks = orch.json.array(checks) }
      return errors > 0 and 1 or 0
    end
    for _, c in ipairs(checks) do
      cli.out(("%-5s  %-13s  "):format(c.state, c.name),
        (cli.escape(c.why):gsub("%s+$", ""):gsub("\n", "\n" .. (" "):rep(22))), "\n")
      if c.fix then cli.out((" "):rep(22), "fix: ", cli.line(c.fix), "\n") end
    end
    if errors > 0 then cli.out(("\n%d error%s\n"):format(errors, errors == 1 and "" or "s")) end
    return errors > 0 and 1 or 0
  end,
}, ...)
