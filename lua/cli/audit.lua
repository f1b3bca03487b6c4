local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"

-- The log's folder: as configured, or the default beside a configuration that cannot be loaded.
local function folder(opts)
  if opts.dir then return opts.dir end
  local g = internal.load()
  if g then return g.audit_dir end
  local dir = internal.paths().state .. "/audit"
  cli.err("orch audit: the configuration cannot be loaded (orch config check says why); looking in " .. dir)
  return dir
end

local function files(opts, name)
  local dir = folder(opts)
  local list, why, code = internal.audit_list(dir)
  if not list then return nil, cli.fail(name, why, code) end
  if not list[1] then return nil, cli.fail(name, "no audit log in " .. dir, 1) end
  return list
end

local function verify(opts, words, _, name)
  local list, status = words, nil
  if not list[1] then
    list, status = files(opts, name)
    if not list then return status end
  end
  if opts.head and not opts.head:find("^%x+$") then
    return cli.usage(name, "--head must be a hash in hexadecimal digits")
  end
  local bad, head_at = 0, nil
  for _, file in ipairs(list) do
    local r, why = internal.audit_verify(file)
    if not r then
      bad = bad + 1
      cli.err("orch " .. name .. ": " .. why)
    else
      local what
      if not r.ok then
        bad = bad + 1
        what = "BROKEN after " .. r.lines .. " good lines: " .. r.problem
      elseif not r.has_head then
        what = ("chain ok, %d lines, all unsigned: there is no signed head beside it"):format(r.lines)
      elseif r.unsigned_lines > 0 then
        what = ("chain ok, %d lines, the last %d unsigned: after the signed head"):format(r.lines, r.unsigned_lines)
      else
        what = ("ok, %d lines, signed"):format(r.lines)
      end
      cli.out(cli.line(file), ": ", cli.line(what), r.ok and r.lines > 0 and "; head " .. r.head or "", "\n")
      if opts.head and r.ok then
        local with_head = internal.audit_verify(file, opts.head:lower())
        head_at = head_at or with_head and with_head.ok and file
      end
    end
  end
  if opts.head and not head_at then
    return cli.fail(name, "no line has the hash " .. opts.head .. ": what was up to it was removed or changed", 1)
  end
  return bad > 0 and 1 or 0
end

-- ---- printing

local function lines_of(text)
  local out = {}
  for line in text:gmatch("[^\n]+") do
    line = line:gsub("%z+", "") -- space that a killed process had reserved
    if line ~= "" then out[#out + 1] = line end
  end
  return out
end

local KNOWN = { ts = true, event = true, call = true, seq = true, prev = true,
  hash = true, session = true, generation = true, args_digest = true,
  tool = true, decision = true, caller = true }

local function text_of(v)
  if type(v) == "table" then return orch.json.encode(v) end
  return tostring(v)
end

-- One line for a person: time, event, call, tool, decision, then what else the line says.
local function brief(line)
  local e = orch.json.decode(line)
  if type(e) ~= "table" then return "(not JSON) " .. line end
  local out, more = { e.ts or "?", e.event or "?" }, {}
  for _, key in ipairs { "call", "tool", "decision" } do
    if e[key] ~= nil then out[#out + 1] = text_of(e[key]) end
  end
  for k in pairs(e) do
    if not KNOWN[k] then more[#more + 1] = k end
  end
  table.sort(more)
  for _, k in ipairs(more) do
    local v = text_of(e[k])
    out[#out + 1] = k .. "=" .. (#v > 200 and v:sub(1, 200) .. "…" or v)
  end
  return table.concat(out, " ")
end

local function print_line(opts, line)
  cli.out(opts.json and line or cli.line(brief(line)), "\n")
end

-- Follows what is appended to any file of the folder, new files too.
local function follow(opts, dir, seen)
  while true do
    for _, file in ipairs(internal.audit_list(dir) or {}) do
      local f = io.open(file, "rb")
      if f then
        f:seek("set", seen[file] or 0)
        local text = f:read("*a") or ""
        f:close()
        local whole = text:match("^.*\n") or ""
        seen[file] = (seen[file] or 0) + #whole
        for _, line in ipairs(lines_of(whole)) do print_line(opts, line) end
      end
    end
    io.stdout:flush()
    local _, why = orch.sleep(0.2)
    if why then return 0 end
  end
end

local function tail(opts, _, _, name)
  local dir = folder(opts)
  local list, why, code = internal.audit_list(dir)
  if not list then return cli.fail(name, why, code) end
  local want, kept, seen = opts.lines or 20, {}, {}
  for i = #list, 1, -1 do
    local text = orch.fs.read(list[i])
    if not text then return cli.fail(name, list[i] .. ": cannot be read", 1) end
    local whole = text:match("^.*\n") or ""
    seen[list[i]] = #whole
    local lines = lines_of(whole)
    for k = #lines, 1, -1 do
      if #kept >= want then break end
      kept[#kept + 1] = lines[k]
    end
  end
  for k = #kept, 1, -1 do print_line(opts, kept[k]) end
  if not list[1] then cli.err("orch " .. name .. ": no audit log in " .. dir .. " yet") end
  return opts.follow and follow(opts, dir, seen) or 0
end

local function show(opts, words, _, name)
  local list, status = files(opts, name)
  if not list then return status end
  local found = {}
  for i = #list, 1, -1 do
    local text = orch.fs.read(list[i]) or ""
    for _, line in ipairs(text:find(words[1], 1, true) and lines_of(text) or {}) do
      local e = line:find(words[1], 1, true) and orch.json.decode(line)
      if type(e) == "table" and e.call == words[1] then found[#found + 1] = { line = line, e = e, file = list[i] } end
    end
    if found[1] then break end
  end
  if not found[1] then return cli.fail(name, "no call " .. words[1] .. " in the audit log", 1) end
  for i, f in ipairs(found) do
    if opts.json then
      cli.out(f.line, "\n")
    else
      local rows, keys = {}, {}
      for k in pairs(f.e) do keys[#keys + 1] = k end
      table.sort(keys)
      for _, k in ipairs(keys) do rows[#rows + 1] = { k, text_of(f.e[k]) } end
      cli.out(i > 1 and "\n" or "", cli.line(f.file), "\n")
      cli.columns(rows, "  ")
    end
  end
  return 0
end

local DIR = { "--dir", "DIR", "another folder than the configured one" }

return cli.main("audit", {
  usage = "verify|tail|show …",
  about = "The audit log: every decision and its outcome, one JSON object a line, hash-chained.",
  commands = {
    { "verify", spec = { summary = "check the hash chain", usage = "[FILE…] [--head HASH] [--dir DIR]",
      about = "Checks that no line of the log was changed, removed or added. With --head: that the line with "
        .. "this hash, which you kept elsewhere, is there; only that proves anything against who may write "
        .. "as this user.",
      options = { { "--head", "HASH", "a hash that verify printed before" }, DIR },
      examples = { "orch audit verify", "orch audit verify --head 5d41…" },
      status = "0 good, 1 broken or nothing there, 2 usage", words = { 0, 10000 }, run = verify } },
    { "tail", spec = { summary = "the last lines", usage = "[-n N] [-f] [--json] [--dir DIR]",
      about = "Prints the last lines of the log.",
      options = { { "--lines", "N", "how many (default 20)", short = "-n", kind = "count" },
        { "--follow", nil, "go on as lines are added", short = "-f" },
        { "--json", nil, "the lines as they are" }, DIR },
      examples = { "orch audit tail -n 50", "orch audit tail -f" }, words = { 0, 0 }, run = tail } },
    { "show", spec = { summary = "all that was logged of one call", usage = "CALL [--json] [--dir DIR]",
      about = "Prints the decision and the outcome of one call; CALL is orch/call of its answer.",
      options = { { "--json", nil, "the lines as they are" }, DIR },
      examples = { "orch audit show c1b2c3d4-1" }, words = { 1, 1 }, run = show } },
  },
}, ...)
