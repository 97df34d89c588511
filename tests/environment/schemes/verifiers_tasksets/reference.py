"""What verifiers itself makes of replies that are known, without rayrl.

Reads `[taskset, fields of its configuration, [[task's data, replies by agent], …]]` for several
tasksets as JSON and writes the reward of each agent, for each task, for each taskset.
"""

import asyncio
import json
import os
import sys
from typing import Any

import verifiers.v1 as vf
from aiohttp import web
from verifiers.v1.utils.loaders import load_environment, resolve_env_config


class Server:
    """An OpenAI-compatible server that gives replies in order; a model's name is an agent's."""

    def __init__(self) -> None:
        self.replies: dict[str, list[str]] = {}

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = self.replies[body["model"]].pop(0)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        finish = "stop"
        if text.startswith("<tool_call>"):
            call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            calls = [{"index": 0, "id": "call_0", "type": "function", "function": function}]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
            finish = "tool_calls"
        streams = bool(body.get("stream"))
        choice = {"index": 0, "delta" if streams else "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        kind = "chat.completion.chunk" if streams else "chat.completion"
        answer = {"id": "c", "object": kind, "created": 0, "model": body["model"], "usage": usage}
        answer["choices"] = [choice]
        if not streams:
            return web.json_response(answer)
        lines = f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n"
        return web.Response(text=lines, content_type="text/event-stream")


async def rewards(
    server: Server, url: str, taskset: str, fields: dict[str, Any], episodes: list[Any]
) -> list[dict[str, float]]:
    for agent, field in fields.items():
        field["model"] = agent
    env = load_environment(resolve_env_config({**fields, "taskset": {"id": taskset}}))
    client = vf.EvalClientConfig(base_url=url, api_key_var="NO_SUCH_KEY")
    kind = type(env.taskset).task_type()
    found = []
    async with env.serving():
        for data, replies in episodes:
            server.replies = replies
            task = kind(kind.data_type().model_validate(data), env.config.taskset.task)
            (slot,) = env.slots(task)
            episode = await env.run_slot(slot, vf.ModelContext(model="agent", client=client))
            assert episode.ok, episode.errors or [trace.errors for trace in episode.traces]
            found.append({trace.agent.name: trace.reward for trace in episode.traces})
    return found


async def main() -> None:
    server = Server()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    print(json.dumps([await rewards(server, url, *one) for one in json.load(sys.stdin)]))
    await runner.cleanup()


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = sys.path[0]
    asyncio.run(main())
