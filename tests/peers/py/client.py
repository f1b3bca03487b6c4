"""A client by the Python SDK: does what the plan in argv says, prints what it saw as one JSON object."""
import json, sys

import anyio, httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.types import ElicitResult

plan = json.loads(sys.argv[1])
seen = {"calls": [], "progress": 0, "asked": []}


async def elicit(context, params):
    seen["asked"].append(params.message)
    return ElicitResult(action="accept", content={"name": "Ann"})


async def progress(done, total, message):
    seen["progress"] += 1


async def main():
    if "url" in plan:
        server = streamable_http_client(plan["url"], http_client=httpx2.AsyncClient(headers=plan["headers"]))
    else:
        server = StdioServerParameters(command=plan["command"][0], args=plan["command"][1:])
    mode = "2026-07-28" if plan["era"] == "modern" else plan["era"]
    async with Client(server, mode=mode, elicitation_callback=elicit) as client:
        seen["version"] = client.protocol_version
        seen["tools"] = [t.name for t in (await client.list_tools()).tools]
        if plan["lists"]:
            seen["resources"] = [r.uri for r in (await client.list_resources()).resources]
            seen["note"] = (await client.read_resource("peer://note")).contents[0].text
            seen["prompts"] = [p.name for p in (await client.list_prompts()).prompts]
            seen["greet"] = (await client.get_prompt("greet", {"name": "Ann"})).messages[0].content.text
        for name, args in plan["calls"]:
            try:
                r = await client.call_tool(name, args, progress_callback=progress)
                text = "".join(c.text for c in r.content)
                seen["calls"].append({"text": text, "structured": r.structured_content, "isError": r.is_error})
            except Exception as error:
                seen["calls"].append({"error": str(error)})


anyio.run(main)
print(json.dumps(seen))
