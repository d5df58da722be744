"""The package stage of a diagnosis: how the student is damaged, as a report, and its alignment as files."""

import time
from pathlib import Path

from recoup.schemas import DiagnosisReport
from recoup_ml import compose, diagnose, evaluate, measures, models
from recoup_ml.diagnose import Exam
from recoup_ml.package import alignment_files
from recoup_ml.probe import make_probe
from recoup_ml.report import cost, provenance
from recoup_ml.run import Done, Journal, Run
from recoup_ml.sequences import encode


def package(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Publishes the report of the diagnosis."""
    report = assemble(run, journal, done)
    files = alignment_files(report.alignment, folder)
    files["report.json"] = folder / "report.json"
    files["report.json"].write_text(report.model_dump_json(indent=1))
    journal.publish(files | compose.files(done))


def assemble(run: Run, journal: Journal, done: Done) -> DiagnosisReport:
    tokenizer, diagnosis = models.load_tokenizer(run.teacher), diagnose.read(done)
    exam = Exam.load(done["diagnose"], run, tokenizer)
    probe = make_probe(run, encode(diagnose.split_prompts(run).test, tokenizer, run.prompt_tokens), tokenizer)
    gate, seed = run.request.evaluation.gate, run.request.seed
    found = measures.measures(diagnosis, None, exam.test, probe, gate, seed)
    aligned = evaluate.aligned(run, diagnosis, done["diagnose"], None, exam)
    return DiagnosisReport(
        object="diagnosis.report",
        created_at=time.time(),
        needed=diagnosis.needed,
        damage=diagnosis.damage,
        measures=found,
        alignment=aligned,
        remarks=evaluate.remarks(found, aligned, exam, None),
        splits=diagnosis.splits,
        samples=evaluate.samples(probe, diagnosis, None),
        cost=cost(run, journal, done, diagnosis, None),
        provenance=provenance(run),
    )
