"""A merged model from what a recovery handed over to an answer, by the local engine, without a recovery."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from recoup.schemas import CreateRecovery, EffectProbe, ModelRef, ProbeRow
from recoup_api.app import create_app
from recoup_jobs.artifacts import publish
from recoup_jobs.ledger import Ledger, open_ledger
from recoup_jobs.publication import weights_sha256
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store
from recoup_worker.engine import create_engine

PROMPT = [5, 9, 33]


@pytest.fixture
def home(tmp_path: Path, write_tiny_models: Callable[[Path], Path]) -> Settings:
    """Of an installation with a student, its teacher, and an engine that answers."""
    socket = f"unix:{tmp_path / 'engine.sock'}"
    settings = Settings(home=tmp_path / "home", serve_urls=[socket], reconcile_seconds=0.05)
    write_tiny_models(settings.model_roots[0])
    return settings


@pytest.fixture
def ledger(home: Settings) -> Iterator[Ledger]:
    ledger = open_ledger(home)
    yield ledger
    ledger.close()


@pytest.fixture
def engine(home: Settings) -> Iterator[None]:
    socket = home.serve_urls[0].removeprefix("unix:")
    server = uvicorn.Server(uvicorn.Config(create_engine(home), uds=socket, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield
    server.should_exit = True
    thread.join()


@pytest.fixture
def merged(home: Settings, ledger: Ledger) -> str:
    """The id of a recovery that handed the teacher over as the merged model: a full success."""
    root = home.model_roots[0]
    student, teacher = (AutoModelForCausalLM.from_pretrained(root / name) for name in ("student", "teacher"))
    rows = [([3 + row, 20, 40 + row], 60 + row) for row in range(8)]
    told = [
        ProbeRow(ids=ids, token=t, base=log_p(student, ids, t), recovered=log_p(teacher, ids, t))
        for ids, t in rows
    ]
    probe = EffectProbe(object="recovery.probe", base_sha256=weights_sha256(root / "student"), rows=told)
    (root / "probe.json").write_text(probe.model_dump_json())
    asked = CreateRecovery(student=ModelRef(source="student"), teacher=ModelRef(source="teacher"))
    id = ledger.create(asked, "gpu.cpu").id
    claim = ledger.claim("worker", ["gpu.cpu"], 30)
    files = {f"model/{path.name}": path for path in (root / "teacher").iterdir()}
    publish(open_store(home), f"{id}/e1/package", files | {"probe.json": root / "probe.json"})
    ledger.commit_stage(claim, "package", f"{id}/e1/package")
    ledger.succeed(claim, "recovered")
    return id


@torch.inference_mode()
def log_p(model: torch.nn.Module, ids: list[int], token: int) -> float:
    return float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])


@torch.inference_mode()
def greedy(folder: Path) -> list[str]:
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([PROMPT])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return [f"w{token - 3}" for token in said[0, len(PROMPT) :].tolist() if token != 1]


def test_a_merged_model_is_deployed_and_answers_as_itself(
    home: Settings, ledger: Ledger, engine: None, merged: str
) -> None:
    with TestClient(create_app(home, ledger), base_url="http://127.0.0.1") as client:
        made = client.post("/v1/deployments", json={"recovery": merged, "name": "whole"}).json()
        assert made["kind"] == "model"
        until = time.monotonic() + 60
        while (found := client.get(f"/v1/deployments/{made['id']}").json())["state"] != "live":
            assert found["state"] in {"pending", "probing"}, found
            assert time.monotonic() < until, found
            time.sleep(0.05)
        ask = {"model": "whole", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=ask).json()
        assert answer["choices"][0]["text"].split() == greedy(home.model_roots[0] / "teacher")
