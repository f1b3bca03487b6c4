-- OAuth for the MCP client, as the specification's authorization chapter has it: the server's
-- metadata says who issues tokens, the issuer's metadata says how, a person (or, with `follow`,
-- nobody) agrees, and the token is bound to this one server. Options (connect{ auth = … }):
--   client_id, client_secret     registered beforehand, with `issuer` at that one alone
--   client_metadata_url          where the client's metadata document is (a client_id by itself)
--   redirect_uri                 where the answer comes to; default http://127.0.0.1/callback
--   authorize = fn(url)          shows the URL to a person, returns the URL that the answer came to
--   follow = true                instead: asks the URL itself; for servers that agree at once
--   scope                        asked for when the server names none
--   grant = "client_credentials" no person: the client itself, by client_secret or private_key
--                                (PEM, ES256)
--   grant = "jwt_bearer"         no person: assertion (a JWT, or fn(issuer, resource) → JWT) names
--                                a workload
--   grant = "enterprise"         the same, with a grant that the identity provider gives for
--                                id_token: idp_token_endpoint, idp_client_id
--   dpop = true                  tokens bound to a key of this process (RFC 9449), where the issuer
--                                knows that
--   keep = false                 do not store tokens and registrations in the state directory
-- Tokens are written to the state directory (0600), never to a log nor into a message.
local orch = require "orch"
local http = require "http"
local crypto = require "orch.crypto"
local M = {}

local Auth = {}
Auth.__index = Auth
local GRANTS = {} -- those without a person

-- How often one request may lead to a new authorization, and how long a step may take.
local ATTEMPTS, STEP_S, ASSERTION_S = 3, 20, 300

local function b64(s) return crypto.base64(s, true) end

local function escape(s)
  return (tostring(s):gsub("[^%w._~-]", function(c) return ("%%%02X"):format(c:byte()) end))
end

local function unescape(s)
  return (s:gsub("+", " "):gsub("%%(%x%x)", function(hex)
    return string.char(tonumber(hex, 16))
  end))
end

local function form(fields)
  local out = {}
  for k, v in pairs(fields) do out[#out + 1] = escape(k) .. "=" .. escape(v) end
  table.sort(out)
  return table.concat(out, "&")
end

local function split(url)
  local origin, path = url:match("^(https?://[^/?#]+)([^?#]*)")
  return origin and origin:lower(), path
end

local function has(list, value)
  for _, v in ipairs(type(list) == "table" and list or {}) do
    if v == value then return true end
  end
  return false
end

local function loopback(url)
  local host = url:match("^http://([^/?#]+)")
  host = host and host:gsub(":%d+$", "")
  return host == "localhost" or host == "127.0.0.1" or host == "[::1]"
end

-- Credentials travel encrypted, or stay on this machine; and a server elsewhere sends nobody to
-- this one.
local function secure(self, url)
  if type(url) ~= "string" then return false end
  return url:find("^https://[^/?#@]+") ~= nil or (loopback(self.url) and loopback(url))
end

-- The parameters of the Bearer or DPoP challenge in a WWW-Authenticate header.
function M.challenge(value)
  local out = {}
  local lower = (value or ""):lower()
  if not lower:find("bearer", 1, true) and not lower:find("dpop", 1, true) then return out end
  for k, v in value:gmatch('([%w_-]+)%s*=%s*"([^"]*)"') do out[k:lower()] = out[k:lower()] or v end
  for k, v in value:gmatch("([%w_-]+)=([^%s\",]+)") do out[k:lower()] = out[k:lower()] or v end
  return out
end

local function text_of(v) return type(v) == "string" and v or nil end

local function words(s)
  local list = {}
  for w in tostring(s or ""):gmatch("%S+") do list[#list + 1] = w end
  return list
end

-- Each word once, in order of appearance.
local function union(...)
  local out = {}
  for _, s in ipairs { ... } do
    for _, w in ipairs(words(s)) do
      if not has(out, w) then out[#out + 1] = w end
    end
  end
  return table.concat(out, " ")
end

-- ---- what is kept between runs

local function store_path(self)
  local paths = require("orch.internal").paths()
  return paths.state .. "/oauth", b64(crypto.sha256(self.url)) .. ".json"
end

local function load(self)
  if self.o.keep == false then return end
  local dir, name = store_path(self)
  local text = orch.fs.read(dir .. "/" .. name)
  local kept = text and orch.json.decode(text)
  if type(kept) == "table" then self.tokens, self.clients = kept.tokens, kept.clients or {} end
end

local function save(self)
  -- A bound token is of no use without its key, which stays here.
  if self.o.keep == false or self.o.dpop then return end
  local dir, name = store_path(self)
  local ok, why = orch.fs.mkdir(dir, { mode = 448 })
  if ok then
    local text = orch.json.encode { url = self.url, tokens = self.tokens, clients = self.clients }
    ok, why = orch.fs.write(dir .. "/" .. name, text, { mode = 384 })
  end
  if not ok then orch.log.warn("mcp: tokens cannot be kept: " .. tostring(why)) end
end

function M.new(url, o, timeout)
  if o.grant ~= nil and not GRANTS[o.grant] then
    error("auth.grant is unknown: " .. tostring(o.grant), 0)
  end
  local self = setmetatable({ url = url, o = o, clients = {},
    step_s = http.seconds(timeout, STEP_S) }, Auth)
  load(self)
  return self
end

function Auth:token() return self.tokens and self.tokens.access_token end

local function jwt(key, header, claims)
  header.alg = "ES256"
  claims.iat, claims.jti = os.time(), b64(crypto.random(16))
  local text = b64(orch.json.encode(header)) .. "." .. b64(orch.json.encode(claims))
  return text .. "." .. b64(assert(key:sign(text)))
end

-- Proves possession of the key for one request (RFC 9449, section 4.2).
local function proof(self, method, url, nonce, access_token)
  local point = assert(self.key:public())
  local jwk = { kty = "EC", crv = "P-256", x = b64(point:sub(1, 32)), y = b64(point:sub(33)) }
  return jwt(self.key, { typ = "dpop+jwt", jwk = jwk }, { htm = method, htu = url:match("^[^?#]*"),
    nonce = nonce,
    ath = access_token and b64(crypto.sha256(access_token)) or nil })
end

-- Adds what authorizes a request. Must not wait.
function Auth:sign(headers, method, url)
  local t = self.tokens
  if not t then return headers end
  headers.Authorization = (t.dpop and "DPoP " or "Bearer ") .. t.access_token
  if t.dpop then headers.DPoP = proof(self, method, url, self.nonce, t.access_token) end
  return headers
end

-- ---- discovery

local function fetch(self, url)
  if not secure(self, url) then return nil, "it is not https" end
  local r, why, code = http.request { url = url, headers = { Accept = "application/json" },
    timeout = self.step_s }
  if not r then return nil, why, code end
  local doc = r.status == 200 and orch.json.decode(r.body)
  if type(doc) ~= "table" then return nil, "HTTP " .. r.status end
  return doc
end

-- The metadata of the protected resource: where the challenge says, else at the well-known places.
local function resource_metadata(self, said)
  local origin, path = split(self.url)
  path = path:gsub("/$", "")
  local places = { said }
  if not said then
    if path ~= "" then places[1] = origin .. "/.well-known/oauth-protected-resource" .. path end
    places[#places + 1] = origin .. "/.well-known/oauth-protected-resource"
  end
  for _, place in ipairs(places) do
    local doc = fetch(self, place)
    if doc then
      local r_origin, r_path = split(type(doc.resource) == "string" and doc.resource or "")
      r_path = r_path and r_path:gsub("/$", "")
      local below = path:sub(1, #(r_path or "") + 1) == (r_path or "") .. "/"
      if r_origin ~= origin or (r_path ~= "" and path ~= r_path and not below) then
        return nil, ("the metadata at %s is of another resource, %s"):format(place,
          tostring(doc.resource))
      end
      return doc
    end
  end
  if said then return nil, "no resource metadata at " .. said end
  return false
end

-- The issuer's metadata, which must name exactly that issuer.
local function issuer_metadata(self, issuer)
  local origin, path = split(issuer)
  if not origin or not secure(self, issuer) then
    return nil, "the authorization server " .. tostring(issuer) .. " is not https"
  end
  path = path:gsub("/$", "")
  local places = { origin .. "/.well-known/oauth-authorization-server" .. path,
    origin .. "/.well-known/openid-configuration" .. path }
  if path ~= "" then places[3] = origin .. path .. "/.well-known/openid-configuration" end
  for _, place in ipairs(places) do
    local doc = fetch(self, place)
    if doc then
      if doc.issuer ~= issuer then
        return nil, ("the metadata at %s is of issuer %s, not of %s"):format(place,
          tostring(doc.issuer), issuer)
      end
      for _, key in ipairs { "authorization_endpoint", "token_endpoint",
        "registration_endpoint" } do
        if doc[key] ~= nil and not secure(self, doc[key]) then
          return nil, ("the %s of %s is not https"):format(key, issuer)
        end
      end
      return doc
    end
  end
  return false
end

-- Servers of 2025-03-26 are their own authorization server, with or without metadata.
local function own_issuer(self)
  local origin = split(self.url)
  local doc, why = issuer_metadata(self, origin)
  if doc == nil then return nil, why end
  return doc or { issuer = origin, authorization_endpoint = origin .. "/authorize",
    token_endpoint = origin .. "/token",
    registration_endpoint = origin .. "/register", code_challenge_methods_supported = { "S256" } }
end

local function discover(self, challenge)
  local resource, why = resource_metadata(self, challenge.resource_metadata)
  if resource == nil then return nil, why end
  if not resource then
    local server
    server, why = own_issuer(self)
    return server, why, {}
  end
  local servers = resource.authorization_servers
  local issuer = type(servers) == "table" and servers[1]
  if type(issuer) ~= "string" then return nil, "its metadata names no authorization server" end
  local server
  server, why = issuer_metadata(self, issuer)
  if not server then
    return nil, why or "the authorization server " .. issuer .. " has no metadata"
  end
  return server, nil, resource
end

-- ---- who the client is

local post
function post(self, url, body, headers, again)
  if not secure(self, url) then
    return nil, "an endpoint of the authorization server is missing or not https"
  end
  local all = { ["Content-Type"] = "application/x-www-form-urlencoded",
    Accept = "application/json" }
  for k, v in pairs(headers or {}) do all[k] = v end
  local r, why, code = http.request { url = url, method = "POST", headers = all, body = body,
    timeout = self.step_s }
  if not r then return nil, why, code end
  local doc = orch.json.decode(r.body)
  doc = type(doc) == "table" and doc or {}
  if doc.error == "use_dpop_nonce" and all.DPoP and r.headers["dpop-nonce"] and not again then
    all.DPoP = proof(self, "POST", url, r.headers["dpop-nonce"])
    return post(self, url, body, all, true)
  end
  if r.status < 200 or r.status > 299 then
    return nil, ("%s: HTTP %d %s %s"):format(url, r.status, tostring(doc.error or ""),
      tostring(doc.error_description or "")), "denied", doc, r
  end
  return doc, nil, nil, nil, r
end

local function redirect_uri(self) return self.o.redirect_uri or "http://127.0.0.1/callback" end

-- Registered beforehand, known from before, by its metadata document, or registered now.
local function client_of(self, server, scope)
  local o = self.o
  if o.client_id and (not o.issuer or o.issuer == server.issuer) then
    return { client_id = o.client_id, client_secret = o.client_secret,
      method = o.token_endpoint_auth_method }
  elseif self.clients[server.issuer] then
    return self.clients[server.issuer]
  elseif o.client_metadata_url and server.client_id_metadata_document_supported == true then
    return { client_id = o.client_metadata_url, method = "none" }
  elseif not server.registration_endpoint then
    return nil, "the authorization server registers no clients; give auth.client_id"
  end
  local supported, method = server.token_endpoint_auth_methods_supported, "client_secret_basic"
  for _, m in ipairs { "none", "client_secret_post", "client_secret_basic" } do
    if has(supported, m) then method = m end
  end
  local doc, why, code = post(self, server.registration_endpoint, orch.json.encode {
    client_name = "orch", application_type = "native", redirect_uris = { redirect_uri(self) },
    grant_types = { "authorization_code", "refresh_token" }, response_types = { "code" },
    token_endpoint_auth_method = method,
    scope = scope ~= "" and scope or nil }, { ["Content-Type"] = "application/json" })
  if not doc then return nil, "registration failed: " .. why, code end
  if type(doc.client_id) ~= "string" then return nil, "registration gave no client_id" end
  local client = { client_id = doc.client_id, client_secret = text_of(doc.client_secret),
    method = text_of(doc.token_endpoint_auth_method) }
  self.clients[server.issuer] = client
  return client
end

-- Adds the client's credentials to a request for a token, as its issuer wants them.
local function authenticate(self, server, client, fields, headers)
  local supported, method = server.token_endpoint_auth_methods_supported, client.method
  if self.o.private_key then
    local key, why = crypto.es256(self.o.private_key)
    if not key then return nil, why end
    fields.client_assertion_type = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    fields.client_assertion = jwt(key, {}, { iss = client.client_id, sub = client.client_id,
      aud = server.issuer, exp = os.time() + ASSERTION_S })
    return true
  end
  if not client.client_secret then
    method = "none"
  elseif not method or (supported and not has(supported, method)) then
    method = (not supported or has(supported, "client_secret_basic")) and "client_secret_basic"
      or has(supported, "client_secret_post") and "client_secret_post" or "none"
  end
  if method == "client_secret_basic" then
    headers.Authorization = "Basic "
      .. crypto.base64(escape(client.client_id) .. ":" .. escape(client.client_secret))
    return true
  end
  fields.client_id = client.client_id
  if method == "client_secret_post" then fields.client_secret = client.client_secret end
  return true
end

local function token(self, server, client, fields, scope)
  local headers = {}
  fields.resource = self.resource
  local ok, wrong = authenticate(self, server, client, fields, headers)
  if not ok then return nil, wrong end
  local bound = server.dpop_signing_alg_values_supported
  if self.o.dpop and type(bound) == "table" and has(bound, "ES256") then
    self.key = self.key or assert(crypto.es256())
    headers.DPoP = proof(self, "POST", server.token_endpoint)
  end
  local doc, why, code = post(self, server.token_endpoint, form(fields), headers)
  if not doc then return nil, "no token: " .. why, code end
  local kind = tostring(doc.token_type or "Bearer"):lower()
  local known = kind == "bearer" or (kind == "dpop" and headers.DPoP)
  if type(doc.access_token) ~= "string" or doc.access_token:find("[%c ]") or not known then
    return nil, "the authorization server's answer has no token of a kind that was asked for"
  end
  local old = self.tokens
  self.tokens = { access_token = doc.access_token, issuer = server.issuer,
    client_id = client.client_id, dpop = kind == "dpop" or nil,
    refresh_token = text_of(doc.refresh_token)
      or old and old.issuer == server.issuer and old.refresh_token or nil,
    scope = type(doc.scope) == "string" and doc.scope or scope, asked = scope,
    till = tonumber(doc.expires_in) and os.time() + tonumber(doc.expires_in) or nil }
  save(self)
  return true
end

-- ---- the person's agreement

local function follow(self, url)
  local r, why, code = http.request { url = url, timeout = self.step_s }
  if not r then return nil, why, code end
  local location = r.headers.location
  if r.status < 300 or r.status > 399 or not location then
    return nil, ("the authorization server wants a person (HTTP %d); give auth.authorize")
      :format(r.status)
  end
  return location
end

local function parameters(url)
  local out = {}
  for k, v in (url:match("%?([^#]*)") or ""):gmatch("([^&=]+)=([^&]*)") do
    out[unescape(k)] = unescape(v)
  end
  return out
end

local function authorize(self, server, client, scope)
  local methods = server.code_challenge_methods_supported
  if methods == nil or not has(methods, "S256") then
    return nil, "the authorization server " .. server.issuer .. " does not offer PKCE with S256"
  elseif not secure(self, server.authorization_endpoint) then
    return nil, "the authorization server has no authorization endpoint"
  end
  local verifier, state = b64(crypto.random(48)), b64(crypto.random(16))
  local fields = { response_type = "code", client_id = client.client_id,
    redirect_uri = redirect_uri(self), state = state,
    code_challenge = b64(crypto.sha256(verifier)), code_challenge_method = "S256",
    resource = self.resource, scope = scope ~= "" and scope or nil,
    prompt = has(words(scope), "offline_access") and "consent" or nil }
  local endpoint = server.authorization_endpoint
  local url = endpoint .. (endpoint:find("?", 1, true) and "&" or "?") .. form(fields)
  local back, why, code
  if self.o.authorize then
    back, why, code = self.o.authorize(url)
  elseif self.o.follow then
    back, why, code = follow(self, url)
  else
    return nil, "it wants a person's agreement; give auth.authorize", "denied"
  end
  if type(back) ~= "string" then
    return nil, why or "the authorization was not given", code or "denied"
  end
  local got = parameters(back)
  if got.state ~= state then
    return nil, "the authorization's answer is to another question (state)", "denied"
  end
  -- The issuer is compared before anything else in the answer is believed, byte for byte.
  if got.iss ~= nil and got.iss ~= server.issuer then
    return nil, ("the authorization's answer is from issuer %s, not from %s"):format(got.iss,
      server.issuer), "denied"
  elseif got.iss == nil and server.authorization_response_iss_parameter_supported == true then
    return nil, ("the authorization's answer lacks the issuer that %s promises")
      :format(server.issuer), "denied"
  elseif got.error then
    local more = got.error_description and ": " .. got.error_description or ""
    return nil, "authorization refused: " .. got.error .. more, "denied"
  elseif not got.code then
    return nil, "the authorization's answer has no code", "denied"
  end
  return token(self, server, client, { grant_type = "authorization_code", code = got.code,
    redirect_uri = redirect_uri(self),
    code_verifier = verifier }, scope)
end

-- ---- without a person

local JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
local TYPE = "urn:ietf:params:oauth:token-type:"

-- The identity provider's grant for this issuer and this server, in exchange for who the user is.
local function exchange(self, server)
  local o = self.o
  local doc, why, code = post(self, o.idp_token_endpoint, form {
    grant_type = "urn:ietf:params:oauth:grant-type:token-exchange",
    requested_token_type = TYPE .. "id-jag", subject_token = o.id_token,
    subject_token_type = TYPE .. "id_token",
    audience = server.issuer, resource = self.resource, client_id = o.idp_client_id })
  if not doc then return nil, "the identity provider gives no grant: " .. why, code end
  if type(doc.access_token) ~= "string" or doc.issued_token_type ~= TYPE .. "id-jag" then
    return nil, "the identity provider's answer has no grant"
  end
  return doc.access_token
end

-- A token for what the assertion says.
local function bear(self, server, client, assertion, scope)
  return token(self, server, client, { grant_type = JWT_BEARER, assertion = assertion,
    scope = scope ~= "" and scope or nil }, scope)
end

function GRANTS.client_credentials(self, server, client, scope)
  return token(self, server, client, { grant_type = "client_credentials",
    scope = scope ~= "" and scope or nil }, scope)
end

function GRANTS.jwt_bearer(self, server, client, scope)
  local assertion = self.o.assertion
  if type(assertion) == "function" then assertion = assertion(server.issuer, self.resource) end
  if type(assertion) ~= "string" then return nil, "auth.assertion gives no JWT" end
  return bear(self, server, client, assertion, scope)
end

function GRANTS.enterprise(self, server, client, scope)
  local assertion, why, code = exchange(self, server)
  if not assertion then return nil, why, code end
  return bear(self, server, client, assertion, scope)
end

-- What to ask for: what the challenge names, else what the resource supports, else what the options
-- say; on a step-up together with what was asked before; offline_access where the issuer knows it.
local function scope_of(self, challenge, resource, server)
  local scope = challenge.scope
  if not scope and type(resource.scopes_supported) == "table" then
    scope = table.concat(resource.scopes_supported, " ")
  end
  scope = scope or self.o.scope or ""
  if challenge.error == "insufficient_scope" and self.tokens then
    scope = union(self.tokens.asked, scope)
  end
  if not self.o.grant and has(server.scopes_supported, "offline_access") then
    scope = union(scope, "offline_access")
  end
  return scope
end

-- A request was answered 401 or 403, for the times-th time. true: try again, with the token that is
-- there now; false: not a matter of tokens; nil, message, code: nothing more can be done.
function Auth:challenged(status, headers, times)
  local challenge = M.challenge(headers["www-authenticate"])
  if status == 403 and challenge.error ~= "insufficient_scope" then return false end
  if times > ATTEMPTS then
    return nil, ("still refused (HTTP %d) after %d authorizations"):format(status, ATTEMPTS),
      "denied"
  end
  local nonce = challenge.error == "use_dpop_nonce" and headers["dpop-nonce"]
  if nonce and self.nonce ~= nonce then
    self.nonce = nonce
    return true
  end
  local server, why, resource = discover(self, challenge)
  if not server then return nil, why or "no authorization server is known", "denied" end
  self.resource = resource.resource or self.url -- as it names itself
  local old = self.tokens
  if old and old.issuer ~= server.issuer then
    old, self.tokens = nil, nil
  end
  local scope = scope_of(self, challenge, resource, server)
  if status == 403 and times > 1 and old and old.asked == scope then
    return nil, "its scope was granted and is still not enough: " .. scope, "denied"
  end
  local client, why2, code2 = client_of(self, server, scope)
  if not client then return nil, why2, code2 or "denied" end
  local refreshable = old and old.refresh_token and old.client_id == client.client_id
    and (times == 1 or not old.refreshed)
  if status == 401 and refreshable then
    if token(self, server, client, { grant_type = "refresh_token",
      refresh_token = old.refresh_token }, old.asked or scope) then
      self.tokens.refreshed = true
      return true
    end
    old.refresh_token = nil
  end
  local ok, why3, code3 = (GRANTS[self.o.grant] or authorize)(self, server, client, scope)
  if not ok then return nil, why3, code3 or "denied" end
  return true
end

return M
