-- ctx:output: what a program in a microVM wrote and how it ended, as a tool's result. It is text alone: of a result
-- that has a structured part some clients show their model nothing else.
local output = {}

local SIGNALS = {}
for name in ("HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU "
  .. "URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"):gmatch("%S+") do
  SIGNALS[#SIGNALS + 1] = "SIG" .. name
end

-- Two texts, the second at the beginning of a line.
local function add(text, more)
  return text .. ((text == "" or text:sub(-1) == "\n") and "" or "\n") .. more
end

local function streams(r)
  return r.stderr == "" and r.stdout or add(r.stdout, "[stderr]\n" .. r.stderr)
end

-- One stream at least is as long as a stream may be; a shorter one is whole.
local function cut(r)
  local most = math.max(#r.stdout, #r.stderr)
  local which = #r.stdout < most and "stderr" or #r.stderr < most and "stdout" or "stdout and stderr"
  return ("[cut: %s after %d bytes, the rest was dropped]"):format(which, most)
end

-- Takes what vm:exec returned. Any end of the program is an answer; an error is only that it could not be started, or
-- that the microVM failed.
function output.result(_, r, err, code, so_far)
  if not r then
    local text = so_far and streams(so_far) or ""
    return nil, text == "" and err or add(err, "[output until then]\n" .. text), code
  end
  local text = streams(r)
  if r.truncated then text = add(text, cut(r)) end
  if r.out_of_memory then
    text = add(text, ("[killed: no memory left of %s]"):format(r.limit))
  elseif r.timed_out then
    text = add(text, ("[ended after %s]"):format(r.limit))
  elseif r.signal then
    text = add(text, ("[killed by signal %d (%s)]"):format(r.signal, SIGNALS[r.signal] or "?"))
  elseif r.status ~= 0 then
    text = add(text, ("[exit status %d]"):format(r.status))
  end
  if r.capped and not r.timed_out and not r.out_of_memory then text = add(text, ("[timeout capped at %s]"):format(r.limit)) end
  return { text = text == "" and "[no output]" or text, is_error = r.failed ~= nil }
end

return output
