"""The laws of a store, for a folder and for a bucket on a server of its own."""

import hashlib
import io
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from recoup_jobs.errors import Unavailable
from recoup_jobs.settings import Settings
from recoup_jobs.stores import FolderStore, open_store

ON_BOTH = pytest.mark.parametrize("store", ["folder", "bucket"], indirect=True)
LARGE = bytes(range(256)) * (80 << 10)
"""20 MiB: three parts of an upload."""


def read(store, name, start=0, stop=1 << 40):
    return b"".join(store.read(name, start, stop))


@ON_BOTH
@pytest.mark.parametrize("content", [b"", b"x", LARGE], ids=["nothing", "a byte", "20 MiB"])
def test_what_was_put_is_read(store, content):
    store.put("job/content/a", io.BytesIO(content))
    assert hashlib.sha256(read(store, "job/content/a")).digest() == hashlib.sha256(content).digest()


@ON_BOTH
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (5, 5), (5, 1 << 40), (1 << 30, 1 << 31), ((8 << 20) - 1, (8 << 20) + 2)]
)
def test_a_range_is_a_slice(store, start, stop):
    store.put("a", io.BytesIO(LARGE))
    assert read(store, "a", start, stop) == LARGE[start:stop]


@ON_BOTH
def test_what_was_put_last_is_there(store):
    for content in (b"first", b"second"):
        store.put("a", io.BytesIO(content))
    assert (read(store, "a"), store.names("")) == (b"second", ["a"])


@ON_BOTH
def test_names_are_those_below_the_folder_and_no_others(store):
    for name in ("job/b", "job/content/a", "job2/c"):
        store.put(name, io.BytesIO(b"x"))
    assert store.names("job") == ["job/b", "job/content/a"]
    assert store.names("job3") == []


@ON_BOTH
def test_what_is_removed_is_gone_and_nothing_else(store):
    for name in ("job/a", "job/content/b", "other"):
        store.put(name, io.BytesIO(b"x"))
    store.remove(["job/a", "job/content/b", "job/never"])
    store.remove([])
    assert (store.names("job"), read(store, "other")) == ([], b"x")


@ON_BOTH
def test_what_was_never_put_is_not_found(store):
    with pytest.raises(FileNotFoundError):
        read(store, "job/content/a")


def test_a_put_that_breaks_leaves_the_former_and_no_draft(tmp_path):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the disk is gone")

    store = FolderStore(tmp_path)
    store.put("job/a", io.BytesIO(b"former"))
    with pytest.raises(OSError, match="gone"):
        store.put("job/a", Broken())
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["a"]
    assert read(store, "job/a") == b"former"


KILLED = """
import sys, time
from pathlib import Path
from recoup_jobs.stores import FolderStore

class Slow:
    def read(self, size):
        print("reading", flush=True)
        time.sleep(60)

FolderStore(Path(sys.argv[1])).put("job/a", Slow())
"""


def test_a_put_that_is_killed_leaves_a_draft_that_no_name_shows_as_whole(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"reading\n"
    writer.kill()
    writer.communicate()
    store = FolderStore(tmp_path)
    (draft,) = store.names("job")
    assert draft.startswith("job/.a.")
    store.remove([draft])
    assert [*tmp_path.iterdir()] == []


def test_a_bucket_below_another_prefix_is_another_store(settings, bucket):
    ours, theirs = (
        open_store(settings.model_copy(update=bucket | {"artifacts_url": bucket["artifacts_url"] + end}))
        for end in ("/a", "/b")
    )
    ours.put("x", io.BytesIO(b"1"))
    assert (ours.names(""), theirs.names("")) == (["x"], [])


def test_a_wrong_secret_and_a_server_that_is_away_are_unavailable(settings, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    stranger = open_store(settings.model_copy(update=bucket))
    away = open_store(settings.model_copy(update=bucket | {"artifacts_endpoint": "http://127.0.0.1:9"}))
    began = time.monotonic()
    for store in (stranger, away):
        with pytest.raises(Unavailable, match="the artifact store does not answer"):
            store.put("a", io.BytesIO(b"x"))
        with pytest.raises(Unavailable):
            read(store, "a")
    assert time.monotonic() - began < 60


def test_the_default_is_a_folder_below_home(settings):
    open_store(settings).put("job/a", io.BytesIO(b"x"))
    assert (settings.home / "artifacts" / "job" / "a").read_bytes() == b"x"


@pytest.mark.parametrize(
    "url", ["https://bucket", "s3://", "s3://Bucket", "s3://bucket/../other", "s3://key:secret@bucket/a"]
)
def test_a_url_that_names_no_bucket_is_refused(url):
    with pytest.raises(ValidationError, match="artifacts_url"):
        Settings(artifacts_url=url)
