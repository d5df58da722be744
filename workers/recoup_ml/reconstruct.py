"""Block-wise reconstruction of a pruned model: what survived makes up for what was cut.

Two fits in every block, on the inputs x that reach it through the blocks already repaired. First each
matrix with zeros is re-fitted to what the teacher's matrix would make of those inputs:

    minimise over W where M = 1:   E‖(W - W_t) x‖² + Σ ρ_i ‖w_i - w_s,i‖²

(layer-wise least squares as in SparseGPT, arXiv 2301.00774, and "A free lunch in LLM compression",
arXiv 2510.14444; the mask M is the student's own and stays, bit for bit). Then the last matrix, which
adds to the residual stream, is fitted so that the stream behind the block becomes the teacher's there.
That makes up for what is still wrong in the block and before it, for channels that are gone, and for
layers that were dropped behind it. Where an output is normed before it is added (Gemma 2), the last
matrix is fitted as the others are.

All rows are solved at once by conjugate gradients with the mask applied, matrix products only. Axes: N
tokens, O outputs, I inputs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recoup_ml.hidden import decoder_blocks
from recoup_ml.low_rank import second_moments
from recoup_ml.sequences import Batch
from recoup_ml.stream import Stream, hooks, linear_layers
from recoup_ml.twins import Twins

ITERATIONS, TOLERANCE = 32, 1e-8
"""Of conjugate gradients: at most so many, until so little of each row's first residual energy is left."""


@torch.no_grad()
def reconstruct(
    student: PreTrainedModel,
    healthy: PreTrainedModel,
    teacher: Twins,
    texts: Sequence[Batch],
    ridge: float,
) -> dict[str, Tensor]:
    """Re-fits the student's blocks in place, one after another; `healthy` is the teacher, loaded.

    Returns the weights that were fitted, by name. In memory at once: both models, the residual streams of
    `texts` in both, and of one block the second moments of its inputs and what its last matrix is given.
    """
    here, there, passed, fitted = Stream(student, texts), Stream(healthy, texts), 0, list[str]()
    for block, module in enumerate(decoder_blocks(student)):
        next_kept = teacher.layers.get(block + 1, len(decoder_blocks(healthy)))
        for other in range(passed, next_kept):
            there.advance(other)
        passed = next_kept
        layers = linear_layers(student, block)
        last = [*layers][-1] if _adds_to_stream(here, block, [*layers.values()][-1]) else None
        others = {name: layer for name, layer in layers.items() if name != last}
        fitted += _fit_to_teacher(here, block, others, teacher, ridge)
        if last is None:
            here.advance(block)
        else:
            here.hidden_BTD = _fit_to_stream(here, there, block, module, layers[last], ridge)
            fitted.append(last)
    return {f"{name}.weight": student.get_submodule(name).weight.detach() for name in fitted}


def refit(weight_OI: Tensor, pull_OI: Tensor, moment_II: Tensor, ridge: float) -> Tensor:
    """`weight_OI` + D with the D that minimises tr (D C Dᵀ - 2 D Pᵀ) + Σ ρ_i ‖d_i‖²; zeros stay zero.

    Args:
        pull_OI: P = Σ y xᵀ of the changes y that the outputs should see.
        moment_II: C = Σ x xᵀ of the inputs.
        ridge: ρ of each input in units of its own moment.
    """
    kept_OI = weight_OI != 0
    damping_I = ridge * moment_II.diagonal()
    scale_I = (moment_II.diagonal() + damping_I).clamp_min(torch.finfo(moment_II.dtype).tiny)
    found = weight_OI.clone()
    residual = pull_OI * kept_OI
    step = residual / scale_I
    direction, energy_O1 = step, (residual * step).sum(1, keepdim=True)
    enough_O1 = TOLERANCE * energy_O1
    for _ in range(ITERATIONS):
        image = (direction @ moment_II + damping_I * direction) * kept_OI
        length_O1 = energy_O1 / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        found = found + length_O1 * direction
        residual = residual - length_O1 * image
        step = residual / scale_I
        before_O1, energy_O1 = energy_O1, (residual * step).sum(1, keepdim=True)
        if (energy_O1 <= enough_O1).all():
            break
        direction = step + energy_O1 / before_O1.clamp_min(1e-30) * direction
    return torch.where(kept_OI, found, torch.zeros(()).to(found))


def _fit_to_teacher(
    stream: Stream, block: int, layers: Mapping[str, nn.Linear], teacher: Twins, ridge: float
) -> list[str]:
    """Fits matrices that have zeros, and their teacher's shape, to their teacher's; returns their names."""
    pruned = {name: layer for name, layer in layers.items() if (layer.weight == 0).any()}
    fitted = []
    for name, moment_II in second_moments(stream, block, pruned).items() if pruned else ():
        weight, theirs = layers[name].weight, teacher[f"{name}.weight"].to(moment_II)
        if theirs.shape == weight.shape:
            pull_OI = (theirs - weight.float()) @ moment_II
            weight.copy_(refit(weight.float(), pull_OI, moment_II, ridge))
            fitted.append(name)
    return fitted


def _fit_to_stream(
    here: Stream, there: Stream, block: int, module: nn.Module, last: nn.Linear, ridge: float
) -> list[Tensor]:
    """Fits the matrix that adds to the stream, so that the stream behind the block is what it is `there`.

    Returns the stream behind the block as it then is.
    """
    moment_II = pull_OI = torch.zeros((), device=last.weight.device)
    watched, seen = here.watch(block, {"last": last, "block": module}), []
    of_batches = zip(watched, there.masks_BT, there.counts_N, there.hidden_BTD, strict=True)
    for flows, mask_BT, counts_N, wanted_BTD in of_batches:
        inputs_NI, outputs_NO = flows["last"].inputs_NI, flows["block"].outputs_NO
        counted_NI = counts_N[:, None] * inputs_NI
        lack_NO = wanted_BTD[mask_BT].float() - outputs_NO
        moment_II = moment_II + inputs_NI.T @ counted_NI
        pull_OI = pull_OI + lack_NO.T @ counted_NI
        seen.append((inputs_NI, outputs_NO))
    fitted_OI = refit(last.weight.float(), pull_OI, moment_II, ridge)
    change_OI, behind_BTD = fitted_OI - last.weight.float(), []
    last.weight.copy_(fitted_OI)
    for (inputs_NI, outputs_NO), mask_BT, hidden_BTD in zip(
        seen, here.masks_BT, here.hidden_BTD, strict=True
    ):
        behind_BTD.append(hidden_BTD.clone())
        behind_BTD[-1][mask_BT] = (outputs_NO + inputs_NI @ change_OI.T).to(hidden_BTD)
    return behind_BTD


def _adds_to_stream(stream: Stream, block: int, layer: nn.Linear) -> bool:
    """Whether the layer's output is added to the stream as it is: then a shift of one shifts the other."""
    before_BTD = next(stream.after(block))
    shift = float(before_BTD.float().std())
    with hooks([layer.register_forward_hook(lambda _layer, _args, output: output + shift)]):
        moved_BTD = next(stream.after(block)) - before_BTD
    return float((moved_BTD - shift).abs().mean()) < 0.1 * shift
