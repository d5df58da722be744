"""The grid's cells and the arithmetic of its tables; the grid itself takes hours."""

import json
import random
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


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 10), (2, 20), (3, 30)], 1.0),
        ([(1, 30), (2, 20), (3, 10)], -1.0),
        ([(1, 5), (2, 5), (3, 5)], 0.0),
        ([(1, 1), (2, 3), (3, 2), (4, 4)], 0.8),
        ([(1, 1), (1, 2), (2, 3)], 3 / 12**0.5),
    ],
)
def test_rank_correlation(pairs: list[tuple[float, float]], expected: float) -> None:
    from recovery_table import spearman

    assert spearman(pairs) == pytest.approx(expected)


def test_rank_correlation_sees_ranks_alone() -> None:
    from recovery_table import spearman

    draw = random.Random(0)
    pairs = [(draw.random(), draw.random()) for _ in range(40)]
    stretched = [(x**3, 5 * y - 2) for x, y in pairs]
    assert spearman(stretched) == pytest.approx(spearman(pairs))


def test_a_report_becomes_a_row_and_rows_a_table() -> None:
    import recovery
    from recovery_table import tables

    reports = json.loads((FOLDER.parent / "tests/recoup_ml/sample_report.json").read_text())
    row = recovery.row("final", "finetuned", "auto", 0, reports["recovered"], 60.0)
    lines = tables([json.loads(json.dumps(row))]).splitlines()
    assert "### finetuned, final" in lines
    (found,) = [line for line in lines if line.startswith("| auto ")]
    assert "0.860 [0.823, 0.893]" in found
