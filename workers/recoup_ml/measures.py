"""From what three models did to the measures of the report, each with its paired units."""

import math
from collections.abc import Sequence

import numpy as np

from recoup.schemas import Baseline, Gate, Match, Measure
from recoup_ml import scores, verdict
from recoup_ml.probe import Probe
from recoup_ml.results import Behaviour, Diagnosis
from recoup_ml.scores import Scores, Window
from recoup_ml.sequences import Answered, Encoded
from recoup_ml.tasks import Questions
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
    paired += _tasks(probe.tasks, diagnosis.teacher, diagnosis.before, after)
    return [verdict.measure(item, gate, seed) for item in paired]


def deficits(tasks: Sequence[Questions], teacher: Behaviour, student: Behaviour, seed: int) -> list[str]:
    """The measures of the tasks in which a paired test finds the student short of its teacher."""
    return verdict.deficits(_tasks(tasks, teacher, student, None), seed)


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


def _tasks(
    tasks: Sequence[Questions], teacher: Behaviour, before: Behaviour, after: Behaviour | None
) -> list[Paired]:
    return [
        Paired(
            f"task:{task.spec.name}",
            f"{task.spec.name}, {RIGHT[task.spec.match]}",
            "share",
            "higher",
            verdict.ratio_of_sums(),
            *(
                item and _pairs(item.tasks[task.spec.name], [1.0] * len(task.items))
                for item in (teacher, before, after)
            ),
            guarded=True,
        )
        for task in tasks
    ]


def _pairs(sums: Sequence[float], weights: Sequence[float]) -> Array:
    return np.array([sums, weights], dtype=np.float64).T


def _token_sums(item: Scores) -> Array:
    return _pairs([math.fsum(tokens) for tokens in item.kl], [len(tokens) for tokens in item.kl])


def _padded(rows: Sequence[Sequence[float]]) -> Array:
    width = max(map(len, rows))
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in rows])
