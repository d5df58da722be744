"""Whole recoveries of the tiny model in bfloat16 on a GPU: by every method, of everything that trains."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recoup.schemas import ChatRow, Outcome, Report
from recoup_ml import injure, models
from recoup_ml.recipe import recover
from recoup_ml.run import Interrupted, Run
from recoup_ml.tickets import ticket_rows
from recoup_ml.weights import Weights, block_of, zeros_filled

pytestmark = [
    pytest.mark.usefixtures("blank_pictures"),
    # models of the tests are narrower than the fast kernels of bitsandbytes want them
    pytest.mark.filterwarnings("ignore:inner dimension:UserWarning"),
]
Student = Callable[[str], Path]
Half = Callable[[Path], Path]
SMALL: dict[str, Any] = {
    "evaluation": {
        "test_sequences": 32,
        "validation_sequences": 8,
        "baselines": False,
        "gate": {"max_regression": 1.0, "max_drift": 0.5},
    },
    "alignment": {"positions": 256},
}
TRAINING = {"steps": 32, "learning_rate": 1e-3, "stop_early": False, "start": "student"}
GONE = {"recovered", "partial"}


class Finished:
    def __init__(self, run: Run, outcome: Outcome, journal: Any) -> None:
        self.run, self.outcome, self.journal = run, outcome, journal
        self.report = Report.model_validate_json(journal.published["report.json"].read_text())

    @property
    def share(self) -> float:
        """Of the damage, in KL to the teacher, that is gone."""
        kl = self.report.measures[0]
        return (kl.before - kl.after) / (kl.before - kl.teacher)

    @property
    def best(self) -> Path:
        return self.journal.place / "distil" / "best"


@pytest.fixture
def finish(
    make_run: Callable[..., Run], open_journal: type, half: Half, tmp_path: Path, device: torch.device
) -> Callable[..., Finished]:
    """`finish("pruned", training={…})`: that recovery in bfloat16, from beginning to end."""

    def run_to_the_end(damage: str, **request: Any) -> Finished:
        asked = make_run(damage, **SMALL | request)
        run = replace(asked, student=half(asked.student), teacher=half(asked.teacher))
        journal = open_journal(tmp_path / "place")
        found = Finished(run, recover(run, journal), journal)
        assert found.report.cost.device == device.type
        return found

    return run_to_the_end


METHODS = {
    "forward KL": {"type": "off_policy"},
    "reverse KL": {"type": "off_policy", "divergence": "reverse_kl"},
    "JSD": {"type": "off_policy", "divergence": "jsd", "beta": 0.5},
    "skewed KL": {"type": "off_policy", "divergence": "skew_kl"},
    "top k": {"type": "off_policy", "top_k": 16},
    "on-policy": {"type": "on_policy", "rollouts": {"refresh_steps": 2}},
    "two stages": {"type": "two_stage", "rollouts": {"refresh_steps": 2}},
    "self-demonstration": {"type": "self_demonstration", "rollouts": {"refresh_steps": 2}},
    "rewrites": {"type": "rewrite_sft"},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_brings_ability_back(method: dict[str, Any], finish: Callable[..., Finished]) -> None:
    found = finish("forgetful", method=method, training=TRAINING)
    phases = found.report.training.phases
    assert sum(phase.steps for phase in phases) == 32 and not found.report.training.diverged
    if method["type"] in {"self_demonstration", "rewrite_sft"}:  # they learn another text than the test's
        losses = [point.loss for point in found.report.training.curve]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    else:
        print(f"{found.share:.3f} {found.outcome}")
        assert found.share > 0.2 and found.outcome in GONE


def test_a_regularised_and_watched_training_keeps_its_skill(finish: Callable[..., Finished]) -> None:
    keep = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(40, seed=77)]
    alignment = {"positions": 256, "every_steps": 4, "weight": 0.1, "hidden_weight": 0.1}
    found = finish("finetuned", keep=keep, training=TRAINING, alignment=alignment)
    assert found.share > 0.1
    assert found.report.training.keep_answers > 0
    assert len(found.report.training.trajectory.points) >= 8


def test_a_healthy_model_is_taught(
    make_run: Callable[..., Run], open_journal: type, half: Half, tmp_path: Path, teacher: Path
) -> None:
    tickets = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(120, seed=77)]
    asked = make_run(
        "copy",
        **SMALL,
        student={"source": "teacher"},
        teach={"file": "file-" + "0" * 24},
        training=TRAINING | {"steps": 36},
    )
    run = replace(asked, student=half(teacher), teacher=half(teacher), teach=tickets)
    journal = open_journal(tmp_path)
    found = Finished(run, recover(run, journal), journal)
    assert found.outcome in {"taught", "taught_with_forgetting"}
    assert found.report.teaching.loss.change.high < 0


LORA = {"mode": "lora", "lora": {"rank": 8, "alpha": 16}}
TRAINED: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "lora": ("forgetful", LORA, "adapter", 0.2),
    "dora": ("forgetful", LORA | {"mode": "dora"}, "adapter", 0.2),
    "full": ("forgetful", {"mode": "full"}, "merged", 0.2),
    "norms": ("forgetful", {"mode": "norms"}, "merged", 0.02),
    "masked full": ("pruned", {"mode": "full"}, "merged", 0.2),
    "masked lora": ("pruned", LORA, "merged", 0.1),
    "2:4": ("wanda-24", LORA, "merged", 0.1),
    "shallow": ("shallow", LORA, "adapter", 0.1),
    "narrow": ("narrow", LORA, "adapter", 0.0),
    "rounded": ("rounded", LORA, "adapter", 0.1),
    "nf4": ("nf4", LORA, "adapter", -0.1),
}


@pytest.mark.parametrize("trained", TRAINED)
def test_everything_that_trains_comes_nearer_to_the_teacher(
    trained: str, finish: Callable[..., Finished]
) -> None:
    damage, training, output, least = TRAINED[trained]
    found = finish(damage, training=TRAINING | training, output={"kind": output})
    print(f"{found.share:.3f} {found.outcome}")
    assert found.share > least
    if damage in {"pruned", "wanda-24"}:
        before, after = Weights(found.run.student), Weights(found.best)
        assert zeros_filled(found.run.student, found.best) == 0
        for name in before:
            if block_of(name) is not None and before[name].dim() == 2:
                new = (after[name] == 0) & (before[name] != 0)
                assert int(new.sum()) < 0.01 * new.numel()  # what is learnt may round to zero
    if output == "merged":
        saved = Weights(found.best)
        assert {saved[name].dtype for name in saved} == {torch.bfloat16}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_student_that_bitsandbytes_packed_learns_and_is_packed_again(
    bits: int, teacher: Path, make_run: Callable[..., Run], open_journal: type, tmp_path: Path, half: Half
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    student = tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(
        half(teacher), dtype=torch.bfloat16, quantization_config=settings
    )
    model.save_pretrained(student)
    models.load_tokenizer(teacher).save_pretrained(student)
    request = SMALL | {"training": TRAINING | LORA, "output": {"kind": "requantized"}}
    asked = make_run("copy", **request | {"student": {"source": "packed"}})
    run = replace(asked, student=student, teacher=half(teacher))
    # a packing that costs nothing is nothing to recover: the verdict is then that
    journal = open_journal(tmp_path / "place")
    found = Finished(run, recover(run, journal), journal)
    if found.outcome != "not_needed":
        assert not found.report.training.diverged
        assert {form.form for form in found.report.forms} == {"adapter", "merged", "requantized"}


def test_a_student_of_compressed_tensors_learns(
    teacher: Path, half: Half, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = models.load(half(teacher)).cpu()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="channel"))
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.FROZEN,
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                most_O1 = module.weight.abs().amax(1, keepdim=True)
                module.weight_scale.data.copy_(most_O1 / 127)
    student = tmp_path / "packed"
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(student)
    compressor.update_config(str(student))
    models.load_tokenizer(teacher).save_pretrained(student)
    request = SMALL | {"training": TRAINING | LORA, "student": {"source": "packed"}}
    run = replace(make_run("copy", **request), student=student, teacher=half(teacher))
    journal = open_journal(tmp_path / "place")
    found = Finished(run, recover(run, journal), journal)
    assert found.outcome in {*GONE, "not_needed", "no_gain"}


@pytest.mark.parametrize(
    ("damage", "method"),
    [
        ("finetuned", "interpolate"),
        ("finetuned", "spectral"),
        ("finetuned", "restore_layers"),
        ("rounded", "low_rank_patch"),
        ("nf4", "low_rank_patch"),
        ("pruned", "reconstruct"),
        ("narrow", "reconstruct"),
    ],
)
def test_a_repair_that_costs_no_training_runs(
    damage: str, method: str, finish: Callable[..., Finished]
) -> None:
    found = finish(damage, method={"type": method})
    assert found.share > (-0.5 if damage == "nf4" else 0.0)
    if damage == "pruned":
        assert zeros_filled(found.run.student, found.best) == 0


@pytest.mark.parametrize(
    "damage", ["prune", "quantize", "wanda", "2:4", "channels", "layers", "round trip", "tune"]
)
def test_healthy_models_are_damaged_in_half_precision(
    damage: str, teacher: Path, half: Half, tmp_path: Path, natural_text: list[str]
) -> None:
    makers: dict[str, Callable[[Path, Path], None]] = {
        "prune": injure.prune,
        "quantize": lambda source, made: injure.quantize(source, made, bits=3, group=32),
        "wanda": lambda source, made: injure.wanda(source, made, texts=natural_text),
        "2:4": lambda source, made: injure.wanda(source, made, pattern="2:4", texts=natural_text),
        "channels": lambda source, made: injure.cut_channels(source, made, texts=natural_text),
        "layers": lambda source, made: injure.drop_layers(source, made, 1, texts=natural_text),
        "round trip": injure.round_trip,
        "tune": lambda source, made: injure.finetune(source, made, steps=4, rate=3e-3),
    }
    makers[damage](half(teacher), tmp_path / "student")
    before, after = Weights(half(teacher)), Weights(tmp_path / "student")
    matrices = [name for name in after if block_of(name) is not None and after[name].dim() == 2]
    if damage in {"prune", "wanda", "2:4"}:
        share = sum(int((after[n] == 0).sum()) for n in matrices) / sum(after[n].numel() for n in matrices)
        assert share == pytest.approx(0.5, abs=0.02)
    same = all(
        name in before and before[name].shape == after[name].shape and torch.equal(before[name], after[name])
        for name in matrices
    )
    assert same == (damage == "round trip") or damage == "layers"
    assert models.load(tmp_path / "student").dtype == models.load(half(teacher)).dtype


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("method", ["off_policy", "on_policy"])
def test_a_training_that_was_stopped_ends_where_an_undisturbed_one_does(
    mode: str, method: str, make_run: Callable[..., Run], open_journal: type, half: Half, tmp_path: Path
) -> None:
    training = TRAINING | {"steps": 8, "mode": mode, "learning_rate": 1e-3}
    asked = make_run(
        "finetuned", **SMALL, training=training, method={"type": method, "rollouts": {"refresh_steps": 3}}
    )
    run = replace(asked, student=half(asked.student), teacher=half(asked.teacher))
    recover(run, open_journal(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        recover(run, open_journal(tmp_path / "cut", breaks_in="distil", breaks_at=5, stops=True))
    recover(run, open_journal(tmp_path / "cut"))
    mine, expected = (Weights(tmp_path / name / "distil" / "best") for name in ("cut", "whole"))
    assert set(mine) == set(expected)
    for name in expected:
        torch.testing.assert_close(mine[name], expected[name], rtol=1e-2, atol=1e-4)
    exact = all(torch.equal(mine[name], expected[name]) for name in expected)
    print(f"bit for bit: {exact}")
