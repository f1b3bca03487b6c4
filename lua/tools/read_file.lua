-- Reads a text file of the workspace, in pieces of at most 256 KiB.
local MAX_BYTES = 262144

return {
  name = "read_file",
  description = "Read a text file of the workspace. Paths are relative to it; nothing outside can be read. Gives at most "
    .. "2000 lines and 256 KiB at once: go on with offset.",
  input = {
    type = "object",
    properties = {
      path = { type = "string", description = "Path in the workspace", minLength = 1, maxLength = 4096 },
      offset = { type = "integer", description = "First line, counted from 1", minimum = 1 },
      limit = { type = "integer", description = "How many lines", minimum = 1, maximum = 2000 },
    },
    required = { "path" },
    additionalProperties = false,
  },
  annotations = { title = "Read a file", readOnlyHint = true, openWorldHint = false },
  timeout = "10s",
  run = function(args, ctx)
    local text, err, code = ctx:read_file(args.path)
    if not text then return nil, err, code end
    if text:find("\0", 1, true) then return nil, args.path .. ": not a text file (" .. #text .. " bytes)" end
    if text == "" then return { text = "[empty file]" } end
    local first, last = args.offset or 1, (args.offset or 1) + (args.limit or 2000) - 1
    local line, at, from, to = 1, 1, nil, #text
    while at <= #text do
      if line == first then from = at end
      local nl = text:find("\n", at, true) or #text
      if from and (line == last or nl - from + 1 >= MAX_BYTES) then
        to = nl
        break
      end
      line, at = line + 1, nl + 1
    end
    if not from then return nil, ("%s: no line %d; it has %d"):format(args.path, first, line - 1) end
    local piece = text:sub(from, to)
    local cut = #piece > MAX_BYTES
    if cut then piece = piece:sub(1, MAX_BYTES) end
    if cut then piece = piece .. "\n[a line cut at 256 KiB]\n" end
    return { text = piece .. (to < #text and ("[more: offset %d]"):format(line + 1) or "") }
  end,
}
