"""How far the student's next-token distribution is from the teacher's.

    KL(p‖q) = Σ_v p_v (log p_v - log q_v),    p = softmax(z_teacher / τ),  q = softmax(z_student / τ)

It is zero exactly where the two agree and never negative; both entropy and cross-entropy
are in it. Values are nats a position; what to average over is the caller's business.
Forward KL on the teacher's own answers is the distillation loss of QAD (arXiv 2601.20088)
and of GKD with λ = 0, β = 0 (arXiv 2306.13649).

Logits are made from hidden states a few hundred positions at a time and are made again in
the backward pass, so that [positions x vocabulary] is never held whole.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recoup_ml.models import Head


def forward_kl(teacher_NV: Tensor, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher‖student) of each position, from logits [N, V]; returns [N], nats."""
    assert teacher_NV.shape == student_NV.shape
    log_p = torch.log_softmax(teacher_NV / temperature, dim=-1)
    log_q = torch.log_softmax(student_NV / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def hidden_forward_kl(
    teacher_ND: Tensor,
    teacher_head: Head,
    student_ND: Tensor,
    student_head: Head,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """As `forward_kl`, from last hidden states [N, D]; differentiable in the student's side.

    Memory grows with `chunk` x vocabulary, not with N.
    """

    def part(student_part: Tensor, teacher_part: Tensor) -> Tensor:
        return forward_kl(teacher_head(teacher_part), student_head(student_part), temperature)

    parts = [
        checkpoint(part, student, teacher, use_reentrant=False)
        for student, teacher in zip(student_ND.split(chunk), teacher_ND.split(chunk), strict=True)
    ]
    return torch.cat(parts)
