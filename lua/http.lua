-- orch.http.request: one HTTP exchange over orch.transport's streams.
local orch = require "orch"
local transport = require "orch.transport"
local http = {}

local MAX_BODY = 16 * 1024 * 1024

-- A duration as the API takes it, in seconds.
function http.seconds(v, default)
  if v == nil then return default end
  if type(v) == "number" and v >= 0 and v <= 1e9 then return v end
  local n, unit = tostring(v):match("^(%d+%.?%d*)(%a+)$")
  local factor = ({ ms = 0.001, s = 1, m = 60, h = 3600 })[unit]
  if not factor then error('a timeout must be seconds or a text like "250ms", "30s", "5m"', 3) end
  return tonumber(n) * factor
end

-- What is left of a stream, as one string. Closes it.
function http.collect(stream, deadline)
  local parts, n = {}, 0
  while true do
    local bytes, why, code = stream:read(math.max(deadline - orch.now(), 0))
    if not bytes then
      stream:close()
      if why then return nil, why, code end
      return table.concat(parts)
    end
    n = n + #bytes
    if n > MAX_BODY then
      stream:close()
      return nil, "the answer's body is over 16 MiB", "limit"
    end
    parts[#parts + 1] = bytes
  end
end

local KNOWN = { url = true, method = true, headers = true, body = true, timeout = true, on_data = true }

function http.request(o)
  if type(o) ~= "table" then error("orch.http.request: an option table is needed", 2) end
  for key in pairs(o) do
    if not KNOWN[key] then error("orch.http.request: unknown option '" .. tostring(key) .. "'", 2) end
  end
  if o.on_data ~= nil and type(o.on_data) ~= "function" then error("orch.http.request: on_data must be a function", 2) end
  local timeout = http.seconds(o.timeout, 60)
  local deadline = orch.now() + timeout
  local stream, status, headers = transport.http_open {
    url = o.url, method = o.method, headers = o.headers, body = o.body, timeout = timeout }
  if not stream then return nil, status, headers end
  local answer = { status = status, headers = headers }
  if not o.on_data then
    local body, why, code = http.collect(stream, deadline)
    if not body then return nil, why, code end
    answer.body = body
    return answer
  end
  while true do
    local bytes, why, code = stream:read(math.max(deadline - orch.now(), 0))
    if bytes then
      o.on_data(bytes)
    else
      stream:close()
      if why then return nil, why, code end
      return answer
    end
  end
end

return http
