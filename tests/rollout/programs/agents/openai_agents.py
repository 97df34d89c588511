"""OpenAI's Agents SDK, which speaks the Responses API."""

import asyncio
import json
import os
import sys

from agents import Agent, Runner, function_tool


@function_tool
def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


task = json.load(sys.stdin)
agent = Agent(
    name="adder", instructions="Call the tool.", tools=[add], model=os.environ["OPENAI_MODEL"]
)
question = f"Sum of {task['a']} and {task['b']}?"


async def main() -> None:
    if task.get("stream"):
        run = Runner.run_streamed(agent, question)
        async for _ in run.stream_events():
            pass
    else:
        run = await Runner.run(agent, question)
    print(run.final_output)


asyncio.run(main())
