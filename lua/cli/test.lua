local cli = require "cli"

-- TAP goes to stdout, not to the log.
function print(...)
  local out = { n = select("#", ...), ... }
  for i = 1, out.n do out[i] = tostring(out[i]) end
  io.stdout:write(table.concat(out, "\t"), "\n")
end

local path = package.path

-- Each file gets globals and modules of its own, `arg`, and modules beside it; what ends one (os.exit, an
-- error) does not end the others.
local function run_file(file)
  local chunk, why = loadfile(file)
  if not chunk then return 6, why end
  local exit, loaded = {}, {}
  for name in pairs(package.loaded) do loaded[name] = true end
  package.path = (file:match("^(.*)/") or ".") .. "/?.lua;" .. path
  local env = setmetatable({ arg = { [0] = file } }, { __index = _G })
  env._G = env
  env.os = setmetatable({ exit = function(status)
    exit.status = status == nil and 0 or type(status) == "boolean" and (status and 0 or 1) or status
    error(exit, 0)
  end }, { __index = os })
  setfenv(chunk, env)
  local ok, result = xpcall(chunk, function(e) return exit.status and exit or debug.traceback(tostring(e), 2) end)
  for name in pairs(package.loaded) do
    if not loaded[name] then package.loaded[name] = nil end
  end
  if exit.status then return exit.status end
  if not ok then return 1, result end
  return type(result) == "number" and result or 0
end

return cli.main("test", {
  usage = "FILE…",
  about = "Runs Lua test files inside the host, as trusted scripts with the whole API. They print TAP (or "
    .. "what they like); a test file fails by an error, or by a status other than 0 from return or "
    .. "os.exit.",
  examples = { "orch test tests/lua/test_schema.lua" },
  status = "0 all passed, 1 one failed, 6 one cannot be compiled, 2 usage",
  words = { 1, 10000 },
  run = function(_, words)
    local worst = 0
    for _, file in ipairs(words) do
      if words[2] then cli.out("# ", cli.line(file), "\n") end
      local status, why = run_file(file)
      io.stdout:flush()
      if why then cli.err(why) end
      if status ~= 0 and (worst == 0 or status == 6) then worst = status == 6 and 6 or 1 end
    end
    return worst
  end,
}, ...)
