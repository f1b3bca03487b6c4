-- Recipes of images (see images/debian.lua): checks one and makes of it what the builder passes to mmdebstrap.
--
--   local plan, errors = recipe.plan(t)   plan: { name, suite, options }; errors: a list of texts
--   recipe.sources(suite)                 this machine's way to the suite's packages; {}: mmdebstrap's own
local orch = require "orch"

local recipe = {}

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end

-- A command for the image, run in it as root; words are its $1, $2 ….
local function hook(script, ...)
  local words = { "chroot \"$1\" /bin/sh -euc", quote(script), "orch" }
  for _, word in ipairs { ... } do words[#words + 1] = quote(word) end
  return "--customize-hook=" .. table.concat(words, " ")
end

local function write(path, text, mode)
  return hook('mkdir -p "${1%/*}"; rm -f "$1"; printf %s "$2" >"$1"; chmod "$3" "$1"', path, text, mode or "0644")
end

-- What every image has, whatever the machine it was made on: mmdebstrap copies that one's name and servers.
local function common()
  return {
    hook "rm -rf /etc/apt/sources.list.d/* /etc/apt/apt.conf.d/99mmdebstrap",
    write("/etc/apt/sources.list", "# No server: a microVM reaches what its network policy allows. A recipe can write this file.\n"),
    write("/etc/hostname", "orch\n"),
    write("/etc/hosts", "127.0.0.1 localhost orch\n::1 localhost\n"),
    write("/etc/resolv.conf", ""),
    hook "id 1000 >/dev/null 2>&1 || useradd --uid 1000 --user-group --create-home --shell /bin/bash user",
  }
end

local MAX_BYTES = 32768 -- of one text: Linux takes 128 KiB an argument, and quoting may treble it

local function text(v, pattern)
  return type(v) == "string" and #v <= MAX_BYTES and not v:find("%z") and (not pattern or v:find(pattern) ~= nil)
end

-- Key -> what each entry of its list must be, in words and as a test.
local LISTS = {
  packages = { "the name of a package", function(v) return text(v, "^[%l%d][%l%d+.-]+$") end },
  leave_out = { 'a path like "/usr/share/doc/*"', function(v) return text(v, "^/[^%c]+$") end },
  commands = { "a shell command of at most 32 KiB", text },
  warm = { "a shell command of at most 1 KiB", function(v) return text(v) and #v <= 1024 end },
  files = { 'a table { path = "/…", text = "…", mode = "0644" } with a text of at most 32 KiB', function(v)
    if type(v) ~= "table" or not text(v.path, "^/[^%c]+$") or not text(v.text) then return false end
    for key in pairs(v) do
      if key ~= "path" and key ~= "text" and key ~= "mode" then return false end
    end
    return not (v.path .. "/"):find("/%.%.?/") and not v.path:find("/$") and (v.mode == nil or text(v.mode, "^[0-7][0-7][0-7][0-7]?$"))
  end },
}
local KNOWN = "name, suite, packages, leave_out, files, commands, warm"

local function check(t)
  local errors = {}
  local function fail(...) errors[#errors + 1] = (...):format(select(2, ...)) end
  if type(t) ~= "table" then return { "the file must return a table" } end
  if not text(t.name, "^%l[%l%d-]*$") or #t.name > 63 then fail "name: needed, a-z and then a-z, 0-9 and -" end
  if t.name == "base" then fail "name: base is made without a recipe; give yours another name" end
  if t.suite ~= nil and not text(t.suite, "^%l+$") then fail 'suite: the name of a Debian release like "bookworm"' end
  for key, v in pairs(t) do
    local list = LISTS[key]
    if list and (type(v) ~= "table" or #v > 1000) then
      fail("%s: expected a list of at most 1000", key)
    elseif list then
      for i = 1, #v do
        if not list[2](v[i]) then fail("%s[%d]: expected %s", key, i, list[1]) end
      end
    elseif key ~= "name" and key ~= "suite" then
      fail("%s: unknown key; known: %s", tostring(key), KNOWN)
    end
  end
  table.sort(errors)
  return errors
end

function recipe.plan(t)
  local errors = check(t)
  if errors[1] then return nil, errors end
  local suite, options = t.suite or "bookworm", {}
  local function add(option) options[#options + 1] = option end
  if t.packages and t.packages[1] then add("--include=" .. table.concat(t.packages, ",")) end
  for _, path in ipairs(t.leave_out or {}) do add("--dpkgopt=path-exclude=" .. path) end
  for _, each in ipairs(common()) do add(each) end
  for _, file in ipairs(t.files or {}) do add(write(file.path, file.text, file.mode)) end
  for _, command in ipairs(t.commands or {}) do add(hook(command)) end
  local warm = { "exec >/dev/null 2>&1 </dev/null" }
  for _, command in ipairs(t.warm or {}) do warm[#warm + 1] = command end
  add(write("/etc/orch/warm", table.concat(warm, "\n") .. "\n:\n"))
  return { name = t.name, suite = suite, options = options }
end

-- The host's own mirrors and proxies, where its apt knows the suite from Debian.
function recipe.sources(suite)
  local out, seen = {}, {}
  local function run(...) return orch.process.run({ ... }, { timeout = "30s" }) end
  local format = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)"
  local targets = run("apt-get", "indextargets", "--format", format, "Created-By: Packages")
  for uri, name, component, origin in (targets and targets.stdout or ""):gmatch "(%S+) (%S+) (%S+) ([^\n]+)" do
    local line = ("deb %s %s %s"):format(uri, name, component)
    if origin == "Debian" and component == "main" and (name == suite or name:sub(1, #suite + 1) == suite .. "-") and not seen[line] then
      out[#out + 1], seen[line], seen[name] = line, true, true
    end
  end
  if not seen[suite] then out = {} end
  for _, key in ipairs { "Acquire::http::Proxy", "Acquire::https::Proxy" } do
    local value = run("apt-config", "shell", "P", key)
    value = value and value.stdout:match "^P='([^'\"]+)'"
    if value then out[#out + 1] = ('--aptopt=%s "%s";'):format(key, value) end
  end
  return out
end

return recipe
