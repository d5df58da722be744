"""From what three models did to the measures of the report, each with its paired units."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from recoup.schemas import Baseline, Gate, Match, Measure
from recoup_ml import scores, verdict
from recoup_ml.errors import UnsupportedRequest
from recoup_ml.probe import Probe
from recoup_ml.results import Behaviour, Diagnosis, HarnessScores
from recoup_ml.scores import Scores, Window
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.verdict import Array, Paired

RIGHT: dict[Match, str] = {
    "exact": "exact match",
    "contains": "reference in the answer",
    "number": "right number",
}


def measures(
    diagnosis: Diagnosis,
    after: Behaviour | None,
    test: Sequence[Answered],
    probe: Probe,
    gate: Gate,
    seed: int,
) -> list[Measure]:
    """Every measure of the report, the primary one first."""
    paired = [
        *_divergences(diagnosis, after),
        *_on_answers(diagnosis, after, test),
        _natural_text(diagnosis, after),
        _repetition(diagnosis, after),
    ]
    if probe.keep:
        paired.append(_keep(diagnosis, after, probe.keep))
    paired += _tasks(probe, diagnosis.teacher, diagnosis.before, after)
    return [verdict.measure(item, gate, seed) for item in paired]


def deficits(probe: Probe, teacher: Behaviour, student: Behaviour, seed: int) -> list[str]:
    """The measures of the tasks in which a paired test finds the student short of its teacher."""
    return verdict.deficits(_tasks(probe, teacher, student, None), seed)


def divergence(diagnosis: Diagnosis, after: Scores, seed: int) -> Measure:
    """The primary measure alone."""
    return verdict.measure(_divergence(diagnosis.floor, diagnosis.before.scores, after), Gate(), seed)


def baseline(
    names: tuple[str, str],
    diagnosis: Diagnosis,
    trained: Behaviour,
    repaired: Behaviour,
    test: Sequence[Answered],
    probe: Probe,
    seed: int,
) -> Baseline:
    """A training-free repair, called `names` (method, label), beside the trained student."""
    found = {item.name: item for item in measures(diagnosis, repaired, test, probe, Gate(), seed)}
    sums = [
        _token_sums(item)
        for item in (diagnosis.floor, diagnosis.before.scores, trained.scores, repaired.scores)
    ]
    after = {name: item.after for name, item in found.items() if item.after is not None}
    return Baseline(
        name=names[0],
        label=names[1],
        kl=after["kl"],
        agreement=after["agreement"],
        bits_per_character=after["bits_per_character"],
        keep=after.get("keep"),
        recovered=found["kl"].recovered,
        lead=verdict.lead(*sums, seed=seed),
    )


def _divergences(diagnosis: Diagnosis, after: Behaviour | None) -> list[Paired]:
    """The primary measure and its tail; the teacher's value is the floor."""
    models = diagnosis.floor, diagnosis.before.scores, after.scores if after else None
    mean = _divergence(*models)
    tail = Paired(
        "kl_p99",
        "token KL, 99th percentile",
        "nats",
        "lower",
        verdict.percentile(99),
        *(item and _padded(item.kl) for item in models),
    )
    return [mean, tail]


def _divergence(floor: Scores, before: Scores, after: Scores | None) -> Paired:
    return Paired(
        "kl",
        "token KL to the teacher",
        "nats",
        "lower",
        verdict.ratio_of_sums(),
        *(item and _token_sums(item) for item in (floor, before, after)),
    )


def _on_answers(diagnosis: Diagnosis, after: Behaviour | None, test: Sequence[Answered]) -> list[Paired]:
    models = diagnosis.teacher.scores, diagnosis.before.scores, after.scores if after else None
    tokens = [len(answer.answer_ids) for answer in test]
    agreement = Paired(
        "agreement",
        "top-1 agreement with the teacher",
        "share",
        "higher",
        verdict.ratio_of_sums(),
        *(item and _pairs(item.agreement, tokens) for item in models),
    )
    perplexity = Paired(
        "perplexity_answers",
        "perplexity on teacher answers",
        "per token",
        "lower",
        verdict.ratio_of_sums(lambda nats: np.exp(np.minimum(nats, 700.0))),
        *(item and _pairs(item.nll, tokens) for item in models),
    )
    return [agreement, perplexity]


def _natural_text(diagnosis: Diagnosis, after: Behaviour | None) -> Paired:
    def bits(windows: Sequence[Window]) -> Array:
        return _pairs([window.bits for window in windows], [window.characters for window in windows])

    return Paired(
        "bits_per_character",
        "natural text",
        "bits per character",
        "lower",
        verdict.ratio_of_sums(),
        bits(diagnosis.teacher.natural),
        bits(diagnosis.before.natural),
        bits(after.natural) if after else None,
        guarded=True,
    )


def _repetition(diagnosis: Diagnosis, after: Behaviour | None) -> Paired:
    models = diagnosis.teacher, diagnosis.before, after
    return Paired(
        "repetition",
        "repetition in own answers (seq-rep-4)",
        "share",
        "lower",
        verdict.ratio_of_sums(),
        *(item and _pairs(item.repetition, [1.0] * len(item.repetition)) for item in models),
    )


def _keep(diagnosis: Diagnosis, after: Behaviour | None, keep: Sequence[Encoded]) -> Paired:
    """Exact match with the references; without a reference, with the student's answer before."""
    references = [
        item.prompt.completion or answer for item, answer in zip(keep, diagnosis.before.kept, strict=True)
    ]
    models = diagnosis.teacher, diagnosis.before, after
    return Paired(
        "keep",
        "new skill, exact match",
        "share",
        "higher",
        verdict.ratio_of_sums(),
        *(item and _pairs(scores.matches(item.kept, references), [1.0] * len(keep)) for item in models),
        guarded=True,
        retained=True,
    )


def _tasks(probe: Probe, teacher: Behaviour, before: Behaviour, after: Behaviour | None) -> list[Paired]:
    models = teacher, before, after
    own = [
        _task(f"task:{name}", f"{name}, {RIGHT[match]}", [item and item.tasks[name] for item in models])
        for name, match in ((task.spec.name, task.spec.match) for task in probe.tasks)
    ]
    names = [task.spec.name for task in probe.harness]
    return own + [_harness(name, [item and item.harness[name] for item in models]) for name in names]


def _harness(name: str, models: Sequence[HarnessScores | None]) -> Paired:
    """Raises `UnsupportedRequest` where the models were not asked the same."""
    asked = [item for item in models if item]
    if len({item.asked_sha256 for item in asked}) > 1:
        raise UnsupportedRequest(
            f"The documents of the task {name} of lm-evaluation-harness changed while the recovery ran; "
            "submit it again, and leave RECOUP_HARNESS_TASKS alone meanwhile."
        )
    metric, better = asked[0].metric.removesuffix(",none"), asked[0].better
    values = [item and item.values for item in models]
    return _task(f"harness:{name}", f"{name}, {metric}", values, "mean", better)


def _task(
    name: str,
    label: str,
    models: Sequence[Sequence[float] | None],
    unit: str = "share",
    better: Literal["lower", "higher"] = "higher",
) -> Paired:
    """The mean of a mark for each question: of the teacher, the student before, and after if there is one."""
    teacher, before, after = (
        None if marks is None else _pairs(marks, [1.0] * len(marks)) for marks in models
    )
    mean = verdict.ratio_of_sums()
    return Paired(name, label, unit, better, mean, teacher, before, after, guarded=True)


def _pairs(sums: Sequence[float], weights: Sequence[float]) -> Array:
    return np.array([sums, weights], dtype=np.float64).T


def _token_sums(item: Scores) -> Array:
    return _pairs([math.fsum(tokens) for tokens in item.kl], [len(tokens) for tokens in item.kl])


def _padded(rows: Sequence[Sequence[float]]) -> Array:
    width = max(map(len, rows))
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in rows])
