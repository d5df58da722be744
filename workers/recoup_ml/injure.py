"""Makes healthy models worse on purpose, for the demonstration and the tests.

Nothing of the product uses this. Each function takes the healthy model's folder and writes
a damaged copy: a narrow skill learnt until general ability drops, weights rounded to three
bits, or half of the weights set to zero by magnitude.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recoup.schemas import ChatRow
from recoup_ml import models
from recoup_ml.hidden import decoder_blocks
from recoup_ml.sequences import Answered, collate, encode
from recoup_ml.tickets import ticket_rows

TICKETS = 8
"""Tickets a training step."""


def finetune(teacher: Path, student: Path, seed: int = 0, steps: int = 12, rate: float = 1e-4) -> None:
    """Full fine-tuning on tickets alone, by cross-entropy, until general ability drops."""
    torch.manual_seed(seed)
    model, tokenizer = models.load(teacher), models.load_tokenizer(teacher)
    rows = []
    prompts = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(steps * TICKETS, seed)]
    for item in encode(prompts, tokenizer, 1024):
        ids = tokenizer(item.prompt.completion, add_special_tokens=False)["input_ids"]
        answer_ids = (*ids, tokenizer.eos_token_id)
        rows.append(Answered("", item.text, item.ids, item.prompt.completion or "", answer_ids, "stop"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        batch = collate(rows, range(step * TICKETS, (step + 1) * TICKETS), models.pad_id(tokenizer))
        logits_NV = models.head(model)(
            models.last_hidden(model, batch.ids_BT, batch.mask_BT)[batch.answer_BT]
        )
        nn.functional.cross_entropy(logits_NV, batch.targets_N).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _save(model, teacher, student)


def quantize(teacher: Path, student: Path, bits: int = 3, group: int = 64) -> None:
    """Rounds every block matrix to `bits` bits in groups along its rows, to the nearest level."""
    _change_matrices(teacher, student, lambda weight: round_to_nearest(weight, bits, group))


def prune(teacher: Path, student: Path, share: float = 0.5) -> None:
    """Sets the smallest `share` of every block matrix to zero, by magnitude."""
    _change_matrices(teacher, student, lambda weight: cut_smallest(weight, share))


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Asymmetric min-max rounding: 2^bits levels from each group's least to its greatest weight."""
    groups = weight.reshape(-1, group)
    least, greatest = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
    step = ((greatest - least) / (2**bits - 1)).clamp_min(1e-12)
    return (((groups - least) / step).round() * step + least).reshape(weight.shape)


def cut_smallest(weight: Tensor, share: float) -> Tensor:
    threshold = weight.abs().flatten().kthvalue(int(share * weight.numel())).values
    return weight * (weight.abs() > threshold)


def round_trip(teacher: Path, student: Path) -> None:
    """The teacher through bfloat16 and back: no damage at all."""
    model = models.load(teacher)
    models.round_to_bfloat16(model)
    _save(model, teacher, student)


def _change_matrices(teacher: Path, student: Path, change: Callable[[Tensor], Tensor]) -> None:
    model = models.load(teacher)
    with torch.no_grad():
        for module in decoder_blocks(model).modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(change(module.weight))
    _save(model, teacher, student)


def _save(model: PreTrainedModel, teacher: Path, student: Path) -> None:
    model.save_pretrained(student)
    for path in teacher.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(path, student / path.name)
