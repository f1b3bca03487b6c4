-- A tool that reads files of the workspace and says how far it is. One file, one tool; to serve it, name
-- its folder in orchestrator.lua (tools = { "examples/tools" }) and allow it in policies/tools.lua:
--   { tool = "word_count", action = "allow" }
local function words_in(text)
  local n = 0
  for _ in text:gmatch("%S+") do n = n + 1 end
  return n
end

return {
  name = "word_count",
  description = "Counts the words of a file of the workspace, or of each file directly in a folder of it",
  input = {
    type = "object",
    properties = {
      path = { type = "string", description = "Relative to the workspace", minLength = 1, maxLength = 4096 },
    },
    required = { "path" },
    additionalProperties = false,
  },
  output = {
    type = "object",
    properties = {
      total = { type = "integer" }, files = { type = "object", additionalProperties = { type = "integer" } },
    },
    required = { "total", "files" },
  },
  annotations = { readOnlyHint = true },
  timeout = "30s",
  run = function(args, ctx)
    -- A path that leads out of the workspace fails here, symlinks included.
    local names, prefix = { args.path }, ""
    local entries = ctx:list_dir(args.path)
    if entries then
      names, prefix = {}, args.path:gsub("/*$", "/")
      for _, entry in ipairs(entries) do
        if entry.type == "file" then names[#names + 1] = entry.name end
      end
      table.sort(names)
    end
    local total, files, lines = 0, {}, {}
    for i, name in ipairs(names) do
      local text, why = ctx:read_file(prefix .. name)
      if not text then return nil, why end
      files[name] = words_in(text)
      total = total + files[name]
      lines[i] = ("%7d %s"):format(files[name], name)
      ctx:progress(i, #names, name)
    end
    if #names ~= 1 then lines[#lines + 1] = ("%7d total"):format(total) end
    return { text = table.concat(lines, "\n"), structured = { total = total, files = files } }
  end,
}
