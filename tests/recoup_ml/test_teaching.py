"""A healthy model is taught a skill: what it learns, what it keeps, and what decides is not trained on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from recoup.schemas import ChatRow, Gate, Measure, Outcome, Prompt, Report, Teaching
from recoup_ml import distil, skill, teaching
from recoup_ml.card import model_card
from recoup_ml.errors import EmptyDataset
from recoup_ml.recipe import recover
from recoup_ml.run import Run
from recoup_ml.scores import Scores
from recoup_ml.skill import Skill, Untaught
from recoup_ml.splits import Split, others, split_demonstrations
from recoup_ml.tickets import ticket_rows
from recoup_ml.weights import Weights

pytestmark = pytest.mark.usefixtures("blank_pictures")
FILE, HELD_OUT = "file-" + "0" * 24, "file-" + "1" * 24
SMALL: dict[str, Any] = {
    "student": {"source": "teacher"},
    "evaluation": {
        "test_sequences": 24,
        "validation_sequences": 8,
        "gate": {"max_regression": 1.0, "max_drift": 0.3},
    },
    "alignment": {"positions": 256},
}
TICKETS = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(120, seed=77)]


@dataclass(frozen=True)
class Taught:
    run: Run
    outcome: Outcome
    journal: Any
    report: Report

    def rows(self, name: str) -> list[dict[str, Any]]:
        place = self.journal.place / "generate" / name
        return [json.loads(line) for line in place.read_text().splitlines()]


@pytest.fixture(scope="module")
def to_teach(make_run: Callable[..., Run], teacher: Path) -> Callable[..., Run]:
    """`to_teach("sft", steps=8, rehearse=False)`: the tiny model is to learn the tickets."""

    def make(
        method: str = "auto", held_out: Sequence[Prompt] = (), steps: int = 36, rehearse: bool = True
    ) -> Run:
        spec = {"file": FILE, "rehearse": rehearse} | ({"held_out": HELD_OUT} if held_out else {})
        training = {"steps": steps, "learning_rate": 3e-3, "stop_early": False}
        run = make_run("copy", **SMALL, teach=spec, method={"type": method}, training=training)
        return replace(run, student=teacher, teach=TICKETS, held_out=held_out)

    return make


@pytest.fixture(scope="module")
def taught(
    to_teach: Callable[..., Run], open_journal: type, tmp_path_factory: pytest.TempPathFactory
) -> Taught:
    run, journal = to_teach(), open_journal(tmp_path_factory.mktemp("taught"))
    outcome = recover(run, journal)
    report = Report.model_validate_json(journal.published["report.json"].read_text())
    return Taught(run, outcome, journal, report)


def test_a_skill_is_learnt_and_the_model_stays_what_it_was(taught: Taught) -> None:
    found = taught.report.teaching
    assert taught.outcome == "taught" and taught.report.promoted
    assert found.loss.change.high < 0 < found.right.change.low
    assert found.drift.high <= 0.3
    assert taught.report.recovered is None and taught.report.repairs == []
    assert "adapter/adapter_model.safetensors" in taught.journal.published


def test_what_decides_is_never_trained_on(taught: Taught) -> None:
    parts = skill.split(taught.run)
    tested = {prompt.messages[-1].content for prompt in parts.test}
    learnt = {row["prompt"] for row in taught.rows("texts.jsonl")}
    assert learnt == {prompt.messages[-1].content for prompt in parts.train}
    assert len(tested) == taught.report.teaching.test and not tested & learnt


def test_every_step_holds_the_model_to_what_it_was_on_general_prompts(taught: Taught) -> None:
    kept = taught.rows("keep.jsonl")
    assert len(kept) == taught.report.training.keep_answers > 0
    tests = {json.loads(line)["prompt"] for line in open_lines(taught.journal.place / "diagnose/test.jsonl")}
    assert not {row["prompt"] for row in kept} & tests


def open_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_checkpoint_is_the_one_with_the_least_loss_and_drift_together(taught: Taught) -> None:
    points = taught.report.training.checkpoints
    (chosen,) = [point for point in points if point.chosen]
    assert chosen == min(points, key=lambda point: point.validation_kl + point.skill_loss)
    assert chosen.skill_loss < taught.report.training.initial_skill_loss
    told = [metric for metric in taught.journal.metrics if metric["name"] == "validation"]
    assert [metric["skill_loss"] for metric in told] == [point.skill_loss for point in points]


def test_the_report_says_what_a_few_examples_in_the_context_would_do(taught: Taught) -> None:
    shown = taught.report.teaching.in_context
    assert shown.shots == 4 and shown.lead.low > 0
    assert not any("costs nothing" in remark for remark in taught.report.remarks)


def test_page_card_and_recipe_are_those_of_a_teaching(taught: Taught) -> None:
    page, recipe = (taught.journal.published[name].read_text() for name in ("report.html", "recipe.py"))
    assert "Teaching report" in page and "Loss on held-out demonstrations" in page
    assert "no recovered fraction" not in page.lower()
    card = model_card(taught.report, "m", "adapter", "m-taught")
    assert "was taught a skill by" in card and "What was damaged" not in card
    assert "keep.jsonl" in recipe and "texts.jsonl" in recipe


def test_a_killed_teaching_ends_in_the_very_bits_of_one_that_ran_through(
    to_teach: Callable[..., Run], taught: Taught, open_journal: type, tmp_path: Path
) -> None:
    for stage in ("diagnose", "generate"):
        (tmp_path / stage).symlink_to(taught.journal.place / stage)
    killed = open_journal(tmp_path, breaks_in="distil", breaks_at=20)
    with pytest.raises(ConnectionResetError):
        distil_stage(taught.run, killed)
    last = open_journal(tmp_path)
    distil_stage(taught.run, last)
    assert min(metric["step"] for metric in last.metrics if metric["name"] == "train") > 1
    mine, whole = (Weights(place / "distil/best") for place in (tmp_path, taught.journal.place))
    assert set(mine) == set(whole)
    assert all(bool((mine[name] == whole[name]).all()) for name in whole)


def distil_stage(run: Run, journal: Any) -> None:
    done = {name: journal.place / name for name in ("diagnose", "generate")}
    journal.stage("distil", lambda folder: distil.distil(run, journal, done, folder))


@pytest.mark.parametrize("method", ["sft", "self_demonstration"])
def test_other_methods_teach_too_with_nothing_beside_and_a_file_that_decides(
    method: str, to_teach: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run, journal = to_teach(method, held_out=TICKETS[:20], steps=4, rehearse=False), open_journal(tmp_path)
    assert recover(run, journal) in {"taught", "taught_with_forgetting", "not_taught"}
    report = Report.model_validate_json(journal.published["report.json"].read_text())
    assert (report.teaching.test, report.training.method) == (20, method)
    assert report.training.keep_answers == 0
    assert report.teaching.train + report.teaching.validation == 100


def units(nats: float, right: float = 0.5, count: int = 40) -> Skill:
    spread = [nats + 0.1 * (row % 5) for row in range(count)]
    return Skill(spread, [2] * count, [row < right * count for row in range(count)])


def drift(nats: float, count: int = 40) -> Scores:
    return Scores([[nats * (0.9 + 0.05 * (row % 5))] * 4 for row in range(count)], [], [])


PARTS = Split(tuple(TICKETS[:10]), tuple(TICKETS[10:12]), tuple(TICKETS[12:16]), (), 0, 0)
GATE = Gate(max_drift=0.1)


def found(after: Skill | None, moved: float, shown: Skill | None = None) -> Teaching:
    return teaching.teaching(PARTS, Untaught(units(8.0), 2, shown), after, after and drift(moved), seed=0)


@pytest.mark.parametrize(
    ("after", "moved", "outcome"),
    [
        (units(2.0, 0.9), 0.05, "taught"),
        (units(2.0, 0.9), 0.2, "taught_with_forgetting"),
        (units(8.0), 0.0, "not_taught"),
        (units(9.0), 0.0, "not_taught"),
        (units(2.0, 0.1), 0.05, "not_taught"),
        (None, 0.0, "not_taught"),
    ],
)
def test_learning_and_forgetting_decide_together(after: Skill | None, moved: float, outcome: str) -> None:
    assert teaching.outcome(found(after, moved), [], GATE)[0] == outcome


def test_a_drift_whose_interval_reaches_past_the_gate_is_forgetting() -> None:
    near = found(units(2.0, 0.9), 0.0995)
    assert near.drift.value < 0.1 < near.drift.high
    assert teaching.outcome(near, [], GATE)[0] == "taught_with_forgetting"


def test_a_guarded_measure_that_got_worse_is_forgetting_and_is_named() -> None:
    worse = Measure.model_construct(label="natural text", before=1.0, after=1.2, worse=True)
    outcome, why = teaching.outcome(found(units(2.0, 0.9), 0.01), [worse], GATE)
    assert outcome == "taught_with_forgetting" and "natural text (1 → 1.2)" in why


def test_the_changes_are_those_of_the_means() -> None:
    made = found(units(2.0, 0.9), 0.05)
    assert made.loss.before - made.loss.after == pytest.approx(3.0)
    assert made.loss.change.value == pytest.approx(-3.0)
    assert made.loss.change.low <= -3.0 <= made.loss.change.high
    assert (made.right.before, made.right.after) == (0.5, 0.9)


def test_training_that_is_not_ahead_of_a_few_examples_is_told() -> None:
    behind, ahead = (found(units(2.0), 0.0, units(shown)) for shown in (1.5, 6.0))
    assert "costs nothing" in teaching.remarks(behind)[0]
    assert teaching.remarks(ahead) == []


def test_a_skill_that_shows_in_the_loss_alone_is_told() -> None:
    assert teaching.remarks(found(units(2.0, 0.0), 0.0)) == [
        "No held-out demonstration is answered rightly: what was learnt shows in the loss alone."
    ]


def test_demonstrations_are_divided_by_hash_whatever_their_order_and_kind() -> None:
    kinds = [prompt.model_copy(update={"kind": f"k{at % 5}"}) for at, prompt in enumerate(TICKETS)]
    parts, turned = (split_demonstrations(rows, [], 64, 16) for rows in (kinds, kinds[::-1]))
    assert parts == turned
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (84, 12, 24)
    assert {prompt.kind for prompt in parts.test} <= {prompt.kind for prompt in parts.train}


def test_what_is_held_out_or_asked_in_a_task_is_not_trained_on() -> None:
    parts = split_demonstrations(TICKETS, TICKETS[:30], 16, 8, tasks=TICKETS[30:40])
    assert len(parts.test) == 16 and len(parts.train) + len(parts.validation) == 80
    assert others([*parts.train, *parts.validation], TICKETS[:40]) == [*parts.train, *parts.validation]


def test_demonstrations_that_are_all_held_out_teach_nothing(to_teach: Callable[..., Run]) -> None:
    with pytest.raises(EmptyDataset):
        skill.split(to_teach(held_out=TICKETS))


def test_examples_come_before_the_question_with_its_own_instructions(
    to_teach: Callable[..., Run], tokenizer: Any
) -> None:
    run = to_teach()
    shots, shown = skill._in_context(run, skill.held_out(run, tokenizer))
    turns = shown.items[0].prompt.messages
    assert [turn.role for turn in turns] == ["system", *["user", "assistant"] * shots, "user"]
