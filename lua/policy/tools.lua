-- Tool dispatch, in the tool state: checks what a tool file returned and keeps what a call needs.
-- The host starts `run` itself, in a task of its own.
--
-- deps: json, schema() -> the schema module (loaded when a tool has an output schema), nearest, duration(text) -> ms
local deps = ...
local json = deps.json

local dispatch = {}
local keys = { name = true, description = true, title = true, input = true, output = true, annotations = true, timeout = true, task = true,
  run = true }

-- task: with a client that has the tasks extension the call is one from its start; required: only so.
local tasks = { optional = 1, required = 2 }

local function check(where, t)
  if type(t) ~= "table" then return where .. ": must return a table (one tool), got " .. type(t) end
  for k in pairs(t) do
    if not keys[k] then
      local list = {}
      for name in pairs(keys) do list[#list + 1] = name end
      local near = type(k) == "string" and deps.nearest(k, list)
      return ("%s: unknown key %s%s"):format(where, tostring(k), near and (" (did you mean " .. near .. "?)") or "")
    end
  end
  if type(t.name) ~= "string" or #t.name > 64 or not t.name:find("^[%w_.%-]+$") or t.name:find("__", 1, true) then
    return where .. ": name must be 1 to 64 of A-Za-z0-9_.- without \"__\""
  end
  if type(t.description) ~= "string" then return where .. ": description must be a string" end
  if t.title ~= nil and type(t.title) ~= "string" then return where .. ": title must be a string" end
  if type(t.input) ~= "table" then return where .. ": input must be a JSON Schema (a table)" end
  if t.input.type ~= "object" then return where .. ": input.type must be \"object\"" end
  if t.output ~= nil and type(t.output) ~= "table" then return where .. ": output must be a JSON Schema (a table)" end
  if t.annotations ~= nil and type(t.annotations) ~= "table" then return where .. ": annotations must be a table" end
  if t.task ~= nil and not tasks[t.task] then return where .. ": task must be \"optional\" or \"required\"" end
  if type(t.run) ~= "function" then return where .. ": run must be a function (args, ctx)" end
end

-- Returns nil, error or: name, run, definition as JSON, input schema as JSON, timeout in ms or nil (the configuration's), output
-- check or nil, task or nil.
function dispatch.register(where, t)
  local problem = check(where, t)
  if problem then return nil, problem end
  local timeout = t.timeout and deps.duration(t.timeout)
  if t.timeout ~= nil and (not timeout or timeout < 1 or timeout > 86400000) then
    return nil, where .. ": timeout must be a duration like \"30s\", got " .. tostring(t.timeout)
  end
  local ok, definition = pcall(json.encode, { name = t.name, title = t.title, description = t.description,
    inputSchema = t.input, outputSchema = t.output, annotations = t.annotations })
  if not ok then return nil, where .. ": " .. tostring(definition) end
  local output
  if t.output then
    local why
    output, why = deps.schema().compile(t.output, { unknown = "error" })
    if not output then return nil, where .. ": output: " .. tostring(why) end
  end
  return t.name, t.run, definition, json.encode(t.input), timeout, output, tasks[t.task]
end

return dispatch
