"""Publications, the same on every store."""

import hashlib
import io
import json

import pytest

from recoup_jobs.artifacts import collect, content_name, open_artifact, open_published, publish, save
from recoup_jobs.errors import CorruptArtifact, NotFound

PLACE = "rec_1/e1/package"

pytestmark = pytest.mark.parametrize("store", ["folder", "bucket"], indirect=True)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b'{"answer": 42}')
    return path


def opened(store, path, place=PLACE):
    return open_artifact(open_published(store, place), path)


def test_the_manifest_tells_size_and_hash_of_every_file(store, source):
    published = publish(store, PLACE, {"report.json": source, "adapter/config.json": source})
    assert [artifact.path for artifact in published] == ["adapter/config.json", "report.json"]
    assert published[1].size == 14
    assert published[1].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert open_published(store, PLACE).artifacts == published


def test_a_published_file_can_be_read_whole_and_in_part(store, source):
    publish(store, PLACE, {"adapter/config.json": source})
    found = opened(store, "adapter/config.json")
    assert json.loads(found.read_bytes()) == {"answer": 42}
    assert b"".join(found.parts(2, 8)) == b"answer"
    assert b"".join(found.parts(11)) == b"42}"


def test_equal_files_of_a_job_are_kept_once(store, source):
    publish(store, PLACE, {"a.json": source, "b.json": source})
    assert len(store.names("rec_1/content")) == 1


@pytest.mark.parametrize(
    "path", ["manifest.json", "stray.json", "../secret.json", "adapter/../report.json", ""]
)
def test_nothing_is_opened_that_the_manifest_does_not_name(store, source, path):
    publish(store, PLACE, {"report.json": source})
    store.put("rec_1/content/stray.json", io.BytesIO(b"{}"))
    with pytest.raises(NotFound):
        opened(store, path)


@pytest.mark.parametrize(
    "path", ["weights.bin", "run.py", "state.pt", "noext", "a.safetensors.pkl", "model/recipe.py"]
)
def test_a_format_that_can_carry_code_is_never_published(store, source, path):
    with pytest.raises(ValueError, match="no format that is served"):
        publish(store, PLACE, {"good.json": source, path: source})
    assert store.names("rec_1") == []


def test_the_recipe_is_the_one_script_that_is_published(store, source):
    assert [artifact.path for artifact in publish(store, PLACE, {"recipe.py": source})] == ["recipe.py"]


@pytest.mark.parametrize("path", ["/etc/a.json", "../a.json", "a//b.json", ".hidden.json"])
def test_a_path_that_is_not_plain_is_never_published(store, source, path):
    with pytest.raises(ValueError, match="plain relative path"):
        publish(store, PLACE, {path: source})


def test_publishing_again_replaces_everything(store, source):
    publish(store, PLACE, {"old.json": source})
    publish(store, PLACE, {"new.json": source})
    assert [artifact.path for artifact in open_published(store, PLACE).artifacts] == ["new.json"]


def test_a_failed_publication_leaves_the_former_one(store, source, tmp_path):
    publish(store, PLACE, {"report.json": source})
    with pytest.raises(FileNotFoundError):
        publish(store, PLACE, {"a.json": source, "b.json": tmp_path / "missing"})
    assert [artifact.path for artifact in open_published(store, PLACE).artifacts] == ["report.json"]


def test_what_an_overtaken_worker_publishes_touches_nothing_of_its_successors(store, source, tmp_path):
    publish(store, "rec_1/e2/package", {"report.json": source})
    other = tmp_path / "other"
    other.write_bytes(b"{}")
    publish(store, PLACE, {"report.json": other, "more.json": other})
    assert opened(store, "report.json", "rec_1/e2/package").read_bytes() == source.read_bytes()


def test_where_nothing_was_published_nothing_is_found(store):
    with pytest.raises(NotFound, match="published no artifacts"):
        open_published(store, PLACE)


@pytest.mark.parametrize("spoilt", [b'{"answer": 43}', b'{"answer"', b""])
def test_a_file_that_is_not_what_was_published_is_never_read_to_its_end(store, source, spoilt):
    (artifact,) = publish(store, PLACE, {"report.json": source})
    store.put(content_name("rec_1", artifact), io.BytesIO(spoilt))
    found, seen = opened(store, "report.json"), []
    with pytest.raises(CorruptArtifact, match="not in the artifact store as its manifest says"):
        seen.extend(found.parts())
    assert seen == []


def test_a_file_that_is_gone_is_told(store, source):
    (artifact,) = publish(store, PLACE, {"report.json": source})
    store.remove([content_name("rec_1", artifact)])
    with pytest.raises(CorruptArtifact):
        opened(store, "report.json").read_bytes()


def test_what_was_published_below_a_prefix_becomes_a_folder(store, source, tmp_path):
    publish(store, PLACE, {"adapter/a.json": source, "adapter/deep/b.json": source, "adapters.json": source})
    save(open_published(store, PLACE), "adapter", tmp_path / "placed")
    found = {
        path.relative_to(tmp_path / "placed").as_posix() for path in (tmp_path / "placed").rglob("*.json")
    }
    assert found == {"a.json", "deep/b.json"}
    assert (tmp_path / "placed" / "deep" / "b.json").read_bytes() == source.read_bytes()


def test_a_folder_of_files_of_which_one_is_spoilt_is_not_made(store, source, tmp_path):
    (artifact,) = publish(store, PLACE, {"adapter/a.json": source})
    store.put(content_name("rec_1", artifact), io.BytesIO(b"spoilt"))
    with pytest.raises(CorruptArtifact):
        save(open_published(store, PLACE), "adapter", tmp_path / "placed" / "here")
    assert [*(tmp_path / "placed").iterdir()] == []


def test_what_a_job_left_beside_its_publication_is_removed(store, source, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"{}")
    publish(store, PLACE, {"report.json": other})
    publish(store, "rec_1/e2/package", {"report.json": source})
    store.put("rec_1/content/.draft", io.BytesIO(b"half"))
    publish(store, "rec_11/e1/package", {"report.json": other})
    collect(store, "rec_1", ["rec_1/e1/preflight", "rec_1/e2/package"])
    assert opened(store, "report.json", "rec_1/e2/package").read_bytes() == source.read_bytes()
    assert len(store.names("rec_1")) == 2
    assert len(store.names("rec_11")) == 2


def test_a_job_that_published_nothing_keeps_nothing(store, source):
    publish(store, PLACE, {"report.json": source})
    collect(store, "rec_1", ["rec_1/e1/preflight"])
    assert store.names("rec_1") == []
