"""One pass of a model over answered prompts, keeping what every measure needs and no more.

Kept are the last hidden states at answer positions (from which a head makes logits again)
and, where positions are named, the residual stream at those. The same pass therefore serves
divergence, agreement, perplexity and alignment.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from recoup_ml.alignment import Positions
from recoup_ml.hidden import Capture, capture
from recoup_ml.layout import laid_out
from recoup_ml.models import Head, head, last_hidden
from recoup_ml.sequences import Answered, Batch

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Observation:
    hidden: list[Tensor]
    """For each sequence, in order: last hidden states at its answer positions, [A, D]."""
    head: Head
    states: list[Tensor]
    """For each layer: the residual stream at the chosen positions, [N, D]; empty if none were named."""

    def save(self, path: Path) -> None:
        """Writes hidden states and head; the residual stream is saved by `save_states`."""
        tensors = {"hidden": torch.cat(self.hidden), "head": self.head.weight_VD}
        if self.head.bias_V is not None:
            tensors["bias"] = self.head.bias_V
        lengths = ",".join(str(len(part)) for part in self.hidden)
        metadata = {
            "lengths": lengths,
            "softcap": repr(self.head.softcap or 0.0),
            "scale": repr(self.head.scale),
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)

    @staticmethod
    def load(path: Path) -> "Observation":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        lengths = [int(length) for length in metadata["lengths"].split(",")]
        softcap, scale = float(metadata["softcap"]) or None, float(metadata["scale"])
        own_head = Head(tensors["head"], tensors.get("bias"), softcap, scale)
        return Observation(list(tensors["hidden"].split(lengths)), own_head, [])


def save_states(path: Path, states: Sequence[Tensor]) -> None:
    save_file({f"{layer:04d}": state.contiguous() for layer, state in enumerate(states)}, path)


def load_states(path: Path) -> list[Tensor]:
    states = load_file(path)
    return [states[name] for name in sorted(states)]


@torch.inference_mode()
def observe(
    model: PreTrainedModel,
    sequences: Sequence[Answered],
    pad_id: int,
    positions: Positions | None = None,
    tick: Callable[[int], None] = lambda _done: None,
) -> Observation:
    """Runs `model` over `sequences`; `tick` is told how many sequences are done."""
    hidden: dict[int, Tensor] = {}
    with capture(model) if positions else nullcontext() as seen:
        for batch in laid_out(sequences, pad_id, BATCH_TOKENS, model):
            there = batch.to(model.device)
            if seen and positions:
                seen.positions_BT = _chosen(there, sequences, positions)
            last_BTD = last_hidden(model, there.ids_BT, there.mask_BT, there.places_BT, there.sees_BTT)
            last_ND = last_BTD[there.answer_BT].cpu()
            sizes = [len(sequences[row].answer_ids) for row in batch.rows]
            hidden |= dict(zip(batch.rows, last_ND.split(sizes), strict=True))
            tick(len(hidden))
    states = _in_order(seen, list(hidden), positions) if seen and positions else []
    return Observation([hidden[row] for row in range(len(sequences))], head(model).detached(), states)


def _chosen(batch: Batch, sequences: Sequence[Answered], positions: Positions) -> Tensor:
    chosen_N = torch.zeros(len(batch.targets_N), dtype=torch.bool, device=batch.answer_BT.device)
    first = 0
    for row in batch.rows:
        chosen_N[[first + position for position in positions.chosen[row]]] = True
        first += len(sequences[row].answer_ids)
    return torch.zeros_like(batch.answer_BT).masked_scatter_(batch.answer_BT, chosen_N)


def _in_order(seen: Capture, rows: Sequence[int], positions: Positions) -> list[Tensor]:
    """The captured states, read batch by batch, put back into the order of the sequences."""
    sizes = [len(positions.chosen[row]) for row in rows]
    ordered = []
    for state in seen.states():
        parts = dict(zip(rows, state.split(sizes), strict=True))
        ordered.append(torch.cat([parts[row] for row in sorted(parts)]))
    return ordered
