"""What `auto` decides, and why: from the diagnosis and the request to a plan without open questions."""

from dataclasses import dataclass
from typing import Literal

from recoup.schemas import Choice, CreateRecovery, DamageReport
from recoup_ml.errors import UnsupportedRequest


@dataclass(frozen=True)
class Plan:
    damage: str
    method: Literal["off_policy"]
    mode: Literal["lora", "full"]
    keep_zeros: bool
    """Pruned weights are held at exactly zero."""
    rank: int
    alpha: int
    targets: str | list[str]
    """Names of linear layers, or PEFT's `all-linear`."""
    learning_rate: float
    steps: int
    batch_size: int
    temperature: float
    output: Literal["adapter", "merged"]
    choices: tuple[Choice, ...]

    @property
    def answers(self) -> int:
        """How many training answers the plan can use."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class _Recipe:
    """What a kind of damage was seen to need, on SmolLM2-135M (docs/02-results.md)."""

    steps: int
    lora_rate: float
    full_rate: float
    why: str


RECIPES = {
    "finetuning": _Recipe(20, 5e-4, 1e-4, "forgetting is shallow: the ability is masked, not erased"),
    "quantization": _Recipe(40, 1e-3, 2e-4, "rounding disturbs every layer, so it takes more steps"),
    "pruning": _Recipe(40, 5e-4, 2e-4, "what was cut must be learnt anew, so it takes many steps"),
}
BATCH_SIZE = 8


def make_plan(request: CreateRecovery, damage: DamageReport, available: int) -> Plan:
    """Settles every `auto`; `available` is the number of training prompts.

    Raises:
        UnsupportedRequest: a merged adapter would fill a pruned student's zeros.
    """
    kind = _kind(request, damage)
    recipe = RECIPES[kind.value]
    keep_zeros = damage.zero_pattern != "none"
    mode = _mode(request, keep_zeros)
    output = _output(request, mode.value, keep_zeros)
    rate = _learning_rate(request, recipe, mode.value)
    batch = _batch_size(request, available)
    steps = _steps(request, recipe)
    method = Choice(
        name="method",
        value="off_policy",
        why="forward KL to the frozen teacher on its own answers recovered most at equal cost",
    )
    lora = request.training.lora
    return Plan(
        damage=kind.value,
        method="off_policy",
        mode="full" if mode.value == "full" else "lora",
        keep_zeros=keep_zeros,
        rank=lora.rank,
        alpha=lora.alpha,
        targets="all-linear" if lora.targets == "auto" else lora.targets,
        learning_rate=float(rate.value),
        steps=int(steps.value),
        batch_size=int(batch.value),
        temperature=request.method.temperature,
        output="merged" if output.value == "merged" else "adapter",
        choices=(kind, method, mode, rate, steps, batch, output),
    )


def _kind(request: CreateRecovery, damage: DamageReport) -> Choice:
    if request.damage != "auto":
        return Choice(name="damage", value=request.damage, why="as requested")
    kind = "finetuning" if damage.kind == "none" else damage.kind
    return Choice(name="damage", value=kind, why=" ".join(damage.evidence))


def _mode(request: CreateRecovery, keep_zeros: bool) -> Choice:
    if request.training.mode != "auto":
        return Choice(name="mode", value=request.training.mode, why="as requested")
    if keep_zeros and request.output.kind != "adapter":
        return Choice(
            name="mode", value="full", why="a plain adapter would fill the pruned zeros when merged"
        )
    return Choice(
        name="mode", value="lora", why="an adapter recovers as much here in less memory and is served as is"
    )


def _output(request: CreateRecovery, mode: str, keep_zeros: bool) -> Choice:
    kind = request.output.kind
    if mode == "full":
        return Choice(name="output", value="merged", why="full fine-tuning gives a whole model")
    if kind == "merged" and keep_zeros:
        raise UnsupportedRequest(
            "Merging an adapter would fill the student's pruned zeros; use training.mode full, "
            "which holds them at zero, or output.kind adapter."
        )
    why = (
        "as requested"
        if kind != "auto"
        else "an adapter is small, and the student it belongs to stays as it is"
    )
    return Choice(name="output", value="adapter" if kind == "auto" else kind, why=why)


def _learning_rate(request: CreateRecovery, recipe: _Recipe, mode: str) -> Choice:
    asked = request.training.learning_rate
    if asked != "auto":
        return Choice(name="learning_rate", value=repr(asked), why="as requested")
    rate = recipe.full_rate if mode == "full" else recipe.lora_rate
    return Choice(
        name="learning_rate", value=repr(rate), why=f"seen to recover most with {mode} on this damage"
    )


def _steps(request: CreateRecovery, recipe: _Recipe) -> Choice:
    asked = request.training.steps
    if asked != "auto":
        return Choice(name="steps", value=str(asked), why="as requested")
    return Choice(name="steps", value=str(recipe.steps), why=recipe.why)


def _batch_size(request: CreateRecovery, available: int) -> Choice:
    asked = request.training.batch_size
    if asked != "auto":
        return Choice(name="batch_size", value=str(asked), why="as requested")
    return Choice(
        name="batch_size", value=str(min(BATCH_SIZE, available)), why="steady gradients at little memory"
    )
