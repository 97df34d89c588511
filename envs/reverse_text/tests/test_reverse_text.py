"""Texts, scores, players, whole episodes."""

import asyncio
import random

import pytest
from rayrl_reverse_text import EXAMPLES, Text, reverse_text, score, split_of, texts
from rayrl_reverse_text.words import WORDS

from rayrl import ConfigError, Reply, ScriptedPlayer, assistant, check_env, play_group, system, user


@pytest.mark.parametrize(
    ("reply", "lcs", "exact", "form"),
    [
        ("<reversed_text>dcba</reversed_text>", 1.0, 1.0, 1.0),
        (" <reversed_text>\ndcba </reversed_text>\n", 1.0, 1.0, 1.0),
        ("<reversed_text>dca</reversed_text>", 6 / 7, 0.0, 1.0),  # dca: 2·3 / (4 + 3)
        ("<reversed_text>abcd</reversed_text>", 2 / 8, 0.0, 1.0),  # any one letter
        ("<reversed_text>dcbadcba</reversed_text>", 8 / 12, 0.0, 1.0),  # repeating is no use
        ("<reversed_text>DCBA</reversed_text>", 0.0, 0.0, 1.0),
        ("<reversed_text></reversed_text>", 0.0, 0.0, 1.0),
        ("Sure: <reversed_text>dcba</reversed_text>", 1.0, 1.0, 0.0),
        ("<reversed_text>x</reversed_text><reversed_text>dcba</reversed_text>", 1.0, 1.0, 0.0),
        ("<reversed_text>dcba", 0.0, 0.0, 0.0),
        ("dcba", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_scores_by_hand(reply: str, lcs: float, exact: float, form: float) -> None:
    assert score("dcba", reply) == pytest.approx({"lcs": lcs, "exact": exact, "format": form})


def test_what_matters_is_the_longest_common_subsequence_not_blocks() -> None:
    # difflib first takes the longest block, "cab", and then finds nothing more: 2·3 / 10. The
    # longest common subsequence is "abab": 2·4 / 10.
    reply = "<reversed_text>cabab</reversed_text>"
    assert score("abcab", reply)["lcs"] == pytest.approx(0.8)


def test_the_words() -> None:
    assert len(WORDS) == len(set(WORDS)) > 700
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)
    assert {len(word) for word in WORDS} == {3, 4, 5, 6, 7}
    assert not [word for word in WORDS if word == word[::-1]]
    assert not set(" ".join(EXAMPLES).split()) & set(WORDS)


def test_no_word_of_a_test_is_ever_trained_on() -> None:
    def seen(split: str) -> set[str]:
        env = reverse_text.configure({"split": split, "letters": 7})
        return {word for task in env.tasks(seed=0, n=2000) for word in task.text.split()}  # type: ignore[attr-defined]

    train, test = seen("train"), seen("test")
    assert not train & test
    assert len(train | test) > 0.98 * len(WORDS)
    assert len(test) / len(WORDS) == pytest.approx(0.2, abs=0.05)
    # Fixed for good: another split would make old results incomparable.
    assert [split_of(word) for word in ("cat", "dog", "tree")] == ["train", "test", "train"]


def test_a_batch_covers_the_lengths_evenly_with_words_that_are_short_enough() -> None:
    env = reverse_text.configure({"shortest": 2, "longest": 4, "letters": 3})
    tasks = env.tasks(seed=0, n=9)
    words = [task.text.split(" ") for task in tasks]  # type: ignore[attr-defined]
    assert [len(each) for each in words] == [2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert {len(word) for each in words for word in each} == {3}


def test_a_text_depends_on_its_seed_only() -> None:
    assert texts(seed=1, u=0.5) == texts(seed=1, u=0.5)
    assert texts(seed=1, u=0.5) != texts(seed=2, u=0.5)
    assert texts(seed=1, u=0.5).text[::-1] == texts(seed=1, u=0.5).reversed


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"shortest": 0}, "shortest=0"),
        ({"longest": 0}, "longest=0"),
        ({"letters": 2}, "letters=2"),
        ({"examples": 4}, "examples=4.*0 to 3"),
    ],
)
def test_settings_without_a_possible_text_are_rejected(args: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        texts(seed=0, u=0.0, **args)  # type: ignore[arg-type]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"split.*'train', 'test'"):
        reverse_text.configure({"split": "tset"})


async def test_messages_to_the_model() -> None:
    asked: list[object] = []

    async def agent(prompt: object) -> Reply:
        asked.append(prompt)
        return Reply("<reversed_text>olleh</reversed_text>")

    task = Text(text="hello", reversed="olleh", examples=1, system_prompt="Backwards!")
    assert await reverse_text(task, agent) == {"lcs": 1.0, "exact": 1.0, "format": 1.0}
    example = [user("fun"), assistant("<reversed_text>nuf</reversed_text>")]
    assert asked == [[system("Backwards!"), *example, user("hello")]]


def test_the_players_in_rayrls_own_loop() -> None:
    def rewards(name: str) -> list[float]:
        player = ScriptedPlayer(reverse_text.players[name])
        groups = [
            asyncio.run(play_group(reverse_text, task, {"agent": player}, id=name, size=4, seed=k))
            for k, task in enumerate(reverse_text.tasks(seed=0, n=12))
        ]
        assert all(group.complete for group in groups)
        return [episode.rewards["agent"] for group in groups for episode in group.episodes]

    assert rewards("perfect") == pytest.approx([1.2] * 48)
    assert 0.2 < sum(rewards("copy")) / 48 < 0.7
    assert 1.0 < sum(rewards("teacher")) / 48 < 1.2


def test_the_teacher_leaves_out_a_character_in_ten() -> None:
    teacher = reverse_text.players["teacher"]
    replies = [teacher([user("abcdef")], random.Random(seed)) for seed in range(4000)]
    exact = [score("fedcba", str(reply))["exact"] for reply in replies]
    assert sum(exact) / 4000 == pytest.approx(0.9**6, abs=0.03)  # four standard errors


def test_env_check_finds_no_problems() -> None:
    assert check_env(reverse_text) == []
