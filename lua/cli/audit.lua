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

-- ---- verify

local function count(n, what) return ("%d %s%s"):format(n, what, n == 1 and "" or "s") end

local function verdict(r)
  if r.missing then return "MISSING: " .. r.problem end
  if not r.ok then return "BROKEN after " .. count(r.lines, "good line") .. ": " .. r.problem end
  local out = { "ok, " .. count(r.lines, "line") }
  local unsigned = r.unsigned_lines
  out[#out + 1] = unsigned == 0 and "signed" or unsigned == r.lines and "all unsigned"
    or ("the last %d unsigned: after the signed head"):format(unsigned)
  if r.running then
    out[#out + 1] = "being written"
  elseif not r.ended then
    out[#out + 1] = r.cut > 0 and ("its process ended by a crash, in the middle of a last line (%d bytes)"):format(r.cut)
      or "its process ended by a crash"
  end
  return table.concat(out, ", ") .. "; head " .. r.head
end

-- The one line at the end, which says it all.
local function summary(s, head)
  local out = { count(s.files, "file") .. ", " .. count(s.lines, "line") }
  if s.bad > 0 then out[#out + 1] = s.bad .. " broken or missing" end
  if s.unsigned_lines > 0 then out[#out + 1] = s.unsigned_lines .. " not signed yet" end
  if s.running > 0 then out[#out + 1] = s.running .. " being written" end
  if s.crashed > 0 then out[#out + 1] = s.crashed .. " ended by a crash" end
  if s.pruned and s.pruned ~= "" then out[#out + 1] = "what was before was removed by audit.keep, up to " .. s.pruned end
  if head then out[#out + 1] = "the hash is " .. (s.head_seen and "there" or "NOT there: what was up to it was removed or changed") end
  local text = table.concat(out, "; ")
  if not s.ok then return "BROKEN: " .. text .. "; first: " .. (s.problem ~= "" and s.problem or "no line has the hash " .. head) end
  return "good: " .. text .. (s.head and "; head " .. s.head or "")
end

local function print_report(r) cli.out(cli.line(r.file), ": ", cli.line(verdict(r)), "\n") end

-- Files that were named: each for itself.
local function verify_files(words, head, name)
  local s = { files = 0, lines = 0, unsigned_lines = 0, bad = 0, running = 0, crashed = 0, problem = "" }
  for _, file in ipairs(words) do
    local r, why = internal.audit_verify(file)
    s.files = s.files + 1
    if not r then
      r = { ok = false, lines = 0, unsigned_lines = 0, problem = why }
      cli.err("orch " .. name .. ": " .. why)
    else
      r.file = file
      print_report(r)
    end
    s.lines, s.unsigned_lines = s.lines + r.lines, s.unsigned_lines + r.unsigned_lines
    if r.running then s.running = s.running + 1 elseif r.ok and not r.ended then s.crashed = s.crashed + 1 end
    if not r.ok then
      s.bad = s.bad + 1
      if s.problem == "" then s.problem = r.problem end
    elseif head and not s.head_seen then
      local with_head = internal.audit_verify(file, head)
      s.head_seen = with_head and with_head.ok
    end
    s.head = r.ok and r.head or nil
  end
  s.ok = s.bad == 0 and (not head or s.head_seen)
  return s
end

local function verify(opts, words, _, name)
  local head = opts.head and opts.head:lower()
  if head and not head:find("^%x+$") then
    return cli.usage(name, "--head must be a hash in hexadecimal digits")
  end
  local s
  if words[1] then
    s = verify_files(words, head, name)
  else
    local dir = folder(opts)
    local list, all, code = internal.audit_verify_dir(dir, head)
    if not list then return cli.fail(name, all, code) end
    if not list[1] then return cli.fail(name, "no audit log in " .. dir, 1) end
    for _, r in ipairs(list) do print_report(r) end
    s = all
  end
  cli.out(cli.escape(summary(s, head)), "\n")
  return s.ok and 0 or 1
end

-- ---- reading: entries, in order, each a call (its decision, and its outcome when it has one) or another event

local Book = {}
Book.__index = Book

local function new_book() return setmetatable({ calls = {}, entries = {} }, Book) end

local function text_of(v)
  if type(v) == "table" then return orch.json.encode(v) end
  return tostring(v)
end

-- The entry that the line belongs to, and whether that is complete now.
function Book:add(line, file)
  line = line:gsub("%z+", "") -- space that a killed process had reserved
  if line == "" then return end
  local e = orch.json.decode(line)
  if type(e) ~= "table" then e = { event = "(not JSON)", text = line } end
  local of = e.call and self.calls[e.call]
  if e.event == "outcome" and of and not of.outcome then
    of.outcome, of.lines[2] = e, line
    return of, true
  end
  local entry = { e = e, lines = { line }, file = file, of = of }
  if e.event == "decision" and e.call then
    entry.call, self.calls[e.call] = e.call, entry
  end
  self.entries[#self.entries + 1] = entry
  return entry, not entry.call
end

function Book:read(file, text)
  for line in text:gmatch("[^\n]+") do self:add(line, file) end
end

-- ---- which

local AGO = { s = 1, m = 60, h = 3600, d = 86400 }

-- "2h" or "2026-12-01" or "2026-12-01T10:30" as the beginning of a time in the log; nil: it is neither.
local function since(text)
  local n, unit = text:match("^(%d+)([smhd])$")
  if n and #n < 10 then return os.date("!%Y-%m-%dT%H:%M:%S", os.time() - tonumber(n) * AGO[unit]) end
  local date, time = text:match("^(%d%d%d%d%-%d%d%-%d%d)[T ]?([%d:.]*)Z?$")
  if date and (time == "" or time:find("^%d%d:?%d?%d?:?%d?%d?%.?%d*$")) then return time == "" and date or date .. "T" .. time end
end

-- A tool's name, as in policies: * is any run.
local function pattern(text)
  return "^" .. text:gsub("[%^%$%(%)%%%.%[%]%+%-%?]", "%%%0"):gsub("%*", ".*") .. "$"
end

local function filter(opts, name)
  local from = opts.since and since(opts.since)
  if opts.since and not from then
    return nil, cli.usage(name, '--since is an age ("30m", "2h", "7d") or a time in UTC ("2026-12-01", "2026-12-01T10:30"), got ' .. opts.since)
  end
  local tool = opts.tool and pattern(opts.tool)
  local about_calls = opts.denied or tool or opts.session or opts.caller
  return function(entry)
    local e = entry.e
    if from and text_of(e.ts or "") < from then return false end
    if not about_calls then return e.event ~= "end" and (e.event ~= "start" or e.lost ~= nil) end
    local who = entry.of and entry.of.e or e -- of what belongs to a call, the call says who and what
    if opts.denied and e.event ~= "net_deny" and (e.decision == nil or e.decision == "allow") then return false end
    if tool and not (who.tool and text_of(who.tool):find(tool)) then return false end
    if opts.session and who.session ~= opts.session then return false end
    return not opts.caller or who.caller ~= nil and text_of(who.caller):find(opts.caller, 1, true) ~= nil
  end
end

-- ---- printing

local function cut(text, n)
  if #text <= n then return text end
  return (text:sub(1, n):gsub("[\192-\255]?[\128-\191]*$", "")) .. "…"
end

local function how_long(ms)
  if type(ms) ~= "number" then return "-" end
  if ms < 10000 then return ("%.4g ms"):format(ms) end
  return ms < 600000 and ("%.1f s"):format(ms / 1000) or ("%.0f min"):format(ms / 60000)
end

-- uid:1000 /usr/bin/node -> uid:1000 node
local function who(e) return e.caller and (text_of(e.caller):gsub(" /%S*/", " ", 1)) or "-" end

local function when(e) return (text_of(e.ts or "?"):gsub("T", " ", 1):gsub("%.%d+Z$", "Z")) end

local function how_it_ended(entry)
  local e, o = entry.e, entry.outcome
  if e.decision ~= "allow" then return cut(e.reason and text_of(e.reason) or "refused", 200) end
  if not o then return internal.audit_running(entry.file) and "runs" or "no outcome: orch did not live to write it" end
  local r = type(o.result) == "table" and o.result or {}
  return (o.cancelled and "cancelled" or o.timed_out and "timed out" or r.is_error and "error" or "ok")
    .. (r.bytes and (", %d bytes"):format(r.bytes) or "")
end

-- One line for a person: when, who, what, decision, rule, microVM, how long, how it ended, with which arguments.
local function brief_call(entry)
  local e, o = entry.e, entry.outcome or {}
  local rules = type(e.rules) == "table" and e.rules or {}
  local args = e.args == orch.json.null and ("(%s bytes)"):format(text_of(e.args_bytes)) or e.args ~= nil and cut(text_of(e.args), 120) or ""
  return table.concat({ when(e), who(e), text_of(e.tool), text_of(e.decision), rules[1] and table.concat(rules, ",") or "-",
    o.vm and text_of(o.vm) or "-", how_long(o.ms), how_it_ended(entry), args, text_of(entry.call) }, "  ")
end

local PLAIN = { ts = true, event = true, seq = true, prev = true, hash = true, session = true, generation = true,
  args_digest = true, caller = true, count = true, decision = true, since = true }

local function brief(entry)
  if entry.call then return brief_call(entry) end
  local e, out, more = entry.e, nil, {}
  out = { when(e), who(e), text_of(e.event) }
  if e.event == "denied" then out[3] = ("%s more calls denied since %s"):format(text_of(e.count), text_of(e.since)) end
  for k in pairs(e) do
    if not PLAIN[k] then more[#more + 1] = k end
  end
  table.sort(more)
  for _, k in ipairs(more) do out[#out + 1] = k .. "=" .. cut(text_of(e[k]), 200) end
  return table.concat(out, "  ")
end

local function print_entry(opts, entry)
  if not opts.json then return cli.out(cli.line(brief(entry)), "\n") end
  for _, line in ipairs(entry.lines) do cli.json_line(line) end
end

-- ---- commands

-- Follows what is appended to any file of the folder, new files too: a call is printed when it has ended.
local function follow(opts, dir, seen, book, wanted)
  while true do
    for _, file in ipairs(internal.audit_list(dir) or {}) do
      local f = io.open(file, "rb")
      if f then
        f:seek("set", seen[file] or 0)
        local whole = (f:read("*a") or ""):match("^.*\n") or ""
        f:close()
        seen[file] = (seen[file] or 0) + #whole
        for line in whole:gmatch("[^\n]+") do
          local entry, complete = book:add(line, file)
          if complete and wanted(entry) then print_entry(opts, entry) end
          if complete and entry.call then book.calls[entry.call] = { e = entry.e } end
        end
        book.entries = {}
      end
    end
    io.stdout:flush()
    local _, why = orch.sleep(0.2)
    if why then return 0 end
  end
end

local function tail(opts, _, _, name)
  local wanted, status = filter(opts, name)
  if not wanted then return status end
  local dir = folder(opts)
  local list, why, code = internal.audit_list(dir)
  if not list then return cli.fail(name, why, code) end
  local want, kept, seen, calls = opts.lines or 20, {}, {}, {}
  for i = #list, 1, -1 do
    local text = orch.fs.read(list[i])
    if not text then return cli.fail(name, list[i] .. ": cannot be read", 1) end
    local whole = text:match("^.*\n") or ""
    seen[list[i]] = #whole
    if #kept < want then
      local book = new_book()
      book:read(list[i], whole)
      for k = #book.entries, 1, -1 do
        if #kept >= want then break end
        if wanted(book.entries[k]) then kept[#kept + 1] = book.entries[k] end
      end
      for call, entry in pairs(book.calls) do calls[call] = entry end
    end
  end
  for k = #kept, 1, -1 do print_entry(opts, kept[k]) end
  if not list[1] then cli.err("orch " .. name .. ": no audit log in " .. dir .. " yet") end
  local book = new_book()
  book.calls = calls
  return opts.follow and follow(opts, dir, seen, book, wanted) or 0
end

local function show_call(opts, entry)
  if opts.json then return print_entry(opts, entry) end
  cli.out(cli.line(entry.file), "\n")
  for i, e in ipairs { entry.e, entry.outcome } do
    local rows, keys = {}, {}
    for k in pairs(e) do keys[#keys + 1] = k end
    table.sort(keys)
    for _, k in ipairs(keys) do rows[#rows + 1] = { k, text_of(e[k]) } end
    cli.out(i > 1 and "\n" or "")
    cli.columns(rows, "  ")
  end
end

local function show(opts, words, _, name)
  local wanted, status = filter(opts, name)
  if not wanted then return status end
  local list
  list, status = files(opts, name)
  if not list then return status end
  for i = words[1] and #list or 1, words[1] and 1 or #list, words[1] and -1 or 1 do
    local text, book = orch.fs.read(list[i]) or "", new_book()
    if not words[1] then
      book:read(list[i], text)
      for _, entry in ipairs(book.entries) do
        if entry.call and wanted(entry) then print_entry(opts, entry) end
      end
    elseif text:find(words[1], 1, true) then
      book:read(list[i], text)
      local of = book.calls[words[1]]
      if of then
        show_call(opts, of)
        for _, entry in ipairs(book.entries) do
          if entry.of == of then print_entry(opts, entry) end
        end
        return 0
      end
    end
  end
  if not words[1] then return 0 end
  return cli.fail(name, "no call " .. words[1] .. " in the audit log (of calls that are denied again and again, the log has "
    .. "the number)", 1)
end

local DIR = { "--dir", "DIR", "another folder than the configured one" }
local JSON = { "--json", nil, "the lines of the log, escaped for terminals" }
local FILTERS = {
  { "--since", "TIME", 'an age ("30m", "2h", "7d") or a time in UTC ("2026-12-01", "2026-12-01T10:30")' },
  { "--denied", nil, "only what was not allowed" },
  { "--tool", "NAME", "only calls of this tool; * is any run of characters" },
  { "--session", "ID", "only of this session" },
  { "--caller", "TEXT", "only of callers that have this in their name" },
}

local function options(...)
  local out = { ... }
  for _, o in ipairs(FILTERS) do out[#out + 1] = o end
  out[#out + 1], out[#out + 2] = JSON, DIR
  return out
end

local LINE = "A line a call: when, who, what, the decision, the rules (file and line), the microVM, how long, how it ended, "
  .. "the arguments, the call's id."

return cli.main("audit", {
  usage = "verify|tail|show …",
  about = "The audit log: every decision and its outcome, one JSON object a line, hash-chained.",
  commands = {
    { "verify", spec = { summary = "check the hash chain", usage = "[FILE…] [--head HASH] [--dir DIR]",
      about = "Checks that no line of the log was changed, removed or added, and that no file is missing: each names the one "
        .. "before it and that one's last line. The last line of the output says it all. With FILE: each for itself. With "
        .. "--head: that the line with this hash, which you kept elsewhere, is there; only that proves anything against who "
        .. "may write as this user.",
      options = { { "--head", "HASH", "a hash that verify printed before" }, DIR },
      examples = { "orch audit verify", "orch audit verify --head 5d41…" },
      status = "0 good, 1 broken, missing or nothing there, 2 usage", words = { 0, 10000 }, run = verify } },
    { "tail", spec = { summary = "the last calls", usage = "[-n N] [-f] [--since TIME] [--denied] [--tool NAME] [--json] …",
      about = "Prints the last entries of the log. " .. LINE,
      options = options({ "--lines", "N", "how many (default 20)", short = "-n", kind = "count" },
        { "--follow", nil, "go on as calls end", short = "-f" }),
      examples = { "orch audit tail -n 50", "orch audit tail -f --denied" }, words = { 0, 0 }, run = tail } },
    { "show", spec = { summary = "all calls, or all that was logged of one",
      usage = "[CALL] [--since TIME] [--denied] [--tool NAME] [--session ID] [--caller TEXT] [--json] [--dir DIR]",
      about = "With CALL, which is orch/call of its answer, all that was logged of it. Without, all calls. " .. LINE,
      options = options(),
      examples = { "orch audit show c1b2c3d4-1", "orch audit show --since 2h --denied", "orch audit show --tool 'files__*'" },
      words = { 0, 1 }, run = show } },
  },
}, ...)
