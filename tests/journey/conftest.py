"""A real installation on loopback: Valkey, API and a worker process, driven by the SDK alone."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from recoup import Client
from recoup_jobs.settings import Settings
from recoup_server.embedded import running

WORDS = [f"w{number}" for number in range(120)]
KINDS = ("add", "name", "sort", "find", "tell")


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), lease_seconds=5, grace_seconds=5)


@pytest.fixture(scope="session")
def client(settings: Settings, free_port: int) -> Iterator[Client]:
    with running(settings, "127.0.0.1", free_port) as installation, Client(installation.url) as client:
        yield client


@pytest.fixture(scope="session")
def models(settings: Settings) -> Path:
    """The folder of a random teacher of two layers, `teacher`, and a noisy copy, `student`."""
    root = settings.model_roots[0]
    root.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "</s>", "<unk>"]
    words = Tokenizer(WordLevel({word: at for at, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    set_seed(0)
    teacher = LlamaForCausalLM(config)
    for weight in teacher.parameters():
        weight.data.mul_(4.0)
    teacher.save_pretrained(root / "teacher")
    for weight in teacher.parameters():
        weight.data.add_(weight.data.std() * 0.4 * weight.data.new_empty(weight.shape).normal_())
    teacher.save_pretrained(root / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[int], Path]:
    """Writes so many prompts of five kinds as a data set."""

    def write(count: int) -> Path:
        rows = [
            {"prompt": f"{WORDS[at % 120]} {WORDS[at * 7 % 120]} {WORDS[at // 120]}", "kind": KINDS[at % 5]}
            for at in range(count)
        ]
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write
