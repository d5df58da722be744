"""What trains of a student, where ranks go, and that zeros stay zero, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from recoup.schemas.request import MOST_RANK
from recoup_ml import injure, models
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.plan import Trainable
from recoup_ml.trainable import MaskedLowRank, Trainee, prepare, ranks
from recoup_ml.weights import Weights, block_of

Student = Callable[[str], Path]
LORA = Trainable(mode="lora", keep_zeros=False, rank=8, alpha=16, targets="all-linear", by_damage=False)
FLAT = [1.0] * 4


def step(trainee: Trainee, rate: float = 1e-2, steps: int = 3) -> None:
    """A few optimizer steps on nothing in particular."""
    optimizer = torch.optim.AdamW(trainee.parameters, lr=rate)
    ids = torch.arange(3, 27).reshape(2, 12)
    for _ in range(steps):
        trainee.model(input_ids=ids, labels=ids).loss.backward()
        trainee.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.settle()


@pytest.mark.parametrize("damage", ["pruned", "pruned-2:4"])
@pytest.mark.parametrize("mode", ["full", "lora", "norms"])
def test_whatever_trains_the_saved_zeros_are_the_students(
    damage: str, mode: str, student: Student, tmp_path: Path
) -> None:
    trainee = prepare(models.load(student(damage)), replace(LORA, mode=mode, keep_zeros=True), FLAT)
    step(trainee)
    trainee.save(tmp_path)
    before, after = Weights(student(damage)), Weights(tmp_path)
    assert set(before) == set(after)
    changed = 0
    for name in before:
        changed += int((before[name] != after[name]).sum())
        if block_of(name) is not None and before[name].dim() == 2:
            assert torch.equal(after[name] == 0, before[name] == 0)
            zeros = after[name][after[name] == 0]
            assert mode == "norms" or not torch.signbit(zeros).any()
    assert changed > 0


def test_a_masked_adapter_is_merged_as_it_acted(student: Student, tmp_path: Path) -> None:
    trainee = prepare(models.load(student("pruned")), replace(LORA, keep_zeros=True), FLAT)
    step(trainee)
    trainee.save(tmp_path)
    ids = torch.arange(3, 27).reshape(2, 12)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(
            saved(input_ids=ids).logits, trainee.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
        )
    assert trainee.kind == "masked lora"
    assert trainee.masked_weights > 1000


def test_a_masked_adapter_begins_as_nothing(student: Student) -> None:
    weight = torch.randn(6, 4) * (torch.rand(6, 4) > 0.5)
    assert torch.equal(MaskedLowRank(weight, 2, 4)(weight), weight)


def test_a_masked_adapter_goes_where_it_was_told(student: Student) -> None:
    chosen = replace(LORA, keep_zeros=True, targets=["q_proj"])
    trainee = prepare(models.load(student("pruned")), chosen, FLAT)
    trained = {name for name, parameter in trainee.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 4
    assert all(".q_proj." in name for name in trained)
    with pytest.raises(UnsupportedRequest, match="names no linear layer"):
        prepare(models.load(student("pruned")), replace(chosen, targets=["nowhere"]), FLAT)


def test_norms_train_alone(student: Student) -> None:
    trainee = prepare(models.load(student("finetuned")), replace(LORA, mode="norms"), FLAT)
    names = {name for name, parameter in trainee.model.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 4 + 1
    assert all("norm" in name for name in names)


def test_dora_is_an_adapter_of_its_own_kind(student: Student, tmp_path: Path) -> None:
    trainee = prepare(models.load(student("finetuned")), replace(LORA, mode="dora"), FLAT)
    step(trainee)
    trainee.save(tmp_path)
    assert any("magnitude" in name for name in Weights(tmp_path))
    assert (
        PeftModel.from_pretrained(models.load(student("finetuned")), tmp_path).peft_config["default"].use_dora
    )


@pytest.mark.parametrize("mode", ["full", "norms"])
@pytest.mark.parametrize("damage", ["finetuned", "pruned"])
def test_small_steps_in_half_precision_add_up(
    damage: str, mode: str, student: Student, tmp_path: Path
) -> None:
    """Steps far below a weight's rounding, which training in bfloat16 itself would lose one by one."""
    model = models.load(student(damage)).bfloat16()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainee = prepare(model, replace(LORA, mode=mode, keep_zeros=damage == "pruned"), FLAT)
    step(trainee, rate=1e-5, steps=20)
    moved = {
        name: (weight.detach() - before[name].float()).abs().max() for name, weight in trainee.named.items()
    }
    assert all(1e-4 < float(most) < 3e-4 for most in moved.values())
    for name, weight in model.named_parameters():
        expected = trainee.named.get(name, before[name])
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected.bfloat16())
        assert weight.grad is None
    trainee.save(tmp_path)
    saved = Weights(tmp_path)
    assert all(saved[name].dtype == torch.bfloat16 for name in saved)
    assert damage != "pruned" or all(
        torch.equal(saved[name] == 0, before[name] == 0)
        for name in saved
        if block_of(name) is not None and saved[name].dim() == 2
    )


def test_gradients_of_many_pieces_are_added_up_in_float32(student: Student) -> None:
    trainee = prepare(models.load(student("finetuned")).bfloat16(), replace(LORA, mode="full"), FLAT)
    ids = torch.arange(3, 27).reshape(2, 12)
    once, often = [], []
    for times, found in ((1, once), (300, often)):
        for _ in range(times):
            trainee.model(input_ids=ids, labels=ids).loss.backward()
        found += [weight.grad for weight in trainee.parameters]
        for weight in trainee.parameters:
            weight.grad = None
    for one, many in zip(once, often, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(many, 300 * one, rtol=1e-4, atol=1e-6)


def test_ranks_follow_the_damage_and_cost_the_same() -> None:
    given = ranks(16, [0.0, 1.0, 1.0, 2.0])
    assert given == [4, 16, 16, 28]
    assert sum(given) == 4 * 16
    assert ranks(16, [0.0] * 3) == [16] * 3
    assert min(ranks(1, [0.0, 5.0])) == 1
    assert max(ranks(256, [9.0, *[0.1] * 29])) == MOST_RANK


def test_a_layer_gets_the_rank_of_its_damage(student: Student) -> None:
    trainee = prepare(models.load(student("finetuned")), replace(LORA, by_damage=True), [0.0, 1.0, 1.0, 2.0])
    found = {
        block_of(name): min(parameter.shape)
        for name, parameter in trainee.model.named_parameters()
        if "q_proj.lora_A" in name
    }
    assert found == dict(enumerate(ranks(8, [0.0, 1.0, 1.0, 2.0])))


def test_a_family_whose_matrices_are_no_linear_layers_keeps_its_zeros_too(tmp_path: Path) -> None:
    """GPT-2's matrices are `Conv1D`; those of a mixture of experts are bare three-dimensional parameters."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if block_of(name) is not None and weight.dim() == 2:
                weight.copy_(injure.cut_smallest(weight, 0.5))
    trainee = prepare(model, replace(LORA, mode="full", keep_zeros=True), [1.0, 1.0])
    assert sum(int((~mask).sum()) for _, mask in trainee.masks) > 10_000
