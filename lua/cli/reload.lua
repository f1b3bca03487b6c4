local cli = require "cli"

return cli.main("reload", {
  usage = "[--pid N]",
  about = "Makes every running orch process of this user read its configuration, policies and tools again. "
    .. "Files that change are noticed without it. Where something is wrong, what was in force before "
    .. "stays.",
  options = { { "--pid", "N", "only this process", kind = "count" } },
  status = "0 done or none running, 3 refused below a process that orch started, "
    .. "6 something is wrong in the files, 2 usage",
  words = { 0, 0 },
  run = function(opts, _, _, name)
    local refused = cli.refuse_below(name)
    if refused then return refused end
    local answers, status = cli.control('{"op":"reload"}', opts.pid), 0
    for _, a in ipairs(answers) do
      if a.answer and a.answer.ok then
        cli.out(("%d: generation %s in force\n"):format(a.pid, a.answer.generation:sub(1, 12)))
      else
        status = a.refused and 3 or 6
        cli.err(("%d: %s"):format(a.pid, a.error or a.answer.error))
      end
    end
    if not answers[1] then
      cli.none_running(opts.pid)
    end
    return status
  end,
}, ...)
