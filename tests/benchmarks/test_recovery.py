"""The grid's cells and the arithmetic of its tables; the grid itself takes hours."""

import json
import sys
from pathlib import Path

import pytest

from recoup.schemas import CreateRecovery

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("recovery", "recovery_table"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("stage", ["screen", "final"])
def test_every_cell_is_a_request_that_the_service_would_take(stage: str) -> None:
    import recovery

    cells = list(recovery.cells(stage))
    assert len(set(cells)) == len(cells) > 40
    for name, method, seed in cells:
        CreateRecovery.model_validate(recovery.request(stage, recovery.damages()[name], method, seed))


def test_a_report_becomes_a_row_and_rows_a_table() -> None:
    import recovery
    from recovery_table import tables

    reports = json.loads((FOLDER.parent / "tests/recoup_ml/sample_report.json").read_text())
    row = recovery.row("final", "finetuned", "auto", 0, reports["recovered"], 60.0)
    lines = tables([json.loads(json.dumps(row))]).splitlines()
    assert "### finetuned, final" in lines
    (found,) = [line for line in lines if line.startswith("| auto ")]
    assert "0.860 [0.823, 0.893]" in found


def test_rows_of_one_device_are_averaged_and_those_of_two_stand_apart() -> None:
    import recovery
    from recovery_table import tables

    reports = json.loads((FOLDER.parent / "tests/recoup_ml/sample_report.json").read_text())
    here = recovery.row("final", "finetuned", "auto", 0, reports["recovered"], 60.0)
    there = json.loads(json.dumps(here)) | {"device": "NVIDIA H200", "seed": 1}
    there["recovered"] |= {"value": 0.9, "high": 0.95}
    lines = tables([json.loads(json.dumps(here)), there, there | {"device": "NVIDIA H200"}]).splitlines()
    found = [line for line in lines if line.startswith("| auto ")]
    assert [line.split(" | ")[1:4] for line in found] == [
        ["cpu", "1", "0.860 [0.823, 0.893]"],
        ["H200", "2", "0.900 [0.823, 0.950]"],
    ]


def test_two_runs_are_paired_over_their_test_sequences() -> None:
    from recovery_table import lead

    shared = {"tokens": [10, 20, 30], "floor": [0.0, 0.0, 0.0], "before": [10.0, 20.0, 30.0]}
    ours = {"sequences": {**shared, "after": [1.0, 2.0, 3.0]}}
    theirs = {"sequences": {**shared, "after": [4.0, 8.0, 12.0]}}
    found = lead(ours, theirs)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3))


def test_each_run_is_judged_by_the_gap_of_its_own_student() -> None:
    from recovery_table import lead

    shared = {"tokens": [10, 20, 30], "floor": [0.0, 0.0, 0.0]}
    ours = {"sequences": {**shared, "before": [10.0, 20.0, 30.0], "after": [1.0, 2.0, 3.0]}}
    theirs = {"sequences": {**shared, "before": [20.0, 40.0, 60.0], "after": [8.0, 16.0, 24.0]}}
    found = lead(ours, theirs)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3))


def test_a_lead_says_when_the_two_ran_on_two_machines() -> None:
    import recovery
    from recovery_table import tables

    reports = json.loads((FOLDER.parent / "tests/recoup_ml/sample_report.json").read_text())
    there = recovery.row("final", "drop4", "auto", 1, reports["recovered"], 60.0) | {"device": "NVIDIA H200"}
    there["sequences"] = {"tokens": [10, 20], "floor": [0, 0], "before": [10, 20], "after": [1, 2]}
    here = there | {"method": "sft", "device": "cpu"}
    here["sequences"] = there["sequences"] | {"before": [20, 40], "after": [8, 16]}
    (line,) = [line for line in tables([there, here]).splitlines() if line.startswith("`auto`")]
    assert line.endswith("sft +0.300 [+0.300, +0.300] (seed 1, cpu behind H200, students of two machines).")


def test_runs_on_other_sequences_are_not_paired() -> None:
    from recovery_table import lead

    one = {"sequences": {"tokens": [10], "floor": [0.0], "before": [10.0], "after": [1.0]}}
    other = {"sequences": {"tokens": [11], "floor": [0.0], "before": [10.0], "after": [1.0]}}
    assert lead(one, other) is None


def test_a_training_whose_alignment_was_not_measured_is_counted_with_no_points() -> None:
    from recovery_table import along

    point = {"validation_kl": 0.5, "last": None, "mean": None}
    assert "| pooled | 1 | 0 |" in along([{"damage": "ffn10", "points": [point, point]}])


def test_a_cell_that_was_killed_goes_on_from_what_it_kept(tmp_path: Path) -> None:
    import recovery

    left = tmp_path / "runs" / ".distil"
    for name in ("fits", "unfinished"):
        (left / name).mkdir(parents=True)
        (left / name / "file").touch()
    seen: list[set[str]] = []
    journal = recovery.FolderJournal(tmp_path / "runs", tmp_path / "shared", {})
    folder = journal.stage("distil", lambda aside: seen.append({item.name for item in aside.iterdir()}))
    assert seen == [{"unfinished"}]
    assert (folder / "unfinished" / "file").exists()


def test_alignment_is_correlated_along_trainings_resampled_whole() -> None:
    from recovery_table import along

    def training(sign: float) -> dict[str, object]:
        values = [(2.0, 0.5), (1.5, 0.5 + 0.1 * sign), (1.0, 0.5 + 0.2 * sign)]
        points = [{"validation_kl": kl, "last": cka, "mean": cka} for kl, cka in values]
        return {"damage": "ffn10", "points": points}

    (row,) = [line for line in along(5 * [training(1)]).splitlines() if "pooled" in line]
    assert row.startswith("| pooled | 5 | 10 | +1.00 [+1.00, +1.00]")
    (row,) = [line for line in along([training(-1), *(4 * [training(1)])]).splitlines() if "pooled" in line]
    assert "+1.00 [+1.00" not in row
