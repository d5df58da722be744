"""How many tokens go through a student at once: on a GPU a power of two for which it has room.

On the way to a loss a decoder layer keeps, of every token, about `ACTIVATIONS` numbers of a hidden state's
width (Korthikanti et al., arXiv 2205.05198, count bytes; the rest is for norms in float32 and gated MLPs). A
batch that holds more tokens is learnt piece by piece, which changes nothing but the order of additions. So
too many at once is an error of memory, and too few is slow. Where there is room for few, layers keep their
inputs alone and are run again on the way back (Chen et al. 2016, arXiv 1604.06174).

Measured on an H200 with LoRA in bfloat16 (`benchmarks/gpu.py memory`): 27 numbers a layer for Llama-3.1-8B's
shape and 45 for one of 0.5 B, whose MLP is wider for its width. Layers that are run again keep 1.6, at 0.7 to
0.9 of the speed. Half of what is free is taken, so that both have room.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from recoup_ml.fused import CHUNK

ACTIVATIONS = 34
RECOMPUTED, WORKING = 2, 2
"""Numbers that a layer keeps if it is run again, and how many layers are there in full meanwhile."""
RECOMPUTE_BELOW = 1024
"""Tokens at once."""
HEAD_COPIES = 6
"""Pieces of logits, float32, that a divergence holds at once."""
OPTIMIZER_BYTES = 12
"""A trained parameter: its gradient and two moments, float32."""
CPU_TOKENS = 384
"""What caches of a CPU like best; its memory does not decide."""
FEWEST_TOKENS, MOST_TOKENS = 256, 8_192
"""Longer packs are slower: attention looks at all of a pack."""
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


@dataclass(frozen=True)
class Room:
    """What a student's device has room for."""

    tokens: int
    """At once; on a GPU a power of two within bounds."""
    recomputes: bool
    """Whether layers are run again on the way back."""


def room_for(free_bytes: int | None, shape: Shape, unborn: int, may_recompute: bool = True) -> Room:
    """How a student trains where `free_bytes` of its device are free.

    Args:
        free_bytes: of the device; None: a CPU.
        unborn: trained parameters whose gradients and moments are not there yet.
    """
    if free_bytes is None:
        return Room(CPU_TOKENS, False)
    held = OPTIMIZER_BYTES * unborn + 4 * HEAD_COPIES * CHUNK["cuda"] * shape.vocabulary
    room, width = SHARE * max(0, free_bytes - held), shape.number_bytes * shape.hidden
    plain = int(room / (ACTIVATIONS * width * shape.layers))
    if plain >= RECOMPUTE_BELOW or not may_recompute:
        return Room(_power_of_two(plain), False)
    return Room(
        _power_of_two(int(room / (width * (RECOMPUTED * shape.layers + WORKING * ACTIVATIONS)))), True
    )


def _power_of_two(tokens: int) -> int:
    return max(FEWEST_TOKENS, min(MOST_TOKENS, 1 << max(0, tokens.bit_length() - 1)))


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take of a GPU, its own cache included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
