"""A server that starts at once, as it has only the standard library, and behaves badly if told to.

`rough_server.py [HOW] [FILE]`: `mute` never answers, `endless` lists tools for ever.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
NAMES = ["echo", "pid", "die", "die_once", "hang", "long_line", "many_lines", "deaf", "odd"]
how, file = [*sys.argv[1:], "", ""][:2]


def write(message: dict[str, Any]) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def call(name: str, text: str) -> str:
    if name == "pid":
        return str(os.getpid())
    if name == "die" or (name == "die_once" and not Path(file).exists()):
        if file:
            Path(file).touch()
        print("no more", file=sys.stderr, flush=True)
        os._exit(3)
    while name == "hang":
        if file:
            Path(file).write_text(str(os.getpid()))
        time.sleep(600)
    while name == "long_line":
        sys.stdout.write("x" * 1_000_000)
    while name == "many_lines":
        sys.stdout.write("{}\n" * 100_000)
    if name == "deaf":
        sys.stdout.close()
        os.close(1)
        time.sleep(600)
    return text


print("this is no message")
for line in sys.stdin:
    asked = json.loads(line)
    method, params = asked["method"], asked.get("params", {})
    if "id" not in asked or how == "mute":
        continue
    result: dict[str, Any]
    if method == "initialize":
        result = {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "rough", "version": "1"},
        }
    elif method == "tools/list":
        at = int(params.get("cursor", 0))  # a page for each
        result = {"tools": [{"name": NAMES[at % len(NAMES)], "inputSchema": TEXT}]}
        if at + 1 < len(NAMES) or how == "endless":
            result["nextCursor"] = str(at + 1)
    elif params["name"] not in NAMES:
        write({"id": asked["id"], "error": {"code": -32602, "message": "unknown tool"}})
        continue
    else:
        said = call(params["name"], params["arguments"]["text"])
        result = {"content": [{"type": "text", "text": said}] if params["name"] != "odd" else 3}
    write({"id": asked["id"], "result": result})
