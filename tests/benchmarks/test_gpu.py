"""The benchmark for GPUs, small and on whatever there is: what it calls is what the product has."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("gpu", "distil", "measuring"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_part_measures_something(tmp_path: Path) -> None:
    import gpu

    gpu.main(["all", "--tiny", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found.keys() == gpu.PARTS.keys()
    assert all(found["memory"]["8B"]["as it is"][0][name] > 0 for name in ("tokens", "seconds"))
    assert found["training"]["8B"]["2 rows, as it is"]["share"] > 0
    assert 0 < max(row["error"] for row in found["divergence"].values()) < 0.05
    assert found["alignment"]["error"]["largest"] < 1e-5
    assert found["generation"]["4"]["tokens"] == 4 * found["generation"]["new"]
