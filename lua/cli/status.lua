local orch = require "orch"
local cli = require "cli"

-- uid:1000 /usr/bin/node -> uid:1000 node
local function who(caller) return (caller:gsub(" /%S*/", " ", 1)) end

local function duration(s)
  if s < 120 then return ("%.0f s"):format(s) end
  if s < 7200 then return ("%.0f min"):format(s / 60) end
  return ("%.1f h"):format(s / 3600)
end

return cli.main("status", {
  usage = "[--pid N] [--json]",
  about = "Shows the running orch processes of this user: configuration, generation, sessions, errors of the last "
    .. "reload, and the calls that run now: for whom, since when.",
  options = { { "--pid", "N", "only this process", kind = "count" }, { "--json", nil, "print a JSON array" } },
  status = "0 done (also when none runs), 2 usage",
  words = { 0, 0 },
  run = function(opts)
    local answers = cli.control('{"op":"status"}', opts.pid)
    if opts.json then
      local all = {}
      for i, a in ipairs(answers) do all[i] = a.answer or { pid = a.pid, error = a.error } end
      cli.json(orch.json.array(all))
      return 0
    end
    for i, a in ipairs(answers) do
      local s = a.answer or {}
      local rows = { { "pid", a.pid } }
      local function row(name, value)
        if value ~= nil and value ~= "" and value ~= orch.json.null then rows[#rows + 1] = { name, value } end
      end
      row("error", a.error)
      row("configuration", s.config)
      row("generation", s.generation and s.generation ~= orch.json.null
        and ("%s, %d reloads"):format(s.generation:sub(1, 12), s.reloads))
      row("running for", s.uptime_s and duration(s.uptime_s))
      row("tools", s.tools)
      row("sessions", s.sessions and ("%d, %d calls in flight"):format(s.sessions, s.calls_in_flight))
      row("upstream", s.upstream)
      row("audit log", s.audit and s.audit ~= orch.json.null
        and s.audit .. (s.audit_broken and " (BROKEN: calls are denied)" or ""))
      row("last reload", s.reload_error)
      row("notes", s.notes)
      if i > 1 then cli.out("\n") end
      cli.columns(rows)
      rows = { { "RUNS", "FOR", "SINCE", "CALL", "VM" } }
      for _, c in ipairs(s.running or {}) do
        rows[#rows + 1] = { c.tool, who(c.caller), ("%s (%s)"):format(c.since, duration(c.ms / 1000)), c.call,
          c.vm ~= orch.json.null and c.vm or "-" }
      end
      if rows[2] then cli.columns(rows, "  ") end
    end
    if not answers[1] then
      cli.none_running(opts.pid)
    end
    return 0
  end,
}, ...)
