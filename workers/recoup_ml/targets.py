"""What the student is to match at each position: a whole distribution, the top of one, or one token.

A target holds what the teacher left (hidden states, log-probabilities, tokens) and knows how far
logits are from it. It says nothing of which positions count, or how much.

Axes: N positions, V vocabulary, D width of a hidden state, K tokens kept of the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from recoup_ml.divergence import between, tempered
from recoup_ml.models import Head
from recoup_ml.objective import Divergence


class Target(Protocol):
    """What N positions should have said."""

    def split(self, size: int) -> Sequence["Target"]:
        """The same, `size` positions at a time."""
        ...

    def loss(self, divergence: Divergence, student_NV: Tensor) -> Tensor:
        """How far logits [N, V] are from it; [N], nats, differentiable in the logits."""
        ...


@dataclass(frozen=True)
class Hidden:
    """The teacher's whole distribution: its last hidden states and its head, an exact cache of its logits."""

    hidden_ND: Tensor
    head: Head

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[N, V], made anew."""
        return self.head(self.hidden_ND)

    def split(self, size: int) -> list["Hidden"]:
        return [Hidden(part_ND, self.head) for part_ND in self.hidden_ND.split(size)]

    def loss(self, divergence: Divergence, student_NV: Tensor) -> Tensor:
        return between(divergence, self.logits(), student_NV)


@dataclass(frozen=True)
class TopK:
    """The teacher's K likeliest tokens.

    With a tail, K + 1 outcomes are compared, one of them being all the other tokens: a lower bound
    of the whole divergence (data processing), equal to it at K = V. Without a tail both sides are
    renormalised over the K, and the student's mass elsewhere goes unseen, which reverse KL forgives
    least. Truncation that does neither is no divergence: it falls below zero.
    """

    ids_NK: Tensor
    """Distinct at each position."""
    log_p_NK: Tensor
    """The teacher's log-probabilities, nats, at the temperature of the divergence they will meet."""
    log_rest_N: Tensor | None
    """Of the mass of all the other tokens, likewise; None: without a tail."""

    @staticmethod
    def of(teacher_NV: Tensor, k: int, temperature: float = 1.0, tail: bool = True) -> "TopK":
        """From logits; all of the vocabulary if it has fewer than `k` tokens."""
        log_p_NV = tempered(teacher_NV, temperature).log_softmax(-1)
        log_p_NK, ids_NK = log_p_NV.topk(min(k, log_p_NV.shape[-1]))
        return TopK.given(ids_NK, log_p_NK) if tail else TopK(ids_NK, log_p_NK, None)

    @staticmethod
    def given(ids_NK: Tensor, log_p_NK: Tensor) -> "TopK":
        """With the tail that they leave; rounded ones may leave less than nothing."""
        return TopK(ids_NK, log_p_NK, _log_rest(log_p_NK))

    def compact(self) -> "TopK":
        """As it is kept, on the CPU: ids of 16 bits where they fit, else of 32, and half floats.

        A log-probability is off by a 2048th of itself at most. The tail is rounded by itself: as what is
        left of rounded log-probabilities it would mean little.
        """
        fits = int(self.ids_NK.max()) < 1 << 16
        rest_N = None if self.log_rest_N is None else self.log_rest_N.half().cpu()
        ids_NK = self.ids_NK.cpu().to(torch.uint16 if fits else torch.int32)
        return TopK(ids_NK, self.log_p_NK.half().cpu(), rest_N)

    def split(self, size: int) -> list["TopK"]:
        ids, log_p = self.ids_NK.split(size), self.log_p_NK.split(size)
        rest = [None] * len(ids) if self.log_rest_N is None else self.log_rest_N.split(size)
        return [TopK(*part) for part in zip(ids, log_p, rest, strict=True)]

    def loss(self, divergence: Divergence, student_NV: Tensor) -> Tensor:
        student_NV, ids_NK = tempered(student_NV, divergence.temperature), self.ids_NK.long()
        student = student_NV.gather(-1, ids_NK)
        teacher = self.log_p_NK.to(student)
        if self.log_rest_N is not None and ids_NK.shape[-1] < student_NV.shape[-1]:
            rest_NV = student_NV.scatter(-1, ids_NK, -math.inf)
            student = torch.cat([student, rest_NV.logsumexp(-1, keepdim=True)], -1)
            teacher = torch.cat([teacher, self.log_rest_N.to(student).unsqueeze(-1)], -1)
        return between(replace(divergence, temperature=1.0), teacher, student)


@dataclass(frozen=True)
class Tokens:
    """One token: cross-entropy, that is forward KL from a one-hot distribution.

    Whatever the divergence: its name and temperature mean nothing here.
    """

    ids_N: Tensor

    def split(self, size: int) -> list["Tokens"]:
        return [Tokens(part_N) for part_N in self.ids_N.split(size)]

    def loss(self, divergence: Divergence, student_NV: Tensor) -> Tensor:  # noqa: ARG002
        return torch.nn.functional.cross_entropy(student_NV, self.ids_N, reduction="none")


def join(targets: Sequence[Target], like: Tensor) -> Target:
    """One target of several of a kind, position after position, on `like`'s device.

    Hidden states and their head also take its dtype.
    """
    match targets[0]:
        case Hidden(head=head):
            return Hidden(torch.cat([target.hidden_ND for target in targets]).to(like), head.like(like))
        case TopK(log_rest_N=rest_N):
            ids_NK = torch.cat([target.ids_NK.long() for target in targets]).to(like.device)
            log_p_NK = torch.cat([target.log_p_NK for target in targets]).to(like.device)
            if rest_N is not None:
                rest_N = torch.cat([target.log_rest_N for target in targets]).to(like.device)
            return TopK(ids_NK, log_p_NK, rest_N)
        case Tokens():
            return Tokens(torch.cat([target.ids_N for target in targets]).to(like.device))
    raise TypeError(f"{type(targets[0]).__name__} is not a kind of target that can be joined.")


def _log_rest(log_p_NK: Tensor) -> Tensor:
    """log(1 - Σ p) [N]; what is left is held to be at least the rounding of 1."""
    rest_N = 1 - log_p_NK.double().exp().sum(-1)
    return rest_N.clamp_min(torch.finfo(log_p_NK.dtype).eps).log().to(log_p_NK)
