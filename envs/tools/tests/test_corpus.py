"""The documents, the search over them, the questions made of them."""

import importlib.util
import json
import random
import re
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from rayrl_tools.corpus import Corpus
from rayrl_tools.questions import FORMS, LEVELS, ask, same

CORPUS = Corpus.load()


def maker() -> ModuleType:
    file = Path(__file__).parent.parent / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shipped_file_is_what_its_script_writes() -> None:
    made = json.loads(json.dumps(maker().corpus()))
    assert made == [asdict(document) for document in CORPUS.documents]
    assert len(made) == 130


def test_every_fact_is_in_its_text_once() -> None:
    for one in CORPUS.documents:
        assert one.title in one.text
        for fact, value in one.facts.items():
            found = re.findall(rf"\b{re.escape(str(value))}\b", one.text)
            assert found == [str(value)], (one.id, fact)


def test_the_two_splits_never_mention_each_other() -> None:
    names = {
        split: {one.title for one in CORPUS.documents if one.split == split}
        for split in ("train", "test")
    }
    assert (len(names["train"]), len(names["test"])) == (96, 34)
    for one in CORPUS.documents:
        others = names["test" if one.split == "train" else "train"]
        assert not [name for name in others if name in one.text]


def test_a_title_finds_its_document_first() -> None:
    for one in CORPUS.documents:
        assert CORPUS.search(one.title, 3)[0] is one
        assert CORPUS.search(one.title.lower() + "?", 1) == [one]


def test_searches_without_a_shared_word_find_nothing() -> None:
    assert CORPUS.search("qwertz", 3) == []
    assert CORPUS.search("", 3) == []
    assert len(CORPUS.search("town river", 3)) == 3


def test_answers_by_hand() -> None:
    """One question of each of two forms, worked out from the texts by a person."""
    baronpan, bohirko = CORPUS.by_title["Baronpan"], CORPUS.by_title["Bohirko"]
    assert "28626 inhabitants" in baronpan.text
    assert "70005 inhabitants" in bohirko.text
    rng, found = random.Random(0), {}
    for _ in range(20_000):
        question = ask(rng, 3, "train")
        found[question.text] = question
    more = found["How many more inhabitants does Bohirko have than Baronpan?"]
    assert (more.answer, more.needed) == ("41379", 5)  # 70005 - 28626; 2 searches, 2 openings, 1
    assert "How many more inhabitants does Baronpan have than Bohirko?" not in found
    years = found["How many years before Baronpan was Bohirko founded?"]
    assert years.answer == "123"  # 1874 - 1751


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_of_a_level(level: int, split: str) -> None:
    rng = random.Random(level)
    questions = [ask(rng, level, split) for _ in range(200)]
    others = CORPUS.titles("town", "test" if split == "train" else "train")
    assert len({question.text for question in questions}) > 25
    for question in questions:
        assert question.answer not in ("", "0")
        assert not question.answer.startswith("-")
        assert not any(name in question.text or name == question.answer for name in others)
    needed = {1: {2}, 2: {4}, 3: {5}, 4: {5, 7}, 5: {7, 8, 9, 11}}[level]
    assert {question.needed for question in questions} <= needed


def test_every_form_has_its_question_and_level() -> None:
    assert {form.level for form in FORMS} == set(range(1, LEVELS + 1))
    for form in FORMS:
        assert "{0}" in form.text
        assert bool(form.work) == (form.level >= 3)


@pytest.mark.parametrize(
    ("answer", "given", "right"),
    [
        ("1234", "1234", True),
        ("1234", " 1,234 inhabitants.", True),
        ("1234", "1 234", True),
        ("1234", "1234.0", True),
        ("1234", "**1234**", True),
        ("1234", "1235", False),
        ("1234", "1.234", False),
        ("1234", "12,34", False),
        ("1234", "-1234", False),
        ("1234", "1234 or 1235", False),
        ("1234", "", False),
        ("3", "three", False),
        ("Bohirko", "bohirko.", True),
        ("Bago Tunadar", " Bago  Tunadar ", True),
        ("Bago Tunadar", "Tunadar", False),
        ("Bohirko", "Bohirko or Baronpan", False),
        ("Bohirko", "", False),
    ],
)
def test_what_counts_as_the_answer(answer: str, given: str, right: bool) -> None:
    assert same(answer, given) is right
