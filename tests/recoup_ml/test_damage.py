"""What the weights say happened: every kind of damage is told apart, with its evidence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM, PreTrainedModel

from recoup_ml import injure, models
from recoup_ml.damage import inspect
from recoup_ml.errors import IncompatibleModels

Student = Callable[[str], Path]
MakeModel = Callable[..., PreTrainedModel]
SAME_LAYERS = [(layer, layer) for layer in range(4)]


@pytest.mark.parametrize(
    ("damage", "kind", "pattern", "zeros"),
    [
        ("finetuned", "finetuning", "none", 0.0),
        ("forgetful", "finetuning", "none", 0.0),
        ("round-trip", "finetuning", "none", 0.0),
        ("rounded", "quantization", "none", 0.0),
        ("pruned", "pruning", "unstructured", 0.5),
        ("pruned-2:4", "pruning", "2:4", 0.5),
        ("copy", "none", "none", 0.0),
    ],
)
def test_each_damage_is_recognised(
    damage: str, kind: str, pattern: str, zeros: float, student: Student, teacher: Path
) -> None:
    found = inspect(student(damage), teacher)
    assert (found.kind, found.zero_pattern, found.missing_layers) == (kind, pattern, 0)
    assert found.zero_fraction == pytest.approx(zeros, abs=0.01)
    assert found.layer_map == SAME_LAYERS


@pytest.mark.parametrize(
    ("damage", "evidence"),
    [
        ("rounded", "32 neighbouring weights take 8 distinct values, 32 in the teacher."),
        ("pruned", "50.0% of the linear weights are exactly zero (unstructured)."),
        ("pruned-2:4", "50.0% of the linear weights are exactly zero (2:4)."),
        ("shallow", "1 of the teacher's decoder layers are missing."),
    ],
)
def test_the_evidence_says_what_was_seen(damage: str, evidence: str, student: Student, teacher: Path) -> None:
    found = inspect(student(damage), teacher).evidence
    assert len(found) == 2
    assert "of the teacher's norm" in found[0]
    assert found[1] == evidence


def test_the_distance_is_the_relative_frobenius_norm(student: Student, teacher: Path) -> None:
    found = inspect(student("finetuned"), teacher)
    mine, theirs = (
        dict(models.load(folder).requires_grad_(False).named_parameters())
        for folder in (student("finetuned"), teacher)
    )
    difference = torch.cat([(mine[name] - theirs[name]).flatten() for name in theirs])
    norm = torch.cat([weight.flatten() for weight in theirs.values()]).norm()
    assert found.weight_distance == pytest.approx(float(difference.norm() / norm), rel=1e-5)


def test_the_distance_by_layer_shows_where_the_damage_is(teacher: Path, tmp_path: Path) -> None:
    model = models.load(teacher)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "student")
    by_layer = inspect(tmp_path / "student", teacher).distance_by_layer
    assert [distance > 0 for distance in by_layer] == [False, False, True, False]


def test_a_copy_lies_at_no_distance(student: Student, teacher: Path) -> None:
    assert inspect(student("copy"), teacher).weight_distance == 0.0


@pytest.mark.parametrize("dropped", [[0], [1], [3], [0, 2], [1, 2], [2, 3]])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_missing_layers_are_found_and_the_others_mapped(
    dropped: list[int], noise: float, teacher: Path, tmp_path: Path
) -> None:
    model = models.load(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    for layer in reversed(dropped):
        del model.model.layers[layer]
    model.config.num_hidden_layers = 4 - len(dropped)
    model.save_pretrained(tmp_path / "student")
    found = inspect(tmp_path / "student", teacher)
    assert (found.kind, found.missing_layers, found.zero_pattern) == ("pruning", len(dropped), "none")
    assert found.layer_map == list(enumerate(layer for layer in range(4) if layer not in dropped))
    assert found.weight_distance == pytest.approx(noise, abs=0.02)


def test_no_two_layers_are_mapped_to_one(make_model: MakeModel, tmp_path: Path) -> None:
    """Two of the teacher's layers are alike, and the first of all is missing from the student."""
    model = make_model()
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    model.save_pretrained(tmp_path / "teacher")
    del model.model.layers[0]
    model.config.num_hidden_layers = 3
    model.save_pretrained(tmp_path / "student")
    found = inspect(tmp_path / "student", tmp_path / "teacher")
    assert found.layer_map == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(("bits", "kind"), [(3, "quantization"), (4, "quantization"), (8, "finetuning")])
def test_few_levels_are_the_mark_of_quantization(bits: int, kind: str, teacher: Path, tmp_path: Path) -> None:
    injure.quantize(teacher, tmp_path / "student", bits=bits, group=32)
    assert inspect(tmp_path / "student", teacher).kind == kind


def test_a_quantization_that_the_config_names_is_believed(
    student: Student, teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    for path in student("finetuned").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "awq"}
    }
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder, teacher)
    assert found.kind == "quantization"
    assert "The config names the quantization method awq." in found.evidence


def test_a_student_tuned_from_a_coarse_teacher_is_not_called_quantized(
    student: Student, tmp_path: Path
) -> None:
    model = models.load(student("rounded"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "student")
    assert inspect(tmp_path / "student", student("rounded")).kind == "finetuning"


def test_heavy_pruning_is_not_taken_for_few_levels(teacher: Path, tmp_path: Path) -> None:
    injure.prune(teacher, tmp_path / "student", share=0.7)
    found = inspect(tmp_path / "student", teacher)
    assert (found.kind, found.zero_pattern) == ("pruning", "unstructured")
    assert not [sentence for sentence in found.evidence if "distinct values" in sentence]


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4)),
        lambda: MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=3, n_heads=4, max_seq_len=64)),
    ],
    ids=["gpt2", "mpt"],
)
def test_families_with_other_names_for_their_depth_are_inspected(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "teacher")
    found = inspect(tmp_path / "teacher", tmp_path / "teacher")
    assert (found.kind, found.layer_map) == ("none", [(0, 0), (1, 1), (2, 2)])


def test_models_without_a_common_tensor_are_refused(
    make_model: MakeModel, teacher: Path, tmp_path: Path
) -> None:
    narrow = make_model(hidden_size=16, intermediate_size=24, vocab_size=64)
    narrow.save_pretrained(tmp_path / "student")
    with pytest.raises(IncompatibleModels, match="share no tensor"):
        inspect(tmp_path / "student", teacher)


def test_a_student_that_is_both_shallower_and_narrower_is_refused_in_a_sentence(
    make_model: MakeModel, teacher: Path, tmp_path: Path
) -> None:
    make_model(layers=2, intermediate_size=48).save_pretrained(tmp_path / "student")
    with pytest.raises(IncompatibleModels):
        inspect(tmp_path / "student", teacher)


def test_a_student_deeper_than_its_teacher_is_refused(
    make_model: MakeModel, teacher: Path, tmp_path: Path
) -> None:
    make_model(layers=5).save_pretrained(tmp_path / "student")
    with pytest.raises(IncompatibleModels, match="5 layers"):
        inspect(tmp_path / "student", teacher)
