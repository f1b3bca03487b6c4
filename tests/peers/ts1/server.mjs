// A server by the TypeScript SDK v1: `server.mjs stdio` or `server.mjs PORT`.
import { randomUUID } from 'node:crypto';
import { createServer } from 'node:http';
import { McpServer } from '@modelcontextprotocol/sdk/server/mcp.js';
import { StdioServerTransport } from '@modelcontextprotocol/sdk/server/stdio.js';
import { StreamableHTTPServerTransport } from '@modelcontextprotocol/sdk/server/streamableHttp.js';
import * as z from 'zod/v4';

const text = (text) => ({ content: [{ type: 'text', text }] });

function peer() {
  const s = new McpServer({ name: 'ts1', version: '1' });
  s.registerTool('add', { inputSchema: { a: z.number(), b: z.number() }, outputSchema: { sum: z.number() } },
    async ({ a, b }) => ({ ...text(JSON.stringify({ sum: a + b })), structuredContent: { sum: a + b } }));
  s.registerTool('echo', { inputSchema: { message: z.string() } }, async ({ message }) => text(message));
  s.registerTool('fail', {}, async () => { throw new Error('broken on purpose'); });
  s.registerTool('steps', {}, async ({ _meta, sendNotification }) => {
    const progressToken = _meta?.progressToken;
    for (let progress = 1; progressToken !== undefined && progress <= 3; progress++)
      await sendNotification({ method: 'notifications/progress', params: { progressToken, progress, total: 3 } });
    return text('stepped');
  });
  s.registerTool('ask', {}, async ({ requestId }) => {
    const requestedSchema = { type: 'object', properties: { name: { type: 'string' } }, required: ['name'] };
    const answer = await s.server.elicitInput({ message: 'Who?', requestedSchema }, { relatedRequestId: requestId });
    return text(`Hello, ${answer.content?.name}`);
  });
  s.registerResource('note', 'peer://note', {}, async (uri) => ({ contents: [{ uri: uri.href, text: 'a note' }] }));
  s.registerPrompt('greet', { argsSchema: { name: z.string() } },
    ({ name }) => ({ messages: [{ role: 'user', content: { type: 'text', text: `Say hello to ${name}` } }] }));
  return s;
}

if (process.argv[2] === 'stdio') {
  await peer().connect(new StdioServerTransport());
} else {
  const sessions = new Map();
  createServer(async (req, res) => {
    let transport = sessions.get(req.headers['mcp-session-id']);
    if (!transport) {
      transport = new StreamableHTTPServerTransport({ sessionIdGenerator: randomUUID,
        onsessioninitialized: (id) => { sessions.set(id, transport); } });
      await peer().connect(transport);
    }
    await transport.handleRequest(req, res);
  }).listen(Number(process.argv[2]), '127.0.0.1');
}
