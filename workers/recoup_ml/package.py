"""The package stage: what a recovery hands over.

Promoted weights (an adapter, or a whole model), the report as JSON and as a page, the
alignment as data and pictures, the teacher's answers, and a card. A student that did not
get better gets its report and no weights.
"""

import json
import shutil
from pathlib import Path

from peft import PeftModel

from recoup.schemas import Report
from recoup_ml import answers, distil, evaluate, models
from recoup_ml.card import model_card
from recoup_ml.errors import RecoveryError
from recoup_ml.page import html_page
from recoup_ml.plots import alignment_png, alignment_svg
from recoup_ml.report import PROMOTED, assemble
from recoup_ml.run import Done, Journal, Run
from recoup_ml.weights import zeros_filled

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def package(run: Run, journal: Journal, done: Done, folder: Path) -> None:
    """Publishes the recovery's artifacts."""
    report = assemble(run, journal, done)
    weights = folder / "weights"
    if evaluate.read(done).outcome in PROMOTED:
        _write_weights(run, done, weights)
        _write_card(run, done, report, weights)
    pages = _write_report(report, folder)
    if "generate" in done:
        pages["rewrites.jsonl"] = done["generate"] / "train.jsonl"
    journal.publish(pages | _weight_files(done, weights))


def _write_report(report: Report, folder: Path) -> dict[str, Path]:
    contents = {
        "report.json": report.model_dump_json(indent=1).encode(),
        "report.html": html_page(report).encode(),
        "alignment.json": report.alignment.model_dump_json().encode(),
        "alignment.svg": alignment_svg(report.alignment).encode(),
        "alignment.png": alignment_png(report.alignment),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


def _write_weights(run: Run, done: Done, folder: Path) -> None:
    plan, best = answers.read_plan(done), distil.best(done)
    assert best is not None
    if plan.output == "merged" and plan.mode == "lora":
        merged = PeftModel.from_pretrained(models.load(run.student), best).merge_and_unload()
        merged.save_pretrained(folder)
    else:
        shutil.copytree(best, folder, dirs_exist_ok=True)
    if plan.output == "adapter":
        _name_base(folder / "adapter_config.json", run.request.student.source)
    for name in TOKENIZER_FILES:
        if (run.student / name).exists():
            shutil.copy(run.student / name, folder / name)
    if plan.keep_zeros and plan.output == "merged" and (filled := zeros_filled(run.student, folder)):
        raise RecoveryError(
            f"{filled} of the student's pruned weights are no longer zero; nothing is published."
        )


def _name_base(config: Path, source: str) -> None:
    """PEFT writes down the folder that the student was loaded from here; a user knows it by its source."""
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": source}, indent=2)
    )


def _write_card(run: Run, done: Done, report: Report, folder: Path) -> None:
    name = run.request.output.name or f"{run.student.name}-recovered"
    kind = answers.read_plan(done).output
    (folder / "README.md").write_text(model_card(report, run.student.name, kind, name), "utf-8")


def _weight_files(done: Done, folder: Path) -> dict[str, Path]:
    if not folder.exists():
        return {}
    place = answers.read_plan(done).output
    return {f"{'adapter' if place == 'adapter' else 'model'}/{path.name}": path for path in folder.iterdir()}
