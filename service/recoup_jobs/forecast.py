"""What would become of a request: its plan, and what that takes on this class of machine.

Whoever asks brings the planner (`recoup_ml.plan.make_plan`): it settles every `auto`, given the damage.
Before anything is measured the damage can only be presumed, from the two configurations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from recoup.schemas import (
    BuiltinPrompts,
    Choice,
    ComposedPrompts,
    CostEstimate,
    CreateRecovery,
    Damage,
    DamageReport,
    FilePrompts,
    ProblemItem,
    Prompt,
    Stage,
)
from recoup_jobs import calibration, catalog
from recoup_jobs.calibration import Measured
from recoup_jobs.datasets import iter_prompts
from recoup_jobs.errors import Unprocessable
from recoup_jobs.estimate import Amounts, Need, Planned, Sizes, machine_of, need_of, sizes_of
from recoup_jobs.inspection import Model
from recoup_jobs.ledger import Ledger
from recoup_jobs.preflight import DEPTH_KEYS, HIDDEN_SIZE_KEYS, config_value
from recoup_jobs.servability import foreseen
from recoup_jobs.settings import Settings

UNTRAINED = "none"
"""The mode of a method that changes weights without training."""
LOOKED_AT = 64
"""Prompts whose length is taken for that of all."""
LETTERS_A_TOKEN = 4
TEMPLATE_TOKENS = 16
"""That a chat template puts around a prompt, about."""

Planner = Callable[[CreateRecovery, DamageReport, int], Planned]


@dataclass(frozen=True)
class Forecast:
    choices: list[Choice]
    need: Need
    mode: str
    parameters: int
    """Of the student."""
    unservable: list[ProblemItem]
    """Why vLLM could not serve what comes of it."""

    @property
    def work(self) -> dict[Stage, float]:
        """Passes of a token through one parameter, by stage."""
        return {stage: float(work.passes * self.parameters) for stage, work in self.need.work.items()}

    def cost(self, known: Sequence[Measured], jobs: int) -> CostEstimate:
        """`known`, `jobs`: what this class of machine has measured, and on how many jobs."""
        return CostEstimate(
            tokens=self.need.tokens,
            memory_bytes=self.need.memory_bytes,
            disk_bytes=self.need.disk_bytes,
            seconds=calibration.seconds_for(self.work, self.mode, self.parameters, known),
            calibrated_on=jobs,
        )

    def measured(self, stage_seconds: dict[str, float]) -> list[Measured]:
        """The rows of a job that took so long."""
        return [
            Measured(stage, self.mode, self.parameters, work, stage_seconds[stage])
            for stage, work in self.work.items()
            if stage in stage_seconds
        ]


def forecast(
    request: CreateRecovery,
    student: Model,
    teacher: Model,
    ledger: Ledger,
    settings: Settings,
    make_plan: Planner,
    refusal: type[Exception],
) -> Forecast:
    """Raises `Unprocessable` where `make_plan` raises `refusal` whatever the damage may be."""
    amounts = _amounts(request, ledger, settings)
    learnt = amounts.taught_rows if request.teach else amounts.rows
    plan = _plan(request, student, teacher, learnt, make_plan, refusal)
    ours, theirs = _sizes(student), _sizes(teacher)
    need = need_of(request, plan, ours, theirs, amounts, machine_of(settings.queue))
    mode = plan.trainable.mode if plan.phases else UNTRAINED
    return Forecast([*plan.choices], need, mode, ours.parameters, foreseen(plan, student))


def cost_of(found: Forecast, ledger: Ledger, queue: str) -> CostEstimate:
    return found.cost(calibration.read(ledger, queue), calibration.jobs_measured(ledger, queue))


def _plan(
    request: CreateRecovery,
    student: Model,
    teacher: Model,
    rows: int,
    make_plan: Planner,
    refusal: type[Exception],
) -> Planned:
    """For the likeliest damage that the request's method can be for."""
    refused = ""
    for damage in _presumed(student, teacher):
        try:
            return make_plan(request, damage, rows)
        except refusal as error:
            refused = refused or str(error)
    raise Unprocessable("unsupported_request", refused)


def _presumed(student: Model, teacher: Model) -> Iterator[DamageReport]:
    depths = [config_value(model, *DEPTH_KEYS) for model in (student, teacher)]
    kinds: dict[Damage, str] = {
        "quantization": "The student's weights are packed.",
        "pruning": "The student has other layers than the teacher.",
        "finetuning": "Presumed: the configurations are alike, and only the diagnosis reads the weights.",
    }
    if student.quantizer:
        likely: Damage = "quantization"
    else:
        likely = "finetuning" if depths[0] == depths[1] else "pruning"
    for kind in sorted(kinds, key=lambda kind: kind != likely):
        why = kinds[kind] if kind == likely else "Presumed: the method is for this damage."
        yield DamageReport(
            kind=kind,
            evidence=[why],
            weight_distance=None,
            zero_fraction=0.0,
            zero_pattern="none",
            missing_layers=0,
            layer_map=[],
            distance_by_layer=[],
        )


def _sizes(model: Model) -> Sizes:
    return sizes_of(model, config_value(model, *HIDDEN_SIZE_KEYS), config_value(model, *DEPTH_KEYS))


def _amounts(request: CreateRecovery, ledger: Ledger, settings: Settings) -> Amounts:
    teach = request.teach
    if isinstance(request.prompts, ComposedPrompts):
        rows, tokens = request.prompts.compose, TEMPLATE_TOKENS + request.prompts.max_tokens
    else:
        rows, tokens = _given(request.prompts, ledger, settings)
    return Amounts(
        rows=rows,
        prompt_tokens=tokens,
        keep_rows=_rows(ledger, request.keep) if request.keep else 0,
        demonstrations=_rows(ledger, FilePrompts(file=teach.file)) if teach else 0,
        held_out=_rows(ledger, FilePrompts(file=teach.held_out)) if teach and teach.held_out else None,
        task_rows=tuple(_rows(ledger, FilePrompts(file=task.file)) for task in request.evaluation.tasks),
    )


def _given(prompts: FilePrompts | BuiltinPrompts, ledger: Ledger, settings: Settings) -> tuple[int, int]:
    """How many, and about how many tokens each."""
    seen: list[Prompt] = []
    for prompt in iter_prompts(ledger, settings, prompts):
        seen.append(prompt)
        if len(seen) == LOOKED_AT and isinstance(prompts, FilePrompts):
            break
    letters = sum(len(message.content) for prompt in seen for message in prompt.messages)
    rows = len(seen) if isinstance(prompts, BuiltinPrompts) else _rows(ledger, prompts)
    return rows, TEMPLATE_TOKENS + letters // (LETTERS_A_TOKEN * max(1, len(seen)))


def _rows(ledger: Ledger, prompts: FilePrompts) -> int:
    return catalog.rows(ledger, prompts.file)
