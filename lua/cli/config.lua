local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"

local function show(opts, _, _, name)
  local list, why, code = internal.config()
  if not list then return cli.fail(name, why, code) end
  local paths, g = internal.paths(), internal.load()
  for _, v in ipairs(list) do
    if v.path == "audit.dir" then v.value = g.audit_dir end -- written or not
  end
  if opts.json then
    cli.json { file = paths.config, found = paths.origin, values = list }
    return 0
  end
  cli.out("# ", cli.line(paths.config), " (", paths.origin, ")\n")
  local rows = {}
  for _, v in ipairs(list) do
    local row = { v.path, v.value == "" and "-" or v.value }
    if opts.origin then row[3] = v.origin end
    rows[#rows + 1] = row
  end
  cli.columns(rows)
  return 0
end

local function check(_, _, _, name)
  local g, why, code = internal.load()
  if not g then return cli.fail(name, why, code) end
  if g.notes ~= "" then cli.err((g.notes:gsub("\n$", ""))) end
  cli.out(cli.line(internal.paths().config), ": ok\n")
  return 0
end

return cli.main("config", {
  usage = "show|check …",
  about = "The configuration in force: --config, $ORCH_CONFIG, ./orchestrator.lua, the user's, /etc/orch, "
    .. "else the built-in one.",
  commands = {
    { "show", spec = { summary = "every value, and where it comes from", usage = "[--origin] [--json]",
      about = "Prints every value of the configuration. Secrets are not shown.",
      options = { { "--origin", nil, "where each value comes from" }, { "--json", nil, "print JSON" } },
      examples = { "orch config show --origin" }, status = "0 done, 6 invalid or not trusted, 2 usage",
      words = { 0, 0 }, run = show } },
    { "check", spec = { summary = "read it, and policies and tools too", usage = "",
      about = "Reads configuration, policies and tools; prints every error.",
      status = "0 good, 6 invalid or not trusted, 2 usage", words = { 0, 0 }, run = check } },
  },
}, ...)
