"""A low-rank patch for a quantized model: the most of its error that B A can take away, without training.

For a linear layer with the error E = W_t - W_q and inputs x of second moment C = E[x xᵀ], the
patch of rank r that minimises E‖(E - B A) x‖² is the best rank-r approximation of E C^½ (Eckart
and Young), times C^-½. Its left singular vectors U are the eigenvectors of E C Eᵀ, and then
B A = U Uᵀ E: no root and no inverse of C is needed, and a patch never does worse than none.
Activation-aware patches of this kind are known as EoRA (arXiv 2410.21271) and SVD-LLM; this
derivation and code are our own.

Blocks are patched in order, and each sees inputs that come through the patched ones before it.
The weights themselves may be packed: they are only read. Axes: O outputs, I inputs, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from recoup_ml.hidden import decoder_blocks
from recoup_ml.sequences import Batch
from recoup_ml.stream import Stream, hooks, linear_layers
from recoup_ml.twins import Twins

SPARE_DIRECTIONS, ITERATIONS = 16, 6


class Patch(NamedTuple):
    """ΔW = B A."""

    a_RI: Tensor
    b_OR: Tensor


def low_rank_patches(
    student: PreTrainedModel, teacher: Twins, texts: Sequence[Batch], rank: int
) -> dict[str, Patch]:
    """The patch of every linear layer in the blocks, by the layer's name; `student` stays as it is.

    In memory at once: the residual stream of `texts`, the second moments of one block's inputs, and
    the patches.
    """
    stream, patches = Stream(student, texts), {}
    for block in range(len(decoder_blocks(student))):
        layers = linear_layers(student, block)
        moments = second_moments(stream, block, layers)
        found = {
            name: low_rank_patch(
                teacher[f"{name}.weight"].to(moment_II) - weight_of(layers[name]), moment_II, rank
            )
            for name, moment_II in moments.items()
        }
        with hooks(_patched(layers[name], patch) for name, patch in found.items()):
            stream.advance(block)
        patches |= found
    return patches


def low_rank_patch(error_OI: Tensor, moment_II: Tensor, rank: int) -> Patch:
    """The B A of `rank` that takes most of E‖`error` x‖² away, B's columns in order of what they take.

    The leading eigenvectors U of E C Eᵀ by subspace iteration. Each pair of a row of A and a column of
    B has equal norms, which suits training. Where a matrix allows fewer directions, the others are zero.
    """
    rows = error_OI.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, min(rank + SPARE_DIRECTIONS, rows), generator=generator)
    directions = torch.linalg.qr(start.to(error_OI))[0]
    for _ in range(ITERATIONS):
        directions = torch.linalg.qr(error_OI @ (moment_II @ (error_OI.T @ directions)))[0]
    seen = error_OI.T @ directions
    _, order = torch.linalg.eigh(seen.T @ moment_II @ seen)
    b_OR = (directions @ order.flip(1))[:, :rank]
    a_RI = b_OR.T @ error_OI
    scale_R = a_RI.norm(dim=1).clamp_min(torch.finfo(a_RI.dtype).tiny).sqrt()
    missing = rank - b_OR.shape[1]
    return Patch(
        nn.functional.pad(a_RI / scale_R[:, None], (0, 0, 0, missing)),
        nn.functional.pad(b_OR * scale_R, (0, missing)),
    )


@torch.no_grad()
def add(student: PreTrainedModel, patches: Mapping[str, Patch]) -> None:
    """W += B A in place, for weights that are not packed."""
    for name, patch in patches.items():
        weight = student.get_submodule(name).weight
        weight.add_(patch.b_OR.to(weight.device) @ patch.a_RI.to(weight.device))


@torch.no_grad()
def as_adapter(student: PreTrainedModel, patches: Mapping[str, Patch]) -> PeftModel:
    """A LoRA adapter (rank r, alpha r) whose factors are the patches; its layers stand inside `student`."""
    rank = len(next(iter(patches.values())).a_RI)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(patches), bias="none", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(student, config)
    for name, patch in patches.items():
        layer = student.get_submodule(name)
        layer.lora_A["default"].weight.copy_(patch.a_RI)
        layer.lora_B["default"].weight.copy_(patch.b_OR)
    return adapted


def weight_of(layer: nn.Linear) -> Tensor:
    """The layer's weights [O, I] as float32, unpacked where a quantizer packed them."""
    held = layer.weight
    plain = dequantize_module_weight(layer).detach().float()
    layer.weight = held  # PEFT 0.21 leaves a copy there, which on a CPU has lost the scales of eight bits
    return plain


def second_moments(stream: Stream, block: int, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Σ x xᵀ over all tokens as they count, [I, I] float32, of each layer that the text flows through."""
    moments: dict[str, Tensor] = {}
    for flows, counts_N in zip(stream.watch(block, layers), stream.counts_N, strict=True):
        for name, flow in flows.items():
            counted_IN = flow.inputs_NI.T * counts_N
            moments[name] = moments.get(name, 0) + counted_IN @ flow.inputs_NI
    return moments


def _patched(layer: nn.Linear, patch: Patch) -> RemovableHandle:
    """Has the layer compute with its patch."""

    def add_patch(_layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0].to(patch.a_RI) @ patch.a_RI.T @ patch.b_OR.T).to(output.dtype)

    return layer.register_forward_hook(add_patch)
