"""Several turns: guess a number. Data and answers draw from the global generators."""

from __future__ import annotations

import random
from typing import Any

import verifiers as vf
from datasets import Dataset


class Guessing(vf.MultiTurnEnv):
    async def setup_state(self, state: Any) -> Any:
        state["low"], state["high"] = 0, state["info"]["largest"]
        state["guesses"] = []
        return state

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        said = self.parser.parse_answer(messages) or ""
        guess = int(said) if said.strip().isdigit() else -1
        state["guesses"].append(guess)
        target = state["info"]["target"]
        if guess == target:
            state["final_env_response"] = [{"role": "user", "content": "Yes!"}]
            return state["final_env_response"]
        if guess == 13:
            raise vf.SandboxError("the oracle is down")
        if guess == 14:
            raise vf.ToolCallError("no such call") from KeyError("oracle")
        if guess == 15:
            raise ZeroDivisionError("a mistake in the environment")
        word = random.choice(["Sorry", "Alas", "No", "Hardly"])
        return [{"role": "user", "content": f"{word}: {'more' if guess < target else 'less'}."}]


def found(state: Any, **_: Any) -> float:
    return float(bool(state["guesses"]) and state["guesses"][-1] == state["info"]["target"])


def speed(state: Any, **_: Any) -> float:
    return 1 / (1 + len(state["guesses"]))


def load_environment(largest: int = 9, max_turns: int = 5) -> vf.Environment:
    def rows() -> Dataset:
        targets = [random.randint(0, largest) for _ in range(30)]
        return Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": f"A number from 0 to {largest}?"}],
                    "info": {"target": target, "largest": largest},
                }
                for target in targets
            ]
        )

    rubric = vf.Rubric(funcs=[found, speed], weights=[1.0, 0.3])
    return Guessing(dataset=rows, rubric=rubric, max_turns=max_turns)
