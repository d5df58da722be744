"""A reference answer, put into the teacher's own words, and whether it may be learnt from.

Text that a model would write itself moves it less than text of others. So the healthy
teacher is shown each question with its reference answer and answers anew; the student learns
the rewrite (Yang et al. 2024, arXiv 2402.13669). A rewrite that gives away that a reference
was shown, or that comes to another answer, is replaced by the reference: no row is dropped.
`demonstrated` is the prompt of a teacher that is shown an example instead (Shenfeld et al.
2026, arXiv 2601.19897).

Text in, text out: nothing here generates, and what counts as the same answer is decided in
`answer_check.py`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from recoup.schemas import Prompt
from recoup_ml.answer_check import AnswerKind, answer_kind, answer_survives
from recoup_ml.repetition import repetition_start

Reason = Literal["cut", "empty", "repetitive", "too_long", "leaked_template", "lost_answer"]

REWRITING = "{question}\n\nReference answer:\n{reference}\n\n{request}"
REQUESTS: dict[AnswerKind, str] = {
    "number": "Write this solution in your own words. Keep its numbers and end with the same number.",
    "code": "Write this solution in your own way, in the same language. "
    "Keep the names of its functions and classes, and put the code into a fenced block.",
    "call": "Write down the call in the reference answer, with the same name and arguments.",
    "exact": "Reply with the reference answer and nothing else.",
    "free": "Write this answer in your own words. Say the same, at about the same length.",
}
DEMONSTRATED = (
    "{question}\n\nThis is how a good response may look:\n\n{reference}\n\n"
    "Now give a response of your own to the same request:\n\n{question}"
)

LONGER, ROOM, LABEL_ROOM = 3, 200, 4
"""A rewrite has at most three times the words of its reference and so many more."""
SHINGLE = 5
"""So many words in the order of a template are no accident."""
LEAKS = (
    *("reference answer", "reference response", "the reference", "reference:", "ref:", "own words"),
    *("own answer", "own response", "own solution", "rewritten", "reworded", "rephrased", "your turn"),
    *("your answer", "your response", "my response", "given answer", "provided answer", "original answer"),
    *("answer above", "response above", "answer to the question", "answer to this question"),
    *("question asks", "question is asking", "as requested, here is"),
)
"""Talk about the task of rewriting, which an answer to the question itself does not need."""
_LEAK = re.compile(rf"(?<!\w)(?:{'|'.join(LEAKS)})(?!\w)")


@dataclass(frozen=True)
class Judgement:
    kept: bool
    reason: Reason | None
    """Why a rewrite is refused; None if it is kept."""


@dataclass(frozen=True)
class Rewritten:
    """Where the text of a row comes from."""

    source: Literal["rewrite", "original"]
    reason: Reason | None
    """Why it is not the rewrite; None if it is."""
    reference: str
    """The original answer."""


def rewriting(prompt: Prompt) -> Prompt:
    """The conversation whose last message shows the reference answer and asks for it in own words.

    Raises:
        ValueError: the prompt has no reference answer; here and in the functions below.
    """
    request = REQUESTS[answer_kind(prompt)]
    return _asking(prompt, REWRITING.format(**_shown(prompt), request=request))


def demonstrated(prompt: Prompt) -> Prompt:
    """The conversation whose last message shows the reference answer as an example and asks once more."""
    return _asking(prompt, DEMONSTRATED.format(**_shown(prompt)))


def settle(prompt: Prompt, rewrite: str, finish: str) -> tuple[str, Rewritten]:
    """What the student shall learn: the rewrite or, where it is refused, the reference answer."""
    judgement = judge(rewrite, prompt, finish)
    reference = _reference(prompt)
    if judgement.kept:
        return rewrite.strip(), Rewritten("rewrite", None, reference)
    return reference, Rewritten("original", judgement.reason, reference)


def judge(rewrite: str, prompt: Prompt, finish: str) -> Judgement:
    """Whether `rewrite` may stand for the prompt's reference answer; `finish` says how it ended.

    Any text can be judged, in a time that grows linearly with its length.
    """
    reason = _objection(rewrite, prompt, finish)
    return Judgement(reason is None, reason)


def _objection(rewrite: str, prompt: Prompt, finish: str) -> Reason | None:
    if finish != "stop":
        return "cut"
    if not rewrite.strip():
        return "empty"
    if _loops(rewrite) and not _loops(_reference(prompt)):
        return "repetitive"
    if _is_long(rewrite, prompt):
        return "too_long"
    if _leaks(rewrite, prompt):
        return "leaked_template"
    return None if answer_survives(rewrite, prompt) else "lost_answer"


def _loops(text: str) -> bool:
    numbers: dict[str, int] = {}
    return repetition_start([numbers.setdefault(word, len(numbers)) for word in text.split()]) is not None


def _is_long(rewrite: str, prompt: Prompt) -> bool:
    room = LABEL_ROOM if answer_kind(prompt) == "exact" else ROOM
    return len(rewrite.split()) > LONGER * len(_reference(prompt).split()) + room


def _leaks(rewrite: str, prompt: Prompt) -> bool:
    """Whether the rewrite speaks of its task in words that neither conversation nor reference use."""
    known = _words(" ".join([*(message.content for message in prompt.messages), _reference(prompt)]))
    said = _words(rewrite)
    return bool(_talk(said) - _talk(known))


def _talk(words: str) -> set[Any]:
    """Phrases about the task, and runs of words that stand in a template of ours."""
    return {*_LEAK.findall(words), *(_shingles(words) & _OWN)}


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[offset:] for offset in range(SHINGLE)), strict=False))


_OWN = frozenset().union(*(_shingles(_words(text)) for text in (*REQUESTS.values(), DEMONSTRATED)))


def _shown(prompt: Prompt) -> dict[str, str]:
    return {"question": prompt.messages[-1].content, "reference": _reference(prompt)}


def _reference(prompt: Prompt) -> str:
    if prompt.completion is None:
        raise ValueError("This prompt has no reference answer, so there is nothing to rewrite.")
    return prompt.completion


def _asking(prompt: Prompt, content: str) -> Prompt:
    """Not validated anew: question and reference together may be longer than a message that is sent."""
    *head, last = prompt.messages
    return prompt.model_copy(update={"messages": [*head, last.model_copy(update={"content": content})]})
