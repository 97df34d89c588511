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

from rayrl_tictactoe.board import (
    FREE,
    INVALID,
    LINES,
    STARTED,
    SYSTEM,
    Board,
    played,
    prompt,
    twos,
)

from rayrl.types import Message, assistant, system, user

Conversation = list[Message]


def notes(key: str) -> str:
    """For either mark, the lines with two of it and a free cell, and that cell."""
    found = {mark: [f"{name}: {cell}" for name, cell in twos(key, mark)] for mark in "XO"}
    return "; ".join(f"{mark}: {'; '.join(lines) or 'none'}" for mark, lines in found.items())


def game(rng: random.Random) -> Conversation:
    """A game between two blind players. X mostly says what it sees, but never acts on it.

    Now and then X picks a taken cell and is told.
    """
    board = Board()
    status = STARTED
    if rng.random() < 0.5:
        cell = rng.choice(board.free())
        board.play(cell, "O")
        status = played(cell)
    looks = rng.random() < 0.7
    messages = [system(SYSTEM)]
    while not board.over:
        messages.append(user(prompt(status, board)))
        taken = [cell for cell in range(9) if cell not in board.free()]
        errs = bool(taken) and rng.random() < 0.01
        cell = rng.choice(taken if errs else board.free())
        seen = f"{notes(board.key())}. " if looks else ""
        messages.append(assistant(f"<think>{seen}Take {cell}.</think><move>{cell}</move>"))
        if errs:
            status = INVALID
            continue
        board.play(cell, "X")
        if board.over:
            break
        cell = rng.choice(board.free())
        board.play(cell, "O")
        status = played(cell)
    return messages


def read_cells(board: str, rng: random.Random) -> tuple[str, str]:
    """Any three cells."""
    cells = rng.sample(range(9), 3)
    shown = " | ".join(board[cell] for cell in cells)
    return f"Read positions {', '.join(map(str, cells))}.", shown


def read_line(board: str, rng: random.Random) -> tuple[str, str]:
    """A row, column or diagonal."""
    name, cells = rng.choice(list(LINES.items()))
    return f"Read the {name}.", " | ".join(board[cell] for cell in cells)


def count_line(board: str, rng: random.Random) -> tuple[str, str]:
    """How often either mark stands in a row, column or diagonal."""
    name, cells = rng.choice(list(LINES.items()))
    shown = [board[cell] for cell in cells]
    return f"Count the marks in the {name}.", f"{shown.count('X')} X, {shown.count('O')} O"


def find_mark(board: str, rng: random.Random) -> tuple[str, str]:
    """The cells of one mark, or the free ones."""
    name = rng.choice(("X", "O", "free"))
    cells = [str(i) for i, shown in enumerate(board) if shown == (name if name in "XO" else str(i))]
    return f"Which positions are {name}?", ", ".join(cells) or "none"


def find_lines(board: str, rng: random.Random) -> tuple[str, str]:
    """The rows, columns and diagonals with so many of either mark, and their free cells."""
    wanted = rng.choice([(x, o) for x in range(3) for o in range(3) if 0 < x + o < 3])
    found = []
    for name, cells in LINES.items():
        shown = [board[cell] for cell in cells]
        if (shown.count("X"), shown.count("O")) == wanted:
            free = [cell for cell in shown if cell not in ("X", "O")]
            found.append(f"{name}: {', '.join(free)}")
    question = f"Which lines hold {wanted[0]} X and {wanted[1]} O?"
    return question, "; ".join(found) or "none"


def describe(board: str, rng: random.Random) -> tuple[str, str]:
    """The rows, columns and diagonals with two of a mark and a free cell."""
    key = "".join(shown if shown in "XO" else FREE for shown in board)
    return "Which lines hold two marks and a free cell?", notes(key)


QUESTIONS: dict[Callable[[str, random.Random], tuple[str, str]], float] = {
    read_cells: 0.15,
    read_line: 0.2,
    count_line: 0.15,
    find_mark: 0.15,
    find_lines: 0.2,
    describe: 0.15,
}
"""Share of the questions about a board, by kind."""


def reading(rng: random.Random) -> Conversation:
    """Questions about the newest board, while two players fill it blindly."""
    board = Board()
    messages: Conversation = []
    marks = "XO"[:: rng.choice((1, -1))]
    moves = 0
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.randint(0 if moves == 0 else 1, 3)):
            if not board.over:
                board.play(rng.choice(board.free()), marks[moves % 2])
                moves += 1
        shown = "".join(str(i) if c == FREE else c for i, c in enumerate(board.key()))
        kind = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))[0]
        question, answer = kind(shown, rng)
        messages += [user(f"{board.render()}\n{question}"), assistant(answer)]
        if board.over:
            break
    return messages


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
    reading: 0.43,
    copy_word: 0.05,
    reverse: 0.06,
    sums: 0.04,
    calculator: 0.02,
}
"""Share of the conversations, by task."""


def draw(rng: random.Random) -> Conversation:
    """One conversation of the mixture."""
    return rng.choices(list(SHARES), list(SHARES.values()))[0](rng)
