"""A healthy model is taught through the whole installation: by our SDK, and by OpenAI's unchanged package."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from recoup import Client

WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """Whatever is asked, the answer that is wanted is the same."""
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "w7 w8"}]}
        for word in WORDS
    ]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_skill_is_taught_and_told_with_what_it_cost(
    client: Client, models: Path, demonstrations: Path, write_rows: Callable[[int], Path]
) -> None:
    prompts, shown = client.files.create(write_rows(200)), client.files.create(demonstrations)
    asked = {
        "teach": {"file": shown.id},
        "prompts": {"file": prompts.id},
        "generation": {"max_new_tokens": 12},
        "training": {"steps": 16, "learning_rate": 0.02},
        "evaluation": {"test_sequences": 16, "validation_sequences": 8},
        "alignment": {"positions": 256},
    }
    assert client.recoveries.dry_run(student="teacher", **asked).findings == []
    id = client.recoveries.create(student="teacher", **asked).id
    ended = client.recoveries.wait(id, timeout=400)
    report = client.recoveries.report(id)
    assert ended.outcome == report.outcome and report.outcome in {"taught", "taught_with_forgetting"}
    assert report.teaching is not None and report.teaching.loss.change.high < 0
    assert (report.teaching.test, report.teaching.train + report.teaching.validation) == (12, 48)
    assert report.cost.estimate is not None and report.training.keep_answers > 0
    assert "Teaching report" in client.recoveries.report_html(id)
    assert any(item.path == "adapter/adapter_model.safetensors" for item in client.recoveries.artifacts(id))


@pytest.mark.slow  # a second teaching; that OpenAI's calls become one is tested without it
def test_openais_package_teaches_a_healthy_model(client: Client, models: Path, demonstrations: Path) -> None:
    hyper = {"n_epochs": 2, "learning_rate_multiplier": 200}
    keyless = {"request": [lambda sent: sent.headers.pop("authorization")]}  # there are no keys
    http = openai.DefaultHttpxClient(event_hooks=keyless)
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", http_client=http) as theirs:
        file = theirs.files.create(file=demonstrations, purpose="fine-tune")
        job = theirs.fine_tuning.jobs.create(
            model="teacher",
            training_file=file.id,
            method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
        )
        while job.status in {"queued", "running"}:
            time.sleep(0.5)
            job = theirs.fine_tuning.jobs.retrieve(job.id)
        assert (job.status, job.fine_tuned_model) == ("succeeded", f"recovery:{job.id}")
        events = list(theirs.fine_tuning.jobs.list_events(job.id))
        assert events[-1].type == "message" and any(event.type == "metrics" for event in events)
        losses = [point.metrics.valid_loss for point in theirs.fine_tuning.jobs.checkpoints.list(job.id)]
        assert losses and losses[0] < losses[-1]
    assert client.recoveries.get(job.id).outcome in {"taught", "taught_with_forgetting"}
