"""A diagnosis: how a student is damaged, without anything done about it.

It is asked for in the words of a recovery, as far as they apply, and measured on the test prompts that a
recovery of the same prompts would be judged on.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recoup.schemas.recovery import JobError, Output, Progress, Stage, State
from recoup.schemas.report import Alignment, Cost, DamageReport, Measure, Provenance, Sample, Splits
from recoup.schemas.request import (
    BuiltinPrompts,
    CreateRecovery,
    Damage,
    FilePrompts,
    GenerationSpec,
    HarnessSpec,
    Input,
    Limits,
    MetadataKey,
    MetadataValue,
    ModelRef,
    Prompts,
    TaskSpec,
)


class ExamSpec(Input):
    """What student and teacher are compared on; each field as in a recovery's `evaluation`."""

    natural_text: FilePrompts | None = None
    tasks: list[TaskSpec] = Field(default=[], max_length=8)
    task_rows: Annotated[int, Field(ge=16, le=10_000)] = 256
    harness: list[HarnessSpec] = Field(default=[], max_length=8)
    test_sequences: Annotated[int, Field(ge=16, le=10_000)] = 128


class PositionsSpec(Input):
    positions: Annotated[int, Field(ge=256, le=32_768)] = 4096
    """At most so many token positions enter CKA; its time grows with their square."""


class CreateDiagnosis(Input):
    """The body of `POST /v1/diagnoses`."""

    student: ModelRef
    """The model to be examined."""
    teacher: ModelRef
    """Its healthy original."""
    damage: Literal["auto"] | Damage = "auto"
    prompts: Prompts = BuiltinPrompts.model_construct(builtin="general")
    max_length: Annotated[int, Field(ge=16, le=32_768)] = 1024
    """Tokens a sequence, prompt and answer together; a prompt that leaves too little room is dropped."""
    generation: GenerationSpec = GenerationSpec.model_construct()
    evaluation: ExamSpec = ExamSpec.model_construct()
    alignment: PositionsSpec = PositionsSpec.model_construct()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    metadata: dict[MetadataKey, MetadataValue] = Field(default={}, max_length=16)
    limits: Limits = Limits.model_construct()

    @model_validator(mode="after")
    def _recoverable(self) -> "CreateDiagnosis":
        if self.generation.max_new_tokens >= self.max_length:
            raise ValueError("generation.max_new_tokens must be less than max_length")
        for tasks in (self.evaluation.tasks, self.evaluation.harness):
            if len({task.name for task in tasks}) < len(tasks):
                raise ValueError("every task must have a name of its own")
        return self

    def as_recovery(self) -> CreateRecovery:
        """The recovery whose first stage this is."""
        fields = self.model_dump(exclude={"max_length"})
        return CreateRecovery.model_validate(fields | {"training": {"max_length": self.max_length}})

    @staticmethod
    def of(recovery: CreateRecovery) -> "CreateDiagnosis":
        """What `as_recovery` was made from."""
        fields = recovery.model_dump(include=set(CreateDiagnosis.model_fields))
        for name, part in (("evaluation", ExamSpec), ("alignment", PositionsSpec)):
            fields[name] = {field: fields[name][field] for field in part.model_fields}
        return CreateDiagnosis.model_validate(fields | {"max_length": recovery.training.max_length})


class DiagnosisReport(Output):
    """Where a student stands beside its teacher."""

    object: Literal["diagnosis.report"]
    created_at: float
    needed: bool
    """Whether there is anything to recover: a divergence beyond rounding, or a deficit in a task."""
    damage: DamageReport
    measures: list[Measure]
    """`before` is the student; nothing comes after."""
    alignment: Alignment
    """Without an `after`."""
    remarks: list[str]
    splits: Splits
    samples: list[Sample]
    cost: Cost
    provenance: Provenance


class Diagnosis(Output):
    """One diagnosis job; fields as in `Recovery`."""

    id: str
    object: Literal["diagnosis"]
    state: State
    stage: Stage | None
    error: JobError | None
    progress: Progress | None
    request: CreateDiagnosis
    report: DiagnosisReport | None
    """Once it succeeded; null in a list."""
    pausing: bool
    retry_of: str | None
    epoch: int
    failures: int
    losses: int
    version: int
    created_at: float
    started_at: float | None
    finished_at: float | None
