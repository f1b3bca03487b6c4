-- orch.http.request and ctx:http: HTTP exchanges over streams. transport is orch.transport, or in tool states the
-- part of it that belongs to a call.
local orch = orch
local transport = type(...) == "table" and ... or require "orch.transport"
local http = {}

local MAX_BODY = 16 * 1024 * 1024
local MAX_REDIRECTS = 5

-- A duration as the API takes it, in seconds.
function http.seconds(v, default)
  if v == nil then return default end
  if type(v) == "number" and v >= 0 and v <= 1e9 then return v end
  local n, unit = tostring(v):match("^(%d+%.?%d*)(%a+)$")
  local factor = ({ ms = 0.001, s = 1, m = 60, h = 3600 })[unit]
  if not factor then error('a timeout must be seconds or a text like "250ms", "30s", "5m"', 3) end
  return tonumber(n) * factor
end

-- What is left of a stream: as one string, or piece by piece to on_data and then "". Closes it. `limit` says which time
-- it is that ends at the deadline.
function http.collect(stream, deadline, limit, on_data)
  local parts, n = {}, 0
  while true do
    local bytes, why, code = stream:read(math.max(deadline - orch.now(), 0))
    if not bytes then
      stream:close()
      if code == "timeout" and limit then why = "not done within " .. limit end
      if why then return nil, why, code end
      return table.concat(parts)
    end
    if on_data then
      local ok, fault = pcall(on_data, bytes)
      if not ok then
        stream:close()
        error(fault, 0)
      end
    else
      n = n + #bytes
      if n > MAX_BODY then
        stream:close()
        return nil, "the answer's body is over 16 MiB", "limit"
      end
      parts[#parts + 1] = bytes
    end
  end
end

local KNOWN = { url = true, method = true, headers = true, body = true, timeout = true, on_data = true }

-- The deadline, and which time it is that ends then: the argument, or of a call what is left of it.
local function check(what, o, left, whole, limit)
  if type(o) ~= "table" then error(what .. ": an option table is needed", 3) end
  for key in pairs(o) do
    if not KNOWN[key] then error(what .. ": unknown option '" .. tostring(key) .. "'", 3) end
  end
  if o.on_data ~= nil and type(o.on_data) ~= "function" then error(what .. ": on_data must be a function", 3) end
  local timeout = http.seconds(o.timeout, left or 60)
  if left and timeout >= left then return orch.now() + left, ("%g s (%s)"):format(whole, limit) end
  return orch.now() + timeout, ("%g s (the argument timeout)"):format(timeout)
end

local function request_of(o, deadline)
  return { url = o.url, method = o.method, headers = o.headers, body = o.body, timeout = math.max(deadline - orch.now(), 0) }
end

local function no_answer(why, code, limit)
  if code == "timeout" then why = "nothing came within " .. limit end
  return nil, why, code
end

local function answer_of(stream, status, headers, o, deadline, limit)
  local body, why, code = http.collect(stream, deadline, limit, o.on_data)
  if not body then return nil, why, code end
  return { status = status, headers = headers, body = not o.on_data and body or nil }
end

function http.request(o)
  local deadline, limit = check("orch.http.request", o)
  local stream, status, headers = transport.http_open(request_of(o, deadline))
  if not stream then return no_answer(status, headers, limit) end
  return answer_of(stream, status, headers, o, deadline, limit)
end

-- A URL that was asked for with success has this form; the slashes may be fewer or more than two.
local function origin(url)
  local scheme, authority = url:match("^(%a[%w+.-]*):/*([^/?#]*)")
  return (scheme .. "://" .. authority):lower()
end

local OF_ORIGIN = { authorization = true, cookie = true, ["proxy-authorization"] = true, host = true }

-- The request that a redirect asks for (RFC 9110, 15.4), or nil and why it is not made.
local function redirected(o, status, location)
  local from, to = origin(o.url), origin(location)
  if from:find("^https:") and not to:find("^https:") then return nil, to .. ": a redirect from https to http is not followed" end
  local method, body = o.method or (o.body and "POST" or "GET"), o.body
  local dropped = status == 303 and method ~= "HEAD" or status < 303 and method == "POST"
  if dropped then method, body = "GET", nil end
  local headers = {}
  for name, value in pairs(o.headers or {}) do
    local lower = name:lower()
    if not (from ~= to and OF_ORIGIN[lower]) and not (dropped and lower:find("^content%-")) then headers[name] = value end
  end
  return { url = location, method = method, headers = headers, body = body, on_data = o.on_data }
end

-- ctx:http(o): every connection, those of redirects too, is one that the call's network policy allows.
function http.fetch(ctx, o)
  local deadline, limit = check("ctx:http", o, transport.call_time(ctx))
  for _ = 0, MAX_REDIRECTS do
    local stream, status, headers, location = transport.call_open(ctx, request_of(o, deadline))
    if not stream then return no_answer(status, headers, limit) end
    if not location then
      local answer, why, code = answer_of(stream, status, headers, o, deadline, limit)
      if answer then answer.url = o.url end
      return answer, why, code
    end
    stream:close()
    local why
    o, why = redirected(o, status, location)
    if not o then return nil, why, "denied" end
  end
  return nil, ("over %d redirects, the last to %s"):format(MAX_REDIRECTS, origin(o.url)), "limit"
end

return http
