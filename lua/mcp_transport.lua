-- How the MCP client's messages travel: lines to and from a child, or Streamable HTTP. A link has
--   exchange(msg, call)  the response to a request; or nil, message, code, HTTP status
--   send(msg)            a notification or an answer; true, or nil, message, code
--   cancel(id, why)      tells the server that nobody waits any more; does not wait
--   listen()             after the legacy handshake: whatever else makes the server's messages arrive
--   key() close()
-- on_message(msg, call) gets every other message; call is the one on whose stream it came, if any.
local orch = require "orch"
local http = require "http"
local verbs = require "orch.transport"
local M = {}

local LISTEN_S, RETRY_MOST_S, RETRIES = 2, 600, 5

function M.has(list, value)
  for _, v in ipairs(list) do
    if v == value then return true end
  end
  return false
end

local function decode(text)
  local msg, why = orch.json.decode(text)
  if type(msg) ~= "table" then return nil, why or "no object" end
  return msg
end

local function is_answer(msg, id) return msg.method == nil and msg.id == id and (msg.result ~= nil or msg.error ~= nil) end

-- ---- lines

local Stdio = {}
Stdio.__index = Stdio

local function pump(self, pipe)
  local stray = 0
  while true do
    local line, why, code = pipe:read()
    if not line then
      if self.pipe == pipe then self.gone = { why, code } end
      for _, w in pairs(self.waiting) do
        if w.pipe == pipe then w.sleep:cancel() end
      end
      return
    end
    local msg, wrong
    if line ~= "" then msg, wrong = decode(line) end
    if wrong and stray < 10 then
      stray = stray + 1
      orch.log.warn(("%s: a line on its stdout is no JSON-RPC (%s): %s"):format(self.name, wrong, line:sub(1, 200)))
    end
    for _, m in ipairs(msg and (msg[1] and msg or { msg }) or {}) do
      local w = type(m) == "table" and m.method == nil and self.waiting[m.id]
      if w then
        w.msg = m
        w.sleep:cancel()
      elseif type(m) == "table" then
        self.on_message(m)
      end
    end
  end
end

local function start(self)
  local o = self.o
  local pipe, why, code = verbs.process_open { command = o.command, env = o.env, cwd = o.cwd, protect = o.protect }
  if not pipe then return nil, why, code end
  self.pipe, self.gone = pipe, nil
  orch.task.spawn(pump, self, pipe)
  return true
end

function M.stdio(o, client, on_message)
  local self = setmetatable({ o = o, name = o.command and o.command[1] or "", waiting = {}, on_message = on_message, client = client }, Stdio)
  local ok, why, code = start(self)
  if not ok then return nil, why, code end
  return self
end

function Stdio:restart()
  self.pipe:close()
  return start(self)
end

function Stdio:key() return table.concat(self.o.command, "\0") .. "\0" .. tostring(self.o.cwd) end
function Stdio:listen() end
function Stdio:send(msg) return self.pipe:send(orch.json.encode(msg)) end

function Stdio:cancel(id, why)
  self.pipe:send(orch.json.encode { jsonrpc = "2.0", method = "notifications/cancelled", params = { requestId = id, reason = why } })
end

-- The pump wakes who waits by ending the task they join.
function Stdio:exchange(msg, call)
  local ok, why, code = self.pipe:send(orch.json.encode(msg))
  if not ok then return nil, why, code end
  local w = { pipe = self.pipe }
  self.waiting[msg.id] = w
  while true do
    local left = call:left()
    if left <= 0 or self.gone then break end
    w.sleep = orch.task.spawn(orch.sleep, left)
    local _, said, class = w.sleep:join()
    if w.msg then break end
    if class == "cancelled" and not self.gone and call:left() > 0 and w.sleep:cancel() then
      self.waiting[msg.id] = nil
      return nil, said, "cancelled"
    end
  end
  self.waiting[msg.id] = nil
  if w.msg then return w.msg end
  if self.gone then return nil, self.gone[1], self.gone[2] end
  return nil, ("%s: %s; %s"):format(self.name, call:late(), self.pipe:stderr()), "timeout"
end

function Stdio:close() self.pipe:close() end

-- ---- Streamable HTTP

local Http = {}
Http.__index = Http

function M.http(o, client, on_message)
  local self = setmetatable({ o = o, name = o.url:match("^%a+://[^/?#]+") or o.url, url = o.url, http = true, client = client, on_message = on_message,
    under_way = {} }, Http)
  if o.auth then self.auth = require("mcp_auth").new(o.url, o.auth, o.timeout) end
  return self
end

function Http:key()
  return self.url .. "\0" .. tostring(self.auth and self.auth:token() or self.o.headers and (self.o.headers.Authorization or self.o.headers.authorization))
end

-- Opens a request, with authorization as the server asks for it.
local function open(self, method, headers, body, timeout)
  local budget = self.auth and self.auth:budget()
  while true do
    local all = {}
    for k, v in pairs(self.o.headers or {}) do all[k] = v end
    for k, v in pairs(headers) do all[k] = v end
    if self.auth then self.auth:sign(all, method, self.url) end
    local stream, status, h = verbs.http_open { url = self.url, method = method, headers = all, body = body, timeout = timeout }
    if not stream then return nil, status, h end
    if not self.auth or (status ~= 401 and status ~= 403) then return stream, status, h end
    local again, why, code = self.auth:challenged(status, h, budget)
    if not again then
      if why then
        stream:close()
        return nil, self.name .. ": " .. why, code, status
      end
      return stream, status, h
    end
    stream:close()
  end
end

local function header_value(v)
  v = tostring(v)
  if v ~= "" and (v:find("[^\32-\126]") or v:find("^ ") or v:find(" $") or v:find("^=%?base64%?.*%?=$")) then
    return "=?base64?" .. verbs.base64(v) .. "?="
  end
  return v
end

local NAMED = { ["tools/call"] = "name", ["prompts/get"] = "name", ["resources/read"] = "uri", ["tasks/get"] = "taskId",
  ["tasks/update"] = "taskId", ["tasks/cancel"] = "taskId" }

local function post_headers(self, msg, call)
  local h = { ["Content-Type"] = "application/json", Accept = "application/json, text/event-stream" }
  if self.client.protocol_version then h["MCP-Protocol-Version"] = self.client.protocol_version end
  if self.client.era ~= "modern" then
    h["Mcp-Session-Id"] = self.session
    return h
  end
  if msg.method then h["Mcp-Method"] = msg.method end
  local name = msg.params and msg.params[NAMED[msg.method]]
  if name then h["Mcp-Name"] = header_value(name) end
  for k, v in pairs(call and call.headers or {}) do h[k] = v end
  return h
end

-- A server that lost a request's stream may send its answer on another one.
local function elsewhere_answered(self, msg)
  local call = msg.method == nil and self.client._.calls[msg.id]
  if not call or not call.stream then return false end
  call.answer = msg
  call.stream:close()
  return true
end

-- Reads events until the answer to call comes: the answer; or nil, message, code. Then the last event's
-- id and the time to wait before asking for more.
local function events(self, stream, call)
  local reader, id, retry = verbs.sse(), nil, nil
  if call then call.stream = stream end
  while true do
    local bytes, why, code = stream:read(call and call:left())
    if bytes then
      local list, last, pause = reader:feed(bytes)
      if not list then return nil, last, pause, id, retry end
      id, retry = last or id, pause or retry
      for _, data in ipairs(list) do
        local msg, wrong
        if data ~= "" then msg, wrong = decode(data) end
        if wrong then orch.log.warn(("%s: an event is no JSON-RPC (%s)"):format(self.name, wrong)) end
        for _, m in ipairs(msg and (msg[1] and msg or { msg }) or {}) do
          if type(m) == "table" and call and is_answer(m, call.id) then return m end
          if type(m) == "table" and not elsewhere_answered(self, m) then self.on_message(m, call) end
        end
      end
    elseif call and call.answer then
      return call.answer
    elseif code ~= "timeout" or call:left() <= 0 then
      return nil, why or "the stream ended before the answer", code or "closed", id, retry
    end
  end
end

local function get(self, last, timeout)
  return open(self, "GET", { Accept = "text/event-stream", ["Mcp-Session-Id"] = self.session, ["Last-Event-ID"] = last,
    ["MCP-Protocol-Version"] = self.client.protocol_version }, nil, timeout)
end

-- Legacy: a stream that broke off is taken up where it ended.
local function resume(self, call, why, code, id, retry)
  local tries = 0
  while id and code ~= "timeout" and code ~= "cancelled" and tries < RETRIES do
    local pause = retry or math.min(2 ^ tries, 30)
    if pause > call:left() then break end
    orch.sleep(pause)
    if call.answer then return call.answer end
    tries = tries + 1
    local stream, status, h = get(self, id, call:left())
    if stream and status ~= 200 then
      stream:close()
      return nil, ("%s: a stream broke off and cannot be resumed (HTTP %d)"):format(self.name, status), "upstream"
    elseif stream then
      local msg, last, pause2
      msg, why, code, last, pause2 = events(self, stream, call)
      stream:close()
      if msg then return msg end
      if last and last ~= id then tries = 0 end
      id, retry = last or id, pause2 or retry
    else
      why, code = status, h
    end
  end
  return nil, why, code
end

local function exchange(self, msg, call, text)
  local stream, status, h, http_status = open(self, "POST", post_headers(self, msg, call), text, call:left())
  if not stream then return nil, status, h, http_status end
  if msg.method == "initialize" then self.session = h["mcp-session-id"] end
  local kind = (h["content-type"] or ""):lower()
  if status == 200 and kind:find("text/event-stream", 1, true) then
    local answer, why, code, id, retry = events(self, stream, call)
    stream:close()
    if not answer and self.client.era ~= "modern" then answer, why, code = resume(self, call, why, code, id, retry) end
    if not answer then return nil, self.name .. ": " .. tostring(why), code end
    return answer
  end
  local body, why, code = http.collect(stream, call.deadline)
  if not body then return nil, self.name .. ": " .. (code == "timeout" and call:late() or why), code end
  local answer = kind:find("application/json", 1, true) and decode(body)
  if answer and (is_answer(answer, call.id) or (status >= 400 and type(answer.error) == "table")) then return answer, nil, nil, status end
  return M.as_error(self, status, msg.method, #body)
end

-- In a task of its own, so that close() ends it wherever it waits.
function Http:exchange(msg, call)
  local task, why, code = orch.task.spawn(exchange, self, msg, call, orch.json.encode(msg))
  if not task then return nil, why, code end
  self.under_way[task] = true
  local answer, status
  answer, why, code, status = task:join()
  self.under_way[task] = nil
  if not answer and code == "timeout" and call:left() <= 0 then why = self.name .. ": " .. call:late() end
  if code == "cancelled" then task:cancel() end -- it was the waiting that was
  return answer, why, code, status
end

function M.as_error(self, status, method, size)
  local why = ({ [401] = "it wants authorization (connect with auth or an Authorization header)", [403] = "it forbids this" })[status]
    or (size == 0 and "without a body" or "with no JSON-RPC answer in it")
  return nil, ("%s: HTTP %d to %s: %s"):format(self.name, status, method or "an answer", why), "upstream", status
end

function Http:send(msg)
  local limit = self.client._.connect_timeout
  local stream, status, h = open(self, "POST", post_headers(self, msg), orch.json.encode(msg), limit)
  if not stream and h == "timeout" then
    status = ("%s: %s not taken within %g s (timeout of connect)"):format(self.name, msg.method or "an answer", limit)
  end
  if not stream then return nil, status, h end
  stream:close()
  if status >= 300 then return M.as_error(self, status, msg.method, 0) end
  return true
end

-- In the modern era closing the stream says it, which is done already.
function Http:cancel(id, why)
  if self.client.era == "modern" then return end
  orch.task.spawn(function()
    return self:send { jsonrpc = "2.0", method = "notifications/cancelled", params = { requestId = id, reason = why } }
  end)
end

-- The legacy stream on which the server may send what belongs to no request. Servers need not have it.
-- What is asked before it stands may be lost, so it is waited for, but not for long.
function Http:listen()
  if self.listening then self.listening:cancel() end
  local opening = orch.task.spawn(orch.sleep, LISTEN_S)
  self.listening = orch.task.spawn(function()
    local last, tries = nil, 0
    while not self.closed and tries < RETRIES do
      local stream, status, h = get(self, last, self.client._.connect_timeout)
      opening:cancel()
      if stream and (status ~= 200 or not (h["content-type"] or ""):find("text/event-stream", 1, true)) then
        stream:close()
        return
      end
      local _, id, retry
      if stream then
        _, _, _, id, retry = events(self, stream)
        stream:close()
        last = id or last
        tries = id and 0 or tries + 1
      else
        tries = tries + 1
      end
      orch.sleep(math.min(retry or 2 ^ tries, RETRY_MOST_S))
    end
  end)
  opening:join()
end

function Http:close()
  self.closed = true
  for task in pairs(self.under_way) do task:cancel() end
  if self.listening then self.listening:cancel() end
  if not self.session then return end
  local stream = verbs.http_open { url = self.url, method = "DELETE", timeout = 1,
    headers = { ["Mcp-Session-Id"] = self.session, ["MCP-Protocol-Version"] = self.client.protocol_version } }
  if stream then stream:close() end
end

-- ---- arguments as headers

local PRIMITIVE = { string = true, integer = true, boolean = true }

local function annotated(schema)
  return type(schema) == "table" and schema["x-mcp-header"] ~= nil
end

-- Annotations where none may be: below anything but properties.
local function elsewhere(schema, depth)
  if type(schema) ~= "table" or depth > 32 then return false end
  if annotated(schema) then return true end
  for _, v in pairs(schema) do
    if elsewhere(v, depth + 1) then return true end
  end
  return false
end

local function collect(schema, path, out, names, depth)
  if depth > 32 then return "its schema is too deep" end
  for key, v in pairs(schema) do
    if key == "properties" and type(v) == "table" then
      for name, property in pairs(v) do
        if type(property) == "table" then
          local at = {}
          for i, p in ipairs(path) do at[i] = p end
          at[#at + 1] = name
          local header = property["x-mcp-header"]
          if header ~= nil then
            if type(header) ~= "string" or not header:find("^[%w!#$%%&'*+.^_`|~-]+$") then
              return "x-mcp-header of " .. tostring(name) .. " is no header name"
            elseif not PRIMITIVE[property.type] then
              return "x-mcp-header of " .. tostring(name) .. " is on a type that cannot have it"
            elseif names[header:lower()] then
              return "x-mcp-header " .. header .. " is there twice"
            end
            names[header:lower()] = true
            out[#out + 1] = { header = header, path = at }
          end
          local wrong = collect(property, at, out, names, depth + 1)
          if wrong then return wrong end
        end
      end
    elseif key ~= "x-mcp-header" and key ~= "default" and key ~= "examples" and key ~= "enum" and key ~= "const" and elsewhere(v, depth) then
      return "x-mcp-header stands below " .. tostring(key) .. ", where it cannot be"
    end
  end
end

-- The headers that a tool's schema asks for; nil and why when the tool must not be used.
function M.mirrored(schema)
  local out = {}
  local wrong = type(schema) == "table" and collect(schema, {}, out, {}, 0)
  if wrong then return nil, wrong end
  return out
end

function M.param_headers(spec, arguments)
  local h = {}
  for _, one in ipairs(spec) do
    local v = arguments
    for _, key in ipairs(one.path) do
      if type(v) ~= "table" then v = nil break end
      v = v[key]
    end
    if v == nil or v == orch.json.null or type(v) == "table" then
      v = nil
    elseif type(v) == "number" and v == math.floor(v) and math.abs(v) <= 2 ^ 53 then
      v = ("%.0f"):format(v)
    end
    if v ~= nil then h["Mcp-Param-" .. one.header] = header_value(v) end
  end
  return h
end

return M
