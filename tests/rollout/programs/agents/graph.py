"""A langgraph agent over langchain's OpenAI client."""

import json
import os
import sys
import warnings

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent


@tool
def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


task = json.load(sys.stdin)
with warnings.catch_warnings(action="ignore"):
    agent = create_react_agent(
        ChatOpenAI(model=os.environ["OPENAI_MODEL"]), [add], prompt="Call the tool."
    )
question = f"Sum of {task['a']} and {task['b']}?"
print(agent.invoke({"messages": [("user", question)]})["messages"][-1].content)
