"""An agent of OpenAI's Agents SDK with one tool. It knows nothing of rayrl."""

import asyncio
import json
import os
import random
import sys

from agents import Agent, Runner, TResponseInputItem, function_tool
from agents.exceptions import AgentsException

CITIES = [
    *["Accra", "Athens", "Baghdad", "Bangkok", "Berlin", "Bogota", "Brussels", "Cairo", "Caracas"],
    *["Chicago", "Damascus", "Delhi", "Dublin", "Hanoi", "Havana", "Helsinki", "Istanbul"],
    *["Jakarta", "Kiev", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Melbourne"],
    *["Milan", "Montreal", "Moscow", "Mumbai", "Nairobi", "Oslo", "Paris", "Prague", "Rome"],
    *["Santiago", "Seoul", "Shanghai", "Singapore", "Sydney", "Taipei", "Tehran", "Tokyo"],
    *["Toronto", "Tunis", "Vienna", "Warsaw"],
]
EXAMPLES = {"Boston": 654000, "Zurich": 421000}

task = json.load(sys.stdin)
rng = random.Random(task["seed"])
city = rng.choice(CITIES)
people = {name: rng.randrange(100, 1000) * 1000 for name in CITIES}
calls = 0


@function_tool
def population(city: str) -> str:
    """Look up how many people live in a city."""
    global calls
    calls += 1
    return str(people.get(city, f"There is no city {city}."))


def example(name: str, number: int) -> list[TResponseInputItem]:
    """A question that has been answered, with the call of the tool."""
    call = json.dumps({"city": name})
    return [
        {"role": "user", "content": f"How many people live in {name}?"},
        {"type": "function_call", "call_id": name, "name": "population", "arguments": call},
        {"type": "function_call_output", "call_id": name, "output": str(number)},
        {"role": "assistant", "content": f"{number} people live in {name}."},
    ]


async def answer() -> str:
    """Ask the agent, and return what it says in the end."""
    clerk = Agent(
        name="clerk",
        instructions="Look up the number with the tool, then answer.",
        tools=[population],
        model=os.environ["OPENAI_MODEL"],
    )
    said = [item for name, number in EXAMPLES.items() for item in example(name, number)]
    said.append({"role": "user", "content": f"How many people live in {city}?"})
    try:
        return str((await Runner.run(clerk, said, max_turns=3)).final_output)
    except AgentsException as error:  # it calls the tool for ever, or one that there is not
        return f"{type(error).__name__}: {error}"


said = asyncio.run(answer())
print(json.dumps({"said": said, "right": people[city], "calls": calls}))
