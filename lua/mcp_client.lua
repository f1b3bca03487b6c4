-- orch.mcp.connect: an MCP client of both eras, over a child's stdio and over Streamable HTTP. The
-- legacy era is 2025-11-25 and before (initialize, sessions, requests from the server), the modern one
-- 2026-07-28 (every request stands alone, questions come as input_required results).
local orch = require "orch"
local http = require "http"
local transport = require "mcp_transport"
local M = {}

local MODERN, LEGACY = "2026-07-28", "2025-11-25"
local KNOWN_LEGACY = { ["2025-11-25"] = true, ["2025-06-18"] = true, ["2025-03-26"] = true, ["2024-11-05"] = true }
local META = "io.modelcontextprotocol/"
local ROUNDS, PAGES, VERDICT_S, PROBE_S = 16, 1000, 300, 5
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
  for name, property in pairs(is_object(schema) and is_object(schema.properties) and schema.properties or {}) do
    if content[name] == nil and is_object(property) and property.default ~= nil then content[name] = property.default end
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
  if method == "ping" then return object() end
  local fn = ANSWERS[method]
  if not fn then return nil, { code = -32601, message = "not offered by this client" } end
  local ok, result = pcall(fn, o, is_object(params) and params or {})
  if not ok then
    orch.log.warn("mcp: the function that answers " .. method .. " failed: " .. tostring(result))
    return nil, { code = -32603, message = "the client could not answer" }
  elseif not is_object(result) then
    return nil, { code = -32601, message = "not offered by this client" }
  end
  return result
end

-- ---- requests

local Client = {}
Client.__index = Client

local function fault(self, err)
  if not is_object(err) then return self._.name .. ": an error that is no object" end
  return ("%s: %s (code %s)"):format(self._.name, tostring(err.message or "error without a message"), tostring(err.code or "?"))
end

-- A call under way: what bounds it in time. Progress sets the clock back, up to a hard maximum.
local Call = {}
Call.__index = Call

function Call:left() return math.max(self.deadline - orch.now(), 0) end
function Call:alive()
  self.deadline = math.min(orch.now() + self.timeout, self.hard)
end

local function new_call(self, opts)
  local now, timeout = orch.now(), http.seconds(opts.timeout, self._.timeout)
  local hard = now + math.max(http.seconds(opts.max_timeout, timeout * 10), timeout)
  self._.next_id = self._.next_id + 1
  return setmetatable({ id = self._.next_id, timeout = timeout, deadline = now + timeout, hard = hard,
    progress = opts.progress, headers = opts.headers, on_message = opts.on_message }, Call)
end

-- Anything that is no answer to a request of ours.
local function take(self, msg, call)
  local _ = self._
  if msg.id ~= nil and msg.id == _.probe then _.late = true end
  if type(msg.method) ~= "string" then return end
  local params = is_object(msg.params) and msg.params or {}
  if msg.id ~= nil and msg.id ~= null then
    if self.era == "modern" then return end -- its servers do not ask this way
    orch.task.spawn(function()
      local result, err = answer(_.o, msg.method, params)
      _.link:send { jsonrpc = "2.0", id = msg.id, result = result, error = err }
    end)
    return
  end
  local handler = _.o.on_notification
  if msg.method == "notifications/progress" then
    local target = _.calls[params.progressToken] or call
    if target then
      target:alive()
      if target.progress then handler = function() target.progress(params.progress, params.total, params.message) end end
    end
  elseif msg.method == "notifications/message" and _.o.on_log then
    handler = function() _.o.on_log(params) end
  elseif call and call.on_message then
    handler = call.on_message
  end
  if handler then
    local ok, why = pcall(handler, msg.method, params)
    if not ok then orch.log.warn("mcp: a function for " .. msg.method .. " failed: " .. tostring(why)) end
  end
end

local function modern_meta(self, meta)
  meta[META .. "protocolVersion"] = self.protocol_version
  meta[META .. "clientInfo"] = self._.info
  meta[META .. "clientCapabilities"] = self._.capabilities
  meta[META .. "logLevel"] = self._.log_level
end

-- One request and its answer: result; or nil, message, code, the JSON-RPC error, the HTTP status.
local function once(self, method, params, opts)
  local _ = self._
  local call = new_call(self, opts)
  params = copy(params)
  local meta = copy(is_object(params._meta) and params._meta or opts.meta)
  if opts.progress then meta.progressToken = call.id end
  if self.era == "modern" then modern_meta(self, meta) end
  if next(meta) then params._meta = meta end
  local msg = { jsonrpc = "2.0", id = call.id, method = method, params = next(params) and params or nil }
  _.calls[call.id] = call
  local reply, why, code, status = _.link:exchange(msg, call)
  _.calls[call.id] = nil
  if not reply then
    if (code == "timeout" or code == "cancelled") and method ~= "initialize" and method ~= "server/discover" then
      _.link:cancel(call.id, why)
    end
    return nil, why, code, nil, status
  elseif reply.error ~= nil then
    return nil, fault(self, reply.error), "upstream", is_object(reply.error) and reply.error or {}, status
  elseif not is_object(reply.result) then
    return nil, _.name .. ": \"result\" is no object", "upstream"
  end
  return reply.result
end

local handshake

-- A request to its end: sessions that the server forgot, other versions it wants, what it asks meanwhile.
function Client:request(method, params, opts)
  local _ = self._
  if _.closed then error("the MCP client is closed", 2) end
  opts = opts or {}
  params = params or {}
  local asked = params
  local again
  for _round = 1, ROUNDS do
    local result, why, code, err, status = once(self, method, asked, opts)
    if not result then
      local wanted = err and err.code == -32022 and is_object(err.data) and is_object(err.data.supported) and err.data.supported or {}
      if self.era == "legacy" and status == 404 and _.link.session and not again then
        _.link.session = nil
        local ok, why2, code2 = handshake.legacy(self, opts.timeout)
        if not ok then return nil, why2, code2 end
      elseif self.era == "modern" and not again and transport.has(wanted, MODERN) then
        self.protocol_version = MODERN
      else
        return nil, why, code, err
      end
      again = true
    else
      local kind = result.resultType
      if self.era == "legacy" or kind == nil or kind == "complete" or (_.result_types[kind]) then return result end
      if kind ~= "input_required" then
        return nil, ("%s: resultType %s of %s is unknown"):format(_.name, tostring(kind), method), "upstream"
      end
      asked = copy(params)
      asked.requestState = result.requestState
      if is_object(result.inputRequests) and next(result.inputRequests) then
        asked.inputResponses = {}
        for key, question in pairs(result.inputRequests) do
          local reply, fail
          if is_object(question) and question.method ~= "ping" then
            reply, fail = answer(_.o, tostring(question.method), question.params)
          end
          if not reply then
            return nil, ("%s: %s asks for %s: %s"):format(_.name, method, tostring(is_object(question) and question.method or "something odd"),
              fail and fail.message or "not a question"), "upstream"
          end
          asked.inputResponses[key] = reply
        end
      elseif result.requestState == nil then
        return nil, _.name .. ": input_required without a question and without a state", "upstream"
      end
    end
  end
  return nil, ("%s: %s was not done after %d rounds of questions"):format(_.name, method, ROUNDS), "limit"
end

function Client:notify(method, params)
  return self._.link:send { jsonrpc = "2.0", method = method, params = params }
end

-- ---- the verbs

local function list(self, method, member, opts)
  local all, cursor, seen = {}, nil, {}
  for _page = 1, PAGES do
    local result, why, code = self:request(method, { cursor = cursor }, opts)
    if not result then return nil, why, code end
    if not is_object(result[member]) then
      return nil, ("%s: its answer to %s has no list of %s"):format(self._.name, method, member), "upstream"
    end
    for _, item in ipairs(result[member]) do all[#all + 1] = item end
    cursor = result.nextCursor
    if cursor == nil or cursor == null then return orch.json.array(all) end
    if type(cursor) ~= "string" or seen[cursor] then return nil, self._.name .. ": the pages of " .. method .. " do not end", "upstream" end
    seen[cursor] = true
  end
  return nil, ("%s: %s has over %d pages"):format(self._.name, method, PAGES), "limit"
end

-- Over modern HTTP some arguments are repeated as headers, as the tool's schema says: those whose
-- annotations are not valid must not be used.
function Client:list_tools(opts)
  local tools, why, code = list(self, "tools/list", "tools", opts)
  if not tools or self.era ~= "modern" or not self._.link.http then return tools, why, code end
  local kept = orch.json.array {}
  self._.mirrored = {}
  for _, tool in ipairs(tools) do
    local headers, wrong = transport.mirrored(is_object(tool) and tool.inputSchema)
    if headers and type(tool.name) == "string" then
      self._.mirrored[tool.name] = headers
      kept[#kept + 1] = tool
    else
      orch.log.warn(("%s: a tool is left out: %s"):format(self._.name, wrong or "it has no name"),
        { tool = is_object(tool) and tostring(tool.name) or nil })
    end
  end
  return kept
end

function Client:call_tool(name, arguments, opts)
  if type(name) ~= "string" then error("call_tool: the tool's name must be a string", 2) end
  opts = copy(opts)
  if self.era == "modern" and self._.link.http then
    if not self._.mirrored then self:list_tools() end
    local spec = self._.mirrored and self._.mirrored[name]
    if spec then opts.headers = transport.param_headers(spec, arguments or {}) end
  end
  arguments = arguments ~= nil and (next(arguments) ~= nil and arguments or object()) or object()
  return self:request("tools/call", { name = name, arguments = arguments }, opts)
end

function Client:list_resources(opts) return list(self, "resources/list", "resources", opts) end
function Client:list_resource_templates(opts) return list(self, "resources/templates/list", "resourceTemplates", opts) end
function Client:read_resource(uri, opts) return self:request("resources/read", { uri = uri }, opts) end
function Client:list_prompts(opts) return list(self, "prompts/list", "prompts", opts) end
function Client:get_prompt(name, arguments, opts)
  return self:request("prompts/get", { name = name, arguments = arguments and next(arguments) and arguments or nil }, opts)
end
function Client:complete(ref, argument, context, opts)
  local result, why, code = self:request("completion/complete", { ref = ref, argument = argument, context = context }, opts)
  if not result then return nil, why, code end
  return result.completion
end

function Client:list_skills(opts) return list(self, "skills/list", "skills", opts) end
function Client:read_skill(entry, uri, opts) return require("mcp_skills").read(self, entry, uri, opts) end

function Client:ping(opts)
  if self.era == "modern" then return self:request("server/discover", nil, opts) end
  return self:request("ping", nil, opts)
end

function Client:set_log_level(level, opts)
  if self.era == "modern" then
    self._.log_level = level
    return object()
  end
  return self:request("logging/setLevel", { level = level }, opts)
end

function Client:subscribe(uri, opts)
  if self.era == "modern" then return self:listen { resourceSubscriptions = orch.json.array { uri } } end
  return self:request("resources/subscribe", { uri = uri }, opts)
end

function Client:unsubscribe(uri, opts)
  if self.era == "modern" then return nil, "in this era a subscription ends by cancelling its task", "failed" end
  return self:request("resources/unsubscribe", { uri = uri }, opts)
end

-- Modern: notifications of these kinds come to on_notification until the task returned is cancelled.
function Client:listen(kinds)
  return orch.task.spawn(function()
    return self:request("subscriptions/listen", { notifications = kinds }, { timeout = 1e8 })
  end)
end

function Client:close()
  if self._.closed then return end
  self._.closed = true
  self._.link:close()
end

-- ---- connecting

handshake = {}

function handshake.legacy(self, timeout)
  self.era = "legacy"
  local _ = self._
  local version = _.o.protocol and KNOWN_LEGACY[_.o.protocol] and _.o.protocol or LEGACY
  self.protocol_version = nil
  local result, why, code, err = once(self, "initialize",
    { protocolVersion = version, capabilities = _.capabilities, clientInfo = _.info }, { timeout = timeout })
  if not result then return nil, why, code, err end
  if type(result.protocolVersion) ~= "string" or not KNOWN_LEGACY[result.protocolVersion] then
    return nil, ("%s: the server speaks protocol %s, which orch does not"):format(_.name, tostring(result.protocolVersion)), "upstream"
  end
  self.protocol_version = result.protocolVersion
  self.server_info, self.capabilities, self.instructions = result.serverInfo, result.capabilities, result.instructions
  local ok, why2, code2 = self:notify("notifications/initialized")
  if not ok then return nil, why2, code2 end
  _.link:listen()
  return true
end

-- true; false for a server of the legacy era; nil, message, code when neither can be told.
function handshake.modern(self, timeout)
  self.era, self.protocol_version = "modern", MODERN
  self._.probe = self._.next_id + 1
  local result, why, code, err, status = once(self, "server/discover", nil, { timeout = timeout })
  if result then
    if not is_object(result.supportedVersions) or not transport.has(result.supportedVersions, MODERN) then
      if is_object(result.supportedVersions) then return false, self._.name .. ": the server does not speak " .. MODERN end
      return nil, self._.name .. ": its answer to server/discover has no supportedVersions", "upstream"
    end
    self.capabilities, self.instructions = result.capabilities, result.instructions
    self.server_info = is_object(result._meta) and result._meta[META .. "serverInfo"] or result.serverInfo
    return true
  elseif err then
    if err.code == -32022 then
      local supported = is_object(err.data) and is_object(err.data.supported) and err.data.supported or {}
      if transport.has(supported, MODERN) then return true end
      return false, why
    elseif err.code == -32020 or err.code == -32021 then
      return nil, why, code
    end
    return false, why
  elseif status and status >= 400 and status < 500 and status ~= 401 and status ~= 403 then
    return false, why
  end
  return nil, why, code, status
end

local verdicts = {} -- by who is asked and as whom: { modern, until }

local function negotiate(self)
  local _, o = self._, self._.o
  local timeout = _.connect_timeout
  if o.protocol == MODERN then
    local ok, why, code = handshake.modern(self, timeout)
    if ok == false then return nil, why or self._.name .. ": the server does not speak " .. MODERN, "upstream" end
    return ok, why, code
  elseif o.protocol then
    return handshake.legacy(self, timeout)
  end
  local key = _.link:key()
  local known = verdicts[key]
  if not known or known.till < orch.now() then
    local modern, why, code, status = handshake.modern(self, _.link.http and timeout or math.min(timeout / 2, PROBE_S))
    if modern == nil then
      -- A stdio server may end, or fall silent, when its first request is none it knows.
      if _.link.http or status then return nil, why, code end
      if code ~= "timeout" then
        local ok, why2, code2 = _.link:restart()
        if not ok then return nil, why2, code2 end
      end
    end
    known = { modern = modern, till = modern and 1 / 0 or orch.now() + VERDICT_S }
    verdicts[key] = known
    if modern then return true end
  elseif known.modern then
    return handshake.modern(self, timeout)
  end
  local ok, why, code, err = handshake.legacy(self, timeout)
  if not ok and err and (_.late or err.code == -32022) then -- slow to start, it has taken the probe for its opening
    verdicts[key] = nil
    return handshake.modern(self, timeout)
  end
  return ok, why, code
end

local KNOWN = { command = "table", url = "string", headers = "table", env = "table", cwd = "string", timeout = true, sandbox = "string",
  protocol = "string", elicit = "function", elicit_url = "function", sample = "function", roots = true, auth = "table",
  capabilities = "table", on_notification = "function", on_log = "function", name = "string" }

function M.connect(o)
  local function bad(why) error("orch.mcp.connect: " .. why, 3) end
  if type(o) ~= "table" then bad("an option table is needed") end
  for key, v in pairs(o) do
    if not KNOWN[key] then bad("unknown option '" .. tostring(key) .. "'") end
    if KNOWN[key] ~= true and type(v) ~= KNOWN[key] then bad(("%s must be a %s, got %s"):format(key, KNOWN[key], type(v))) end
  end
  if o.sandbox and o.sandbox ~= "host" then bad('sandbox "' .. o.sandbox .. '" is not available yet') end
  if o.protocol and o.protocol ~= MODERN and not KNOWN_LEGACY[o.protocol] then bad("protocol " .. o.protocol .. " is unknown") end
  if o.url and o.command then bad("url and command exclude each other") end
  local timeout = http.seconds(o.timeout, 30)
  local client = setmetatable({}, Client)
  client._ = { o = o, next_id = 0, calls = {}, connect_timeout = timeout, timeout = 60, capabilities = capabilities(o),
    info = { name = o.name or "orch", version = orch.version }, result_types = {} }
  local function on_message(msg, call) take(client, msg, call) end
  local link, why, code
  if o.url then
    link, why, code = transport.http(o, client, on_message)
  else
    link, why, code = transport.stdio(o, client, on_message)
  end
  if not link then return nil, why, code end
  client._.link, client._.name = link, link.name
  local ok
  ok, why, code = negotiate(client)
  if not ok then
    client:close()
    return nil, why, code
  end
  return client
end

return M
