"""Reading the residual stream: the right values, the right positions, and nothing left behind."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from recoup_ml.errors import UnsupportedModel
from recoup_ml.hidden import capture, decoder_blocks

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(name="ids_BT")
def ids() -> Tensor:
    return torch.arange(3, 23).view(2, 10)


@pytest.fixture
def llama(make_model: MakeModel) -> PreTrainedModel:
    return make_model(layers=3).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4)).eval()


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.inference_mode()
def read(model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor) -> list[Tensor]:
    with capture(model) as seen:
        seen.positions_BT = positions_BT
        model(input_ids=ids_BT)
        return seen.states()


@torch.inference_mode()
def check_against_transformers(model: PreTrainedModel, ids_BT: Tensor, final_norm: torch.nn.Module) -> None:
    positions_BT = torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    expected = model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    *inner, last = read(model, ids_BT, positions_BT)
    for layer, state in enumerate(inner):
        torch.testing.assert_close(state, expected[layer][positions_BT])
    torch.testing.assert_close(final_norm(last), expected[-1][positions_BT])
    assert len(inner) == len(expected) - 1


def test_states_are_those_of_transformers_and_the_last_is_before_the_final_norm(
    llama: PreTrainedModel, ids_BT: Tensor
) -> None:
    check_against_transformers(llama, ids_BT, llama.model.norm)


def test_another_family_is_read_alike(ids_BT: Tensor) -> None:
    model = gpt2()
    check_against_transformers(model, ids_BT, model.transformer.ln_f)


def test_forward_passes_are_read_one_after_another(llama: PreTrainedModel, ids_BT: Tensor) -> None:
    everything_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    with torch.inference_mode(), capture(llama) as seen:
        for row_T, places_T in zip(ids_BT, everything_BT, strict=True):
            seen.positions_BT = places_T[None]
            llama(input_ids=row_T[None])
        found = seen.states()
    for ours, together in zip(found, read(llama, ids_BT, everything_BT), strict=True):
        torch.testing.assert_close(ours, together)


def test_nothing_is_read_where_no_positions_are_set(llama: PreTrainedModel, ids_BT: Tensor) -> None:
    positions_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    with torch.inference_mode(), capture(llama) as seen:
        llama(input_ids=ids_BT)
        seen.positions_BT = positions_BT
        llama(input_ids=ids_BT)
        assert [len(state) for state in seen.states()] == [0] * 4


def test_hooks_are_gone_after_the_block(llama: PreTrainedModel, ids_BT: Tensor) -> None:
    with capture(llama):
        assert hooks(llama) == 4
    assert hooks(llama) == 0


def test_hooks_are_gone_after_an_exception(llama: PreTrainedModel) -> None:
    with pytest.raises(IndexError), capture(llama):
        llama(input_ids=torch.full((1, 4), 10_000))
    assert hooks(llama) == 0


def test_an_adapter_inside_is_read_with_its_effect(llama: PreTrainedModel, ids_BT: Tensor) -> None:
    everything_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    bare = read(llama, ids_BT, everything_BT)
    adapted = get_peft_model(llama, LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    found = read(llama, ids_BT, everything_BT)
    with torch.inference_mode():
        expected = adapted(input_ids=ids_BT, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[0], bare[0])
    for layer in (1, 2):
        torch.testing.assert_close(found[layer], expected[layer].flatten(0, 1))
        assert not torch.allclose(found[layer], bare[layer], atol=1e-3)


def test_blocks_are_the_models_own(llama: PreTrainedModel) -> None:
    assert decoder_blocks(llama) is llama.model.layers


def test_a_model_without_a_list_of_blocks_is_refused_in_a_sentence(llama: PreTrainedModel) -> None:
    llama.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModel, match="no list of 7 decoder blocks"):
        decoder_blocks(llama)
