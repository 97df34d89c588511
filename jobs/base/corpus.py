"""Synthetic conversations that teach a base model to read and to answer, and no strategy.

Every item is a list of messages. Games are between two players who pick any free cell; the other
tasks are copying, reversing, small sums, calling a calculator and reading cells, rows, columns and
diagonals off a board. What wins a game is never said and never favoured.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable

from rayrl_tictactoe.board import INVALID, STARTED, SYSTEM, Board, played, prompt

from rayrl.types import Message, assistant, system, user

Conversation = list[Message]


def game(rng: random.Random) -> Conversation:
    """A game between two players who pick free cells blindly; now and then X errs and is told."""
    board = Board()
    status = STARTED
    if rng.random() < 0.5:
        cell = rng.choice(board.free())
        board.play(cell, "O")
        status = played(cell)
    messages = [system(SYSTEM)]
    while not board.over:
        messages.append(user(prompt(status, board)))
        taken = [cell for cell in range(9) if cell not in board.free()]
        if taken and rng.random() < 0.01:
            cell = rng.choice(taken)
            messages.append(assistant(f"<think>{cell} is free.</think><move>{cell}</move>"))
            status = INVALID
            continue
        cell = rng.choice(board.free())
        messages.append(assistant(f"<think>{cell} is free.</think><move>{cell}</move>"))
        board.play(cell, "X")
        if board.over:
            break
        cell = rng.choice(board.free())
        board.play(cell, "O")
        status = played(cell)
    return messages


def _board(rng: random.Random) -> Board:
    board = Board()
    for turn in range(rng.randrange(9)):
        if board.over:
            break
        board.play(rng.choice(board.free()), "XO"[turn % 2])
    return board


def read_cells(rng: random.Random) -> Conversation:
    """Reads any three cells off a board."""
    board = _board(rng)
    cells = rng.sample(range(9), 3)
    shown = [board.key()[cell].replace(".", str(cell)) for cell in cells]
    question = f"{board.render()}\nRead positions {', '.join(map(str, cells))}."
    return [user(question), assistant(" | ".join(shown))]


LINES = {
    "top row": (0, 1, 2),
    "middle row": (3, 4, 5),
    "bottom row": (6, 7, 8),
    "left column": (0, 3, 6),
    "middle column": (1, 4, 7),
    "right column": (2, 5, 8),
    "falling diagonal": (0, 4, 8),
    "rising diagonal": (6, 4, 2),
}


def _line(rng: random.Random) -> tuple[str, str, list[str]]:
    board = _board(rng)
    name, cells = rng.choice(list(LINES.items()))
    return board.render(), name, [board.key()[c].replace(".", str(c)) for c in cells]


def read_line(rng: random.Random) -> Conversation:
    """Reads a row, column or diagonal."""
    shown, name, cells = _line(rng)
    return [user(f"{shown}\nRead the {name}."), assistant(" | ".join(cells))]


def count_line(rng: random.Random) -> Conversation:
    """Counts the marks in a row, column or diagonal."""
    shown, name, cells = _line(rng)
    counts = f"{cells.count('X')} X, {cells.count('O')} O"
    return [user(f"{shown}\nCount the marks in the {name}."), assistant(counts)]


def find_mark(rng: random.Random) -> Conversation:
    """Lists the cells of one mark, or the free ones."""
    board = _board(rng)
    mark = rng.choice("XO.")
    cells = [str(cell) for cell, owner in enumerate(board.key()) if owner == mark]
    name = {"X": "X", "O": "O", ".": "free"}[mark]
    question = f"{board.render()}\nWhich positions are {name}?"
    return [user(question), assistant(", ".join(cells) or "none")]


def word(rng: random.Random, low: int = 2, high: int = 8) -> str:
    """Random letters."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def copy_word(rng: random.Random) -> Conversation:
    """Repeats a word."""
    text = word(rng)
    return [user(f"Repeat this word: {text}"), assistant(f"<word>{text}</word>")]


def reverse(rng: random.Random) -> Conversation:
    """Reverses letters."""
    text = " ".join(word(rng, 2, 5) for _ in range(rng.randint(1, 2)))
    question = f"Reverse the text character by character: {text}"
    return [user(question), assistant(f"<reversed_text>{text[::-1]}</reversed_text>")]


def sums(rng: random.Random) -> Conversation:
    """A small sum, sometimes asked twice."""
    a, b = rng.randrange(20), rng.randrange(20)
    sign = rng.choice("+-")
    reply = assistant(f"<answer>{a + b if sign == '+' else a - b}</answer>")
    messages = [user(f"What is {a} {sign} {b}?"), reply]
    return [*messages, user("Are you sure?"), reply] if rng.random() < 0.5 else messages


def calculator(rng: random.Random) -> Conversation:
    """Calls a tool and reports what it said."""
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    call = json.dumps({"name": "calculator", "arguments": {"expression": f"{a} * {b}"}})
    return [
        user(f"What is {a} * {b}? Use the calculator."),
        assistant(f"<tool_call>{call}</tool_call>"),
        Message("tool", str(a * b)),
        assistant(f"<answer>{a * b}</answer>"),
    ]


SHARES: dict[Callable[[random.Random], Conversation], float] = {
    game: 0.40,
    read_line: 0.15,
    count_line: 0.12,
    read_cells: 0.08,
    find_mark: 0.08,
    copy_word: 0.05,
    reverse: 0.06,
    sums: 0.04,
    calculator: 0.02,
}
"""Share of the conversations, by task."""


def draw(rng: random.Random) -> Conversation:
    """One conversation of the mixture."""
    return rng.choices(list(SHARES), list(SHARES.values()))[0](rng)
