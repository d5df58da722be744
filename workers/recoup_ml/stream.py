"""Text on its way through a model, one decoder block at a time.

A repair that changes a block wants to see what reaches it through the blocks already repaired,
and then to send the text on through the repaired one. A `Stream` holds the residual stream of
some batches at the door of a block, so that the whole model is passed once, not once a block.
What else a block is called with (masks, rotary angles) does not depend on the stream, and is
recorded when the stream is made.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from recoup_ml.errors import UnsupportedModel
from recoup_ml.hidden import decoder_blocks
from recoup_ml.layout import laid_out
from recoup_ml.models import last_hidden
from recoup_ml.sequences import Answered, Batch

CALIBRATION_TOKENS, BATCH_TOKENS = 16_384, 2_048


class Flow(NamedTuple):
    """What one layer was given and what it made of it, at every token of a batch, float32."""

    inputs_NI: Tensor
    outputs_NO: Tensor


class Stream:
    """The residual stream of some batches before the first block; `advance` takes it past the next."""

    def __init__(self, model: PreTrainedModel, texts: Sequence[Batch]) -> None:
        self._blocks = decoder_blocks(model)
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self._blocks]
        self.masks_BT = [_tokens(batch).to(model.device) for batch in texts]
        """Of each batch: true on tokens."""
        self.counts_N = [_counts(batch).to(model.device) for batch in texts]
        """Of each token: how much it counts. What all sequences of a batch begin with counts once:
        as often as it stands there, the same few tokens would outweigh all others."""
        self.hidden_BTD: list[Tensor] = []
        """Of each batch: the stream at the door of the block that comes next."""
        self._record(model, texts)

    @torch.no_grad()
    def after(self, block: int) -> Iterator[Tensor]:
        """What `block`, as it is now, makes of the stream: [B, T, D] for each batch."""
        for hidden_BTD, (args, kwargs) in zip(self.hidden_BTD, self._arguments[block], strict=True):
            output = self._blocks[block](hidden_BTD, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    def advance(self, block: int) -> None:
        self.hidden_BTD = list(self.after(block))

    def watch(self, block: int, layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Flow]]:
        """Runs `block` and tells, for each batch, what flows through its `layers`.

        A layer that is given tokens in another order than the stream's (an expert) is left out.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, _layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args[0].dim() == 3:
                seen[name] = args[0], output

        with hooks(layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()):
            for mask_BT, _ in zip(self.masks_BT, self.after(block), strict=True):
                yield {name: Flow(*(part[mask_BT].float() for part in parts)) for name, parts in seen.items()}

    @torch.no_grad()
    def _record(self, model: PreTrainedModel, texts: Sequence[Batch]) -> None:
        def at_the_door(index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self._arguments[index].append((args[1:], others))
            if index == 0:
                self.hidden_BTD.append(args[0] if args else kwargs["hidden_states"])

        def behind(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            plain.append(isinstance(output, Tensor))

        plain: list[bool] = []
        before = (
            block.register_forward_pre_hook(partial(at_the_door, index), with_kwargs=True)
            for index, block in enumerate(self._blocks)
        )
        with hooks([*before, *(block.register_forward_hook(behind) for block in self._blocks)]):
            for batch in texts:
                there = batch.to(model.device)
                with _passed_over(self._blocks if plain and all(plain) else []):
                    last_hidden(model, there.ids_BT, there.mask_BT, there.places_BT, there.sees_BTT)


@contextmanager
def _passed_over(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Has blocks give back the stream as it reached them: what a model does outside of them costs little."""
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    for block, _ in before:
        block.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for block, forward in before:
            del block.forward
            if forward:
                block.forward = forward


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks away when the block ends, whatever happened in it."""
    placed = list(handles)
    try:
        yield
    finally:
        for handle in placed:
            handle.remove()


def _tokens(batch: Batch) -> Tensor:
    return torch.ones_like(batch.answer_BT) if batch.mask_BT is None else batch.mask_BT.bool()


def _counts(batch: Batch) -> Tensor:
    counts_BT = torch.ones(batch.ids_BT.shape)
    if batch.mask_BT is not None:  # in a pack what is shared stands once
        alike_T = (batch.ids_BT == batch.ids_BT[:1]).all(0).cumprod(0).bool()
        counts_BT[:, alike_T] = 1 / len(batch.rows)
    return counts_BT[_tokens(batch)]


def calibration(sequences: Sequence[Answered], pad_id: int, *readers: PreTrainedModel) -> list[Batch]:
    """The first of `sequences`, one at least, that hold no more than 16k tokens together; in batches."""
    return list(laid_out(sequences[: calibrated(sequences)], pad_id, BATCH_TOKENS, *readers))


def calibrated(sequences: Sequence[Answered]) -> int:
    """How many of the first of `sequences` that are."""
    totals = accumulate(map(len, sequences))
    return max(1, sum(1 for _ in takewhile(lambda total: total <= CALIBRATION_TOKENS, totals)))


def linear_layers(model: PreTrainedModel, block: int) -> dict[str, nn.Linear]:
    """The linear layers of one block, by their names in the model.

    Raises:
        UnsupportedModel: there are none; GPT-2 and its kin keep their matrices in another class.
    """
    inside = set(decoder_blocks(model)[block].modules())
    found = {
        name: layer
        for name, layer in model.named_modules()
        if layer in inside and isinstance(layer, nn.Linear)
    }
    if not found:
        raise UnsupportedModel(
            f"The blocks of {type(model).__name__} hold no torch.nn.Linear, all that this repair knows."
        )
    return found
