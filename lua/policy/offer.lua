-- Resources, prompts and completion: checks what is offered, by orch.mcp.serve{…} of a script or by the files in
-- lua/resources and lua/prompts, and answers what clients ask. The host calls handle(method, params, ctx) in a
-- task of its own for each request; tools it calls itself.
--
--   resources          = { { uri =, name =, read = function(uri, ctx) | text = | blob =, … }, … }
--   resource_templates = { { uri_template =, name =, read = function(uri, ctx, variables), … }, … }
--   prompts            = { { name =, arguments = { { name =, … } }, get = function(args, ctx), … }, … }
--   complete           = function(ref, argument, ctx, context) -> list of strings | { values =, total =, hasMore = }
-- read returns a string (text), or { text = } | { blob = base64 } with mimeType, or a list of such; get returns
-- a string, a list of messages, or { description =, messages = }. Failing: nil, message.
local orch = orch

local INVALID_PARAMS = -32602
local PAGE = 500

local function fail(where, text, ...)
  error(where .. ": " .. text:format(...), 0)
end

local function check(where, t, fields, fn)
  if type(t) ~= "table" then fail(where, "must be a table, got %s", type(t)) end
  for key, kind in pairs(fields) do
    local required = kind:sub(-1) ~= "?"
    local want = kind:gsub("%?", "")
    if t[key] == nil and required then fail(where, "%s is missing", key) end
    if t[key] ~= nil and type(t[key]) ~= want then fail(where, "%s must be a %s, got %s", key, want, type(t[key])) end
  end
  for key in pairs(t) do
    if not fields[key] then fail(where, "unknown key %s", tostring(key)) end
  end
end

-- "test://template/{id}/data" as a pattern and the names of its variables; {+path} and {path*} may hold "/".
local function compile_template(where, template)
  local names, pattern, at = {}, "^", 1
  while true do
    local from, to, operator, name, star = template:find("{([+]?)([%w_]+)(%*?)}", at)
    pattern = pattern .. template:sub(at, (from or 0) - 1):gsub("%W", "%%%0")
    if not from then break end
    names[#names + 1] = name
    pattern = pattern .. ((operator == "+" or star == "*") and "(.+)" or "([^/]+)")
    at = to + 1
  end
  if #names == 0 then fail(where, "uri_template needs a variable, like \"notes://{id}\"") end
  return pattern .. "$", names
end

local function definition(entry, hide, rename)
  local out = {}
  for k, v in pairs(entry) do
    if not hide[k] then out[rename and rename[k] or k] = v end
  end
  return out
end

local function by(key)
  return function(a, b) return a[key] < b[key] end
end

-- One page of list: { [member] = …, nextCursor = }, the cursor being where the page before ended.
local function page(list, member, cursor, key)
  local from = 1
  if cursor ~= nil then
    from = nil
    for i = 1, #list do
      if list[i][key] == cursor then from = i + 1 end
    end
    if not from then return nil, "unknown cursor; the list may have changed, begin anew", INVALID_PARAMS end
  end
  local out = {}
  for i = from, math.min(#list, from + PAGE - 1) do out[#out + 1] = list[i] end
  local result = { [member] = orch.json.array(out) }
  if from + PAGE <= #list then result.nextCursor = list[from + PAGE - 1][key] end
  return result
end

local function contents(uri, mime, value)
  if type(value) == "string" then value = { text = value } end
  if type(value) ~= "table" then return nil end
  if value[1] == nil then value = { value } end
  local out = {}
  for i, item in ipairs(value) do
    local copy = {}
    for k, v in pairs(type(item) == "string" and { text = item } or item) do copy[k] = v end
    copy.uri = copy.uri or uri
    copy.mimeType = copy.mimeType or mime
    if copy.text == nil and copy.blob == nil then return nil end
    out[i] = copy
  end
  return { contents = orch.json.array(out) }
end

local function messages(value)
  if type(value) == "string" then value = { { role = "user", content = { type = "text", text = value } } } end
  if type(value) ~= "table" then return nil end
  if value.messages == nil then value = { messages = value } end
  return { description = value.description, messages = orch.json.array(value.messages) }
end

local resource_fields = { uri = "string", name = "string", title = "string?", description = "string?", mimeType = "string?", size = "number?",
  annotations = "table?", icons = "table?", _meta = "table?", text = "string?", blob = "string?", read = "function?" }
local template_fields = { uri_template = "string", name = "string", title = "string?", description = "string?", mimeType = "string?",
  annotations = "table?", icons = "table?", _meta = "table?", read = "function" }
local prompt_fields = { name = "string", title = "string?", description = "string?", arguments = "table?", icons = "table?", _meta = "table?",
  get = "function" }

-- o.where: the files that entries come from, where they do.
local function read_options(o)
  local function where_of(kind, i)
    return o.where and o.where[kind][i] or ("orch.mcp.serve: %s[%d]"):format(kind, i)
  end
  local resources, templates, prompts = {}, {}, {}
  local resource_list, template_list, prompt_list = {}, {}, {}
  for i, r in ipairs(o.resources or {}) do
    local where = where_of("resources", i)
    check(where, r, resource_fields)
    if not (r.read or r.text or r.blob) then fail(where, "one of read, text, blob is needed") end
    if resources[r.uri] then fail(where, "the uri %s is there already", r.uri) end
    resources[r.uri] = r
    resource_list[#resource_list + 1] = definition(r, { read = true, text = true, blob = true })
  end
  for i, t in ipairs(o.resource_templates or {}) do
    local where = where_of("resource_templates", i)
    check(where, t, template_fields)
    local pattern, names = compile_template(where, t.uri_template)
    templates[i] = { pattern = pattern, names = names, template = t }
    template_list[#template_list + 1] = definition(t, { read = true }, { uri_template = "uriTemplate" })
  end
  for i, p in ipairs(o.prompts or {}) do
    local where = where_of("prompts", i)
    check(where, p, prompt_fields)
    if prompts[p.name] then fail(where, "the name %s is there already", p.name) end
    prompts[p.name] = p
    prompt_list[#prompt_list + 1] = definition(p, { get = true })
  end
  table.sort(resource_list, by "uri")
  table.sort(template_list, by "uriTemplate")
  table.sort(prompt_list, by "name")
  return resources, templates, prompts, resource_list, template_list, prompt_list
end

return function(o)
  if o.complete ~= nil and type(o.complete) ~= "function" then fail("orch.mcp.serve: complete", "must be a function, got %s", type(o.complete)) end
  local resources, templates, prompts, resource_list, template_list, prompt_list = read_options(o)
  local handlers = {}

  handlers["resources/list"] = function(params) return page(resource_list, "resources", params.cursor, "uri") end
  handlers["resources/templates/list"] = function(params) return page(template_list, "resourceTemplates", params.cursor, "uriTemplate") end
  handlers["prompts/list"] = function(params) return page(prompt_list, "prompts", params.cursor, "name") end

  local function read(uri, ctx)
    local r = resources[uri]
    if r then
      if r.read then return r, r.read(uri, ctx) end
      return r, { text = r.text, blob = r.blob }
    end
    for _, t in ipairs(templates) do
      local found = { uri:match(t.pattern) }
      if found[1] then
        local variables = {}
        for i, name in ipairs(t.names) do variables[name] = found[i] end
        return t.template, t.template.read(uri, ctx, variables)
      end
    end
  end

  handlers["resources/read"] = function(params, ctx)
    local entry, value, why, code, data = read(params.uri, ctx)
    if not entry then return nil, "Resource not found", INVALID_PARAMS, { uri = params.uri } end
    if value == nil then
      if why == nil then return nil, "Resource not found", INVALID_PARAMS, { uri = params.uri } end
      return nil, why, code, data
    end
    local result = contents(params.uri, entry.mimeType, value)
    if not result then return nil, "the resource's read must return text or a blob" end
    return result
  end

  handlers["prompts/get"] = function(params, ctx)
    local p = prompts[params.name]
    if not p then return nil, "Unknown prompt: " .. params.name, INVALID_PARAMS end
    local args = params.arguments or {}
    for k, v in pairs(args) do
      if type(v) ~= "string" then return nil, ("prompts/get: arguments.%s must be a string"):format(k), INVALID_PARAMS end
    end
    for _, a in ipairs(p.arguments or {}) do
      if a.required and args[a.name] == nil then return nil, ("prompts/get: the argument %s is missing"):format(a.name), INVALID_PARAMS end
    end
    local value, why, code, data = p.get(args, ctx)
    if value == nil then return nil, why or "the prompt gave no reason", code, data end
    local result = messages(value)
    if not result then return nil, "the prompt's get must return text or messages" end
    if result.description == nil then result.description = p.description end
    return result
  end

  handlers["completion/complete"] = function(params, ctx)
    local ref, argument = params.ref, params.argument
    if type(ref) ~= "table" or type(argument) ~= "table" or type(argument.name) ~= "string" or type(argument.value) ~= "string" then
      return nil, "completion/complete: params.ref and params.argument { name, value } are needed", INVALID_PARAMS
    end
    if ref.type == "ref/prompt" and not prompts[ref.name] then return nil, "Unknown prompt: " .. tostring(ref.name), INVALID_PARAMS end
    local value, why, code = {}, nil, nil
    if o.complete then
      value, why, code = o.complete(ref, argument, ctx, params.context)
      if value == nil then return nil, why or "complete gave no reason", code end
    end
    if value.values == nil then value = { values = value } end
    local values = {}
    for i = 1, math.min(100, #value.values) do values[i] = value.values[i] end
    return { completion = { values = orch.json.array(values), total = value.total or #value.values,
      hasMore = value.hasMore or #value.values > 100 } }
  end

  local function handle(method, params, ctx)
    return handlers[method](params, ctx)
  end

  local has_resources = o.resources ~= nil or o.resource_templates ~= nil
  return o.tools or {}, handle, has_resources, o.prompts ~= nil, o.complete ~= nil
end
