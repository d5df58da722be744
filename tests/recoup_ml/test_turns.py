"""A server of the teacher that is there for the stages that ask it, and for nothing else."""

import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup_ml import turns
from recoup_ml.errors import TeacherUnavailable
from recoup_ml.generate import LocalEngine
from recoup_ml.recipe import recover
from recoup_ml.run import Interrupted, Run
from recoup_ml.sequences import Encoded

GATE = """
import socket, sys, threading
behind, port, notes = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def pump(source, target):
    while data := source.recv(1 << 16):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
listener = socket.create_server(("127.0.0.1", port))
open(notes, "a").write("started\\n")
while True:
    near, _ = listener.accept()
    far = socket.create_connection(("127.0.0.1", behind))
    for pair in ((near, far), (far, near)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""
"""A process that is the teacher's server for as long as it lives: it leads to one behind it."""
SMALL = {
    "generation": {"max_new_tokens": 8},
    "evaluation": {"test_sequences": 16, "validation_sequences": 8, "baselines": False},
    "alignment": {"positions": 256},
}


@pytest.fixture
def run_in_turns(make_run: Callable[..., Run], server: Any, free_port: int, tmp_path: Path) -> Run:
    """A run whose teacher's server has to be started."""
    behind = server.url.rsplit(":", 1)[1]
    command = (sys.executable, "-c", GATE, behind, str(free_port), str(tmp_path / "notes"))
    run = make_run("forgetful", **SMALL)
    return replace(run, vllm_urls=(f"http://127.0.0.1:{free_port}",), vllm_command=command)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_server_is_there_while_it_is_asked_and_gone_while_models_are_looked_at(
    run_in_turns: Run,
    server: Any,
    healthy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    free_port: int,
    open_journal: type,
    tmp_path: Path,
) -> None:
    engine, empty = LocalEngine(healthy, tokenizer), run_in_turns.prompts[0]

    def answer(ids: list[int], limit: int) -> list[int]:
        return list(engine.answer([Encoded(empty, tuple(ids))], limit, lambda _done: None)[0].answer_ids)

    server.answer = answer
    place = tmp_path / "job"
    journal = open_journal(place, breaks_in="distil")
    seen, tell = [], journal.progress

    def progress(*told: Any) -> None:
        seen.append((journal.ran[-1], is_open(free_port)))
        tell(*told)

    journal.progress = progress
    with pytest.raises(ConnectionResetError):
        recover(run_in_turns, journal)
    turns_taken = [turn for turn, _ in groupby(seen)]
    asked_and_gone = [(stage, is_there) for stage in ("diagnose", "generate") for is_there in (True, False)]
    assert turns_taken == [*asked_and_gone, ("distil", False)]
    assert (tmp_path / "notes").read_text() == "started\n" * 2  # for diagnose and for generate
    asked = [tuple(body["prompt"]) for body in server.bodies]
    assert len(asked) == len(set(asked)) == len(lines(place))


def lines(place: Path) -> list[str]:
    files = ("diagnose/test.jsonl", "generate/train.jsonl", "generate/validation.jsonl")
    return [line for name in files for line in (place / name).read_text().splitlines()]


def test_a_server_that_does_not_come_up_may_come_up_the_next_time(
    run_in_turns: Run, open_journal: type, tmp_path: Path
) -> None:
    broken = replace(run_in_turns, vllm_command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(TeacherUnavailable, match="ended with code 3") as caught:
        recover(broken, open_journal(tmp_path / "job"))
    assert caught.value.may_pass


def test_a_recovery_that_is_to_stop_does_not_wait_for_a_server(
    run_in_turns: Run, open_journal: type, tmp_path: Path
) -> None:
    slow = replace(run_in_turns, vllm_command=(sys.executable, "-c", "import time; time.sleep(600)"))
    journal = open_journal(tmp_path)
    journal._stopping = True
    with pytest.raises(Interrupted), turns.served(slow, journal):
        pytest.fail("nothing answers")
