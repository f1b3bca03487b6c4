local internal = require "orch.internal"
local cli = require "cli"

local EXIT = [[
exit status of every command:
    0  done
    1  failed: a Lua error, a test, a verification, a doctor's finding
    2  usage: unknown command or option, what is not available yet
    3  denied by policy
    4  approval refused, timed out, or nobody to ask
    5  isolation not available (VMM, firewall): nothing was run
    6  configuration, policy or script invalid or not trusted
    7  provider or upstream failed
    8  a budget or limit was hit
  130  interrupted      143  terminated

orch vm run gives CMD's status: 126 not executable, 127 not found, 128+N ended by signal N, 124 ended by its time-out,
and 125 when CMD never ran for another reason than usage (stderr and --json name the status above).
]]

local CONFIG = [[
The configuration is one Lua table, orchestrator.lua. The first of these that exists is used:
  --config FILE   $ORCH_CONFIG   ./orchestrator.lua   $XDG_CONFIG_HOME/orch/orchestrator.lua
  /etc/orch/orchestrator.lua   and else the built-in one: run_command in a microVM, all else denied.
Only ./orchestrator.lua needs `orch trust`, and one that says trust = "always". Relative paths are relative to the file.
All keys may be left out.

  return {
    policies  = "policies",           -- directory of tools.lua and network.lua
    tools     = { "lua/tools" },      -- directories of tool files
    workspace = ".",                  -- the only host directory that tools may see
    trust     = nil,                  -- "always": loaded only as `orch trust` saw it, wherever it lies
    -- timeout: of each call whose tool file has none, and so of its commands; a longer build: timeout = "30m"
    vm = { backend = "auto", accel = "auto", image = "debian", memory = "256M", vcpus = 1, timeout = "60s", max = 16 },
    limits = { message = "16M", depth = 64, calls = 64,
               policy = { time = "100ms", memory = "64M" }, tool = { cpu = "2s", memory = "256M" } },
    audit = { dir = nil, sync = "none",     -- none | interval | each
              keep = nil },                 -- "90d": older files are removed when a new one is made; nil: all are kept
  }

env "NAME" and env("NAME", default) read the environment and give a secret. `orch config show --origin` prints what
is in force, `orch config check` what is wrong, `orch init` writes one to start from.
]]

local function overview(out)
  out:write("usage: orch [options] COMMAND …    orch [options] SCRIPT.lua [ARG…]    orch -e CODE    orch - <SCRIPT\n",
    "\ncommands:\n")
  for _, c in ipairs(cli.COMMANDS) do
    if not c.later then out:write(("  %-9s  %s\n"):format(c[1], c[2])) end
  end
  out:write("\noptions, before a command or among its own:\n",
    "  -c, --config FILE          the configuration to use\n",
    "  -v                         more in the log on stderr; -vv for all\n",
    "  --log-level LEVEL          debug, info, warn or error\n",
    "  --log-format text|json     form of the log\n",
    "  -h, --help   --version\n",
    "\nMore: orch help COMMAND, orch help exit, orch help config\n")
end

local function unknown(name)
  if not name then
    overview(io.stderr)
    return 2
  end
  local names = {}
  for _, c in ipairs(cli.COMMANDS) do
    if c[1] == name and c.later then return cli.fail(name, "not available yet; " .. c.later, 2) end
    names[#names + 1] = c[1]
  end
  local near = internal.nearest(name, names)
  cli.err("orch: unknown command " .. name .. (near and "; did you mean " .. near .. "?" or "") .. "\nTry: orch help")
  return 2
end

local first, second = ...
if first == "--unknown" then return unknown(second) end

return cli.main("help", {
  usage = "[COMMAND…|exit|config]",
  about = "Lists the commands, or shows the help of one, the exit statuses, or the configuration's keys.",
  examples = { "orch help vm run", "orch help exit" },
  run = function(_, words)
    if not words[1] then
      overview(io.stdout)
      return 0
    elseif words[1] == "exit" then
      cli.out(EXIT)
      return 0
    elseif words[1] == "config" and not words[2] then
      cli.command("config", "--help")
      cli.out("\n", CONFIG)
      return 0
    end
    for _, c in ipairs(cli.COMMANDS) do
      if c[1] == words[1] and not c.later then
        words[#words + 1] = "--help"
        return cli.command(unpack(words))
      end
    end
    return unknown(words[1])
  end,
}, ...)
