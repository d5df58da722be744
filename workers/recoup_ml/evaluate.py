"""The evaluate stage: the student after training on the same exam, and the verdict."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from recoup.schemas import (
    Alignment,
    Baseline,
    Estimate,
    Measure,
    Outcome,
    OutputForm,
    ProbeRow,
    Sample,
    Teaching,
    TrainingReport,
)
from recoup_ml import (
    alignment,
    answers,
    baselines,
    diagnose,
    distil,
    forms,
    measures,
    models,
    results,
    skill,
    teaching,
    verdict,
)
from recoup_ml.alignment import States
from recoup_ml.diagnose import Exam
from recoup_ml.effect_probe import probe_rows
from recoup_ml.observation import load_states, observe
from recoup_ml.probe import Probe, make_probe
from recoup_ml.repair import Repair
from recoup_ml.results import Behaviour, Diagnosis, Evaluation
from recoup_ml.run import Counter, Done, Journal, Run
from recoup_ml.scores import compare
from recoup_ml.sequences import encode
from recoup_ml.skill import Skill

WEIGHTS, PROBE, AFTER = "weights", "probe.json", "after.json"
CLOSED = 0.9
"""Recovered fraction from which more of the same training can hardly help."""


def evaluate(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Fills `folder` with the evaluation and the alignment; here the test split is used for the last time."""
    tokenizer = models.load_tokenizer(run.teacher)
    diagnosis = diagnose.read(done)
    exam = Exam.load(done["diagnose"], run, tokenizer)
    prompts = encode(diagnose.split_prompts(run).test, tokenizer, run.prompt_tokens)
    probe = make_probe(run, prompts, tokenizer)
    rival, demonstrations = _rival(done), skill.held_out(run, tokenizer)
    shown = skill.PASSES * len(demonstrations.items) if demonstrations else 0
    counter = Counter(journal, (1 + bool(rival)) * (len(exam.test) + probe.answers) + shown, "sequences")
    after, states, able = None, None, None
    if best := distil.best(done):
        student = _recovered(run, done, best, folder)
        after, states = diagnose.sit(student, exam, probe, counter)
        if not math.isfinite(after.scores.mean_kl):
            after, states = None, None
        elif demonstrations:
            able = demonstrations.done_by(student, counter)
        del student
    models.release()
    gate, seed = run.request.evaluation.gate, run.request.seed
    found = measures.measures(diagnosis, after, exam.test, probe, gate, seed)
    baseline = None
    if rival and after:
        model = baselines.repaired(run, done, rival, done["distil"] / baselines.FITS)
        repaired, _ = diagnose.sit(model, exam, probe, counter)
        names = rival.name, rival.label
        baseline = measures.baseline(names, diagnosis, after, repaired, exam.test, probe, seed)
    found_alignment = aligned(run, diagnosis, done["diagnose"], states, exam)
    taught = _teaching(run, done, able, after)
    outcome, reason = _verdict(run, diagnosis, found, taught)
    short = measures.deficits(probe, diagnosis.teacher, after, seed) if after else []
    evaluation = Evaluation(
        outcome=outcome,
        reason=reason,
        measures=found,
        baseline=baseline,
        teaching=taught,
        forms=_forms(run, done, best, diagnosis, exam) if best and after else [],
        samples=samples(probe, diagnosis, after),
        remarks=[
            *remarks(found, found_alignment, exam, baseline),
            *(teaching.remarks(taught) if taught else []),
            *out_of_reach(found, short),
            *along_the_way(distil.read(done) if "distil" in done else None),
        ],
    )
    results.write(folder / "evaluation.json", evaluation)
    if after:
        results.write(folder / AFTER, after)
        results.write(folder / PROBE, probe_rows(exam.test, diagnosis.before.scores, after.scores))
    recovered = found[0].recovered
    journal.metric(name="verdict", outcome=outcome, recovered=recovered and recovered.value)
    (folder / "alignment.json").write_text(found_alignment.model_dump_json())


def read(done: Done) -> Evaluation:
    return results.read(done["evaluate"] / "evaluation.json", Evaluation)


def read_probe(done: Done) -> list[ProbeRow]:
    """Empty where nothing was trained or repaired."""
    path = done["evaluate"] / PROBE
    return results.read(path, list[ProbeRow]) if path.exists() else []


def read_alignment(done: Done) -> Alignment:
    return Alignment.model_validate_json((done["evaluate"] / "alignment.json").read_text())


def handed_over(done: Done) -> Path | None:
    """The whole model that was packed or unpacked to be handed over, if one was."""
    folder = done["evaluate"] / WEIGHTS
    return folder if folder.exists() else None


def _recovered(run: Run, done: Done, best: Path, folder: Path) -> PreTrainedModel:
    """The student after training, in the form in which it is handed over."""
    output = answers.read_plan(done).output
    if output == "adapter" or (output == "merged" and not forms.can_change(run.student)):
        return models.load_trained(run.student, best)
    forms.write(run.student, best, output, folder / WEIGHTS)
    return models.load(folder / WEIGHTS)


def _forms(run: Run, done: Done, best: Path, diagnosis: Diagnosis, exam: Exam) -> list[OutputForm]:
    """What the student's other forms would have cost, where it is packed and has an adapter."""
    if not (forms.can_change(run.student) and models.is_adapter(best)):
        return []

    def measure(model: PreTrainedModel) -> Measure:
        seen = observe(model, exam.test, exam.pad_id)
        return measures.divergence(diagnosis, compare(exam.teacher, seen, exam.test), run.request.seed)

    return forms.measured(run.student, best, answers.read_plan(done).output, measure)


def aligned(
    run: Run, diagnosis: Diagnosis, diagnosed: Path, after: list[Tensor] | None, exam: Exam
) -> Alignment:
    names = ("teacher", "before", "ceiling")
    teacher, before, ceiling = (load_states(diagnosed / f"{name}-states.safetensors") for name in names)
    layer_map = alignment.with_embeddings(diagnosis.damage.layer_map)
    states = States(teacher, before, after, ceiling)
    found = alignment.align(states, exam.positions, layer_map, run.request.seed)
    if not run.teaches:
        return found
    none = dict.fromkeys(("headroom_recovered_last", "headroom_recovered_mean"))  # a healthy model has none
    return found.model_copy(update=none)


def _teaching(run: Run, done: Done, able: Skill | None, after: Behaviour | None) -> Teaching | None:
    if not run.teaches:
        return None
    drift = after and after.scores
    return teaching.teaching(skill.split(run), skill.untaught(done), able, drift, run.request.seed)


def _verdict(
    run: Run, diagnosis: Diagnosis, found: Sequence[Measure], taught: Teaching | None
) -> tuple[Outcome, str]:
    if taught:
        return teaching.outcome(taught, found, run.request.evaluation.gate)
    if diagnosis.needed:
        return verdict.outcome(found[0], found, run.request.evaluation.gate)
    before, floor = diagnosis.before.scores.mean_kl, diagnosis.floor.mean_kl
    tasks = ", and no task shows a deficit" if run.tasks or run.harness else ""
    return "not_needed", (
        f"The student's token KL to its teacher is {before:.2g} nats, rounding alone costs {floor:.2g}"
        f"{tasks}: there is nothing to recover."
    )


def _rival(done: Done) -> Repair | None:
    """The training-free repair to be beaten, where something was trained."""
    if "distil" not in done or distil.read(done) is None:
        return None
    trials = baselines.read(done)
    return trials and trials.best


def remarks(
    found: Sequence[Measure], alignment: Alignment, exam: Exam, baseline: Baseline | None
) -> list[str]:
    """What a reader must know beside the numbers, above all where they disagree."""
    said = []
    cut = sum(answer.finish == "length" for answer in exam.test)
    if cut:
        said.append(f"{cut} of {len(exam.test)} teacher answers were cut at generation.max_new_tokens.")
    said += disagreements(found[0].recovered, alignment)
    if baseline and direction(baseline.lead) < 1:
        said.append(f"Training is not ahead of what costs nothing: {baseline.label}.")
    worse = [
        item.label
        for item in found
        if item.recovered and item.recovered.high is not None and item.recovered.high < 0 and not item.worse
    ]
    if worse:
        said.append(f"Moved away from the teacher: {', '.join(worse)}.")
    return said


def disagreements(divergence: Estimate | None, aligned: Alignment) -> list[str]:
    """A sentence for each alignment that went the other way than the divergence, beyond both intervals."""
    shares = {
        "last layer's": aligned.headroom_recovered_last,
        "mean": aligned.headroom_recovered_mean,
    }
    return [
        f"Measures disagree: the {name} alignment {'rose' if direction(share) > 0 else 'fell'} "
        f"while the divergence from the teacher {'grew' if direction(divergence) < 0 else 'shrank'}. "
        "Trust the divergence."
        for name, share in shares.items()
        if direction(share) * direction(divergence) < 0
    ]


def along_the_way(training: TrainingReport | None) -> list[str]:
    """A sentence for each alignment that went against recovery over the course of training."""
    found = training.trajectory.correlations if training and training.trajectory else []
    return [
        f"Measures disagree along the training: over {item.n} points the "
        f"{'mean alignment' if item.alignment == 'mean' else 'alignment of the last layer'} went against "
        f"recovery, Spearman {rank.value:.2f} ({_certainty(rank)}). Trust the divergence."
        for item in found
        if (rank := item.spearman) and rank.value < 0
    ]


def _certainty(rank: Estimate) -> str:
    if rank.low is None or rank.high is None:
        return "no interval can be given"
    chance = "" if direction(rank) else ", which may be chance"
    return f"95 % interval {rank.low:.2f} to {rank.high:.2f}{chance}"


def out_of_reach(found: Sequence[Measure], short: Sequence[str]) -> list[str]:
    """A sentence for each of the `short` tasks that training left so although it closed the gap of the KL."""
    r = found[0].recovered
    if r is None or r.value < CLOSED:
        return []
    return [
        f"Not recoverable at this size, as far as can be seen: {item.label}, stays at {item.after:.3g} "
        f"against the teacher's {item.teacher:.3g}, although {r.value:.0%} of the KL gap was recovered."
        for item in found
        if item.name in short
    ]


def direction(estimate: Estimate | None) -> int:
    """1 or -1 where the interval lies on one side of zero, else 0."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def samples(probe: Probe, diagnosis: Diagnosis, after: Behaviour | None) -> list[Sample]:
    return [
        Sample(
            kind=prompt.kind,
            prompt=prompt.text,
            teacher=diagnosis.teacher.greedy[index],
            before=diagnosis.before.greedy[index],
            after=after.greedy[index] if after else None,
        )
        for index, prompt in enumerate(probe.samples)
    ]
