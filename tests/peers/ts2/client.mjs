// A client by the TypeScript SDK v2: does what the plan in argv says, prints what it saw as one JSON object.
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { StdioClientTransport } from '@modelcontextprotocol/client/stdio';

const plan = JSON.parse(process.argv[2]);
const seen = { calls: [], progress: 0, asked: [] };
const client = new Client({ name: 'ts2', version: '1' }, {
  capabilities: { elicitation: {} },
  versionNegotiation: { mode: plan.era === 'modern' ? { pin: '2026-07-28' } : plan.era },
});
client.setRequestHandler('elicitation/create', async ({ params }) => {
  seen.asked.push(params.message);
  return { action: 'accept', content: { name: 'Ann' } };
});
await client.connect(plan.url
  ? new StreamableHTTPClientTransport(new URL(plan.url), { requestInit: { headers: plan.headers } })
  : new StdioClientTransport({ command: plan.command[0], args: plan.command.slice(1), stderr: 'inherit' }));
seen.version = client.getNegotiatedProtocolVersion();
seen.server = client.getServerVersion()?.name;
seen.tools = (await client.listTools(undefined, { timeout: plan.listMs ?? 60000 })).tools.map((t) => t.name);
if (plan.lists) {
  seen.resources = (await client.listResources()).resources.map((r) => r.uri);
  seen.note = (await client.readResource({ uri: 'peer://note' })).contents[0].text;
  seen.prompts = (await client.listPrompts()).prompts.map((p) => p.name);
  seen.greet = (await client.getPrompt({ name: 'greet', arguments: { name: 'Ann' } })).messages[0].content.text;
}
for (const [name, args] of plan.calls) {
  try {
    // The SDK reports rounds of questions as progress too, without a total.
    const onprogress = ({ total }) => { if (total) seen.progress++; };
    const r = await client.callTool({ name, arguments: args }, { onprogress });
    const text = r.content.map((c) => c.text).join('');
    seen.calls.push({ text, structured: r.structuredContent, isError: !!r.isError });
  } catch (error) {
    seen.calls.push({ error: String(error) });
  }
}
await client.close();
console.log(JSON.stringify(seen));
