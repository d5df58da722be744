"""Alignment along a training: measured where it was asked for, and without a trace in what is learnt."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recoup.schemas import AlignmentPoint, Report, TrainingReport
from recoup_ml import models
from recoup_ml.alignment import choose_positions
from recoup_ml.evaluate import along_the_way
from recoup_ml.observation import observe
from recoup_ml.recipe import recover
from recoup_ml.run import Run
from recoup_ml.scores import compare
from recoup_ml.sequences import Answered
from recoup_ml.training import validation_steps
from recoup_ml.trajectory import Recorder, correlation
from recoup_ml.weights import Weights

pytestmark = pytest.mark.usefixtures("blank_pictures")
STEPS = 20


@pytest.fixture(scope="module")
def finish(make_run: Callable[..., Run], open_journal: type, tmp_path_factory: pytest.TempPathFactory):
    """`finish({…})`: the recovery of a fine-tuned student with that `alignment`, and where it lies."""

    def to_the_end(alignment: dict[str, object]) -> tuple[TrainingReport, Report, Path]:
        training = {"steps": STEPS, "learning_rate": 3e-3, "mode": "full", "stop_early": False}
        evaluation = {"test_sequences": 32, "validation_sequences": 8, "gate": {"max_regression": 1.0}}
        journal = open_journal(tmp_path_factory.mktemp("trajectory"))
        recover(make_run("finetuned", training=training, alignment=alignment, evaluation=evaluation), journal)
        report = Report.model_validate_json(journal.published["report.json"].read_text())
        return report.training, report, journal.place

    return to_the_end


@pytest.fixture(scope="module")
def watched(finish) -> tuple[TrainingReport, Report, Path]:
    return finish({"every_steps": 3})


@pytest.fixture
def recorder(teacher: Path, answered: list[Answered]) -> Recorder:
    positions = choose_positions(answered, 160, seed=0)
    seen = observe(models.load(teacher), answered, 0, positions)
    return Recorder(4, answered, seen, positions, [(layer, layer) for layer in range(5)], 0)


def test_alignment_is_measured_at_the_start_at_validations_and_in_between(watched) -> None:
    points = watched[0].trajectory.points
    wanted = {0, STEPS} | validation_steps(STEPS) | set(range(3, STEPS, 3))
    assert [point.step for point in points] == sorted(wanted)
    assert all(point.mean is not None and point.last is not None for point in points)


def test_its_divergence_is_that_of_the_checkpoints(watched) -> None:
    found = {point.step: point.validation_kl for point in watched[0].trajectory.points}
    assert found[0] == pytest.approx(watched[0].initial_validation_kl, rel=1e-5)
    assert [found[point.step] for point in watched[0].checkpoints] == [
        point.validation_kl for point in watched[0].checkpoints
    ]


def test_looking_changes_nothing_about_the_training(watched, finish) -> None:
    plain, _, place = finish({})
    assert plain.trajectory is None
    assert (plain.curve, plain.checkpoints) == (watched[0].curve, watched[0].checkpoints)
    mine, theirs = (Weights(folder / "distil" / "best") for folder in (place, watched[2]))
    assert all((mine[name] == theirs[name]).all() for name in mine)


def test_alignment_went_with_recovery_and_the_page_shows_how(watched) -> None:
    training, report, place = watched
    by_name = {item.alignment: item for item in training.trajectory.correlations}
    assert by_name["mean"].n == len(training.trajectory.points)
    assert by_name["mean"].spearman.value > 0.5
    page = (place / "artifacts" / "report.html").read_text()
    assert "Along the training" in page and f"{by_name['mean'].kendall.value:.2f}" in page
    assert along_the_way(training) == [text for text in report.remarks if "along the training" in text]


def test_the_teacher_itself_is_fully_aligned(recorder: Recorder, teacher: Path) -> None:
    assert recorder.look(models.load(teacher), 0) == pytest.approx(0.0, abs=1e-6)
    assert recorder.points[0].mean == pytest.approx(1.0, abs=1e-5)


def test_a_model_of_fewer_layers_is_read_by_its_layer_map(
    recorder: Recorder, student: Callable[[str], Path], answered: list[Answered]
) -> None:
    recorder.layer_map = [(0, 0), (1, 1), (2, 2), (3, 4)]
    shallow = models.load(student("shallow"))
    kl = recorder.look(shallow, 7)
    assert kl == compare(recorder.teacher, observe(shallow, answered, 0), answered).mean_kl
    assert recorder.points[0].step == 7 and 0 < recorder.points[0].last < 0.9999


def test_a_model_that_broke_leaves_a_gap_and_no_error(recorder: Recorder, teacher: Path) -> None:
    broken = models.load(teacher)
    recorder.look(broken, 0)
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    recorder.look(broken, 4)
    assert recorder.points[1] == AlignmentPoint(step=4, validation_kl=None, mean=None, last=None)
    assert [item.n for item in recorder.trajectory().correlations] == [1, 1]
    assert recorder.trajectory().correlations[0].spearman is None


def test_too_few_sequences_for_groups_have_no_alignment(teacher: Path, answered: list[Answered]) -> None:
    few = answered[:4]
    positions = choose_positions(few, 16, seed=0)
    seen = observe(models.load(teacher), few, 0, positions)
    recorder = Recorder(1, few, seen, positions, [(0, 0)], 0)
    assert recorder.look(models.load(teacher), 0) == pytest.approx(0.0, abs=1e-6)
    assert recorder.points[0].mean is None


def points(alignment: list[float], kl: list[float]) -> list[AlignmentPoint]:
    return [
        AlignmentPoint(step=step, validation_kl=loss, mean=value, last=None)
        for step, (value, loss) in enumerate(zip(alignment, kl, strict=True))
    ]


def test_recovery_is_less_divergence_so_falling_alignment_is_a_negative_correlation() -> None:
    assert correlation(points([0.9, 0.8, 0.7], [3.0, 2.0, 1.0]), "mean").spearman.value == -1.0
    assert correlation(points([0.7, 0.8, 0.9], [3.0, 2.0, 1.0]), "mean").spearman.value == 1.0
    assert correlation(points([0.7, 0.8, 0.9], [3.0, 2.0, 1.0]), "last").n == 0


@pytest.mark.parametrize(
    ("alignment", "said"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.35], "95 % interval"),
        ([0.9, 0.8, 0.81, 0.92, 0.7], "which may be chance"),
        ([0.9, 0.8, 0.7], "no interval can be given"),
    ],
)
def test_alignment_that_went_against_recovery_is_named_in_a_sentence(
    watched, alignment: list[float], said: str
) -> None:
    found = points(alignment, [1.0 - 0.1 * step for step in range(len(alignment))])
    trajectory = watched[0].trajectory.model_copy(update={"correlations": [correlation(found, "mean")]})
    (sentence,) = along_the_way(watched[0].model_copy(update={"trajectory": trajectory}))
    assert said in sentence and f"over {len(found)} points the mean alignment" in sentence
    assert "Trust the divergence" in sentence
