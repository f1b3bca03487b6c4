local cli = require "cli"

return cli.main("check", {
  usage = "FILE…",
  about = "Compiles Lua files without running them and prints syntax errors with file:line. Policies and "
    .. "tools as a whole: orch policy check.",
  examples = { "orch check policies/*.lua lua/tools/*.lua" },
  status = "0 good, 6 a file has an error or cannot be read, 2 usage",
  words = { 1, 10000 },
  run = function(_, words)
    local status = 0
    for _, file in ipairs(words) do
      local f, why = io.open(file, "rb")
      local text = f and f:read("*a")
      if f then f:close() end
      -- What loading refuses, in its words.
      if text and text:sub(1, 1) == "\27" then
        f, why = nil, file .. ": bytecode is not accepted, only source text"
      elseif text and #text > 2 ^ 20 then
        f, why = nil, ("%s: %d bytes; a Lua file may have 1 MiB"):format(file, #text)
      elseif text then
        text = text:gsub("^#[^\n]*", "")
        f, why = loadstring(text, "@" .. file)
      end
      if not f or not text then
        status = 6
        cli.err(why or file .. ": cannot be read")
      end
    end
    if status == 0 then cli.out(("%d file%s: ok\n"):format(#words, #words == 1 and "" or "s")) end
    return status
  end,
}, ...)
