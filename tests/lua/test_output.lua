-- ctx:output: what a model is told of a program's end, where no microVM can be made to do it.
local t = require "tap"
local output = require "output"

local function result(fields)
  local r = { status = 0, stdout = "", stderr = "", truncated = false, timed_out = false, ms = 12 }
  for k, v in pairs(fields) do r[k] = v end
  if r.signal then r.status = nil end
  return r
end

local CASES = {
  { { timed_out = true, signal = 9, limit = "60 s: vm.timeout" }, "[ended after 60 s: vm.timeout]" },
  { { timed_out = true, signal = 15, limit = "0.5 s: the argument timeout", stdout = "begun" },
    "begun\n[ended after 0.5 s: the argument timeout]" },
  { { timed_out = true, capped = true, limit = "60 s: vm.timeout" }, "[ended after 60 s: vm.timeout]" },
  { { capped = true, limit = "60 s: vm.timeout", status = 3 }, "[exit status 3]\n[timeout capped at 60 s: vm.timeout]" },
  { { out_of_memory = true, signal = 9, limit = "256 MiB: vm.memory", stdout = "begun\n" },
    "begun\n[killed: no memory left of 256 MiB: vm.memory]" },
  { { signal = 64 }, "[killed by signal 64 (?)]" },
  { { signal = 31 }, "[killed by signal 31 (SIGSYS)]" },
  { { stdout = "a", stderr = "bcd", truncated = true }, "a\n[stderr]\nbcd\n[cut: stderr after 3 bytes, the rest was dropped]" },
  { { stdout = "abc", truncated = true, status = 3 }, "abc\n[cut: stdout after 3 bytes, the rest was dropped]\n[exit status 3]" },
  { { stdout = "\n" }, "\n" },
}

t.test("every end has its words", function()
  for _, case in ipairs(CASES) do t.eq(output.result(nil, result(case[1])), { text = case[2], is_error = false }) end
end)

t.test("a microVM that failed is an error, with what was written until then", function()
  t.eq({ output.result(nil, nil, "gone", "closed") }, { nil, "gone", "closed" })
  t.eq({ output.result(nil, nil, "gone", "closed", { stdout = "", stderr = "" }) }, { nil, "gone", "closed" })
  t.eq({ output.result(nil, nil, "gone", "closed", { stdout = "a\n", stderr = "b\n" }) },
    { nil, "gone\n[output until then]\na\n[stderr]\nb\n", "closed" })
end)

return t.done()
