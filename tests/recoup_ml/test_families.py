"""Every family of models goes the whole way: random weights, so that only the machinery is tried."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from recoup.schemas import Report
from recoup_ml import models
from recoup_ml.recipe import recover
from recoup_ml.run import Run

pytestmark = pytest.mark.usefixtures("blank_pictures")
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COSTLY = pytest.mark.slow
"""Another full recovery each, of a family whose adapter, or another family, is learnt in the fast tests."""

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, **ENDS, head_dim=8, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **ENDS, head_dim=8, sliding_window=8),
    "mixtral": lambda: MixtralConfig(**SHAPE, **ENDS, num_local_experts=4),
    "granite": lambda: GraniteConfig(**SHAPE, **ENDS, logits_scaling=0.5),
    "cohere": lambda: CohereConfig(**SHAPE, **ENDS, logit_scale=2.0),
    "gpt2": lambda: GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4, initializer_range=0.1, **ENDS),
    "opt": lambda: OPTConfig(
        vocab_size=128,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        init_std=0.1,
        **ENDS,
    ),
}


@pytest.fixture
def recovered(
    make_run: Callable[..., Run], open_journal: type, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Report]:
    """`recovered("gpt2", method={…})`: the report on a model of that family whose weights were shaken."""

    def run(family: str, template: bool = True, **request: object) -> Report:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family]())
        for folder in (tmp_path / "teacher", tmp_path / "student"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if not template:
                (folder / "chat_template.jinja").unlink()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
        wanted = {"training": {"steps": 3}, "evaluation": {"test_sequences": 40, "validation_sequences": 8}}
        asked = make_run("finetuned", **wanted | request)
        journal = open_journal(tmp_path / "job")
        recover(replace(asked, student=tmp_path / "student", teacher=tmp_path / "teacher"), journal)
        return Report.model_validate_json(journal.published["report.json"].read_text())

    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mode", ["lora", pytest.param("full", marks=COSTLY), pytest.param("norms", marks=COSTLY)]
)
def test_a_family_goes_all_the_way(family: str, mode: str, recovered: Callable[..., Report]) -> None:
    report = recovered(family, training={"steps": 3, "mode": mode})
    assert report.training.steps == 3
    assert report.measures[0].after is not None
    assert report.alignment.after is not None


@pytest.mark.parametrize("family", [pytest.param("qwen3", marks=COSTLY), "gpt2"])
@pytest.mark.parametrize("method", ["on_policy", "two_stage", "rewrite_sft", "interpolate"])
def test_other_methods_do_not_mind_the_family(
    family: str, method: str, recovered: Callable[..., Report]
) -> None:
    assert recovered(family, method={"type": method}).measures[0].after is not None


def test_a_model_without_a_chat_template_is_asked_in_plain_text(recovered: Callable[..., Report]) -> None:
    assert recovered("qwen3", template=False).training.steps == 3


def test_embeddings_that_are_tied_stay_tied(recovered: Callable[..., Report], tmp_path: Path) -> None:
    recovered("qwen3", training={"steps": 3, "mode": "full"})
    trained = models.load(tmp_path / "job" / "distil" / "best")
    assert trained.get_output_embeddings().weight is trained.get_input_embeddings().weight
