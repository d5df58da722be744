"""Two models compared on batches of text, as an outsider would do it."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from recoup_ml import cka
from recoup_ml.feature_space import Moments

VOCABULARY, WORD = 96, 40
Batch = dict[str, Tensor]


def llama(layers: int = 3, width: int = 24, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).eval()


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def student(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """The teacher with noise in every matrix."""
    model = llama()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    return model


def texts(batches: int = 24, size: int = 6, length: int = 20, fill: int = 0) -> list[Batch]:
    """Random texts of differing lengths, padded on the right with `fill`."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(batches):
        ids = torch.randint(4, VOCABULARY, (size, length), generator=draw)
        ends = torch.randint(length // 2, length + 1, (size, 1), generator=draw)
        mask = (torch.arange(length) < ends).long()
        found.append({"input_ids": ids * mask + fill * (1 - mask), "attention_mask": mask})
    return found


@pytest.fixture(scope="module")
def found(student: PreTrainedModel, teacher: PreTrainedModel) -> cka.Alignment:
    return cka.align(student, teacher, texts(), groups=8)


def test_a_model_is_perfectly_aligned_with_itself(teacher: PreTrainedModel) -> None:
    same = cka.align(teacher, teacher, texts(), groups=8)
    assert np.diag(same.matrix) == pytest.approx(1.0, abs=1e-6)
    assert same.ceiling == pytest.approx([1.0] * 4, abs=1e-3)
    assert max(map(abs, same.floor)) < 0.2
    assert [row.relative_l2 for row in same.geometry] == [0.0] * 4
    assert [row.cosine for row in same.geometry] == pytest.approx([1.0] * 4)


def test_a_damaged_model_lies_between_floor_and_ceiling(found: cka.Alignment) -> None:
    for interval, ceiling, floor in zip(found.diagonal, found.ceiling, found.floor, strict=True):
        assert floor < interval.low < interval.value < interval.high
        assert interval.value < ceiling
        assert 0 < interval.se < 0.1
    relative = [row.relative_l2 for row in found.geometry]
    assert relative == sorted(relative)
    assert found.problems == ()


def test_its_diagonal_and_intervals_are_entries_of_its_matrix(found: cka.Alignment) -> None:
    assert [interval.value for interval in found.diagonal] == list(np.diag(found.matrix))
    assert found.interval(-1, 0).value == found.matrix[-1, 0]


def test_what_stands_in_the_padding_changes_nothing(
    student: PreTrainedModel, teacher: PreTrainedModel, found: cka.Alignment
) -> None:
    other = cka.align(student, teacher, texts(fill=VOCABULARY - 1), groups=8)
    assert np.array_equal(other.matrix, found.matrix)


def test_a_pilot_is_run_twice_and_counted_once(found: cka.Alignment) -> None:
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in texts()])
    assert found.texts == len(lengths) == 144
    assert found.tokens + found.dropped_first + found.dropped_outliers == int(lengths.sum())
    assert found.dropped_first == 144


def test_parts_in_one_frame_add_up_to_the_whole(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    batches = texts()
    whole = cka.align(student, teacher, batches, groups=8, controls=False)
    whole.save(tmp_path / "whole.safetensors")
    frames = cka.Alignment.load(tmp_path / "whole.safetensors").frames
    parts = [
        cka.align(student, teacher, part, pilot=frames, groups=8, controls=False, tokens=99)
        for part in (batches[:16], batches[16:])
    ]
    both = parts[0] + parts[1]
    np.testing.assert_allclose(both.matrix, whole.matrix, rtol=1e-6)
    assert (both.texts, both.tokens, both.dropped_first) == (144, whole.tokens, whole.dropped_first)
    for mine, theirs in zip(both.geometry, whole.geometry, strict=True):
        np.testing.assert_allclose([*vars(mine).values()], [*vars(theirs).values()], rtol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_an_alignment_is_the_same_after_a_file(
    student: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path, pooled: bool
) -> None:
    found = cka.align(student, teacher, texts(), groups=8, pooled=pooled)
    found.save(tmp_path / "alignment.safetensors")
    again = cka.Alignment.load(tmp_path / "alignment.safetensors")
    assert again.to_json() == found.to_json()
    assert again.positions_sha256 == found.positions_sha256
    assert again.to_json() != (again + found).to_json()


def test_parts_that_were_not_measured_alike_are_not_added(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    batches = texts()
    first = cka.align(student, teacher, batches[:16], groups=8, controls=False)
    others = [
        cka.align(student, teacher, batches[16:], groups=8, controls=False),
        cka.align(student, teacher, batches[16:], groups=8, controls=True, pilot=first.frames),
        cka.align(student, teacher, batches[16:], groups=8, controls=False, pooled=True, pilot=first.frames),
        cka.align(
            student, teacher, batches[16:], groups=8, controls=False, layer_map=[(0, 0)], pilot=first.frames
        ),
    ]
    for other in others:
        with pytest.raises(ValueError, match="in the frames of one pilot"):
            first + other


def test_texts_by_their_means_are_the_exact_value_over_texts(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    batches = texts(batches=6)
    found = cka.align(student, teacher, batches, groups=36, controls=False, pooled=True, tokens=99)
    sides: list[list[Tensor]] = [[], []]
    for batch in batches:
        for model, side in zip((student, teacher), sides, strict=True):
            hidden_BTD = deepcopy(model)(**batch, output_hidden_states=True).hidden_states[2].detach()
            counts_BT = batch["attention_mask"].clone()
            counts_BT[:, 0] = 0
            side.append((hidden_BTD * counts_BT[..., None]).sum(1) / counts_BT.sum(1, keepdim=True))
    x, y = (torch.cat(side) for side in sides)
    moments = Moments(x.double().mean(0), y.double().mean(0))
    moments.add(x, y)
    assert found.dropped_outliers == 0
    assert found.matrix[2, 2] == pytest.approx(moments.cka(), abs=1e-5)


def test_pooled_lies_between_its_floor_and_its_ceiling_and_adds_up(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    batches = texts()
    whole = cka.align(student, teacher, batches, groups=8, pooled=True)
    first = cka.align(student, teacher, batches[:16], groups=8, pooled=True, tokens=99, pilot=whole.frames)
    second = cka.align(student, teacher, batches[16:], groups=8, pooled=True, tokens=99, pilot=whole.frames)
    np.testing.assert_allclose((first + second).matrix, whole.matrix, rtol=1e-5)
    for interval, floor, ceiling in zip(whole.diagonal, whole.floor, whole.ceiling, strict=True):
        assert floor < interval.value < ceiling + 1e-3
        assert interval.low < interval.value < interval.high
    assert abs(whole.floor[-1]) < 0.3 and whole.with_outliers[-1] == pytest.approx(
        whole.diagonal[-1].value, abs=0.1
    )


def test_too_few_texts_cannot_be_pooled(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="4 are left"):
        _ = cka.align(student, teacher, texts(batches=1, size=4), controls=False, pooled=True).matrix


def test_no_more_tokens_of_a_text_are_taken_than_asked(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    few = cka.align(student, teacher, texts(), tokens=3, groups=8, controls=False)
    assert few.tokens + few.dropped_first + few.dropped_outliers == 3 * few.texts
    assert few.ceiling is None
    assert few.floor is None


def test_the_seed_alone_chooses_the_tokens(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    first, again, other = (
        cka.align(student, teacher, texts(), tokens=3, seed=seed, controls=False) for seed in (0, 0, 1)
    )
    assert first.to_json() == again.to_json()
    assert first.positions_sha256 == again.positions_sha256 != other.positions_sha256


def test_a_completion_alone_can_count(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    batches = [batch | {"completion_mask": batch["attention_mask"].roll(4, 1)} for batch in texts()]
    for batch in batches:
        batch["completion_mask"][:, :4] = 0
    part = cka.align(student, teacher, batches, groups=8, controls=False)
    counted = sum(int((b["attention_mask"] * b["completion_mask"]).sum()) for b in batches)
    assert part.tokens + part.dropped_outliers == counted
    assert part.dropped_first == 0


def test_massive_activations_decide_nothing_once_dropped() -> None:
    """Unrelated models that both blow up at one word: with it they look alike, without it they do not."""
    models = [llama(seed=11), llama(seed=12)]
    with torch.no_grad():
        for model in models:
            model.get_input_embeddings().weight[WORD] = 400.0
    batches = texts()
    for batch in batches:
        batch["input_ids"][:, 5] = WORD
    found = cka.align(*models, batches, groups=8, controls=False)
    assert found.dropped_outliers >= found.texts
    assert min(found.with_outliers) > 0.9
    assert max(interval.value for interval in found.diagonal) < 0.5


def test_models_of_other_depth_need_to_be_told_which_layers_correspond(teacher: PreTrainedModel) -> None:
    shallow = llama(layers=2)
    with pytest.raises(ValueError, match="give a layer_map"):
        cka.align(shallow, teacher, texts())
    found = cka.align(shallow, teacher, texts(), layer_map=[(0, 0), (1, 1), (2, 3)], groups=8)
    assert found.matrix.shape == (3, 4)
    assert found.diagonal[2].value == found.matrix[2, 3]
    with pytest.raises(ValueError, match="layers below 3 and 4"):
        cka.align(shallow, teacher, texts(), layer_map=[(3, 3)])


def test_models_of_other_width_have_no_distance_in_a_shared_basis(teacher: PreTrainedModel) -> None:
    found = cka.align(llama(width=32), teacher, texts(), groups=8)
    assert found.matrix.shape == (4, 4)
    assert all(math.isnan(row.relative_l2) and row.teacher_norm > 0 for row in found.geometry)


def test_an_adapter_on_the_student_is_seen(teacher: PreTrainedModel) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(llama(), config).eval()
    found = cka.align(adapted, teacher, texts(), groups=8, controls=False)
    assert found.diagonal[0].value == pytest.approx(1.0, abs=1e-6)
    assert found.diagonal[-1].value < 0.999


def test_other_families_are_read_too() -> None:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(shape).eval()
    found = cka.align(model, model, texts(), groups=8, controls=False)
    assert np.diag(found.matrix) == pytest.approx(1.0, abs=1e-6)


def test_layers_that_do_not_vary_are_undefined_and_say_so(teacher: PreTrainedModel) -> None:
    dull = llama()
    with torch.no_grad():
        dull.get_input_embeddings().weight.fill_(1.0)
    found = cka.align(dull, teacher, texts(), groups=8, controls=False)
    assert math.isnan(found.matrix[0, 0])
    assert "undefined for the student's layers 0" in " ".join(found.problems)
    assert json.loads(found.to_json())["layers"][0]["cka"] is None


def test_few_texts_are_named_as_a_problem(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    found = cka.align(student, teacher, texts(batches=3))
    few_groups, few_texts = found.problems
    assert "intervals need" in few_groups
    assert "from 18 texts" in few_texts
    assert math.isnan(found.diagonal[0].se)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "B of 2 or more"),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 3)},
            "masks of that shape",
        ),
    ],
)
def test_a_batch_that_cannot_be_compared_is_refused(
    batch: Batch, message: str, teacher: PreTrainedModel
) -> None:
    with pytest.raises(ValueError, match=message):
        cka.align(teacher, teacher, [batch])


def test_nothing_is_left_on_the_models_after_an_error(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    def broken() -> Iterator[Batch]:
        yield from texts(batches=1)
        yield {"input_ids": torch.full((2, 4), VOCABULARY)}

    with pytest.raises(IndexError):
        cka.align(student, teacher, broken())
    for model in (student, teacher):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    with pytest.raises(ValueError, match="no batch"):
        cka.align(student, teacher, [])


def test_progress_is_told_text_by_text(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    told: list[int] = []
    cka.align(student, teacher, texts(batches=4), controls=False, tick=told.append)
    assert told == [6, 12, 18, 24]


def test_it_is_written_as_json_csv_and_pictures(found: cka.Alignment, tmp_path: Path) -> None:
    content = json.loads(found.to_json())
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [float(row["cka"]) for row in rows] == [row["cka"] for row in content["layers"]]
    assert np.array(content["matrix"]).shape == (4, 4)
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        found.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert "student" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("changed", [lambda x: 1e4 * x, lambda x: 1e-4 * x, lambda x: x + 50.0])
def test_scale_and_shift_of_a_model_change_nothing(
    changed: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applied to every state that is read of the student."""
    from recoup_ml import paired_states

    student, teacher = llama(seed=5), llama()
    plain = cka.align(student, teacher, texts(), groups=8, controls=False).matrix
    read = paired_states.read

    def moved(model: PreTrainedModel, chosen: paired_states.Chosen) -> list[Tensor]:
        return [changed(state) for state in read(model, chosen)] if model is student else read(model, chosen)

    monkeypatch.setattr(cka, "read", moved)
    other = cka.align(student, teacher, texts(), groups=8, controls=False).matrix
    np.testing.assert_allclose(other, plain, atol=1e-4)
