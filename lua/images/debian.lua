-- The recipe of the image `debian`: Debian 12 with what an agent needs daily. Copy it for an image of your own,
-- and build that with: orch image build ./NAME.lua
return {
  name = "debian",
  suite = "bookworm",
  -- Beside Debian's essential packages (a shell, coreutils, grep, sed, tar …) and apt. Recommended ones are left out.
  packages = { "ca-certificates", "curl", "git", "jq", "python3" },
  -- What dpkg does not unpack.
  leave_out = {
    "/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*",
    "/usr/share/bug/*", "/usr/share/gitweb/*", "/usr/share/bash-completion/*", "/usr/share/zsh/*",
  },
  -- Written over what the packages brought: { path =, text =, mode = "0644" }.
  files = {},
  -- Run as root in the image when all is there, by /bin/sh -eu.
  commands = {
    -- All files have one time in the image, so Python must not compare it.
    "python3 -m compileall -q -f -j0 --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.11 || true",
  },
  -- Run once in the microVM that becomes the template, as uid 1000 and at most 20 s in all: every clone has in
  -- memory what they read. The first python3 of a clone takes a third of the time so.
  warm = { "python3 -c 'import json, re, subprocess'", "git --version", "echo {} | jq .", "curl --version", "ls /" },
}
