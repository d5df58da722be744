"""The training loop: repeatable, downhill, true to the plain gradient, and careful with zeros."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from recoup.schemas import ChatRow, Checkpoint, TrainingPoint, TrainingReport
from recoup_ml import models, training
from recoup_ml.generate import LocalEngine
from recoup_ml.lessons import FixedCourse, Lesson, distributions, texts
from recoup_ml.mismatch import weights
from recoup_ml.objective import Divergence
from recoup_ml.observation import observe
from recoup_ml.plan import Phase, Plan, Trainable
from recoup_ml.room import Room
from recoup_ml.scores import compare
from recoup_ml.sequences import Answered, batches, encode, packs, shared_tokens
from recoup_ml.tickets import ticket_rows
from recoup_ml.trainable import prepare
from recoup_ml.training import Training, Watchers, learn, rate_share, validation_steps
from recoup_ml.weights import Weights, block_of, zeros_filled

Student = Callable[[str], Path]

LORA = Trainable(mode="lora", keep_zeros=False, rank=8, alpha=16, targets="all-linear", by_damage=False)
PLAN = Plan(
    damage="finetuning",
    method="off_policy",
    phases=(Phase("teacher", 12, 3e-3),),
    divergence=Divergence(),
    top_k=None,
    trainable=LORA,
    batch_size=8,
    start="student",
    output="adapter",
    choices=(),
)


def planned(plan: Plan, **changes: object) -> Plan:
    """`planned(PLAN, steps=1, learning_rate=…, mode="full", rank=2, …)`: changes, wherever they belong."""
    fields = {name: changes.pop(name) for name in ("steps", "learning_rate") if name in changes}
    what = {name: changes.pop(name) for name in list(changes) if hasattr(plan.trainable, name)}
    return replace(
        plan,
        phases=tuple(replace(phase, **fields) for phase in plan.phases),
        trainable=replace(plan.trainable, **what),
        **changes,
    )


FULL = planned(PLAN, mode="full", output="merged", learning_rate=1e-3)
MODES = pytest.mark.parametrize("plan", [PLAN, FULL], ids=["lora", "full"])


@pytest.fixture(scope="module")
def lesson(healthy: PreTrainedModel, answered: list[Answered]) -> Lesson:
    return taught(healthy, answered[:32])


@pytest.fixture(scope="module")
def exam(healthy: PreTrainedModel, answered: list[Answered]) -> Lesson:
    return taught(healthy, answered[32:])


def taught(model: PreTrainedModel, answers: list[Answered], top_k: int | None = None) -> Lesson:
    """The lesson of a model on answers."""
    return distributions(answers, observe(model, answers, 0), top_k, 1.0)


def kl(model: PreTrainedModel, lesson: Lesson) -> float:
    seen = observe(model, lesson.answers, 0)
    teacher = replace(
        seen, hidden=[target.hidden_ND for target in lesson.targets], head=lesson.targets[0].head
    )
    return compare(teacher, seen, lesson.answers).mean_kl


@dataclass(frozen=True)
class Trained:
    report: TrainingReport
    best: Path
    told: list[TrainingPoint | Checkpoint]


@pytest.fixture
def trained(exam: Lesson, tmp_path: Path) -> Callable[..., Trained]:
    """`trained(folder, [lesson], plan)`: a folder's student after training, its best checkpoint saved."""

    def run(
        folder: Path, lessons: Sequence[Lesson], plan: Plan = PLAN, seed: int = 0, repaired: bool = False
    ) -> Trained:
        told: list[TrainingPoint | Checkpoint] = []
        best = tmp_path / f"best-{len(list(tmp_path.iterdir()))}"
        watchers = Watchers(lambda model: kl(model, exam), 0.0, told.append)
        student = models.load(folder)
        trainee = prepare(student, plan.trainable, [1.0] * 4, seed)
        before = kl(student, exam)
        work = Training(trainee, plan, 0, watchers, before, stops_early=False, best=best, repaired=repaired)
        first, *kept = (FixedCourse(lesson, plan.batch_size, seed) for lesson in lessons)
        for course in kept:
            work.keep(course)
        for phase in plan.phases:
            work.run(phase, first)
        return Trained(work.report("student", 0, 0, None), best, told)

    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = Weights(folder)
    return {name: weights[name] for name in weights}


def same(one: Path, other: Path) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@MODES
def test_a_seed_gives_the_same_weights_twice(
    plan: Plan, student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    first, again, other = (trained(student("finetuned"), [lesson], plan, seed) for seed in (0, 0, 1))
    assert same(first.best, again.best)
    assert first.report.curve == again.report.curve
    assert first.report.checkpoints == again.report.checkpoints
    assert not same(first.best, other.best)


def test_a_repair_that_training_makes_worse_is_what_is_kept(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    wild = planned(FULL, learning_rate=30.0, steps=4)
    kept = trained(student("finetuned"), [lesson], wild, repaired=True)
    assert [point.step for point in kept.report.checkpoints if point.chosen] == [0]
    assert same(kept.best, student("finetuned"))
    worse = trained(student("finetuned"), [lesson], wild)
    assert [point.step for point in worse.report.checkpoints if point.chosen] != [0]
    assert not same(worse.best, student("finetuned"))


@MODES
def test_layers_that_are_run_again_learn_the_same(
    plan: Plan,
    student: Student,
    lesson: Lesson,
    trained: Callable[..., Trained],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[nn.Module] = []
    short = planned(plan, steps=3)
    counting = register_module_forward_pre_hook(
        lambda module, _: runs.append(module) if isinstance(module, LlamaMLP) else None
    )
    try:
        kept = trained(student("finetuned"), [lesson], short)
        once = len(runs)
        monkeypatch.setattr(training, "room_for", lambda *_, may_recompute: Room(256, may_recompute))
        again = trained(student("finetuned"), [lesson], short)
    finally:
        counting.remove()
    assert len(runs) - once > once
    assert same(kept.best, again.best)


@MODES
def test_the_loss_falls_on_what_is_learnt_and_on_what_is_not(
    plan: Plan, student: Student, lesson: Lesson, exam: Lesson, trained: Callable[..., Trained]
) -> None:
    before = models.load(student("forgetful"))
    found = trained(student("forgetful"), [lesson], plan)
    after = models.load_trained(student("forgetful"), found.best)
    assert kl(after, lesson) < 0.6 * kl(before, lesson)
    assert kl(after, exam) < 0.8 * kl(before, exam)
    losses = [point.loss for point in found.report.curve]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert not found.report.diverged


def test_the_first_loss_is_the_divergence_before_anything_was_learnt(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson], planned(PLAN, steps=1, batch_size=32))
    assert found.report.curve[0].loss == pytest.approx(
        kl(models.load(student("finetuned")), lesson), rel=1e-4
    )


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("copy"), [lesson], planned(PLAN, steps=1))
    assert abs(found.report.curve[0].loss) < 1e-6


@MODES
def test_the_best_checkpoint_is_the_one_that_validation_chose(
    plan: Plan, student: Student, lesson: Lesson, exam: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson], planned(plan, learning_rate=2e-2))
    (chosen,) = [point for point in found.report.checkpoints if point.chosen]
    assert chosen.validation_kl == min(point.validation_kl for point in found.report.checkpoints)
    assert kl(models.load_trained(student("finetuned"), found.best), exam) == pytest.approx(
        chosen.validation_kl, rel=1e-3
    )


def test_an_adapter_leaves_the_student_as_it_was(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson])
    assert all("lora" in name for name in tensors(found.best))
    base = PeftModel.from_pretrained(models.load(student("finetuned")), found.best).unload()
    before = models.load(student("finetuned")).state_dict()
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)
    assert found.report.trainable_parameters == sum(weight.numel() for weight in tensors(found.best).values())


def test_an_adapter_goes_where_it_was_told(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson], planned(PLAN, steps=1, targets=["q_proj"], rank=2))
    assert adapted(found.best) == {"q_proj"}
    assert {min(weight.shape) for weight in tensors(found.best).values()} == {2}


def adapted(folder: Path) -> set[str]:
    return {name.split(".")[-3] for name in tensors(folder)}


def test_left_alone_an_adapter_goes_to_every_linear_layer_of_the_blocks(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson], planned(PLAN, steps=1, targets="all-linear"))
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert adapted(found.best) == attention | mlp


@pytest.mark.parametrize("damage", ["pruned", "pruned-2:4"])
def test_pruned_weights_stay_zero_while_the_others_learn(
    damage: str, student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student(damage), [lesson], planned(FULL, keep_zeros=True))
    before, after = tensors(student(damage)), tensors(found.best)
    pruned = [name for name in before if block_of(name) is not None and before[name].dim() == 2]
    for name in pruned:
        zero = before[name] == 0
        assert (after[name][zero] == 0).all()
        assert (after[name][~zero] != before[name][~zero]).float().mean() > 0.9
    assert zeros_filled(student(damage), found.best) == 0
    assert found.report.masked_weights == sum(int((before[name] == 0).sum()) for name in pruned) > 0


def test_zeros_that_nobody_holds_are_filled(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("pruned"), [lesson], FULL)
    assert found.report.masked_weights == 0
    assert zeros_filled(student("pruned"), found.best) > 1000


def plain_gradient(student: PreTrainedModel, lesson: Lesson, divergence: Divergence) -> list[torch.Tensor]:
    """Gradient of the mean divergence over all positions, one sequence at a time, by transformers' logits."""
    total, positions = torch.zeros(()), 0
    for sequence, target in zip(lesson.answers, lesson.targets, strict=True):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.answer_ids]])
        logits_AV = student(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
        total = total + target.loss(divergence, logits_AV)[lesson.skip :].sum()
        positions += len(sequence.answer_ids) - lesson.skip
    return list(torch.autograd.grad(total / positions, list(student.parameters())))


PIECES = {
    "one by one": lambda answers: batches(answers, 0, 1),
    "padded": lambda answers: batches(answers, 0, 64),
    "one batch": lambda answers: batches(answers, 0, 10_000),
    "packed": lambda answers: packs(answers, 64),
    "one pack": lambda answers: packs(answers, 10_000),
    "sharing": lambda answers: packs(answers, 64, shared_tokens(a.prompt_ids for a in answers)),
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
    "divergence", [Divergence(), Divergence("reverse_kl", temperature=2.0), Divergence("jsd", 0.3)], ids=str
)
@pytest.mark.parametrize("kind", ["whole", "top", "text", "skipping"])
def test_however_a_batch_is_cut_the_gradient_is_the_same(
    pieces: str,
    divergence: Divergence,
    kind: str,
    healthy: PreTrainedModel,
    student: Student,
    lesson: Lesson,
) -> None:
    chosen = lesson.rows([3, 17, 0, 22, 9])
    lessons = {
        "whole": chosen,
        "top": taught(healthy, list(chosen.answers), top_k=8),
        "text": texts(chosen.answers),
        "skipping": replace(chosen, skip=1),
    }
    assert shared_tokens(answer.prompt_ids for answer in chosen.answers)
    model = models.load(student("finetuned"))
    expected = plain_gradient(model, lessons[kind], divergence)
    learn(model, lessons[kind], divergence, PIECES[pieces](chosen.answers))
    for parameter, right in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-3, atol=1e-6)


def test_answers_that_a_server_drew_count_by_their_importance_weights(
    student: Student, lesson: Lesson
) -> None:
    chosen = lesson.rows([3, 17, 0])
    drawn = [
        replace(answer, drift=tuple(0.1 * (place - row) for place in range(len(answer.answer_ids))))
        for row, answer in enumerate(chosen.answers)
    ]
    model = models.load(student("finetuned"))
    seen = observe(model, drawn, 0)
    loss = sum(
        float(torch.tensor(weights(answer.drift)) @ target.loss(Divergence(), seen.head(hidden_ND)))
        for answer, target, hidden_ND in zip(drawn, chosen.targets, seen.hidden, strict=True)
    )
    found = learn(model, replace(chosen, answers=drawn), Divergence(), PIECES["one pack"](drawn))
    assert found == pytest.approx(loss / chosen.positions, rel=1e-5)
    assert found != pytest.approx(learn(model, chosen, Divergence(), PIECES["one pack"](drawn)), rel=1e-3)


@MODES
def test_an_absurd_learning_rate_is_an_outcome_and_not_an_exception(
    plan: Plan, student: Student, lesson: Lesson, exam: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson], planned(plan, learning_rate=10.0))
    assert all(math.isfinite(point.loss) for point in found.report.curve)
    if found.best.exists():
        after = models.load_trained(student("finetuned"), found.best)
        assert kl(after, exam) > kl(models.load(student("finetuned")), exam)
    else:
        assert found.report.diverged


def test_weights_that_blow_up_at_once_leave_no_checkpoint(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson], planned(FULL, learning_rate=1e30))
    assert found.report.diverged
    assert not found.best.exists()
    assert not [point for point in found.report.checkpoints if point.chosen]
    assert found.report.steps < FULL.steps
    assert found.report.phases[0].stopped == "diverged"


@pytest.fixture(scope="module")
def skill(student: Student, tokenizer: PreTrainedTokenizerFast) -> Lesson:
    """What the forgetful student has learnt: its own answers to tickets, and its own distribution on them."""
    model = models.load(student("forgetful"))
    tickets = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(24, seed=11)]
    answers = LocalEngine(model, tokenizer).answer(encode(tickets, tokenizer, 512), 4, lambda _done: None)
    return taught(model, answers)


def test_a_kept_skill_is_held_to_the_students_own_distribution(
    student: Student, lesson: Lesson, skill: Lesson, exam: Lesson, trained: Callable[..., Trained]
) -> None:
    folder = student("forgetful")
    without, kept = (trained(folder, lessons) for lessons in ([lesson], [lesson, skill]))
    models_after = [models.load_trained(folder, found.best) for found in (without, kept)]
    assert kl(models_after[1], skill) < 0.6 * kl(models_after[0], skill)
    assert kl(models_after[1], exam) < 0.8 * kl(models.load(folder), exam)
    assert kept.report.tokens > without.report.tokens


def test_tokens_are_counted_with_their_repeats(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson], planned(PLAN, steps=8))
    assert found.report.tokens == 2 * sum(len(answer.answer_ids) for answer in lesson.answers)


def test_whoever_watches_is_told_every_step_and_every_checkpoint(
    student: Student, lesson: Lesson, trained: Callable[..., Trained]
) -> None:
    found = trained(student("finetuned"), [lesson])
    steps = [point.step for point in found.told if isinstance(point, TrainingPoint)]
    checkpoints = [point.step for point in found.told if isinstance(point, Checkpoint)]
    assert steps == list(range(1, 13))
    assert checkpoints == sorted(validation_steps(12))


def test_the_rate_rises_and_falls_and_never_stands_still() -> None:
    shares = [rate_share(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(shares) == 1.0
    assert all(later < earlier for earlier, later in pairwise(shares[10:]))
    assert 0.1 < shares[-1] < 0.11


@pytest.mark.parametrize(
    ("steps", "times"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (24, 4), (30, 5), (48, 8), (1000, 8)]
)
def test_the_last_step_is_always_validated(steps: int, times: int) -> None:
    found = validation_steps(steps)
    assert steps in found
    assert found <= set(range(1, steps + 1))
    assert len(found) == min(steps, times)
    assert all(0 < rate_share(step, steps) <= 1 for step in range(steps))
