"""Scripted players: what they say, what they see, how strong they are."""

import itertools
import random
from collections import Counter

import pytest
from rayrl_tictactoe.board import FREE, Board, best_moves, format_ok, parse_move, played, prompt
from rayrl_tictactoe.match import Match
from rayrl_tictactoe.players import (
    POLICIES,
    optimal,
    random_legal,
    read_board,
    teacher,
    teacher_policy,
)
from rayrl_tictactoe.strength import most_wins, strength

from rayrl import Message, assistant, system, user


def messages(key: str) -> list[Message]:
    return [system("rules"), user(prompt(played(0), Board(key)))]


def test_the_board_is_read_from_the_last_user_message() -> None:
    talk = [*messages(FREE * 9), assistant("<move>0</move>"), *messages("X...O...X")]
    assert read_board(talk) == "X...O...X"


@pytest.mark.parametrize("talk", [[], [system("0 | 1 | 2")], [user("hello")]])
def test_no_board_is_an_error(talk: list[Message]) -> None:
    with pytest.raises(ValueError, match="no board"):
        read_board(talk)


def replies(player: object, key: str, n: int = 200) -> Counter[str]:
    assert callable(player)
    return Counter(player(messages(key), random.Random(seed)) for seed in range(n))


def reply(thought: str, cell: int) -> str:
    return f"<think>{thought}</think><move>{cell}</move>"


def test_replies_of_the_players() -> None:
    assert replies(optimal, "XX.OO....").keys() == {reply("X: top row: 2. Win.", 2)}
    block = reply("X: none; O: middle row: 3. Block.", 3)
    assert replies(optimal, "X...OO...").keys() == {block}
    calm = "X: none; O: none."
    assert replies(optimal, "XO.......").keys() == {
        reply(f"{calm} Best {cell}.", cell) for cell in (3, 4, 6)
    }
    assert replies(random_legal, "XOXOXOO.X").keys() == {reply("Take 7.", 7)}
    assert replies(teacher, "X.O......", 1000).keys() == {
        reply(f"{calm} Take {cell}.", cell) for cell in (1, 3, 4, 5, 6, 7, 8)
    }
    assert replies(teacher, "XXOOOXX.O").keys() == {reply(f"{calm} Take 7.", 7)}


def test_the_teacher_sees_most_wins_and_threats_but_not_all() -> None:
    said = replies(teacher, "XX.OO....", 4000)
    share = {text: count / 4000 for text, count in said.items()}
    assert share[reply("X: top row: 2. Win.", 2)] == pytest.approx(0.95, abs=0.015)
    assert share[reply("X: none; O: middle row: 5. Block.", 5)] == pytest.approx(0.0475, abs=0.01)
    said = replies(teacher, "X...OO...", 4000)
    share = {text: count / 4000 for text, count in said.items()}
    assert share[reply("X: none; O: middle row: 3. Block.", 3)] == pytest.approx(0.95, abs=0.015)


def test_the_teacher_plays_a_random_cell_a_quarter_of_the_time() -> None:
    said = replies(teacher, ".........", 4000)
    elsewhere = sum(count for text, count in said.items() if "<move>4" not in text) / 4000
    assert elsewhere == pytest.approx(0.25 * 8 / 9, abs=0.03)


def boards_with_x_to_move() -> list[str]:
    keys = ("".join(cells) for cells in itertools.product("XO.", repeat=9))
    return [
        key for key in keys if key.count("X") - key.count("O") in (0, -1) and not Board(key).over
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_distributions_over_free_cells_with_short_thoughts(name: str) -> None:
    for key in boards_with_x_to_move():
        choices = POLICIES[name](key)
        assert sum(choice.probability for choice in choices) == pytest.approx(1)
        assert all(choice.probability >= 0 for choice in choices)
        assert {choice.cell for choice in choices} <= set(Board(key).free())
        assert all(len(choice.thought.split()) <= 8 for choice in choices)


def test_thoughts_are_true() -> None:
    for key in boards_with_x_to_move():
        for choice in teacher_policy(key):
            board = Board(key)
            rival = Board(key)
            board.play(choice.cell, "X")
            rival.play(choice.cell, "O")
            if "win" in choice.thought:
                assert board.winner() == "X"
            if "block" in choice.thought:
                assert rival.winner() == "O"


def test_replies_are_well_formed_and_legal() -> None:
    for player in (optimal, random_legal, teacher):
        for key in random.Random(0).sample(boards_with_x_to_move(), 50):
            for text in replies(player, key, 5):
                assert format_ok(text)
                assert parse_move(text) in Board(key).free()


def test_perfect_play_never_loses_and_beats_random_as_often_as_is_known() -> None:
    assert strength(POLICIES["optimal"], 0.0).draw == pytest.approx(1)
    against_random = strength(POLICIES["optimal"], 1.0)
    assert against_random.loss == 0
    assert against_random.win == pytest.approx(0.8726, abs=5e-5)


def test_random_play_is_symmetric_when_both_start_equally_often() -> None:
    # The first player's known rates: 58.5% won, 12.7% drawn, 28.8% lost.
    rates = strength(POLICIES["random"], 1.0)
    assert rates.win == pytest.approx(rates.loss)
    assert rates.win == pytest.approx((0.58492 + 0.28810) / 2, abs=5e-5)
    assert rates.draw == pytest.approx(0.12698, abs=5e-5)


def test_the_most_wins_against_random() -> None:
    """By the known best replies: 99.48% when starting; 93.86% as second, 91.64% without risk."""
    assert most_wins(never_lose=False) == pytest.approx((0.99479 + 0.93862) / 2, abs=1e-5)
    assert most_wins(never_lose=True) == pytest.approx((0.99479 + 0.91640) / 2, abs=1e-5)
    for policy in POLICIES.values():
        assert strength(policy, 1.0).win < most_wins(never_lose=True)


def test_the_teacher_is_as_strong_as_the_references() -> None:
    """Theirs: 0/76/24 against optimal, 90/9/1 against random; 100 games each are good to ±6."""
    against_optimal = strength(POLICIES["teacher"], 0.0)
    assert against_optimal.win == 0
    assert against_optimal.draw == pytest.approx(0.76, abs=0.01)
    against_random = strength(POLICIES["teacher"], 1.0)
    assert against_random.win == pytest.approx(0.90, abs=0.03)
    assert against_random.draw == pytest.approx(0.09, abs=0.03)
    assert against_random.loss == pytest.approx(0.01, abs=0.01)


def test_played_games_agree_with_the_computed_strength() -> None:
    results: Counter[str] = Counter()
    n = 4000
    for seed in range(n):
        rng = random.Random(seed)
        match = Match(max_turns=8, to_move=rng.choice("XO"))
        while not match.over:
            if match.to_move == "X":
                match = match.hear(teacher([user(match.prompt())], rng))
            else:
                match = match.reply(rng.choice(best_moves(match.key, "O")))
        assert match.scores()["format"] == 1
        assert match.scores()["invalid"] == 0
        results[match.result] += 1
    expected = strength(POLICIES["teacher"], 0.0)
    assert results["draw"] / n == pytest.approx(expected.draw, abs=0.025)  # 3.7 standard errors
    assert results["loss"] / n == pytest.approx(expected.loss, abs=0.025)
