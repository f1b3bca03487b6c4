-- The MCP entry script: what `orch mcp …` runs; `orch lua/mcp.lua stdio` is the same.
local orch = require "orch"

local usage = [[
usage: orch mcp stdio [--as NAME] [--] [CMD ARG…]
         an MCP server on stdin and stdout: the configured tools; with CMD, a policy-enforcing
         proxy in front of just that server (its tools are NAME__tool in policy, NAME is "cmd")
       orch mcp test [--list] [--call NAME --args JSON] [--timeout T] -- CMD ARG…
         connect to a server, list its tools or call one, print
]]

local function fail(message, status)
  io.stderr:write("orch mcp: ", message, "\n")
  return status
end

local function stdio(args)
  local opts, i = { transport = "stdio" }, 1
  while args[i] do
    local a = args[i]
    if a == "--" then
      i = i + 1
      break
    elseif a == "--as" then
      opts.as = args[i + 1]
      if not opts.as or not opts.as:find("^[a-z0-9-]+$") or #opts.as > 32 or opts.as == "local" then
        return fail("--as needs a name of 1 to 32 of a-z0-9- that is not \"local\"", 2)
      end
      i = i + 2
    elseif a == "--sandbox" then
      if args[i + 1] ~= "host" then return fail("--sandbox " .. tostring(args[i + 1]) .. " is not available yet; only host is", 2) end
      i = i + 2
    elseif a == "--help" or a == "-h" then
      io.stdout:write(usage)
      return 0
    elseif a:sub(1, 1) == "-" then
      return fail("unknown option " .. a .. "\n" .. usage, 2)
    else
      break
    end
  end
  if args[i] then
    opts.command = { unpack(args, i) }
  end
  local status, why, code = orch.mcp.serve(opts)
  if not status then
    local exits = { usage = 2, isolation = 5, config = 6, upstream = 7, limit = 8 }
    return fail(why, exits[code] or 1)
  end
  if why then orch.log.info("mcp stdio: ended: " .. why) end
  return status
end

local args = { ... }
local what = table.remove(args, 1)
if what == "stdio" then
  return stdio(args)
elseif what == "test" then
  return require "cli.test-mcp"(args)
elseif what == "http" then
  return fail("http is not available yet; use: orch mcp stdio", 2)
elseif what == "--help" or what == "-h" then
  io.stdout:write(usage)
  return 0
end
return fail((what and ("unknown subcommand " .. what) or "a subcommand is missing") .. "\n" .. usage, 2)
