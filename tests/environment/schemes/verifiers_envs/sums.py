"""One turn: a sum, answered in a tag. Its arguments have every kind of name, hint and default."""

from __future__ import annotations

import random
from typing import Any, Literal

import verifiers as vf
from datasets import Dataset


def load_environment(
    count: int = 40,
    largest: int = 99,
    style: Literal["plain", "tagged"] = "tagged",
    seed: int = 3,
    weights: tuple[float, float] = (1.0, 0.5),
    evaluates: bool = True,
    short: bool = False,
    **options: Any,
) -> vf.Environment:
    def rows(name: str, n: int) -> Dataset:
        rng = random.Random(f"{name} {seed}")
        pairs = [(rng.randint(1, largest), rng.randint(1, largest)) for _ in range(n)]
        made = [{"question": f"{a} + {b} = ?", "answer": str(a + b)} for a, b in pairs]
        return Dataset.from_list(made)

    tagged = vf.XMLParser(fields=["answer"], answer_field="answer")
    parser = tagged if style == "tagged" else vf.Parser()

    def right(parser: Any, completion: Any, answer: str) -> float:
        return float((parser.parse_answer(completion) or "").strip() == answer)

    def near(parser: Any, completion: Any, answer: str) -> float:
        return 1 / (1 + abs(int(parser.parse_answer(completion)) - int(answer)))  # may raise

    async def brief(completion: Any) -> float:
        return float(len(completion[-1]["content"]) < 30)

    rubric = vf.Rubric(funcs=[right, near], weights=list(weights), parser=parser)
    if short:
        rubric.add_metric(brief)
    return vf.SingleTurnEnv(
        dataset=rows("train", count),
        eval_dataset=rows("eval", 10) if evaluates else None,
        system_prompt="Add. Answer in <answer></answer>.",
        parser=parser,
        rubric=rubric,
        **options,
    )
