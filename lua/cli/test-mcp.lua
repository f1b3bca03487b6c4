local orch = require "orch"
local cli = require "cli"

local function show_schema(input)
  local out, required = {}, {}
  for _, name in ipairs(type(input.required) == "table" and input.required or {}) do required[name] = true end
  for name, p in pairs(type(input.properties) == "table" and input.properties or {}) do
    local kind = type(p) == "table" and type(p.type) == "string" and ": " .. p.type or ""
    out[#out + 1] = name .. (required[name] and "" or "?") .. kind
  end
  table.sort(out)
  return table.concat(out, ", ")
end

local function list(client, opts)
  local tools, why, code = client:list_tools()
  if not tools then return nil, why, code end
  if opts.json then
    cli.json(tools)
    return true
  end
  cli.out(("%d tools\n"):format(#tools))
  for _, t in ipairs(tools) do
    cli.out("  ", cli.line(t.name), "(", cli.line(show_schema(type(t.inputSchema) == "table" and t.inputSchema or {})), ")\n")
    if type(t.description) == "string" then cli.out("      ", cli.line(t.description), "\n") end
  end
  return true
end

local function show_result(result, opts)
  if opts.json then return cli.json(result) end
  for _, item in ipairs(type(result.content) == "table" and result.content or {}) do
    if item.type == "text" and type(item.text) == "string" then
      cli.out(cli.escape(item.text), item.text:sub(-1) == "\n" and "" or "\n")
    else
      cli.out(cli.line(orch.json.encode(item)), "\n")
    end
  end
  if type(result.structuredContent) == "table" then cli.out("structured: ", cli.line(orch.json.encode(result.structuredContent)), "\n") end
end

local function run(opts, words, cmd, name)
  if opts.url then return cli.fail(name, "--url is not available yet; give a command after --", 2) end
  if words[1] then return cli.usage(name, "unexpected argument " .. words[1] .. "; the server's command comes after --") end
  if not cmd or not cmd[1] then return cli.usage(name, "CMD is missing: orch " .. name .. " [options] -- CMD ARG…") end
  local args = orch.json.decode("{}")
  if opts.args then
    local why
    if not opts.call then return cli.usage(name, "--args needs --call NAME") end
    args, why = orch.json.decode(opts.args)
    if type(args) ~= "table" or opts.args:find("^%s*%[") then return cli.usage(name, "--args must be a JSON object: " .. (why or opts.args)) end
  end
  local client, why = orch.mcp.connect { command = cmd, timeout = opts.timeout }
  if not client then return cli.fail(name, why, 7) end
  if not opts.json then
    local info = client.server_info or {}
    cli.err(("%s %s, protocol %s"):format(tostring(info.name), tostring(info.version), tostring(client.protocol_version)))
  end
  local status, ok = 0, true
  if opts.list or not opts.call then ok, why = list(client, opts) end
  if ok and opts.call then
    ok, why = client:call_tool(opts.call, args, { timeout = opts.timeout })
    if ok then
      show_result(ok, opts)
      status = ok.isError and 1 or 0
    end
  end
  client:close()
  if not ok then return cli.fail(name, why, 7) end
  return status
end

return cli.main("mcp test", {
  usage = "[--list] [--call NAME [--args JSON]] [--timeout TIME] [--json] -- CMD ARG…",
  about = "An MCP client: starts the server CMD, connects over its stdin and stdout, lists its tools or calls one, prints what\n"
    .. "it said with control characters escaped. test-mcp is the same command.",
  options = { { "--list", nil, "list the tools (also without --call)" }, { "--call", "NAME", "call this tool" },
    { "--args", "JSON", "with these arguments, a JSON object" },
    { "--timeout", "TIME", 'how long to wait for the server and for the call ("30s")', kind = "duration" },
    { "--url", "URL", "not available yet" }, { "--json", nil, "print what the server answered as JSON" } },
  examples = { "orch mcp test -- orch mcp stdio", [[orch mcp test --call run_command --args '{"command":"id"}' -- orch mcp stdio]] },
  status = "0 done, 1 the tool said isError, 7 the server failed, 2 usage",
  command = "--", run = run,
}, ...)
