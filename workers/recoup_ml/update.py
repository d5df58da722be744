"""What fine-tuning did to the weights, W_s - W_t, and how much of it is kept: repairs without data.

Three ways back to the teacher: along the straight line between the two models (WiSE-FT, arXiv
2109.01903), by the singular values of the update that rise above noise (DG-Hard, arXiv
2605.20296), and by whole decoder blocks. They change the loaded student in place and read the
teacher's tensors one at a time. Axes: O outputs, I inputs of a matrix.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml.twins import Twins
from recoup_ml.weights import block_of


@torch.no_grad()
def interpolate(student: PreTrainedModel, teacher: Twins, share: float) -> None:
    """W = W_t + share (W_s - W_t) for every parameter: 0 is the teacher, 1 the student."""
    for _, weight, theirs in teacher.pairs(student):
        weight.copy_(torch.lerp(theirs, weight.float(), share))


@torch.no_grad()
def keep_signal(student: PreTrainedModel, teacher: Twins, strictness: float) -> None:
    """Takes the noise out of every matrix's update; all other parameters become the teacher's."""
    for _, weight, theirs in teacher.pairs(student):
        is_matrix = weight.dim() == 2
        weight.copy_(theirs + signal(weight.float() - theirs, strictness) if is_matrix else theirs)


@torch.no_grad()
def restore_blocks(
    student: PreTrainedModel, teacher: Twins, distances: Sequence[float], share: float
) -> None:
    """Copies back the `share` of decoder blocks, one at least, that lie furthest from the teacher's."""
    furthest = sorted(range(len(distances)), key=lambda block: -distances[block])
    chosen = set(furthest[: max(1, round(share * len(distances)))])
    for name, weight, theirs in teacher.pairs(student):
        if block_of(name) in chosen:
            weight.copy_(theirs)


def signal(update_OI: Tensor, strictness: float = 1.0) -> Tensor:
    """The part of `update_OI` whose singular values exceed strictness · ω(β) · their median.

    The optimal hard threshold where the noise level is unknown: Gavish and Donoho, arXiv 1305.5870.
    """
    tall = update_OI if update_OI.shape[0] >= update_OI.shape[1] else update_OI.T
    squares, right = torch.linalg.eigh(tall.T.double() @ tall.double())
    singular = squares.clamp_min(0).sqrt()
    threshold = strictness * noise_factor(tall.shape[1] / tall.shape[0]) * singular.median()
    kept = right[:, singular > threshold].to(tall.dtype)
    low_rank = (tall @ kept) @ kept.T
    return low_rank if tall is update_OI else low_rank.T


@cache
def noise_factor(ratio: float) -> float:
    """ω(β) = λ*(β) / √μ(β) of arXiv 1305.5870 for a matrix of aspect ratio β ≤ 1; ω(1) = 2.858.

    λ* is the threshold for a known noise level, μ the median of the Marčenko-Pastur law, which is
    integrated here over x = x₋ + (x₊ - x₋) sin²θ, where its density is smooth.
    """
    optimal = math.sqrt(2 * (ratio + 1) + 8 * ratio / (ratio + 1 + math.sqrt(ratio**2 + 14 * ratio + 1)))
    least, greatest = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angle = (torch.arange(20_000, dtype=torch.float64) + 0.5) * (math.pi / 2 / 20_000)
    squares = least + (greatest - least) * angle.sin() ** 2
    mass = ((2 * angle).sin() ** 2 / squares).cumsum(0)
    return optimal / math.sqrt(float(squares[torch.searchsorted(mass, mass[-1] / 2)]))
