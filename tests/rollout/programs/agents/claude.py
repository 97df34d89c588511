"""Anthropic's library: a tool loop over messages, streamed or not."""

import json
import os
import sys

from anthropic import Anthropic

ADD = {
    "name": "add",
    "description": "Add two whole numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
task, client = json.load(sys.stdin), Anthropic()
messages: list = [{"role": "user", "content": f"Sum of {task['a']} and {task['b']}?"}]
for _ in range(4):
    asked = {
        "model": os.environ["ANTHROPIC_MODEL"],
        "max_tokens": 64,
        "system": "Call the tool.",
        "tools": [ADD],
        "messages": messages,
    }
    if task.get("stream"):
        with client.messages.stream(**asked) as stream:
            reply = stream.get_final_message()
    else:
        reply = client.messages.create(**asked)
    messages.append({"role": "assistant", "content": reply.content})
    uses = [block for block in reply.content if block.type == "tool_use"]
    if not uses:
        break
    results = []
    for use in uses:
        result = str(use.input.get("a", 0) + use.input.get("b", 0))
        results.append({"type": "tool_result", "tool_use_id": use.id, "content": result})
    messages.append({"role": "user", "content": results})
print("".join(block.text for block in reply.content if block.type == "text"))
