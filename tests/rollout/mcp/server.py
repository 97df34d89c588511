"""A server of the package `mcp`: over stdio, or `--http PORT`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any, Literal

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ResourceLink,
    TextContent,
    TextResourceContents,
)
from pydantic import BaseModel, Field

server = MCPServer("tests")
counted: Counter[str] = Counter()


class Point(BaseModel):
    """A place."""

    x: int
    y: int = Field(0, ge=0)


@server.tool()
def add(a: int, b: int = 0) -> int:
    """Add two numbers.

    Of any size.
    """
    return a + b


@server.tool()
def count(context: Context[Any, Any]) -> str:
    """Count the calls of this tool in this session."""
    session = (context.headers or {}).get("mcp-session-id", "")
    counted[session] += 1
    return str(counted[session])


@server.tool()
def far(point: Point, unit: Literal["m", "km"] = "m") -> str:
    """Tell how far a place is."""
    return f"{abs(point.x) + point.y} {unit}"


@server.tool()
def fails(reason: str) -> str:
    """Fail."""
    raise ToolError(reason)


@server.tool()
def repeat(text: str, times: int) -> str:
    """Repeat a text."""
    return text * times


@server.tool(name="show.all/kinds")
def show() -> CallToolResult:
    """Show one of each kind of result."""
    link = ResourceLink(type="resource_link", name="notes", uri="file:///notes")
    text = TextResourceContents(uri="file:///a", text="inside")
    blob = BlobResourceContents(uri="file:///b", blob="AAAA", mime_type="application/pdf")
    return CallToolResult(
        content=[
            TextContent(type="text", text="first"),
            Image(data=b"12345", format="png").to_image_content(),
            AudioContent(type="audio", data="AAA=", mime_type="audio/wav"),
            link,
            EmbeddedResource(type="resource", resource=text),
            EmbeddedResource(type="resource", resource=blob),
        ]
    )


@server.tool()
def data() -> CallToolResult:
    """Return data without text."""
    return CallToolResult(content=[], structured_content={"é": [1, None]})


@server.tool()
def family() -> str:
    """Start processes that do not end, in this session and another; return all ids."""
    words = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    children = [
        subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=own).pid
        for own in (False, True)
    ]
    return json.dumps([os.getpid(), *children])


if __name__ == "__main__":
    if "--http" in sys.argv:
        server.run("streamable-http", port=int(sys.argv[sys.argv.index("--http") + 1]))
    else:
        server.run()
