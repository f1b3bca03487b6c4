-- The built-in configuration: used when no other is found (orch help config). It allows run_command in
-- a microVM without a network and denies everything else. Copy it, or run `orch init`, to change it.
return {
  policies = "policies",
}
