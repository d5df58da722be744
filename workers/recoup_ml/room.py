"""How many tokens go through a student at once: a power of two for which its device has room.

On the way to a loss a decoder layer keeps, of every token, about `ACTIVATIONS` numbers of a hidden state's
width (Korthikanti et al., arXiv 2205.05198, count bytes; the rest is for norms in float32 and gated MLPs). A
batch that holds more tokens is learnt piece by piece, which changes nothing but the order of additions. So
too many at once is an error of memory, and too few is slow. Half of what is free is taken; that was not
measured on GPUs.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from recoup_ml.fused import CHUNK

ACTIVATIONS = 34
HEAD_COPIES = 4
"""Pieces of logits, float32, that a divergence holds at once."""
OPTIMIZER_BYTES = 12
"""A trained parameter: its gradient and two moments, float32."""
CPU_TOKENS = 256
"""What caches of a CPU like best; its memory does not decide."""
FEWEST_TOKENS, MOST_TOKENS = 256, 16_384
SHARE = 0.5
"""Of what is free; the rest is for what is estimated wrongly and for what the allocator breaks up."""


@dataclass(frozen=True)
class Shape:
    """Of a student, what its activations depend on."""

    hidden: int
    layers: int
    vocabulary: int
    number_bytes: int

    @staticmethod
    def of(model: PreTrainedModel) -> "Shape":
        config = model.config.get_text_config()
        return Shape(
            config.hidden_size,
            config.num_hidden_layers,
            config.vocab_size,
            torch.finfo(model.dtype).bits // 8,
        )


def tokens_at_once(free_bytes: int | None, shape: Shape, unborn: int) -> int:
    """The largest power of two for which there is room, within bounds.

    Args:
        free_bytes: of the device; None: a CPU.
        unborn: trained parameters whose gradients and moments are not there yet.
    """
    if free_bytes is None:
        return CPU_TOKENS
    held = OPTIMIZER_BYTES * unborn + 4 * HEAD_COPIES * CHUNK["cuda"] * shape.vocabulary
    each = ACTIVATIONS * shape.number_bytes * shape.hidden * shape.layers
    room = int(SHARE * max(0, free_bytes - held) / each)
    return max(FEWEST_TOKENS, min(MOST_TOKENS, 1 << max(0, room.bit_length() - 1)))


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take of a GPU, its own cache included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
