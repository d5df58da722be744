import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.ledger import open_ledger
from recoup_jobs.metrics import REGISTRY
from recoup_jobs.settings import Settings
from recoup_worker.meter import Meter, gpus

QUEUE = "gpu.8x80g"


@pytest.fixture
def ledger(tmp_path):
    ledger = open_ledger(Settings(home=tmp_path))
    yield ledger
    ledger.close()


@pytest.fixture
def claim(ledger):
    ledger.create(CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t")), QUEUE)
    return ledger.claim("worker", [QUEUE], 30)


def value(name, **labels):
    found = text_string_to_metric_families(generate_latest(REGISTRY).decode())
    samples = [sample for family in found for sample in family.samples]
    return next((s.value for s in samples if s.name == name and s.labels == labels), 0.0)


@pytest.fixture
def counted():
    """`counted(name, **labels)`: how much was added since the last time it was asked."""
    before = {}

    def added(name, **labels):
        key = (name, *sorted(labels.items()))
        now = value(name, **labels)
        before[key], past = now, before.get(key, 0.0)
        return now - past

    return added


def run(ledger, claim):
    """What a runner tells of a short recovery."""
    ledger.enter_stage(claim, "generate")
    ledger.event(claim, "metric", {"name": "tokens", "generated": 700})
    ledger.commit_stage(claim, "generate", "folder")
    ledger.event(claim, "metric", {"name": "tokens", "trained": 900})
    ledger.event(claim, "metric", {"name": "verdict", "outcome": "recovered", "recovered": 0.75})
    ledger.succeed(claim, "recovered")


COUNTED = (
    ("recoup_stage_seconds_count", {"stage": "generate"}, 1),
    ("recoup_tokens_generated_total", {}, 700),
    ("recoup_tokens_trained_total", {}, 900),
    ("recoup_recovered_fraction_sum", {}, 0.75),
    ("recoup_claim_latency_seconds_count", {}, 1),
    ("recoup_jobs_ended_total", {"kind": "recovery", "state": "succeeded", "outcome": "recovered"}, 1),
)


def test_what_the_runner_tells_is_counted_once(ledger, claim, counted):
    for name, labels, _ in COUNTED:
        counted(name, **labels)
    meter = Meter(ledger, claim, QUEUE)
    run(ledger, claim)
    meter.close()
    meter.close()
    assert [counted(name, **labels) for name, labels, _ in COUNTED] == [much for *_, much in COUNTED]


def test_what_an_earlier_holder_told_is_not_counted_again(ledger, claim, counted):
    ledger.event(claim, "metric", {"name": "tokens", "trained": 900})
    ledger.release(claim)
    successor = ledger.claim("other", [QUEUE], 30)
    counted("recoup_tokens_trained_total")
    Meter(ledger, successor, QUEUE).close()
    assert counted("recoup_tokens_trained_total") == 0


def test_gpus_are_counted_for_as_long_as_the_job_is_held(ledger, claim, counted, monkeypatch):
    from recoup_worker import meter as meters

    moments = iter([100.0, 130.0])
    monkeypatch.setattr(meters.time, "monotonic", lambda: next(moments))
    counted("recoup_gpu_seconds_total", queue=QUEUE)
    Meter(ledger, claim, QUEUE).close()
    monkeypatch.undo()
    assert counted("recoup_gpu_seconds_total", queue=QUEUE) == 8 * 30


@pytest.mark.parametrize(("queue", "number"), [("gpu.cpu", 0), ("gpu.1x24g", 1), ("gpu.8x80g", 8)])
def test_a_class_of_machine_names_its_gpus(queue, number):
    assert gpus(queue) == number
