import hashlib
import json

import pytest

from recoup_jobs.artifacts import open_artifact, publish, read_manifest
from recoup_jobs.errors import NotFound


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b'{"answer": 42}')
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "job" / "artifacts"


def test_the_manifest_tells_size_and_hash_of_every_file(folder, source):
    published = publish(folder, {"report.json": source, "adapter/config.json": source})
    assert [artifact.path for artifact in published] == ["adapter/config.json", "report.json"]
    assert published[1].size == 14
    assert published[1].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert read_manifest(folder) == published


def test_a_published_file_can_be_opened(folder, source):
    publish(folder, {"adapter/config.json": source})
    assert json.loads(open_artifact(folder, "adapter/config.json").read_text()) == {"answer": 42}


@pytest.mark.parametrize(
    "path", ["manifest.json", "stray.json", "../secret.json", "adapter/../report.json", ""]
)
def test_nothing_is_opened_that_the_manifest_does_not_name(folder, source, path):
    publish(folder, {"report.json": source})
    (folder / "stray.json").write_text("{}")
    (folder.parent / "secret.json").write_text("{}")
    with pytest.raises(NotFound):
        open_artifact(folder, path)


@pytest.mark.parametrize(
    "path", ["weights.bin", "run.py", "state.pt", "noext", "a.safetensors.pkl", "model/recipe.py"]
)
def test_a_format_that_can_carry_code_is_never_published(folder, source, path):
    with pytest.raises(ValueError, match="no format that is served"):
        publish(folder, {path: source})
    assert not folder.exists()


def test_the_recipe_is_the_one_script_that_is_published(folder, source):
    assert [artifact.path for artifact in publish(folder, {"recipe.py": source})] == ["recipe.py"]


@pytest.mark.parametrize("path", ["/etc/a.json", "../a.json", "a//b.json", ".hidden.json", "manifest.json"])
def test_a_path_that_leaves_the_folder_is_never_published(folder, source, path):
    with pytest.raises(ValueError, match="plain relative path"):
        publish(folder, {path: source})


def test_publishing_again_replaces_everything(folder, source):
    publish(folder, {"old.json": source})
    publish(folder, {"new.json": source})
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "new.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["artifacts"]


def test_a_failed_publication_leaves_the_former_one(folder, source, tmp_path):
    publish(folder, {"report.json": source})
    with pytest.raises(FileNotFoundError):
        publish(folder, {"a.json": source, "b.json": tmp_path / "missing"})
    assert [artifact.path for artifact in read_manifest(folder)] == ["report.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["artifacts"]


def test_where_nothing_was_published_nothing_is_found(folder):
    with pytest.raises(NotFound, match="published no artifacts"):
        read_manifest(folder)
