"""Deployments on a real vLLM, where RECOUP_TEST_VLLM_PYTHON names an environment of it.

A tiny student and an adapter of it, whose log-probabilities transformers and peft measured: it comes alive,
answers through the gateway as they do, and every way of not being served is caught or healed.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from recoup.schemas import CreateDeployment, CreateRecovery, Deployment, EffectProbe, ModelRef, ProbeRow
from recoup_api.app import create_app
from recoup_jobs.artifacts import publish
from recoup_jobs.deployments import Deployments
from recoup_jobs.keys import NewKey, create_key
from recoup_jobs.ledger import Ledger, open_ledger
from recoup_jobs.publication import prepared, weights_sha256
from recoup_jobs.reconciler import Reconciler
from recoup_jobs.replica import Replica
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store
from recoup_jobs.tables import DEFAULT_TENANT
from recoup_server.teacher import Teacher, find_build, running

pytestmark = [
    pytest.mark.slow,  # a vLLM takes a minute or more to start
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        "RECOUP_TEST_VLLM_PYTHON" not in os.environ,
        reason="RECOUP_TEST_VLLM_PYTHON names no environment of vLLM (deploy/vllm/environment.sh)",
    ),
]
WORDS = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(125))]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
FLAGS = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def student(home: Path) -> Path:
    """Its heads are as wide as vLLM's kernels want them."""
    folder = home / "models" / "student"
    set_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        **shape,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    known = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(student: Path, home: Path) -> Path:
    """A random one, with the probe that a recovery would hand over."""
    folder = home / "out"
    base = AutoModelForCausalLM.from_pretrained(student)
    rows = [(list(range(5 + row, 11 + 2 * row)), 20 + 3 * row) for row in range(16)]
    before = [log_p(base, *row) for row in rows]
    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    set_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.15)
    adapted.eval().save_pretrained(folder / "adapter")
    told = [
        ProbeRow(ids=ids, token=token, base=base_p, recovered=log_p(adapted, ids, token))
        for (ids, token), base_p in zip(rows, before, strict=True)
    ]
    probe = EffectProbe(object="recovery.probe", base_sha256=weights_sha256(student), rows=told)
    (folder / "probe.json").write_text(probe.model_dump_json())
    (folder / "report.json").write_text("{}")
    return folder


@torch.inference_mode()
def log_p(model: torch.nn.Module, ids: list[int], token: int) -> float:
    return float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])


class Server:
    """A vLLM of one model that can be started again."""

    def __init__(self, model: Path, port: int, home: Path, flags: tuple[str, ...] = FLAGS) -> None:
        self._asked = Teacher(model, "127.0.0.1", port, 256, flags)
        self._home, self._stack = home, contextlib.ExitStack()
        self.url = self._asked.url

    def start(self) -> None:
        build = find_build(Path(os.environ["RECOUP_TEST_VLLM_PYTHON"]))
        self._stack.enter_context(running(self._asked, build, Settings(home=self._home)))

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def server(student: Path, home: Path, free_port: int, settings: Settings) -> Iterator[Server]:
    """With the resolver of docker-compose.yml beside the route."""
    settings.deployments_dir.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
        patch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(settings.deployments_dir))
        server = Server(student, free_port, home)
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="module")
def settings(home: Path, free_port: int) -> Settings:
    return Settings(
        home=home / "service",
        model_roots=[home / "models"],
        serve_urls=[f"http://127.0.0.1:{free_port}"],
        reconcile_seconds=0.5,
        probe_seconds=5,
    )


@pytest.fixture(scope="module")
def ledger(settings: Settings) -> Iterator[Ledger]:
    ledger = open_ledger(settings)
    yield ledger
    ledger.close()


@pytest.fixture(scope="module")
def deploy(ledger: Ledger, settings: Settings, adapter: Path) -> Callable[..., str]:
    """Deploys a new recovery that handed this adapter over, spoilt after it was checked."""

    def make(name: str, spoil: Callable[[Path], None] = lambda _folder: None) -> str:
        source = Path(shutil.copytree(adapter, settings.home / "handed" / secrets.token_hex(4)))
        id = recovered(source, ledger, settings)
        new = prepared(CreateDeployment(recovery=id, name=name), ledger, settings, DEFAULT_TENANT)
        spoil(source / "adapter")
        hand_over(source, id, settings)
        return Deployments(ledger, settings.serve_urls).add(new, 100).id

    return make


def recovered(source: Path, ledger: Ledger, settings: Settings) -> str:
    """The id of a recovery that handed over what lies in a folder."""
    asked = CreateRecovery(student=ModelRef(source="student"), teacher=ModelRef(source="teacher"))
    id = ledger.create(asked, "gpu.cpu").id
    claim = ledger.claim("worker", ["gpu.cpu"], 30)
    ledger.commit_stage(claim, "package", hand_over(source, id, settings))
    ledger.succeed(claim, "recovered")
    return id


def hand_over(source: Path, id: str, settings: Settings) -> str:
    files = [path for path in source.rglob("*") if path.is_file() and path.suffix != ".md"]
    place = f"{id}/e1/package"
    publish(open_store(settings), place, {str(path.relative_to(source)): path for path in files})
    return place


@pytest.fixture(scope="module")
def settled(ledger: Ledger, settings: Settings, server: Server) -> Iterator[Callable[..., Deployment]]:
    """The deployment once it is as asked."""
    reconciler = Reconciler(ledger, settings, drain_seconds=0.5)
    reconciler.start()
    deployments = Deployments(ledger, settings.serve_urls)

    def wait(id: str, holds: Callable[[Deployment], bool], seconds: float = 300) -> Deployment:
        until = time.monotonic() + seconds
        while not holds(found := deployments.get(id, DEFAULT_TENANT)):
            assert time.monotonic() < until, found
            time.sleep(0.2)
        return found

    yield wait
    reconciler.stop()


@pytest.fixture(scope="module")
def live(deploy: Callable[..., str], settled: Callable[..., Deployment]) -> Deployment:
    return settled(deploy("support"), lambda found: found.state in {"live", "failed"})


@pytest.fixture(scope="module")
def gateway(settings: Settings, ledger: Ledger) -> Iterator[openai.OpenAI]:
    with answering(settings, ledger, reconciles=False) as client:
        yield client


@contextlib.contextmanager
def answering(settings: Settings, ledger: Ledger, *, reconciles: bool) -> Iterator[openai.OpenAI]:
    """A client of an API of this installation."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(settings, ledger, sweep=None if reconciles else False)
    service = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=service.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    key = create_key(ledger, NewKey(DEFAULT_TENANT, "test"))
    with openai.OpenAI(base_url=url, api_key=key, max_retries=20) as client:
        yield client
    service.should_exit = True
    thread.join()


def change_weights(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(dict(change(*item) for item in load_file(path).items()), path)


def with_zeros(folder: Path) -> None:
    change_weights(folder, lambda name, weight: (name, torch.zeros_like(weight)))


def with_wrong_prefix(folder: Path) -> None:
    change_weights(folder, lambda name, weight: (name.replace(".model.layers", ".model.stack"), weight))


def of_another_base(folder: Path) -> None:
    torch.manual_seed(7)
    change_weights(folder, lambda name, weight: (name, torch.randn_like(weight) * 0.15))


def of_a_rank_without_room(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 32}))


def test_an_adapter_comes_alive_on_a_real_vllm(live: Deployment) -> None:
    assert (live.state, live.reason) == ("live", None)
    assert [one.state for one in live.replicas] == ["ready"]


def test_greedy_answers_through_the_gateway_are_those_of_peft(
    live: Deployment, gateway: openai.OpenAI, student: Path, adapter: Path
) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), adapter / "adapter")
    same, excluded, total = 0, 0, 0
    for start in range(3, 33):
        prompt = list(range(start, start + 5))
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, 5:].tolist()
        told = gateway.completions.create(
            model="support", prompt=prompt, max_tokens=16, temperature=0, logprobs=0
        )
        found = told.choices[0].logprobs.tokens
        for place, token in enumerate(tokens):
            first, second = out.logits[place][0].log_softmax(-1).topk(2).values.tolist()
            if first - second <= 1e-3:  # a tie: whatever follows may differ
                excluded += len(tokens) - place
                break
            total += 1
            same += place < len(found) and found[place].strip() == WORDS[token]
    print(f"{same} of {total} greedy tokens are those of transformers and peft, {excluded} ties excluded")
    assert same >= 0.98 * total


def test_a_chat_streams_through_the_gateway(live: Deployment, gateway: openai.OpenAI) -> None:
    chunks = [
        *gateway.chat.completions.create(
            model="support",
            messages=[{"role": "user", "content": "w1 w2 w3"}],
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
    ]
    assert {chunk.model for chunk in chunks} == {"support"}
    assert chunks[-1].usage.completion_tokens >= 1
    assert any(chunk.choices and chunk.choices[0].logprobs for chunk in chunks)


@pytest.mark.parametrize(
    ("spoil", "codes"),
    [
        (with_zeros, {"no_effect"}),
        (with_wrong_prefix, {"no_effect", "load_refused"}),
        (of_another_base, {"effect_mismatch"}),
        (of_a_rank_without_room, {"load_refused"}),
    ],
)
def test_a_spoilt_adapter_is_never_served(
    deploy: Callable[..., str],
    settled: Callable[..., Deployment],
    server: Server,
    spoil: Callable[[Path], None],
    codes: set[str],
) -> None:
    found = settled(deploy("spoilt", spoil), lambda found: found.state in {"live", "failed"})
    print(spoil.__name__, found.reason)
    assert found.state == "failed"
    assert found.reason
    assert found.reason.code in codes
    with contextlib.closing(Replica(server.url)) as replica:
        assert found.id not in replica.look().adapters


def test_a_vllm_with_the_resolver_finds_a_deployments_folder_by_its_name(
    live: Deployment, server: Server, settings: Settings, adapter: Path
) -> None:
    name = f"dep_{'f' * 24}"
    shutil.copytree(settings.deployments_dir / live.id, settings.deployments_dir / name)
    rows = EffectProbe.model_validate_json((adapter / "probe.json").read_bytes()).rows
    with contextlib.closing(Replica(server.url)) as replica:
        found = replica.log_probabilities(name, rows)
        assert found == pytest.approx([row.recovered for row in rows], abs=1e-3)
        assert name in replica.look().adapters
        replica.unload(name)


def test_an_adapter_unloaded_behind_our_back_comes_back(
    live: Deployment, settled: Callable[..., Deployment], gateway: openai.OpenAI, server: Server
) -> None:
    with contextlib.closing(Replica(server.url)) as replica:
        replica.unload(live.id)
        said = gateway.completions.create(model="support", prompt=[5, 6, 7], max_tokens=4, temperature=0)
        assert said.choices[0].text
        assert live.id in replica.look().adapters


def test_a_restarted_vllm_gets_the_adapter_back(
    live: Deployment, settled: Callable[..., Deployment], gateway: openai.OpenAI, server: Server
) -> None:
    ask = {"model": "support", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
    before = gateway.completions.create(**ask).choices[0].text
    server.stop()
    settled(live.id, lambda found: found.replicas[0].state == "away")
    server.start()
    found = settled(live.id, lambda found: found.replicas[0].state == "ready")
    assert (found.state, found.reason) == ("live", None)
    assert gateway.completions.create(**ask).choices[0].text == before


@pytest.fixture
def merged(student: Path, adapter: Path, tmp_path: Path) -> Path:
    """The same adapter, merged into its student."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), adapter / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "out" / "model")
    for path in student.glob("*token*"):
        shutil.copy(path, tmp_path / "out" / "model")
    for name in ("probe.json", "report.json"):
        shutil.copy(adapter / name, tmp_path / "out")
    return tmp_path / "out"


def test_a_merged_model_is_live_once_a_vllm_is_started_as_its_launch_says(
    settings: Settings, merged: Path, tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    here = Settings(
        home=tmp_path / "home",
        model_roots=settings.model_roots,
        serve_urls=[f"http://127.0.0.1:{port}"],
        reconcile_seconds=0.5,
    )
    with contextlib.closing(open_ledger(here)) as ledger, answering(here, ledger, reconciles=True) as client:
        asked = CreateDeployment(recovery=recovered(merged, ledger, here), name="whole")
        new = prepared(asked, ledger, here, DEFAULT_TENANT)
        deployments = Deployments(ledger, here.serve_urls)
        id = deployments.add(new, 100).id
        folder, *flags = new.launch.arguments
        wait_until((here.home / folder).exists)
        assert deployments.get(id, DEFAULT_TENANT).state == "pending"
        server = Server(here.home / folder, port, tmp_path, tuple(flags))
        server.start()
        try:
            wait_until(lambda: deployments.get(id, DEFAULT_TENANT).state in {"live", "failed"})
            found = deployments.get(id, DEFAULT_TENANT)
            assert (found.kind, found.state, found.reason) == ("model", "live", None)
            ask = {"model": "whole", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
            answer = client.completions.create(**ask).choices[0].text
            assert answer.split() == greedy(merged / "model", [5, 6, 7], 8)
        finally:
            server.stop()


@torch.inference_mode()
def greedy(folder: Path, prompt: list[int], most: int) -> list[str]:
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([prompt])
    mask = torch.ones_like(ids)
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
    return [WORDS[token] for token in said[0, len(prompt) :].tolist() if token != 1]


def wait_until(holds: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)
