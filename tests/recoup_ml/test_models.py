"""Loading, the two halves of a model, and what is refused at the door."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from recoup_ml import models
from recoup_ml.errors import NonFiniteWeights, UnsupportedModel
from recoup_ml.sequences import sees

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


def test_weights_that_are_missing_are_not_made_up(teacher: Path, tmp_path: Path) -> None:
    """As of a model whose quantizer transformers no longer knows: its layers would be random."""
    model = models.load(teacher)
    kept = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "partial", state_dict=kept)
    with pytest.raises(
        UnsupportedModel, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight, one of 1"
    ):
        models.load(tmp_path / "partial")


def test_a_head_that_is_more_than_a_linear_map_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(**SHAPE, is_decoder=True)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModel, match="not a linear map"):
        models.load(tmp_path / "bert")


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


FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_packed_keeps_its_sequences_apart(family: str) -> None:
    """A pack's hidden states are those of each sequence alone, whatever stands before it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    if not models.can_pack(model):
        pytest.skip(f"{family} attends across sequences in one row; it is padded instead")
    parts = [torch.randint(3, 64, (1, size)) for size in (5, 9, 2, 7)]
    places = torch.cat([torch.arange(part.shape[1]) for part in parts]).unsqueeze(0)
    with torch.inference_mode():
        together = models.last_hidden(model, torch.cat(parts, 1), None, places)
        alone = torch.cat([models.last_hidden(model, part, torch.ones_like(part)) for part in parts], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_sequences_share_may_stand_in_a_row_once(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    if not models.can_share(model):
        pytest.skip(f"{family} cannot be told what each token may look at")
    first, *others = (torch.randint(3, 64, (1, size)) for size in (5, 9, 1, 7))
    whole = [torch.cat([first, other], 1) for other in others]
    places = torch.cat([torch.arange(5), *(torch.arange(5, part.shape[1]) for part in whole)]).unsqueeze(0)
    with torch.inference_mode():
        together = models.last_hidden(
            model, torch.cat([first, *others], 1), None, places, sees([5, 9, 1, 7]).unsqueeze(0)
        )
        alone = [models.last_hidden(model, part, torch.ones_like(part)) for part in whole]
    expected = torch.cat([alone[0][:, :5], *(part[:, 5:] for part in alone)], 1)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_which_families_share_first_tokens() -> None:
    """Gemma's window, here of four tokens, would lose them."""
    made = {name: AutoModelForCausalLM.from_config(make()).eval() for name, make in FAMILIES.items()}
    found = {name for name, model in made.items() if models.can_share(model)}
    assert found == {*FAMILIES} - {"gemma"}


def test_a_model_that_ignores_places_is_found_out(
    healthy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = models.last_hidden
    assert models.can_pack(healthy)
    monkeypatch.setattr(models, "last_hidden", lambda model, ids, mask, *_: plain(model, ids, mask))
    assert not models.can_pack(healthy)
