"""Words, scores, one whole episode."""

import random
import string

import pytest
from rayrl_copyword import Word, copyword, score, words

from rayrl import ConfigError, Reply, user


@pytest.mark.parametrize(
    ("reply", "copied", "form"),
    [
        ("<word>abcd</word>", 1.0, 1.0),
        (" <word>abcd</word>\n", 1.0, 1.0),
        ("<word>abxd</word>", 0.75, 1.0),
        ("<word>abcdabcd</word>", 0.5, 1.0),
        ("<word>ab</word>", 0.5, 1.0),
        ("<word></word>", 0.0, 1.0),
        ("Sure: <word>abcd</word>", 1.0, 0.0),
        ("<word>x</word><word>abcd</word>", 1.0, 0.0),
        ("abcd", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_scores_by_hand(reply: str, copied: float, form: float) -> None:
    assert score("abcd", reply) == {"copied": copied, "format": form}


def test_lengths_cover_their_range_evenly() -> None:
    env = copyword.configure({"shortest": 3, "longest": 5, "alphabet": "ab"})
    tasks = env.tasks(seed=0, n=9)
    assert [len(task.word) for task in tasks] == [3, 3, 3, 4, 4, 4, 5, 5, 5]  # type: ignore[attr-defined]
    assert set("".join(task.word for task in tasks)) == {"a", "b"}  # type: ignore[attr-defined]


def test_a_word_depends_on_its_seed_only() -> None:
    assert words(seed=1, u=0.5) == words(seed=1, u=0.5)
    assert words(seed=1, u=0.5) != words(seed=2, u=0.5)
    assert set(words(seed=1, u=0.999).word) <= set(string.ascii_lowercase)
    assert len(words(seed=1, u=0.999).word) == 8


@pytest.mark.parametrize(
    ("args", "named"),
    [({"alphabet": ""}, "alphabet"), ({"shortest": 0}, "shortest"), ({"longest": 1}, "longest=1")],
)
def test_settings_without_a_possible_word_are_rejected(args: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        words(seed=0, u=0.0, **args)  # type: ignore[arg-type]


async def test_one_message_one_reply() -> None:
    asked: list[str] = []

    async def agent(prompt: str) -> Reply:
        asked.append(prompt)
        return Reply(copyword.players["perfect"]([user(prompt)], random.Random(0)))

    assert await copyword(Word(word="hello"), agent) == {"copied": 1.0, "format": 1.0}
    assert asked == ["Repeat this word: hello"]
