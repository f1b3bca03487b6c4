-- orch.mcp.connect: manners above the C client (orch.client: core/bind/lua_client.c), which speaks
-- both eras over both transports. Here are names, lists and their pages, the answers to what
-- servers ask, and who gives tokens.
local orch = require "orch"
local http = require "http"
local link = require "orch.client"
local M = {}

local MODERN = "2026-07-28"
local KNOWN = {}
for _, v in ipairs { MODERN, "2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05" } do
  KNOWN[v] = true
end
local PAGES, QUESTIONS = 1000, 64
-- Until the handshake is done, where connect's timeout does not say: what is started may have to
-- be fetched first.
local START_S, CONNECT_S, CALL_S = 300, 60, 300
local null = orch.json.null

local function object() return orch.json.decode("{}") end
local function is_object(v) return type(v) == "table" end

local function copy(t)
  local out = {}
  for k, v in pairs(t or {}) do out[k] = v end
  return out
end

-- ---- what the server asks: elicitation, sampling, roots

-- What a form's answer leaves out is filled in from the schema's defaults.
local function with_defaults(content, schema)
  content = copy(content)
  local properties = is_object(schema) and is_object(schema.properties) and schema.properties or {}
  for name, property in pairs(properties) do
    local default
    if is_object(property) then default = property.default end
    if content[name] == nil then content[name] = default end
  end
  return next(content) and content or object()
end

local ANSWERS = {}

ANSWERS["elicitation/create"] = function(o, params)
  local url = params.mode == "url"
  local fn = url and o.elicit_url or not url and o.elicit
  if not fn then return nil end
  local answer = fn(params)
  if type(answer) == "string" then answer = { action = answer } end
  answer = copy(answer or { action = "cancel" })
  answer.action = answer.action or "accept"
  if url or answer.action ~= "accept" then
    answer.content = nil
  else
    answer.content = with_defaults(answer.content, params.requestedSchema)
  end
  return answer
end

ANSWERS["sampling/createMessage"] = function(o, params) return o.sample and o.sample(params) end

ANSWERS["roots/list"] = function(o, params)
  local roots = o.roots
  if type(roots) == "function" then roots = roots(params) end
  return roots and { roots = orch.json.array(copy(roots)) }
end

local function capabilities(o)
  local c = object()
  if o.elicit or o.elicit_url then
    c.elicitation = { form = o.elicit and object() or nil, url = o.elicit_url and object() or nil }
  end
  if o.sample then c.sampling = object() end
  if o.roots then c.roots = object() end
  for name, value in pairs(o.capabilities or {}) do c[name] = value end
  return c
end

-- The answer to one question: result, or nil and a JSON-RPC error.
local function answer(o, method, params)
  local ok, result = pcall(ANSWERS[method], o, is_object(params) and params or {})
  if not ok then
    orch.log.warn("mcp: the function that answers " .. method .. " failed: " .. tostring(result))
    return nil, { code = -32603, message = "the client could not answer" }
  elseif not is_object(result) then
    return nil, { code = -32601, message = "not offered by this client" }
  end
  return result
end

-- ---- what comes unasked

local Client = {}
Client.__index = Client

local HANDLERS = {}

-- Functions of the script's, which must not end what calls them.
local function guarded(what, fn, ...)
  local ok, why = pcall(fn, ...)
  if not ok then orch.log.warn("mcp: a function for " .. what .. " failed: " .. tostring(why)) end
end

function HANDLERS.note(_, method, params)
  local o = _.o
  params = is_object(params) and params or {}
  if method == "notifications/message" and o.on_log then
    guarded(method, o.on_log, params)
  elseif o.on_notification then
    guarded(method, o.on_notification, method, params)
  end
end

function HANDLERS.progress(_, fn, ...)
  if fn then guarded("progress", fn, ...) end
end

function HANDLERS.question(_, id, method, params)
  local task = _.n_asked < QUESTIONS and orch.task.spawn(function()
    local result, err = answer(_.o, method, params)
    if not _.asked[id] then return end
    _.asked[id], _.n_asked = nil, _.n_asked - 1
    local ok, why = result ~= nil, err and err.message
    if ok then ok, why = pcall(_.link.reply, _.link, id, result) end
    if not ok then _.link:refuse(id, err and err.code or -32603, why) end
  end)
  if not task then
    _.link:refuse(id, -32603, "too many questions wait for their answers")
    return
  end
  _.asked[id], _.n_asked = task, _.n_asked + 1
end

function HANDLERS.withdrawn(_, id)
  local task = _.asked[id]
  if not task then return end
  _.asked[id], _.n_asked = nil, _.n_asked - 1
  task:cancel()
end

function HANDLERS.challenge(_, id, status, headers, times)
  local task, full = orch.task.spawn(function()
    local ok, again, why, code = pcall(_.auth.challenged, _.auth, status, headers, times)
    if not _.challenges[id] then return end
    _.challenges[id] = nil
    if not ok then again, why, code = nil, again, "failed" end
    _.link:decide(id, again, why and tostring(why), code)
  end)
  if not task then _.link:decide(id, nil, full, "limit") end
  _.challenges[id] = task
end

function HANDLERS.unchallenged(_, id)
  if _.challenges[id] then _.challenges[id]:cancel() end
  _.challenges[id] = nil
end

local function take(_)
  local function handle(kind, ...)
    if not kind then return false end
    HANDLERS[kind](_, ...)
    return true
  end
  while handle(_.link:next()) do end
end

-- ---- requests

function Client:request(method, params, opts)
  opts = opts or {}
  params = copy(params)
  if opts.meta and params._meta == nil then params._meta = opts.meta end
  local timeout = http.seconds(opts.timeout, CALL_S)
  return self._.link:request(method, next(params) and params or nil, { timeout = timeout,
    max_timeout = http.seconds(opts.max_timeout, timeout * 10), progress = opts.progress })
end

function Client:notify(method, params)
  return self._.link:notify(method, params, self._.connect_timeout)
end

-- ---- the verbs

local function list(self, method, member, opts)
  local all, cursor, seen = {}, nil, {}
  for _page = 1, PAGES do
    local result, why, code = self:request(method, { cursor = cursor }, opts)
    if not result then return nil, why, code end
    if not is_object(result[member]) then
      return nil, ("%s: its answer to %s has no list of %s"):format(self._.name, method, member),
        "upstream"
    end
    for _, item in ipairs(result[member]) do all[#all + 1] = item end
    cursor = result.nextCursor
    if cursor == nil or cursor == null then return orch.json.array(all) end
    if type(cursor) ~= "string" or seen[cursor] then
      return nil, self._.name .. ": the pages of " .. method .. " do not end", "upstream"
    end
    seen[cursor] = true
  end
  return nil, ("%s: %s has over %d pages"):format(self._.name, method, PAGES), "limit"
end

-- Over modern HTTP some arguments are repeated as headers, as the tool's schema says: those whose
-- annotations are not valid must not be used.
function Client:list_tools(opts)
  local tools, why, code = list(self, "tools/list", "tools", opts)
  if not tools or self.era ~= "modern" or not self._.o.url then return tools, why, code end
  self._.listed = true
  local kept = orch.json.array {}
  for _, tool in ipairs(tools) do
    local name = is_object(tool) and type(tool.name) == "string" and tool.name
    local wrong = not name and "it has no name" or self._.link:tool_problem(name)
    if wrong then
      orch.log.warn(("%s: a tool is left out: %s"):format(self._.name, wrong),
        { tool = name or nil })
    else
      kept[#kept + 1] = tool
    end
  end
  return kept
end

function Client:call_tool(name, arguments, opts)
  if type(name) ~= "string" then error("call_tool: the tool's name must be a string", 2) end
  if self.era == "modern" and self._.o.url and not self._.listed then self:list_tools() end
  arguments = arguments ~= nil and (next(arguments) ~= nil and arguments or object()) or object()
  return self:request("tools/call", { name = name, arguments = arguments }, opts)
end

function Client:list_resources(opts) return list(self, "resources/list", "resources", opts) end
function Client:list_resource_templates(opts)
  return list(self, "resources/templates/list", "resourceTemplates", opts)
end

function Client:read_resource(uri, opts)
  return self:request("resources/read", { uri = uri }, opts)
end

function Client:list_prompts(opts) return list(self, "prompts/list", "prompts", opts) end
function Client:get_prompt(name, arguments, opts)
  arguments = arguments and next(arguments) and arguments or nil
  return self:request("prompts/get", { name = name, arguments = arguments }, opts)
end
function Client:complete(ref, argument, context, opts)
  local result, why, code = self:request("completion/complete",
    { ref = ref, argument = argument, context = context }, opts)
  if not result then return nil, why, code end
  return result.completion
end

function Client:list_skills(opts) return list(self, "skills/list", "skills", opts) end
function Client:read_skill(entry, uri, opts)
  return require("mcp.skills").read(self, entry, uri, opts)
end

function Client:ping(opts)
  if self.era == "modern" then return self:request("server/discover", nil, opts) end
  return self:request("ping", nil, opts)
end

function Client:set_log_level(level, opts)
  if self.era == "modern" then
    self._.link:log_level(level)
    return object()
  end
  return self:request("logging/setLevel", { level = level }, opts)
end

function Client:subscribe(uri, opts)
  if self.era == "modern" then
    return self:listen { resourceSubscriptions = orch.json.array { uri } }
  end
  return self:request("resources/subscribe", { uri = uri }, opts)
end

function Client:unsubscribe(uri, opts)
  if self.era == "modern" then
    return nil, "in this era a subscription ends by cancelling its task", "failed"
  end
  return self:request("resources/unsubscribe", { uri = uri }, opts)
end

-- Modern: notifications of these kinds come to on_notification until the task returned is
-- cancelled.
function Client:listen(kinds)
  return orch.task.spawn(function()
    return self:request("subscriptions/listen", { notifications = kinds }, { timeout = 1e8 })
  end)
end

-- What is under way and everything later get the same reason: that of a server that had ended, else
-- that this was done.
function Client:close() self._.link:close() end

-- ---- connecting

local TYPES = { command = "table", url = "string", headers = "table", env = "table", cwd = "string",
  timeout = true, sandbox = "string", protocol = "string", elicit = "function",
  elicit_url = "function",
  sample = "function", roots = true, auth = "table", protect = "boolean", capabilities = "table",
  on_notification = "function", on_log = "function", name = "string" }

local function check(o)
  local function bad(why) error("orch.mcp.connect: " .. why, 4) end
  if type(o) ~= "table" then bad("an option table is needed") end
  for key, v in pairs(o) do
    if not TYPES[key] then bad("unknown option '" .. tostring(key) .. "'") end
    if TYPES[key] ~= true and type(v) ~= TYPES[key] then
      bad(("%s must be a %s, got %s"):format(key, TYPES[key], type(v)))
    end
  end
  if o.sandbox and o.sandbox ~= "host" then
    bad('sandbox "' .. o.sandbox .. '" is not available yet')
  end
  if o.protocol and not KNOWN[o.protocol] then bad("protocol " .. o.protocol .. " is unknown") end
  if o.url and o.command then bad("url and command exclude each other") end
end

function M.connect(o)
  check(o)
  local _ = { o = o, asked = {}, n_asked = 0, challenges = {} }
  _.connect_timeout = http.seconds(o.timeout, o.url and CONNECT_S or START_S)
  _.name = o.url and (o.url:match("^%a+://[^/?#]+") or o.url) or o.command and o.command[1]
  if o.url and o.auth then _.auth = require("mcp.auth").new(o.url, o.auth, o.timeout) end
  local client, why, code = link.new { name = _.name, url = o.url, command = o.command, env = o.env,
    cwd = o.cwd, protect = o.protect, headers = o.headers, protocol = o.protocol,
    info_name = o.name,
    capabilities = capabilities(o), questions = true, roots = o.roots ~= nil,
    timeout = _.connect_timeout,
    sign = _.auth and function(method, url) return _.auth:sign({}, method, url) end }
  if not client then return nil, why, code end
  _.link = client
  orch.task.spawn(take, _)
  local about
  about, why, code = client:ready()
  if not about then
    client:close()
    return nil, why, code
  end
  return setmetatable({ _ = _, era = about.modern and "modern" or "legacy",
    protocol_version = about.version, server_info = about.server_info,
    capabilities = about.capabilities,
    instructions = about.instructions }, Client)
end

return M
