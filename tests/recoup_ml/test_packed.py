"""Packed students: read as plain matrices, loaded as they are, and trained beside."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from recoup_ml import models, packed
from recoup_ml.errors import NonFiniteWeights, UnsupportedModel
from recoup_ml.low_rank import weight_of
from recoup_ml.packed import PlainWeights
from recoup_ml.weights import Weights

Student = Callable[[str], Path]
IDS_BT = torch.arange(8, 40).view(2, 16)


@pytest.fixture
def pack(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    """A model as bitsandbytes packs it with these settings; its rows are whole blocks of 64."""

    def make(**settings: object) -> Path:
        make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "whole")
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config)
        model.save_pretrained(tmp_path / "packed")
        return tmp_path / "packed"

    return make


def unpacked(folder: Path) -> PreTrainedModel:
    """An ordinary model of the weights that the packed ones stand for."""
    weights, config = PlainWeights(folder), LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: weights[name] for name in weights})
    return model.eval()


def with_adapter(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for _, parameter in sorted(adapted.named_parameters()):
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def gradients(adapted: PeftModel) -> Tensor:
    adapted.train()
    adapted(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(adapted.named_parameters()) if p.requires_grad])


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.float32},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "nf4 twice", "fp4 as float32", "int8"],
)
def test_packed_weights_are_read_as_bitsandbytes_itself_unpacks_them(
    settings: dict[str, object], pack: Callable[..., Path]
) -> None:
    folder = pack(**settings)
    read, model = PlainWeights(folder), models.load(folder).dequantize(dtype=torch.float32)
    expected = dict(model.requires_grad_(False).named_parameters())
    assert set(read) == set(expected)
    for name in read:
        torch.testing.assert_close(read[name], expected[name], rtol=1e-5, atol=1e-6)


def test_what_only_a_quantizer_can_read_is_as_good_as_absent(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2, dtype=torch.int8), "b.weight": torch.ones(2, 2).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = PlainWeights(tmp_path)
    assert list(weights) == ["b.weight"]
    assert weights["b.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (None, None),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_the_method_is_the_one_that_the_config_names(
    config: dict[str, object] | None, method: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert packed.method(tmp_path) == method


def test_a_model_is_quantized_if_its_weights_are_packed(student: Student) -> None:
    assert models.is_quantized(models.load(student("nf4")))
    assert not models.is_quantized(models.load(student("rounded")))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_model_computes_in_float32_what_its_weights_stand_for(
    compute: torch.dtype, pack: Callable[..., Path]
) -> None:
    folder = pack(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    torch.testing.assert_close(models.load(folder)(IDS_BT).logits, unpacked(folder)(IDS_BT).logits)


@torch.inference_mode()
def test_rows_that_are_no_whole_blocks_are_computed_rightly_too(student: Student) -> None:
    """32 inputs and blocks of 64: bitsandbytes by itself gets these wrong on a CPU."""
    folder = student("nf4")
    torch.testing.assert_close(models.load(folder)(IDS_BT).logits, unpacked(folder)(IDS_BT).logits)


def test_an_adapter_learns_alike_before_and_after_an_evaluation(pack: Callable[..., Path]) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes by itself lets no gradient through after one."""
    folder = pack(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    expected = gradients(with_adapter(unpacked(folder)))
    torch.testing.assert_close(gradients(with_adapter(models.load(folder))), expected, rtol=1e-3, atol=1e-6)
    evaluated = with_adapter(models.load(folder)).eval()
    with torch.inference_mode():
        evaluated(input_ids=IDS_BT)
    torch.testing.assert_close(gradients(evaluated), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_beside_packed_weights_is_trained_saved_and_loaded(
    bits: int, pack: Callable[..., Path], tmp_path: Path
) -> None:
    folder = pack(**{f"load_in_{bits}bit": True})
    before = dict(models.load(folder).named_parameters())
    model = models.load(folder)
    adapted = with_adapter(model)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    assert gradients(adapted).count_nonzero() > 0
    optimizer.step()
    for name, weight in model.named_parameters():
        if ".base_layer." in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(models.load(folder), tmp_path / "adapter").get_base_model()
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(IDS_BT).logits, model.eval()(IDS_BT).logits)


@pytest.mark.parametrize("bits", [4, 8])
@torch.inference_mode()
def test_a_layer_computes_the_same_after_its_weights_were_read(bits: int, pack: Callable[..., Path]) -> None:
    model = models.load(pack(**{f"load_in_{bits}bit": True}))
    before = model(IDS_BT).logits
    assert weight_of(model.get_decoder().layers[0].mlp.up_proj).dtype == torch.float32
    torch.testing.assert_close(model(IDS_BT).logits, before)


def test_eight_bit_products_are_not_logged_one_by_one(
    pack: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = pack(load_in_8bit=True)
    model = models.load(folder)
    caplog.clear()
    with caplog.at_level(logging.DEBUG), torch.inference_mode():
        model(IDS_BT)
    assert "MatMul8bitLt" not in caplog.text


def test_scales_that_are_not_finite_are_refused(pack: Callable[..., Path]) -> None:
    weights = pack(load_in_4bit=True) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight.absmax"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(NonFiniteWeights, match="computes NaN"):
        models.load(weights.parent)


def test_a_packed_output_head_is_refused_in_a_sentence(pack: Callable[..., Path]) -> None:
    folder = pack(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    assert Weights(folder)["lm_head.weight"].dtype == torch.uint8
    with pytest.raises(UnsupportedModel, match=r"output head of packed is quantized.*without its head"):
        models.load(folder)


def test_a_missing_bitsandbytes_is_named_with_what_installs_it(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedModel, match=r"nf4: .*pip install 'recoup-server\[quantized\]'"):
        models.load(student("nf4"))


@pytest.mark.parametrize(("method", "needed"), [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_what_the_loader_of_another_method_misses_is_passed_on(
    method: str, needed: str, student: Student, tmp_path: Path
) -> None:
    shutil.copytree(student("copy"), tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=f"student: its weights are packed by {method}.*{needed}"):
        models.load(tmp_path / "student")
