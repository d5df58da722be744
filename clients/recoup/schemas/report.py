"""The report of a recovery: what was measured, what it means, and all that is needed to repeat it."""

from typing import Literal

from recoup.schemas.recovery import Outcome, Output
from recoup.schemas.request import Damage, Gate


class Estimate(Output):
    """A value with its 95 % interval; `low` and `high` are null where none can be given."""

    value: float
    low: float | None
    high: float | None


class Measure(Output):
    """One measure on held-out data, of the teacher, the student before and the student after."""

    name: str
    """`kl`, `kl_p99`, `agreement`, `perplexity_answers`, `bits_per_character`, `repetition`, `keep`."""
    label: str
    unit: str
    better: Literal["lower", "higher"]
    n: int
    """Units that were measured (sequences, windows or prompts)."""
    teacher: float
    before: float
    after: float | None
    """Null where nothing was trained."""
    recovered: Estimate | None
    """(after - before) / (teacher - before); for `kl` the teacher's value is its floor.

    Null where a paired test finds no deficit before, and for `keep`.
    """
    retained: Estimate | None
    """after / before, for `keep` alone."""
    guarded: bool
    """A guarded measure that gets significantly worse makes the outcome `regressed`."""
    worse: bool
    """Worse than before by more than the gate allows, with an interval that excludes zero."""


class Choice(Output):
    """One decision of `auto`, with its reason in a sentence."""

    name: str
    value: str
    why: str


class DamageReport(Output):
    """What the weights say happened to the student."""

    kind: Damage | Literal["none"]
    evidence: list[str]
    """One sentence a finding."""
    weight_distance: float | None
    """||W_student - W_teacher|| / ||W_teacher|| over all tensors of equal shape (Frobenius)."""
    zero_fraction: float
    """Share of exact zeros in the student's linear weights."""
    zero_pattern: Literal["none", "unstructured", "2:4"]
    missing_layers: int
    layer_map: list[tuple[int, int]]
    """(student layer, teacher layer), from 0, of the decoder layers that correspond."""
    distance_by_layer: list[float]
    """Relative weight distance of each student layer to its teacher layer."""


class Splits(Output):
    """How prompts were divided; no prompt stands in two splits."""

    train: int
    validation: int
    test: int
    test_kinds: list[str]
    """Whole kinds of prompts that appear in test alone."""
    duplicates_dropped: int
    too_long_dropped: int
    prompts_sha256: str


class TrainingPoint(Output):
    step: int
    loss: float
    """Mean token divergence of the batch, nats."""
    learning_rate: float


class Checkpoint(Output):
    step: int
    validation_kl: float | None
    """Mean token KL(teacher‖student) on validation, nats; null if not finite."""
    chosen: bool


class TrainingReport(Output):
    method: str
    mode: Literal["lora", "full"]
    steps: int
    """Optimizer steps that were taken."""
    batch_size: int
    learning_rate: float
    trainable_parameters: int
    keep_answers: int
    """Prompts of `keep` on which the student was held to its own distribution before."""
    tokens: int
    """Answer tokens that entered the loss, repeats counted."""
    masked_weights: int
    """Pruned weights that were held at zero."""
    diverged: bool
    """The loss became infinite or not a number, and training stopped there."""
    curve: list[TrainingPoint]
    checkpoints: list[Checkpoint]


class AlignmentState(Output):
    """CKA of a student's layers with the teacher's, at one moment."""

    matrix: list[list[float | None]]
    """[student layer][teacher layer], embeddings first; null where the estimator is undefined."""
    diagonal: list[Estimate | None]
    """Corresponding layers, with jackknife intervals over groups of sequences; null where undefined."""


class Alignment(Output):
    """Debiased linear CKA, token level, same positions throughout."""

    estimator: str
    student_layers: list[str]
    teacher_layers: list[str]
    layer_map: list[tuple[int, int]]
    """Rows and columns of the matrices whose entries form the diagonal."""
    positions: int
    sequences: int
    groups: int
    dropped_outliers: int
    """Positions with a massive activation in any layer of either model."""
    positions_sha256: str
    before: AlignmentState
    after: AlignmentState | None
    ceiling: list[float | None]
    """Teacher against itself after a round trip through bfloat16, along `layer_map`."""
    floor: list[float | None]
    """Student before against the teacher on shuffled positions, along `layer_map`."""
    headroom_recovered_last: Estimate | None
    """(after - before) / (ceiling - before) of the last layer."""
    headroom_recovered_mean: Estimate | None


class Sample(Output):
    kind: str
    prompt: str
    teacher: str
    before: str
    after: str | None


class Cost(Output):
    stage_seconds: dict[str, float]
    """Wall time by stage."""
    tokens_generated: int
    tokens_trained: int
    peak_memory_bytes: int
    """Resident set of the runner process at its highest."""
    device: str


class Provenance(Output):
    seed: int
    student: str
    teacher: str
    student_sha256: str
    teacher_sha256: str
    versions: dict[str, str]


class Report(Output):
    object: Literal["recovery.report"]
    recovery: str
    created_at: float
    outcome: Outcome
    reason: str
    """Why this outcome, in one sentence with the numbers."""
    promoted: bool
    """Whether the trained weights were made an artifact."""
    recovered: Estimate | None
    """The recovered fraction of the primary measure, mean token KL to the teacher on test."""
    gate: Gate
    remarks: list[str]
    """Where measures disagree, and what else a reader must know."""
    measures: list[Measure]
    splits: Splits
    damage: DamageReport
    plan: list[Choice]
    training: TrainingReport | None
    alignment: Alignment
    samples: list[Sample]
    cost: Cost
    provenance: Provenance
