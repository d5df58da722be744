"""A small model that has learnt six little tasks, students damaged in every way, and a journal in a folder.

The teacher is a Llama of four layers and 32 channels over a vocabulary of words, trained for a few
seconds on prompts such as `reverse : red fox seven`. It is small enough for a recovery to take
seconds, and healthy enough for damage to show.
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import CreateRecovery, Message, Prompt, Stage
from recoup_ml import durable, injure, models, plots
from recoup_ml.generate import LocalEngine
from recoup_ml.run import Run, Task
from recoup_ml.sequences import Answered, Encoded, collate, encode
from recoup_ml.tickets import NAMES, OPENINGS, QUEUES

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
THINGS = [
    "red",
    "blue",
    "green",
    "black",
    "white",
    "fox",
    "dog",
    "cat",
    "bird",
    "fish",
    "one",
    "two",
    "three",
    "seven",
    "nine",
    "stone",
    "tree",
    "river",
]
TASKS: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda words: words,
    "reverse": lambda words: words[::-1],
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
    "twice": lambda words: [word for word in words for _ in range(2)],
    "middle": lambda words: [words[len(words) // 2]],
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


CHARTS = ["loss_curve", "trajectory_curves", "alignment_diagonal", "alignment_heatmap", "alignment_svg"]


def task_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Distinct prompts of the six kinds, each with its right answer."""
    draw = random.Random(seed)
    answers: dict[str, tuple[str, str]] = {}
    while len(answers) < count:
        kind = draw.choice(list(TASKS))
        words = draw.choices(THINGS, k=draw.randint(2, 6))
        answers[f"{kind} : {' '.join(words)}"] = (" ".join(TASKS[kind](words)), kind)
    return [
        Prompt(messages=[Message(role="user", content=text)], completion=answer, kind=kind)
        for text, (answer, kind) in answers.items()
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    matters = " ".join([*QUEUES, *QUEUES.values(), *NAMES, *OPENINGS, "Route ticket from . :"]).split()
    words = list(dict.fromkeys([*SPECIAL, *THINGS, *TASKS, *matters]))
    words_only = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_llama(layers: int = 4, seed: int = 0, **config: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(
            **shape | config,
            num_hidden_layers=layers,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def learn_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    rows = []
    for item in encode(task_prompts(steps * 32, seed=1), tokenizer, 512):
        ids = (*tokenizer(item.prompt.completion)["input_ids"], tokenizer.eos_token_id)
        rows.append(Answered(item.kind, item.text, item.ids, "", ids, "stop"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        batch = collate(rows, range(step * 32, step * 32 + 32), 0)
        logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
        nn.functional.cross_entropy(logits_BTV[batch.answer_BT], batch.targets_N).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors this small gain nothing from a second thread, and wait for it."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Drawing is half of a small recovery; `test_plots.py` and the journeys look at what is drawn."""
    blank = dict.fromkeys(CHARTS, "<svg></svg>") | {"alignment_png": b"\x89PNG"}
    with pytest.MonkeyPatch.context() as patch:
        for chart, picture in blank.items():
            patch.setattr(plots, chart, lambda _drawn, picture=picture: picture)
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once("teacher", make)`: the folder that `make` filled, by one of the processes that test."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "models"
    place.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, aside = place / name, place / f".{name}"
        with (place / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make(aside)
                aside.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def teacher(made_once: Callable[..., Path]) -> Path:
    """The healthy model's folder."""

    def make(folder: Path) -> None:
        model, tokenizer = make_llama(), make_tokenizer()
        learn_tasks(model, tokenizer, steps=300)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once("teacher", make)


def change(teacher: Path, student: Path, edit: Callable[[PreTrainedModel], None]) -> None:
    model = models.load(teacher)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(student)
    models.load_tokenizer(teacher).save_pretrained(student)


def add_noise(model: PreTrainedModel) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))


def cut_two_of_four(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            fours = weight.view(-1, 4)
            fours.scatter_(1, fours.abs().topk(2, dim=1, largest=False).indices, 0.0)


def task_texts() -> list[str]:
    return [f"{prompt.messages[0].content} {prompt.completion}" for prompt in task_prompts(300, seed=9)]


def drop_third_layer(model: PreTrainedModel) -> None:
    del model.model.layers[2]
    model.config.num_hidden_layers = 3


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "finetuned": lambda teacher, student: change(teacher, student, add_noise),
    "forgetful": lambda teacher, student: injure.finetune(teacher, student, steps=20, rate=3e-3),
    "rounded": lambda teacher, student: injure.quantize(teacher, student, bits=3, group=32),
    "nf4": injure.pack_nf4,
    "pruned": injure.prune,
    "wanda": lambda teacher, student: injure.wanda(teacher, student, texts=task_texts()),
    "wanda-24": lambda teacher, student: injure.wanda(teacher, student, pattern="2:4", texts=task_texts()),
    "narrow": lambda teacher, student: injure.cut_channels(teacher, student, texts=task_texts()),
    "dropped": lambda teacher, student: injure.drop_layers(teacher, student, 1, texts=task_texts()),
    "pruned-2:4": lambda teacher, student: change(teacher, student, cut_two_of_four),
    "shallow": lambda teacher, student: change(teacher, student, drop_third_layer),
    "round-trip": injure.round_trip,
    "copy": shutil.copytree,
}


@pytest.fixture(scope="session")
def student(teacher: Path, made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a student with the named damage, made when it is asked for first."""
    return lambda damage: made_once(damage, partial(DAMAGES[damage], teacher))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    """Untrained models: `make_model(layers=3, seed=1, vocab_size=96)`."""
    return make_llama


@pytest.fixture(scope="session")
def tokenizer(teacher: Path) -> PreTrainedTokenizerFast:
    return models.load_tokenizer(teacher)


@pytest.fixture(scope="session")
def healthy(teacher: Path) -> PreTrainedModel:
    """The teacher, loaded; a test that changes a model loads its own."""
    return models.load(teacher)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return task_prompts(200, seed=5)


@pytest.fixture(scope="session")
def answered(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> list[Answered]:
    """The teacher's answers to 40 prompts, of different lengths."""
    return LocalEngine(healthy, tokenizer).answer(
        encode(prompts[:40], tokenizer, 512), 12, lambda _done: None
    )


@pytest.fixture(scope="session")
def natural_text() -> list[str]:
    return task_texts()


@pytest.fixture(scope="session")
def make_run(
    teacher: Path, student: Callable[[str], Path], prompts: list[Prompt], natural_text: list[str]
) -> Callable[..., Run]:
    """A student's recovery, small enough for a test: `make_run("pruned", keep=…, tasks=…, training={…})`."""

    def make(damage: str, keep: Sequence[Prompt] = (), tasks: Sequence[Task] = (), **request: object) -> Run:
        asked = {
            "student": {"source": damage},
            "teacher": {"source": "teacher"},
            "training": {"steps": 24},
            "generation": {"max_new_tokens": 12},
            "evaluation": {"test_sequences": 32, "validation_sequences": 8},
        }
        return Run(
            job_id="rec-1",
            student=student(damage),
            teacher=teacher,
            request=CreateRecovery.model_validate(asked | request),
            prompts=prompts,
            keep=keep,
            tasks=tasks,
            natural_text=natural_text,
            vllm_urls=(),
        )

    return make


class FolderJournal:
    """A journal whose stages are folders: filled aside, then renamed, which commits them.

    A second journal in the same place finds what the first one committed, and what it left of an
    unfinished stage. `breaks_in` names a stage in which telling the progress fails from `breaks_at` on,
    as a killed process or a lost lease would; with `stops` the journal asks to stop there instead.
    """

    def __init__(
        self, place: Path, breaks_in: Stage | None = None, breaks_at: int = 0, stops: bool = False
    ) -> None:
        self.place, self._breaks_in, self._breaks_at, self._stops = place, breaks_in, breaks_at, stops
        self._stopping = False
        self.ran: list[Stage] = []
        self.told: list[tuple[int, int, str]] = []
        self.metrics: list[dict[str, object]] = []
        self.published: dict[str, Path] = {}
        self._seconds: dict[str, float] = {}

    def stage(self, name: Stage, work: Callable[[Path], None]) -> Path:
        committed, aside = self.place / name, self.place / f".{name}"
        if committed.exists():
            return committed
        self.ran.append(name)
        for item in aside.iterdir() if aside.exists() else []:
            if item.name != durable.UNFINISHED:
                durable.remove(item)
        aside.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        work(aside)
        self._seconds[name] = time.monotonic() - began
        return aside.rename(committed)

    def progress(self, done: int, total: int, unit: str) -> None:
        if self.ran[-1] == self._breaks_in and done >= self._breaks_at:
            if not self._stops:
                raise ConnectionResetError("the ledger is gone")
            self._stopping = True
        self.told.append((done, total, unit))

    def stopping(self) -> bool:
        return self._stopping

    def metric(self, **values: str | float | int | bool | None) -> None:
        self.metrics.append(values)

    def publish(self, files: dict[str, Path]) -> None:
        for name, path in files.items():
            self.published[name] = self.place / "artifacts" / name
            self.published[name].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.published[name])

    def stage_seconds(self) -> dict[str, float]:
        return self._seconds


@pytest.fixture(scope="session")
def open_journal() -> type[FolderJournal]:
    return FolderJournal


class Refusal(NamedTuple):
    """An answer of an upstream that is not 200."""

    status: int
    headers: Mapping[str, str] = MappingProxyType({})
    words: str = "no"


class CompletionsServer:
    """A vLLM as it looks from outside, on loopback; it gives the choices of an answer in any order.

    It echoes the end of each prompt, unless `answer` says otherwise. `reply` may change what is sent, take
    its time, or refuse. `die` breaks every connection in the middle, as SIGKILL does; `live` brings it back
    on the same port.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.traces: set[str | None] = set()
        self.busy, self.most_busy = 0, 0
        self.models: list[dict[str, Any]] = [{"id": "teacher", "max_model_len": 4096}]
        self.healthy = True
        self.answer: Callable[[list[int], int], list[int]] = lambda ids, limit: [*ids[-4:], 2][:limit]
        self.sample: Callable[[list[int], int], list[int]] | None = None
        """Sampled answers, by the seed; none: as greedy ones."""
        self.log_p: Callable[[list[int]], Tensor]
        """Of the next token at each position of a sequence, [T, V]; nobody asks for it unless it is set."""
        self.reply: Callable[[dict[str, Any]], dict[str, Any] | bytes | Refusal] = lambda answer: answer
        self.routes: dict[str, Callable[[dict[str, Any]], dict[str, Any] | bytes | Refusal]] = {}
        """What else it answers, by path."""
        self._lock, self._port = threading.Lock(), 0
        self._connections: set[socket.socket] = set()
        self.live()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def live(self) -> None:
        self._http = _Listener(("127.0.0.1", self._port), partial(_Upstream, self))
        self._port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def die(self) -> None:
        self.stop()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def respond(self, body: dict[str, Any]) -> dict[str, Any] | bytes | Refusal:
        with self._lock:
            self.bodies.append(body)
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
        try:
            if route := self.routes.get(body["path"]):
                return route(body)
            return self.reply(self._complete(body))
        finally:
            with self._lock:
                self.busy -= 1

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chosen tokens and, where `log_p` knows them, the log-probabilities that are asked for."""
        said = [message["content"] for message in body.get("messages", [])]
        ids = (
            self.sample(body["prompt"], body["seed"])
            if self.sample and "seed" in body
            else self.answer(body.get("prompt") or [len(text) for text in said], body["max_tokens"])
        )
        text = {"message": {"content": " ".join(said)}} if said else {"text": ""}
        finish = "stop" if ids[-1] == 2 else "length"
        choices = [
            {"index": index, "token_ids": ids, "finish_reason": finish} | text for index in range(body["n"])
        ]
        if "logprobs" in body:
            told = self._told([*body["prompt"], *ids], body["logprobs"])
            scored = [None, *({str(i): {"logprob": p} for i, p in place.items()} for place in told)]
            top = [{f"token_id:{i}": p for i, p in place.items()} for place in told[-len(ids) :]]
            for choice in choices:
                choice |= {"logprobs": {"top_logprobs": top}}
                if "prompt_logprobs" in body:
                    choice["prompt_logprobs"] = scored[: len(body["prompt"])]
        return {"choices": random.Random(0).sample(choices, len(choices))}

    def _told(self, ids: list[int], k: int) -> list[dict[int, float]]:
        """For each token but the first: its own log-probability and those of the `k` likeliest."""
        log_p_TV = self.log_p(ids)
        best = log_p_TV.topk(k)
        rows = zip(ids[1:], log_p_TV, best.indices.tolist(), best.values.tolist(), strict=False)
        return [
            {token: float(log_p_V[token])} | dict(zip(likely, values, strict=True))
            for token, log_p_V, likely, values in rows
        ]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: CompletionsServer, *args: Any) -> None:
        self.upstream = server
        super().__init__(*args)

    def setup(self) -> None:
        super().setup()
        self.upstream.opened(self.connection)

    def finish(self) -> None:
        self.upstream.closed(self.connection)
        super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send({} if self.upstream.healthy else Refusal(503))
        else:
            self._send({"data": self.upstream.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.upstream.traces.add(self.headers["traceparent"])
        self._send(self.upstream.respond(body | {"path": self.path}))

    def _send(self, reply: dict[str, Any] | bytes | Refusal) -> None:
        refused = isinstance(reply, Refusal)
        status, headers = (reply.status, reply.headers) if refused else (200, {})
        told = {"error": reply.words} if refused else reply
        content = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[CompletionsServer]:
    running = CompletionsServer()
    yield running
    running.die()


@pytest.fixture
def author(
    server: CompletionsServer, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> CompletionsServer:
    """A server of a teacher that says, as a user, one of the tests' prompts or, one time in four, a word."""
    (opening,) = tokenizer("<|user|>", add_special_tokens=False)["input_ids"]
    texts = [prompt.messages[0].content for prompt in prompts]

    def say(ids: list[int], seed: int) -> list[int]:
        assert ids == [opening]
        draw = random.Random(seed)
        text = draw.choice(texts) if draw.random() < 0.75 else "red"
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    server.sample = say
    return server


@pytest.fixture
def refusal() -> type[Refusal]:
    return Refusal


@pytest.fixture
def replicas() -> Iterator[list[CompletionsServer]]:
    """Two servers that serve the same."""
    running = [CompletionsServer(), CompletionsServer()]
    yield running
    for one in running:
        one.die()


@pytest.fixture
def knowing(
    server: CompletionsServer, healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> CompletionsServer:
    """A server that answers as the teacher does, and tells its log-probabilities."""
    engine = LocalEngine(healthy, tokenizer)
    blank = Prompt(messages=[Message(role="user", content="?")])

    @torch.inference_mode()
    def log_p(ids: list[int]) -> Tensor:
        return healthy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    server.log_p = log_p
    server.answer = lambda ids, limit: list(
        engine.answer([Encoded(blank, tuple(ids))], limit, lambda _done: None)[0].answer_ids
    )
    return server
