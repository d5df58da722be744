"""Loading, the two halves of a model, and what is refused at the door."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from recoup_ml import models
from recoup_ml.errors import NonFiniteWeights, UnsupportedModel

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def capped(tmp_path: Path) -> Path:
    """A model whose logits pass a soft cap, with logits large enough to feel it."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, initializer_range=1.0))
    model.save_pretrained(tmp_path / "capped")
    return tmp_path / "capped"


@torch.inference_mode()
def test_backbone_and_head_make_the_models_logits(healthy: PreTrainedModel, capped: Path) -> None:
    for model in (healthy, models.load(capped)):
        ids_BT = torch.arange(3, 43).view(2, 20)
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1, 12:] = 0
        logits_BTV = models.head(model)(models.last_hidden(model, ids_BT, mask_BT))
        expected_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        torch.testing.assert_close(logits_BTV[mask_BT == 1], expected_BTV[mask_BT == 1])


def test_the_soft_cap_is_felt(capped: Path) -> None:
    head = models.head(models.load(capped))
    assert head.softcap == 30.0
    assert 29.0 < float(head(100 * torch.randn(50, 32)).abs().max().detach()) <= 30.0


def test_gradients_reach_the_model_through_its_head(teacher: Path) -> None:
    model = models.load(teacher)
    models.head(model)(torch.rand(3, 32)).sum().backward()
    assert model.lm_head.weight.grad is not None
    assert not models.head(model).detached().weight_VD.requires_grad


def test_a_loaded_model_is_float32_on_a_cpu_and_evaluates(
    student: Callable[[str], Path], tmp_path: Path
) -> None:
    models.load(student("copy")).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = models.load(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, teacher: Path, tmp_path: Path) -> None:
    model = models.load(teacher)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteWeights, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(tmp_path / "broken")


def test_a_head_that_is_more_than_a_linear_map_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)).save_pretrained(tmp_path / "granite")
    with pytest.raises(UnsupportedModel, match="not a linear map"):
        models.load(tmp_path / "granite")


def test_pickled_weights_are_not_read(teacher: Path, tmp_path: Path) -> None:
    models.load(teacher).config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        models.load(tmp_path)


def test_batches_are_filled_with_padding_or_the_end_token_or_zero(teacher: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    assert models.pad_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert models.pad_id(tokenizer) == 2
    tokenizer.eos_token = None
    assert models.pad_id(tokenizer) == 0
