-- The MCP entry script: what `orch mcp …` runs; `orch lua/mcp.lua stdio` is the same.
local orch = require "orch"

local function stdio(opts, _, cmd, name)
  local as = opts.as
  if as and (not as:find("^[a-z0-9-]+$") or #as > 32 or as == "local") then
    return require "cli".usage(name, "--as needs a name of 1 to 32 of a-z0-9- that is not \"local\", got " .. as)
  elseif opts.sandbox and opts.sandbox ~= "host" then
    return require "cli".fail(name, "--sandbox " .. opts.sandbox .. " is not available yet; only host is", 2)
  end
  cmd = cmd and cmd[1] and cmd or nil
  for _, option in ipairs { "start-timeout", "timeout" } do
    local text = opts[option]
    if text and not cmd then
      return require "cli".usage(name, "--" .. option .. " is for a server CMD, and none is named")
    elseif text and not text:find("[1-9]") then
      return require "cli".usage(name, "--" .. option .. " must be over zero, got " .. text)
    end
  end
  local status, why, code = orch.mcp.serve { transport = "stdio", as = as, command = cmd,
    start_timeout = opts["start-timeout"], timeout = opts.timeout, protect = not opts["no-protect"] }
  if not status then
    if code == "isolation" and cmd and not opts["no-protect"] then why = why .. "\nOr give it --no-protect: see orch mcp stdio --help" end
    return require "cli".fail(name, why, code)
  end
  if why then orch.log.info("mcp stdio: ended: " .. why) end
  return status
end

local function http(opts, _, _, name)
  local status, why, code = orch.mcp.serve { transport = "http", listen = opts.listen }
  if not status then return require "cli".fail(name, why, code) end
  return status
end

-- How agents start it. Reading options takes cli.lua, and compiling that a twentieth of the start.
if select("#", ...) == 1 and ... == "stdio" then return stdio({}, nil, nil, "mcp stdio") end

return require "cli".main("mcp", {
  usage = "stdio|http|test …",
  about = "Model Context Protocol: what an agent connects to, and a client to try servers with.",
  commands = {
    { "stdio", spec = {
      summary = "MCP server on stdin and stdout, or a proxy in front of CMD",
      usage = "[--as NAME] [--start-timeout DURATION] [--timeout DURATION] [--no-protect] [--] [CMD ARG…]",
      about = "An MCP server on standard input and output with the configured tools. With CMD: that server "
        .. "behind the policy, its tools under their own names on the wire and as NAME__tool in policies. It may take its "
        .. "time to start: what the client asks meanwhile waits, and says so where the client hears progress. "
        .. "To CMD, orch's configuration, policies, tools, state and caches are read-only. Logs go to stderr; -v shows what CMD writes there.",
      options = { { "--as", "NAME", "name of CMD's server in policies (default: cmd)" },
        { "--start-timeout", "DURATION", "how long CMD may take until its tools are known (default: 5m)", kind = "duration" },
        { "--timeout", "DURATION", "how long a call may take without progress of CMD (default: 1h)", kind = "duration" },
        { "--sandbox", "host", "where CMD runs; vm is not available yet" },
        { "--no-protect", nil, "leave orch's own files open to CMD: an agent that steers it can then rewrite the policies "
          .. "that judge it, and what trust and the audit log hold" } },
      examples = { "orch mcp stdio", "orch mcp stdio -- npx -y @modelcontextprotocol/server-filesystem ." },
      status = "0 input ended, 5 orch's files cannot be protected from CMD, 6 configuration invalid or not trusted, "
        .. "7 CMD's server failed, 2 usage",
      command = "word", words = { 0, 0 }, run = stdio } },
    { "test", spec = { summary = "connect to a server, list its tools or call one", delegate = "test-mcp" } },
    { "http", spec = {
      summary = "the same over Streamable HTTP",
      usage = "[--listen HOST:PORT | unix:PATH]",
      about = "An MCP server at http://HOST:PORT/mcp with the configured tools. A bearer token is always needed: http.token of "
        .. "the configuration, else the one in http.token of the state directory, which is made at the first start. On a unix "
        .. "socket the peer's user takes its place.",
      options = { { "--listen", "ADDRESS", "HOST:PORT or unix:PATH (default: http.listen of the configuration)" } },
      examples = { "orch mcp http", "orch mcp http --listen unix:/run/user/1000/orch-mcp.sock" },
      status = "0 stopped, 1 the address cannot be had, 6 configuration invalid or not trusted, 2 usage",
      words = { 0, 0 }, run = http } },
  },
}, ...)
