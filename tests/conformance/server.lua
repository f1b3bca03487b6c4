-- The server that the official conformance suite tests: orch tests/conformance/server.lua --listen 127.0.0.1:PORT
-- serves /mcp with every fixture that its scenarios name (tests/conformance/run). The token is $ORCH_TOKEN.
local orch = require "orch"

local listen, token = "127.0.0.1:3000", nil
for i = 1, #arg, 2 do
  if arg[i] == "--listen" then listen = arg[i + 1] else error("usage: server.lua [--listen HOST:PORT]", 0) end
end
token = os.getenv "ORCH_TOKEN"

local PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
local WAV = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAAB9AAACABAAZGF0YQIAAAA="

local EMPTY = orch.json.decode "{}"
local function object(properties, required)
  return { type = "object", properties = properties or EMPTY, required = required }
end
local function text(s) return { type = "text", text = s } end
local function content(...) return { content = { ... } } end
local json = orch.json.encode

local tools = {}
local function tool(name, input, run, more)
  local t = { name = name, description = "Fixture " .. name, input = input or object(), run = run }
  for k, v in pairs(more or {}) do t[k] = v end
  tools[#tools + 1] = t
end

-- ---- tools/call

tool("test_simple_text", nil, function() return "This is a simple text response for testing." end)
tool("test_image_content", nil, function() return content { type = "image", data = PNG, mimeType = "image/png" } end)
tool("test_audio_content", nil, function() return content { type = "audio", data = WAV, mimeType = "audio/wav" } end)
tool("test_embedded_resource", nil, function()
  return content { type = "resource", resource = { uri = "test://embedded-resource", mimeType = "text/plain",
    text = "This is an embedded resource content." } }
end)
tool("test_multiple_content_types", nil, function()
  return content(text "Multiple content types test:", { type = "image", data = PNG, mimeType = "image/png" },
    { type = "resource", resource = { uri = "test://mixed-content-resource", mimeType = "application/json", text = '{"test":"data","value":123}' } })
end)
tool("test_error_handling", nil, function() error("This tool intentionally returns an error for testing", 0) end)
tool("test_tool_with_progress", nil, function(_, ctx)
  for done = 0, 100, 50 do
    ctx:progress(done, 100, ("Completed step %d of %d"):format(done, 100))
    if done < 100 then orch.sleep(0.05) end
  end
  return "done"
end)
local function logging(_, ctx)
  ctx:log("info", "Tool execution started")
  orch.sleep(0.05)
  ctx:log("info", "Tool processing data")
  orch.sleep(0.05)
  ctx:log("info", "Tool execution completed")
  return "logged"
end
tool("test_tool_with_logging", nil, logging)
tool("test_logging_tool", nil, logging)
tool("test_reconnection", nil, function(_, ctx)
  ctx:release("500ms")
  orch.sleep(0.1)
  return "Reconnection test completed"
end)
tool("json_schema_2020_12_tool", { ["$schema"] = "https://json-schema.org/draft/2020-12/schema", type = "object",
  ["$defs"] = { address = { ["$anchor"] = "addressDef", type = "object", properties = { street = { type = "string" }, city = { type = "string" } } } },
  properties = { name = { type = "string" }, address = { ["$ref"] = "#/$defs/address" }, contactMethod = { type = "string", enum = { "phone", "email" } },
    phone = { type = "string" }, email = { type = "string" } },
  allOf = { { anyOf = { { required = { "phone" } }, { required = { "email" } } } } },
  ["if"] = { properties = { contactMethod = { const = "phone" } }, required = { "contactMethod" } },
  ["then"] = { required = { "phone" } }, ["else"] = { required = { "email" } }, additionalProperties = false,
}, function(args) return json(args) end)
tool("test_x_mcp_header", object({ region = { type = "string", ["x-mcp-header"] = "Region" }, priority = { type = "integer", ["x-mcp-header"] = "Priority" },
  verbose = { type = "boolean", ["x-mcp-header"] = "Verbose" }, query = { type = "string" } }), function(args) return json(args) end)

-- ---- questions to the client, in both eras

tool("test_sampling", object({ prompt = { type = "string" } }, { "prompt" }), function(args, ctx)
  local answer, why, code = ctx:sample { prompt = args.prompt, max_tokens = 100 }
  if not answer then return nil, why, code end
  return "LLM response: " .. (answer.content.text or json(answer.content))
end)
tool("test_missing_capability", nil, function(_, ctx)
  local answer, why, code = ctx:sample { prompt = "Anything" }
  if not answer then return nil, why, code end
  return "sampled"
end)
local USER = object({ username = { type = "string", description = "User's response" }, email = { type = "string", description = "User's email address" } },
  { "username", "email" })
tool("test_elicitation", object({ message = { type = "string" } }, { "message" }), function(args, ctx)
  local answer, why, code = ctx:elicit { message = args.message, schema = USER }
  if not answer then return nil, why, code end
  return ("User response: action=%s, content=%s"):format(answer.action, json(answer.content or EMPTY))
end)
local function form(name, properties)
  tool(name, nil, function(_, ctx)
    local answer, why, code = ctx:elicit { message = "Please fill in the form", schema = object(properties) }
    if not answer then return nil, why, code end
    return ("Elicitation completed: action=%s, content=%s"):format(answer.action, json(answer.content or EMPTY))
  end)
end
form("test_elicitation_sep1034_defaults", { name = { type = "string", default = "John Doe" }, age = { type = "integer", default = 30 },
  score = { type = "number", default = 95.5 }, status = { type = "string", enum = { "active", "inactive", "pending" }, default = "active" },
  verified = { type = "boolean", default = true } })
local function titled(...)
  local out = {}
  for i, v in ipairs { ... } do out[i] = { const = v, title = v:upper() } end
  return out
end
form("test_elicitation_sep1330_enums", {
  untitledSingle = { type = "string", enum = { "option1", "option2", "option3" } },
  titledSingle = { type = "string", oneOf = titled("value1", "value2", "value3") },
  legacyEnum = { type = "string", enum = { "opt1", "opt2", "opt3" }, enumNames = { "Option One", "Option Two", "Option Three" } },
  untitledMulti = { type = "array", items = { type = "string", enum = { "option1", "option2", "option3" } } },
  titledMulti = { type = "array", items = { anyOf = titled("value1", "value2", "value3") } } })
tool("test_streaming_elicitation", nil, function(_, ctx)
  ctx:progress(0, 1)
  local answer, why, code = ctx:elicit { message = "Go on?" }
  if not answer then return nil, why, code end
  return "answered: " .. answer.action
end)

-- ---- results that need input first

local NAME = object({ name = { type = "string" } }, { "name" })
local OK = object({ ok = { type = "boolean" } }, { "ok" })
tool("test_input_required_result_elicitation", nil, function(_, ctx)
  local answer, why, code = ctx:elicit { key = "user_name", message = "What is your name?", schema = NAME }
  if not answer then return nil, why, code end
  return ("Hello, %s!"):format(answer.content and answer.content.name or "nobody")
end)
tool("test_input_required_result_sampling", nil, function(_, ctx)
  local answer, why, code = ctx:sample { key = "capital_question", prompt = "What is the capital of France?", max_tokens = 100 }
  if not answer then return nil, why, code end
  return answer.content.text or "no text"
end)
tool("test_input_required_result_list_roots", nil, function(_, ctx)
  local roots, why, code = ctx:roots { key = "client_roots" }
  if not roots then return nil, why, code end
  local out = {}
  for i, r in ipairs(roots) do out[i] = r.uri end
  return "Roots: " .. table.concat(out, ", ")
end)
tool("test_input_required_result_request_state", nil, function(_, ctx)
  local answer, why, code = ctx:elicit { key = "confirm", message = "Please confirm", schema = OK }
  if not answer then return nil, why, code end
  return "state-ok"
end)
tool("test_input_required_result_tampered_state", nil, function(_, ctx)
  local answer, why, code = ctx:elicit { key = "confirm", message = "Please confirm", schema = OK }
  if not answer then return nil, why, code end
  return "state-ok"
end)
tool("test_input_required_result_multiple_inputs", nil, function(_, ctx)
  local answers, why, code = ctx:ask {
    user_name = { elicit = { message = "What is your name?", schema = NAME } },
    greeting = { sample = { prompt = "Generate a greeting", max_tokens = 50 } },
    client_roots = { roots = true } }
  if not answers then return nil, why, code end
  return json(answers)
end)
tool("test_input_required_result_multi_round", nil, function(_, ctx)
  local first, why, code = ctx:elicit { key = "step1", message = "Step 1: What is your name?", schema = NAME }
  if not first then return nil, why, code end
  local second
  second, why, code = ctx:elicit { key = "step2", message = "Step 2: What is your favorite color?",
    schema = object({ color = { type = "string" } }, { "color" }) }
  if not second then return nil, why, code end
  return json { first.content, second.content }
end)
tool("test_input_required_result_capabilities", nil, function(_, ctx)
  local questions = {}
  if ctx.client.elicit then questions.user_name = { elicit = { message = "What is your name?", schema = NAME } } end
  if ctx.client.sample then questions.greeting = { sample = { prompt = "Generate a greeting" } } end
  if ctx.client.roots then questions.client_roots = { roots = true } end
  if not next(questions) then return "nothing can be asked" end
  local answers, why, code = ctx:ask(questions)
  if not answers then return nil, why, code end
  return json(answers)
end)

tool("test_trigger_tool_change", nil, function() orch.mcp.changed { tools = true } return "changed" end)
tool("test_trigger_prompt_change", nil, function() orch.mcp.changed { prompts = true } return "changed" end)

-- ---- tasks

local TASK = { task = "optional", timeout = "5m" }
tool("greet", object({ name = { type = "string" } }), function(args) return ("Hello, %s!"):format(args.name or "nobody") end)
tool("slow_compute", object({ seconds = { type = "number" }, label = { type = "string" } }), function(args)
  orch.sleep(args.seconds or 0)
  return ("Computed %s"):format(args.label or "it")
end, TASK)
tool("failing_job", nil, function()
  orch.sleep(1)
  return { text = "This job always fails", is_error = true }
end, { task = "required" })
tool("protocol_error_job", nil, function() return nil, "This job ends in a protocol error", -32603 end, TASK)
tool("confirm_delete", object({ filename = { type = "string" } }), function(args, ctx)
  local answer, why, code = ctx:elicit { message = ("Delete %s?"):format(args.filename or "it"), schema = object({ confirm = { type = "boolean" } }, { "confirm" }) }
  if not answer then return nil, why, code end
  return answer.action == "accept" and answer.content.confirm and "Deleted" or "Kept"
end, TASK)
tool("multi_input", nil, function(_, ctx)
  local answers, why, code = ctx:ask { first = { elicit = { message = "First?", schema = NAME } }, second = { elicit = { message = "Second?", schema = NAME } } }
  if not answers then return nil, why, code end
  return json(answers)
end, TASK)
tool("test_tool_with_task", nil, function(_, ctx)
  local answer, why, code = ctx:elicit { key = "user_name", message = "What is your name?", schema = NAME }
  if not answer then return nil, why, code end
  local ok
  ok, why, code = ctx:task()
  if not ok then return nil, why, code end
  orch.sleep(0.2)
  return ("Hello, %s!"):format(answer.content and answer.content.name or "nobody")
end)

-- ---- resources, prompts

local resources = {
  { uri = "test://static-text", name = "Static text", description = "A static text resource", mimeType = "text/plain",
    text = "This is the content of the static text resource." },
  { uri = "test://static-binary", name = "Static binary", description = "A static binary resource", mimeType = "image/png", blob = PNG },
  { uri = "test://watched-resource", name = "Watched resource", description = "A resource that changes", mimeType = "text/plain",
    read = function() return ("Watched resource content at %.3f"):format(orch.now()) end },
}
local templates = { { uri_template = "test://template/{id}/data", name = "Template", description = "A template", mimeType = "application/json",
  read = function(_, _, v) return json { id = v.id, templateTest = true, data = "Data for ID: " .. v.id } end } }

local function user(item) return { role = "user", content = item } end
local prompts = {
  { name = "test_simple_prompt", description = "A simple prompt", get = function() return "This is a simple prompt for testing." end },
  { name = "test_prompt_with_arguments", description = "A prompt with arguments",
    arguments = { { name = "arg1", description = "First", required = true }, { name = "arg2", description = "Second", required = true } },
    get = function(a) return ("Prompt with arguments: arg1='%s', arg2='%s'"):format(a.arg1, a.arg2) end },
  { name = "test_prompt_with_embedded_resource", description = "A prompt with an embedded resource",
    arguments = { { name = "resourceUri", description = "URI", required = true } },
    get = function(a)
      return { user { type = "resource", resource = { uri = a.resourceUri, mimeType = "text/plain", text = "Embedded resource content for testing." } },
        user(text "Please process the embedded resource above.") }
    end },
  { name = "test_prompt_with_image", description = "A prompt with an image", get = function()
    return { user { type = "image", data = PNG, mimeType = "image/png" }, user(text "Please analyze the image above.") }
  end },
  { name = "test_input_required_result_prompt", description = "A prompt that needs input", get = function(_, ctx)
    local answer, why, code = ctx:elicit { key = "user_context", message = "What context should the prompt use?",
      schema = object({ context = { type = "string" } }, { "context" }) }
    if not answer then return nil, why, code end
    return "Context: " .. (answer.content and answer.content.context or "none")
  end },
}

local function complete(_, argument)
  local out = {}
  for _, word in ipairs { "paris", "park", "party" } do
    if word:sub(1, #argument.value) == argument.value then out[#out + 1] = word end
  end
  return out
end

local status, why = orch.mcp.serve { transport = "http", listen = listen, token = token, name = "orch-conformance", version = orch.version,
  instructions = "The fixtures of the MCP conformance suite.", tools = tools, resources = resources, resource_templates = templates,
  prompts = prompts, complete = complete }
if not status then error(why, 0) end
return status
