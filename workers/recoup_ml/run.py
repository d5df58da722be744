"""What a recovery is given, and to whom it tells how it goes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recoup.schemas import CostEstimate, CreateRecovery, HarnessSpec, Prompt, Stage, TaskSpec


@dataclass(frozen=True)
class Task:
    """A task of `evaluation.tasks` with its rows."""

    spec: TaskSpec
    prompts: Sequence[Prompt]
    """Each with its reference answer."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of `evaluation.harness` with its file."""

    spec: HarnessSpec
    file: Path


@dataclass(frozen=True)
class Run:
    """All that a recovery needs to know."""

    job_id: str
    student: Path
    teacher: Path
    request: CreateRecovery
    prompts: Sequence[Prompt]
    keep: Sequence[Prompt]
    tasks: Sequence[Task]
    natural_text: Sequence[str]
    """Texts for bits per character; empty: text that Python carries."""
    vllm_urls: tuple[str, ...]
    """Servers that answer for the teacher, all alike; none: the teacher answers in this process."""
    vllm_command: tuple[str, ...] = ()
    """Serves there while it runs, for stages that ask (`turns.py`); empty: the servers are there already."""
    teach: Sequence[Prompt] = ()
    """Demonstrations of the skill of `request.teach`."""
    held_out: Sequence[Prompt] = ()
    """Those of `request.teach.held_out`."""
    harness: Sequence[HarnessTask] = ()
    rollout_urls: tuple[str, ...] = ()
    """Servers of students, for answers of the one that learns; none, or none of it: it answers itself."""
    answers: Path | None = None
    """The folder of the cache of servers' answers, shared by recoveries; none: nothing is remembered."""
    halvings: int = 0
    """How often training goes with half as many tokens at once, memory having run out before."""
    processes: int = 1
    """How many train together, a device each."""
    estimate: CostEstimate | None = None
    """What it was expected to take, for its report."""

    @property
    def teaches(self) -> bool:
        """Whether a healthy model is taught a skill; else a damaged one is recovered."""
        return self.request.teach is not None

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt that leaves room for an answer within `training.max_length`."""
        return self.request.training.max_length - self.request.generation.max_new_tokens


Done = Mapping[Stage, Path]
"""The folders of the stages that are committed."""


class Interrupted(Exception):
    """The recovery was asked to stop and did, leaving what its successor goes on from."""


class Audience(Protocol):
    """Is told how far a recovery is."""

    def stopping(self) -> bool:
        """Whether the recovery is to stop as soon as what it did is safe."""
        ...

    def progress(self, done: int, total: int, unit: str) -> None: ...

    def metric(self, **values: str | float | int | bool | None) -> None: ...


class Journal(Audience, Protocol):
    """Keeps what a recovery did and tells how far it is."""

    def stage(self, name: Stage, work: Callable[[Path], None]) -> Path:
        """The folder of a committed stage; where there is none yet, `work` fills it and it is committed.

        What an earlier holder of the job left of this stage in `durable.UNFINISHED` is there again.
        """
        ...

    def publish(self, files: dict[str, Path]) -> None:
        """Makes files the recovery's artifacts, by the path they get there."""
        ...

    def stage_seconds(self) -> dict[str, float]:
        """Wall time of the stages that were committed."""
        ...


class Counter:
    """One count over the parts of a stage, told to the journal."""

    def __init__(self, journal: Journal, total: int, unit: str) -> None:
        self._journal, self._total, self._unit, self._before = journal, total, unit, 0

    def part(self, size: int) -> Callable[[int], None]:
        """Counts a part of `size`: call the result with how much of the part is done.

        The call raises `Interrupted` where the recovery is to stop.
        """
        before = self._before
        self._before += size

        def count(done: int) -> None:
            self._journal.progress(before + done, self._total, self._unit)
            if self._journal.stopping():
                raise Interrupted

        return count
