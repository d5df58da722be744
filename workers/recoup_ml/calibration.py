"""What a model does on a little text: how strongly each linear layer's inputs flow, and what each block adds.

Pruning that looks at activations asks this before it cuts. One forward pass over one batch of
text answers it, whatever the architecture, because hooks see what each block is really called
with. Axes as in `sequences.py`; I is a linear layer's inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recoup_ml.hidden import capture, decoder_blocks
from recoup_ml.models import last_hidden
from recoup_ml.natural_text import python_documentation
from recoup_ml.scores import text_windows

WINDOWS, LENGTH = 16, 128
"""Stretches of calibration text, and the tokens of each."""

Norms = dict[nn.Linear, Tensor]
"""For each linear layer ‖X_j‖₂, the norm of each input over all tokens of the text, [I]."""


def calibration_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None) -> Tensor:
    """16 stretches of 128 tokens, spread over `texts`, by default Python's documentation: [B, T]."""
    return torch.tensor(text_windows(texts or python_documentation(), tokenizer, LENGTH, WINDOWS))


@torch.no_grad()
def change_blocks(model: PreTrainedModel, ids_BT: Tensor, change: Callable[[nn.Module, Norms], None]) -> None:
    """Calls `change` on every decoder block in order, with the norms of its linear layers' inputs.

    The blocks are changed while one forward pass goes through them, as Wanda does it: the norms of
    a block come from its unchanged weights, and its inputs from the blocks already changed.
    """

    def at_the_door(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _input_norms(block) as norms:
            block.forward(*args, **kwargs)
        change(block, norms)

    hooks = [b.register_forward_pre_hook(at_the_door, with_kwargs=True) for b in decoder_blocks(model)]
    try:
        _run(model, ids_BT)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def block_influence(model: PreTrainedModel, ids_BT: Tensor) -> list[float]:
    """1 - E[cos(x_in, x_out)] over the tokens, for each decoder block (ShortGPT, arXiv 2403.03853, eq. 1)."""
    with capture(model) as seen:
        seen.positions_BT = torch.ones_like(ids_BT, dtype=torch.bool, device=model.device)
        _run(model, ids_BT)
    return [
        1 - float(nn.functional.cosine_similarity(before_ND, after_ND).mean())
        for before_ND, after_ND in pairwise(seen.states())
    ]


def _run(model: PreTrainedModel, ids_BT: Tensor) -> None:
    there_BT = ids_BT.to(model.device)
    last_hidden(model, there_BT, torch.ones_like(there_BT))


@contextmanager
def _input_norms(block: nn.Module) -> Iterator[Norms]:
    norms: Norms = {}

    def read(linear: nn.Linear, args: tuple[Tensor]) -> None:
        norms[linear] = args[0].flatten(0, -2).float().norm(dim=0)

    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(read) for linear in linears]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()
