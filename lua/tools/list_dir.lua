-- Lists a folder of the workspace.
local MAX = 2000

return {
  name = "list_dir",
  description = "List a folder of the workspace: name, type (file, directory, link, other) and size of each entry, at most "
    .. MAX .. ". Paths are relative to the workspace; nothing outside can be listed.",
  input = {
    type = "object",
    properties = { path = { type = "string", description = "Folder in the workspace, default all of it", maxLength = 4096 } },
    additionalProperties = false,
  },
  annotations = { title = "List a folder", readOnlyHint = true, openWorldHint = false },
  timeout = "10s",
  run = function(args, ctx)
    local path = args.path and args.path ~= "" and args.path or "."
    local entries, err, code = ctx:list_dir(path)
    if not entries then return nil, err, code end
    table.sort(entries, function(a, b) return a.name < b.name end)
    local lines = {}
    for i = 1, math.min(#entries, MAX) do
      local e = entries[i]
      lines[i] = e.type == "file" and ("%s  %d"):format(e.name, e.size) or e.name .. (e.type == "directory" and "/" or "  (" .. e.type .. ")")
    end
    if #entries > MAX then lines[MAX + 1] = ("[%d more]"):format(#entries - MAX) end
    return { text = lines[1] and table.concat(lines, "\n") or "[empty folder]" }
  end,
}
