"""Whole recoveries of a tiny model: every outcome, what is handed over, and what a crash costs."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import (
    Alignment,
    ChatRow,
    EffectProbe,
    Message,
    Outcome,
    ProbeRow,
    Prompt,
    PromptRow,
    Report,
    TaskSpec,
    TrainingReport,
)
from recoup_jobs.effect import verdict as verdict_of
from recoup_jobs.publication import weights_sha256
from recoup_ml import answers, baselines, diagnose, evaluate, models, repair, results, stream, tops, verdict
from recoup_ml.errors import EmptyDataset, RecoveryError
from recoup_ml.generate import LocalEngine
from recoup_ml.observation import observe
from recoup_ml.recipe import recover
from recoup_ml.results import Behaviour
from recoup_ml.run import Run, Task
from recoup_ml.scores import compare
from recoup_ml.sequences import Encoded, encode
from recoup_ml.tickets import ticket_rows
from recoup_ml.training import validation_steps
from recoup_ml.weights import Weights, block_of, zeros_filled

pytestmark = pytest.mark.usefixtures("blank_pictures")
Student = Callable[[str], Path]
STAGES = ["diagnose", "generate", "distil", "evaluate", "package"]
REPORT_FILES = {
    "report.json",
    "report.html",
    *(f"alignment.{suffix}" for suffix in ("json", "csv", "svg", "png")),
}
LENIENT = {"evaluation": {"test_sequences": 32, "validation_sequences": 8, "gate": {"max_regression": 1.0}}}


@dataclass(frozen=True)
class Finished:
    run: Run
    outcome: Outcome
    journal: object
    report: Report

    def measure(self, name: str) -> object:
        (found,) = [item for item in self.report.measures if item.name == name]
        return found

    @property
    def weights(self) -> Path | None:
        """The folder of published weights."""
        folders = [self.journal.place / "artifacts" / name for name in ("adapter", "model")]
        return next((folder for folder in folders if folder.exists()), None)


@pytest.fixture(scope="module")
def finish(
    make_run: Callable[..., Run], open_journal: type, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Finished]:
    """`finish("pruned", training={…})`: that recovery, from beginning to end."""

    def run_to_the_end(damage: str, **request: object) -> Finished:
        run = make_run(damage, **request)
        return finished(run, open_journal(tmp_path_factory.mktemp(damage.replace(":", "-"))))

    return run_to_the_end


def finished(run: Run, journal: object) -> Finished:
    outcome = recover(run, journal)
    report = Report.model_validate_json(journal.published["report.json"].read_text())
    return Finished(run, outcome, journal, report)


def tickets(count: int) -> list[Prompt]:
    return [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(count, seed=77)]


@pytest.fixture(scope="module")
def forgetful(finish: Callable[..., Finished]) -> Finished:
    """The recovery of a student that learnt tickets and forgot its tasks, its new skill to be kept."""
    return finish("forgetful", keep=tickets(60), training={"steps": 40}, **LENIENT)


@pytest.fixture(scope="module")
def pruned(finish: Callable[..., Finished]) -> Finished:
    return finish("pruned", training={"steps": 60, "learning_rate": 1e-3}, **LENIENT)


@pytest.fixture(scope="module")
def spared(finish: Callable[..., Finished]) -> Finished:
    """The teacher against a copy of itself."""
    return finish("copy")


@pytest.fixture(scope="module")
def absurd(finish: Callable[..., Finished]) -> Finished:
    return finish("finetuned", training={"steps": 12, "mode": "full", "learning_rate": 10.0})


@pytest.fixture(scope="module", params=["forgetful", "pruned", "spared", "absurd"])
def any_recovery(request: pytest.FixtureRequest) -> Finished:
    return request.getfixturevalue(request.param)


@torch.inference_mode()
def plain_kl(finished: Finished, student: PreTrainedModel) -> float:
    """Mean token KL(teacher‖student) on the exam, by transformers' own forward passes."""
    teacher = AutoModelForCausalLM.from_pretrained(finished.run.teacher)
    total, tokens = 0.0, 0
    for line in (finished.journal.place / "diagnose" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        places = slice(len(row["prompt_ids"]) - 1, -1)
        log_p, log_q = (
            model(input_ids=ids).logits[0, places].log_softmax(-1) for model in (teacher, student)
        )
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(row["answer_ids"])
    return total / tokens


def test_a_forgetful_student_gets_its_ability_back(forgetful: Finished) -> None:
    assert forgetful.outcome == "recovered"
    assert forgetful.report.recovered.low >= 0.5
    kl = forgetful.measure("kl")
    assert kl.teacher < kl.after < kl.before / 2
    agreement = forgetful.measure("agreement")
    assert agreement.before < agreement.after < agreement.teacher == 1.0


@pytest.mark.parametrize("damage", ["finetuned", "rounded", "shallow"])
def test_every_damage_comes_to_an_outcome_of_training(damage: str, finish: Callable[..., Finished]) -> None:
    found = finish(damage, training={"steps": 24, "stop_early": False}, **LENIENT)
    assert found.outcome in {"recovered", "partial", "no_gain"}
    assert found.journal.ran == STAGES
    assert found.report.training.steps == 24
    assert found.measure("kl").after is not None


def test_a_student_without_a_layer_is_compared_with_the_layers_it_has_left(
    finish: Callable[..., Finished],
) -> None:
    alignment = finish("shallow", training={"steps": 1}).report.alignment
    assert alignment.layer_map == [(0, 0), (1, 1), (2, 2), (3, 4)]
    assert (len(alignment.before.matrix), len(alignment.before.matrix[0])) == (4, 5)
    assert alignment.before.diagonal[2].value == pytest.approx(1.0, abs=1e-5)
    assert alignment.before.diagonal[3].value < 0.999


@pytest.mark.parametrize("damage", ["copy", "round-trip"])
def test_a_student_without_damage_is_spared_the_training(
    damage: str, finish: Callable[..., Finished]
) -> None:
    found = finish(damage)
    assert found.outcome == "not_needed"
    assert found.journal.ran == ["diagnose", "evaluate", "package"]
    assert found.journal.published.keys() == REPORT_FILES
    assert found.report.training is None
    assert found.measure("kl").after is None
    assert found.report.alignment.after is None
    assert "nothing to recover" in found.report.reason


def test_the_floor_is_what_rounding_the_weights_to_bfloat16_costs(finish: Callable[..., Finished]) -> None:
    """A student that is the rounded teacher stands exactly on the floor."""
    kl = finish("round-trip").measure("kl")
    assert kl.before == pytest.approx(kl.teacher, rel=1e-3)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_absurd_learning_rate_publishes_a_report_and_no_weights(
    mode: str, finish: Callable[..., Finished]
) -> None:
    found = finish("finetuned", training={"steps": 12, "mode": mode, "learning_rate": 10.0})
    assert found.outcome in {"regressed", "no_gain"}
    assert not found.report.promoted
    assert found.weights is None
    assert found.journal.published.keys() == REPORT_FILES | {"rewrites.jsonl", "recipe.py"}


def test_a_recovery_publishes_everything_it_can_show(forgetful: Finished) -> None:
    published = forgetful.journal.published
    assert published.keys() >= REPORT_FILES | {
        "rewrites.jsonl",
        "keep.jsonl",
        "recipe.py",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "adapter/chat_template.jinja",
        "adapter/README.md",
    }
    assert published["alignment.png"].read_bytes().startswith(b"\x89PNG")
    lines = published["alignment.csv"].read_text().splitlines()
    assert len(lines) == 1 + len(json.loads(published["alignment.json"].read_text())["layer_map"])
    assert published["alignment.svg"].read_text().lstrip().startswith(("<svg", "<?xml"))
    assert "<html" in published["report.html"].read_text()
    assert (
        Alignment.model_validate_json(published["alignment.json"].read_text()) == forgetful.report.alignment
    )
    rewrites = [json.loads(line) for line in published["rewrites.jsonl"].read_text().splitlines()]
    assert len(rewrites) == forgetful.report.splits.train
    assert all(row["answer"] for row in rewrites)


def test_weights_are_published_exactly_where_the_outcome_promotes_them(any_recovery: Finished) -> None:
    promoted = any_recovery.outcome in {"recovered", "partial"}
    assert any_recovery.report.outcome == any_recovery.outcome
    assert any_recovery.report.promoted == promoted
    assert (any_recovery.weights is not None) == promoted


def test_the_primary_measure_comes_first_and_is_the_recovered_fraction(any_recovery: Finished) -> None:
    first = any_recovery.report.measures[0]
    assert first.name == "kl"
    assert any_recovery.report.recovered == first.recovered


def test_a_report_holds_numbers_that_json_has(any_recovery: Finished) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for name in ("report.json", "alignment.json"):
        json.loads(any_recovery.journal.published[name].read_text(), parse_constant=refuse)


def test_the_report_says_what_a_repetition_needs(any_recovery: Finished) -> None:
    facts = any_recovery.report.provenance
    assert (facts.student_sha256 == facts.teacher_sha256) == (any_recovery.outcome == "not_needed")
    assert facts.versions.keys() >= {"torch", "transformers", "peft", "python", "recoup"}
    assert any_recovery.report.cost.stage_seconds.keys() == set(any_recovery.journal.ran) - {"package"}


def test_kl_before_and_after_are_those_of_plain_forward_passes(forgetful: Finished) -> None:
    kl = forgetful.measure("kl")
    student = AutoModelForCausalLM.from_pretrained(forgetful.run.student)
    assert plain_kl(forgetful, student) == pytest.approx(kl.before, rel=1e-4)
    adapted = PeftModel.from_pretrained(student, forgetful.weights)
    assert plain_kl(forgetful, adapted) == pytest.approx(kl.after, rel=1e-4)


@torch.inference_mode()
def log_probability(model: PreTrainedModel, row: ProbeRow) -> float:
    """log p(token | ids), by transformers' own forward pass."""
    return float(model(input_ids=torch.tensor([row.ids])).logits[0, -1].log_softmax(-1)[row.token])


def test_what_the_recovered_student_did_is_kept_sequence_by_sequence(forgetful: Finished) -> None:
    after = results.read(forgetful.journal.place / "evaluate" / evaluate.AFTER, Behaviour)
    (kl,) = [item for item in forgetful.report.measures if item.name == "kl"]
    assert len(after.scores.kl) == kl.n
    assert after.scores.mean_kl == pytest.approx(kl.after)


def test_the_probe_holds_a_server_to_what_plain_forward_passes_find(forgetful: Finished) -> None:
    probe = EffectProbe.model_validate_json(forgetful.journal.published["probe.json"].read_text())
    assert (probe.base_sha256, len(probe.rows)) == (forgetful.report.provenance.student_sha256, 16)
    student = AutoModelForCausalLM.from_pretrained(forgetful.run.student)
    base = [log_probability(student, row) for row in probe.rows]
    assert base == pytest.approx([row.base for row in probe.rows], abs=1e-3)
    adapted = PeftModel.from_pretrained(student, forgetful.weights)
    served = [log_probability(adapted, row) for row in probe.rows]
    assert served == pytest.approx([row.recovered for row in probe.rows], abs=1e-3)
    assert weights_sha256(forgetful.run.student) == probe.base_sha256
    assert verdict_of(probe, served, base) is None
    assert verdict_of(probe, base, base).code == "no_effect"


def test_a_merged_model_loads_alone_and_does_what_was_measured(finish: Callable[..., Finished]) -> None:
    found = finish("forgetful", output={"kind": "merged"}, **LENIENT)
    assert "model/model.safetensors" in found.journal.published
    merged = AutoModelForCausalLM.from_pretrained(found.weights)
    assert plain_kl(found, merged) == pytest.approx(found.measure("kl").after, rel=1e-3)
    assert AutoTokenizer.from_pretrained(found.weights).chat_template


def test_a_recovered_pruned_model_has_exactly_its_old_zeros(pruned: Finished) -> None:
    assert pruned.outcome in {"recovered", "partial"}
    before, after = Weights(pruned.run.student), Weights(pruned.weights)
    matrices = [name for name in before if block_of(name) is not None and before[name].dim() == 2]
    for name in matrices:
        assert torch.equal(after[name] == 0, before[name] == 0)
    assert pruned.report.training.masked_weights == sum(int((after[name] == 0).sum()) for name in matrices)
    published = AutoModelForCausalLM.from_pretrained(pruned.weights)
    assert plain_kl(pruned, published) == pytest.approx(pruned.measure("kl").after, rel=1e-4)


def test_what_is_published_names_no_folder_of_this_machine(any_recovery: Finished) -> None:
    home = str(any_recovery.run.teacher.parent)
    texts = [
        path
        for path in any_recovery.journal.published.values()
        if path.suffix in {".json", ".jsonl", ".md", ".html", ".svg", ".jinja", ".py"}
    ]
    assert [path.name for path in texts if home in path.read_text()] == []


def test_a_kept_skill_is_measured_on_tickets_that_were_not_taught(
    forgetful: Finished, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = (forgetful.journal.place / "generate" / "keep.jsonl").read_text().splitlines()
    taught = {json.loads(line)["prompt"] for line in lines}
    tested = [ticket for ticket in forgetful.run.keep if ticket.messages[-1].content not in taught]
    engine = LocalEngine(models.load(forgetful.run.student), tokenizer)
    answers = engine.answer(encode(tested, tokenizer, 512), 12, lambda _done: None)
    right = sum(answer.answer == ticket.completion for answer, ticket in zip(answers, tested, strict=True))
    assert forgetful.measure("keep").before == pytest.approx(right / 30)
    assert len(taught) == len(tested) == 30


def test_what_became_of_a_kept_skill_is_reported(forgetful: Finished) -> None:
    keep = forgetful.measure("keep")
    assert keep.n == 30
    assert forgetful.report.training.keep_answers == 30
    assert keep.before > keep.teacher
    assert keep.retained.value == pytest.approx(keep.after / keep.before)
    assert keep.guarded
    assert keep.recovered is None


def test_a_skill_without_right_answers_is_held_against_the_students_own(
    finish: Callable[..., Finished],
) -> None:
    bare = [ticket.model_copy(update={"completion": None}) for ticket in tickets(20)]
    keep = finish("forgetful", keep=bare, training={"steps": 1}).measure("keep")
    assert (keep.n, keep.before) == (10, 1.0)


def test_what_a_repair_found_in_texts_is_found_once(
    pruned: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {stage: pruned.journal.place / stage for stage in ("diagnose", "generate", "distil")}
    (tried,) = baselines.read(done).tried
    monkeypatch.setattr(repair, "fit", lambda *_: pytest.fail("fitted again"))
    mended = baselines.repaired(pruned.run, done, tried.repair, done["distil"] / baselines.FITS)
    found, teacher = answers.answered(done, "validation")
    assert compare(teacher, observe(mended, found, 0), found).mean_kl == pytest.approx(tried.validation_kl)


def test_what_a_repair_was_fitted_to_is_left_out_where_more_is_left(
    pruned: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {stage: pruned.journal.place / stage for stage in ("diagnose", "generate", "distil")}
    texts = answers.training_answers(done)
    assert len(texts) >= 16
    for fitted, left_out in ((5, 5), (len(texts) - 5, 0), (len(texts), 0)):
        monkeypatch.setattr(stream, "CALIBRATION_TOKENS", sum(map(len, texts[:fitted])))
        plan, trials = answers.read_plan(done), baselines.read(done)
        assert baselines.start(pruned.run, done, plan, trials, done["distil"]).fitted == left_out
    monkeypatch.setattr(stream, "CALIBRATION_TOKENS", sum(map(len, texts[:5])))
    phases = (replace(plan.phases[0], data="references"),)
    other = baselines.start(pruned.run, done, replace(plan, phases=phases), trials, done["distil"])
    assert (other.name, other.fitted) == ("block-wise reconstruction", 0)


def test_without_a_skill_to_keep_none_is_reported(pruned: Finished) -> None:
    assert "keep" not in {measure.name for measure in pruned.report.measures}


def test_every_stage_tells_its_progress_from_start_to_end(forgetful: Finished) -> None:
    by_unit: dict[tuple[int, str], list[int]] = {}
    for done, total, unit in forgetful.journal.told:
        by_unit.setdefault((total, unit), []).append(done)
    assert len(by_unit) == 5
    for (total, _), done in by_unit.items():
        assert done == sorted(done)
        assert done[-1] == total


def test_the_training_curve_is_told_as_it_grows(forgetful: Finished) -> None:
    names = [metric["name"] for metric in forgetful.journal.metrics]
    assert names.count("train") == 40
    assert names.count("validation") == len(validation_steps(40))
    curve = [metric for metric in forgetful.journal.metrics if metric["name"] in {"train", "validation"}]
    assert all(isinstance(metric["step"], int) for metric in curve)


def test_what_a_stage_cost_in_tokens_and_what_came_of_it_is_told_once(forgetful: Finished) -> None:
    told = [metric for metric in forgetful.journal.metrics if metric["name"] in {"tokens", "verdict"}]
    generated, trained, verdict = told
    assert isinstance(generated["generated"], int) and generated["generated"] > 0
    assert trained["trained"] == forgetful.report.training.tokens
    assert verdict["recovered"] == forgetful.report.measures[0].recovered.value


def numbers(report: Report) -> dict[str, object]:
    """All that a report says, times aside."""
    times = {"created_at": True, "cost": True, "repairs": {"__all__": {"seconds"}}}
    return report.model_dump(exclude=times | {"training": {"phases": {"__all__": {"seconds"}}}})


@pytest.mark.parametrize("breaks_in", ["generate", "distil", "evaluate"])
def test_a_recovery_that_broke_goes_on_where_it_was_and_finds_the_same(
    breaks_in: str, forgetful: Finished, open_journal: type, tmp_path: Path
) -> None:
    for stage in STAGES[: STAGES.index(breaks_in)]:
        shutil.copytree(forgetful.journal.place / stage, tmp_path / stage)
    broken = open_journal(tmp_path, breaks_in=breaks_in)
    with pytest.raises(ConnectionResetError):
        recover(forgetful.run, broken)
    assert broken.ran == [breaks_in]
    again = open_journal(tmp_path)
    found = finished(forgetful.run, again)
    assert again.ran == STAGES[STAGES.index(breaks_in) :]
    assert numbers(found.report) == numbers(forgetful.report)


def test_a_finished_recovery_does_nothing_again(forgetful: Finished, open_journal: type) -> None:
    again = open_journal(forgetful.journal.place)
    assert recover(forgetful.run, again) == forgetful.outcome
    assert again.ran == []


def test_the_order_of_prompts_changes_no_number(spared: Finished, open_journal: type, tmp_path: Path) -> None:
    turned = replace(spared.run, prompts=spared.run.prompts[::-1])
    assert numbers(finished(turned, open_journal(tmp_path)).report) == numbers(spared.report)


def without_kinds(prompts: list[Prompt]) -> list[Prompt]:
    return [prompt.model_copy(update={"kind": None}) for prompt in prompts]


def test_prompts_that_are_too_long_are_dropped_and_counted(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = make_run("copy", training={"max_length": 28})
    long = [Prompt(messages=[Message(role="user", content=" ".join(["red"] * n))]) for n in range(20, 60)]
    found = finished(replace(run, prompts=[*without_kinds(run.prompts), *long]), open_journal(tmp_path))
    splits = found.report.splits
    assert splits.too_long_dropped == 40
    assert splits.train + splits.validation + splits.test == 200


def test_prompt_and_answer_together_stay_within_the_length_that_was_asked_for(
    finish: Callable[..., Finished],
) -> None:
    found = finish("forgetful", training={"steps": 1, "max_length": 21})
    rows = [json.loads(line) for line in found.journal.published["rewrites.jsonl"].read_text().splitlines()]
    assert max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows) <= 21


def test_too_few_test_prompts_are_refused_in_a_sentence(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = make_run("forgetful")
    journal = open_journal(tmp_path)
    with pytest.raises(EmptyDataset, match="7 test prompts are left; at least 16"):
        recover(replace(run, prompts=without_kinds(run.prompts)[:20]), journal)
    assert journal.published == {}


def test_a_server_that_serves_the_teacher_is_as_good_as_the_teacher_itself(
    server: Any,
    healthy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    forgetful: Finished,
    open_journal: type,
    tmp_path: Path,
) -> None:
    engine = LocalEngine(healthy, tokenizer)
    empty = forgetful.run.prompts[0]

    def answer(ids: list[int], limit: int) -> list[int]:
        return list(engine.answer([Encoded(empty, tuple(ids))], limit, lambda _done: None)[0].answer_ids)

    server.answer = answer
    found = finished(replace(forgetful.run, vllm_urls=(server.url,)), open_journal(tmp_path))
    asked = Counter(tuple(body["prompt"]) for body in server.bodies)
    assert set(asked.values()) == {1}
    for given in ("diagnose/test.jsonl", "generate/train.jsonl", "generate/validation.jsonl"):
        assert (found.journal.place / given).read_text() == (forgetful.journal.place / given).read_text()
    assert found.report.recovered.value == pytest.approx(forgetful.report.recovered.value, abs=0.01)


def test_the_teachers_top_is_the_same_from_its_server(
    knowing: Any, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = make_run("finetuned", method={"top_k": 16}, training={"steps": 4})
    found = []
    for name, urls in (("local", ()), ("served", (knowing.url,))):
        with pytest.raises(ConnectionResetError):
            recover(replace(run, vllm_urls=urls), open_journal(tmp_path / name, breaks_in="distil"))
        place = tmp_path / name / "generate"
        found.append(((place / "train.jsonl").read_text(), tops.read(place / "train.safetensors")))
    (texts, local), (same_texts, served) = found
    assert texts == same_texts
    for mine, theirs in zip(local, served, strict=True):
        assert mine.ids_NK[:, 0].tolist() == theirs.ids_NK[:, 0].tolist()
        torch.testing.assert_close(mine.log_p_NK, theirs.log_p_NK, rtol=2e-3, atol=1e-4)
    told = [body for body in knowing.bodies if "logprobs" in body]
    assert len(told) == len(served)
    assert not any("prompt_logprobs" in body for body in told)


def test_a_teacher_whose_servers_score_the_students_answers_is_not_beside_it(
    knowing: Any, teacher: Path, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    """Its weights are taken away before training begins."""
    shutil.copytree(teacher, tmp_path / "teacher")
    asked = make_run(
        "finetuned",
        method={"type": "on_policy", "top_k": 16},
        training={"steps": 8},
        evaluation=LENIENT["evaluation"] | {"baselines": False},
    )
    run = replace(asked, teacher=tmp_path / "teacher", vllm_urls=(knowing.url,))
    with pytest.raises(ConnectionResetError):
        recover(run, open_journal(tmp_path, breaks_in="distil"))
    (tmp_path / "teacher" / "model.safetensors").unlink()
    knowing.bodies.clear()
    with pytest.raises(ConnectionResetError):
        recover(run, open_journal(tmp_path, breaks_in="evaluate"))
    report = TrainingReport.model_validate_json((tmp_path / "distil" / "training.json").read_text())
    assert min(point.validation_kl for point in report.checkpoints) < report.initial_validation_kl
    assert len(knowing.bodies) == 8 * report.batch_size
    assert all(body["prompt_logprobs"] == 16 for body in knowing.bodies)


def test_prompts_that_the_teacher_wrote_are_divided_like_any_others_and_handed_over(
    author: Any, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    """A server writes them; then the teacher itself answers, for the server would not answer as it does."""
    asked = make_run("finetuned", prompts={"compose": 120}, training={"steps": 4})
    run = replace(asked, prompts=[])
    with pytest.raises(ConnectionResetError):
        recover(replace(run, vllm_urls=(author.url,)), open_journal(tmp_path, breaks_in="diagnose"))
    found = finished(run, open_journal(tmp_path))
    splits = found.report.splits
    assert splits.composed.kept == 120 == splits.train + splits.validation + splits.test
    assert (splits.duplicates_dropped, splits.test_kinds) == (0, [])
    assert found.report.cost.tokens_generated > splits.composed.tokens > 0
    assert "120 prompts, of" in found.journal.published["report.html"].read_text("utf-8")
    lines = found.journal.published["composed.jsonl"].read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {PromptRow.model_validate(row).prompt for row in rows} <= {
        prompt.messages[0].content for prompt in asked.prompts
    }
    assert len(rows) == 120


def test_a_server_that_serves_another_model_is_refused(
    server: Any, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = replace(make_run("forgetful"), vllm_urls=(server.url,))
    with pytest.raises(RecoveryError, match="serves another model"):
        recover(run, open_journal(tmp_path))


def test_natural_text_shorter_than_a_window_is_refused_before_anything_is_trained(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = replace(make_run("forgetful"), natural_text=["red blue green"])
    with pytest.raises(RecoveryError):
        recover(run, open_journal(tmp_path))


def test_a_method_for_another_damage_is_refused_before_anything_is_answered(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = make_run("pruned", method={"type": "interpolate"})
    journal = open_journal(tmp_path)
    with pytest.raises(RecoveryError, match="does not repair pruning"):
        recover(run, journal)
    assert not (journal.place / "distil").exists()


def test_a_masked_adapter_is_merged_and_the_zeros_stay(finish: Callable[..., Finished]) -> None:
    found = finish(
        "pruned",
        training={"mode": "lora", "steps": 40, "learning_rate": 3e-3, "start": "student"},
        output={"kind": "merged"},
        **LENIENT,
    )
    assert found.report.training.mode == "masked lora"
    assert found.outcome in {"recovered", "partial"}
    assert zeros_filled(found.run.student, found.weights) == 0


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl"])
def test_every_divergence_brings_the_student_nearer(divergence: str, finish: Callable[..., Finished]) -> None:
    found = finish("finetuned", method={"divergence": divergence}, training={"steps": 40}, **LENIENT)
    assert found.report.training.phases[0].objective.startswith(divergence)
    assert found.outcome in {"recovered", "partial"}


@pytest.mark.slow  # two whole recoveries for one comparison
def test_the_teachers_top_is_nearly_as_good_as_the_whole(finish: Callable[..., Finished]) -> None:
    whole, top = (
        finish("finetuned", method={"type": "off_policy", "top_k": k}, training={"steps": 40}, **LENIENT)
        for k in (None, 16)
    )
    assert top.report.recovered.value > 0.8 * whole.report.recovered.value > 0


def test_a_student_learns_from_its_own_answers(finish: Callable[..., Finished]) -> None:
    found = finish(
        "finetuned",
        method={"type": "on_policy", "divergence": "reverse_kl"},
        training={"steps": 40},
        **LENIENT,
    )
    (phase,) = found.report.training.phases
    assert (phase.data, phase.objective) == ("student", "reverse_kl")
    assert found.outcome in {"recovered", "partial"}


def test_the_second_stage_follows_the_first(finish: Callable[..., Finished]) -> None:
    found = finish("finetuned", method={"type": "two_stage"}, training={"steps": 40}, **LENIENT)
    first, second = found.report.training.phases
    assert (first.data, second.data) == ("teacher", "student")
    assert second.steps <= second.planned_steps
    assert found.outcome in {"recovered", "partial"}


def test_a_teacher_that_is_shown_the_reference_scores_the_students_answers(
    finish: Callable[..., Finished],
) -> None:
    found = finish("finetuned", method={"type": "self_demonstration"}, training={"steps": 40}, **LENIENT)
    (phase,) = found.report.training.phases
    assert (phase.data, phase.objective) == ("demonstrated", "reverse_kl")
    losses = [point.loss for point in found.report.training.curve]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("method", ["sft", "rewrite_sft"])
def test_a_student_learns_from_texts(method: str, finish: Callable[..., Finished]) -> None:
    found = finish("finetuned", method={"type": method}, training={"steps": 40}, **LENIENT)
    (phase,) = found.report.training.phases
    assert phase.objective == "cross_entropy"
    losses = [point.loss for point in found.report.training.curve]
    assert sum(losses[-5:]) < sum(losses[:5])
    rewrites = found.report.training.rewrites
    assert (rewrites is None) == (method == "sft")
    assert rewrites is None or rewrites.kept + rewrites.originals > 0


def test_texts_cannot_be_learnt_without_references(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = make_run("finetuned", method={"type": "sft"})
    bare = [prompt.model_copy(update={"completion": None}) for prompt in run.prompts]
    with pytest.raises(EmptyDataset, match="no training prompt has one"):
        recover(replace(run, prompts=bare), open_journal(tmp_path))


def test_nothing_can_be_demonstrated_without_references(
    make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    run = make_run("finetuned", method={"type": "self_demonstration"})
    bare = [prompt.model_copy(update={"completion": None}) for prompt in run.prompts]
    with pytest.raises(EmptyDataset, match="shows the teacher each prompt with its reference"):
        recover(replace(run, prompts=bare), open_journal(tmp_path))


@pytest.mark.parametrize(
    ("damage", "method"),
    [
        ("finetuned", "interpolate"),
        ("finetuned", "spectral"),
        ("finetuned", "restore_layers"),
        ("rounded", "low_rank_patch"),
        ("wanda", "reconstruct"),
    ],
)
def test_a_repair_is_a_method_of_its_own(damage: str, method: str, finish: Callable[..., Finished]) -> None:
    found = finish(damage, method={"type": method}, **LENIENT)
    assert found.report.training is None
    assert {tried.name for tried in found.report.repairs} == {method}
    assert found.measure("kl").after is not None
    assert found.outcome in {"recovered", "partial", "no_gain"}
    assert (found.weights is not None) == found.report.promoted
    assert "recipe.py" not in found.journal.published


def test_a_repair_that_is_the_method_is_chosen_with_the_skill_in_view(
    finish: Callable[..., Finished],
) -> None:
    report = finish("forgetful", keep=tickets(60), method={"type": "interpolate"}, **LENIENT).report
    assert all(tried.keep_kl for tried in report.repairs)
    costs = [tried.validation_kl + tried.keep_kl for tried in report.repairs]
    assert costs == sorted(costs)


def test_the_best_repair_stands_beside_the_trained_student(forgetful: Finished) -> None:
    report = forgetful.report
    assert {tried.name for tried in report.repairs} == {"interpolate", "spectral", "restore_layers"}
    costs = [tried.validation_kl + tried.keep_kl for tried in report.repairs]
    assert costs == sorted(costs)
    assert report.baseline.label == report.repairs[0].label
    gap = report.recovered.value - report.baseline.recovered.value
    assert report.baseline.lead.value == pytest.approx(gap, abs=1e-6)


def first_and_last(prompts: Sequence[Prompt]) -> Task:
    """A task that the teacher can do and the forgetful student cannot."""
    spec = {"name": "ends", "file": "file-" + "0" * 24, "max_new_tokens": 12}
    return Task(
        TaskSpec.model_validate(spec), [prompt for prompt in prompts if prompt.kind in {"first", "last"}]
    )


def test_a_task_is_measured_before_and_after_and_guarded(
    finish: Callable[..., Finished], prompts: list[Prompt]
) -> None:
    asked = first_and_last(prompts)
    task = finish("forgetful", tasks=[asked], training={"steps": 40}, **LENIENT).measure("task:ends")
    assert (task.n, task.guarded) == (len(asked.prompts), True)
    assert task.before < task.after <= 1
    assert task.recovered.value > 0


def test_a_task_deficit_makes_a_recovery_needed_though_the_divergence_is_negligible(
    finish: Callable[..., Finished], prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "NEGLIGIBLE_NATS", 1e9)
    assert finish("forgetful").outcome == "not_needed"
    tasks = [first_and_last(prompts)]
    assert finish("forgetful", tasks=tasks, training={"steps": 4}, **LENIENT).report.training


def test_task_prompts_are_not_trained_on(make_run: Callable[..., Run]) -> None:
    run = make_run("finetuned")
    asked = replace(first_and_last(run.prompts), prompts=run.prompts[:60])
    before, after = diagnose.split_prompts(run), diagnose.split_prompts(replace(run, tasks=[asked]))
    texts = {prompt.messages[0].content for prompt in run.prompts[:60]}
    assert not texts & {prompt.messages[0].content for prompt in (*after.train, *after.validation)}
    assert after.test == before.test
    assert after.task_duplicates_dropped > 0
