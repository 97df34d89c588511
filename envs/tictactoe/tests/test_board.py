"""Hand-worked boards, messages, replies and facts about perfect play."""

import pytest
from rayrl_tictactoe.board import (
    FREE,
    SYSTEM,
    Board,
    best_moves,
    format_ok,
    other,
    parse_move,
    played,
    prompt,
    winner,
)

EMPTY = FREE * 9


def test_a_message_shows_status_board_positions_and_turn() -> None:
    assert prompt(played(4), Board("X...O...X")) == (
        "Opponent (O) played at position 4.\n"
        "---------\n"
        "X | 1 | 2\n"
        "3 | O | 5\n"
        "6 | 7 | X\n"
        "---------\n"
        "Available positions: 1, 2, 3, 5, 6, 7\n"
        "Your turn."
    )


def test_the_system_prompt_states_the_rules_and_the_form() -> None:
    assert len(SYSTEM.split()) <= 50
    for part in ("X", "O", "row, column or diagonal", "0 to 8", "<think>", "<move>"):
        assert part in SYSTEM


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (EMPTY, None),
        ("XXX.OO...", "X"),
        ("XX.OOO.X.", "O"),
        ("X.OX.OX..", "X"),
        ("XOX.O..O.", "O"),
        ("X..OX.O.X", "X"),
        ("X.OXO.O..", "O"),
        ("XOXXOOOXX", None),
        ("XX.OO....", None),
    ],
)
def test_winner(key: str, expected: str | None) -> None:
    assert winner(key) == expected
    assert Board(key).winner() == expected


def test_playing_changes_the_board_until_it_is_over() -> None:
    board = Board()
    for cell, mark in ((0, "X"), (3, "O"), (1, "X"), (4, "O")):
        assert not board.over
        board.play(cell, mark)
    assert board.key() == "XX.OO...."
    assert board.free() == [2, 5, 6, 7, 8]
    board.play(2, "X")
    assert board.over
    assert board.winner() == "X"
    with pytest.raises(ValueError, match="is over"):
        board.play(5, "O")


def test_a_full_board_without_a_line_is_over() -> None:
    board = Board("XOXXOOOXX")
    assert board.over
    assert board.winner() is None
    assert board.free() == []


@pytest.mark.parametrize(("cell", "mark"), [(0, "O"), (9, "X"), (-1, "X"), (1, "x")])
def test_a_move_that_is_not_one_is_refused_and_changes_nothing(cell: int, mark: str) -> None:
    board = Board("X........")
    with pytest.raises(ValueError):
        board.play(cell, mark)
    assert board.key() == "X........"


def test_a_malformed_key_is_refused() -> None:
    with pytest.raises(ValueError, match="nine characters"):
        Board("XO")
    with pytest.raises(ValueError, match="nine characters"):
        Board("x........")


@pytest.mark.parametrize(
    ("text", "move", "form"),
    [
        ("<think>Centre is free.</think><move>4</move>", 4, True),
        ("<think>\nlong\nthought\n</think>\n\n<move> 4 </move>\n", 4, True),
        ("<think></think><move>0</move>", 0, True),
        ("<think>a</think>So I play <move>2</move>", 2, True),
        ("<move>4</move>", 4, False),
        ("4", None, False),
        ("", None, False),
        ("<think>a</think><move>9</move>", None, True),
        ("<think>a</think><move>centre</move>", None, True),
        ("<think>a</think><move>4</move> Good luck!", 4, False),
        ("Hm. <think>a</think><move>4</move>", 4, False),
        ("<think>a</think><think>b</think><move>4</move>", 4, False),
        ("<think>a</think><move>1</move><move>2</move>", 2, False),
        ("<think>maybe <move>1</move></think><move>2</move>", 2, True),
        ("<think>maybe <move>1</move></think>", None, False),
        ("<think>cut off after <move>1</move>", None, False),
        ("<think>a</think><move>4", None, False),
    ],
)
def test_what_a_reply_means(text: str, move: int | None, form: bool) -> None:
    assert parse_move(text) == move
    assert format_ok(text) is form


@pytest.mark.parametrize(
    ("key", "mark", "expected"),
    [
        (EMPTY, "X", tuple(range(9))),  # every opening is a draw
        ("....X....", "O", (0, 2, 6, 8)),  # against the centre only corners hold
        ("X........", "O", (4,)),  # against a corner only the centre holds
        ("XX.OO....", "X", (2,)),  # wins now rather than blocking
        ("XX.O.....", "O", (2,)),  # must block
        ("X...O...X", "O", (1, 3, 5, 7)),  # a corner would lose to a fork
        ("X...XO..O", "X", (2,)),  # blocks, and threatens twice
        ("XO.......", "X", (3, 4, 6)),  # each of these wins by force
        ("XO..X....", "O", (8,)),  # lost to a fork, but anything else loses at once
    ],
)
def test_best_moves_by_hand(key: str, mark: str, expected: tuple[int, ...]) -> None:
    assert best_moves(key, mark) == expected


def test_best_moves_of_a_finished_game_is_an_error() -> None:
    with pytest.raises(ValueError, match="is over"):
        best_moves("XXX.OO...", "O")


def _results(key: str, mark: str) -> set[str | None]:
    """All results when both sides play any of their best moves."""
    if winner(key) or FREE not in key:
        return {winner(key)}
    children = (key[:cell] + mark + key[cell + 1 :] for cell in best_moves(key, mark))
    return set().union(*(_results(child, other(mark)) for child in children))


def test_perfect_play_by_both_always_draws() -> None:
    assert _results(EMPTY, "X") == {None}
    assert _results(EMPTY, "O") == {None}
