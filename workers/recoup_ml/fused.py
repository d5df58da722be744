"""A divergence straight from last hidden states, its gradient made together with its value.

Like the fused linear losses of Liger (arXiv 2410.10989): for some hundred positions at a time,
logits are made, turned into a loss and its slope, the slope is multiplied back through the head,
and both are let go. The forward pass leaves the gradient of the hidden states behind; the backward
pass only scales it. So [positions x vocabulary] is never held whole, and a head is multiplied with
once a direction: forward (student, teacher), back (student), and once more where the head trains.

Liger's own kernels are not used: its fused JSD takes no weight for a position, no soft cap and no
teacher's top-k. On an H200 (`benchmarks/gpu.py divergence`) its forward KL takes 1.2 to 1.3 times our time,
and its JSD 0.6 to 0.7 of it.

Axes: N positions, C positions of a chunk, V vocabulary, D width of a hidden state.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recoup_ml.divergence import tempered
from recoup_ml.models import Head
from recoup_ml.objective import Divergence
from recoup_ml.targets import Hidden, Target, Tokens

CHUNK = {"cpu": 128, "cuda": 512}
"""Positions whose logits are held at once; with more an H200 is 4 % faster at most."""


def hidden_divergence(
    student_ND: Tensor,
    student_head: Head,
    target: Target,
    divergence: Divergence,
    weights_N: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Σ_n weights_N[n] · D_n, a scalar in nats; differentiable in student_ND and the student's head.

    A position of weight 0 counts nowhere. Each gradient has the dtype of its tensor; the head's are added
    up over the chunks in float32 at least. Memory grows with `chunk` x V, and by the head's size, in that
    dtype, where it trains.
    """
    assert student_ND.shape[:1] == weights_N.shape
    learners = student_ND, student_head.weight_VD, student_head.bias_V
    size = chunk or CHUNK[student_ND.device.type]
    return _HiddenDivergence.apply(*learners, student_head, target, divergence, weights_N, size)


class _HiddenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        target: Target,
        divergence: Divergence,
        weights_N: Tensor,
        size: int,
    ) -> Tensor:
        total = 0.0
        grad_ND = torch.empty_like(student_ND)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=wide) if ctx.needs_input_grad[2] else None
        parts = (tensor.split(size) for tensor in (student_ND, grad_ND, weights_N.unsqueeze(-1)))
        for target_C, student_CD, grad_CD, weights_C1 in zip(target.split(size), *parts, strict=True):
            loss_C, slope_CV = _loss_and_slope(target_C, divergence, head, student_CD)
            slope_CV = slope_CV.to(weight_VD.dtype)
            total += (loss_C * weights_C1.squeeze(-1)).sum()
            grad_CD.copy_(slope_CV @ weight_VD * weights_C1)
            if grad_VD is not None:
                inputs_CD = (student_CD * weights_C1).to(slope_CV.dtype)
                if wide == slope_CV.dtype:
                    grad_VD.addmm_(slope_CV.T, inputs_CD)
                else:
                    grad_VD += slope_CV.T @ inputs_CD
            if grad_V is not None:
                grad_V += (slope_CV * weights_C1).sum(0)
        ctx.save_for_backward(
            grad_ND,
            None if grad_VD is None else grad_VD.to(weight_VD.dtype),
            None if grad_V is None else grad_V.to(bias_V.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad * scale for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _loss_and_slope(
    target: Target, divergence: Divergence, head: Head, hidden_CD: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each position [C] and its derivative by what the head's linear map gave [C, V]."""
    logits_CV = head(hidden_CD)
    match target:
        case Hidden() if divergence.name == "forward_kl":
            loss_C, slope_CV = _forward_kl(target.logits(), logits_CV, divergence.temperature)
        case Tokens(ids_N=ids_C):
            loss_C, slope_CV = _cross_entropy(ids_C, logits_CV)
        case _:
            loss_C, slope_CV = _by_autograd(target, divergence, logits_CV)
    if head.softcap is not None:
        slope_CV *= 1 - (logits_CV / head.softcap).square()
    if head.scale != 1.0:
        slope_CV *= head.scale
    return loss_C, slope_CV


def _forward_kl(teacher_CV: Tensor, student_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`divergence.forward_kl` with its slope (q - p) / τ, by few passes over memory."""
    assert teacher_CV.shape == student_CV.shape
    log_p = tempered(teacher_CV, temperature).log_softmax(-1)
    log_q = tempered(student_CV, temperature).log_softmax(-1)
    p = torch.exp(log_p, out=teacher_CV)
    loss_C = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return loss_C, tempered(log_q.exp_().sub_(p), temperature)


def _cross_entropy(ids_C: Tensor, student_CV: Tensor) -> tuple[Tensor, Tensor]:
    """-log q of the tokens, with its slope q - 1[token]."""
    ids_C1, log_q = ids_C.unsqueeze(-1), student_CV.log_softmax(-1)
    loss_C = -log_q.gather(-1, ids_C1).squeeze(-1)
    return loss_C, log_q.exp_().scatter_add_(-1, ids_C1, -torch.ones_like(loss_C).unsqueeze(-1))


def _by_autograd(target: Target, divergence: Divergence, student_CV: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf_CV = student_CV.detach().requires_grad_()
        loss_C = target.loss(divergence, leaf_CV)
        (slope_CV,) = torch.autograd.grad(loss_C.sum(), leaf_CV)
    return loss_C.detach(), slope_CV
