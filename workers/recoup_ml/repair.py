"""Training-free repairs: what can be won back from the weights and a few teacher's answers alone.

They are methods of their own, the baselines that training must beat, and what training may start
from. Which of them apply is a matter of the damage; how each works is in `update.py` (fine-tuning),
`low_rank.py` (quantization) and `reconstruct.py` (pruning).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from recoup.schemas import DamageReport
from recoup_ml import low_rank, models, reconstruct, update
from recoup_ml.free_text import free_texts
from recoup_ml.low_rank import Patch
from recoup_ml.sequences import Answered
from recoup_ml.stream import calibration
from recoup_ml.twins import Twins

Name = Literal["interpolate", "spectral", "restore_layers", "low_rank_patch", "reconstruct"]
Fit = dict[str, Tensor]
"""What was found on texts, by names in the model."""
FITTED: frozenset[Name] = frozenset({"low_rank_patch", "reconstruct"})
"""The repairs that look at texts, which takes its time."""
FREE_TEXTS, FREE_TOKENS = 32, 255
"""Of the teacher's own, beside its answers, for a reconstruction: answers alone make it worse at all else."""


@dataclass(frozen=True)
class Repair:
    name: Name
    strength: float
    """`interpolate`: the student's share α; `spectral`: a multiple of the threshold; `restore_layers`: the
    share of blocks; `low_rank_patch`: the rank; `reconstruct`: the ridge."""

    @property
    def label(self) -> str:
        words = {
            "interpolate": f"interpolation, α = {self.strength:g}",
            "spectral": f"spectral threshold × {self.strength:g}",
            "restore_layers": f"{self.strength:.0%} of the layers restored",
            "low_rank_patch": f"low-rank patch, rank {self.strength:g}",
            "reconstruct": "block-wise reconstruction",
        }
        return words[self.name]


def candidates(kind: str) -> list[Repair]:
    """What is worth trying for this kind of damage."""
    match kind:
        case "quantization":
            return [Repair("low_rank_patch", 16)]
        case "pruning":
            return [Repair("reconstruct", 0.5)]
        case _:
            return [
                *(Repair("interpolate", share) for share in (0.25, 0.5, 0.75)),
                Repair("spectral", 1.0),
                *(Repair("restore_layers", share) for share in (0.1, 0.3)),
            ]


def fit(
    repair: Repair,
    student: PreTrainedModel,
    teacher: Path,
    damage: DamageReport,
    texts: Sequence[Answered],
    pad_id: int,
) -> Fit:
    """What a repair that looks at texts finds: new weights, or the factors of a patch. Others find nothing.

    `texts` are teacher's answers that no test knows. The loaded student may be changed on the way.

    Raises:
        UnsupportedModel: the model's matrices cannot be changed so.
    """
    twins = Twins(teacher, damage.layer_map)
    match repair.name:
        case "low_rank_patch":
            patches = low_rank.low_rank_patches(
                student, twins, calibration(texts, pad_id, student), int(repair.strength)
            )
            return {
                f"{name}.{factor}": tensor
                for name, patch in patches.items()
                for factor, tensor in patch._asdict().items()
            }
        case "reconstruct":
            healthy = models.load(teacher)
            free = free_texts(healthy, models.load_tokenizer(teacher), FREE_TEXTS, FREE_TOKENS)
            seen = [batch for part in (texts, free) for batch in calibration(part, pad_id, student, healthy)]
            return reconstruct.reconstruct(student, healthy, twins, seen, repair.strength)
        case _:
            return {}


@torch.no_grad()
def apply(repair: Repair, student: PreTrainedModel, teacher: Path, damage: DamageReport, found: Fit) -> None:
    """Repairs the loaded student in place, with what `fit` found."""
    twins = Twins(teacher, damage.layer_map)
    match repair.name:
        case "interpolate":
            update.interpolate(student, twins, repair.strength)
        case "spectral":
            update.keep_signal(student, twins, repair.strength)
        case "restore_layers":
            update.restore_blocks(student, twins, damage.distance_by_layer, repair.strength)
        case "low_rank_patch" if models.is_quantized(student):
            as_adapter(student, found)
        case "low_rank_patch":
            low_rank.add(student, _patches(found))
        case "reconstruct":
            for name, weight in found.items():
                student.get_parameter(name).copy_(weight)


def as_adapter(student: PreTrainedModel, found: Fit) -> PeftModel:
    """A low-rank patch as an adapter inside the student, whose own weights stay as they are."""
    return low_rank.as_adapter(student, _patches(found))


def _patches(found: Fit) -> dict[str, Patch]:
    names = dict.fromkeys(name.rpartition(".")[0] for name in found)
    return {name: Patch(*(found[f"{name}.{factor}"] for factor in Patch._fields)) for name in names}
