"""The report of a recovery, put together from what its stages left."""

import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

from recoup.schemas import HANDED_OVER, Choice, Cost, Provenance, Report, TrainingReport
from recoup_ml import answers, baselines, diagnose, distil, evaluate, models, weights
from recoup_ml.results import Diagnosis
from recoup_ml.run import Done, Journal, Run
from recoup_ml.sequences import read_jsonl

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")


def assemble(run: Run, journal: Journal, done: Done) -> Report:
    diagnosis, evaluation = diagnose.read(done), evaluate.read(done)
    training = distil.read(done) if "distil" in done else None
    return Report(
        object="recovery.report",
        recovery=run.job_id,
        created_at=time.time(),
        outcome=evaluation.outcome,
        reason=evaluation.reason,
        promoted=evaluation.outcome in HANDED_OVER,
        recovered=evaluation.measures[0].recovered,
        gate=run.request.evaluation.gate,
        teaching=evaluation.teaching,
        remarks=evaluation.remarks,
        measures=evaluation.measures,
        splits=diagnosis.splits,
        damage=diagnosis.damage,
        plan=list(answers.read_plan(done).choices) if "distil" in done else _nothing_to_plan(),
        training=training,
        repairs=baselines.shown(done),
        baseline=evaluation.baseline,
        forms=evaluation.forms,
        alignment=evaluate.read_alignment(done),
        samples=evaluation.samples,
        cost=cost(run, journal, done, diagnosis, training),
        provenance=provenance(run),
    )


def _nothing_to_plan() -> list[Choice]:
    return [
        Choice(name="method", value="none", why="the student is as close to its teacher as rounding allows")
    ]


def cost(
    run: Run, journal: Journal, done: Done, diagnosis: Diagnosis, training: TrainingReport | None
) -> Cost:
    learnt = _generated(done["generate"]) if "generate" in done else 0
    return Cost(
        stage_seconds=journal.stage_seconds(),
        tokens_generated=diagnosis.tokens_generated + learnt,
        tokens_trained=training.tokens if training else 0,
        peak_memory_bytes=_peak_memory(),
        device=models.device().type,
        estimate=run.estimate,
    )


def _generated(folder: Path) -> int:
    """Tokens of all answers; of rewrites, those that there are to learn."""
    parts = ["train", "validation", "keep"] + ["texts"] * (folder / "rewrites.jsonl").exists()
    files = [folder / f"{part}.jsonl" for part in parts]
    return sum(len(answer.answer_ids) for file in files if file.exists() for answer in read_jsonl(file))


def _peak_memory() -> int:
    """The largest resident set of this process so far, bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def provenance(run: Run) -> Provenance:
    libraries = {name: version(name) for name in LIBRARIES}
    return Provenance(
        seed=run.request.seed,
        student=run.request.student.source,
        teacher=run.request.teacher.source,
        student_sha256=weights.sha256(run.student),
        teacher_sha256=weights.sha256(run.teacher),
        versions=libraries | {"python": platform.python_version(), "recoup": _recoup_version()},
    )


def _recoup_version() -> str:
    from recoup import __version__

    return __version__
