"""What a reference answer is, and whether another text still comes to it."""

import time

import pytest

from recoup.schemas import Message, Prompt
from recoup_ml.answer_check import AnswerKind, answer_kind, answer_survives, holds

FUNCTION = 'Here it is:\n```python\ndef add(a, b):\n    """The sum."""\n    return a + b\n```'
SCRIPT = "class Queue:\n    def push(self, item):\n        self.items.append(item)"
JAVA = "```java\npublic class Main {\n    public static void main(String[] args) {}\n}\n```"


def asked(reference: str, question: str = "Tell me.") -> Prompt:
    return Prompt(messages=[Message(role="user", content=question)], completion=reference)


@pytest.mark.parametrize(
    ("reference", "question", "kind"),
    [
        ("6 * 7 = 42\n#### 42", "Solve.", "number"),
        ("So the answer is 42.", "Well?", "number"),
        ("77.0°F", "Convert 25°C.", "number"),
        ("They have 12 apples in all.", "How many apples do they have?", "number"),
        ("They have 12 apples in all.", "Tell a story.", "free"),
        ("About 300 in babies. It varies.", "How many bones are there?", "free"),
        (FUNCTION, "Write a function.", "code"),
        (SCRIPT, "Write a class.", "code"),
        ("<ul>\n<li>one</li>\n</ul>", "A list in HTML.", "code"),
        ("int main() {\n  return 0;\n}", "A program in C.", "code"),
        ("print('hello')", "Print hello.", "exact"),
        ("import math\nprint(math.pi)", "Print pi.", "code"),
        ('{"name": "add", "arguments": {"a": 1}}', "Add.", "call"),
        ('Let me see. {"name": "add", "arguments": {"a": 1}}', "Add.", "call"),
        ("add(a=1)", "Add.", "call"),
        ('```json\n{"name": "add", "arguments": {}}\n```', "Add.", "call"),
        ("billing", "Route the ticket.", "exact"),
        ("Science fiction.", "Which genre?", "exact"),
        ("Apollo 11", "Which mission?", "exact"),
        ("The car accelerated rapidly.", "Use a synonym.", "free"),
        ("red\nblue\ngreen", "Three colours.", "free"),
        ("fog; mist; haze and also some rain", "Words for weather.", "free"),
        ("Recycling is important. It saves energy.", "Persuade me.", "free"),
        ("x" * 200, "One word.", "free"),
        ("   ", "Nothing?", "free"),
    ],
)
def test_the_kind_follows_from_reference_and_question(
    reference: str, question: str, kind: AnswerKind
) -> None:
    assert answer_kind(asked(reference, question)) == kind


def test_a_prompt_without_a_reference_is_free() -> None:
    assert answer_kind(Prompt(messages=[Message(role="user", content="How many?")])) == "free"


@pytest.mark.parametrize(
    ("reference", "rewrite"),
    [
        ("#### 42", "Six times seven is 42."),
        ("#### 1,000", "That makes 1000.0"),
        ("#### -5", "It falls to −5 degrees."),
        ("The answer is 0.5.", r"So it is \(\frac{1}{2}\)."),
        ("The answer is 42. It took 3 steps.", "We get 42."),
        ("$28", "$20 + $8 = $28."),
        (FUNCTION, "```py\ndef add(first,second): return first+second\n```"),
        (
            FUNCTION,
            "Use this:\n```\ndef add(*terms):\n\treturn sum(terms)\n```\nIt prints:\n```\n3 is the sum!\n```",
        ),
        (SCRIPT, SCRIPT),
        (SCRIPT, f"```python\n{SCRIPT}\n```"),
        (JAVA, "```java\nclass Main { /* less */ }\n```"),
        (JAVA, "```\nclass Main {}\n```"),
        ("Run this:\n```sh\nls\n```", "```bash title=list\nls -a\n```"),
        ("Say ```x = 1```.", "Say ```x = 2```."),
        ("add(a=1)", "add( a = 1 )"),
        ("Science fiction.", "It is science  FICTION, I think"),
        ("don't know", "I don’t know."),
        ("C++", "That is C++."),
        ("Anything at all is good. Really.", "Whatever."),
    ],
)
def test_an_answer_survives_in_other_words(reference: str, rewrite: str) -> None:
    assert answer_survives(rewrite, asked(reference))


@pytest.mark.parametrize(
    ("reference", "rewrite"),
    [
        ("#### 42", ""),
        ("#### 42", "Six times seven is forty-two."),
        ("#### 42", "First 42, then minus 1 makes 41."),
        ("#### 42", "The answer is 42. No, wait: 43."),
        ("#### 42", "420"),
        ("#### -5", "It falls to 5 degrees."),
        ("The answer is 42. It took 3 steps.", "We get 40. It took 3 steps."),
        (FUNCTION, "def add(a, b):\n    return a + b"),
        (FUNCTION, "```python\ndef plus(a, b):\n    return a + b\n```"),
        (FUNCTION, "```python\ndef add(a, b):\nreturn a + b\n```"),
        (FUNCTION, "```python\ndef add(a, b): return a + b\n```\n```python\nprint add(1, 2)\n```"),
        (FUNCTION, "The function `add` returns a + b."),
        (SCRIPT, "A class Queue with a method push appends an item."),
        (JAVA, "```java\nclass Other {}\n```"),
        (JAVA, "```javascript\nclass Main {}\n```"),
        ("add(a=1)", "add(a=2)"),
        ("billing", "shipping"),
        ("billing", "rebilling"),
        ("C++", "That is C."),
    ],
)
def test_an_answer_that_changed_is_lost(reference: str, rewrite: str) -> None:
    assert not answer_survives(rewrite, asked(reference))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("It is BILLING.", "billing"),
        ('"yes", he said', "Yes."),
        ("a,b , c", "A, b, c"),
        ("new\nYork", "New  York"),
        ("I don’t know!", "don't know"),
        ("**Paris**", "paris"),
        ("C++ it is", "C++"),
        ("why?", "?"),
    ],
)
def test_a_label_is_held_as_whole_words(text: str, label: str) -> None:
    assert holds(text, label)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("rebilling", "billing"),
        ("yesterday", "yes"),
        ("York, new", "New York"),
        ("C", "C++"),
        ("", "a"),
        ("a", " "),
    ],
)
def test_parts_of_words_hold_no_label(text: str, label: str) -> None:
    assert not holds(text, label)


@pytest.mark.parametrize(
    "part",
    [
        "```",
        "```python\n",
        "def f(",
        "class ",
        "(",
        "-",
        "a.",
        "a+",
        "not ",
        "x = ",
        "f'{",
        "    ",
        "\n",
        "\t\n",
        "; ",
        "'",
        "\\",
        "[[",
        "lambda:",
        "if x:\n",
        "# ",
        "billing",
        "a ",
    ],
)
@pytest.mark.parametrize("reference", [FUNCTION, SCRIPT, "billing", "add(1)", "#### 42", None])
def test_no_text_takes_long_or_fails(part: str, reference: str | None) -> None:
    text = part * (200_000 // len(part))
    started = time.process_time()
    answer_survives(text, asked(reference or text))
    holds(text, reference or text)
    assert time.process_time() - started < 2
