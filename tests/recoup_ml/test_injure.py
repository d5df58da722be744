"""Damage made on purpose is the damage it says it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from recoup.schemas import ChatRow
from recoup_ml import injure, models
from recoup_ml.calibration import Norms, block_influence, calibration_ids, change_blocks
from recoup_ml.injure import cut_smallest, round_to_nearest
from recoup_ml.tickets import QUEUES, ticket_rows
from recoup_ml.weights import Weights, block_of, sha256, zeros_filled

Student = Callable[[str], Path]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calibration(tokenizer: PreTrainedTokenizerFast, natural_text: list[str]) -> torch.Tensor:
    return calibration_ids(tokenizer, natural_text)


def norms_by_name(
    model: PreTrainedModel, ids_BT: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each linear layer of the blocks: its weight, and the norms of its inputs."""
    norms: Norms = {}
    change_blocks(model, ids_BT, lambda _block, of_block: norms.update(of_block))
    return {
        name: (module.weight.detach(), norms[module])
        for name, module in model.named_modules()
        if module in norms
    }


def save(model: PreTrainedModel, teacher: Path, folder: Path) -> None:
    model.save_pretrained(folder)
    models.load_tokenizer(teacher).save_pretrained(folder)


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


@pytest.mark.parametrize("damage", ["rounded", "pruned", "wanda", "wanda-24"])
def test_only_the_matrices_of_the_blocks_are_changed(damage: str, student: Student, teacher: Path) -> None:
    before, after = Weights(teacher), Weights(student(damage))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if block_of(name) is not None and before[name].dim() == 2}


@pytest.mark.parametrize("damage", ["wanda", "wanda-24"])
def test_wanda_takes_half_of_every_row_and_leaves_the_rest(
    damage: str, student: Student, teacher: Path
) -> None:
    before, after = Weights(teacher), Weights(student(damage))
    for name in after:
        if block_of(name) is not None and (weight := after[name]).dim() == 2:
            groups = weight.reshape(-1, 4) if damage == "wanda-24" else weight
            assert ((groups == 0).sum(1) == groups.shape[1] // 2).all()
            assert torch.equal(weight[weight != 0], before[name][weight != 0])


def test_wanda_cuts_the_least_products_of_weight_and_input(
    student: Student, teacher: Path, calibration: torch.Tensor
) -> None:
    """In the first block, whose inputs are the healthy model's own."""
    seen = norms_by_name(models.load(teacher), calibration)
    pruned = dict(models.load(student("wanda")).named_modules())
    for name, (weight, norm_I) in seen.items():
        if ".layers.0." in name:
            score, cut = weight.abs() * norm_I, pruned[name].weight == 0
            most_cut = score.masked_fill(~cut, 0.0).amax(1)
            assert (most_cut <= score.masked_fill(cut, torch.inf).amin(1)).all()


def test_a_block_is_judged_by_what_the_pruned_blocks_before_it_put_out(
    student: Student, teacher: Path, calibration: torch.Tensor
) -> None:
    def halve(_block: nn.Module, norms: Norms) -> None:
        told.append({linear: norm_I.clone() for linear, norm_I in norms.items()})
        for linear in norms:
            linear.weight.mul_(0.5)

    told: list[Norms] = []
    model = models.load(teacher)
    change_blocks(model, calibration, halve)
    again = norms_by_name(model, calibration)
    last = model.model.layers[-1].self_attn.q_proj
    torch.testing.assert_close(told[-1][last], again["model.layers.3.self_attn.q_proj"][1])


def test_the_norm_of_an_input_is_taken_over_all_tokens(
    healthy: PreTrainedModel, calibration: torch.Tensor
) -> None:
    first = healthy.model.layers[0]
    with torch.no_grad():
        input_BTI = first.input_layernorm(healthy.get_input_embeddings()(calibration))
    norm_I = norms_by_name(healthy, calibration)["model.layers.0.self_attn.k_proj"][1]
    torch.testing.assert_close(norm_I, input_BTI.square().sum((0, 1)).sqrt(), rtol=1e-4, atol=0.0)


def test_a_narrower_model_is_narrower_in_every_block_and_in_its_config(student: Student) -> None:
    model = models.load(student("narrow"))
    assert model.config.intermediate_size == 58
    for block in model.model.layers:
        assert block.mlp.up_proj.weight.shape == block.mlp.gate_proj.weight.shape == (58, 32)
        assert block.mlp.down_proj.weight.shape == (32, 58)


@torch.inference_mode()
def test_channels_that_do_nothing_are_cut_first(
    teacher: Path, natural_text: list[str], calibration: torch.Tensor, tmp_path: Path
) -> None:
    model = models.load(teacher)
    for block in model.model.layers:
        block.mlp.down_proj.weight[:, [3, 17, 40, 63]] = 0.0
    save(model, teacher, tmp_path / "idle")
    injure.cut_channels(tmp_path / "idle", tmp_path / "student", share=4 / 64, texts=natural_text)
    narrow = models.load(tmp_path / "student")
    assert narrow.config.intermediate_size == 60
    torch.testing.assert_close(narrow(calibration).logits, model(calibration).logits)


@torch.inference_mode()
def test_a_block_that_does_nothing_is_dropped_first_unless_it_is_the_first_or_the_last(
    teacher: Path, natural_text: list[str], calibration: torch.Tensor, tmp_path: Path
) -> None:
    model = models.load(teacher)
    for block in [0, 2, 3]:
        model.model.layers[block].mlp.down_proj.weight.zero_()
        model.model.layers[block].self_attn.o_proj.weight.zero_()
    influences = block_influence(model, calibration)
    assert [influence > 1e-3 for influence in influences] == [False, True, False, False]
    save(model, teacher, tmp_path / "idle")
    injure.drop_layers(tmp_path / "idle", tmp_path / "student", 1, texts=natural_text)
    shallow = models.load(tmp_path / "student")
    assert shallow.config.num_hidden_layers == 3
    assert shallow.model.layers[1].mlp.down_proj.weight.abs().sum() > 0
    torch.testing.assert_close(shallow(calibration).logits, model(calibration).logits)


def test_a_model_without_some_of_its_layers_generates_with_its_cache(student: Student) -> None:
    model = models.load(student("dropped"))
    ids_BT = torch.arange(8, 20).view(2, 6)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (model.generate(ids_BT, use_cache=cached, **asked) for cached in (True, False))
    assert torch.equal(with_cache, without)


def test_settings_of_single_layers_go_with_them(teacher: Path, tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **shape, num_key_value_heads=2, num_hidden_layers=3, layer_types=kinds, use_sliding_window=True
        )
    )
    injure.keep_blocks(model, [0, 1])
    model.save_pretrained(tmp_path)
    assert models.load(tmp_path).config.layer_types == kinds[:2]


def test_packing_leaves_two_weights_a_byte_in_the_blocks_alone(student: Student, teacher: Path) -> None:
    before, after = Weights(teacher), Weights(student("nf4"))
    for name in before:
        if block_of(name) is not None and before[name].dim() == 2:
            assert after[name].dtype == torch.uint8
            assert after[name].numel() * 2 == before[name].numel()
        else:
            assert torch.equal(after[name], before[name])


def test_a_round_trip_rounds_every_weight_to_bfloat16(student: Student, teacher: Path) -> None:
    before, after = Weights(teacher), Weights(student("round-trip"))
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in before)


@pytest.mark.parametrize(
    "damage", ["forgetful", "rounded", "nf4", "pruned", "wanda", "narrow", "dropped", "round-trip"]
)
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
