-- What the commands in lua/cli share: option parsing, help, output. A command is a file lua/cli/NAME.lua
-- that gets its words as `...` and returns the exit status.
local orch = require "orch"
local internal = require "orch.internal"

local cli = {}

-- Class of an error (the third value of a failed call) -> exit status.
local STATUS = { failed = 1, usage = 2, denied = 3, approval = 4, isolation = 5, config = 6, upstream = 7, limit = 8 }
function cli.status(code) return STATUS[code] or 1 end

-- Every command of the contract: name, what it does, or what to say of one that is not there yet.
cli.COMMANDS = {
  { "mcp", "MCP server on stdin and stdout, alone or in front of another server; a test client" },
  { "test-mcp", "the same as mcp test" },
  { "vm", "run one command in a microVM; spawn and list microVMs" },
  { "spawn-vm", "spawn a microVM, say how long it took, destroy it" },
  { "image", "guest images: build, list, inspect, rm" },
  { "policy", "check and test policies, explain what decides a call, show the rules" },
  { "audit", "the audit log: verify, tail, show" },
  { "trust", "accept a folder's configuration, policies and tools as they are" },
  { "init", "write a configuration, policies and a tool to start from" },
  { "config", "show or check the configuration in force" },
  { "reload", "make running orch processes read their files again" },
  { "status", "the running orch processes of this user" },
  { "doctor", "what works here and what does not, with the fix; changes nothing" },
  { "check", "check the syntax of Lua files" },
  { "test", "run Lua test files inside the host" },
  { "version", "version and build features" },
  { "help", "this list, or the help of one command" },
  { "run", later = "connect an agent with: orch mcp stdio" },
  { "chat", later = "connect an agent with: orch mcp stdio" },
  { "approvals", later = "what a rule asks about is denied until then" },
  { "repl", later = "try: orch -e CODE" },
  { "types", later = "the annotations are in lua/meta/orch.lua of the installation" },
}

-- ---- output

-- What a terminal shows and does not obey. Newlines stay.
function cli.escape(s) return internal.escape(tostring(s), true) end
-- The same on one line.
function cli.line(s) return internal.escape(tostring(s), false) end

function cli.out(...) io.stdout:write(...) end

function cli.err(message) io.stderr:write(cli.escape(message), "\n") end

-- "orch vm run: MESSAGE" on stderr; returns the exit status (a number, or the class of an error).
function cli.fail(name, message, status)
  cli.err("orch " .. name .. ": " .. tostring(message))
  return type(status) == "number" and status or cli.status(status)
end

local function clean(v)
  if type(v) == "string" then return internal.utf8(v) end
  if type(v) ~= "table" then return v end
  local keys = {}
  for k in pairs(v) do keys[#keys + 1] = k end
  for _, k in ipairs(keys) do v[k] = clean(v[k]) end
  return v
end

-- A character as JSON escapes it, when a terminal would obey it.
local function escape_json(char)
  if char ~= "\127" and internal.escape(char, false) == char then return char end
  local a, b, c, d = char:byte(1, 4)
  local code = d and (a % 8) * 262144 + (b % 64) * 4096 + (c % 64) * 64 + d % 64 or c and (a % 16) * 4096 + (b % 64) * 64 + c % 64
    or b and (a % 32) * 64 + b % 64 or a
  if code < 65536 then return ("\\u%04x"):format(code) end
  code = code - 65536
  return ("\\u%04x\\u%04x"):format(0xd800 + math.floor(code / 1024), 0xdc00 + code % 1024)
end

-- One JSON value on stdout. Strings in it that are not UTF-8 are changed in place.
function cli.json(v)
  cli.out((orch.json.encode(clean(v)):gsub("[\127\194-\244][\128-\191]*", escape_json)), "\n")
end

-- A line that is JSON, as it is but for what a terminal would obey.
function cli.json_line(text) cli.out((internal.utf8(text):gsub("[\127\194-\244][\128-\191]*", escape_json)), "\n") end

-- Rows of strings in columns.
function cli.columns(rows, indent)
  local width = {}
  for _, row in ipairs(rows) do
    for i, cell in ipairs(row) do
      row[i] = cli.line(cell)
      if #row[i] > (width[i] or 0) then width[i] = #row[i] end
    end
  end
  for _, row in ipairs(rows) do
    local cells = {}
    for i, cell in ipairs(row) do cells[i] = i < #row and cell .. (" "):rep(width[i] - #cell) or cell end
    cli.out(indent or "", (table.concat(cells, "  "):gsub("%s+$", "")), "\n")
  end
end

-- ---- files

function cli.exists(path) return orch.fs.stat(path) ~= nil end

function cli.absolute(path)
  return path:sub(1, 1) == "/" and path or internal.paths().cwd .. "/" .. path
end

-- ---- help

local function option_text(o)
  return (o.short and o.short .. ", " or "") .. o[1] .. (o[2] and " " .. o[2] or "")
end

local function paragraph(text)
  local out, column = {}, 0
  for word in text:gmatch("%S+") do
    local gap = column == 0 and "" or column + #word > 98 and "\n" or " "
    column = gap == "\n" and #word or column + #gap + #word
    out[#out + 1] = gap .. word
  end
  return table.concat(out)
end

-- name: "vm run". spec: see cli.main.
function cli.help(name, spec)
  cli.out("usage: orch ", name, spec.usage and " " .. spec.usage or "", "\n\n", paragraph(spec.about), "\n")
  if spec.commands then
    cli.out("\ncommands:\n")
    local rows = {}
    for _, c in ipairs(spec.commands) do
      if c.spec then rows[#rows + 1] = { c[1], c.spec.summary } end
    end
    cli.columns(rows, "  ")
    cli.out("\nTry: orch ", name, " COMMAND --help\n")
  end
  if spec.options and spec.options[1] then
    cli.out("\noptions:\n")
    local rows = {}
    for _, o in ipairs(spec.options) do rows[#rows + 1] = { option_text(o), o[3] } end
    cli.columns(rows, "  ")
  end
  if spec.examples then
    cli.out("\nexamples:\n  ", table.concat(spec.examples, "\n  "), "\n")
  end
  if not spec.commands then
    cli.out("\nexit status: ", spec.status or "0 done, 1 failed, 2 usage", " (all: orch help exit)\n")
  end
  return 0
end

-- ---- options

local function usage(name, message)
  return cli.fail(name, message .. "\nTry: orch " .. name .. " --help", 2)
end
cli.usage = usage

local UNITS = { ms = true, s = true, m = true, h = true }
local KINDS = {
  count = { function(v) return v:find("^%d+$") and #v < 10 end, "a number" },
  duration = { function(v) return UNITS[v:match("^%d+(%l+)$")] end, 'a duration like "250ms", "30s", "5m"' },
  size = { function(v) return v:find("^%d+[KMG]?$") end, 'a size like "64K", "256M"' },
}

local function near(word, list)
  local found = internal.nearest(word, list)
  return found and "; did you mean " .. found .. "?" or ""
end

-- Options by name without the dashes, the other words, and what came behind "--" (nil without one).
local function parse(name, spec, words)
  local opts, rest, known, i = {}, {}, {}, 1
  for _, o in ipairs(spec.options or {}) do
    known[o[1]] = o
    if o.short then known[o.short] = o end
  end
  while words[i] do
    local a, value = words[i], nil
    if a == "--" and spec.command then
      return opts, rest, { unpack(words, i + 1) }
    elseif a == "--" then
      for k = i + 1, #words do rest[#rest + 1] = words[k] end
      break
    elseif a == "--help" or a == "-h" then
      return nil, cli.help(name, spec)
    elseif a:sub(1, 1) == "-" and #a > 1 then
      local key, eq = a:match("^(%-%-[^=]+)=(.*)$")
      local o = known[key or a]
      if not o then
        local list = { "--help" }
        for _, each in ipairs(spec.options or {}) do list[#list + 1] = each[1] end
        return nil, usage(name, "unknown option " .. (key or a) .. near(key or a, list))
      end
      if o[2] then
        value = eq
        if value == nil then
          i = i + 1
          value = words[i]
        end
        if value == nil then return nil, usage(name, o[1] .. " needs a value: " .. o[1] .. " " .. o[2]) end
        local kind = KINDS[o.kind]
        if kind and not kind[1](value) then
          return nil, usage(name, o[1] .. " must be " .. kind[2] .. ", got " .. value)
        end
      elseif eq then
        return nil, usage(name, o[1] .. " takes no value")
      end
      opts[o[1]:sub(3)] = o.kind == "count" and tonumber(value) or value or true
    elseif spec.command == "word" then
      return opts, rest, { unpack(words, i) }
    else
      rest[#rest + 1] = a
    end
    i = i + 1
  end
  if spec.words and (#rest < spec.words[1] or #rest > spec.words[2]) then
    local what = #rest > spec.words[2] and "unexpected argument " .. rest[spec.words[2] + 1] or "an argument is missing"
    return nil, usage(name, what .. "; usage: orch " .. name .. " " .. (spec.usage or ""))
  end
  return opts, rest
end

-- Runs a command with its words; returns the exit status. spec:
--   summary, about, usage, examples, status: texts
--   options: { { "--name", "VALUE" or nil, text, short =, kind = }… }
--   words: { least, most } of plain words               command: "--" or "word": where CMD begins, none: no CMD
--   run = function(opts, words, cmd, name) -> status    delegate: the command whose file does it
--   commands: { { name, spec = } or { name, later = text }… } instead of all these
function cli.main(name, spec, ...)
  local words = { ... }
  if spec.delegate then return cli.command(spec.delegate, ...) end
  if not spec.commands then
    local opts, rest, cmd = parse(name, spec, words)
    if not opts then return rest end
    return spec.run(opts, rest, cmd, name)
  end
  local first = table.remove(words, 1)
  if first == nil then
    return usage(name, "a command is missing: " .. (spec.usage or ""))
  elseif first == "--help" or first == "-h" then
    return cli.help(name, spec)
  end
  local names = {}
  for _, c in ipairs(spec.commands) do
    names[#names + 1] = c[1]
    if c[1] == first then
      if c.later then return cli.fail(name .. " " .. first, "not available yet; " .. c.later, 2) end
      return cli.main(name .. " " .. first, c.spec, unpack(words))
    end
  end
  return usage(name, (first:sub(1, 1) == "-" and "unknown option " or "unknown command ") .. first
    .. near(first, names))
end

-- Runs lua/cli/NAME.lua as the program does.
function cli.command(name, ...)
  local dir = internal.paths().share .. "/lua/"
  local chunk, why = loadfile(name == "mcp" and dir .. "mcp.lua" or dir .. "cli/" .. name .. ".lua")
  if not chunk then error(why, 0) end
  return chunk(...)
end

-- ---- the configuration of a folder that was named

-- What DIR or FILE stands for: a configuration, its folder, or policies beside it. nil, message otherwise.
function cli.find_config(path)
  local stat, why = orch.fs.stat(path)
  if not stat then return nil, why end
  local dir = cli.absolute(path):gsub("/+$", "")
  if stat.type == "file" then
    local name = dir:match("[^/]*$")
    if name ~= "tools.lua" and name ~= "network.lua" then return path end
    dir = dir:match("^(.*)/")
  end
  for _, candidate in ipairs { dir, dir:match("^(.*)/") } do
    if cli.exists(candidate .. "/orchestrator.lua") then return candidate .. "/orchestrator.lua" end
  end
  return nil, path .. ": no orchestrator.lua there or in the folder above; write one with: orch init " .. path
end

-- ---- running orch processes

-- What each answered: { pid =, answer = } or { pid =, error =, refused = }.
function cli.control(request, pid)
  local answers = internal.control(request, pid)
  for _, a in ipairs(answers) do
    if a.answer and a.answer.refused then a.error, a.refused, a.answer = a.answer.error, true, nil end
  end
  return answers
end

function cli.none_running(pid)
  cli.out(pid and ("no orch process %d of yours is running\n"):format(pid) or "no orch process of yours is running\n")
end

-- What a person must do: the exit status of the refusal where an agent could be doing it, or nil.
function cli.refuse_below(name)
  local pid = internal.below_orch()
  return pid and cli.fail(name, ("refused: this is a descendant of an orch process (pid %d); "
    .. "run it in your own shell"):format(pid), 3)
end

-- ---- microVMs

cli.VM_OPTIONS = {
  { "--image", "NAME", "guest image (default: the configured one)" },
  { "--memory", "SIZE", "64M to 4G (default: vm.memory)", kind = "size" },
  { "--vcpus", "N", "processors (default: vm.vcpus)", kind = "count" },
  { "--network", "POLICY", "a policy of policies/network.lua (default: none, no network interface)" },
  { "--kernel", "FILE", "kernel to boot instead of Debian's (bzImage or vmlinux)" },
  { "--modules", "DIR", "its /lib/modules/VERSION, when virtio is not built in" },
}

function cli.use_kernel(opts)
  if opts.modules and not opts.kernel then return nil, "--modules needs --kernel", "usage" end
  if not opts.kernel then return true end
  for _, path in ipairs { opts.kernel, opts.modules } do
    local stat, why = orch.fs.stat(path)
    if not stat then return nil, why, "isolation" end
  end
  internal.set_kernel(cli.absolute(opts.kernel), opts.modules and cli.absolute(opts.modules))
  return true
end

-- A microVM as the options ask for, or nil, message, class.
function cli.spawn(opts)
  local ok, why, code = cli.use_kernel(opts)
  if not ok then return nil, why, code end
  local vm
  ok, vm, why, code = pcall(orch.vm.spawn,
    { image = opts.image, memory = opts.memory, vcpus = opts.vcpus, name = opts.name,
      network = opts.network, timeout = 0 })
  if not ok then return nil, (tostring(vm):gsub("^[^\n]-orch%.vm%.spawn: ", ""):gsub("\n.*", "")), "usage" end
  return vm, why, code
end

return cli
