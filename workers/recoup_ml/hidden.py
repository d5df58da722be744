"""Hidden states of chosen positions, layer by layer, while a model runs.

The residual stream after the embeddings and after every decoder block is read by hooks
that copy only the positions asked for, and that are gone when the `with` block ends,
whatever happened in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recoup_ml.errors import UnsupportedModel

CPU = torch.device("cpu")


class Capture:
    """What the hooks of one `capture` block read. Set `positions_BT` before each forward pass."""

    def __init__(self, layers: int, device: torch.device, detached: bool) -> None:
        self.positions_BT: Tensor | None = None
        self._device, self._detached = device, detached
        self._parts: list[list[Tensor]] = [[] for _ in range(layers)]

    def read(self, layer: int, hidden_BTD: Tensor) -> None:
        if self.positions_BT is not None:
            read_ND = hidden_BTD[self.positions_BT]
            read_ND = read_ND.detach() if self._detached else read_ND
            dtype = torch.promote_types(read_ND.dtype, torch.float32)
            self._parts[layer].append(read_ND.to(self._device, dtype))

    def states(self) -> list[Tensor]:
        """For every layer, embeddings first, the positions read so far: [N, D], float32 at least."""
        return [torch.cat(parts) for parts in self._parts]


@contextmanager
def capture(model: PreTrainedModel, device: torch.device = CPU, detached: bool = True) -> Iterator[Capture]:
    """Reads the residual stream of `model` inside the block, before the first block and after each.

    What is read is kept on `device`; not `detached`, gradients flow back from it into the model.
    """
    blocks = decoder_blocks(model)
    seen = Capture(len(blocks) + 1, device, detached)
    first = blocks[0].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.read(0, args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    hooks = [first]
    for index, block in enumerate(blocks):
        hooks.append(
            block.register_forward_hook(
                lambda _module, _args, output, layer=index + 1: seen.read(
                    layer, output[0] if isinstance(output, tuple) else output
                )
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks: the one module list as long as the config says."""
    depth = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of {depth} decoder blocks; "
            "recovery reads hidden states block by block."
        )
    return found[0]
