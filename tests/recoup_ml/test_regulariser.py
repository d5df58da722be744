"""Terms that pull hidden states: right in value and slope, silent for equal models, felt by a student."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from recoup.schemas import AlignmentSpec, Report
from recoup_ml import models
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.feature_space import Moments
from recoup_ml.hidden import decoder_blocks
from recoup_ml.lessons import Lesson, distributions
from recoup_ml.models import can_pack, last_hidden
from recoup_ml.objective import Divergence
from recoup_ml.observation import observe
from recoup_ml.recipe import recover
from recoup_ml.regulariser import MOST_POSITIONS, Regulariser, cka, compared, distance, spread
from recoup_ml.run import Run
from recoup_ml.sequences import Answered, Batch, batches, packs
from recoup_ml.training import learn

pytestmark = pytest.mark.usefixtures("blank_pictures")
Student = Callable[[str], Path]
EVERY = [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pair(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 24, generator=draw, dtype=torch.float64)
    return x, torch.tanh(x @ torch.randn(24, 16, generator=draw, dtype=torch.float64))


@pytest.fixture
def piece(answered: list[Answered]) -> Batch:
    return next(batches(answered[:8], 0, 4096))


def regulariser(folder: Path, weight: float = 1.0, hidden_weight: float = 0.0, layers=EVERY) -> Regulariser:
    return Regulariser(models.load(folder), layers, weight, hidden_weight)


def terms_of(held: Regulariser, student, piece: Batch) -> Tensor:
    with held.beside(student, piece) as terms:
        last_hidden(student, piece.ids_BT, piece.mask_BT, piece.places_BT)
    return terms()


def test_it_is_the_debiased_cka_of_the_literature(pair: tuple[Tensor, Tensor]) -> None:
    moments = Moments(pair[0].mean(0), pair[1].mean(0))
    moments.add(*pair)
    assert cka(*pair).item() == pytest.approx(moments.cka(), abs=1e-12)


def test_independent_states_wider_than_many_are_unlike(draw: torch.Generator) -> None:
    x, y = torch.randn(2, 48, 1024, generator=draw)
    assert abs(cka(x, y).item()) < 0.1


def test_rotation_scale_and_shift_change_nothing(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    turned = 1e4 * x @ torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0] + 100
    assert cka(turned, y).item() == pytest.approx(cka(x, y).item(), abs=1e-9)


def test_a_shift_of_a_hundred_sigma_in_float32_changes_nothing(pair: tuple[Tensor, Tensor]) -> None:
    x, y = (side.float() for side in pair)
    assert cka(x + 100, y).item() == pytest.approx(cka(*pair).item(), abs=1e-4)


@pytest.mark.parametrize("term", [cka, distance])
def test_the_slope_of_a_term_is_that_of_its_differences(term, draw: torch.Generator) -> None:
    x, y = (torch.randn(9, 5, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(term, (x, y))


def test_the_slope_of_a_weight_is_that_of_its_differences(
    teacher: Path, student: Student, piece: Batch
) -> None:
    held = Regulariser(models.load(teacher).double(), EVERY, 0.7, 0.2)
    learner = models.load(student("finetuned")).double()
    weight = learner.model.layers[1].mlp.up_proj.weight
    terms_of(held, learner, piece).backward()
    direction, step = torch.randn_like(weight), 1e-3  # norms round to float32
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            sides.append(terms_of(held, learner, piece).item())
            weight.sub_(sign * step * direction)
    measured = (sides[0] - sides[1]) / (2 * step)
    assert (weight.grad * direction).sum().item() == pytest.approx(measured, rel=1e-3)


def test_equal_models_have_no_term_and_no_slope(teacher: Path, piece: Batch) -> None:
    held = Regulariser(models.load(teacher).double(), EVERY, 1.0, 1.0)
    same = models.load(teacher).double()
    terms = terms_of(held, same, piece)
    terms.backward()
    assert abs(terms.item()) < 1e-12
    slopes = [parameter.grad.abs().max() for parameter in same.parameters() if parameter.grad is not None]
    assert slopes and max(slopes) < 1e-10


def test_the_teacher_gets_no_gradient_and_no_hook_stays(
    teacher: Path, student: Student, piece: Batch
) -> None:
    held, learner = regulariser(teacher), models.load(student("finetuned"))
    terms_of(held, learner, piece).backward()
    assert all(parameter.grad is None for parameter in held.teacher.parameters())
    for model in (held.teacher, learner):
        blocks = decoder_blocks(model)
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_a_student_of_fewer_layers_is_compared_by_its_layer_map(
    teacher: Path, student: Student, piece: Batch
) -> None:
    shallow = models.load(student("shallow"))
    kept, cut = ((2, 2),), ((3, 4),)
    assert terms_of(regulariser(teacher, layers=kept), shallow, piece).item() == pytest.approx(0, abs=1e-5)
    assert terms_of(regulariser(teacher, layers=cut), shallow, piece).item() > 1e-3


def test_an_adapter_alone_gets_the_gradient(teacher: Path, student: Student, piece: Batch) -> None:
    learner = models.load(student("finetuned"))
    get_peft_model(learner, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    terms_of(regulariser(teacher), learner, piece).backward()
    with_slope = {name for name, parameter in learner.named_parameters() if parameter.grad is not None}
    assert with_slope and all("lora" in name for name in with_slope)


def test_packed_and_padded_sequences_are_read_alike(
    teacher: Path, student: Student, answered: list[Answered]
) -> None:
    held, learner = regulariser(teacher, hidden_weight=1.0), models.load(student("finetuned"))
    assert can_pack(learner)
    padded, packed = next(batches(answered[:6], 0, 4096)), next(packs(answered[:6], 4096))
    assert terms_of(held, learner, packed).item() == pytest.approx(
        terms_of(held, learner, padded).item(), rel=1e-4
    )


def test_massive_activations_decide_nothing(teacher: Path) -> None:
    held = regulariser(teacher, hidden_weight=1.0, layers=[(0, 0)])
    x, y = torch.randn(2, 60, 8)
    wild = y.clone()
    wild[7] = 1e4
    left = [torch.cat([side[:7], side[8:]]) for side in (x, y)]
    assert held.terms([x], [wild]).item() == pytest.approx(held.terms(*([side] for side in left)).item())


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_too_few_positions_have_no_term(teacher: Path, rows: int) -> None:
    states = [torch.randn(rows, 8)] * 5
    assert regulariser(teacher).terms(states, states).item() == 0.0


def test_states_that_do_not_vary_have_no_term_and_a_finite_slope(teacher: Path) -> None:
    still = torch.ones(10, 8, requires_grad=True)
    term = regulariser(teacher, hidden_weight=1.0, layers=[(0, 0)]).terms([still], [torch.ones(10, 8)])
    term.backward()
    assert term.item() == 0.0 and bool(still.grad.isfinite().all())


def test_long_pieces_are_thinned_evenly(piece: Batch) -> None:
    tiled = piece.answer_BT.repeat(1, 40)
    kept = spread(tiled)
    assert kept.sum() == MOST_POSITIONS and bool((tiled | ~kept).all())
    assert spread(piece.answer_BT) is piece.answer_BT


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        cka(torch.randn(5, 3), torch.randn(6, 3))


def test_blocks_are_named_by_the_students_numbers() -> None:
    layer_map = [(0, 0), (1, 1), (2, 3)]
    assert compared(AlignmentSpec(), layer_map) == [(1, 1), (2, 2), (3, 4)]
    assert compared(AlignmentSpec(layers=[2]), layer_map) == [(3, 4)]
    with pytest.raises(UnsupportedRequest):
        compared(AlignmentSpec(layers=[5]), layer_map)


@pytest.fixture
def lesson(teacher: Path, answered: list[Answered]) -> Lesson:
    return distributions(answered[:8], observe(models.load(teacher), answered[:8], 0), None, 1.0)


def gradient(student: Path, lesson: Lesson, tokens: int, held: Regulariser | None) -> tuple[float, Tensor]:
    model = models.load(student)
    value = learn(model, lesson, Divergence(), batches(lesson.answers, 0, tokens), held)
    return value, slope_of(model)


def slope_of(model: PreTrainedModel) -> Tensor:
    """All gradients one after another; zeros where there is none."""
    return torch.cat([(p.grad if p.grad is not None else 0 * p).flatten() for p in model.parameters()])


def test_a_step_adds_its_gradient_and_leaves_the_reported_divergence(
    teacher: Path, student: Student, lesson: Lesson
) -> None:
    plain, slope = gradient(student("finetuned"), lesson, 4096, None)
    held = regulariser(teacher, 0.5)
    value, pulled = gradient(student("finetuned"), lesson, 4096, held)
    model = models.load(student("finetuned"))
    terms_of(held, model, next(batches(lesson.answers, 0, 4096))).backward()
    assert value == pytest.approx(plain)
    assert (slope + slope_of(model) - pulled).abs().max() < 1e-5 * pulled.abs().max()


def test_pieces_count_by_their_share_of_positions(teacher: Path, student: Student, lesson: Lesson) -> None:
    held = Regulariser(models.load(teacher), EVERY, 0.0, 1.0)
    _, whole = gradient(student("finetuned"), lesson, 4096, held)
    _, parts = gradient(student("finetuned"), lesson, 64, held)
    assert torch.cosine_similarity(whole, parts, dim=0) > 0.98


def test_a_recovery_with_it_comes_nearer_inside_and_says_so(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    training = {"steps": 24, "mode": "full", "learning_rate": 1e-3, "stop_early": False}
    found = {}
    for weight in (0.0, 3.0):
        journal = open_journal(tmp_path / str(weight))
        asked = {"weight": weight, "hidden_weight": weight}
        recover(make_run("finetuned", training=training, alignment=asked), journal)
        report = Report.model_validate_json(journal.published["report.json"].read_text())
        found[weight] = report
        script = journal.published["recipe.py"].read_text()
        assert ("leaves them out" in " ".join(script.split())) == (weight > 0)
    plain, pulled = found[0.0], found[3.0]
    assert pulled.alignment.headroom_recovered_mean.value > plain.alignment.headroom_recovered_mean.value
    assert pulled.training.phases[0].objective == "forward_kl + 3 (1 - CKA) + 3 hidden distance"
    assert plain.training.phases[0].objective == "forward_kl"
    assert all(math.isfinite(point.loss) for point in pulled.training.curve)
