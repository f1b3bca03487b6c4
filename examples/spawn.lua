-- Spawns microVMs and runs commands in them, all at once: orch examples/spawn.lua [HOW-MANY]
-- A trusted script: it has the whole API. print goes to the log on stderr, io.write to stdout.
local orch = require "orch"

local count = tonumber(arg[1] or 3)

-- A task of its own: what waits in it (spawn, exec) lets the others go on.
local function work(n)
  local vm, why, code = orch.vm.spawn { name = "spawn.lua " .. n }
  if not vm then return nil, why, code end
  vm:write_file("/tmp/input", ("line\n"):rep(n))
  local r
  r, why, code =
    vm:exec({ "sh", "-c", "cat /proc/sys/kernel/random/boot_id; wc -l < /tmp/input; id -u" }, { timeout = "10s" })
  local report = r and { id = vm.id, isolation = vm.isolation, spawn_ms = vm.spawn_ms, result = r }
  vm:close()
  return report, why, code
end

local started, tasks = orch.now(), {}
for n = 1, count do tasks[n] = orch.task.spawn(work, n) end

for n = 1, count do
  local report, why, code = tasks[n]:join()
  if not report then
    io.stderr:write(("microVM %d: %s (%s)\n"):format(n, why, code))
    return 1
  end
  local boot_id, lines, uid = report.result.stdout:match("^(%S+)%s+(%d+)%s+(%d+)")
  io.write(("%s  %s  spawned in %.0f ms, command %d ms: boot %s, %s lines, uid %s\n"):format(
    report.id, report.isolation,
    report.spawn_ms, report.result.ms, boot_id, lines, uid))
end
io.write(("%d microVMs in %.2f s\n"):format(count, orch.now() - started))
return 0
