"""The script that repeats a training: plain Python that computes the same, and that nothing breaks out of."""

import ast
import json
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from recoup.schemas import ChatRow, Checkpoint, CreateRecovery, PhaseReport, Prompt, Report, TrainingReport
from recoup_ml import baselines, stream
from recoup_ml.plan import DATA, Plan, make_plan
from recoup_ml.recipe import recover
from recoup_ml.run import Run
from recoup_ml.script import comment, recipe_script
from recoup_ml.tickets import ticket_rows
from recoup_ml.weights import zeros_filled

pytestmark = pytest.mark.usefixtures("blank_pictures")
SAMPLES = json.loads((Path(__file__).parent / "sample_report.json").read_text("utf-8"))
MODES = {
    "lora": {"mode": "lora"},
    "lora (by damage)": {"mode": "lora", "lora": {"allocation": "damage", "targets": ["q_proj", "up_proj"]}},
    "dora": {"mode": "dora"},
    "full": {"mode": "full"},
    "norms": {"mode": "norms"},
    "masked full": {"mode": "full"},
    "masked lora": {"mode": "lora"},
    "masked lora (of some)": {"mode": "lora", "lora": {"targets": ["q_proj"]}},
}
FILE = "file-" + "0" * 24
OBJECTIVES = [
    {},
    {"divergence": "reverse_kl", "temperature": 2.0},
    {"divergence": "jsd", "beta": 0.3},
    {"divergence": "skew_kl", "top_k": 8},
    {"rollouts": {"skip_tokens": 2, "temperature": 0.0}},
]


def asked(**fields: object) -> CreateRecovery:
    return CreateRecovery.model_validate({"student": {"source": "s"}, "teacher": {"source": "t"}} | fields)


def planned(request: CreateRecovery, masked: bool) -> Plan:
    report = Report.model_validate(SAMPLES["recovered"])
    damage = report.damage.model_copy(update={"zero_pattern": "2:4" if masked else "none"})
    return make_plan(request, damage, 100)


def trained(
    plan: Plan, mode: str, keep: int = 0, started_from: str = "student", fitted: int = 0, **changes: object
) -> Report:
    """The report of a training that went as planned."""
    phases = [
        PhaseReport(
            data=phase.data,
            objective="",
            learning_rate=phase.learning_rate,
            planned_steps=phase.steps,
            steps=phase.steps,
            tokens=1,
            seconds=1.0,
            stopped="steps",
            rollouts=None,
        )
        for phase in plan.phases
    ]
    training = TrainingReport(
        method=plan.method,
        mode=mode,
        started_from=started_from,
        fitted_answers=fitted,
        steps=plan.steps,
        batch_size=plan.batch_size,
        phases=phases,
        trainable_parameters=1,
        keep_answers=keep,
        tokens=1,
        masked_weights=0,
        initial_validation_kl=1.0,
        initial_skill_loss=None,
        diverged=False,
        rewrites=None,
        curve=[],
        checkpoints=[Checkpoint(step=plan.steps, validation_kl=0.1, skill_loss=None, chosen=True)],
        trajectory=None,
    )
    report = Report.model_validate(SAMPLES["recovered"] | {"training": training.model_dump()})
    return report.model_copy(update=changes)


def script(
    method: str = "off_policy",
    mode: str = "lora",
    objective: dict | None = None,
    patched: bool = False,
    **changes: object,
) -> str:
    masked = mode.startswith("masked")
    output = {"kind": "merged"} if masked else {}
    method_ = {"type": method, **(objective or {})}
    healthy = {"teacher": {"source": "s"}, "teach": {"file": FILE}} if "teacher" in method_ else {}
    request = asked(method=method_, training=MODES[mode], output=output, **healthy)
    plan = planned(request, masked)
    return recipe_script(trained(plan, mode.partition(" (")[0], **changes), plan, request, patched)


def ruff(*arguments: object) -> str:
    command = [Path(sys.executable).with_name("ruff"), *arguments, "--isolated", "--line-length=110"]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    return found.stdout if found.returncode else ""


@pytest.mark.parametrize("mode", MODES)
def test_every_script_is_tidy_python(mode: str, tmp_path: Path) -> None:
    variants = product(DATA, OBJECTIVES, (0, 8), ("student", "a repair"))
    for number, (method, objective, keep, started) in enumerate(variants):
        origin = {"started_from": started, "fitted": 5 * (started != "student" and method == "off_policy")}
        text = script(method, mode, objective, patched=mode == "lora", keep=keep, **origin)
        compile(text, "recipe.py", "exec")
        (tmp_path / f"{number}.py").write_text(text, "utf-8")
    assert ruff("check", "--select=E,F,I,B,UP,SIM,RET,ARG", tmp_path) == ""
    assert mode == "lora (by damage)" or ruff("format", "--diff", tmp_path) == ""


@pytest.mark.parametrize("mode", MODES)
def test_the_script_of_a_moving_teacher_is_tidy_too(mode: str, tmp_path: Path) -> None:
    text = script("self_demonstration", mode, {"teacher": "ema", "ema_rate": 0.05}, keep=8)
    assert constants(text)["EMA_RATE"] == 0.05
    (tmp_path / "recipe.py").write_text(text, "utf-8")
    assert ruff("check", "--select=E,F,I,B,UP,SIM,RET,ARG", tmp_path) == ""
    assert mode == "lora (by damage)" or ruff("format", "--diff", tmp_path) == ""


def imported(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


def test_a_script_needs_no_more_than_it_uses() -> None:
    standard = {"argparse", "json", "math", "pathlib", "torch", "transformers"}
    assert imported(script(mode="lora")) == standard | {"peft"}
    assert imported(script("two_stage", "masked lora", keep=8)) == standard
    assert "teacher" not in ast.unparse(ast.parse(script("sft", "full"))).split('"""')[2]
    assert len(script(mode="full").splitlines()) < 130
    assert len(script("two_stage", "masked lora", OBJECTIVES[3], keep=8).splitlines()) < 230


def test_a_script_ends_at_the_checkpoint_that_was_kept() -> None:
    plan = planned(asked(method={"type": "two_stage"}, training={"steps": 24}), masked=False)
    report = trained(plan, "lora")
    cases = [(20, [(16, 16), (8, 4)]), (12, [(16, 12)]), (0, [(16, 0)]), (None, [(16, 16), (8, 8)])]
    for kept, phases in cases:
        step, chosen = (24, False) if kept is None else (kept, True)
        points = [Checkpoint(step=step, validation_kl=0.1, skill_loss=None, chosen=chosen)]
        told = report.model_copy(
            update={"training": report.training.model_copy(update={"checkpoints": points})}
        )
        written = constants(recipe_script(told, plan, asked()))["PHASES"]
        assert [phase[:2] for phase in written.values()] == phases


def constants(text: str) -> dict[str, object]:
    """What a script writes down as literals at its top."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with suppress(ValueError):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


EVIL = [
    '"""\nevil()\n"""',
    "'\nevil()\n'",
    "\revil()",
    "\x0cevil()",
    "a\u2028evil()",
    "\\",
    "{{ 7 * 7 }}",
    "\x00",
]


@pytest.mark.parametrize("text", EVIL)
def test_nothing_breaks_out_of_a_comment(text: str) -> None:
    lines = comment(f"Student {text}").splitlines()
    assert all(line.startswith("# ") for line in lines)
    assert ast.parse("\n".join([*lines, "x = 1"])).body[0].lineno == len(lines) + 1


@pytest.mark.parametrize("text", EVIL)
def test_whatever_things_are_called_the_script_does_the_same(text: str) -> None:
    plan = planned(asked(), masked=False)
    plan = replace(plan, trainable=replace(plan.trainable, targets=[text]))
    report = trained(plan, "lora", recovery=text, reason=text)
    named = {"student": text, "teacher": text, "versions": {text: text}}
    report = report.model_copy(update={"provenance": report.provenance.model_copy(update=named)})
    odd, plain = (ast.parse(recipe_script(told, plan, asked())) for told in (report, trained(plan, "lora")))
    assert ast.dump(odd) == ast.dump(plain)
    assert constants(ast.unparse(odd))["TARGETS"] == [text]


@dataclass(frozen=True)
class Repeated:
    run: Run
    place: Path
    """Of the journal."""
    report: Report
    losses: list[float]
    weights: Path
    """What the script saved."""

    @property
    def kl(self) -> float:
        (measure,) = [measure for measure in self.report.measures if measure.name == "kl"]
        return measure.after


SKILL = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(40, seed=77)]
SHORT = {"steps": 12, "stop_early": False, "start": "student"}
MERGED = {"output": {"kind": "merged"}}
CASES: dict[str, tuple[str, list[Prompt], dict[str, object]]] = {
    "lora": ("forgetful", SKILL, {"training": SHORT}),
    "masked full": (
        "pruned",
        [],
        {
            "training": SHORT | {"mode": "full", "learning_rate": 2e-4},
            "method": {"divergence": "jsd"},
        },
    ),
    "masked lora": (
        "pruned",
        [],
        {"training": SHORT | {"mode": "lora"}, "method": {"top_k": 8, "temperature": 2.0}} | MERGED,
    ),
    "dora": ("finetuned", [], {"training": SHORT | {"mode": "dora"}, "method": {"type": "rewrite_sft"}}),
    "by damage": (
        "finetuned",
        [],
        {
            "training": SHORT | {"mode": "lora", "lora": {"allocation": "damage"}},
            "method": {"type": "two_stage", "divergence": "skew_kl", "rollouts": {"skip_tokens": 1}},
        }
        | MERGED,
    ),
    "demonstrated": (
        "finetuned",
        [],
        {
            "training": SHORT | {"mode": "lora"},
            "method": {"type": "self_demonstration", "rollouts": {"temperature": 0.0}},
        },
    ),
    "averaged": (
        "copy",
        [],
        {
            "student": {"source": "teacher"},
            "teach": {"file": FILE},
            "training": SHORT | {"mode": "lora", "learning_rate": 3e-3},
            "method": {
                "type": "self_demonstration",
                "teacher": "ema",
                "ema_rate": 0.2,
                "rollouts": {"temperature": 0.0},
            },
        },
    ),
    "after a patch": (
        "rounded",
        [],
        {
            "training": SHORT | {"mode": "lora", "start": "repair", "lora": {"rank": 2}},
            "method": {"divergence": "reverse_kl"},
        },
    ),
    "after a repair": ("wanda", [], {"training": SHORT | {"mode": "full", "start": "repair"}}),
}


COSTLY = {"dora", "by damage", "demonstrated", "averaged", "after a patch", "masked lora"}
"""Beyond what the others show, for 20 seconds each."""
SLOW = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(
    scope="module",
    params=[SLOW(name) if name in COSTLY else name for name in CASES],
)
def repeated(
    request: pytest.FixtureRequest,
    make_run: Callable[..., Run],
    open_journal: type,
    tmp_path_factory: pytest.TempPathFactory,
) -> Repeated:
    """A recovery, and its training once more by its script."""
    damage, keep, fields = CASES[request.param]
    evaluation = {"test_sequences": 32, "validation_sequences": 8, "baselines": False}
    run = make_run(damage, keep=keep, evaluation=evaluation, **fields)
    run = replace(run, teach=SKILL if run.teaches else ())
    journal = open_journal(tmp_path_factory.mktemp("repeated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CALIBRATION_TOKENS", 600)
        recover(run, journal)
    losses = repeat(run, journal.place)
    report = Report.model_validate_json(journal.published["report.json"].read_text())
    return Repeated(run, journal.place, report, losses, journal.place / "output")


def repeat(run: Run, place: Path) -> list[float]:
    """Runs the script of the recovery in `place`, told of the folders that it asks for; its losses."""
    script = place / "artifacts" / "recipe.py"
    folders = {
        "--student": run.student,
        "--start": place / "repaired",
        "--teacher": run.teacher,
        "--data": script.parent,
        "--output": place / "output",
    }
    asked = re.findall(r"(--\w+) DIR", script.read_text("utf-8"))
    if "--start" in asked:
        done = {stage: place / stage for stage in ("diagnose", "generate", "distil")}
        better = baselines.read(done).better
        baselines.repaired(run, done, better, done["distil"] / baselines.FITS).save_pretrained(
            folders["--start"]
        )
    said = printed_by(script, *(str(part) for name in asked for part in (name, folders[name])))
    return [float(line.rpartition(" ")[2]) for line in said.splitlines()]


def printed_by(script: Path, *arguments: str) -> str:
    """What the script prints, run in this process: another would load torch first, for most of its time."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said, torch.random.fork_rng():
        patch.setattr(sys, "argv", [str(script), *arguments])
        warnings.simplefilter("default")  # as elsewhere; pytest puts its own filters back
        runpy.run_path(str(script), run_name="__main__")
    return said.getvalue()


def test_the_script_takes_the_same_steps(repeated: Repeated) -> None:
    (kept,) = [point.step for point in repeated.report.training.checkpoints if point.chosen]
    losses = [point.loss for point in repeated.report.training.curve[:kept]]
    assert len(losses) == len(repeated.losses)
    assert repeated.losses[0] == pytest.approx(losses[0], rel=1e-4)
    assert repeated.losses[:4] == pytest.approx(losses[:4], rel=1e-3)  # Adam's first steps enlarge rounding
    assert repeated.losses == pytest.approx(losses, rel=1e-2)
    written = constants((repeated.place / "artifacts" / "recipe.py").read_text("utf-8"))
    assert [*written["PHASES"]] == [phase.data for phase in repeated.report.training.phases]


def test_the_script_comes_to_the_same_weights(repeated: Repeated) -> None:
    student = AutoModelForCausalLM.from_pretrained(repeated.run.student)
    before = plain_kl(repeated, student)
    if (repeated.weights / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(student, repeated.weights)
    else:
        model = AutoModelForCausalLM.from_pretrained(repeated.weights)
    assert plain_kl(repeated, model) == pytest.approx(repeated.kl, rel=1e-2)
    assert abs(repeated.kl - before) > 0.02 * before


@torch.inference_mode()
def plain_kl(repeated: Repeated, student: PreTrainedModel | PeftModel) -> float:
    """Mean token KL(teacher‖student) on the exam."""
    teacher = AutoModelForCausalLM.from_pretrained(repeated.run.teacher)
    values = []
    for line in (repeated.place / "diagnose" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, first = torch.tensor([row["prompt_ids"] + row["answer_ids"]]), len(row["prompt_ids"]) - 1
        log_p, log_q = (
            model(input_ids=ids).logits[0, first:-1].log_softmax(-1) for model in (teacher, student)
        )
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("repeated", [SLOW("after a patch"), "after a repair"], indirect=True)
def test_the_script_goes_on_from_what_a_repair_left(repeated: Repeated) -> None:
    training = repeated.report.training
    assert training.started_from != "student"
    written = constants((repeated.place / "artifacts" / "recipe.py").read_text("utf-8"))
    assert written.get("FITTED", 0) == training.fitted_answers
    assert bool(training.fitted_answers) == (training.started_from == "block-wise reconstruction")
    assert repeated.losses[0] == pytest.approx(training.curve[0].loss, rel=1e-4)


@pytest.mark.parametrize("repeated", ["masked full", SLOW("masked lora")], indirect=True)
def test_the_script_keeps_the_zeros_of_a_pruned_student(repeated: Repeated) -> None:
    assert repeated.report.training.masked_weights > 0
    assert zeros_filled(repeated.run.student, repeated.weights) == 0
