"""Tools, and functions that compare the episodes of a group."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

PRICES = {"tea": 4, "salt": 2, "rice": 7, "figs": 9}


def price(item: str) -> int:
    """What an item costs.

    Args:
        item: its name.
    """
    return PRICES[item]


async def stock(items: list[str]) -> str:
    """Which of the items there are.

    Args:
        items: their names.
    """
    return ", ".join(item for item in items if item in PRICES)


def _text(completion: Any) -> str:
    return str(completion[-1]["content"] or "")


def right(completion: Any, answer: str) -> float:
    return float(_text(completion).strip() == answer)


def shortest(completions: list[Any]) -> list[float]:
    """1 for those whose last message is the shortest of the group."""
    lengths = [len(_text(completion)) for completion in completions]
    return [float(length == min(lengths)) for length in lengths]


async def fewest_calls(states: list[Any], answers: list[str], **_: Any) -> list[float]:
    """1 for those with the fewest turns; right answers count half a turn less."""
    turns = [
        len(state["trajectory"]) - 0.5 * (_text(state["completion"]).strip() == answer)
        for state, answer in zip(states, answers, strict=True)
    ]
    return [float(n == min(turns)) for n in turns]


class Shop(vf.ToolEnv):
    async def setup_state(self, state: Any) -> Any:
        state["lock"] = object()  # nothing that could be stored
        return state


def picky(states: list[Any]) -> list[float]:
    return [float(state["lock"] is not None) for state in states]


def load_environment(asks_lock: bool = False) -> vf.Environment:
    rows = [{"question": f"What does {item} cost?", "answer": str(p)} for item, p in PRICES.items()]
    rubric = vf.Rubric(funcs=[right, shortest], weights=[1.0, 0.25])
    rubric.add_reward_func(fewest_calls, 0.5)
    if asks_lock:
        rubric.add_reward_func(picky)
    return Shop(
        tools=[price, stock], dataset=Dataset.from_list(rows * 4), rubric=rubric, max_turns=4
    )
