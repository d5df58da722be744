"""A student that is taught by its own moving average: what is averaged, and who has which weights when."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import Prompt
from recoup_ml import models
from recoup_ml.moving_average import MovingAverage
from recoup_ml.objective import Divergence
from recoup_ml.observation import observe
from recoup_ml.plan import Phase, Plan, Trainable
from recoup_ml.rollouts import Room, rollouts
from recoup_ml.run import Run
from recoup_ml.sequences import Encoded, encode
from recoup_ml.team import ALONE
from recoup_ml.trainable import Trainee, prepare
from recoup_ml.training import Training, Watchers

LORA = Trainable(mode="lora", keep_zeros=False, rank=8, alpha=16, targets="all-linear", by_damage=False)
PLAN = Plan(
    damage="finetuning",
    method="self_demonstration",
    phases=(Phase("demonstrated", 6, 3e-3),),
    divergence=Divergence(),
    top_k=None,
    trainable=LORA,
    batch_size=4,
    start="student",
    output="adapter",
    choices=(),
    ema_rate=0.5,
)
FILE = "file-" + "0" * 24
IDS = torch.arange(3, 27).reshape(2, 12)
KINDS: dict[str, tuple[str, Trainable, torch.dtype]] = {
    "lora": ("copy", LORA, torch.float32),
    "dora": ("copy", replace(LORA, mode="dora"), torch.float32),
    "full": ("copy", replace(LORA, mode="full"), torch.float32),
    "norms": ("copy", replace(LORA, mode="norms"), torch.float32),
    "masked lora": ("pruned", replace(LORA, keep_zeros=True), torch.float32),
    "masked full": ("pruned", replace(LORA, mode="full", keep_zeros=True), torch.float32),
    "lora on packed weights": ("nf4", LORA, torch.float32),
    "lora in half precision": ("copy", LORA, torch.bfloat16),
    "full in half precision": ("copy", replace(LORA, mode="full"), torch.bfloat16),
}
MakeTrainee = Callable[[str], Trainee]


@pytest.fixture
def make_trainee(student: Callable[[str], Path]) -> MakeTrainee:
    def make(kind: str) -> Trainee:
        damage, trainable, dtype = KINDS[kind]
        model = models.load(student(damage))
        return prepare(model if dtype == torch.float32 else model.to(dtype), trainable, [1.0] * 4)

    return make


@pytest.fixture(params=KINDS)
def trainee(request: pytest.FixtureRequest, make_trainee: MakeTrainee) -> Trainee:
    return make_trainee(request.param)


def steps(trainee: Trainee, average: MovingAverage, count: int) -> Iterator[dict[str, Tensor]]:
    """The trained weights after each of so many steps on nothing in particular."""
    optimizer = torch.optim.AdamW(trainee.parameters, lr=1e-2)
    for _ in range(count):
        trainee.model(input_ids=IDS, labels=IDS).loss.backward()
        trainee.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        trainee.settle()
        average.renew()
        yield copied(trainee.named)


def copied(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    """All parameters, as the model has them, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    with parametrize.cached():
        return model.eval()(input_ids=IDS).logits


def test_it_begins_as_the_student_and_remembers_by_the_rate(trainee: Trainee) -> None:
    start, average = copied(trainee.named), MovingAverage(trainee, 0.25)
    assert different(average.named, start) == []
    one, two = steps(trainee, average, 2)
    for name, found in average.named.items():
        expected = 0.75**2 * start[name] + 0.75 * 0.25 * one[name] + 0.25 * two[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert len(different(average.named, start)) > len(start) / 2


def test_at_rate_one_it_is_the_student(trainee: Trainee) -> None:
    average = MovingAverage(trainee, 1.0)
    list(steps(trainee, average, 3))
    assert different(average.named, copied(trainee.named)) == []
    own = logits(trainee.model)
    with average.in_place() as model:
        assert torch.equal(logits(model), own)


def test_at_a_tiny_rate_it_stays_what_the_student_was(trainee: Trainee) -> None:
    average, before = MovingAverage(trainee, 1e-7), logits(trainee.model)
    list(steps(trainee, average, 3))
    moved = float((logits(trainee.model) - before).abs().max())
    with average.in_place() as model:
        assert float((logits(model) - before).abs().max()) < 1e-3 * moved


def test_in_place_the_averages_act_and_then_the_student_again(trainee: Trainee) -> None:
    average = MovingAverage(trainee, 0.25)
    list(steps(trainee, average, 3))
    trainee.model(input_ids=IDS, labels=IDS).loss.backward()
    own, mine, averages = logits(trainee.model), bits(trainee.model), copied(average.named)
    gradients = {name: weight.grad.clone() for name, weight in trainee.named.items()}
    with average.in_place() as model:
        acting = {name: value for name, value in bits(model).items() if name in averages}
        assert different(acting, {name: averages[name].to(acting[name].dtype) for name in acting}) == []
        assert not torch.equal(logits(model), own)
    assert different(bits(trainee.model), mine) == []
    assert different(average.named, averages) == []
    assert different({name: weight.grad for name, weight in trainee.named.items()}, gradients) == []
    assert torch.equal(logits(trainee.model), own)


def test_an_exception_in_the_middle_leaves_the_student_as_it_was(trainee: Trainee) -> None:
    average = MovingAverage(trainee, 0.25)
    list(steps(trainee, average, 3))
    mine, averages = bits(trainee.model), copied(average.named)
    with pytest.raises(MemoryError), average.in_place():
        raise MemoryError
    assert different(bits(trainee.model), mine) == []
    assert different(average.named, averages) == []


@pytest.mark.parametrize("kind", ["masked lora", "masked full"])
def test_what_is_pruned_is_zero_in_the_average_too(
    kind: str, make_trainee: MakeTrainee, student: Callable[[str], Path]
) -> None:
    trainee, before = make_trainee(kind), models.load(student("pruned"))
    average = MovingAverage(trainee, 0.25)
    list(steps(trainee, average, 3))
    with average.in_place() as model, parametrize.cached():
        for block, pruned in zip(model.model.layers, before.model.layers, strict=True):
            averaged, own = block.mlp.up_proj.weight, pruned.mlp.up_proj.weight
            assert torch.equal(averaged == 0, own == 0) and not torch.equal(averaged, own)


@pytest.fixture
def enter(
    make_run: Callable[..., Run], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Room]:
    """`enter(trainee, average, top_k)`: where a trainee is taught by that average, or by a frozen teacher."""

    def make(trainee: Trainee, average: MovingAverage | None, top_k: int | None = None) -> Room:
        rolled = {"temperature": 0.0, "refresh_steps": 3}
        method = {"type": "self_demonstration", "rollouts": rolled}
        run = make_run("copy", student={"source": "teacher"}, teach={"file": FILE}, method=method)
        return Room(run, replace(PLAN, top_k=top_k), trainee, tokenizer, tmp_path, ALONE, average)

    return make


@pytest.fixture
def questions(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[Encoded]:
    return encode(prompts[:12], tokenizer, 512)


def shown(questions: list[Encoded]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each question another one that the teacher sees: what it begins with, twice."""
    return {item.ids: (*item.ids[:3], *item.ids) for item in questions}


@pytest.mark.parametrize("kind", ["lora", "full", "full in half precision", "masked lora"])
def test_what_it_says_is_what_a_model_with_its_weights_would_say(
    kind: str, make_trainee: MakeTrainee, enter: Callable[..., Room], questions: list[Encoded]
) -> None:
    """The head too, where it trains: the lesson is learnt when the student has its own again."""
    trainee = make_trainee(kind)
    average = MovingAverage(trainee, 0.25)
    list(steps(trainee, average, 3))
    with ExitStack() as ends:
        lesson = rollouts(enter(trainee, average), questions, shown(questions), ends).next()
    seen = shown(questions)
    heard = [replace(item, prompt_ids=seen[item.prompt_ids]) for item in lesson.answers]
    with average.in_place() as model:
        expected = observe(model, heard, 0)
        head = copied({"head": expected.head.weight_VD})["head"]
    for target, hidden_ND in zip(lesson.targets, expected.hidden, strict=True):
        assert torch.equal(target.hidden_ND, hidden_ND)
        assert torch.equal(target.head.weight_VD, head)


def losses_in(room: Room, questions: list[Encoded], folder: Path) -> list[float]:
    """The losses of a training in that room."""
    silent = Watchers(lambda _model: 0.5, 0.0, lambda _point: None)
    work = Training(
        room.trainee, room.plan, 0, silent, 1.0, stops_early=False, best=folder, average=room.average
    )
    with ExitStack() as ends:
        work.run(room.plan.phases[0], rollouts(room, questions, shown(questions), ends))
    return [point.loss for point in work.report("student", 0, 0, None).curve]


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_at_a_tiny_rate_it_teaches_as_a_frozen_teacher_does(
    kind: str,
    top_k: int | None,
    make_trainee: MakeTrainee,
    enter: Callable[..., Room],
    questions: list[Encoded],
    tmp_path: Path,
) -> None:
    losses = []
    for rate in (None, 1e-9, 0.5):
        trainee = make_trainee(kind)
        average = rate and MovingAverage(trainee, rate)
        losses.append(losses_in(enter(trainee, average, top_k), questions, tmp_path / str(rate)))
    frozen, tiny, moving = losses
    assert tiny == pytest.approx(frozen, rel=1e-4)
    assert moving[0] == pytest.approx(frozen[0], rel=1e-4)
    assert moving[1:] != pytest.approx(frozen[1:], rel=1e-2)


def test_at_rate_one_the_student_as_it_is_scores_every_step(
    make_trainee: MakeTrainee, enter: Callable[..., Room], questions: list[Encoded]
) -> None:
    """Also where it answers for several steps at once."""
    trainee = make_trainee("full")
    average = MovingAverage(trainee, 1.0)
    with ExitStack() as ends:
        course = rollouts(enter(trainee, average), questions, {}, ends)
        course.next()
        for _ in steps(trainee, average, 2):
            lesson = course.next()
            own = observe(trainee.model.eval(), lesson.answers, 0)
            for target, hidden_ND in zip(lesson.targets, own.hidden, strict=True):
                assert torch.equal(target.hidden_ND, hidden_ND)
                assert torch.equal(target.head.weight_VD, own.head.weight_VD)
            trainee.model.train()
