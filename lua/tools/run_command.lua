-- Runs a shell command in a microVM that is made for this call and destroyed after it.
return {
  name = "run_command",
  description = "Run a shell command in a fresh, isolated microVM: Debian with git, curl, jq and python3, "
    .. "or, where that image is not built, Linux with busybox alone. Nothing of the host is visible and "
    .. "nothing is kept between calls. Returns standard output and error and the exit status.",
  input = {
    type = "object",
    properties = {
      command = { type = "string", description = "Command line for /bin/sh", minLength = 1, maxLength = 32768 },
      stdin = { type = "string", description = "Text for the command's standard input", maxLength = 1048576 },
      timeout = { type = "number", description = "Seconds after which the command is ended; never more than vm.timeout of the configuration",
        exclusiveMinimum = 0, maximum = 86400 },
    },
    required = { "command" },
    additionalProperties = false,
  },
  annotations = { title = "Run a command in a microVM", readOnlyHint = false, destructiveHint = false, openWorldHint = false },
  run = function(args, ctx)
    local vm, err, code = ctx:vm()
    if not vm then return nil, err, code end
    local r, so_far
    r, err, code, so_far = vm:exec({ "/bin/sh", "-c", args.command }, { stdin = args.stdin, timeout = args.timeout })
    if not r then return nil, so_far and err .. "\n" .. so_far.stdout .. so_far.stderr or err, code end
    local text = r.stdout .. r.stderr
    if r.truncated then text = text .. "\n[output cut at 1 MiB a stream]" end
    if r.limit then text = text .. "\n[" .. (r.timed_out and "ended: " or "timeout capped: ") .. r.limit .. "]" end
    return {
      text = text,
      structured = { status = r.status, signal = r.signal, timed_out = r.timed_out, truncated = r.truncated, ms = r.ms },
      is_error = r.status ~= 0,
    }
  end,
}
