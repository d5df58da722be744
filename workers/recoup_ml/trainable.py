"""What of a student trains: an adapter, all weights, or norms alone; and what must stay zero.

A pruned student's zeros are part of what it is: they make it small or fast. Full fine-tuning
holds them by masking gradients and weights. A plain adapter, ΔW = B A (LoRA, arXiv 2106.09685),
would fill them when it is merged, so a masked one is trained instead, ΔW = M ⊙ (B A): the
zeros of the merged matrix are, bit for bit, those of the student.

Weights in half precision are not trained as they are: bfloat16 would round nearly every step of 1e-5 away.
The optimizer has a float32 master of each, to which gradients are added as soon as they are there; the
model holds the masters rounded.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recoup.schemas.request import MOST_RANK
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.fused_adapter import fuse
from recoup_ml.hidden import decoder_blocks
from recoup_ml.models import HALVES
from recoup_ml.plan import Trainable


@dataclass
class Trainee:
    """The student with what trains of it."""

    model: PreTrainedModel
    """The student itself; layers of an adapter stand inside it."""
    kind: str
    """As the report names it."""
    peft: PeftModel | None = None
    masks: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """Matrices of a pruned student, and where they are zero and stay so."""

    def __post_init__(self) -> None:
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self._rounded = {name: weight for name, weight in trained.items() if weight.dtype in HALVES}
        masters = {name: _master(weight) for name, weight in self._rounded.items()}
        self.named: dict[str, nn.Parameter] = trained | masters
        """What the optimizer trains, by its name in the model."""
        places = {id(weight): name for name, weight in trained.items()}
        self.masks = [
            (self.named[places[id(weight)]] if id(weight) in places else weight, mask)
            for weight, mask in self.masks
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.named.values()]

    @property
    def masked_weights(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.masks)

    def save(self, folder: Path) -> None:
        """Writes an adapter, or a whole model with its masked adapters merged."""
        if self.peft:
            self.peft.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, state_dict=_merged(self.model))

    def mask_gradients(self) -> None:
        for weight, mask in self.masks:
            if weight.grad is not None:
                weight.grad.masked_fill_(mask, 0.0)

    @torch.no_grad()
    def settle(self) -> None:
        """Puts back the zeros that momentum may have moved, and what was learnt into the model."""
        for weight, mask in self.masks:
            weight.masked_fill_(mask, 0.0)
        for name, weight in self._rounded.items():
            weight.copy_(self.named[name])


def prepare(
    student: PreTrainedModel,
    plan: Trainable,
    distance_by_layer: Sequence[float],
    seed: int = 0,
    adapter: PeftModel | None = None,
) -> Trainee:
    """Makes the parts of `student` trainable that `plan` names, and freezes the rest.

    Args:
        distance_by_layer: how far each decoder layer is from the teacher's, for `plan.by_damage`.
        seed: of torch's generator, from which adapters begin.
        adapter: one that stands inside the student already and is trained on.
    """
    torch.manual_seed(seed)
    if adapter:
        return Trainee(student, "lora", fuse(adapter))
    if plan.mode == "full":
        return _full(student, plan.keep_zeros)
    student.requires_grad_(False)
    if plan.mode == "norms":
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.dim() == 1 and parameter.is_floating_point())
        return Trainee(student, "norms")
    if plan.keep_zeros:
        return _masked_lora(student, plan)
    adapter = get_peft_model(
        student,
        _config(student, plan, distance_by_layer),
        autocast_adapter_dtype=plan.mode == "dora",  # which divides by norms; others have float32 masters
    )
    return Trainee(student, plan.mode, fuse(adapter))


def ranks(rank: int, distance_by_layer: Sequence[float]) -> list[int]:
    """A rank for each layer, proportional to its distance; the same sum as `rank` everywhere, or nearly.

    No layer gets less than a quarter of `rank`, nor more than can be served; where no distance is known all
    get `rank`.
    """
    total = math.fsum(distance_by_layer)
    if total <= 0:
        return [rank] * len(distance_by_layer)
    least = rank / 4
    spare = (rank - least) * len(distance_by_layer)
    shares = (least + spare * distance / total for distance in distance_by_layer)
    return [min(MOST_RANK, max(1, round(share))) for share in shares]


class MaskedLowRank(nn.Module):
    """W ↦ W + M ⊙ (B A) α/r: the update of a weight [out, in] that leaves its zeros alone."""

    def __init__(self, weight: Tensor, rank: int, alpha: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.register_buffer("kept", weight.detach() != 0)
        self.down = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.kept * (self.up @ self.down * self.scale).to(weight.dtype)


def _master(weight: nn.Parameter) -> nn.Parameter:
    """A float32 copy that takes over every gradient of `weight`, and adds them up."""
    master = nn.Parameter(weight.detach().float())

    def take(_weight: Tensor) -> None:
        if weight.grad is not None:
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None

    weight.register_post_accumulate_grad_hook(take)
    return master


def _full(student: PreTrainedModel, keep_zeros: bool) -> Trainee:
    student.requires_grad_(True)
    if not keep_zeros:
        return Trainee(student, "full")
    matrices = [weight for weight in decoder_blocks(student).parameters() if weight.dim() >= 2]
    return Trainee(student, "masked full", masks=[(weight, weight.detach() == 0) for weight in matrices])


def _masked_lora(student: PreTrainedModel, plan: Trainable) -> Trainee:
    chosen = [
        linear
        for name, linear in decoder_blocks(student).named_modules()
        if isinstance(linear, nn.Linear)
        and (plan.targets == "all-linear" or name.rpartition(".")[2] in plan.targets)
    ]
    if not chosen:
        raise UnsupportedRequest(
            f"training.lora.targets {plan.targets} names no linear layer of the student."
        )
    for linear in chosen:
        masked = MaskedLowRank(linear.weight, plan.rank, plan.alpha)
        parametrize.register_parametrization(linear, "weight", masked)
    masks = [
        (linear.parametrizations.weight.original, linear.parametrizations.weight[0].kept.logical_not())
        for linear in chosen
    ]
    return Trainee(student, "masked lora", masks=masks)


def _merged(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors by their ordinary names, parametrised weights as they act."""
    with torch.no_grad():
        acting = {
            f"{name}.weight": module.weight.detach()
            for name, module in model.named_modules()
            if parametrize.is_parametrized(module, "weight")
        }
    plain = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    return plain | acting


def _config(student: PreTrainedModel, plan: Trainable, distance_by_layer: Sequence[float]) -> LoraConfig:
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=plan.targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=plan.mode == "dora",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in student.modules()),
    )
    if plan.by_damage:
        places = {module: name for name, module in student.named_modules()}
        for block, rank in zip(decoder_blocks(student), ranks(plan.rank, distance_by_layer), strict=True):
            pattern = re.escape(places[block]) + r"\..*"
            config.rank_pattern[pattern] = rank
            config.alpha_pattern[pattern] = round(plan.alpha * rank / plan.rank)
    return config
