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
    """`kl`, `kl_p99`, `agreement`, `perplexity_answers`, `bits_per_character`, `repetition`, `keep`,
    `task:<name>` for each task, and `harness:<name>` for each of lm-evaluation-harness."""
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
    """||W_student - W_teacher|| / ||W_teacher|| over all tensors of equal shape (Frobenius).

    Null where only a quantizer can read the student's packed weights.
    """
    zero_fraction: float
    """Share of exact zeros in the student's linear weights."""
    zero_pattern: Literal["none", "unstructured", "2:4"]
    missing_layers: int
    layer_map: list[tuple[int, int]]
    """(student layer, teacher layer), from 0, of the decoder layers that correspond."""
    distance_by_layer: list[float]
    """Relative weight distance of each student layer to its teacher layer; 0 where none can be taken."""


class Composition(Output):
    """How the teacher wrote the prompts itself."""

    wanted: int
    kept: int
    """Distinct prompts that were divided into the splits, like any others."""
    drawn: int
    refused: dict[str, int]
    """Why the others were left out."""
    tokens: int
    """That were generated for it."""
    opening: str
    """The part of the teacher's chat template that it went on from."""


class Splits(Output):
    """How prompts were divided; no prompt stands in two splits."""

    train: int
    validation: int
    test: int
    test_kinds: list[str]
    """Whole kinds of prompts that appear in test alone."""
    duplicates_dropped: int
    task_duplicates_dropped: int
    """Prompts that were not trained on, nor validated on, because they stand in a task."""
    too_long_dropped: int
    prompts_sha256: str
    composed: Composition | None
    """Null where prompts were given."""


class TrainingPoint(Output):
    step: int
    loss: float
    """Mean token divergence of the batch, nats."""
    learning_rate: float


class Checkpoint(Output):
    step: int
    """0 is the repair that training started from."""
    validation_kl: float | None
    """Mean token KL(teacher‖student) on validation, nats; null if not finite."""
    skill_loss: float | None
    """Of demonstrated answers on validation, nats a token, where a skill is taught; then the sum of both
    chooses."""
    chosen: bool


class AlignmentPoint(Output):
    """The student on validation prompts at one step of its training."""

    step: int
    """0 is where training started."""
    validation_kl: float | None
    """Mean token KL(teacher‖student), nats; null if not finite."""
    mean: float | None
    """CKA with the teacher, the mean over corresponding layers; null where undefined, as is `last`."""
    last: float | None
    """CKA of the last layer."""


class RankCorrelation(Output):
    """Of alignment with recovery (that is, with less KL to the teacher) over the points of a training.

    Points of one training follow one another and are not independent, so the intervals, which suppose
    that they are, are too narrow if anything.
    """

    alignment: Literal["mean", "last"]
    n: int
    """Points at which both are finite."""
    spearman: Estimate | None
    """Spearman's ρ; no interval below five points; null below three, or where nothing changed."""
    kendall: Estimate | None
    """Kendall's τ_b, likewise."""


class Trajectory(Output):
    """Alignment during training, at validation and after every `alignment.every_steps` steps."""

    positions: int
    sequences: int
    dropped_outliers: int
    """Positions with a massive activation in any layer of the teacher or of the student at the start."""
    positions_sha256: str
    points: list[AlignmentPoint]
    correlations: list[RankCorrelation]


Stopped = Literal["steps", "gap_closed", "regression", "plateau", "diverged"]


class RolloutReport(Output):
    """The student's own answers that servers drew, and how far these were from the student that learnt.

    p is the student, q the server, both at the moment of drawing.
    """

    answers: int
    tokens: int
    mean_difference: float
    """Mean |log p - log q| of the drawn tokens, nats."""
    largest_difference: float
    kl: float
    """Estimate of KL(q‖p), nats a token."""
    truncated: float
    """Share of positions whose importance weight was cut to `cap`."""
    cap: float


class PhaseReport(Output):
    """One phase of training: answers of one origin, one objective."""

    data: Literal["teacher", "student", "demonstrated", "rewrites", "references"]
    """Whose answers were learnt from."""
    objective: str
    """The divergence that was made small, or cross-entropy."""
    learning_rate: float
    """At its highest."""
    planned_steps: int
    steps: int
    """Optimizer steps that were taken."""
    tokens: int
    """Tokens of answers, and of prompts where they are learnt, that entered the loss; repeats and `keep`
    counted."""
    seconds: float
    stopped: Stopped
    """`steps`: all planned steps were taken."""
    rollouts: RolloutReport | None
    """Null where no server drew answers of the student's."""


class RewriteCounts(Output):
    """What became of the references in `rewrite_sft`."""

    kept: int
    """Rewrites that were learnt from."""
    originals: int
    """References that stayed as they were, their rewrite being refused."""
    refused: dict[str, int]
    """Why rewrites were refused."""


class TrainingReport(Output):
    method: str
    mode: str
    """`lora`, `masked lora`, `dora`, `full`, `masked full` or `norms`."""
    started_from: str
    """`student`, or the training-free repair that came nearer to the teacher on validation."""
    fitted_answers: int
    """So many of the teacher's first answers that repair was fitted to; training learnt from the others."""
    steps: int
    """Optimizer steps that were taken."""
    batch_size: int
    phases: list[PhaseReport]
    trainable_parameters: int
    keep_answers: int
    """Prompts of `keep`, and general ones where a skill is taught, on which the student was held to its own
    distribution before."""
    tokens: int
    """Tokens of answers, and of prompts where they are learnt, that entered the loss; repeats counted."""
    masked_weights: int
    """Pruned weights that were held at zero."""
    initial_validation_kl: float
    """Of the student before its first step, nats."""
    initial_skill_loss: float | None
    """Likewise, where a skill is taught."""
    diverged: bool
    """The loss became infinite or not a number, and training stopped there."""
    rewrites: RewriteCounts | None
    curve: list[TrainingPoint]
    checkpoints: list[Checkpoint]
    trajectory: Trajectory | None
    """Null where the request has no `alignment.every_steps`."""


class TriedRepair(Output):
    """A training-free repair as it did on validation prompts."""

    name: str
    """The method, as in `method.type`."""
    label: str
    """With its setting."""
    validation_kl: float | None
    """Mean token KL(teacher‖repaired), nats; null if not finite."""
    keep_kl: float | None
    """Mean token KL(student‖repaired) on prompts of `keep`, nats; it counts as much in the choice."""
    seconds: float
    problem: str | None
    """Why it could not be done."""


class Baseline(Output):
    """The training-free repair that was best on validation, measured on test."""

    name: str
    label: str
    kl: float
    agreement: float
    bits_per_character: float
    keep: float | None
    """Exact match on the new skill; null where none is kept."""
    recovered: Estimate | None
    """Recovered fraction of the KL gap."""
    lead: Estimate | None
    """Recovered fraction of the trained student minus that of the repair, over the same sequences."""


class Change(Output):
    """A measure of one model before and after, over the same units."""

    before: float
    after: float | None
    """Null where nothing finite was trained, as is `change`."""
    change: Estimate | None
    """after - before."""
    n: int


class InContext(Output):
    """The untaught model, shown a few demonstrations in its context: what costs no training and no drift."""

    shots: int
    loss: float
    right: float
    lead: Estimate | None
    """Its loss minus that of the taught model, over the same demonstrations, nats a token."""


class Teaching(Output):
    """What a healthy model learnt from demonstrations, and what it lost over it; on held-out data."""

    train: int
    """Demonstrations; none stands in two splits, and repeated ones count once."""
    validation: int
    test: int
    loss: Change
    """Of held-out demonstrated answers, nats a token: what decides whether the skill was learnt."""
    right: Change
    """Share of held-out demonstrations that were answered rightly by `teach.match`."""
    drift: Estimate | None
    """Mean token KL from the model as it was, on its answers to held-out general prompts, nats."""
    in_context: InContext | None
    """Null where `evaluation.baselines` is off, or demonstrations are too long to be shown."""


class OutputForm(Output):
    """A form in which a packed student's recovery can be handed over, measured on test."""

    form: Literal["adapter", "merged", "requantized"]
    kl: float | None
    """Mean token KL to the teacher, nats."""
    recovered: Estimate | None
    """Recovered fraction of the KL gap."""
    bytes: int
    """Of its weight files; an adapter's with those of the student that it needs."""
    handed_over: bool
    """Whether it is the one that the verdict is on."""


class LayerDistance(Output):
    """A student's layer and its teacher's, in the basis that the two share; null where widths differ."""

    relative_l2: float | None
    """√(Σ‖s - t‖² / Σ‖t‖²) over the positions that count."""
    cosine: float | None
    """Mean cosine of a position's two states."""
    student_norm: float | None
    """Mean norm."""
    teacher_norm: float | None


class AlignmentState(Output):
    """CKA of a student's layers with the teacher's, at one moment."""

    matrix: list[list[float | None]]
    """[student layer][teacher layer], embeddings first; null where the estimator is undefined."""
    diagonal: list[Estimate | None]
    """Corresponding layers, with jackknife intervals over groups of sequences; null where undefined."""
    with_outliers: list[float | None]
    """Of corresponding layers: what CKA would be if no position had been dropped."""
    distances: list[LayerDistance]
    """Of corresponding layers."""


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


class CostEstimate(Output):
    """What a recovery would take."""

    tokens: int
    """Generated and trained on, every answer as long as it may be."""
    memory_bytes: int
    """At its highest."""
    disk_bytes: int
    seconds: float | None
    """By what this class of machine took for other recoveries; null before it has finished one."""
    calibrated_on: int
    """Finished recoveries that the seconds rest on."""


class Cost(Output):
    stage_seconds: dict[str, float]
    """Wall time by stage."""
    tokens_generated: int
    tokens_trained: int
    peak_memory_bytes: int
    """Resident set of the runner process at its highest."""
    device: str
    estimate: CostEstimate | None
    """What was expected before the first stage; null for a diagnosis."""


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
    """The recovered fraction of the primary measure, mean token KL to the teacher on test; null where a skill
    is taught."""
    gate: Gate
    teaching: Teaching | None
    """Null in a recovery."""
    remarks: list[str]
    """Where measures disagree, and what else a reader must know."""
    measures: list[Measure]
    splits: Splits
    damage: DamageReport
    plan: list[Choice]
    training: TrainingReport | None
    """Null where nothing was trained: no need, or a training-free method."""
    repairs: list[TriedRepair]
    """Training-free repairs that were tried, best first."""
    baseline: Baseline | None
    """Null where no repair applies, where none was asked for, or where a repair is the method."""
    forms: list[OutputForm]
    """What each form of a packed student's recovery costs; empty for other students."""
    alignment: Alignment
    samples: list[Sample]
    cost: Cost
    provenance: Provenance
