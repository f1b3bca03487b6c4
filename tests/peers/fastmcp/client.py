"""A client by FastMCP: does what the plan in argv says, prints what it saw as one JSON object."""
import asyncio, json, sys

from fastmcp import Client
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport

plan = json.loads(sys.argv[1])
seen = {"calls": [], "progress": 0, "asked": []}


async def elicit(message, response_type, params, context):
    seen["asked"].append(message)
    return {"name": "Ann"}


async def progress(done, total, message):
    seen["progress"] += 1


async def main():
    if "url" in plan:
        transport = StreamableHttpTransport(plan["url"], headers=plan["headers"])
    else:
        transport = StdioTransport(plan["command"][0], plan["command"][1:], keep_alive=False)
    mode = "2026-07-28" if plan["era"] == "modern" else plan["era"]
    async with Client(transport, mode=mode, elicitation_handler=elicit, progress_handler=progress) as client:
        seen["version"] = client.session.protocol_version
        seen["tools"] = [t.name for t in await client.list_tools()]
        if plan["lists"]:
            seen["resources"] = [str(r.uri) for r in await client.list_resources()]
            seen["note"] = (await client.read_resource("peer://note"))[0].text
            seen["prompts"] = [p.name for p in await client.list_prompts()]
            seen["greet"] = (await client.get_prompt("greet", {"name": "Ann"})).messages[0].content.text
        for name, args in plan["calls"]:
            try:
                r = await client.call_tool(name, args, raise_on_error=False)
                text = "".join(c.text for c in r.content)
                seen["calls"].append({"text": text, "structured": r.structured_content, "isError": r.is_error})
            except Exception as error:
                seen["calls"].append({"error": str(error)})


asyncio.run(main())
print(json.dumps(seen))
