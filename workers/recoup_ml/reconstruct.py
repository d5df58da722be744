"""Block-wise reconstruction of a pruned model: its surviving weights make up for what was cut.

For every matrix in turn, with the inputs x that reach it through the blocks already repaired, the
survivors are re-fitted to what the teacher's matrix would make of them:

    minimise over W where M = 1:   E‖(W - W_t) x‖² + Σ ρ_i ‖w_i - w_s,i‖²

(layer-wise least squares as in SparseGPT, arXiv 2301.00774, and "A free lunch in LLM compression",
arXiv 2510.14444; the mask M is the student's own and stays, bit for bit). All rows are solved at
once by conjugate gradients with the mask applied, matrix products only. A matrix whose teacher has
another shape is left as it is. Axes: O outputs, I inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml.hidden import decoder_blocks
from recoup_ml.low_rank import second_moments
from recoup_ml.sequences import Batch
from recoup_ml.stream import Stream, linear_layers
from recoup_ml.twins import Twins

ITERATIONS = 32


@torch.no_grad()
def reconstruct(student: PreTrainedModel, teacher: Twins, texts: Sequence[Batch], ridge: float) -> None:
    """Re-fits the survivors of every pruned matrix in the blocks, in place, block after block.

    In memory at once: the residual stream of `texts` and the second moments of one block's inputs.
    """
    stream = Stream(student, texts)
    for block in range(len(decoder_blocks(student))):
        layers = linear_layers(student, block)
        for name, moment_II in second_moments(stream, block, layers).items():
            weight = layers[name].weight
            theirs = teacher[f"{name}.weight"].to(moment_II)
            if theirs.shape == weight.shape and (weight == 0).any():
                weight.copy_(refit(weight.float(), theirs, moment_II, ridge))
        stream.advance(block)


def refit(weight_OI: Tensor, teacher_OI: Tensor, moment_II: Tensor, ridge: float) -> Tensor:
    """The survivors that minimise tr (W - W_t) C (W - W_t)ᵀ + Σ ρ_i ‖w_i - w_s,i‖²; zeros elsewhere.

    Args:
        moment_II: C, the second moment of the inputs.
        ridge: ρ of each input in units of its own moment.
    """
    kept_OI = weight_OI != 0
    damping_I = ridge * moment_II.diagonal()
    scale_I = (moment_II.diagonal() + damping_I).clamp_min(torch.finfo(moment_II.dtype).tiny)
    found = weight_OI.clone()
    residual = ((teacher_OI - found) @ moment_II) * kept_OI
    step = residual / scale_I
    direction, energy_O1 = step, (residual * step).sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        image = (direction @ moment_II + damping_I * direction) * kept_OI
        length_O1 = energy_O1 / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        found = found + length_O1 * direction
        residual = residual - length_O1 * image
        step = residual / scale_I
        before_O1, energy_O1 = energy_O1, (residual * step).sum(1, keepdim=True)
        direction = step + energy_O1 / before_O1.clamp_min(1e-30) * direction
    return torch.where(kept_OI, found, torch.zeros(()).to(found))
