"""Tasks with exact answers: prompts that have one right answer, and whether it was given.

Teacher, student before and student after are asked alike: the same rows by the chat template,
greedily, as many new tokens. No judge decides what is right, so an answer in other words or other
units may count as wrong: a share means something beside the teacher's, not by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from recoup.schemas import Match, TaskSpec
from recoup_ml.answer_check import holds
from recoup_ml.errors import EmptyDataset
from recoup_ml.numerals import last_number
from recoup_ml.run import Run, Task
from recoup_ml.sequences import Answered, Encoded, encode, reference_room
from recoup_ml.splits import by_hash


@dataclass(frozen=True)
class Questions:
    """A task as every model is asked it."""

    spec: TaskSpec
    items: list[Encoded]
    max_new_tokens: int

    def marked(self, answers: Sequence[Answered]) -> list[bool]:
        """Whether each answer is right."""
        return [
            is_right(given.answer, item.prompt.completion or "", self.spec.match)
            for item, given in zip(self.items, answers, strict=True)
        ]


def questions(task: Task, run: Run, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """At most `evaluation.task_rows` of a task, by hash; of these, prompts that are too long are dropped.

    Raises:
        EmptyDataset: none is left.
    """
    rows = by_hash(task.prompts)[: run.request.evaluation.task_rows]
    items = encode(rows, tokenizer, run.prompt_tokens)
    if not items:
        raise EmptyDataset(f"No prompt of the task {task.spec.name} is shorter than training.max_length.")
    most = task.spec.max_new_tokens
    if most == "auto":
        most = room(task.spec.match, items, run.request.generation.max_new_tokens, tokenizer)
    return Questions(task.spec, items, most)


def is_right(answer: str, reference: str, match: Match) -> bool:
    """Whether an answer is the reference, holds it as whole words, or ends on its last number."""
    if match == "exact":
        return answer.strip() == reference.strip()
    if match == "contains":
        return holds(answer, reference)
    found, wanted = last_number(answer), last_number(reference)
    return found is not None and wanted is not None and found.same(wanted)


def room(match: Match, items: Sequence[Encoded], limit: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of an answer: enough for the longest reference, and where it need not be exact, for `limit`."""
    return max(1 if match == "exact" else limit, reference_room(items, tokenizer))
