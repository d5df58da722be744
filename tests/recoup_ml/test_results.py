"""What a stage left is read by the release that comes after."""

import json
from pathlib import Path

from recoup_ml import results
from recoup_ml.results import Behaviour
from recoup_ml.scores import Scores, Window


def test_what_a_release_without_the_harness_left_is_read(tmp_path: Path) -> None:
    scores = Scores([[0.5]], [1], [[0.25]])
    left = Behaviour(scores, [Window(2.0, 3)], ["yes"], [0.0], [], {"sums": [True]}, {})
    results.write(tmp_path / "left.json", left)
    older = json.loads((tmp_path / "left.json").read_text())
    del older["harness"]
    (tmp_path / "left.json").write_text(json.dumps(older))
    assert results.read(tmp_path / "left.json", Behaviour) == left
