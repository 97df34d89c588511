"""OpenAI's library: a tool loop over streamed chat completions."""

import json
import os
import sys

from openai import OpenAI

ADD = {
    "name": "add",
    "description": "Add two whole numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
task, client = json.load(sys.stdin), OpenAI()
messages: list = [
    {"role": "system", "content": "Call the tool."},
    {"role": "user", "content": f"Sum of {task['a']} and {task['b']}?"},
]
for _ in range(4):
    text, calls = "", []
    for chunk in client.chat.completions.create(
        model=os.environ["OPENAI_MODEL"],
        messages=messages,
        tools=[{"type": "function", "function": ADD}],
        stream=True,
    ):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for call in delta.tool_calls or ():
            calls.append(call.model_dump(exclude={"index"}))
    reply = {"role": "assistant", "content": text or None}
    messages.append({**reply, "tool_calls": calls} if calls else reply)
    if not calls:
        break
    for call in calls:
        given = json.loads(call["function"]["arguments"])
        result = str(given.get("a", 0) + given.get("b", 0))
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
print(text)
