"""The generate stage: the answers that the student will learn from.

The teacher answers training and validation prompts; the student, as it is, answers the
prompts of `keep`, so that it can be held to its own distribution there (a dual teacher).
With each answer the last hidden states of who gave it are kept: no teacher is in memory
while the student learns. Only as many prompts are answered as the plan will use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup_ml import diagnose, models, results
from recoup_ml.errors import EmptyDataset
from recoup_ml.generate import Engine, LocalEngine, usable
from recoup_ml.observation import Observation, observe
from recoup_ml.plan import Plan, make_plan
from recoup_ml.probe import KEPT, keep_tokens
from recoup_ml.run import Counter, Done, Journal, Run
from recoup_ml.sequences import Answered, Encoded, encode, read_jsonl, write_jsonl
from recoup_ml.splits import split_keep


@dataclass(frozen=True)
class Lesson:
    """Answers to learn from or to validate on, and the last hidden states of who gave them."""

    answers: list[Answered]
    teacher: Observation

    @staticmethod
    def load(done: Done, part: Literal["train", "validation", "keep"]) -> "Lesson":
        """A lesson that the generate stage left."""
        folder = done["generate"]
        return Lesson(read_jsonl(folder / f"{part}.jsonl"), Observation.load(folder / f"{part}.safetensors"))


def generate(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Fills `folder` with the plan and the lessons `train`, `validation` and, if a skill is kept, `keep`."""
    tokenizer = models.load_tokenizer(run.teacher)
    parts = diagnose.split_prompts(run)
    plan = make_plan(run.request, diagnose.read(done).damage, len(parts.train))
    chosen = parts.train[: plan.answers], parts.validation, split_keep(run.keep, KEPT)[0][: plan.answers]
    train, validation, keep = (encode(part, tokenizer, run.prompt_tokens) for part in chosen)
    counter = Counter(journal, 2 * (len(train) + len(validation) + len(keep)), "answers")
    limit = run.request.generation.max_new_tokens
    teacher = _teacher(run, tokenizer)
    _answer(teacher, train, limit, folder / "train", counter)
    _answer(teacher, validation, limit, folder / "validation", counter)
    del teacher
    models.release()
    if keep:
        _answer(_student(run, tokenizer), keep, keep_tokens(keep, tokenizer), folder / "keep", counter)
    results.write(folder / "plan.json", plan)


def has_keep(done: Done) -> bool:
    """Whether there is a skill to be kept."""
    return (done["generate"] / "keep.jsonl").exists()


def read_plan(done: Done) -> Plan:
    return results.read(done["generate"] / "plan.json", Plan)


@dataclass(frozen=True)
class Speaker:
    """Who answers, and the model whose hidden states are kept."""

    model: PreTrainedModel
    engine: Engine
    pad_id: int


def _teacher(run: Run, tokenizer: PreTrainedTokenizerBase) -> Speaker:
    model = models.load(run.teacher)
    return Speaker(model, diagnose.engine(run, model, tokenizer), models.pad_id(tokenizer))


def _student(run: Run, tokenizer: PreTrainedTokenizerBase) -> Speaker:
    model = models.load(run.student)
    return Speaker(model, LocalEngine(model, tokenizer), models.pad_id(tokenizer))


def _answer(speaker: Speaker, prompts: Sequence[Encoded], limit: int, place: Path, counter: Counter) -> None:
    if not prompts:
        raise EmptyDataset(f"No prompt for {place.name} is shorter than training.max_length.")
    answers = usable(speaker.engine.answer(prompts, limit, counter.part(len(prompts))))
    write_jsonl(place.with_suffix(".jsonl"), answers)
    seen = observe(speaker.model, answers, speaker.pad_id, tick=counter.part(len(prompts)))
    seen.save(place.with_suffix(".safetensors"))
