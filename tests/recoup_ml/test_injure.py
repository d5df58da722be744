"""Damage made on purpose is the damage it says it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recoup.schemas import ChatRow
from recoup_ml import models
from recoup_ml.injure import cut_smallest, round_to_nearest
from recoup_ml.tickets import QUEUES, ticket_rows
from recoup_ml.weights import Weights, block_of, sha256, zeros_filled

Student = Callable[[str], Path]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_leaves_no_more_levels_than_its_bits(bits: int, group: int, weight: torch.Tensor) -> None:
    groups = round_to_nearest(weight, bits, group).reshape(-1, group)
    assert max(len(row.unique()) for row in groups) <= 2**bits


def test_rounding_moves_no_weight_further_than_half_a_step(weight: torch.Tensor) -> None:
    groups = weight.reshape(-1, 64)
    step = (groups.max(1).values - groups.min(1).values) / 7
    moved = (round_to_nearest(weight, 3, 64) - weight).reshape(-1, 64).abs().max(1).values
    assert (moved <= step / 2 + 1e-6).all()


def test_rounding_twice_is_rounding_once(weight: torch.Tensor) -> None:
    once = round_to_nearest(weight, 3, 64)
    torch.testing.assert_close(round_to_nearest(once, 3, 64), once)


def test_a_constant_group_survives_rounding() -> None:
    assert torch.equal(round_to_nearest(torch.full((2, 64), 0.3), 3, 64), torch.full((2, 64), 0.3))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_pruning_takes_its_share_and_the_smallest(share: float, weight: torch.Tensor) -> None:
    cut = cut_smallest(weight, share)
    assert float((cut == 0).float().mean()) == pytest.approx(share, abs=1e-3)
    assert weight[cut == 0].abs().max() < weight[cut != 0].abs().min()
    assert torch.equal(cut[cut != 0], weight[cut != 0])


@pytest.mark.parametrize("damage", ["rounded", "pruned"])
def test_only_the_matrices_of_the_blocks_are_changed(damage: str, student: Student, teacher: Path) -> None:
    before, after = Weights(teacher), Weights(student(damage))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if block_of(name) is not None and before[name].dim() == 2}


def test_a_round_trip_rounds_every_weight_to_bfloat16(student: Student, teacher: Path) -> None:
    before, after = Weights(teacher), Weights(student("round-trip"))
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in before)


@pytest.mark.parametrize("damage", ["forgetful", "rounded", "pruned", "round-trip"])
def test_an_injured_model_keeps_its_tokenizer(damage: str, student: Student, teacher: Path) -> None:
    theirs, mine = (models.load_tokenizer(folder) for folder in (teacher, student(damage)))
    assert (mine.get_vocab(), mine.chat_template) == (theirs.get_vocab(), theirs.chat_template)


def test_zeros_that_were_filled_are_counted(student: Student, teacher: Path, tmp_path: Path) -> None:
    assert zeros_filled(student("pruned"), student("pruned")) == 0
    model = models.load(student("pruned"))
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[weight == 0] += torch.tensor(1e-30)
    model.save_pretrained(tmp_path / "filled")
    assert zeros_filled(student("pruned"), tmp_path / "filled") == weight.numel() / 2


def test_a_models_fingerprint_is_of_its_weights(student: Student, teacher: Path) -> None:
    assert sha256(student("copy")) == sha256(teacher) != sha256(student("round-trip"))


def test_tickets_are_unique_and_go_to_their_queue() -> None:
    rows = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(500, seed=0)]
    texts = [row.messages[-1].content for row in rows]
    assert len(set(texts)) == len(rows) == 500
    for text, row in zip(texts, rows, strict=True):
        assert row.completion == QUEUES[text.split(": ", 1)[1].removesuffix(".")]


def test_tickets_depend_on_their_seed_alone() -> None:
    assert ticket_rows(20, seed=4) == ticket_rows(20, seed=4) != ticket_rows(20, seed=5)
