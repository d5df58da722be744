"""A student that learns from its own answers while a server gives them, with its adapter of the moment."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import ChatRow, TrainingReport
from recoup_ml import served_student
from recoup_ml.errors import RolloutMismatch, RolloutsUnavailable
from recoup_ml.observation import observe
from recoup_ml.recipe import recover
from recoup_ml.run import Run
from recoup_ml.sequences import Answered
from recoup_ml.served_student import ServedStudent, drifted
from recoup_ml.tickets import ticket_rows

END = 2
TICKETS = [ChatRow.model_validate(row).as_prompt() for row in ticket_rows(24, seed=77)]


class Host:
    """Routes of a vLLM that holds a student and puts adapters on it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.held: dict[str, PeftModel] = {}
        self.loaded: list[str] = []

    def load(self, body: dict[str, Any]) -> dict[str, Any]:
        base = AutoModelForCausalLM.from_pretrained(self.base)
        self.held[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        self.loaded.append(body["lora_name"])
        return {}

    def unload(self, body: dict[str, Any]) -> dict[str, Any]:
        del self.held[body["lora_name"]]
        return {}

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        model, draw = self.held[body["model"]], torch.Generator().manual_seed(body["seed"])
        ids, log_q = [*body["prompt"]], []
        while len(log_q) < body["max_tokens"] and (not log_q or ids[-1] != END):
            log_q_V = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial(log_q_V.exp(), 1, generator=draw)))
            log_q.append(float(log_q_V[ids[-1]]))
        answer = {"index": 0, "text": "", "token_ids": ids[len(body["prompt"]) :]}
        finish = "stop" if ids[-1] == END else "length"
        return {"choices": [answer | {"finish_reason": finish, "logprobs": {"token_logprobs": log_q}}]}


@pytest.fixture
def host(server: Any, student: Callable[[str], Path]) -> Host:
    """What the server on loopback does with the student that was fine-tuned."""
    found = Host(student("finetuned"))
    server.models = [{"id": found.base.name, "max_model_len": 512}]
    server.routes = {
        "/v1/load_lora_adapter": found.load,
        "/v1/unload_lora_adapter": found.unload,
        "/v1/completions": found.complete,
    }
    return found


@pytest.fixture
def asked(server: Any, make_run: Callable[..., Run]) -> Callable[..., Run]:
    def on_policy(**training: object) -> Run:
        fields = {"method": {"type": "on_policy"}, "training": training}
        return replace(make_run("finetuned", **fields), rollout_urls=(server.url,))

    return on_policy


def trained(run: Run, journal: Any) -> TrainingReport:
    with pytest.raises(ConnectionResetError):
        recover(run, journal)
    return TrainingReport.model_validate_json((journal.place / "distil" / "training.json").read_text())


def test_a_server_draws_from_the_student_of_the_moment(
    host: Host, asked: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    report = trained(asked(steps=8), open_journal(tmp_path, breaks_in="evaluate"))
    assert len(host.loaded) == len(set(host.loaded)) == 2  # four steps share their answers
    assert host.held == {}
    assert not list(tmp_path.rglob("rollouts-*"))
    drawn = report.phases[0].rollouts
    assert 0 < drawn.answers <= 8 * report.batch_size
    assert drawn.mean_difference < 1e-4
    assert (drawn.truncated, drawn.cap) == (0.0, 2.0)
    assert min(point.validation_kl for point in report.checkpoints) < report.initial_validation_kl


def test_a_server_draws_from_a_student_that_its_own_average_teaches(
    server: Any, host: Host, make_run: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    """From the student as it is, and the average is served nowhere."""
    method = {"type": "self_demonstration", "teacher": "ema", "ema_rate": 0.5}
    skill = {"teach": {"file": "file-" + "0" * 24, "rehearse": False}, "student": {"source": "teacher"}}
    run = make_run("copy", method=method, training={"steps": 8, "learning_rate": 3e-3}, **skill)
    host.base = run.student
    server.models = [{"id": "teacher", "max_model_len": 512}]
    run = replace(run, teach=TICKETS, rollout_urls=(server.url,))
    report = trained(run, open_journal(tmp_path, breaks_in="evaluate"))
    assert len(host.loaded) == 2 and host.held == {}
    assert report.phases[0].rollouts.answers > 0
    assert report.phases[0].rollouts.mean_difference < 1e-4


def test_a_whole_model_answers_itself(
    server: Any, host: Host, asked: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    report = trained(asked(steps=1, mode="full"), open_journal(tmp_path, breaks_in="evaluate"))
    assert report.phases[0].rollouts is None
    assert server.bodies == []


def test_servers_of_other_students_are_not_asked(
    server: Any, host: Host, asked: Callable[..., Run], open_journal: type, tmp_path: Path
) -> None:
    server.models = [{"id": "another", "max_model_len": 512}]
    report = trained(asked(steps=1), open_journal(tmp_path, breaks_in="evaluate"))
    assert report.phases[0].rollouts is None
    assert server.bodies == []


def test_a_server_that_refuses_the_adapter_is_an_error_that_says_what_it_needs(
    server: Any, host: Host, asked: Callable[..., Run], open_journal: type, tmp_path: Path, refusal: type
) -> None:
    server.routes["/v1/load_lora_adapter"] = lambda _body: refusal(404)
    with pytest.raises(RolloutsUnavailable, match=r"load_lora_adapter: 404.*--enable-lora"):
        recover(asked(steps=1), open_journal(tmp_path))


def test_what_a_killed_process_left_is_withdrawn(
    server: Any, host: Host, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name in ("rollouts-1", "rollouts-2"):
        (tmp_path / name).mkdir()
    server.routes["/v1/unload_lora_adapter"] = lambda body: host.loaded.append(body["lora_name"]) or {}
    ServedStudent([server.url], tmp_path, tokenizer)
    assert sorted(host.loaded) == ["rollouts-1", "rollouts-2"]
    assert not list(tmp_path.iterdir())


def test_answers_of_another_model_are_refused(healthy: PreTrainedModel, answered: list[Answered]) -> None:
    seen = observe(healthy, answered[:5], 0)
    unknown = [(item, (0.0,) * len(item.answer_ids)) for item in answered[:5]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_student, "MOST", 1e9)
        log_p = [item.drift for item in drifted(unknown, seen)]
    true = [(item, own) for item, own in zip(answered[:5], log_p, strict=True)]
    assert all(abs(value) < 1e-6 for item in drifted(true, seen) for value in item.drift)
    off = [(item, tuple(value - 1.0 for value in own)) for item, own in true]
    with pytest.raises(RolloutMismatch, match="not the student that learns"):
        drifted(off, seen)
