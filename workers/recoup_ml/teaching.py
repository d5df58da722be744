"""From what a model can do before and after to the verdict of a teaching: pure arithmetic.

Two numbers decide, each with a 95 % interval by bootstrap over held-out units: the loss on demonstrations
(after - before, paired), and the drift, the mean token KL from the model as it was on its own answers to
general prompts.

    not_taught              the interval of the loss does not lie below 0, or fewer are answered rightly
    taught_with_forgetting  it does, but the drift may exceed the gate, or a guarded measure got worse
    taught                  it does, and the upper bound of the drift is within the gate
"""

from collections.abc import Sequence

import numpy as np

from recoup.schemas import Change, Estimate, Gate, InContext, Measure, Outcome, Teaching
from recoup_ml import verdict
from recoup_ml.scores import Scores
from recoup_ml.skill import Skill, Untaught
from recoup_ml.splits import Split
from recoup_ml.verdict import Array, ratio_of_sums


def teaching(
    parts: Split, before: Untaught, after: Skill | None, drift: Scores | None, seed: int
) -> Teaching:
    """What was learnt and what was lost over it."""
    taught = after and _loss(after)
    return Teaching(
        train=len(parts.train),
        validation=len(parts.validation),
        test=len(before.alone.tokens),
        loss=_change(_loss(before.alone), taught, seed),
        right=_change(_right(before.alone), after and _right(after), seed),
        drift=_drift(drift, seed) if drift else None,
        in_context=_in_context(before, taught, seed),
    )


def outcome(found: Teaching, measures: Sequence[Measure], gate: Gate) -> tuple[Outcome, str]:
    """The verdict on a taught model, and why, in a sentence or two."""
    loss, right, drift = found.loss, found.right, found.drift
    if loss.change is None or right.change is None or drift is None:
        return "not_taught", "No trained checkpoint gave finite numbers: training diverged."
    learnt = (
        f"The loss on {loss.n} held-out demonstrations went from {loss.before:.3g} to {loss.after:.3g} "
        f"nats a token ({_interval(loss.change)}), right answers from {right.before:.0%} to {right.after:.0%}"
    )
    if _high(loss.change) >= 0:
        return "not_taught", f"{learnt}: no gain beyond the noise."
    if _high(right.change) < 0:
        return "not_taught", f"{learnt}: the loss fell, but fewer are answered rightly."
    moved = (
        f"It moved by {drift.value:.2g} nats a token from what it was on general prompts "
        f"({_interval(drift)}); the gate allows {gate.max_drift:g}"
    )
    worse = [f"{item.label} ({item.before:.3g} → {item.after:.3g})" for item in measures if item.worse]
    if worse:
        return "taught_with_forgetting", f"{learnt}. {moved}. Got worse: {', '.join(worse)}."
    name: Outcome = "taught" if _high(drift) <= gate.max_drift else "taught_with_forgetting"
    return name, f"{learnt}. {moved}."


def remarks(found: Teaching) -> list[str]:
    """What a reader must know beside the verdict."""
    said = []
    if found.right.after == 0:
        said.append("No held-out demonstration is answered rightly: what was learnt shows in the loss alone.")
    shown = found.in_context
    lead = shown and shown.lead
    if shown is None or lead is None or (lead.low is not None and lead.low > 0):
        return said
    return [
        *said,
        f"Training is not ahead of what costs nothing: with {shown.shots} demonstrations in its context the "
        f"untaught model has a loss of {shown.loss:.3g} nats a token and answers {shown.right:.0%} rightly.",
    ]


def _loss(skill: Skill) -> Array:
    return np.array([skill.nats, skill.tokens], dtype=np.float64).T


def _right(skill: Skill) -> Array:
    return np.array([skill.right, [1.0] * len(skill.right)], dtype=np.float64).T


def _change(before: Array, after: Array | None, seed: int) -> Change:
    """Of a mean over all units of (sum, weight)."""
    mean = ratio_of_sums()
    change = None if after is None else verdict.change(before, after, seed)
    return Change(
        before=float(mean(before)),
        after=None if after is None or change is None else float(mean(after)),
        change=change,
        n=len(before),
    )


def _drift(scores: Scores, seed: int) -> Estimate | None:
    values = np.array([[sum(tokens), len(tokens)] for tokens in scores.kl], dtype=np.float64)
    return verdict.change(values * [0.0, 1.0], values, seed)


def _in_context(before: Untaught, taught: Array | None, seed: int) -> InContext | None:
    if before.in_context is None:
        return None
    shown, mean = _loss(before.in_context), ratio_of_sums()
    return InContext(
        shots=before.shots,
        loss=float(mean(shown)),
        right=float(mean(_right(before.in_context))),
        lead=None if taught is None else verdict.change(taught, shown, seed),
    )


def _high(estimate: Estimate) -> float:
    return estimate.value if estimate.high is None else estimate.high


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:+.2g}, 95 % interval {estimate.low:+.2g} to {estimate.high:+.2g}"
