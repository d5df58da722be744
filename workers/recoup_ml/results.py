"""What one stage leaves for the next, as JSON beside its tensors."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter

from recoup.schemas import Baseline, DamageReport, Measure, Outcome, OutputForm, Sample, Splits, Teaching
from recoup_ml.scores import Scores, Window

T = TypeVar("T")


@dataclass(frozen=True)
class HarnessScores:
    """How one model did in a task of lm-evaluation-harness."""

    metric: str
    """With the filter whose answers it marks, as `acc,none`."""
    better: Literal["lower", "higher"]
    values: list[float]
    """By document."""
    asked_sha256: str
    """Of the documents and of the prompts made of them, in their order."""


@dataclass(frozen=True)
class Behaviour:
    """What one model did on everything that is measured."""

    scores: Scores
    natural: list[Window]
    greedy: list[str]
    """Its own answers to the sampled prompts."""
    repetition: list[float]
    """seq-rep-4 of those answers."""
    kept: list[str]
    """Its answers to the `keep` prompts."""
    tasks: dict[str, list[bool]]
    """By the task's name, whether it answered each question rightly."""
    harness: dict[str, HarnessScores] = field(default_factory=dict)
    """By the task's name; a release that knew none left nothing."""


@dataclass(frozen=True)
class Diagnosis:
    damage: DamageReport
    splits: Splits
    needed: bool
    """Whether there is anything to recover."""
    teacher: Behaviour
    floor: Scores
    """The teacher's against itself after a round trip through bfloat16."""
    before: Behaviour
    tokens_generated: int


@dataclass(frozen=True)
class Evaluation:
    """The verdict and what it rests on; the alignment lies in a file of its own."""

    outcome: Outcome
    reason: str
    measures: list[Measure]
    baseline: Baseline | None
    teaching: Teaching | None
    """Of a model that is taught a skill."""
    forms: list[OutputForm]
    """Of a packed student; empty for others."""
    samples: list[Sample]
    remarks: list[str]


def write(path: Path, value: object) -> None:
    """Writes a result; infinity survives, as it does in Python's JSON."""
    path.write_text(json.dumps(TypeAdapter(type(value)).dump_python(value)))


def read(path: Path, kind: type[T]) -> T:
    return TypeAdapter(kind).validate_python(json.loads(path.read_text()))
