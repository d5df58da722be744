"""The effect probe: whether a server does with an adapter what the trainer saw it do. Pure arithmetic.

vLLM can answer 200, list the adapter, and serve the base model (vllm#34186, #55193). So both are asked how
likely they find a few tokens of held-out answers, and compared with what the trainer measured after the same
token ids. Per token i, in nats: b_i and r_i are log p by the trainer's student and recovered model, B_i and
R_i by the server's. With ‖x‖ the root mean square over tokens:

    effect           ‖r - b‖        what training changed
    another base     ‖B - b‖        beyond the tolerance
    no effect        ‖R - B‖        less than a quarter of the effect
    another effect   ‖R - r‖        beyond the tolerance

The tolerance is 0.02 nats or 15 % of the effect, whichever is more: bfloat16 on a GPU moves a token's
log-probability by about a hundredth, another model or a part of an adapter by far more.
"""

import math
from collections.abc import Sequence

from recoup.schemas import EffectProbe, JobError

TOLERANCE_NATS, TOLERANCE_SHARE = 0.02, 0.15
LEAST_EFFECT_NATS = 0.01
"""An effect that small would be lost in rounding."""
LEAST_SHARE = 0.25


def verdict(
    probe: EffectProbe, served: Sequence[float], base: Sequence[float] | None = None
) -> JobError | None:
    """Why the server must not serve, or None.

    Args:
        served: log p of each row's token under what was deployed, nats.
        base: the same under the student; None where the server holds a whole model and no student.
    """
    trained = [row.recovered for row in probe.rows]
    student = [row.base for row in probe.rows]
    found_base = student if base is None else base
    if not all(map(math.isfinite, (*served, *found_base))):
        return JobError(code="probe_not_finite", message="The server computes NaN or infinity.")
    effect = _distance(trained, student)
    tolerance = max(TOLERANCE_NATS, TOLERANCE_SHARE * effect)
    if effect < LEAST_EFFECT_NATS:
        return _said("effect_too_small", effect, "is all that training changed, too little to be told apart")
    if (apart := _distance(found_base, student)) > tolerance:
        return _said("base_mismatch", apart, "lie between the server's student and the one that was trained")
    if (changed := _distance(served, found_base)) < LEAST_SHARE * effect:
        return _said("no_effect", changed, f"is all that it changes on the server; in training {effect:.3g}")
    if (apart := _distance(served, trained)) > tolerance:
        return _said("effect_mismatch", apart, f"lie between server and trainer; the effect is {effect:.3g}")
    return None


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))


def _said(code: str, nats: float, what: str) -> JobError:
    return JobError(code=code, message=f"{nats:.3g} nats a token {what}.")
