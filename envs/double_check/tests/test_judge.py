"""What counts as the right answer, and what never reaches the algebra."""

import random
import threading
from fractions import Fraction

import pytest
from rayrl_double_check import judge
from rayrl_double_check.judge import LONGEST, finished, is_right, normal


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("84", "84"),
        (" 84\n", "84"),
        ("$84$", "84"),
        ("+84", "84"),
        ("84.0", "84"),
        ("x = 84", "84"),
        ("1,000", "1000"),
        ("-7", "-7"),
        ("−7", "-7"),
        ("0.75", "3/4"),
        ("6/8", "3/4"),
        ("\\frac{3}{4}", "3/4"),
        ("\\dfrac{3}{4}", "3/4"),
        ("-\\frac{3}{4}", "-3/4"),
        ("x = -3/4", "-3/4"),
        ("0.333333", "1/3"),
        ("2 + 3x^2", "3x^2 + 2"),
        ("3*x**2+2", "3x^2 + 2"),
        ("3 \\cdot x^{2} + 2", "3x^2 + 2"),
        ("3X^2 + 2", "3x^2 + 2"),
        ("5x^{12}", "5x^12"),
        ("0", "0"),
    ],
)
def test_right_in_any_spelling(answer: str, expected: str) -> None:
    assert is_right(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "84"),
        ("83", "84"),
        ("84%", "84"),
        ("0.84", "84"),
        ("0.333", "1/3"),
        ("-3/4", "3/4"),
        ("1/0", "84"),
        ("0/0", "0"),
        ("\\frac{1}{0}", "3/4"),
        ("3x^2", "3x^2 + 2"),
        ("3y^2 + 2", "3x^2 + 2"),
        ("5x^1", "5x^12"),
        ("10x", "5x^12"),  # how TeX reads it: x to the first, times 2
        ("٨٤", "84"),
        ("84 or 83", "84"),
        ("83 = 84", "84"),
        ("x = 83 = 84", "84"),
        ("83, 84", "84"),
        ("{83, 84}", "84"),
        ("eighty-four", "84"),
    ],
)
def test_wrong(answer: str, expected: str) -> None:
    assert not is_right(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("12 * 7", "84"),
        ("12 \\times 7", "84"),
        ("80 + 4", "84"),
        ("168/2", "84"),
        ("\\frac{168}{2}", "84"),
        ("x = 168/2", "84"),
        ("2^3", "8"),
        ("(8)", "8"),
        ("1/2 + 1/4", "3/4"),
        ("3x - x + 7", "2x + 7"),
        ("2(x + 3)", "2x + 6"),
    ],
)
def test_repeating_the_question_is_not_an_answer(answer: str, expected: str) -> None:
    text = f"${normal(answer)}$"
    library = judge.verify(judge.parse(f"${expected}$"), judge.parse(text))
    assert library, "math-verify alone takes it"
    assert not is_right(answer, expected)


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "10^999999999",
        "x^999999999",
        "9!!!!",
        "\\binom{10^9}{10^8}",
        "\\sum_{i=1}^{10^9} i",
        "\\int_0^1 e^{x^x} dx",
        "1" * 100_000,
        "(" * 5_000 + "1" + ")" * 5_000,
        "1 + " * 5_000 + "1",
        "\\frac{1}{" * 1_000 + "1" + "}" * 1_000,
        "__import__('os').abort()",
    ],
)
@pytest.mark.timeout(20)
def test_expressions_that_would_never_end_are_not_evaluated(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the library was asked")

    monkeypatch.setattr(judge, "parse", reached)
    for expected in ("84", "3/4", "-7x^2 + 3x - 5"):
        assert not is_right(answer, expected)


@pytest.mark.timeout(60)
def test_the_largest_finished_answers_are_compared() -> None:
    nines = "9" * 12
    for answer in (nines, f"{nines}.{nines}", f"{nines}/{nines}", f"{nines}.{nines}x^99"):
        assert finished(normal(answer), "1/2")
        assert not is_right(answer, "1/2")
    assert not finished("1" * (LONGEST + 1), "1")


def test_it_agrees_with_exact_arithmetic() -> None:
    rng = random.Random(0)
    agreed = 0
    for _ in range(300):
        right = Fraction(rng.randint(-20, 20), rng.randint(1, 9))
        said = rng.choice([right, -right, right + 1, Fraction(rng.randint(-20, 20), 7)])
        times = rng.randint(1, 5)  # not in lowest terms
        text = f"{said.numerator * times}/{said.denominator * times}"
        whole = right.denominator == 1
        assert is_right(text, str(right)) == (said == right and not whole)
        assert is_right(str(said), str(right)) == (said == right)
        agreed += said == right
    assert 50 < agreed < 250


def test_it_works_outside_the_main_thread_where_signals_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found: list[bool] = []

    def ask() -> None:
        found.extend([is_right("123.5", "247/2"), is_right("124.5", "247/2")])

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [True, False]
    assert not caplog.records  # the library's advice to mind the time limits is not for the user
