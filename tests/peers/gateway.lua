-- A gateway by script: one orch in front of every peer's server, over stdio and HTTP, each in its newest era.
-- Tools are NAME.tool; what a server asks, and its progress, go to the client.
-- arg: { NAME: { command or url } } as JSON, and where to listen.
local tools, busy, caller = {}, {}, {}

local function forward(client, name, tool, args, ctx)
  while busy[name] do orch.sleep(0.01) end -- an older server's question does not say which call it belongs to
  busy[name], caller[name] = true, ctx
  local steps = 0
  local r, why, code = client:call_tool(tool, args, { progress = function(done, total)
    steps = steps + 1
    ctx:progress(done, total)
  end })
  busy[name] = nil
  if steps > 0 then orch.sleep(0.05) end -- TypeScript's clients forget progress that comes in one read with the answer
  if not r then return nil, why, code end
  local text = {}
  for i, item in ipairs(r.content) do text[i] = item.text end
  return { text = table.concat(text), structured = r.structuredContent, is_error = r.isError or false }
end

for name, where in pairs(orch.json.decode(arg[1])) do
  local client = assert(orch.mcp.connect { command = where.command, url = where.url,
    elicit = function(params)
      local answer, why = caller[name]:elicit { message = params.message, schema = params.requestedSchema }
      if not answer then error(why, 0) end
      return answer
    end })
  for _, tool in ipairs(assert(client:list_tools())) do
    tools[#tools + 1] = {
      name = name .. "." .. tool.name, description = tool.description or tool.name, input = tool.inputSchema,
      run = function(args, ctx) return forward(client, name, tool.name, args, ctx) end,
    }
  end
end
return orch.mcp.serve {
  transport = "http", listen = arg[2], token = orch.env "ORCH_TOKEN", name = "gateway", tools = tools,
}
