"""The package stage: what a recovery hands over.

Promoted weights (an adapter, or a whole model), the report as JSON and as a page, the
alignment as data and pictures, what was learnt from, a script that repeats the training, and a
card. A student that did not get better gets its report and no weights.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from recoup.schemas import HANDED_OVER, Alignment, EffectProbe, Report
from recoup_ml import answers, compose, diagnose, distil, evaluate, models, plots
from recoup_ml.alignment import csv_table
from recoup_ml.card import model_card
from recoup_ml.errors import RecoveryError
from recoup_ml.page import html_page
from recoup_ml.plan import Plan
from recoup_ml.report import assemble
from recoup_ml.run import Done, Journal, Run
from recoup_ml.script import recipe_script
from recoup_ml.sequences import Encoded, encode
from recoup_ml.weights import zeros_filled

RECIPE, PROMPTS, CHECKPOINT = "recipe.py", "prompts.jsonl", "checkpoint"
TAUGHT = ("texts.jsonl", "keep.jsonl")
"""Beside the teacher's answers: reference answers, rewritten or not, and the student's own on `keep`."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
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
    files = _write_report(report, folder)
    if evaluate.read(done).outcome in HANDED_OVER:
        _write_weights(run, done, weights)
        _write_card(run, done, report, weights)
        files |= _write_probe(done, report, folder)
    if "generate" in done:
        files |= _learnt(run, done, report, folder)
    files |= compose.files(done)
    journal.publish(files | _weight_files(done, weights))


def checkpoint(run: Run, journal: Journal, best: Path, folder: Path) -> None:
    """Publishes the best checkpoint of a recovery that was given up: unproven, so without a report."""
    weights = folder / CHECKPOINT
    shutil.copytree(best, weights, ignore=shutil.ignore_patterns("README.md"))
    if (weights / ADAPTER_FILES[0]).exists():
        _name_base(weights / ADAPTER_FILES[0], run.request.student.source)
    journal.publish({f"{CHECKPOINT}/{path.name}": path for path in weights.iterdir()})


def _write_report(report: Report, folder: Path) -> dict[str, Path]:
    contents = {
        "report.json": report.model_dump_json(indent=1).encode(),
        "report.html": html_page(report).encode(),
    }
    return _written(contents, folder) | alignment_files(report.alignment, folder)


def _write_probe(done: Done, report: Report, folder: Path) -> dict[str, Path]:
    """By what a server is held to these weights."""
    rows = evaluate.read_probe(done)
    probe = EffectProbe(object="recovery.probe", base_sha256=report.provenance.student_sha256, rows=rows)
    return _written({"probe.json": probe.model_dump_json(indent=1).encode()}, folder) if rows else {}


def alignment_files(alignment: Alignment, folder: Path) -> dict[str, Path]:
    """The alignment as data, as a table and as pictures, by what they are called."""
    contents = {
        "alignment.json": alignment.model_dump_json().encode(),
        "alignment.csv": csv_table(alignment).encode(),
        "alignment.svg": plots.alignment_svg(alignment).encode(),
        "alignment.png": plots.alignment_png(alignment),
    }
    return _written(contents, folder)


def _written(contents: dict[str, bytes], folder: Path) -> dict[str, Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


def _learnt(run: Run, done: Done, report: Report, folder: Path) -> dict[str, Path]:
    """What there was to learn from and, if anything was trained, the script that repeats it."""
    generated, plan = done["generate"], answers.read_plan(done)
    rewrites = generated / "rewrites.jsonl"
    learnt = rewrites if rewrites.exists() else generated / "train.jsonl"
    files = {"rewrites.jsonl": learnt} if learnt.exists() else {}
    files |= {name: generated / name for name in TAUGHT if (generated / name).exists()}
    if asked := _asked(run, plan):
        files[PROMPTS] = folder / PROMPTS
        files[PROMPTS].write_text("".join(asked), "utf-8")
    started = _start(run, done, folder)
    if report.training:
        files[RECIPE] = folder / RECIPE
        files[RECIPE].write_text(recipe_script(report, plan, run.request, bool(started)), "utf-8")
    return files | started


def _start(run: Run, done: Done, folder: Path) -> dict[str, Path]:
    """The adapter that training went on with, where a repair left one."""
    left = done["distil"] / distil.START
    if not left.exists():
        return {}
    shutil.copytree(left, folder / distil.START)
    _name_base(folder / distil.START / ADAPTER_FILES[0], run.request.student.source)
    return {f"{distil.START}/{name}": folder / distil.START / name for name in ADAPTER_FILES}


def _asked(run: Run, plan: Plan) -> list[str]:
    """The prompts that a student answers while it trains, a line each; none if it answers none."""
    tokenizer = models.load_tokenizer(run.teacher)
    if plan.answers("demonstrated"):
        items, shown = answers.demonstrations(run, tokenizer)
        return [_line(item, shown_ids=shown[item.ids]) for item in items]
    if plan.answers("student"):
        return [
            _line(item) for item in encode(diagnose.split_prompts(run).train, tokenizer, run.prompt_tokens)
        ]
    return []


def _line(item: Encoded, **more: Sequence[int]) -> str:
    return json.dumps({"prompt": item.text, "prompt_ids": item.ids} | more, ensure_ascii=False) + "\n"


def _write_weights(run: Run, done: Done, folder: Path) -> None:
    plan, best = answers.read_plan(done), distil.best(done)
    assert best is not None
    if changed := evaluate.handed_over(done):
        shutil.copytree(changed, folder, dirs_exist_ok=True)
    elif plan.output == "merged" and models.is_adapter(best):
        merged = PeftModel.from_pretrained(models.load(run.student), best).merge_and_unload()
        merged.save_pretrained(folder)
    else:
        shutil.copytree(best, folder, dirs_exist_ok=True)
    if plan.output == "adapter":
        _name_base(folder / "adapter_config.json", run.request.student.source)
    for name in TOKENIZER_FILES:
        if (run.student / name).exists():
            shutil.copy(run.student / name, folder / name)
    holds = plan.trainable.keep_zeros and plan.output == "merged"
    if holds and (filled := zeros_filled(run.student, folder)):
        raise RecoveryError(
            f"{filled} of the student's pruned weights are no longer zero; nothing is published."
        )


def _name_base(config: Path, source: str) -> None:
    """PEFT writes down the folder that the student was loaded from here; a user knows it by its source."""
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": source}, indent=2)
    )


def _write_card(run: Run, done: Done, report: Report, folder: Path) -> None:
    name = run.request.output.name or f"{run.student.name}-{'taught' if run.teaches else 'recovered'}"
    kind = answers.read_plan(done).output
    (folder / "README.md").write_text(model_card(report, run.student.name, kind, name), "utf-8")


def _weight_files(done: Done, folder: Path) -> dict[str, Path]:
    if not folder.exists():
        return {}
    place = answers.read_plan(done).output
    return {f"{'adapter' if place == 'adapter' else 'model'}/{path.name}": path for path in folder.iterdir()}
