// A server by the TypeScript SDK v2, both eras: `server.mjs stdio` or `server.mjs PORT`.
import { createServer } from 'node:http';
import { toNodeHandler } from '@modelcontextprotocol/node';
import { acceptedContent, createMcpHandler, inputRequired, McpServer } from '@modelcontextprotocol/server';
import { serveStdio } from '@modelcontextprotocol/server/stdio';
import * as z from 'zod/v4';

const text = (text) => ({ content: [{ type: 'text', text }] });

function peer() {
  const s = new McpServer({ name: 'ts2', version: '1' });
  const inputSchema = z.object({ a: z.number(), b: z.number() });
  s.registerTool('add', { inputSchema, outputSchema: z.object({ sum: z.number() }) },
    async ({ a, b }) => ({ ...text(JSON.stringify({ sum: a + b })), structuredContent: { sum: a + b } }));
  s.registerTool('echo', { inputSchema: z.object({ message: z.string() }) }, async ({ message }) => text(message));
  s.registerTool('fail', {}, async () => { throw new Error('broken on purpose'); });
  s.registerTool('steps', {}, async ({ mcpReq }) => {
    const progressToken = mcpReq._meta?.progressToken;
    for (let progress = 1; progressToken !== undefined && progress <= 3; progress++)
      await mcpReq.notify({ method: 'notifications/progress', params: { progressToken, progress, total: 3 } });
    return text('stepped');
  });
  s.registerTool('ask', {}, async ({ mcpReq }) => {
    const who = z.object({ name: z.string() });
    const answer = acceptedContent(mcpReq.inputResponses, 'who', who);
    const question = inputRequired.elicit({ message: 'Who?', requestedSchema: who });
    if (!answer) return inputRequired({ inputRequests: { who: question } });
    return text(`Hello, ${answer.name}`);
  });
  s.registerResource('note', 'peer://note', {}, async (uri) => ({ contents: [{ uri: uri.href, text: 'a note' }] }));
  s.registerPrompt('greet', { argsSchema: z.object({ name: z.string() }) },
    ({ name }) => ({ messages: [{ role: 'user', content: { type: 'text', text: `Say hello to ${name}` } }] }));
  return s;
}

if (process.argv[2] === 'stdio') {
  serveStdio(peer);
} else {
  const handle = toNodeHandler(createMcpHandler(peer));
  createServer((req, res) => void handle(req, res)).listen(Number(process.argv[2]), '127.0.0.1');
}
