"""What `auto` decides, and why: from the diagnosis and the request to a plan without open questions.

Nothing here is learnt or measured; the numbers of `RULES` were chosen on the grid of
`benchmarks/recovery.py` and are explained in docs/02-results.md.
"""

import math
from dataclasses import dataclass
from typing import Literal

from recoup.schemas import Choice, CreateRecovery, DamageReport, DivergenceName, Method
from recoup.schemas.request import TEACHING_METHODS
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.objective import Divergence

Data = Literal["teacher", "student", "demonstrated", "rewrites", "references"]
Mode = Literal["lora", "dora", "full", "norms"]
Form = Literal["adapter", "merged", "requantized"]
REPAIRS: dict[str, frozenset[str]] = {
    "finetuning": frozenset({"interpolate", "spectral", "restore_layers"}),
    "quantization": frozenset({"low_rank_patch"}),
    "pruning": frozenset({"reconstruct"}),
}
"""The training-free methods that apply to a kind of damage."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with answers of one origin and one objective."""

    data: Data
    """Whose answers: the teacher's, the student's own, those scored by a teacher that is shown the
    reference, rewritten references, or references."""
    steps: int
    learning_rate: float
    probation: bool = False
    """Whether the phase ends at the first validation that brings no gain."""


@dataclass(frozen=True)
class Trainable:
    """What of the student is trained."""

    mode: Mode
    keep_zeros: bool
    """Pruned weights are held at exactly zero."""
    rank: int
    alpha: int
    targets: str | list[str]
    """Names of linear layers, or PEFT's `all-linear`."""
    by_damage: bool
    """Whether layers further from the teacher get more of the ranks."""

    @property
    def saves_model(self) -> bool:
        """Whether a checkpoint is a whole model; else it is an adapter of the student."""
        return self.mode in {"full", "norms"} or self.keep_zeros


@dataclass(frozen=True)
class Plan:
    damage: str
    method: Method
    phases: tuple[Phase, ...]
    """Empty for a training-free method."""
    divergence: Divergence
    top_k: int | None
    trainable: Trainable
    batch_size: int
    start: Literal["student", "repair"]
    """Whether a training-free repair that came nearer on validation is what training starts from."""
    output: Form
    choices: tuple[Choice, ...]
    ema_rate: float | None = None
    """The student's own moving average teaches, renewed at this rate; None, as in plans of releases that knew
    no other: a frozen teacher."""

    prompts: bool = False
    """The teacher's distributions on its prompts are learnt, too, not on its answers alone."""

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def answers(self, data: Data) -> int:
        """How many different answers of one origin the plan can use."""
        return sum(phase.steps for phase in self.phases if phase.data == data) * self.batch_size


@dataclass(frozen=True)
class _Rule:
    """What a kind of damage was seen to need, on SmolLM2-135M (docs/02-results.md)."""

    method: Method
    steps: int
    rates: dict[Mode, float]
    mode: Mode
    why: str
    method_why: str
    prompts: bool = False
    """Whether what the teacher holds of prompts is learnt, too."""
    whole_gap: float | None = None
    """The gap in nats that the rates are for: a smaller one gets a share of them, as near the teacher the
    gradient of a batch is mostly noise."""


RULES = {
    "finetuning": _Rule(
        method="off_policy",
        steps=24,
        rates={"lora": 5e-4, "dora": 5e-4, "full": 1e-4, "norms": 5e-3},
        mode="lora",
        why="forgetting is shallow: the ability is masked, not erased",
        method_why="the teacher's distribution on its own answers recovered most at equal cost",
    ),
    "quantization": _Rule(
        method="off_policy",
        steps=96,
        rates={"lora": 1e-3, "dora": 1e-3, "full": 2e-4, "norms": 5e-3},
        mode="lora",
        why="rounding disturbs every layer, so it takes more steps",
        method_why="the teacher's distribution on its own answers recovered most at equal cost",
        whole_gap=2.0,
    ),
    "pruning": _Rule(
        method="off_policy",
        steps=96,
        rates={"lora": 1e-3, "dora": 1e-3, "full": 2e-4, "norms": 5e-3},
        mode="full",
        why="what was cut must be learnt anew, so it takes many steps",
        method_why="the teacher's distribution on its own answers recovered most at equal cost",
        prompts=True,
        whole_gap=2.0,
    ),
}
TEACHING = _Rule(
    method="rewrite_sft",
    steps=30,
    rates={"lora": 5e-4, "dora": 5e-4, "full": 1e-4, "norms": 5e-3},
    mode="lora",
    why="each demonstration about once, and enough steps for a few of them",
    method_why="what a model would say itself moves it less, and a small one learns nothing from being shown "
    "examples (docs/02-results.md)",
)
"""Of a healthy model that is taught a skill."""
MOST_TEACHING_STEPS = 300
BATCH_SIZE = 8
LEAST_SHARE = 0.1
"""Of a learning rate, however small the gap."""
SECOND_STAGE = 1 / 3
"""Share of the steps, and of the learning rate, that `two_stage` leaves for the student's own answers."""
DEFAULT_BETA = {"jsd": 0.5, "skew_kl": 0.1}
DEFAULT_EMA_RATE = 0.02
"""The middle one of the three that arXiv 2601.19897 tried."""
DATA: dict[Method, tuple[Data, ...]] = {
    "off_policy": ("teacher",),
    "on_policy": ("student",),
    "two_stage": ("teacher", "student"),
    "self_demonstration": ("demonstrated",),
    "rewrite_sft": ("rewrites",),
    "sft": ("references",),
}
"""Whose answers each trained method learns from, in order."""


def make_plan(
    request: CreateRecovery, damage: DamageReport, available: int, gap: float | None = None
) -> Plan:
    """Settles every `auto`; `available` is the number of training prompts, or demonstrations.

    `gap` is the student's token KL beyond rounding, nats; None where it was not measured yet.

    Raises:
        UnsupportedRequest: the method does not fit the damage, or the output would break a promise.
    """
    asked = request.training
    kind, why_kind = _kind(request, damage)
    rule = TEACHING if request.teach else RULES[kind]
    method, why_method = _method(request, rule, kind)
    keep_zeros = damage.zero_pattern != "none"
    mode, why_mode = _mode(request, rule)
    output, why_output = _output(request, mode, method, keep_zeros)
    rate, why_rate = _rate(request, rule, mode, gap)
    batch = min(BATCH_SIZE, available) if asked.batch_size == "auto" else asked.batch_size
    steps = _steps(request, rule, available, batch) if asked.steps == "auto" else asked.steps
    divergence, why_divergence = _divergence(request, method)
    ema_rate = _ema_rate(request)
    start, why_start = _start(request, kind)
    prompts, why_prompts = _prompts(request, rule, method)
    choices = [*_aim(request, kind, why_kind), ("method", method, why_method)]
    if method in DATA:
        choices += [
            ("objective", _objective(method, divergence, request.method.top_k), why_divergence),
            *(
                [("learn_prompts", "yes" if prompts else "no", why_prompts)]
                if "teacher" in DATA[method]
                else []
            ),
            *([_teacher(request, ema_rate)] if method == "self_demonstration" else []),
            *([] if request.teach else [("start", start, why_start)]),
            ("mode", _mode_name(mode, keep_zeros, output), why_mode),
            ("learning_rate", repr(rate), _why(asked.learning_rate, why_rate)),
            ("steps", str(steps), _why(asked.steps, rule.why)),
            ("batch_size", str(batch), _why(asked.batch_size, "steady gradients at little memory")),
        ]
    choices.append(("output", output, why_output))
    return Plan(
        damage=kind,
        method=method,
        phases=_phases(method, steps, rate),
        divergence=divergence,
        top_k=request.method.top_k,
        trainable=Trainable(
            mode=mode,
            keep_zeros=keep_zeros and output == "merged",
            rank=asked.lora.rank,
            alpha=asked.lora.alpha,
            targets="all-linear" if asked.lora.targets == "auto" else asked.lora.targets,
            by_damage=asked.lora.allocation == "damage",
        ),
        batch_size=batch,
        start=start,
        output=output,
        choices=tuple(Choice(name=name, value=value, why=why) for name, value, why in choices),
        ema_rate=ema_rate,
        prompts=prompts,
    )


def _phases(method: Method, steps: int, rate: float) -> tuple[Phase, ...]:
    if method == "two_stage":
        second = max(1, round(SECOND_STAGE * steps))
        return (
            Phase("teacher", max(1, steps - second), rate),
            Phase("student", second, SECOND_STAGE * rate, probation=True),
        )
    return tuple(Phase(data, steps, rate) for data in DATA.get(method, ()))


def _aim(request: CreateRecovery, kind: str, why: str) -> list[tuple[str, str, str]]:
    """What the training is for: against which damage, or what a skill is taught beside."""
    if request.teach is None:
        return [("damage", kind, why)]
    if request.teach.rehearse:
        reason = "held to its own distribution there, a model forgets little; each step takes twice the work"
        return [("rehearsal", "general prompts", reason)]
    return [("rehearsal", "none", "as requested")]


def _steps(request: CreateRecovery, rule: _Rule, available: int, batch: int) -> int:
    if request.teach is None:
        return rule.steps
    return min(MOST_TEACHING_STEPS, max(rule.steps, math.ceil(available / max(1, batch))))


def _rate(request: CreateRecovery, rule: _Rule, mode: Mode, gap: float | None) -> tuple[float, str]:
    asked, whole = request.training.learning_rate, rule.rates[mode]
    if asked != "auto":
        return asked, ""
    if rule.whole_gap is None or gap is None or gap >= rule.whole_gap:
        return whole, f"teaches with {mode} here" if request.teach else f"recovered most with {mode} here"
    share = max(LEAST_SHARE, gap / rule.whole_gap)
    why = f"{whole:g} is for a gap of {rule.whole_gap:g} nats and more; here it is {gap:.2g}"
    return float(f"{share * whole:.2g}"), why


def _kind(request: CreateRecovery, damage: DamageReport) -> tuple[str, str]:
    if request.damage != "auto":
        return request.damage, "as requested"
    kind = "finetuning" if damage.kind == "none" else damage.kind
    return kind, " ".join(damage.evidence)


def _method(request: CreateRecovery, rule: _Rule, kind: str) -> tuple[Method, str]:
    asked = request.method.type
    if asked == "auto":
        return rule.method, rule.method_why
    if request.teach:
        if asked not in TEACHING_METHODS:
            raise UnsupportedRequest(f"method.type {asked} cannot teach; {teachers()} can.")
        return asked, "as requested"
    everywhere = frozenset(DATA)
    if asked not in everywhere | REPAIRS[kind]:
        raise UnsupportedRequest(
            f"method.type {asked} does not repair {kind}; what does, beside training, is "
            f"{', '.join(sorted(REPAIRS[kind]))}."
        )
    return asked, "as requested"


def teachers() -> str:
    """The methods by which a skill can be taught, in words."""
    return ", ".join(sorted(TEACHING_METHODS - {"auto"}))


def _divergence(request: CreateRecovery, method: Method) -> tuple[Divergence, str]:
    asked = request.method
    usual: DivergenceName = "forward_kl"
    reason = "it recovered most of all divergences at equal cost"
    if method == "self_demonstration":
        usual = "forward_kl" if request.teach else "reverse_kl"
        reason = (
            "what the teacher says because it was shown the answer is what is to be learnt"
            if request.teach
            else "what the teacher says only because it was shown the answer should weigh least"
        )
    elif request.teach:
        reason = "each demonstrated answer is learnt as a text"
    name = usual if asked.divergence == "auto" else asked.divergence
    beta = DEFAULT_BETA.get(name, 0.5) if asked.beta is None else asked.beta
    why = _why(asked.divergence, reason)
    return Divergence(name, beta, asked.temperature), why


def _objective(method: Method, divergence: Divergence, top_k: int | None) -> str:
    if DATA[method][0] in {"rewrites", "references"}:
        return "cross_entropy"
    return str(divergence) + (f" on the teacher's top {top_k}" if top_k else "")


def _ema_rate(request: CreateRecovery) -> float | None:
    asked = request.method
    if asked.teacher == "frozen":
        return None
    return DEFAULT_EMA_RATE if asked.ema_rate is None else asked.ema_rate


def _teacher(request: CreateRecovery, ema_rate: float | None) -> tuple[str, str, str]:
    """Who is shown the demonstrations."""
    if ema_rate is not None:
        reason = "as requested: it takes up what was learnt, slowly enough not to run after its own mistakes"
        return "teacher", f"moving average, rate {ema_rate!r}", reason
    if request.teach:
        return "teacher", "frozen", "it cannot drift; method.teacher ema has it take up what was learnt"
    return "teacher", "frozen", "what the healthy original does is the target, so it must not move"


def _start(request: CreateRecovery, kind: str) -> tuple[Literal["student", "repair"], str]:
    asked = request.training.start
    if asked != "auto":
        return asked, "as requested"
    if kind == "finetuning":
        return "student", "a repair in weight space would wear the new skill away"
    return "repair", "a repair that costs no training saves steps, where it comes nearer on validation"


def _prompts(request: CreateRecovery, rule: _Rule, method: Method) -> tuple[bool, str]:
    """Whether prompts are learnt, too: of the teacher's distributions alone, where all of them is known."""
    asked, top_k = request.training.learn_prompts, request.method.top_k
    if asked is True and "teacher" not in DATA.get(method, ()):
        raise UnsupportedRequest(
            f"training.learn_prompts is for methods that learn from the teacher's answers; {method} does not."
        )
    if asked is True and top_k is not None:
        raise UnsupportedRequest(
            "With method.top_k answers alone are learnt: leave out training.learn_prompts."
        )
    if asked != "auto":
        return asked, "as requested"
    if "teacher" not in DATA.get(method, ()) or not rule.prompts:
        return False, "answers are what is measured, and what was disturbed comes back with few of them"
    if top_k is not None:
        return False, "of prompts the teacher's likeliest tokens are not told"
    return True, "they pass through the student anyway, and what must be learnt anew needs all there is"


def _mode(request: CreateRecovery, rule: _Rule) -> tuple[Mode, str]:
    asked = request.training.mode
    if asked != "auto":
        return asked, "as requested"
    if request.output.kind == "adapter":
        return "lora", "an adapter was asked for"
    if rule.mode == "full":
        return "full", "what a pruned student must learn anew needs all of its weights; zeros stay zero"
    return "lora", "an adapter recovers as much here in less memory and is served as is"


def _output(request: CreateRecovery, mode: Mode, method: Method, keep_zeros: bool) -> tuple[Form, str]:
    kind = request.output.kind
    if method not in DATA and method != "low_rank_patch":
        if kind == "adapter":
            raise UnsupportedRequest(
                f"{method} changes weights in place; output.kind adapter cannot hold that."
            )
        return "merged", f"{method} changes weights in place"
    if method in DATA and mode in {"full", "norms"}:
        return "merged", f"{mode} training gives a whole model"
    if mode == "dora" and keep_zeros and kind == "merged":
        raise UnsupportedRequest(
            "DoRA scales whole columns and cannot hold a pruned student's zeros in a merged model; "
            "use training.mode lora or full, or output.kind adapter."
        )
    if kind != "auto":
        return kind, "as requested"
    return "adapter", "an adapter is small, and the student it belongs to stays as it is"


def _mode_name(mode: Mode, keep_zeros: bool, output: str) -> str:
    return f"masked {mode}" if keep_zeros and output == "merged" and mode in {"lora", "full"} else mode


def _why(asked: object, why: str) -> str:
    return why if asked == "auto" else "as requested"
