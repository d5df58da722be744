"""A diagnosis: what a recovery would find before it does anything, and nothing done."""

from collections.abc import Callable

import pytest

from recoup.schemas import CreateDiagnosis, DiagnosisReport, Report
from recoup_ml.recipe import examine, recover
from recoup_ml.run import Run

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(scope="module")
def examined(make_run: Callable[..., Run], open_journal: type, tmp_path_factory: pytest.TempPathFactory):
    """`examined("pruned")`: the report of its diagnosis, and the journal."""

    def run(damage: str) -> tuple[DiagnosisReport, object]:
        journal = open_journal(tmp_path_factory.mktemp("diagnosis"))
        examine(make_run(damage), journal)
        return DiagnosisReport.model_validate_json(journal.published["report.json"].read_text()), journal

    return run


@pytest.fixture(scope="module")
def pruned(examined):
    return examined("pruned")


def test_it_names_the_damage_and_trains_nothing(pruned) -> None:
    report, journal = pruned
    assert (report.damage.kind, report.needed) == ("pruning", True)
    assert report.damage.evidence and len(report.damage.distance_by_layer) == 4
    assert journal.ran == ["diagnose", "package"]
    assert not any("safetensors" in name for name in journal.published)


def test_it_finds_what_a_recovery_of_the_same_prompts_finds_before(
    pruned, make_run: Callable[..., Run], open_journal: type, tmp_path
) -> None:
    journal = open_journal(tmp_path)
    recover(make_run("pruned", training={"steps": 1}), journal)
    recovery = Report.model_validate_json(journal.published["report.json"].read_text())
    report = pruned[0]
    assert report.damage == recovery.damage and report.splits == recovery.splits
    mine = {measure.name: (measure.teacher, measure.before) for measure in report.measures}
    assert mine == {measure.name: (measure.teacher, measure.before) for measure in recovery.measures}
    for name in ("positions_sha256", "floor", "layer_map"):
        assert getattr(report.alignment, name) == getattr(recovery.alignment, name)
    values = ([layer.value for layer in found.alignment.before.diagonal] for found in (report, recovery))
    assert next(values) == pytest.approx(next(values), abs=1e-5)


def test_nothing_comes_after(pruned) -> None:
    report = pruned[0]
    assert report.alignment.after is None and report.alignment.headroom_recovered_mean is None
    assert all(measure.after is None and measure.recovered is None for measure in report.measures)


def test_its_alignment_is_published_as_data_table_and_pictures(pruned) -> None:
    published = pruned[1].published
    assert {f"alignment.{suffix}" for suffix in ("json", "csv", "svg", "png")} < set(published)
    assert len(published["alignment.csv"].read_text().splitlines()) == 1 + 5


def test_a_copy_of_the_teacher_needs_nothing(examined) -> None:
    report, _ = examined("copy")
    assert (report.damage.kind, report.needed) == ("none", False)


def test_a_request_is_the_same_after_a_recovery_was_made_of_it() -> None:
    asked = {
        "student": {"source": "s"},
        "teacher": {"source": "t"},
        "max_length": 300,
        "generation": {"max_new_tokens": 20},
        "evaluation": {"test_sequences": 32, "tasks": [{"name": "sums", "file": "file-" + "0" * 24}]},
        "alignment": {"positions": 512},
        "seed": 3,
        "metadata": {"a": "b"},
    }
    request = CreateDiagnosis.model_validate(asked)
    assert request.as_recovery().training.max_length == 300
    assert CreateDiagnosis.of(request.as_recovery()) == request
    plain = CreateDiagnosis.model_validate({name: asked[name] for name in ("student", "teacher")})
    assert CreateDiagnosis.of(plain.as_recovery()) == plain


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"steps": 3}},
        {"alignment": {"weight": 1.0}},
        {"max_length": 100},
        {"evaluation": {"tasks": [{"name": "a", "file": "file-" + "0" * 24}] * 2}},
    ],
)
def test_what_belongs_to_training_or_does_not_fit_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        CreateDiagnosis.model_validate({"student": {"source": "s"}, "teacher": {"source": "t"}} | change)
