-- The client that the official conformance suite runs: orch tests/conformance/client.lua URL, with the
-- scenario, the protocol version and its credentials in the environment.
local orch = require "orch"
local url = arg[#arg]
local scenario = orch.env("MCP_CONFORMANCE_SCENARIO") or ""
local context = orch.json.decode(orch.env("MCP_CONFORMANCE_CONTEXT") or "{}") or {}

local function must(ok, why, code)
  if ok == nil then
    io.stderr:write(scenario, ": ", tostring(why), " (", tostring(code), ")\n")
    os.exit(1)
  end
  return ok
end

local options = { url = url, protocol = orch.env("MCP_CONFORMANCE_PROTOCOL_VERSION"), timeout = 60 }
options.elicit = function() return { action = "accept", content = {} } end
options.sample = function() return { role = "assistant", model = "none", content = { type = "text", text = "nothing" } } end
options.roots = { { uri = "file:///workspace", name = "workspace" } }

if scenario:find("^auth/") then
  options.auth = { client_id = context.client_id, client_secret = context.client_secret,
    client_metadata_url = "https://conformance-test.local/client-metadata.json",
    redirect_uri = "http://localhost:3000/callback", follow = true, keep = false }
  local more = ({ ["auth/client-credentials-jwt"] = { grant = "client_credentials", private_key = context.private_key_pem },
    ["auth/client-credentials-basic"] = { grant = "client_credentials" },
    ["auth/wif-jwt-bearer"] = { grant = "jwt_bearer", assertion = context.valid_jwt },
    ["auth/enterprise-managed-authorization"] = { grant = "enterprise", id_token = context.idp_id_token,
      idp_client_id = context.idp_client_id, idp_token_endpoint = context.idp_token_endpoint },
    ["auth/dpop"] = { dpop = true }, ["auth/dpop-nonce"] = { dpop = true } })[scenario]
  for k, v in pairs(more or {}) do options.auth[k] = v end
end

if scenario:find("^sep%-2640%-") then options.capabilities = { extensions = { ["io.modelcontextprotocol/skills"] = orch.json.decode("{}") } } end

local client = must(orch.mcp.connect(options))
local tools = must(client:list_tools())

local run = {}

run["http-standard-headers"] = function()
  for _, t in ipairs(tools) do client:call_tool(t.name, {}) end
  for _, r in ipairs(must(client:list_resources())) do client:read_resource(r.uri) end
  for _, p in ipairs(must(client:list_prompts())) do client:get_prompt(p.name, {}) end
end

run["http-custom-headers"] = function()
  for _, call in ipairs(context.toolCalls) do must(client:call_tool(call.name, call.arguments)) end
end

run["json-schema-2020-12-preservation"] = function()
  for _, t in ipairs(tools) do
    if t.name == "json_schema_2020_12_tool" then must(client:call_tool("json_schema_echo", { schema = t.inputSchema })) end
  end
end

run["tools_call"] = function() must(client:call_tool("add_numbers", { a = 5, b = 3 })) end

run["json-schema-ref-no-deref"] = function() end -- listing is all: its server answers no calls

-- A skill is loaded and, if it is what its entry says, its other files are read.
local function load_skill()
  for _, skill in ipairs(must(client:list_skills())) do
    must(client:read_skill(skill))
    for _, file in ipairs(skill.resources) do must(client:read_skill(skill, file.uri)) end
  end
end
run["sep-2640-client-no-prefetch"] = function() must(client:list_skills()) end
for _, what in ipairs { "digest", "size", "frontmatter" } do run["sep-2640-client-verify-" .. what] = load_skill end

local function call_all()
  for _, t in ipairs(tools) do must(client:call_tool(t.name, {})) end
end

(run[scenario] or call_all)()
client:close()
return 0
