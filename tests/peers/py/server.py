"""A server by the Python SDK, both eras: `server.py stdio` or `server.py PORT`."""
import sys
from typing import Annotated

from mcp.server.mcpserver import Context, Elicit, MCPServer, Resolve
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

peer = MCPServer("py", log_level="WARNING")


class Sum(BaseModel):
    sum: int


class Who(BaseModel):
    name: str


async def who() -> Elicit[Who]:
    return Elicit("Who?", Who)


@peer.tool()
def add(a: int, b: int) -> Sum:
    return Sum(sum=a + b)


@peer.tool()
def echo(message: str) -> str:
    return message


@peer.tool()
def fail() -> str:
    raise ToolError("broken on purpose")


@peer.tool()
async def steps(ctx: Context) -> str:
    for done in (1, 2, 3):
        await ctx.report_progress(done, 3)
    return "stepped"


@peer.tool()
async def ask(answer: Annotated[Who, Resolve(who)]) -> str:
    return "Hello, " + answer.name


@peer.resource("peer://note")
def note() -> str:
    return "a note"


@peer.prompt()
def greet(name: str) -> str:
    return "Say hello to " + name


if sys.argv[1] == "stdio":
    peer.run()
else:
    peer.run("streamable-http", port=int(sys.argv[1]))
