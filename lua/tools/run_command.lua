-- Runs a shell command in a microVM that is made for this call and destroyed after it.
return {
  name = "run_command",
  description = "Run a shell command in a fresh, isolated microVM: Debian with git, curl, jq and python3, "
    .. "or, where that image is not built, Linux with busybox alone. Nothing of the host is visible and "
    .. "nothing is kept between calls. Returns standard output, standard error under a line [stderr], and the exit "
    .. "status where it is not 0.",
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
    return ctx:output(vm:exec({ "/bin/sh", "-c", args.command }, { stdin = args.stdin, timeout = args.timeout }))
  end,
}
