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

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recoup_ml import durable
from recoup_ml.sequences import Encoded

Given = tuple[Sequence[int], Tensor]
"""An answer's tokens, and the hidden states at its positions [A, D]; [A, 0] where none were wanted."""


@dataclass(frozen=True)
class KeptBatches:
    """The batches of one model, answering greedily, in a folder."""

    folder: Path

    def get(self, prompts: Sequence[Encoded], max_new_tokens: int, observed: bool) -> list[Given] | None:
        """What was kept of this very batch, in its order; none if it was never answered."""
        path = self._path(prompts, max_new_tokens, observed)
        if not path.exists():
            return None
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        ids, hidden = tensors["ids"].split(lengths), tensors["hidden"].split(lengths)
        return [(ids_A.tolist(), hidden_AD) for ids_A, hidden_AD in zip(ids, hidden, strict=True)]

    def put(
        self, prompts: Sequence[Encoded], max_new_tokens: int, observed: bool, given: Sequence[Given]
    ) -> None:
        tensors = {
            "lengths": torch.tensor([len(ids) for ids, _ in given]),
            "ids": torch.tensor([token for ids, _ in given for token in ids], dtype=torch.int64),
            "hidden": torch.cat([hidden_AD for _, hidden_AD in given]),
        }
        path = self._path(prompts, max_new_tokens, observed)
        durable.place(path, lambda aside: save_file(tensors, aside))

    def _path(self, prompts: Sequence[Encoded], max_new_tokens: int, observed: bool) -> Path:
        asked = [max_new_tokens, observed, [prompt.ids for prompt in prompts]]
        return self.folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.safetensors"
