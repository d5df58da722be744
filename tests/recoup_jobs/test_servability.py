"""What vLLM would refuse, or take without a word, is refused before it is asked."""

import json
from types import SimpleNamespace

import numpy
import pytest
from safetensors.numpy import save_file

from recoup_jobs.errors import Unprocessable
from recoup_jobs.inspection import Model
from recoup_jobs.servability import RANKS, foreseen, launch_adapter, require_servable

CONFIG = {"peft_type": "LORA", "r": 12, "lora_alpha": 24, "bias": "none", "use_dora": False}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter whose configuration and tensors are these."""

    def write(names=(LAYER,), **config):
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
        tensors = {f"{name}.lora_{part}.weight": numpy.ones((2, 2)) for name in names for part in "AB"}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


def test_a_plain_adapter_needs_the_next_step_of_the_ladder(adapter):
    assert require_servable(adapter()) == 16
    assert [require_servable(adapter(r=rank, lora_alpha=rank)) for rank in RANKS] == [*RANKS]


def test_the_largest_rank_of_any_layer_counts(adapter):
    pattern = {"rank_pattern": {"a": 40}, "alpha_pattern": {"a": 80}}
    assert require_servable(adapter(**pattern)) == 64


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"peft_type": "IA3"}, "unsupported_adapter"),
        ({"use_dora": True}, "dora_not_servable"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save_not_servable"),
        ({"bias": "all"}, "bias_not_servable"),
        ({"r": 513, "lora_alpha": 1026}, "rank_not_servable"),
        ({"r": "16"}, "unsupported_adapter"),
        ({"rank_pattern": {"a": 1024}}, "rank_not_servable"),
        ({"layer_replication": [[0, 1]]}, "adapter_not_servable"),
        ({"init_lora_weights": "pissa"}, "adapter_not_servable"),
        ({"names": ["model.layers.0.self_attn.q_proj"]}, "wrong_module_names"),
        ({"names": [f"base_model.{LAYER}/x"]}, "wrong_module_names"),
        ({"names": ["base_model.model.lm_head"]}, "head_not_servable"),
        ({"names": []}, "unsupported_adapter"),
    ],
)
def test_what_would_not_be_served_is_refused(adapter, change, code):
    with pytest.raises(Unprocessable) as refused:
        require_servable(adapter(**change))
    assert refused.value.code == code


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(Unprocessable, match="can be read"):
        require_servable(tmp_path)


def test_a_server_is_started_with_room_for_the_rank():
    launch = launch_adapter("models/student", 64)
    assert launch.arguments[:3] == ["models/student", "--served-model-name", "student"]
    assert launch.arguments[-2:] == ["--max-lora-rank", "64"]


@pytest.fixture
def student(tmp_path):
    def make(architecture="LlamaForCausalLM", quantizer=None):
        return Model(tmp_path, {"architectures": [architecture]}, quantizer, None, None, None)

    return make


def plan(output="adapter", phases=("teacher",), **trainable):
    trained = SimpleNamespace(**{"mode": "lora", "rank": 16, "targets": "all-linear"} | trainable)
    return SimpleNamespace(output=output, phases=phases, trainable=trained)


def found(items):
    return [(item.pointer, item.code) for item in items]


def test_a_usual_plan_can_be_served(student):
    assert foreseen(plan(), student()) == []
    assert foreseen(plan(targets=["q_proj", "down_proj"], rank=RANKS[-1]), student(quantizer="gptq")) == []


@pytest.mark.parametrize(
    ("trainable", "adapter_of_it", "place"),
    [
        ({"mode": "dora"}, {"use_dora": True}, "/training/mode"),
        ({"rank": 513}, {"r": 513}, "/training/lora/rank"),
        (
            {"targets": ["q_proj", "lm_head"]},
            {"names": ["base_model.model.lm_head"]},
            "/training/lora/targets",
        ),
    ],
)
def test_a_plan_is_held_to_what_its_adapter_is_held_to(student, adapter, trainable, adapter_of_it, place):
    with pytest.raises(Unprocessable) as refused:
        require_servable(adapter(**adapter_of_it))
    assert found(foreseen(plan(**trainable), student())) == [(place, refused.value.code)]


def test_a_method_that_does_not_train_makes_no_dora(student):
    assert foreseen(plan(mode="dora", phases=()), student()) == []


@pytest.mark.parametrize(
    ("base", "output", "codes"),
    [
        ({"quantizer": "bitsandbytes"}, "adapter", ["base_not_servable"]),
        ({"quantizer": "bitsandbytes"}, "requantized", ["base_not_servable"]),
        ({"quantizer": "bitsandbytes"}, "merged", []),
        ({"architecture": "GPT2LMHeadModel"}, "adapter", ["base_takes_no_adapter"]),
        ({"architecture": "GPT2LMHeadModel"}, "merged", []),
        ({"architecture": "FreshForCausalLM"}, "adapter", []),
    ],
)
def test_a_student_must_be_what_vllm_loads_in_the_form_that_is_handed_over(student, base, output, codes):
    assert found(foreseen(plan(output), student(**base))) == [("/output/kind", code) for code in codes]
