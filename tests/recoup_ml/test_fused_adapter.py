"""An adapter that is added within its product is the adapter that PEFT makes of the same numbers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from recoup_ml.fused_adapter import fuse

IDS_BT = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture
def llama(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(layers=2)


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """Whose layers are `Conv1D`."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ).eval()


def adapted(model: PreTrainedModel, **chosen: Any) -> PeftModel:
    return get_peft_model(
        model, LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False, **chosen)
    )


def learnt(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the slopes of what trains."""
    loss = model(input_ids=IDS_BT, labels=IDS_BT).loss
    loss.backward()
    slopes = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(slope is not None for slope in slopes.values())
    return loss, {name: slope for name, slope in slopes.items() if slope is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [12, 20])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_loss_and_slopes_are_those_of_the_plain_adapter(
    request: pytest.FixtureRequest, family: str, alpha: int
) -> None:
    torch.manual_seed(0)
    plain = adapted(request.getfixturevalue(family), lora_alpha=alpha).double()
    fused = fuse(copy.deepcopy(plain))
    (loss, slopes), (wanted, wanted_slopes) = learnt(fused), learnt(plain)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(slopes, wanted_slopes)


def test_every_linear_layer_is_fused(llama: PreTrainedModel) -> None:
    layers = [layer for layer in fuse(adapted(llama)).modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 2 * 7
    assert all(layer.lora_variant for layer in layers)


def test_dora_is_left_as_it_is(llama: PreTrainedModel) -> None:
    dora = adapted(llama, use_dora=True)
    kept = [dict(layer.lora_variant) for layer in dora.modules() if isinstance(layer, LoraLayer)]
    assert kept == [layer.lora_variant for layer in fuse(dora).modules() if isinstance(layer, LoraLayer)]


def test_an_adapter_in_float32_of_a_layer_in_half_precision_keeps_its_precision() -> None:
    layer = nn.Sequential(nn.Linear(16, 8, bias=False, dtype=torch.bfloat16))
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x_NI = torch.randn(3, 16, dtype=torch.bfloat16)
    wanted = model(x_NI)
    assert torch.equal(fuse(model)(x_NI), wanted)
