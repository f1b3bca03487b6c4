-- orch as a client of the peers' servers: does what the plan in arg says, prints what it saw as one JSON object.
local plan = orch.json.decode(arg[1])
local seen = { calls = orch.json.array {}, progress = 0, asked = orch.json.array {} }

local function must(ok, why)
  return ok ~= nil and ok or error(why, 0)
end

local function pluck(list, key)
  local out = orch.json.array {}
  for i, item in ipairs(must(list)) do out[i] = item[key] end
  return out
end

local client = must(orch.mcp.connect {
  command = plan.command, url = plan.url, protocol = ({ legacy = "2025-11-25", modern = "2026-07-28" })[plan.era],
  elicit = function(params)
    seen.asked[#seen.asked + 1] = params.message
    return { action = "accept", content = { name = "Ann" } }
  end,
})
seen.version, seen.server = client.protocol_version, client.server_info.name
seen.tools = pluck(client:list_tools(), "name")
if plan.lists then
  seen.resources = pluck(client:list_resources(), "uri")
  seen.note = must(client:read_resource("peer://note")).contents[1].text
  seen.prompts = pluck(client:list_prompts(), "name")
  seen.greet = must(client:get_prompt("greet", { name = "Ann" })).messages[1].content.text
end
for i, call in ipairs(plan.calls) do
  local r, why = client:call_tool(call[1], call[2], { progress = function() seen.progress = seen.progress + 1 end })
  local text = {}
  for j, item in ipairs(r and r.content or {}) do text[j] = item.text end
  seen.calls[i] = r and { text = table.concat(text), structured = r.structuredContent, isError = r.isError or false }
    or { error = why }
end
client:close()
io.write(orch.json.encode(seen), "\n")
