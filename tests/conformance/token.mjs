// The suite knows no credentials; orch serves nobody without. Adds the token to what goes to the server under test.
import http from "node:http";
import { createRequire } from "node:module";
const token = "Bearer " + process.env.ORCH_TOKEN;
const fetched = globalThis.fetch;
globalThis.fetch = (input, init = {}) => {
  const headers = new Headers(init.headers ?? (input instanceof Request ? input.headers : undefined));
  if (!headers.has("authorization")) headers.set("authorization", token);
  return fetched(input, { ...init, headers });
};
// Some scenarios send by themselves, because fetch would not let them set Host or spell headers as they want.
const requested = http.request;
http.request = function (...args) {
  const options = args.find((a) => a && typeof a === "object" && !(a instanceof URL));
  if (options) options.headers = { authorization: token, ...options.headers };
  return requested.apply(this, args);
};
const undici = createRequire(process.argv[1])("undici");
undici.setGlobalDispatcher(new undici.Agent().compose((dispatch) => (options, handler) => {
  const plain = options.headers && typeof options.headers === "object" && !Array.isArray(options.headers) && !options.headers[Symbol.iterator];
  return dispatch(plain ? { ...options, headers: { authorization: token, ...options.headers } } : options, handler);
}));
