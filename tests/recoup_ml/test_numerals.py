"""Numbers are compared as numbers, however they are written."""

import random
import time

import pytest

from recoup_ml.numerals import is_quantity, last_number, marked_number


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000"),
        ("1000", "1000.0"),
        ("1\u202f000", "1'000.00"),
        ("$1,000", "1000 dollars"),
        ("1e3", "1000"),
        ("-5", "−5"),
        ("-$5", "$-5"),
        ("1/2", "0.5"),
        ("½", r"\frac{1}{2}"),
        (r"-\dfrac{3}{4}", "-0.75"),
        ("3½ hours", "3 1/2"),
        (r"2\frac{1}{2}", "2.5"),
        (".5", "0.50"),
        ("50%", "0.5"),
        ("50 percent", "50"),
        (r"50\%", "50 per cent"),
        ("1.5 million", "1,500,000"),
        ("3,5 km", "3.5 km"),
        (r"1{,}000", "1000"),
        ("**42**", r"\(42\)"),
        ("42km", "x=42"),
        ("6 * 7 = 42.", "42"),
        ("44 cm^2", "44 m²"),
        ("from 10-42", "42"),
        ("- 42 apples", "42"),
    ],
)
def test_the_same_number_in_another_dress(one: str, other: str) -> None:
    ours, theirs = last_number(one), last_number(other)
    assert ours is not None and theirs is not None
    assert ours.same(theirs) and theirs.same(ours)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1.5"),
        ("5", "-5"),
        ("5 million", "5"),
        ("50%", "5"),
        ("0.5%", "50"),
        ("1/2", "1/3"),
        ("42", "420"),
        ("3,5", "4,5"),
        ("1/3", "0.33"),
        ("1e3", "1e4"),
        ("9" * 80, "9" * 79 + "8"),
    ],
)
def test_other_numbers_differ(one: str, other: str) -> None:
    ours, theirs = last_number(one), last_number(other)
    assert ours is not None and theirs is not None
    assert not ours.same(theirs) and not theirs.same(ours)


@pytest.mark.parametrize("text", ["", "none", "CO2", "x1", "v1", "forty-two", "5/0", "9" * 200])
def test_what_cannot_be_read_is_no_number(text: str) -> None:
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 2 = 4\n#### 4", 4),
        ("#### -1,200", -1200),
        (r"so \boxed{42} it is, as 5 shows", 42),
        ("The answer is 42. It took 3 steps.", 42),
        ("**Answer:** $42", 42),
        ("The final answer to the problem is: x = 7 apples", 7),
        ("The answer is 3. No: the answer is 4.", 4),
    ],
)
def test_the_number_that_is_called_the_answer_is_found(text: str, value: int) -> None:
    found = marked_number(text)
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize(
    "text",
    [
        "In 1998 it was 42.",
        "Please answer the following questions:\n\n1. Who?",
        "#### Steps",
        "The answer is in 1998",
    ],
)
def test_other_numbers_are_not_called_the_answer(text: str) -> None:
    assert marked_number(text) is None


@pytest.mark.parametrize("text", ["42", " 77.0°F ", "42 apples.", "$3.50", "x = 5", "-1/2", "½ cup", "12 %"])
def test_a_number_with_its_unit_is_a_quantity(text: str) -> None:
    assert is_quantity(text)


@pytest.mark.parametrize(
    "text", ["", "Apollo 11", "(555) 123-4567", "3/4/2020", "1, 2, 3", "5 of the 12", "a\n5"]
)
def test_anything_else_is_no_quantity(text: str) -> None:
    assert not is_quantity(text)


@pytest.mark.parametrize(
    "part",
    [
        "1",
        "1,",
        "1,000,",
        "1/",
        "1 ",
        "-",
        "$",
        "1e",
        ".1",
        "answer ",
        "answer is ",
        "####",
        r"\frac{1}",
        "½",
        "1.",
        "\n",
    ],
)
@pytest.mark.parametrize("end", ["", "x", "1"])
def test_no_text_takes_long(part: str, end: str) -> None:
    text = part * (200_000 // len(part)) + end
    started = time.process_time()
    last_number(text), marked_number(text), is_quantity(text)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("seed", range(20))
def test_a_number_is_read_back_from_any_of_its_forms(seed: int) -> None:
    value = random.Random(seed).randint(-(10**9), 10**9)
    for form in (f"{value}", f"{value:,}", f"{value}.0", f"it is {value:,} in all", f"{value * 100}%"):
        found = last_number(form)
        assert found is not None
        assert found.value == value * (100 if found.percent else 1)
