"""A rewrite is learnt from if it answers alike and does not betray itself; else the reference is."""

import random
import time

import pytest

from recoup.schemas import Message, Prompt
from recoup_ml.rewrite import (
    LEAKS,
    REQUESTS,
    Judgement,
    Reason,
    Rewritten,
    demonstrated,
    judge,
    rewriting,
    settle,
)

REFERENCE = "Plants need light, water and air. They grow towards the sun."
REFERENCES = [
    REFERENCE,
    "6 * 7 = 42\n#### 42",
    "```python\ndef add(a, b):\n    return a + b\n```",
    '{"name": "add", "arguments": {"a": 1}}',
    "add(a=1)",
    "billing",
]


def asked(reference: str | None = REFERENCE, question: str = "What do plants need?") -> Prompt:
    system = Message(role="system", content="Be brief.")
    return Prompt(
        messages=[system, Message(role="user", content=question)], completion=reference, kind="plants"
    )


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("show", [rewriting, demonstrated])
def test_question_and_reference_are_shown_and_the_rest_stays(show, reference: str) -> None:
    prompt = asked(reference)
    shown = show(prompt)
    *head, last = shown.messages
    assert head == prompt.messages[:-1]
    assert last.role == "user"
    assert "What do plants need?" in last.content and reference in last.content
    assert (shown.completion, shown.kind) == (reference, "plants")


def test_each_kind_of_answer_is_asked_for_in_its_own_way() -> None:
    requests = {
        rewriting(asked(reference)).messages[-1].content.rpartition("\n\n")[2] for reference in REFERENCES
    }
    assert requests == set(REQUESTS.values())


def test_a_demonstration_is_followed_by_the_same_question() -> None:
    text = demonstrated(asked()).messages[-1].content
    assert text.count("What do plants need?") == 2
    assert text.endswith("What do plants need?")


@pytest.mark.parametrize("show", [rewriting, demonstrated])
def test_braces_and_long_texts_are_shown_as_they_are(show) -> None:
    prompt = asked("{reference} {0} {" + "y" * 150_000, "{question} %s " + "x" * 150_000)
    assert prompt.messages[-1].content in show(prompt).messages[-1].content
    assert prompt.completion in show(prompt).messages[-1].content


@pytest.mark.parametrize("show", [rewriting, demonstrated])
def test_without_a_reference_there_is_nothing_to_show(show) -> None:
    with pytest.raises(ValueError, match="no reference answer"):
        show(asked(None))


@pytest.mark.parametrize(
    "rewrite",
    [
        "Light, water and air are what plants live on; they lean towards the sun.",
        REFERENCE,
        "They need: light, water, air. In other words, what any of us needs.",
        "Plants are guided by light as their guide, with water as a help.",
        "Ja, ja, ja: " + "ja " * 20,
    ],
)
def test_an_answer_in_other_words_is_kept(rewrite: str) -> None:
    assert judge(rewrite, asked(), "stop") == Judgement(kept=True, reason=None)


@pytest.mark.parametrize(
    ("rewrite", "finish", "reason"),
    [
        ("", "stop", "empty"),
        (" \n\t ", "stop", "empty"),
        ("Light and", "length", "cut"),
        ("", "length", "cut"),
        ("Light and water. " * 30, "stop", "repetitive"),
        ("Reference answer: light and water.", "stop", "leaked_template"),
        ("According to the\nREFERENCE, plants need light.", "stop", "leaked_template"),
        ("In my own words: plants need light.", "stop", "leaked_template"),
        ("Here is a rewritten answer: plants need light.", "stop", "leaked_template"),
        ("Light. Say the same, at about the same length.", "stop", "leaked_template"),
        ("Light.\n\nNow give a response of your\nown to the same request:", "stop", "leaked_template"),
    ],
)
def test_a_refusal_has_its_reason(rewrite: str, finish: str, reason: Reason) -> None:
    assert judge(rewrite, asked(), finish) == Judgement(kept=False, reason=reason)


@pytest.mark.parametrize(
    ("reference", "words", "reason"),
    [("billing", 7, None), ("billing", 8, "too_long"), (REFERENCE, 233, None), (REFERENCE, 234, "too_long")],
)
def test_a_rewrite_has_at_most_three_times_the_words_of_its_reference_and_some(
    reference: str, words: int, reason: Reason | None
) -> None:
    more = (f"word{number}" for number in range(words - len(reference.split())))
    assert judge(" ".join([reference, *more]), asked(reference), "stop").reason == reason


@pytest.mark.parametrize("reference", REFERENCES[1:])
def test_a_lost_answer_is_refused_and_a_kept_one_is_not(reference: str) -> None:
    assert judge("Light and water.", asked(reference), "stop") == Judgement(False, "lost_answer")
    assert judge(f"Sure.\n\n{reference}", asked(reference), "stop") == Judgement(True, None)


@pytest.mark.parametrize("phrase", LEAKS)
def test_a_phrase_of_the_question_or_the_reference_is_no_leak(phrase: str) -> None:
    rewrite = f"Here {phrase} stands."
    assert judge(rewrite, asked(), "stop").reason == "leaked_template"
    assert judge(rewrite, asked(question=f"What is  {phrase.upper()}?"), "stop").kept
    assert judge(rewrite, asked(f"We say {phrase}, as one does."), "stop").kept


@pytest.mark.parametrize("request_text", REQUESTS.values())
def test_a_rewrite_that_echoes_its_request_is_refused(request_text: str) -> None:
    assert judge(f"{request_text}\nLight.", asked(), "stop").reason == "leaked_template"


def test_a_reference_that_repeats_itself_may_be_repeated() -> None:
    song = "Row, row, row your boat. " * 30
    assert judge(song, asked(song), "stop").kept
    assert judge(song, asked(), "stop").reason == "repetitive"


def test_a_kept_rewrite_is_learnt_without_the_space_around_it() -> None:
    text, origin = settle(asked(), "\n Light and water. \n", "stop")
    assert text == "Light and water."
    assert origin == Rewritten(source="rewrite", reason=None, reference=REFERENCE)


def test_a_refused_rewrite_leaves_the_reference_as_it_was() -> None:
    reference = " 6 * 7 = 42\n#### 42\n"
    text, origin = settle(asked(reference), "It is 43.", "stop")
    assert text == reference
    assert origin == Rewritten(source="original", reason="lost_answer", reference=reference)


PIECES = [
    *(
        "word",
        "the reference",
        "42",
        "-1,000.5",
        "1/0",
        "½",
        "%",
        "####",
        "answer is",
        "\\frac{1}{2}",
        "```",
        "```python\n",
    ),
    *(
        "def add(",
        "class ",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        '{"name": "add", "arguments": ',
        '"',
        "'",
        "\\",
        "\n",
        "\t",
        " ",
    ),
    *(
        "\x00",
        "\ud800",
        "\u202e",
        "🙂",
        "e9999",
        "1e999",
        "add(a=1)",
        "billing",
        ";",
        ":",
        "=",
        "f'{",
        "#",
        "if x:\n\t",
    ),
]


@pytest.mark.parametrize("seed", range(150))
def test_any_text_can_be_judged_and_no_row_is_dropped(seed: int) -> None:
    draw = random.Random(seed)
    rewrite, reference = ("".join(draw.choices(PIECES, k=draw.randint(1, 60))) for _ in range(2))
    prompt = asked().model_copy(update={"completion": draw.choice([reference, *REFERENCES])})
    text, origin = settle(prompt, rewrite, draw.choice(["stop", "length"]))
    assert text == (rewrite.strip() if origin.source == "rewrite" else prompt.completion)
    assert (origin.source == "rewrite") == (origin.reason is None)


@pytest.mark.parametrize("piece", PIECES)
def test_the_longest_texts_are_judged_at_once(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    prompt = asked().model_copy(update={"completion": text})
    started = time.process_time()
    judge(text, prompt, "stop")
    assert time.process_time() - started < 5
