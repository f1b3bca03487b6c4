// A client by the TypeScript SDK v1: does what the plan in argv says, prints what it saw as one JSON object.
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { ElicitRequestSchema } from '@modelcontextprotocol/sdk/types.js';

const plan = JSON.parse(process.argv[2]);
const seen = { calls: [], progress: 0, asked: [] };
const client = new Client({ name: 'ts1', version: '1' }, { capabilities: { elicitation: {} } });
client.setRequestHandler(ElicitRequestSchema, async ({ params }) => {
  seen.asked.push(params.message);
  return { action: 'accept', content: { name: 'Ann' } };
});
const transport = plan.url
  ? new StreamableHTTPClientTransport(new URL(plan.url), { requestInit: { headers: plan.headers } })
  : new StdioClientTransport({ command: plan.command[0], args: plan.command.slice(1), stderr: 'inherit' });
// The client tells its transport alone what was agreed on.
const set = transport.setProtocolVersion?.bind(transport);
transport.setProtocolVersion = (version) => { seen.version = version; set?.(version); };
await client.connect(transport);
seen.server = client.getServerVersion().name;
seen.tools = (await client.listTools(undefined, { timeout: plan.listMs ?? 60000 })).tools.map((t) => t.name);
if (plan.lists) {
  seen.resources = (await client.listResources()).resources.map((r) => r.uri);
  seen.note = (await client.readResource({ uri: 'peer://note' })).contents[0].text;
  seen.prompts = (await client.listPrompts()).prompts.map((p) => p.name);
  seen.greet = (await client.getPrompt({ name: 'greet', arguments: { name: 'Ann' } })).messages[0].content.text;
}
for (const [name, args] of plan.calls) {
  try {
    const r = await client.callTool({ name, arguments: args }, undefined, { onprogress: () => seen.progress++ });
    const text = r.content.map((c) => c.text).join('');
    seen.calls.push({ text, structured: r.structuredContent, isError: !!r.isError });
  } catch (error) {
    seen.calls.push({ error: String(error) });
  }
}
await client.close();
console.log(JSON.stringify(seen));
