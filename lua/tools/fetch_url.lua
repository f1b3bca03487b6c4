-- Fetches a URL from this host, held to the network policy of the rules that allow the call.
local MAX_TEXT = 262144

local function is_text(kind, body)
  if body:find("\0", 1, true) then return false end
  return kind == "" or kind:find("^text/") or kind:find("json") or kind:find("xml") or kind:find("javascript") or kind:find("urlencoded")
end

return {
  name = "fetch_url",
  description = "Fetch a http or https URL (GET) and return its text, at most 256 KiB: go on with offset. The server must be one "
    .. "that the network policy allows, by its IPv4 address; redirects are followed within that policy.",
  input = {
    type = "object",
    properties = {
      url = { type = "string", description = "http://ADDRESS[:PORT]/… or https://…", minLength = 1, maxLength = 8192 },
      offset = { type = "integer", description = "First byte of the text to return, counted from 0", minimum = 0,
        maximum = 16777216 },
      timeout = { type = "number", description = "Seconds for all of it", exclusiveMinimum = 0, maximum = 60 },
    },
    required = { "url" },
    additionalProperties = false,
  },
  annotations = { title = "Fetch a URL", readOnlyHint = true, openWorldHint = true },
  timeout = "65s",
  run = function(args, ctx)
    local r, err, code = ctx:http { url = args.url, timeout = args.timeout or 30, headers = { Accept = "text/*, application/json, */*;q=0.1" } }
    if not r then return nil, err, code end
    local kind = (r.headers["content-type"] or ""):lower():match("^[^;]*")
    local from, notes = args.offset or 0, {}
    local text = r.body:sub(from + 1, from + MAX_TEXT)
    if not is_text(kind, r.body) then
      text = ("[%s, %d bytes: not text]"):format(kind ~= "" and kind or "no type", #r.body)
    elseif text == "" then
      text = r.body == "" and "[empty]" or ("[no more: it has %d bytes]"):format(#r.body)
    elseif from + #text < #r.body then
      text = text:gsub("[\192-\247][\128-\191]*$", "") -- a character goes as a whole
      notes[1] = ("[more: offset %d of %d]"):format(from + #text, #r.body)
    end
    if r.url ~= args.url then notes[#notes + 1] = "[redirected to " .. r.url .. "]" end
    if r.status ~= 200 then notes[#notes + 1] = ("[HTTP status %d]"):format(r.status) end
    if notes[1] and text:sub(-1) ~= "\n" then text = text .. "\n" end
    return { text = text .. table.concat(notes, "\n") } -- a page that is missing is an answer too
  end,
}
