"""How far the student's next-token distribution q is from the teacher's p.

    KL(p‖q) = Σ_v p_v (log p_v - log q_v),    p = softmax(z_teacher / τ),  q = softmax(z_student / τ)

Every divergence here is zero exactly where the two agree and never negative (in float32 to
about 1e-6 nats); entropy and cross-entropy are both in it. Values are nats a position; what to
average over is the caller's business, and nothing is multiplied by τ². Forward KL on the
teacher's own answers is the loss of QAD (arXiv 2601.20088); reverse KL and JSD on the student's
rollouts are those of GKD (arXiv 2306.13649), skew KL is that of DistiLLM (arXiv 2402.03898).

What a student is compared with is in `targets.py`; how it learns without logits in memory, in `fused.py`.

Axes: N positions, V vocabulary (or any set of outcomes).
"""

import math

import torch
from torch import Tensor

from recoup_ml.objective import Divergence


def between(divergence: Divergence, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """The divergence of each position, from logits [N, V]; returns [N], nats."""
    match divergence.name:
        case "forward_kl":
            return forward_kl(teacher_NV, student_NV, divergence.temperature)
        case "reverse_kl":
            return reverse_kl(teacher_NV, student_NV, divergence.temperature)
        case "jsd":
            return jsd(teacher_NV, student_NV, divergence.beta, divergence.temperature)
        case "skew_kl":
            return skew_kl(teacher_NV, student_NV, divergence.beta, divergence.temperature)


def forward_kl(teacher_NV: Tensor, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p‖q) of each position, from logits [N, V]; returns [N], nats."""
    return _kl(*_both(teacher_NV, student_NV, temperature))


def reverse_kl(teacher_NV: Tensor, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q‖p) of each position, from logits [N, V]; returns [N], nats."""
    log_p, log_q = _both(teacher_NV, student_NV, temperature)
    return _kl(log_q, log_p)


def jsd(teacher_NV: Tensor, student_NV: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """β KL(p‖m) + (1-β) KL(q‖m) with m = β p + (1-β) q, of each position; returns [N], nats.

    The generalised Jensen-Shannon divergence of GKD, at most -β log β - (1-β) log(1-β).
    It vanishes towards both ends, but JSD_β / β → KL(p‖q) as β → 0 and JSD_β / (1-β) → KL(q‖p)
    as β → 1. At the ends it is these limits, by the convention of TRL and Liger: β = 0 is
    forward KL, β = 1 reverse KL; the value jumps there.
    """
    assert 0 <= beta <= 1
    log_p, log_q = _both(teacher_NV, student_NV, temperature)
    if beta in (0, 1):
        return _kl(log_q, log_p) if beta else _kl(log_p, log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(teacher_NV: Tensor, student_NV: Tensor, beta: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ β p + (1-β) q) of each position, of DistiLLM; returns [N], nats.

    At most -log β. At β = 0 it is forward KL, its limit from above; at β = 1 it would be zero
    everywhere and is refused.
    """
    assert 0 <= beta < 1
    log_p, log_q = _both(teacher_NV, student_NV, temperature)
    return _kl(log_p, _log_mixture(log_p, log_q, beta) if beta else log_q)


def tempered(logits_NV: Tensor, temperature: float) -> Tensor:
    """z / τ, without a copy where τ is 1."""
    assert temperature > 0
    return logits_NV if temperature == 1 else logits_NV / temperature


def _both(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and log q."""
    assert teacher_NV.shape == student_NV.shape
    log_p, log_q = (tempered(z, temperature).log_softmax(-1) for z in (teacher_NV, student_NV))
    return log_p, log_q


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(β p + (1-β) q), no probability made on the way."""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
