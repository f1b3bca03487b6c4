-- lua/policy/config.lua: what a configuration becomes, and what each mistake is told.
local count, failed = 0, 0
local function report(ok, name, detail)
    count = count + 1
    if not ok then failed = failed + 1 end
    print((ok and "ok " or "not ok ") .. count .. " - " .. name:gsub("[\n#]", " "))
    if not ok then print("# " .. tostring(detail):gsub("\n", "\n# ")) end
end

-- Stand-ins for the host's functions -----------------------------------------------------------------

local SECRET = setmetatable({}, { __tostring = function() return "[secret]" end })

local function parse(units)
    return function(s)
        local n, unit = s:match("^(%d+%.?%d*)(%a*)$")
        return n and units[unit] and tonumber(n) * units[unit] or nil
    end
end

local function distance(a, b)
    local row = {}
    for j = 0, #b do row[j] = j end
    for i = 1, #a do
        local diagonal = row[0]
        row[0] = i
        for j = 1, #b do
            local best = math.min(row[j] + 1, row[j - 1] + 1, diagonal + (a:byte(i) == b:byte(j) and 0 or 1))
            diagonal, row[j] = row[j], best
        end
    end
    return row[#b]
end

local function nearest(word, list)
    local best, least = nil, math.floor(#word / 3) + 2
    for i = 1, #list do
        local d = distance(word, list[i])
        if d < least then best, least = list[i], d end
    end
    return best
end

local deps = {
    duration = parse({ ms = 1, s = 1000, m = 60000, h = 3600000, d = 86400000 }),
    size = parse({ [""] = 1, K = 1024, M = 1024 ^ 2, G = 1024 ^ 3 }),
    nearest = nearest,
    is_secret = function(v) return v == SECRET end,
    cwd = "/home/u/project", home = "/home/u",
}
local function module_with(changes)
    local d = {}
    for k, v in pairs(deps) do d[k] = v end
    for k, v in pairs(changes or {}) do d[k] = v end
    if d.home == "" then d.home = nil end
    return assert(loadfile("lua/policy/config.lua"))(d)
end
local config = module_with()
local ctx = { dir = "/etc/orch", file = "/etc/orch/orchestrator.lua" }

local function list_text(list)
    local out = {}
    for i = 1, #list do out[i] = list[i].path .. ": " .. list[i].message end
    return table.concat(out, "\n")
end

-- bad(table, "path: message", …): all the errors, in order.
local function bad(t, ...)
    local want = table.concat({ ... }, "\n")
    local ok, errors = config.check(t, ctx)
    report(ok == nil and list_text(errors) == want, "refused: " .. (...), "got:\n" .. (ok and "accepted" or list_text(errors)) .. "\nwant:\n" .. want)
end

local function good(name, t, f, m)
    local c, errors = (m or config).check(t, ctx)
    if not c then return report(false, name, list_text(errors)) end
    local ok, err = pcall(f, c)
    report(ok, name, err)
end

local function eq(got, want, what)
    if got ~= want then error((what or "value") .. ": got " .. tostring(got) .. ", want " .. tostring(want), 2) end
end

-- What is accepted -----------------------------------------------------------------------------------

good("an empty table gives the defaults", {}, function(c)
    eq(c.policies, "/etc/orch/policies")
    eq(#c.tools, 0)
    eq(c.workspace, "/home/u/project")
    eq(c.vm.backend, "auto") eq(c.vm.accel, "auto") eq(c.vm.image, nil) eq(c.vm.memory, 256 * 1024 ^ 2)
    eq(c.vm.vcpus, 1) eq(c.vm.timeout, 60000) eq(c.vm.pool, 0) eq(c.vm.max, 16)
    eq(#c.net.permit_private, 0) eq(c.net.uplink, "pasta")
    eq(next(c.upstreams), nil) eq(next(c.mcp_json), nil)
    eq(c.limits.message, 16 * 1024 ^ 2) eq(c.limits.depth, 64) eq(c.limits.calls, 64)
    eq(c.limits.policy.time, 100) eq(c.limits.policy.memory, 64 * 1024 ^ 2)
    eq(c.limits.tool.cpu, 2000) eq(c.limits.tool.memory, 256 * 1024 ^ 2)
    eq(c.audit.dir, nil) eq(c.audit.sync, "none") eq(c.audit.keep, nil)
    eq(list_text(c.notes), "")
end)

good("the contract's example without what is not built", {
    policies = "policies", tools = { "lua/tools" }, workspace = "work",
    vm = { backend = "auto", accel = "auto", image = "debian", memory = "256M", vcpus = 1, timeout = "60s", pool = 1, max = 16 },
    net = { permit_private = {}, uplink = "pasta" }, upstreams = {}, mcp_json = {},
    limits = { message = "16M", depth = 64, calls = 64, policy = { time = "100ms", memory = "64M" }, tool = { cpu = "2s", memory = "256M" } },
    http = { listen = "127.0.0.1:8700", token = nil }, audit = { dir = nil, sync = "none" },
    llm = { provider = "openai", base_url = nil, model = nil, api_key = SECRET },
}, function(c)
    eq(c.tools[1], "/etc/orch/lua/tools")
    eq(c.workspace, "/etc/orch/work")
    eq(c.vm.pool, 0)
    eq(list_text(c.notes), [[
llm.api_key: without effect: not available yet
llm.provider: without effect: not available yet
vm.pool: spares are not available yet: taken as 0]])
end)

good("numbers are bytes and seconds", { vm = { memory = 134217728, timeout = 1.1 }, limits = { policy = { time = 0.25 } } }, function(c)
    eq(c.vm.memory, 134217728) eq(c.vm.timeout, 1100) eq(c.limits.policy.time, 250)
end)
good("both ends of a range", { vm = { memory = "64M", vcpus = 8, max = 1, timeout = "24h" }, limits = { message = "64M" } }, function(c)
    eq(c.vm.memory, 64 * 1024 ^ 2) eq(c.vm.vcpus, 8) eq(c.vm.max, 1) eq(c.vm.timeout, 86400000)
end)
good("paths are relative to the file", { policies = "../p//x/./y", tools = { "/abs/t", "t", "../../../../t" }, audit = { dir = "audit" } }, function(c)
    eq(c.policies, "/etc/p/x/y") eq(c.tools[1], "/abs/t") eq(c.tools[2], "/etc/orch/t") eq(c.tools[3], "/t")
    eq(c.audit.dir, "/etc/orch/audit")
end)
good("address blocks", { net = { permit_private = { "10.0.0.0/8", "192.168.1.0/24", "10.1.2.3/32", "fd00::/8", "fe80::1/128", "2001:db8:0:1:2:3:4:5/128", "::1/128", "1::/16", "255.255.255.255/32", "1:2:3:4:5:6:7::/112" } } }, function(c)
    eq(#c.net.permit_private, 10) eq(c.net.permit_private[4], "fd00::/8")
    eq(list_text(c.notes), "")
end)
good("a token comes from the environment", { http = { token = SECRET } }, function(c)
    eq(list_text(c.notes), "")
    eq(c.http.token, SECRET)
    eq(c.http.listen, "127.0.0.1:8700")
end)
good("empty sections", { vm = {}, net = {}, limits = { policy = {} }, http = {}, llm = {}, audit = {} }, function(c)
    eq(c.limits.policy.time, 100) eq(list_text(c.notes), "")
end)
good("no pool, no note", { vm = { pool = 0 } }, function(c) eq(list_text(c.notes), "") end)
good("the whole file system as workspace, written absolutely", { workspace = "/" }, function(c) eq(c.workspace, "/") end)
good("the home directory, written absolutely", { workspace = "/home/u/" }, function(c) eq(c.workspace, "/home/u") end)
good("a folder beside the home directory", { workspace = "../../home/us" }, function(c) eq(c.workspace, "/home/us") end)
good("without a home directory only / is special", {}, function(c) eq(c.workspace, "/home/u") end, module_with({ home = "", cwd = "/home/u" }))

-- What is refused ------------------------------------------------------------------------------------

bad(nil, ": the file must return a table, got nothing")
bad("x", ': the file must return a table, got "x"')
bad(SECRET, ": the file must return a table, got [secret]")
bad({ vm = { memroy = "256M" } }, "vm.memroy: unknown key; did you mean 'memory'?")
bad({ tols = {} }, "tols: unknown key; did you mean 'tools'?")
bad({ limits = { tool = { cup = "1s" } } }, "limits.tool.cup: unknown key; did you mean 'cpu'?")
bad({ limits = { policy = { xxxxxxxx = 1 } } }, "limits.policy.xxxxxxxx: unknown key; known here: memory, time")
bad({ "policies" }, "[1]: keys are names, like vm = { … }")
bad({ vm = { true } }, "vm.[1]: keys are names, like vm = { … }")
bad({ vm = "auto" }, 'vm: expected a table, got "auto"')
bad({ limits = { policy = 5 } }, "limits.policy: expected a table, got 5")
bad({ vm = SECRET }, "vm: expected a table, got [secret]")
bad({ policies = 5 }, "policies: expected a path, got 5")
bad({ policies = "" }, 'policies: expected a path, got ""')
bad({ policies = SECRET }, "policies: expected a path, got [secret]")
bad({ policies = "~/policies" }, 'policies: "~" is not expanded; write the path')
bad({ policies = "a\nb" }, 'policies: a path without control characters is needed, got "a\\10b"')
bad({ policies = ("x"):rep(5000) }, "policies: the path is longer than 4000 bytes")
bad({ tools = "lua/tools" }, 'tools: expected a list of directories like { "lua/tools" }, got "lua/tools"')
bad({ tools = { dir = "x" } }, 'tools: expected a list of directories like { "lua/tools" }, got a table')
bad({ tools = { "ok", 5, "~x" } }, "tools[2]: expected a path, got 5", 'tools[3]: "~" is not expanded; write the path')
bad({ workspace = true }, "workspace: expected a path, got true")
bad({ workspace = "../.." }, 'workspace: "../.." is /, the whole file system: name a folder in it, or write that path itself to allow it')
bad({ workspace = "../../home/u" }, 'workspace: "../../home/u" is /home/u, your home directory: name a folder in it, or write that path itself to allow it')
bad({ workspace = "../../home" }, 'workspace: "../../home" is /home, above your home directory: name a folder in it, or write that path itself to allow it')
bad({ vm = { backend = "firecracker" } }, 'vm.backend: not available yet; use "auto" or "qemu"')
bad({ vm = { backend = "qmeu" } }, 'vm.backend: must be one of auto, qemu, firecracker, got "qmeu"')
bad({ vm = { accel = "hvf" } }, 'vm.accel: must be one of auto, kvm, tcg, got "hvf"')
bad({ vm = { accel = true } }, "vm.accel: must be one of auto, kvm, tcg, got true")
bad({ vm = { image = "my.image" } }, 'vm.image: expected the name of an image (a-z, 0-9, -), got "my.image"')
bad({ vm = { image = "../x" } }, 'vm.image: expected the name of an image (a-z, 0-9, -), got "../x"')
bad({ vm = { image = 5 } }, "vm.image: expected the name of an image (a-z, 0-9, -), got 5")
bad({ vm = { memory = "lots" } }, 'vm.memory: expected a size like "256M" or a number of bytes, got "lots"')
bad({ vm = { memory = true } }, 'vm.memory: expected a size like "256M" or a number of bytes, got true')
bad({ vm = { memory = 1e8 + 0.5 } }, 'vm.memory: expected a size like "256M" or a number of bytes, got 100000000.5')
bad({ vm = { memory = 0 / 0 } }, 'vm.memory: expected a size like "256M" or a number of bytes, got ' .. ("%.14g"):format(0 / 0))
bad({ vm = { memory = -5 } }, 'vm.memory: expected a size like "256M" or a number of bytes, got -5')
bad({ vm = { memory = "32M" } }, "vm.memory: must be 64M to 4G, got 32M")
bad({ vm = { memory = 1024 } }, "vm.memory: must be 64M to 4G, got 1024")
bad({ vm = { memory = "5G" } }, "vm.memory: must be 64M to 4G, got 5G")
bad({ vm = { vcpus = 0 } }, "vm.vcpus: must be 1 to 8, got 0")
bad({ vm = { vcpus = 1.5 } }, "vm.vcpus: expected an integer, got 1.5")
bad({ vm = { vcpus = "2" } }, 'vm.vcpus: expected an integer, got "2"')
bad({ vm = { timeout = "60" } }, 'vm.timeout: expected a duration like "30s" or a number of seconds, got "60"')
bad({ vm = { timeout = "30 s" } }, 'vm.timeout: expected a duration like "30s" or a number of seconds, got "30 s"')
bad({ vm = { timeout = "48h" } }, "vm.timeout: must be 100ms to 24h, got 48h")
bad({ vm = { timeout = 0 } }, "vm.timeout: must be 100ms to 24h, got 0")
bad({ vm = { pool = 65 } }, "vm.pool: must be 0 to 64, got 65")
bad({ vm = { max = 257 } }, "vm.max: must be 1 to 256, got 257")
bad({ net = { permit_private = "10.0.0.0/8" } }, 'net.permit_private: expected a list of address blocks like { "10.0.0.0/8" }, got "10.0.0.0/8"')
bad({ net = { permit_private = { "10.0.0.0/8", "10.0.0.1/8", "10.0.0.0", "300.0.0.0/8", "0.0.0.0/0", "fd00::1/8", "1:2:3/8", "1::2::3/8", "010.0.0.0/8", "10.0.0.0/33", 5, "::/129" } } },
    'net.permit_private[10]: expected an address block like "10.0.0.0/8", got "10.0.0.0/33"',
    'net.permit_private[11]: expected an address block like "10.0.0.0/8", got 5',
    'net.permit_private[12]: expected an address block like "10.0.0.0/8", got "::/129"',
    'net.permit_private[2]: "10.0.0.1/8" has bits set behind the first 8',
    'net.permit_private[3]: expected an address block like "10.0.0.0/8", got "10.0.0.0"',
    'net.permit_private[4]: expected an address block like "10.0.0.0/8", got "300.0.0.0/8"',
    "net.permit_private[5]: a block of everything (/0) is never permitted",
    'net.permit_private[6]: "fd00::1/8" has bits set behind the first 8',
    'net.permit_private[7]: expected an address block like "10.0.0.0/8", got "1:2:3/8"',
    'net.permit_private[8]: expected an address block like "10.0.0.0/8", got "1::2::3/8"',
    'net.permit_private[9]: expected an address block like "10.0.0.0/8", got "010.0.0.0/8"')
for _, block in ipairs({ "1.256.0.0/16", "1.2.256.0/24", "1.2.3.256/32", "1:2:3:4:5:6:7:8:9/128", "1:2:3:4:5:6:7:8::/128", "g::/16", "12345::/16", "/8", "::/x" }) do
    bad({ net = { permit_private = { block } } }, 'net.permit_private[1]: expected an address block like "10.0.0.0/8", got "' .. block .. '"')
end
bad({ net = { uplink = "slirp" } }, 'net.uplink: must be one of pasta, veth, got "slirp"')
bad({ upstreams = { files = { command = { "x" } } } }, "upstreams: not available yet; put one server behind `orch mcp stdio -- CMD`")
bad({ upstreams = "x" }, 'upstreams: expected a table, got "x"')
bad({ mcp_json = { { path = ".mcp.json", sandbox = "vm" } } }, "mcp_json: not available yet; put one server behind `orch mcp stdio -- CMD`")
bad({ limits = { message = "65M" } }, "limits.message: must be 64K to 64M, got 65M")
bad({ limits = { depth = 3, calls = 0 } }, "limits.calls: must be 1 to 1024, got 0", "limits.depth: must be 4 to 128, got 3")
bad({ limits = { policy = { time = "20s", memory = "1M" } } }, "limits.policy.memory: must be 4M to 1G, got 1M", "limits.policy.time: must be 1ms to 10s, got 20s")
bad({ limits = { tool = { cpu = "1ms", memory = "8G" } } }, "limits.tool.cpu: must be 10ms to 10m, got 1ms", "limits.tool.memory: must be 4M to 4G, got 8G")
for _, v in ipairs { "127.0.0.1", "127.0.0.1:65536", "127.0.0.1:x", ":80", 8700, "::1:80", "" } do
  bad({ http = { listen = v } }, "http.listen: expected \"HOST:PORT\" or \"unix:PATH\", like \"127.0.0.1:8700\", got " .. (v == 8700 and "8700" or '"' .. v .. '"'))
end
bad({ http = { token = "abc" } }, "http.token: is not written into a file; take it from the environment: env(\"ORCH_TOKEN\", nil)")
bad({ http = { lisen = "x" } }, "http.lisen: unknown key; did you mean 'listen'?")
for _, row in ipairs { { "24h", 86400000 }, { "90d", 7776000000 }, { 864000, 864000000 }, { "36500d", 36500 * 86400000 }, { "1440m", 86400000 } } do
  good("audit.keep = " .. tostring(row[1]), { audit = { keep = row[1] } }, function(c) eq(c.audit.keep, row[2]) end)
end
for _, v in ipairs { "23h", "1h", 0, "36501d", 60 } do
  bad({ audit = { keep = v } }, "audit.keep: must be 24h to 36500d, got " .. v)
end
for _, v in ipairs { "forever", "90 d", "10G", "", "-1d" } do
  bad({ audit = { keep = v } }, 'audit.keep: expected a duration like "30s" or a number of seconds, got "' .. v .. '"')
end
bad({ audit = { sync = "always" } }, 'audit.sync: must be one of none, interval, each, got "always"')
bad({ audit = { dir = SECRET } }, "audit.dir: expected a path, got [secret]")
bad({ llm = { provider = "anthropic" } }, "llm.provider: not available yet; connect an agent with `orch mcp stdio`")
bad({ llm = { model = "m", base_url = "http://x" } }, "llm.base_url: not available yet; connect an agent with `orch mcp stdio`",
    "llm.model: not available yet; connect an agent with `orch mcp stdio`")
bad({ llm = { api_key = "sk-1" } }, "llm.api_key: not available yet; connect an agent with `orch mcp stdio`")
bad({ vm = { memroy = 1, vcpus = 9, image = "Debian" }, tols = 1, audit = 5 }, "audit: expected a table, got 5", "tols: unknown key; did you mean 'tools'?",
    'vm.image: expected the name of an image (a-z, 0-9, -), got "Debian"', "vm.memroy: unknown key; did you mean 'memory'?", "vm.vcpus: must be 1 to 8, got 9")
bad({ vm = { accel = ("ä"):rep(200) } }, 'vm.accel: must be one of auto, kvm, tcg, got "' .. ("ä"):rep(29) .. '…"')

good("started in /, workspace omitted", {}, function(c)
    eq(c.workspace, nil)
    eq(list_text(c.notes), "workspace: none: orch was started in /, the whole file system; set workspace to give tools a folder")
end, module_with({ cwd = "/" }))
good("started in the home directory, workspace omitted", {}, function(c)
    eq(c.workspace, nil)
    eq(list_text(c.notes), "workspace: none: orch was started in /home/u, your home directory; set workspace to give tools a folder")
end, module_with({ cwd = "/home/u" }))

-- show, defaults -------------------------------------------------------------------------------------

do
    local c = config.check({ vm = { memory = "512M", timeout = 90 }, tools = { "a", "b" }, llm = { api_key = SECRET } }, ctx)
    local rows = {}
    for _, row in ipairs(config.show(c)) do rows[row.path] = row.value .. " (" .. row.origin .. ")" end
    local function shows(path, want) report(rows[path] == want, "show " .. path, rows[path]) end
    shows("vm.memory", "512M (/etc/orch/orchestrator.lua)")
    shows("vm.timeout", "90 (/etc/orch/orchestrator.lua)")
    shows("vm.vcpus", "1 (default)")
    shows("limits.message", "16M (default)")
    shows("policies", "/etc/orch/policies (default)")
    shows("tools", "/etc/orch/a, /etc/orch/b (/etc/orch/orchestrator.lua)")
    shows("workspace", "/home/u/project (default)")
    shows("llm.api_key", "[secret] (/etc/orch/orchestrator.lua)")
    shows("audit.dir", " (default)")
    shows("audit.keep", "all is kept (default)")
    shows("http.token", "made when first needed (default)")
    shows("upstreams", " (default)")
    report(config.show(c)[1].path == "policies" and #config.show(c) == 32, "show has every key, in order")
    report(config.defaults["vm.memory"] == "256M" and config.defaults["limits.policy.time"] == "100ms", "defaults as one would write them")
end

print("1.." .. count)
os.exit(failed == 0 and 0 or 1)
