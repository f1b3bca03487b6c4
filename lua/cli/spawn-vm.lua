local internal = require "orch.internal"
local cli = require "cli"

local options = { unpack(cli.VM_OPTIONS) }
options[#options + 1] = { "--json", nil, "print one JSON object" }

return cli.main("spawn-vm", {
  usage = "[-v] [options]",
  about = "Spawns a microVM, prints its id, backend, isolation and milliseconds, and destroys it. With -v: "
    .. "the phases of the start, in milliseconds since it was asked for. The first start on a machine "
    .. "builds image and template.",
  options = options,
  examples = { "orch spawn-vm", "orch spawn-vm -v --memory 512M" },
  status = "0 done, 5 isolation not available, 6 configuration, 2 usage",
  words = { 0, 0 },
  run = function(opts, _, _, name)
    local vm, why, code = cli.spawn(opts)
    if not vm then return cli.fail(name, why, code) end
    local phases = vm:phases()
    if opts.json then
      cli.json { id = vm.id, backend = vm.backend, isolation = vm.isolation,
        image = vm.image, spawn_ms = vm.spawn_ms, phases = phases }
    else
      cli.out(("%s  %s  %s  %.1f ms\n"):format(vm.id, vm.backend, vm.isolation, vm.spawn_ms))
      if internal.verbose() then
        local rows = {}
        for i, p in ipairs(phases) do rows[i] = { p.name, ("%8.1f ms"):format(p.ms) } end
        cli.columns(rows, "  ")
      end
    end
    vm:close()
    return 0
  end,
}, ...)
