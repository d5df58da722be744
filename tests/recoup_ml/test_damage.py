"""What the weights say happened: every kind of damage is told apart, with its evidence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM, PreTrainedModel

from recoup_ml import injure, models
from recoup_ml.damage import inspect
from recoup_ml.errors import IncompatibleModels
from recoup_ml.packed import PlainWeights
from recoup_ml.weights import Weights, block_of

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
        ("nf4", "quantization", "none", 0.09),
        ("narrow", "pruning", "none", 0.0),
        ("wanda", "pruning", "unstructured", 0.5),
        ("wanda-24", "pruning", "2:4", 0.5),
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
    assert len(found.distance_by_layer) == 4


@pytest.mark.parametrize(
    ("damage", "evidence"),
    [
        ("rounded", "32 neighbouring weights take 8 distinct values, 32 in the teacher."),
        ("pruned", "50.0% of the linear weights are exactly zero (unstructured)."),
        ("pruned-2:4", "50.0% of the linear weights are exactly zero (2:4)."),
        ("shallow", "1 of the teacher's decoder layers are missing."),
        ("narrow", "9.4% of the blocks' inner channels are gone (58 of 64 left)."),
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


@pytest.mark.parametrize("bits", [3, 4])
def test_zeros_that_are_a_level_of_quantization_are_no_pruning(
    bits: int, teacher: Path, tmp_path: Path
) -> None:
    def round_around_zero(model: PreTrainedModel) -> None:
        for linear in linears(model):
            step = linear.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            linear.weight.copy_((linear.weight / step).round() * step)

    change(teacher, tmp_path / "student", round_around_zero)
    found = inspect(tmp_path / "student", teacher)
    assert found.zero_fraction > 0.05
    assert (found.kind, found.zero_pattern) == ("quantization", "none")


def test_the_distance_of_packed_weights_is_that_of_what_they_stand_for(
    student: Student, teacher: Path
) -> None:
    found = inspect(student("nf4"), teacher)
    mine, theirs = PlainWeights(student("nf4")), Weights(teacher)
    difference = torch.cat([(mine[name] - theirs[name]).flatten() for name in theirs]).norm()
    norm = torch.cat([theirs[name].flatten() for name in theirs]).norm()
    assert found.weight_distance == pytest.approx(float(difference / norm), rel=1e-4)
    assert found.distance_by_layer == pytest.approx([0.09] * 4, abs=0.02)
    assert found.evidence[1] == "The config names the quantization method bitsandbytes."


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "torchao", "fp8"])
@pytest.mark.parametrize("damage", ["copy", "shallow"])
def test_weights_that_only_their_quantizer_reads_are_compared_with_nothing(
    method: str, damage: str, student: Student, teacher: Path, tmp_path: Path
) -> None:
    pack_strangely(student(damage), tmp_path / "student", method)
    found = inspect(tmp_path / "student", teacher)
    assert found.kind == ("quantization" if damage == "copy" else "pruning")
    assert found.layer_map == (SAME_LAYERS if damage == "copy" else [(0, 0), (1, 1), (2, 3)])
    assert found.weight_distance is None
    assert found.distance_by_layer == [0.0] * len(found.layer_map)
    assert (found.zero_fraction, found.zero_pattern) == (0.0, "none")
    assert f"The config names the quantization method {method}." in found.evidence
    assert "Only their quantizer can read" in found.evidence[0]


def pack_strangely(plain: Path, folder: Path, method: str) -> None:
    """The layout of `method`: block matrices under other names, or under their own as scaled bytes."""
    packed = {}
    for name in (weights := Weights(plain)):
        weight, stem = weights[name], name.removesuffix(".weight")
        if block_of(name) is None or weight.dim() != 2:
            packed[name] = weight
        elif method == "fp8":
            packed |= {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
        else:
            packed |= {f"{stem}.qweight": weight.int(), f"{stem}.scales": weight[:, :1].half()}
    folder.mkdir()
    save_file(packed, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))


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


def test_a_student_that_is_both_shallower_and_narrower_is_mapped_by_what_kept_its_shape(
    student: Student, teacher: Path, tmp_path: Path
) -> None:
    change(student("narrow"), tmp_path / "student", lambda model: injure.keep_blocks(model, [0, 2, 3]))
    found = inspect(tmp_path / "student", teacher)
    assert (found.kind, found.missing_layers) == ("pruning", 1)
    assert found.layer_map == [(0, 0), (1, 2), (2, 3)]


def test_a_shallower_student_whose_every_weight_has_another_shape_is_refused_in_a_sentence(
    make_model: MakeModel, teacher: Path, tmp_path: Path
) -> None:
    make_model(layers=2, hidden_size=16).save_pretrained(tmp_path / "student")
    with pytest.raises(IncompatibleModels, match="cannot be told apart"):
        inspect(tmp_path / "student", teacher)


def test_a_student_wider_than_its_teacher_is_refused(
    make_model: MakeModel, teacher: Path, tmp_path: Path
) -> None:
    make_model(intermediate_size=96).save_pretrained(tmp_path / "student")
    with pytest.raises(IncompatibleModels, match=r"96\), larger than its teacher's"):
        inspect(tmp_path / "student", teacher)


@pytest.mark.parametrize("smaller", ["narrow", "shallow"])
def test_zeros_of_a_smaller_student_are_counted_in_all_its_matrices(
    smaller: str, student: Student, teacher: Path, tmp_path: Path
) -> None:
    change(student(smaller), tmp_path / "student", cut_two_of_four)
    found = inspect(tmp_path / "student", teacher)
    assert (found.kind, found.zero_fraction) == ("pruning", 0.5)
    # 58 inputs are no multiple of four, so the pattern cannot hold in a narrow model's down_proj
    assert found.zero_pattern == ("2:4" if smaller == "shallow" else "unstructured")


def cut_two_of_four(model: PreTrainedModel) -> None:
    for linear in linears(model):
        fours = linear.weight.view(-1, 4)
        fours.scatter_(1, fours.abs().topk(2, dim=1, largest=False).indices, 0.0)


def linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def change(before: Path, after: Path, edit: Callable[[PreTrainedModel], None]) -> None:
    model = models.load(before)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(after)


def test_a_student_deeper_than_its_teacher_is_refused(
    make_model: MakeModel, teacher: Path, tmp_path: Path
) -> None:
    make_model(layers=5).save_pretrained(tmp_path / "student")
    with pytest.raises(IncompatibleModels, match="5 layers"):
        inspect(tmp_path / "student", teacher)
