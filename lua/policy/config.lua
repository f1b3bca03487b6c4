-- The configuration: checks the table that orchestrator.lua returned and fills in the defaults.
--
--   local config = chunk(deps)   deps: nearest(word, list) -> word | nil, duration(text) -> ms | nil,
--                                size(text) -> bytes | nil, is_secret(v), cwd, home (nil: unknown)
--   config.check(t, ctx) -> table | nil, errors      ctx: dir (of the file, absolute), file (its name)
--   config.show(table) -> list of { path =, value =, origin = }
--   config.defaults: path -> default as one would write it
--
-- The checked table has every key of the contract that has a value: paths absolute, durations in
-- milliseconds, sizes in bytes; and `notes`, a list of { path =, message = } about what was accepted
-- without effect. errors is such a list too, of all that is wrong, in order of their paths.
local deps = ...
local type, pairs, tostring, next, find, format = type, pairs, tostring, next, string.find, string.format
local gsub, sub, match, floor = string.gsub, string.sub, string.match, math.floor
local concat, sort = table.concat, table.sort

-- A kind is a function(v, entry, c, path) -> value for the checked table | nil, message. `entry` is the
-- row of SPEC: path, kind, default, and two arguments of the kind; c is the check in progress.

local function show(v)
  if deps.is_secret(v) then
    return "[secret]"
  elseif type(v) == "string" then
    v = #v <= 60 and v or gsub(sub(v, 1, 60), "[\192-\255]?[\128-\191]*$", "") .. "…"
    return '"' .. gsub(v, "[%c\"\\]", function(ch) return format("\\%d", ch:byte()) end) .. '"'
  end
  return type(v) == "number" and format("%.14g", v) or type(v) == "boolean" and tostring(v) or "a " .. type(v)
end

local function is_list(v)
  if type(v) ~= "table" or deps.is_secret(v) then return false end
  local n = 0
  for _ in pairs(v) do n = n + 1 end
  return n == #v
end

-- `form` says how a value is written; of: text -> number; unit: what a plain number is multiplied by.
local function quantity(v, entry, form, of, unit)
  local n
  if type(v) == "number" then
    n = unit == 1 and v or floor(v * unit + 0.5)
  elseif type(v) == "string" then
    n = of(v)
  end
  if not n or n < 0 or n % 1 ~= 0 then return nil, "expected " .. form .. ", got " .. show(v) end
  if n < of(entry[4]) or n > of(entry[5]) then
    return nil, "must be " .. entry[4] .. " to " .. entry[5] .. ", got " .. (type(v) == "string" and v or show(v))
  end
  return n
end

local function size(v, entry)
  return quantity(v, entry, 'a size like "256M" or a number of bytes', deps.size, 1)
end

local function duration(v, entry)
  return quantity(v, entry, 'a duration like "30s" or a number of seconds', deps.duration, 1000)
end

local function integer(v, entry)
  if type(v) ~= "number" or v % 1 ~= 0 then return nil, "expected an integer, got " .. show(v) end
  if v < entry[4] or v > entry[5] then
    return nil, "must be " .. entry[4] .. " to " .. entry[5] .. ", got " .. show(v)
  end
  return v
end

-- entry[4]: what may be written; entry[5]: what of it is not built, with what to use instead.
local function choice(v, entry)
  local list = entry[4]
  for i = 1, #list do
    if list[i] == v then
      if entry[5] and entry[5][v] then return nil, "not available yet; use " .. entry[5][v] end
      return v
    end
  end
  return nil, "must be one of " .. concat(list, ", ") .. ", got " .. show(v)
end

local function image(v)
  if type(v) ~= "string" or #v > 63 or not find(v, "^%l[%l%d-]*$") then
    return nil, "expected the name of an image (a-z, 0-9, -), got " .. show(v)
  end
  return v
end

local function pool(v, entry, c, path)
  local n, message = integer(v, entry)
  if n and n > 0 then
    c:note(path, "spares are not available yet: taken as 0")
    n = 0
  end
  return n, message
end

-- Paths are taken as written: "..", "." and "//" are resolved in the text, links are not followed here.
local function absolute(dir, p)
  local out = {}
  for part in (sub(p, 1, 1) == "/" and p or dir .. "/" .. p):gmatch("[^/]+") do
    if part == ".." then
      out[#out] = nil
    elseif part ~= "." then
      out[#out + 1] = part
    end
  end
  return "/" .. concat(out, "/")
end

local function path_of(v, c)
  if type(v) ~= "string" or v == "" then return nil, "expected a path, got " .. show(v) end
  if find(v, "[%c]") then return nil, "a path without control characters is needed, got " .. show(v) end
  if sub(v, 1, 1) == "~" then return nil, "\"~\" is not expanded; write the path" end
  if #v > 4000 then return nil, "the path is longer than 4000 bytes" end
  return absolute(c.dir, v)
end

local function directory(v, _, c)
  return path_of(v, c)
end

local function directories(v, _, c, path)
  if not is_list(v) then return nil, 'expected a list of directories like { "lua/tools" }, got ' .. show(v) end
  local out = {}
  for i = 1, #v do
    local p, message = path_of(v[i], c)
    if not p then c:fail(path .. "[" .. i .. "]", message) end
    out[i] = p
  end
  return out
end

-- Omitted: the folder orch was started in. What holds everything of a user is no workspace by accident:
-- written so it is an error, omitted there is none.
local function workspace(v, _, c, path)
  local p, message
  if v == nil then
    p = absolute("/", deps.cwd)
  else
    p, message = path_of(v, c)
    if not p or sub(v, 1, 1) == "/" then return p, message end
  end
  local home = deps.home and absolute("/", deps.home)
  local what = p == "/" and "the whole file system"
    or home == p and "your home directory"
    or home and sub(home, 1, #p + 1) == p .. "/" and "above your home directory"
  if what and v == nil then
    return nil, c:note(path, "none: orch was started in " .. p .. ", " .. what .. "; set workspace to give tools a folder")
  elseif what then
    return nil, show(v) .. " is " .. p .. ", " .. what .. ": name a folder in it, or write that path itself to allow it"
  end
  return p
end

-- The address as 16-bit groups, or nil.
local function groups_of(address)
  local a, b, c, d = match(address, "^(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)$")
  if a then
    if a + 0 > 255 or b + 0 > 255 or c + 0 > 255 or d + 0 > 255 then return nil end
    return { a * 256 + b, c * 256 + d }
  end
  local head, tail = match(address, "^(.-)::(.*)$")
  local function part(text, out)
    for g in (text .. ":"):gmatch("([^:]*):") do
      if not find(g, "^%x%x?%x?%x?$") then return nil end
      out[#out + 1] = tonumber(g, 16)
    end
    return out
  end
  if not head then
    local out = part(address, {})
    return out and #out == 8 and out or nil
  end
  local out, rest = head == "" and {} or part(head, {}), tail == "" and {} or part(tail, {})
  if not out or not rest or #out + #rest > 7 then return nil end
  for _ = #out + #rest + 1, 8 do out[#out + 1] = 0 end
  for i = 1, #rest do out[#out + 1] = rest[i] end
  return out
end

local function cidr(v)
  local address, bits = match(type(v) == "string" and v or "", "^([%x:.]+)/(%d%d?%d?)$")
  local groups = address and not find("." .. address, "%.0%d") and groups_of(address)
  bits = tonumber(bits)
  if not groups or bits > #groups * 16 then return 'expected an address block like "10.0.0.0/8", got ' .. show(v) end
  if bits == 0 then return "a block of everything (/0) is never permitted" end
  for i = 1, #groups do
    local fixed = bits - 16 * (i - 1)
    fixed = fixed < 0 and 0 or fixed > 16 and 16 or fixed
    if groups[i] % 2 ^ (16 - fixed) ~= 0 then return show(v) .. " has bits set behind the first " .. bits end
  end
end

local function cidrs(v, _, c, path)
  if not is_list(v) then return nil, 'expected a list of address blocks like { "10.0.0.0/8" }, got ' .. show(v) end
  local out = {}
  for i = 1, #v do
    local message = cidr(v[i])
    if message then c:fail(path .. "[" .. i .. "]", message) end
    out[i] = v[i]
  end
  return out
end

local function uplink(v, entry, c, path)
  local value, message = choice(v, entry)
  if value == "veth" then return nil, 'not available yet; use "pasta"' end
  return value, message
end

-- A table that must be empty for now; entry[4]: what to do instead.
local function nothing(v, entry)
  if type(v) ~= "table" or deps.is_secret(v) then return nil, "expected a table, got " .. show(v) end
  if next(v) ~= nil then return nil, "not available yet; " .. entry[4] end
  return {}
end

-- "HOST:PORT", "[IPV6]:PORT" or "unix:PATH".
local function listen(v, _, c)
  if type(v) == "string" and sub(v, 1, 5) == "unix:" then
    local p, message = path_of(sub(v, 6), c)
    return p and "unix:" .. p, message
  end
  local port = type(v) == "string" and (match(v, "^[%w.-]+:(%d+)$") or match(v, "^%[[%x:.]+%]:(%d+)$"))
  if not port or #port > 5 or tonumber(port) > 65535 then
    return nil, 'expected "HOST:PORT" or "unix:PATH", like "127.0.0.1:8700", got ' .. show(v)
  end
  return v
end

local function token(v)
  if not deps.is_secret(v) then return nil, 'is not written into a file; take it from the environment: env("ORCH_TOKEN", nil)' end
  return v
end

-- A value that nothing reads yet: what equals the contract's example (entry[4]) or comes from the
-- environment is accepted, so that the same file is good whatever is set there; all else is refused.
local function unused(v, entry, c, path)
  if v ~= entry[4] and not deps.is_secret(v) then return nil, "not available yet; " .. entry[5] end
  c:note(path, "without effect: not available yet")
end

local AGENT = "connect an agent with `orch mcp stdio`"
-- path, kind, default, the kind's arguments. Ranges: what a small machine can hold and a peer must not
-- exceed; the message limit is also the JSON scanner's.
local SPEC = {
  { "policies", directory, "policies" },
  { "tools", directories, {} },
  { "workspace", workspace },
  { "trust", choice, nil, { "always" } }, -- none: only a configuration in the working directory needs it
  { "vm.backend", choice, "auto", { "auto", "qemu", "firecracker" }, { firecracker = '"auto" or "qemu"' } },
  { "vm.accel", choice, "auto", { "auto", "kvm", "tcg" } },
  { "vm.image", image }, -- none: the host takes debian when it is built, else base
  { "vm.memory", size, "256M", "64M", "4G" },
  { "vm.vcpus", integer, 1, 1, 8 },
  { "vm.timeout", duration, "60s", "100ms", "24h" },
  { "vm.pool", pool, 0, 0, 64 },
  { "vm.max", integer, 16, 1, 256 },
  { "net.permit_private", cidrs, {} },
  { "net.uplink", uplink, "pasta", { "pasta", "veth" } },
  { "upstreams", nothing, {}, "put one server behind `orch mcp stdio -- CMD`" },
  { "mcp_json", nothing, {}, "put one server behind `orch mcp stdio -- CMD`" },
  { "limits.message", size, "16M", "64K", "64M" },
  { "limits.depth", integer, 64, 4, 128 },
  { "limits.calls", integer, 64, 1, 1024 },
  { "limits.policy.time", duration, "100ms", "1ms", "10s" },
  { "limits.policy.memory", size, "64M", "4M", "1G" },
  { "limits.tool.cpu", duration, "2s", "10ms", "10m" },
  { "limits.tool.memory", size, "256M", "4M", "4G" },
  { "http.listen", listen, "127.0.0.1:8700" },
  { "http.token", token },
  { "audit.dir", directory },
  { "audit.sync", choice, "none", { "none", "interval", "each" } },
  { "audit.keep", duration, nil, "24h", "36500d" }, -- none: all is kept
  { "llm.provider", unused, nil, "openai", AGENT },
  { "llm.base_url", unused, nil, nil, AGENT },
  { "llm.model", unused, nil, nil, AGENT },
  { "llm.api_key", unused, nil, nil, AGENT },
}

-- TREE["vm"]["memory"] is its row; TREE["limits"]["policy"] is true for a table of its own in TREE.
local TREE, defaults = { [""] = {} }, {}
for i = 1, #SPEC do
  local path = SPEC[i][1]
  local section, name = match(path, "^(.-)%.?([^.]+)$")
  if not TREE[section] then
    TREE[section] = {}
    local outer, inner = match(section, "^(.-)%.?([^.]+)$")
    TREE[outer][inner] = true
  end
  TREE[section][name], defaults[path] = SPEC[i], SPEC[i][3]
end

local function names_of(t)
  local out = {}
  for k in pairs(t) do out[#out + 1] = k end
  sort(out)
  return out
end

local function fill(c, section, given)
  local out, known, prefix = {}, TREE[section], section == "" and "" or section .. "."
  for k in pairs(given) do
    if type(k) ~= "string" then
      c:fail(prefix .. "[" .. show(k) .. "]", "keys are names, like vm = { … }")
    elseif not known[k] then
      local near = deps.nearest(k, names_of(known))
      local hint = near and "did you mean '" .. near .. "'?" or "known here: " .. concat(names_of(known), ", ")
      c:fail(prefix .. k, "unknown key; " .. hint)
    end
  end
  for k, row in pairs(known) do
    local v, path = given[k], prefix .. k
    if row == true then
      if v ~= nil and (type(v) ~= "table" or deps.is_secret(v)) then
        c:fail(path, "expected a table, got " .. show(v))
      else
        out[k] = fill(c, path, v or {})
      end
    else
      -- A default is checked like a value; what is to be noted of defaults is that there is no workspace.
      local value, message
      if v ~= nil then
        value, message = row[2](v, row, c, path)
      elseif row[3] ~= nil or row[2] == workspace then
        value, message = row[2](row[3], row, row[2] == workspace and c or { dir = c.dir, note = function() end }, path)
      end
      if value == nil and message then c:fail(path, message) end
      out[k] = value
      c.written[path] = v
    end
  end
  return out
end

local function by_path(a, b)
  return a.path < b.path or a.path == b.path and a.message < b.message
end

local function check(t, ctx)
  local errors, notes = {}, {}
  if type(t) ~= "table" or deps.is_secret(t) then
    return nil, { { path = "", message = "the file must return a table, got " .. (t == nil and "nothing" or show(t)) } }
  end
  local c = { dir = ctx.dir, written = {} }
  function c:fail(path, message) errors[#errors + 1] = { path = path, message = message } end
  function c:note(path, message) notes[#notes + 1] = { path = path, message = message } end
  local config = fill(c, "", t)
  sort(errors, by_path)
  sort(notes, by_path)
  if errors[1] then return nil, errors end
  config.notes, config.written, config.file = notes, c.written, ctx.file or "orchestrator.lua"
  return config
end

local function text(v)
  if v == nil then return "" end
  if type(v) ~= "table" or deps.is_secret(v) then return deps.is_secret(v) and "[secret]" or tostring(v) end
  return concat(v, ", ")
end

-- Sizes and durations as they were written, paths as they are taken.
-- What is used where nothing is written and the host decides.
local OTHERWISE = { ["vm.image"] = "debian when built, else base", ["audit.keep"] = "all is kept", ["http.token"] = "made when first needed" }

local function show_config(config)
  local out = {}
  for i = 1, #SPEC do
    local path, kind = SPEC[i][1], SPEC[i][2]
    local value, written = config, config.written[path]
    for k in path:gmatch("[^.]+") do value = type(value) == "table" and value[k] or nil end
    if kind == size or kind == duration or kind == unused then
      value = written
      if value == nil then value = defaults[path] end
    end
    if value == nil then value = OTHERWISE[path] end
    out[i] = { path = path, value = text(value), origin = written ~= nil and config.file or "default" }
  end
  return out
end

return { check = check, show = show_config, defaults = defaults }
