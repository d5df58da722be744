"""Makes healthy models worse on purpose, for the demonstration, the tests and the benchmark grid.

Nothing of the product uses this. Each function takes the healthy model's folder and writes
a damaged copy: a narrow skill learnt until general ability drops, weights rounded or packed
into few bits, weights set to zero, channels or whole layers cut out.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from recoup.schemas import ChatRow
from recoup_ml import models
from recoup_ml.calibration import Norms, block_influence, calibration_ids, change_blocks
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
        chosen = range(step * TICKETS, (step + 1) * TICKETS)
        batch = collate(rows, chosen, models.pad_id(tokenizer)).to(model.device)
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


def pack_nf4(teacher: Path, student: Path) -> None:
    """Packs every block matrix into NF4 with doubly quantized scales, as QLoRA does (arXiv 2305.14314).

    What is written is a checkpoint of bitsandbytes: two weights a byte, scales beside them, and the
    method in `config.json`.
    """
    model = AutoModelForCausalLM.from_pretrained(
        teacher,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        local_files_only=True,
    )
    _save(model, teacher, student)


def round_trip(teacher: Path, student: Path) -> None:
    """The teacher through bfloat16 and back: no damage at all."""
    model = models.load(teacher)
    models.round_to_bfloat16(model)
    _save(model, teacher, student)


def prune(teacher: Path, student: Path, share: float = 0.5) -> None:
    """Sets the smallest `share` of every block matrix to zero, by magnitude."""
    _change_matrices(teacher, student, lambda weight: cut_smallest(weight, share))


def wanda(
    teacher: Path,
    student: Path,
    share: float = 0.5,
    pattern: Literal["unstructured", "2:4"] = "unstructured",
    texts: Sequence[str] | None = None,
) -> None:
    """Sets the block weights of least |W_ij|·‖X_j‖₂ to zero (Wanda, arXiv 2306.11695).

    Scores are compared within each output row, or within every four neighbours of a row (`2:4`,
    half of the weights whatever `share` says), block after block as in the paper.
    """

    def cut(_block: nn.Module, norms: Norms) -> None:
        for linear, norm_I in norms.items():
            score = linear.weight.abs() * norm_I
            linear.weight.mul_(
                _largest_two_of_four(score) if pattern == "2:4" else _largest_of_row(score, share)
            )

    _change_blocks(teacher, student, cut, texts)


def cut_channels(
    teacher: Path, student: Path, share: float = 0.10, texts: Sequence[str] | None = None
) -> None:
    """Takes the least important `share` of the MLP's inner channels out of every block.

    A channel j matters as much as ‖W_down[:, j]‖₂·‖X_j‖₂, a bound of what it adds to the residual
    stream. Every block keeps the same even number of channels, so the result is an ordinary narrower
    model. For models with gated MLPs (Llama and its kin).
    """
    config = models.load_config(teacher)
    kept = round((1 - share) * config.intermediate_size / 2) * 2

    def cut(block: nn.Module, norms: Norms) -> None:
        mlp = block.mlp
        importance_I = mlp.down_proj.weight.norm(dim=0) * norms[mlp.down_proj]
        chosen = importance_I.topk(kept).indices.sort().values
        for linear in (mlp.gate_proj, mlp.up_proj):
            _keep_outputs(linear, chosen)
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, chosen])

    _change_blocks(teacher, student, cut, texts, intermediate_size=kept)


def drop_layers(teacher: Path, student: Path, count: int, texts: Sequence[str] | None = None) -> None:
    """Removes the `count` decoder blocks of least influence, never the first or the last (ShortGPT)."""
    model = models.load(teacher)
    influence = block_influence(model, calibration_ids(models.load_tokenizer(teacher), texts))
    dropped = sorted(range(1, len(influence) - 1), key=influence.__getitem__)[:count]
    keep_blocks(model, [block for block in range(len(influence)) if block not in dropped])
    _save(model, teacher, student)


def keep_blocks(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leaves only these decoder blocks; to be saved and loaded anew before it generates."""
    blocks, config = decoder_blocks(model), model.config.get_text_config()
    for block in reversed(range(len(blocks))):
        if block not in kept:
            del blocks[block]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[block] for block in kept]
    config.num_hidden_layers = len(kept)


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Asymmetric min-max rounding: 2^bits levels from each group's least to its greatest weight."""
    groups = weight.reshape(-1, group)
    least, greatest = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
    step = ((greatest - least) / (2**bits - 1)).clamp_min(1e-12)
    return (((groups - least) / step).round() * step + least).reshape(weight.shape)


def cut_smallest(weight: Tensor, share: float) -> Tensor:
    threshold = weight.abs().flatten().kthvalue(int(share * weight.numel())).values
    return weight * (weight.abs() > threshold)


def _largest_of_row(score: Tensor, share: float) -> Tensor:
    """1 on all but the smallest `share` of each row, 0 there."""
    cut = score.argsort(dim=1)[:, : int(share * score.shape[1])]
    return torch.ones_like(score).scatter_(1, cut, 0.0)


def _largest_two_of_four(score: Tensor) -> Tensor:
    """1 on the larger two of every four neighbours in a row, 0 on the others."""
    fours = score.reshape(-1, 4)
    return torch.zeros_like(fours).scatter_(1, fours.topk(2, dim=1).indices, 1.0).reshape(score.shape)


def _keep_outputs(linear: nn.Linear, chosen: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight[chosen])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[chosen])


def _change_matrices(teacher: Path, student: Path, change: Callable[[Tensor], Tensor]) -> None:
    model = models.load(teacher)
    with torch.no_grad():
        for module in decoder_blocks(model).modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(change(module.weight.float()))
    _save(model, teacher, student)


def _change_blocks(
    teacher: Path,
    student: Path,
    change: Callable[[nn.Module, Norms], None],
    texts: Sequence[str] | None,
    **config: int,
) -> None:
    """Saves the teacher with `change` made to every block on calibration text, and `config` put in."""
    model = models.load(teacher)
    change_blocks(model, calibration_ids(models.load_tokenizer(teacher), texts), change)
    model.config.update(config)
    _save(model, teacher, student)


def _save(model: PreTrainedModel, teacher: Path, student: Path) -> None:
    model.save_pretrained(student)
    for path in teacher.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(path, student / path.name)
