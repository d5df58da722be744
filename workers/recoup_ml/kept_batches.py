"""Batches that a model in this process answered, kept until their stage is done.

What a model answers depends, in its last bits, on what else stood in the batch, and so do the hidden
states that were seen on the way. So a batch is kept whole, under a hash of all its prompts: a stage
that was killed takes what is there, makes the rest, and leaves what it would have left undisturbed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recoup_ml import durable
from recoup_ml.sequences import Encoded

Given = tuple[Sequence[int], Tensor]
"""An answer's tokens, and last hidden states [N, D] of its positions or, too, of the prompt's before them."""
States = Literal["none", "answer", "whole"]
"""Which of them are wanted."""


@dataclass(frozen=True)
class KeptBatches:
    """The batches of one model, answering greedily, in a folder."""

    folder: Path

    def get(self, prompts: Sequence[Encoded], max_new_tokens: int, states: States) -> list[Given] | None:
        """What was kept of this very batch, in its order; none if it was never answered."""
        path = self._path(prompts, max_new_tokens, states)
        if not path.exists():
            return None
        tensors = load_file(path)
        ids, hidden = (tensors[name].split(tensors[f"{name}_lengths"].tolist()) for name in ("ids", "hidden"))
        return [(ids_A.tolist(), hidden_ND) for ids_A, hidden_ND in zip(ids, hidden, strict=True)]

    def put(
        self, prompts: Sequence[Encoded], max_new_tokens: int, states: States, given: Sequence[Given]
    ) -> None:
        tensors = {
            "ids_lengths": torch.tensor([len(ids) for ids, _ in given]),
            "ids": torch.tensor([token for ids, _ in given for token in ids], dtype=torch.int64),
            "hidden_lengths": torch.tensor([len(hidden_ND) for _, hidden_ND in given]),
            "hidden": torch.cat([hidden_ND for _, hidden_ND in given]),
        }
        path = self._path(prompts, max_new_tokens, states)
        durable.place(path, lambda aside: save_file(tensors, aside))

    def _path(self, prompts: Sequence[Encoded], max_new_tokens: int, states: States) -> Path:
        asked = [max_new_tokens, states, [prompt.ids for prompt in prompts]]
        return self.folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.safetensors"
