local internal = require "orch.internal"
local cli = require "cli"

return cli.main("trust", {
  usage = "[--edits] [DIR]",
  about = "Accepts the configuration in DIR (default: the working directory), its policies and its tools as "
    .. "they are now: their SHA-256 is recorded, and what is new or changed later is not loaded until you "
    .. "say so again. Only a configuration that orch finds in the working directory needs it; look at the "
    .. "files before you trust them.",
  options = { { "--edits", nil, "accept later edits and new files too" } },
  examples = { "orch trust", "orch trust --edits ~/project" },
  status = "0 done, 3 refused below a process that orch started, 6 invalid, 2 usage",
  words = { 0, 1 },
  run = function(opts, words, _, name)
    local refused = cli.refuse_below(name)
    if refused then return refused end
    local paths = internal.paths()
    local file, why = paths.config, nil
    if words[1] then
      file, why = cli.find_config(words[1])
    elseif paths.origin ~= "--config" and paths.origin ~= "ORCH_CONFIG" then
      file, why = cli.find_config(paths.cwd)
    end
    if file then file, why = internal.use_config(file) end
    if not file then return cli.fail(name, why, 6) end
    local list, code
    list, why, code = internal.trust(opts.edits or false)
    if not list then return cli.fail(name, why, code) end
    for _, f in ipairs(list) do cli.out(f.sha256:sub(1, 16), "  ", cli.line(f.path), "\n") end
    cli.out(("%d files trusted%s\n"):format(#list, opts.edits and ", and later edits of this folder" or " as they are"))
    return 0
  end,
}, ...)
