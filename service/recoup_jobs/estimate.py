"""What a recovery will take: tokens, memory and disk from shapes and counts alone, no tensor loaded.

Tokens are counted stage by stage, every answer as long as it may be; that is an upper bound for models that
end their answers themselves. Time is not guessed from shapes: `calibration.py` knows how long stages of this
much work took on this class of machine, and what the counts here miss it has measured along.

Memory is the larger of two moments: a model that is read (its weights, the logits of a piece), and a
training (weights, gradients, AdamW's two moments, the activations of a micro-batch, the cached states that
are learnt from). One model is in memory at a time, unless the teacher must answer beside the student.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from recoup.schemas import Choice, ComposedPrompts, CreateRecovery, Stage
from recoup_jobs.inspection import Model

GENERATING, TRAINING = 2, 3
"""Passes of one token through a model that a generated and a trained token are counted as."""
BASE_BYTES = 600 << 20
"""Of a process that has loaded torch and transformers."""
OPTIMIZER_BYTES = 12
"""A trained parameter: its gradient and two moments, float32."""
AVERAGE_BYTES = 4
"""A trained parameter's moving average, float32."""
ACTIVATIONS = 34
"""Numbers of a hidden state's width that a layer keeps for the way back (Korthikanti et al., 2205.05198)."""
SAMPLES, KEPT, WINDOWS, WINDOW_TOKENS, CALIBRATION, TRIALS = 16, 128, 32, 128, 64, 6
"""As in `probe.py`, `answers.py` and `baselines.py`; the last is how many repairs are tried, about."""
FIT_TOKENS = 16_384
"""As in `stream.py`: of answers, that a repair is fitted to."""
FREE_TOKENS = 32 * 256
"""As in `repair.py`: of texts that the teacher writes for a pruned student's repair, beside those."""
FITTING_PASSES = {"quantization": 2, "pruning": 3}
"""Of these answers and texts through a model, about, by the damage whose repair is fitted."""
VALIDATIONS, TEST_SHARE, VALIDATION_SHARE = 8, 0.20, 0.12
LEAST_TESTED, MOST_TESTED_SHARE = 20, 1 / 3
"""As in `training.py` and `splits.py`."""
TASK_ROWS_KNOWN = 256
DEFAULT_KEEP_TOKENS = 64
HARNESS_TOKENS = 1024
"""A document of lm-evaluation-harness, a guess: four choices, each behind a prompt of 256 tokens."""
FORMS_OF_LOSS = 6
"""Pieces of logits that a divergence holds at once."""
CPU_TOKENS, FEWEST_TOKENS, MOST_TOKENS, SHARE = 384, 256, 8_192, 0.5
RECOMPUTED, WORKING, RECOMPUTE_BELOW = 2, 2, 1024
"""As in `recoup_ml/room.py`, which settles by what is free how many tokens go through a student at once."""


@dataclass(frozen=True)
class Machine:
    """What the class of a machine decides about memory."""

    weight_bytes: int | None
    """Bytes a parameter of a loaded model; None: as it is stored."""
    logit_rows: int
    """Positions whose logits are held at once."""
    gpu_bytes: int | None = None
    """Memory of one GPU; None: a CPU."""

    def loaded_bytes(self, parameters: int, stored_bytes: int) -> int:
        """What weights take here."""
        return max(stored_bytes, (self.weight_bytes or 0) * parameters)


CPU = Machine(weight_bytes=4, logit_rows=128)
GPU_GIB = 80
"""Of a class of machine whose name does not say it."""


CPU_QUEUE = "gpu.cpu"


def machine_of(queue: str) -> Machine:
    """`gpu.cpu`, or `gpu.<GPUs>x<GiB>g`."""
    if queue == CPU_QUEUE:
        return CPU
    named = re.fullmatch(r"gpu\.\d+x(\d+)g", queue)
    return Machine(None, 512, (int(named[1]) if named else GPU_GIB) << 30)


@dataclass(frozen=True)
class Sizes:
    """Of one model."""

    parameters: int
    stored_bytes: int
    edges: int
    """Rows and columns of all matrices but embeddings: what an adapter of rank 1 has parameters."""
    vectors: int
    """Parameters of norms and biases."""
    hidden: int
    layers: int
    vocabulary: int

    def loaded_bytes(self, machine: Machine) -> int:
        return machine.loaded_bytes(self.parameters, self.stored_bytes)


@dataclass(frozen=True)
class Amounts:
    """How much there is to ask."""

    rows: int
    prompt_tokens: int
    """A prompt, about."""
    keep_rows: int = 0
    task_rows: tuple[int, ...] = ()
    demonstrations: int = 0
    """Of a skill that is taught."""
    held_out: int | None = None
    """Of these, what comes in a file of its own."""

    def tested_rows(self, most: int) -> int:
        """Demonstrations that decide."""
        own = max(1, round(TEST_SHARE * self.demonstrations))
        return min(most, own if self.held_out is None else self.held_out) if self.demonstrations else 0

    @property
    def taught_rows(self) -> int:
        """Demonstrations that train, about."""
        rest = self.demonstrations if self.held_out is not None else (1 - TEST_SHARE) * self.demonstrations
        return round((1 - VALIDATION_SHARE) * rest)


class PlannedPhase(Protocol):
    @property
    def data(self) -> str: ...
    @property
    def steps(self) -> int: ...


class PlannedTraining(Protocol):
    @property
    def mode(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def targets(self) -> str | list[str]: ...


class Planned(Protocol):
    """What is read here, and by `servability.py`, of a plan (`recoup_ml.plan.Plan`)."""

    @property
    def damage(self) -> str: ...
    @property
    def start(self) -> str: ...
    @property
    def phases(self) -> Sequence[PlannedPhase]: ...
    @property
    def trainable(self) -> PlannedTraining: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def prompts(self) -> bool: ...
    @property
    def output(self) -> str: ...
    @property
    def choices(self) -> Sequence[Choice]: ...


@dataclass(frozen=True)
class Work:
    """Tokens of one stage."""

    generated: int = 0
    read: int = 0
    """Passed through a model once, nothing learnt."""
    trained: int = 0

    @property
    def passes(self) -> int:
        return GENERATING * self.generated + self.read + TRAINING * self.trained


@dataclass(frozen=True)
class Need:
    """What a recovery takes, time aside."""

    work: Mapping[Stage, Work]
    memory_bytes: int
    least_memory_bytes: int
    """Below which it cannot be, whatever is estimated wrongly: weights and what belongs to them."""
    disk_bytes: int

    @property
    def tokens(self) -> int:
        return sum(work.generated + work.trained for work in self.work.values())


def sizes_of(model: Model, hidden: Any, layers: Any) -> Sizes:
    """`hidden`, `layers`: what the configuration calls them, whatever it is."""
    tensors = model.tensors or {}
    matrices = [info.shape for name, info in tensors.items() if len(info.shape) == 2 and _is_linear(name)]
    embeddings = (info.shape[0] for name, info in tensors.items() if "embed" in name and info.shape)
    return Sizes(
        parameters=model.parameters,
        stored_bytes=model.stored_bytes,
        edges=sum(rows + columns for rows, columns in matrices),
        vectors=sum(info.shape[0] for info in tensors.values() if len(info.shape) == 1),
        hidden=hidden if isinstance(hidden, int) else 0,
        layers=layers if isinstance(layers, int) else 0,
        vocabulary=max(embeddings, default=0),
    )


def need_of(
    request: CreateRecovery, plan: Planned, student: Sizes, teacher: Sizes, amounts: Amounts, machine: Machine
) -> Need:
    work = _work(request, plan, amounts)
    held = max(student.loaded_bytes(machine), teacher.loaded_bytes(machine))
    trained = _trained(plan, student)
    beside = teacher.loaded_bytes(machine) if _needs_teacher(request, plan) else 0
    optimizer = (OPTIMIZER_BYTES + AVERAGE_BYTES * _averages(request)) * trained
    training = student.loaded_bytes(machine) + beside + optimizer if plan.phases else 0
    held_to = plan.batch_size * sum(phase.steps for phase in plan.phases)
    learnt = held_to if request.teach and request.teach.rehearse else _answers(plan, "teacher")
    taught = min(amounts.rows, learnt) * _learnt_tokens(request, plan, amounts)
    reading = held + 4 * machine.logit_rows * student.vocabulary
    learning = training + _activations(student, training, machine) + _kept_bytes(request, student) * taught
    return Need(
        work=work,
        memory_bytes=BASE_BYTES + max(reading, learning),
        least_memory_bytes=max(student.stored_bytes, teacher.stored_bytes, training // 2),
        disk_bytes=_disk(request, plan, student, trained, amounts),
    )


def _kept_bytes(request: CreateRecovery, student: Sizes) -> int:
    """A position of the teacher's, while the student learns: a hidden state, or ids and half floats."""
    k = request.method.top_k
    return 4 * student.hidden if k is None else 6 * k + 2


def _learnt_tokens(request: CreateRecovery, plan: Planned, amounts: Amounts) -> int:
    """Of a sequence with a teacher's answer, at most."""
    return _length(request, amounts) if plan.prompts else request.generation.max_new_tokens


def _length(request: CreateRecovery, amounts: Amounts) -> int:
    """Tokens of a prompt and its answer."""
    limit = request.generation.max_new_tokens
    return limit + min(amounts.prompt_tokens, request.training.max_length - limit)


def _work(request: CreateRecovery, plan: Planned, amounts: Amounts) -> dict[Stage, Work]:
    limit, wanted = request.generation.max_new_tokens, request.evaluation
    length = _length(request, amounts)
    least = max(1.0, TEST_SHARE * amounts.rows, min(LEAST_TESTED, MOST_TESTED_SHARE * amounts.rows))
    test = min(wanted.test_sequences, round(least))
    validation = min(wanted.validation_sequences, max(1, round(VALIDATION_SHARE * (amounts.rows - test))))
    train = max(1, amounts.rows - test - validation)
    probed = SAMPLES * limit + DEFAULT_KEEP_TOKENS * min(KEPT, amounts.keep_rows // 2)
    probed += sum(min(rows, wanted.task_rows) * limit for rows in amounts.task_rows)
    reading = WINDOWS * WINDOW_TOKENS + HARNESS_TOKENS * sum(task.limit for task in wanted.harness)
    teach = request.teach
    taught = 0 if teach else min(train, max(_answers(plan, "teacher"), CALIBRATION))
    rewritten = min(amounts.taught_rows if teach else train, _answers(plan, "rewrites"))
    steps = sum(phase.steps for phase in plan.phases)
    rehearsed = min(train, steps * plan.batch_size) if teach and teach.rehearse else 0
    kept = min(amounts.keep_rows, max(steps * plan.batch_size, CALIBRATION) - rehearsed)
    sequences = steps * plan.batch_size * (2 if amounts.keep_rows or rehearsed else 1)
    shown = amounts.tested_rows(wanted.test_sequences)
    rolled = (_answers(plan, "student") + _answers(plan, "demonstrated")) * limit
    passes = _fitting_passes(request, plan)
    free = FREE_TOKENS if passes and plan.damage == "pruning" else 0
    written = request.prompts
    composed: dict[Stage, Work] = (
        {"compose": Work(written.compose * written.max_tokens)}
        if isinstance(written, ComposedPrompts)
        else {}
    )
    return composed | {
        "diagnose": Work(
            (test + 2 * shown) * limit + 2 * probed, (3 * test + 2 * shown) * length + 2 * reading
        ),
        "generate": Work(
            (taught + validation + 2 * rewritten + rehearsed) * limit + kept * DEFAULT_KEEP_TOKENS,
            (taught + validation + rehearsed) * length,
        ),
        "distil": Work(
            rolled + free,
            (VALIDATIONS + TRIALS) * validation * length + passes * (min(FIT_TOKENS, taught * length) + free),
            sequences * length,
        ),
        "evaluate": Work(2 * probed + shown * limit, (2 * test + shown) * length + 2 * reading),
        "package": Work(read=length),
    }


def _fitting_passes(request: CreateRecovery, plan: Planned) -> int:
    """How often the repairs that are tried read the answers that they are fitted to."""
    tried = plan.start == "repair" or request.evaluation.baselines or not plan.phases
    return FITTING_PASSES.get(plan.damage, 0) if tried and not request.teach else 0


def _answers(plan: Planned, data: str) -> int:
    return plan.batch_size * sum(phase.steps for phase in plan.phases if phase.data == data)


def _needs_teacher(request: CreateRecovery, plan: Planned) -> bool:
    """Whether the teacher stands beside the student that trains."""
    rolls = any(phase.data in {"student", "demonstrated"} for phase in plan.phases)
    live = rolls and not _averages(request)
    return live or request.alignment.weight > 0 or request.alignment.hidden_weight > 0


def _averages(request: CreateRecovery) -> bool:
    """Whether the student's moving average teaches, which stands in no model of its own."""
    return request.method.teacher == "ema"


def _trained(plan: Planned, student: Sizes) -> int:
    by_mode = {"full": student.parameters, "norms": student.vectors}
    return by_mode.get(plan.trainable.mode, plan.trainable.rank * student.edges)


def _activations(student: Sizes, training: int, machine: Machine) -> int:
    """Of the tokens that go through at once, beside weights and optimizer of `training` bytes."""
    width = (machine.weight_bytes or 2) * student.hidden
    logits = 4 * FORMS_OF_LOSS * machine.logit_rows * student.vocabulary
    tokens, each = micro_batch(width, student.layers, training + logits, machine)
    return tokens * each + logits


def micro_batch(width: int, layers: int, held: int, machine: Machine) -> tuple[int, int]:
    """How many tokens go through a student at once, and the bytes that each keeps.

    Args:
        width: bytes of a hidden state.
        held: bytes that are taken already.
    """
    plain = ACTIVATIONS * width * layers
    if machine.gpu_bytes is None:
        return CPU_TOKENS, plain
    room = SHARE * max(0, machine.gpu_bytes - held)
    if room >= RECOMPUTE_BELOW * plain:
        return _power_of_two(int(room / max(1, plain))), plain
    again = width * (RECOMPUTED * layers + WORKING * ACTIVATIONS)
    return _power_of_two(int(room / max(1, again))), again


def _power_of_two(tokens: int) -> int:
    return max(FEWEST_TOKENS, min(MOST_TOKENS, 1 << max(0, tokens.bit_length() - 1)))


def _disk(request: CreateRecovery, plan: Planned, student: Sizes, trained: int, amounts: Amounts) -> int:
    """States of answers and of alignment, the head beside each set, a fit, snapshots, what is handed over."""
    taught = max(_answers(plan, "teacher"), CALIBRATION)
    learnt = min(amounts.rows, taught) * _learnt_tokens(request, plan, amounts)
    observed = min(amounts.rows, 2 * request.evaluation.test_sequences) * request.generation.max_new_tokens
    states = 4 * student.hidden * (learnt + observed)
    aligned = 4 * 4 * student.hidden * (student.layers + 1) * request.alignment.positions
    heads = 3 * 4 * student.hidden * student.vocabulary
    handed_over = 4 * trained if plan.output == "adapter" else 2 * student.stored_bytes
    snapshot = OPTIMIZER_BYTES + AVERAGE_BYTES * _averages(request)
    fitted = 4 * student.parameters if plan.damage == "pruning" and _fitting_passes(request, plan) else 0
    return states + aligned + heads + fitted + handed_over + (snapshot * trained if plan.phases else 0)


def _is_linear(name: str) -> bool:
    return "embed" not in name and "lm_head" not in name
