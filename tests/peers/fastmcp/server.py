"""A server by FastMCP, both eras: `server.py stdio` or `server.py PORT`."""
import sys
from dataclasses import dataclass

from fastmcp import Context, FastMCP
from mcp.types import ElicitRequest, ElicitRequestFormParams, InputRequiredResult

peer = FastMCP("fastmcp")


@dataclass
class Sum:
    sum: int


@dataclass
class Who:
    name: str


@peer.tool
def add(a: int, b: int) -> Sum:
    return Sum(a + b)


@peer.tool
def echo(message: str) -> str:
    return message


@peer.tool
def fail() -> str:
    raise ValueError("broken on purpose")


@peer.tool
async def steps(ctx: Context) -> str:
    for done in (1, 2, 3):
        await ctx.report_progress(done, 3)
    return "stepped"


@peer.tool
async def ask(ctx: Context) -> str | InputRequiredResult:
    if ctx.request_context.protocol_version < "2026": # the eras have two ways of asking
        return "Hello, " + (await ctx.elicit("Who?", Who)).data.name
    if ctx.input_responses:
        return "Hello, " + ctx.input_responses["who"].content["name"]
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    return InputRequiredResult(input_requests={
        "who": ElicitRequest(params=ElicitRequestFormParams(message="Who?", requested_schema=schema))})


@peer.resource("peer://note")
def note() -> str:
    return "a note"


@peer.prompt
def greet(name: str) -> str:
    return "Say hello to " + name


if sys.argv[1] == "stdio":
    peer.run(show_banner=False)
else:
    peer.run("http", port=int(sys.argv[1]), show_banner=False)
