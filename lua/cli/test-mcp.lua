local orch = require "orch"
local cli = require "cli"

-- The server may have written anything.
local function object(v) return type(v) == "table" and v or {} end
local function word(v) return v == nil and "?" or tostring(v) end

local function show_schema(input)
  local out, required = {}, {}
  for _, name in ipairs(object(input.required)) do required[name] = true end
  for name, p in pairs(object(input.properties)) do
    local kind = object(p).type
    out[#out + 1] = tostring(name) .. (required[name] and "" or "?") .. (type(kind) == "string" and ": " .. kind or "")
  end
  table.sort(out)
  return table.concat(out, ", ")
end

local function list(client, opts)
  local tools, why, code = client:list_tools { timeout = opts.timeout }
  if type(tools) ~= "table" then return nil, why or "its answer to tools/list has no list of tools", code end
  if opts.json then
    cli.json(tools)
    return true
  end
  cli.out(("%d tools\n"):format(#tools))
  for _, t in ipairs(tools) do
    t = object(t)
    cli.out("  ", cli.line(word(t.name)), "(", cli.line(show_schema(object(t.inputSchema))), ")\n")
    if type(t.description) == "string" then cli.out("      ", cli.line(t.description), "\n") end
  end
  return true
end

local function show_result(result, opts)
  if opts.json then return cli.json(result) end
  for _, item in ipairs(object(result.content)) do
    if object(item).type == "text" and type(item.text) == "string" then
      cli.out(cli.escape(item.text), item.text:sub(-1) == "\n" and "" or "\n")
    else
      cli.out(cli.line(orch.json.encode(item)), "\n")
    end
  end
  if type(result.structuredContent) == "table" then
    cli.out("structured: ", cli.line(orch.json.encode(result.structuredContent)), "\n")
  end
end

-- A limit that was too short: how to raise it.
local function failed(name, why, code)
  return cli.fail(name, code == "timeout" and why .. "; --timeout TIME sets it" or why, 7)
end

local function run(opts, words, cmd, name)
  if words[1] then
    return cli.usage(name, "unexpected argument " .. words[1] .. "; the server's command comes after --")
  end
  if opts.url and cmd then return cli.usage(name, "--url and a command exclude each other") end
  if not opts.url and (not cmd or not cmd[1]) then
    return cli.usage(name, "CMD is missing: orch " .. name .. " [options] -- CMD ARG…, or --url URL")
  end
  local headers = {}
  if opts.header then
    local field, value = opts.header:match("^([^:%s]+):%s*(.-)%s*$")
    if not field or not opts.url then return cli.usage(name, "--header needs NAME: VALUE, and --url") end
    headers[field] = value
  end
  local args = orch.json.decode("{}")
  if opts.args then
    local why
    if not opts.call then return cli.usage(name, "--args needs --call NAME") end
    args, why = orch.json.decode(opts.args)
    if type(args) ~= "table" or opts.args:find("^%s*%[") then
      return cli.usage(name, "--args must be a JSON object: " .. (why or opts.args))
    end
  end
  local client, why, code = orch.mcp.connect { command = cmd, url = opts.url, headers = opts.url and headers, timeout = opts.timeout }
  if not client then return failed(name, why, code) end
  if not opts.json then
    local info = object(client.server_info)
    cli.err(("%s %s, protocol %s"):format(word(info.name), word(info.version), word(client.protocol_version)))
  end
  local status, ok = 0, true
  if opts.list or not opts.call then ok, why, code = list(client, opts) end
  if ok and opts.call then
    ok, why, code = client:call_tool(opts.call, args, { timeout = opts.timeout })
    if type(ok) == "table" then
      show_result(ok, opts)
      status = ok.isError and 1 or 0
    end
  end
  client:close()
  if type(ok) ~= "table" and ok ~= true then return failed(name, why or "its result is no object", code) end
  return status
end

return cli.main("mcp test", {
  usage = "[--list] [--call NAME [--args JSON]] [--timeout TIME] [--json] --url URL | -- CMD ARG…",
  about = "An MCP client: goes to the server at URL, or starts CMD and connects over its stdin and stdout, lists its "
    .. "tools or calls one, prints what it said with control characters escaped. test-mcp is the same command.",
  options = { { "--list", nil, "list the tools (also without --call)" }, { "--call", "NAME", "call this tool" },
    { "--args", "JSON", "with these arguments, a JSON object" },
    { "--timeout", "TIME", "how long to wait for the server, its list and the call each (default: 5m; --url: 1m to connect)", kind = "duration" },
    { "--url", "URL", "of a server over Streamable HTTP" },
    { "--header", "TEXT", "a header for it (\"Authorization: Bearer …\")" }, { "--json", nil, "print what the server answered as JSON" } },
  examples = { "orch mcp test -- orch mcp stdio",
    [[orch mcp test --call run_command --args '{"command":"id"}' -- orch mcp stdio]] },
  status = "0 done, 1 the tool said isError, 7 the server failed, 2 usage",
  command = "--", run = run,
}, ...)
