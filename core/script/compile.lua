-- Run by make: compiles orch's own Lua files ahead of time and prints them as a C table. Every start would
-- compile the same 60 kB again, a third of its time. luajit compile.lua FILE…
local function octal(c) return ("\\%03o"):format(c:byte()) end

io.write('#include "script/state.h"\n\nconst struct orch_compiled orch_compiled[] = {\n')
for _, path in ipairs(arg) do
  local text = assert(io.open(path, "rb")):read("*a")
  local sum = assert(io.popen("sha256sum " .. path)):read(64)
  local code = string.dump(assert(loadstring(text, "@" .. path))) -- with lines and names, for messages
  io.write(('    { "%s", "%s",\n      %d },\n'):format(sum, (code:gsub("[%z\1-\255]", octal)), #code))
end
io.write("    { 0 }\n};\n")
