"""Repairs without training: what each does to weights, what it must never do, and that it helps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from recoup.schemas import DamageReport
from recoup_ml import damage, layout, low_rank, models, reconstruct, repair, stream, update
from recoup_ml.errors import UnsupportedModel
from recoup_ml.observation import observe
from recoup_ml.reconstruct import refit
from recoup_ml.repair import Repair
from recoup_ml.scores import compare
from recoup_ml.sequences import Answered
from recoup_ml.stream import Stream, calibrated, calibration
from recoup_ml.weights import block_of

Student = Callable[[str], Path]


@pytest.fixture
def repaired(student: Student, teacher: Path, answered: list[Answered]) -> Callable[..., PreTrainedModel]:
    """`repaired("pruned", "reconstruct", 1.0)`: that student with that repair."""

    def make(name: str, method: str, strength: float) -> PreTrainedModel:
        model = models.load(student(name))
        found = damage.inspect(student(name), teacher)
        fit = fitted(Repair(method, strength), student(name), teacher, found, answered)
        repair.apply(Repair(method, strength), model, teacher, found, fit)
        return model

    return make


def fitted(
    chosen: Repair, student: Path, teacher: Path, found: DamageReport, answered: list[Answered]
) -> dict[str, torch.Tensor]:
    return repair.fit(chosen, models.load(student), teacher, found, answered[:32], 0)


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def close(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in theirs)


def kl(model: PreTrainedModel, healthy: PreTrainedModel, answers: list[Answered]) -> float:
    teacher = observe(healthy, answers, 0)
    return compare(teacher, observe(model, answers, 0), answers).mean_kl


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("finetuning", {"interpolate", "spectral", "restore_layers"}),
        ("none", {"interpolate", "spectral", "restore_layers"}),
        ("quantization", {"low_rank_patch"}),
        ("pruning", {"reconstruct"}),
    ],
)
def test_every_damage_has_its_repairs(kind: str, names: set[str]) -> None:
    tried = repair.candidates(kind)
    assert {item.name for item in tried} == names
    assert len({item.label for item in tried}) == len(tried)


def test_interpolation_goes_from_the_teacher_to_the_student(
    repaired: Callable[..., PreTrainedModel], student: Student, healthy: PreTrainedModel
) -> None:
    tuned = models.load(student("finetuned"))
    assert close(repaired("finetuned", "interpolate", 0.0), healthy)
    assert close(repaired("finetuned", "interpolate", 1.0), tuned)
    half, mine, theirs = (tensors(m) for m in (repaired("finetuned", "interpolate", 0.5), tuned, healthy))
    assert all(torch.allclose(half[name], (mine[name] + theirs[name]) / 2, atol=1e-6) for name in half)


def test_restoring_every_layer_leaves_only_what_is_outside_them(
    repaired: Callable[..., PreTrainedModel], student: Student, healthy: PreTrainedModel
) -> None:
    found, mine, theirs = (
        tensors(m)
        for m in (repaired("finetuned", "restore_layers", 1.0), models.load(student("finetuned")), healthy)
    )
    for name, tensor in found.items():
        assert torch.equal(tensor, mine[name] if block_of(name) is None else theirs[name])


def test_the_layers_that_are_restored_are_the_furthest(
    repaired: Callable[..., PreTrainedModel], student: Student, teacher: Path, healthy: PreTrainedModel
) -> None:
    distances = damage.inspect(student("finetuned"), teacher).distance_by_layer
    found, theirs = tensors(repaired("finetuned", "restore_layers", 0.25)), tensors(healthy)
    restored = {
        block_of(name)
        for name in found
        if block_of(name) is not None and torch.equal(found[name], theirs[name])
    }
    assert restored == {distances.index(max(distances))}


def test_a_planted_update_is_told_from_noise() -> None:
    torch.manual_seed(0)
    planted = 3 * torch.randn(96, 2) @ torch.randn(2, 64)
    noise = torch.randn(96, 64)
    found = update.signal(planted + noise)
    assert torch.linalg.matrix_rank(found) == 2
    assert (found - planted).norm() < 0.5 * noise.norm()
    assert update.signal(noise).norm() < 0.2 * noise.norm()
    assert torch.allclose(update.signal((planted + noise).T).T, found, atol=1e-4)


def test_the_threshold_is_that_of_the_paper() -> None:
    """arXiv 1305.5870, table IV: ω(1) = 2.858, ω(0.5) = 2.1711 (their rational fit is within 0.02)."""
    assert update.noise_factor(1.0) == pytest.approx(2.858, abs=2e-3)
    for ratio in (0.1, 0.3, 0.5, 0.8):
        fit = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
        assert update.noise_factor(ratio) == pytest.approx(fit, abs=0.02)


def weighted_error(error_OI: torch.Tensor, moment_II: torch.Tensor) -> float:
    return float((error_OI @ moment_II * error_OI).sum())


def test_a_patch_takes_the_most_of_the_error_that_its_rank_can() -> None:
    """Against the closed form: the error that stays is the tail of the spectrum of E C^½."""
    torch.manual_seed(1)
    inputs, error = torch.randn(200, 24) @ torch.randn(24, 24), torch.randn(32, 24)
    moment = inputs.T @ inputs
    spectrum = torch.linalg.eigvalsh(error.double() @ moment.double() @ error.T.double()).flip(0)
    left = [weighted_error(error, moment)]
    for rank in (1, 4, 12, 24):
        patch = low_rank.low_rank_patch(error, moment, rank)
        left.append(weighted_error(error - patch.b_OR @ patch.a_RI, moment))
        assert left[-1] == pytest.approx(float(spectrum[rank:].sum()), rel=2e-2, abs=1e-2 * left[0])
    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-4 * left[0]


def test_a_patch_brings_a_rounded_student_nearer(
    repaired: Callable[..., PreTrainedModel],
    student: Student,
    healthy: PreTrainedModel,
    answered: list[Answered],
) -> None:
    before = kl(models.load(student("rounded")), healthy, answered[32:])
    assert kl(repaired("rounded", "low_rank_patch", 8), healthy, answered[32:]) < 0.7 * before


@pytest.mark.parametrize("name", ["rounded", "nf4"])
def test_a_patch_is_the_same_as_an_adapter(
    name: str,
    repaired: Callable[..., PreTrainedModel],
    student: Student,
    teacher: Path,
    answered: list[Answered],
) -> None:
    found, model = damage.inspect(student(name), teacher), models.load(student(name))
    before = tensors(models.load(student(name)))
    fit = fitted(Repair("low_rank_patch", 8), student(name), teacher, found, answered)
    adapted = repair.as_adapter(model, fit)
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.inference_mode():
        in_place = repaired(name, "low_rank_patch", 8)(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, in_place, rtol=1e-3, atol=1e-3)
    plain = {
        key.replace(".base_layer", ""): value for key, value in tensors(model).items() if "lora" not in key
    }
    assert all(torch.equal(plain[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["pruned-2:4", "wanda-24", "narrow", "shallow"])
def test_reconstruction_brings_a_pruned_student_nearer(
    name: str,
    repaired: Callable[..., PreTrainedModel],
    student: Student,
    healthy: PreTrainedModel,
    answered: list[Answered],
) -> None:
    cut, mended = models.load(student(name)), repaired(name, "reconstruct", 1.0)
    assert kl(mended, healthy, answered) < 0.95 * kl(cut, healthy, answered)


@pytest.mark.parametrize("name", ["pruned", "pruned-2:4"])
def test_reconstruction_keeps_the_zeros(
    name: str, repaired: Callable[..., PreTrainedModel], student: Student
) -> None:
    before, after = tensors(models.load(student(name))), tensors(repaired(name, "reconstruct", 1.0))
    for key in before:
        if block_of(key) is not None and before[key].dim() == 2:
            assert not torch.equal(after[key], before[key])
            assert torch.equal(after[key] == 0, before[key] == 0)
            assert not torch.signbit(after[key][after[key] == 0]).any()


def test_reconstruction_has_nothing_to_mend_in_the_teacher_itself(
    repaired: Callable[..., PreTrainedModel], healthy: PreTrainedModel
) -> None:
    mended, before = tensors(repaired("copy", "reconstruct", 1.0)), tensors(healthy)
    assert all(torch.allclose(mended[name], before[name], atol=1e-4) for name in before)


@pytest.mark.parametrize("name", ["pruned", "narrow"])
def test_the_stream_behind_a_fitted_block_is_what_the_block_makes_of_it(
    name: str, student: Student, healthy: PreTrainedModel, answered: list[Answered]
) -> None:
    model, texts = models.load(student(name)), calibration(answered[:12], 0)
    here, there, block = Stream(model, texts), Stream(healthy, texts), model.model.layers[0]
    there.advance(0)
    before = block.mlp.down_proj.weight.detach().clone()
    with torch.no_grad():
        behind = reconstruct._fit_to_stream(here, there, 0, block, block.mlp.down_proj, 1.0)
    assert not torch.allclose(block.mlp.down_proj.weight, before, atol=1e-3)
    for found_BTD, expected_BTD, mask_BT in zip(behind, here.after(0), here.masks_BT, strict=True):
        torch.testing.assert_close(found_BTD[mask_BT], expected_BTD[mask_BT], rtol=1e-4, atol=1e-4)


def test_survivors_are_fitted_as_least_squares_would() -> None:
    """Row by row against the normal equations on each row's own support."""
    torch.manual_seed(2)
    inputs = torch.randn(300, 16) @ torch.randn(16, 16)
    moment, theirs = inputs.T @ inputs, torch.randn(8, 16)
    pruned = theirs * (torch.rand(8, 16) > 0.5)
    pull, ridge = (theirs - pruned) @ moment, 0.1 * moment.diagonal()
    found = refit(pruned, pull, moment, 0.1)
    for row in range(8):
        kept = pruned[row] != 0
        system = (moment[kept][:, kept] + torch.diag(ridge[kept])).double()
        right = (theirs[row] @ moment)[kept] + ridge[kept] * pruned[row][kept]
        torch.testing.assert_close(
            found[row][kept].double(), torch.linalg.solve(system, right.double()), rtol=1e-2, atol=1e-2
        )
        assert (found[row][~kept] == 0).all()


def test_a_stream_is_the_model_block_by_block(healthy: PreTrainedModel, answered: list[Answered]) -> None:
    texts = [*calibration(answered[:6], 0), *calibration(answered[6:12], 0)]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in healthy.modules())
    stream = Stream(healthy, texts)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in healthy.modules())
    assert not any("forward" in vars(block) for block in healthy.model.layers)
    with torch.inference_mode():
        whole = [
            healthy.model(
                input_ids=batch.ids_BT, attention_mask=batch.mask_BT, output_hidden_states=True
            ).hidden_states
            for batch in texts
        ]
    for block in range(3):
        stream.advance(block)
        for batch, hidden_BTD, expected in zip(texts, stream.hidden_BTD, whole, strict=True):
            seen = batch.mask_BT.bool()
            torch.testing.assert_close(hidden_BTD[seen], expected[block + 1][seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rounded", "wanda", "narrow"])
def test_what_all_texts_begin_with_counts_once(
    name: str,
    teacher: Path,
    student: Student,
    answered: list[Answered],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fit on a row where it stands once is that on whole sequences."""
    system = (11, 12, 13, 14, 15, 16, 17, 18)
    texts = [replace(item, prompt_ids=system + item.prompt_ids) for item in answered[:12]]
    found = damage.inspect(student(name), teacher)
    chosen = Repair("low_rank_patch" if name == "rounded" else "reconstruct", 1.0)
    assert all(batch.shared >= 8 for batch in calibration(texts, 0, models.load(teacher)))
    once = fitted(chosen, student(name), teacher, found, texts)
    monkeypatch.setattr(layout, "LEAST_SHARED", 2.0)
    apart = fitted(chosen, student(name), teacher, found, texts)
    assert once.keys() == apart.keys()
    for key, tensor in apart.items():
        torch.testing.assert_close(once[key], tensor, rtol=1e-2, atol=1e-3)


def test_a_fit_sees_the_first_texts_that_have_room(
    answered: list[Answered], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = sum(map(len, answered[:5]))
    for tokens, count in ((room, 5), (room - 1, 4), (0, 1)):
        monkeypatch.setattr(stream, "CALIBRATION_TOKENS", tokens)
        assert calibrated(answered) == count
        assert sum(len(batch.rows) for batch in calibration(answered, 0)) == count


def test_a_family_without_linear_layers_is_refused(teacher: Path, answered: list[Answered]) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    found = DamageReport.model_construct(
        kind="pruning", layer_map=[(0, 0), (1, 1)], distance_by_layer=[0.0, 0.0]
    )
    with pytest.raises(UnsupportedModel, match=r"no torch\.nn\.Linear"):
        repair.fit(Repair("reconstruct", 1.0), model, teacher, found, answered[:8], 0)
