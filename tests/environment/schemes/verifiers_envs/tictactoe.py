"""In the shape of a course's tic-tac-toe: a board in the state, a seeded opponent."""

from __future__ import annotations

import random
import re
from typing import Any

import verifiers as vf
from datasets import Dataset

LINES = ["012", "345", "678", "036", "147", "258", "048", "246"]


def shown(board: list[Any]) -> str:
    rows = [" ".join(board[k] or str(k) for k in range(r, r + 3)) for r in (0, 3, 6)]
    return "\n".join(rows)


def won(board: list[Any], who: str) -> bool:
    return any(all(board[int(k)] == who for k in line) for line in LINES)


class TicTacToe(vf.MultiTurnEnv):
    async def setup_state(self, state: Any) -> Any:
        state["board"] = list(state["info"]["board"])
        state["winner"], state["mistakes"] = None, 0
        return state

    def over(self, state: Any, winner: str) -> list[Any]:
        state["winner"] = winner
        state["final_env_response"] = [vf.UserMessage(content=f"{winner}!")]
        return state["final_env_response"]

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        board = state["board"]
        move = self.parser.parse_answer(messages) or ""
        if move not in [str(k) for k in range(9) if board[k] is None]:
            state["mistakes"] += 1
            return [vf.UserMessage(content=f"Not a free square: {move!r}.\n{shown(board)}")]
        board[int(move)] = "X"
        if won(board, "X"):
            return self.over(state, "X")
        if None not in board:
            return self.over(state, "nobody")
        rng = random.Random(f"{state['info']['seed']} {board}")
        board[rng.choice([k for k in range(9) if board[k] is None])] = "O"
        if won(board, "O"):
            return self.over(state, "O")
        return [vf.UserMessage(content=f"Your turn.\n{shown(board)}")]


def win(state: Any, **_: Any) -> float:
    return {"X": 1.0, "nobody": 0.5}.get(state["winner"], 0.0)


def mistake(state: Any, **_: Any) -> float:
    return -0.1 if state["mistakes"] else 0.0


def load_environment(num_examples: int = 50, max_turns: int = 8, **kwargs: Any) -> vf.Environment:
    def make_dataset() -> Dataset:
        rows = []
        for _ in range(num_examples):
            board: list[Any] = [None] * 9
            if random.random() < 0.5:
                board[random.randrange(9)] = "O"
            info = {"board": board, "seed": random.randint(0, 10**6)}
            rows.append({"question": shown(board), "info": info})
        return Dataset.from_list(rows)

    parser = vf.XMLParser(fields=["move"], answer_field="move")
    pattern = re.compile(r"<think>.*?</think>.*?<move>.*?</move>", re.DOTALL)

    def form(parser: Any, completion: Any, **_: Any) -> float:
        said = parser.get_assistant_messages(completion)
        return sum(bool(pattern.search(one.get("content", ""))) for one in said) / len(said)

    rubric = vf.Rubric(parser=parser, funcs=[win, form, mistake], weights=[1.0, 0.2, 1.0])
    return TicTacToe(
        dataset=make_dataset(),
        system_prompt="You play X. Answer <move>0</move> to <move>8</move>.",
        parser=parser,
        rubric=rubric,
        max_turns=max_turns,
        **kwargs,
    )
