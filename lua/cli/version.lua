local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"

return cli.main("version", {
  usage = "[--json]",
  about = "Prints the version and what this orch was built with.",
  options = { { "--json", nil, "print one JSON object" } },
  words = { 0, 0 },
  run = function(opts)
    local paths, features = internal.paths(), {}
    for name in internal.features:gmatch("%S+") do features[#features + 1] = name end
    if opts.json then
      cli.json { version = orch.version, features = orch.json.array(features), lua = jit.version,
        prefix = internal.prefix, share = paths.share,
        launcher = paths.launcher, agent = paths.agent }
      return 0
    end
    cli.out("orch ", orch.version, "\n")
    cli.columns({ { "features", features[1] and table.concat(features, " ") or "none" }, { "lua", jit.version },
      { "files", paths.share },
      { "launcher", paths.launcher }, { "agent", paths.agent } })
    return 0
  end,
}, ...)
