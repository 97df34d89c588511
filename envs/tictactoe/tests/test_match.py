"""Scores, invalid moves, the turn limit and state keys of scripted replies."""

import pytest
from rayrl_tictactoe.match import Match


def say(cell: int | str) -> str:
    return f"<think>ok</think><move>{cell}</move>"


def play(match: Match, *moves: str | int) -> Match:
    """A text is X's message, a number is O's move."""
    for move in moves:
        match = match.hear(move) if isinstance(move, str) else match.reply(move)
    return match


def test_a_won_game() -> None:
    match = play(Match(max_turns=8), say(0), 3, say(1), 4, say(2))
    assert match.over
    assert match.result == "win"
    assert match.scores() == {"win": 1.0, "format": 1.0, "invalid": 0.0}


def test_a_lost_game_of_the_second_player() -> None:
    match = play(Match(max_turns=8, to_move="O"), 0, say(3), 1, say(4), 2)
    assert match.over
    assert match.scores() == {"win": 0.0, "format": 1.0, "invalid": 0.0}


def test_a_drawn_game() -> None:
    # X X O / O O X / X O X
    match = play(Match(max_turns=8), say(0), 4, say(1), 2, say(6), 3, say(5), 7, say(8))
    assert match.over
    assert match.key == "XXOOOXXOX"
    assert match.scores() == {"win": 0.5, "format": 1.0, "invalid": 0.0}


def test_invalid_moves_are_reported_and_cost_a_flat_penalty() -> None:
    match = play(Match(max_turns=8), say(0), 3)
    before = match
    match = play(match, say(3))  # taken
    assert not match.over
    assert match.to_move == "X"
    assert match.key == before.key
    assert match.prompt().startswith("Invalid move.\n---------\nX | 1 | 2\n")
    match = play(match, "I resign", say(1), 4, say(2))
    assert match.scores() == {"win": 1.0, "format": 4 / 5, "invalid": -0.1}


def test_only_whole_messages_count_as_well_formed() -> None:
    match = play(Match(max_turns=8), "<move>0</move>", 3, say(1), 4, "<move>2</move>")
    assert match.result == "win"
    assert match.scores()["format"] == pytest.approx(1 / 3)


def test_the_turn_limit_loses_the_game() -> None:
    match = Match(max_turns=7)
    for turn in range(7):
        assert not match.over
        assert match.turns == turn
        match = play(match, "no")
    assert match.over
    assert match.scores() == {"win": 0.0, "format": 0.0, "invalid": -0.1}


def test_the_limit_loses_a_game_under_way_but_not_one_won_on_the_last_turn() -> None:
    match = play(Match(max_turns=4), say(0), 3, say(1), 4, "no")
    assert not match.over
    assert play(match, say(2)).result == "win"
    assert play(match, say(8)).over
    assert play(match, say(8)).result == "loss"


def test_state_names_board_and_invalid_moves_whatever_the_order() -> None:
    one = play(Match(max_turns=8), say(0), 4, say(8), 2)
    two = play(Match(max_turns=8), say(8), 4, say(0), 2)
    assert one.state == two.state == "X.O.O...X/0"
    assert play(one, "no").state == "X.O.O...X/1"
    # The penalty stays, so a later board of such a game is not that of a clean one.
    assert play(one, "no", say(6), 3).state == "X.OOO.X.X/1"
    assert play(one, say(6), 3).state == "X.OOO.X.X/0"


def test_statuses() -> None:
    assert Match(max_turns=8).prompt().startswith("Game started. You are X.\n")
    match = Match(max_turns=8, to_move="O").reply(4)
    assert match.prompt().startswith("Opponent (O) played at position 4.\n")
